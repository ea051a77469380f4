"""Files behind a URL or on the Hugging Face hub, read by ranges, fetched whole once where they are needed whole."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from open_lm_linear.cache import cache_folder
from open_lm_linear.cli import UserError
from open_lm_linear.pretrained.places import LocalPlace, Place

WEIGHTS = (".gguf", ".safetensors", ".pt", ".pth", ".bin", ".ckpt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What is asked for by name where a server does not list its folders.
WELL_KNOWN = (
    "config.json",
    "model.json",
    "state.json",
    "params.json",
    "model.safetensors",
    "pytorch_model.bin",
    *INDEXES,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "generation_config.json",
)
BLOCK = 1 << 20  # the least that a ranged read fetches; S3's default would be 50 MB for a header
REMOTE = "`pip install open_lm_linear[remote]`"


class RemotePlace(Place):
    """A folder or a file behind any URL that fsspec reads: s3, gs, https, hf and others.

    The listing is taken once per place; ``local`` asks for the file's size and mark anew.
    """

    def __init__(self, url: str) -> None:
        self.name = url
        self._http = url.startswith(("http://", "https://"))
        # Only in HTTP does ? begin a query (such as a signature); it then goes with every file of the folder.
        address, self._question, self._query = url.partition("?") if self._http else (url, "", "")
        self._folder = address.rstrip("/")
        self._sizes: dict[str, int] | None = None
        above, _, last = address.rpartition("/")
        last = unquote(last) if self._http else last
        if last.lower().endswith(WEIGHTS) and _is_plain(last):
            self._folder, self.single = above, last

    def files(self) -> dict[str, int]:
        if self._sizes is None:
            self._sizes = self._list() if self.single is None else {self.single: self._info(self.single)[0]}
        return dict(self._sizes)

    def open(self, name: str) -> BinaryIO:
        size = self.size(name)
        fs, path = self._at(name)
        # The size saves HTTP a request.
        options: dict[str, Any] = {"size": size} if self._http else {}
        try:
            file = fs.open(path, "rb", block_size=BLOCK, cache_type="readahead", **options)
        except Exception as error:  # every protocol has its own kinds; to the user they are one
            raise self._failed(self._url(name), error) from error
        # Python's own http.server is one that knows no ranges; its files are then fetched whole.
        whole = (lambda: self.local(name).open("rb")) if self._http else None
        return io.BufferedReader(_Ranged(file, size, lambda e: self._failed(self._url(name), e), whole))

    def local(self, name: str) -> Path:
        self.size(name)
        size, mark = self._info(name)
        folder = cache_folder() / "remote" / hashlib.sha256(self._folder.encode()).hexdigest()[:16]
        target, record = folder / name, folder / f".{name}.json"
        wanted = {"size": size, "mark": mark}
        if _is_kept(target, record, wanted):
            return target
        with _alone(folder / f".{name}.lock"):  # of several ranks one fetches, and the others find what it brought
            return target if _is_kept(target, record, wanted) else self._fetch(name, target, record, wanted)

    def _fetch(self, name: str, target: Path, record: Path, wanted: dict[str, Any]) -> Path:
        """Brings the file whole under its name in the cache, or nothing."""
        fs, path = self._at(name)
        size, folder = wanted["size"], target.parent
        part = folder / f".{name}.{uuid.uuid4().hex}.part"  # its own for every process, on every machine
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part.touch()
            if size >= 10 * BLOCK:
                print(f"fetching {self._url(name)}, {size / 1e6:.0f} MB (once; kept in {folder})", file=sys.stderr)
            try:
                fs.get_file(path, str(part))
            except Exception as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if not part.stat().st_size:
                    raise self._failed(self._url(name), error) from error
                raise self._short(name, part.stat().st_size, size, f" ({_first_line(error)})") from error
            if part.stat().st_size != size:
                raise self._short(name, part.stat().st_size, size)
            os.replace(part, target)  # whole or not at all
            part.write_text(json.dumps(wanted))
            os.replace(part, record)
        except OSError as error:
            raise UserError(
                f"cannot keep {self._url(name)} in {folder} ({error.strerror}): make room there, or set "
                "OPEN_LM_LINEAR_CACHE to another folder."
            ) from error
        finally:
            part.unlink(missing_ok=True)
        return target

    def parent(self) -> Place | None:
        folder = self._folder if self.single is not None else self._folder.rpartition("/")[0]
        if folder.endswith("/") or "://" not in folder:  # above a bucket or a host
            return None
        return RemotePlace(folder + "/" + self._question + self._query)

    def _url(self, name: str = "") -> str:
        if self._http:  # many servers list a folder only where the address ends in a slash
            return f"{self._folder}/{quote(name)}{self._question}{self._query}"
        return f"{self._folder}/{name}" if name else self._folder

    def _at(self, name: str = "") -> tuple[Any, str]:
        """fsspec's file system and the path in it; asked for anew each time, for it does not survive a fork."""
        from fsspec.config import conf
        from fsspec.core import url_to_fs

        protocol = self._folder.partition("://")[0]
        options: dict[str, Any] = {}
        try:
            if self._http:
                import aiohttp

                # aiohttp ends any transfer after five minutes and ignores proxies, unless told.
                timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
                options["client_kwargs"] = {
                    "timeout": timeout,
                    "trust_env": True,
                    **conf.get(protocol, {}).get("client_kwargs", {}),
                }
            return url_to_fs(self._url(name), **options)
        except ImportError as error:
            raise UserError(f"{self.name} needs a package that is not installed ({error}): {REMOTE}.") from error
        except ValueError as error:
            if "not known" not in str(error):
                raise self._failed(self.name, error) from error
            raise UserError(
                f"{self.name}: the protocol {protocol!r} is not known; use s3, gs or https, or copy it to a local disk."
            ) from error
        except Exception as error:  # a missing credential, for some protocols
            raise self._failed(self.name, error) from error

    def _info(self, name: str) -> tuple[int, str]:
        """The file's size now, and what tells its versions apart.

        Raises:
            UserError: it cannot be had, or the server does not say how large it is.
        """
        fs, path = self._at(name)
        try:
            fs.invalidate_cache(path)
            info = fs.info(path)
        except Exception as error:
            raise self._failed(self._url(name), error) from error
        if info.get("type") == "directory":
            raise UserError(f"{self._url(name)} is a folder, not a file: write it with a / at its end.")
        if info.get("size") is None:
            raise UserError(f"the server does not say how large {self._url(name)} is: copy it to a local disk first.")
        keys = ("ETag", "etag", "Content-MD5", "md5Hash", "checksum", "generation", "xet_hash", "blob_id")
        times = ("Last-Modified", "LastModified", "mtime", "updated", "modified", "created")
        mark = next((f"{key} {info[key]}" for key in (*keys, *times) if info.get(key)), None)
        # Without a mark, the URL with its query has to do; hashed, for it may hold a secret.
        return int(info["size"]), mark or "url " + hashlib.sha256(self._url(name).encode()).hexdigest()

    def _list(self) -> dict[str, int]:
        fs, path = self._at()
        try:
            fs.invalidate_cache(path)
            entries = fs.ls(path, detail=True)
        except Exception as error:
            kind = _kind(error)
            # Some let a file be read and no folder be listed.
            if not (kind == "denied" or (self._http and kind in ("absent", "other"))):
                raise self._failed(self.name, error) from error
            return self._probe(_reason(error))
        if self._http:
            return self._list_links(path, [entry["name"] for entry in entries])
        # S3 lists an empty object for a folder that was made by hand.
        files = {e["name"].strip("/"): e["size"] for e in entries if e["type"] == "file" and e["name"][-1] != "/"}
        if list(files) == [path.strip("/")]:  # a file without one of the usual suffixes
            self._folder, _, self.single = self._folder.rpartition("/")
        sizes = {name.rpartition("/")[2]: size for name, size in files.items()}
        sizes = {name: size for name, size in sizes.items() if _is_plain(name)}
        known = {name: size for name, size in sizes.items() if size is not None}
        return {**known, **self._ask(set(sizes) - set(known))}

    def _list_links(self, folder: str, links: list[str]) -> dict[str, int]:
        """The files among the links of a page, which may be a listing or anything else."""
        rests = [link.removeprefix(folder.rstrip("/") + "/").removeprefix("./") for link in links]
        names = {unquote(re.split("[?#]", rest)[0]) for rest in rests if "/" not in rest}
        sizes = self._ask(name for name in names if _is_plain(name))
        if any(name in WELL_KNOWN or name.lower().endswith(WEIGHTS) for name in sizes):
            return sizes
        return {**sizes, **self._probe("its page lists no checkpoint", required=not sizes)}

    def _probe(self, why: str, required: bool = True) -> dict[str, int]:
        """The files of well-known names, and those that an index among them names."""
        sizes = self._ask(WELL_KNOWN, page=False)
        if required and not sizes:
            raise UserError(
                f"no checkpoint file is found at {self.name}: the folder cannot be listed ({why}), and it holds none "
                f"of the usual names ({', '.join(WELL_KNOWN[:5])}, ...)."
            )
        self._sizes = sizes  # for json()
        shards: set[str] = set()
        try:
            for index in set(INDEXES) & set(sizes):
                value = self.json(index)
                named = value.get("weight_map") if isinstance(value, dict) else None
                if not isinstance(named, dict):
                    raise UserError(f"{index} of {self.name} has no weight_map: copy or download it again.")
                shards.update(name for name in named.values() if isinstance(name, str) and _is_plain(name))
        finally:
            self._sizes = None
        return {**sizes, **self._ask(shards, page=False)}

    def _ask(self, names: Iterable[str], page: bool = True) -> dict[str, int]:
        """The sizes of those of the files that are there.

        Args:
            page: whether a file may be a web page. Many servers answer with one where there is nothing.
        """

        def ask(name: str) -> int | None:
            fs, path = self._at(name)
            try:
                info = fs.info(path)
            except Exception as error:
                if _kind(error) in ("absent", "denied"):
                    return None
                raise self._failed(self._url(name), error) from error
            if info.get("type") == "directory" or (not page and info.get("mimetype") == "text/html"):
                return None
            if info.get("size") is None and (name in WELL_KNOWN or name.lower().endswith(WEIGHTS)):
                raise UserError(
                    f"the server does not say how large {self._url(name)} is: copy it to a local disk first."
                )
            return info.get("size")

        names = sorted(names)
        with ThreadPoolExecutor(8) as pool:
            return {name: size for name, size in zip(names, pool.map(ask, names), strict=True) if size is not None}

    def _short(self, name: str, got: int, size: int, why: str = "") -> UserError:
        return UserError(
            f"the fetch of {self._url(name)} ended after {got} of {size} bytes{why}: nothing is kept of it, run the "
            "command again."
        )

    def _failed(self, url: str, error: BaseException) -> UserError:
        return UserError(f"cannot read {url}: {_reason(error)}.")


