"""Conversion: the plan from headers, the copy and its proof, shards under FSDP2, teacher parity and what breaks it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative, tiny
from ranks import Ranks
from safetensors.torch import load_file, save_file
from test_families import IDS, our_logits, random_model

import open_lm_linear as oll
from open_lm_linear import parity
from open_lm_linear.cli import UserError
from open_lm_linear.convert import main, plan_text
from open_lm_linear.pretrained import open_source
from open_lm_linear.pretrained.copies import convert, prepare
from open_lm_linear.pretrained.gguf_files import GGUFReader


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "open_lm_linear.convert", *words], capture_output=True, text=True)


def test_the_plan_names_groups_changes_and_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_model(tmp_path / "m", "gemma2", head_dim=10, sliding_window=9)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    main([str(tmp_path / "m"), "--plan", "--attn-name", "linear", "--no-use-decay", "--feature-map", "per_head"])
    text = capsys.readouterr().out
    assert "(gemma2)" in text and '"use_decay": false' in text and '"feature_map": "per_head"' in text
    rows = {tuple(line[:31].split()): line.split()[-4:] for line in text.splitlines() if line[23:31].strip()}
    new = 3 * (6 * 10 * 10 + 60 + 2 * 10 * 10 + 20)
    assert f"{new:,}" in next(line for line in text.splitlines() if line.startswith("feature maps")).split()
    assert any(line.startswith("output") and " tied " in line for line in text.splitlines()), rows
    for change in ("attention softmax -> linear", "the sliding window of 9 tokens is dropped", "the cap of"):
        assert f"change: {change}" in text
    assert sorted(p.name for p in tmp_path.rglob("*")) == before  # nothing is written


def test_the_plan_reads_headers_alone(tmp_path: Path) -> None:
    random_model(tmp_path, "llama")
    source = open_source(str(tmp_path))
    text = plan_text(prepare(source, "linear"))
    assert "feature maps" in text and source.reader.bytes_read == 0


def test_a_copy_is_the_model_and_carries_its_checksums(tmp_path: Path) -> None:
    random_model(tmp_path / "m", "qwen3", head_dim=10)
    done = convert(prepare(open_source(str(tmp_path / "m")), "linear", seed=3), tmp_path / "c", max_shard_bytes=9000)
    assert done.files == len(list((tmp_path / "c").glob("*.safetensors"))) > 3
    direct = oll.load_pretrained(tmp_path / "m", attn_name="linear", seed=3)
    copy = oll.load_pretrained(tmp_path / "c")
    assert copy.config == direct.config
    assert all(torch.equal(value, copy.state_dict()[key]) for key, value in direct.state_dict().items())
    record = json.loads((tmp_path / "c" / "state.json").read_text())
    assert set(record["sha256"]) == set(direct.state_dict())
    source = open_source(str(tmp_path / "c"))
    assert source.untrained == direct.new_keys() and source.family == "qwen3"


def test_dtypes_are_kept_or_chosen(tmp_path: Path) -> None:
    model = random_model(tmp_path / "m", "llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "m")
    convert(prepare(open_source(str(tmp_path / "m")), "linear"), tmp_path / "kept")
    assert {v.dtype for v in load_file(tmp_path / "kept" / "model.safetensors").values()} == {torch.bfloat16}
    convert(prepare(open_source(str(tmp_path / "m")), format="hf", dtype=torch.float32), tmp_path / "wide")
    assert {v.dtype for v in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_a_flipped_bit_that_no_header_shows_is_caught_by_the_checksum(tmp_path: Path) -> None:
    random_model(tmp_path / "m", "llama")
    convert(prepare(open_source(str(tmp_path / "m"))), tmp_path / "c")
    oll.load_pretrained(tmp_path / "c")
    path = tmp_path / "c" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"c/model.safetensors: 'output.weight' is not what the conversion wrote"):
        oll.load_pretrained(tmp_path / "c")
    path.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"half-written checkpoint: model.safetensors has \d+ bytes"):
        oll.load_pretrained(tmp_path / "c")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    random_model(tmp_path / "m", "llama")
    job = prepare(open_source(str(tmp_path / "m")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="mine"):
            convert(job, tmp_path / "mine", overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    convert(job, tmp_path / "c")
    with pytest.raises(UserError, match="is not empty"):
        convert(job, tmp_path / "c")
    convert(job, tmp_path / "c", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "m", "mine"]  # nothing half-written beside them


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_lm_linear.pretrained import copies

    random_model(tmp_path / "m", "llama")
    job = prepare(open_source(str(tmp_path / "m")))
    monkeypatch.setattr(copies, "tensor_checksums", lambda path: {"norm.weight": "0"})
    with pytest.raises(RuntimeError, match="does not read back from the disk as it was written"):
        convert(job, tmp_path / "c")
    monkeypatch.undo()
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="the disk has 100 bytes left"):
        convert(job, tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_only_softmax_models_go_out_to_transformers(tmp_path: Path) -> None:
    random_model(tmp_path, "llama")
    with pytest.raises(UserError, match=r"export a linear one with `python -m open_lm_linear.export`"):
        prepare(open_source(str(tmp_path)), "linear", format="hf")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "nothing to do: give a folder to write, --plan or --verify"),
        (("--plan", "--pretrained", "x"), "--pretrained is the source"),
        (("c", "--max-shard-gb", "0"), "--max-shard-gb must be above 0"),
        (("--plan", "--attn-name", "linaer"), "unknown attention 'linaer'"),
        (("--verify", "--layers", "9"), "--layers 9: the model has 3"),
        (("--verify", "--tokens", "0"), "--tokens must be at least 1"),
        (("--verify", "--text", "nowhere.txt"), "--text nowhere.txt is not a readable UTF-8 file"),
    ],
)
def test_flags_that_make_no_sense_are_one_sentence(words: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    random_model(tmp_path, "llama")
    with pytest.raises(UserError) as error:
        main([str(tmp_path), *words])
    assert sentence in str(error.value)


def test_the_command_writes_and_verifies_and_exits_with_2(tmp_path: Path) -> None:
    random_model(tmp_path / "m", "mistral", sliding_window=9)
    done = command(str(tmp_path / "m"), str(tmp_path / "c"), "--attn-name", "linear", "--verify", "--tokens", "40")
    assert done.returncode == 0, done.stderr
    assert "parity: " in done.stdout and "read back with equal SHA-256" in " ".join(done.stdout.split())
    assert oll.load_pretrained(tmp_path / "c").config.attn_name == "linear"
    done = command(str(tmp_path / "m"), "--verify", "--tokens", "40", "--rotary-scale", "2")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: ") and "part at" in done.stderr
    (tmp_path / "m" / "model.safetensors").unlink()
    done = command(str(tmp_path / "m"), "--plan")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- shards --------------------------------------------------------------------------------------------------------

RANKS = """
import json, sys
import torch
from open_lm_linear import parallel, pretrained
from open_lm_linear.model import Transformer, swap

