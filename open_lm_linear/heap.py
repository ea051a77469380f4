"""Memory on a CPU: what becomes of it when a process frees it, and the size of the pages that weights lie in."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch

Model = TypeVar("Model", bound="torch.nn.Module")

# The options of glibc's mallopt(3), and what malloc comes to by itself once large tensors were freed.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
BY_ITSELF = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65_536}
TUNED = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
HUGE_PAGE, LINE = 2 << 20, 64  # bytes
HUGE_REGIONS: WeakKeyDictionary[mmap.mmap, range] = WeakKeyDictionary()  # their addresses, while tensors lie in them


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """Memory that is freed while the block runs stays with the process, for the tensors that come next.

    A training step takes and frees the same gigabytes again and again, and malloc gives large tensors back to the
    kernel, which hands them out anew page by page, each one zeroed. The process holds a few percent more at its peak
    than else, and holds it until the end.

    Yields:
        Whether it does so: not without glibc, and not where the environment has malloc tuned or replaced already.
    """
    libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
    tuned = any(name.startswith(TUNED) for name in os.environ)
    kept = (
        hasattr(libc, "mallopt") and not tuned and bool(libc.mallopt(TRIM_THRESHOLD, -1) and libc.mallopt(MMAP_MAX, 0))
    )
    try:
        yield kept
    finally:
        if kept:
            for option, value in BY_ITSELF.items():
                libc.mallopt(option, value)
            libc.malloc_trim(0)


def in_memory(model: Model, device: str | torch.device) -> Model:
    """``model``, of the meta device, in memory that nobody has written to: on a CPU in huge pages where there are any.

    What is read into them needs no move (`to_huge_pages`), which would take as long as the reading.
    """
    import torch

    if torch.device(device).type != "cpu":
        return model.to_empty(device=device)
    held = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    if any(not p.is_meta for _, _, p in held) or next(model.buffers(), None) is not None:
        raise ValueError("in_memory takes a model of the meta device without buffers.")
    shapes = [parameter for _, _, parameter in held]
    places = _empty_in_huge_pages(shapes) or [torch.empty(p.shape, dtype=p.dtype, device="cpu") for p in shapes]
    for (module, name, parameter), place in zip(held, places, strict=True):
        module.register_parameter(name, torch.nn.Parameter(place, parameter.requires_grad))
    return model


def to_huge_pages(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Moves parameters to huge pages, one behind the other as they are given; their values stay.

    A processor looks up where each page lies, and its prefetchers stop at the end of one. What shares its memory with
    something else stays where it is, and so does what lies in huge pages already.

    Returns:
        The bytes that were moved: 0 where the kernel has no huge pages for who asks, or there is less than one to fill.
    """
    unique = list(dict.fromkeys(parameters))
    sharers = Counter(p.untyped_storage().data_ptr() for p in unique)
    moved = [p for p in unique if sharers[p.untyped_storage().data_ptr()] == 1 and _has_its_own(p)]
    moved = [p for p in moved if not any(p.data_ptr() in places for places in HUGE_REGIONS.values())]
    places = _empty_in_huge_pages(moved)
    if places is None:
        return 0
    for parameter, place in zip(moved, places, strict=True):
        parameter.data = place.copy_(parameter.detach())
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # the places where they were
    return sum(map(_in_lines, moved))


def _empty_in_huge_pages(like: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """Memory for tensors of these shapes and dtypes, one behind the other; None where there is none in huge pages."""
    import torch

    size = sum(map(_in_lines, like))
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        region = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    begin = torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr()
    HUGE_REGIONS[region] = range(begin, begin + len(region))
    places, offset = [], -begin % HUGE_PAGE
    for tensor in like:
        if tensor.numel():
            place = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        else:
            place = torch.empty(0, dtype=tensor.dtype, device="cpu")
        places.append(place.view(tensor.shape))
        offset += _in_lines(tensor)
    return places


def _has_its_own(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is all that its memory holds, and nobody else's."""
    storage = parameter.untyped_storage()
    whole = parameter.is_contiguous() and storage.nbytes() == parameter.nbytes
    return whole and not parameter.is_inference() and not parameter.is_shared() and parameter.device.type == "cpu"


def _in_lines(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // LINE) * LINE
