"""Data behind URLs: read like local data, through a cache of bounded size, over servers that fail now and then."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from test_places import Web

from open_lm_linear.cli import UserError
from open_lm_linear.data import remote
from open_lm_linear.data.manifest import Shard, read_dataset_card, read_manifest, write_manifest
from open_lm_linear.data.shards import ShardIndex, write_shard
from open_lm_linear.data.stream import DataConfig, TokenDataset, check, global_batches, shards_of, validation_batches

SEQ_LEN, VOCAB, SHARDS = 3, 1000, 6
SIZE = 10240  # bytes of each shard


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPEN_LM_LINEAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "_fetched", {})
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six shards of four sequences and their manifest, on this machine."""
    (tmp_path / "data").mkdir()
    shards = []
    for i in range(SHARDS):
        path = tmp_path / "data" / f"shard-{i:05d}.tar"
        write_shard(path, (np.full(SEQ_LEN + 1, 4 * i + n) for n in range(4)), vocab_size=VOCAB)
        assert path.stat().st_size == SIZE
        shards.append(Shard(str(path), 4))
    card = {"seq_len": SEQ_LEN, "vocab_size": VOCAB, "eod_token_id": 7}
    write_manifest(tmp_path / "data" / "manifest.jsonl", shards, card)
    return tmp_path / "data"


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    pytest.importorskip("aiohttp")
    web = Web()
    web.listing = False
    web.files = {f"/data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    yield web
    web.server.shutdown()
    web.server.server_close()


@pytest.fixture
def memory(folder: Path) -> str:
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe_file(f"/{folder.parent.name}/{path.name}", path.read_bytes())
    return f"memory://{folder.parent.name}"


def samples(cfg: DataConfig, n: int, seen: int = 0) -> list[int]:
    found = global_batches(
        cfg,
        seed=0,
        samples_seen=seen,
        global_batch_size=2,
        rank=0,
        world_size=1,
        seq_len=SEQ_LEN,
        vocab_size=VOCAB,
    )
    return torch.cat(list(itertools.islice(found, n)))[:, 0].tolist()


def cached(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("remote/*/*.tar")}


class Failing(dict):
    """Errors to answer with, each a number of times."""

    def __init__(self, code: int, times: dict[str, int]) -> None:
        super().__init__()
        self.code, self.times = code, times

    def __contains__(self, path: object) -> bool:
        self.times[path] = self.times.get(path, 0) - 1  # type: ignore[index]
        return self.times[path] >= 0  # type: ignore[index]

    def __getitem__(self, path: str) -> int:
        return self.code


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_manifest_on_the_web_gives_the_batches_of_a_local_one(folder: Path, web: Web, workers: int) -> None:
    local = samples(DataConfig(train_data=(str(folder),), workers=0), 24)
    far = DataConfig(train_data=(web.url + "/data/manifest.jsonl",), workers=workers)
    check(far, SEQ_LEN, VOCAB)
    assert samples(far, 24) == local
    assert samples(far, 4, seen=20) == local[20:28]
    bodies = [path for path in web.bodies if path.endswith(".tar")]
    assert sorted(bodies) == sorted(set(bodies))  # each once, whatever the workers


@pytest.mark.parametrize("form", ["{}/manifest.jsonl", "{}", "{}/", "{}/shard-{{00000..00005}}.tar"])
def test_every_form_of_a_source_may_be_remote(folder: Path, memory: str, form: str) -> None:
    local = samples(DataConfig(train_data=(str(folder),), workers=0), 12)
    assert samples(DataConfig(train_data=(form.format(memory),), workers=0), 12) == local


def test_a_query_goes_with_every_file(folder: Path, web: Web) -> None:
    (first, *_) = read_manifest(web.url + "/data/manifest.jsonl?key=secret")
    assert first.path == web.url + "/data/shard-00000.tar?key=secret"
    assert ShardIndex(first.path).read(1).tolist() == [1] * (SEQ_LEN + 1)


def test_remote_cards_and_absolute_shards(folder: Path, web: Web, memory: str) -> None:
    assert read_dataset_card(memory + "/manifest.jsonl")["eod_token_id"] == 7  # type: ignore[index]
    assert read_dataset_card(web.url + "/data/manifest.jsonl")["eod_token_id"] == 7  # type: ignore[index]
    del web.files["/data/dataset.json"]
    remote._fetched.clear()
    assert read_dataset_card(web.url + "/data/manifest.jsonl") is None
    (folder / "far.jsonl").write_text(json.dumps({"shard": memory + "/shard-00001", "num_sequences": 4}))
    assert shards_of([str(folder / "far.jsonl")]) == [Shard(memory + "/shard-00001.tar", 4)]


def test_validation_may_be_remote(memory: str) -> None:
    cfg = DataConfig(val_data=(f"books={memory}/manifest.jsonl",), workers=0)
    shape: dict[str, Any] = {"global_batch_size": 5, "rank": 0, "world_size": 1}
    rows = torch.cat(list(validation_batches(cfg, **shape, seq_len=SEQ_LEN, vocab_size=VOCAB)))
    assert rows[:, 0].tolist() == list(range(24))


def test_the_cache_is_bounded_and_keeps_what_was_used_last(memory: str, cache: Path) -> None:
    cfg = DataConfig(train_data=(memory,), workers=0, data_cache_gb=3 * SIZE / 1e9)
    most = 0
    dataset = TokenDataset(shards_of(cfg.train_data), SEQ_LEN, VOCAB, cache_gb=cfg.data_cache_gb, keep_open=2)
    for i in [0, 1, 2, 0, 3]:  # 1 is the one longest unused when 3 comes
        dataset[i, 0]
        most = max(most, len(cached(cache)))
    assert most == 3 and cached(cache) == {f"shard-{i:05d}.tar" for i in (0, 2, 3)}
    assert dataset[1, 3][0] == 7  # and comes again
    del dataset
    assert len(samples(cfg, 30)) == 60 and len(cached(cache)) <= 4


def test_an_open_shard_is_never_removed(memory: str, cache: Path) -> None:
    held = [ShardIndex(f"{memory}/shard-0000{i}.tar", cache_gb=1.5 * SIZE / 1e9) for i in range(3)]
    assert len(cached(cache)) == 3  # over the limit, for all are open
    assert [index.read(0)[0] for index in held] == [0, 4, 8]
    del held
    ShardIndex(f"{memory}/shard-00003.tar", cache_gb=1.5 * SIZE / 1e9)
    assert cached(cache) == {"shard-00003.tar"}


def test_only_tars_make_room(memory: str, cache: Path) -> None:
    index = ShardIndex(f"{memory}/shard-00000.tar")
    other = Path(index.path).with_name("model.safetensors")
    other.write_bytes(bytes(10 * SIZE))
    del index
    ShardIndex(f"{memory}/shard-00001.tar", cache_gb=SIZE / 1e9)
    assert other.exists() and cached(cache) == {"shard-00001.tar"}
    assert {path.name for path in other.parent.glob("*.json")} <= {".shard-00001.tar.json"}


def test_the_next_shard_is_fetched_meanwhile(memory: str, cache: Path) -> None:
    dataset = TokenDataset(shards_of([memory]), SEQ_LEN, VOCAB)
    dataset[0, 0, 3]
    until = time.monotonic() + 20
    while "shard-00003.tar" not in cached(cache) and time.monotonic() < until:
        time.sleep(0.01)
    assert cached(cache) == {"shard-00000.tar", "shard-00003.tar"}
    assert 3 not in dataset._open


@pytest.mark.parametrize("code", [503, 500, 429])
def test_failures_that_pass_are_tried_again(web: Web, capfd: pytest.CaptureFixture[str], code: int) -> None:
    web.status = Failing(code, {"/data/shard-00002.tar": 4})
    index = ShardIndex(web.url + "/data/shard-00002.tar")
    assert index.read(0)[0] == 8
    said = capfd.readouterr().err
    assert said.count("trying again up to 5 times") == 1 and f"HTTP {code}" in said and "shard-00002.tar" in said


def test_a_server_that_keeps_failing_is_given_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote, "FIRST_DELAY", 1.0)
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    web.status = Failing(503, {"/data/shard-00002.tar": 10**6})
    with pytest.raises(
        UserError, match=r"cannot fetch http.*/data/shard-00002\.tar in 6 attempts .*HTTP 503"
    ) as caught:
        ShardIndex(web.url + "/data/shard-00002.tar")
    assert "\n" not in str(caught.value) and pauses == [1, 2, 4, 8, 16]


