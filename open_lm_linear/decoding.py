"""Decoding at growing context: what a model remembers of a sequence, and how long a token takes."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from open_lm_linear import generate as generation
from open_lm_linear.cli import UserError

if TYPE_CHECKING:
    import torch

    from open_lm_linear.model import Past, Transformer

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Decoding:
    """One model decoding one sequence after ``context_tokens``."""

    model: str
    context_tokens: int
    state_bytes: int
    """What the model remembers of the sequence, counted from its tensors."""
    milliseconds_per_token: float
    """Median over the tokens timed."""
    milliseconds_per_token_p10: float
    milliseconds_per_token_p90: float
    prefill_tokens_per_second: float | None
    """From the beginning to this context; None where the cache was filled up in place of being computed."""
    tokens_timed: int


def decoding(
    models: Mapping[str, Transformer],
    contexts: Sequence[int] = CONTEXTS,
    *,
    ids: torch.Tensor | None = None,
    tokens: int = 16,
    warmup: int = 3,
    prefill_up_to: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Decoding]:
    """Bytes of state and time per token of each model at each context, one sequence at a time, greedily.

    The models take turns token by token, so that whatever else the machine does hits all of them. The prompt is read
    once, in pieces from context to context; decoding goes on from a fork of each past, which it does not disturb.

    Args:
        ids: (N,) ids of text, repeated to the longest context; None draws random ones.
        tokens: timed at each context, after ``warmup`` untimed ones.
        prefill_up_to: from this context on a key-value cache is filled up with its own keys and values in place of
            being computed in quadratic time: decoding does the same work on it. None computes all.
        progress: called with a line as each context begins.

    Raises:
        UserError: a context that is not above 0.
    """
    import torch

    contexts = sorted(set(contexts))
    if not contexts or contexts[0] < 1 or tokens < 1:
        raise UserError(f"--contexts {list(contexts)} and --timed-tokens {tokens} must be above 0.")
    if prefill_up_to is not None and prefill_up_to < 1:
        raise UserError(f"--prefill-up-to {prefill_up_to} is not above 0.")
    vocab_size = min(m.config.vocab_size for m in models.values())
    if ids is None:
        ids = torch.randint(vocab_size, (contexts[-1],), generator=torch.Generator().manual_seed(seed))
    generation.check_ids(ids, vocab_size)
    ids = ids.repeat(-(-contexts[-1] // len(ids)))[None, : contexts[-1]]
    readers = {name: _Reader(model, ids, prefill_up_to) for name, model in models.items()}
    rows: list[Decoding] = []
    for context in contexts:
        if progress is not None:
            progress(f"decoding at {context} tokens of context")
        sizes = [reader.advance(context).nbytes() for reader in readers.values()]
        times = _time_in_turns([reader.decode() for reader in readers.values()], warmup, tokens)
        for (name, reader), size, seconds in zip(readers.items(), sizes, times, strict=True):
            p10, median, p90 = (1e3 * t for t in _quantiles(seconds))
            rows.append(Decoding(name, context, size, median, p10, p90, reader.prefill_rate(), len(seconds)))
    return rows


class _Reader:
    """One model on its way through the ids (1, N): the past so far and the seconds that it took."""

    def __init__(self, model: Transformer, ids: torch.Tensor, prefill_up_to: int | None) -> None:
        self.model, self.device, self.limit = model, model.head_weight().device, prefill_up_to
        self.ids = ids.to(self.device)
        self.read, self.seconds, self.computed = 0, 0.0, True
        self.past: Past | None = None

    def advance(self, context: int) -> Past:
        """Reads on to ``context`` tokens: the past there."""
        computable = context if self.limit is None else min(context, self.limit)
        past = self._compute(max(computable, self.read))
        if self.read < context:
            filled = _filled_up(past, context - self.read)
            if filled is None:
                return self._compute(context)
            self.past, self.read, self.computed = filled, context, False
        assert self.past is not None
        return self.past

    def _compute(self, context: int) -> Past:
        if self.read < context:
            begin = generation.now(self.device)
            _, self.past = generation.prefill(self.model, self.ids[:, self.read : context], past=self.past)
            self.seconds += generation.now(self.device) - begin
            self.read = context
        assert self.past is not None
        return self.past

    def prefill_rate(self) -> float | None:
        return self.read / self.seconds if self.computed else None

    def decode(self) -> Iterator[float]:
        """Seconds of each further token, without end, from a fork of the past."""
        past, token = self.past, self.ids[:, self.read - 1 : self.read]
        while True:
            begin = generation.now(self.device)
            logits, past = generation.prefill(self.model, token, past=past)
            token = logits.argmax(-1, keepdim=True)
            yield generation.now(self.device) - begin


def _filled_up(past: Past, more: int) -> Past | None:
    """A key-value past with ``more`` tokens of its own repeated at its end; None where a state is another thing."""
    from open_lm_linear.attention.softmax import KVState

    layers = []
    for state in past.layers:
        if not isinstance(state, KVState):
            return None
        left = more
        while left:
            n = min(left, state.length)
            state = state.extended(state.k[:, :n], state.v[:, :n], state.document[:, :n], state.current, state.plain)
            left -= n
        layers.append(state)
    return dataclasses.replace(past, layers=tuple(layers), positions=past.positions + more)


def _time_in_turns(steps: list[Iterator[float]], warmup: int, tokens: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in steps]
    for i in range(warmup + tokens):
        for step, kept in zip(steps, times, strict=True):
            seconds = next(step)
            if i >= warmup:
                kept.append(seconds)
    return times


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 10 %, 50 % and 90 % points."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[0], statistics.median(values), deciles[8]
