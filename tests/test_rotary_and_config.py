"""Rotary embeddings against complex numbers, decay slopes against their formulas, and model configs, good and bad."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import relative, tiny

from open_lm_linear.architecture import FEED_FORWARDS, NORMS, ModelConfig, shipped
from open_lm_linear.attention.linear import lightning_slopes, retnet_slopes
from open_lm_linear.cli import UserError
from open_lm_linear.model import Transformer, create_model, read_config, swap
from open_lm_linear.rotary import Rotary

LAYOUTS = ("rotary", "llama_rotary", "head_rotary")


def rotary(layout="rotary", head_dim=8, **fields) -> Rotary:
    return Rotary(tiny(positional_embedding_type=layout, **fields), head_dim)


def turned(x, index, layout, base=10000.0, scale=1.0):
    """x (B, T, H, D) turned as complex pairs by exp(i index / (scale base^(2i/D))), in float64; index (B, T, H)."""
    dim = x.shape[-1]
    angles = index.double()[..., None] / (scale * base ** (torch.arange(0, dim, 2).double() / dim))
    turn = torch.polar(torch.ones_like(angles), angles)
    if layout == "llama_rotary":
        pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * turn
        return torch.stack((pairs.real, pairs.imag), -1).flatten(-2)
    pairs = torch.complex(x[..., : dim // 2].double(), x[..., dim // 2 :].double()) * turn
    return torch.cat((pairs.real, pairs.imag), -1)


# ---------------------------------------------------------------- rotary


@pytest.mark.parametrize(
    ("base", "scale"), [(10000.0, 1.0), (100000.0, 1.0), (500.0, 1.0), (10000.0, 4.0), (777.0, 0.5)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_against_complex_numbers(layout, base, scale):
    """Positions of each row its own; fewer key heads than query heads; base and scale honoured by every layout."""
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [100, 101, 0, 1, 1023]])
    out_q, out_k = rotary(layout, rotary_base_frequency=base, rotary_scale=scale)(q, k, positions)
    if layout == "head_rotary":
        at_k = torch.arange(2).expand(2, 5, 2)
        at_q = at_k.repeat_interleave(2, -1)
    else:
        at_q, at_k = positions[..., None].expand(2, 5, 4), positions[..., None].expand(2, 5, 2)
    assert relative(out_q, turned(q, at_q, layout, base, scale)) < 1e-5
    assert relative(out_k, turned(k, at_k, layout, base, scale)) < 1e-5
    assert relative(out_q.norm(dim=-1), q.norm(dim=-1)) < 1e-6


def test_layers_that_turn_alike_share_one_table_until_the_positions_change(monkeypatch):
    made, table = [], Rotary._table
    monkeypatch.setattr(Rotary, "_table", lambda *args: made.append(1) or table(*args))
    q, positions = torch.randn(1, 5, 2, 8), torch.arange(5)[None]
    layers = [rotary() for _ in range(3)]
    first = [layer(q, q, positions)[0] for layer in layers]
    assert len(made) == 1 and all(torch.equal(x, first[0]) for x in first)
    assert (
        torch.equal(
            rotary(rotary_base_frequency=500.0)(q, q, positions)[0],
            rotary(rotary_base_frequency=500.0)(q, q, positions.clone())[0],
        )
        and len(made) == 3
    )
    positions += 1
    assert relative(layers[0](q, q, positions)[0], turned(q, positions[..., None], "rotary")) < 1e-5
    assert layers[0](q.double(), q.double(), positions)[0].dtype == torch.float64
    with torch.inference_mode():
        unseen = torch.arange(5)[None]
        layers[0](q, q, unseen)
        unseen += 7
        assert relative(layers[0](q, q, unseen)[0], turned(q, unseen[..., None], "rotary")) < 1e-5
    with torch.inference_mode():
        layers[0](q, q, positions + 1)
    leaf = q.clone().requires_grad_()
    layers[0](leaf, leaf, positions)[0].sum().backward()
    assert leaf.grad is not None


def test_a_table_lives_as_long_as_its_positions():
    from open_lm_linear import rotary as module

    positions = torch.arange(5)[None]
    turn = rotary(rotary_base_frequency=123.0)
    turn(torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8), positions)
    kind = (turn.kind, torch.float32)
    assert kind in module._LAST
    del positions
    assert kind not in module._LAST


@pytest.mark.parametrize("layout", ["rotary", "llama_rotary"])
def test_products_depend_on_the_distance_alone(layout):
    """Shifting all positions leaves q . k as it is, near the start and far from it."""
    q, k, turn = torch.randn(1, 6, 2, 16), torch.randn(1, 6, 2, 16), rotary(layout, 16)
    products = []
    for shift in (0, 1, 77, 5000):
        a, b = turn(q, k, torch.arange(6)[None] + shift)
        products.append(torch.einsum("bihd,bjhd->bhij", a, b))
    for moved in products[1:]:
        assert relative(moved, products[0]) < 1e-3 * (moved is products[-1]) + 2e-5
    assert relative(turn(q, k, torch.arange(6)[None] * 2)[0], turn(q, k, torch.arange(6)[None])[0]) > 0.1


def test_one_row_of_positions_serves_the_batch():
    q, k, positions = torch.randn(3, 5, 2, 8), torch.randn(3, 5, 2, 8), torch.arange(5)[None]
    for one, each in zip(rotary()(q, k, positions), rotary()(q, k, positions.expand(3, 5)), strict=True):
        assert torch.equal(one, each)


def test_layouts_differ_by_a_permutation():
    """Meta's interleaved layout is Hugging Face's after even and odd features are moved apart."""
    q, positions = torch.randn(1, 5, 2, 8), torch.arange(5)[None]
    apart = [0, 2, 4, 6, 1, 3, 5, 7]
    meta, _ = rotary("llama_rotary")(q, q, positions)
    ours, _ = rotary("rotary")(q[..., apart], q[..., apart], positions)
    assert relative(meta[..., apart], ours) < 1e-6


def test_none_turns_nothing():
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    out_q, out_k = rotary("none")(q, k, torch.arange(5)[None])
    assert torch.equal(out_q, q)
    assert torch.equal(out_k, k)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bfloat16_model_has_float32_angles(layout):
    """Position 2047 in bfloat16: off by the rounding of the result alone, and the dtype is kept."""
    q = torch.randn(1, 3, 4, 64).bfloat16()
    positions = torch.tensor([[128, 1000, 2047]])
    out, _ = rotary(layout, 64)(q, q, positions)
    index = positions[..., None].expand(1, 3, 4) if layout != "head_rotary" else torch.arange(4).expand(1, 3, 4)
    assert out.dtype == torch.bfloat16
    assert relative(out, turned(q, index, layout)) < 4e-3


def test_rounded_angles_are_the_reference_s():
    """rotary_rounding bfloat16 at head_dim 128: the cosine is off by 0.13 at position 128 and 1.7 at 2047."""
    ones = torch.cat((torch.ones(64), torch.zeros(64))).expand(1, 2, 1, 128)
    positions = torch.tensor([[128, 2047]])
    exact, _ = rotary("rotary", 128)(ones, ones, positions)
    rounded, _ = rotary("rotary", 128, rotary_rounding="bfloat16")(ones, ones, positions)
    off = (exact - rounded)[0, :, 0, :64].abs().amax(-1)  # the first half holds the cosines
    assert off[0].item() == pytest.approx(0.13, abs=0.005)
    assert off[1].item() == pytest.approx(1.7, abs=0.05)


# ---------------------------------------------------------------- slopes


def test_lightning_slopes():
    assert lightning_slopes(8) == pytest.approx([2.0**-i for i in range(1, 9)])
    assert lightning_slopes(4) == pytest.approx([2.0 ** (-2 * i) for i in range(1, 5)])
    assert lightning_slopes(1) == pytest.approx([2.0**-8])
    assert math.exp(-2048 * lightning_slopes(32)[-1]) == pytest.approx(3.35e-4, rel=2e-3)


def test_lightning_slopes_of_other_numbers_of_heads():
    """Those of the next lower power of two, then every second one of the next higher (ALiBi's rule)."""
    eight = [2.0**-i for i in range(1, 9)]
    assert lightning_slopes(9) == pytest.approx([*eight, 2.0**-0.5])
    assert lightning_slopes(12) == pytest.approx([*eight, 2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5])
    assert lightning_slopes(3) == pytest.approx([2.0**-4, 2.0**-8, 2.0**-2])
    for heads in range(1, 70):
        assert len(lightning_slopes(heads)) == heads
        assert all(0 < s < 1 for s in lightning_slopes(heads))


def test_decay_start():
    assert lightning_slopes(4, 0.75) == pytest.approx([0.75, 0.75 / 4, 0.75 / 16, 0.75 / 64])
    assert lightning_slopes(8, 0.5) == pytest.approx(lightning_slopes(8))
    layer = create_model(tiny("linear", {"decay_start": 0.75})).layers[0].attention
    assert layer.slopes == pytest.approx(lightning_slopes(4, 0.75))


def test_retnet_slopes():
    assert [math.exp(-s) for s in retnet_slopes(4)] == pytest.approx([1 - 2.0 ** (-5 - h) for h in range(4)])
    assert create_model(tiny("linear", {"use_retnet_slopes": True})).layers[1].attention.slopes == tuple(
        retnet_slopes(4)
    )
    assert create_model(tiny("linear", {"use_decay": False})).layers[0].attention.slopes is None


# ---------------------------------------------------------------- configs


def write(tmp_path, values):
    path = tmp_path / "model.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


@pytest.mark.parametrize(
    "config",
    [
        tiny(),
        tiny("softmax", qk_norm=True, n_heads_kv=2, rotary_rounding="bfloat16"),
        tiny(
            "linear",
            {"use_decay": True, "feature_dim": 12},
            weight_tying=True,
            rotary_base_frequency=1e6,
            norm_eps=1e-6,
        ),
        tiny("package.module:Class", {"anything": [1, "two"]}, qk_head_dim=6, v_head_dim=10),
    ],
    ids=["plain", "softmax", "linear", "plug-in"],
)
def test_json_round_trip(config):
    again = ModelConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config


def test_defaults_are_openlm_s():
    config = ModelConfig.from_json({"hidden_dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 10})
    assert (config.model_norm, config.ffn_type, config.positional_embedding_type) == (
        "default_layer_norm",
        "swiglu",
        "rotary",
    )
    assert (config.rotary_base_frequency, config.rotary_scale, config.qk_norm) == (10000, 1.0, False)
    assert (config.kv_heads, config.qk_dim, config.v_dim) == (4, 16, 16)
    assert config.ffn_dim == 256 * math.ceil(int(8 * 64 / 3) / 256) == 256
    assert tiny(intermediate_dim_ffn=None, hidden_dim=576, n_heads=9).ffn_dim == 1536
    assert tiny(intermediate_dim_ffn=None, ffn_type="gelu").ffn_dim == 4 * 32
    assert tiny(ffn_type="gelu").ffn_dim == 48  # honoured by gelu too


def test_keys_that_ask_for_nothing_are_dropped():
    values = {**tiny("softmax").to_json(), "moe_freq": 0, "moe_num_experts": None, "moe_top_k": 2}
    assert ModelConfig.from_json(values) == tiny("softmax")


def test_create_model_from_a_path(tmp_path):
    values = {**tiny("linear_attn").to_json()}
    for source in (write(tmp_path, values), str(write(tmp_path, values))):
        model = create_model(source)
        assert model.config.attn_name == "linear"
        assert model(torch.randint(0, 61, (1, 5)))[0].shape == (1, 5, 61)
    changed = create_model(source, n_layers=1, seq_len=4096, use_retnet_slopes=True, use_decay=True)
    assert (len(changed.layers), changed.config.seq_len) == (1, 4096)
    assert changed.layers[0].attention.slopes == tuple(retnet_slopes(4))
    wide = create_model(source, dtype=torch.bfloat16)
    assert {p.dtype for p in wide.parameters()} == {torch.bfloat16}


def test_a_json_s_own_attention_has_openlm_s_defaults_and_a_swap_ours(tmp_path):
    """OpenLM's linear config has no decay unless it says so; ours decays."""
    linear = write(tmp_path, tiny("linear_attn").to_json())
    assert create_model(linear).config.attn_options["use_decay"] is False
    softmax = write(tmp_path, tiny("auto").to_json())
    assert create_model(softmax, "linear").config.attn_options["use_decay"] is True
    assert create_model(softmax, "linear", use_decay=False).config.attn_options["use_decay"] is False
    assert create_model(softmax).config.attn_name == "softmax"


def test_qk_head_dim_of_a_linear_json_is_that_of_the_features(tmp_path):
    values = {**tiny("linear_attn", qk_head_dim=12, positional_embedding_type="none").to_json()}
    attention = create_model(write(tmp_path, values)).layers[0].attention
    assert attention.in_proj.weight.shape == (3 * 32, 32)
    assert attention._totrain_embed.weight.shape == (4 * 12, 32)


def test_swap_keeps_what_belongs_to_the_new_attention():
    config = swap(tiny("softmax"), "linear", use_retnet_slopes=True)
    assert dict(config.attn_options) == {"use_retnet_slopes": True}
    assert dict(swap(config, "softmax").attn_options) == {}
    assert dict(swap(config, "linear").attn_options) == {"use_retnet_slopes": True}
    assert swap(config, None, n_layers=5).n_layers == 5


@pytest.mark.parametrize("name", sorted(shipped("models", ".json")))
def test_shipped_configs(name):
    """Each reads, survives its JSON form and builds on the meta device."""
    config = read_config(name)
    assert ModelConfig.from_json(config.to_json()) == config
    with torch.device("meta"):
        model = Transformer(config)
    assert len(model.layers) == config.n_layers


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_every_norm_and_feed_forward_builds_and_runs(norm, feed_forward):
    model = create_model(tiny("softmax", model_norm=norm, ffn_type=feed_forward, post_embed_norm=True))
    logits, hidden, past = model(torch.randint(0, 61, (2, 3)), use_cache=True)
    assert torch.isfinite(logits).all()
    assert (logits.shape, hidden.shape) == ((2, 3, 61), (2, 3, 32))


BAD_FIELDS = [
    ({"hidden_dim": 0}, "hidden_dim"),
    ({"hidden_dim": "64"}, "hidden_dim"),
    ({"n_layers": -1}, "n_layers"),
    ({"n_heads": True}, "n_heads"),
    ({"vocab_size": 1.5}, "vocab_size"),
    ({"seq_len": None}, "seq_len"),
    ({"hidden_dim": 33}, "n_heads 4"),
    ({"n_heads_kv": 3}, "n_heads_kv 3"),
    ({"n_heads_kv": 8}, "n_heads_kv 8"),
    ({"qk_head_dim": 7}, "even"),
    ({"qk_head_dim": 0}, "qk_head_dim"),
    ({"intermediate_dim_ffn": 0}, "intermediate_dim_ffn"),
    ({"model_norm": "rmsnorm"}, "rms_norm"),
    ({"ffn_type": "swigluu"}, "swiglu"),
    ({"positional_embedding_type": "rope"}, "head_rotary"),
    ({"rotary_rounding": "fp8"}, "bfloat16"),
    ({"rotary_base_frequency": 0}, "rotary_base_frequency"),
    ({"rotary_base_frequency": "10000"}, "rotary_base_frequency"),
    ({"rotary_scale": -1.0}, "rotary_scale"),
    ({"rotary_scale": float("nan")}, "rotary_scale"),
    ({"norm_eps": "tiny"}, "norm_eps"),
    ({"norm_eps": None}, "norm_eps"),
    ({"qk_norm": "false"}, "qk_norm"),
    ({"weight_tying": 1}, "weight_tying"),
    ({"attn_name": 5}, "attn_name"),
    ({"attn_name": None}, "attn_name"),
]


@pytest.mark.parametrize(
    ("change", "part"), BAD_FIELDS, ids=[f"{k}={v!r}" for c, _ in BAD_FIELDS for k, v in c.items()]
)
def test_bad_fields_are_one_sentence(change, part, tmp_path):
    """And the same through a file."""
    values = {**tiny("softmax").to_json(), **change}
    for attempt in (lambda: ModelConfig.from_json(values), lambda: create_model(write(tmp_path, values))):
        with pytest.raises(UserError) as refusal:
            attempt()
        assert part in str(refusal.value)
        assert "\n" not in str(refusal.value)


BAD_OPTIONS = [
    ({"use_decay": "false"}, "use_decay"),
    ({"use_decay": 0}, "use_decay"),
    ({"decay_start": 0}, "decay_start"),
    ({"decay_start": -1.0}, "decay_start"),
    ({"decay_start": "0.5"}, "decay_start"),
    ({"decay_start": 0.5, "use_decay": False}, "decay_start"),
    ({"decay_start": 0.5, "use_retnet_slopes": True}, "decay_start"),
    ({"feature_map": "half"}, "per_head"),
    ({"feature_map_init": "zero"}, "identity"),
    ({"feature_dim": 0}, "feature_dim"),
    ({"feature_dim": -2}, "feature_dim"),
    ({"feature_dim": 7}, "even"),
    ({"feature_dim": 8.0}, "feature_dim"),
]


@pytest.mark.parametrize(("options", "part"), BAD_OPTIONS, ids=[json.dumps(o) for o, _ in BAD_OPTIONS])
def test_bad_options_of_linear_attention_are_one_sentence(options, part):
    with pytest.raises(UserError) as refusal:
        create_model(tiny("linear", options))
    assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_whole_numbers_stand_for_floats():
    assert (
        create_model(tiny("linear", {"decay_start": 1}, rotary_base_frequency=10000)).config.attn_options["decay_start"]
        == 1
    )


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ("{", "not a readable JSON"),
        ("[1, 2]", "not a JSON object"),
        ({"hidden_dim": 8}, "n_layers"),
        ({**tiny("softmax").to_json(), "moe_freq": 2}, "moe_freq"),
    ],
    ids=["half", "list", "missing", "moe"],
)
def test_bad_files_are_one_sentence_that_names_the_file(values, part, tmp_path):
    path = write(tmp_path, values)
    with pytest.raises(UserError, match=part) as refusal:
        create_model(path)
    assert str(path) in str(refusal.value)


def test_missing_file_and_unknown_name(tmp_path):
    with pytest.raises(UserError, match="nowhere.json"):
        create_model(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match="unknown model 'no_such_model'"):
        create_model("no_such_model")


def test_neither_or_both_inputs_are_refused():
    model = create_model(tiny())
    with pytest.raises(ValueError, match="either"):
        model()
    with pytest.raises(ValueError, match="either"):
        model(torch.zeros(1, 1, dtype=torch.long), inputs_embeds=torch.zeros(1, 1, 32))