def test_a_host_that_is_down_is_given_up(web: Web) -> None:
    web.server.shutdown()
    web.server.server_close()
    with pytest.raises(UserError, match="cannot fetch .*manifest.jsonl in 6 attempts"):
        read_manifest(web.url + "/data/manifest.jsonl")


@pytest.mark.parametrize(("code", "reason"), [(404, "nothing is there"), (403, "access is denied")])
def test_what_will_not_pass_is_said_at_once(
    web: Web, capfd: pytest.CaptureFixture[str], code: int, reason: str
) -> None:
    web.status = Failing(code, {"/data/shard-00002.tar": 10**6})
    with pytest.raises(UserError, match=rf"cannot read http.*/data/shard-00002\.tar: {reason}"):
        ShardIndex(web.url + "/data/shard-00002.tar")
    assert "trying again" not in capfd.readouterr().err


def test_a_transfer_that_breaks_off_leaves_nothing(web: Web, cache: Path) -> None:
    web.cut = 100
    with pytest.raises(UserError, match=r"/data/shard-00002\.tar"):
        ShardIndex(web.url + "/data/shard-00002.tar")
    assert not cached(cache)
    web.cut = 0
    assert ShardIndex(web.url + "/data/shard-00002.tar").read(0)[0] == 8


def test_a_truncated_shard_is_refused_by_its_url(web: Web) -> None:
    whole = web.files["/data/shard-00002.tar"]
    web.files["/data/shard-00002.tar"] = whole[:2300]
    with pytest.raises(UserError, match=r"shard http.*/data/shard-00002\.tar is not a whole, uncompressed tar"):
        ShardIndex(web.url + "/data/shard-00002.tar")
    web.files["/data/shard-00002.tar"] = b""
    with pytest.raises(UserError, match=r"shard http.*/data/shard-00002\.tar is an empty file"):
        remote._fetched.clear()
        ShardIndex(web.url + "/data/shard-00002.tar")


