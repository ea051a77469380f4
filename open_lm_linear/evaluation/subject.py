"""A model under evaluation: ours or any of transformers', behind one interface, with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_lm_linear.cli import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Subject:
    """A causal language model with transformers' interface (ours: OpenLMLinearForCausalLM), in evaluation mode."""

    name: str
    model: Any
    tokenizer: Any
    max_length: int
    """Tokens of context that a request is cut to, from the left."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_subject(
    source: str,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
) -> Subject:
    """Loads what a command line names: whatever `load_pretrained` reads, else any Hugging Face folder or hub id.

    Args:
        name: in tables (default: the source's last part).
        dtype: of the weights (default: float32).
        max_length: tokens of context (default: the length that the model was trained at).

    Raises:
        UserError: nothing there, no causal language model, no tokenizer, or one with more tokens than the model.
    """
    import torch

    from open_lm_linear.generate import lay_out
    from open_lm_linear.hf.wrap import wrap
    from open_lm_linear.pretrained import load_pretrained, load_tokenizer

    dtype = dtype or torch.float32
    if _is_foreign(source):
        model, tokenizer = _load_foreign(source, dtype)
        model, trained_at = model.to(device), getattr(model.config, "max_position_embeddings", None)
    else:
        tokenizer = load_tokenizer(source)
        ours = lay_out(load_pretrained(source, dtype=dtype, device=torch.device(device)))
        model, trained_at = wrap(ours, tokenizer=tokenizer), ours.config.seq_len
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"the tokenizer of {source} has {len(tokenizer)} tokens, more than the model: they do not fit.")
    return Subject(name or Path(source).name, model, tokenizer, max_length or trained_at or 2048)


def _is_foreign(source: str) -> bool:
    """Whether transformers alone reads this: a folder or hub id whose architecture is none of ours."""
    from open_lm_linear.pretrained.families import FAMILIES
    from open_lm_linear.pretrained.places import find_place

    place = find_place(source)
    if place is None or "config.json" not in place:
        return False
    kind = place.json("config.json").get("model_type")
    return kind not in FAMILIES and kind not in ("open_lm_linear", "openlm")


def _load_foreign(source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model, in evaluation mode, and tokenizer of a folder or hub id (``owner/name@revision``)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, _, revision = source.partition("@")
    at = {"revision": revision} if revision else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **at)
        return model.eval(), AutoTokenizer.from_pretrained(name, **at)
    except Exception as error:  # transformers raises many kinds for one fact: it can make no language model of this
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source} is no causal language model that transformers reads: {reason}") from error
