"""Loss by position and by domain equals the plain computation, however the text is cut."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from subjects import VOCAB, random_subject

from open_lm_linear.cli import UserError
from open_lm_linear.data.manifest import Shard, write_manifest
from open_lm_linear.data.shards import write_shard
from open_lm_linear.evaluation import perplexity
from open_lm_linear.evaluation.estimates import mean, ratio
from open_lm_linear.evaluation.perplexity import buckets, in_turn, windows_of
from open_lm_linear.evaluation.reading import token_losses

TEXTS = {"news": ["The council met. " * 12, "It rained."], "prose": ["Once there was a fox, and it slept. " * 7]}


def write(path: Path) -> Path:
    lines = [json.dumps({"text": t, "source": domain}) for domain, texts in TEXTS.items() for t in texts]
    path.write_bytes(lzma.compress("\n".join(lines).encode()))
    return path


def naive(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return -logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def one(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The only row with these values; ``position`` must be absent unless asked."""
    found = [r for r in rows if all(r.get(k) == v for k, v in ({"position": None} | wanted).items())]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize("attn_name", ["softmax", "linear"])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_losses_in_pieces_equal_the_whole(attn_name: str, chunk: int) -> None:
    subject = random_subject(attn_name)
    ids = torch.randint(VOCAB, (50,)).tolist()
    torch.testing.assert_close(
        token_losses(subject.model, torch.tensor(ids), chunk).double(), naive(subject.model, ids), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("bos", [False, True])
def test_rows_equal_the_plain_computation(tmp_path: Path, bos: bool) -> None:
    subject, context = random_subject(bos=bos), 40
    data = str(write(tmp_path / "held.jsonl.xz"))
    rows = perplexity.run(subject, {"data": data, "contexts": [context], "windows": 99}, None, 0)
    nats: dict[str, list[float]] = {"news": [], "prose": []}
    full = torch.zeros(context, dtype=torch.float64)
    documents, tokens = 0, 0
    for domain, texts in TEXTS.items():
        for text in texts:
            ids = [VOCAB - 1] * bos + subject.tokenizer(text, add_special_tokens=False)["input_ids"]
            for begin in range(0, len(ids) - 1, context):
                window = ids[begin : begin + context + 1]
                if bos and begin:
                    window = [VOCAB - 1, *window[1:]]
                losses = naive(subject.model, window)
                nats[domain] += losses.tolist()
                if len(losses) == context:
                    full, tokens = full + losses, tokens + 1
            documents += 1
    everything = nats["news"] + nats["prose"]
    whole = one(rows, metric="nats_per_token", domain="all")
    assert whole["value"] == pytest.approx(math.fsum(everything) / len(everything), rel=1e-5)
    assert (whole["n"], whole["tokens"], whole["context"]) == (documents, len(everything), context)
    assert whole["chance"] == pytest.approx(math.log(VOCAB))
    for domain, values in nats.items():
        found = one(rows, metric="nats_per_token", domain=domain)
        assert found["value"] == pytest.approx(math.fsum(values) / len(values), rel=1e-5)
    bits = one(rows, metric="bits_per_byte", domain="prose")  # a token is a byte here
    assert bits["value"] == pytest.approx(math.fsum(nats["prose"]) / len(nats["prose"]) / math.log(2), rel=1e-5)
    at = one(rows, position=[0, context - 1])
    assert (at["value"], at["tokens"]) == (pytest.approx(float(full.sum()) / (tokens * context)), tokens * context)


@pytest.mark.parametrize("context", [1, 100, 128, 129, 256, 1000, 4096])
def test_buckets_partition_the_positions(context: int) -> None:
    for width in (1, 3, 128):
        positions = [p for first, last in buckets(context, width) for p in range(first, last + 1)]
        assert positions == list(range(context))


def test_buckets_double_from_the_first_on() -> None:
    assert buckets(256, 128) == [(0, 127), (128, 255)]
    assert buckets(100, 16) == [(0, 15), (16, 31), (32, 63), (64, 99)]


def test_positions_partition_the_tokens_of_full_windows(tmp_path: Path) -> None:
    data = str(write(tmp_path / "held.jsonl.xz"))
    rows = perplexity.run(random_subject(), {"data": data, "contexts": [200]}, None, 0)
    at = [r for r in rows if "position" in r]
    assert [r["position"] for r in at] == [[0, 127], [128, 199]]
    assert [r["tokens"] for r in at] == [128 * 2, 72 * 2]  # two documents are longer than 200 bytes


def test_every_token_but_the_first_is_predicted_once() -> None:
    assert windows_of(list(range(7)), 3, []) == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert windows_of(list(range(8)), 3, []) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert windows_of(list(range(5)), 3, [9]) == [[9, 0, 1, 2], [9, 3, 4]]


def test_limits_and_domains_in_turn(tmp_path: Path) -> None:
    documents = [perplexity.Document(d, t) for d, t in [("a", "1"), ("a", "2"), ("a", "3"), ("b", "4")]]
    assert [d.content for d in in_turn(documents)] == ["1", "4", "2", "3"]
    data = str(write(tmp_path / "held.jsonl.xz"))
    options = {"data": data, "contexts": [20], "windows": 1}
    assert one(perplexity.run(random_subject(), options, 2, 0), metric="nats_per_token", domain="all")["tokens"] == 40
    options |= {"tokens": 10}
    assert one(perplexity.run(random_subject(), options, None, 0), metric="nats_per_token", domain="all")["n"] == 1


def test_shards_of_tokens(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, (3, 33))
    (tmp_path / "held").mkdir()
    write_shard(tmp_path / "held" / "a.tar", ids, vocab_size=VOCAB)
    write_manifest(tmp_path / "held" / "manifest.jsonl", [Shard(str(tmp_path / "held" / "a.tar"), 3)], {})
    subject = random_subject()
    options = {"data": str(tmp_path / "held" / "manifest.jsonl"), "contexts": [32]}
    found = one(perplexity.run(subject, options, None, 0), metric="nats_per_token", domain="all")
    plain = torch.cat([naive(subject.model, row.tolist()) for row in ids])
    assert (found["value"], found["n"]) == (pytest.approx(float(plain.mean()), rel=1e-5), 3)


def test_standard_errors() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean(values) == (pytest.approx(0.6), pytest.approx(np.std(values, ddof=1) / math.sqrt(5)))
    assert mean([3.0]) == (3.0, None)
    # Groups that agree have no error, however unequal they are.
    assert ratio([2.0, 20.0], [1, 10]) == (pytest.approx(2.0), pytest.approx(0.0))
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 20, (4000, 30))
    sums = counts * 2.0 + rng.normal(size=counts.shape) * np.sqrt(counts)
    found = [ratio(s.tolist(), c.tolist()) for s, c in zip(sums, counts, strict=True)]
    assert np.mean([e for _, e in found]) == pytest.approx(np.std([v for v, _ in found]), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": [8]}, "no option 'context'. Did you mean 'contexts'"),
        ({}, "give its option `data`"),
        ({"data": "missing.jsonl"}, "no input file at missing.jsonl"),
        ({"data": "x.jsonl", "contexts": [0]}, "must be above 0"),
        ({"data": "x.jsonl", "first_bucket": 0}, "must be above 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        perplexity.run(random_subject(), options, None, 0)