def test_errors_of_remote_samples_name_the_url(web: Web) -> None:
    (bad,) = [Shard(web.url + "/data/shard-00001.tar", 5)]
    with pytest.raises(UserError, match=r"shard http.*shard-00001\.tar holds 4 samples and its manifest says 5"):
        TokenDataset([bad], SEQ_LEN, VOCAB)[0, 0]
    with pytest.raises(UserError, match=r"shard http.*shard-00001\.tar sample 00000000\.npy has token id 4"):
        ShardIndex(bad.path).read_sequence(0, SEQ_LEN, 2)


def test_check_fetches_one_shard_of_a_folder(web: Web) -> None:
    check(DataConfig(train_data=(web.url + "/data",)), SEQ_LEN, VOCAB)
    assert len([path for path in web.bodies if path.endswith(".tar")]) == 1


def test_a_shard_removed_by_another_process_is_fetched_again(memory: str) -> None:
    url = f"{memory}/shard-00000.tar"
    path = ShardIndex(url).path
    os.unlink(path)
    assert ShardIndex(url).read(2)[0] == 2


def test_two_threads_fetch_one_file_once(web: Web) -> None:
    url = web.url + "/data/shard-00000.tar"
    threads = [threading.Thread(target=remote.fetch, args=(url,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert web.bodies.count("/data/shard-00000.tar") == 1
