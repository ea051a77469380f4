"""Evaluation while a run trains: the scores of its checkpoint, on any number of ranks, and no trace in the run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Ranks
from test_train import make_data, rows, run, weights, words, worst
from toy_tasks import WORDS, write_suite, write_tasks
from toy_tasks import tokenizer as made_tokenizer

from open_lm_linear import generate
from open_lm_linear.checkpoint import checkpoints
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.evaluation import harness
from open_lm_linear.evaluation.subject import Subject
from open_lm_linear.evaluation.suites import read_suite
from open_lm_linear.hf.wrap import wrap
from open_lm_linear.pretrained import load_pretrained
from open_lm_linear.train import train

PROMPTS = ["a b c", "d"]


def tokenizer() -> Any:
    """A word for each of the model's 64 tokens."""
    return made_tokenizer([*WORDS, *(f"w{i}" for i in range(len(WORDS), 64))])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_data(tmp_path)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Evaluation every two steps; the suite is evaluated with sequences cut to the model's 16 tokens."""
    tokenizer().save_pretrained(tmp_path / "words")
    entries = [
        {"task": "toy", "metric": "acc_norm", "chance": 0.25},
        {"task": "other", "metric": "acc", "chance": 0.25, "shots": 1},
    ]
    suite = write_suite(tmp_path / "small.yaml", *entries)
    files = write_tasks(tmp_path / "tasks")
    return [
        *("--eval-every", "2", "--eval-suite", suite, "--eval-include-path", str(files)),
        *("--eval-tokenizer", str(tmp_path / "words"), "--eval-prompts", *PROMPTS, "--eval-tokens", "5"),
    ]


def states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_the_scores_are_those_of_the_checkpoint_and_training_goes_on_the_same(
    tmp_path: Path, data: Path, flags: list[str]
) -> None:
    more = ["--epochs", "5", "--save-frequency", "2", "--report-to", "tensorboard"]
    torch.manual_seed(5)
    random.seed(5)
    plain = run(tmp_path, data, "plain", *more)
    before = states()
    torch.manual_seed(5)
    random.seed(5)
    folder = run(tmp_path, data, "watched", *more, *flags)
    assert states() == before
    assert [r["loss"] for r in rows(folder, "metrics.jsonl")] == [r["loss"] for r in rows(plain, "metrics.jsonl")]
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(folder).items())
    assert not (plain / "evaluations.jsonl").exists()

    found = rows(folder, "evaluations.jsonl")
    assert [row["step"] for row in found] == [2, 4, 6, 8, 10, 12, 14, 15]  # and the last
    assert "toy/acc_norm" in (folder / "out.log").read_text()
    (at_six,) = (row for row in found if row["step"] == 6)
    model = load_pretrained(next(p for p in checkpoints(folder) if p.name == "step_00000006"))
    subject = Subject("six", wrap(model, tokenizer=tokenizer()), tokenizer(), 16)
    suite = read_suite(flags[3])
    tasks = harness.load_tasks(suite.tasks, flags[5])
    for entry in suite.tasks:
        row, _ = harness.score(subject, entry, tasks[entry.label])
        name = f"{entry.label}/{entry.metric}"
        assert at_six[name] == row["value"] and at_six[f"{name}_n"] == row["n"] == 12
        assert at_six[f"{name}_standard_error"] == row["standard_error"]
    for said, prompt in zip(at_six["prompts"], PROMPTS, strict=True):
        ids = generate.encode(tokenizer(), prompt)
        alone = generate.generate(model, ids, max_new_tokens=5)[0, ids.shape[1] :]
        assert said == {"prompt": prompt, "text": tokenizer().decode(alone.tolist())}


