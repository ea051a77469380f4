"""Are the kernels right on this device? `python -m open_lm_linear.ops.check` compares every backend that is here with
the definition in float64: outputs, last state, and the gradients by q, k, v, the decays and the first state.

Kernels that are right on one GPU, driver and compiler can be wrong on the next, and a wrong gradient trains without
complaint. So the command prints a table and ends with an error if a backend is wrong, and training runs its first case
before the first step.

Errors are ||x - exact|| / ||exact||. A result in half precision is rounded once whatever computed it; what stands in
the table is the error beyond that, sqrt(error^2 - rounding^2), where rounding is the error of the rounded exact result.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from open_lm_linear import cli
from open_lm_linear.cli import UserError

if TYPE_CHECKING:
    import torch

PARTS = ("out", "state", "dq", "dk", "dv", "dlog_decay", "dstate")
FLOAT32_BOUND = 1e-5
# What may be wrong by in half precision. Our kernels keep more digits of what they compute on the way to a gradient;
# the others round it to half precision. Triton's interpreter cuts digits off instead of rounding.
HALF_BOUND, TRITON_GRADIENT_BOUND = 1e-2, 1e-3


@dataclass(frozen=True)
class Check:
    """What is compared."""

    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    backends: tuple[str, ...] = ()
    """Backends to check. None given: all that run on this device."""
    cases: int = 0
    """The first so many cases (0: all)."""


class Case(NamedTuple):
    """One edge: lengths that no chunk divides, head sizes, sharing, states, documents, padding, decays."""

    label: str
    dtype: str
    shape: tuple[int, int, int, int, int, int]  # B, T, H, Hkv, K, V
    strength: float = 1.0  # log decays lie between 0 and minus this
    state: bool = False
    first: bool = False
    keep: bool = False
    segment: int = 0  # tokens that a Triton program walks along; 0: its choice


CASES = (
    Case("as in training", "bfloat16", (1, 200, 8, 2, 128, 128)),
    Case("the same", "float32", (1, 200, 8, 2, 128, 128)),
    Case("odd sizes, documents, padding", "bfloat16", (2, 150, 4, 2, 80, 48), state=True, first=True, keep=True),
    Case("the same", "float32", (2, 70, 4, 2, 80, 48), state=True, first=True, keep=True),
    Case("cut into segments, decays that underflow", "float32", (1, 300, 4, 1, 32, 64), 1e3, state=True, segment=128),
    Case("cut into segments, almost no decay", "bfloat16", (1, 300, 2, 2, 64, 64), 1e-4, True, True, segment=128),
    Case("widest heads", "bfloat16", (1, 65, 2, 1, 256, 256), state=True),
    Case("narrowest heads", "float32", (1, 129, 2, 1, 16, 16), first=True),
    Case("one token", "bfloat16", (2, 1, 4, 2, 64, 64), state=True),
)


class Finding(NamedTuple):
    """A backend in a case: the errors by part, or why it was left out."""

    backend: str
    case: Case
    errors: dict[str, float]
    skipped: str
    right: bool
    seconds: float


def inputs_of_case(case: Case, device: torch.device) -> dict[str, torch.Tensor | None]:
    """Arguments of the operator, the same for every backend, in the case's dtype."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def chance(p: float) -> torch.Tensor:
        return torch.rand(batch, tokens, generator=generator) < p

    batch, tokens, heads, kv_heads, dim_k, dim_v = case.shape
    dtype = getattr(torch, case.dtype)
    keep = ~chance(0.1) if case.keep else None
    k = normal(batch, tokens, kv_heads, dim_k) / dim_k**0.5
    found = {
        "q": normal(batch, tokens, heads, dim_k).to(dtype),
        "k": (k if keep is None else k.masked_fill(~keep[:, :, None, None], 0.0)).to(dtype),
        "v": normal(batch, tokens, kv_heads, dim_v).to(dtype),
        "log_decay": -case.strength * torch.rand(heads, generator=generator),
        "state": normal(batch, heads, dim_k, dim_v) if case.state else None,
        "first": chance(0.05) if case.first else None,
        "keep": keep,
    }
    return {name: None if x is None else x.to(device) for name, x in found.items()}


def results(
    form: Callable[..., tuple[torch.Tensor, torch.Tensor]], given: dict[str, torch.Tensor | None], trained: bool = True
) -> dict[str, torch.Tensor]:
    """Output, last state and the gradients of a fixed weighing of both, by the names in ``PARTS``.

    The decays get one if they are ``trained``.
    """
    import torch

    names = ("q", "k", "v", *(["log_decay"] if trained else []), "state")
    leaves = {n: x.detach().requires_grad_() for n in names if (x := given[n]) is not None}
    out, last = form(**{**given, **leaves})
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in (out, last)]
    gradients = torch.autograd.grad((out, last), list(leaves.values()), weights)
    return {"out": out.detach(), "state": last.detach()} | {
        f"d{name}": x for name, x in zip(leaves, gradients, strict=True)
    }


