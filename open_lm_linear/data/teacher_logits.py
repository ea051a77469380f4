"""What a teacher said of each token, kept in the shards: its k likeliest next tokens and all others together.

A position takes 16-bit words: k token ids (where the vocabulary is above 65,536 their low words and then their high
ones), k log-probabilities as float16, and the log-probability of all other tokens together. The words of a sample are
one row of uint16, the member ``NAME.teacher.npy`` beside its tokens; what they mean is said by ``teacher`` in
``dataset.json``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from open_lm_linear.cli import UserError

if TYPE_CHECKING:
    from torch import Tensor

ROW = np.dtype("<i8")  # of a batch
WORD = np.dtype("<u2")
SETTINGS = "teacher.json"  # beside shards while they are written and after: with what


@dataclass(frozen=True)
class TeacherSection:
    """The teacher whose likeliest next tokens are written beside the tokens."""

    teacher: str = ""
    """What --pretrained takes. Its vocabulary must be the student's."""
    top_k: int = 64
    """Next tokens to keep at each position; the probability of all others is kept as one number."""
    kl_temperature: float = 1.0
    """Its logits are divided by it; the training run has the same --kl-temperature."""
    reset_state_at_document: bool = False
    """Packed documents do not see each other; the training run has the same flag."""
    batch_size: int = 8
    """Sequences that the teacher reads at once."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the teacher's weights and products."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""

    def check(self) -> None:
        """Refuses what means nothing."""
        if not self.teacher and self != TeacherSection():
            raise UserError("--top-k and what else says how a teacher is asked need one: give --teacher PRETRAINED.")
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.kl_temperature < float("inf"):
            raise UserError(f"--kl-temperature must be above 0, not {self.kl_temperature}.")


@dataclass(frozen=True)
class TeacherLogits:
    """What the words are: ``teacher`` of a data set's card.

    Args:
        source: the teacher as it was named.
        temperature: its logits were divided by it.
        document_separator: the token after which it began anew; None: never.
    """

    source: str
    top_k: int
    temperature: float
    vocab_size: int
    document_separator: int | None
    dtype: str

    @classmethod
    def of_card(cls, card: Mapping[str, Any] | None, where: str) -> TeacherLogits:
        """Raises UserError where the card of the data ``where`` has none."""
        told = (card or {}).get("teacher")
        if not isinstance(told, dict) or set(told) != {field.name for field in dataclasses.fields(cls)}:
            raise UserError(
                f"the shards of {where} hold no teacher's logits: write them with "
                "`python -m open_lm_linear.data.teach --data DIR --teacher PRETRAINED --output DIR`."
            )
        return cls(**told)

    @property
    def words(self) -> int:
        """16-bit words a position."""
        return (2 if self.vocab_size <= 1 << 16 else 3) * self.top_k + 1

    def summary(self) -> str:
        """What a token costs."""
        return (
            f"teacher {self.source}: the top {self.top_k} of {self.vocab_size:,} tokens and the rest, "
            f"{self.words * WORD.itemsize} bytes per token beside the token itself"
        )

    def row_length(self, seq_len: int) -> int:
        """int64 numbers in a row of a batch: the tokens, and then the words."""
        return seq_len + 1 + -(-seq_len * self.words * WORD.itemsize // ROW.itemsize)

    def encode(self, ids: np.ndarray, log_p: np.ndarray) -> np.ndarray:
        """Ids (T, k) and log-probabilities (T, k + 1), that of the rest last -> uint16 (T * words,)."""
        high = [] if self.vocab_size <= 1 << 16 else [ids >> 16]
        parts = [(part & 0xFFFF).astype(WORD) for part in (ids, *high)]
        return np.concatenate([*parts, log_p.astype("<f2").view(WORD)], axis=1).ravel()

    def row(self, tokens: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Tokens (seq_len + 1,) and the words of all but the last -> int64 (row_length,)."""
        row = np.zeros(self.row_length(len(tokens) - 1), dtype=ROW)
        row[: len(tokens)] = tokens
        row[len(tokens) :].view(WORD)[: len(words)] = words
        return row

    def split(self, rows: Tensor, seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, row_length) -> tokens (B, T + 1), ids (B, T, k), log-probabilities (B, T, k + 1) float32.

        Rounding leaves probabilities that do not quite add up to 1; here they do again.
        """
        import torch

        tokens, words = rows[:, : seq_len + 1], rows[:, seq_len + 1 :].contiguous().view(torch.int16)
        words = words[:, : seq_len * self.words].unflatten(1, (seq_len, self.words))
        ids = words[..., : self.top_k].long() & 0xFFFF
        if self.vocab_size > 1 << 16:
            ids |= (words[..., self.top_k : 2 * self.top_k].long() & 0xFFFF) << 16
        log_p = words[..., -self.top_k - 1 :].contiguous().view(torch.float16)
        return tokens, ids, log_p.float().log_softmax(-1)
