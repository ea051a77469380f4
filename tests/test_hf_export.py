"""The Hugging Face export: what a stranger without this package gets, and that it is the model."""

from __future__ import annotations

import ast
import builtins
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
from conftest import relative, tiny

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError
from open_lm_linear.hf import OpenLMLinearConfig, OpenLMLinearForCausalLM, proof
from open_lm_linear.hf.bundle import bundle
from open_lm_linear.hf.export import export_hf
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
            patch.setattr(
                proof, "logits_of_a_fresh_process", lambda code, path, ids, _, m=model: m(torch.tensor([ids]))[0][0]
            )
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
    assert type(AutoModelForCausalLM.from_pretrained(folders["linear"])) is OpenLMLinearForCausalLM
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


# ---- the modeling file ------------------------------------------------------------------------------------------


def test_the_exported_file_is_whole() -> None:
    """Every global name that it uses is defined in it, and it imports nothing that it cannot do without."""
    source = bundle(attention.names())
    imported = {n.module or "" for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    imported |= {a.name for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import) for a in n.names}
    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names, "mamba_ssm"}  # tried, in a function
    assert {name.split(".")[0] for name in imported} <= allowed
    assert "ctypes" not in imported  # compiled code stays with its C++ sources, in the package
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
