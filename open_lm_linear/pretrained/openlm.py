"""What OpenLM and linear_open_lm write: ``.pt`` files, ``params.txt`` two folders up, and Hugging Face folders."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig, shipped
from open_lm_linear.cli import UserError
from open_lm_linear.pretrained.readers import Reader

# Its Hugging Face config's names -> those of its JSON.
_RENAMED = {"dim": "hidden_dim", "norm_type": "model_norm", "apply_qk_norm": "qk_norm"}

_SHARED = (
    *("ffn_type", "n_heads", "n_layers", "norm_eps", "positional_embedding_type", "post_embed_norm"),
    *("rotary_base_frequency", "rotary_scale", "seq_len", "vocab_size", "weight_tying"),
)
_ATTENTIONS = {"linear": "linear_attn", "softmax": "auto"}
_NO_EXPERTS = {
    "moe_capacity_factor": 1.25,
    "moe_expert_model_parallelism": False,
    "moe_freq": 0,
    "moe_loss_weight": 0.1,
    "moe_num_experts": None,
    "moe_top_k": 2,
    "moe_weight_parallelism": False,
}


def config_from_folder(values: Mapping[str, Any], reader: Reader, *, source: str) -> ModelConfig:
    """A ``config.json`` of ``model_type: openlm``. Key-value heads that it leaves out are counted in the weights."""
    config = _config_from_values(values, source)
    key = "layers.0.attention.in_proj.weight"
    if values.get("n_heads_kv") is None and key in reader.names():
        rest = reader.shape(key)[0] - config.n_heads * config.qk_dim
        config = dataclasses.replace(config, n_heads_kv=max(1, rest // (config.qk_dim + config.v_dim)))
    return config


def _config_from_values(values: Mapping[str, Any], source: str) -> ModelConfig:
    values = {_RENAMED.get(key, key): value for key, value in values.items()}
    values.setdefault("attn_name", "linear")
    own = {f.name for f in dataclasses.fields(ModelConfig)} - {"attn_options"}
    options = {f.name for f in dataclasses.fields(attention.resolve(values["attn_name"]).Config)}
    config = ModelConfig.from_json(
        {key: value for key, value in values.items() if key in own | options or key.startswith("moe_")}, source=source
    )
    return attention.resolve(config.attn_name).from_openlm(config)


def config_to_folder(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The ``config.json`` of ``model_type: openlm`` for a model of ours, the other way round.

    Args:
        dtype: of the weights, such as ``float32``.

    Raises:
        UserError: a model that the reference cannot hold or cannot run, by the field.
    """
    config = dataclasses.replace(config, attn_name=attention.canonical(config.attn_name))
    config = attention.resolve(config.attn_name).complete(config)
    options = config.attn_options
    values: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in _RENAMED.items()}
    for name in _SHARED:
        values[name] = getattr(config, name)
    values |= {
        "architectures": ["OpenLMForCausalLM"],
        "attn_name": _ATTENTIONS.get(config.attn_name, config.attn_name),
        "decay_start": options.get("decay_start"),
        "dtype": dtype,
        "intermediate_dim_ffn": config.ffn_dim,
        "model_type": "openlm",
        "n_heads_kv": config.kv_heads,
        "qk_head_dim": options.get("feature_dim", config.qk_dim),
        "use_decay": options.get("use_decay", False),
        "use_retnet_slopes": options.get("use_retnet_slopes", False),
        "v_head_dim": config.v_dim,
        **_NO_EXPERTS,
    }
    if config.rotary_rounding != "none":  # it rounds anyway; who reads the folder with our loader must know
        values["rotary_rounding"] = config.rotary_rounding
    _refuse_what_it_lacks(config, _config_from_values(values, "config.json"))
    _refuse_what_it_cannot_run(config, values["qk_head_dim"])
    return values


def _refuse_what_it_lacks(config: ModelConfig, again: ModelConfig) -> None:
    """Raises UserError for a field that does not come back from the reference's config."""
    wanted, found = _effective(config), _effective(attention.resolve(again.attn_name).complete(again))
    for name in reversed(wanted):  # options of the attention, which say most, come last
        if found.get(name) != wanted[name]:
            raise UserError(f"linear_open_lm has no place for {name} {wanted[name]!r}: export with --format hf.")


