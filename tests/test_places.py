"""Places: listings, ranged reads and whole fetches, of local paths, fsspec's URLs, a real web server and the hub."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import fsspec
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from open_lm_linear.cli import UserError
from open_lm_linear.pretrained.places import LocalPlace, find_place
from open_lm_linear.pretrained.remote import BLOCK, HubPlace, RemotePlace

CONFIG = json.dumps({"model_type": "llama"}).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPEN_LM_LINEAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


def kept(cache: Path) -> list[str]:
    """The names of all files in the cache but for locks."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


class Web:
    """A web server of files held in memory, which counts what it sends."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.status: dict[str, int] = {}  # path -> an error to answer with
        self.listing = True
        self.ranges = True
        self.cut = 0  # bytes to leave out at the end of every body
        self.everything: bytes | None = None  # the page to answer with where there is nothing
        self.sent = 0
        self.bodies: list[str] = []  # paths of GETs, in order
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = unquote(self.path.partition("?")[0])
                code, headers = 200, {"Content-Type": "application/octet-stream", "Connection": "close"}
                if path in web.status:
                    self.send_error(web.status[path])
                    return
                if path in web.files:
                    content = web.files[path]
                    if path in web.etags:
                        headers["ETag"] = web.etags[path]
                    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                    if asked and web.ranges:
                        begin, end = int(asked[1]), min(int(asked[2]) + 1, len(content))
                        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
                        code, content = 206, content[begin:end]
                elif path.endswith("/") and web.listing and any(name.startswith(path) for name in web.files):
                    names = {name.removeprefix(path) for name in web.files if name.startswith(path)}
                    links = "".join(f'<a href="{n}">{n}</a>' for n in ["../", "?C=N;O=D", "sub/", *sorted(names)])
                    headers["Content-Type"], content = "text/html", links.encode()
                elif web.everything is not None:
                    headers["Content-Type"], content = "text/html", web.everything
                else:
                    self.send_error(404)
                    return
                self.send_response(code)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    web.bodies.append(path)
                    try:
                        for begin in range(0, len(content) - web.cut, 1 << 16):
                            piece = content[begin : min(begin + (1 << 16), len(content) - web.cut)]
                            self.wfile.write(piece)
                            web.sent += len(piece)
                    except OSError:  # the client has read enough
                        pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # of 5 by default; the next caller waits for a second

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def web() -> Iterator[Web]:
    pytest.importorskip("aiohttp")
    web = Web()
    yield web
    web.server.shutdown()
    web.server.server_close()


def big(size: int) -> bytes:
    """A file like safetensors: the header's length, the header, then bytes that tell their place."""
    header = b'{"w": {}}'
    body = struct.pack("<Q", len(header)) + header
    return body + bytes(i % 251 for i in range(1 << 12)) * ((size - len(body)) // (1 << 12))


# ---- this machine


def test_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    (folder / "inner").mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "inner" / "hidden.json").write_bytes(CONFIG)
    place = LocalPlace(folder)
    assert place.files() == {"config.json": len(CONFIG)} and place.single is None
    assert "config.json" in place and "inner" not in place and "hidden.json" not in place
    assert place.json("config.json") == {"model_type": "llama"}
    assert place.local("config.json") == folder / "config.json"
    assert place.local_folder(["config.json"]) == folder
    with place.open("config.json") as file:
        file.seek(-1, 2)
        assert file.read() == b"}"
    above = place.parent()
    assert above is not None and above.files() == {} and above.name == str(folder.parent)


def test_local_file_is_alone_and_its_parent_is_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "other.txt").write_bytes(b"x")
    place = LocalPlace(tmp_path / "model.gguf")
    assert place.single == "model.gguf" and place.files() == {"model.gguf": 4}
    assert "other.txt" not in place
    above = place.parent()
    assert above is not None and set(above.files()) == {"model.gguf", "other.txt"}


def test_the_root_has_no_parent() -> None:
    assert LocalPlace("/").parent() is None


def test_relative_paths_have_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "params.txt").write_text("x")
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path / "checkpoints")
    above = LocalPlace(".").parent()
    assert above is not None and set(above.files()) == {"params.txt"}


