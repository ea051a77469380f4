"""Measures equal their definitions, state is counted as it is, and the report says what the JSON says."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from open_lm_linear import report as reporting
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.evaluation import run as evaluation
from open_lm_linear.model import Transformer, create_model

VOCAB = 61


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads only cost time at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(attn_name: str) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_dim=32,
        n_layers=2,
        n_heads=4,
        n_heads_kv=2,
        vocab_size=VOCAB,
        intermediate_dim_ffn=48,
        attn_name=attn_name,
    )
    return create_model(config).eval()


@pytest.mark.parametrize("attn_name", ["softmax", "linear"])
def test_perplexity_is_the_mean_cross_entropy(attn_name: str) -> None:
    model = tiny(attn_name)
    rows = torch.randint(VOCAB, (5, 21), generator=torch.Generator().manual_seed(0))
    rows[3, 11:] = -100
    measured = evaluation.perplexity(model, [rows[:2], rows[2:], rows[:0]])
    with torch.no_grad():
        logits = model(rows[:, :-1].clamp(min=0))[0]
    losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(5, 20)
    counted = (rows[:, 1:] >= 0).sum(1)
    mean = float(losses.sum() / counted.sum())
    assert measured.tokens == 90 and measured.sequences == 5
    assert measured.nats_per_token == pytest.approx(mean, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    deviation = losses.sum(1) - mean * counted
    assert measured.nats_per_token_standard_error == pytest.approx(
        float((5 / 4 * deviation.square().sum()).sqrt()) / 90, rel=1e-3
    )


def test_perplexity_of_one_row_has_no_error_and_of_none_is_refused() -> None:
    rows = torch.randint(VOCAB, (1, 9))
    assert evaluation.perplexity(tiny("linear"), [rows]).nats_per_token_standard_error is None
    in_bfloat16 = evaluation.perplexity(tiny("linear"), [rows], autocast=torch.bfloat16).nats_per_token
    assert in_bfloat16 == pytest.approx(evaluation.perplexity(tiny("linear"), [rows]).nats_per_token, rel=0.02)
    with pytest.raises(UserError, match="no held-out tokens"):
        evaluation.perplexity(tiny("linear"), [])


@pytest.mark.parametrize("prefill_up_to", [None, 16, 20])
def test_the_state_grows_with_softmax_and_not_with_linear(prefill_up_to: int | None) -> None:
    models = {"teacher": tiny("softmax"), "uptrained": tiny("linear")}
    rows = evaluation.decoding(models, (64, 8, 16, 40), tokens=3, warmup=1, prefill_up_to=prefill_up_to)
    per_token = 2 * 2 * (8 + 8) * 4  # layers, key-value heads, key and value, float32
    state = 2 * 4 * 8 * 8 * 4  # layers, heads, K, V, float32
    assert [(r.model, r.context_tokens, r.state_bytes) for r in rows] == [
        row for c in (8, 16, 40, 64) for row in (("teacher", c, c * per_token), ("uptrained", c, state))
    ]
    for row in rows:
        filled = row.model == "teacher" and prefill_up_to is not None and row.context_tokens > prefill_up_to
        assert (row.prefill_tokens_per_second is None) == filled
        assert row.milliseconds_per_token_p10 <= row.milliseconds_per_token <= row.milliseconds_per_token_p90


def test_a_cache_is_filled_up_from_the_limit_on_whatever_the_first_context_is() -> None:
    (row,) = evaluation.decoding({"teacher": tiny("softmax")}, (50,), tokens=1, warmup=0, prefill_up_to=7)
    assert row.state_bytes == 50 * 256 and row.prefill_tokens_per_second is None


@pytest.mark.parametrize("options", [{"contexts": (0, 8)}, {"contexts": ()}, {"tokens": 0}, {"prefill_up_to": 0}])
def test_decoding_refuses_what_it_cannot_measure(options: dict) -> None:
    with pytest.raises(UserError):
        evaluation.decoding({"teacher": tiny("softmax")}, **({"contexts": (8,)} | options))


def test_decoding_leaves_ids_out_of_the_vocabulary_to_the_caller() -> None:
    with pytest.raises(UserError, match="token id 61"):
        evaluation.decoding({"teacher": tiny("softmax")}, (8,), ids=torch.tensor([1, VOCAB]))


class Words:
    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f" {i}" for i in ids)


def run_folder(folder: Path, val_data: str = "") -> Path:
    """What the trainer leaves behind, as far as evaluation and report read it."""
    folder.mkdir()
    settings = {"pretrained": "smollm2", "attn_name": "linear", "lr": 3e-4, "lr_new": 1e-3, "seed": 7}
    lines = [f"{k}: {v}" for k, v in settings.items()] + [f"val_data: ['{val_data}']", "seq_len: 16"]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    rows = [{"step": s, "tokens": 1000 * s, "loss": 9.0 - s / 10, "tokens_per_s": 200.0} for s in range(1, 61)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 61, "tok')
    (folder / "results.jsonl").write_text(
        '{"step": 0, "tokens": 0, "loss": 10.5}\n{"step": 60, "tokens": 60000, "loss": 3.1}\n'
    )
    return folder


def evaluated() -> dict:
    """An evaluation.json of numbers that are easy to find again."""
    models = {
        name: {"tokens": 12345, "sequences": 24, "nats_per_token": math.log(p), "nats_per_token_standard_error": 0.0321,
               "perplexity": p, "seconds": 2.0}
        for name, p in (("teacher", 17.25), ("swapped", 40123.5), ("uptrained", 345.75))
    }  # fmt: skip
    rows = [
        {"model": name, "context_tokens": c, "state_bytes": size, "milliseconds_per_token": ms,
         "milliseconds_per_token_p10": ms * 0.9, "milliseconds_per_token_p90": ms * 1.1,
         "prefill_tokens_per_second": None if name == "teacher" and c > 1024 else 777.0, "tokens_timed": 16}
        for c in (512, 1024, 2048)
        for name, size, ms in (("teacher", 23040 * c, 30.0 + c / 100), ("uptrained", 4423680, 41.5))
    ]  # fmt: skip
    return {
        "machine": {"cpu": "A CPU of 1999", "cores": 2, "memory_bytes": 8e9, "gpu": None, "torch": "2.13"},
        "seconds": {"perplexity": 33.0, "decoding": 44.0},
        "model": {"feature_map_init": "identity", "seq_len": 8192},
        "parameters": {"total": 1000, "new": 25},
        "perplexity": {"precision": "amp_bf16", "data": ["x"], "seq_len": 512, "models": models},
        "decoding": {"weights": "bfloat16", "prefill_up_to": 1024, "rows": rows},
        "samples": {"temperature": 0.0, "repetition_penalty": 1.2, "max_new_tokens": 40,
                    "rows": [{"prompt": "The sea", "teacher": " is blue.", "uptrained": " sea | sea\nsea"}]},
    }  # fmt: skip


def test_the_report_says_what_was_measured(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    run = run_folder(tmp_path / "demo")
    (run / "evaluation.json").write_text(json.dumps(evaluated()))
    facts = reporting.report(run)
    assert json.loads((run / "report.json").read_text()) == json.loads(json.dumps(facts))
    for name in ("loss.png", "decoding.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    text, terminal = (run / "report.md").read_text(), capsys.readouterr().out
    for number in ("17.25", "40,123.50", "345.75", "0.0321", "12,345", "47.19", "4.42", "50.5", "41.5", "777"):
        assert number in text and number in terminal
    assert "60,000 tokens in 60 steps and 5.0 min" in text and "0.00030 %" in text and "20 to 100 billion" in text
    assert "0.86% of the swapped model's" in text and "20.0 times the teacher's" in text
    for setting in ("- lr_new: 0.001\n", "- seed: 7\n", "- feature_map_init: identity\n", "- seq_len: 16\n"):
        assert setting in text
    assert "1,000, of which 25 new (2.5%)" in text and "A CPU of 1999" in text and "5.0 min" in text
    assert "mistral_7b_supra_100b.yaml" in text and "sea | sea sea" in text


def test_a_report_of_stages_beside_another_run(tmp_path: Path) -> None:
    """Losses are cross entropies, tokens go on counting, and what stages have in common is said once."""
    run, other = tmp_path / "demo", run_folder(tmp_path / "supra")
    run.mkdir()
    for number, label in enumerate(("align", "distil")):
        stage = run_folder(run / f"stage_{number}_{label}")
        lines = (stage / "metrics.jsonl").read_text().splitlines()[:60]
        rows = [json.loads(line) | {"align": 0.5} if number == 0 else json.loads(line) for line in lines]
        rows = [row if number == 0 else row | {"loss": 0.7, "loss_ce": row["loss"]} for row in rows]
        (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with (stage / "config.yaml").open("a") as file:
            file.write(f"loss: ['{label}=1']\ninit_tokens: {1024 * (1 - number)}\n")
    (run / "evaluation.json").write_text(json.dumps(evaluated() | {"beside": [str(other)]}))
    facts = reporting.gather(run)
    training = facts["training"]
    assert (training["tokens"], training["steps"], training["seconds"]) == (120_000, 120, 600.0)
    assert training["curve"][0] == (61_000, 8.9) and len(training["curve"]) == 60  # an align stage has none
    assert training["held_out"] == [(0, 10.5), (60_000, 3.1), (60_000, 10.5), (120_000, 3.1)]
    assert facts["settings"]["loss"] == [["align=1"], ["distil=1"]] and facts["settings"]["lr"] == 3e-4
    assert facts["settings"]["init_tokens"] == 1024
    assert facts["beside"]["supra"]["held_out"][-1] == (60_000, 3.1)
    text = reporting.markdown(facts)
    assert "every head's decay and feature map were chosen by the teacher's head on 1,024 tokens" in text
    assert "the run supra stood at 3.1000 held-out nats after 60,000 tokens" in text


def test_a_report_of_some_parts_only(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "demo")
    (run / "evaluation.json").write_text(json.dumps({"machine": {}, "seconds": {}}))
    for name in ("metrics.jsonl", "results.jsonl"):
        (run / name).unlink()
    reporting.report(run)
    assert "mistral" in (run / "report.md").read_text() and not (run / "loss.png").exists()


def test_the_report_refuses_what_is_not_measured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        reporting.report(tmp_path / "nowhere")
    run = run_folder(tmp_path / "demo")
    with pytest.raises(UserError, match="open_lm_linear.evaluate --run"):
        reporting.report(run)
    (run / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        reporting.report(run)


def test_a_missing_matplotlib_is_one_sentence_after_the_texts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    run = run_folder(tmp_path / "demo")
    (run / "evaluation.json").write_text(json.dumps(evaluated()))
    with pytest.raises(UserError, match=r"pip install open_lm_linear\[report\]"):
        reporting.report(run)
    assert (run / "report.md").exists() and (run / "report.json").exists()


def test_a_run_is_evaluated_from_its_folder(tmp_path: Path, monkeypatch) -> None:
    from open_lm_linear import pretrained
    from open_lm_linear.data.manifest import Shard, write_manifest
    from open_lm_linear.data.shards import write_shard

    data = tmp_path / "data"
    data.mkdir()
    rows = np.random.default_rng(0).integers(VOCAB, size=(6, 17))
    write_shard(data / "shard-0.tar", list(rows))
    write_manifest(data / "manifest.jsonl", [Shard(str(data / "shard-0.tar"), 6)], {})
    run = run_folder(tmp_path / "demo", str(data / "manifest.jsonl"))
    names = {"teacher": "softmax", "swapped": "linear", "uptrained": "linear"}
    loaders = {name: lambda dtype, attn=attn: tiny(attn).to(dtype) for name, attn in names.items()}
    monkeypatch.setattr(evaluation, "loaders", lambda *_: loaders)
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda _: Words())
    args = evaluation.RunArgs(str(run), contexts=(8, 16), timed_tokens=2, prompts=("one two three",), precision="fp32")
    result = evaluation.evaluate_run(args, "cpu")
    saved = json.loads((run / "evaluation.json").read_text())
    assert saved["perplexity"]["models"]["teacher"]["tokens"] == 96 and saved["perplexity"]["seq_len"] == 16
    direct = evaluation.perplexity(tiny("softmax"), [torch.from_numpy(rows)])
    assert saved["perplexity"]["models"]["teacher"]["perplexity"] == pytest.approx(direct.perplexity)
    assert [(r["model"], r["context_tokens"]) for r in saved["decoding"]["rows"]] == [
        ("teacher", 8), ("uptrained", 8), ("teacher", 16), ("uptrained", 16)
    ]  # fmt: skip
    assert set(result["samples"]["rows"][0]) == {"prompt", "teacher", "uptrained"}
    assert saved["parameters"]["new"] > 0 and saved["machine"]["cores"] >= 1
    few = evaluation.evaluate_run(evaluation.RunArgs(str(run), max_val_tokens=32, skip=("decoding", "samples")), "cpu")
    assert few["perplexity"]["models"]["uptrained"]["tokens"] == 32 and "decoding" not in few
    with pytest.raises(UserError, match="is not a run folder"):
        evaluation.evaluate_run(evaluation.RunArgs(str(data)), "cpu")
