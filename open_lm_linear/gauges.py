"""What is measured while a run trains: FLOPs/s, memory, gradients by group, and the states of linear layers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from open_lm_linear.cli import UserError
from open_lm_linear.profiling import parse_window

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from open_lm_linear.model import Transformer
    from open_lm_linear.parallel import Context

PROBE_TOKENS = 256
"""Tokens of one sequence that a probe of the states reads at most."""

# FLOPs/s of dense bfloat16 products with float32 sums, by the makers' data sheets; the first entry whose words are all
# in the device's name holds. A slice of a GPU (MIG) has no entry.
PEAKS: tuple[tuple[str, float | None], ...] = (
    ("MIG", None),
    ("Laptop", None),
    ("H200 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H800", 989e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


@dataclass(frozen=True)
class MeasureConfig:
    """Measuring."""

    log_state_every: int = 0
    """Steps between two looks at the states of linear layers (states.jsonl). 0: none."""
    profile: str = ""
    """START:STEPS, such as 10:3: a trace of these steps, and on a GPU of its memory, into the run's profile/."""

    def check(self, steps: int) -> None:
        """Refuses what a run of ``steps`` steps would never do."""
        if self.log_state_every < 0:
            raise UserError(f"--log-state-every must be 0 or more, not {self.log_state_every}.")
        if self.profile and sum(parse_window(self.profile)) - 1 > steps:
            raise UserError(f"--profile {self.profile} ends after the run's {steps} steps: begin earlier.")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    eval_every: int = 0
    """Steps between two evaluations; the last step is one too. 0: none."""
    eval_suite: str = ""
    """Suite of multiple-choice tasks: a name under configs/suites, or a .yaml path."""
    eval_limit: int | None = None
    """Examples of each task to use at most. None: all."""
    eval_include_path: str = ""
    """Folder of task files for lm-evaluation-harness; a TASK_local of theirs stands in for TASK."""
    eval_prompts: tuple[str, ...] = ()
    """Beginnings that the model goes on from, greedily."""
    eval_tokens: int = 32
    """Tokens that each prompt is continued by."""
    eval_tokenizer: str = ""
    """Folder, preset or hub id of the tokenizer. Empty: that of --pretrained."""

    def check(self) -> None:
        """Refuses what says nothing or cannot be done."""
        for name, least in (("eval_every", 0), ("eval_tokens", 1), ("eval_limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} must be {least} or more, not {value}.")
        if bool(self.eval_every) != bool(self.eval_suite or self.eval_prompts):
            raise UserError("evaluation during training needs --eval-every and --eval-suite or --eval-prompts.")


def peak_flops(name: str) -> float | None:
    """The dense bfloat16 FLOPs/s of a GPU by its name; None where they are not known."""
    words = set(name.replace("-", " ").split())
    return next((peak for key, peak in PEAKS if set(key.split()) <= words), None)


def training_flops(model: Transformer, seq_len: int) -> float:
    """FLOPs of one trained token: forward, gradients of activations, and gradients of the trained weights.

    Three times the forward's where all is trained. What recomputation adds is not counted.
    """
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    share = sum(n for n, trained in sizes if trained) / sum(n for n, _ in sizes)
    return (2.0 + share) * model.flops_per_token(seq_len)


def speed(tokens_per_s: float, flops_per_token: float, ctx: Context) -> dict[str, float]:
    """FLOPs/s of all devices and of one, and its share of what a known GPU could do in bfloat16."""
    import torch

    each = tokens_per_s * flops_per_token / ctx.world_size
    values = {"flops_per_s": each * ctx.world_size, "flops_per_s_per_device": each}
    if ctx.device.type == "cuda" and ctx.precision != "fp32":
        peak = peak_flops(torch.cuda.get_device_name(ctx.device))
        if peak is not None:
            values["flops_share"] = each / peak
    return values


def memory(device: torch.device) -> dict[str, int]:
    """Bytes of this process on its GPU, or of its resident memory on a CPU, now and at most so far."""
    if device.type == "cuda":
        import torch

        now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    else:
        import resource
        import sys

        import psutil

        now = psutil.Process().memory_info().rss
        unit = 1 if sys.platform == "darwin" else 1024
        peak = max(now, unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return {"memory_now_bytes": now, "memory_peak_bytes": peak}


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """``grad_norm/LABEL``: the norm of the gradients of all groups of that label together, over all ranks."""
    import torch

    from open_lm_linear.parallel import whole

    grads: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        grads.setdefault(group["label"], []).extend(p.grad for p in group["params"] if p.grad is not None)
    return {
        f"grad_norm/{label}": float(whole(torch.nn.utils.get_total_norm(found))) if found else 0.0
        for label, found in grads.items()
    }


def probe_states(model: Transformer, ids: Tensor, ctx: Context) -> dict[str, float]:
    """The norm of each head's state and the reach of its decay: least, median and greatest over heads and layers.

    ``state_norm`` is the Frobenius norm of S after the first tokens of one sequence; ``effective_context`` the sum of
    all weights gamma^j that a token gives to those before it, 1 / (1 - gamma), of heads that decay. Nothing is drawn,
    nothing is kept, and every rank takes part.

    Args:
        ids: (B, T) of the batch at hand; one row and ``PROBE_TOKENS`` tokens of it are read.
    """
    import torch

    from open_lm_linear.parallel import reshard

    was_training = model.training
    model.eval()
    with torch.no_grad(), ctx.autocast():
        past = model(ids[:1, :PROBE_TOKENS], use_cache=True)[2]
    reshard(model)
    model.train(was_training)
    states = [state.S for state in past.layers if hasattr(state, "S")]
    norms = [norm for S in states for norm in S[0].float().flatten(1).norm(dim=1).tolist()]
    slopes = [found for block in model.blocks() if (found := getattr(block.attention, "slopes", None))]
    return _spread("state_norm", norms) | _spread("effective_context", effective_contexts(slopes))


def effective_contexts(slopes: Iterable[Sequence[float]]) -> list[float]:
    """1 / (1 - gamma) tokens of every head of every layer, with gamma = exp(-slope)."""
    return [-1.0 / math.expm1(-s) for layer in slopes for s in layer if s > 0]


def _spread(name: str, values: list[Any]) -> dict[str, float]:
    if not values:
        return {}
    return {f"{name}_min": min(values), f"{name}_median": statistics.median(values), f"{name}_max": max(values)}
