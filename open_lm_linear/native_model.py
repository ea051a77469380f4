"""A token of a few sequences through a block or a whole model in one call of the compiled code (`ops/native.cpp`).

`Block.forward` and `Transformer` are the definition. What they do in about a hundred small operators a block, each of
which takes longer to start than to run, is here a description by numbers and pointers. It is made once, and again where
a parameter has changed.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from open_lm_linear.attention.base import State
from open_lm_linear.attention.linear import GROUP_NORM_EPS, SUM_EPS, LinearAttention, LinearState
from open_lm_linear.feature_maps import EXP_LIMIT, FeatureMap
from open_lm_linear.model import GELU, Block, GemmaGeGLU, Past, SwiGLU, TanhGeGLU, Transformer
from open_lm_linear.norms import LayerNorm, Norm, RMSNorm
from open_lm_linear.ops.native import (
    NATIVE_DTYPES,
    NativeBlock,
    NativeCall,
    NativeLayer,
    NativeNorm,
    native_library,
    native_matrix,
    native_threads,
)
from open_lm_linear.ops.rows import ROWS

FEED_FORWARDS = {SwiGLU: 1, TanhGeGLU: 2, GemmaGeGLU: 3, GELU: 3}  # by activation: silu, gelu by tanh, gelu by erf
MAP_LAYOUTS = ("full", "per_head", "none")
ACTIVATIONS = ("relu", "elu", "softmax", "exp", "identity")
NORMALISERS = ("none", "rms_norm", "group_norm", "sum")
ROTARY_AT = ("none", "projection", "features")


def why_not_native(block: Block) -> str:
    """What keeps a block from the compiled code, in words; empty where nothing does."""
    if type(block.attention) is not LinearAttention:
        return f"it is for linear attention, not {type(block.attention).__name__}"
    if block.feed_forward is not None and type(block.feed_forward) not in FEED_FORWARDS:
        return f"it does not know the feed-forward part {type(block.feed_forward).__name__}"
    if block.attention.rotary.layout == "head_rotary" and block.attention.config.rotary_at != "none":
        return "it does not turn by the heads' index (head_rotary)"
    return _unreadable(block)


def _unreadable(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype not in NATIVE_DTYPES or not parameter.is_contiguous():
            return f"it takes float32 and bfloat16 in a CPU's memory, row by row, which {name} is not"
        if parameter.is_inference():
            return f"{name} was made in inference mode, where nothing tells that it has changed"
    return ""


def make_native(model: Transformer) -> None:
    """Gives every block that can have it its `NativeStep`, and a model of such blocks alone its `NativeModel`."""
    reasons = [why_not_native(block) for block in model.blocks()]
    for block, reason in zip(model.blocks(), reasons, strict=True):
        block.step = None if reason else NativeStep(block)
    model.step = None if any(reasons) or _unreadable(model) else NativeModel(model)


class NativeStep:
    """``block(x, positions, None, None, state)`` for one token of at most ``ROWS`` sequences, outside of autograd."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self._made: _Stack | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "_made": None}  # pointers do not travel

    def __call__(
        self, x: Tensor, positions: Tensor, keep: Any, first: Any, state: State | None
    ) -> tuple[Tensor, State] | None:
        """x (B, 1, hidden_dim) after the block, and its state; None where the block itself must do it."""
        if keep is not None or first is not None or torch.is_grad_enabled() or not _few(x):
            return None
        if self._made is None or not self._made.holds():
            self._made = None if why_not_native(self.block) else _Stack([_Description(self.block)])
        if self._made is None or x.dtype != self._made.blocks[0].dtype:
            return None
        x, y = x.contiguous(), torch.empty_like(x)
        call = NativeCall(x=x.data_ptr(), y=y.data_ptr(), bfloat16=x.dtype == torch.bfloat16)
        (after,) = self._made.through(call, x.shape[0], positions, [state])
        return y, after