def _effective(config: ModelConfig) -> dict[str, Any]:
    """The config's JSON, defaults that depend on others spelt out, without options that say nothing here."""
    values = config.to_json() | {
        "attn_name": attention.canonical(config.attn_name),
        "intermediate_dim_ffn": config.ffn_dim,
        "n_heads_kv": config.kv_heads,
        "qk_head_dim": config.qk_dim,
        "v_head_dim": config.v_dim,
    }
    idle = ["feature_map_init"] if config.qk_norm else ["feature_map_init", "qk_norm_at"]
    return {name: value for name, value in values.items() if name not in idle}


def _refuse_what_it_cannot_run(config: ModelConfig, qk_head_dim: int) -> None:
    """Raises UserError for a model that its config can hold and its code crashes on or computes otherwise."""
    options, layout = config.attn_options, config.positional_embedding_type
    turned_otherwise = config.rotary_base_frequency != 10000 or config.rotary_scale != 1
    reasons = {
        f"it cannot compute the default decays of {config.n_heads} heads, which is no power of two": (
            options.get("use_decay") and not options["use_retnet_slopes"] and config.n_heads & (config.n_heads - 1)
        ),
        "its qk_norm crashes with fewer key-value heads in softmax attention": (
            config.attn_name == "softmax" and config.qk_norm and config.kv_heads != config.n_heads
        ),
        f"its {layout} ignores rotary_base_frequency and rotary_scale": (
            layout in ("llama_rotary", "head_rotary") and turned_otherwise
        ),
        "its rotary embeddings need heads of hidden_dim / n_heads": (
            layout != "none" and qk_head_dim * config.n_heads != config.hidden_dim
        ),
        "its gelu ignores intermediate_dim_ffn": (
            config.ffn_type == "gelu" and config.ffn_dim != 4 * config.hidden_dim
        ),
        "it computes norms with an epsilon of 1e-5 whatever norm_eps says": abs(config.norm_eps - 1e-5) > 1e-9,
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(f"linear_open_lm could not run this model: {reason}; export with --format hf.")


def folder_names(config: ModelConfig, name: str) -> tuple[str, ...]:
    """The names of one of our parameters in the reference's Hugging Face folders: all those that its state dict has."""
    names = [name]
    if config.weight_tying and name == "tok_embeddings.weight":
        names.append("output.weight")
    for main, other in ((".feed_forward.0.", "._ff_w1."), (".feed_forward.2.", "._ff_w2.")):
        if main in name:
            names.append(name.replace(main, other))
    return tuple(f"model.{n}" for n in names)


def config_from_params_txt(text: str, *, source: str) -> ModelConfig | None:
    """The architecture of a run of OpenLM by its ``params.txt``: the model's JSON, and flags where that is silent.

    None where the model is a JSON that is not here.
    """
    flags = {}
    for line in text.splitlines():
        name, separator, value = line.partition(": ")
        if separator:
            flags[name.strip()] = _literal(value.strip())
    model = str(flags.get("model"))
    path = shipped("models", ".json").get(Path(model).stem)
    if path is None:
        return None
    values = json.loads(path.read_text())
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    name = values.get("attn_name", flags.get("attn_name") or "auto")
    if name not in attention.ALIASES and name not in attention.names():
        name = "auto"
    known |= {f.name for f in dataclasses.fields(attention.resolve(name).Config)}
    # What its models read from flags; key-value heads it never did.
    taken = {k: v for k, v in flags.items() if k in known - {"n_heads_kv", "seq_len"} and v is not None}
    config = ModelConfig.from_json({**taken, **values, "attn_name": name}, source=source)
    return attention.resolve(name).from_openlm(config)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def keys_of(names: Collection[str]) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    """Our key -> the file's, and the pairs of names under which it stores one tensor twice (the gelu feed-forward)."""
    keys: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    doubled = []
    for name in names:
        main = name.replace("._ff_w1.", ".feed_forward.0.").replace("._ff_w2.", ".feed_forward.2.")
        if main != name:
            del keys[name]
            if main in names:
                doubled.append((main, name))
            else:
                keys[main] = (name,)
    return keys, doubled
