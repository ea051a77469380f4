"""Every format in, and every damaged, malicious or ill-fitting file refused by a sentence with its name."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative, tiny
from safetensors.torch import load_file, save_file
from test_families import IDS, our_logits, random_model, their_logits

import open_lm_linear as oll
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer, read_config
from open_lm_linear.pretrained import load_tokenizer, open_source
from open_lm_linear.pretrained.families import FAMILIES, expand
from open_lm_linear.pretrained.llama_cpp import keys_from_gguf
from open_lm_linear.pretrained.meta import KEYS as META_KEYS

GOLDEN = Path(__file__).parent / "golden"
OPENLM = Path(__file__).parent / "openlm"  # as its trainer and its Hugging Face classes write them


# ---- OpenLM and linear_open_lm -------------------------------------------------------------------------------------


def golden(name: str) -> tuple[Transformer, dict[str, torch.Tensor], torch.Tensor]:
    """The model of a fixture, its weights and its inputs' logits."""
    folder = GOLDEN / name
    io = load_file(folder / "io.safetensors")
    return oll.create_model(folder / "config.json"), load_file(folder / "weights.safetensors"), io


def checkpoint_file(path: Path, state: dict[str, torch.Tensor], prefix: str) -> None:
    """As OpenLM's trainer writes it."""
    named = {prefix + key: value for key, value in state.items()}
    record = {"epoch": 1, "name": "run", "state_dict": named, "is_final_checkpoint": False, "step": 7}
    torch.save(record | {"evaluation_metrics": [], "next_shard_per_source": [3], "samples_seen": 24}, path)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("name", ["linear_decay_qknorm", "softmax_gqa_mistral", "softmax_head_rotary_gelu"])
def test_a_pt_file_of_openlm_gives_the_recorded_logits(name: str, prefix: str, tmp_path: Path) -> None:
    _, state, io = golden(name)
    checkpoint_file(tmp_path / "epoch_1.pt", state, prefix)
    model = oll.load_pretrained(tmp_path / "epoch_1.pt", model=str(GOLDEN / name / "config.json"))
    with torch.no_grad():
        assert relative(model(io["input_ids"])[0], io["logits"]) < 1e-5


@pytest.mark.parametrize("name", ["linear_decay_qknorm", "softmax_gqa_mistral"])
def test_a_file_of_its_trainer_gives_the_recorded_logits(name: str) -> None:
    _, state, io = golden(name)
    file = OPENLM / f"{name}.pt"
    model = oll.load_pretrained(file, model=str(GOLDEN / name / "config.json"))
    with torch.no_grad():
        assert relative(model(io["input_ids"])[0], io["logits"]) < 1e-5
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["linear_gqa_mistral", "linear_gqa_mistral_sharded"])
def test_a_folder_of_its_classes_generates_the_recorded_tokens(name: str) -> None:
    from open_lm_linear.generate import generate

    _, _, io = golden("linear_gqa_mistral")
    model = oll.load_pretrained(OPENLM / name)
    with torch.no_grad():
        assert relative(model(io["input_ids"])[0], io["logits"]) < 1e-5
    expected = json.loads((OPENLM / name / "expected.json").read_text())
    out = generate(model, torch.tensor([expected["prompt"]]), max_new_tokens=16)
    assert out[0, len(expected["prompt"]) :].tolist() == expected["greedy_16"]


