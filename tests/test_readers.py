"""Checkpoint files read by rows: what their own libraries give, small in memory, and damage is one sentence."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from open_lm_linear.cli import UserError
from open_lm_linear.pretrained.gguf_files import GGUFReader
from open_lm_linear.pretrained.places import LocalPlace
from open_lm_linear.pretrained.readers import ModelParallelReader, Reader, SafetensorsReader, TorchReader
from open_lm_linear.pretrained.safetensors_files import SafetensorsWriter, read_header, tensor_checksums

gguf = pytest.importorskip("gguf")


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Every dtype of weights and every kind of shape: odd, scalar, empty, three dimensions."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(7, 6, generator=draw),
        "b.weight": torch.randn(5, 3, generator=draw).bfloat16(),
        "b.norm": torch.randn(9, generator=draw).half(),
        "c": torch.randn(2, 3, 4, generator=draw, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "flat": torch.empty(3, 0),
    }


def write_torch(values: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(OrderedDict(values), path)


def write_old_torch(values: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(values, path, _use_new_zipfile_serialization=False)


def write_gguf(values: dict[str, torch.Tensor], path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "bc", "d"])
    for name, value in values.items():
        if value.dtype == torch.bfloat16:
            raw = np.ascontiguousarray(value.view(torch.uint8).numpy())
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        elif value.numel() and value.dim():
            writer.add_tensor(name, value.numpy())
    finish_gguf(writer)


def finish_gguf(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FORMATS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor], Path], None]]] = {
    "safetensors": ("m.safetensors", save_file),
    "torch": ("m.pt", write_torch),
    "old torch": ("m.bin", write_old_torch),
    "gguf": ("m.gguf", write_gguf),
}


def open_reader(path: Path, **options: Any) -> Reader:
    place = LocalPlace(path.parent)
    if path.suffix == ".gguf":
        return GGUFReader(place, path.name)
    kind = SafetensorsReader if path.suffix == ".safetensors" else TorchReader
    return kind(place, [path.name], **options)


def refused(act: Callable[[], Any], *parts: str) -> None:
    """``act`` ends in a UserError of one line that holds each of ``parts``."""
    with pytest.raises(UserError) as error:
        act()
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_its_tensors_whole_and_by_rows(tmp_path: Path, kind: str) -> None:
    name, write = FORMATS[kind]
    values = state()
    write(values, tmp_path / name)
    reader = open_reader(tmp_path / name)
    if kind == "gguf":  # has no scalars and nothing empty
        values = {k: v for k, v in values.items() if v.numel() and v.dim()}
    assert reader.names() == set(values)
    for key, value in values.items():
        assert reader.shape(key) == tuple(value.shape) and reader.dtype(key) == value.dtype
        assert str(tmp_path / name) in reader.where(key) and repr(key) in reader.where(key)
        before = reader.bytes_read
        assert torch.equal(reader.read(key), value)
        assert reader.bytes_read - before == value.nbytes
        for begin in range(len(value) if value.dim() else 0):
            before = reader.bytes_read
            part = reader.read(key, begin, begin + 1)
            assert torch.equal(part, value[begin : begin + 1]) and part.is_contiguous() and part.dtype == value.dtype
            assert reader.bytes_read - before == part.nbytes
        if value.dim():
            assert reader.read(key, len(value)).shape == (0, *value.shape[1:])
        with pytest.raises(IndexError):
            reader.read(key, 0, 99)
    reader.read("a.weight").zero_()  # what one reader of a tensor does to it is not the next one's
    assert torch.equal(reader.read("a.weight"), values["a.weight"])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("kept", [0, 3, 9, 200, -1, -70])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, kept: int) -> None:
    name, write = FORMATS[kind]
    # Of sizes that GGUF does not pad, so that one byte less is one too few.
    write({"a": torch.randn(8, 8), "z": torch.randn(8, 16)}, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:kept])
    refused(lambda: open_reader(tmp_path / name), str(tmp_path / name), "is not a whole")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_missing_file_is_named(tmp_path: Path, kind: str) -> None:
    name, write = FORMATS[kind]
    write(state(), tmp_path / "other")
    refused(lambda: open_reader(tmp_path / name), f"holds no {name}; its files are: other.")


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_flipped_bit_is_refused_or_does_no_harm(tmp_path: Path, kind: str) -> None:
    """Everywhere in a torch file, and in the header of safetensors, whose data have no checksum."""
    name, write = FORMATS[kind]
    path = tmp_path / name
    values = {"a": torch.randn(8, 8), "b": torch.randn(4)}
    write(values, path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little") if kind == "safetensors" else len(content)
    draw = random.Random(0)
    caught = 0
    for _ in range(150):
        broken = bytearray(content)
        broken[draw.randrange(end)] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            reader = open_reader(path)
            same = all(torch.equal(reader.read(k), values[k]) for k in reader.names() & set(values))
            assert same, "a flipped bit changed what was read"
        except UserError as error:
            assert name in str(error) and "\n" not in str(error)
            caught += 1
    assert caught > 50


def test_a_flipped_bit_in_a_gguf_header_raises_nothing_but_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf({"a": torch.randn(8, 8), "b": torch.randn(4)}, path)
    content = path.read_bytes()
    draw, caught = random.Random(0), 0
    for _ in range(300):
        broken = bytearray(content)
        broken[draw.randrange(content.index(b"b\x01\x00\x00\x00") + 32)] ^= 1 << draw.randrange(8)
        path.write_bytes(broken)
        try:
            reader = open_reader(path)
            for name in reader.names():
                reader.read(name)
        except UserError as error:
            assert "m.gguf" in str(error) and "\n" not in str(error)
            caught += 1
    assert caught > 50


# What a process holds more than at its start while it reads every tensor once: its largest, in MB.
CHILD = """
import os, sys
from pathlib import Path
import torch
from open_lm_linear.pretrained import gguf_files, readers
from open_lm_linear.pretrained.places import LocalPlace