class HubPlace(Place):
    """A model repository of the Hugging Face hub, at one commit; files already in the hub's cache are read there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.repo, _, revision = name.partition("@")
        self.revision = revision or None
        self._sizes: dict[str, int] = {}
        self._commit: str | None = None  # known once listed, so that every file is of one version
        self._cached: Path | None = None  # the snapshot on this machine, where the hub cannot be reached

    def files(self) -> dict[str, int]:
        if self._commit is None and self._cached is None:
            self._list()
        return dict(self._sizes)

    def _list(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            info = HfApi().model_info(self.repo, revision=self.revision, files_metadata=True)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise self._failed(error) from error
        except Exception as error:  # the hub client raises a dozen kinds; to the user they are one
            folder = self._snapshot()
            if folder is None:
                raise self._failed(error) from error
            self._cached, self._sizes = folder, LocalPlace(folder).files()
            return
        self._commit = info.sha
        siblings = info.siblings or []
        self._sizes = {s.rfilename: s.size or 0 for s in siblings if "/" not in s.rfilename}

    def _snapshot(self) -> Path | None:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except Exception:
            return None

    def open(self, name: str) -> BinaryIO:
        from huggingface_hub import HfFileSystem, try_to_load_from_cache

        size = self.size(name)
        if self._cached is not None:
            return (self._cached / name).open("rb")
        try:
            kept = try_to_load_from_cache(self.repo, name, revision=self._commit)
            if isinstance(kept, str):
                return Path(kept).open("rb")
            file = HfFileSystem().open(f"{self.repo}@{self._commit}/{name}", "rb", block_size=BLOCK)
        except Exception as error:
            raise self._failed(error) from error
        return io.BufferedReader(_Ranged(file, size, self._failed))

    def local(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        self.size(name)
        if self._cached is not None:
            return self._cached / name
        try:
            # Asked for by the revision's name, the hub's cache remembers what it stood for when it is out of reach.
            path = Path(hf_hub_download(self.repo, name, revision=self.revision))
            if path.parent.name != self._commit:  # the revision has moved since the listing
                path = Path(hf_hub_download(self.repo, name, revision=self._commit))
            return path
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> UserError:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        if isinstance(error, GatedRepoError):
            reason = "its owner grants access on its page there; ask for it, then log in with `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "no such model and no such local path, or it is private: then log in with `hf auth login`"
        elif isinstance(error, RevisionNotFoundError):
            reason = f"it has no revision {self.revision!r}"
        else:
            reason = f"{_first_line(error)}; check the network, or give a folder of this machine"
        return UserError(f"cannot fetch {self.name!r} from the Hugging Face hub: {reason}.")


class _Ranged(io.RawIOBase):
    """A remote file whose failures are UserErrors.

    Args:
        failed: makes the UserError of an exception.
        whole: opens the whole file on this machine, for a server that gives no ranges.
    """

    def __init__(
        self,
        file: Any,
        size: int,
        failed: Callable[[BaseException], UserError],
        whole: Callable[[], BinaryIO] | None = None,
    ) -> None:
        self._file = file
        self._size = size
        self._failed = failed
        self._whole = whole
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._position)
        if count <= 0:
            return 0
        try:
            content = self._read(count)
        except UserError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        if not content:
            raise self._failed(OSError(f"it ends at byte {self._position} of {self._size}; run the command again"))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _read(self, count: int) -> bytes:
        try:
            self._file.seek(self._position)
            return self._file.read(count)
        except ValueError:  # fsspec's word for a server without ranges
            if self._whole is None:
                raise
        self._file.close()
        self._file, self._whole = self._whole(), None
        self._file.seek(self._position)
        return self._file.read(count)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a lock against the other processes of this machine, where the file system has locks."""
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except (ImportError, OSError):
        yield
        return
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_kept(target: Path, record: Path, wanted: dict[str, Any]) -> bool:
    try:
        return target.stat().st_size == wanted["size"] and json.loads(record.read_text()) == wanted
    except (OSError, ValueError):
        return False


