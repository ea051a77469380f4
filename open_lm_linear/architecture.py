"""The architecture of a model in OpenLM's JSON keys. No torch here: reading a config must cost nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from open_lm_linear.cli import UserError, did_you_mean

NORMS = (
    "default_layer_norm",
    "lp_layer_norm",
    "gain_only_layer_norm",
    "gain_only_lp_layer_norm",
    "no_wb_layer_norm",
    "rms_norm",
    "gemma_rms_norm",
)
FEED_FORWARDS = ("swiglu", "swiglu_torch", "gelu", "gemma_geglu", "geglu_tanh", "none")
NORM_PLACEMENTS = ("before", "after", "both")
ROTARY_LAYOUTS = ("rotary", "llama_rotary", "head_rotary", "none")

# Rotary scalings by transformers' names: the keys that each needs, and those that it may have.
ROTARY_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dynamic": (("factor", "original_max_position_embeddings"), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"), ()),
}

# Keys of OpenLM configs that ask for nothing as long as they hold these values.
_INERT: dict[str, tuple[Any, ...]] = {
    "moe_freq": (0, None),
    "moe_num_experts": (None,),
    "moe_weight_parallelism": (False, None),
    "moe_expert_model_parallelism": (False, None),
    "moe_capacity_factor": (1.25, None),
    "moe_loss_weight": (0.1, None),
    "moe_top_k": (2, None),
    "attn_activation": (None,),
    "attn_seq_scalar": (None,),
    "attn_seq_scalar_alpha": (None,),
}


@dataclass(frozen=True)
class ModelConfig:
    """One architecture. Field names are the keys of OpenLM's model JSON; missing keys have its defaults.

    Fields that OpenLM does not have change nothing unless given: they hold what other families of the Llama kind do.
    Lists of layers count from 0.

    ``attn_options`` holds every key that belongs to the chosen attention (its ``Config``), such as ``use_decay``.
    """

    hidden_dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    seq_len: int = 2048
    n_heads_kv: int | None = None  # None: as many as n_heads
    qk_head_dim: int | None = None  # None: hidden_dim / n_heads, as for v_head_dim
    v_head_dim: int | None = None
    intermediate_dim_ffn: int | None = (
        None  # None: 256 * ceil(int(8 * hidden_dim / 3) / 256), or 4 * hidden_dim for gelu
    )
    ffn_type: str = "swiglu"
    model_norm: str = "default_layer_norm"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    post_embed_norm: bool = False
    weight_tying: bool = False
    positional_embedding_type: str = "rotary"
    rotary_base_frequency: float = 10000.0
    rotary_scale: float = 1.0
    rotary_rounding: Literal["none", "bfloat16"] = "none"  # bfloat16: the angles that the reference learned in bf16
    rotary_scaling: Mapping[str, Any] | None = None  # {"rope_type": one of ROTARY_SCALINGS, and its keys}
    partial_rotary_factor: float = 1.0  # share of each head, from its front, that is turned
    no_rotary_layers: tuple[int, ...] = ()
    rotary_local_base_frequency: float | None = None  # base, unscaled, in rotary_local_layers
    rotary_local_layers: tuple[int, ...] = ()
    sliding_window: int | None = None  # tokens that softmax sees, itself included, in sliding_window_layers
    sliding_window_layers: tuple[int, ...] | None = None  # None: all
    qkv_bias: bool = False
    attn_out_bias: bool = False
    ffn_bias: bool = False
    qk_norm_per_head: bool = False  # qk_norm with one gain for every head, in place of over all heads together
    norm_placement: str = "before"  # of attention and feed-forward: before, after (on what they add), or both
    query_pre_attn_scalar: float | None = None  # softmax logits are divided by its root; None: qk_head_dim
    attn_logit_softcap: float | None = None  # softmax logits x become cap * tanh(x / cap)
    logit_softcap: float | None = None  # the output's too
    embedding_scale: float | None = None  # token embeddings are multiplied by it
    attn_name: str = "auto"
    attn_layers: Mapping[str, Any] = field(default_factory=dict)  # another attention -> the layers that have it
    attn_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "n_layers", "n_heads", "vocab_size", "seq_len"):
            _require_positive_int(name, getattr(self, name))
        for name in ("n_heads_kv", "qk_head_dim", "v_head_dim", "intermediate_dim_ffn", "sliding_window"):
            if getattr(self, name) is not None:
                _require_positive_int(name, getattr(self, name))
        for name in ("norm_eps", "rotary_base_frequency", "rotary_scale", "partial_rotary_factor"):
            _require_positive_number(name, getattr(self, name))
        for name in _OPTIONAL_NUMBERS:
            if getattr(self, name) is not None:
                _require_positive_number(name, getattr(self, name))
        for name in ("qk_norm", "qk_norm_per_head", "post_embed_norm", "weight_tying", *_BIASES):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        for name in ("no_rotary_layers", "rotary_local_layers", "sliding_window_layers"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, self._layers(name, getattr(self, name)))  # JSON has lists
        if not isinstance(self.attn_name, str):
            raise UserError(f"attn_name must be the name of an attention, not {self.attn_name!r}.")
        self._check_attn_layers()
        for name, known in (
            ("model_norm", NORMS),
            ("ffn_type", FEED_FORWARDS),
            ("positional_embedding_type", ROTARY_LAYOUTS),
            ("rotary_rounding", ("none", "bfloat16")),
            ("norm_placement", NORM_PLACEMENTS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} {value!r} is not one of {', '.join(known)}.{did_you_mean(str(value), known)}")
        self._check_shapes()
        self._check_rotary()

    def _check_shapes(self) -> None:
        if self.n_heads % self.kv_heads:
            raise UserError(f"n_heads {self.n_heads} is not a multiple of n_heads_kv {self.kv_heads}.")
        if (self.qk_head_dim is None or self.v_head_dim is None) and self.hidden_dim % self.n_heads:
            raise UserError(
                f"hidden_dim {self.hidden_dim} is no multiple of n_heads {self.n_heads}: give both head dims."
            )
        if self.qk_norm_per_head and not self.qk_norm:
            raise UserError("qk_norm_per_head says how qk_norm is done: give qk_norm too.")
        if self.ffn_bias and self.ffn_type in ("gelu", "gemma_geglu", "none"):
            raise UserError(f"ffn_bias does not belong to ffn_type {self.ffn_type}.")

    def _check_rotary(self) -> None:
        if self.positional_embedding_type != "none" and self.qk_dim % 2:
            raise UserError(f"rotary embeddings need an even qk_head_dim, not {self.qk_dim}.")
        uneven = int(self.qk_dim * self.partial_rotary_factor) % 2 and self.positional_embedding_type != "none"
        if self.partial_rotary_factor > 1 or uneven:
            raise UserError(
                f"partial_rotary_factor {self.partial_rotary_factor} of a head of {self.qk_dim} is not an even number "
                "of dimensions, at most all."
            )
        if self.rotary_local_layers and self.rotary_local_base_frequency is None:
            raise UserError("rotary_local_layers need a rotary_local_base_frequency.")
        if self.rotary_scaling is None:
            return
        kind = self.rotary_scaling.get("rope_type") if isinstance(self.rotary_scaling, Mapping) else None
        if kind not in ROTARY_SCALINGS:
            known = ", ".join(ROTARY_SCALINGS)
            raise UserError(
                f"rotary_scaling must be an object with a rope_type of {known}, not {self.rotary_scaling!r}."
            )
        needed, optional = ROTARY_SCALINGS[kind]
        for key in needed:
            if self.rotary_scaling.get(key) is None:
                raise UserError(f"rotary_scaling {kind} needs the key {key!r}.")
        for key in self.rotary_scaling:
            if key not in ("rope_type", *needed, *optional):
                raise UserError(f"rotary_scaling {kind} has no key {key!r}.{did_you_mean(key, (*needed, *optional))}")
        if self.positional_embedding_type not in ("rotary", "llama_rotary"):
            raise UserError(f"rotary_scaling does not belong to {self.positional_embedding_type}.")

    def _check_attn_layers(self) -> None:
        if not isinstance(self.attn_layers, Mapping):
            raise UserError(f"attn_layers must map attentions to lists of layers, not {self.attn_layers!r}.")
        layers = {name: self._layers(f"attn_layers of {name}", value) for name, value in self.attn_layers.items()}
        flat = [layer for value in layers.values() for layer in value]
        if len(flat) != len(set(flat)):
            twice = next(layer for layer in flat if flat.count(layer) > 1)
            raise UserError(f"attn_layers gives layer {twice} two attentions.")
        object.__setattr__(self, "attn_layers", layers)

    def _layers(self, name: str, layers: Any) -> tuple[int, ...]:
        whole = isinstance(layers, (list, tuple)) and all(type(i) is int and 0 <= i < self.n_layers for i in layers)
        if not whole:
            raise UserError(f"{name} must be a list of layers from 0 to {self.n_layers - 1}, not {layers!r}.")
        return tuple(sorted(set(layers)))

    def window(self, layer: int) -> int | None:
        """Tokens that softmax attention sees in this layer, itself included; None: all."""
        windowed = self.sliding_window_layers is None or layer in self.sliding_window_layers
        return self.sliding_window if windowed else None

    def attention_of(self, layer: int) -> tuple[str, Mapping[str, Any]]:
        """Name and options of a layer's attention; one of ``attn_layers`` has its defaults."""
        other = next((name for name, layers in self.attn_layers.items() if layer in layers), None)
        return (self.attn_name, self.attn_options) if other is None else (other, {})

    @property
    def kv_heads(self) -> int:
        return self.n_heads_kv or self.n_heads

    @property
    def qk_dim(self) -> int:
        """Dimension of one query or key head as it leaves the projection."""
        return self.qk_head_dim or self.hidden_dim // self.n_heads

    @property
    def v_dim(self) -> int:
        return self.v_head_dim or self.hidden_dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        if self.intermediate_dim_ffn is not None:
            return self.intermediate_dim_ffn
        if self.ffn_type == "gelu":
            return 4 * self.hidden_dim
        return 256 * ((int(8 * self.hidden_dim / 3) + 255) // 256)

    def to_json(self) -> dict[str, Any]:
        """The flat JSON form; ``ModelConfig.from_json(config.to_json()) == config``."""
        flat = dataclasses.asdict(self)
        flat |= dict(flat.pop("attn_options"))
        flat["attn_layers"] = {name: list(layers) for name, layers in self.attn_layers.items()}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, source: str = "model config") -> ModelConfig:
        """Reads OpenLM's flat keys; keys that are not the model's own go to ``attn_options`` unchecked."""
        if "d_model" in values:
            values = _from_mamba(values)
        own = {f.name for f in dataclasses.fields(cls)} - {"attn_options"}
        options = {k: v for k, v in values.items() if k not in own}
        for key, inert in _INERT.items():
            if key in options and options.pop(key) not in inert:
                raise UserError(f"{source}: {key} = {values[key]!r} is not supported; remove the key.")
        missing = [k for k in ("hidden_dim", "n_layers", "n_heads", "vocab_size") if k not in values]
        if missing:
            raise UserError(f"{source}: the key {missing[0]!r} is missing.")
        return cls(**{k: v for k, v in values.items() if k in own}, attn_options=options)

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        try:
            values = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{path} is not a readable JSON model config: {error}.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path} is not a JSON object of model config keys.")
        return cls.from_json(values, source=str(path))


