"""Preparation: text in every form becomes shards that hold each training token once and no held-out document."""

from __future__ import annotations

import copy
import gzip
import json
import lzma
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from open_lm_linear.cli import UserError
from open_lm_linear.data import prepare as prepare_module
from open_lm_linear.data import python_docs, tokenise
from open_lm_linear.data.manifest import read_dataset_card, read_manifest
from open_lm_linear.data.prepare import PrepareConfig, held_out, pack, prepare, summary
from open_lm_linear.data.shards import ShardIndex
from open_lm_linear.data.stream import DataConfig, check

EOD = 256


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per byte, then the end of text: id 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.fixture(autouse=True)
def loader(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """Stands for open_lm_linear.pretrained, which would ask the hub."""
    from types import ModuleType

    module = ModuleType("open_lm_linear.pretrained")
    module.__path__ = [str(Path(prepare_module.__file__).parents[1] / "pretrained")]  # its submodules stay real
    module.load_tokenizer = lambda source: tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "open_lm_linear.pretrained", module)


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


TEXTS = [f"<{i}> " + "word " * (i % 17) + f"</{i}>" for i in range(300)]


def run(tmp_path: Path, content: bytes = jsonl(TEXTS), name: str = "a.jsonl", **settings: Any) -> dict[str, Any]:
    (tmp_path / name).write_bytes(content)
    settings = {"seq_len": 31, "holdout_documents": 0.2, **settings}
    return prepare(PrepareConfig(input=(str(tmp_path / name),), tokenizer="t", output=tmp_path / "out", **settings))


def sequences(folder: Path) -> list[list[int]]:
    indices = [
        ShardIndex(shard.path, expected=shard.num_sequences) for shard in read_manifest(folder / "manifest.jsonl")
    ]
    return [index.read(i).tolist() for index in indices for i in range(len(index))]


def packed(tokenizer: Any, texts: list[str], seq_len: int = 31) -> list[list[int]]:
    return [s.tolist() for s in pack((tokenizer(t, add_special_tokens=False).input_ids for t in texts), seq_len, EOD)]


def test_pack_joins_documents_and_cuts_without_overlap() -> None:
    found = list(pack([[1, 2, 3], [], [4], range(10, 20)], seq_len=3, eod=0))
    assert [row.tolist() for row in found] == [[1, 2, 3, 0], [0, 4, 0, 10], [11, 12, 13, 14], [15, 16, 17, 18]]
    assert list(pack([[1]], seq_len=3, eod=0)) == []


def test_every_token_lands_once_on_its_side(tmp_path: Path, tokenizer: Any) -> None:
    splits = run(tmp_path)
    sides = {side: [t for t in TEXTS if held_out(t, 0.2) == side] for side in (False, True)}
    assert 30 < len(sides[True]) < 90
    for name, side in (("train", False), ("val", True)):
        found, expected = sequences(tmp_path / "out" / name), packed(tokenizer, sides[side])
        assert Counter(map(tuple, found)) == Counter(map(tuple, expected))
        assert splits[name].documents == len(sides[side])
        assert found != expected  # shuffled


def test_held_out_documents_never_reach_training(tmp_path: Path, tokenizer: Any) -> None:
    run(tmp_path)
    train, val = (
        "|".join(tokenizer.decode(row) for row in sequences(tmp_path / "out" / name)) for name in ("train", "val")
    )
    for i, text in enumerate(TEXTS):
        here, elsewhere = (val, train) if held_out(text, 0.2) else (train, val)
        assert f"</{i}>" not in elsewhere and f"<{i}> " not in elsewhere
    assert sum(f"<{i}> " in train + val for i in range(300)) > 200  # the search does find documents


def test_the_side_is_a_function_of_the_text() -> None:
    assert held_out("a document", 0.5) == held_out("a document", 0.5)
    assert not any(held_out(text, 0) for text in TEXTS)
    assert all(held_out(text, 0.4) for text in TEXTS if held_out(text, 0.2))  # a larger share only adds
    assert abs(sum(held_out(str(i), 0.1) for i in range(10_000)) - 1000) < 120


