"""Manifests and shards behind URLs: fetched whole, once, into a cache that holds a bounded number of bytes.

The files are those of pretrained.places: whole or not there, fetched by one of several processes, and made anew where
the remote file has changed. Of them only tars are ever removed here, the least recently used first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from open_lm_linear.cli import UserError

CACHE_GB = 50.0
ATTEMPTS = 6
FIRST_DELAY = 1.0  # seconds before the second attempt; doubled before each further one, so 31 seconds in all
TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)
TRANSIENT_ERRNO = (
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EPIPE),
    *(errno.EBUSY, errno.EAGAIN, errno.ENETUNREACH, errno.EHOSTUNREACH),  # EBUSY: s3fs's word for a busy server
)
TRANSIENT_TYPE = re.compile("connect|timeout|payload|slowdown|reset", re.IGNORECASE)

Keep = Callable[[], Collection[str]]

_fetched: dict[str, Path] = {}  # of this process, so that an open file's neighbours cost no further questions


def is_remote(path: str) -> bool:
    """Whether a path is a URL of another machine."""
    return "://" in path and not path.startswith("file://")


def beside(url: str, name: str) -> str:
    """The URL of the file ``name`` in the folder of the file ``url``, with the query that goes with all of them."""
    address, question, query = _split(url)
    return f"{address.rpartition('/')[0]}/{name}{question}{query}"


def within(url: str, name: str) -> str:
    """The URL of the file ``name`` in the folder ``url``."""
    address, question, query = _split(url)
    return f"{address.rstrip('/')}/{name}{question}{query}"


def suffix(path: str) -> str:
    """The extension of a path or of a URL, which may have a query: ``.tar``, ``.jsonl`` or another."""
    return os.path.splitext(_split(path)[0])[1]


def _split(url: str) -> tuple[str, str, str]:
    return url.partition("?") if url.startswith(("http://", "https://")) else (url, "", "")


def fetch(url: str, cache_gb: float = CACHE_GB, keep: Keep = frozenset) -> Path:
    """The file on this machine. Failures that may pass are tried again, with growing pauses.

    Args:
        cache_gb: what the tars in the cache may take, in 10^9 bytes, this one included.
        keep: says which cached files stay whatever their size, as they are open.

    Raises:
        UserError: there is no such file, access is denied, or the server kept failing.
    """
    known = _fetched.get(url)
    if known is not None and known.exists():
        _touch(known)
        return known
    delay, why = FIRST_DELAY, ""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            path = _fetch(url, cache_gb, keep)
            break
        except UserError as error:
            if not _transient(error):
                raise
            why = str(error).rstrip(".")
        if attempt == 1:
            print(f"{why}; trying again up to {ATTEMPTS - 1} times", file=sys.stderr, flush=True)
        if attempt < ATTEMPTS:
            time.sleep(delay)
            delay *= 2
    else:
        raise UserError(
            f"cannot fetch {url} in {ATTEMPTS} attempts ({why}): wait for the server, then --resume latest."
        )
    _fetched[url] = path
    _touch(path)
    return path


def _fetch(url: str, cache_gb: float, keep: Keep) -> Path:
    from open_lm_linear.pretrained.places import find_place

    address, question, query = _split(url)
    folder, _, name = address.rpartition("/")
    place = find_place(f"{folder}/{question}{query}")
    if place is None or not name:
        raise UserError(f"{url} is not the URL of a file: write it in full, such as s3://bucket/folder/shard.tar.")
    place.single = unquote(name) if url.startswith("http") else name  # one file; the folder is not listed
    if name.endswith(".tar"):
        make_room(round(cache_gb * 1e9) - place.size(place.single), keep)
    return place.local(place.single)


def fetch_optional(url: str) -> Path | None:
    """As fetch, but None where the server has no such file or shows it to nobody."""
    try:
        return fetch(url)
    except UserError as error:
        if any(
            isinstance(e, (FileNotFoundError, PermissionError)) or _status(e) in (403, 404, 410) for e in _chain(error)
        ):
            return None
        raise


def make_room(limit: int, keep: Keep) -> None:
    """Removes the least recently used tars from the cache until they take at most ``limit`` bytes."""
    found = []
    for path in _cache().glob("*/*.tar"):
        with contextlib.suppress(OSError):  # another process makes room too
            stat = path.stat()
            found.append((stat.st_atime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in found)
    kept = keep() if total > limit else ()
    for _, size, path in sorted(found):
        if total <= limit:
            return
        if str(path) not in kept:
            for name in (path.name, f".{path.name}.json", f"{path.name}.index.npy"):
                with contextlib.suppress(OSError):
                    path.with_name(name).unlink()
            total -= size


def _cache() -> Path:
    from open_lm_linear.cache import cache_folder

    return cache_folder() / "remote"


def _touch(path: Path) -> None:
    """Marks a use by the time of access alone; the time of change tells whether its index is still true."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> Any:
    return getattr(error, "status", None) or getattr(error, "code", None)


def _transient(error: BaseException) -> bool:
    """Whether the same question may well be answered next time."""
    statuses = [_status(e) for e in _chain(error) if isinstance(_status(e), int)]
    if statuses:
        return statuses[-1] in TRANSIENT_STATUS
    return any(
        TRANSIENT_TYPE.search(type(e).__name__)
        or isinstance(e, (ConnectionError, TimeoutError))
        or getattr(e, "errno", None) in TRANSIENT_ERRNO
        for e in _chain(error)
    )


class Ahead:
    """Fetches one shard at a time in the background, so that it is there when its turn comes."""

    def __init__(self, cache_gb: float) -> None:
        self.cache_gb = cache_gb
        self.url = ""
        self.process = 0
        self.thread: threading.Thread | None = None

    def start(self, url: str, keep: Keep) -> None:
        """Begins with ``url``, unless it was begun already or another is under way."""
        if url == self.url and self.process == os.getpid():
            return
        if self.thread is not None and self.process == os.getpid() and self.thread.is_alive():
            return
        self.url, self.process = url, os.getpid()
        self.thread = threading.Thread(target=self._run, args=(url, keep), daemon=True)
        self.thread.start()

    def wait(self, url: str) -> None:
        """Returns when ``url`` is not under way."""
        if url == self.url and self.thread is not None and self.process == os.getpid():
            self.thread.join()

    def _run(self, url: str, keep: Keep) -> None:
        with contextlib.suppress(UserError):  # said when its turn comes and it still fails
            fetch(url, self.cache_gb, keep)

    def __getstate__(self) -> dict[str, Any]:
        return {"cache_gb": self.cache_gb, "url": "", "process": 0, "thread": None}
