"""Memory on a CPU: what becomes of it when a process frees it, and the size of the pages that weights lie in."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The options of glibc's mallopt(3), and what malloc comes to by itself once large tensors were freed.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
BY_ITSELF = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65_536}
TUNED = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
HUGE_PAGE, LINE = 2 << 20, 64  # bytes


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


def to_huge_pages(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Moves parameters to huge pages, one behind the other as they are given; their values stay.

    A processor looks up where each page lies, and its prefetchers stop at the end of one. What shares its memory with
    something else stays where it is.

    Returns:
        The bytes that were moved: 0 where the kernel has no huge pages for who asks, or there is less than one to fill.
    """
    import torch

    unique = list(dict.fromkeys(parameters))
    sharers = Counter(p.untyped_storage().data_ptr() for p in unique)
    moved = [p for p in unique if sharers[p.untyped_storage().data_ptr()] == 1 and _has_its_own(p)]
    size = sum(_in_lines(p) for p in moved)
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return 0
    try:
        region = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return 0
    offset = -torch.frombuffer(region, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
    for parameter in moved:
        place = torch.frombuffer(region, dtype=parameter.dtype, count=parameter.numel(), offset=offset)
        parameter.data = place.view(parameter.shape).copy_(parameter.detach())
        offset += _in_lines(parameter)
    libc: Any = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # the places where they were
    return size


def _has_its_own(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is all that its memory holds, and nobody else's."""
    storage = parameter.untyped_storage()
    whole = parameter.is_contiguous() and storage.nbytes() == parameter.nbytes
    return whole and not parameter.is_inference() and not parameter.is_shared() and parameter.device.type == "cpu"


def _in_lines(parameter: torch.nn.Parameter) -> int:
    return -(-parameter.nbytes // LINE) * LINE