def exact_results(given: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The definition's, in float64."""
    import torch

    from open_lm_linear.ops.linear_attention import naive

    wide = {name: x.double() if x is not None and x.dtype != torch.bool else x for name, x in given.items()}

    def form(keep: Any, log_decay: Any, **others: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return naive(log_decay=log_decay if keep is None else log_decay * keep[:, :, None], **others)

    return results(form, wide)


def error_beyond_rounding(x: torch.Tensor, exact: torch.Tensor, size: float = 0.0) -> float:
    """||x - exact|| / ||exact|| less, in squares, that of the exact result in x's dtype; not finite stays so.

    ``size`` stands for ||exact|| where that is smaller.
    """
    size = max(exact.norm().item(), size) or 1.0
    error, rounding = ((y.double() - exact).norm().item() / size for y in (x, exact.to(x.dtype)))
    return math.sqrt(max(error**2 - rounding**2, 0.0)) if math.isfinite(error) else math.inf


def check_cases(backends: tuple[str, ...], device: torch.device, cases: tuple[Case, ...] = CASES) -> Iterator[Finding]:
    """Every backend in every case."""
    from open_lm_linear.ops.backends import why_not

    for case in cases:
        given = inputs_of_case(case, device)
        exact = exact_results(given)
        for backend in backends:
            began = time.perf_counter()
            skipped = why_not(backend, **given)  # type: ignore[arg-type]
            errors = {}
            if not skipped:
                decays = given["log_decay"]
                trained = decays is not None and not why_not(
                    backend,
                    **{**given, "log_decay": decays.detach().requires_grad_()},  # type: ignore[arg-type]
                )
                found = results(_form(backend, case), given, trained)
                # Decays that underflow have no gradient left: what it sums, q . dq, tells what is small.
                sizes = {"dlog_decay": exact["dq"].norm().item()}
                errors = {p: error_beyond_rounding(found[p], exact[p], sizes.get(p, 0.0)) for p in PARTS if p in found}
            right = all(error <= _bound(part, case, backend) for part, error in errors.items())
            yield Finding(backend, case, errors, skipped, right, time.perf_counter() - began)


def _form(backend: str, case: Case) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    if backend == "triton" and case.segment:
        from open_lm_linear.ops.triton_linear import triton_attention

        return functools.partial(triton_attention, segment=case.segment)
    from open_lm_linear.ops.backends import run_backend

    return functools.partial(run_backend, backend)


def _bound(part: str, case: Case, backend: str) -> float:
    if case.dtype == "float32":
        return FLOAT32_BOUND
    if backend == "triton" and part.startswith("d"):
        from open_lm_linear.ops.triton_linear import INTERPRETED

        return HALF_BOUND if INTERPRETED else TRITON_GRADIENT_BOUND
    return HALF_BOUND


def present_backends(device: torch.device) -> tuple[str, ...]:
    """Those that run on a device."""
    from open_lm_linear.ops.backends import BACKENDS, missing

    return tuple(n for n in BACKENDS[1:] if not missing(n, device.type == "cuda"))


def check_at_start(device: torch.device, say: Callable[[str], None]) -> None:
    """Before training on a GPU: the first case by the kernels that it will run; if they are wrong here, torch runs.

    Raises:
        UserError: the backend that was asked for is not here.
    """
    from open_lm_linear.ops.backends import chosen_backend, missing, use_backend

    asked = chosen_backend()
    name = "triton" if asked == "auto" else asked
    if device.type != "cuda" or name == "torch":
        return
    hindrance = missing(name, True)
    if hindrance and asked != "auto":
        raise UserError(f"linear attention backend {name}: {hindrance}; backend auto or torch runs here.")
    if hindrance:
        return  # said where auto meets it
    for finding in check_cases((name,), device, CASES[:1]):
        if not finding.right:
            errors = ", ".join(f"{part} {error:.1e}" for part, error in finding.errors.items())
            say(f"WARNING: {name} is wrong on this device ({errors}): linear attention runs in its torch form")
            use_backend("torch")


def line_of(finding: Finding) -> str:
    """One line of the table."""
    case = finding.case
    head = f"{case.label:42}{case.dtype:>9}  {'x'.join(map(str, case.shape)):20}{finding.backend:>10}  "
    if finding.skipped:
        return head + f"not run: {finding.skipped}"
    cells = "".join(f"{finding.errors[p]:9.1e}" if p in finding.errors else f"{'':9}" for p in PARTS)
    return head + cells + f"{finding.seconds:7.1f} s  " + ("right" if finding.right else "WRONG")


@cli.command
def main() -> None:
    """Reads the flags, prints the table, ends with an error if a backend is wrong."""
    options = cli.parse(Check, prog="python -m open_lm_linear.ops.check", description=str(__doc__).split("\n\n")[0])
    import torch

    from open_lm_linear.ops.backends import BACKENDS, missing

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device != "auto":
        try:
            device = torch.device(options.device)
        except RuntimeError as error:
            raise UserError(f"--device {options.device!r} is not a device: give auto, cpu, cuda or cuda:N.") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {options.device}: torch finds no GPU here.")
    for name in options.backends:
        if name not in BACKENDS[1:]:
            raise UserError(f"unknown backend {name!r}; there are: {cli.nearest(name, BACKENDS[1:])}.")
        if missing(name, device.type == "cuda"):
            raise UserError(f"backend {name}: {missing(name, device.type == 'cuda')}.")
    backends = options.backends or present_backends(device)
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{on}, torch {torch.__version__}{_triton_version()}; backends: {', '.join(backends)}")
    for name in BACKENDS[1:]:
        if name not in backends and not options.backends:
            print(f"not here: {name}: {missing(name, device.type == 'cuda')}")
    print(f"{'case':42}{'dtype':>9}  {'B x T x H x Hkv x K x V':20}{'':>7}  " + "".join(f"{p:>9}" for p in PARTS))
    cases = CASES[: options.cases] if options.cases else CASES
    wrong = 0
    for finding in check_cases(backends, device, cases):
        print(line_of(finding), flush=True)
        wrong += not finding.right
    if wrong:
        raise cli.ProofError(f"{wrong} of the comparisons above are wrong: choose another backend (docs/kernels.md).")


def _triton_version() -> str:
    from importlib import metadata

    try:
        return f", triton {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