def test_bare_weights_in_pt_and_safetensors(tmp_path: Path) -> None:
    _, state, io = golden("linear_gqa_mistral")
    config = str(GOLDEN / "linear_gqa_mistral" / "config.json")
    torch.save(state, tmp_path / "bare.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "bare.safetensors")
    for file in ("bare.pt", "old.pt", "bare.safetensors"):
        model = oll.load_pretrained(tmp_path / file, model=config)
        with torch.no_grad():
            assert relative(model(io["input_ids"])[0], io["logits"]) < 1e-5
    with pytest.raises(UserError, match="holds weights and not their architecture: give it with --model"):
        oll.load_pretrained(tmp_path / "bare.pt")


def test_a_doubled_name_must_agree(tmp_path: Path) -> None:
    _, state, _ = golden("softmax_head_rotary_gelu")
    doubled = next(key for key in state if "_ff_w1." in key)
    checkpoint_file(tmp_path / "epoch_1.pt", {**state, doubled: state[doubled] + 1}, "")
    with pytest.raises(UserError, match=r"_ff_w1.* name one tensor but hold different values"):
        oll.load_pretrained(tmp_path / "epoch_1.pt", model=str(GOLDEN / "softmax_head_rotary_gelu" / "config.json"))


def test_a_run_of_openlm_says_its_architecture_in_params_txt(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "params.txt").write_text(
        "model: open_lm_11m\nmodel_norm: gain_only_lp_layer_norm\nqk_norm: True\nlr: 0.003\nname: a: b\n"
        "positional_embedding_type: rotary\nattn_name: auto\nn_heads_kv: 1\nffn_type: swiglu\nval_data: None\n"
    )
    model = oll.create_model("open_lm_11m", qk_norm=True, model_norm="gain_only_lp_layer_norm")
    for epoch, scale in ((2, 1.0), (10, 2.0)):
        state = {key: value * scale for key, value in model.state_dict().items()}
        checkpoint_file(run / "checkpoints" / f"epoch_{epoch}.pt", state, "module.")
    loaded = oll.load_pretrained(run)  # the newest, by number
    assert loaded.config == model.config
    assert torch.equal(loaded.norm.weight, 2 * model.norm.weight)
    second = oll.load_pretrained(run / "checkpoints" / "epoch_2.pt")
    assert torch.equal(second.norm.weight, model.norm.weight)


def openlm_folder(folder: Path, **changes: Any) -> torch.Tensor:
    """A Hugging Face folder as linear_open_lm saves them; the fixture's logits."""
    folder.mkdir()
    _, state, io = golden("linear_gqa_mistral")
    values = json.loads((GOLDEN / "linear_gqa_mistral" / "config.json").read_text())
    names = {"hidden_dim": "dim", "model_norm": "norm_type", "qk_norm": "apply_qk_norm"}
    values = {names.get(k, k): v for k, v in values.items()}
    config = {"model_type": "openlm", "architectures": ["OpenLMForCausalLM"], "attn_name": "linear_attn", "moe_freq": 0}
    config |= {"dtype": "float32", **values, **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    save_file({f"model.{key}": value for key, value in state.items()}, folder / "model.safetensors")
    return io


def test_a_hugging_face_folder_of_linear_open_lm(tmp_path: Path) -> None:
    io = openlm_folder(tmp_path / "a")
    model = oll.load_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert relative(model(io["input_ids"])[0], io["logits"]) < 1e-5
    openlm_folder(tmp_path / "b", n_heads_kv="gone", dtype="bfloat16")  # the reference would take 8
    source = open_source(str(tmp_path / "b"))
    assert source.config == open_source(str(tmp_path / "a")).config
    assert "--rotary-rounding bfloat16" in source.notes[0]


def test_a_linear_checkpoint_goes_on_as_a_linear_model(tmp_path: Path) -> None:
    openlm_folder(tmp_path / "a")
    model = oll.load_pretrained(tmp_path / "a", attn_name="linear", use_decay=False)
    assert model.config.attn_options["use_decay"] is False
    assert open_source(str(tmp_path / "a")).config.attn_options["use_decay"] is True
    with pytest.raises(UserError, match=r"_totrain_embed.* has shape .* in the checkpoint, .* in the model"):
        oll.load_pretrained(tmp_path / "a", feature_map="per_head")
    with pytest.raises(UserError, match="without a place in this model: .*_totrain_embed"):
        oll.load_pretrained(tmp_path / "a", attn_name="softmax")
    with pytest.raises(UserError, match="its features were trained in the layout rotary"):
        oll.load_pretrained(tmp_path / "a", positional_embedding_type="llama_rotary")


# ---- Meta ----------------------------------------------------------------------------------------------------------


def meta_folder(folder: Path, state: dict[str, torch.Tensor], parts: int, **params: Any) -> None:
    """Our test model as Meta would ship it: pairs interleaved, every matrix cut into ``parts``."""
    folder.mkdir()
    tensors = {}
    for ours, theirs in expand(META_KEYS, 2).items():
        sizes = [32, 16, 16] if "in_proj" in ours else [state[ours].shape[0] // len(theirs)] * len(theirs)
        for name, rows in zip(theirs, state[ours].split(sizes), strict=True):
            if name.endswith(("wq.weight", "wk.weight")):
                rows = rows.unflatten(0, (-1, 2, 4)).transpose(1, 2).flatten(0, 2)
            tensors[name] = rows
    along_columns = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    for part in range(parts):
        cut = {
            name: value if value.dim() == 1 else value.chunk(parts, int(name.endswith(along_columns)))[part].clone()
            for name, value in tensors.items()
        }
        torch.save({**cut, "rope.freqs": torch.zeros(4)}, folder / f"consolidated.{part:02d}.pth")
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps({**sizes, "multiple_of": 16, "rope_theta": 10000.0, **params}))


@pytest.mark.parametrize("parts", [1, 2])
def test_meta_folders_come_in_in_both_layouts(parts: int, tmp_path: Path) -> None:
    model = oll.create_model(tiny("softmax", n_heads_kv=2, vocab_size=60))
    ids = IDS % 60
    meta_folder(tmp_path / "meta", model.state_dict(), parts)
    loaded = oll.load_pretrained(tmp_path / "meta")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    pairs = oll.load_pretrained(tmp_path / "meta", positional_embedding_type="llama_rotary")
    with torch.no_grad():
        assert relative(pairs(ids)[0], model(ids)[0]) < 1e-5
    assert any("does not say the trained context" in note for note in open_source(str(tmp_path / "meta")).notes)


def test_meta_params_beyond_us_are_named(tmp_path: Path) -> None:
    state = oll.create_model(tiny("softmax", n_heads_kv=2, vocab_size=60)).state_dict()
    meta_folder(tmp_path / "scaled", state, 1, use_scaled_rope=True)
    scaling = open_source(str(tmp_path / "scaled")).config.rotary_scaling
    assert scaling is not None and (scaling["rope_type"], scaling["factor"]) == ("llama3", 32.0)
    meta_folder(tmp_path / "moe", state, 1, moe={"num_experts": 8})
    with pytest.raises(UserError, match=r"params.json: the key moe = .* cannot be represented"):
        open_source(str(tmp_path / "moe"))
    meta_folder(tmp_path / "short", state, 1)
    (tmp_path / "short" / "params.json").write_text('{"dim": 32, "n_layers": 2}')
    with pytest.raises(UserError, match="params.json: the key 'n_heads' is missing"):
        open_source(str(tmp_path / "short"))


# ---- Hugging Face: .bin, revisions, URLs ---------------------------------------------------------------------------


def as_bin(folder: Path, parts: int = 1) -> None:
    """Turns a folder of safetensors into one of pickled shards."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = sorted(state)
    weight_map = {name: f"pytorch_model-{i % parts + 1:05d}-of-{parts:05d}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({n: state[n] for n in names if weight_map[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("parts", [1, 3])
def test_bin_files_come_in_by_weights_only(parts: int, tmp_path: Path) -> None:
    theirs = random_model(tmp_path, "llama")
    as_bin(tmp_path, parts)
    assert relative(our_logits(oll.load_pretrained(tmp_path)), their_logits(theirs)) < 1e-5


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the URL under which a real server hands it out."""
    pytest.importorskip("aiohttp")
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_url_works_as_a_path_does(served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, url = served
    monkeypatch.setenv("OPEN_LM_LINEAR_CACHE", str(tmp_path / "cache"))
    theirs = random_model(folder / "model", "qwen2")
    assert relative(our_logits(oll.load_pretrained(f"{url}/model")), their_logits(theirs)) < 1e-5
    model = oll.create_model(tiny("softmax", n_heads_kv=2))
    torch.save(model.state_dict(), folder / "weights.pt")
    (tmp_path / "model.json").write_text(json.dumps(model.config.to_json()))
    loaded = oll.load_pretrained(f"{url}/weights.pt", model=str(tmp_path / "model.json"))
    assert torch.equal(loaded.norm.weight, model.norm.weight)


def test_a_hub_id_may_name_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_lm_linear.pretrained import places, remote, sources

    random_model(tmp_path, "llama")
    place = places.find_place("someone/model@v2")
    assert isinstance(place, remote.HubPlace) and (place.repo, place.revision) == ("someone/model", "v2")
    asked = []

    def find(name: str) -> places.Place:
        asked.append(name)
        return places.LocalPlace(tmp_path)

    monkeypatch.setattr(sources, "find_place", find)
    assert oll.load_pretrained("someone/model@v2").config.n_layers == 3
    assert asked == ["someone/model@v2"]


# ---- GGUF ----------------------------------------------------------------------------------------------------------

GGUF_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": False}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
}


def gguf_of(folder: Path, kind: str, path: Path, quantise: bool = False) -> None:
    """The Hugging Face folder's model as llama.cpp stores it."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    theirs = FAMILIES[kind].table(config["num_hidden_layers"])
    for ours, names in keys_from_gguf(kind, config["num_hidden_layers"]).items():
        for name, source in zip(names, theirs[ours], strict=True):
            if source not in state:
                continue
            value = state[source]
            if kind in ("llama", "smollm3") and ("attn_q." in name or "attn_k." in name):
                value = value.unflatten(0, (heads if "attn_q" in name else kv, 2, -1)).transpose(1, 2).flatten(0, 2)
            array = np.ascontiguousarray(value.numpy())
            if quantise and value.dim() == 2:
                packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", GGUF_CASES)
def test_gguf_of_every_architecture_gives_the_original_logits(kind: str, tmp_path: Path) -> None:
    model_type, fields = GGUF_CASES[kind]
    theirs = random_model(tmp_path / "hf", model_type, **fields)
    gguf_of(tmp_path / "hf", kind, tmp_path / "m.gguf")
    assert relative(our_logits(oll.load_pretrained(tmp_path / "m.gguf")), their_logits(theirs)) < 1e-5


def test_a_quantised_gguf_gives_what_its_blocks_hold(tmp_path: Path) -> None:
    theirs = random_model(tmp_path / "hf", "llama", hidden_size=64, num_attention_heads=4, intermediate_size=96)
    gguf_of(tmp_path / "hf", "llama", tmp_path / "m.gguf", quantise=True)
    ours = oll.load_pretrained(tmp_path / "m.gguf")
    exact = oll.load_pretrained(tmp_path / "hf")
    difference = relative(our_logits(ours), their_logits(theirs))
    assert 1e-4 < difference < 5e-2  # eight bits, not the original's 32
    for key, value in exact.state_dict().items():
        assert relative(ours.state_dict()[key], value) < 1e-2


# ---- what is refused -----------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]


def resave(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    return damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[content.index(b'"F32"') + 2] ^= 4  # F32 -> F72
    path.write_bytes(content)


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "truncated": (cut, ("model.safetensors", "bytes")),
    "a flipped bit in the header": (flip_header, ("model.safetensors", "F7")),
    "mis-shaped": (resave(lambda s: s.update({Q: s[Q][:-1].clone()})), (Q, "has shape (59, 36)", "(60, 36)")),
    "rows that moved to a neighbour": (
        resave(lambda s: s.update({Q: torch.zeros(20, 36), Q.replace("q_", "k_"): torch.zeros(60, 36)})),
        (Q, "has shape (20, 36)"),
    ),
    "transposed": (resave(lambda s: s.update({Q: torch.zeros(30, 2, 36)})), (Q, "has shape (30, 2, 36)")),
    "a key missing": (resave(lambda s: s.pop(Q)), (f"missing from the checkpoint: {Q!r}.",)),
    "a key too many": (
        resave(lambda s: s.update({"model.extra": torch.ones(2)})),
        ("without a place in this model: 'model.extra'.",),
    ),
    "a key renamed": (
        resave(lambda s: s.update({"layers.1.q": s.pop(Q)})),
        (f"missing from the checkpoint: {Q!r}; in the checkpoint and without a place in this model: 'layers.1.q'.",),
    ),
    "integers": (resave(lambda s: s.update({Q: s[Q].to(torch.int8)})), (Q, "model.safetensors", "int8")),
    "eight-bit floats": (
        resave(lambda s: s.update({Q: s[Q].to(torch.float8_e4m3fn)})),
        (Q, "model.safetensors", "float8"),
    ),
    "no file": (lambda folder: (folder / "model.safetensors").unlink(), ("holds no weights",)),
    "no config": (lambda folder: (folder / "config.json").write_text("{"), ("config.json", "not JSON")),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_or_ill_fitting_folder_is_refused_by_name(case: str, tmp_path: Path) -> None:
    random_model(tmp_path, "llama", head_dim=10)
    damage, parts = DAMAGES[case]
    oll.load_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as error:
        oll.load_pretrained(tmp_path)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert str(tmp_path) in message and "\n" not in message


class Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("inside", ["whole", "state_dict", "beside", "value"])
@pytest.mark.parametrize("file", ["model.pt", "model.pth", "pytorch_model.bin", "consolidated.00.pth"])
def test_no_pickle_ever_runs(file: str, inside: str, new: bool, tmp_path: Path) -> None:
    bomb, model = Bomb(tmp_path / "exploded"), oll.create_model(tiny("softmax", n_heads_kv=2))
    content = {
        "whole": bomb,
        "state_dict": {"state_dict": bomb},
        "beside": {"state_dict": model.state_dict(), "args": bomb},
        "value": {**model.state_dict(), "norm.weight": bomb},
    }[inside]
    folder = tmp_path / "folder"
    random_model(folder, "llama")
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / file, _use_new_zipfile_serialization=new)
    (folder / "params.json").write_text('{"dim": 32, "n_layers": 2, "n_heads": 4}')
    (tmp_path / "model.json").write_text(json.dumps(model.config.to_json()))
    if file.startswith("consolidated"):
        (folder / "config.json").unlink()
    alone = file in ("model.pt", "model.pth")
    if file == "pytorch_model.bin":
        (folder / "params.json").unlink()
    with pytest.raises(UserError, match=f"{file} is a pickle that asks to run code") as error:
        oll.load_pretrained(folder / file if alone else folder, model=str(tmp_path / "model.json") if alone else "")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_a_flipped_bit_inside_a_pt_file_is_caught(tmp_path: Path) -> None:
    model = oll.create_model(tiny("softmax", n_heads_kv=2))
    torch.save(model.state_dict(), tmp_path / "m.pt")
    (tmp_path / "model.json").write_text(json.dumps(model.config.to_json()))
    content = bytearray((tmp_path / "m.pt").read_bytes())
    place = content.index(model.tok_embeddings.weight.detach().numpy().tobytes())
    content[place + 41] ^= 1
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"m.pt is not a whole torch file \(.*CRC"):
        oll.load_pretrained(tmp_path / "m.pt", model=str(tmp_path / "model.json"))


def test_an_architecture_is_given_where_it_is_needed_alone(tmp_path: Path) -> None:
    random_model(tmp_path, "llama")
    with pytest.raises(UserError, match="says its own architecture: leave out --model"):
        oll.load_pretrained(tmp_path, model="open_lm_11m")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    assert read_config("open_lm_11m").n_layers > 0
