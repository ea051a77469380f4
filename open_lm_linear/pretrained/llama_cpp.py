"""GGUF metadata and tensor names in our terms: one entry for each architecture of llama.cpp that we read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError, nearest
from open_lm_linear.pretrained.families import KeyTable, expand


def _block(*names: str) -> tuple[str, ...]:
    return tuple(f"blk.{{i}}.{name}" for name in names)


KEYS: KeyTable = {
    "tok_embeddings.weight": ("token_embd.weight",),
    "layers.{i}.attention.in_proj.weight": _block("attn_q.weight", "attn_k.weight", "attn_v.weight"),
    "layers.{i}.attention.in_proj.bias": _block("attn_q.bias", "attn_k.bias", "attn_v.bias"),
    "layers.{i}.attention.out_proj.weight": _block("attn_output.weight"),
    "layers.{i}.attention.out_proj.bias": _block("attn_output.bias"),
    "layers.{i}.attention.q_norm.weight": _block("attn_q_norm.weight"),
    "layers.{i}.attention.k_norm.weight": _block("attn_k_norm.weight"),
    "layers.{i}.feed_forward.w12.weight": _block("ffn_gate.weight", "ffn_up.weight"),
    "layers.{i}.feed_forward.w12.bias": _block("ffn_gate.bias", "ffn_up.bias"),
    "layers.{i}.feed_forward.w3.weight": _block("ffn_down.weight"),
    "layers.{i}.feed_forward.w3.bias": _block("ffn_down.bias"),
    "layers.{i}.attention_norm.weight": _block("attn_norm.weight"),
    "layers.{i}.ffn_norm.weight": _block("ffn_norm.weight"),
    "norm.weight": ("output_norm.weight",),
    "output.weight": ("output.weight",),
}


@dataclass(frozen=True)
class GGUFFamily:
    """One architecture of llama.cpp. ``interleaved``: it stores the two rows of a rotary pair side by side."""

    fixed: Mapping[str, Any] = field(default_factory=dict)
    keys: KeyTable = field(default_factory=dict)
    interleaved: bool = False
    skips_rotary: Callable[[int], bool] = lambda layer: False


FAMILIES = {
    "llama": GGUFFamily(interleaved=True),  # Mistral and SmolLM2 too
    "qwen2": GGUFFamily(),
    "qwen3": GGUFFamily({"qk_norm": True, "qk_norm_per_head": True}),
    "smollm3": GGUFFamily(interleaved=True, skips_rotary=lambda layer: (layer + 1) % 4 == 0),
    "phi3": GGUFFamily(
        keys={
            "layers.{i}.attention.in_proj.weight": _block("attn_qkv.weight"),
            "layers.{i}.feed_forward.w12.weight": _block("ffn_up.weight"),
        }
    ),
    "olmo2": GGUFFamily(
        {"qk_norm": True, "norm_placement": "after"},
        {
            "layers.{i}.attention_norm.weight": (),
            "layers.{i}.ffn_norm.weight": (),
            "layers.{i}.attention_post_norm.weight": _block("post_attention_norm.weight"),
            "layers.{i}.ffn_post_norm.weight": _block("post_ffw_norm.weight"),
        },
    ),
}

# Tensors that hold what our config says: divisors of the rotary frequencies.
FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def config_from_gguf(
    fields: Mapping[str, Any], names: Collection[str], factors: Mapping[str, list[float]], *, source: str
) -> ModelConfig:
    """GGUF metadata in our terms.

    Args:
        fields: the metadata; ``tokens`` is the size of the vocabulary where ``vocab_size`` is not given.
        names: of the tensors, which tell ties and biases.
        factors: contents of those tensors of `FACTORS` that are there.

    Raises:
        UserError: another architecture, a missing field, or one that we cannot represent.
    """
    kind = str(fields.get("general.architecture"))
    if kind not in FAMILIES:
        raise UserError(
            f"{source}: the GGUF architecture {kind!r} is not supported; supported: {nearest(kind, FAMILIES)}."
        )
    get = {k[len(kind) + 1 :]: v for k, v in fields.items() if k.startswith(f"{kind}.")}.get

    def require(key: str) -> Any:
        if get(key) is None:
            raise UserError(f"{source}: the GGUF field {kind}.{key} is missing.")
        return get(key)

    if get("expert_count"):
        raise UserError(f"{source}: the GGUF field {kind}.expert_count = {get('expert_count')} cannot be represented.")
    hidden, heads, layers = require("embedding_length"), require("attention.head_count"), require("block_count")
    if isinstance(heads, list) or isinstance(get("attention.head_count_kv"), list):
        raise UserError(f"{source}: the GGUF field {kind}.attention.head_count differs by layer: not representable.")
    head_dim = get("attention.key_length") or hidden // heads
    family = FAMILIES[kind]
    return ModelConfig(
        hidden_dim=hidden,
        n_layers=layers,
        n_heads=heads,
        n_heads_kv=get("attention.head_count_kv") or heads,
        qk_head_dim=head_dim,
        v_head_dim=get("attention.value_length") or head_dim,
        intermediate_dim_ffn=require("feed_forward_length"),
        vocab_size=get("vocab_size") or fields["tokens"],
        seq_len=require("context_length"),
        model_norm="rms_norm",
        norm_eps=float(require("attention.layer_norm_rms_epsilon")),
        rotary_base_frequency=float(get("rope.freq_base") or 10000.0),
        partial_rotary_factor=(get("rope.dimension_count") or head_dim) / head_dim,
        no_rotary_layers=tuple(i for i in range(layers) if family.skips_rotary(i)),
        sliding_window=get("attention.sliding_window") or None,
        weight_tying="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        attn_out_bias="blk.0.attn_output.bias" in names,
        ffn_bias="blk.0.ffn_down.bias" in names,
        **family.fixed,
        **_scaling(get, require, factors, f"{source}: the GGUF field {kind}"),
    )


def _scaling(
    get: Callable[[str], Any], require: Callable[[str], Any], factors: Mapping[str, list[float]], field_of: str
) -> dict[str, Any]:
    kind = get("rope.scaling.type")
    original = get("rope.scaling.original_context_length") or require("context_length")
    if "rope_freqs.weight" in factors:  # Llama 3.1's scaling, already worked out
        divisors = factors["rope_freqs.weight"]
        scaling = {"short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
    elif "rope_factors_long.weight" in factors:
        scaling = {f"{x}_factor": factors[f"rope_factors_{x}.weight"] for x in ("short", "long")}
        stretch = require("context_length") / original
        usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        scaling["attention_factor"] = float(get("rope.scaling.attn_factor") or usual)
    elif kind in (None, "none"):
        return {}
    elif kind == "linear":
        return {"rotary_scale": float(require("rope.scaling.factor"))}
    elif kind == "yarn" and not get("rope.scaling.yarn_log_multiplier"):
        scaling = {"rope_type": "yarn", "factor": float(require("rope.scaling.factor"))}
        return {"rotary_scaling": {**scaling, "original_max_position_embeddings": original}}
    else:
        raise UserError(f"{field_of}.rope.scaling.type = {kind!r} cannot be represented.")
    return {"rotary_scaling": {"rope_type": "longrope", "original_max_position_embeddings": original, **scaling}}


def keys_from_gguf(kind: str, layers: int) -> dict[str, tuple[str, ...]]:
    """Our key -> the GGUF's, every layer written out."""
    return expand({**KEYS, **FAMILIES[kind].keys}, layers)
