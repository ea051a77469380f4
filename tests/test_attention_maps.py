"""Attention as a matrix gives the layer's own output; a model is like itself; the script writes what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import relative, tiny
from test_hf_export import make_tokenizer

from open_lm_linear import attention
from open_lm_linear.cli import UserError
from open_lm_linear.evaluation.attention_maps import likeness, matrix
from open_lm_linear.hf.export import export_hf
from open_lm_linear.model import create_model

GQA = {"n_heads_kv": 2}


@pytest.mark.parametrize(
    ("name", "options", "fields"),
    [
        ("softmax", {}, GQA),
        ("softmax", {}, {"sliding_window": 5, "attn_logit_softcap": 0.4}),
        ("linear", {"normaliser": "none"}, GQA),
        ("linear", {"normaliser": "none", "use_decay": False, "rotary_at": "projection"}, {}),
        ("hedgehog", {"normaliser": "none"}, {}),
    ],
)
def test_the_matrix_times_the_values_is_the_output(name, options, fields) -> None:
    torch.manual_seed(0)
    config = attention.expand(tiny(name, options, **fields))
    layer = attention.resolve(config.attn_name)(config, config.attn_options, 0)
    x, positions = torch.randn(2, 30, 32), torch.arange(30)[None]
    with torch.no_grad():
        v = layer._project(x)[2].repeat_interleave(config.n_heads // config.kv_heads, 2)
        out = torch.einsum("bhij,bjhv->bihv", matrix(layer, x, positions), v)
        assert relative(layer.out_proj(out.flatten(2)), layer(x, positions)[0]) < 1e-5


def test_a_model_is_like_itself_and_less_like_another() -> None:
    torch.manual_seed(0)
    teacher, student, ids = create_model(tiny("softmax")), create_model(tiny("linear")), torch.arange(40)[None]
    same, other = likeness(teacher, teacher, ids), likeness(teacher, student, ids)
    for name in ("raw", "by row"):
        assert torch.tensor(same[name].cosine).sub(1).abs().max() < 1e-6
        assert torch.tensor(same[name].singular).abs().max() < 1e-6
        cosines = torch.tensor(other[name].cosine)
        assert cosines.shape == (2, 4) and cosines.max() < 0.99
    # Softmax's rows sum to 1 already; the other's do not.
    assert same["raw"] == same["by row"] or relative(*(torch.tensor(same[n].cosine) for n in same)) < 1e-6
    assert other["raw"].singular != other["by row"].singular


@pytest.mark.parametrize(
    ("student", "named"),
    [
        (tiny("window"), "no single matrix"),
        (tiny("linear", n_layers=3), "only equal ones"),
        (tiny("lolcats"), "no single"),
    ],
)
def test_what_is_no_matrix_is_refused(student, named) -> None:
    with pytest.raises(UserError, match=named):
        likeness(create_model(tiny("softmax")), create_model(student), torch.arange(8)[None])


def test_the_script_writes_numbers_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    export_hf(create_model(tiny("softmax")), tmp_path / "teacher", tokenizer=make_tokenizer())
    script = Path(__file__).parents[1] / "eval" / "attention_similarity.py"
    flags = ["--teacher", "teacher", "--student", "teacher", "--attn-name", "linear", "--tokens", "24", "--out", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), *flags], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "similarity.json").read_text())
    assert (
        found["attn_name"] == "linear" and len(found["raw"]["cosine"]) == 2 and len(found["by row"]["singular"][0]) == 4
    )
    assert (tmp_path / "out" / "similarity.png").stat().st_size > 1000 and done.stdout.count("mean") == 4
