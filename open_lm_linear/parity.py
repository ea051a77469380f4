"""Teacher parity: our softmax or Mamba model against transformers' on the same weights, and where they part if they do.

    python -m open_lm_linear.convert --verify SOURCE [--text FILE] [--tokens 512] [--layers N]

transformers' model is filled with the checkpoint's tensors under their own names where the checkpoint is its own
(Hugging Face folders, and the GGUF files that it reads), so that no table of ours stands between the two. Of any other
format it is built from our export, and the report says so. A model too large for the memory is compared at the depth
that fits: the first layers, the final norm and the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import ProofError, UserError
from open_lm_linear.model import Transformer, swap
from open_lm_linear.pretrained.families import ATTENTIONS, FAMILIES, to_hugging_face
from open_lm_linear.pretrained.gguf_files import GGUFReader
from open_lm_linear.pretrained.loading import load_weights
from open_lm_linear.pretrained.matching import in_layout, match
from open_lm_linear.pretrained.readers import Reader
from open_lm_linear.pretrained.sources import Source

Tensor = torch.Tensor

LIMIT = 1e-4  # of ||ours - theirs|| / ||theirs||, in float32
SPARE = 2 << 30  # bytes of memory that are left to others when the depth is chosen


class ParityError(ProofError):
    """Our model and transformers' differ; the message names the first layer and tensor that depart."""


@dataclass(frozen=True)
class Point:
    """The same place in both models: its name in ours, and the two modules whose outputs are compared."""

    name: str
    ours: nn.Module
    theirs: nn.Module


def verify(source: Source, *, text: str = "", tokens: int = 512, layers: int = 0, **changes: Any) -> str:
    """Compares the two models on a text; one paragraph on what was compared and how far apart they are.

    Args:
        text: a UTF-8 file; empty: a page of the Python documentation.
        tokens: how many of its first tokens to run on.
        layers: compare models of the first so many layers; 0: all, or as many as memory takes.
        changes: fields of our config, such as another rotary layout, that must not change the function.

    Raises:
        UserError: a linear model, which has no counterpart, or nothing to compare with.
        ParityError: the logits differ by more than `LIMIT`.
    """
    if attention.canonical(source.config.attn_name) not in ATTENTIONS:
        raise UserError(f"{source.name} is a {source.config.attn_name} model: transformers has none to compare with.")
    if tokens < 1:
        raise UserError(f"--tokens must be at least 1, not {tokens}.")
    depth = layers or _depth_that_fits(source.config)
    if not 1 <= depth <= source.config.n_layers:
        raise UserError(f"--layers {depth}: the model has {source.config.n_layers}.")
    part = source if depth == source.config.n_layers else _first_layers(source, depth)
    ids, what = _ids(source, text, tokens)
    ours = _ours(part, changes)
    theirs, how = _theirs(part, whole=part is source)
    points = list(_points(ours, theirs))
    here, there = _record(points, lambda p: p.ours), _record(points, lambda p: p.theirs)
    with torch.no_grad():
        logits, reference = ours(ids)[0], theirs(ids, use_cache=False).logits.float()
    difference = _relative(logits, reference)
    depth_text = "" if part is source else f" (the first {depth} of {source.config.n_layers} layers)"
    if not difference <= LIMIT:  # nan is a difference too
        raise ParityError(
            f"{source.name}{depth_text}: our logits and those of {how} differ by {difference:.1e} relative on {what} "
            f"(limit {LIMIT:.0e}); {_first_departure(points, here, there, part, theirs, ours)}."
        )
    return (
        f"parity: {source.name} ({source.family}){depth_text}: our logits and those of {how} on {what} differ by "
        f"{difference:.1e} relative in float32 (limit {LIMIT:.0e}), at most {(logits - reference).abs().max():.1e} in "
        f"any logit; the furthest layer by {max(map(_relative, here, there)):.1e}"
    )


def _ours(source: Source, changes: dict[str, Any]) -> Transformer:
    with torch.device("meta"):
        model = Transformer(swap(source.config, None, **changes))
    matched = match(model, source)
    model = model.to(torch.float32).to_empty(device="cpu")
    load_weights(model, source, matched=matched)
    return model.eval()