torch.set_num_threads(1)
cfg = parallel.ParallelConfig(device="cpu", precision="fp32", fsdp=True)
with parallel.setup(cfg) as ctx:
    source = pretrained.open_source(sys.argv[1])
    attn_name, changes = sys.argv[2] or None, json.loads(sys.argv[3])
    config = swap(source.config, attn_name, **changes)
    with torch.device("meta"):
        model = Transformer(config)
    model = parallel.apply(model, cfg, ctx)
    model.to_empty(device="cpu")
    pretrained.load_weights(model, source, 5)
    kept = sum(p.to_local().nbytes for n, p in model.named_parameters() if n not in model.new_keys())
    single = pretrained.load_pretrained(sys.argv[1], attn_name, seed=5, **changes).state_dict()
    equal = all(torch.equal(parallel.whole(p).detach(), single[n]) for n, p in model.named_parameters())
    with open(f"{sys.argv[4]}.{ctx.rank}", "w") as file:
        json.dump({"read": source.reader.bytes_read, "kept": kept, "equal": equal}, file)
"""


@pytest.mark.parametrize(
    ("kind", "attn_name", "changes"),
    [("qwen2", "linear", {}), ("phi3", "", {"positional_embedding_type": "llama_rotary"}), ("llama", "", {})],
)
def test_each_rank_reads_the_rows_of_its_shards_alone(
    kind: str, attn_name: str, changes: dict[str, Any], tmp_path: Path, ranks: Ranks
) -> None:
    random_model(tmp_path / "m", kind, vocab_size=601)
    script, out = tmp_path / "ranks.py", tmp_path / "out"
    script.write_text(RANKS)
    argv = [str(tmp_path / "m"), attn_name, json.dumps(changes), str(out)]
    assert ranks.run(2, argv, program=script) == [0, 0], ranks.text()
    found = [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]
    assert all(rank["equal"] for rank in found)
    for rank in found:
        # Where rows change places inside a head, the head at the seam is read by both sides.
        assert rank["kept"] <= rank["read"] <= rank["kept"] * (1.05 if changes else 1.0)


# ---- parity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "phi3", "olmo2", "gemma3_text", "smollm3"])
def test_parity_holds_whole_and_at_reduced_depth(kind: str, tmp_path: Path) -> None:
    random_model(tmp_path, kind)
    for layers, mark in ((0, "("), (2, "(the first 2 of 3 layers)")):
        text = parity.verify(open_source(str(tmp_path)), tokens=30, layers=layers)
        assert "parity: " in text and mark in text and "30 made-up tokens" in text


def test_parity_takes_the_depth_that_the_memory_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import psutil

    random_model(tmp_path, "llama")
    source = open_source(str(tmp_path))
    model = oll.load_pretrained(tmp_path)
    block = sum(p.numel() for p in model.layers[0].parameters())
    ends = sum(p.numel() for p in model.parameters()) - 3 * block
    for depth in (2, 1):
        free = parity.SPARE + 8 * (ends + depth * block) + 8 * block // 2
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: type("Memory", (), {"available": free}))
        assert f"(the first {depth} of 3 layers)" in parity.verify(source, tokens=20)
        assert f"comparing its first {depth} layers" in capsys.readouterr().out
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": parity.SPARE}))
    with pytest.raises(UserError, match="two copies of one layer take more than"):
        parity.verify(source, tokens=20)


def test_parity_of_other_formats_goes_through_our_table(tmp_path: Path) -> None:
    random_model(tmp_path / "m", "qwen3", head_dim=10)
    convert(prepare(open_source(str(tmp_path / "m")), positional_embedding_type="llama_rotary"), tmp_path / "c")
    text = parity.verify(open_source(str(tmp_path / "c")), tokens=30)
    assert "Qwen3ForCausalLM, filled through our table," in text


def test_parity_names_the_first_layer_and_tensor_that_depart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_model(tmp_path, "llama")
    load = parity.load_weights

    def spoilt(model: Any, *args: Any, **kwargs: Any) -> Any:
        matched = load(model, *args, **kwargs)
        with torch.no_grad():
            model.layers[1].feed_forward.w3.weight[0] += 0.5
        return matched

    monkeypatch.setattr(parity, "load_weights", spoilt)
    with pytest.raises(parity.ParityError) as error:
        parity.verify(open_source(str(tmp_path)), tokens=30)
    message = str(error.value)
    assert "they part at 'layers.1.feed_forward'" in message
    assert "the first tensor that differs is 'layers.1.feed_forward.w3.weight'" in message
    assert "model.layers.1.mlp.down_proj.weight" in message


def test_parity_names_a_computation_that_departs(tmp_path: Path) -> None:
    random_model(tmp_path, "llama")
    with pytest.raises(parity.ParityError, match=r"part at 'layers.0.attention', where every tensor is the same"):
        parity.verify(open_source(str(tmp_path)), tokens=30, rotary_base_frequency=77.0)


def test_parity_has_nothing_to_say_of_a_linear_model(tmp_path: Path) -> None:
    random_model(tmp_path / "m", "llama")
    convert(prepare(open_source(str(tmp_path / "m")), "linear"), tmp_path / "c")
    with pytest.raises(UserError, match="is a linear model: transformers has none to compare with"):
        parity.verify(open_source(str(tmp_path / "c")))


@pytest.mark.network
def test_smollm2_passes_verify_on_real_text() -> None:
    try:
        source = open_source("smollm2")
    except UserError as error:
        pytest.skip(f"the model cannot be had here: {error}")
    assert isinstance(source.reader, GGUFReader)
    text = parity.verify(source, tokens=512)
    assert "512 tokens of the Python documentation" in text and "which read the GGUF file itself," in text
    assert float(text.split(" differ by ")[1].split()[0]) < 1e-4


# ---- uptraining from what was converted ----------------------------------------------------------------------------


def test_new_parameters_of_a_copy_are_still_new_to_the_trainer(tmp_path: Path) -> None:
    random_model(tmp_path / "m", "llama")
    convert(prepare(open_source(str(tmp_path / "m")), "linear"), tmp_path / "c")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "c" / "model.safetensors").read_bytes())
    train = [sys.executable, "-m", "open_lm_linear.main", "--dataset-type", "synthetic", "--train-num-samples", "64"]
    train += ["--global-batch-size", "2", "--seq-len", "16", "--dry-run", "--device", "cpu", "--warmup", "0"]
    copy = ["--pretrained", str(tmp_path / "c"), "--attn-name", "linear"]
    bare = ["--pretrained", str(tmp_path / "w.safetensors"), "--model", str(tmp_path / "c" / "model.json")]
    for words, new in ((copy, True), (bare, False)):
        done = subprocess.run([*train, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("new in each attention: _totrain_embed" in done.stdout) is new, done.stdout


def test_the_state_is_kept_where_a_window_slides_over_it(tmp_path: Path) -> None:
    model = oll.create_model(tiny("softmax", n_heads_kv=2, sliding_window=5, vocab_size=61))
    with torch.no_grad():
        whole, _, past = model(IDS, use_cache=True)
    assert past is not None and past.nbytes() == model.state_bytes(2, 45) * 2  # float32, and 5 tokens of 45
    assert relative(our_logits(model, 21), whole) < 1e-5
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    ids = torch.cat((IDS[:, :7] * 0, IDS), 1)
    mask = torch.ones_like(ids)
    mask[:, :7] = 0
    with torch.no_grad():
        assert relative(model(ids, attention_mask=mask)[0][:, 7:], whole) < 1e-5
