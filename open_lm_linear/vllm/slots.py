"""The states of many sequences in memory that a serving engine owns, a slot a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from open_lm_linear.attention.base import State, Tensor
from open_lm_linear.model import Past, Transformer


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """How one layer's state is made of tensors (B, ...): its class and each tensor's name, shape without B, dtype."""

    kind: type[State]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, state: State) -> StateLayout:
        tensors = state.tensors()
        shapes = tuple(tuple(x.shape[1:]) for x in tensors.values())
        return cls(type(state), tuple(tensors), shapes, tuple(x.dtype for x in tensors.values()))

    def read(self, memory: Sequence[Tensor], slots: Tensor, fresh: Tensor) -> State:
        """The state (B, ...) in ``slots`` (B,) of memory (slots, ...); zero, as before a first token, where fresh."""
        rows = (x.index_select(0, slots) for x in memory)
        zeroed = (x.masked_fill(fresh.view(-1, *[1] * (x.dim() - 1)), 0) for x in rows)
        return self.kind.from_tensors(dict(zip(self.names, zeroed, strict=True)))

    def write(self, memory: Sequence[Tensor], slots: Tensor, state: State) -> None:
        tensors = state.tensors()
        for x, name in zip(memory, self.names, strict=True):
            x.index_copy_(0, slots, tensors[name].to(x.dtype))


def layouts(model: Transformer) -> list[StateLayout]:
    """The layout of every layer's state.

    Raises:
        ValueError: a layer whose state grows with the sequence.
    """
    with torch.no_grad():
        device = model.tok_embeddings.weight.device
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        one, two = (model.hidden(ids[:, :tokens])[1].layers for tokens in (1, 2))
    for i, (before, after) in enumerate(zip(one, two, strict=True)):
        if before.nbytes() != after.nbytes():
            raise ValueError(
                f"layer {i} ({model.config.attn_name}) keeps a state that grows with the sequence, which has no fixed "
                "slot: only models whose every layer is recurrent can be served so."
            )
    return [StateLayout.of(state) for state in one]


def advance(
    model: Transformer,
    states: Sequence[StateLayout],
    memory: Sequence[Sequence[Tensor]],
    ids: Tensor,
    positions: Tensor,
    slots: Tensor,
) -> Tensor:
    """Reads tokens (B, T) of B sequences and renews their slots: the hidden states (B, T, hidden_dim).

    Args:
        states: of each layer, from ``layouts``.
        memory: of each layer, the tensors (slots, ...) that its layout names.
        positions: (B,), of each row's first token. A row at 0 begins a sequence, whatever its slot holds.
        slots: (B,), all different.
    """
    fresh = positions == 0
    layers = [layout.read(where, slots, fresh) for layout, where in zip(states, memory, strict=True)]
    hidden, past = model.hidden(ids, past=Past(tuple(layers), positions))
    for layout, where, state in zip(states, memory, past.layers, strict=True):
        layout.write(where, slots, state)
    return hidden