torch.set_num_threads(1)
path, hold = Path(sys.argv[1]), sys.argv[2] == "hold"
readers.TorchReader.window = 8 << 20
place = LocalPlace(path.parent)
kinds = {".gguf": gguf_files.GGUFReader, ".pt": readers.TorchReader, ".safetensors": readers.SafetensorsReader}
kind = kinds[path.suffix]
reader = kind(place, path.name if path.suffix == ".gguf" else [path.name])

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

names = sorted(reader.names())
reader.read(names[0]).sum()  # what the first read imports is not the tensors' size
start, most, held = resident(), 0, []
for name in names:
    tensor = reader.read(name)
    tensor.sum()
    most = max(most, resident() - start)
    held.append(tensor if hold else None)
    del tensor
print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "torch", "gguf"])
def test_a_large_file_is_streamed_in_little_memory(tmp_path: Path, kind: str) -> None:
    name, write = FORMATS[kind]
    values = {f"w{i:02}": torch.full((512, 512), float(i)) for i in range(64)}
    write(values, tmp_path / name)
    size = sum(v.nbytes for v in values.values()) / 1e6

    def most(mode: str) -> float:
        command = [sys.executable, "-c", CHILD, str(tmp_path / name), mode]
        # glibc else keeps some of what is freed, by chance up to 15 MB.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    assert most("hold") > 0.8 * size  # the measure sees what is held
    assert most("stream") < size / 3