class NativeModel:
    """``generate.prefill`` of one token of at most ``ROWS`` sequences after others."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self._made: tuple[_Ends, _Stack] | None = None
        self._last: weakref.ref[Past] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "_made": None, "_last": None}

    def __call__(self, ids: Tensor, past: Past) -> tuple[Tensor, Past] | None:
        """Logits (B, vocab_size) in float32 behind ids (B, 1), and the past; None where the model itself must do it.

        Neither has a gradient.

        Raises:
            IndexError: an id outside of the vocabulary.
        """
        if not _few(ids) or past.positions.device.type != "cpu":
            return None
        # A generation has the weights that it begins with: to look at all of them takes a twentieth of a token's time.
        goes_on = self._last is not None and self._last() is past
        if not goes_on and not self._described():
            return None
        assert self._made is not None
        ends, blocks = self._made
        if ids.dtype != torch.long or not ids.is_contiguous():
            ids = ids.long().contiguous()
        logits = torch.empty(len(ids), self.model.config.vocab_size)
        positions, following = past.positions.contiguous(), torch.empty_like(past.positions)
        call = NativeCall.from_buffer_copy(ends.call)
        call.ids, call.logits, call.next_positions = ids.data_ptr(), logits.data_ptr(), following.data_ptr()
        states = blocks.through(call, len(ids), positions, past.layers)
        cap = self.model.config.logit_softcap
        after = Past(tuple(states), following)
        self._last = weakref.ref(after)
        return (logits if cap is None else cap * torch.tanh(logits / cap)), after

    def _described(self) -> bool:
        """Whether the description is that of the model as it is now, made anew if need be."""
        if self._made is None or not all(made.holds() for made in self._made):
            self._made = None
            if not _unreadable(self.model):
                self._made = _Ends(self.model), _Stack([_Description(block) for block in self.model.blocks()])
        return self._made is not None


def _few(x: Tensor) -> bool:
    """Whether x (B, 1, ...) is a token of few sequences that nothing else has a hand in."""
    if x.shape[1] != 1 or not 0 < x.shape[0] <= ROWS or x.device.type != "cpu":
        return False
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")


class _Pointers:
    """Parameters as the compiled code sees them, and what must live as long as its pointers."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.kept: list[Tensor | None] = []
        self.owners = [(m._parameters, name) for m in modules for name in m._parameters]
        self.seen = self._now()

    def _now(self) -> list[tuple[int, int] | None]:
        with torch._C.DisableTorchFunctionSubclass():  # to ask a `RowsParameter` would take longer
            found = [parameters[name] for parameters, name in self.owners]
            return [None if p is None else (p.data_ptr(), p._version) for p in found]

    def holds(self) -> bool:
        """Whether every parameter lies where it lay and has the values that it had."""
        return self._now() == self.seen

    def matrix(self, part: Any, rows: slice | None = None) -> Any:
        bias = getattr(part, "bias", None)
        bias = None if bias is None else bias.detach().float().flatten()
        self.kept += [part.weight.detach(), bias]
        return native_matrix(part.weight, bias, rows)

    def norm(self, norm: Norm | None) -> NativeNorm:
        if norm is None:
            return NativeNorm()
        assert isinstance(norm, (LayerNorm, RMSNorm))
        gain = None if norm.weight is None else self.values(norm.weight.detach().float() + norm.offset)
        bias = None if norm.bias is None else self.values(norm.bias.detach())
        return NativeNorm(1 if isinstance(norm, RMSNorm) else 2, gain, bias, norm.eps)

    def values(self, x: Tensor) -> int:
        """The address of a float32 copy."""
        self.kept.append(x.float().contiguous())
        return self.kept[-1].data_ptr()  # type: ignore[union-attr]


class _Ends(_Pointers):
    """What lies before a model's blocks and behind them."""

    def __init__(self, model: Transformer) -> None:
        own = [model.tok_embeddings, model.post_embed_norm, model.norm, model.output]
        super().__init__(part for part in own if part is not None)
        head = model.tok_embeddings if model.output is None else model.output
        parts = {"embedding": self.matrix(model.tok_embeddings), "head": self.matrix(head)}
        norms = {"after_embedding": self.norm(model.post_embed_norm), "before_head": self.norm(model.norm)}
        scale = 1.0 if model.tok_embeddings.scale is None else model.tok_embeddings.scale
        self.call = NativeCall(embedding_scale=scale, **parts, **norms)  # but for a token's own


