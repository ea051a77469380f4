"""Text from a model: the prompt in pieces, then token by token, whatever the attention.

    python -m open_lm_linear.generate --checkpoint RUN --input-text "The capital of France is" --max-new-tokens 64

Torch is imported inside the functions, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from open_lm_linear.cli import UserError, command, parse
from open_lm_linear.parallel import resolve_device

if TYPE_CHECKING:
    import torch

    from open_lm_linear.model import Past, Transformer

PREFILL_CHUNK = 2048  # tokens of the prompt in one call: bounds the memory of activations, not the result


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The filters apply in this order: repetition, temperature, top-k, top-p."""

    temperature: float = 0.0
    """0 takes the likeliest token; above, logits are divided by it and the token is drawn."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probability reaches this (1: from all)."""
    top_k: int = 0
    """Draw from the k likeliest tokens (0: from all)."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that have occurred, the prompt's too, and multiplies negative ones (1: off)."""

    def check(self) -> None:
        """Raises UserError for a value out of range."""
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature} is not 0 (the likeliest token) or above.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} is not above 0 and at most 1.")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} is below 0; 0 switches it off.")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(f"--repetition-penalty {self.repetition_penalty} is not above 0; 1 switches it off.")


@dataclass
class Stats:
    """What a generation took; filled in as it goes on. Seconds count the model and the sampling, not the reader."""

    prompt_tokens: int = 0
    """Tokens of the longest row, padding included."""
    new_tokens: int = 0
    """Tokens of each row."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    state_bytes: int = 0
    """Of all rows together, after the last token that was read."""

    def summary(self) -> str:
        """One line of rates; a rate whose time was not measured is left out."""
        parts = [f"prefill {self.prompt_tokens} tokens at {_rate(self.prompt_tokens, self.prefill_seconds)}"]
        if self.decode_steps:
            milliseconds = 1e3 * self.decode_seconds / self.decode_steps
            parts.append(f"decode {_rate(self.decode_steps, self.decode_seconds)} ({milliseconds:.1f} ms per token)")
        return "; ".join([*parts, f"state {self.state_bytes / 1e6:.2f} MB"])


def generate(
    model: Transformer,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    attention_mask: torch.Tensor | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[torch.Tensor], None] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    stats: Stats | None = None,
) -> torch.Tensor:
    """The prompts (B, T) with what follows them: (B, T + new), new at most ``max_new_tokens``.

    Args:
        eos_token_id: a row ends with any of these; rows that end before the others are filled with the first of them.
        attention_mask: (B, T), 0 at the left padding of shorter prompts.
        seed: makes sampling reproducible; or give a ``generator`` on the model's device.
        on_token: called with the ids (B,) of each step.
        stats: filled in with tokens, seconds and bytes.

    Raises:
        UserError: an option out of range, an empty prompt, an id beyond the vocabulary, right padding.
    """
    import torch

    if seed is not None:
        if generator is not None:
            raise ValueError("give either seed or generator")
        generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty)
    ids = [input_ids]
    for token in stream(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_id=eos_token_id,
        attention_mask=attention_mask,
        generator=generator,
        prefill_chunk=prefill_chunk,
        stats=stats,
    ):
        ids.append(token[:, None])
        if on_token is not None:
            on_token(token)
    return torch.cat(ids, 1)


def stream(
    model: Transformer,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    attention_mask: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    stats: Stats | None = None,
) -> Iterator[torch.Tensor]:
    """As ``generate``, but yields the ids (B,) of each step as soon as they are drawn."""
    sampling = sampling or Sampling()
    sampling.check()
    _check_prompt(model, input_ids, attention_mask)
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens} is not above 0.")
    eos = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    stats = Stats() if stats is None else stats
    return _stream(model, input_ids, attention_mask, max_new_tokens, sampling, eos, generator, prefill_chunk, stats)


def _stream(
    model: Transformer,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    eos: list[int],
    generator: torch.Generator | None,
    prefill_chunk: int,
    stats: Stats,
) -> Iterator[torch.Tensor]:
    import torch

    begin = now(input_ids.device)
    logits, past = prefill(model, input_ids, attention_mask=attention_mask, chunk=prefill_chunk)
    seen = _seen(logits, input_ids, attention_mask) if sampling.repetition_penalty != 1 else None
    ends = torch.tensor(eos, dtype=torch.long, device=input_ids.device)
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    token = input_ids[:, -1]
    stats.prompt_tokens = input_ids.shape[1]
    stats.prefill_seconds = now(input_ids.device) - begin
    for step in range(max_new_tokens):
        begin = now(input_ids.device)
        if step:
            logits, past = prefill(model, token[:, None], past=past)
            stats.decode_steps += 1
        token = next_token(logits, sampling, seen, generator)
        if eos:
            token = torch.where(finished, ends[0], token)
            finished = finished | torch.isin(token, ends)
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        done = bool(eos) and bool(finished.all())
        if step:
            stats.decode_seconds += now(input_ids.device) - begin
        stats.new_tokens, stats.state_bytes = step + 1, past.nbytes()
        yield token
        if done:
            return


def prefill(
    model: Transformer,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    past: Past | None = None,
    chunk: int = PREFILL_CHUNK,
) -> tuple[torch.Tensor, Past]:
    """Reads tokens (B, T), T > 0, in pieces of ``chunk``: the logits (B, vocab_size) after the last, and the past.

    Only the last position's logits are computed. ``past`` is what an earlier call returned; it stays valid.
    """
    import torch

    if model.step is not None and past is not None and attention_mask is None:
        done = model.step(input_ids, past)
        if done is not None:
            return done
    with torch.no_grad(), _products_of_one_row(model, input_ids):
        for begin in range(0, input_ids.shape[1], chunk):
            span = slice(begin, begin + chunk)
            mask = None if attention_mask is None else attention_mask[:, span]
            hidden, past = model.hidden(input_ids[:, span], past=past, attention_mask=mask)
        assert past is not None
        return model.logits(hidden[:, -1]), past


def lay_out(model: Transformer) -> Transformer:
    """``model``, made ready for decoding on a CPU, in place; on other devices it is left as it is.

    Matrices multiply few rows by compiled code (`ops/native.cpp`), which reads them from huge pages, and blocks of
    linear attention, or a whole model of them, do a token in one call of it. Values, shapes and names stay; an
    optimizer that was made before has other parameters. Where that code cannot be built, a warning says so once, and
    nothing changes. After parts of the model were exchanged for others, call it again.
    """
    import torch

    from open_lm_linear.feature_maps import FeatureMap
    from open_lm_linear.heap import to_huge_pages
    from open_lm_linear.native_model import make_native
    from open_lm_linear.ops.native import native_library, takes_matrix
    from open_lm_linear.ops.rows import RowsParameter

    if model.head_weight().device.type != "cpu" or native_library() is None:
        return model
    parts: list[Any] = [
        part
        for part in model.modules()
        if isinstance(part, torch.nn.Linear) or (isinstance(part, FeatureMap) and part.layout == "full")
    ]
    parts += [model.tok_embeddings] if model.output is None else []
    parts = [part for part in parts if takes_matrix(part.weight) and type(part.weight) is torch.nn.Parameter]
    to_huge_pages(part.weight for part in parts)
    for part in parts:
        part.weight = RowsParameter(part.weight, part.weight.requires_grad)
    make_native(model)
    return model


@contextlib.contextmanager
def _products_of_one_row(model: Transformer, input_ids: torch.Tensor) -> Iterator[None]:
    """torch's own product of a bfloat16 matrix and one row reads a CPU's memory twice as fast as oneDNN's."""
    import torch

    onednn: Any = torch.backends.mkldnn
    weight, before = model.head_weight(), onednn.enabled
    plain = type(weight) is torch.nn.Parameter  # no `RowsParameter`, which has a product of its own
    if plain and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and input_ids.numel() == 1:
        onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = before