def _theirs(source: Source, *, whole: bool) -> tuple[Any, str]:
    """transformers' model with the same weights in float32, and how it came about."""
    import transformers

    version = f"transformers {transformers.__version__}"
    if isinstance(source.reader, GGUFReader) and whole:
        place = source.tokenizer()
        assert place is not None
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(place[0], **place[1], dtype=torch.float32)
            return model.eval(), f"{version}, which read the GGUF file itself,"
        except Exception as error:  # it reads fewer architectures than we do
            print(f"note: {version} cannot read this GGUF file ({str(error).splitlines()[0]})")
    if source.hugging_face is not None:
        model = _empty(_shortened(source.hugging_face, source.config.n_layers))
        _fill_by_name(model, source)
        return model, version
    family, values = to_hugging_face(in_layout(source.config, "rotary"), source.family)
    model = _empty(values)
    with torch.device("meta"):
        twin = Transformer(in_layout(source.config, "rotary"))
    recipes = match(twin, source).kept
    params = dict(model.named_parameters())
    table = family.table(source.config.n_layers)
    for ours, recipe in recipes.items():
        begin = 0
        for name in table[ours]:
            end = begin + params[name].shape[0]
            params[name].data.copy_(recipe.read(begin, end))
            begin = end
    return model, f"{version}'s {family.architecture}, filled through our table,"


