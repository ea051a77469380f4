"""Learning from a teacher: layer by layer; what it costs is said, and its updates are those of any other run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative, tiny
from ranks import Ranks
from safetensors.torch import load_file, save_file
from test_train import make_data, rows, weights, worst

from open_lm_linear import pretrained
from open_lm_linear.checkpoint import checkpoints, latest
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli, stages_from_cli
from open_lm_linear.distillation import Alignment, objective_of
from open_lm_linear.model import Transformer, create_model
from open_lm_linear.parallel import Context
from open_lm_linear.train import train, train_stages

HERE = Context(0, 1, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and random softmax weights whose attentions say more than random ones usually do."""
    folder = tmp_path_factory.mktemp("distillation")
    make_data(folder)
    save(folder / "teacher", create_model(tiny("softmax", n_heads_kv=2, seq_len=16, vocab_size=64)))
    return folder


def save(folder: Path, model: Transformer) -> None:
    folder.mkdir()
    with torch.no_grad():
        for block in model.blocks():
            block.attention.in_proj.weight *= 3
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(model.config.to_json()))
    sizes = {n: (folder / n).stat().st_size for n in ("model.safetensors", "model.json")}
    (folder / "state.json").write_text(json.dumps({"files": sizes}))


def words(place: Path, logs: Path, name: str, *more: str) -> list[str]:
    return [
        *("--pretrained", str(place / "teacher"), "--attn-name", "hedgehog", "--logs", str(logs), "--name", name),
        *("--train-data", str(place / "data" / "manifest.jsonl"), "--precision", "fp32", "--device", "cpu"),
        *("--workers", "0", "--global-batch-size", "8", "--train-num-samples", str(16 * 8 * 3), "--epochs", "2"),
        *("--warmup", "1", "--lr", "3e-3", "--wd", "0.1", "--lr-scheduler", "const", "--log-every-n-steps", "1"),
        *("--multiple-data-passes", *more),
    ]


def run(place: Path, logs: Path, name: str, *more: str) -> Path:
    folder = train(from_cli(words(place, logs, name, *more)))
    assert folder is not None
    return folder


def objective(place: Path, model: Transformer, *more: str) -> Any:
    """The loss of a run, ready for batches."""
    cfg = from_cli(words(place, place, "x", *more))
    made = objective_of(cfg, model, pretrained.open_source(str(place / "teacher")), HERE)
    made.load()
    made.begin(lambda: batch(8))
    return made


def batch(size: int) -> torch.Tensor:
    return torch.randint(64, (size, 17), generator=torch.Generator().manual_seed(5))


ALIGN = ("--loss", "align=1")
BOTH = ("--loss", "align=1", "hidden=0.5")
MIXED = ("--loss", "kl=1", "ce=0.3", "--kl-temperature", "2", "--z-loss-coefficient", "1e-3")


# ---------------------------------------------------------------- layer by layer


def test_the_teachers_own_attention_has_no_error(place: Path) -> None:
    student = pretrained.load_pretrained(place / "teacher")
    aligned = objective(place, student, *BOTH)
    sums = aligned.sums(student, (batch(8)[:, :-1], batch(8)[:, 1:], None))
    assert len(sums) == 5 and sums.abs().max() < 1e-9
    assert not aligned.reached
    hybrid = pretrained.load_pretrained(place / "teacher", "hedgehog", attn_layers={"softmax": [1]})
    aligned = objective(place, hybrid, *BOTH)
    named = aligned.named(aligned.sums(hybrid, (batch(8)[:, :-1], batch(8)[:, 1:], None)).detach())
    assert named["align"][0] > 1 and named["align"][1] < 1e-9 and named["hidden"][1] < 1e-9
    assert aligned.reached == {n for n, _ in hybrid.named_parameters() if n.startswith("layers.0.attention.")}


