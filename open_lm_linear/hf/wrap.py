"""A Transformer of ours behind transformers' interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.hf.modeling import OpenLMLinearConfig, OpenLMLinearForCausalLM
from open_lm_linear.model import Transformer

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def wrap(
    model: Transformer,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    eos_token_id: int | list[int] | None = None,
    auto_map: Mapping[str, str] | None = None,
) -> OpenLMLinearForCausalLM:
    """``model`` as transformers sees one, in evaluation mode; it shares the weights where the dtype is theirs.

    Args:
        tokenizer: a transformers tokenizer, whose special tokens `generate()` then uses.
        dtype: of the weights (default: the model's).
        eos_token_id: what ends a generation (default: the tokenizer's).
        auto_map: the config's ``auto_map``, for a folder with remote code.

    Raises:
        UserError: a tokenizer with more tokens than the model.
    """
    with torch.device("meta"):
        wrapped = OpenLMLinearForCausalLM(hf_config(model.config, tokenizer, eos_token_id, auto_map))
    dtype = dtype or next(model.parameters()).dtype
    weights = {name: value.detach().to(dtype).contiguous() for name, value in model.state_dict().items()}
    wrapped.model.load_state_dict(weights, assign=True)
    wrapped.generation_config = generation_config(wrapped.config)
    return wrapped.eval()


def hf_config(
    config: ModelConfig,
    tokenizer: Any = None,
    eos_token_id: int | list[int] | None = None,
    auto_map: Mapping[str, str] | None = None,
) -> OpenLMLinearConfig:
    """The architecture as transformers has it, with the special tokens of a tokenizer.

    Raises:
        UserError: a tokenizer with more tokens than the model.
    """
    special: dict[str, Any] = {}
    if tokenizer is not None:
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens and the model only {config.vocab_size}: they do not fit."
            )
        special = {name: getattr(tokenizer, name) for name in SPECIAL}
    if eos_token_id is not None:
        special["eos_token_id"] = eos_token_id
    if special.get("pad_token_id") is None:
        eos = special.get("eos_token_id")
        special["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    if auto_map is not None:
        special["auto_map"] = dict(auto_map)
    return OpenLMLinearConfig.from_model_config(config, **special)


def generation_config(config: OpenLMLinearConfig) -> GenerationConfig:
    """What `generate()` begins with: the special tokens."""
    return GenerationConfig(**{name: getattr(config, name) for name in SPECIAL})
