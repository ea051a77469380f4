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
        UserError: nothing there, no tokenizer, or a tokenizer with more tokens than the model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from open_lm_linear.hf.wrap import wrap
    from open_lm_linear.pretrained import load_pretrained, load_tokenizer

    dtype = dtype or torch.float32
    if _is_foreign(source):
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
        model = model.to(device)
        trained_at = getattr(config, "max_position_embeddings", None)
    else:
        tokenizer = load_tokenizer(source)
        if tokenizer is None:
            raise UserError(f"{source} has no tokenizer beside it: evaluation needs one.")
        ours = load_pretrained(source, dtype=dtype, device=torch.device(device))
        model, trained_at = wrap(ours, tokenizer=tokenizer), ours.config.seq_len
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"the tokenizer of {source} has {len(tokenizer)} tokens, more than the model: they do not fit.")
    return Subject(name or Path(source).name, model, tokenizer, max_length or trained_at or 2048)


def _is_foreign(source: str) -> bool:
    """Whether transformers alone reads this: a folder whose architecture is none of ours."""
    import json

    from open_lm_linear.pretrained.families import FAMILIES

    path = Path(source) / "config.json"
    if not path.exists():
        return False
    kind = json.loads(path.read_text()).get("model_type")
    return kind not in FAMILIES and kind not in ("open_lm_linear", "openlm")
