"""Softmax over a window and sinks, alone and beside linear attention, each against its formula written out."""

from __future__ import annotations

import pytest
import torch
from conftest import relative, tiny

from open_lm_linear import attention
from open_lm_linear.attention.linear import lightning_slopes
from open_lm_linear.attention.linear_window import LinearWindowAttention
from open_lm_linear.attention.softmax import SoftmaxAttention
from open_lm_linear.attention.window import WindowAttention
from open_lm_linear.cli import UserError
from open_lm_linear.hf.export import export_hf
from open_lm_linear.model import create_model

TOKENS = 50
GQA = {"n_heads_kv": 2}


def awake(layer):
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.double()


def near_mask(window: int, sinks: int) -> torch.Tensor:
    """(T, T), True where softmax sees."""
    i, j = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    return (j <= i) & ((i - j < window) | (j < sinks))


def scores_of(layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax's scores (B, H, T, T) and values (B, T, H, V)."""
    a = layer.arch
    q, k, v = layer._project(x)
    rotary = layer.near_rotary if isinstance(layer, LinearWindowAttention) else layer.rotary
    q, k = rotary(q, k, torch.arange(TOKENS)[None])
    groups = a.n_heads // a.kv_heads
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    return torch.einsum("bihd,bjhd->bhij", q, k) * (a.query_pre_attn_scalar or a.qk_dim) ** -0.5, v


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (1, 1), (7, 0), (7, 3), (8, 8), (50, 4), (200, 0)])
def test_a_window_is_the_masked_softmax(window, sinks):
    layer = awake(WindowAttention(tiny("window", **GQA), {"window": window, "sinks": sinks}, 0))
    x = torch.randn(2, TOKENS, 32, dtype=torch.float64)
    scores, v = scores_of(layer, x)
    weights = scores.masked_fill(~near_mask(window, sinks), float("-inf")).softmax(-1)
    expected = layer.out_proj(torch.einsum("bhij,bjhv->bihv", weights, v).flatten(2))
    assert relative(layer(x, torch.arange(TOKENS)[None])[0], expected) < 1e-6


def test_a_window_over_everything_is_softmax_attention():
    softmax, window = SoftmaxAttention(tiny("softmax"), {}, 0), WindowAttention(tiny("window"), {"window": TOKENS}, 0)
    window.load_state_dict(softmax.state_dict())
    x, where = torch.randn(2, TOKENS, 32), torch.arange(TOKENS)[None]
    assert relative(window(x, where)[0], softmax(x, where)[0]) < 1e-5
    assert window.new_keys() == set()


@pytest.mark.parametrize("rotary_at", ["features", "projection"])
@pytest.mark.parametrize("normaliser", ["sum", "group_norm"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (6, 2), (60, 0)])
def test_a_token_is_near_or_far_and_never_both(rotary_at, normaliser, window, sinks):
    options = {"window": window, "sinks": sinks, "normaliser": normaliser, "rotary_at": rotary_at}
    layer = awake(LinearWindowAttention(tiny("linear_window"), {**options, "feature_activation": "elu"}, 0))
    x, where = torch.randn(2, TOKENS, 32, dtype=torch.float64), torch.arange(TOKENS)[None]
    near, far = near_mask(window, sinks), ~near_mask(window, sinks) & torch.ones(TOKENS, TOKENS).tril().bool()
    scores, v = scores_of(layer, x)
    scores = scores.masked_fill(~near, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True)).exp()

    queries, keys = layer._pairs(*_projected(layer, x, where), v, where)
    age = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) - window).double()
    decay = torch.exp(-torch.tensor(lightning_slopes(4)).double()[:, None, None] * age) * far
    turned = torch.einsum("bihf,bjhf->bhij", queries[0], keys[0]) * decay
    bare = torch.einsum("bihf,bjhf->bhij", queries[-1], keys[-1]) * decay
    mix = layer._totrain_mix.weight.double()[:, None, None]
    if normaliser == "sum":
        share = torch.sigmoid(mix)
        total = (share * weights + (1 - share) * bare).sum(-1)
        out = torch.einsum("bhij,bjhv->bihv", (share * weights + (1 - share) * turned) / total[..., None], v)
    else:
        out = torch.einsum("bhij,bjhv->bihv", turned, v)
        out = (out - out.mean(-1, True)) / (out.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        out = torch.einsum("bhij,bjhv->bihv", weights / weights.sum(-1, True), v) + mix[..., 0] * out
    assert relative(layer(x, where)[0], layer.out_proj(out.flatten(2))) < 1e-6


def _projected(layer, x, where):
    q, k, _ = layer._project(x)
    return layer.near_rotary(q, k, where) if layer.config.rotary_at == "projection" else (q, k)


@pytest.mark.parametrize("name", ["window", "linear_window", "lolcats"])
def test_the_state_has_one_size(name):
    model = create_model(tiny(name, {"window": 5}))
    sizes = set()
    with torch.no_grad():
        for tokens in (1, 4, 30, 90):
            past = model(torch.arange(tokens)[None] % 61, use_cache=True)[2]
            sizes.add(past.nbytes())
    assert len(sizes) == 1 and model.state_bytes(1, 10) == model.state_bytes(1, 10**6)


def test_at_first_the_far_part_of_an_unshared_denominator_is_silent():
    torch.manual_seed(0)
    window, both = WindowAttention(tiny("window"), {"sinks": 0}, 0), LinearWindowAttention(tiny("linear_window"), {}, 0)
    both.load_state_dict({**both.state_dict(), **window.state_dict()})
    x, where = torch.randn(1, 90, 32), torch.arange(90)[None]
    assert relative(both(x, where)[0], window(x, where)[0]) < 1e-6


@pytest.mark.parametrize(
    ("name", "options", "fields", "named"),
    [
        ("window", {"window": 0}, {}, "window must be 1 or more"),
        ("linear_window", {"window": 3, "sinks": 4}, {}, "sinks at most as many"),
        ("linear_window", {"qk_norm_at": "features"}, {"qk_norm": True}, "qk_norm_at projection"),
    ],
)
def test_what_cannot_be_is_one_sentence(name, options, fields, named):
    with pytest.raises(UserError, match=named):
        create_model(tiny(name, options, **fields))


def test_lolcats_is_hedgehog_beside_a_window():
    (_, hedgehog), (name, lolcats) = attention.PRESETS["hedgehog"], attention.PRESETS["lolcats"]
    assert (name, lolcats) == ("linear_window", {**hedgehog, "window": 64})


@pytest.mark.parametrize("name", ["window", "lolcats"])
def test_an_export_carries_the_window(name, tmp_path):
    exported = export_hf(create_model(tiny(name, {"window": 5})), tmp_path / "hf")
    assert exported.differences.reloaded < 1e-5