class Far(LocalPlace):
    """A place whose files are read by ranges until one is fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fetched: list[str] = []

    def open(self, name: str) -> BinaryIO:
        return (self.folder / name).open("rb")

    def local(self, name: str) -> Path:
        self.fetched.append(name)
        return super().local(name)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_header_is_read_without_the_file_and_must_be_that_of_the_file(tmp_path: Path, kind: str) -> None:
    name, write = FORMATS[kind]
    values = {"a": torch.randn(4, 8), "b": torch.randn(4, 8)}
    write(values, tmp_path / name)
    readers: list[Reader] = []
    for _ in range(3):
        place = Far(tmp_path)
        readers.append(SafetensorsReader(place, [name]) if kind == "safetensors" else GGUFReader(place, name))
        assert readers[-1].shape("a") == (4, 8) and readers[-1].dtype("b") == torch.float32
        assert place.fetched == []
    assert torch.equal(readers[0].read("b"), values["b"])
    write({**values, "c": torch.ones(1)}, tmp_path / name)
    refused(lambda: readers[1].read("b"), name, "is no longer what it was when ")
    write({"a": values["a"], "b": torch.randn(5, 8)}, tmp_path / name)
    for reader in readers[::2]:  # one has read of the file before, one has not
        refused(lambda reader=reader: reader.read("b"), name, "; ")


# safetensors


def test_the_writer_writes_what_save_file_writes(tmp_path: Path) -> None:
    values = state()
    save_file(values, tmp_path / "theirs.safetensors")
    path = tmp_path / "ours.safetensors"
    announced = {k: (v.dtype, v.shape) for k, v in values.items()}
    with SafetensorsWriter(path, announced, {"format": "pt", "note": "ü"}) as writer:
        for name, value in values.items():
            for part in value.split(2) if value.dim() else [value]:
                writer.write(name, part)
        digests = writer.close()
    content = path.read_bytes()
    assert digests == {
        k: hashlib.sha256(v.reshape(-1).view(torch.uint8).numpy()).hexdigest() for k, v in values.items()
    }
    assert tensor_checksums(path) == digests
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0
    assert json.loads(content[8 : content.index(b"}}") + 2])["__metadata__"] == {"format": "pt", "note": "ü"}
    ours, theirs = load_file(path), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype
    headers = []
    for file in (path, tmp_path / "theirs.safetensors"):
        with file.open("rb") as stream:
            headers.append({k: (e.dtype, e.shape) for k, e in read_header(stream, file.stat().st_size, "m").items()})
    assert headers[0] == headers[1]


def test_the_writer_takes_non_contiguous_rows_and_an_empty_file(tmp_path: Path) -> None:
    value = torch.randn(6, 4).t()
    with SafetensorsWriter(tmp_path / "m.safetensors", {"a": (torch.float32, (4, 6))}) as writer:
        writer.write("a", value)
        writer.close()
    assert torch.equal(load_file(tmp_path / "m.safetensors")["a"], value)
    with SafetensorsWriter(tmp_path / "e.safetensors", {}) as writer:
        assert writer.close() == {}
    assert load_file(tmp_path / "e.safetensors") == {}


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("b", torch.zeros(2, 3), "takes bytes 24 to 48"),  # a is not complete
        ("a", torch.zeros(3, 3), "takes bytes 0 to 24"),  # too many rows
        ("a", torch.zeros(2, 4), "announced as torch.float32 (2, 3)"),
        ("a", torch.zeros(6), "announced as torch.float32 (2, 3)"),
        ("a", torch.zeros(2, 3).half(), "announced as torch.float32 (2, 3)"),
    ],
)
def test_the_writer_takes_nothing_but_what_was_announced(
    tmp_path: Path, name: str, rows: torch.Tensor, message: str
) -> None:
    announced = {"a": (torch.float32, (2, 3)), "b": (torch.float32, (2, 3))}
    with SafetensorsWriter(tmp_path / "m.safetensors", announced) as writer:
        with pytest.raises(ValueError) as error:
            writer.write(name, rows)
        assert message in str(error.value)
        writer.write("a", torch.zeros(2, 3))
        writer.write("b", torch.zeros(1, 3))
        with pytest.raises(ValueError, match="'b' was not written to its end"):
            writer.close()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="has no page cache to drop")
def test_a_file_is_dropped_from_the_page_cache_before_its_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    before = tensor_checksums(path)

    def advise(fd: int, begin: int, length: int, advice: int) -> None:
        assert (begin, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        save_file({"a": torch.ones(4)}, tmp_path / "new")  # a sum that was taken before would be the old content's
        with path.open("r+b") as file:
            file.write((tmp_path / "new").read_bytes())

    monkeypatch.setattr(os, "posix_fadvise", advise)
    assert tensor_checksums(path) != before
    assert tensor_checksums(path)["a"] == hashlib.sha256(torch.ones(4).numpy()).hexdigest()


def raw(header: Any, data: int = 0) -> bytes:
    """A safetensors file of this header (JSON unless bytes) with ``data`` zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\1\2", "it has 2 bytes"),
        (raw({"x": entry()}, 8)[:20], "it has 20 bytes, and its header alone takes "),
        ((1 << 62).to_bytes(8, "little") + b"{}", "it has 10 bytes, and its header alone takes "),
        (raw({"x": entry()}, 7), "bytes, and its header asks for "),
        (raw({"x": entry()}, 9), "bytes, and its header asks for "),
        (raw(b"{"), "its header is not JSON"),
        (raw(b"\xff\xfe"), "its header is not JSON"),
        (raw(b"[" * 99999), "its header is not JSON"),
        (raw([1]), "its header is not a JSON object"),
        (raw(b'{"x": 1, "x": 2}'), "'x' stands in it twice"),
        (raw({"x": 5}), "gives 'x' no dtype, shape and data_offsets"),
        (raw({"x": {"dtype": "F32", "shape": [2]}}, 8), "gives 'x' no 'data_offsets'"),
        (raw({"x": entry("F33")}, 8), "gives 'x' the unknown dtype 'F33'"),
        (raw({"x": entry(["F32"])}, 8), "gives 'x' the unknown dtype ['F32']"),
        (raw({"x": entry(shape=[-2])}, 8), "gives 'x' the shape [-2]"),
        (raw({"x": entry(shape=[2.0])}, 8), "gives 'x' the shape [2.0]"),
        (raw({"x": entry(shape=[True])}, 8), "gives 'x' the shape [True]"),
        (raw({"x": entry(shape=[3])}, 8), "gives 'x' 8 bytes, and F32 of shape [3] takes 12"),
        (raw({"x": entry("F4", [3], [0, 2])}, 2), "gives 'x' 2 bytes, and F4 of shape [3] takes 1.5"),
        (raw({"x": entry(offsets=[8, 0])}, 8), "gives 'x' the data_offsets [8, 0]"),
        (raw({"x": entry(offsets=[0])}, 8), "gives 'x' the data_offsets [0]"),
        (raw({"x": entry(offsets=[4, 12])}, 12), "'x' begins at byte "),  # a hole in front
        (raw({"x": entry(), "y": entry(offsets=[4, 12])}, 12), "'y' begins at byte "),  # an overlap
        (raw({"x": entry(), "y": entry(offsets=[12, 20])}, 20), "'y' begins at byte "),  # a hole
        (raw({"x": entry(), "y": entry()}, 8), "'y' begins at byte "),  # twice the same bytes
    ],
)
def test_a_header_that_the_format_does_not_allow_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(lambda: open_reader(path), f"{path} is not a whole safetensors file", sentence, "copy or download it again")