class _Description(_Pointers):
    """The numbers and pointers of a block."""

    def __init__(self, block: Block) -> None:
        super().__init__(block.modules())
        attention = block.attention
        assert isinstance(attention, LinearAttention)
        self.attention, self.native = attention, NativeBlock()
        self.dtype, self.summed = attention.in_proj.weight.dtype, attention.config.normaliser == "sum"
        self.elements = sum(p.numel() for p in block.parameters())
        self._dimensions(attention)
        self._parts(block, attention)
        self._feed_forward(block.feed_forward)

    # ---- what the block is ---------------------------------------------------------------------------------------

    def _dimensions(self, attention: LinearAttention) -> None:
        native, arch, options = self.native, attention.arch, attention.config
        native.dim, native.heads, native.kv_heads = arch.hidden_dim, arch.n_heads, arch.kv_heads
        native.k_dim, native.v_dim = arch.qk_dim, arch.v_dim
        native.map_rows, native.features = attention._totrain_embed.rows, attention.features
        native.map_layout = MAP_LAYOUTS.index(options.feature_map)
        native.map_activation = ACTIVATIONS.index(options.feature_activation)
        native.norms_at = 0 if not arch.qk_norm else 1 if attention.norms_projection() else 2
        native.norms_per_head = arch.qk_norm_per_head
        rotary = attention.rotary
        native.rotary_at = 0 if rotary.layout == "none" else ROTARY_AT.index(options.rotary_at)
        native.rotary_pairs, native.interleaved = rotary.turned // 2, rotary.layout == "llama_rotary"
        native.rotary_magnitude = rotary.magnitude
        fixed = native.rotary_at and not rotary.follows_length()
        self.frequencies = rotary.frequencies(torch.zeros(1, dtype=torch.long)) if fixed else None
        native.normaliser = NORMALISERS.index(options.normaliser)
        native.normaliser_eps, native.sum_least, native.exp_limit = GROUP_NORM_EPS, SUM_EPS, EXP_LIMIT
        native.key_scale = attention.features**-0.5

    def _parts(self, block: Block, attention: LinearAttention) -> None:
        native, norms = self.native, ("q_norm", "k_norm")
        log_decay = attention._log_decay(torch.device("cpu"))
        native.decay = None if log_decay is None else self.values(log_decay.detach().exp())
        native.before_attention, native.before_ffn = self.norm(block.attention_norm), self.norm(block.ffn_norm)
        native.after_attention = self.norm(block.attention_post_norm)
        native.after_ffn = self.norm(block.ffn_post_norm)
        if native.norms_at:
            prefix = "" if native.norms_at == 1 else "_totrain_"
            native.q_norm, native.k_norm = (self.norm(getattr(attention, prefix + name)) for name in norms)
        native.in_proj, native.out_proj = self.matrix(attention.in_proj), self.matrix(attention.out_proj)
        keys: FeatureMap = attention._totrain_embed_kv or attention._totrain_embed
        if native.map_layout != MAP_LAYOUTS.index("none"):
            native.q_map, native.k_map = self.matrix(attention._totrain_embed), self.matrix(keys)
        if attention.config.output_gate:
            native.gate = self.matrix(attention._totrain_gate)

    def _feed_forward(self, part: nn.Module | None) -> None:
        if part is None:
            return
        native, native.ffn = self.native, FEED_FORWARDS[type(part)]  # type: ignore[index]
        if isinstance(part, SwiGLU):
            hidden = part.w3.in_features
            native.ffn_gate = self.matrix(part.w12, slice(0, hidden))
            native.ffn_up, native.ffn_down = self.matrix(part.w12, slice(hidden, None)), self.matrix(part.w3)
        elif isinstance(part, GemmaGeGLU):
            native.ffn_gate, native.ffn_up = self.matrix(part.gate_proj), self.matrix(part.up_proj)
            native.ffn_down = self.matrix(part.down_proj)
        else:
            native.ffn_gate, native.ffn_down = self.matrix(part[0]), self.matrix(part[2])  # type: ignore[index]
        native.hidden = native.ffn_gate.out


class _Stack:
    """Blocks one behind the other."""

    def __init__(self, blocks: Sequence[_Description]) -> None:
        self.blocks = blocks
        self.elements = sum(made.elements for made in blocks)
        self.layers = (NativeLayer * len(blocks))()  # but for the states, and for frequencies that follow the length
        for layer, made in zip(self.layers, blocks, strict=True):
            layer.block = ctypes.addressof(made.native)
            layer.frequencies = None if made.frequencies is None else made.frequencies.data_ptr()

    def holds(self) -> bool:
        """Whether every block is what it was."""
        return all(made.holds() for made in self.blocks)

    def through(
        self, call: NativeCall, batch: int, positions: Tensor, states: Sequence[State | None]
    ) -> list[LinearState]:
        """Makes a call, but for its ends, and does it: the states (B, ...) behind the blocks.

        The weights that went by have left nothing of this in the processor's caches, which makes every line of it
        five times as long as it seems.
        """
        library, positions = native_library(), positions.contiguous()
        assert library is not None
        layers = type(self.layers).from_buffer_copy(self.layers)
        kept: list[Tensor] = []
        after: list[LinearState] = []
        for layer, made, state in zip(layers, self.blocks, states, strict=True):
            native = made.native
            if native.rotary_at and made.frequencies is None:
                kept.append(made.attention.rotary.frequencies(positions[:, None]))
                layer.frequencies = kept[-1].data_ptr()
            S = torch.empty(batch, native.heads, native.features, native.v_dim)
            Z = torch.empty(batch, native.heads, native.features, 1) if made.summed else None
            if state is not None:
                assert isinstance(state, LinearState)
                kept.append(state.S.contiguous())
                layer.S = kept[-1].data_ptr()
                if state.Z is not None:
                    kept.append(state.Z.contiguous())
                    layer.Z = kept[-1].data_ptr()
            layer.next_S, layer.next_Z = S.data_ptr(), None if Z is None else Z.data_ptr()
            after.append(LinearState(S, Z))
        call.threads = native_threads(self.elements)
        call.rows, call.dim, call.layers = batch, self.blocks[0].native.dim, len(layers)
        call.layer, call.positions = ctypes.addressof(layers), positions.data_ptr()
        call.position_stride = int(len(positions) > 1)
        memory = torch.empty(library.token_memory(ctypes.byref(call)))
        call.memory = memory.data_ptr()
        if library.token_step(ctypes.byref(call)):
            raise IndexError("a token id is outside of the model's vocabulary")
        return after
