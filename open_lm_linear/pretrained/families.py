"""How other people's configs and keys become ours: one table a naming scheme, used in both directions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError, nearest

KeyTable = tuple[tuple[str, tuple[str, ...]], ...]

# Ours -> theirs; several of theirs are the rows of one of ours, in this order. {i} is the layer.
HUGGING_FACE: KeyTable = (
    ("tok_embeddings.weight", ("model.embed_tokens.weight",)),
    (
        "layers.{i}.attention.in_proj.weight",
        tuple(f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in ("q", "k", "v")),
    ),
    ("layers.{i}.attention.out_proj.weight", ("model.layers.{i}.self_attn.o_proj.weight",)),
    (
        "layers.{i}.feed_forward.w12.weight",
        ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
    ),
    ("layers.{i}.feed_forward.w3.weight", ("model.layers.{i}.mlp.down_proj.weight",)),
    ("layers.{i}.attention_norm.weight", ("model.layers.{i}.input_layernorm.weight",)),
    ("layers.{i}.ffn_norm.weight", ("model.layers.{i}.post_attention_layernorm.weight",)),
    ("norm.weight", ("model.norm.weight",)),
    ("output.weight", ("lm_head.weight",)),
)

GGUF: KeyTable = (
    ("tok_embeddings.weight", ("token_embd.weight",)),
    ("layers.{i}.attention.in_proj.weight", tuple(f"blk.{{i}}.attn_{x}.weight" for x in ("q", "k", "v"))),
    ("layers.{i}.attention.out_proj.weight", ("blk.{i}.attn_output.weight",)),
    ("layers.{i}.feed_forward.w12.weight", ("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight")),
    ("layers.{i}.feed_forward.w3.weight", ("blk.{i}.ffn_down.weight",)),
    ("layers.{i}.attention_norm.weight", ("blk.{i}.attn_norm.weight",)),
    ("layers.{i}.ffn_norm.weight", ("blk.{i}.ffn_norm.weight",)),
    ("norm.weight", ("output_norm.weight",)),
    ("output.weight", ("output.weight",)),
)

MODEL_TYPES = ("llama", "mistral")

# Fields of a Hugging Face config that change the computation, with the only values we can represent.
_REPRESENTABLE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}


def expand(table: KeyTable, layers: int) -> dict[str, tuple[str, ...]]:
    """The table with every layer written out: our key -> their keys."""
    out = {}
    for ours, theirs in table:
        for i in range(layers) if "{i}" in ours else (0,):
            out[ours.format(i=i)] = tuple(t.format(i=i) for t in theirs)
    return out


def config_from_hugging_face(values: Mapping[str, Any], *, source: str) -> ModelConfig:
    """A Hugging Face ``config.json`` of the Llama family in our terms.

    Raises:
        UserError: another model type (with the supported ones), or the first field that we cannot represent.
    """
    kind = str(values.get("model_type"))
    if kind not in MODEL_TYPES:
        raise UserError(f"{source}: model_type {kind!r} is not supported; supported: {nearest(kind, MODEL_TYPES)}.")
    for field, allowed in _REPRESENTABLE.items():
        if field in values and values[field] not in allowed:
            raise UserError(f"{source}: the config field {field} = {values[field]!r} cannot be represented.")
    rope = values.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"{source}: the config field rope_parameters.rope_type = {rope['rope_type']!r} cannot be represented."
        )
    try:
        hidden, heads = values["hidden_size"], values["num_attention_heads"]
        head_dim = values.get("head_dim") or hidden // heads
        window = values.get("sliding_window")  # exact up to the window; the linear model has none
        return ModelConfig(
            hidden_dim=hidden,
            n_layers=values["num_hidden_layers"],
            n_heads=heads,
            n_heads_kv=values.get("num_key_value_heads") or heads,
            qk_head_dim=head_dim,
            v_head_dim=head_dim,
            intermediate_dim_ffn=values["intermediate_size"],
            vocab_size=values["vocab_size"],
            seq_len=min(values.get("max_position_embeddings", 2048), window or 1 << 30),
            model_norm="rms_norm",
            norm_eps=values.get("rms_norm_eps", 1e-6),
            rotary_base_frequency=float(rope.get("rope_theta") or values.get("rope_theta") or 10000.0),
            weight_tying=bool(values.get("tie_word_embeddings", False)),
        )
    except KeyError as error:
        raise UserError(f"{source}: the config field {error.args[0]} is missing.") from error


def config_from_gguf(fields: Mapping[str, Any], *, tied: bool, source: str) -> ModelConfig:
    """GGUF metadata (``llama.*`` keys) in our terms; the same refusals as for Hugging Face."""
    kind = str(fields.get("general.architecture"))
    if kind != "llama":
        raise UserError(f"{source}: the GGUF architecture {kind!r} is not supported; supported: llama.")
    get = {k[len("llama.") :]: v for k, v in fields.items() if k.startswith("llama.")}.get

    def require(key: str) -> Any:
        if get(key) is None:
            raise UserError(f"{source}: the GGUF field llama.{key} is missing.")
        return get(key)

    if get("rope.scaling.type") not in (None, "none"):
        raise UserError(
            f"{source}: the GGUF field llama.rope.scaling.type = {get('rope.scaling.type')!r} cannot be represented."
        )
    hidden, heads = require("embedding_length"), require("attention.head_count")
    head_dim = get("attention.key_length") or hidden // heads
    return ModelConfig(
        hidden_dim=hidden,
        n_layers=require("block_count"),
        n_heads=heads,
        n_heads_kv=get("attention.head_count_kv") or heads,
        qk_head_dim=head_dim,
        v_head_dim=get("attention.value_length") or head_dim,
        intermediate_dim_ffn=require("feed_forward_length"),
        vocab_size=get("vocab_size") or len(fields["tokenizer.ggml.tokens"]),
        seq_len=require("context_length"),
        model_norm="rms_norm",
        norm_eps=float(require("attention.layer_norm_rms_epsilon")),
        rotary_base_frequency=float(get("rope.freq_base") or 10000.0),
        weight_tying=tied,
    )


def config_from_own(values: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Our exported ``config.json``: OpenLM's flat keys among those that Hugging Face adds."""
    from open_lm_linear import attention

    options = attention.resolve(str(values.get("attn_name"))).Config
    known = {f.name for cls in (ModelConfig, options) for f in dataclasses.fields(cls)}
    return ModelConfig.from_json({k: v for k, v in values.items() if k in known}, source=source)
