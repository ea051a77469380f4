"""Scores are lm-eval's own, the state gives the parallel form's, and models stand side by side, task by task."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from toy_tasks import VOCAB, llama, save, tokenizer, write_suite, write_tasks
from transformers import Mamba2Config, Mamba2ForCausalLM, T5Config, T5ForConditionalGeneration

from open_lm_linear.cli import UserError
from open_lm_linear.evaluation import compare as comparing
from open_lm_linear.evaluation import harness, tables
from open_lm_linear.evaluation.compare import SuiteArgs, compare
from open_lm_linear.evaluation.subject import Subject, load_subject
from open_lm_linear.evaluation.suites import Entry, read_suite
from open_lm_linear.hf.wrap import wrap
from open_lm_linear.model import create_model

TOY = Entry("toy", metric="acc_norm", chance=0.25, shots=2)
SAY = Entry("say", metric="exact_match")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def loaded(files: Path) -> dict[str, harness.Task]:
    both = Entry("both", metric="acc", shots=1)
    return harness.load_tasks([TOY, SAY, both], str(files))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Llama, which we read ourselves, and Mamba2, which transformers does."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}
    mamba = Mamba2ForCausalLM(Mamba2Config(**sizes, vocab_size=VOCAB, initializer_range=0.5))
    return save(folder / "llama", llama()), save(folder / "mamba", mamba)


def recurrent(max_length: int = 64) -> Subject:
    torch.manual_seed(0)
    words = tokenizer()
    model = wrap(create_model(tiny("linear", vocab_size=VOCAB)), tokenizer=words)
    return Subject("rnn", model, words, max_length)


def likelihoods(samples: list[dict[str, Any]]) -> list[float]:
    return [response[0][0] for sample in samples for response in sample["resps"]]


# ---------------------------------------------------------------- scores


def test_ours_are_the_harness_s_own_on_the_transformers_model(tmp_path: Path, loaded: dict[str, harness.Task]) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = llama()
    subject = load_subject(save(tmp_path / "llama", theirs))
    assert type(subject.model).__name__ == "OpenLMLinearForCausalLM"
    reference = HFLM(pretrained=theirs, tokenizer=tokenizer(), max_length=64, batch_size=3)
    found: dict[str, tuple[Any, Any]] = {}
    for entry in (TOY, SAY):
        expected = simple_evaluate(
            model=reference,
            tasks=list(loaded[entry.label].parts.values()),
            task_manager=TaskManager(include_defaults=False),
            num_fewshot=entry.shots,
            fewshot_random_seed=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
        row, samples = harness.score(subject, entry, loaded[entry.label], batch_size=5, log_samples=True)
        name = loaded[entry.label].name
        own = expected["results"][name]
        assert row["value"] == own[f"{entry.metric},none"], entry.task
        assert row["standard_error"] == own[f"{entry.metric}_stderr,none"] and row["n"] == 12
        found[entry.task] = (expected["samples"][name], samples)
    expected_toy, toy = found["toy"]
    assert likelihoods(toy) == pytest.approx(likelihoods(expected_toy), abs=1e-4)
    assert len(set(likelihoods(toy))) > 20
    assert [s["arguments"] for s in toy] == [s["arguments"] for s in expected_toy]
    assert [s["resps"] for s in found["say"][1]] == [s["resps"] for s in found["say"][0]]


@pytest.mark.parametrize("max_length", [64, 11])
def test_the_recurrent_form_gives_the_parallel_form_s_scores(
    loaded: dict[str, harness.Task], monkeypatch: pytest.MonkeyPatch, max_length: int
) -> None:
    monkeypatch.setattr(harness, "PIECE", 5)
    subject = recurrent(max_length)
    calls = []
    monkeypatch.setattr(subject.model, "forward", _counted(subject.model.forward, calls))
    row, samples = harness.score(subject, TOY, loaded["toy"], log_samples=True)
    assert all(not kwargs["use_cache"] for kwargs in calls)
    parallel_calls = len(calls)
    again, others = harness.score(subject, TOY, loaded["toy"], log_samples=True, form="recurrent")
    assert again == row and len(calls) > 2 * parallel_calls
    assert likelihoods(others) == pytest.approx(likelihoods(samples), abs=1e-5)


def test_generation_goes_through_the_state_one_token_at_a_time(
    loaded: dict[str, harness.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = recurrent()
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(subject.model, "forward", _counted(subject.model.forward, calls))
    _, samples = harness.score(subject, SAY, loaded["say"], log_samples=True, batch_size=4)
    after_prompt = [kwargs["input_ids"].shape[1] for kwargs in calls if kwargs["past_key_values"].get_seq_length()]
    assert len(after_prompt) >= 4 and set(after_prompt) == {1}
    alone = harness.score(subject, SAY, loaded["say"], log_samples=True, batch_size=1)[1]
    assert [s["resps"] for s in alone] == [s["resps"] for s in samples]  # left padding changes nothing


def test_recurrent_models_of_transformers_generate_one_prompt_at_a_time(
    loaded: dict[str, harness.Task], folders: tuple[str, str]
) -> None:
    """Their states take in the padding of shorter prompts."""
    subject = load_subject(folders[1])
    batched = harness.score(subject, SAY, loaded["say"], log_samples=True, batch_size=4)[1]
    alone = harness.score(subject, SAY, loaded["say"], log_samples=True, batch_size=1)[1]
    assert [s["resps"] for s in batched] == [s["resps"] for s in alone]


def test_a_prompt_is_cut_from_the_left_so_that_its_answer_fits(
    loaded: dict[str, harness.Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = recurrent()
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(subject.model, "forward", _counted(subject.model.forward, calls))
    cut = dataclasses.replace(SAY, context=9)  # 5 of which the answer has
    samples = harness.score(subject, cut, loaded["say"], log_samples=True, batch_size=1)[1]
    prompts = [kwargs["input_ids"][0].tolist() for kwargs in calls if not kwargs["past_key_values"].get_seq_length()]
    whole = [subject.tokenizer.encode(sample["arguments"][0][0]) for sample in samples]
    assert sorted(prompts) == sorted(ids[-4:] for ids in whole) and max(map(len, whole)) == 14


def _counted(forward: Any, calls: list[dict[str, Any]]) -> Any:
    @functools.wraps(forward)  # transformers looks at the names of its arguments
    def counted(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        kept = {**kwargs, "past_key_values": None if cache is None else cache.fork()}
        calls.append(kept)
        return forward(*args, **kwargs)

    return counted


def test_a_group_is_weighted_by_size_and_the_examples_of_a_prompt_are_the_same_each_time(
    loaded: dict[str, harness.Task],
) -> None:
    entry, subject = Entry("both", metric="acc", shots=1), recurrent()
    row, samples = harness.score(subject, entry, loaded["both"], limit=5, log_samples=True)
    assert row["n"] == 10 and set(row["parts"]) == {"toy_local", "other_local"}
    assert row["value"] == pytest.approx(sum(p["value"] * p["n"] for p in row["parts"].values()) / 10)
    again = harness.score(subject, entry, loaded["both"], limit=5, log_samples=True)[1]
    assert [s["arguments"] for s in again] == [s["arguments"] for s in samples]
    other = harness.score(subject, entry, loaded["both"], limit=5, seed=1, log_samples=True)[1]
    assert [s["arguments"] for s in other] != [s["arguments"] for s in samples]


# ---------------------------------------------------------------- side by side


def test_models_side_by_side_resume_task_by_task(
    tmp_path: Path, files: Path, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    fake = types.ModuleType("open_lm_linear.evaluation.recall")
    asked: list[Any] = []

    def run(subject: Subject, options: Any, limit: int | None, seed: int) -> list[dict[str, Any]]:
        asked.append((subject.name, options, limit, seed))
        row = {"metric": "accuracy", "standard_error": 0.1, "n": 4, "chance": 0.0}
        rows = [{"task": "copy", "context": c, "value": v, **row} for c, v in ((8, 0.75), (16, 0.5))]
        loss = {"metric": "nats", "standard_error": None, "n": 4, "chance": 10.0, "domain": "all"}
        text = {"task": "text", "value": 2.5 if subject.name == "mamba" else 2.0, **loss}
        return [*rows, text, {**text, "position": [0, 7]}]

    fake.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    entries = (
        {"task": "toy", "metric": "acc_norm", "chance": 0.25},
        {"task": "other", "metric": "acc", "chance": 0.25, "context": 16},
        {"task": "made-up", "kind": "recall", "options": {"pairs": 2}},
    )
    suite = write_suite(tmp_path / "mine.yaml", *entries, title="Mine")
    args = SuiteArgs(
        models=(f"llama2-7b={folders[0]}", folders[1]),
        suite=suite,
        out=str(tmp_path / "out"),
        include_path=str(files),
        limit=6,
        seed=3,
    )
    tables.report(compare(args, "cpu"))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = {(row["model"], row["label"]): row for row in result["rows"]}
    labels = ("toy", "other@16", "copy@8", "copy@16", "text", "text, position 0-7")
    assert list(rows) == [(model, label) for model in ("llama2-7b", "mamba") for label in labels]
    options = {"task": "made-up", "pairs": 2}
    assert asked == [("llama2-7b", options, 6, 3), ("mamba", options, 6, 3)]
    teacher, student = rows["llama2-7b", "toy"], rows["mamba", "toy"]
    assert teacher["n"] == 6 and teacher["harness_task"] == "toy_local"
    expected = (student["value"] - 0.25) / (teacher["value"] - 0.25) if teacher["value"] > 0.25 else None
    assert student["relative"] == expected and rows["mamba", "copy@8"]["relative"] == 1.0
    assert rows["mamba", labels[-1]]["relative"] == (2.5 - 10) / (2 - 10)
    assert result["models"]["mamba"]["max_length"] == 2048 and result["versions"]["lm_eval"] == harness.version()
    text = (tmp_path / "out" / "table.md").read_text()
    assert "Mine, first 6 examples" in text and "toy_local for toy" in text and "| copy@16 | accuracy | - | 4 |" in text
    assert "| text, position 0-7 | nats | - | 4 | 2.000 | 2.500 | 93.8% |" in text
    assert (tmp_path / "out" / "scores.png").stat().st_size > 5000
    assert "toy: taking the task toy_local" in capsys.readouterr().err

    scored: list[tuple[str, str]] = []
    score = harness.score
    monkeypatch.setattr(
        comparing.harness, "score", lambda s, e, t, **k: scored.append((s.name, e.label)) or score(s, e, t, **k)
    )
    (tmp_path / "out" / "mamba" / "other@16.json").write_text("{cut off")
    compare(args, "cpu")
    assert scored == [("mamba", "other@16")]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["rows"] == result["rows"]
    scored.clear()
    compare(dataclasses.replace(args, models=args.models[:1], limit=5), "cpu")
    assert scored == [("llama2-7b", "toy"), ("llama2-7b", "other@16")]


def test_other_weights_have_another_fingerprint() -> None:
    one, other = recurrent(), recurrent()
    assert comparing.fingerprint(one) == comparing.fingerprint(other)
    with torch.no_grad():
        other.model.model.layers[1].attention.out_proj.weight.mul_(1.001)
    assert comparing.fingerprint(one) != comparing.fingerprint(other)


def test_contexts_beyond_the_length_are_left_out(
    tmp_path: Path, files: Path, folders: tuple[str, str], capsys: Any
) -> None:
    entries = [{"task": "say", "metric": "exact_match", "context": c} for c in (16, 32)]
    suite = write_suite(tmp_path / "long.yaml", *entries)
    args = SuiteArgs((folders[0],), suite, str(tmp_path / "out"), include_path=str(files), max_length=16)
    compare(args, "cpu")
    rows = json.loads((tmp_path / "out" / "result.json").read_text())["rows"]
    assert [row["label"] for row in rows] == ["say@16"]
    assert "left out, beyond --max-length 16: say@32" in capsys.readouterr().err


def test_the_published_figures_are_the_paper_s() -> None:
    found = tables.published_tables()
    assert [len(table["rows"]) for table in found.values()] == [16, 8, 10]
    for table in found.values():
        assert all(len(row["values"]) == len(table["columns"]) for row in table["rows"].values())
    for key, row in found["table1"]["rows"].items():
        *tasks, average = row["values"]
        if average is not None:  # the paper's means are of figures with more digits
            assert sum(tasks) / len(tasks) == pytest.approx(average, abs=0.11), key
    names = {"paper_table1": "table1", "paper_table2": "table2", "paper_table3": "table3"}
    for suite, table in names.items():
        read = read_suite(suite)
        columns = [entry.label for entry in read.tasks] + (["average"] if read.average else [])
        assert read.published == table and columns == found[table]["columns"]


def test_ours_stand_beside_the_published_figures() -> None:
    row = {"metric": "acc", "standard_error": 0.01, "n": 100, "chance": 0.25}
    values = {"hellaswag": 0.8, "piqa": 0.8, "winogrande": 0.7, "arc_easy": 0.75, "arc_challenge": 0.5, "mmlu": 0.6}
    rows = [
        {"model": model, "label": label, "task": label, **row, "value": value - less}
        for model, less in (("mistral", 0.0), ("student", 0.1))
        for label, value in values.items()
    ]
    done = tables.complete(rows, teacher="mistral", average=True, published="table1")
    found = {(r["model"], r["label"]): r for r in done}
    average = found["mistral", "average"]
    assert average["value"] == pytest.approx(sum(values.values()) / 6) and average["n"] == 600
    assert average["standard_error"] == pytest.approx(0.01 / 6**0.5)
    assert found["mistral", "mmlu"]["published"] == 62.4
    assert found["mistral", "mmlu"]["difference"] == pytest.approx(60 - 62.4)
    assert average["difference"] == pytest.approx(100 * average["value"] - 72.4)
    assert found["student", "mmlu"]["published"] is None
    assert found["student", "mmlu"]["relative"] == pytest.approx(0.25 / 0.35)
    part = tables.complete(rows[:3], teacher="mistral", average=True, published="table1")
    assert part[-1]["label"] == "average" and part[-1]["published"] is None  # of other tasks than theirs
    assert tables.relative(0.5, 0.25, 0.25) is tables.relative(0.5, 0.9, None) is None


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_measured_is_refused_in_a_sentence(
    tmp_path: Path, files: Path, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    few = TaskManager(include_path=str(files), include_defaults=False)
    monkeypatch.setattr(harness, "own_tasks", lambda: few)

    def refused(sentence: str, *entries: dict[str, Any], models: tuple[str, ...] = folders[:1], **more: Any) -> None:
        suite = write_suite(tmp_path / "bad.yaml", *(entries or ({"task": "toy", "metric": "acc"},)))
        more = {"suite": suite, "out": str(tmp_path / "out"), "include_path": str(files), **more}
        with pytest.raises(UserError, match=sentence):
            compare(SuiteArgs(models, **more), "cpu")

    refused("no suite 'paper_tabel1'. Did you mean 'paper_table1'", suite="paper_tabel1")
    refused("unknown key 'shot'. Did you mean 'shots'", {"task": "toy", "metric": "acc", "shot": 1})
    refused("name the metric", {"task": "toy"})
    refused("the kind 'recal' is not one of", {"task": "toy", "kind": "recal"})
    refused("chance is a share", {"task": "toy", "metric": "acc", "chance": 25})
    refused("has no task 'toy_x', nor has --include-path. Did you mean 'toy_local'", {"task": "toy_x", "metric": "acc"})
    refused("the task gone_local has no data here .*: check the files", {"task": "gone", "metric": "acc"})
    refused("has no metric 'f1'; it has acc, acc_norm", {"task": "toy", "metric": "f1"})
    refused("no model: give --models", models=())
    refused("two models are called llama", models=(folders[0], folders[0]))
    refused("--teacher 'mistral' is not one of the models: llama", teacher="mistral")
    refused("--limit must be at least 1", limit=0)
    refused("mamba is no model of this package", models=folders[1:], form="recurrent")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    other = save(tmp_path / "t5", t5)
    refused("t5 is no causal language model that transformers reads", models=(other,))
    wordy = save(tmp_path / "wordy", llama(), [f"w{i}" for i in range(9)] + ["<eos>"])
    refused("the tokenizer has 10 tokens and the model only 8", models=(wordy,))
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=1000))
    refused("GB for their logits and 0.0 GB are free: lower --batch-size or --max-length")


def test_without_the_harness_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'open_lm_linear\[eval\]'"):
        harness.library()


def test_a_full_gpu_is_one_sentence(loaded: dict[str, harness.Task], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    subject = recurrent()
    monkeypatch.setattr(subject.model, "forward", full)
    with pytest.raises(UserError, match="toy with requests of up to 64 tokens does not fit the memory of cpu"):
        harness.score(subject, TOY, loaded["toy"])


def test_the_paper_s_script_evaluates_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_lm_linear import cli
    from open_lm_linear.evaluate import Args

    stub = tmp_path / "python"
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" >> "$CALLS"; printf "\\036" >> "$CALLS"\n')
    stub.chmod(0o755)
    script = Path(__file__).parent.parent / "eval" / "paper_tables.sh"
    calls = tmp_path / "calls"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "OUT": "there"}
    subprocess.run(["bash", str(script), "--limit", "8", "--include-path", "tasks"], env=env, check=True)
    found = []
    for call in calls.read_text().split("\036")[:-1]:
        dash, module, *flags = call.split("\0")[:-1]
        assert (dash, module) == ("-m", "open_lm_linear.evaluate")
        found.append(cli.parse(Args, flags, prog="evaluate", description="").models)
    assert [args.suite for args in found] == ["paper_table1", "paper_table2"]
    for args in found:
        assert (args.limit, args.include_path, args.out) == (8, "tasks", f"there/{args.suite}")
        suite = read_suite(args.suite)
        published = tables.published_tables()[suite.published]
        teacher = args.models[0].partition("=")[0]
        assert tables.figure_of(published, teacher, suite.tasks[0].label) is not None