def _is_plain(name: str) -> bool:
    """Whether a name that came from outside is a plain file name, which cannot lead out of a folder."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _kind(error: BaseException) -> str:
    """``absent``, ``denied``, ``unreachable`` or ``other``, over the exceptions of all protocols."""
    # fsspec's HTTP makes a FileNotFoundError of every failed question and keeps the reason as its cause.
    chain = [e for e in (error, error.__cause__) if e is not None]
    status = _status(error)
    if status is not None:
        return {401: "denied", 403: "denied", 404: "absent", 410: "absent"}.get(status, "other")
    if any(re.search("connect|timeout", type(e).__name__, re.IGNORECASE) for e in chain):
        return "unreachable"
    if any(isinstance(e, PermissionError) for e in chain):
        return "denied"
    return "absent" if isinstance(error, FileNotFoundError) else "other"


def _status(error: BaseException) -> int | None:
    """The HTTP status that an exception or its cause carries."""
    found = [getattr(e, "status", None) for e in (error, error.__cause__)]
    return next((status for status in found if isinstance(status, int)), None)


def _reason(error: BaseException) -> str:
    status = _status(error)
    number = f" (HTTP {status})" if status is not None else ""
    kind = _kind(error)
    if kind == "absent":
        return f"nothing is there{number}; check the address"
    if kind == "denied":
        return f"access is denied{number}; set the credentials that its protocol uses, or copy it to a local disk"
    if kind == "unreachable":
        return f"its host does not answer ({_first_line(error.__cause__ or error)}); check the address and the network"
    if "Credentials" in type(error).__name__:
        return (
            "no credentials are set; set them as its protocol does, or for a public bucket FSSPEC_S3='{\"anon\": true}'"
        )
    return f"the server answers with an error{number}" if number else _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