def test_card_manifest_and_check_agree(tmp_path: Path, tokenizer: Any) -> None:
    run(tmp_path, seed=5)
    manifest = tmp_path / "out" / "train" / "manifest.jsonl"
    card = read_dataset_card(manifest)
    count = len(sequences(manifest.parent))
    val = [text for text in TEXTS if held_out(text, 0.2)]
    kept = [text for text in TEXTS if not held_out(text, 0.2)]
    assert card is not None
    quantiles, fingerprint = card.pop("tokens_per_document"), card.pop("tokenizer_sha256")
    assert card == {
        "format_version": 1,
        "split": "train",
        "tokenizer": "t",
        "vocab_size": 257,
        "seq_len": 31,
        "eod_token_id": EOD,
        "documents": 300 - len(val),
        "tokens": count * 32,
        "sequences": count,
        "heldout_documents": len(val),
        "heldout_sequences": len(packed(tokenizer, val)),
        "shuffle_seed": 5,
        "sample_format": "npy",
        "characters": sum(map(len, kept)),
        "tokens_dropped": sum(len(text) + 1 for text in kept) - count * 32,
        "inputs": [{"path": str(tmp_path / "a.jsonl"), "size": len(jsonl(TEXTS))}],
    }
    lengths = sorted(map(len, kept))
    assert quantiles.pop("mean") == round(sum(lengths) / len(lengths), 2)
    for name, share in (("p5", 0.05), ("p25", 0.25), ("p50", 0.5), ("p75", 0.75), ("p95", 0.95)):
        assert quantiles.pop(name) == lengths[math.ceil(share * len(lengths)) - 1]  # exact below 128
    assert not quantiles and re.fullmatch("[0-9a-f]{64}", fingerprint)
    check(DataConfig(train_data=(str(manifest),), val_data=(str(tmp_path / "out" / "val"),)), 31, 257)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        run(tmp_path / name, seed=seed)
        found.append([path.read_bytes() for path in sorted((tmp_path / name / "out" / "train").glob("*.tar"))])
    assert found[0] == found[1] != found[2]