def test_local_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    place = LocalPlace(tmp_path)
    with pytest.raises(UserError, match=r"broken\.json of .* is not JSON"):
        place.json("broken.json")
    with pytest.raises(UserError, match=r"bytes\.txt of .* is not a text file"):
        place.text("bytes.txt")
    for use in (place.open, place.local, place.size):
        with pytest.raises(UserError, match=r"holds no absent\.json; its files are: broken\.json, bytes\.txt"):
            use("absent.json")


# ---- which place a name means


def test_find_place_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name@main").mkdir(parents=True)
    assert isinstance(find_place("owner/name@main"), LocalPlace)  # an existing path wins
    assert isinstance(find_place(tmp_path), LocalPlace)
    assert isinstance(find_place(f"file://{tmp_path}"), LocalPlace)
    assert isinstance(find_place("s3://bucket/folder"), RemotePlace)
    hub = find_place("owner/name@v1.0")
    assert isinstance(hub, HubPlace) and (hub.repo, hub.revision, hub.name) == ("owner/name", "v1.0", "owner/name@v1.0")
    hub = find_place("owner/name@refs/pr/3")
    assert isinstance(hub, HubPlace) and hub.revision == "refs/pr/3"
    hub = find_place("owner/other.name")
    assert isinstance(hub, HubPlace) and hub.revision is None


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere", "~/nowhere", "../nowhere", "nowhere", "a/b/c", "a/", "a/b@", "a b/c", ""]
)
def test_find_place_of_nothing(name: str) -> None:
    assert find_place(name) is None


def test_the_import_is_cheap() -> None:
    code = (
        "import sys; import open_lm_linear.pretrained.places; "
        "print(sorted({'fsspec', 'huggingface_hub', 'aiohttp', 's3fs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("suffix", ["gguf", "safetensors", "pt", "pth", "bin", "ckpt"])
def test_a_url_with_a_suffix_of_weights_is_one_file(suffix: str) -> None:
    assert RemotePlace(f"s3://bucket/folder/m.{suffix}").single == f"m.{suffix}"
    assert RemotePlace(f"s3://bucket/folder.{suffix}/").single is None
    assert RemotePlace(f"https://host/my%20m.{suffix}?sign=a/b.x").single == f"my m.{suffix}"
    assert RemotePlace("s3://bucket/model-v0.1").single is None


def test_remote_parents() -> None:
    above = RemotePlace("s3://bucket/run/checkpoints/epoch_1.pt").parent()
    assert above is not None and above.name == "s3://bucket/run/checkpoints/"
    above = above.parent()
    assert above is not None and above.name == "s3://bucket/run/"
    assert RemotePlace("s3://bucket").parent() is None


# ---- fsspec, by its file system in memory


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.pipe({"/bucket/model/config.json": CONFIG, "/bucket/model/w.bin": b"0123", "/bucket/model/sub/x.json": b"{}"})
    yield fs
    fs.rm("/bucket", recursive=True)


def test_memory_folder(memory: Any) -> None:
    place = find_place("memory://bucket/model")
    assert place is not None and place.files() == {"config.json": len(CONFIG), "w.bin": 4}
    assert place.json("config.json") == {"model_type": "llama"}
    with place.open("w.bin") as file:
        file.seek(2)
        assert file.read() == b"23" and file.tell() == 4
        file.seek(-4, 2)
        assert file.read(1) == b"0"
    folder = place.local_folder(["config.json", "w.bin"])
    assert (folder / "config.json").read_bytes() == CONFIG and (folder / "w.bin").read_bytes() == b"0123"


def test_memory_single_file(memory: Any) -> None:
    place = RemotePlace("memory://bucket/model/w.bin")
    assert place.files() == {"w.bin": 4} and place.local("w.bin").read_bytes() == b"0123"
    memory.pipe("/bucket/model/plain", b"12345")
    place = RemotePlace("memory://bucket/model/plain")  # no suffix: the listing tells
    assert place.files() == {"plain": 5} and place.single == "plain"
    assert place.local("plain").read_bytes() == b"12345"


def test_a_new_version_of_the_same_size_is_fetched(memory: Any) -> None:
    assert RemotePlace("memory://bucket/model").local("w.bin").read_bytes() == b"0123"
    memory.pipe("/bucket/model/w.bin", b"4567")  # its time of creation differs
    assert RemotePlace("memory://bucket/model").local("w.bin").read_bytes() == b"4567"


def test_sizes_that_a_file_system_remembers_are_asked_anew(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As S3's does, for as long as the process lives."""
    fresh, remembered = type(memory).info, {}

    def info(self: Any, path: str, **kwargs: Any) -> Any:
        return remembered.setdefault(path, fresh(self, path, **kwargs))

    monkeypatch.setattr(type(memory), "info", info)
    monkeypatch.setattr(type(memory), "invalidate_cache", lambda self, path=None: remembered.pop(path, None))
    place = RemotePlace("memory://bucket/model")
    assert place.local("w.bin").read_bytes() == b"0123"
    memory.pipe("/bucket/model/w.bin", b"012345")
    assert place.local("w.bin").read_bytes() == b"012345"


def test_memory_absent(memory: Any) -> None:
    with pytest.raises(UserError, match="cannot read memory://bucket/none: nothing is there; check the address"):
        RemotePlace("memory://bucket/none").files()
    with pytest.raises(UserError, match="nothing is there"):
        RemotePlace("memory://bucket/none.bin").files()
    with pytest.raises(UserError, match="holds no absent"):
        RemotePlace("memory://bucket/model").open("absent")


def test_probing_where_listing_is_denied(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Any, path: str, **kwargs: Any) -> None:
        raise PermissionError("no ListBucket")

    monkeypatch.setattr(type(memory), "ls", denied)
    assert RemotePlace("memory://bucket/model").files() == {"config.json": len(CONFIG)}
    with pytest.raises(UserError, match=r"no checkpoint file is found at memory://bucket/none: .*access is denied"):
        RemotePlace("memory://bucket/none").files()


def test_unknown_protocol() -> None:
    with pytest.raises(UserError, match="the protocol 'nosuch' is not known"):
        RemotePlace("nosuch://bucket/model").files()


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # fsspec keeps what was imported before.
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"s3://b/m needs a package .*`pip install open_lm_linear\[remote\]`"):
        RemotePlace("s3://b/m").files()
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UserError, match=r"needs a package .*`pip install open_lm_linear\[remote\]`"):
        RemotePlace("https://host/m").files()


