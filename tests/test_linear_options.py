"""Linear attention's options: each against its formula written out, and the presets that name combinations of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import relative, tiny

from open_lm_linear import attention
from open_lm_linear.attention.linear import SUM_EPS, LinearAttention, lightning_slopes
from open_lm_linear.cli import UserError
from open_lm_linear.config import from_cli
from open_lm_linear.feature_maps import FeatureMap
from open_lm_linear.hf.modeling import OpenLMLinearConfig
from open_lm_linear.model import create_model, swap
from open_lm_linear.rotary import Rotary

ACTIVATIONS = {
    "relu": lambda z: z.clamp(min=0),
    "elu": lambda z: torch.where(z > 0, z + 1, z.exp()),
    "softmax": lambda z: torch.cat([z.exp() / z.exp().sum(-1, True), (-z).exp() / (-z).exp().sum(-1, True)], -1),
    "exp": torch.exp,
    "identity": lambda z: z,
}


def layer_with(**options) -> LinearAttention:
    torch.manual_seed(3)
    layer = LinearAttention(tiny("linear", n_heads_kv=2), options, 0).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def written_out(layer: LinearAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer as one T x T matrix a head, in float64."""
    c, tokens = layer.config, x.shape[1]
    positions = torch.arange(tokens)[None]
    q, k, v = layer._project(x)
    if c.rotary_at == "projection":
        q, k = Rotary(layer.arch, layer.arch.qk_dim)(q, k, positions)

    def phi(part, z):
        if c.feature_map == "per_head":
            z = torch.einsum("hfd,bthd->bthf", part.weight, z) + part.bias
        elif c.feature_map == "full":
            z = (z.flatten(2) @ part.weight.T + part.bias).unflatten(-1, z.shape[2:])
        return ACTIVATIONS[c.feature_activation](z)

    q, k = phi(layer._totrain_embed, q), phi(layer._totrain_embed_kv, k)
    bare_q, bare_k = q, k
    if c.rotary_at == "features":
        q, k = Rotary(layer.arch, q.shape[-1])(q, k, positions)
    k, bare_k, v = (z.repeat_interleave(2, 2) for z in (k, bare_k, v))
    slopes = torch.zeros(4, dtype=torch.float64)
    if c.use_decay:
        slopes = layer._totrain_decay.log_slopes.exp() if c.learn_decay else torch.tensor(lightning_slopes(4)).double()
    age = (torch.arange(tokens)[:, None] - torch.arange(tokens)).double()
    decay = torch.exp(-slopes[:, None, None] * age) * (age >= 0)
    scale = q.shape[-1] ** -0.5
    out = torch.einsum("bihf,bjhf,hij,bjhv->bihv", q, k * scale, decay, v)
    if c.normaliser == "sum":
        weights = torch.einsum("bihf,bjhf,hij->bih", bare_q, bare_k * scale, decay)
        out = out / weights.clamp(min=SUM_EPS)[..., None]
    elif c.normaliser == "rms_norm":
        out = out / (out.square().mean(-1, True) + 1e-5).sqrt()
    elif c.normaliser == "group_norm":
        out = (out - out.mean(-1, True)) / (out.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    gate = 2 * torch.sigmoid(x @ layer._totrain_gate.weight.T) if c.output_gate else 1
    return layer.out_proj(gate * out.flatten(2))


OPTIONS = [
    {"feature_activation": activation, "feature_map": kind, "normaliser": normaliser, "rotary_at": rotary}
    for (activation, kind), normaliser, rotary in itertools.product(
        [("relu", "full"), ("elu", "none"), ("softmax", "per_head"), ("exp", "per_head"), ("identity", "none")],
        ["group_norm", "rms_norm", "sum", "none"],
        ["features", "projection", "none"],
    )
    if (activation, normaliser) != ("identity", "sum")
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize(
    "others",
    [{}, {"use_decay": False, "output_gate": True}, {"learn_decay": True}],
    ids=["fixed decay", "gate", "learnt decay"],
)
def test_each_combination_is_its_formula(options, others):
    layer, x = layer_with(**options, **others), torch.randn(2, 40, 32, dtype=torch.float64)
    with torch.no_grad():
        out, _ = layer(x, torch.arange(40)[None])
        assert relative(out, written_out(layer, x)) < 1e-6


def test_what_is_exponentiated_has_a_limit():
    phi = FeatureMap(1, 2, 2, layout="none", activation="exp", init="identity")
    assert torch.equal(phi(torch.tensor([[[[1e4, 0.0]]]])), torch.tensor([[[[30.0, 0.0]]]]).exp())


@pytest.mark.parametrize("options", [{}, {"use_retnet_slopes": True}, {"decay_start": 0.6}])
def test_trained_decays_begin_where_the_fixed_ones_are(options):
    torch.manual_seed(0)
    fixed = LinearAttention(tiny(), options, 0)
    learnt = LinearAttention(tiny(), {**options, "learn_decay": True}, 0)
    learnt.load_state_dict({**learnt.state_dict(), **fixed.state_dict()})
    x, positions = torch.randn(1, 70, 32), torch.arange(70)[None]
    out = learnt(x, positions)[0]
    assert relative(out, fixed(x, positions)[0]) < 1e-5
    out.square().sum().backward()
    assert (learnt._totrain_decay.log_slopes.grad != 0).all()
    assert learnt.new_keys() - fixed.new_keys() == {"_totrain_decay.log_slopes"}


def test_the_gate_begins_open():
    torch.manual_seed(0)
    plain, gated = LinearAttention(tiny(), {}, 0), LinearAttention(tiny(), {"output_gate": True}, 0)
    gated.load_state_dict({**gated.state_dict(), **plain.state_dict()})
    x, positions = torch.randn(1, 20, 32), torch.arange(20)[None]
    assert torch.equal(gated(x, positions)[0], plain(x, positions)[0])
    assert gated.flops_per_token(64) == plain.flops_per_token(64) + 2 * 32 * 32


def test_unshared_maps_are_two():
    shared, two = create_model(tiny("linear")), create_model(tiny("linear", {"share_feature_map": False}))
    assert len(two.new_keys()) == 2 * len(shared.new_keys())


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", attention.PRESETS)
def test_a_preset_is_its_options(name):
    registered, options = attention.PRESETS[name]
    torch.manual_seed(0)
    named = create_model(tiny(name))
    torch.manual_seed(0)
    spelt = create_model(tiny(registered, options))
    assert named.config == spelt.config and named.config.attn_name == registered
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), spelt.parameters(), strict=True))
    assert OpenLMLinearConfig.from_model_config(named.config).to_model_config() == spelt.config


