"""A teacher's logits in the shards: written once, resumed, read with the tokens, and as good as the teacher itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative, tiny
from ranks import Ranks
from subjects import byte_tokenizer
from test_distillation import HERE, rows, run, save, weights, words
from test_train import make_data, worst

from open_lm_linear import pretrained
from open_lm_linear.checkpoint import checkpoints
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.data import stream
from open_lm_linear.data.manifest import read_dataset_card, read_manifest
from open_lm_linear.data.prepare import PrepareConfig, prepare
from open_lm_linear.data.shards import ShardIndex
from open_lm_linear.data.teach import TeachConfig, teach
from open_lm_linear.data.teacher_logits import TeacherLogits, TeacherSection
from open_lm_linear.distillation import objective_of
from open_lm_linear.model import create_model
from open_lm_linear.ops.losses import IGNORE, Teaching, TopTeaching, chunked_distillation, top_k_of

RESET = ("--reset-state-at-document", "--document-separator", "17")
KL = ("--loss", "kl=1", "ce=0.3", "--kl-temperature", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a teacher, and the data with its logits."""
    folder = tmp_path_factory.mktemp("offline")
    make_data(folder)
    torch.manual_seed(0)
    save(folder / "teacher", create_model(tiny("softmax", n_heads_kv=2, seq_len=16, vocab_size=64)))
    teach(asked(folder, "taught"))
    return folder


def asked(place: Path, output: str, **section: Any) -> TeachConfig:
    fields: dict[str, Any] = {
        "top_k": 8,
        "kl_temperature": 2.0,
        "batch_size": 3,
        "reset_state_at_document": True,
        "device": "cpu",
        **section,
    }
    told = TeacherSection(str(place / "teacher"), **fields)
    return TeachConfig(str(place / "data"), place / output, 17 if told.reset_state_at_document else None, told)


def offline(place: Path) -> tuple[str, ...]:
    return ("--teacher", "shards", "--train-data", str(place / "taught"))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("k", [1, 5, 37])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_the_divergence_over_k_tokens_and_the_rest(k, chunk):
    """Against whole distributions in float64, with gradients; all of the vocabulary is the full divergence."""
    hidden, theirs = (torch.randn(50, 16, dtype=torch.float64) for _ in range(2))
    weight, head = (torch.randn(37, 16, dtype=torch.float64) / 4 for _ in range(2))
    targets = torch.randint(0, 37, (50,)).masked_fill(torch.rand(50) < 0.3, IGNORE)
    scales = {"ce": 0.3, "kl": 1.5, "temperature": 2.0}
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    online = chunked_distillation(*leaves, targets, Teaching(theirs, head, top_k=k, **scales), 0.1, chunk)
    found = torch.autograd.grad(online[2], leaves)

    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    p, q = (theirs @ head.T / 2).softmax(-1), (exact[0] @ exact[1].T / 2).softmax(-1)
    top = p.topk(k).indices
    told = torch.zeros_like(p).scatter(1, top, 1.0)
    outcomes = [torch.cat((x.gather(1, top), (x * (1 - told)).sum(1, keepdim=True)), 1) for x in (p, q)]
    divergence = 4 * (torch.special.xlogy(outcomes[0], outcomes[0] / outcomes[1].clamp(min=1e-300))).sum(1)
    kl = divergence[targets != IGNORE].sum()
    ce = chunked_distillation(*exact, targets, Teaching(theirs, head, ce=1.0, kl=0.0), 0.1)[2]
    assert relative(online[1], kl) < 1e-9
    for one, two in zip(found, torch.autograd.grad(1.5 * kl + 0.3 * ce, exact), strict=True):
        assert relative(one, two) < 1e-9
    kept = TopTeaching(*top_k_of(theirs @ head.T, k, 2.0), **scales)
    assert relative(chunked_distillation(*leaves, targets, kept, 0.1, chunk), online) < 1e-12
    if k == 37:
        full = chunked_distillation(*leaves, targets, Teaching(theirs, head, **scales), 0.1, chunk)
        assert relative(online, full) < 1e-9
        for one, two in zip(found, torch.autograd.grad(full[2], leaves), strict=True):
            assert relative(one, two) < 1e-9


@pytest.mark.parametrize("vocab_size", [64, 1 << 16, 150_000])
def test_words(vocab_size):
    """Ids come back as they were, log-probabilities within float16's rounding, in rows of any length."""
    logits = TeacherLogits("x", 5, 1.0, vocab_size, None, "float32")
    ids = torch.stack([torch.randperm(min(vocab_size, 1 << 20))[:5] for _ in range(7)])
    ids[0, 0] = vocab_size - 1
    log_p = torch.randn(7, 6).mul(4).log_softmax(-1)
    stored = logits.encode(ids.numpy(), log_p.numpy())
    assert stored.shape == (7 * logits.words,) and logits.words == (11 if vocab_size <= 1 << 16 else 16)
    for length in (7, 3):
        row = logits.row(np.arange(length + 1), stored[: length * logits.words])
        batch = torch.from_numpy(np.stack([row, row]))
        tokens, found, values = logits.split(batch, length)
        assert tokens[1].tolist() == list(range(length + 1)) and torch.equal(found[1], ids[:length])
        assert (values[1].exp() - log_p[:length].exp()).abs().max() < 1e-3