def next_token(
    logits: torch.Tensor,
    sampling: Sampling,
    seen: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Ids (B,) drawn from logits (B, V); ``seen`` (B, V) is True at the tokens that the repetition penalty hits."""
    import torch

    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(probabilities(logits, sampling), 1, generator=generator)[:, 0]


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What a token is drawn from, (B, V): softmax(logits / temperature) within top-k, then within top-p."""
    import torch

    # The largest logit is taken off first, since a small temperature could make the quotient overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        values, index = logits.topk(sampling.top_k, -1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, index, values)
    p = logits.softmax(-1)
    if sampling.top_p < 1:
        values, index = p.sort(-1, descending=True)
        before = values.cumsum(-1) - values
        p = torch.zeros_like(p).scatter(-1, index, values.masked_fill(before >= sampling.top_p, 0.0))
        p = p / p.sum(-1, keepdim=True)
    return p


def stream_text(tokenizer: Any, ids: Iterable[int]) -> Iterator[str]:
    """The text of a growing list of ids in whole characters: a piece waits until its last character is complete.

    Each piece is decoded after the one before it, since tokenizers write a word differently at the start of a text.
    """

    def decode(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before: list[int] = []  # written, kept as context
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        known, text = decode(before), decode(before + waiting)
        if len(text) > len(known) and not text.endswith("\ufffd"):  # what half a character decodes to
            yield text[len(known) :]
            before, waiting = waiting, []
    rest = decode(before + waiting)[len(decode(before)) :]
    if rest:
        yield rest


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Raises UserError where an id is not in [0, vocab_size)."""
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"the prompt has token id {low if low < 0 else high}, outside the model's vocabulary of {vocab_size}: "
            "the tokenizer belongs to another model."
        )


def _check_prompt(model: Transformer, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (batch, tokens), not {tuple(input_ids.shape)}")
    if input_ids.numel() == 0:
        raise UserError("the prompt has no tokens: give at least one character.")
    check_ids(input_ids, model.config.vocab_size)
    if attention_mask is None:
        return
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)} differ")
    if not bool(attention_mask[:, -1].bool().all()):
        raise UserError("generation goes on from the last column, so pad the prompts on the left and leave none empty.")


def _seen(logits: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, V): True at the ids of each row's prompt, padding left out."""
    import torch

    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    return torch.zeros_like(logits, dtype=torch.long).scatter_add_(1, input_ids, real) > 0


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if seconds else "-"


@dataclass(frozen=True)
class Args:
    """Flags of ``python -m open_lm_linear.generate``."""

    checkpoint: str
    """A run folder, a Hugging Face folder or hub id, a GGUF file, or a preset such as smollm2."""
    input_text: str
    """The prompt; - reads it from standard input."""
    max_new_tokens: int = 64
    """Stop after so many tokens, if the model has not ended before."""
    sampling: Sampling = field(default_factory=Sampling)
    """Sampling."""
    seed: int = 0
    """Of the draws, where the temperature is above 0."""
    chat: bool = False
    """Put the prompt into the tokenizer's chat template as a user's message."""
    model: str = ""
    """Architecture of weights that do not say their own (an OpenLM .pt): a known name or a .json path."""
    tokenizer: str = ""
    """Where the tokenizer lies, if not with the checkpoint."""
    attn_name: str | None = None
    """Another attention than the checkpoint's: swaps it, its new parameters untrained."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """auto: the first GPU, or the CPU where there is none."""


def encode(tokenizer: Any, text: str, *, chat: bool = False) -> torch.Tensor:
    """The prompt's ids (1, T), by the tokenizer's own template where ``chat``.

    Raises:
        UserError: an empty prompt, or ``chat`` with a tokenizer that has no template.
    """
    import torch

    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("this checkpoint's tokenizer has no chat template: leave out --chat.")
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise UserError("--input-text has no tokens: give at least one character.")
    return torch.tensor([ids], dtype=torch.long)


def run(args: Args) -> None:
    """Streams the text to standard output, and what it took to standard error."""
    args.sampling.check()
    text = sys.stdin.read() if args.input_text == "-" else args.input_text
    if not text:
        raise UserError("--input-text is empty: give at least one character.")
    import torch

    from open_lm_linear import pretrained

    device = resolve_device(args.device)
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    tokenizer = pretrained.load_tokenizer(args.tokenizer or args.checkpoint)
    ids = encode(tokenizer, text, chat=args.chat).to(device)
    model = pretrained.load_pretrained(
        args.checkpoint, attn_name=args.attn_name, model=args.model, dtype=getattr(torch, dtype), device=device
    )
    model = lay_out(model).eval()
    stats = Stats()
    tokens = stream(
        model,
        ids,
        max_new_tokens=args.max_new_tokens,
        sampling=args.sampling,
        eos_token_id=tokenizer.eos_token_id,
        generator=torch.Generator(device=device).manual_seed(args.seed),
        stats=stats,
    )
    for piece in stream_text(tokenizer, (int(token[0]) for token in tokens)):
        print(piece, end="", flush=True)
    print(flush=True)
    print(stats.summary(), file=sys.stderr)


@command
def main() -> None:
    run(parse(Args, prog="python -m open_lm_linear.generate", description="Generate text from a checkpoint."))


if __name__ == "__main__":
    main()
