"""The OpenLM-compatible Transformer, whatever its attention."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig, parse_rotary_scaling, shipped
from open_lm_linear.attention.base import Attention, State, truncated_normal
from open_lm_linear.cli import UserError, nearest
from open_lm_linear.norms import Norm, build_norm
from open_lm_linear.ops.losses import Teaching, TopTeaching, chunked_cross_entropy, chunked_distillation
from open_lm_linear.ops.native_pointwise import native_swiglu
from open_lm_linear.ops.recompute import recomputed

Tensor = torch.Tensor


class FeedForward(nn.Module):
    """What the feed-forward parts share: OpenLM's initialisation, by the depth of the block."""

    layer: int

    def init_weights(self) -> None:
        linears = [m for m in self.modules() if isinstance(m, nn.Linear)]
        for linear in linears:
            std = 1.0 / math.sqrt(linear.in_features)
            truncated_normal(linear.weight, std / math.sqrt(2 * (self.layer + 1)) if linear is linears[-1] else std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)


class SwiGLU(FeedForward):
    """w3(silu(gate) * up) with gate | up in one projection (OpenLM's ``w12``)."""

    def __init__(self, dim: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden, bias=bias)
        self.w3 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.gated(self.w12(x)))

    def gated(self, both: Tensor) -> Tensor:
        """silu(gate) * up (..., hidden) of gate | up (..., 2 hidden)."""
        done = native_swiglu(both)
        if done is not None:
            return done
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up


class TanhGeGLU(SwiGLU):
    """The same with the tanh form of gelu (``geglu_tanh``), as Gemma's."""

    def gated(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up


class GemmaGeGLU(FeedForward):
    """down(gelu(gate(x)) * up(x)) with biases and the erf gelu, as OpenLM's ``gemma_geglu``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden)
        self.up_proj = nn.Linear(dim, hidden)
        self.down_proj = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class GELU(nn.Sequential, FeedForward):
    """The plain two-layer part, under the keys ``0`` and ``2``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False))


class Embedding(nn.Embedding):
    """Token embeddings (B, T, hidden_dim), times ``scale`` where there is one, rounded to their dtype as Gemma's is."""

    def __init__(self, tokens: int, dim: int, scale: float | None = None) -> None:
        super().__init__(tokens, dim)
        self.scale = scale

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where normal numbers, of all things, import the compiler
            super().reset_parameters()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = super().forward(input_ids)
        return x if self.scale is None else x * torch.full((), self.scale, dtype=x.dtype, device=x.device)


def build_feed_forward(config: ModelConfig, layer: int) -> FeedForward | None:
    """The feed-forward part that OpenLM calls ``ffn_type``; None for ``none``, a block of its attention alone."""
    if config.ffn_type == "none":
        return None
    dims = config.hidden_dim, config.ffn_dim
    part: FeedForward
    if config.ffn_type in ("gelu", "gemma_geglu"):
        part = (GELU if config.ffn_type == "gelu" else GemmaGeGLU)(*dims)
    else:
        part = (TanhGeGLU if config.ffn_type == "geglu_tanh" else SwiGLU)(*dims, bias=config.ffn_bias)
    part.layer = layer
    return part