def _from_mamba(values: Mapping[str, Any]) -> dict[str, Any]:
    """OpenLM's JSON of a Mamba model, which has mamba_ssm's keys, in our terms."""
    names = {"d_model": "hidden_dim", "n_layer": "n_layers"}
    fixed = {"n_heads": 1, "ffn_type": "none", "model_norm": "rms_norm", "positional_embedding_type": "none"}
    return {**fixed, "weight_tying": True, "attn_name": "mamba"} | {names.get(k, k): v for k, v in values.items()}


_BIASES = ("qkv_bias", "attn_out_bias", "ffn_bias")
_OPTIONAL_NUMBERS = (
    "rotary_local_base_frequency",
    "query_pre_attn_scalar",
    "attn_logit_softcap",
    "logit_softcap",
    "embedding_scale",
)


def _require_positive_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{name} must be a number above 0, not {value!r}.")


def _require_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a whole number above 0, not {value!r}.")


def parse_rotary_scaling(text: str, seq_len: int) -> dict[str, Any]:
    """``yarn:4`` as changes to a config: the scaling, beyond a trained context of ``seq_len``, with its usual values.

    Raises:
        UserError: another kind than linear, dynamic, yarn or llama3, or a factor below 1.
    """
    kind, _, factor_text = text.partition(":")
    try:
        factor = float(factor_text)
    except ValueError:
        factor = 0.0
    if kind not in ("linear", "dynamic", "yarn", "llama3") or not 1 <= factor < math.inf:
        raise UserError(
            f"--rotary-scaling {text!r} is not KIND:FACTOR: give linear, dynamic, yarn or llama3 and a factor of "
            "1 or more, such as yarn:4."
        )
    if kind == "linear":
        return {"rotary_scale": factor, "rotary_scaling": None}
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": seq_len}
    if kind == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rotary_scaling": scaling}


