"""The families of the Llama kind in transformers, and Mamba: one declarative entry each, read in both directions.

A `Family` says which of their config fields are which of ours, what it always has, and which of their tensors are the
rows of ours. ``from_hugging_face`` and ``to_hugging_face`` walk the same entry, so a config that goes out comes back as
it was, or is refused: nothing is dropped on the way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from open_lm_linear import attention
from open_lm_linear.architecture import ROTARY_SCALINGS, ModelConfig
from open_lm_linear.cli import UserError, nearest

KeyTable = Mapping[str, tuple[str, ...]]
Values = dict[str, Any]


def _layer(*names: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{{i}}.{name}" for name in names)


def _qkv(kind: str) -> tuple[str, ...]:
    return _layer(*(f"self_attn.{x}_proj.{kind}" for x in "qkv"))


# Ours -> theirs; several of theirs are the rows of one of ours, in this order. {i} is the layer. Rows of which a model
# has no parameter (biases, head norms) lie idle.
LLAMA_KEYS: KeyTable = {
    "tok_embeddings.weight": ("model.embed_tokens.weight",),
    "layers.{i}.attention.in_proj.weight": _qkv("weight"),
    "layers.{i}.attention.in_proj.bias": _qkv("bias"),
    "layers.{i}.attention.out_proj.weight": _layer("self_attn.o_proj.weight"),
    "layers.{i}.attention.out_proj.bias": _layer("self_attn.o_proj.bias"),
    "layers.{i}.attention.q_norm.weight": _layer("self_attn.q_norm.weight"),
    "layers.{i}.attention.k_norm.weight": _layer("self_attn.k_norm.weight"),
    "layers.{i}.feed_forward.w12.weight": _layer("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "layers.{i}.feed_forward.w12.bias": _layer("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "layers.{i}.feed_forward.w3.weight": _layer("mlp.down_proj.weight"),
    "layers.{i}.feed_forward.w3.bias": _layer("mlp.down_proj.bias"),
    "layers.{i}.attention_norm.weight": _layer("input_layernorm.weight"),
    "layers.{i}.ffn_norm.weight": _layer("post_attention_layernorm.weight"),
    "norm.weight": ("model.norm.weight",),
    "output.weight": ("lm_head.weight",),
}

_FUSED: KeyTable = {
    "layers.{i}.attention.in_proj.weight": _layer("self_attn.qkv_proj.weight"),
    "layers.{i}.feed_forward.w12.weight": _layer("mlp.gate_up_proj.weight"),
}
_POST_NORMS: KeyTable = {
    "layers.{i}.attention_norm.weight": (),
    "layers.{i}.ffn_norm.weight": (),
    "layers.{i}.attention_post_norm.weight": _layer("post_attention_layernorm.weight"),
    "layers.{i}.ffn_post_norm.weight": _layer("post_feedforward_layernorm.weight"),
}
_BOTH_NORMS: KeyTable = {
    "layers.{i}.attention_post_norm.weight": _layer("post_attention_layernorm.weight"),
    "layers.{i}.ffn_norm.weight": _layer("pre_feedforward_layernorm.weight"),
    "layers.{i}.ffn_post_norm.weight": _layer("post_feedforward_layernorm.weight"),
}

_MIXER = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
_MAMBA_KEYS: KeyTable = {
    **{key: () for key in LLAMA_KEYS if ".feed_forward." in key or key.split(".")[-2] in ("q_norm", "k_norm")},
    **{
        f"layers.{{i}}.attention.{name}": (f"backbone.layers.{{i}}.mixer.{name}",)
        for name in ("A_log", "D", *(f"{part}.{kind}" for part in _MIXER for kind in ("weight", "bias")))
    },
    "tok_embeddings.weight": ("backbone.embeddings.weight",),
    "layers.{i}.attention_norm.weight": ("backbone.layers.{i}.norm.weight",),
    "layers.{i}.ffn_norm.weight": (),
    "norm.weight": ("backbone.norm_f.weight",),
}

# Theirs -> ours, the same value. Where one of theirs is several of ours, all of them hold it.
COMMON: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_dim",),
    "num_hidden_layers": ("n_layers",),
    "num_attention_heads": ("n_heads",),
    "num_key_value_heads": ("n_heads_kv",),
    "intermediate_size": ("intermediate_dim_ffn",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("seq_len",),
    "rms_norm_eps": ("norm_eps",),
    "tie_word_embeddings": ("weight_tying",),
}
_ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "attn_out_bias")}
_MLP_BIAS = {"mlp_bias": ("ffn_bias",)}
_SWITCHES = ("tie_word_embeddings", *_ATTENTION_BIAS, *_MLP_BIAS)  # null stands for false

ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"}

Read = Callable[[Values, str], Values]  # their fields, the source's name -> ours
Write = Callable[[ModelConfig], Values]  # our config -> their fields


@dataclass(frozen=True)
class Trait:
    """What more than a renaming separates some of their fields from ours: two functions, inverse to each other."""

    read: Read
    write: Write


@dataclass(frozen=True)
class Family:
    """One model type of transformers.

    ``fields`` are renamings beside `COMMON`, () for those of it that the family does not have; ``fixed`` is what every
    model of the family has in our terms; ``refused`` names fields with the only values that we can represent.
    """

    model_type: str
    architecture: str
    traits: tuple[Trait, ...]
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    keys: KeyTable = field(default_factory=dict)
    refused: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def renamed(self) -> dict[str, tuple[str, ...]]:
        """Their field -> ours, of all that are only renamed."""
        return {theirs: ours for theirs, ours in {**COMMON, **self.fields}.items() if ours}

    def table(self, layers: int) -> dict[str, tuple[str, ...]]:
        """Our key -> their keys, every layer written out."""
        return expand({**LLAMA_KEYS, **self.keys}, layers)


def expand(table: KeyTable, layers: int) -> dict[str, tuple[str, ...]]:
    """The table with every layer written out: our key -> their keys."""
    out = {}
    for ours, theirs in table.items():
        for i in range(layers if theirs else 0) if "{i}" in ours else (0,):
            out[ours.format(i=i)] = tuple(t.format(i=i) for t in theirs)
    return out


# ---- traits --------------------------------------------------------------------------------------------------------


def _read_heads(values: Values, _: str) -> Values:
    head_dim = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    return {"qk_head_dim": head_dim, "v_head_dim": head_dim}


def _write_heads(config: ModelConfig) -> Values:
    return {"head_dim": config.qk_dim} if config.qk_dim == config.v_dim else {}


HEADS = Trait(_read_heads, _write_heads)


def _activation(name: str) -> Trait:
    def read(values: Values, source: str) -> Values:
        if values.get(name) not in ACTIVATIONS:
            raise _cannot(source, name, values.get(name))
        return {"ffn_type": ACTIVATIONS[values[name]]}

    def write(config: ModelConfig) -> Values:
        kind = "swiglu" if config.ffn_type == "swiglu_torch" else config.ffn_type  # two names of one function
        theirs = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == kind), None)
        return {} if theirs is None else {name: theirs}

    return Trait(read, write)


def read_rope(rope: Mapping[str, Any], seq_len: int, source: str, name: str = "rope_parameters") -> Values:
    """Base and scaling of one of transformers' rope dictionaries in our terms."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    ours: Values = {"rotary_base_frequency": float(rope.get("rope_theta") or 10000.0)}
    if kind == "default":
        return ours
    if kind == "linear":
        return ours | {"rotary_scale": float(rope["factor"])}
    if kind not in ROTARY_SCALINGS:
        raise _cannot(source, f"{name}.rope_type", kind)
    needed, optional = ROTARY_SCALINGS[kind]
    scaling = {key: rope[key] for key in (*needed, *optional) if rope.get(key) is not None}
    original = rope.get("original_max_position_embeddings") or seq_len
    # dynamic scales from the context of the config itself; the others say what they were trained on
    scaling["original_max_position_embeddings"] = seq_len if kind == "dynamic" else original
    if kind == "yarn":
        scaling.setdefault("factor", seq_len / original)
    if kind == "longrope" and "attention_factor" not in scaling:
        factor = rope.get("factor") or seq_len / original
        scaling["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return ours | {"rotary_scaling": {"rope_type": kind, **scaling}}


def write_rope(config: ModelConfig) -> Values:
    """The inverse of ``read_rope``."""
    rope: Values = {"rope_theta": config.rotary_base_frequency, "rope_type": "default"}
    if config.rotary_scaling is not None:
        rope |= config.rotary_scaling
        if rope["rope_type"] == "dynamic":
            del rope["original_max_position_embeddings"]
    elif config.rotary_scale != 1:
        rope |= {"rope_type": "linear", "factor": config.rotary_scale}
    return rope


def _read_one_rope(values: Values, source: str) -> Values:
    rope = values.get("rope_parameters") or {}
    if rope.get("partial_rotary_factor", 1.0) != 1:
        raise _cannot(source, "rope_parameters.partial_rotary_factor", rope["partial_rotary_factor"])
    return read_rope(rope, values["max_position_embeddings"], source)


ROPE = Trait(_read_one_rope, lambda config: {"rope_parameters": write_rope(config)})


def _read_partial_rope(values: Values, source: str) -> Values:
    rope = values["rope_parameters"]
    ours = read_rope(rope, values["max_position_embeddings"], source)
    return ours | {"partial_rotary_factor": float(rope.get("partial_rotary_factor", 1.0))}


def _write_partial_rope(config: ModelConfig) -> Values:
    rope = write_rope(config) | {"partial_rotary_factor": config.partial_rotary_factor}
    if (original := rope.pop("original_max_position_embeddings", None)) is None:
        return {"rope_parameters": rope}
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


PARTIAL_ROPE = Trait(_read_partial_rope, _write_partial_rope)


def _read_two_ropes(values: Values, source: str) -> Values:
    ropes = values["rope_parameters"]
    local = ropes["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise _cannot(source, "rope_parameters.sliding_attention.rope_type", local["rope_type"])
    sliding = tuple(i for i, kind in enumerate(values["layer_types"]) if kind == "sliding_attention")
    ours = read_rope(ropes["full_attention"], values["max_position_embeddings"], source)
    return ours | {"rotary_local_base_frequency": float(local["rope_theta"]), "rotary_local_layers": sliding}


def _write_two_ropes(config: ModelConfig) -> Values:
    if config.rotary_local_base_frequency is None:
        return {}
    local = {"rope_type": "default", "rope_theta": config.rotary_local_base_frequency}
    return {"rope_parameters": {"full_attention": write_rope(config), "sliding_attention": local}}


TWO_ROPES = Trait(_read_two_ropes, _write_two_ropes)

WINDOW = Trait(
    lambda values, _: {"sliding_window": values.get("sliding_window")},
    lambda config: {"sliding_window": config.sliding_window},
)


def _read_layer_types(values: Values, source: str) -> Values:
    for kind in values["layer_types"]:
        if kind not in ("sliding_attention", "full_attention"):
            raise _cannot(source, "layer_types", kind)
    layers = tuple(i for i, kind in enumerate(values["layer_types"]) if kind == "sliding_attention")
    if not layers:
        return {}
    if not values.get("sliding_window"):
        raise _cannot(source, "sliding_window", values.get("sliding_window"))
    return {"sliding_window": values["sliding_window"], "sliding_window_layers": layers}


def _write_layer_types(config: ModelConfig) -> Values:
    slides = [config.window(i) is not None for i in range(config.n_layers)]
    return {
        "sliding_window": config.sliding_window,
        "use_sliding_window": any(slides),
        "layer_types": ["sliding_attention" if s else "full_attention" for s in slides],
    }


LAYER_TYPES = Trait(_read_layer_types, _write_layer_types)

SKIPPED_ROTARY = Trait(
    lambda values, _: {"no_rotary_layers": tuple(i for i, on in enumerate(values["no_rope_layers"]) if not on)},
    lambda config: {"no_rope_layers": [int(i not in config.no_rotary_layers) for i in range(config.n_layers)]},
)
_MAMBA_OPTIONS = {"state_size": "d_state", "conv_kernel": "d_conv", "expand": "expand", "time_step_rank": "dt_rank"}
_MAMBA_OPTIONS["use_conv_bias"] = "conv_bias"


def _read_mamba(values: Values, source: str) -> Values:
    if values["intermediate_size"] != values["expand"] * values["hidden_size"]:
        raise _cannot(source, "intermediate_size", values["intermediate_size"])
    options = {ours: values[theirs] for theirs, ours in _MAMBA_OPTIONS.items()}
    return {"attn_options": options, "seq_len": values.get("max_position_embeddings") or ModelConfig.seq_len}


def _write_mamba(config: ModelConfig) -> Values:
    options = config.attn_options
    return {theirs: options[ours] for theirs, ours in _MAMBA_OPTIONS.items() if ours in options}


MAMBA = Trait(_read_mamba, _write_mamba)
SCALED_EMBEDDING = Trait(lambda values, _: {"embedding_scale": values["hidden_size"] ** 0.5}, lambda _: {})

# ---- the families --------------------------------------------------------------------------------------------------

_SILU, _HIDDEN_ACTIVATION = _activation("hidden_act"), _activation("hidden_activation")
_RMS = {"model_norm": "rms_norm"}
_GEMMA: Values = {"model_norm": "gemma_rms_norm", "norm_placement": "both"}
_GEMMA_FIELDS = {
    **_ATTENTION_BIAS,
    "query_pre_attn_scalar": ("query_pre_attn_scalar",),
    "final_logit_softcapping": ("logit_softcap",),
}
_PER_HEAD = {"qk_norm": True, "qk_norm_per_head": True}

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", (HEADS, ROPE, _SILU), {**_ATTENTION_BIAS, **_MLP_BIAS}, _RMS),
        Family("mistral", "MistralForCausalLM", (HEADS, ROPE, _SILU, WINDOW), {}, _RMS),
        Family("qwen2", "Qwen2ForCausalLM", (HEADS, ROPE, _SILU, LAYER_TYPES), {}, {**_RMS, "qkv_bias": True}),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            (HEADS, ROPE, _SILU, LAYER_TYPES),
            _ATTENTION_BIAS,
            {**_RMS, **_PER_HEAD},
        ),
        Family(
            "smollm3",
            "SmolLM3ForCausalLM",
            (HEADS, ROPE, _SILU, LAYER_TYPES, SKIPPED_ROTARY),
            {**_ATTENTION_BIAS, **_MLP_BIAS},
            _RMS,
        ),
        Family("phi3", "Phi3ForCausalLM", (HEADS, PARTIAL_ROPE, _SILU, WINDOW), {}, _RMS, _FUSED),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            (HEADS, ROPE, _SILU),
            _ATTENTION_BIAS,
            {**_RMS, "qk_norm": True, "norm_placement": "after"},
            _POST_NORMS,
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            (HEADS, ROPE, _HIDDEN_ACTIVATION, LAYER_TYPES, SCALED_EMBEDDING),
            {**_GEMMA_FIELDS, "attn_logit_softcapping": ("attn_logit_softcap",)},
            _GEMMA,
            _BOTH_NORMS,
            {"use_bidirectional_attention": (None, False)},
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            (HEADS, TWO_ROPES, _HIDDEN_ACTIVATION, LAYER_TYPES, SCALED_EMBEDDING),
            _GEMMA_FIELDS,
            {**_GEMMA, **_PER_HEAD},
            _BOTH_NORMS,
            {"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},
        ),
        Family(
            "mamba",
            "MambaForCausalLM",
            (MAMBA,),
            {
                **dict.fromkeys(
                    ("num_attention_heads", "num_key_value_heads", "intermediate_size", "rms_norm_eps"), ()
                ),
                "layer_norm_epsilon": ("norm_eps",),
                "use_bias": ("qkv_bias", "attn_out_bias"),
            },
            {**_RMS, "attn_name": "mamba", "ffn_type": "none", "positional_embedding_type": "none", "n_heads": 1},
            _MAMBA_KEYS,
            {"hidden_act": ("silu",)},
        ),
    )
}