class Block(nn.Module):
    """h = x + attention(norm(x)); h + feed_forward(norm(h)), norms before, after, or on both sides.

    Without a feed-forward part (``ffn_type`` none) the block is h. ``step``, where there is one, may do a call in its
    place, with the same arguments and results; it gives None for a call that it does not take (`native_model`).
    """

    step: Callable[..., tuple[Tensor, State] | None] | None = None

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        name, options = config.attention_of(layer)
        self.attention: Attention = attention.resolve(name)(config, options, layer)
        self.feed_forward = build_feed_forward(config, layer)

        def norm(*placements: str) -> Norm | None:
            wanted = config.norm_placement in placements
            return build_norm(config.model_norm, config.hidden_dim, config.norm_eps) if wanted else None

        self.attention_norm, self.attention_post_norm = norm("before", "both"), norm("after", "both")
        fed = self.feed_forward is not None
        self.ffn_norm = norm("before", "both") if fed else None
        self.ffn_post_norm = norm("after", "both") if fed else None

    def init_weights(self) -> None:
        for part in self.children():
            part.init_weights()  # type: ignore[operator]

    def forward(self, x: Tensor, positions: Tensor, keep: Any, first: Any, state: Any) -> tuple[Tensor, State]:
        done = None if self.step is None else self.step(x, positions, keep, first, state)
        if done is not None:
            return done
        mixed, state = self.attention(self.before_attention(x), positions, keep=keep, first=first, state=state)
        return self.after_attention(x, mixed), state

    def trace(self, x: Tensor, positions: Tensor, first: Any, whole: bool = True) -> tuple[Tensor, Tensor | None]:
        """The attention's output and, if ``whole``, the residual stream behind the block, (B, T, hidden_dim) each."""
        mixed, _ = self.attention(self.before_attention(x), positions, first=first)
        return mixed, self.after_attention(x, mixed) if whole else None

    def before_attention(self, x: Tensor) -> Tensor:
        """What the attention gets of the residual stream (B, T, hidden_dim)."""
        return _normed(self.attention_norm, x)

    def after_attention(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream behind the block, from that before it and the attention's output."""
        h = x + _normed(self.attention_post_norm, mixed)
        if self.feed_forward is None:
            return h
        return h + _normed(self.ffn_post_norm, self.feed_forward(_normed(self.ffn_norm, h)))


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


@dataclass(frozen=True)
class Past:
    """What a model remembers of a batch: one state a layer and the next position (B,) of each row."""

    layers: tuple[State, ...]
    positions: Tensor

    def select(self, rows: Tensor) -> Past:
        """The past whose row i is this one's row ``rows[i]``: beam search, forks, dropping finished rows."""
        return Past(tuple(s.select(rows) for s in self.layers), self.positions.index_select(0, rows))

    def nbytes(self) -> int:
        """Bytes of all layers' states together, all rows."""
        return sum(s.nbytes() for s in self.layers)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name: ``positions`` and, for layer 0, ``layers.0.S`` or whatever its state holds."""
        states = {f"layers.{i}.{name}": x for i, s in enumerate(self.layers) for name, x in s.tensors().items()}
        return {"positions": self.positions, **states}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Past:
        """A past of the same kind of states that holds ``tensors``, named as `tensors` names them."""
        held: list[dict[str, Tensor]] = [{} for _ in self.layers]
        for key, value in tensors.items():
            if key != "positions":
                _, layer, name = key.split(".")
                held[int(layer)][name] = value
        layers = tuple(state.from_tensors(h) for state, h in zip(self.layers, held, strict=True))
        return Past(layers, tensors["positions"])


class Transformer(nn.Module):
    """OpenLM's Transformer: embeddings -> blocks -> norm -> output, keys as in its checkpoints.

    ``state_dict()`` has one key a parameter; ``load_state_dict`` also takes OpenLM's doubled ones (a tied
    ``output.weight``, the gelu feed-forward under both of its names) and refuses them when they disagree. ``step``,
    where there is one, may do a token of decoding in its place (`native_model`).
    """

    step: Callable[[Tensor, Past], tuple[Tensor, Past] | None] | None = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = attention.resolve(config.attn_name).complete(attention.expand(config))
        self.grad_checkpointing: int = 0  # recompute every so many blocks' activations; 0: keep them
        self.grad_checkpointing_mode = "full"
        dim = config.hidden_dim
        self.tok_embeddings = Embedding(config.vocab_size, dim, config.embedding_scale)
        self.post_embed_norm = build_norm(config.model_norm, dim, config.norm_eps) if config.post_embed_norm else None
        self.layers = nn.ModuleList(Block(self.config, i) for i in range(config.n_layers))
        self.norm = build_norm(config.model_norm, dim, config.norm_eps)
        self.output = None if config.weight_tying else nn.Linear(dim, config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(_fold_doubled_keys)

    def init_weights(self) -> None:
        """Initialises every parameter, so that a model built on the meta device is whole after ``to_empty``."""
        for module in self.children():
            for part in module if isinstance(module, nn.ModuleList) else (module,):
                self.init_part(part)

    def init_part(self, part: nn.Module) -> None:
        """Initialises one child of the model or of a block: embeddings, a block, a norm, the output."""
        if isinstance(part, (nn.Embedding, nn.Linear)):
            truncated_normal(part.weight, 1.0 / math.sqrt(self.config.hidden_dim))
        else:
            part.init_weights()  # type: ignore[operator]

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Past | None = None,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        first: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Past | None]:
        """OpenLM's forward.

        Args:
            input_ids: (B, T) token ids; or ``inputs_embeds`` (B, T, hidden_dim), which are taken as they are.
            past_key_values: the third value of an earlier call, whose tokens come before these.
            use_cache: whether to return the past for a later call.
            attention_mask: (B, T) or, as Hugging Face grows it, (B, past + T); 0 at padding, left or right.
            first: (B, T) bool, True at the first token of each packed document.

        Returns:
            logits (B, T, vocab_size) in float32, hidden (B, T, hidden_dim) after the final norm, and the past.
        """
        hidden, past = self.hidden(input_ids, inputs_embeds, past_key_values, attention_mask, first)
        return self.logits(hidden), hidden, past if use_cache else None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab_size) in float32 (or float64) from hidden (..., hidden_dim) after the final norm."""
        if self.output is not None:
            logits = self.output(hidden)
        else:
            logits = F.linear(hidden, self.head_weight().to(hidden.device, hidden.dtype))
        logits = logits.float() if logits.dtype != torch.float64 else logits
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def hidden(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None = None,
        past: Past | None = None,
        attention_mask: Tensor | None = None,
        first: Tensor | None = None,
        block_inputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, Past]:
        """The hidden states (B, T, hidden_dim) after the final norm, without logits, and the past.

        ``block_inputs``, where given, gets the input (B, T, hidden_dim) of every block.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = _normed(self.post_embed_norm, self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        keep = _keep(attention_mask, x.shape[1])
        positions, following = _positions(x, past, keep, first)
        states: list[State] = []
        for i, layer in enumerate(self.layers):
            before = None if past is None else past.layers[i]
            if block_inputs is not None:
                block_inputs.append(x)
            x, state = self._run(i, layer, x, positions, keep, first, before)
            states.append(state)
        return self.norm(x), Past(tuple(states), following)

    def trace(
        self,
        input_ids: Tensor,
        first: Tensor | None = None,
        streams: Sequence[Tensor] | None = None,
        whole: bool = True,
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """The residual stream before each block, its attention's output, and the stream behind it (B, T, hidden_dim).

        Args:
            streams: what each block reads, in place of what the block before it gave; no gradient links the blocks.
            whole: whether to go on from the attentions; without it there is no stream behind a block, and ``streams``
                must be given.
        """
        x = _normed(self.post_embed_norm, self.tok_embeddings(input_ids)) if streams is None else streams[0]
        positions, _ = _positions(x, None, None, first)
        found = []
        for i, block in enumerate(self.blocks()):
            x = x if streams is None else streams[i]
            mixed, behind = self._run(i, block.trace, x, positions, first, whole)
            found.append((x, mixed, behind))
            x = behind
        return found

    def _run(self, layer: int, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` of a block, whose activations are computed again in the backward pass where asked."""
        every = self.grad_checkpointing if self.training and torch.is_grad_enabled() else 0
        if every and layer % every == 0:
            return recomputed(self.grad_checkpointing_mode, function, *args)
        return function(*args)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        z_loss: float = 0.0,
        first: Tensor | None = None,
        per_sequence: bool = False,
        teaching: Teaching | TopTeaching | None = None,
    ) -> Tensor:
        """Sum of the cross entropy (nats) over targets (B, T) other than -100, plus z_loss * sum(logsumexp^2).

        The logits of all tokens never stand in memory at once. Returns a pair (2,): cross entropy, total; with a
        teacher (3,): cross entropy, divergence from it, weighted total; or as many of each sequence (B, 2 or 3).
        """
        hidden, _ = self.hidden(input_ids, first=first)
        weight, cap = self.head_weight(), self.config.logit_softcap

        def loss_of(h: Tensor, t: Tensor, teaching: Teaching | TopTeaching | None) -> Tensor:
            if teaching is not None:
                return chunked_distillation(h, weight, t, teaching, z_loss, softcap=cap)
            return chunked_cross_entropy(h, weight, t, z_loss, softcap=cap)

        if per_sequence:
            rows = enumerate(zip(hidden, targets, strict=True))
            return torch.stack([loss_of(h, t, teaching and teaching.row(i)) for i, (h, t) in rows])
        return loss_of(hidden.flatten(0, 1), targets.flatten(), teaching)

    def blocks(self) -> Iterator[Block]:
        """The blocks, typed."""
        return iter(self.layers)  # type: ignore[arg-type]

    def head_weight(self) -> Tensor:
        """The output matrix (vocab_size, hidden_dim), tied or not."""
        return self.tok_embeddings.weight if self.output is None else self.output.weight

    def new_keys(self) -> set[str]:
        """State-dict keys that a softmax checkpoint of this architecture does not have."""
        return {f"layers.{i}.attention.{k}" for i, b in enumerate(self.blocks()) for k in b.attention.new_keys()}

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of one forward token at context ``seq_len``: every matrix product, by each layer's own count."""
        total = 2.0 * self.config.vocab_size * self.config.hidden_dim
        for block in self.blocks():
            total += block.attention.flops_per_token(seq_len)
            if block.feed_forward is not None:
                total += sum(2.0 * m.weight.numel() for m in block.feed_forward.modules() if isinstance(m, nn.Linear))
        return total

    def state_bytes(self, batch: int, seq_len: int) -> int:
        return sum(block.attention.state_bytes(batch, seq_len) for block in self.blocks())


