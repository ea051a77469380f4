"""Which code computes decayed linear attention. This is the one place that decides.

    torch      the chunked form of `linear_attention`: any device, dtype and decay, and the definition of the others
    triton     our kernels (`triton_linear`): bfloat16 and float32 on a GPU, one decay per head
    fla        flash-linear-attention's simple_gla: half precision on a GPU
    lightning  lightning-attn, which the paper's code used: half precision on a GPU, fixed decays, whole sequences
    auto       triton where its kernels take the inputs, else torch

`use` chooses for the whole process; OPEN_LM_LINEAR_BACKEND in the environment is the choice of a process that makes
none. A backend that was asked for and cannot run the inputs is an error; only ``auto`` takes another way, and says once
why.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F

from open_lm_linear.cli import UserError, nearest
from open_lm_linear.ops.kernels import call_fla, is_short
from open_lm_linear.ops.linear_attention import linear_attention

Tensor = torch.Tensor

BACKENDS = ("auto", "torch", "triton", "fla", "lightning")
BACKEND_VARIABLE = "OPEN_LM_LINEAR_BACKEND"
BACKEND_CHOICE = {"name": ""}  # of this process
LIGHTNING_DIMS = (32, 64, 128)
HALF = (torch.bfloat16, torch.float16)
MODULES = {
    "triton": "open_lm_linear.ops.triton_linear",
    "fla": "fla.ops.simple_gla",
    "lightning": "lightning_attn.ops",
}

KERNEL_MODULES: dict[str, Any] = {}  # imported so far: a compiled block could not import

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Marks what a compiler may take as a constant, by the mark of torch.compiler.assume_constant_result.

    torch's own decorator imports the whole compiler, which takes as long as torch itself.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def use_backend(name: str) -> None:
    """Chooses the backend of this process; an empty name leaves the choice to the environment.

    Raises:
        UserError: no such backend.
    """
    if name and name not in BACKENDS:
        raise UserError(f"unknown linear attention backend {name!r}; there are: {nearest(name, BACKENDS)}.")
    BACKEND_CHOICE["name"] = name


def linear_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    first: Tensor | None = None,
    keep: Tensor | None = None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Decayed linear attention by the chosen backend: the arguments and results of `linear_attention.chunked`.

    Args:
        keep: (B, T) bool, False at a padded token: there nothing decays. Its key must be 0.
        norm_eps: GroupNorm with this epsilon, one group a head: the outputs come normalised, in float32.

    Raises:
        UserError: the backend that was asked for cannot run these inputs.
    """
    asked = chosen_backend()
    if asked == "auto":
        name = auto_backend(q, k, v, log_decay)
    else:
        name = asked
        hindrance = why_not(name, q, k, v, log_decay, state, first, keep)
        if hindrance:
            raise UserError(f"linear attention backend {name}: {hindrance}; backend auto or torch runs here.")
    if name == "triton" and q.shape[1] == 1 and not torch.is_grad_enabled():
        return KERNEL_MODULES["triton"].triton_step(q, k, v, log_decay, state, first, keep, norm_eps)
    out, last = run_backend(name, q, k, v, log_decay, state, first, keep)
    if norm_eps is not None:
        out = F.layer_norm(out.to(torch.promote_types(out.dtype, torch.float32)), out.shape[-1:], eps=norm_eps)
    return out, last