def test_a_full_disk_is_told_apart(memory: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def full(self: Any, rpath: str, lpath: str, **kwargs: Any) -> None:
        Path(lpath).write_bytes(b"0")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(memory), "get_file", full)
    with pytest.raises(UserError, match="No space left on device.*OPEN_LM_LINEAR_CACHE"):
        RemotePlace("memory://bucket/model").local("w.bin")
    assert kept(cache) == []


# ---- a web server


def test_http_listing(web: Web) -> None:
    web.files = {"/m/config.json": CONFIG, "/m/a b.bin": b"0123", "/other/x.bin": b"x"}
    place = RemotePlace(f"{web.url}/m/")
    assert place.files() == {"config.json": len(CONFIG), "a b.bin": 4}
    assert place.json("config.json") == {"model_type": "llama"}
    assert place.local("a b.bin").read_bytes() == b"0123"


def test_a_header_does_not_cost_the_file(web: Web) -> None:
    content = big(48 << 20)
    web.files = {"/m/model.safetensors": content}
    place = RemotePlace(f"{web.url}/m/model.safetensors")
    with place.open("model.safetensors") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        assert json.loads(file.read(length)) == {"w": {}}
        assert web.sent <= 2 * BLOCK
        file.seek(30 << 20)
        assert file.read(1000) == content[30 << 20 : (30 << 20) + 1000]
        file.seek(-10, 2)
        assert file.read() == content[-10:]
    assert place.size("model.safetensors") == len(content)
    assert web.sent <= 4 * BLOCK < len(content) // 10


def test_one_large_read_is_one_request(web: Web) -> None:
    content = big(9 << 20)
    web.files = {"/m/model.safetensors": content}
    with RemotePlace(f"{web.url}/m/model.safetensors").open("model.safetensors") as file:
        file.seek(1000)
        assert file.read(5 << 20) == content[1000 : 1000 + (5 << 20)]
    assert len(web.bodies) <= 2 and web.sent <= (5 << 20) + 2 * BLOCK


