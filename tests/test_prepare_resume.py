"""Preparation on many cores, killed and given again: always the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from prepare_run import EOD, SMALL, ByteTokenizer, config, contents, jsonl, stand_in, texts

from open_lm_linear.cli import UserError
from open_lm_linear.data import prepare as prepare_module
from open_lm_linear.data.engines import Processes, Serial, choose
from open_lm_linear.data.inputs import Reading, documents, find_inputs, plan
from open_lm_linear.data.journal import Journal
from open_lm_linear.data.manifest import read_dataset_card
from open_lm_linear.data.prepare import PrepareConfig, Speed, prepare
from open_lm_linear.data.shards import ShardIndex

SCRIPT = Path(__file__).with_name("prepare_run.py")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_lm_linear.pretrained", stand_in())
    for (module, name), value in SMALL.items():
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts()))
    return str(tmp_path / "a.jsonl")


def script(*words: Any) -> subprocess.Popen[bytes]:
    """In a group of its own, so that nothing but the kill itself ends its workers."""
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "TQDM_DISABLE": "1"}, start_new_session=True
    )


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path: Path, source: str) -> None:
    said, _ = script("kill", source, tmp_path / "out", 9).communicate(timeout=120)
    report = json.loads(said)
    found = report["found"]
    assert report["pieces"] > 3 and len(found) > 8
    assert [entry["moment"] for entry in found if not entry["same"]] == []
    assert {entry["killed"] for entry in found} == {signal.SIGKILL}
    assert {entry["done"] for entry in found} >= {0, 2, report["pieces"] + 1}  # early, half-way, writing shards
    for entry in found:  # no finished piece is tokenised again; the journal's last piece is the leftovers
        assert entry["tokenised"] == max(0, report["pieces"] - entry["done"])


def test_workers_end_with_a_killed_parent_and_the_rest_is_done_by_others(tmp_path: Path, source: str) -> None:
    prepare(config(source, tmp_path / "whole"))
    run = script("run", source, tmp_path / "out", 2)
    journal = tmp_path / "out" / ".work" / "journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and journal.stat().st_size):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    assert workers and not psutil.wait_procs(workers, timeout=20)[1]
    if not journal.exists():
        pytest.skip("it was done before it was killed")
    prepare(config(source, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_every_number_of_workers_gives_the_same_bytes(tmp_path: Path, source: str) -> None:
    prepare(config(source, tmp_path / "one", workers=1))
    prepare(config(source, tmp_path / "three", workers=3))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


@pytest.mark.parametrize(
    ("name", "value"), [("RUN_BYTES", 10**6), ("BUCKET_BYTES", 10**6), ("BATCH_CHARACTERS", 10**6)]
)
def test_sizes_that_bound_the_memory_change_no_byte(
    tmp_path: Path, source: str, monkeypatch: Any, name: str, value: int
):
    prepare(config(source, tmp_path / "a"))
    (module,) = [module for module, known in SMALL if known == name]
    monkeypatch.setattr(module, name, value)
    prepare(config(source, tmp_path / "b"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class Stopped(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Makes the preparation end where a process would be killed: after so many pieces."""
    original, count = prepare_module.tokenise_piece, [0]

    def tokenise(*args: Any) -> Any:
        count[0] += 1
        if count[0] > pieces:
            raise Stopped
        return original(*args)

    monkeypatch.setattr(prepare_module, "tokenise_piece", tokenise)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 63}, r"with --seq-len 31, and this command has --seq-len 63: give the same settings to go on, or"),
        ({"seed": 1}, "with --seed 0, and this command has --seed 1"),
        ({"holdout_documents": 0.0}, "with --holdout-documents 0.2, and"),
        ({"sample_format": "json"}, "with --sample-format npy, and"),
        ({"tokenizer": "u"}, r"with --tokenizer t \(\w{12}\), and this command has --tokenizer u"),
        ({"input": ("b.jsonl",)}, r"of an --input without b\.jsonl"),
        ({"workers": 2}, None),
        ({"benchmark": True}, None),
    ],
)
def test_other_settings_are_refused_over_an_unfinished_preparation(
    tmp_path: Path, source: str, monkeypatch: Any, changes: dict[str, Any], message: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.jsonl").write_bytes(jsonl(texts(200)))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        prepare(config(source, tmp_path / "out"))
    assert not (tmp_path / "out" / "train").exists()
    other = config(source, tmp_path / "out")
    other = PrepareConfig(**{**other.__dict__, **changes})
    if message is None:
        prepare(other)
        return
    with pytest.raises(UserError, match=message) as caught:
        prepare(other)
    assert "\n" not in str(caught.value)
    prepare(PrepareConfig(**{**other.__dict__, "overwrite": True}))
    fresh = PrepareConfig(**{**other.__dict__, "output": tmp_path / "fresh"})
    prepare(fresh)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_changed_input_is_refused(tmp_path: Path, source: str, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 1)
        prepare(config(source, tmp_path / "out"))
    Path(source).write_bytes(jsonl(texts(299)))
    with pytest.raises(UserError, match=r"of .*a\.jsonl, which has changed since: give"):
        prepare(config(source, tmp_path / "out"))


def test_the_data_that_is_there_stays_until_the_new_is_tokenised(tmp_path: Path, source: str, monkeypatch: Any) -> None:
    prepare(config(source, tmp_path / "out"))
    before = contents(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, 2)
        prepare(config(source, tmp_path / "out", seed=1, overwrite=True))
    now = contents(tmp_path / "out")
    assert {name: now[name] for name in before} == before
    with pytest.raises(UserError, match="manifest.jsonl exists"):  # what is unfinished does not speak for --overwrite
        prepare(config(source, tmp_path / "out", seed=1))
    prepare(config(source, tmp_path / "out", seed=1, overwrite=True))
    prepare(config(source, tmp_path / "fresh", seed=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh") != before


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with (
        Journal(tmp_path, {"format": 1}, False),
        pytest.raises(UserError, match="another process is preparing data in"),
    ):
        Journal(tmp_path, {"format": 1}, False)
    assert list(tmp_path.iterdir()) == []


def test_a_line_of_the_journal_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    with Journal(tmp_path, {"format": 1}, False) as journal:
        journal.piece_done(0, {"train": {}})
        journal.piece_done(1, {"train": {}})
    lines = tmp_path / ".work" / "journal.jsonl"
    lines.write_bytes(lines.read_bytes()[:-5])
    with Journal(tmp_path, {"format": 1}, False) as journal:
        assert list(journal.pieces) == [0]
        journal.piece_done(1, {"train": {}})
    assert [json.loads(line)["piece"] for line in lines.read_text().splitlines()] == [0, 1]


def test_an_error_in_a_worker_is_the_sentence_it_would_be_here(tmp_path: Path, source: str) -> None:
    content = Path(source).read_bytes().splitlines(keepends=True)
    content[250] = b"{broken\n"
    Path(source).write_bytes(b"".join(content))
    said = []
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"a\.jsonl line 251 is not JSON") as caught:
            prepare(config(source, tmp_path / f"out{workers}", workers=workers))
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("workers", "tasks", "expected"), [(4, 9, (4, 1)), (4, 2, (2, 2)), (8, 1, (1, 8)), (5, 2, (2, 2))]
)
def test_processes_and_threads_fill_the_cores(workers: int, tasks: int, expected: tuple[int, int]) -> None:
    engine = choose("local", None, workers, tasks)
    assert (engine.workers, engine.threads) == expected
    assert type(engine) is (Serial if expected[0] == 1 else Processes)


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "kept")
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    with Serial(None, 3):
        assert (os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"]) == ("true", "3")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "kept" and "RAYON_NUM_THREADS" not in os.environ


def test_speed_is_measured_beside_the_tokenizer_alone(tmp_path: Path, source: str) -> None:
    speed = Speed()
    splits = prepare(config(source, tmp_path / "out", benchmark=True), speed)
    assert speed.tokens == sum(split.tokens for split in splits.values())
    assert 0 < speed.alone < speed.tokenising and speed.writing > 0
    (line,) = Speed(tokens=1000, tokenising=1.5, writing=0.5, alone=1.0).lines()
    assert line == (
        "per core: 500 tokens/s from text to shards; "
        "the tokenizer alone, on the same texts, 1,000 tokens/s: 50.0% of it"
    )
    assert Speed(tokens=10, tokenising=1, writing=1).lines() == ["per core: 5 tokens/s from text to shards"]
    assert Speed().lines() == []


@pytest.mark.parametrize("sample_format", ["npy", "json"])
def test_both_sample_formats_hold_the_same(tmp_path: Path, source: str, sample_format: str) -> None:
    prepare(config(source, tmp_path / "npy"))
    prepare(config(source, tmp_path / "out", sample_format=sample_format))
    for path in sorted((tmp_path / "npy" / "train").glob("*.tar")):
        other = ShardIndex(tmp_path / "out" / "train" / path.name)
        index = ShardIndex(path)
        assert other.data_key == sample_format and len(index) == len(other)
        assert all((index.read(i) == other.read(i)).all() for i in range(len(index)))
    card = read_dataset_card(tmp_path / "out" / "train" / "manifest.jsonl")
    assert card is not None and card["sample_format"] == sample_format


@pytest.mark.parametrize("seq_len", [31, 1999, 2999])
def test_pieces_are_packed_alone_and_what_they_leave_over_together(tmp_path: Path, source: str, seq_len: int) -> None:
    splits = prepare(config(source, tmp_path / "out", seq_len=seq_len, holdout_documents=0.0))
    encode, length = ByteTokenizer().backend_tokenizer.encode, seq_len + 1
    expected, rest = [], []
    for piece in plan(find_inputs([source])):
        tokens = [token for text in documents(piece, Reading()) for token in (*encode(text).ids, EOD)]
        whole = len(tokens) // length * length
        expected += [tokens[i : i + length] for i in range(0, whole, length)]
        rest += tokens[whole:]
    alone = len(expected)
    expected += [rest[i : i + length] for i in range(0, len(rest) // length * length, length)]
    indices = [ShardIndex(shard.path) for shard in splits["train"].shards]
    found = [index.read(i).tolist() for index in indices for i in range(len(index))]
    assert alone > 3 and sorted(found) == sorted(expected) != found
    assert seq_len == 2999 or len(expected) > alone
    card = read_dataset_card(tmp_path / "out" / "train" / "manifest.jsonl")
    assert card is not None and card["tokens_dropped"] == len(rest) % length
