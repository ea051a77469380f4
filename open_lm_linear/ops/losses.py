"""Cross entropy, and divergence from a teacher, that never hold the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from open_lm_linear.ops.native_losses import native_divergence, native_entropy
from open_lm_linear.ops.products import product_dtype

Tensor = torch.Tensor

IGNORE = -100
LOGITS_CHUNK = 1024
CACHED = 1 << 20  # logits that a CPU reduces at a time: 4 MiB of float32 stay in its cache from pass to pass
NO_MASS = -1e4  # the log of a probability that is 0 in every precision


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss: float = 0.0,
    chunk: int = LOGITS_CHUNK,
    softcap: float | None = None,
) -> Tensor:
    """Summed cross entropy of ``hidden @ weight.T`` against ``targets``, by chunks of tokens.

    The gradients are computed on the way forward, while a chunk's logits are at hand, so that backward multiplies and
    no logits are kept or computed twice. Logits are made in the autocast dtype and reduced in float32.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) token ids, -100 where there is nothing to predict.
        z_loss: coefficient of sum(logsumexp(logits)^2), over the same tokens (arXiv 2204.02311).
        softcap: logits x become softcap * tanh(x / softcap) (arXiv 2408.00118).

    Returns:
        (2,) float32: the cross entropy alone, for the log, and the total with z-loss, to be differentiated.
    """

    def loss_of(chunk: slice) -> ChunkLoss:
        target = targets[chunk]
        return ChunkLoss(
            lambda logits, rows: _entropy(logits, target[rows], z_loss),
            lambda logits, gradient: native_entropy(logits, target, z_loss, gradient),
        )

    return _by_chunks(hidden, weight, chunk, softcap, loss_of)


@dataclass(frozen=True)
class Teaching:
    """What a frozen teacher says of a batch, and how much it counts.

    Args:
        hidden: (..., D') behind its final norm, for the same tokens; ``weight`` (V, D') makes logits of it.
        softcap: of its logits.
        ce: weight of the cross entropy with its z-loss; ``kl``: of the divergence.
        temperature: both sides' logits are divided by it, and the divergence is multiplied by its square, so that its
            gradient keeps its size (arXiv 1503.02531).
        top_k: how many of its likeliest tokens are told apart, all others being one; 0: all are.
    """

    hidden: Tensor
    weight: Tensor
    softcap: float | None = None
    ce: float = 0.0
    kl: float = 1.0
    temperature: float = 1.0
    top_k: int = 0

    def row(self, i: int) -> Teaching:
        """What it says of one sequence of the batch."""
        return replace(self, hidden=self.hidden[i])


@dataclass(frozen=True)
class TopTeaching:
    """What a teacher said of a batch beforehand: its likeliest next tokens and all others together (``top_k_of``).

    Args:
        ids: (..., k) token ids, for the same tokens as the student's.
        log_p: (..., k + 1) log-probabilities of these and, last, of all other tokens, at ``temperature``.
        ce, kl, temperature: as in ``Teaching``.
    """

    ids: Tensor
    log_p: Tensor
    ce: float = 0.0
    kl: float = 1.0
    temperature: float = 1.0

    def row(self, i: int) -> TopTeaching:
        """What it says of one sequence of the batch."""
        return replace(self, ids=self.ids[i], log_p=self.log_p[i])


def top_k_of(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens (n, k) of logits (n, V), and the log-probabilities of them and of the rest (n, k + 1)."""
    log_p = torch.log_softmax(logits / temperature, -1)
    top = log_p.topk(k, -1)
    rest = log_p.scatter_(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)  # -inf where k is V
    return top.indices, torch.cat((top.values, rest), -1)


def top_k_by_chunks(
    hidden: Tensor, weight: Tensor, k: int, temperature: float, softcap: float | None, chunk: int = LOGITS_CHUNK
) -> tuple[Tensor, Tensor]:
    """``top_k_of`` of a model's final hidden states (B, T, D): ids (B, T, k) and log-probabilities (B, T, k + 1)."""
    found = []
    for part in hidden.flatten(0, 1).split(chunk):
        logits, _ = _capped((part @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)), softcap)
        found.append(top_k_of(logits, k, temperature))
    ids, log_p = (torch.cat(parts).unflatten(0, hidden.shape[:2]) for parts in zip(*found, strict=True))
    return ids, log_p


