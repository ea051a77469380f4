"""Studies: arms alike in data, tokens and evaluation, controls, a study that was killed, and a report that adds up."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from toy_tasks import VOCAB, llama, save, write_suite, write_tasks

from open_lm_linear.checkpoint import latest
from open_lm_linear.cli import UserError
from open_lm_linear.config import stages_from_cli
from open_lm_linear.data.manifest import Shard, write_manifest
from open_lm_linear.data.shards import write_shard
from open_lm_linear.pretrained import load_pretrained
from open_lm_linear.study import arms as work
from open_lm_linear.study import facts, report
from open_lm_linear.study.controls import NAMES, controls
from open_lm_linear.study.grid import Arm, arm_config, read_grid, stage_steps
from open_lm_linear.study.run import StudyArgs, run
from open_lm_linear.train import train_stages

SEQ_LEN, HELDOUT = 16, 160
ALIGNED = [
    {"stage_name": "align", "share": 0.25, "loss": "align=1", "train_params": "new"},
    {"stage_name": "distil", "share": 0.75, "loss": ["kl=1", "ce=0.1"]},
]
ARMS: dict[str, Any] = {
    "supra": {"attn_name": "supra", "published": "supra-1b"},
    "two_step": {"attn_name": "supra", "published": "two-step-1b", "stages": [{"train_params": "new"}, {}]},
    "from_scratch": {"attn_name": "supra", "from_scratch": True, "published": "supra-1b-scratch"},
    "linear_window": {"attn_name": "lolcats", "window": 4, "stages": ALIGNED},
}
TRAINED = [*ARMS, "teacher_same_tokens", "window_alone", "linear_alone", "no_attention"]


def shards(folder: Path, rows: np.ndarray) -> Path:
    folder.mkdir(parents=True)
    write_shard(folder / "shard-00000.tar", rows)
    card = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "tokenizer": "toy"}
    write_manifest(folder / "manifest.jsonl", [Shard(str(folder / "shard-00000.tar"), len(rows))], card)
    return folder


def texts(number: int, seed: int) -> np.ndarray:
    """A language in which each token follows from the one before."""
    start = np.random.default_rng(seed).integers(0, VOCAB, (number, 1))
    return (start + 3 * np.arange(SEQ_LEN + 1)) % VOCAB


def grid(folder: Path, teacher: str, **changes: Any) -> Path:
    flags = {"pretrained": teacher, "seq_len": SEQ_LEN, "global_batch_size": 4, "precision": "fp32", "workers": 0}
    flags |= {"lr": 1e-2, "warmup": 0, "wd": 0.0, "grad_clip_norm": 1.0, "z_loss_coefficient": 0.0, "val_iter_ci": 0}
    values = {"title": "Tiny", "tokens": 8 * 4 * SEQ_LEN, "validations": 4, "heldout_tokens": HELDOUT}
    values |= {"first_bucket": 4, "prompts": ["a b"], "recover": [0.01, 0.5, 9], "run": flags, "arms": ARMS}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return path


class InProcess:
    """The trainer without a process of its own, which takes seconds; it remembers what it was asked."""

    def __init__(self) -> None:
        self.arms: list[str] = []

    def __call__(self, words: Sequence[str], log: Path) -> int:
        self.arms.append(log.parent.parent.name)
        train_stages(stages_from_cli(words))
        return 0


class Tiny:
    """A teacher, data and one whole study of them with its controls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = save(folder / "teacher", llama())
        self.train, self.val = shards(folder / "train", texts(40, 0)), shards(folder / "val", texts(12, 1))
        self.tasks = str(write_tasks(folder / "tasks"))
        suite = write_suite(folder / "toy.yaml", {"task": "toy", "metric": "acc", "chance": 0.25})
        self.grid = grid(folder, self.teacher)
        self.suites = [{"suite": suite, "limit": 8}]
        self.output = folder / "study"

    def args(self, **changes: Any) -> StudyArgs:
        given = StudyArgs(str(self.grid), str(self.output), str(self.train), str(self.val))
        return replace(given, device="cpu", include_path=self.tasks, **changes)

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "report.json").read_text())


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a second, and those of the whole study are looked at."""
    monkeypatch.setattr(report, "plot", lambda *_: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    torch.set_num_threads(1)
    found = Tiny(tmp_path_factory.mktemp("study"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "launch", InProcess())
        run(found.args(controls=True), "the command")
    yield found


def of(row: dict[str, Any]) -> range:
    """The samples that a step took."""
    return range(row["first_sample"], row["first_sample"] + row["samples"])


def test_every_arm_and_control_has_the_same_tokens(tiny: Tiny) -> None:
    arms = {arm["name"]: arm for arm in tiny.report["arms"]}
    assert list(arms) == [*ARMS, *NAMES]
    assert {arm["tokens"] for name, arm in arms.items() if name in TRAINED} == {8 * 4 * SEQ_LEN}
    assert arms["untrained_window"]["tokens"] == 0 and arms["untrained_window"]["runs"][0]["curve"] == []
    assert {row["heldout"]["tokens"] for arm in arms.values() for row in arm["runs"]} == {HELDOUT}
    for name in TRAINED:
        points = [at for at, _, _ in arms[name]["runs"][0]["curve"]]
        assert points[0] == 0 and points[-1] == 8 * 4 * SEQ_LEN and len(points) >= 4, name
        folder = tiny.output / "arms" / name / "seed_0" / "run"
        read = [line for path in sorted(folder.rglob("samples.jsonl")) for line in path.read_text().splitlines()]
        assert sorted(i for line in read for i in of(json.loads(line))) == list(range(8 * 4)), name
    assert [s["tokens"] for s in arms["linear_window"]["runs"][0]["stages"]] == [2 * 64, 6 * 64]
    assert [s["tokens"] for s in arms["two_step"]["runs"][0]["stages"]] == [4 * 64, 4 * 64]


def by_hand(source: str | Path) -> torch.Tensor:
    """(sequences, SEQ_LEN) nats of the first held-out tokens."""
    rows = torch.from_numpy(texts(12, 1))[: HELDOUT // SEQ_LEN]
    with torch.no_grad():
        logits = load_pretrained(source)(rows[:, :-1])[0]
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(rows.shape[0], -1)


@pytest.mark.parametrize("name", ["supra", "linear_window", "from_scratch", "no_attention", "untrained_window"])
def test_losses_gaps_and_tokens_to_recover_are_right(name: str, tiny: Tiny) -> None:
    arm = next(arm for arm in tiny.report["arms"] if arm["name"] == name)
    (one,) = arm["runs"]
    nats, teacher = by_hand(tiny.output / "arms" / name / "seed_0" / "weights"), by_hand(tiny.teacher).mean().item()
    assert arm["heldout"]["mean"] == pytest.approx(nats.mean().item(), rel=1e-5)
    error = nats.mean(1).std().item() / len(nats) ** 0.5
    assert arm["heldout"]["standard_error"] == pytest.approx(error, rel=1e-4, abs=1e-6)
    assert arm["gap"]["mean"] == pytest.approx(nats.mean().item() - teacher, abs=1e-5)
    assert [p["position"] for p in one["positions"]] == [[0, 3], [4, 7], [8, 15]]
    assert [p["value"] for p in one["positions"]] == pytest.approx(
        [part.mean().item() for part in (nats[:, :4], nats[:, 4:8], nats[:, 8:])], rel=1e-5
    )
    if name == "untrained_window":  # four sinks and the last four tokens: it sees all of the first eight
        whole = tiny.report["teacher"]["positions"]
        assert [p["value"] for p in one["positions"][:2]] == pytest.approx([p["value"] for p in whole[:2]], rel=1e-5)
    if one["curve"]:  # the trainer's own validation of the last step
        assert one["curve"][-1][1:] == pytest.approx([nats.mean().item(), error], rel=1e-4, abs=1e-6)
        near = [at for at, loss, _ in one["curve"] if loss - teacher <= 0.5]
        assert one["recovered"]["0.5"] == (min(near) if near else None)
        assert one["recovered"]["9.0"] == 0


def test_scores_are_relative_to_the_teacher_and_measured_in_a_call_of_their_own(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None
) -> None:
    monkeypatch.setattr(work, "launch", lambda *_: pytest.fail("a training was started"))
    output = shutil.copytree(tiny.output, tmp_path / "out")
    more = grid(tmp_path, tiny.teacher, suites=tiny.suites)
    run(tiny.args(grid=str(more), output=str(output), arms="supra,linear_window", only="evaluate"), "")
    found = json.loads((output / "report.json").read_text())
    assert [arm["name"] for arm in found["arms"]] == ["supra", "linear_window"]
    assert len(found["missing"]) == len(ARMS) + len(NAMES) - 2  # measured too, but not on these tasks
    assert "the first 8 examples of each task alone" in (output / "report.md").read_text()
    theirs = found["teacher"]["scores"]["toy acc"]["value"]
    assert theirs > 0 and found["teacher"]["share"] == 1
    for arm in found["arms"]:
        score = arm["scores"]["toy acc"]["mean"]
        assert 8 * score == int(8 * score)  # of eight questions
        assert arm["share"]["mean"] == pytest.approx(score / theirs)
        expected = (score - 0.25) / (theirs - 0.25) if theirs > 0.25 else None
        assert arm["above_chance"]["mean"] == (None if expected is None else pytest.approx(expected))


def test_the_report_says_what_was_measured(tiny: Tiny) -> None:
    found, text = tiny.report, (tiny.output / "report.md").read_text()
    for arm in found["arms"]:
        loss = f"{arm['heldout']['mean']:.4f} ± {arm['heldout']['standard_error']:.4f} | {arm['gap']['mean']:+.4f}"
        assert loss in text
    for words in (
        "the command",
        "| teacher |",
        "window_alone (control)",
        "one run an arm",
        "- untrained_window",
        "a b",
    ):
        assert words in text, words
    paper = ["supra", "two_step", "from_scratch"]
    assert [row["name"] for row in found["order"]["paper"]] == paper
    loss = {arm["name"]: arm["heldout"]["mean"] for arm in found["arms"]}
    assert found["order"]["measured"] == sorted(paper, key=loss.__getitem__)
    pairs = {(a, b) for i, a in enumerate(paper) for b in paper[i + 1 :] if loss[a] > loss[b]}
    assert {(row["paper_better"], row["here_better"]) for row in found["order"]["differs"]} == pairs
    assert text.count("Differs: ") == len(pairs)
    assert all((tiny.output / name).stat().st_size > 10_000 for name in ("curves.png", "positions.png"))


def test_controls_are_the_grids_arm_with_one_thing_changed(tiny: Tiny) -> None:
    found = read_grid(str(tiny.grid))
    made = {arm.name: arm for arm in controls(found)}
    assert list(made) == list(NAMES) and all(arm.control for arm in made.values())
    assert made["teacher_same_tokens"].flags == {} and made["teacher_same_tokens"].stages == ({"loss": ["ce=1"]},)
    assert made["window_alone"].flags == {"attn_name": "window", "window": 4, "sinks": 0}
    assert made["no_attention"].flags == {"attn_name": "window", "window": 1, "sinks": 0}
    assert made["untrained_window"].flags == {"attn_name": "window", "window": 4, "sinks": 4}
    assert made["untrained_window"].stages == ()
    # The stage that trains new weights alone has nothing to train there: the other takes its tokens.
    assert made["window_alone"].stages == made["no_attention"].stages == ({**ALIGNED[1], "share": 1.0},)
    assert made["linear_alone"].stages == tuple(ALIGNED)
    trained = {
        name: json.loads((tiny.output / "arms" / name / "seed_0" / "weights" / "model.json").read_text())
        for name in ("linear_alone", "linear_window", "no_attention", "teacher_same_tokens")
    }
    alone, beside = trained["linear_alone"], trained["linear_window"]
    assert (alone["attn_name"], beside["attn_name"]) == ("linear", "linear_window")
    assert {k: beside[k] for k in ("feature_map", "normaliser", "feature_activation", "use_decay")} == {
        k: alone[k] for k in ("feature_map", "normaliser", "feature_activation", "use_decay")
    }
    assert (trained["no_attention"]["window"], trained["no_attention"]["sinks"]) == (1, 0)
    assert trained["teacher_same_tokens"]["attn_name"] == "softmax"


def test_a_control_that_is_an_arm_is_not_run_twice(tiny: Tiny) -> None:
    arms = {**ARMS, "hedgehog": {"attn_name": "hedgehog", "stages": ALIGNED}}
    path = grid(tiny.output, tiny.teacher, arms=arms, controls={"no_attention": {"lr": 1e-3}})
    made = {arm.name: arm for arm in controls(read_grid(str(path)))}
    assert set(NAMES) - set(made) == {"linear_alone"}
    assert made["no_attention"].flags["lr"] == 1e-3
    without = grid(tiny.output, tiny.teacher, arms={"supra": ARMS["supra"]})
    made = {arm.name: arm for arm in controls(read_grid(str(without)))}
    assert set(NAMES) - set(made) == {"linear_alone"}
    assert made["window_alone"].flags == {"attn_name": "window", "window": 64, "sinks": 4}


def test_a_killed_study_goes_on(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_plots: None) -> None:
    plain = grid(tmp_path, tiny.teacher)
    again = tiny.args(grid=str(plain), arms="supra,from_scratch,untrained_window", output=str(tmp_path / "out"))

    def killed(words: Sequence[str], log: Path) -> int:
        if log.parent.parent.name == "from_scratch":
            stages = stages_from_cli(words)
            stages = [replace(cfg, run=replace(cfg.run, epochs=2)) for cfg in stages]  # half of the way
            train_stages(stages)
            raise KeyboardInterrupt
        return InProcess()(words, log)

    monkeypatch.setattr(work, "launch", killed)
    with pytest.raises(KeyboardInterrupt):
        run(again, "")
    before = (tmp_path / "out" / "arms" / "supra" / "seed_0" / "training.json").stat().st_mtime_ns
    assert latest(tmp_path / "out" / "arms" / "from_scratch" / "seed_0" / "run" / "stage_0_0").name == "step_00000004"
    rest, measured = InProcess(), []
    monkeypatch.setattr(work, "launch", rest)
    compare = work.compare
    monkeypatch.setattr(work, "compare", lambda args, device: measured.append(args.models[0]) or compare(args, device))
    run(again, "")
    assert rest.arms == ["from_scratch"]
    assert {model.partition("=")[0] for model in measured} == {"from_scratch", "untrained_window"}
    assert (tmp_path / "out" / "arms" / "supra" / "seed_0" / "training.json").stat().st_mtime_ns == before
    run(again, "")
    assert rest.arms == ["from_scratch"]  # all of it is there
    assert not list((tmp_path / "out" / "arms").rglob("checkpoints"))
    assert not json.loads((tmp_path / "out" / "report.json").read_text())["missing"]


def test_the_trainer_is_a_process_and_an_arm_that_fails_keeps_no_other_waiting(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = work.launch

    def one_fails(words: Sequence[str], log: Path) -> int:
        if log.parent.parent.name == "supra":
            return launch(words, log)
        log.write_text("step 1\nerror: no memory\n")
        return 2

    monkeypatch.setattr(work, "launch", one_fails)
    with pytest.raises(UserError, match=r"two_step, seed 0: the arm two_step ended with code 2: error: no memory"):
        run(tiny.args(arms="two_step,supra", output=str(tmp_path / "out"), only="train"), "")
    folder = tmp_path / "out" / "arms" / "supra" / "seed_0"
    known = json.loads((tiny.output / "arms" / "supra" / "seed_0" / "training.json").read_text())
    found = json.loads((folder / "training.json").read_text())
    assert np.allclose(found["curve"], known["curve"], rtol=1e-4)
    assert "done: 512 tokens" in (folder / "train.log").read_text()


def test_the_report_alone_needs_no_data_and_no_place(tiny: Tiny, tmp_path: Path, no_plots: None) -> None:
    output = shutil.copytree(tiny.output, tmp_path / "out", ignore=shutil.ignore_patterns("weights", "report.*"))
    run(tiny.args(output=str(output), train_data="", val_data="", only="report"), "the command")
    assert json.loads((output / "report.json").read_text()) == tiny.report


def test_another_grid_over_the_same_folder_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    other = grid(tmp_path, tiny.teacher, arms={**ARMS, "supra": {**ARMS["supra"], "lr": 0.5}})
    with pytest.raises(UserError, match=r"holds the arm supra with other settings \(lr\): choose another --output"):
        run(tiny.args(grid=str(other), only="report"), "")


def test_several_seeds_have_a_mean_and_a_spread() -> None:
    assert facts.spread([1.0, 2.0, 4.5]) == {"mean": 2.5, "deviation": statistics.stdev([1.0, 2.0, 4.5])}
    assert facts.spread([1.0]) == {"mean": 1.0, "deviation": None}
    assert facts.spread([None, None]) == {"mean": None, "deviation": None}

    def arm(name: str, row: str, *losses: float) -> dict[str, Any]:
        heldout = facts.spread(list(losses)) | {"standard_error": 0.3}
        runs = [{"curve": [[0, 2 * loss, 0.1], [64, loss, 0.1]]} for loss in losses]
        return {"name": name, "published": row, "heldout": heldout, "runs": runs, "tokens": 1234}

    arms = {"a": arm("a", "supra-1b", 5.0, 5.2), "b": arm("b", "two-step-1b", 4.0, 4.4), "c": arm("c", "t2r-1b", 6.0)}
    order = facts.order({**arms, "ours": arm("ours", "", 1.0)})
    assert [row["name"] for row in order["paper"]] == ["a", "b", "c"] and order["measured"] == ["b", "a", "c"]
    (pair,) = order["differs"]
    assert (pair["paper_better"], pair["here_better"], pair["nats"]) == ("a", "b", pytest.approx(0.9))
    assert pair["standard_error"] == pytest.approx((0.1**2 + 0.2**2) ** 0.5)
    assert (
        "Differs: b is before a here, by 0.900 ± 0.224 nats, +2.000 before any training. "
        "The paper's had a (1.6T)+10B, b (1.6T)+10B+10B tokens; here each has 1,234." in report._order_notes(order)
    )


def test_relative_scores_are_means_over_tasks_that_the_teacher_can() -> None:
    def task(value: float, chance: float | None = 0.25, harness: bool = True) -> dict[str, Any]:
        return {"value": value, "chance": chance, "task": harness}

    teacher = {"a": task(0.5), "b": task(0.25), "c": task(0.0, 0.0), "recall": task(0.5, 0.0, False)}
    student = {"a": task(0.4), "b": task(0.2), "c": task(0.1, 0.0), "recall": task(0.0, 0.0, False)}
    assert facts.share(student, teacher) == pytest.approx((0.8 + 0.8) / 2)  # c: the teacher has nothing
    assert facts.above_chance(student, teacher) == pytest.approx(0.15 / 0.25)  # nor is it above chance in b
    assert facts.share({"recall": task(0.1, 0.0, False)}, teacher) is None


def test_tokens_to_recover_are_those_of_the_first_point_that_is_near() -> None:
    curve = [[0, 9.0, 0.1], [100, 4.5, 0.1], [200, 5.1, 0.1], [300, 4.1, 0.1]]
    assert [facts.recovered(curve, 4.0, d) for d in (0.05, 0.1, 0.5, 5)] == [None, 300, 100, 0]


def test_shares_cut_an_arm_into_whole_steps() -> None:
    def cut(steps: int, *shares: float) -> list[int]:
        return stage_steps(Arm("a", {}, tuple({"share": share} for share in shares)), steps)

    assert cut(10, 0.25, 0.75) == [2, 8] and cut(10, 0.5, 0.5) == [5, 5] and cut(3, 0.3, 0.3, 0.4) == [1, 1, 1]
    assert stage_steps(Arm("a", {}, ({}, {}, {})), 10) == [3, 4, 3] and stage_steps(Arm("a", {}, ()), 10) == []
    for shares in ((0.5, 0.6), (1.5, -0.5), (0.01, 0.99)):
        with pytest.raises(UserError, match="the arm a"):
            cut(10, *shares)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token": 3}, "has no option 'token'. Did you mean 'tokens'"),
        ({"tokens": 100}, "tokens must be a multiple of 64"),
        ({"heldout_tokens": 100}, "heldout_tokens must be a multiple of 16"),
        ({"validations": 0}, "must be above 0"),
        ({"arms": {}}, "needs mappings under `run` and `arms`"),
        ({"arms": {"a": 3}}, "arm a must be a mapping"),
        ({"arms": {"teacher": {}}}, "which is not `teacher`"),
        ({"arms": {"a": {"seed": 1}}}, "arm a sets seed, which is the study's"),
        ({"arms": {"a": {"stages": [{"epochs": 2}]}}}, "arm a, stage 0 sets epochs"),
        ({"arms": {"a": {"stages": []}}}, "stages must be a list"),
        ({"arms": {"a": {"published": "x"}}}, "published 'x' is no row of Table 3"),
        ({"suites": [{"suite": "nowhere"}]}, "there is no suite 'nowhere'"),
        ({"suites": [{"suite": "study", "limits": 3}]}, "has no option 'limits'. Did you mean 'limit'"),
        ({"suites": [{"suite": "study"}, {"suite": "study", "limit": 3}]}, "each suite needs a file name of its own"),
        ({"controls": {"window_only": {}}}, "unknown control 'window_only'. Did you mean 'window_alone'"),
        ({"arms": {"no_attention": {}}}, "calls an arm no_attention, which is a control's name"),
        ({"arms": {"a": {"attn_name": "linear", "lrr": 1}}}, "the arm a: unknown config key 'lrr'. Did you mean 'lr'"),
        ({"arms": {"a": {"attn_name": "linear", "warmup": 99}}}, "the arm a: warmup 99 takes the whole run of 8 steps"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_trained(
    changes: dict[str, Any], sentence: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "launch", lambda *_: pytest.fail("a training was started"))
    path = grid(tmp_path, tiny.teacher, **changes)
    with pytest.raises(UserError) as error:
        run(tiny.args(grid=str(path), output=str(tmp_path / "out")), "")
    assert sentence in str(error.value)


def test_bad_words_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    for changes, sentence in (
        ({"arms": "supr"}, "--arms 'supr' is no arm of the grid. Did you mean 'supra'"),
        ({"grid": "smal"}, "there is no grid 'smal'. Did you mean 'small'"),
        ({"val_data": str(tmp_path)}, "there is no data at --val-data"),
        ({"train_data": ""}, "no data: give --train-data"),
        ({"val_data": str(tiny.train)}, "begun with other data than --val-data has"),
        ({"output": str(tmp_path), "only": "report"}, "holds no study yet"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(tiny.args(**changes), "")


@pytest.mark.parametrize("name", ["small", "gpu"])
def test_shipped_grids_share_their_tokens_out_and_the_trainer_takes_their_arms(name: str, tmp_path: Path) -> None:
    found = read_grid(name)
    arms = [*found.arms, *controls(found)]
    assert {"t2r", "supra", "two_step", "new_weights_only", "from_scratch"} == {a.name for a in arms if a.published}
    (tmp_path / "teacher.json").write_text("{}")
    for arm in arms:
        folder = tmp_path / "arms" / arm.name / "seed_0"
        values = arm_config(found, arm, 0, folder, "T/manifest.jsonl", "V/manifest.jsonl")
        tokens = [stage["epochs"] * stage["train_num_samples"] for stage in values["stages"]]
        assert sum(tokens) == (found.settings.tokens if arm.stages else 0), arm.name
        # Parsing takes a tenth of a second: one of each kind.
        if arm.name not in ("from_scratch", "gated_delta", "linear_window", "teacher_same_tokens", "no_attention"):
            continue
        folder.mkdir(parents=True)
        (folder / "arm.yaml").write_text(yaml.safe_dump(values))
        stages = stages_from_cli(["--config", str(folder / "arm.yaml"), "--resume", "latest"])
        settings = {(c.optim.wd, c.optim.z_loss_coefficient, c.optim.lr_cooldown_end, c.data.seq_len) for c in stages}
        assert settings == {(0.0, 0.0, found.run["lr_cooldown_end"], found.run["seq_len"])}, arm.name
        for cfg, count in zip(stages, tokens, strict=True):
            assert cfg.optim.warmup < count // (found.run["seq_len"] * found.run["global_batch_size"])
