"""Processes, devices, precision and sharding: one process or torchrun, one mechanism (FSDP2) for all of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from open_lm_linear.cli import UserError
from open_lm_linear.heap import kept_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from open_lm_linear.model import Transformer


@dataclass(frozen=True)
class ParallelConfig:
    """Devices, precision and sharding."""

    device: str = "auto"
    """auto (this rank's GPU where there is one), cpu, cuda or cuda:N."""
    precision: Literal["amp_bf16", "amp_bfloat16", "bf16", "fp32"] = "amp_bf16"
    """amp_bf16: float32 weights, bf16 compute (float32 on a CPU that has no instruction for it). bf16: bf16
    throughout. fp32: float32 throughout."""
    fsdp: bool = False
    """Shard parameters, gradients and optimiser over all ranks; without it every rank holds them all."""
    fsdp_hybrid: bool = False
    """With --fsdp: shard within each node (or --fsdp-shard-size ranks) and replicate over those groups."""
    fsdp_shard_size: int | None = None
    """Ranks over which --fsdp-hybrid shards. None: the ranks of a node."""
    fsdp_cpu_offload: bool = False
    """With --fsdp: keep parameters, gradients and optimiser in the CPU's memory, and update them there."""
    grad_checkpointing: bool = False
    """Recompute each block's activations in the backward pass."""
    grad_checkpointing_every: int = 1
    """Recompute every k-th block only, the first among them."""
    grad_checkpointing_mode: Literal["full", "selective"] = "full"
    """selective keeps the products with weight matrices and recomputes what is cheap."""
    torchcompile: bool = False
    """Compile each block."""
    linear_backend: str = ""
    """What computes linear attention: auto, torch, triton, fla or lightning (docs/kernels.md). Empty: what
    OPEN_LM_LINEAR_BACKEND says, else auto."""
    dist_backend: str = ""
    """nccl or gloo. Empty: nccl on GPUs, gloo on CPUs."""

    def check(self, world_size: int) -> None:
        """Refuses settings that do not go together, or not with this number of ranks."""
        for name in ("fsdp_hybrid", "fsdp_cpu_offload"):
            if getattr(self, name) and not self.fsdp:
                raise UserError(f"--{name.replace('_', '-')} is a way of sharding: give --fsdp too.")
        if self.fsdp_shard_size is not None and not self.fsdp_hybrid:
            raise UserError("--fsdp-shard-size says how --fsdp-hybrid shards: give that too.")
        size = self.shard_size(world_size)
        if size < 1 or world_size % size:
            raise UserError(
                f"--fsdp-hybrid cannot cut {world_size} ranks into groups of {size}: give a --fsdp-shard-size that "
                "divides them."
            )
        if self.grad_checkpointing_every < 1:
            raise UserError(f"--grad-checkpointing-every must be at least 1, not {self.grad_checkpointing_every}.")
        if not self.grad_checkpointing and (self.grad_checkpointing_every, self.grad_checkpointing_mode) != (1, "full"):
            raise UserError(
                "--grad-checkpointing-every and --grad-checkpointing-mode say how --grad-checkpointing works: "
                "give that too."
            )

    def shard_size(self, world_size: int) -> int:
        """Ranks that hold one copy of the parameters between them."""
        if not self.fsdp:
            return 1
        if not self.fsdp_hybrid:
            return world_size
        if self.fsdp_shard_size is not None:
            return self.fsdp_shard_size
        return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


@dataclass(frozen=True)
class Context:
    """Where this process stands."""

    rank: int
    world_size: int
    device: torch.device
    precision: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> Any:
        """bf16 autocast under amp, nothing otherwise or on a CPU that has no bf16 products."""
        from open_lm_linear.ops.products import autocast

        return autocast(self.device) if self.precision.startswith("amp") else contextlib.nullcontext()

    @property
    def param_dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over all ranks."""
        import torch.distributed as dist

        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        import torch.distributed as dist

        if self.world_size > 1:
            dist.barrier()


@contextlib.contextmanager
def setup(cfg: ParallelConfig) -> Iterator[Context]:
    """The process group (under torchrun), the device and its memory, for as long as the block runs."""
    import torch
    import torch.distributed as dist

    from open_lm_linear.ops.products import warn_of_bfloat16_weights

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = resolve_device(cfg.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cfg.check(world)
    grouped = world > 1 or cfg.fsdp_cpu_offload
    if grouped:
        _init_process_group(cfg, device, world)
    ctx = Context(rank, world, device, cfg.precision)
    if cfg.precision == "bf16":
        warn_of_bfloat16_weights(device)
    try:
        with kept_memory() if device.type == "cpu" else contextlib.nullcontext():
            yield ctx
        ctx.barrier()  # the ranks part together
    finally:
        if grouped:
            dist.destroy_process_group()


def _init_process_group(cfg: ParallelConfig, device: torch.device, world: int) -> None:
    import torch.distributed as dist

    backend = cfg.dist_backend or ("nccl" if device.type == "cuda" else "gloo")
    if cfg.fsdp_cpu_offload and device.type == "cuda":
        backend = f"cpu:gloo,cuda:{backend}"  # norms of gradients are summed where the gradients lie
    if world > 1:
        dist.init_process_group(backend)
    else:  # sharding needs a group even where there is one rank
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a ``--device`` flag names; ``auto`` is this rank's GPU, or the CPU where there is none.

    Raises:
        UserError: no such device, or a GPU where torch finds none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is not a device: give auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no GPU here; --device cpu runs without one.")
    return device


def apply(model: Transformer, cfg: ParallelConfig, ctx: Context) -> Transformer:
    """Activation checkpointing, compilation per block, sharding per block and root, in this order, on a meta model.

    On several ranks without ``fsdp`` the same mechanism replicates: a mesh of (ranks, 1) keeps every parameter whole
    and averages gradients. A hybrid's mesh is (groups, ranks of a group).
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    cfg.check(ctx.world_size)
    model.grad_checkpointing = cfg.grad_checkpointing_every if cfg.grad_checkpointing else 0
    model.grad_checkpointing_mode = cfg.grad_checkpointing_mode
    if cfg.torchcompile:
        for layer in model.layers:
            layer.compile()
    if ctx.world_size == 1 and not cfg.fsdp_cpu_offload:
        return model
    kind, size = ctx.device.type, cfg.shard_size(ctx.world_size)
    if size == ctx.world_size:
        mesh = init_device_mesh(kind, (ctx.world_size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(kind, (ctx.world_size // size, size), mesh_dim_names=("replicate", "shard"))
    compute = torch.bfloat16 if ctx.precision.startswith("amp") and kind == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=kind == "cuda") if cfg.fsdp_cpu_offload else OffloadPolicy()
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=offload)
        register_fsdp_forward_method(part, "trace")
    register_fsdp_forward_method(model, "loss")
    return model


def storage(cfg: ParallelConfig, ctx: Context) -> torch.device:
    """Where parameters are kept."""
    import torch

    return torch.device("cpu") if cfg.fsdp_cpu_offload else ctx.device


def accumulating(model: Transformer, ctx: Context, last: bool) -> None:
    """Before each backward pass: whether gradients are exchanged now (the last of a step) or kept for later."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]


def clip_gradients(model: Transformer, limit: float | None) -> float:
    """The norm of all gradients together, over all ranks, before they are scaled down to ``limit``."""
    import torch

    params = [p for p in model.parameters() if p.grad is not None]
    return float(whole(torch.nn.utils.clip_grad_norm_(params, float("inf") if limit is None else limit)))


@contextlib.contextmanager
def unsharded(module: Any) -> Iterator[None]:
    """A module with its own parameters whole for as long as the block runs, so that its parts can be called alone."""
    if hasattr(module, "unshard"):
        module.unshard()
    try:
        yield
    finally:
        if hasattr(module, "reshard"):
            module.reshard()


def reshard(model: nn.Module) -> None:
    """Lets go of the whole parameters that a forward pass without gradients leaves behind under FSDP2.

    Until then ``model.parameters()`` are these and not the sharded ones that an optimiser holds.
    """
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every rank takes part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def put(target: Tensor, value: Tensor) -> None:
    """Copies ``value`` into ``target``; of a sharded one, into this rank's shard, without communication."""
    import torch

    placements = getattr(target, "placements", None)
    with torch.no_grad():
        if placements is None or hasattr(value, "placements"):
            target.copy_(value)
            return
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device, target.dtype)
        target.copy_(distribute_tensor(value, target.device_mesh, placements, src_data_rank=None))  # type: ignore[attr-defined]


def put_rows(target: Tensor, read: Callable[[int, int], Tensor], block: int = 16 << 20) -> None:
    """Fills ``target`` with rows that ``read(begin, end)`` gives, of a sharded one this rank's alone, block by block.

    Args:
        read: rows [begin, end) along dim 0 on the CPU; of a scalar all of it.
        block: bytes of ``target`` to ask for at once.
    """
    import torch

    local, offset = _local(target)
    with torch.no_grad():
        if not local.dim():
            local.copy_(read(0, 1))
            return
        step = max(1, block // max(1, local[:1].numel() * local.element_size()))
        for begin in range(0, len(local), step):
            end = min(begin + step, len(local))
            rows = read(offset[0] + begin, offset[0] + end)
            for dim in range(1, local.dim()):
                rows = rows.narrow(dim, offset[dim], local.shape[dim])
            local[begin:end].copy_(rows)


def _local(target: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a tensor that may be sharded, and where it begins in the whole."""
    if not hasattr(target, "to_local"):
        return target, (0,) * target.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)  # type: ignore[attr-defined]
    return target.to_local(), tuple(offset)