def chunked_distillation(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teaching: Teaching | TopTeaching,
    z_loss: float = 0.0,
    chunk: int = LOGITS_CHUNK,
    softcap: float | None = None,
) -> Tensor:
    """``chunked_cross_entropy`` and the divergence KL(teacher | student), over the same tokens.

    The divergence is over the vocabulary or, with k, over k + 1 outcomes: the teacher's k likeliest tokens, each with
    the student's probability of it, and all other tokens together.

    Neither side's logits are ever held for more than a chunk of tokens.

    Returns:
        (3,) float32: the summed cross entropy, the summed divergence, and ce * (cross entropy + z-loss) + kl *
        divergence, to be differentiated. The teacher gets no gradient.
    """
    if isinstance(teaching, TopTeaching):
        ids, log_p = teaching.ids.flatten(0, -2), teaching.log_p.flatten(0, -2)

        def loss_of_kept(chunk: slice) -> ChunkLoss:
            top, p, target = ids[chunk], log_p[chunk], targets[chunk]
            return ChunkLoss(lambda x, rows: _top_divergence(x, top[rows], p[rows], target[rows], teaching, z_loss))

        return _by_chunks(hidden, weight, chunk, softcap, loss_of_kept)
    dtype = _compute_dtype(hidden)
    theirs, their_weight = teaching.hidden.detach().flatten(0, -2), teaching.weight.detach().to(dtype)
    plain = teaching.temperature == 1 and not (teaching.top_k or teaching.softcap or z_loss)

    def loss_of(chunk: slice) -> ChunkLoss:
        reference, target = theirs[chunk].to(dtype) @ their_weight.T, targets[chunk]

        def loss(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            wide, _ = _capped(reference[rows].to(logits.dtype), teaching.softcap)
            if teaching.top_k:
                top = top_k_of(wide, teaching.top_k, teaching.temperature)
                return _top_divergence(logits, *top, target[rows], teaching, z_loss)
            return _divergence(logits, wide, target[rows], teaching, z_loss)

        def at_once(logits: Tensor, gradient: bool) -> Tensor | None:
            return native_divergence(logits, reference, target, teaching.ce, teaching.kl, gradient)

        return ChunkLoss(loss, at_once if plain else None)

    return _by_chunks(hidden, weight, chunk, softcap, loss_of)


@dataclass(frozen=True)
class ChunkLoss:
    """The loss of a chunk of logits (n, V)."""

    rows: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
    """Of some of them, which it may overwrite, and their rows: sums (K,) and the gradient by the last of these."""
    at_once: Callable[[Tensor, bool], Tensor | None] | None = None
    """Of all, which become that gradient if it is wanted: sums (K,); or None, and nothing done."""


def _by_chunks(
    hidden: Tensor, weight: Tensor, chunk: int, softcap: float | None, loss_of: Callable[[slice], ChunkLoss]
) -> Tensor:
    need = torch.is_grad_enabled() and (hidden.requires_grad, weight.requires_grad)
    return _ByChunks.apply(hidden, weight, chunk, softcap, loss_of, _compute_dtype(hidden), need or (False, False))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of products: autocast's where it is on, but none that the device has no products of."""
    device = hidden.device
    on = torch.is_autocast_enabled(device.type)
    return product_dtype(torch.get_autocast_dtype(device.type) if on else hidden.dtype, device)


class _ByChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, chunk, softcap, loss_of, dtype, need):  # type: ignore[override]
        dhidden = torch.empty_like(hidden, dtype=dtype) if need[0] else None
        total: Any = 0.0
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            buffer = torch.empty(min(chunk, len(hidden)), len(w), dtype=dtype, device=hidden.device)
            gradient = _Sum(w) if need[1] else None
            for begin in range(0, max(1, hidden.shape[0]), chunk):
                span = slice(begin, begin + chunk)
                h = hidden[span].to(dtype)
                logits = torch.mm(h, w.T, out=buffer[: len(h)])
                total = total + _reduce(logits, softcap, loss_of(span), gradient=any(need))
                if dhidden is not None:
                    torch.mm(logits, w, out=dhidden[span])
                if gradient is not None:
                    gradient.add(logits.T, h)
        dweight = torch.empty(0) if gradient is None else gradient.value
        ctx.save_for_backward(torch.empty(0) if dhidden is None else dhidden, dweight)
        ctx.dtypes, ctx.need = (hidden.dtype, weight.dtype), need
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[override]
        grads = []
        for saved, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.need, strict=True):
            grads.append(_multiplied(saved, grad[-1].to(saved.dtype), dtype) if need else None)
        return *grads, *[None] * 5


class _Sum:
    """A sum of products of the shape and dtype of ``like``, in float32 at least; nothing is made anew for each."""

    def __init__(self, like: Tensor) -> None:
        self.wide = torch.promote_types(like.dtype, torch.float32)
        self.product = torch.empty_like(like)
        self.value = torch.empty(0)

    def add(self, a: Tensor, b: Tensor) -> None:
        begun = self.value.numel() > 0
        if begun and self.wide == self.product.dtype:
            self.value.addmm_(a, b)
            return
        torch.mm(a, b, out=self.product)
        self.value = self.value.add_(self.product) if begun else self.product.to(self.wide)