def _keep(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """The mask of the present tokens as bool (B, T), or None where nothing is padded."""
    if attention_mask is None:
        return None
    keep = attention_mask[:, -tokens:].bool()
    # Nothing padded is the quicker case, but a compiled graph cannot ask.
    return None if not torch.compiler.is_compiling() and bool(keep.all()) else keep


def _positions(x: Tensor, past: Past | None, keep: Tensor | None, first: Tensor | None) -> tuple[Tensor, Tensor]:
    """Position of each token (B or 1, T), counting neither padding nor earlier documents, and of the next (B,)."""
    batch, tokens = x.shape[:2]
    if tokens == 1 and past is not None and keep is None and first is None:
        return past.positions[:, None], past.positions + 1
    index = torch.arange(tokens, device=x.device)
    begin = torch.zeros(batch, dtype=torch.long, device=x.device) if past is None else past.positions
    if keep is None and first is None:
        return (index[None] if past is None else begin[:, None] + index), begin + tokens
    real = torch.ones(batch, tokens, dtype=torch.long, device=x.device) if keep is None else keep.long()
    count = begin[:, None] + real.cumsum(1)  # tokens so far, this one included
    if first is not None:
        # The count before the latest first token is what the present document does not have.
        before = torch.where(first, count - real, torch.zeros_like(count))
        count = count - before.cummax(1).values
    return (count - 1).clamp(min=0), count[:, -1]


def _fold_doubled_keys(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Removes the second name of a tensor that OpenLM stores under two; both must agree."""
    doubled = {}
    for key in list(state):
        name = key[len(prefix) :] if key.startswith(prefix) else ""
        if name == "output.weight" and module.config.weight_tying:  # type: ignore[union-attr]
            doubled[key] = prefix + "tok_embeddings.weight"
        for old, new in (("._ff_w1.", ".feed_forward.0."), ("._ff_w2.", ".feed_forward.2.")):
            if old in name:
                doubled[key] = prefix + name.replace(old, new)
    for key, kept in doubled.items():
        value = state.pop(key)
        if kept not in state:
            state[kept] = value
        elif state[kept].shape != value.shape or not torch.equal(state[kept], value):
            raise UserError(f"the checkpoint's {key!r} and {kept!r} name one tensor but hold different values.")


def read_config(source: str | Path, attn_name: str | None = None, **changes: Any) -> ModelConfig:
    """An architecture from a known name or a JSON file, with another attention or other fields where asked.

    A file that names its attention itself is read with OpenLM's defaults for it; an attention given here, the
    swap, starts from our own.

    Raises:
        UserError: an unknown name, or a file that is not a model config.
    """
    path = Path(source)
    if path.suffix != ".json":
        known = shipped("models", ".json")
        if str(source) not in known:
            raise UserError(
                f"unknown model {str(source)!r}; known: {nearest(str(source), known)}; or give a .json path."
            )
        path = known[str(source)]
    config = ModelConfig.from_file(path)
    if config.attn_name not in attention.PRESETS:
        config = attention.resolve(config.attn_name).from_openlm(config)
    return swap(config, attn_name, **changes)


def swap(config: ModelConfig, attn_name: str | None, **changes: Any) -> ModelConfig:
    """``config`` with another attention, and with ``changes``.

    Options of the old attention that the new one has too are kept; a preset (``hedgehog``) begins from its own.
    """
    if isinstance(changes.get("rotary_scaling"), str):
        changes = changes | parse_rotary_scaling(changes["rotary_scaling"], config.seq_len)
    own = {f.name for f in dataclasses.fields(ModelConfig)}
    config = attention.expand(config)
    name = attention.canonical(attn_name or config.attn_name)
    options = config.attn_options
    if attn_name in attention.PRESETS:
        options = attention.PRESETS[attn_name][1]
    elif name != config.attn_name:
        theirs = {f.name for f in dataclasses.fields(attention.resolve(name).Config)}
        options = {k: v for k, v in options.items() if k in theirs}
    given = {k: v for k, v in changes.items() if k not in own}
    fields = {k: v for k, v in changes.items() if k in own}
    return dataclasses.replace(config, attn_name=name, attn_options={**options, **given}, **fields)


def create_model(
    config: str | Path | ModelConfig,
    attn_name: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **changes: Any,
) -> Transformer:
    """A model with random weights from an OpenLM JSON (path or known name) or a ``ModelConfig``.

    Args:
        attn_name: another attention than the config's (``softmax``, ``linear``, ``package.module:Class``).
        changes: fields of the config or options of the attention, such as ``seq_len=4096`` or ``use_decay=False``.
    """
    from open_lm_linear.heap import in_memory  # here, since exports carry the top of this file

    if isinstance(config, ModelConfig):
        config = swap(config, attn_name, **changes)
    else:
        config = read_config(config, attn_name, **changes)
    with torch.device("meta"):
        model = Transformer(config)
    model = in_memory(model.to(dtype), device)
    model.init_weights()
    return model
