"""Inputs of preparation: what paths mean, how they are cut into pieces, and that a cut loses no document."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from prepare_run import SMALL, config, contents, jsonl, stand_in, texts

from open_lm_linear.cli import UserError
from open_lm_linear.data import inputs as inputs_module
from open_lm_linear.data import prepare as prepare_module
from open_lm_linear.data.inputs import Input, Part, Reading, braces, documents, find_inputs, is_dataset, plan
from open_lm_linear.data.prepare import PrepareConfig, prepare


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.txt", ["a.txt"]),
        ("{a,b}.txt", ["a.txt", "b.txt"]),
        ("p-{08..11}.gz", ["p-08.gz", "p-09.gz", "p-10.gz", "p-11.gz"]),
        ("{2..1}/{x,y}", ["2/x", "2/y", "1/x", "1/y"]),
        ("{a,b{1..2}}", ["a", "b1", "a", "b2"]),
        ("{one}.txt", ["{one}.txt"]),
        ("s3://b/{a,}c", ["s3://b/ac", "s3://b/c"]),
    ],
)
def test_braces_name_many_paths(pattern: str, expected: list[str]) -> None:
    assert sorted(braces(pattern)) == sorted(expected)
    assert "b{" in pattern or braces(pattern) == expected  # of nested ones the inner come first


def test_globs_are_sorted_and_take_only_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.pdf", "sub/d.txt.gz", "x[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
    monkeypatch.chdir(tmp_path)
    assert [entry.path for entry in find_inputs(["*"])] == ["a.jsonl", "b.jsonl", "x[1].txt"]
    assert [entry.path for entry in find_inputs(["**/*.gz", "{b,a}.jsonl"])] == ["sub/d.txt.gz", "b.jsonl", "a.jsonl"]
    assert [(entry.path, entry.size) for entry in find_inputs(["x[1].txt"])] == [("x[1].txt", 3)]
    with pytest.raises(UserError, match=r"a\.jsonl is named twice by --input"):
        find_inputs(["a.jsonl", "*.jsonl"])
    for pattern in ("no-*.txt", "*.pdf", "sub"):
        with pytest.raises(UserError, match="no input file at|has an extension that is not read"):
            find_inputs([pattern])
    with pytest.raises(UserError, match=r"cannot open nowhere://a\.txt .*: check the url"):
        find_inputs(["nowhere://a.txt"])


def test_urls_are_found_cut_and_read() -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/p-0.jsonl", jsonl(["a", "b"]))
    memory.pipe("/bucket/p-1.jsonl.gz", gzip.compress(jsonl(["c"])))
    for patterns in (["memory://bucket/p-*"], ["memory://bucket/p-{0.jsonl,1.jsonl.gz}"]):
        found = find_inputs(patterns)
        assert [entry.path.rpartition("/")[2] for entry in found] == ["p-0.jsonl", "p-1.jsonl.gz"]
        assert list(documents((part for piece in plan(found) for part in piece), Reading())) == ["a", "b", "c"]
    assert find_inputs(["memory://bucket/p-0.jsonl"])[0].size == len(jsonl(["a", "b"]))


@pytest.mark.parametrize("cuts", [1, 2, 3, 7, 50, 400])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_cuts_of_json_lines_hold_each_line_once(tmp_path: Path, cuts: int, end: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(texts(40)).rstrip() + end)
    parts = [Part(str(path), path.stat().st_size, cut, cuts) for cut in range(cuts)]
    found = [list(documents([part], Reading())) for part in parts]
    assert [text for part in found for text in part] == texts(40)
    assert cuts == 1 or max(map(len, found)) < 40  # the cuts do cut


@pytest.mark.parametrize("line", [1, 2, 57, 100])
@pytest.mark.parametrize("cuts", [1, 9, 200])
def test_a_bad_line_has_its_number_in_every_cut(tmp_path: Path, cuts: int, line: int) -> None:
    lines = jsonl(texts(100)).splitlines(keepends=True)
    lines[line - 1] = b"5\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))
    parts = [Part(str(path), path.stat().st_size, cut, cuts) for cut in range(cuts)]
    with pytest.raises(UserError, match=rf"a\.jsonl line {line} is not a JSON object"):
        list(documents(parts, Reading()))


def test_the_plan_joins_small_files_and_cuts_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "SMALLEST_PIECE", 100)
    monkeypatch.setattr(inputs_module, "LARGEST_PIECE", 100)
    found = [Input("/a.txt", 30), Input("/b.txt", 60), Input("/c.txt", 20), Input("/d.jsonl", 250), Input("/e.xz", 900)]
    pieces = plan(found)
    assert [[(part.path, part.cut, part.cuts) for part in piece] for piece in pieces] == [
        [("/a.txt", 0, 1), ("/b.txt", 0, 1)],
        [("/c.txt", 0, 1)],
        [("/d.jsonl", 0, 3)],
        [("/d.jsonl", 1, 3)],
        [("/d.jsonl", 2, 3)],
        [("/e.xz", 0, 1)],
    ]
    assert plan([]) == []


def test_text_that_is_no_unicode_is_still_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_lm_linear.pretrained", stand_in())
    rows = [r'{"text": "half \ud83d of a pair ' + "x" * 90 + '"}', r'{"text": "a whole \ud83d\ude00"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    splits = prepare(config(str(tmp_path / "a.jsonl"), tmp_path / "out", holdout_documents=0.0))
    tokens = len(("half \ufffd of a pair " + "x" * 90).encode()) + len("a whole \U0001f600".encode()) + 2
    assert (splits["train"].documents, splits["train"].tokens) == (2, tokens)


def parquet(path: Path, column: list[Any], name: str = "text") -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path, row_group_size=7)


@pytest.mark.parametrize("cuts", [1, 3, 20])
def test_parquet_is_read_by_row_groups(tmp_path: Path, cuts: int) -> None:
    parquet(tmp_path / "a.parquet", [*texts(40), None])
    parts = [Part(str(tmp_path / "a.parquet"), 1, cut, cuts) for cut in range(cuts)]
    found = [list(documents([part], Reading())) for part in parts]
    assert [text for part in found for text in part] == texts(40)
    assert cuts == 1 or all(len(part) <= 14 for part in found)


@pytest.mark.parametrize(
    ("column", "name", "message"),
    [
        (["a"], "content", r"a\.parquet has no column 'text': set --text-key to one of id, content"),
        ([1, 2], "text", r"a\.parquet has under 'text' no strings but int64"),
        (None, "", r"cannot read .*a\.parquet \("),
    ],
)
def test_bad_parquet_is_named(tmp_path: Path, column: list[Any] | None, name: str, message: str) -> None:
    pytest.importorskip("pyarrow")
    if column is None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1 but no parquet")
    else:
        parquet(tmp_path / "a.parquet", column, name)
    with pytest.raises(UserError, match=message) as caught:
        list(documents([Part(str(tmp_path / "a.parquet"), 1)], Reading()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("hf://datasets/x", "datasets")])
def test_a_missing_package_is_said(tmp_path: Path, monkeypatch: Any, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    path = name if "://" in name else str(tmp_path / name)
    inputs_module._stream.cache_clear()
    with pytest.raises(
        UserError, match=rf"the package `{package}`, which is not installed: pip install 'open_lm_linear"
    ):
        list(documents([Part(path, 0)], Reading()))


def test_the_same_documents_give_the_same_bytes_from_every_format(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "open_lm_linear.pretrained", stand_in())
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts()))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(texts())))
    parquet(tmp_path / "a.parquet", texts())
    found = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet"):
        prepare(config(str(tmp_path / name), tmp_path / name.replace(".", "-")))
        found.append({k: v for k, v in contents(tmp_path / name.replace(".", "-")).items() if k.endswith(".tar")})
    assert len(found[0]) > 8 and found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://datasets/owner/name", True),
        ("hf://datasets/owner/name@v1.0", True),
        ("hf://datasets/owner/name/data/x.parquet", False),
        ("hf://datasets/owner/name/data/*.jsonl.gz", False),
        ("datasets/name", False),
    ],
)
def test_data_sets_are_told_from_their_files(path: str, expected: bool) -> None:
    assert is_dataset(path) is expected


def test_a_data_set_is_streamed_shard_by_shard(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("datasets")
    for (module, name), value in SMALL.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "open_lm_linear.pretrained", stand_in())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"train-{i}.jsonl").write_bytes(jsonl(texts()[i * 100 : i * 100 + 100]))
    (entry,) = find_inputs([f"hf://datasets/{folder}"], Reading())
    assert entry.cuts == 3 and len(plan([entry])) == 3
    argv = ["--dataset", str(folder), "--tokenizer", "t", "--output", str(tmp_path / "out"), "--seq-len", "31"]
    monkeypatch.setattr(sys, "argv", ["prepare", *argv, "--workers", "1", "--holdout-documents", "0"])
    prepare_module.main()
    assert capsys.readouterr().out.startswith("train: 300 documents, ")
    prepare(
        PrepareConfig(
            tuple(map(str, sorted(folder.iterdir()))), "t", tmp_path / "files", 31, holdout_documents=0.0, workers=1
        )
    )
    shards = [{k: v for k, v in contents(tmp_path / name).items() if k.endswith(".tar")} for name in ("out", "files")]
    assert len(shards[0]) >= 4 and shards[0].keys() == shards[1].keys()
    with pytest.raises(UserError, match="the data set .*no-such cannot be opened: "):
        find_inputs([f"hf://datasets/{tmp_path / 'no-such'}"], Reading())
    with pytest.raises(UserError, match="has no column 'content': set --text-key to one of text"):
        list(documents(plan([entry])[0], Reading("content")))


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is nothing to read: give --input FILES, or --dataset NAME"):
        prepare(PrepareConfig((), "t", tmp_path / "out"))
    with pytest.raises(UserError, match="--workers -1 must be at least 1, or 0 for all cores"):
        prepare(PrepareConfig(("a.txt",), "t", tmp_path / "out", workers=-1))
    assert json.dumps([str(path) for path in tmp_path.iterdir()]) == "[]"