def _multiplied(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x (n, D) times a number, in ``dtype``, without another x in its own on the way."""
    if x.dtype == dtype:
        return x * factor
    out = torch.empty_like(x, dtype=dtype)
    step = max(1, CACHED // x.shape[1]) if x.device.type == "cpu" else len(x)
    for begin in range(0, len(x), step):
        out[begin : begin + step] = x[begin : begin + step] * factor
    return out


def _reduce(logits: Tensor, softcap: float | None, loss: ChunkLoss, gradient: bool) -> Tensor:
    """The sums (K,) of a chunk's loss, in float32; ``logits`` (n, V) become the gradient by them, if it is wanted."""
    if loss.at_once is not None and softcap is None:
        sums = loss.at_once(logits, gradient)
        if sums is not None:
            return sums
    wide = torch.promote_types(logits.dtype, torch.float32)
    step = max(1, CACHED // logits.shape[1] if logits.device.type == "cpu" else len(logits))
    total: Any = 0.0
    for begin in range(0, max(1, len(logits)), step):
        rows = slice(begin, begin + step)
        capped, slope = _capped(logits[rows].to(wide), softcap)
        sums, grad = loss.rows(capped, rows)
        total = total + sums
        if gradient:
            logits[rows] = grad if slope is None else grad.mul_(slope)
    return total


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Logits under their cap, in place, and the slope of the cap, for the gradient."""
    if softcap is None:
        return logits, None
    logits = logits.div_(softcap).tanh_()
    slope = 1 - logits.square()
    return logits.mul_(softcap), slope


def _entropy(logits: Tensor, target: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """(cross entropy, the same with z-loss) summed, and the gradient of the second, in place of the logits."""
    counted = target != IGNORE
    picked = logits.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    # One exponential serves both the normaliser and the gradient.
    top = logits.amax(-1)
    total = logits.sub_(top[:, None]).exp_().sum(-1)
    log_z = top + total.log()
    entropy = ((log_z - picked) * counted).sum()
    square = (log_z.square() * counted).sum()
    # d/dlogits = softmax * (1 + 2 z log_z) - one_hot(target)
    grad = logits.mul_((counted * (1 + 2 * z_loss * log_z) / total)[:, None])
    grad.scatter_add_(-1, target.clamp(min=0)[:, None], -counted.to(grad.dtype)[:, None])
    return torch.stack((entropy, entropy + z_loss * square)), grad


def _divergence(
    logits: Tensor, theirs: Tensor, target: Tensor, teaching: Teaching, z_loss: float
) -> tuple[Tensor, Tensor]:
    """(cross entropy, divergence, weighted total) summed, and the total's gradient, in place of the logits."""
    counted, t = target != IGNORE, teaching.temperature
    log_q = torch.log_softmax(logits if t == 1 else logits / t, -1)
    log_p = torch.log_softmax(theirs if t == 1 else theirs.div_(t), -1)
    p = log_p.exp()
    divergence = t * t * (log_p.sub_(log_q).mul_(p).sum(-1) * counted).sum()
    if t == 1 and not z_loss:  # then one softmax serves both
        at, ce, kl = target.clamp(min=0)[:, None], teaching.ce, teaching.kl
        nats = -(log_q.gather(-1, at)[:, 0] * counted).sum()
        grad = log_q.exp_().mul_(ce + kl).sub_(p, alpha=kl).mul_(counted[:, None])
        grad.scatter_add_(-1, at, -ce * counted.to(grad.dtype)[:, None])
        return torch.stack((nats, divergence, ce * nats + kl * divergence)), grad
    slope = log_q.exp_().sub_(p).mul_((teaching.kl * t * counted)[:, None])  # t^2 (q - p) / t
    entropy, grad = _entropy(logits, target, z_loss)
    total = teaching.ce * entropy[1] + teaching.kl * divergence
    return torch.stack((entropy[0], divergence, total)), grad.mul_(teaching.ce).add_(slope)


def _top_divergence(
    logits: Tensor, ids: Tensor, log_p: Tensor, target: Tensor, teaching: Teaching | TopTeaching, z_loss: float
) -> tuple[Tensor, Tensor]:
    """As ``_divergence``, over the tokens ``ids`` (n, k) and the rest; the teacher has ``log_p`` (n, k + 1)."""
    counted, t = target != IGNORE, teaching.temperature
    log_p = log_p.to(logits.dtype).clamp(min=NO_MASS)  # where nothing is left, 0 * log 0 is 0
    others = logits / t
    log_z, ours = others.logsumexp(-1, keepdim=True), others.gather(-1, ids)
    rest = others.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True).clamp(min=NO_MASS)
    log_q = torch.cat((ours, rest), -1) - log_z
    p = log_p.exp()
    divergence = t * t * (((log_p - log_q) * p).sum(-1) * counted).sum()
    error = log_q.exp() - p
    # d/dlogits = q - p for a token of its own; the rest's error is shared out by the student's probabilities within it
    slope = others.sub_(rest).exp_().mul_(error[:, -1:]).scatter_(-1, ids, error[:, :-1])
    slope.mul_((teaching.kl * t * counted)[:, None])
    entropy, grad = _entropy(logits, target, z_loss)
    total = teaching.ce * entropy[1] + teaching.kl * divergence
    return torch.stack((entropy[0], divergence, total)), grad.mul_(teaching.ce).add_(slope)


def cross_entropy_per_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy (nats) of each target: logits (B, T, V), targets (B, T) -> (B, T) float32, 0 where ignored."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none").view(
        targets.shape
    )
