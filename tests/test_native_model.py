"""The compiled code of blocks and models against the model itself in float64, option by option."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch

from open_lm_linear import native_model
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.linear import LinearAttention
from open_lm_linear.generate import generate, lay_out, prefill
from open_lm_linear.model import Past, Transformer, create_model
from open_lm_linear.ops import native

pytestmark = pytest.mark.skipif(native.native_library() is None, reason="no C++ compiler")

OPTIONS = {field.name for field in dataclasses.fields(LinearAttention.Config)}
NORMS = ("rms_norm", "gemma_rms_norm", "default_layer_norm", "lp_layer_norm", "gain_only_lp_layer_norm")
VARIANTS: list[dict[str, Any]] = [
    {},
    *[
        {"feature_map": layout, "feature_activation": activation}
        for layout in ("full", "per_head", "none")
        for activation in ("relu", "elu", "softmax", "exp", "identity")
    ],
    *[
        {"rotary_at": at, "positional_embedding_type": layout, "normaliser": "sum", "n_heads_kv": 2}
        for at in ("features", "projection", "none")
        for layout in ("rotary", "llama_rotary", "none")
    ],
    *[{"normaliser": kind, "use_decay": False} for kind in ("group_norm", "rms_norm", "sum", "none")],
    *[
        {"model_norm": norm, "qk_norm": True, "qk_norm_at": at, "n_heads_kv": 2}
        for norm in (*NORMS, "no_wb_layer_norm")
        for at in ("projection", "features")
    ],
    {"qk_norm": True, "qk_norm_per_head": True, "n_heads_kv": 2},
    *[{"ffn_type": kind} for kind in ("swiglu", "gelu", "gemma_geglu", "geglu_tanh", "none")],
    *[{"norm_placement": place, "post_embed_norm": True} for place in ("before", "after", "both")],
    {"output_gate": True, "n_heads_kv": 1},
    {"learn_decay": True, "share_feature_map": False},
    {"use_retnet_slopes": True, "partial_rotary_factor": 0.5},
    {"feature_dim": 20, "n_heads_kv": 1, "n_heads": 3},
    {"qkv_bias": True, "attn_out_bias": True, "ffn_bias": True, "weight_tying": True},
    {"qk_head_dim": 20, "v_head_dim": 12, "logit_softcap": 2.0, "embedding_scale": 3.3},
    {"seq_len": 64, "rotary_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 4}},
    {"seq_len": 64, "rotary_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
]


def model_of(variant: dict[str, Any], dtype: torch.dtype = torch.float32, attn_name: str = "linear") -> Transformer:
    """A model of two layers in which no parameter is where it was initialised."""
    options = {k: v for k, v in variant.items() if k in OPTIONS}
    rest = {"n_heads": 4, **{k: v for k, v in variant.items() if k not in OPTIONS}}
    config = ModelConfig(hidden_dim=48, n_layers=2, vocab_size=61, attn_name=attn_name, attn_options=options, **rest)
    torch.manual_seed(0)
    model = create_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def prompt(batch: int, tokens: int = 5) -> torch.Tensor:
    return torch.randint(61, (batch, tokens), generator=torch.Generator().manual_seed(1))


def steps(model: Transformer, ids: torch.Tensor, past: Past | None = None, by_block: bool = False) -> tuple[Any, Past]:
    """The logits of tokens given one by one after a prompt of two, and the past."""
    found = []
    if past is None:
        _, past = prefill(model, ids[:, :2])
        ids = ids[:, 2:]
    for token in ids.split(1, 1):
        if by_block:
            with torch.no_grad():
                hidden, past = model.hidden(token, past=past)
                logits = model.logits(hidden[:, -1])
        else:
            logits, past = prefill(model, token, past=past)
        found.append(logits)
    return torch.stack(found), past


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items())[:80] or "supra")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_what_the_model_gives(variant: dict[str, Any], dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(native_model, "native_threads", lambda elements: 3)
    model, ids = model_of(variant, dtype), prompt(3, 6)
    exact, after = steps(copy.deepcopy(model).double(), ids)
    plain, plain_after = steps(model, ids)
    lay_out(model)
    assert model.step is not None and all(block.step is not None for block in model.blocks())
    least = 5e-6 if dtype == torch.float32 else 1e-2
    for by_block in (False, True):
        found, past = steps(model, ids, by_block=by_block)
        # What the model's own rounding makes, of which a norm over small outputs makes much, now here and now there.
        assert error(found, exact) < max(least, 4 * error(plain, exact))
        for name, x in past.tensors().items():
            truth = after.tensors()[name]
            assert error(x, truth) < max(least, 4 * error(plain_after.tensors()[name], truth)), name


@pytest.mark.parametrize("variant", [{}, {"output_gate": True, "qk_norm": True, "qk_norm_at": "features"}], ids=str)
def test_the_bits_do_not_depend_on_the_threads(variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lay_out(model_of({"n_heads_kv": 2, **variant})), prompt(3)
    _, past = prefill(model, ids)
    count = [1]
    monkeypatch.setattr(native_model, "native_threads", lambda elements: count[0])
    expected, after = prefill(model, ids[:, :1], past=past)
    for count[0] in [2, 3, 5, 8] * 25:
        logits, again = prefill(model, ids[:, :1], past=past)
        assert torch.equal(logits, expected)
        assert all(torch.equal(x, after.tensors()[name]) for name, x in again.tensors().items())


@pytest.mark.parametrize("batch", [1, 2, 8, 9])
def test_up_to_eight_sequences_are_a_call_each(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = model_of({}), prompt(batch)
    exact, _ = steps(copy.deepcopy(model).double(), ids)
    lay_out(model)
    calls, through = [], native_model._Stack.through

    def counted(stack: Any, *args: Any) -> Any:
        calls.append(len(stack.blocks))
        return through(stack, *args)

    monkeypatch.setattr(native_model._Stack, "through", counted)
    found, _ = steps(model, ids)
    assert error(found, exact) < 1e-6
    assert calls == ([2] * 3 if batch <= 8 else [])


def test_rows_at_positions_of_their_own() -> None:
    model = model_of({})
    long, short = prompt(1, 7), prompt(1, 4)
    expected = [steps(copy.deepcopy(model), x)[0][-1] for x in (long, short)]
    lay_out(model)
    pasts = [prefill(model, x[:, :-1])[1] for x in (long, short)]
    layers = tuple(type(a)(torch.cat((a.S, b.S))) for a, b in zip(*(p.layers for p in pasts), strict=True))
    both = Past(layers, torch.cat([p.positions for p in pasts]))
    assert both.positions.tolist() == [6, 3]
    found, after = prefill(model, torch.cat((long[:, -1:], short[:, -1:])), past=both)
    assert error(found, torch.cat(expected)) < 1e-6 and after.positions.tolist() == [7, 4]
    forked, _ = prefill(model, torch.cat((short[:, -1:], long[:, -1:])), past=both.select(torch.tensor([1, 0])))
    assert torch.equal(forked, found.flip(0))


def test_a_state_is_never_changed_in_place() -> None:
    model, ids = lay_out(model_of({"normaliser": "sum"})), prompt(2)
    _, past = prefill(model, ids)
    before = {name: x.clone() for name, x in past.tensors().items()}
    first, after = prefill(model, ids[:, :1], past=past)
    prefill(model, ids[:, :1], past=after)
    assert all(torch.equal(x, before[name]) for name, x in past.tensors().items())
    assert torch.equal(prefill(model, ids[:, :1], past=past)[0], first)


@pytest.mark.parametrize("change", ["in place", "storage", "parameter", "loaded", "decay", "dtype"])
def test_changed_parameters_are_seen_by_the_next_generation(change: str) -> None:
    model, ids = lay_out(model_of({"learn_decay": True})), prompt(2)
    _, past = prefill(model, ids)
    before, _ = prefill(model, ids[:, :1], past=past)
    by_block, _ = steps(model, ids[:, :1], past, by_block=True)
    weight = model.layers[0].attention.out_proj.weight
    with torch.no_grad():
        if change == "in place":
            weight.mul_(2)
        elif change == "storage":
            weight.data = 2 * weight.data
        elif change == "parameter":
            model.layers[0].attention.out_proj.weight = torch.nn.Parameter(2 * weight.detach().clone())
        elif change == "loaded":
            model.load_state_dict({name: 2 * x for name, x in model.state_dict().items()})
        elif change == "decay":
            model.layers[1].attention._totrain_decay.log_slopes.add_(1)
        else:
            model.bfloat16()
    exact = copy.deepcopy(model).double()
    exact.step = None
    for block in exact.blocks():
        block.step = None
    expected, _ = prefill(exact, ids[:, :1], past=past)
    bound = 3e-2 if change == "dtype" else 1e-5
    for found in (prefill(model, ids[:, :1], past=past)[0], steps(model, ids[:, :1], past, by_block=True)[0]):
        assert error(found.reshape(expected.shape), expected) < bound
    if change != "dtype":
        assert error(before, expected) > 1e-4 and error(by_block.reshape(expected.shape), expected) > 1e-4


def test_weights_that_the_code_cannot_read_go_back_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lay_out(model_of({})), prompt(2)
    _, past = prefill(model, ids)
    model.half()
    monkeypatch.setattr(native_model._Stack, "through", lambda *_: pytest.fail("the compiled code was called"))
    logits, _ = prefill(model, ids[:, :1], past=past)
    assert logits.dtype == torch.float32 and bool(logits.isfinite().all())


@pytest.mark.parametrize("case", ["gradients", "a mask", "packed", "autocast", "two tokens"])
def test_what_it_does_not_take_the_model_does(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lay_out(model_of({})), prompt(2)
    _, past = prefill(model, ids)
    monkeypatch.setattr(native_model._Stack, "through", lambda *_: pytest.fail("the compiled code was called"))
    token = ids[:, :2] if case == "two tokens" else ids[:, :1]
    with torch.set_grad_enabled(case == "gradients"), torch.autocast("cpu", enabled=case == "autocast"):
        if case == "a mask":
            prefill(model, token, past=past, attention_mask=torch.tensor([[0], [1]]))
        else:
            first = torch.ones(2, 1, dtype=torch.bool) if case == "packed" else None
            hidden, _ = model.hidden(token, past=past, first=first)
            assert hidden.requires_grad == (case == "gradients")


@pytest.mark.parametrize("wrong", [61, -1])
def test_an_id_outside_of_the_vocabulary_is_an_error(wrong: int) -> None:
    model, ids = lay_out(model_of({})), prompt(2)
    _, past = prefill(model, ids)
    with pytest.raises(IndexError, match="outside of the model's vocabulary"):
        prefill(model, torch.tensor([[3], [wrong]]), past=past)


def test_a_hybrid_has_it_in_its_linear_layers_alone() -> None:
    model, ids = model_of({"attn_layers": {"softmax": [1]}}), prompt(2)
    exact, _ = steps(copy.deepcopy(model).double(), ids)
    lay_out(model)
    assert model.step is None and [block.step is not None for block in model.blocks()] == [True, False]
    assert error(steps(model, ids)[0], exact) < 1e-6


@pytest.mark.parametrize(
    "variant, attn_name, reason",
    [
        ({}, "softmax", "not SoftmaxAttention"),
        ({"positional_embedding_type": "head_rotary"}, "linear", "heads' index"),
    ],
)
def test_what_is_not_known_stays_the_models(variant: dict[str, Any], attn_name: str, reason: str) -> None:
    model = model_of(variant, attn_name=attn_name)
    assert reason in native_model.why_not_native(next(model.blocks()))
    assert lay_out(model).step is None
    assert "float32 and bfloat16" in native_model.why_not_native(next(model_of({}, torch.float64).blocks()))


def test_copies_and_pickles_describe_themselves() -> None:
    model, ids = lay_out(model_of({})), prompt(2)
    expected = generate(model, ids, max_new_tokens=5)
    _, past = prefill(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.step.model is other and other.layers[0].step.block is other.layers[0]
        assert torch.equal(generate(other, ids, max_new_tokens=5), expected)
        with torch.no_grad():
            other.layers[0].attention.in_proj.weight.zero_()
        assert not torch.equal(prefill(other, ids[:, :1], past=past)[0], prefill(model, ids[:, :1], past=past)[0])


def test_a_compiled_model_is_the_models_own() -> None:
    model, ids = model_of({}), prompt(1)
    _, past = prefill(model, ids)
    expected, _ = prefill(model, ids[:, :1], past=past)
    lay_out(model)
    block = torch.compile(model.layers[0], backend="eager", fullgraph=True)
    with torch.no_grad():
        x = model.tok_embeddings(ids[:, :1])
        y, _ = block(x, past.positions[:, None], None, None, past.layers[0])
        assert error(y, model.layers[0](x, past.positions[:, None], None, None, past.layers[0])[0]) < 1e-6
    assert error(prefill(model, ids[:, :1], past=past)[0], expected) < 1e-6
