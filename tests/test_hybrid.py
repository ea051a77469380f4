"""Layers that have another attention than the rest: which they are, what they keep of the teacher, what is new."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import relative, tiny

import open_lm_linear as oll
from open_lm_linear.architecture import ModelConfig, parse_attn_layers
from open_lm_linear.attention.linear import LinearAttention
from open_lm_linear.attention.softmax import SoftmaxAttention
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.convert import main as convert
from open_lm_linear.fit import fit_output_projections
from open_lm_linear.hf.export import export_hf
from open_lm_linear.model import create_model
from open_lm_linear.parallel import Context

IDS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model(tiny("softmax", n_layers=3, sliding_window=9))
    export_hf(model, tmp_path / "teacher")
    return tmp_path / "teacher"


def kinds(model: oll.Transformer) -> list[type]:
    return [type(block.attention) for block in model.blocks()]


def test_named_layers_keep_softmax_and_its_window(teacher: Path) -> None:
    model = oll.load_pretrained(teacher, "linear", attn_layers={"softmax": [0, 2]})
    assert kinds(model) == [SoftmaxAttention, LinearAttention, SoftmaxAttention]
    assert {key.split(".")[1] for key in model.new_keys()} == {"1"}
    assert model.config.sliding_window == 9 and model.layers[0].attention.window == 9
    everywhere = oll.load_pretrained(teacher, "linear", attn_layers={"softmax": [0, 1, 2]})
    with torch.no_grad():
        assert torch.equal(everywhere(IDS)[0], oll.load_pretrained(teacher)(IDS)[0])
        assert relative(model(IDS)[0], everywhere(IDS)[0]) > 1e-3


def test_a_hybrid_goes_out_and_comes_back(teacher: Path, tmp_path: Path, capsys) -> None:
    flags = ["--attn-name", "linear", "--attn-layers", "1-2=softmax"]
    convert([str(teacher), str(tmp_path / "hybrid"), *flags])
    assert "attention softmax -> linear, but softmax in layers 1, 2" in capsys.readouterr().out
    hybrid = oll.load_pretrained(tmp_path / "hybrid")
    assert kinds(hybrid) == [LinearAttention, SoftmaxAttention, SoftmaxAttention]
    export_hf(hybrid, tmp_path / "hf")  # compares a stranger's logits with ours
    back = oll.load_pretrained(tmp_path / "hf")
    with torch.no_grad():
        assert torch.equal(back(IDS)[0], hybrid(IDS)[0])
    values = json.loads(json.dumps(hybrid.config.to_json()))
    assert ModelConfig.from_json(values) == hybrid.config


def test_the_fit_passes_by_what_kept_its_attention(teacher: Path) -> None:
    old, new = oll.load_pretrained(teacher), oll.load_pretrained(teacher, "linear", attn_layers={"softmax": [1]})
    before = {name: value.clone() for name, value in new.state_dict().items()}
    explained = fit_output_projections(new, old, [IDS], Context(0, 1, torch.device("cpu"), "fp32"))
    assert explained[1] == 1.0 and max(explained[0], explained[2]) < 1.0
    changed = {name for name, value in new.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"layers.0.attention.out_proj.weight", "layers.2.attention.out_proj.weight"}


def test_layers_are_written_as_numbers_and_ranges() -> None:
    assert parse_attn_layers(["0,8-10=softmax", "3=linear", "12=softmax"]) == {
        "softmax": [0, 8, 9, 10, 12],
        "linear": [3],
    }
    flags = ["--pretrained", "smollm2", "--attn-name", "linear", "--dataset-type", "synthetic"]
    cfg = from_cli([*flags, "--train-num-samples", "8", "--attn-layers", "0,8=softmax"])
    assert cfg.model.changes()["attn_layers"] == {"softmax": [0, 8]}


@pytest.mark.parametrize("text", ["softmax", "0;1=softmax", "=softmax", "1,=softmax", "a=softmax", "0="])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not LAYERS=ATTENTION"):
        parse_attn_layers([text])


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ({"softmax": [3]}, "layers from 0 to 1"),
        ({"softmax": [0], "linear": [0]}, "layer 0 two attentions"),
        ({"softmx": [0]}, "unknown attention"),
        ({"hedgehog": [0]}, "without options"),
        ([0], "must map attentions"),
    ],
)
def test_layers_that_cannot_be_are_one_sentence(layers, named: str) -> None:
    with pytest.raises(UserError, match=named):
        create_model(tiny("linear", attn_layers=layers))