# ---------------------------------------------------------------- shards


def test_the_tokens_stay_and_the_card_says_what_lies_beside(place: Path) -> None:
    card = read_dataset_card(place / "taught" / "manifest.jsonl")
    assert card is not None and card["vocab_size"] == 64
    assert card["teacher"] == {
        "source": str(place / "teacher"),
        "top_k": 8,
        "temperature": 2.0,
        "vocab_size": 64,
        "document_separator": 17,
        "dtype": "float32",
    }
    pairs = zip(
        read_manifest(place / "data/manifest.jsonl"), read_manifest(place / "taught/manifest.jsonl"), strict=True
    )
    for before, after in pairs:
        one, two = ShardIndex(before.path), ShardIndex(after.path)
        assert not one.taught and two.taught and two.data_key == one.data_key
        assert [(one.key(i), one.content(i)) for i in range(16)] == [(two.key(i), two.content(i)) for i in range(16)]


def test_a_killed_teacher_goes_on_where_it_was(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_lm_linear.data import teach as module

    written, write = [], module.write_members

    def twice(path: str, members: Any) -> int:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, members)

    monkeypatch.setattr(module, "write_members", twice)
    with pytest.raises(KeyboardInterrupt):
        teach(asked(place, "killed"))
    assert not (place / "killed" / "manifest.jsonl").exists()
    with pytest.raises(UserError, match=r"written with another top_k \(8, now 9\)"):
        teach(asked(place, "killed", top_k=9))
    monkeypatch.setattr(module, "write_members", lambda path, members: written.append(path) or write(path, members))
    teach(asked(place, "killed"))
    assert len(written) == 3
    for name in ("shard-00000.tar", "shard-00001.tar", "shard-00002.tar", "manifest.jsonl", "dataset.json"):
        assert (place / "killed" / name).read_bytes() == (place / "taught" / name).read_bytes()


