"""AdamW over groups of parameters, each with its own learning rate, weight decay and warmup, and their schedule."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import UseAppendAction

from open_lm_linear import groups
from open_lm_linear.averaging import parse_averager
from open_lm_linear.cli import UserError
from open_lm_linear.groups import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """The optimiser; adamw8bit keeps its moments in 8 bits and needs torchao."""
    lr: float = 5e-4
    """Peak learning rate of the pretrained parameters (of all, when training from scratch)."""
    lr_new: float | None = None
    """Peak learning rate of the parameters that the swapped attention adds. None: --lr."""
    wd: float = 0.2
    """Weight decay of matrices; norms and biases have none."""
    wd_new: float | None = None
    """Weight decay of the new matrices. None: --wd."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.95
    """AdamW's second decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup: int = 10000
    """Steps of linear warmup."""
    warmup_new: int | None = None
    """Steps of linear warmup of the new parameters. None: --warmup."""
    lr_scheduler: Literal["cosine", "const", "const-cooldown"] = "cosine"
    """Course of the learning rate after the warmup; const-cooldown stays at the peak until --epochs-cooldown."""
    lr_cooldown_end: float = 0.0
    """Learning rate at the last step of a cosine or a cooldown; every group ends at the same fraction of its peak."""
    lr_cooldown_power: float = 1.0
    """Shape of the cooldown of const-cooldown: (share of it that is left)^power; 1 is a straight line."""
    epochs_cooldown: int | None = None
    """The last epochs, over which const-cooldown cools down."""
    force_min_lr: float = 0.0
    """After the warmup the learning rate never falls below this; other groups keep the same fraction of their peak."""
    grad_clip_norm: float | None = None
    """Gradients above this norm (over all parameters together) are scaled down to it."""
    z_loss_coefficient: float = 0.0
    """Weight of the mean squared log of the softmax's denominator."""
    train_params: str = "all"
    """all; new, what the swapped attention adds; or patterns of parameter names such as 'layers.*.attention.*,norm.*';
    with commas between them."""
    freeze: str = ""
    """Names or patterns that are not trained, whatever --train-params says."""
    param_group: UseAppendAction[tuple[str, ...]] = ()
    """'PATTERN:lr=1e-4,wd=0.1,warmup=500', with any of the three: settings of the parameters that a pattern names
    (new is a pattern too). May be given several times, after those of a --config file; a later one wins."""
    averagers: str = ""
    """Running averages of the weights, validated beside them: ema_DECAY[_EVERY] (0.999), poly_ETA[_EVERY] (8_1), with
    commas between them."""

    def check(self, steps: int, steps_per_epoch: int = 0) -> None:
        """Refuses values that could only waste a run of ``steps`` steps."""
        if not self.lr > 0 or (self.lr_new is not None and not self.lr_new > 0):
            raise UserError(f"learning rates must be above 0, not lr {self.lr}, lr_new {self.lr_new}.")
        for name in ("lr_cooldown_end", "force_min_lr"):
            if getattr(self, name) > self.lr:
                raise UserError(f"{name} {getattr(self, name)} is above lr {self.lr}.")
        cooling = self.cooldown(steps_per_epoch)
        for flag, warmup in self._warmups():
            if warmup >= steps and self.lr_scheduler != "const":
                raise UserError(f"{flag} {warmup} takes the whole run of {steps} steps: lower it or train longer.")
            if cooling and warmup + cooling > steps:
                raise UserError(
                    f"{flag} {warmup} and the cooldown of {cooling} steps (--epochs-cooldown) are more than the run's "
                    f"{steps} steps: lower one of them or train longer."
                )
        if not self.lr_cooldown_power > 0:
            raise UserError(f"--lr-cooldown-power must be above 0, not {self.lr_cooldown_power}.")
        for name in filter(None, self.averagers.split(",")):
            parse_averager(name)

    def cooldown(self, steps_per_epoch: int) -> int:
        """Steps of the cooldown; 0 under the other schedules."""
        if self.lr_scheduler != "const-cooldown":
            if self.epochs_cooldown is not None:
                raise UserError("--epochs-cooldown belongs to --lr-scheduler const-cooldown: give both or neither.")
            return 0
        if self.epochs_cooldown is None or self.epochs_cooldown < 1:
            raise UserError("--lr-scheduler const-cooldown needs --epochs-cooldown, the epochs it cools down over.")
        return self.epochs_cooldown * steps_per_epoch

    def _warmups(self) -> Iterator[tuple[str, int]]:
        """Every warmup with the flag that set it."""
        yield "warmup", self.warmup
        if self.warmup_new is not None:
            yield "warmup-new", self.warmup_new
        for text in self.param_group:
            if (warmup := groups.parse_rule(text).given.get("warmup")) is not None:
                yield f"param-group {text!r}: warmup", int(warmup)