def _empty(values: dict[str, Any]) -> Any:
    """A model of transformers by its config, in float32, its values to come."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    # SDPA cannot cap logits, and there is nothing for it to do in Mamba.
    implementation = "eager" if values["model_type"] in ("gemma2", "mamba") else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()


def _fill_by_name(model: Any, source: Source) -> None:
    available = source.reader.names()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, param in model.named_parameters():
        if name not in available and not (tied and name == "lm_head.weight"):
            raise UserError(f"{source.name}: the tensor {name!r} is missing from the checkpoint.")
        param.data.copy_(source.reader.read(name))


class _Subset(Reader):
    """Another reader's tensors but for some."""

    def __init__(self, reader: Reader, without: set[str]) -> None:
        self.reader, self.without, self.label = reader, without, reader.label

    def names(self) -> set[str]:
        return self.reader.names() - self.without

    def where(self, name: str) -> str:
        return self.reader.where(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.reader.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(name)

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        return self.reader.read(name, begin, end)


def _first_layers(source: Source, depth: int) -> Source:
    """The checkpoint as if it ended after its first layers."""
    changes: dict[str, Any] = {"n_layers": depth}
    for name in ("no_rotary_layers", "rotary_local_layers", "sliding_window_layers"):
        value = getattr(source.config, name)
        changes[name] = None if value is None else tuple(i for i in value if i < depth)
    gone = {key for key in source.keys if key.startswith("layers.") and int(key.split(".")[1]) >= depth}
    without = {name for key in gone for name in source.keys[key]}
    return dataclasses.replace(
        source,
        config=dataclasses.replace(source.config, **changes),
        keys={key: names for key, names in source.keys.items() if key not in gone},
        reader=_Subset(source.reader, without),
        doubled=[(main, other) for main, other in source.doubled if main not in gone],
        checksums={name: value for name, value in source.checksums.items() if name not in without},
    )


def _shortened(values: dict[str, Any], depth: int) -> dict[str, Any]:
    """A config.json with fewer layers; lists of one entry a layer are cut."""
    before = values["num_hidden_layers"]
    cut = {
        k: v[:depth]
        for k, v in values.items()
        if isinstance(v, list) and len(v) == before and k.endswith(("layers", "types"))
    }
    return {**values, **cut, "num_hidden_layers": depth}


def _depth_that_fits(config: ModelConfig) -> int:
    """The layers of which two float32 models fit into the memory that is free now."""
    import psutil

    with torch.device("meta"):
        block = sum(p.numel() for p in Transformer(dataclasses.replace(_one_layer(config))).layers.parameters())
    ends = (2 - config.weight_tying) * config.vocab_size * config.hidden_dim
    free = psutil.virtual_memory().available - SPARE
    depth = min(config.n_layers, int((free / 8 - ends) // block))
    if depth < 1:
        raise UserError(f"two copies of one layer take more than the {free >> 20} MiB of memory that are free.")
    if depth < config.n_layers:
        print(f"note: the whole model does not fit twice into {free >> 20} MiB: comparing its first {depth} layers")
    return depth


def _one_layer(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        config, n_layers=1, no_rotary_layers=(), rotary_local_layers=(), sliding_window_layers=None
    )


def _ids(source: Source, text: str, tokens: int) -> tuple[Tensor, str]:
    """(1, tokens) ids of a text, and what they are in words; made-up ids where there is no tokenizer."""
    if text:
        try:
            content, what = Path(text).read_text(encoding="utf-8"), f"of {text}"
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {text} is not a readable UTF-8 file ({error}).") from error
    else:
        from pydoc_data.topics import topics

        content, what = "".join(topics[key] for key in sorted(topics)), "of the Python documentation"
    place = source.tokenizer()
    tokenizer = None
    if place is not None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(place[0], trust_remote_code=False, **place[1])
        except Exception:  # it raises many kinds for one fact: there is none
            tokenizer = None
    if tokenizer is None:
        if text:
            raise UserError(f"{source.name} has no tokenizer to read --text {text} with.")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(source.config.vocab_size, (1, tokens), generator=generator)
        return ids, f"{tokens} made-up tokens (the checkpoint has no tokenizer)"
    found = tokenizer(content[: 16 * tokens + 64]).input_ids[:tokens]
    if max(found) >= source.config.vocab_size:
        raise UserError(f"{source.name}: its tokenizer gives ids beyond its vocabulary of {source.config.vocab_size}.")
    return torch.tensor([found]), f"{len(found)} tokens {what}"


def _points(ours: Transformer, theirs: Any) -> Iterator[Point]:
    """The places to compare, in the order in which a forward pass comes by."""
    base = theirs.base_model
    for i, (block, layer) in enumerate(zip(ours.blocks(), base.layers, strict=True)):
        yield Point(
            f"layers.{i}.attention", block.attention, layer.mixer if hasattr(layer, "mixer") else layer.self_attn
        )
        if block.feed_forward is not None:
            yield Point(f"layers.{i}.feed_forward", block.feed_forward, layer.mlp)
        yield Point(f"layers.{i}", block, layer)
    yield Point("norm", ours.norm, base.norm_f if hasattr(base, "norm_f") else base.norm)


def _record(points: list[Point], side: Callable[[Point], nn.Module]) -> list[Tensor]:
    """A list that fills with the outputs of the points' modules as the model runs."""
    outputs: list[Tensor] = [torch.zeros(())] * len(points)

    def hook(i: int) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs[i] = (output[0] if isinstance(output, tuple) else output).detach()

        return keep

    for i, point in enumerate(points):
        side(point).register_forward_hook(hook(i))
    return outputs


def _relative(out: Tensor, ref: Tensor) -> float:
    return ((out.double() - ref.double()).norm() / ref.double().norm().clamp(min=1e-30)).item()


def _first_departure(
    points: list[Point], here: list[Tensor], there: list[Tensor], source: Source, theirs: Any, ours: Transformer
) -> str:
    """The first tensor of ours that is not theirs, or the first place whose output departs."""
    place = next(
        (p.name for p, a, b in zip(points, here, there, strict=True) if not _relative(a, b) <= LIMIT), "output"
    )
    family = FAMILIES.get(theirs.config.model_type)
    params = dict(theirs.named_parameters())
    table = {} if family is None else family.table(source.config.n_layers)
    for name, mine in ours.named_parameters():
        names = [n for n in table.get(name, ()) if n in params]
        if not names:
            continue
        other = torch.cat([params[n].detach() for n in names])
        if other.shape != mine.shape or not torch.allclose(mine.detach(), other, rtol=1e-3, atol=1e-5):
            return f"they part at {place!r}, and the first tensor that differs is {name!r} (theirs: {', '.join(names)})"
    return f"they part at {place!r}, where every tensor is the same: the computation differs"