def test_prepare_writes_them_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the teacher speaks, and given again."""
    from open_lm_linear.data import teach as module

    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("once upon a time " * 60)
    save(tmp_path / "teacher", create_model(tiny("softmax", seq_len=32, vocab_size=257)))
    section = TeacherSection(str(tmp_path / "teacher"), top_k=4, device="cpu")
    cfg = PrepareConfig(
        (str(tmp_path / "text.txt"),),
        str(tmp_path / "tokenizer"),
        tmp_path / "out",
        32,
        0.0,
        workers=1,
        teaching=section,
    )
    for wrong, sentence in (
        (TeacherSection(top_k=4), "need one: give --teacher"),
        (TeacherSection(str(tmp_path / "teacher"), top_k=258), "--top-k 258 is more than the 257 tokens"),
        (TeacherSection("nowhere"), "no pretrained model 'nowhere'"),
    ):
        with pytest.raises(UserError, match=sentence):
            prepare(dataclasses.replace(cfg, teaching=wrong))
        assert not (tmp_path / "out").exists()
    write, written = module.write_members, []

    def once(path: str, members: Any) -> int:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, members)

    monkeypatch.setattr(module, "write_members", once)
    with pytest.raises(KeyboardInterrupt):
        prepare(cfg)
    assert not (tmp_path / "out/train/manifest.jsonl").exists()
    monkeypatch.setattr(module, "write_members", write)
    sequences = prepare(cfg)["train"].sequences
    assert "18 bytes per token" in capsys.readouterr().out
    data = stream.DataConfig((str(tmp_path / "out/train"),), workers=0)
    logits = stream.teacher_logits_of(data)
    assert logits.top_k == 4 and stream.count_sequences(data) == sequences
    teacher = pretrained.load_pretrained(tmp_path / "teacher")
    batches = stream.global_batches(
        data,
        seed=0,
        samples_seen=0,
        global_batch_size=4,
        rank=0,
        world_size=1,
        seq_len=32,
        vocab_size=257,
        logits=logits,
    )
    tokens, ids, log_p = logits.split(next(batches), 32)
    with torch.no_grad():
        expected = teacher(tokens[:, :-1])[0].log_softmax(-1)
    assert torch.allclose(expected.gather(-1, ids), log_p[..., :-1], atol=5e-3)


# ---------------------------------------------------------------- a run


@pytest.mark.parametrize("seq_len", [16, 11])
def test_offline_is_online(seq_len: int, place: Path) -> None:
    """Loss within 1e-3 and the gradient nearly, with masks, resets and sequences shorter than those taught."""
    student = pretrained.load_pretrained(place / "teacher", "hedgehog")
    more = ("--target-mask-left", "5", *RESET, *KL, "--seq-len", str(seq_len), "--z-loss-coefficient", "1e-3")
    found = []
    for given in (("--kl-top-k", "8"), offline(place)):
        cfg = from_cli(words(place, place, "x", *more, *given))
        made = objective_of(cfg, student, pretrained.open_source(str(place / "teacher")), HERE)
        made.load()
        batch = next(
            stream.global_batches(
                cfg.data,
                seed=0,
                samples_seen=8,
                global_batch_size=8,
                rank=0,
                world_size=1,
                seq_len=seq_len,
                vocab_size=64,
                logits=made.logits,
            )
        )
        student.zero_grad()
        losses, count = made.accumulate(student, batch)
        found.append((losses, count, torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])))
    (online, tokens, gradient), (kept, same, other) = found
    assert tokens == same and online["loss_kl"] > 0.05
    for name in ("loss", "loss_kl", "loss_ce"):
        assert kept[name] == pytest.approx(online[name], abs=1e-3 * min(1.0, online[name]))
    assert relative(other, gradient) < 2e-3


def test_a_run_without_a_teacher_in_memory(place: Path, tmp_path: Path, ranks: Ranks) -> None:
    """It goes as that with the teacher, for any cut of a batch and on two ranks; after a kill it goes on exactly."""
    val = ("--val-data", str(place / "data"))
    online = run(place, tmp_path, "online", *KL, *RESET, "--kl-top-k", "8", *val)
    kept = run(place, tmp_path, "offline", *KL, *RESET, *offline(place), *val)
    for one, two in zip(rows(online, "metrics.jsonl"), rows(kept, "metrics.jsonl"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)
    cut = run(place, tmp_path, "cut", *KL, *RESET, *offline(place), "--accum-freq", "4", "--workers", "1")
    assert worst(weights(cut), weights(kept)) < 1e-5
    before = weights(kept)
    assert len(checkpoints(kept)) > 1
    for folder in checkpoints(kept)[1:]:  # as if killed before the last save
        shutil.rmtree(folder)
    run(place, tmp_path, "offline", *KL, *RESET, *offline(place), *val, "--resume", "latest")
    assert all(torch.equal(before[name], after) for name, after in weights(kept).items())
    given = words(place, tmp_path, "two", *KL, *RESET, *offline(place), "--accum-freq", "2", "--fsdp")
    assert ranks.run(2, given) == [0, 0], ranks.text()[-3000:]
    assert worst(weights(tmp_path / "two"), before) < 1e-5
    assert "learns from the top 8 tokens of" in (kept / "out.log").read_text()
    assert "frozen teacher" not in (kept / "out.log").read_text()
    assert "loss_kl" not in rows(kept, "results.jsonl")[-1] and rows(kept, "results.jsonl")[-1]["loss"] > 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--kl-temperature", "1"), "with --kl-temperature 2.0, and this run has 1.0"),
        (("--document-separator", "18"), "the --document-separator to reset at 17, and this run has 18"),
        (("--train-data", "{place}/data"), "hold no teacher's logits"),
        (("--train-data", "{place}/taught/shard-00000.tar"), "is no manifest"),
        (("--train-data", "{place}/taught", "{place}/other"), "different teachers or settings"),
        (("--target-mask-left", "5", "--squash-mask-left"), "--squash-mask-left moves tokens"),
        (("--kl-top-k", "4"), "--kl-top-k is what the shards hold"),
        (("--loss", "align=1", "--kl-temperature", "1"), "align and hidden need a teacher in memory"),
        (("--dataset-type", "synthetic"), "synthetic tokens lie in no shards"),
        (("--teacher", "{place}/teacher", "--kl-top-k", "65"), "more than the vocabulary, 64"),
        (("--kl-top-k", "-1", "--teacher", "{place}/teacher"), "--kl-top-k must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(more: tuple[str, ...], sentence: str, place: Path, tmp_path: Path) -> None:
    if "other" in str(more):
        teach(asked(place, "other", top_k=4))
    given = [word.format(place=place) for word in more]
    with pytest.raises(UserError) as error:
        run(place, tmp_path, "x", *KL, *RESET, *offline(place), *given, "--dry-run")
    assert sentence in str(error.value)


def test_a_wrong_teacher_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--top-k 65 is more than the 64 tokens"):
        teach(asked(place, "never", top_k=65))
    with pytest.raises(UserError, match="--top-k must be at least 1"):
        teach(asked(place, "never", top_k=0))
    save(tmp_path / "small", create_model(tiny("softmax", seq_len=16, vocab_size=32)))
    small = dataclasses.replace(asked(place, "never").section, teacher=str(tmp_path / "small"))
    with pytest.raises(UserError, match="a vocabulary of 64"):
        teach(dataclasses.replace(asked(place, "never"), section=small))
    assert not (place / "never").exists()
    card = json.loads((place / "taught" / "dataset.json").read_text())
    assert TeacherLogits.of_card(card, "here").words == 17