def schedule(cfg: OptimConfig, step: int, steps: int, *, warmup: int | None = None, steps_per_epoch: int = 0) -> float:
    """Fraction of the peak learning rate at ``step`` (from 0) of ``steps``; nothing else enters.

    Args:
        warmup: of the group; None: ``cfg.warmup``.
        steps_per_epoch: what ``epochs_cooldown`` counts.
    """
    warmup = cfg.warmup if warmup is None else warmup
    if step < warmup:
        return (step + 1) / warmup
    end = cfg.lr_cooldown_end / cfg.lr
    left = 1.0
    if cfg.lr_scheduler == "cosine":
        progress = (step - warmup) / max(1, steps - 1 - warmup)
        left = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    elif cfg.lr_scheduler == "const-cooldown":
        cooling = cfg.cooldown(steps_per_epoch)
        left = min(1.0, max(0, steps - 1 - step) / max(1, cooling)) ** cfg.lr_cooldown_power
    return max(end + (1.0 - end) * left, cfg.force_min_lr / cfg.lr)


def assign(
    cfg: OptimConfig, matrices: Mapping[str, bool], new: Collection[str], reached: Collection[str] | None = None
) -> dict[str, Settings | None]:
    """The settings of each parameter, None where it is frozen.

    Args:
        matrices: every parameter's name -> whether it is a matrix, to which weight decay applies.
        reached: names that the loss has a gradient for; None: all.

    Raises:
        UserError: a pattern that names nothing, or nothing left to train.
    """
    new = set(new)

    def either(special: Any, usual: Any) -> Any:
        return usual if special is None else special

    added = Settings("new", either(cfg.lr_new, cfg.lr), either(cfg.wd_new, cfg.wd), either(cfg.warmup_new, cfg.warmup))
    kept = Settings("pretrained" if new else "all", cfg.lr, cfg.wd, cfg.warmup)
    chosen = {"train": cfg.train_params, "freeze": cfg.freeze, "rules": cfg.param_group}
    return groups.assign(dict(matrices), new, **chosen, kept=kept, added=added, reached=reached)  # type: ignore[arg-type]


def is_matrix(name: str, param: Tensor) -> bool:
    """Whether weight decay applies: to all that has two dimensions, but for biases (one a head has two as well) and for
    the logarithms of Mamba's decays, as in mamba_ssm."""
    return param.dim() >= 2 and not name.endswith(("bias", "A_log"))


def trained_names(
    model: nn.Module, cfg: OptimConfig, new: Collection[str], reached: Collection[str] | None = None
) -> list[str]:
    """The parameters that a run would train; refuses what ``build`` would refuse, without memory."""
    chosen = assign(cfg, {n: is_matrix(n, p) for n, p in model.named_parameters()}, new, reached)
    return [name for name, settings in chosen.items() if settings is not None]


