"""The contract that every attention keeps: those of the registry in all their variants, and a plug-in of this file.

Through the layer's own forward and through the Transformer's: any cut into calls, padding on either side, packed
documents, causality, gradients, state dtype and size, initialisation from the meta device, forks of one past.
"""

from __future__ import annotations

import copy
import json
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import relative, spans, tiny

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Attention, State
from open_lm_linear.attention.linear import LinearAttention, LinearState
from open_lm_linear.cli import UserError
from open_lm_linear.model import Past, Transformer, create_model

Tensor = torch.Tensor
TOLERANCE = 2e-5  # float32, two layers


@dataclass(frozen=True)
class MeanState(State):
    total: Tensor  # (B, D)
    count: Tensor  # (B, 1)

    def select(self, rows: Tensor) -> MeanState:
        return MeanState(self.total[rows], self.count[rows])

    def nbytes(self) -> int:
        return 4 * (self.total.numel() + self.count.numel())


class RunningMean(Attention):
    """A plug-in: the mean of the values so far, token by token."""

    @dataclass(frozen=True)
    class Config:
        sharpness: float = 1.0

    def forward(self, x, positions, *, keep=None, first=None, state=None):
        v = self._project(x)[2].flatten(2).float() * self.config.sharpness
        total = v.new_zeros(v.shape[0], v.shape[2]) if state is None else state.total
        count = v.new_zeros(v.shape[0], 1) if state is None else state.count
        out = []
        for t in range(v.shape[1]):
            stays = torch.ones_like(count) if first is None else 1 - first[:, t, None].float()
            real = torch.ones_like(count) if keep is None else keep[:, t, None].float()
            total, count = total * stays + v[:, t] * real, count * stays + real
            out.append(total / count.clamp(min=1))
        return self.out_proj(torch.stack(out, 1).to(x.dtype)), MeanState(total, count)

    def flops_per_token(self, seq_len):
        return self._projection_flops()

    def state_bytes(self, batch, seq_len):
        return 4 * batch * (self.arch.n_heads * self.arch.v_dim + 1)


