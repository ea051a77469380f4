"""The 16 golden models of the reference: keys, logits, hidden states and final states, in every form.

Each folder of tests/golden holds a config, weights and the outputs of the published implementation in float32 and
float64 (batch 2, 24 tokens).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import relative, spans
from safetensors.torch import load_file

from open_lm_linear import rotary
from open_lm_linear.attention import linear
from open_lm_linear.attention.linear import LinearState
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer, create_model

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
LINEAR = [n for n in NAMES if n.startswith("linear")]
CUTS = [(24,), (7, 17), (1, 5, 11, 7), (23, 1), (1,) * 24, (9, 1, 1, 13)]

Fixture = tuple[Transformer, dict[str, torch.Tensor]]


@lru_cache(maxsize=4)
def load(name: str, dtype: torch.dtype = torch.float32) -> Fixture:
    """The model of a fixture with the reference's weights, and the recorded outputs."""
    model = create_model(GOLDEN / name / "config.json", dtype=dtype)
    model.load_state_dict(load_file(GOLDEN / name / "weights.safetensors"), strict=True)
    return model.eval(), load_file(GOLDEN / name / "io.safetensors")


@torch.no_grad()
def in_calls(model: Transformer, ids: torch.Tensor, lengths: tuple[int, ...]):
    """Logits, hidden states and the past of the sequence given in calls of these lengths."""
    past, logits, hidden = None, [], []
    for span in spans(lengths):
        out, h, past = model(ids[:, span], past_key_values=past, use_cache=True)
        logits.append(out)
        hidden.append(h)
    return torch.cat(logits, 1), torch.cat(hidden, 1), past


def test_all_sixteen_are_here():
    assert len(NAMES) == 16
    assert len(LINEAR) == 9


@pytest.mark.parametrize("name", NAMES)
def test_parallel(name):
    model, io = load(name)
    with torch.no_grad():
        logits, hidden, past = model(io["input_ids"])
    assert past is None
    assert logits.dtype == torch.float32
    assert relative(logits, io["logits"]) < 1e-5
    assert relative(hidden, io["hidden"]) < 1e-5


@pytest.mark.parametrize("lengths", CUTS, ids=lambda c: "-".join(map(str, c)) if len(c) < 24 else "tokens")
@pytest.mark.parametrize("name", NAMES)
def test_any_cut(name, lengths):
    model, io = load(name)
    logits, hidden, past = in_calls(model, io["input_ids"], lengths)
    assert relative(logits, io["logits"]) < 1e-5
    assert relative(hidden, io["hidden"]) < 1e-5
    recorded = io["recurrent_logits"] if name in LINEAR else io["cached_logits"]
    assert relative(logits, recorded) < 1e-5
    assert past.positions.tolist() == [24, 24]


@pytest.mark.parametrize("lengths", [(24,), (5, 19), (1,) * 24], ids=["parallel", "two calls", "tokens"])
@pytest.mark.parametrize("name", LINEAR)
def test_final_states(name, lengths):
    """The reference's recorded state has been decayed once more, for the next token: exp(-slope) * ours."""
    model, io = load(name)
    _, _, past = in_calls(model, io["input_ids"], lengths)
    for i, state in enumerate(past.layers):
        assert isinstance(state, LinearState)
        slopes = model.layers[i].attention.slopes or (0.0,) * 4
        decayed = state.S * torch.tensor(slopes).neg().exp()[:, None, None]
        assert state.S.dtype == torch.float32
        assert relative(decayed, io[f"state.{i}"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_float64(name):
    """To float32's rounding: the reference keeps RMSNorm in float32 even then, and ours the angles and slopes."""
    model, io = load(name, torch.float64)
    with torch.no_grad():
        logits, _, _ = model(io["input_ids"])
    assert logits.dtype == torch.float64
    assert relative(logits, io["logits_f64"]) < 2e-7


@pytest.mark.parametrize("name", ["linear_head_dims_nopos", "linear_head_rotary", "softmax_head_rotary_gelu"])
def test_float64_angles_and_slopes(name, monkeypatch):
    """With these in float64 too, models without RMSNorm and without positions to turn by agree to 1e-13."""

    def frequencies(head_dim, base, scale, rounding, scaling, device):
        return 1.0 / (scale * base ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim))

    monkeypatch.setattr(rotary, "_fixed", frequencies)
    monkeypatch.setattr(linear, "_log_decay", lambda slopes, device: -torch.tensor(slopes, dtype=torch.float64))
    model, io = load(name, torch.float64)
    with torch.no_grad():
        assert relative(model(io["input_ids"])[0], io["logits_f64"]) < 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip(name):
    """What we save has one key a tensor, loads strictly and gives the same bits."""
    model, io = load(name)
    again = create_model(model.config)
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(io["input_ids"])[0], model(io["input_ids"])[0])
    assert not [k for k in model.state_dict() if "_ff_w" in k]


@pytest.mark.parametrize("name", NAMES)
def test_resolved_config_means_the_same(name, tmp_path):
    """The config written out in full, read back as a file, builds the same model."""
    model, io = load(name)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(model.config.to_json()))
    again = create_model(path)
    assert again.config == model.config
    again.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(again(io["input_ids"])[0], model(io["input_ids"])[0])


@pytest.mark.parametrize(
    ("name", "key", "other"),
    [
        ("softmax_head_rotary_gelu", "layers.1._ff_w1.weight", "feed_forward.0"),
        ("softmax_head_rotary_gelu", "layers.0._ff_w2.weight", "feed_forward.2"),
        ("softmax_gemma_geglu_tied", "output.weight", "tok_embeddings"),
    ],
)
def test_doubled_keys(name, key, other):
    """One of two names is enough; two that disagree are refused in a sentence with both names."""
    model, _ = load(name)
    weights = load_file(GOLDEN / name / "weights.safetensors")
    if key not in weights:  # tied: the fixture stores the tensor once
        weights[key] = weights["tok_embeddings.weight"].clone()
    fresh = create_model(model.config)
    fresh.load_state_dict(weights, strict=True)
    weights[key][0, 0] += 1
    with pytest.raises(UserError, match="different values") as refusal:
        fresh.load_state_dict(weights, strict=True)
    assert key in str(refusal.value)
    assert other in str(refusal.value)
    kept = next(k for k in weights if other in k and k.split(".")[:2] == key.split(".")[:2] or k == other + ".weight")
    del weights[kept]
    fresh.load_state_dict(weights, strict=True)
    assert torch.equal(fresh.state_dict()[kept], weights[key])


def test_a_missing_and_an_unknown_key_are_refused():
    model, _ = load("linear_decay_qknorm")
    weights = load_file(GOLDEN / "linear_decay_qknorm" / "weights.safetensors")
    value = weights.pop("layers.0.attention._totrain_embed.weight")
    fresh = create_model(model.config)
    with pytest.raises(RuntimeError, match="_totrain_embed.weight"):
        fresh.load_state_dict(weights, strict=True)
    weights["layers.0.attention._totrain_embed.weight"] = value
    weights["layers.0.attention.w_new"] = value
    with pytest.raises(RuntimeError, match="w_new"):
        fresh.load_state_dict(weights, strict=True)


def test_the_load_does_not_touch_the_given_weights():
    weights = load_file(GOLDEN / "softmax_head_rotary_gelu" / "weights.safetensors")
    keys = set(weights)
    model, _ = load("softmax_head_rotary_gelu")
    create_model(model.config).load_state_dict(weights, strict=True)
    assert set(weights) == keys
