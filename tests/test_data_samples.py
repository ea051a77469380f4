"""Binary samples and the index of offsets: small, fast, readable by webdataset, and never trusted."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import tar_of

from open_lm_linear.cli import UserError
from open_lm_linear.data import offsets, shards
from open_lm_linear.data.samples import Malformed, decode, encode_npy
from open_lm_linear.data.shards import ShardIndex, write_shard

ROWS = np.arange(40).reshape(5, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPEN_LM_LINEAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(40, "<u2"), (65536, "<u2"), (65537, "<u4"), (200_000, "<u4")])
def test_binary_samples_are_as_small_as_the_vocabulary_allows(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    top = np.array([vocab_size - 1, 0, 1])
    assert write_shard(tmp_path / "a.tar", [top], vocab_size=vocab_size) == 1
    with tarfile.open(tmp_path / "a.tar") as tar:
        stored = np.load(io.BytesIO(tar.extractfile("00000000.npy").read()), allow_pickle=False)
    assert stored.dtype == np.dtype(dtype)
    tokens = ShardIndex(tmp_path / "a.tar").read_sequence(0, 2, vocab_size)
    assert tokens.dtype == np.dtype(dtype) and tokens.tolist() == top.tolist()


def test_webdataset_reads_binary_samples(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    write_shard(tmp_path / "a.tar", ROWS, vocab_size=100)
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode())
    assert np.array_equal([sample["npy"] for sample in found], ROWS)


@pytest.mark.parametrize("row", [np.array([0, 100]), np.array([-1, 0]), np.array([0.5]), np.array([[1]])])
def test_what_is_no_token_is_not_written(tmp_path: Path, row: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"sample 00000000\.npy for .*a\.tar is .*: use the model's tokenizer"):
        write_shard(tmp_path / "a.tar", [row], vocab_size=100)
    assert not (tmp_path / "a.tar").exists()


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "<u4", "<i4", "<i8", ">i8", "|u1", "|i1"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_integer_array_is_read(dtype: str, version: tuple[int, int]) -> None:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.arange(9).astype(dtype), version=version)
    assert decode(file.getvalue(), "npy").tolist() == list(range(9))
    assert decode(encode_npy(np.arange(0), 10), "npy").tolist() == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.array([1, "a"], dtype=object), allow_pickle=True), "Python objects, which are never unpickled"),
        (npy(np.array([1.0, 2.0])), "float64 values, not integers"),
        (npy(np.array([True])), "bool values, not integers"),
        (npy(np.array(["a"])), "not integers"),
        (npy(np.ones((2, 3), dtype=int)), r"an array of shape \(2, 3\), not one row"),
        (npy(np.array(3)), r"an array of shape \(\), not one row"),
        (npy(np.arange(9))[:-1], "71 bytes where 9 values of int64 belong"),
        (npy(np.arange(9)) + b"x", "73 bytes where 9 values"),
        (npy(np.zeros(2, dtype=[("a", "i4")])), "whose header is not that of one array of numbers"),
        (pickle.dumps([1, 2]), "no .npy file"),
        (b"", "no .npy file"),
        (npy(np.arange(9))[:40], "whose header is not"),
    ],
)
def test_other_npy_files_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(Malformed):
        decode(content, "npy")
    index = ShardIndex(tar_of(tmp_path / "a.tar", {"dir/17.npy": content}))
    with pytest.raises(UserError, match=rf"a\.tar sample 17\.npy is corrupt, .*{message}") as caught:
        index.read(0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("token", [50, 60_000])
def test_binary_tokens_are_held_against_the_vocabulary(tmp_path: Path, token: int) -> None:
    write_shard(tmp_path / "a.tar", [np.array([1, token, 2])], vocab_size=65_000)
    with pytest.raises(UserError, match=rf"sample 00000000\.npy has token id {token}, outside the model's vocabulary"):
        ShardIndex(tmp_path / "a.tar").read_sequence(0, 2, 50)


def test_binary_is_preferred_to_json(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {"0.txt": b"[3]", "0.json": b"[1]", "0.npy": npy(np.array([2]))})
    assert ShardIndex(path).read(0).tolist() == [2]
    assert ShardIndex(path, "json").read(0).tolist() == [1]
    assert ShardIndex(path, "txt").read(0).tolist() == [3]


# ---- the index of offsets


def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards whose headers are scanned from here on."""
    found: list[str] = []
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda name, file: found.append(name) or scan(name, file))
    return found