def test_a_header_beyond_the_formats_limit_is_not_even_read() -> None:
    class Head(BytesIO):
        def read(self, count: int | None = -1, /) -> bytes:
            assert count is not None and 0 <= count <= 8
            return super().read(count)

    refused(
        lambda: read_header(Head((10**8 + 1).to_bytes(8, "little")), 10**9, "m"), "more than the format's 100000000"
    )


def test_the_header_alone_is_enough() -> None:
    content = raw({"__metadata__": {"format": "pt"}, "y": entry(offsets=[8, 16]), "x": entry()})
    found = read_header(BytesIO(content), len(content) + 16, "m")
    assert list(found) == ["x", "y"]  # in the order of the data
    assert (found["y"].begin, found["y"].end) == (len(content) + 8, len(content) + 16)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.ones(2, dtype=torch.int8), "int8"),
        (torch.ones(2, dtype=torch.bool), "bool"),
        (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_what_is_no_weight_harms_only_who_asks_for_it(
    tmp_path: Path, kind: str, value: torch.Tensor, dtype: str
) -> None:
    name, write = FORMATS[kind]
    write({"w": torch.ones(2), "q": value}, tmp_path / name)
    reader = open_reader(tmp_path / name)
    assert reader.names() == {"w", "q"} and reader.shape("q") == (2,)
    assert torch.equal(reader.read("w"), torch.ones(2))
    for ask in (reader.dtype, reader.read):
        refused(lambda ask=ask: ask("q"), name, f"'q' has dtype {dtype}, which is no plain weight")


def test_a_dtype_that_torch_lacks_is_no_weight(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(raw({"q": entry("F4", [4], [0, 2])}, 2))
    reader = open_reader(tmp_path / "m.safetensors")
    refused(lambda: reader.read("q"), "'q' has dtype F4, which is no plain weight")


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_files_are_read_as_one_and_a_name_in_two_is_refused(tmp_path: Path, kind: str) -> None:
    name, write = FORMATS[kind]
    first, second = f"1{name}", f"2{name}"
    write({"model.a": torch.ones(2, 2)}, tmp_path / first)
    write({"model.b": torch.zeros(2, 2), "head": torch.ones(1)}, tmp_path / second)
    place = LocalPlace(tmp_path)
    kinds = {"safetensors": SafetensorsReader, "torch": TorchReader}
    reader = kinds[kind](place, [first, second], prefix="model.")
    assert reader.names() == {"a", "b", "head"}
    for _ in range(2):  # in turn
        assert torch.equal(reader.read("a"), torch.ones(2, 2)) and torch.equal(reader.read("b"), torch.zeros(2, 2))
    write({"a": torch.ones(2)}, tmp_path / second)
    refused(
        lambda: kinds[kind](place, [first, second], prefix="model."), f"{second}: 'a' is the tensor 'a'", f"{first}: 'm"
    )


# torch


@pytest.mark.parametrize(
    ("make", "names", "extra"),
    [
        (lambda s: s, {"a", "b.c"}, {}),
        (lambda s: {"state_dict": s, "epoch": 3, "name": "x"}, {"a", "b.c"}, {"epoch": 3, "name": "x"}),
        (lambda s: {"model": s, "optimizer": {"state": {0: s["a"]}}, "step": 1}, {"a", "b.c"}, {"step": 1}),
        (lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}}, {"a", "b.c"}, {}),
        (lambda s: {f"module._orig_mod.module.{k}": v for k, v in s.items()}, {"a", "b.c"}, {}),
        (lambda s: {k.replace("b.c", "b._orig_mod._orig_mod.c"): v for k, v in s.items()}, {"a", "b.c"}, {}),
        (lambda s: {f"module.model.{k}": v for k, v in s.items()}, {"a", "b.c"}, {}),
        (lambda s: {f"my_module.{k}": v for k, v in s.items()}, {"my_module.a", "my_module.b.c"}, {}),
        (lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()}, {"a", "b.c"}, {}),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_found_under_its_wrappers(
    tmp_path: Path, make: Callable[[Any], Any], names: set[str], extra: dict[str, Any], zipped: bool
) -> None:
    values = {"a": torch.randn(3, 2), "b.c": torch.randn(4)}
    torch.save(make(values), tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    reader = TorchReader(LocalPlace(tmp_path), ["m.ckpt"], prefix="model.")
    assert reader.names() == names and reader.extra == extra
    for name, value in zip(sorted(names), (values["a"], values["b.c"]), strict=True):
        read = reader.read(name)
        assert torch.equal(read, value) and not read.requires_grad


def test_a_view_of_a_storage_is_read_as_it_is_seen(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    torch.save({"t": base.t(), "part": base[2:4], "twin": base}, tmp_path / "m.pt")
    reader = open_reader(tmp_path / "m.pt")
    assert torch.equal(reader.read("t", 1, 3), base.t()[1:3]) and reader.read("t", 1, 3).is_contiguous()
    assert torch.equal(reader.read("part"), base[2:4]) and torch.equal(reader.read("twin"), base)


def test_the_window_is_mapped_anew_and_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {f"w{i}": torch.randn(64, 64) for i in range(8)}
    torch.save(values, tmp_path / "m.pt")
    loads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(1) or load(*a, **k))
    monkeypatch.setattr(TorchReader, "window", 2 * 64 * 64 * 4)
    reader = open_reader(tmp_path / "m.pt")
    assert all(torch.equal(reader.read(k), v) for k, v in values.items())
    assert len(loads) == 1 + 4


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ([torch.ones(2)], ("holds one list and no tensors by name",)),
        (torch.ones(2), ("holds one Tensor and no tensors by name",)),
        ({}, ("holds nothing and no tensors by name",)),
        ({"a": torch.ones(2), "epoch": 3}, ("'epoch' is of type int",)),
        ({"state_dict": {"a": torch.ones(2), "b": [1]}}, ("'b' is of type list",)),
        ({"state_dict": {"a": 1}}, ("'state_dict' is of type dict",)),
        ({1: torch.ones(2)}, ("1 is of type Tensor", "by name")),
        ({"module.a": torch.ones(2), "a": torch.ones(2)}, ("'a' is the tensor 'a'", "'module.a'")),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, value: Any, parts: tuple[str, ...]) -> None:
    torch.save(value, tmp_path / "m.pt")
    refused(lambda: open_reader(tmp_path / "m.pt"), str(tmp_path / "m.pt"), *parts)


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), torch.ones(2, device="meta")])
def test_a_tensor_without_plain_data_is_no_weight(tmp_path: Path, value: torch.Tensor) -> None:
    torch.save({"a": torch.ones(2), "s": value}, tmp_path / "m.pt")
    reader = open_reader(tmp_path / "m.pt")
    assert torch.equal(reader.read("a"), torch.ones(2))
    refused(lambda: reader.read("s"), "m.pt: 's' has dtype float32 (", "which is no plain weight")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _dump(value: Any, path: Path, protocol: int) -> None:
    with path.open("wb") as file:
        pickle.dump(value, file, protocol)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["m.pt", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "save",
    [
        lambda bomb, path: torch.save(bomb, path),
        lambda bomb, path: torch.save({"state_dict": bomb}, path),
        lambda bomb, path: torch.save({"state_dict": {"a": torch.ones(2), "b": bomb}}, path),
        lambda bomb, path: torch.save({"model": {"a": torch.ones(2)}, "args": bomb}, path),
        lambda bomb, path: torch.save(bomb, path, _use_new_zipfile_serialization=False),
        lambda bomb, path: torch.save({"a": bomb}, path, _use_new_zipfile_serialization=False),
        lambda bomb, path: _dump(bomb, path, 0),
        lambda bomb, path: _dump(bomb, path, 2),
        lambda bomb, path: _dump(bomb, path, 4),
    ],
)
def test_a_pickle_that_would_run_code_does_not(tmp_path: Path, save: Callable[[Bomb, Path], None], name: str) -> None:
    trace, path = tmp_path / "exploded", tmp_path / name
    save(Bomb(trace), path)
    refused(lambda: open_reader(path), f"{path} is a pickle that asks to run code (", "convert it to safetensors")
    assert not trace.exists()
    with suppress(Exception):
        torch.load(path, weights_only=False)
    assert trace.exists()  # the bomb was live


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (np.float64(0.5), "multiarray.scalar"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_class_beside_the_weights_is_named(tmp_path: Path, value: Any, names: str, zipped: bool) -> None:
    whole = {"state_dict": {"a": torch.ones(2)}, "args": value}
    torch.save(whole, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    refused(lambda: open_reader(tmp_path / "m.pt"), "m.pt is a pickle that asks to run code (it names ", names)


@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive")
def test_torchscript_is_code(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        for name in ("m/constants.pkl", "m/version", "m/data.pkl"):
            archive.writestr(name, b"3\n")
    refused(lambda: open_reader(tmp_path / "m.pt"), "m.pt is a pickle that asks to run code (it is TorchScript)")


@pytest.mark.parametrize("content", [b"", b"hello, world", b"version https://git-lfs.github.com/spec/v1\n", b"\0" * 99])
def test_what_is_no_torch_file_at_all_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.pt").write_bytes(content)
    refused(lambda: open_reader(tmp_path / "m.pt"), "m.pt is not a whole torch file (")


def test_a_flipped_bit_of_the_weights_is_found_before_the_first_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    values = {"a": torch.ones(1000), "b": torch.full((1000,), 7.0)}
    torch.save(values, path)
    content = bytearray(path.read_bytes())
    content[content.index(values["b"].numpy().tobytes()) + 2001] ^= 16
    path.write_bytes(content)
    reader = open_reader(path)
    assert reader.shape("b") == (1000,)
    refused(lambda: reader.read("a"), f"{path} is not a whole torch file (m/data/1: ", "CRC")


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="torch always writes checksums")
def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(open_reader(tmp_path / "m.pt").read("a"), torch.ones(3))


def test_a_compressed_zip_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(300)}, tmp_path / "m.pt")
    with zipfile.ZipFile(tmp_path / "m.pt") as old, zipfile.ZipFile(tmp_path / "z.pt", "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(lambda: open_reader(tmp_path / "z.pt"), "z.pt is not a whole torch file (m/", "is compressed")


# GGUF

QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes make infinite scales
@pytest.mark.parametrize("kind", [*PLAIN, *QUANTISED])
def test_a_gguf_type_is_dequantised_by_rows_as_by_the_library(tmp_path: Path, kind: str) -> None:
    chosen = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[chosen]
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, shape in {"two": (37, 512), "three": (3, 5, 256), "one": (768,)}.items():
        values = draw.standard_normal(shape)
        if kind in ("F64", "F32", "F16"):
            writer.add_tensor(name, values.astype(f"f{size}"))
            continue
        try:
            data = gguf.quants.quantize(values.astype(np.float32), chosen)
        except NotImplementedError:
            data = draw.integers(0, 256, (*shape[:-1], shape[-1] // block * size), np.uint8)
        writer.add_tensor(name, data, raw_dtype=chosen)
    finish_gguf(writer)
    reader = open_reader(tmp_path / "m.gguf")
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert reader.names() == set(theirs)
    for name, stored in theirs.items():
        values = stored.data if kind == "F64" else gguf.quants.dequantize(stored.data, chosen)
        whole = torch.from_numpy(values.copy())
        assert reader.dtype(name) == PLAIN.get(kind, torch.float32)
        assert reader.shape(name) == tuple(whole.shape)
        rows = len(whole)
        for begin, end in [(0, rows), (0, 1), (1, rows - 1), (rows - 1, rows), (2, 2)]:
            before = reader.bytes_read
            part = reader.read(name, begin, end)
            assert part.dtype == reader.dtype(name) and part.shape == whole[begin:end].shape
            assert torch.equal(part.to(whole.dtype).nan_to_num(), whole[begin:end].nan_to_num())
            if name != "one":
                assert reader.bytes_read - before == stored.n_bytes * (end - begin) // rows


@pytest.mark.skipif(not hasattr(gguf.ReaderField, "contents"), reason="an older gguf has no contents() to compare with")
def test_gguf_metadata_is_that_of_the_library_without_the_tokenizers_lists(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_token_list([f"t{i}" for i in range(300)])
    writer.add_token_types([1] * 300)
    writer.add_token_merges(["a b", "ü c"])
    writer.add_bos_token_id(5)
    writer.add_head_count([4, 8])
    writer.add_array("some.names", ["x", "yü"])
    writer.add_array("some.lists", [[1, 2], [3, 4]])
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"n.{kind}", 7)
    writer.add_float32("n.float32", 1e-5)
    writer.add_float64("n.float64", 0.1)
    writer.add_bool("n.bool", True)
    writer.add_string("n.string", "ä\n")
    writer.add_tensor("w", np.ones((2, 2), np.float32))
    finish_gguf(writer)
    ours = open_reader(tmp_path / "m.gguf")
    assert isinstance(ours, GGUFReader)
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    theirs = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.") and k != "some.lists"}
    lists = {k for k, v in theirs.items() if k.startswith("tokenizer.") and isinstance(v, list)}
    assert len(lists) == 3
    expected = {k: v for k, v in theirs.items() if k not in lists}
    assert ours.fields == {**expected, "some.lists": [[1, 2], [3, 4]], "tokens": 300}


@pytest.mark.parametrize("kind", ["Q8_K", "I32", "I8"])
def test_a_gguf_type_that_is_no_weight_harms_only_who_asks_for_it(tmp_path: Path, kind: str) -> None:
    chosen = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    size = gguf.GGML_QUANT_SIZES[chosen][1]
    data = {"I32": np.ones((2, 2), np.int32), "I8": np.ones((2, 2), np.int8)}
    writer.add_tensor("q", data.get(kind, np.zeros((2, size), np.uint8)), raw_dtype=chosen)
    writer.add_tensor("w", np.ones((2, 2), np.float32))
    finish_gguf(writer)
    reader = open_reader(tmp_path / "m.gguf")
    assert torch.equal(reader.read("w"), torch.ones(2, 2))
    refused(lambda: reader.read("q"), str(tmp_path / "m.gguf"), f"'q' is of type {kind}, which the package gguf cannot")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"GGUF", b"GGML", "is not a whole GGUF file (it does not begin with GGUF)"),
        (b"GGUF\x03\0\0\0", b"GGUF\x01\0\0\0", "is a GGUF file of version 1, which cannot be read"),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "is a GGUF file in big-endian byte order"),
        (b"w\x02\0\0\0", b"w\xff\xff\xff\xff", "is not a whole GGUF file ("),  # dimensions without end
        (b"\0\0\0\0" + bytes(8) + b"\x01", b"\xff\0\0\0" + bytes(8) + b"\x01", "'w' has the unknown type 255"),
        (b"block_count\x04", b"block_count\x63", "is not a whole GGUF file (a field has the unknown type 99)"),
        (b"tokens\x09\0\0\0\x08\0\0\0\x03", b"tokens\x09\0\0\0\x08\0\0\0\xf3", "is not a whole GGUF file ("),
        (b"\x01\0\0\0\0\0\0\0a", b"\x01\0\0\0\0\0\0\x7fa", "is not a whole GGUF file (its header runs to byte "),
    ],
)
def test_a_gguf_header_that_cannot_be_is_one_sentence(tmp_path: Path, old: bytes, new: bytes, sentence: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf({"w": torch.ones(1, 32)}, path)
    content = path.read_bytes()
    # The type of w is the four zeros before its offset (eight zeros); padding and data follow.
    at = content.rindex(b"w\x02\0\0\0") + 5 + 16 if old.startswith(b"\0") else content.index(old)
    old = old[:4] if old.startswith(b"\0") else old
    assert content[at : at + len(old)] == old
    path.write_bytes(content[:at] + new[: len(old)] + content[at + len(old) :])
    refused(lambda: open_reader(path), str(path), sentence)


def test_gguf_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf({"w": torch.ones(2, 32), "v": torch.ones(2, 32)}, path)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"v\x02\0\0\0") + 5 + 16 + 4
    assert int.from_bytes(content[at : at + 8], "little") == 256
    content[at : at + 8] = (128).to_bytes(8, "little")
    path.write_bytes(content)
    refused(lambda: open_reader(path), "is not a whole GGUF file ('v' begins at byte ")