@pytest.mark.parametrize("page", [None, b"<a href='/'>home</a>"])
def test_probing_where_no_listing_is_given(web: Web, page: bytes | None) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "../secret", "d": "gone.bin"}}
    web.files = {
        "/m/config.json": CONFIG,
        "/m/tokenizer.model": b"tok",
        "/m/model.safetensors.index.json": json.dumps(index).encode(),
        "/m/model-1.safetensors": b"1",
        "/m/model-2.safetensors": b"22",
        "/m/unusual.txt": b"x",
        "/secret": b"x",
    }
    web.listing = False
    web.everything = page  # some answer with a page, and no 404, where there is nothing
    files = RemotePlace(f"{web.url}/m").files()
    index_size = len(web.files["/m/model.safetensors.index.json"])
    assert files.pop("model.safetensors.index.json") == index_size
    assert files == {
        "config.json": len(CONFIG),
        "tokenizer.model": 3,
        "model-1.safetensors": 1,
        "model-2.safetensors": 2,
    }


def test_a_broken_index_is_named(web: Web) -> None:
    web.files = {"/m/model.safetensors.index.json": b"[]"}
    web.listing = False
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json of .* has no weight_map"):
        RemotePlace(f"{web.url}/m").files()


def test_names_that_lead_out_of_the_folder_are_not_taken(web: Web) -> None:
    web.files = {"/m/config.json": CONFIG, "/m/..%2f..%2fevil.bin": b"x", "/m/%2e%2e": b"x"}
    assert set(RemotePlace(f"{web.url}/m").files()) == {"config.json"}


def test_a_server_without_ranges(web: Web, tmp_path: Path) -> None:
    """Python's own http.server, which many use to share a folder."""
    content = big(5 << 20)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "model.safetensors").write_bytes(content)
    (tmp_path / "served" / "config.json").write_bytes(CONFIG)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        place = RemotePlace(f"http://127.0.0.1:{server.server_port}")
        assert set(place.files()) == {"model.safetensors", "config.json"}
        with place.open("model.safetensors") as file:
            assert file.read(8) == content[:8]
            file.seek(3 << 20)
            assert file.read(100) == content[3 << 20 : (3 << 20) + 100]
            assert file.read() == content[(3 << 20) + 100 :]
    finally:
        server.shutdown()
        server.server_close()


def test_the_cache_is_used_until_the_file_changes(web: Web, cache: Path) -> None:
    web.files, web.etags = {"/m/w.bin": b"0123"}, {"/m/w.bin": '"1"'}
    url = f"{web.url}/m/w.bin"
    path = RemotePlace(url).local("w.bin")
    assert path.read_bytes() == b"0123" and web.bodies == ["/m/w.bin"]
    assert path.parent.parent == cache / "remote" and len(path.parent.name) == 16
    assert RemotePlace(url).local("w.bin") == path
    assert RemotePlace(f"{web.url}/m/").local("w.bin") == path  # one file, whether its folder or itself is named
    assert web.bodies.count("/m/w.bin") == 1

    place = RemotePlace(url)
    assert place.size("w.bin") == 4
    web.files["/m/w.bin"] = b"01234567"  # another size, after the listing
    assert place.local("w.bin").read_bytes() == b"01234567" and web.bodies.count("/m/w.bin") == 2

    web.files["/m/w.bin"], web.etags["/m/w.bin"] = b"abcdefgh", '"2"'  # the same size, another ETag
    assert RemotePlace(url).local("w.bin").read_bytes() == b"abcdefgh" and web.bodies.count("/m/w.bin") == 3

    path.write_bytes(b"abc")  # damaged here
    assert RemotePlace(url).local("w.bin").read_bytes() == b"abcdefgh" and web.bodies.count("/m/w.bin") == 4


def test_a_signed_url(web: Web) -> None:
    web.files, web.etags = {"/m/w.bin": b"0123"}, {"/m/w.bin": '"1"'}
    first = RemotePlace(f"{web.url}/m/w.bin?signature=a%2Fb/c.x").local("w.bin")
    second = RemotePlace(f"{web.url}/m/w.bin?signature=other").local("w.bin")
    assert first == second and first.read_bytes() == b"0123" and web.bodies == ["/m/w.bin"]


