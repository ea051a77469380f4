"""Meta's and Mistral's own folders: ``params.json`` beside ``consolidated.*``, rotary pairs interleaved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.pretrained.families import KeyTable
from open_lm_linear.pretrained.readers import Reader


def _layer(*names: str) -> tuple[str, ...]:
    return tuple(f"layers.{{i}}.{name}.weight" for name in names)


KEYS: KeyTable = {
    "tok_embeddings.weight": ("tok_embeddings.weight",),
    "layers.{i}.attention.in_proj.weight": _layer("attention.wq", "attention.wk", "attention.wv"),
    "layers.{i}.attention.out_proj.weight": _layer("attention.wo"),
    "layers.{i}.feed_forward.w12.weight": _layer("feed_forward.w1", "feed_forward.w3"),
    "layers.{i}.feed_forward.w3.weight": _layer("feed_forward.w2"),
    "layers.{i}.attention_norm.weight": _layer("attention_norm"),
    "layers.{i}.ffn_norm.weight": _layer("ffn_norm"),
    "norm.weight": ("norm.weight",),
    "output.weight": ("output.weight",),
}

_INERT = ("multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len", "quantization_args", "lora_args")


def config_from_params(params: Mapping[str, Any], reader: Reader, *, source: str) -> tuple[ModelConfig, list[str]]:
    """``params.json`` in our terms, and notes on what it leaves open. Widths are those of the tensors.

    Raises:
        UserError: a missing or unknown field, or tensors that are not there.
    """
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "norm_eps", "vocab_size"}
    known |= {"rope_theta", "use_scaled_rope", "rope_scaling_factor", "sliding_window", *_INERT}
    for key in ("dim", "n_layers", "n_heads"):
        if key not in params:
            raise UserError(f"{source}: the key {key!r} is missing.")
    for key, value in params.items():
        if key not in known and value not in (None, False):
            raise UserError(f"{source}: the key {key} = {value!r} cannot be represented.")
    if params.get("quantization_args") or params.get("lora_args"):
        raise UserError(f"{source}: quantised checkpoints must be dequantised first.")
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in reader.names():
            raise UserError(f"{source}: the tensor {name!r} is missing from the checkpoint.")
    head_dim = params.get("head_dim") or params["dim"] // params["n_heads"]
    vocab = reader.shape("tok_embeddings.weight")[0]
    config = ModelConfig(
        hidden_dim=params["dim"],
        n_layers=params["n_layers"],
        n_heads=params["n_heads"],
        n_heads_kv=params.get("n_kv_heads") or params["n_heads"],
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
        intermediate_dim_ffn=reader.shape("layers.0.feed_forward.w1.weight")[0],
        vocab_size=vocab,
        seq_len=_context(params, vocab),
        model_norm="rms_norm",
        norm_eps=params.get("norm_eps", 1e-5),
        rotary_base_frequency=float(params.get("rope_theta") or 10000.0),
        sliding_window=params.get("sliding_window"),
        weight_tying="output.weight" not in reader.names(),
        rotary_scaling=_scaling(params),
    )
    notes = [f"params.json does not say the trained context: {config.seq_len} tokens taken"]
    if config.rotary_scaling and not params.get("rope_scaling_factor"):
        factor = config.rotary_scaling["factor"]
        notes.append(f"params.json does not say the factor of its scaled rotary: {factor:g} taken")
    return config, notes


def _context(params: Mapping[str, Any], vocab: int) -> int:
    """The trained context by what tells the releases apart."""
    if params.get("max_seq_len"):
        return params["max_seq_len"]
    if params.get("use_scaled_rope"):
        return 131072
    if "hidden_dim" in params:  # Mistral's spelling
        return 32768
    if vocab >= 128000:
        return 8192
    return 2048 if params.get("norm_eps") == 1e-6 else 4096


def _scaling(params: Mapping[str, Any]) -> dict[str, Any] | None:
    if not params.get("use_scaled_rope"):
        return None
    factor = params.get("rope_scaling_factor") or (32.0 if params["dim"] <= 3072 else 8.0)  # Llama 3.2's, Llama 3.1's
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": float(factor), **frequencies}