PLUGIN = f"{__name__}:RunningMean"
GQA = {"n_heads_kv": 2}
BIASES = {"qkv_bias": True, "attn_out_bias": True, "ffn_bias": True}
GEMMA = {
    **{"model_norm": "gemma_rms_norm", "norm_placement": "both", "ffn_type": "geglu_tanh", "embedding_scale": 5.7},
    **{"rotary_local_base_frequency": 50.0, "rotary_local_layers": [0], "sliding_window": 6},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
IDENTITY = {"feature_map": "per_head", "feature_map_init": "identity"}

# name -> (attention, its options, fields of the architecture)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in attention.names() if name != "linear_window"},
    "linear_window": ("linear_window", {"window": 5}, {}),
    "linear-nodecay": ("linear", {"use_decay": False}, {}),
    "linear-retnet": ("linear", {"use_retnet_slopes": True}, {}),
    "linear-start": ("linear", {"decay_start": 0.75}, {}),
    "linear-per-head": ("linear", IDENTITY, {}),
    "linear-gqa": ("linear", {}, GQA),
    "linear-gqa-nodecay": ("linear", {"use_decay": False}, {"n_heads_kv": 1}),
    "linear-gqa-per-head": ("linear", IDENTITY, GQA),
    "linear-qk-norm": ("linear", {}, {"qk_norm": True, "model_norm": "gain_only_lp_layer_norm"}),
    "linear-gqa-qk-norm": ("linear", {}, {"qk_norm": True, **GQA}),
    "linear-sum": ("linear", {"normaliser": "sum", "use_decay": False}, {}),
    "linear-sum-decay-gqa": ("linear", {"normaliser": "sum"}, GQA),
    "linear-rms-norm": ("linear", {"normaliser": "rms_norm"}, {}),
    "linear-no-normaliser": ("linear", {"normaliser": "none"}, GQA),
    "linear-elu-gqa": ("linear", {"feature_activation": "elu", "feature_map": "none", "decay_start": 0.6}, GQA),
    "linear-exp-unshared": ("linear", {"feature_activation": "exp", "share_feature_map": False, **IDENTITY}, {}),
    "linear-softmax-sum": ("linear", {"feature_activation": "softmax", "normaliser": "sum", "feature_dim": 5}, {}),
    "linear-softmax-rotary-first": (
        "linear",
        {"feature_activation": "softmax", "rotary_at": "projection", "normaliser": "rms_norm", "feature_dim": 3},
        GQA,
    ),
    "linear-identity-learned": (
        "linear",
        {"feature_activation": "identity", "feature_map": "none", "learn_decay": True, "output_gate": True},
        GQA,
    ),
    "linear-no-rotary-gate": ("linear", {"rotary_at": "none", "output_gate": True, "learn_decay": True}, {}),
    **{name: (name, {}, {}) for name in attention.PRESETS if name != "lolcats"},
    "lolcats": ("lolcats", {"window": 5}, {}),
    "linear-window-gqa": ("linear_window", {"window": 6, "sinks": 2, "decay_start": 0.7}, GQA),
    "linear-window-sum": ("linear_window", {"window": 9, "normaliser": "sum", "use_decay": False}, {}),
    "linear-window-first": ("linear_window", {"window": 4, "sinks": 1, "rotary_at": "projection"}, {"qk_norm": True}),
    "gated-linear-gqa-qk-norm": ("gated_linear", {"output_gate": True}, {"qk_norm": True, **GQA}),
    "gated-linear-softmax": ("gated_linear", {"feature_activation": "softmax", "rotary_at": "none"}, GQA),
    "gated-delta-gqa-qk-norm": ("gated_delta", {"output_gate": True, "normaliser": "none"}, {"qk_norm": True, **GQA}),
    "gated-delta-group-norm": ("gated_delta", {"normaliser": "group_norm", "rotary_at": "none"}, GQA),
    "window-gqa": ("window", {"window": 7, "sinks": 3}, GQA),
    "window-no-sinks": ("window", {"window": 70, "sinks": 0}, {"qk_norm": True}),
    "window-caps": ("window", {"window": 5, "sinks": 5}, {"attn_logit_softcap": 0.3, "query_pre_attn_scalar": 5}),
    "hybrid": ("linear", {}, {"attn_layers": {"softmax": [1]}, "sliding_window": 7, **GQA}),
    "linear-qk-norm-features": ("linear", {"qk_norm_at": "features"}, {"qk_norm": True}),
    "linear-gqa-qk-norm-features": ("linear", {"qk_norm_at": "features"}, {"qk_norm": True, **GQA}),
    "linear-gqa-qk-norm-per-head": ("linear", {}, {"qk_norm": True, "qk_norm_per_head": True, **GQA}),
    "linear-biases": ("linear", {}, {**BIASES, "partial_rotary_factor": 0.5, "norm_placement": "after", **GQA}),
    "linear-llama-rotary": ("linear", {}, {"positional_embedding_type": "llama_rotary"}),
    "linear-features": ("linear", {"feature_dim": 12, "feature_map_init": "identity"}, {"v_head_dim": 5}),
    "linear-three-heads": ("linear", {}, {"n_heads": 3, "qk_head_dim": 8, "v_head_dim": 8}),
    "softmax-gqa": ("softmax", {}, GQA),
    "softmax-qk-norm": ("softmax", {}, {"qk_norm": True}),
    "softmax-gqa-qk-norm": ("softmax", {}, {"qk_norm": True, **GQA}),
    "softmax-llama-rotary": ("softmax", {}, {"positional_embedding_type": "llama_rotary"}),
    "softmax-head-dims": ("softmax", {}, {"qk_head_dim": 6, "v_head_dim": 10, "positional_embedding_type": "none"}),
    "softmax-window": ("softmax", {}, {"sliding_window": 5}),
    "softmax-window-gqa": ("softmax", {}, {"sliding_window": 3, "sliding_window_layers": [1], **GQA}),
    "softmax-caps": (
        "softmax",
        {},
        {"attn_logit_softcap": 0.3, "query_pre_attn_scalar": 5, "logit_softcap": 2.0, **GQA},
    ),
    "softmax-caps-window": ("softmax", {}, {"attn_logit_softcap": 0.3, "sliding_window": 4}),
    "softmax-qk-norm-per-head": ("softmax", {}, {"qk_norm": True, "qk_norm_per_head": True, **GQA}),
    "softmax-biases": ("softmax", {}, {**BIASES, "partial_rotary_factor": 0.5, "norm_placement": "after"}),
    "softmax-gemma": ("softmax", {}, {**GEMMA, **GQA}),
    "softmax-yarn": ("softmax", {}, {"rotary_scaling": YARN, "no_rotary_layers": [1]}),
    "mamba-options": (
        "mamba",
        {"d_state": 3, "d_conv": 2, "expand": 1, "dt_rank": 5, "conv_bias": False},
        {"ffn_type": "none", "qkv_bias": True, "attn_out_bias": True},
    ),
    "plug-in": (PLUGIN, {"sharpness": 2.0}, {}),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
LINEAR = [v for v, (name, _, _) in VARIANTS.items() if attention.canonical(name) == "linear" and v != "hybrid"]


def config_of(variant: str) -> ModelConfig:
    name, options, fields = VARIANTS[variant]
    return tiny(name, options, **fields)


def layer_of(variant: str) -> Attention:
    torch.manual_seed(1)
    config = attention.expand(config_of(variant))
    return awake(attention.resolve(config.attn_name)(config, config.attn_options, 0))


def model_of(variant: str, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(1)
    return awake(create_model(config_of(variant), dtype=dtype).eval())


def awake(module: torch.nn.Module) -> Any:
    """What begins at 0, and so hides the path behind it, begins elsewhere."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    return module


def tokens_of(batch: int, length: int) -> Tensor:
    return torch.randint(0, 61, (batch, length))


def run_layer(layer, x, positions, lengths, keep=None, first=None, state=None):
    """The layer's outputs and last state for calls of these lengths."""
    out = []
    for span in spans(lengths):
        masks = {"keep": None if keep is None else keep[:, span], "first": None if first is None else first[:, span]}
        y, state = layer(x[:, span], positions[:, span], state=state, **masks)
        out.append(y)
    return torch.cat(out, 1), state


@torch.no_grad()
def run_model(model, ids, lengths, mask=None, first=None, past=None) -> tuple[Tensor, Past]:
    """The model's logits and last past for calls of these lengths."""
    out = []
    for span in spans(lengths):
        masks = {
            "attention_mask": None if mask is None else mask[:, span],
            "first": None if first is None else first[:, span],
        }
        logits, _, past = model(ids[:, span], past_key_values=past, use_cache=True, **masks)
        out.append(logits)
    return torch.cat(out, 1), past


# ---------------------------------------------------------------- cuts


@every_variant
@pytest.mark.parametrize(
    "lengths",
    [(1,) * 150, (64, 64, 22), (63, 1, 65, 21), (1, 149), (140, 1, 9)],
    ids=["tokens", "chunks", "odd", "one", "late"],
)
def test_layer_any_cut(variant, lengths):
    layer, x, positions = layer_of(variant), torch.randn(2, 150, 32), torch.arange(150)[None]
    with torch.no_grad():
        whole, last = layer(x, positions)
        cut, state = run_layer(layer, x, positions, lengths)
        probe, where = torch.randn(2, 3, 32), torch.arange(150, 153)[None]
        after, after_cut = layer(probe, where, state=last)[0], layer(probe, where, state=state)[0]
    assert relative(cut, whole) < TOLERANCE
    assert relative(after_cut, after) < TOLERANCE


@every_variant
@pytest.mark.parametrize("lengths", [(1,) * 80, (13, 1, 66)], ids=["tokens", "13-1-66"])
def test_model_any_cut(variant, lengths):
    model, ids = model_of(variant), tokens_of(2, 80)
    with torch.no_grad():
        whole = model(ids)[0]
    cut, past = run_model(model, ids, lengths)
    assert relative(cut, whole) < TOLERANCE
    assert past.positions.tolist() == [80, 80]


@every_variant
def test_layer_gradients_flow_through_a_cut(variant):
    """Handing on the state inside one graph gives the gradients of one call."""
    layer, x, positions = layer_of(variant), torch.randn(2, 90, 32), torch.arange(90)[None]
    weight = torch.randn(2, 90, 32)
    grads = []
    for lengths in ((90,), (70, 1, 6, 1, 12)):
        z = x.clone().requires_grad_()
        parameters = list(layer.parameters())
        out, _ = run_layer(layer, z, positions, lengths)
        grads.append(torch.autograd.grad((out * weight).sum(), [z, *parameters]))
    for whole, cut in zip(*grads, strict=True):
        assert relative(cut, whole) < 1e-4


# ---------------------------------------------------------------- padding


@every_variant
@pytest.mark.parametrize(
    "lengths", [(75,), (30, 45), (6, 1, 68), (1,) * 75], ids=["whole", "30-45", "6-1-68", "tokens"]
)
def test_layer_padded_rows_equal_the_row_alone(variant, lengths):
    """Rows of 70, 66 and 75 tokens: the first padded left, the second right, the third not; then 4 tokens more."""
    layer = layer_of(variant)
    rows = [torch.randn(1, n, 32) for n in (70, 66, 75)]
    begins = (5, 0, 0)
    x, keep = 10 * torch.randn(3, 75, 32), torch.zeros(3, 75, dtype=torch.bool)
    for b, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        x[b, begin : begin + row.shape[1]] = row[0]
        keep[b, begin : begin + row.shape[1]] = True
    positions = (keep.long().cumsum(1) - 1).clamp(min=0)
    more, where = torch.randn(3, 4, 32), keep.sum(1, keepdim=True) + torch.arange(4)
    with torch.no_grad():
        out, state = run_layer(layer, x, positions, lengths, keep=keep)
        after, _ = run_layer(layer, more, where, (1, 3), state=state)
        for b, row in enumerate(rows):
            alone, alone_state = layer(row, torch.arange(row.shape[1])[None])
            after_alone, _ = layer(more[b : b + 1], where[b : b + 1], state=alone_state)
            assert relative(out[b : b + 1, keep[b]], alone) < TOLERANCE
            assert relative(after[b : b + 1], after_alone) < TOLERANCE


@every_variant
def test_layer_padding_leaves_no_trace_in_the_state(variant):
    """Calls of nothing but padding, before, between and after, change nothing that follows."""
    layer, x, where = layer_of(variant), torch.randn(2, 20, 32), torch.arange(20)[None]
    garbage, at, none = 10 * torch.randn(2, 3, 32), torch.zeros(1, 3, dtype=torch.long), torch.zeros(2, 3).bool()
    with torch.no_grad():
        whole, _ = layer(x, where)
        _, state = layer(garbage, at, keep=none)
        one, state = layer(x[:, :9], where[:, :9], state=state)
        _, state = layer(garbage, at, keep=none, state=state)
        _, state = layer(garbage[:, :1], at[:, :1], keep=none[:, :1], state=state)
        two, state = layer(x[:, 9:10], where[:, 9:10], state=state)
        three, _ = layer(x[:, 10:], where[:, 10:], state=state)
    assert relative(torch.cat((one, two, three), 1), whole) < TOLERANCE


@pytest.mark.parametrize("variant", LINEAR)
def test_right_padding_leaves_the_linear_state_as_it_was(variant):
    layer, x, where = layer_of(variant), torch.randn(2, 70, 32), torch.arange(70)[None]
    keep = torch.ones(2, 70, dtype=torch.bool)
    keep[:, 50:] = False
    with torch.no_grad():
        padded, alone = layer(x, where, keep=keep)[1], layer(x[:, :50], where[:, :50])[1]
    assert relative(padded.S, alone.S) < 1e-6


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_model_padded_prefill_then_decoding(variant, side):
    """A padded batch, then decoding under Hugging Face's growing mask, equals each row alone."""
    model, lengths, width, more = model_of(variant), (11, 17, 1), 17, tokens_of(3, 6)
    rows = [tokens_of(1, n) for n in lengths]
    ids, mask = tokens_of(3, width), torch.zeros(3, width, dtype=torch.long)
    for b, row in enumerate(rows):
        span = slice(width - lengths[b], width) if side == "left" else slice(0, lengths[b])
        ids[b, span], mask[b, span] = row[0], 1
    with torch.no_grad():
        logits, _, past = model(ids, attention_mask=mask, use_cache=True)
        assert past.positions.tolist() == list(lengths)
        decoded, grown = [], mask
        for t in range(6):
            grown = torch.cat((grown, torch.ones(3, 1, dtype=torch.long)), 1)
            step, _, past = model(more[:, t : t + 1], past_key_values=past, attention_mask=grown, use_cache=True)
            decoded.append(step)
        for b, row in enumerate(rows):
            alone = model(torch.cat((row, more[b : b + 1]), 1))[0]
            assert relative(logits[b][mask[b] > 0], alone[0, : lengths[b]]) < TOLERANCE
            assert relative(torch.cat(decoded, 1)[b], alone[0, lengths[b] :]) < TOLERANCE


@every_variant
def test_masks_that_say_nothing_change_nothing(variant):
    layer, x, where = layer_of(variant), torch.randn(2, 70, 32), torch.arange(70)[None]
    ones, first = torch.ones(2, 70, dtype=torch.bool), torch.zeros(2, 70, dtype=torch.bool)
    first[:, 0] = True
    with torch.no_grad():
        plain = layer(x, where)[0]
        assert relative(layer(x, where, keep=ones)[0], plain) < 1e-6
        assert relative(layer(x, where, first=first)[0], plain) < 1e-6
        assert relative(layer(x, where, keep=ones, first=~ones)[0], plain) < 1e-6


# ---------------------------------------------------------------- packed documents


@every_variant
@pytest.mark.parametrize("lengths", [(140,), (30, 110), (29, 1, 1, 109), (1,) * 140], ids=["1", "2", "4", "tokens"])
def test_layer_packed_documents_equal_the_documents_alone(variant, lengths):
    layer, documents = layer_of(variant), [torch.randn(1, n, 32) for n in (29, 1, 70, 40)]
    x = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    with torch.no_grad():
        out, state = run_layer(layer, x, positions, lengths, first=positions == 0)
        alone = [layer(d, torch.arange(d.shape[1])[None]) for d in documents]
        probe, where = torch.randn(1, 2, 32), torch.arange(40, 42)[None]
        after, after_alone = (layer(probe, where, state=s)[0] for s in (state, alone[-1][1]))
    assert relative(out, torch.cat([y for y, _ in alone], 1)) < TOLERANCE
    assert relative(after, after_alone) < TOLERANCE


@every_variant
def test_model_packed_rows_with_padding(variant):
    """Two rows whose documents begin and end elsewhere, padded left, right and between, in calls of any length."""
    model = model_of(variant)
    layout = [[4, -20, -7, 3, -30, 6], [-33, 2, -1, -34]]  # negative: a document's tokens; positive: padding
    width = 70
    ids, mask, first = tokens_of(2, width), torch.zeros(2, width), torch.zeros(2, width, dtype=torch.bool)
    documents = []
    for b, parts in enumerate(layout):
        at = 0
        for n in parts:
            if n < 0:
                documents.append((b, at, at - n))
                mask[b, at : at - n], first[b, at] = 1, True
            at += abs(n)
        assert at == width
    for lengths in ((width,), (30, 1, 39), (4, 20, 46), (1,) * width):
        out, past = run_model(model, ids, lengths, mask, first)
        assert past.positions.tolist() == [30, 34]
        for b, begin, end in documents:
            alone = run_model(model, ids[b : b + 1, begin:end], (end - begin,))[0]
            assert relative(out[b : b + 1, begin:end], alone) < TOLERANCE


@every_variant
@pytest.mark.parametrize("seed", range(3))
def test_random_layouts(variant, seed):
    """Documents and padding drawn at random, cut at random; each document equals itself alone."""
    rng, model = random.Random(seed), model_of(variant)
    width, batch = 48, 3
    ids, mask, first = tokens_of(batch, width), torch.zeros(batch, width), torch.zeros(batch, width, dtype=torch.bool)
    owner = [[-1] * width for _ in range(batch)]
    for b in range(batch):
        document, fresh = 0, False
        for t in range(width):
            new = t > 0 and rng.random() < 0.08
            document, fresh = document + new, fresh or new
            if rng.random() < 0.75:
                owner[b][t], mask[b, t], first[b, t], fresh = document, 1, fresh, False
            elif fresh and rng.random() < 0.5:
                first[b, t], fresh = True, False  # the document begins at a padded place
    lengths, left = [], width
    while left:
        lengths.append(min(left, rng.choice((1, 1, 2, 7, 20))))
        left -= lengths[-1]
    out, _ = run_model(model, ids, lengths, mask, first)
    for b in range(batch):
        for document in set(owner[b]) - {-1}:
            at = [t for t in range(width) if owner[b][t] == document]
            alone = run_model(model, ids[b : b + 1, at], (len(at),))[0]
            assert relative(out[b : b + 1, at], alone) < TOLERANCE


# ---------------------------------------------------------------- causality


@every_variant
@pytest.mark.parametrize("t", [0, 1, 63, 64, 99])
def test_causality(variant, t):
    layer, x, where = layer_of(variant), torch.randn(2, 100, 32), torch.arange(100)[None]
    changed = x.clone()
    changed[:, t] += 1
    with torch.no_grad():
        before, after = layer(x, where)[0], layer(changed, where)[0]
    assert (before[:, :t] - after[:, :t]).abs().sum().item() <= 1e-6
    assert relative(after[:, t], before[:, t]) > 1e-3


@every_variant
def test_documents_do_not_see_each_other(variant):
    """Changing a document leaves those before and after it as they were, and its gradient reaches only itself."""
    model, ids = model_of(variant), tokens_of(1, 60)
    first = torch.zeros(1, 60, dtype=torch.bool)
    first[0, [0, 20, 45]] = True
    changed = ids.clone()
    changed[0, 20:45] = (ids[0, 20:45] + 1) % 61
    with torch.no_grad():
        before, after = model(ids, first=first)[0], model(changed, first=first)[0]
    outside = torch.tensor([t for t in range(60) if not 20 <= t < 45])
    assert relative(after[:, outside], before[:, outside]) < 1e-6
    embedded = model.tok_embeddings(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, first=first)[0][0, 20:45].square().sum().backward()
    assert embedded.grad[0, outside].abs().max().item() == 0
    assert embedded.grad[0, 20:45].abs().max().item() > 0


# ---------------------------------------------------------------- gradients and dtypes


@every_variant
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_gradients_against_float64(variant, masked):
    layer, x, where = layer_of(variant), torch.randn(2, 70, 32), torch.arange(70)[None]
    weight, masks = torch.randn(2, 70, 32), {}
    if masked:
        keep, first = torch.rand(2, 70) < 0.8, torch.rand(2, 70) < 0.05
        weight, masks = weight * keep[..., None], {"keep": keep, "first": first}
    grads = []
    for dtype in (torch.float32, torch.float64):
        wide = copy.deepcopy(layer).to(dtype)
        z = x.clone().to(dtype).requires_grad_()
        (wide(z, where, **masks)[0] * weight).sum().backward()
        parameters = {k: p.grad for k, p in wide.named_parameters()}
        assert all(g is not None for g in parameters.values()) or variant == "plug-in"
        grads.append({"x": z.grad, **{k: g for k, g in parameters.items() if g is not None}})
    for key, exact in grads[1].items():
        # Where a feature's sum is near 0, relu may fall on either side of it.
        assert relative(grads[0][key], exact) < 1e-4, key


@every_variant
def test_activation_checkpointing_gives_the_same_gradients(variant):
    model, ids = model_of(variant).train(), tokens_of(2, 30)
    grads = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        model.loss(ids, ids)[1].backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for key in grads[0]:
        assert relative(grads[1][key], grads[0][key]) < 1e-6, key


@pytest.mark.parametrize("variant", LINEAR)
@pytest.mark.parametrize("lengths", [(100,), (64, 36), (1,) * 100], ids=["whole", "two", "tokens"])
def test_bfloat16_model_keeps_a_float32_state(variant, lengths):
    """The error does not grow with the number of calls, because the state is not rounded between them."""
    model, ids = model_of(variant), tokens_of(2, 100)
    exact = run_model(model, ids, (100,))[0]
    logits, past = run_model(copy.deepcopy(model).to(torch.bfloat16), ids, lengths)
    assert logits.dtype == torch.float32
    assert all(isinstance(s, LinearState) and s.S.dtype == torch.float32 for s in past.layers)
    assert relative(logits, exact) < 0.05


@every_variant
@pytest.mark.parametrize("lengths", [(70,), (1,) * 70], ids=["whole", "tokens"])
def test_autocast(variant, lengths):
    model, ids = model_of(variant), tokens_of(2, 70)
    exact = run_model(model, ids, (70,))[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits, past = run_model(model, ids, lengths)
    assert logits.dtype == torch.float32
    assert relative(logits, exact) < 0.05
    for state in past.layers:
        assert not isinstance(state, LinearState) or state.S.dtype == torch.float32


@every_variant
def test_a_model_used_in_inference_mode_first_can_still_be_trained(variant):
    """Nothing that a first call in inference mode leaves behind may meet a later call's graph."""
    torch.manual_seed(2)
    name, options, fields = VARIANTS[variant]
    # A number of heads and a base that no other test uses, so that no cache already holds its constants.
    fields = {**fields, "hidden_dim": 40, "n_heads": 5, "n_heads_kv": 5, "rotary_base_frequency": 777.0}
    model = create_model(tiny(name, options, **{**fields, "qk_head_dim": 8, "v_head_dim": 8}))
    ids = tokens_of(2, 10)
    with torch.inference_mode():
        past = run_model(model, ids, (9, 1))[1]
    model.loss(ids, ids)[1].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    # and its past may be continued outside
    for more in (run_model(model, ids, (1, 1, 8), past=past)[0], model(ids, past_key_values=past)[0]):
        assert relative(more, model(torch.cat((ids, ids), 1))[0][:, 10:]) < TOLERANCE


# ---------------------------------------------------------------- initialisation


@every_variant
def test_meta_initialisation_touches_every_parameter(variant):
    with torch.device("meta"):
        model = Transformer(config_of(variant))
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan"))
    torch.manual_seed(1)
    model.init_weights()
    for key, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), key
    torch.manual_seed(1)
    again = create_model(config_of(variant))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@every_variant
def test_new_keys_are_what_a_softmax_checkpoint_lacks(variant):
    """A softmax model's keys, less the dropped and with the new ones, are exactly this model's."""
    config, model = config_of(variant), model_of(variant)
    teacher = create_model(config, "softmax") if variant != "plug-in" else create_model(tiny("softmax"))
    ours, theirs = set(model.state_dict()), set(teacher.state_dict())
    dropped = {f"layers.{i}.attention.{k}" for i, b in enumerate(model.layers) for k in b.attention.dropped_keys()}
    assert ours == (theirs - dropped) | model.new_keys()
    assert not model.new_keys() & theirs


def test_identity_feature_map_starts_at_relu():
    for kind in ("full", "per_head"):
        layer = LinearAttention(tiny(), {"feature_map": kind, "feature_map_init": "identity"}, 0)
        x = torch.randn(2, 3, 4, 8)
        assert torch.equal(layer._totrain_embed(x), x.relu())


# ---------------------------------------------------------------- states: size, selection, forks


@every_variant
def test_state_bytes_and_nbytes_agree(variant):
    model = model_of(variant, torch.bfloat16)
    for lengths in ((7,), (40, 1, 1), (1,) * 70):
        _, past = run_model(model, tokens_of(3, sum(lengths)), lengths)
        assert past.nbytes() == model.state_bytes(3, sum(lengths)) > 0
        assert past.layers[0].nbytes() == model.layers[0].attention.state_bytes(3, sum(lengths))


@pytest.mark.parametrize("variant", LINEAR)
def test_linear_state_does_not_grow(variant):
    model = model_of(variant)
    assert model.state_bytes(1, 512) == model.state_bytes(1, 16384)
    assert model.flops_per_token(512) == model.flops_per_token(16384)
    assert run_model(model, tokens_of(1, 3), (3,))[1].nbytes() == run_model(model, tokens_of(1, 90), (90,))[1].nbytes()


@every_variant
def test_select_reorders_rows(variant):
    model, ids, more = model_of(variant), tokens_of(3, 14), tokens_of(4, 5)
    mask = torch.ones(3, 14)
    mask[1, :5] = 0
    _, past = run_model(model, ids, (13, 1), mask)
    rows = torch.tensor([2, 1, 1, 0])
    chosen = past.select(rows)
    assert chosen.positions.tolist() == [14, 9, 9, 14]
    out, _ = run_model(model, more, (2, 1, 2), past=chosen)
    for b, row in enumerate(rows):
        whole = torch.cat((ids[row][mask[row] > 0], more[b]))[None]
        assert relative(out[b], run_model(model, whole, (whole.shape[1],))[0][0, -5:]) < TOLERANCE
    assert past.positions.tolist() == [14, 9, 14]


@every_variant
def test_two_continuations_of_one_past(variant):
    """In lockstep, so that each would write where the other has just written."""
    model, prompt, left, right = model_of(variant), tokens_of(2, 9), tokens_of(2, 90), tokens_of(2, 90)
    _, past = run_model(model, prompt, (7, 1, 1))
    pasts, out = [past, past], [[], []]
    for t in range(90):
        for side, ids in enumerate((left, right)):
            logits, pasts[side] = run_model(model, ids[:, t : t + 1], (1,), past=pasts[side])
            out[side].append(logits)
    for side, ids in enumerate((left, right)):
        whole = run_model(model, torch.cat((prompt, ids), 1), (99,))[0][:, 9:]
        assert relative(torch.cat(out[side], 1), whole) < TOLERANCE


@every_variant
@pytest.mark.parametrize("seed", [0])
def test_a_tree_of_forks(variant, seed):
    """60 times: pick any past, select rows or go on from it in some gradient mode; each equals its text in one call."""
    rng, model = random.Random(seed), model_of(variant)
    modes = (torch.no_grad, torch.inference_mode, torch.enable_grad)
    ids = tokens_of(2, 3)
    known = [(run_model(model, ids, (3,))[1], ids)]
    for _ in range(60):
        past, ids = known[rng.randrange(len(known))] if rng.random() < 0.6 else known[-1]
        if rng.random() < 0.15:
            rows = torch.tensor([rng.randrange(2), rng.randrange(2)])
            known.append((past.select(rows), ids[rows]))
            continue
        more = tokens_of(2, rng.choice((1, 1, 1, 2, 5)))
        with rng.choice(modes)():
            logits, _, after = model(more, past_key_values=past, use_cache=True)
        ids = torch.cat((ids, more), 1)
        known.append((after, ids))
        assert relative(logits, run_model(model, ids, (ids.shape[1],))[0][:, -more.shape[1] :]) < TOLERANCE
    probe = tokens_of(2, 2)
    for past, ids in known:  # what each remembers is still its own
        out, _ = run_model(model, probe, (1, 1), past=past)
        whole = torch.cat((ids, probe), 1)
        assert relative(out, run_model(model, whole, (whole.shape[1],))[0][:, -2:]) < TOLERANCE


# ---------------------------------------------------------------- names


def test_registered_names():
    assert attention.names() == sorted(attention.names())
    assert {"linear", "softmax"} <= set(attention.names())
    for alias, name in (("linear_attn", "linear"), ("auto", "softmax"), ("torch_attn", "softmax")):
        assert attention.canonical(alias) == name
        assert attention.resolve(alias) is attention.resolve(name)
    assert attention.canonical("xformers_attn") == "softmax"
    for name in attention.names():
        assert issubclass(attention.resolve(name), Attention)


@pytest.mark.parametrize(
    ("wrong", "near"), [("linaer", "linear"), ("softmx", "softmax"), ("linear_atn", "linear_attn")]
)
def test_unknown_name_lists_the_known_ones_nearest_first(wrong, near):
    with pytest.raises(UserError) as refusal:
        create_model(tiny(wrong))
    sentence = str(refusal.value)
    listed = sentence.split("known: ")[1].split(";")[0].split(", ")
    assert repr(wrong) in sentence
    assert listed[0] == near
    assert set(listed) == {*attention.names(), *attention.PRESETS, *attention.ALIASES}


def test_plug_in():
    model = create_model(tiny(), PLUGIN, sharpness=3.0)
    assert isinstance(model.layers[0].attention, RunningMean)
    assert model.layers[0].attention.config.sharpness == 3.0
    assert model.config.attn_name == PLUGIN
    assert model.config.attn_options == {"sharpness": 3.0}
    assert ModelConfig.from_json(model.config.to_json()) == model.config


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("no_such_package:Mixer", "cannot be imported"),
        (f"{__name__}:NoSuchClass", "cannot be imported"),
        (f"{__name__}:MeanState", "not a subclass"),
        (f"{__name__}:TOLERANCE", "not a subclass"),
        (":Mixer", "cannot be imported"),
        ("torch:", "cannot be imported"),
    ],
)
def test_bad_plug_ins_are_one_sentence(name, part):
    with pytest.raises(UserError, match=part) as refusal:
        create_model(tiny(), name)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "key", "near"),
    [("linear", "use_decy", "use_decay"), ("linear", "feature_mpa", "feature_map"), (PLUGIN, "sharpnes", "sharpness")],
)
def test_unknown_option(name, key, near):
    with pytest.raises(UserError, match=f"{key}.*{near}"):
        create_model(tiny(name, {key: 1}))
    with pytest.raises(UserError, match=f"{key}.*{near}"):
        create_model(tiny(name), **{key: 1})


@pytest.mark.parametrize(
    ("key", "near"), [("use_decaay", "use_decay"), ("qknorm", "qk_norm"), ("rotary_base_freq", "rotary_base_frequency")]
)
@pytest.mark.parametrize("name", ["linear_attn", "auto"])
def test_unknown_json_key(name, key, near, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**tiny().to_json(), "attn_name": name, key: 1}))
    with pytest.raises(UserError) as refusal:
        create_model(path)
    assert repr(key) in str(refusal.value)
    if name == "linear_attn" or near != "use_decay":  # softmax has no decay to be near to
        assert repr(near) in str(refusal.value)