def test_several_fetches_at_once(web: Web, cache: Path) -> None:
    content = big(3 << 20)
    web.files = {"/m/w.bin": content}
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(RemotePlace(f"{web.url}/m/w.bin").local("w.bin")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(paths) == 4 and len(set(paths)) == 1
    assert paths[0].read_bytes() == content and kept(cache) == [".w.bin.json", "w.bin"]
    # One fetched it, and the others waited for that; besides, each may have asked for size and ranges.
    assert len(content) <= web.sent < 2 * len(content)


def test_a_transfer_that_ends_short_leaves_nothing(web: Web, cache: Path) -> None:
    web.files, web.cut = {"/m/w.bin": bytes(100_000)}, 1000
    place = RemotePlace(f"{web.url}/m/w.bin")
    with pytest.raises(UserError, match=r"w\.bin ended after \d+ of 100000 bytes.*run the command again"):
        place.local("w.bin")
    assert kept(cache) == []
    with place.open("w.bin") as file, pytest.raises(UserError, match=r"cannot read http.*w\.bin"):
        file.read()
    web.cut = 0
    assert place.local("w.bin").stat().st_size == 100_000


def test_a_transfer_that_ends_short_without_an_error(memory: Any, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(type(memory), "get_file", lambda self, rpath, lpath, **_: Path(lpath).write_bytes(b"01"))
    with pytest.raises(UserError, match=r"w\.bin ended after 2 of 4 bytes"):
        RemotePlace("memory://bucket/model").local("w.bin")
    assert kept(cache) == []


def test_http_errors(web: Web) -> None:
    web.files = {"/m/config.json": CONFIG}
    with pytest.raises(UserError, match=r"/none\.bin: nothing is there \(HTTP 404\); check the address"):
        RemotePlace(f"{web.url}/none.bin").files()
    with pytest.raises(UserError, match=r"no checkpoint file is found at .*/none: .*nothing is there.*config\.json"):
        RemotePlace(f"{web.url}/none").files()
    web.status = {"/secret.bin": 403, "/broken.bin": 500}
    with pytest.raises(UserError, match=r"/secret\.bin: access is denied \(HTTP 403\); set the credentials"):
        RemotePlace(f"{web.url}/secret.bin").files()
    with pytest.raises(UserError, match=r"/broken\.bin: the server answers with an error \(HTTP 500\)"):
        RemotePlace(f"{web.url}/broken.bin").files()
    place = RemotePlace(f"{web.url}/m")
    assert "config.json" in place
    del web.files["/m/config.json"]
    with pytest.raises(UserError, match=r"config\.json: nothing is there"):
        place.local("config.json")


def test_a_failing_server_is_not_taken_for_an_empty_one(web: Web) -> None:
    web.files, web.listing = {"/m/config.json": CONFIG}, False
    web.status = {"/m/tokenizer.json": 503}
    with pytest.raises(UserError, match=r"tokenizer\.json: the server answers with an error \(HTTP 503\)"):
        RemotePlace(f"{web.url}/m").files()


def test_no_such_host(web: Web) -> None:
    web.server.shutdown()
    web.server.server_close()
    for name in ("m", "m.gguf"):
        with pytest.raises(UserError, match=f"cannot read {web.url}/{name}: its host does not answer"):
            RemotePlace(f"{web.url}/{name}").files()


# ---- the Hugging Face hub, by the calls that go out


class Hub:
    """Stands for huggingface_hub's calls and notes what they were given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head = "c0ffee"  # the commit that every other revision stands for when a file is downloaded
        self.error: Exception | None = None
        self.snapshot: Path | None = None  # what an earlier download left
        self.calls: list[tuple[str, ...]] = []

    def note(self, *call: str) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    def model_info(self, repo: str, revision: str | None = None, files_metadata: bool = False) -> Any:
        self.note("info", repo, str(revision))
        assert files_metadata
        names = {"config.json": len(CONFIG), "model.safetensors": 4, "onnx/model.bin": 9}
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=n, size=s) for n, s in names.items()])

    def hf_hub_download(self, repo: str, name: str, revision: str | None = None) -> str:
        self.note("download", repo, name, str(revision))
        folder = self.folder if revision == "c0ffee" else self.folder.with_name(self.head)
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(CONFIG if name == "config.json" else b"0123")
        return str(folder / name)

    def open(self, path: str, mode: str, block_size: int) -> Any:
        self.note("open", path)
        return fsspec.filesystem("memory").open("/hub/" + path, mode)

    def try_to_load_from_cache(self, repo: str, name: str, revision: str | None = None) -> str | None:
        return str(self.folder / name) if (self.folder / name).exists() else None

    def snapshot_download(self, repo: str, revision: str | None = None, local_files_only: bool = False) -> str:
        assert local_files_only
        if self.snapshot is None:
            raise FileNotFoundError("no snapshot")
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(tmp_path / "c0ffee")
    fsspec.filesystem("memory").pipe("/hub/owner/name@c0ffee/model.safetensors", b"0123")
    for name in ("hf_hub_download", "try_to_load_from_cache", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: hub)
    yield hub
    fsspec.filesystem("memory").rm("/hub", recursive=True)


def test_hub(hub: Hub) -> None:
    place = HubPlace("owner/name@v1")
    assert place.files() == {"config.json": len(CONFIG), "model.safetensors": 4}  # the top folder's
    assert hub.calls == [("info", "owner/name", "v1")]
    with place.open("model.safetensors") as file:
        file.seek(1)
        assert file.read(2) == b"12"
    assert place.local_folder(["config.json", "model.safetensors"]) == hub.folder
    assert place.json("config.json") == {"model_type": "llama"}  # from the cache now, with no further call
    assert hub.calls[1:] == [
        ("open", "owner/name@c0ffee/model.safetensors"),
        ("download", "owner/name", "config.json", "v1"),
        ("download", "owner/name", "model.safetensors", "v1"),
    ]
    assert place.parent() is None


def test_hub_files_are_of_the_commit_that_was_listed(hub: Hub) -> None:
    place = HubPlace("owner/name@v1")
    place.files()
    hub.head = "decade"  # pushed since then
    assert place.local("config.json") == hub.folder / "config.json"
    assert hub.calls[-1] == ("download", "owner/name", "config.json", "c0ffee")


def test_hub_without_revision(hub: Hub) -> None:
    assert "config.json" in HubPlace("owner/name")
    assert hub.calls == [("info", "owner/name", "None")]


def test_hub_out_of_reach_uses_what_was_downloaded(hub: Hub, tmp_path: Path) -> None:
    hub.error = ConnectionError("offline")
    hub.snapshot = tmp_path / "snapshot"
    hub.snapshot.mkdir()
    (hub.snapshot / "config.json").write_bytes(CONFIG)
    place = HubPlace("owner/name")
    assert place.files() == {"config.json": len(CONFIG)}
    assert place.json("config.json") == {"model_type": "llama"}
    assert place.local_folder(["config.json"]) == hub.snapshot


def hub_error(kind: Callable[..., Exception]) -> Exception:
    return kind("401 Client Error. (Request ID: x)", response=SimpleNamespace(headers={}, request=None))


def test_hub_errors(hub: Hub) -> None:
    start = r"cannot fetch 'owner/name@v1' from the Hugging Face hub: "
    for error, reason in (
        (RuntimeError("first line\nsecond"), "first line; check the network"),
        (hub_error(RepositoryNotFoundError), "no such model and no such local path"),
        (hub_error(GatedRepoError), "its owner grants access"),
        (hub_error(RevisionNotFoundError), "it has no revision 'v1'"),
    ):
        hub.error = error
        with pytest.raises(UserError, match=start + reason):
            HubPlace("owner/name@v1").files()
    hub.error = None
    place = HubPlace("owner/name@v1")
    assert "model.safetensors" in place
    hub.error = hub_error(GatedRepoError)  # the listing of a gated model is public
    for use in (place.local, place.open):
        with pytest.raises(UserError, match=start + "its owner grants access"):
            use("model.safetensors")
