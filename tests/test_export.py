"""Export in every format: what is written, that it is proved, that folding changes nothing, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import relative, spans, tiny
from safetensors.torch import load_file
from test_hf_export import make_tokenizer

import open_lm_linear as oll
from open_lm_linear import export as command
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.hf import export as exporting
from open_lm_linear.hf import formats, proof
from open_lm_linear.hf.card import History
from open_lm_linear.hf.export import export, export_hf
from open_lm_linear.hf.proof import Differences, ExportError, text_ids
from open_lm_linear.model import Block, Transformer, create_model, read_config
from open_lm_linear.pretrained import load_weights, open_source
from open_lm_linear.pretrained.folding import fold, folded_config
from open_lm_linear.pretrained.layerwise import layerwise_logits
from open_lm_linear.pretrained.openlm import config_to_folder
from open_lm_linear.pretrained.readers import ModelReader
from open_lm_linear.pretrained.sources import source_of

TESTS = Path(__file__).parent
IDS = [5, 17, 3, 42, 8, 29, 11, 60, 0, 33]
GQA = {"n_heads_kv": 2}
HISTORY = History("some/teacher", "apache-2.0", 60000, {"pretrained": "some/teacher", "lr": 3e-5, "wd": 0.0})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are loaded by our loader in this process: for tests that ask about something else."""

    def load(code: str, path: Path, ids: list[int], arguments: list[str]) -> torch.Tensor:
        model, dtype = arguments or ["", json.loads((path / "config.json").read_text())["dtype"]]
        return layerwise_logits(open_source(str(path), model), ids, getattr(torch, dtype))

    monkeypatch.setattr(proof, "logits_of_a_fresh_process", load)


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose every parameter, biases and norms too, says something."""
    torch.manual_seed(7)
    model = create_model(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# ---- the formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "dtype", "folds"),
    [("hf", "bf16", True), ("openlm", "fp16", True), ("safetensors", "auto", False), ("supra", "fp32", False)],
)
def test_the_command_proves_what_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, dtype: str, folds: bool
) -> None:
    """With real fresh processes, from a checkpoint folder with a tokenizer."""
    model = build(tiny("linear", **GQA))
    source, folder = tmp_path / "run", tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:  # that one is proved below
        patch.setattr(proof, "logits_of_a_fresh_process", lambda code, path, ids, _: model(torch.tensor([ids]))[0][0])
        export(source_of(model), source, format="openlm", tokenizer=make_tokenizer(), history=HISTORY)
    words = [str(source), str(folder), "--format", format, "--dtype", dtype]
    command.main(words + ["--fold-feature-map"] * folds)

    said = capsys.readouterr().out
    record = json.loads((folder / "export.json").read_text())
    card = (folder / "README.md").read_text()
    assert "reloaded in a fresh process, the logits differ from the source's by" in said
    # The folder's file takes torch's operators for what the package has compiled: in bfloat16 a rounding apart at most.
    assert record["differences"]["reloaded"] < (1e-3 if dtype == "bf16" else 1e-6)
    assert record["differences"]["tokens"] == 64
    assert f"{record['differences']['total']:.1e} relative on 64 tokens" in card
    assert (record["differences"]["cast"] is not None) == (dtype in ("bf16", "fp16"))
    assert ("base_model: some/teacher" in card, "60,000 tokens" in card, "| lr | 3e-05 |" in card) == (True,) * 3
    assert {path.name for path in folder.iterdir()} == set(record["files"]) >= {"tokenizer.json", "README.md"}
    assert not list(tmp_path.glob(".*.partial"))
    if folds:
        # one map over 4 heads of 8, one over 2; 4 * 8 + 2 * 8 + 2 * 8 biases come instead
        saved = 2 * (32 * 32 + 32 + 16 * 16 + 16 - 64)
        assert f"folding saved {saved:,} parameters" in said and f"{saved:,} parameters fewer" in card
        assert not any("_totrain" in name for name in load_file(folder / "model.safetensors"))
    assert ("rotary angles in the dtype of the weights" in card) == (format == "supra")
    written = {"auto": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {written}

    reader = (str(folder / "model.safetensors"), str(folder / "model.json")) if format == "safetensors" else (folder,)
    again = oll.load_pretrained(reader[0], model=reader[1] if len(reader) > 1 else "")
    with torch.no_grad():
        ours, theirs = model(torch.tensor([IDS]))[0], again(torch.tensor([IDS]))[0]
    assert relative(theirs, ours) < (1e-6 if written == torch.float32 else 3e-2)


def test_supra_writes_what_the_reference_wrote(tmp_path: Path, in_this_process: None) -> None:
    """From a folder that its own classes saved: the same config, the same keys, the same bytes, the same text."""
    for name in ("linear_gqa_mistral", "linear_gqa_mistral_sharded"):
        theirs, ours = TESTS / "openlm" / name, tmp_path / name
        shard = 10**5 if "sharded" in name else 10**9
        export(open_source(str(theirs)), ours, format="supra", max_shard_bytes=shard)
        config, wanted = (json.loads((f / "config.json").read_text()) for f in (ours, theirs))
        assert config.pop("transformers_version") and wanted.pop("transformers_version")
        assert config == wanted
        assert (len(list(ours.glob("*.safetensors"))) > 1) == ("sharded" in name)
        here, there = (
            {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()} for folder in (ours, theirs)
        )
        assert here.keys() == there.keys() and all(torch.equal(here[k], there[k]) for k in there)
        expected = json.loads((theirs / "expected.json").read_text())
        model = oll.load_pretrained(ours)
        ids = list(expected["prompt"])
        with torch.no_grad():
            for _ in range(16):
                ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        assert ids[-16:] == expected["greedy_16"]


@pytest.mark.parametrize("name", sorted(p.name for p in (TESTS / "golden").iterdir() if p.is_dir()))
def test_every_golden_model_goes_out_as_supra_and_comes_back(tmp_path: Path, in_this_process: None, name: str) -> None:
    model = create_model(TESTS / "golden" / name / "config.json")
    model.load_state_dict(load_file(TESTS / "golden" / name / "weights.safetensors"))
    export(source_of(model), tmp_path / "out", format="supra")
    stored = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert stored == {f"model.{key}" for key in load_file(TESTS / "golden" / name / "weights.safetensors")}
    io = load_file(TESTS / "golden" / name / "io.safetensors")
    with torch.no_grad():
        logits = oll.load_pretrained(tmp_path / "out")(io["input_ids"])[0]
    assert relative(logits, io["logits"]) < 1e-5


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"normaliser": "rms_norm"}, {}, "no place for normaliser 'rms_norm'"),
        ({}, {"attn_out_bias": True}, "no place for attn_out_bias True"),
        ({}, {"qk_norm": True}, "no place for qk_norm_at 'projection'"),
        ({}, {"n_heads": 2, "n_heads_kv": 1, "qk_head_dim": 8}, "no place for qk_head_dim 8"),
        ({}, {"norm_eps": 1e-6}, "epsilon of 1e-5 whatever norm_eps says"),
        ({}, {"hidden_dim": 48, "n_heads": 6}, "default decays of 6 heads"),
        ({}, {"positional_embedding_type": "llama_rotary", "rotary_scale": 2.0}, "ignores rotary_base_frequency"),
        ({"feature_dim": 12}, {}, "rotary embeddings need heads of hidden_dim / n_heads"),
    ],
)
def test_what_the_reference_cannot_be_or_run_is_refused(
    options: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_to_folder(tiny("linear", options, **fields), "float32")


# ---- folding -------------------------------------------------------------------------------------------------------

FOLDABLE = {
    "full": ({}, {}),
    "full_gqa": ({}, GQA),
    "per_head_gqa_biases": ({"feature_map": "per_head"}, {**GQA, "qkv_bias": True}),
    "more_features": ({"feature_dim": 12, "normaliser": "sum"}, GQA),
    "fewer_features_no_rotary": ({"feature_dim": 3}, {"positional_embedding_type": "none", "v_head_dim": 5}),
    "norm_on_features": ({"qk_norm_at": "features"}, {**GQA, "qk_norm": True}),
    "layout_of_meta": ({"feature_map": "per_head"}, {"positional_embedding_type": "llama_rotary"}),
    "hedgehog": ({"feature_activation": "softmax", "feature_map": "per_head", "feature_dim": 6}, GQA),
    "maps_of_their_own": ({"feature_activation": "elu", "share_feature_map": False, "learn_decay": True}, {}),
    "gate": ({"output_gate": True, "rotary_at": "none"}, GQA),
    "hybrid": ({}, {**GQA, "attn_layers": {"softmax": [1]}}),
    "partial_rotary": ({}, {**GQA, "partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_keeps_the_function(name: str, dtype: torch.dtype) -> None:
    options, fields = FOLDABLE[name]
    model = build(tiny("linear", options, **fields), dtype)
    source = source_of(model)
    light = Transformer(fold(source).config).to(dtype).eval()
    load_weights(light, fold(source))
    assert not any("_totrain_embed" in key for key in light.state_dict())
    assert light.flops_per_token(64) < model.flops_per_token(64)
    assert light.state_bytes(1, 64) == model.state_bytes(1, 64)
    ids, past, parts = torch.tensor([IDS]), None, []
    with torch.no_grad():
        reference = model(ids)[0]
        for span in spans((3, 1, 6)):
            logits, _, past = light(ids[:, span], past_key_values=past, use_cache=True)
            parts.append(logits)
        # float64 to float32's rounding: rotary angles and decays are float32 always
        assert relative(light(ids)[0], reference) < (1e-5 if dtype == torch.float32 else 1e-12)
        assert relative(torch.cat(parts, 1), reference) < 1e-5


def test_folding_saves_what_it_says_of_mistral() -> None:
    """Mistral 7B: a map over 32 query heads and one over 8 key heads in each of 32 layers; biases come instead."""
    config = read_config("mistral_7b_linear")
    with torch.device("meta"):
        before, after = Transformer(config), Transformer(folded_config(config))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (before, after)]
    assert sizes[0] - sizes[1] == 32 * (4096 * 4096 + 4096 + 1024 * 1024 + 1024 - 6144)
    assert 0.565e9 < sizes[0] - sizes[1] < 0.575e9
    assert before.flops_per_token(2048) - after.flops_per_token(2048) == 32 * 2 * (4096 * 4096 + 1024 * 1024)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny("softmax"), "softmax attention, which has no feature map"),
        (tiny("linear", {"feature_map": "none"}, qkv_bias=True), "the feature map 'none'"),
        (tiny("linear", {"rotary_at": "projection"}), "turns its queries and keys"),
        (tiny("linear", {"feature_dim": 12}, attn_layers={"softmax": [1]}), "layers of another attention"),
        (tiny("linear", qk_norm=True), "W cannot pass through a norm"),
    ],
)
def test_what_cannot_be_folded_is_refused(tmp_path: Path, config: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_hf(build(config), tmp_path / "out", fold=True)
    assert not list(tmp_path.iterdir())


# ---- one layer at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [tiny("linear", **GQA), tiny("softmax", weight_tying=True)], ids=["linear", "tied"])
def test_a_checkpoint_runs_with_one_block_in_memory(monkeypatch: pytest.MonkeyPatch, config: ModelConfig) -> None:
    model = build(config)
    seen: list[Block] = []
    forward = Block.forward

    def watched(block: Block, *args: Any) -> Any:
        assert all(p.is_meta for other in seen for p in other.parameters())
        seen.append(block)
        return forward(block, *args)

    with torch.no_grad():
        wanted = model(torch.tensor([IDS]))[0][0]
    monkeypatch.setattr(Block, "forward", watched)
    assert torch.equal(layerwise_logits(source_of(model), IDS, torch.float32), wanted)
    assert len(seen) == 2


def test_tensors_are_read_by_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_this_process: None) -> None:
    """No read of a source is of more than the block size, so that a model of any size streams."""
    from open_lm_linear.pretrained import matching

    model, largest = build(tiny("linear", vocab_size=5000, seq_len=8)), 0
    read = ModelReader._read

    def watched(self: ModelReader, name: str, begin: int, end: int) -> torch.Tensor:
        nonlocal largest
        value = read(self, name, begin, end)
        largest = max(largest, value.nbytes)
        return value

    monkeypatch.setattr(ModelReader, "_read", watched)
    monkeypatch.setattr(matching, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(exporting, "Proof", lambda *_: type("Proved", (), {"of": lambda *_: NO_DIFFERENCE})())
    export_hf(model, tmp_path / "out")
    assert largest <= 1 << 14
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[f"model.{name}"], p) for name, p in model.named_parameters())


NO_DIFFERENCE = Differences(8, 0.0, None, None, 0.0)

# ---- folders, tokenizers, failures ---------------------------------------------------------------------------------


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    model = build(tiny("linear"))
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        export_hf(model, tmp_path)
    with pytest.raises(UserError, match="holds no export"):
        export_hf(model, tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        export_hf(model, tmp_path / "mine.txt")


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path, in_this_process: None) -> None:
    folder, source = tmp_path / "out", source_of(build(tiny("linear")))
    export(source, folder, max_shard_bytes=5000)
    (folder / "mine.txt").write_text("keep")
    assert len(list(folder.glob("*.safetensors"))) > 1
    with pytest.raises(UserError, match="not empty"):
        export(source, folder)
    export(source, folder, format="safetensors", overwrite=True)
    found = {path.name for path in folder.iterdir()}
    assert found == {"model.safetensors", "model.json", "README.md", "export.json", "mine.txt"}


def test_a_wrong_export_is_noticed_and_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the process without the package: the modeling file that it loads computes something else."""
    bundle = formats.bundle

    def wrong(attentions: Any) -> str:
        source = bundle(attentions)
        assert "GROUP_NORM_EPS = 1e-5" in source
        return source.replace("GROUP_NORM_EPS = 1e-5", "GROUP_NORM_EPS = 1e-1")

    monkeypatch.setattr(formats, "bundle", wrong)
    with pytest.raises(ExportError, match="differ from the model's"):
        export_hf(build(tiny("linear")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_fold_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from open_lm_linear.pretrained import folding

    through = folding._through

    def transposed(weight: torch.Tensor, bias: torch.Tensor, *rest: torch.Tensor) -> Any:
        return through(weight.T, bias, *rest)

    monkeypatch.setattr(folding, "_through", transposed)
    with pytest.raises(ExportError, match="the folded model's logits differ"):
        export_hf(build(tiny("linear")), tmp_path / "out", fold=True)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(formats, "bundle", lambda attentions: "import nothing_of_that_name")
    with pytest.raises(ExportError, match=r"does not load in a fresh process.*nothing_of_that_name"):
        export_hf(build(tiny("linear")), tmp_path / "out")


def test_tokenizers_that_do_not_fit(tmp_path: Path, in_this_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    for format in ("hf", "openlm", "supra"):
        with pytest.raises(UserError, match="61 tokens and the model only 40"):
            export(source_of(build(tiny(vocab_size=40))), tmp_path / "out", format=format, tokenizer=make_tokenizer())
    model = build(tiny(vocab_size=99))
    export(source_of(model), tmp_path / "alone", format="openlm")
    command.main([str(tmp_path / "alone"), str(tmp_path / "a")])
    assert "note: the export will have no tokenizer" in capsys.readouterr().err
    assert "AutoTokenizer" not in (tmp_path / "a" / "README.md").read_text()
    make_tokenizer().save_pretrained(tmp_path / "words")
    command.main([str(tmp_path / "alone"), str(tmp_path / "b"), "--tokenizer", str(tmp_path / "words")])
    assert "has 61 tokens and the model 99: make sure" in capsys.readouterr().err
    assert "AutoTokenizer" in (tmp_path / "b" / "README.md").read_text()


def test_bad_words_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for words, message in (
        (["bert", "out"], "bert"),
        (["nowhere", "out"], "no pretrained model"),
        (["bert", "out", "--max-shard-gb", "0"], "--max-shard-gb must be above 0"),
        (["bert", "out", "--private"], "--private belongs to --push-to-hub"),
    ):
        with pytest.raises(UserError, match=message):
            command.main([str(tmp_path / words[0]), str(tmp_path / words[1]), *words[2:]])


def test_the_command_answers_without_loading_torch() -> None:
    code = "import sys, open_lm_linear.export; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_text_is_cut_to_the_model_and_has_an_answer_without_a_tokenizer() -> None:
    short, long = tiny(seq_len=12), tiny(seq_len=4096)
    assert len(text_ids(make_tokenizer(), short)) == 12 and len(text_ids(None, long)) == proof.MAX_TOKENS
    assert len(set(text_ids(None, long))) > 20 and max(text_ids(None, long)) < 61


# ---- the card ------------------------------------------------------------------------------------------------------


def test_the_card_tells_of_a_run(tmp_path: Path, in_this_process: None) -> None:
    """From a run folder, its base a folder on this machine with a card of its own."""
    run, base = tmp_path / "run", tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlibrary_name: x\nlicense: cc-by-4.0\n---\n# Base\n")
    recipe = {"pretrained": str(base), "lr": 1e-4, "global_batch_size": 8, "lr_new": None, "seed": 0}
    step = run / "checkpoints" / "step_00000010"
    history = History(str(base), "cc-by-4.0", 81920, recipe)
    export(source_of(build(tiny("linear"))), step, format="openlm", history=history)
    models = {
        "teacher": {"perplexity": 11.5, "nats_per_token": 2.4423, "tokens": 4096},
        "uptrained": {"perplexity": None, "nats_per_token": None, "tokens": 4096},
    }
    row = {"model": "uptrained", "context_tokens": 2048, "milliseconds_per_token": 3.25, "state_bytes": 2048}
    evaluation = {"perplexity": {"models": models}, "decoding": {"rows": [row]}, "machine": {"cpu": "One", "gpu": None}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    suite = tmp_path / "evaluations"
    with pytest.raises(UserError, match="no table.md"):
        command.main([str(run), str(tmp_path / "out"), "--evaluation", str(suite)])
    suite.mkdir()
    (suite / "table.md").write_text("# paper_table1\n\n| model | piqa |\n| --- | ---: |\n| student | 61.5 ± 1.1 |\n")
    command.main([str(run), str(tmp_path / "out"), "--evaluation", str(suite)])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\n### paper_table1\n" in card and "| student | 61.5 ± 1.1 |" in card
    assert f"made from {base}" in card and "license: cc-by-4.0" in card and "base_model" not in card
    assert "81,920 tokens" in card and "| lr | 0.0001 |" in card and "lr_new" not in card
    assert "| teacher | 11.50 | 2.4423 | 4,096 |" in card and "| uptrained | - | - | 4,096 |" in card
    assert "| uptrained | 2,048 | 3.2 | 2.00 KiB |" in card and "on One" in card
    assert 'pipeline("text-generation"' not in card and "model.generate(token_ids" in card  # it has no tokenizer
    assert "its logits" in card and "tokens of text" in card


@pytest.mark.parametrize(
    ("name", "licence", "base"),
    [
        ("smollm2", "apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("mistral", "apache-2.0", "mistralai/Mistral-7B-v0.1"),
        ("llama2", "llama2", "meta-llama/Llama-2-7b-hf"),
        ("nobody/has-this", "unknown", "nobody/has-this"),
    ],
)
def test_base_models_and_licences(tmp_path: Path, in_this_process: None, name: str, licence: str, base: str) -> None:
    source = source_of(build(tiny("linear")))
    export(source, tmp_path / "run", format="openlm", history=History(recipe={"pretrained": name}))
    command.main([str(tmp_path / "run"), str(tmp_path / "out")])
    front = (tmp_path / "out" / "README.md").read_text().split("---")[1]
    assert f"license: {licence}\n" in front and f"base_model: {base}\n" in front


# ---- the hub -------------------------------------------------------------------------------------------------------


class Hub:
    """Stands in for HfApi and records what it is asked."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    refuse = ""

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> str:
            if name == Hub.refuse:
                raise OSError("401: not you.\nRequest ID: 1")
            Hub.calls.append((name, args, kwargs))
            return "https://huggingface.co/me/model"

        return call


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "refuse", "")
    return Hub


def pushed(tmp_path: Path, *words: str) -> None:
    command.main([str(TESTS / "openlm" / "linear_gqa_mistral"), str(tmp_path / "out"), "--push-to-hub", *words])


def test_an_export_is_uploaded_once_it_is_proved(
    tmp_path: Path, hub: type[Hub], in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed(tmp_path, "me/model", "--private")
    assert [name for name, _, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1:] == (("me/model",), {"private": True, "exist_ok": True})
    upload = hub.calls[2][2]
    assert upload["repo_id"] == "me/model" and upload["folder_path"] == tmp_path / "out"
    assert {"model.safetensors", "README.md", "modeling_open_lm_linear.py"} <= set(upload["allow_patterns"])
    assert 'from_pretrained("me/model"' in (tmp_path / "out" / "README.md").read_text()
    assert "uploaded to https://huggingface.co/me/model" in capsys.readouterr().out


def test_what_hinders_an_upload_is_said_before_the_work(
    tmp_path: Path, hub: type[Hub], in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is not OWNER/NAME"):
        pushed(tmp_path, "model")
    hub.refuse = "whoami"
    with pytest.raises(UserError, match="does not take the token: 401: not you$"):
        pushed(tmp_path, "me/model")
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_token", lambda: None)
        with pytest.raises(UserError, match="needs a Hugging Face token"):
            pushed(tmp_path, "me/model")
    assert not list(tmp_path.iterdir()) and not hub.calls
    hub.refuse = "upload_folder"
    with pytest.raises(UserError, match="is written but not uploaded: 401: not you; `hf upload me/model"):
        pushed(tmp_path, "me/model")
    assert (tmp_path / "out" / "config.json").exists()


def test_a_wrong_export_is_not_uploaded(tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "logits_of_a_fresh_process", lambda code, path, ids, _: torch.full((len(ids), 128), 1.0))
    with pytest.raises(ExportError):
        pushed(tmp_path, "me/model")
    assert [name for name, _, _ in hub.calls] == ["whoami"]