def test_the_error_is_over_the_variance_of_the_teacher(place: Path) -> None:
    """By hand, with packed documents; a student that always gives the teacher's mean has an error of 1."""
    teacher = pretrained.load_pretrained(place / "teacher", dtype=torch.float32)
    student = pretrained.load_pretrained(place / "teacher", "hedgehog")
    aligned = objective(place, student, *BOTH, "--reset-state-at-document", "--document-separator", "17")
    ids = batch(8)
    first = torch.zeros(8, 16, dtype=torch.bool)
    first[:, 0] = True
    first[:, 1:] = ids[:, :-2] == 17
    found = aligned.named(aligned.sums(student, (ids[:, :-1], ids[:, 1:], first)).detach() / (8 * 16))
    total = 0.0
    with torch.no_grad():
        x, positions = teacher.tok_embeddings(ids[:, :-1]), None
        for layer, (theirs, ours) in enumerate(zip(teacher.blocks(), student.blocks(), strict=True)):
            positions = torch.stack([count(row) for row in first])
            pairs = [block.trace(x, positions, first) for block in (theirs, ours)]
            for name, weight, a, y in zip(("align", "hidden"), (1, 0.5), *pairs, strict=True):
                assert a is not None and y is not None
                variance = (a - a.mean((0, 1))).square().mean()
                expected = (y - a).square().mean() / variance
                assert float(found[name][layer]) == pytest.approx(float(expected), rel=1e-4)
                total += weight * float(expected) / 2
                assert (a - a.mean((0, 1))).square().mean() / variance == pytest.approx(1)
            assert pairs[0][1] is not None
            x = pairs[0][1]
    assert found["loss"] == pytest.approx(total, rel=1e-4)


def count(first: torch.Tensor) -> torch.Tensor:
    """Positions in documents that begin where ``first`` says."""
    found, position = [], -1
    for begins in first.tolist():
        position = 0 if begins else position + 1
        found.append(position)
    return torch.tensor(found)


def test_the_error_falls_in_every_layer_and_the_body_stays(place: Path, tmp_path: Path) -> None:
    logs, val = tmp_path / "logs", ("--val-data", str(place / "data" / "manifest.jsonl"))
    folder = run(place, logs, "a", *BOTH, "--epochs", "12", "--train-params", "new", "--lr-new", "2e-2", *val)
    found, logged = rows(folder, "alignment.jsonl"), rows(folder, "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, 37))
    for name in ("align", "hidden"):
        before, after = found[0][name], found[-1][name]
        assert len(after) == 2 and all(b < 0.9 * a for a, b in zip(before, after, strict=True)), (before, after)
        assert logged[-1][name] == pytest.approx(sum(after) / 2) and logged[-1][name + "_max"] == max(after)
    assert logged[-1]["loss"] == pytest.approx(logged[-1]["align"] + 0.5 * logged[-1]["hidden"])
    assert logged[-1]["tokens"] == 36 * 8 * 16
    held_out = rows(folder, "results.jsonl")
    for name in ("align", "hidden"):
        before, after = held_out[0][name], held_out[-1][name]
        assert len(after) == 2 and all(b < 0.9 * a for a, b in zip(before, after, strict=True)), (before, after)
    assert held_out[0]["loss"] == pytest.approx(float(np.log(held_out[0]["perplexity"])))  # cross entropy all the same
    before, after = load_file(place / "teacher" / "model.safetensors"), weights(folder)
    assert all(torch.equal(before[k], after[k]) for k in before)
    text = (folder / "out.log").read_text()
    assert "loss: 1 align + 0.5 hidden; frozen teacher: 2 layers, hidden 32" in text
    assert "expected:" in text and "(align 0." in text
    last = text[text.index("\nalign by layer: ") :].split("\n")[1].split(": ")[1]
    assert [float(error) for error in last.split()] == pytest.approx(found[-1]["align"], abs=1e-4)


def test_all_means_the_swapped_attentions(place: Path, tmp_path: Path) -> None:
    folder = run(place, tmp_path, "a", *ALIGN, "--attn-layers", "0=softmax")
    before, after = load_file(place / "teacher" / "model.safetensors"), weights(folder)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"layers.1.attention.in_proj.weight", "layers.1.attention.out_proj.weight"}
    assert "frozen" in (folder / "out.log").read_text()


