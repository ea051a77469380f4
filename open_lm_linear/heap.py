"""What becomes of the memory that a process frees on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

# The options of glibc's mallopt(3), and what malloc comes to by itself once large tensors were freed.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
BY_ITSELF = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65_536}
TUNED = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


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
