"""The Hugging Face export: what a stranger without this package gets, and that it is the model."""

from __future__ import annotations

import ast
import builtins
import copy
import dis
import importlib.util
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import relative, tiny

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.hf import OpenLMLinearConfig, OpenLMLinearForCausalLM, export
from open_lm_linear.hf.bundle import bundle
from open_lm_linear.hf.export import ExportError, export_hf
from open_lm_linear.model import Transformer, create_model

ARCHITECTURES = {
    "linear": tiny("linear"),
    "linear_gqa_qk_norm": tiny("linear", n_heads_kv=2, qk_norm=True),
    "mamba": tiny("mamba", ffn_type="none", weight_tying=True),
    "softmax_gqa_tied": tiny("softmax", n_heads_kv=2, weight_tying=True),
    "softmax_of_another_family": tiny(
        "softmax",
        n_heads_kv=2,
        sliding_window=9,
        sliding_window_layers=[0],
        rotary_local_layers=[0],
        rotary_local_base_frequency=77.0,
        rotary_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        model_norm="gemma_rms_norm",
        norm_placement="both",
        ffn_type="geglu_tanh",
        embedding_scale=5.5,
        logit_softcap=3.0,
        attn_logit_softcap=2.0,
        qkv_bias=True,
    ),
}
PROMPT = [5, 17, 3, 42, 8, 29, 11]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads only get in each other's way on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