# ---------------------------------------------------------------- the whole model


@pytest.mark.parametrize("fields", [{}, {"logit_softcap": 3.0, "weight_tying": True}], ids=str)
def test_the_divergence_is_that_of_the_logits(fields: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """With ignored targets and packed documents."""
    save(tmp_path / "teacher", create_model(tiny("softmax", n_heads_kv=2, seq_len=16, vocab_size=64, **fields)))
    teacher = pretrained.load_pretrained(tmp_path / "teacher")
    student = pretrained.load_pretrained(tmp_path / "teacher", "hedgehog")
    taught = objective(tmp_path, student, *MIXED, "--train-data", str(place / "data" / "manifest.jsonl"))
    ids = batch(8)
    targets, first = ids[:, 1:].clone(), torch.rand(8, 16) < 0.1
    targets[:, 3:6] = -100
    found = taught.named(taught.sums(student, (ids[:, :-1], targets, first)).detach() / taught.count(targets))
    with torch.no_grad():
        ours, theirs = (model(ids[:, :-1], first=first)[0][targets != -100].double() for model in (student, teacher))
    entropy = torch.nn.functional.cross_entropy(ours, targets[targets != -100])
    p, q = (theirs / 2).log_softmax(-1), (ours / 2).log_softmax(-1)
    divergence = 4 * (p.exp() * (p - q)).sum(-1).mean()
    assert found["loss_ce"] == pytest.approx(float(entropy), rel=1e-5)
    assert found["loss_kl"] == pytest.approx(float(divergence), rel=1e-4)
    assert found["loss"] == pytest.approx(0.3 * float(entropy) + float(divergence), rel=1e-4)


def test_the_divergence_falls(place: Path, tmp_path: Path) -> None:
    val = ("--val-data", str(place / "data" / "manifest.jsonl"))
    folder = run(place, tmp_path, "a", "--loss", "kl=1", "--epochs", "8", "--lr", "1e-2", *val)
    held_out = rows(folder, "results.jsonl")
    assert held_out[-1]["loss_kl"] < 0.5 * held_out[0]["loss_kl"] and "loss_ce" not in held_out[0]
    logged = rows(folder, "metrics.jsonl")
    assert logged[-1]["loss_kl"] == logged[-1]["loss"] < 0.5 * logged[0]["loss_kl"]
    assert {"loss_ce", "loss_kl"} <= set(logged[0]) and not (folder / "alignment.jsonl").exists()
    assert logged[0]["flops_per_s"] > 0 and "(ce " in (folder / "out.log").read_text()


TOP = ("--loss", "kl=1", "--kl-top-k", "5")


@pytest.mark.parametrize("loss", [("--loss", "ce=1"), BOTH, MIXED, TOP], ids=" ".join)
def test_validation_has_every_sequences_entropy_and_what_the_teacher_says(
    loss: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ignored targets, of which one row has nothing else; the student reads the batch once."""
    student = pretrained.load_pretrained(place / "teacher", "hedgehog")
    asked = objective(place, student, *loss)
    ids, read, hidden = batch(8), [], student.hidden
    targets = ids[:, 1:].clone()
    targets[:, 3:6] = -100
    targets[2] = -100
    part = (ids[:, :-1], targets, None)
    with torch.no_grad():
        wanted = torch.stack([student.loss(ids[i : i + 1, :-1], targets[i : i + 1])[0] for i in range(8)])
        total = None if asked.teacher is None else asked.sums(student, part)
        monkeypatch.setattr(student, "hidden", lambda *args, **options: (read.append(1), hidden(*args, **options))[1])
        losses, sums = asked.judged(student, part)
    assert losses.shape == (8,) and losses[2] == 0 and relative(losses, wanted) < 1e-6 and len(read) == 1
    if total is None:
        assert sums is None
    else:
        assert sums is not None and sums.shape == total.shape and relative(sums, total) < 1e-6


# ---------------------------------------------------------------- as exact as any run


@pytest.mark.parametrize("loss", [BOTH, MIXED], ids=" ".join)
def test_the_update_does_not_depend_on_the_cut_nor_on_recomputation(
    loss: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    masked = ("--target-mask-left", "5", "--reset-state-at-document", "--document-separator", "17")
    whole = run(place, tmp_path, "1x8", *loss, *masked)
    for more in (("--accum-freq", "2"), ("--accum-freq", "8"), ("--grad-checkpointing",)):
        other = run(place, tmp_path, "x" + "".join(more), *loss, *masked, *more)
        assert worst(weights(other), weights(whole)) < 1e-5, more


@pytest.mark.parametrize("loss", [BOTH, MIXED], ids=" ".join)
def test_resume_is_exact(loss: tuple[str, ...], place: Path, tmp_path: Path) -> None:
    more = (*loss, "--epochs", "4")
    whole = run(place, tmp_path, "whole", *more)
    part = run(place, tmp_path, "part", *more)
    for folder in checkpoints(part)[2:]:  # as if killed after the second epoch
        shutil.rmtree(folder)
    assert run(place, tmp_path, "part", *more, "--resume", "latest") == part
    for kind in ("model", "optimizer"):
        one, two = weights(whole, kind), weights(part, kind)
        assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)
    for file in ("metrics.jsonl", "alignment.jsonl"):
        if (whole / file).exists():
            values = [[r.get("loss") or r["align"] for r in rows(f, file)] for f in (whole, part)]
            assert values[0] == values[1] and len(values[0]) == 12
    assert (whole / "alignment.jsonl").exists() == (loss == BOTH)


@pytest.mark.parametrize("fsdp", [False, True])
@pytest.mark.parametrize("loss", [BOTH, MIXED], ids=" ".join)
def test_two_ranks_give_the_update_of_one(
    loss: tuple[str, ...], fsdp: bool, place: Path, tmp_path: Path, ranks: Ranks
) -> None:
    val = ("--val-data", str(place / "data" / "manifest.jsonl"), "--val-num-samples", str(16 * 41))
    alone = run(place, tmp_path, "alone", *loss, *val)
    more = ["--fsdp", "--grad-checkpointing"] if fsdp else []
    argv = words(place, tmp_path, "two", *loss, *val, "--accum-freq", "2", *more)
    assert ranks.run(2, argv) == [0, 0], ranks.text()[-3000:]
    assert worst(weights(tmp_path / "two"), weights(alone)) < 1e-5
    for one, two in zip(rows(alone, "results.jsonl"), rows(tmp_path / "two", "results.jsonl"), strict=True):
        for name in {"loss", "loss_kl", "align", "hidden"} & set(one):
            assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_stages_with_losses_of_their_own(place: Path, tmp_path: Path) -> None:
    """The first stage's original teaches the later ones too; a killed stage goes on."""
    stages = [
        {"stage_name": "align", "loss": "align=1", "train_params": "new"},
        {"stage_name": "again", "loss": ["align=1", "hidden=1"]},
        {"stage_name": "distil", "loss": ["kl=1", "ce=0.1"], "kl_temperature": 2.0},
        {"stage_name": "last"},
    ]
    (tmp_path / "run.yaml").write_text(json.dumps({"stages": stages}))
    given = words(place, tmp_path, "staged", "--config", str(tmp_path / "run.yaml"), "--resume", "latest")
    found = stages_from_cli(given)
    assert [cfg.objective.weights for cfg in found] == [
        {"align": 1},
        {"align": 1, "hidden": 1},
        {"kl": 1, "ce": 0.1},
        {"ce": 1},
    ]
    assert [cfg.objective.teacher for cfg in found] == ["", *[str(place / "teacher")] * 2, ""]
    folders = train_stages(found)
    ends = [weights(folder) for folder in folders]
    assert train_stages(found) == folders  # all is over, nothing is done again
    assert [checkpoints(folder)[-1] for folder in folders] == [latest(folder) for folder in folders]
    assert all(torch.equal(ends[0][k], v) for k, v in load_file(place / "teacher" / "model.safetensors").items())
    assert relative(ends[1]["layers.0.attention.out_proj.weight"], ends[0]["layers.0.attention.out_proj.weight"]) > 0
    assert torch.equal(ends[1]["norm.weight"], ends[0]["norm.weight"])
    for before, after in zip(ends[1:], ends[2:], strict=False):
        assert not torch.equal(after["norm.weight"], before["norm.weight"])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--loss", "align"), "--loss 'align' is not NAME=WEIGHT with one of"),
        (("--loss", "aling=1"), "Did you mean 'align'?"),
        (("--loss", "align=x"), "the weight must be a number"),
        (("--loss", "align=0"), "the weight must be above 0"),
        (("--loss", "ce=1", "ce=2"), "gives ce twice"),
        (("--loss",), "--loss is empty"),
        (("--loss", "align=1", "ce=1"), "make them a stage of their own"),
        (("--loss", "align=1", "kl=1"), "make them a stage of their own"),
        (("--kl-temperature", "2"), "--kl-temperature belongs to --loss kl=WEIGHT"),
        (("--loss", "kl=1", "--kl-temperature", "0"), "--kl-temperature must be above 0"),
        (("--teacher", "x"), "--loss is cross entropy alone"),
        ((*ALIGN, "--train-params", "norm.*"), "--loss align trains the attentions that are not the teacher's"),
        ((*ALIGN, "--attn-name", "softmax"), "leaves nothing to train"),
        ((*ALIGN, "--teacher", "nowhere"), "no pretrained model 'nowhere'"),
    ],
)
def test_what_means_nothing_is_refused(more: tuple[str, ...], sentence: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run(place, tmp_path, "x", *more, "--dry-run")
    assert sentence in str(error.value)


def test_a_teacher_that_does_not_fit_is_refused(place: Path, tmp_path: Path) -> None:
    save(tmp_path / "wide", create_model(tiny("softmax", hidden_dim=64, seq_len=16, vocab_size=64)))
    save(tmp_path / "linear", create_model(tiny("linear", seq_len=16, vocab_size=64)))
    with pytest.raises(UserError, match="the teacher has hidden_dim 64, the student 32"):
        run(place, tmp_path, "x", *ALIGN, "--teacher", str(tmp_path / "wide"), "--dry-run")
    kl = words(place, tmp_path, "x", "--loss", "kl=1", "--dry-run", "--teacher")
    assert train(from_cli([*kl, str(tmp_path / "wide")])) is None  # logits may come from any width
    save(tmp_path / "words", create_model(tiny("softmax", seq_len=16, vocab_size=65)))
    with pytest.raises(UserError, match="the teacher has vocab_size 65, the student 64"):
        train(from_cli([*kl, str(tmp_path / "words")]))
    linear = ("--pretrained", str(tmp_path / "linear"), "--attn-name", "linear")
    with pytest.raises(UserError, match="--loss align=1 needs a teacher: give --teacher"):
        run(place, tmp_path, "x", *ALIGN, *linear, "--dry-run")


def test_a_teacher_without_variance_is_refused(place: Path) -> None:
    student = pretrained.load_pretrained(place / "teacher", "hedgehog")
    aligned = objective(place, student, *ALIGN)
    assert isinstance(aligned, Alignment) and aligned.teacher is not None
    with torch.no_grad():
        aligned.teacher.layers[1].attention.out_proj.weight.zero_()  # type: ignore[index,union-attr]
    with pytest.raises(UserError, match="layer 1 of the teacher gives every token the same"):
        aligned.begin(lambda: batch(8))
