"""Manifests and shards: what is written can be read, by us and by webdataset, and what is wrong is named."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import tar_of

from open_lm_linear.cli import UserError
from open_lm_linear.data.manifest import Shard, read_dataset_card, read_manifest, write_manifest
from open_lm_linear.data.shards import ShardIndex, write_shard

SEQUENCES = np.arange(5 * 9).reshape(5, 9)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "a.tar", SEQUENCES, first_key=7)
    return tmp_path / "a.tar"


def test_written_samples_are_read_back_in_any_order(shard: Path) -> None:
    index = ShardIndex(shard)
    assert len(index) == 5 and index.key(0) == "00000007"
    for i in (4, 0, 2, 2):
        tokens = index.read(i)
        assert tokens.dtype == np.int64
        np.testing.assert_array_equal(tokens, SEQUENCES[i])


def test_the_same_sequences_give_the_same_bytes(shard: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "b.tar", SEQUENCES, first_key=7)
    assert shard.read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(shard) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}


def test_a_write_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    def failing():
        yield SEQUENCES[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", failing())
    assert not (tmp_path / "a.tar").exists()


def test_webdataset_reads_our_shards(shard: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{n:08d}" for n in range(7, 12)]
    assert [sample["json"] for sample in samples] == SEQUENCES.tolist()


@pytest.mark.parametrize(
    ("extension", "encode"),
    [
        ("txt", lambda row: str(row).encode()),
        ("txt", lambda row: str(tuple(row)).encode()),
        ("json", lambda row: json.dumps(row).encode()),
        ("json.gz", lambda row: gzip.compress(json.dumps(row).encode())),
    ],
)
def test_samples_as_openlm_writes_them_are_read(tmp_path: Path, extension: str, encode) -> None:
    files = {f"dir/{i}.{extension}": encode(row) for i, row in enumerate(SEQUENCES.tolist())}
    path = tar_of(tmp_path / "a.tar", files)
    for data_key in ("auto", extension):
        index = ShardIndex(path, data_key)
        np.testing.assert_array_equal([index.read(i) for i in range(5)], SEQUENCES)


def test_longer_samples_are_cut_to_their_beginning(shard: Path) -> None:
    np.testing.assert_array_equal(ShardIndex(shard).read_sequence(1, 3, 100), SEQUENCES[1][:4])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (b"[1, 2, 3]", "sample 0.json has 3 tokens, fewer than the 4 that length 3 needs"),
        (b"[1, -2, 3, 4]", r"a\.tar sample 0\.json has token id -2, outside the model's vocabulary of 50"),
        (b"[1, 50, 3, 4]", r"a\.tar sample 0\.json has token id 50, outside the model's vocabulary of 50"),
        (b"[1, 2, 3", r"a\.tar sample 0\.json is corrupt"),
        (b"[1, 2.5, 3, 4]", r"sample 0\.json is corrupt"),
        (b"[[1, 2], [3, 4]]", r"sample 0\.json is corrupt"),
        (b"[[1], [3, 4]]", r"sample 0\.json is corrupt"),
        (b"[1, 99999999999999999999999, 3, 4]", r"sample 0\.json is corrupt"),
        (b'{"a": 1}', r"sample 0\.json is corrupt"),
        (b"\xff\xfe\x00", r"sample 0\.json is corrupt"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, tokens: bytes, message: str) -> None:
    index = ShardIndex(tar_of(tmp_path / "a.tar", {"0.json": tokens}))
    with pytest.raises(UserError, match=message):
        index.read_sequence(0, 3, 50)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"[1, 2, 3, 4]" * 50, mtime=0)[:-12]])
def test_corrupt_gzip_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"sample 0\.json\.gz is corrupt"):
        ShardIndex(tar_of(tmp_path / "a.tar", {"0.json.gz": content})).read(0)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {"0.pyd": pickle.dumps([1]), "0.pth": b""})
    with pytest.raises(UserError, match="holds pyd, pth files and no samples of npy, json, json.gz, txt"):
        ShardIndex(path)


def test_bad_shards_are_named(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "zero.tar").touch()
    tar_of(tmp_path / "none.tar", {})
    for length in (2000, 2048, 2100):  # within a sample, after one, and within a header
        (tmp_path / f"cut{length}.tar").write_bytes(shard.read_bytes()[:length])
    (tmp_path / "packed.tar").write_bytes(gzip.compress(shard.read_bytes()))
    for name, message in {
        "missing.tar": r"cannot open shard .*missing\.tar \(No such file",
        "zero.tar": r"shard .*zero\.tar is an empty file",
        "none.tar": r"shard .*none\.tar holds no samples",
        "cut2000.tar": r"shard .*cut2000\.tar is not a whole, uncompressed tar",
        "cut2048.tar": r"shard .*cut2048\.tar is not a whole, uncompressed tar",
        "cut2100.tar": r"shard .*cut2100\.tar is not a whole, uncompressed tar",
        "packed.tar": r"shard .*packed\.tar is not a whole, uncompressed tar",
    }.items():
        with pytest.raises(UserError, match=message):
            ShardIndex(tmp_path / name)
    with pytest.raises(UserError, match=r"a\.tar holds 5 samples and its manifest says 6"):
        ShardIndex(shard, expected=6)
    with pytest.raises(UserError, match="holds no txt samples but json: set --data-key"):
        ShardIndex(shard, "txt")
    with pytest.raises(UserError, match="--data-key jsn is not known; it is one of: json, "):
        ShardIndex(shard, "jsn")
    with pytest.raises(UserError, match="pipe:cat a.tar is a command, and data is read from paths and URLs alone"):
        ShardIndex("pipe:cat a.tar")


def test_manifest_round_trip_survives_moving_the_folder(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    shards = [Shard(str(old / "a.tar"), 5), Shard(str(old / "b.tar"), 6)]
    write_manifest(old / "manifest.jsonl", shards, {"vocab_size": 100, "seq_len": 8})
    assert read_manifest(old / "manifest.jsonl") == shards
    old.rename(tmp_path / "new")
    manifest = tmp_path / "new" / "manifest.jsonl"
    assert read_manifest(manifest)[0] == Shard(str(tmp_path / "new" / "a.tar"), 5)
    assert read_dataset_card(manifest) == {"format_version": 1, "vocab_size": 100, "seq_len": 8}


def test_manifests_of_openlm_are_read(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"shard": "0001", "num_sequences": 3}\n\n{"shard": "0002.tar", "num_chunks": 4}\n')
    assert read_manifest(manifest) == [Shard(str(tmp_path / "0001.tar"), 3), Shard(str(tmp_path / "0002.tar"), 4)]
    assert read_dataset_card(manifest) is None


@pytest.mark.parametrize(
    "line",
    ["not json", "[]", '"a"', '{"shard": "a"}', '{"shard": 1, "num_sequences": 1}', '{"num_sequences": 1}']
    + [f'{{"shard": "a", "num_sequences": {n}}}' for n in ('"5"', "1.5", "true", "-1", "0")],
)
def test_malformed_manifest_lines_are_named(tmp_path: Path, line: str) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text('{"shard": "ok", "num_sequences": 3}\n' + line)
    with pytest.raises(UserError, match=r"manifest\.jsonl line 2 is not"):
        read_manifest(manifest)


def test_bad_manifests_and_cards_are_named(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    with pytest.raises(UserError, match="no manifest at .* `python -m open_lm_linear.data.prepare"):
        read_manifest(manifest)
    with pytest.raises(UserError, match="is a command, and data is read from paths and URLs alone"):
        read_manifest("pipe:cat manifest.jsonl")
    manifest.write_text("\n")
    with pytest.raises(UserError, match="names no shards"):
        read_manifest(manifest)
    (tmp_path / "dataset.json").write_text("[")
    with pytest.raises(UserError, match="is not a JSON object"):
        read_dataset_card(manifest)
    (tmp_path / "dataset.json").write_text('{"format_version": 2}')
    with pytest.raises(UserError, match="has format version 2 and this code reads 1"):
        read_dataset_card(manifest)