def build(config: ModelConfig) -> Transformer:
    torch.manual_seed(7)
    return create_model(config).eval()


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(58))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every architecture, exported in float32, without the export's own proof: the tests below are that."""
    root = tmp_path_factory.mktemp("exports")
    with pytest.MonkeyPatch.context() as patch:
        for name, config in ARCHITECTURES.items():
            model = build(config)
            patch.setattr(export, "_stranger_logits", lambda folder, ids, model=model: model(torch.tensor([ids]))[0])
            export_hf(model, root / name, tokenizer=make_tokenizer())
    return {name: root / name for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def exported_module(folders: dict[str, Path]) -> types.ModuleType:
    """The modeling file of an export, imported as it stands: the one that carries all three attentions."""
    spec = importlib.util.spec_from_file_location("stranger_modeling", folders["mamba"] / "modeling_open_lm_linear.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["package", "exported file"])
def model_class(request: pytest.FixtureRequest, exported_module: types.ModuleType) -> Any:
    return OpenLMLinearForCausalLM if request.param == "package" else exported_module.OpenLMLinearForCausalLM


@pytest.fixture(params=list(ARCHITECTURES))
def loaded(request: pytest.FixtureRequest, folders: dict[str, Path], model_class: Any) -> Any:
    return model_class.from_pretrained(folders[request.param]).eval()


def greedy(model: Transformer, prompt: list[int], tokens: int) -> list[int]:
    """The most likely continuation by our own model, without any cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    return ids[len(prompt) :]


STRANGER = """
import json, sys, torch
sys.meta_path.insert(0, type("Nothing", (), {"find_spec": staticmethod(lambda name, *_: (_ for _ in ()).throw(
    ModuleNotFoundError(name, name=name)) if name.split(".")[0] == "open_lm_linear" else None)}))
try:
    import open_lm_linear
    raise SystemExit("open_lm_linear is importable")
except ModuleNotFoundError:
    pass
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
prompt, found = torch.tensor([json.loads(sys.argv[1])]), {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(prompt).logits
    text = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    sizes = []
    for length in (8, 200):
        ids = torch.arange(length)[None] % 61
        out = model.generate(ids, max_new_tokens=2, eos_token_id=None, return_dict_in_generate=True)
        sizes.append(out.past_key_values.nbytes())
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = pipe("w1 w2 w3", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    found[folder] = dict(logits=logits.tolist(), text=text[0, prompt.shape[1]:].tolist(), sizes=sizes, said=said,
                         module=type(model).__module__)
print(json.dumps(found))
"""


def test_a_process_without_the_package_loads_and_generates(folders: dict[str, Path], tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps(PROMPT), *map(str, folders.values())],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, folder in folders.items():
        ours, theirs = build(ARCHITECTURES[name]), found[str(folder)]
        with torch.no_grad():
            assert relative(torch.tensor(theirs["logits"]), ours(torch.tensor([PROMPT]))[0]) < 1e-6
        assert theirs["module"].startswith("transformers_modules.")
        assert theirs["text"] == greedy(ours, PROMPT, 12)
        assert theirs["said"].startswith("w1 w2 w3")
        if name.startswith("linear"):
            assert theirs["sizes"] == [2 * 4 * 8 * 8 * 4] * 2  # layers, heads, K, V, bytes of a float32
        elif name == "mamba":
            assert theirs["sizes"] == [2 * 64 * (16 + 3) * 4] * 2  # layers, channels, states and inputs, bytes
        else:
            assert theirs["sizes"][1] > theirs["sizes"][0]


def test_the_exported_file_computes_what_the_package_does(loaded: Any, exported_module: types.ModuleType) -> None:
    ours = build(loaded.model.config if isinstance(loaded.model.config, ModelConfig) else _twin(loaded.model.config))
    rows = torch.randint(0, 61, (2, 70))
    with torch.no_grad():
        reference, _, past = ours(rows, use_cache=True)
        out = loaded(rows, use_cache=True)
        assert relative(out.logits, reference) < 1e-6
        again = loaded(rows[:, :1], past_key_values=out.past_key_values)
        assert relative(again.logits, ours(rows[:, :1], past_key_values=past)[0]) < 1e-6
    if type(loaded).__module__ == exported_module.__name__:
        assert type(loaded.model) is exported_module.Transformer is not Transformer


def _twin(config: Any) -> ModelConfig:
    return ModelConfig.from_json(config.to_json())


def test_generate_equals_a_loop_of_calls(loaded: Any) -> None:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        out = loaded(ids, use_cache=True)
        texts = []
        for _ in range(10):
            texts.append(int(out.logits[0, -1].argmax()))
            out = loaded(torch.tensor([texts[-1:]]), past_key_values=out.past_key_values)
    wanted = torch.tensor([PROMPT + texts])
    plain: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **plain), wanted)
    assert torch.equal(loaded.generate(ids, use_cache=False, **plain), wanted)
    assert torch.equal(loaded.generate(ids, prefill_chunk_size=3, **plain), wanted)
    embeds = loaded.get_input_embeddings()(ids).detach()
    assert torch.equal(loaded.generate(inputs_embeds=embeds, **plain), wanted[:, len(PROMPT) :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_rows_alone(loaded: Any, side: str) -> None:
    prompts = [PROMPT[:length] for length in (7, 3, 1, 5)]
    pad = [[0] * (7 - len(p)) for p in prompts]
    ids = torch.tensor([z + p if side == "left" else p + z for z, p in zip(pad, prompts, strict=True)])
    ones = [[1] * len(p) for p in prompts]
    mask = torch.tensor([z + o if side == "left" else o + z for z, o in zip(pad, ones, strict=True)])
    with torch.no_grad():
        together = loaded(ids, attention_mask=mask).logits
        for row, prompt in enumerate(prompts):
            assert relative(together[row][mask[row].bool()], loaded(torch.tensor([prompt])).logits[0]) < 1e-5
    if side == "right":
        return
    plain: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    texts = loaded.generate(ids, attention_mask=mask, **plain)
    for row, prompt in enumerate(prompts):
        assert torch.equal(texts[row, 7:], loaded.generate(torch.tensor([prompt]), **plain)[0, len(prompt) :])


def test_beam_search_with_the_cache_equals_beam_search_without(loaded: Any) -> None:
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    plain: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 2, "do_sample": False}
    cached = loaded.generate(ids, attention_mask=mask, **plain)
    assert torch.equal(cached, loaded.generate(ids, attention_mask=mask, use_cache=False, **plain))
    assert cached.shape[0] == 4


def test_sampling_with_the_cache_equals_sampling_without(loaded: Any) -> None:
    ids = torch.tensor([PROMPT])
    plain: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "top_p": 0.9, "num_return_sequences": 3}
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        texts.append(loaded.generate(ids, use_cache=use_cache, eos_token_id=None, **plain))
    assert torch.equal(*texts) and texts[0].shape == (3, len(PROMPT) + 8)


def test_a_prompt_is_read_once_and_asked_many_times(loaded: Any) -> None:
    document, questions = torch.randint(2, 61, (1, 20)), [[4, 9], [33]]
    plain: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        read = loaded(document, use_cache=True).past_key_values
        for question in questions:
            whole = torch.cat((document, torch.tensor([question])), 1)
            answer = loaded.generate(whole, past_key_values=copy.deepcopy(read), **plain)
            assert torch.equal(answer, loaded.generate(whole, **plain))
        wide = read.fork()
        wide.batch_repeat_interleave(3)
        assert read.get_seq_length() == 20 and wide.nbytes() == 3 * read.nbytes()
        rows = loaded(torch.tensor([[4], [9], [33]]), past_key_values=wide).logits
        assert relative(rows[1:2], loaded(torch.tensor([[9]]), past_key_values=read).logits) < 1e-5


def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(loaded: Any) -> None:
    ids = torch.randint(0, 61, (2, 12))
    labels = ids.clone()
    labels[0, :5] = -100
    out = loaded(ids, labels=labels)
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert relative(out.loss, wanted) < 1e-6
    summed = loaded(ids, labels=labels, num_items_in_batch=torch.tensor(40)).loss
    assert relative(summed, wanted * (labels[:, 1:] != -100).sum() / 40) < 1e-6
    loaded.zero_grad()
    out.loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_positions_that_begin_again_are_packed_documents(loaded: Any) -> None:
    ids = torch.randint(0, 61, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = loaded(ids, position_ids=positions).logits
        alone = torch.cat([loaded(part).logits for part in (ids[:, :4], ids[:, 4:])], 1)
    assert relative(packed, alone) < 1e-5


def test_outputs_that_are_asked_for(loaded: Any) -> None:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        out = loaded(ids, output_hidden_states=True, use_cache=False)
        kept = loaded(ids, logits_to_keep=2).logits
        logits = loaded(ids, return_dict=False, use_cache=False)[0]
    states = out.hidden_states
    assert len(states) == 3 and out.past_key_values is None
    assert torch.equal(states[0], loaded.get_input_embeddings()(ids))
    head = loaded.get_output_embeddings() or loaded.get_input_embeddings()
    raw, cap = states[-1] @ head.weight.T, loaded.config.logit_softcap
    assert relative(raw if cap is None else cap * torch.tanh(raw / cap), out.logits) < 1e-6
    assert relative(kept, out.logits[:, -2:]) < 1e-6 and torch.equal(logits, out.logits)
    with pytest.raises(ValueError, match="output_attentions"):
        loaded(ids, output_attentions=True)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # newer transformers call it activation checkpointing
def test_activation_checkpointing_changes_no_gradient(loaded: Any) -> None:
    ids = torch.tensor([PROMPT])
    gradients = []
    for switch in ("disable", "enable"):
        getattr(loaded, f"gradient_checkpointing_{switch}")()
        assert loaded.model.grad_checkpointing == (switch == "enable") == loaded.is_gradient_checkpointing
        loaded.train().zero_grad()
        loaded(ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in loaded.parameters()]))
    assert relative(*gradients) < 1e-6


def test_the_vocabulary_can_grow(loaded: Any, tmp_path: Path) -> None:
    before = loaded(torch.tensor([PROMPT])).logits.detach()
    loaded.resize_token_embeddings(70, mean_resizing=False)
    after = loaded(torch.tensor([[*PROMPT, 69]])).logits
    assert loaded.config.vocab_size == loaded.model.config.vocab_size == 70
    assert relative(after[:, :-1, :61], before) < 1e-6 and after.isfinite().all()
    loaded.save_pretrained(tmp_path)
    again = type(loaded).from_pretrained(tmp_path)
    assert torch.equal(again(torch.tensor([[*PROMPT, 69]])).logits, after)


def test_save_and_load_round_trip(loaded: Any, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path)
    again, info = type(loaded).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), again.parameters(), strict=True))
    assert again.config.to_model_config() == loaded.config.to_model_config()
    assert again.generation_config.eos_token_id == 1 and again.generation_config.pad_token_id == 0


def test_a_dtype_is_taken_at_loading(folders: dict[str, Path], model_class: Any) -> None:
    model = model_class.from_pretrained(folders["linear"], dtype=torch.bfloat16).eval()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    with torch.no_grad():
        out = model(torch.tensor([PROMPT]), use_cache=True)
        reference = build(ARCHITECTURES["linear"])(torch.tensor([PROMPT]))[0]
    assert relative(out.logits, reference) < 3e-2
    assert out.past_key_values.past.layers[0].S.dtype == torch.float32
    assert model.generate(torch.tensor([PROMPT]), max_new_tokens=3).shape[1] > len(PROMPT)


def test_the_auto_classes_know_the_model_where_the_package_is(folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    config = OpenLMLinearConfig.from_model_config(ARCHITECTURES["linear"])
    assert type(AutoModelForCausalLM.from_config(config)) is OpenLMLinearForCausalLM
    assert config.hidden_size == 32 and config.num_hidden_layers == 2 and config.max_position_embeddings == 64
    assert OpenLMLinearConfig.from_pretrained(folders["softmax_gqa_tied"]).tie_word_embeddings
    assert OpenLMLinearConfig.from_pretrained(folders["linear"]).to_model_config() == build(tiny("linear")).config


def test_only_what_no_checkpoint_gave_is_drawn(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    options = {"feature_map_init": "identity"}
    config = OpenLMLinearConfig.from_model_config(tiny("linear", options))
    torch.manual_seed(1)
    model = OpenLMLinearForCausalLM(config)
    eye = torch.eye(8)
    drawn = model.model.layers[0].attention._totrain_embed.weight
    assert torch.equal(drawn[8:16, 8:16], eye) and drawn.count_nonzero() == 32
    with torch.no_grad():
        drawn.fill_(0.5)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = ["model.layers.0.attention._totrain_embed.bias", "model.layers.1.feed_forward.w3.weight"]
    save_file({k: v for k, v in weights.items() if k not in missing}, tmp_path / "model.safetensors", {"format": "pt"})
    again = OpenLMLinearForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, value in weights.items():
        if name not in missing:
            assert torch.equal(again[name], value), name
    assert again[missing[0]].count_nonzero() == 0
    assert 0.5 < again[missing[1]].std() / weights[missing[1]].std() < 2


# ---- the command and its failures ------------------------------------------------------------------------------


def test_the_command_writes_casts_and_reports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import open_lm_linear.pretrained as pretrained

    monkeypatch.setattr(pretrained, "load_pretrained", lambda source, **_: build(ARCHITECTURES["linear"]))
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda source: make_tokenizer())
    run = tmp_path / "step"
    run.mkdir()
    record = {"tokens": 60000, "config": {"pretrained": {"pretrained": "some/teacher"}}}
    (run / "state.json").write_text(json.dumps(record))
    folder = tmp_path / "out"
    export.main([str(run), str(folder), "--dtype", "bfloat16"])
    assert "the cast to bfloat16 changed them" in capsys.readouterr().out
    names = {p.name for p in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    card = (folder / "README.md").read_text()
    assert "base_model: some/teacher" in card and "60,000 tokens" in card and "bfloat16" in card
    values = json.loads((folder / "config.json").read_text())
    assert values["dtype"] == "bfloat16" and values["auto_map"] == export.AUTO_MAP
    assert not list(tmp_path.glob(".*.partial"))
    with pytest.raises(UserError, match="not empty"):
        export.main([str(run), str(folder)])


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    model = build(ARCHITECTURES["linear"])
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        export_hf(model, tmp_path)
    with pytest.raises(UserError, match="holds no export"):
        export_hf(model, tmp_path, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        export_hf(model, tmp_path / "mine.txt")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = build(tiny("linear", vocab_size=40))
    with pytest.raises(UserError, match="61 tokens and the model only 40"):
        export_hf(model, tmp_path / "out", tokenizer=make_tokenizer())


def test_a_wrong_export_is_noticed_and_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(attentions: Any) -> str:
        source = bundle(attentions)
        assert "GROUP_NORM_EPS = 1e-5" in source
        return source.replace("GROUP_NORM_EPS = 1e-5", "GROUP_NORM_EPS = 1e-1")

    monkeypatch.setattr(export, "bundle", wrong)
    with pytest.raises(ExportError, match="differ from the model's"):
        export_hf(build(ARCHITECTURES["linear"]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_an_export(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build(ARCHITECTURES["linear"])
    with torch.no_grad():
        logits = model(torch.tensor([[(7919 * i + 1) % 61 for i in range(16)]]))[0]
    monkeypatch.setattr(export, "_stranger_logits", lambda folder, ids: logits)
    export_hf(model, tmp_path / "out", max_shard_size="5KB")
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    export_hf(model, tmp_path / "out", overwrite=True)
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "out" / "mine.txt").exists()


def test_the_exported_file_is_whole() -> None:
    """Every global name that it uses is defined in it, and it imports nothing but torch and transformers."""
    source = bundle({"linear", "softmax"})
    imported = {n.module or "" for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
    assert {name.split(".")[0] for name in imported} <= {"torch", "transformers", *sys.stdlib_module_names}
    code = compile(source, "bundle", "exec")
    known = {*dir(builtins), "__name__"}
    known |= {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}
    waiting, used = [code], set()
    while waiting:
        part = waiting.pop()
        waiting += [c for c in part.co_consts if isinstance(c, types.CodeType)]
        used |= {i.argval for i in dis.get_instructions(part) if i.opname == "LOAD_GLOBAL"}
    assert used <= known, used - known


def test_two_meanings_of_a_name_cannot_be_bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    from open_lm_linear.hf import bundle as bundler

    read = bundler._read

    def other(name: str) -> str:
        if name != "open_lm_linear.rotary":
            return read(name)
        source = read(name).replace("def _turn(self", "tool = _require_positive_int\n\n    def _turn(self")
        return source + "\n\ndef _require_positive_int(x):\n    return x\n"

    monkeypatch.setattr(bundler, "_read", other)
    with pytest.raises(AssertionError, match="mean different things by _require_positive_int"):
        bundle({"linear"})


def test_what_a_config_cannot_be_is_one_sentence() -> None:
    with pytest.raises(UserError, match="'hidden_dim' is missing"):
        OpenLMLinearConfig()
    with pytest.raises(UserError, match="lives outside open_lm_linear"):
        bundle({"somewhere.else:Attention"})
    model = OpenLMLinearForCausalLM(OpenLMLinearConfig.from_model_config(tiny("linear")))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(torch.tensor([PROMPT]), attention_mask=torch.ones(1, 1, 7, 7))