# Meta's model-parallel parts

WHOLE = {
    "tok_embeddings.weight": (12, 8),
    "output.weight": (12, 8),
    "layers.0.attention.wq.weight": (8, 8),
    "layers.0.attention.wk.weight": (4, 8),
    "layers.0.attention.wv.weight": (4, 8),
    "layers.0.attention.wo.weight": (8, 8),
    "layers.0.feed_forward.w1.weight": (16, 8),
    "layers.0.feed_forward.w2.weight": (8, 16),
    "layers.0.feed_forward.w3.weight": (16, 8),
    "layers.0.attention_norm.weight": (8,),
    "norm.weight": (8,),
    "rope.freqs": (4,),
}


def meta_parts(folder: Path, count: int, embedding: int) -> tuple[dict[str, torch.Tensor], list[Reader]]:
    """A Llama whole, and one reader for each of the parts that its files hold; the embedding is cut along a dim."""
    values = {name: torch.randn(shape).bfloat16() for name, shape in WHOLE.items()}
    for i in range(count):
        part = {}
        for name, value in values.items():
            dim = 1 if name.endswith(("wo.weight", "w2.weight")) else embedding if "tok" in name else 0
            part[name] = value if value.dim() == 1 else value.chunk(count, dim)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    place = LocalPlace(folder)
    return values, [TorchReader(place, [f"consolidated.{i:02}.pth"]) for i in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("embedding", [0, 1])
def test_model_parallel_parts_are_one_checkpoint(tmp_path: Path, count: int, embedding: int) -> None:
    values, parts = meta_parts(tmp_path, count, embedding)
    reader = ModelParallelReader(parts, embedding_dim=8)
    assert reader.names() == set(values)
    for name, value in values.items():
        assert reader.shape(name) == tuple(value.shape) and reader.dtype(name) == torch.bfloat16
        for begin in range(len(value)):
            for end in range(begin, len(value) + 1):
                assert torch.equal(reader.read(name, begin, end), value[begin:end])


def test_rows_are_read_only_of_the_parts_that_hold_them(tmp_path: Path) -> None:
    _, parts = meta_parts(tmp_path, 4, 0)
    reader = ModelParallelReader(parts, embedding_dim=8)
    reader.read("output.weight", 4, 9)  # three rows of 16 bytes in each part: 4, 5 | 6, 7, 8
    assert [part.bytes_read for part in parts] == [0, 32, 48, 0]
    assert reader.bytes_read == 80
    reader.read("layers.0.attention.wo.weight", 0, 2)  # two rows of two columns of each
    assert [part.bytes_read for part in parts] == [8, 40, 56, 8]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda p: p.pop("norm.weight"), ("consolidated.00.pth: 'norm.weight' is missing from", "consolidated.01.pth")),
        (lambda p: p.update(more=torch.ones(1)), ("consolidated.01.pth: 'more' is missing from",)),
        (
            lambda p: p.update({"output.weight": torch.ones(6, 7)}),
            ("consolidated.01.pth: 'output.weight' has shape (6, 7), and ", "has (6, 8)"),
        ),
        (
            lambda p: p.update({"norm.weight": torch.ones(7)}),
            ("consolidated.01.pth: 'norm.weight' has shape (7,), and ", "has (8,)"),
        ),
        (
            lambda p: p.update({"norm.weight": p["norm.weight"] + 1}),
            ("consolidated.01.pth: 'norm.weight' differs from", "not of one checkpoint"),
        ),
        (
            lambda p: p.update({"output.weight": p["output.weight"].float()}),
            ("consolidated.01.pth: 'output.weight' has another dtype than",),
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_named(
    tmp_path: Path, change: Callable[[Any], Any], parts: tuple[str, ...]
) -> None:
    meta_parts(tmp_path, 2, 0)
    path = tmp_path / "consolidated.01.pth"
    part = torch.load(path, weights_only=True)
    change(part)
    torch.save(part, path)

    def read() -> None:
        files = [TorchReader(LocalPlace(tmp_path), [f"consolidated.0{i}.pth"]) for i in range(2)]
        reader = ModelParallelReader(files, embedding_dim=8)
        for name in reader.names():
            reader.read(name)

    refused(read, *parts)


@pytest.mark.parametrize(("name", "shape"), [("tok_embeddings.weight", (12, 6)), ("gate.weight", (4, 8))])
def test_a_matrix_whose_cut_is_not_known_is_named(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    for i in range(2):
        torch.save({name: torch.ones(shape)}, tmp_path / f"{i}.pth")
    parts = [TorchReader(LocalPlace(tmp_path), [f"{i}.pth"]) for i in range(2)]
    refused(lambda: ModelParallelReader(parts, embedding_dim=8), f"0.pth: {name!r} has shape {shape}, and how a Llama")