ATTENTIONS = {family.fixed.get("attn_name", "softmax") for family in FAMILIES.values()}
"""The attentions of which transformers has models."""

# What every config has that does not change what a model computes, for naming the fields that do.
_INERT = {
    *("architectures", "auto_map", "attention_dropout", "dtype", "hidden_dropout", "initializer_range", "model_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "transformers_version", "use_cache"),
}


def _cannot(source: str, name: str, value: Any) -> UserError:
    return UserError(f"{source}: the config field {name} = {value!r} cannot be represented.")


def from_hugging_face(values: Mapping[str, Any], *, source: str) -> ModelConfig:
    """A ``config.json`` of one of the `FAMILIES` in our terms. transformers fills in what the file leaves out.

    Raises:
        UserError: another model type (with the supported ones and the fields that stand in the way), a missing field,
            or the first field that we cannot represent.
    """
    kind = str(values.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{source}: {_unsupported(kind, values)}")
    family = FAMILIES[kind]
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
        if name in family.renamed and name not in values:
            raise UserError(f"{source}: the config field {name} is missing.")
    full = _completed(kind, values, source)
    for name, allowed in {"quantization_config": (None,), **family.refused}.items():
        if full.get(name) not in allowed:
            raise _cannot(source, name, full[name])
    ours: Values = dict(family.fixed)
    for theirs, names in family.renamed.items():
        value = full.get(theirs)
        ours |= dict.fromkeys(names, bool(value) if theirs in _SWITCHES else value)
    for trait in family.traits:
        ours |= trait.read(full, source)
    return ModelConfig(**ours)


def _completed(kind: str, values: Mapping[str, Any], source: str) -> Values:
    """The config as transformers understands it: defaults filled in, older spellings renewed."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(kind, **{k: v for k, v in values.items() if k != "model_type"}).to_dict()
    except Exception as error:  # it raises many kinds for one fact: a value that its model could not have
        raise UserError(f"{source}: transformers refuses this config: {' '.join(str(error).split())[:300]}") from error


def _unsupported(kind: str, values: Mapping[str, Any]) -> str:
    known = {*COMMON, *_INERT, "head_dim", "hidden_act", "rope_theta", "rope_parameters", "rope_scaling"}
    known |= {name for family in FAMILIES.values() for name in (*family.fields, *family.refused)}
    known |= {"sliding_window", "layer_types", "use_sliding_window", "max_window_layers", "no_rope_layers"}
    odd = [name for name in values if name not in known and not name.startswith("_")]
    why = f" Its config fields {', '.join(odd[:6])} have no place in our model." if odd else ""
    return f"model_type {kind!r} is not supported; supported: {nearest(kind, FAMILIES)}.{why}"


def to_hugging_face(config: ModelConfig, preferred: str | None = None) -> tuple[Family, Values]:
    """A model's config as a ``config.json``, of the first family that can say all of it.

    Raises:
        UserError: no family can.
    """
    config = attention.resolve(config.attn_name).complete(config)
    names = [preferred, *FAMILIES] if preferred in FAMILIES else list(FAMILIES)
    for name in names:
        family = FAMILIES[str(name)]
        values = _written(family, config)
        try:
            back = from_hugging_face(values, source=family.model_type)
        except UserError:
            continue
        if _plain(back) == _plain(config):
            return family, values
    raise UserError(
        f"no family of transformers ({', '.join(FAMILIES)}) has this architecture: write it with --format openlm."
    )


def _written(family: Family, config: ModelConfig) -> Values:
    values: Values = {"model_type": family.model_type, "architectures": [family.architecture]}
    for theirs, names in family.renamed.items():
        values[theirs] = getattr(config, names[0])
    spelt: Values = {"num_key_value_heads": config.kv_heads, "intermediate_size": config.ffn_dim}
    spelt["query_pre_attn_scalar"] = config.query_pre_attn_scalar or config.qk_dim
    values |= {name: value for name, value in spelt.items() if name in values}
    for trait in family.traits:
        values |= trait.write(config)
    return values


def _plain(config: ModelConfig) -> Values:
    """A config with every default spelt out and one name for what has two, so that equal means equal."""
    slides = [config.window(i) for i in range(config.n_layers)]
    same: Values = {
        "n_heads_kv": config.kv_heads,
        "qk_head_dim": config.qk_dim,
        "v_head_dim": config.v_dim,
        "intermediate_dim_ffn": config.ffn_dim,
        "ffn_type": "swiglu" if config.ffn_type == "swiglu_torch" else config.ffn_type,
        "query_pre_attn_scalar": config.query_pre_attn_scalar or config.qk_dim,
        "attn_name": attention.canonical(config.attn_name),
        "sliding_window": None,
        "sliding_window_layers": None,
    }
    config = attention.resolve(config.attn_name).complete(config)
    return dataclasses.asdict(dataclasses.replace(config, **same)) | {"windows": slides}


def config_from_own(values: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Our exported ``config.json``: OpenLM's flat keys among those that Hugging Face adds."""
    options = attention.resolve(str(values.get("attn_name"))).Config
    known = {f.name for cls in (ModelConfig, options) for f in dataclasses.fields(cls)}
    return ModelConfig.from_json({k: v for k, v in values.items() if k in known}, source=source)