def test_a_preset_gives_way_to_flags_and_forgets_the_attention_before():
    before = tiny("linear", {"use_decay": False, "normaliser": "none"})
    assert swap(before, "supra").attn_options == {}
    assert swap(before, "linear").attn_options == {"use_decay": False, "normaliser": "none"}
    changed = swap(tiny("softmax"), "hedgehog", use_decay=True, seq_len=32)
    assert (changed.attn_options["use_decay"], changed.attn_options["normaliser"], changed.seq_len) == (True, "sum", 32)


def test_a_preset_on_the_command_line_has_linears_flags():
    flags = ["--model", "open_lm_11m", "--dataset-type", "synthetic", "--train-num-samples", "8"]
    cfg = from_cli([*flags, "--attn-name", "hedgehog", "--feature-dim", "4"])
    assert (cfg.model.attn_name, cfg.model.attn) == ("hedgehog", {"feature_dim": 4})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"feature_activation": "identity", "normaliser": "sum"}, "identity has others"),
        ({"feature_map": "none", "feature_dim": 4}, "drop feature_dim"),
        ({"learn_decay": True, "use_decay": False}, "learn_decay"),
        ({"feature_activation": "tanh"}, "feature_activation must be"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(options, named):
    with pytest.raises(UserError, match=named):
        create_model(tiny("linear", options))


def test_an_odd_map_turns_where_there_are_two_features_of_each_row():
    model = create_model(tiny("linear", {"feature_activation": "softmax", "feature_dim": 3}))
    assert model.layers[0].attention.features == 6
    with pytest.raises(UserError, match="an even feature_dim"):
        create_model(tiny("linear", {"feature_dim": 3}))