def build(
    model: nn.Module, cfg: OptimConfig, new: Collection[str], reached: Collection[str] | None = None
) -> torch.optim.Optimizer:
    """The optimiser, with two groups for each kind of settings, matrices and the rest. Freezes what is not trained.

    Args:
        new: names of the parameters that the pretrained checkpoint did not have.
        reached: names that the loss has a gradient for; None: all.

    Raises:
        UserError: a pattern that names nothing, or nothing left to train.
    """
    import torch

    chosen = assign(cfg, {n: is_matrix(n, p) for n, p in model.named_parameters()}, new, reached)
    members: dict[tuple[Settings, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, param in model.named_parameters():
        settings = chosen[name]
        param.requires_grad_(settings is not None)
        if settings is not None:
            members.setdefault((settings, is_matrix(name, param)), []).append((name, param))
    built: list[dict[str, Any]] = [
        {
            "params": [p for _, p in named],
            "names": [n for n, _ in named],
            "label": settings.label,
            "matrices": matrices,
            "peak_lr": settings.lr,
            "lr": settings.lr,
            "warmup": settings.warmup,
            "weight_decay": settings.wd if matrices else 0.0,
        }
        for (settings, matrices), named in members.items()
    ]
    betas = (cfg.beta1, cfg.beta2)
    if cfg.optimizer == "adamw8bit":
        return _adamw8bit(built, betas, cfg.eps)
    return torch.optim.AdamW(built, betas=betas, eps=cfg.eps, fused=True)


def _adamw8bit(built: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """torchao's AdamW with moments of 8 bits, which knows sharded parameters."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "--optimizer adamw8bit needs torchao: pip install 'open_lm_linear[adamw8bit]', or use --optimizer adamw."
        ) from error
    return AdamW8bit(built, betas=betas, eps=eps)


def begin_states(optimizer: torch.optim.Optimizer) -> None:
    """Gives every trained parameter the state that the first step would begin with, for a checkpoint to fill."""
    import torch

    for group in optimizer.param_groups:
        for param in group["params"]:
            if hasattr(optimizer, "_new_buffer"):  # torchao's: some tensors in 8 bits, small ones as they are
                state = {"step": torch.zeros(())}
                state |= {"exp_avg": optimizer._new_buffer(param, True)}
                state |= {"exp_avg_sq": optimizer._new_buffer(param, False)}
            else:
                state = {"step": torch.zeros((), device=param.device)}
                state |= {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[param] = state


def bytes_per_trained(cfg: OptimConfig, width: int) -> int:
    """Bytes that a trained parameter of ``width`` bytes takes beyond itself: gradient, moments and averages."""
    moments = 2 if cfg.optimizer == "adamw8bit" else 2 * width
    return width + moments + 4 * len([name for name in cfg.averagers.split(",") if name.strip()])


def is_eight_bit(value: Tensor) -> bool:
    """Whether a state of the optimiser, or this rank's part of it, is held in 8 bits."""
    return hasattr(value.to_local() if hasattr(value, "to_local") else value, "codes")


def dequantised(value: Tensor) -> Tensor:
    """A state of the optimiser as an ordinary tensor, of 8 bits in float32.

    What copies it back into an 8-bit state rounds it to 8 bits anew.
    """
    return value.dequantize().float() if hasattr(value, "codes") else value


def set_learning_rates(
    optimizer: torch.optim.Optimizer, cfg: OptimConfig, step: int, steps: int, steps_per_epoch: int = 0
) -> float:
    """Puts every group at its learning rate for ``step``; returns that of the pretrained parameters."""
    for group in optimizer.param_groups:
        lr = group["peak_lr"] * schedule(cfg, step, steps, warmup=group["warmup"], steps_per_epoch=steps_per_epoch)
        if hasattr(group["lr"], "fill_"):  # torchao keeps it in a tensor, which its compiled step reads
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    return cfg.lr * schedule(cfg, step, steps, steps_per_epoch=steps_per_epoch)


def table(model: nn.Module, optimizer: torch.optim.Optimizer, cfg: OptimConfig) -> str:
    """What is trained and what is frozen, a line for each group of parameters."""
    rows = [("trained with " + cfg.optimizer, "tensors", "parameters", "peak lr", "wd", "warmup")]
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    trained: set[str] = set()
    for group in optimizer.param_groups:
        trained |= set(group["names"])
        kind = "matrices" if group["matrices"] else "norms and biases"
        figures = f"{group['peak_lr']:.2e}", f"{group['weight_decay']:g}", f"{group['warmup']:,}"
        count = sum(sizes[name] for name in group["names"])
        rows.append((f"{group['label']}, {kind}", f"{len(group['names']):,}", f"{count:,}", *figures))
    frozen = [size for name, size in sizes.items() if name not in trained]
    if frozen:
        rows.append(("frozen", f"{len(frozen):,}", f"{sum(frozen):,}", "-", "-", "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
