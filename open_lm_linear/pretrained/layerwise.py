"""Runs a checkpoint with one of its blocks in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from open_lm_linear.model import Transformer
from open_lm_linear.parallel import put_rows
from open_lm_linear.pretrained.matching import match
from open_lm_linear.pretrained.sources import Source


@torch.no_grad()
def layerwise_logits(source: Source, ids: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Logits (T, vocab_size) of a checkpoint on one row of T tokens, its weights cast to ``dtype``, on the CPU.

    In memory are the embeddings, the output and one block.

    Raises:
        UserError: a tensor that does not fit.
    """
    with torch.device("meta"):
        model = Transformer(source.config)
    kept = match(model, source).kept
    model = model.to(dtype).eval()

    def fill(module: nn.Module, name: str) -> None:
        module.to_empty(device="cpu")
        for key, parameter in module.named_parameters(name):
            put_rows(parameter, kept[key].read)

    def arrive(block: nn.Module, _: Any) -> None:
        fill(block, names[block])

    def leave(block: nn.Module, _args: Any, _output: Any) -> None:
        block.to("meta")

    names: dict[nn.Module, str] = {block: f"layers.{i}" for i, block in enumerate(model.layers)}
    for block in names:
        block.register_forward_pre_hook(arrive)
        block.register_forward_hook(leave)
    for name, child in model.named_children():
        if child is not model.layers:
            fill(child, name)
    return model(torch.tensor([list(ids)]))[0][0]