def test_headers_are_scanned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.tar", ROWS, first_key=5)
    scanned = scans(monkeypatch)
    first = ShardIndex(tmp_path / "a.tar")
    again = ShardIndex(tmp_path / "a.tar", expected=5)
    assert len(scanned) == 1 and np.array_equal(first.spans, again.spans)
    assert np.array_equal([again.read(i) for i in range(5)], ROWS) and again.key(4) == "00000009"
    assert (tmp_path / "a.tar.index.npy").exists() and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(UserError, match="holds no txt samples but json"):
        ShardIndex(tmp_path / "a.tar", "txt")


def test_several_extensions_share_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_of(tmp_path / "a.tar", {"0.txt": b"[3]", "0.pyd": b"x", "0.json": b"[1]", "1.txt": b"[4]"})
    ShardIndex(path)
    scanned = scans(monkeypatch)
    assert [ShardIndex(path, key).read(-1).tolist() for key in ("json", "txt")] == [[1], [4]] and not scanned


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:100],
        lambda good: good[:-24],
        lambda good: b"\x93NUMPY\x01\x00",
        lambda good: npy(np.array([{}], dtype=object), allow_pickle=True),
        lambda good: npy(np.load(io.BytesIO(good)).astype(np.int32)),
        lambda good: npy(np.load(io.BytesIO(good)) + [[1, 0, 0], *[[0, 0, 0]] * 5]),
        lambda good: npy(np.load(io.BytesIO(good)) + [[0, 0, 0], *[[0, 1, 0]] * 5]),
        lambda good: npy(np.load(io.BytesIO(good)) + [[0, 0, 0], *[[9, 0, 0]] * 5]),
        lambda good: npy(np.load(io.BytesIO(good))[:1]),
        lambda good: npy(np.zeros((0, 3), dtype=np.int64)),
    ],
)
def test_a_damaged_index_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    write_shard(tmp_path / "a.tar", ROWS)
    ShardIndex(tmp_path / "a.tar")
    index = tmp_path / "a.tar.index.npy"
    good = index.read_bytes()
    index.write_bytes(damage(good))
    scanned = scans(monkeypatch)
    assert np.array_equal([ShardIndex(tmp_path / "a.tar").read(i) for i in range(5)], ROWS)
    assert len(scanned) == 1 and index.read_bytes() == good


def test_a_changed_shard_is_scanned_anew(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, ROWS)
    ShardIndex(path)
    write_shard(tmp_path / "b.tar", ROWS[:2])
    os.replace(tmp_path / "b.tar", path)  # not by write_shard, which forgets the index itself
    assert len(ShardIndex(path)) == 2
    os.utime(path, ns=(0, 1))
    assert offsets.load(str(path)) is None
    write_shard(path, ROWS[:3])
    assert not (tmp_path / "a.tar.index.npy").exists() and len(ShardIndex(path)) == 3


def test_a_read_only_folder_has_its_index_in_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "a.tar", ROWS)
    opened = open

    def refusing(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:  # root may write anywhere
        if str(path).startswith(str(tmp_path / "a.tar.")) and "w" in mode:
            raise PermissionError(13, "Permission denied")
        return opened(path, mode, *args, **options)

    monkeypatch.setattr("builtins.open", refusing)
    ShardIndex(tmp_path / "a.tar")
    scanned = scans(monkeypatch)
    assert len(ShardIndex(tmp_path / "a.tar")) == 5 and not scanned
    assert len(list((cache / "indexes").iterdir())) == 1
    monkeypatch.setattr(os, "makedirs", lambda *args, **options: (_ for _ in ()).throw(OSError()))
    write_shard(tmp_path / "a.tar", ROWS)
    assert len(ShardIndex(tmp_path / "a.tar")) == 5  # nowhere to keep it