def test_shards_are_bounded_and_at_least_four(tmp_path: Path) -> None:
    sizes = [shard.num_sequences for shard in run(tmp_path)["train"].shards]
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 1
    sizes = [shard.num_sequences for shard in run(tmp_path, overwrite=True, sequences_per_shard=20)["train"].shards]
    assert len(sizes) > 10 and max(sizes) <= 20 and max(sizes) - min(sizes) <= 1
    shards = sorted((tmp_path / "out" / "train").iterdir())
    assert [path.name for path in shards[2:4]] == ["shard-00000.tar", "shard-00001.tar"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train", "val"}  # no temporary files stay


def two_frames(content: bytes) -> bytes:
    import zstandard

    half = len(content) // 2
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


@pytest.mark.parametrize(
    ("name", "compress"),
    [("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress), ("a.jsonl.zst", two_frames), ("a.json", bytes)],
)
def test_compressed_inputs_are_read_whole(tmp_path: Path, name: str, compress: Any) -> None:
    assert run(tmp_path, compress(jsonl(TEXTS)), name, holdout_documents=0.0)["train"].documents == 300


@pytest.mark.parametrize(("name", "compress"), [("a.txt", bytes), ("a.md", bytes), ("a.rst.xz", lzma.compress)])
def test_a_text_file_is_one_document(tmp_path: Path, tokenizer: Any, name: str, compress: Any) -> None:
    text = "\n".join(TEXTS) + " é ☃"
    splits = run(tmp_path, compress(text.encode()), name, holdout_documents=0.0)
    assert (splits["train"].documents, splits["train"].tokens) == (1, len(text.encode()) + 1)
    assert sorted(sequences(tmp_path / "out" / "train")) == sorted(packed(tokenizer, [text]))


def test_many_batches_and_inputs_keep_their_order(tmp_path: Path, tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 100)
    (tmp_path / "b.txt").write_text("the second input " * 10)
    (tmp_path / "a.jsonl").write_bytes(jsonl([*TEXTS, "", " \n"]))  # empty documents are passed over
    inputs = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt"))
    splits = prepare(PrepareConfig(inputs, "t", tmp_path / "out", seq_len=31, holdout_documents=0.0))
    assert splits["train"].documents == 301
    expected = packed(tokenizer, [*TEXTS, "the second input " * 10])
    assert sorted(sequences(tmp_path / "out" / "train")) == sorted(expected)


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    run(tmp_path, sequences_per_shard=20)
    with pytest.raises(UserError, match=r"train/manifest\.jsonl exists: choose another --output, or pass --overwrite"):
        run(tmp_path)
    run(tmp_path, overwrite=True, holdout_documents=0.0)
    assert len(list((tmp_path / "out" / "train").glob("*.tar"))) == 4  # none of the first run's is left
    assert not (tmp_path / "out" / "val" / "manifest.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl line 1 is not JSON"),
        ("a.jsonl", b'\n["a"]\n', r"a\.jsonl line 2 is not a JSON object"),
        ("a.jsonl", b'{"content": "a", "id": 1}\n', "line 1 has no key 'text': set --text-key to one of content, id"),
        ("a.jsonl", b'{"text": 5}\n', "line 1 has under 'text' no string but 5"),
        ("a.pdf", b"", r"a\.pdf has an extension that is not read; it must be one of \.txt \.md"),
        ("a.gz", b"", "has an extension that is not read"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8 text \(byte 0\)"),
        ("a.txt", b"short", "too little text: 6 training tokens do not fill one sequence of 32"),
        ("a.txt.gz", b"not gzip", r"cannot read .*a\.txt\.gz"),
        ("a.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], r"cannot read .*a\.txt\.gz"),
        ("a.txt.xz", b"not xz", r"cannot read .*a\.txt\.xz"),
        ("a.txt.zst", b"not zst", r"cannot read .*a\.txt\.zst"),
    ],
)
def test_bad_inputs_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, content, name, holdout_documents=0.0)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "train").exists()


def test_bad_settings_are_named(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no input file at missing.txt"):
        prepare(PrepareConfig(("missing.txt",), "t", tmp_path / "out"))
    with pytest.raises(UserError, match="--holdout-documents 2 is a share"):
        run(tmp_path, holdout_documents=2)
    with pytest.raises(UserError, match="--seq-len and --sequences-per-shard must be at least 1"):
        run(tmp_path, seq_len=0)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    monkeypatch.setattr(sys.modules["open_lm_linear.pretrained"], "load_tokenizer", lambda source: endless)
    with pytest.raises(UserError, match="the tokenizer t has no end-of-text token"):
        run(tmp_path)


def test_the_command_prints_a_summary_and_one_line_errors(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
    argv = ["prepare", "--input", str(tmp_path / "a.jsonl"), "--tokenizer", "t", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*argv, "--seq-len", "31", "--holdout-documents", "0"])
    prepare_module.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("train: 300 documents, ") and lines[0].endswith("out/train/manifest.jsonl")
    assert lines[1].startswith("val: 0 documents") and "nothing: too little text" in lines[1]
    assert lines[2].endswith("tokens/s)")
    with pytest.raises(SystemExit) as caught:
        prepare_module.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_summary_counts(tmp_path: Path) -> None:
    splits = run(tmp_path)
    total = splits["train"].tokens + splits["val"].tokens
    assert total == sum(len(text) + 1 for text in TEXTS)
    cfg = PrepareConfig(("a",), "t", tmp_path / "out")
    assert summary(cfg, splits, 2.0).splitlines()[-1] == f"{total:,} tokens in 2.0 s ({total / 2:,.0f} tokens/s)"


def test_docstrings_are_taken_from_the_source() -> None:
    source = '''"""Module."""
if True:
    def f(a, b=1):
        """Does f.

            Indented."""
        def inner(): "not taken"
class C:
    "Is C."
    async def m(self): "Does m."
    def bare(self): pass
'''
    assert python_docs.module_docs(source, "mod") == (
        "mod\n\nModule.\n\nf(a, b=1)\n\nDoes f.\n\nIndented.\n\nclass C\n\nIs C.\n\nC.m(self)\n\nDoes m."
    )


def test_modules_skip_tests_and_what_cannot_be_parsed(tmp_path: Path) -> None:
    for name in ("b.py", "a/__init__.py", "a/z.py", "test/x.py", "site-packages/y.py", "a/tests/t.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f'"""{name}"""')
    (tmp_path / "bad.py").write_text("def (")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    assert [name for name, _ in python_docs.modules(tmp_path)] == ["b", "a", "a.z"]


def test_python_docs_are_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stdlib").mkdir()
    (tmp_path / "stdlib" / "long.py").write_text(f'"""{"long " * 50}"""')
    (tmp_path / "stdlib" / "short.py").write_text('"""Short."""')
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "stdlib")})
    documents, characters = python_docs.write_docs(tmp_path / "docs.jsonl.gz")
    content = (tmp_path / "docs.jsonl.gz").read_bytes()
    rows = [json.loads(line) for line in gzip.decompress(content).splitlines()]
    assert len(rows) == documents > 50 and sum(len(row["text"]) for row in rows) == characters > 100_000
    assert [row["id"] for row in rows if row["source"] == "stdlib"] == ["long"]
    assert min(len(row["text"]) for row in rows) >= python_docs.SHORTEST
    python_docs.write_docs(tmp_path / "again.jsonl.gz")
    assert (tmp_path / "again.jsonl.gz").read_bytes() == content
    with pytest.raises(UserError, match="must end in .jsonl"):
        python_docs.write_docs(tmp_path / "docs.txt")


def test_sequences_are_stored_as_small_integers() -> None:
    (row,) = pack([range(4)], seq_len=4, eod=9)
    assert row.dtype == np.int32