def parse_attn_layers(texts: Sequence[str]) -> dict[str, list[int]]:
    """``["0,8-10=softmax"]`` as ``{"softmax": [0, 8, 9, 10]}``.

    Raises:
        UserError: a text of another form.
    """
    found: dict[str, list[int]] = {}
    for text in texts:
        layers, _, name = text.rpartition("=")
        spans = [re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()) for part in layers.split(",")]
        if not name or not all(spans):
            raise UserError(f"--attn-layers {text!r} is not LAYERS=ATTENTION, such as 0,8-10=softmax.")
        ends = [(int(span[1]), int(span[2] or span[1])) for span in spans if span]
        found.setdefault(name.strip(), []).extend(i for begin, end in ends for i in range(begin, end + 1))
    return found


@dataclass(frozen=True)
class ModelSection:
    """Which model is trained, and what is changed in it. What is not given stays as the model's file has it."""

    model: str = ""
    """Architecture to train from scratch, or of a --pretrained file that does not say its own (an OpenLM .pt): a name
    under configs/models or a .json path."""
    pretrained: str = ""
    """Pretrained weights: smollm2, mistral, llama2, llama3, a folder, file, URL or hub id (owner/name@revision)."""
    attn_name: str = ""
    """Attention to swap in: linear, window, linear_window, gated_linear, gated_delta or softmax; a preset (supra, t2r,
    elu, hedgehog, retention, lolcats); or package.module:Class. Its options become flags."""
    attn_layers: tuple[str, ...] = ()
    """LAYERS=ATTENTION, layers (from 0) that have another attention: 0,8,16=softmax keeps the teacher's."""
    model_norm: str = ""
    """One of OpenLM's norms."""
    ffn_type: str = ""
    """swiglu, swiglu_torch, gelu, gemma_geglu, or none (blocks of an attention alone)."""
    qk_norm: bool = False
    """Normalise queries and keys over all heads together."""
    positional_embedding_type: str = ""
    """rotary (Hugging Face layout), llama_rotary (Meta's), head_rotary or none."""
    rotary_base_frequency: float | None = None
    """Base of the rotary frequencies."""
    rotary_scale: float | None = None
    """Positions are divided by this."""
    rotary_scaling: str = ""
    """KIND:FACTOR, context beyond the trained one: linear:2, dynamic:2, yarn:4 or llama3:8."""
    rotary_rounding: str = ""
    """bfloat16 reproduces the angles of checkpoints that the reference trained in bf16."""
    n_heads_kv: int | None = None
    """Key-value heads."""
    qk_head_dim: int | None = None
    """Dimension of a query or key head."""
    v_head_dim: int | None = None
    """Dimension of a value head."""
    intermediate_dim_ffn: int | None = None
    """Width of the feed-forward part."""
    attn: Mapping[str, Any] = field(default_factory=dict)
    """Options of the attention that were given."""

    def changes(self) -> dict[str, Any]:
        """What was given beyond the choice of model: fields of ModelConfig and options of the attention."""
        own = {f.name for f in dataclasses.fields(ModelConfig)} - {"attn_name"}
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in own}
        if self.attn_layers:
            given["attn_layers"] = parse_attn_layers(self.attn_layers)
        return {k: v for k, v in given.items() if v not in ("", None, False, ())} | dict(self.attn)


def shipped(kind: str, suffix: str) -> dict[str, Path]:
    """The files of configs/``kind`` that come with the package: name -> path."""
    installed = Path(sys.prefix) / "share" / "open_lm_linear" / "configs" / kind
    folders = (installed, Path(__file__).parent.parent / "configs" / kind)  # from a wheel, in a checkout
    return {p.stem: p for folder in folders if folder.is_dir() for p in sorted(folder.glob(f"*{suffix}"))}


def read_shipped(folder: str, kind: str, source: str) -> tuple[Path, Any]:
    """The path and the values of a YAML file, by its name under configs/FOLDER or by its path.

    Raises:
        UserError: no such file, or none that can be read; ``kind`` is what the sentence calls it.
    """
    import yaml

    known = shipped(folder, ".yaml")
    path = known.get(source, Path(source))
    try:
        return path, yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        names = ", ".join(sorted(known))
        raise UserError(
            f"there is no {kind} {source!r}.{did_you_mean(source, known)} Known: {names}; or give a .yaml path."
        ) from error
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"the {kind} {path} cannot be read: {' '.join(str(error).split())}") from error