def test_sharded_ranks_share_the_requests_and_find_the_same(
    tmp_path: Path, data: Path, flags: list[str], ranks: Ranks
) -> None:
    alone = run(tmp_path, data, "alone", *flags)
    assert ranks.run(2, words(tmp_path, data, "two", "--fsdp", *flags)) == [0, 0], ranks.text()[-3000:]
    two = tmp_path / "logs" / "two"
    assert worst(weights(two), weights(alone)) < 1e-5
    for one, other in zip(rows(alone, "evaluations.jsonl"), rows(two, "evaluations.jsonl"), strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_log_likelihoods_are_summed_over_the_continuation(tmp_path: Path, data: Path, flags: list[str]) -> None:
    from open_lm_linear.evaluation.during_training import Evaluator
    from open_lm_linear.model import create_model
    from open_lm_linear.parallel import Context

    cfg = from_cli(words(tmp_path, data, "x", *flags))
    ctx = Context(0, 1, torch.device("cpu"), "fp32")
    model = create_model(str(tmp_path / "model.json"), "linear").eval()
    rng = random.Random(0)
    requests = [
        (("", ""), [rng.randrange(64) for _ in range(n)], [rng.randrange(64) for _ in range(m)])
        for n, m in ((3, 2), (1, 1), (30, 3), (15, 2), (14, 2), (2, 20), *((5, k % 4 + 1) for k in range(9)))
    ]
    with torch.no_grad():
        found = Evaluator(cfg, ctx, vocab_size=64, seq_len=16, steps=6).log_likelihoods(model, requests)
        for value, (_, context, continuation) in zip(found, requests, strict=True):
            ids = torch.tensor((context + continuation)[-17:])
            scores = model(ids[None, :-1])[0][0].log_softmax(-1)
            kept = min(len(continuation), 16)
            expected = scores.gather(1, ids[1:, None])[-kept:].sum()
            assert value == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize(
    ("entry", "change", "sentence"),
    [
        ({"task": "say", "metric": "exact_match"}, {}, "say is a task of generate_until; during training only"),
        ({"task": "x", "kind": "recall"}, {}, "x is of the kind recall; during training only"),
        ({"task": "gone", "metric": "acc"}, {}, "the task gone_local has no data here"),
        (None, {"--eval-tokenizer": None}, "evaluation during training needs a tokenizer: give --eval-tokenizer"),
        (None, {"--eval-every": None}, "needs --eval-every and --eval-suite or --eval-prompts"),
        (None, {"--eval-every": "-1"}, "--eval-every must be 0 or more, not -1"),
        (None, {"--eval-suite": "nowhere"}, "there is no suite 'nowhere'"),
        (None, {"--eval-tokenizer": "wordy"}, "the tokenizer of wordy has 65 tokens and the model only 64"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(
    tmp_path: Path,
    data: Path,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    entry: Any,
    change: dict[str, str | None],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    made_tokenizer(["<eos>", *(f"w{i}" for i in range(64))]).save_pretrained("wordy")
    if entry is not None:
        change = {"--eval-suite": write_suite(tmp_path / "bad.yaml", entry)}
    for flag, value in change.items():
        at = flags.index(flag)
        flags[at : at + 2] = [] if value is None else [flag, value]
    with pytest.raises(UserError) as error:
        train(from_cli(words(tmp_path, data, "bad", *flags)))
    assert sentence in str(error.value)
    assert not (tmp_path / "logs" / "bad").exists()


def test_a_resumed_run_has_each_evaluation_once(tmp_path: Path, data: Path, flags: list[str]) -> None:
    whole = run(tmp_path, data, "whole", "--epochs", "4", *flags)
    part = run(tmp_path, data, "part", "--epochs", "4", *flags)
    for folder in checkpoints(part)[2:]:  # as if killed on the way
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    run(tmp_path, data, "part", "--epochs", "4", "--resume", "latest", *flags)
    kept = [{**row, "seconds": 0} for row in rows(part, "evaluations.jsonl")]
    assert kept == [{**row, "seconds": 0} for row in rows(whole, "evaluations.jsonl")]
