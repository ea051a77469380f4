"""AdamW over two kinds of parameters, pretrained and new, each with its own learning rate, and their schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from open_lm_linear.cli import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule."""

    optimizer: Literal["adamw"] = "adamw"
    """The optimiser."""
    lr: float = 5e-4
    """Peak learning rate of the pretrained parameters (of all, when training from scratch)."""
    lr_new: float | None = None
    """Peak learning rate of the parameters that the swapped attention adds. None: --lr."""
    wd: float = 0.2
    """Weight decay of matrices; norms and biases have none."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.95
    """AdamW's second decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup: int = 10000
    """Steps of linear warmup."""
    lr_scheduler: Literal["cosine", "const"] = "cosine"
    """Course of the learning rate after the warmup."""
    lr_cooldown_end: float = 0.0
    """Learning rate at the last step of the cosine; new parameters end at the same fraction of their peak."""
    grad_clip_norm: float | None = None
    """Gradients above this norm (over all parameters together) are scaled down to it."""
    z_loss_coefficient: float = 0.0
    """Weight of the mean squared log of the softmax's denominator."""
    train_params: Literal["all", "new"] = "all"
    """Train everything, or only the parameters that the swapped attention adds."""

    def check(self, steps: int) -> None:
        """Refuses values that could only waste a run of ``steps`` steps."""
        if not self.lr > 0 or (self.lr_new is not None and not self.lr_new > 0):
            raise UserError(f"learning rates must be above 0, not lr {self.lr}, lr_new {self.lr_new}.")
        if self.lr_cooldown_end > self.lr:
            raise UserError(f"lr_cooldown_end {self.lr_cooldown_end} is above lr {self.lr}.")
        if self.warmup >= steps and self.lr_scheduler == "cosine":
            raise UserError(
                f"warmup {self.warmup} takes the whole run of {steps} steps: lower --warmup or train longer."
            )


def schedule(cfg: OptimConfig, step: int, steps: int) -> float:
    """Fraction of the peak learning rate at ``step`` (from 0) of ``steps``."""
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    if cfg.lr_scheduler == "const":
        return 1.0
    end = cfg.lr_cooldown_end / cfg.lr
    progress = (step - cfg.warmup) / max(1, steps - 1 - cfg.warmup)
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build(model: nn.Module, cfg: OptimConfig, new: Iterable[str]) -> torch.optim.Optimizer:
    """AdamW with up to four groups: pretrained and new, matrices and the rest. Freezes what is not trained.

    Args:
        new: names of the parameters that the pretrained checkpoint did not have.

    Raises:
        UserError: nothing is left to train.
    """
    import torch

    new = set(new)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        param.requires_grad_(cfg.train_params == "all" or name in new)
        if param.requires_grad:
            groups.setdefault((name in new, param.dim() >= 2), []).append(param)
    if not groups:
        raise UserError("--train-params new: this model has no new parameters; use --train-params all or --attn-name.")
    built = []
    for (is_new, decays), params in groups.items():
        peak = cfg.lr_new if is_new and cfg.lr_new is not None else cfg.lr
        built.append({"params": params, "peak_lr": peak, "lr": peak, "weight_decay": cfg.wd if decays else 0.0})
    return torch.optim.AdamW(built, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, cfg: OptimConfig, step: int, steps: int) -> float:
    """Puts every group at its learning rate for ``step``; returns that of the pretrained parameters."""
    fraction = schedule(cfg, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * fraction
    return cfg.lr * fraction