def run_backend(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    first: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The operator by one backend, which `why_not` has nothing against."""
    if name == "triton":
        return KERNEL_MODULES[name].triton_attention(q, k, v, log_decay, state, first, keep)
    if name == "lightning":
        return _lightning(q, k, v, log_decay)
    if keep is not None and log_decay is not None:
        log_decay = log_decay * keep[:, :, None]
    form = _fla if name == "fla" else linear_attention
    return form(q, k, v, log_decay, state, first)


@constant_in_graphs
def chosen_backend() -> str:
    """What `use_backend` or else the environment asks for."""
    name = BACKEND_CHOICE["name"] or os.environ.get(BACKEND_VARIABLE, "") or "auto"
    if name not in BACKENDS:
        raise UserError(f"{BACKEND_VARIABLE}={name}: no such backend; there are: {nearest(name, BACKENDS)}.")
    return name


def auto_backend(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> str:
    """The backend for these inputs; that a GPU gets the torch form is said once for each reason."""
    if not on_gpu(q):
        return "torch"
    hindrance = why_not("triton", q, k, v, log_decay, None, None, None)
    if not hindrance:
        return "triton"
    _say_once(f"linear attention runs in its torch form, which is slower on a GPU: {hindrance}")
    return "torch"


def why_not(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    first: Tensor | None,
    keep: Tensor | None,
) -> str:
    """What keeps a backend from these inputs, in words; empty where nothing does."""
    if name == "torch":
        return ""
    hindrance = missing(name, on_gpu(q))
    if hindrance:
        return hindrance
    trained = log_decay is not None and log_decay.requires_grad and torch.is_grad_enabled()
    dtypes = (torch.bfloat16, torch.float32) if name == "triton" else HALF
    if q.dtype not in dtypes or not q.dtype == k.dtype == v.dtype:
        return f"it takes {' or '.join(str(x)[6:] for x in dtypes)}, not {str(q.dtype)[6:]}"
    if name != "fla" and log_decay is not None and log_decay.dim() != 1:
        return "it takes one decay per head, not one for each token"
    if name == "lightning" and trained:
        return "it takes decays that are fixed, not trained ones"
    if name == "triton" and max(q.shape[3], v.shape[3]) > 256:
        return f"it takes heads of up to 256 dimensions, not {max(q.shape[3], v.shape[3])}"
    if name == "lightning" and (state is not None or first is not None or keep is not None):
        return "it takes whole sequences, without a state to begin with, packed documents or padding"
    if name == "lightning" and (q.shape[3] not in LIGHTNING_DIMS or v.shape[3] <= 16):
        sizes = f"{q.shape[3]} and {v.shape[3]}"
        return f"it takes keys of 32, 64 or 128 dimensions and values of more than 16, not {sizes}"
    return ""


@constant_in_graphs
def missing(name: str, gpu: bool) -> str:
    """What a backend lacks on this machine, in words; empty where it is there."""
    if name == "torch":
        return ""
    if not gpu and name != "triton":
        return "it needs a GPU"
    error = _import_error(name)
    if not error and not gpu and not KERNEL_MODULES[name].INTERPRETED:
        return "it needs a GPU (or TRITON_INTERPRET=1, which is very slow)"
    return error


@functools.lru_cache(maxsize=8)
def _import_error(name: str) -> str:
    try:
        KERNEL_MODULES[name] = importlib.import_module(MODULES[name])
    except ImportError as error:
        return f"{MODULES[name]} cannot be imported ({error}); pip install 'open_lm_linear[gpu]' has what it needs"
    return ""


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@constant_in_graphs
def _say_once(sentence: str) -> bool:
    return _said(sentence)


@functools.lru_cache(maxsize=64)
def _said(sentence: str) -> bool:
    warnings.warn(sentence, stacklevel=2)
    return True


def _fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's kernels; the state is one a query head, so that here they get a key for each."""
    groups = q.shape[2] // k.shape[2]
    inputs = {"k": k.repeat_interleave(groups, 2), "v": v.repeat_interleave(groups, 2)}
    kernel = KERNEL_MODULES["fla"].fused_recurrent_simple_gla if is_short(q) else KERNEL_MODULES["fla"].chunk_simple_gla
    if log_decay is None:
        log_decay = torch.zeros(q.shape[2], device=q.device)
    if log_decay.dim() == 1 and log_decay.requires_grad:
        log_decay = log_decay.expand(q.shape[:3])  # by the token: the kernel's g_gamma has no gradient
    if log_decay.dim() == 1:
        kernel = functools.partial(kernel, g_gamma=log_decay)
    else:
        inputs["g"] = log_decay
    return call_fla(kernel, q, inputs, state, first)


def _lightning(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """lightning-attn, whose layout is (B, H, T, D) and which has as many key heads as query heads and no state."""
    groups, tokens = q.shape[2] // k.shape[2], q.shape[1]
    if log_decay is None:
        log_decay = torch.zeros(q.shape[2], device=q.device)
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    rows = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out = KERNEL_MODULES["lightning"].lightning_attn_func(*rows, -log_decay.float().view(-1, 1, 1))
    age = torch.arange(tokens - 1, -1, -1, device=q.device)[:, None]
    weighted = k.float() * torch.exp(log_decay.float() * age)[..., None]
    return out.transpose(1, 2), torch.einsum("bthk,bthv->bhkv", weighted, v.float())
