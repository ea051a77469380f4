"""Activation checkpointing: what a call computed is computed again in the backward pass instead of being kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Products with weight matrices: most of the time, and a memory that grows with the tokens alone. The batched products
# inside an attention are left out, because the scores among them would be kept too.
KEPT = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})


def recomputed(mode: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, whose activations are computed again when its gradient is taken.

    Args:
        mode: ``full`` keeps the arguments alone; ``selective`` the results of ``KEPT`` too.
    """
    if mode == "full":
        return checkpoint(function, *args, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
