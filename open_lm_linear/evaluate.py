"""Measures a run against the model that it came from: held-out perplexity, decoding at growing context, samples.

    python -m open_lm_linear.evaluate --run RUN

writes ``evaluation.json`` into the run folder and has ``report`` show it. The functions take models and batches, so
that a script or a notebook can measure what it likes. Torch is imported inside, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from open_lm_linear import generate as generation
from open_lm_linear.cli import UserError, command, parse
from open_lm_linear.parallel import resolve_device

if TYPE_CHECKING:
    import torch

    from open_lm_linear.config import Config
    from open_lm_linear.model import Past, Transformer

FILE = "evaluation.json"
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384)
CPU_PREFILL_TOKENS = 4096  # a teacher's prefill is quadratic: 135M parameters at 16384 tokens take minutes on 2 cores
SAMPLE_TOKENS = 40
REPETITION_PENALTY = 1.2  # greedy text of small models runs in circles without it
PROMPTS = (
    "The capital of France is",
    "To read a text file line by line in Python,",
    "Once upon a time, in a small village by the sea,",
)


@dataclass(frozen=True)
class Perplexity:
    """Held-out perplexity of one model, per token of its own tokenizer."""

    tokens: int
    """Tokens that were predicted."""
    sequences: int
    nats_per_token: float
    nats_per_token_standard_error: float | None
    """Over sequences; None for a single one."""
    perplexity: float
    """exp(nats_per_token)."""
    seconds: float


def perplexity(
    model: Transformer, batches: Iterable[torch.Tensor], *, autocast: torch.dtype | None = None
) -> Perplexity:
    """Perplexity over ``batches`` (B, T + 1) of ids, each token predicted from those before it in its row.

    Args:
        batches: on any device; an id of -100 is not predicted.
        autocast: dtype of the matrix products, such as ``torch.bfloat16``; None computes in the weights' dtype.

    Raises:
        UserError: there is nothing to predict.
    """
    import torch

    from open_lm_linear.ops.losses import IGNORE

    device = model.head_weight().device
    context = torch.autocast(device.type, dtype=autocast) if autocast is not None else nullcontext()
    sums: list[float] = []
    counts: list[int] = []
    begin = generation.now(device)
    with torch.no_grad(), context:
        for batch in batches:
            for row in batch.to(device):  # row by row: the standard error needs each row's own sum
                inputs, targets = row[None, :-1].clamp(min=0), row[None, 1:]
                sums.append(float(model.loss(inputs, targets)[0]))
                counts.append(int((targets != IGNORE).sum()))
    if not sum(counts):
        raise UserError("there are no held-out tokens to measure on: give --val-data a manifest that has some.")
    tokens = sum(counts)
    mean = sum(sums) / tokens
    error = None
    if len(sums) > 1:
        # Of a ratio of sums over rows: var = n / (n - 1) * sum (sum_i - mean * count_i)^2 / tokens^2
        squares = sum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
        error = math.sqrt(len(sums) / (len(sums) - 1) * squares) / tokens
    seconds = generation.now(device) - begin
    return Perplexity(tokens, len(sums), mean, error, math.exp(min(mean, 700.0)), seconds)


@dataclass(frozen=True)
class Decoding:
    """One model decoding one sequence after ``context_tokens``."""

    model: str
    context_tokens: int
    state_bytes: int
    """What the model remembers of the sequence, counted from its tensors."""
    milliseconds_per_token: float
    """Median over the tokens timed."""
    milliseconds_per_token_p10: float
    milliseconds_per_token_p90: float
    prefill_tokens_per_second: float | None
    """From the beginning to this context; None where the cache was filled up in place of being computed."""
    tokens_timed: int


def decoding(
    models: Mapping[str, Transformer],
    contexts: Sequence[int] = CONTEXTS,
    *,
    ids: torch.Tensor | None = None,
    tokens: int = 16,
    warmup: int = 3,
    prefill_up_to: int | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Decoding]:
    """Bytes of state and time per token of each model at each context, one sequence at a time, greedily.

    The models take turns token by token, so that whatever else the machine does hits all of them. The prompt is read
    once, in pieces from context to context; decoding goes on from a fork of each past, which it does not disturb.

    Args:
        ids: (N,) ids of text, repeated to the longest context; None draws random ones.
        tokens: timed at each context, after ``warmup`` untimed ones.
        prefill_up_to: from this context on a key-value cache is filled up with its own keys and values in place of
            being computed in quadratic time: decoding does the same work on it. None computes all.
        progress: called with a line as each context begins.

    Raises:
        UserError: a context that is not above 0.
    """
    import torch

    contexts = sorted(set(contexts))
    if not contexts or contexts[0] < 1 or tokens < 1:
        raise UserError(f"--contexts {list(contexts)} and --timed-tokens {tokens} must be above 0.")
    if prefill_up_to is not None and prefill_up_to < 1:
        raise UserError(f"--prefill-up-to {prefill_up_to} is not above 0.")
    vocab_size = min(m.config.vocab_size for m in models.values())
    if ids is None:
        ids = torch.randint(vocab_size, (contexts[-1],), generator=torch.Generator().manual_seed(seed))
    generation.check_ids(ids, vocab_size)
    ids = ids.repeat(-(-contexts[-1] // len(ids)))[None, : contexts[-1]]
    readers = {name: _Reader(model, ids, prefill_up_to) for name, model in models.items()}
    rows: list[Decoding] = []
    for context in contexts:
        if progress is not None:
            progress(f"decoding at {context} tokens of context")
        sizes = [reader.advance(context).nbytes() for reader in readers.values()]
        times = _time_in_turns([reader.decode() for reader in readers.values()], warmup, tokens)
        for (name, reader), size, seconds in zip(readers.items(), sizes, times, strict=True):
            p10, median, p90 = (1e3 * t for t in _quantiles(seconds))
            rows.append(Decoding(name, context, size, median, p10, p90, reader.prefill_rate(), len(seconds)))
    return rows


class _Reader:
    """One model on its way through the ids (1, N): the past so far and the seconds that it took."""

    def __init__(self, model: Transformer, ids: torch.Tensor, prefill_up_to: int | None) -> None:
        self.model, self.device, self.limit = model, model.head_weight().device, prefill_up_to
        self.ids = ids.to(self.device)
        self.read, self.seconds, self.computed = 0, 0.0, True
        self.past: Past | None = None

    def advance(self, context: int) -> Past:
        """Reads on to ``context`` tokens: the past there."""
        computable = context if self.limit is None else min(context, self.limit)
        past = self._compute(max(computable, self.read))
        if self.read < context:
            filled = _filled_up(past, context - self.read)
            if filled is None:
                return self._compute(context)
            self.past, self.read, self.computed = filled, context, False
        assert self.past is not None
        return self.past

    def _compute(self, context: int) -> Past:
        if self.read < context:
            begin = generation.now(self.device)
            _, self.past = generation.prefill(self.model, self.ids[:, self.read : context], past=self.past)
            self.seconds += generation.now(self.device) - begin
            self.read = context
        assert self.past is not None
        return self.past

    def prefill_rate(self) -> float | None:
        return self.read / self.seconds if self.computed else None

    def decode(self) -> Iterator[float]:
        """Seconds of each further token, without end, from a fork of the past."""
        past, token = self.past, self.ids[:, self.read - 1 : self.read]
        while True:
            begin = generation.now(self.device)
            logits, past = generation.prefill(self.model, token, past=past)
            token = logits.argmax(-1, keepdim=True)
            yield generation.now(self.device) - begin


def _filled_up(past: Past, more: int) -> Past | None:
    """A key-value past with ``more`` tokens of its own repeated at its end; None where a state is another thing."""
    from open_lm_linear.attention.softmax import KVState

    layers = []
    for state in past.layers:
        if not isinstance(state, KVState):
            return None
        left = more
        while left:
            n = min(left, state.length)
            state = state.extended(state.k[:, :n], state.v[:, :n], state.document[:, :n], state.current, state.plain)
            left -= n
        layers.append(state)
    return dataclasses.replace(past, layers=tuple(layers), positions=past.positions + more)


def _time_in_turns(steps: list[Iterator[float]], warmup: int, tokens: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in steps]
    for i in range(warmup + tokens):
        for step, kept in zip(steps, times, strict=True):
            seconds = next(step)
            if i >= warmup:
                kept.append(seconds)
    return times


def _quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 10 %, 50 % and 90 % points."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[0], statistics.median(values), deciles[8]


def samples(
    models: Mapping[str, Transformer],
    tokenizer: Any,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_new_tokens: int = SAMPLE_TOKENS,
    repetition_penalty: float = REPETITION_PENALTY,
) -> list[dict[str, str]]:
    """What each model writes after each prompt, greedily: ``[{"prompt": ..., <model name>: continuation}, ...]``."""
    rows = []
    for prompt in prompts:
        row = {"prompt": prompt}
        for name, model in models.items():
            ids = generation.encode(tokenizer, prompt).to(model.head_weight().device)
            options = {"repetition_penalty": repetition_penalty, "eos_token_id": tokenizer.eos_token_id}
            out = generation.generate(model, ids, max_new_tokens=max_new_tokens, **options)
            row[name] = "".join(generation.stream_text(tokenizer, out[0, ids.shape[1] :].tolist()))
        rows.append(row)
    return rows


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 on a CPU that turns out slower at bfloat16 products, for want of an instruction."""
    import torch

    if device.type != "cpu":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        weight, x = (torch.ones(rows, 1024, dtype=dtype) for rows in (1024, 256))
        best = math.inf
        for _ in range(6):
            begin = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best = min(best, time.perf_counter() - begin)
        return best

    return min((torch.bfloat16, torch.float32), key=seconds)


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


Part = Literal["perplexity", "decoding", "samples"]


@dataclass(frozen=True)
class Args:
    """Flags of ``python -m open_lm_linear.evaluate``."""

    run: str
    """The run folder."""
    val_data: tuple[str, ...] = ()
    """Held-out data, as the trainer's --val-data. Not given: the run's."""
    max_val_tokens: int | None = None
    """Held-out tokens to use at most. Not given: all of them."""
    contexts: tuple[int, ...] = CONTEXTS
    """Tokens of context at which decoding is measured."""
    timed_tokens: int = 16
    """Tokens timed at each context."""
    prefill_up_to: int | None = None
    """Beyond this context fill up the teacher's cache, not compute it. Not given: 4096 on a CPU, never on a GPU."""
    prompts: tuple[str, ...] = PROMPTS
    """Beginnings that teacher and student go on from."""
    skip: tuple[Part, ...] = ()
    """Parts to leave out."""
    precision: Literal["amp_bf16", "fp32"] = "amp_bf16"
    """Of the perplexity: bfloat16 matrix products with float32 weights, or float32 throughout."""
    device: str = "auto"
    """auto: the first GPU, or the CPU where there is none."""


Loader = Callable[["torch.dtype"], "Transformer"]


def loaders(run: Path, cfg: Config, device: torch.device) -> dict[str, Loader]:
    """How to load what is compared: teacher (where the run began from one), swapped (before step 0) and uptrained."""
    from open_lm_linear import pretrained

    def teacher(dtype: torch.dtype) -> Transformer:
        return pretrained.load_pretrained(cfg.model.pretrained, dtype=dtype, device=device)

    def swapped(dtype: torch.dtype) -> Transformer:
        return pretrained.build_model(cfg.model, dtype=dtype, device=device, seed=cfg.run.seed)

    def uptrained(dtype: torch.dtype) -> Transformer:
        return pretrained.load_pretrained(run, dtype=dtype, device=device)

    found: dict[str, Loader] = {"teacher": teacher, "swapped": swapped, "uptrained": uptrained}
    if not cfg.model.pretrained:
        del found["teacher"]
    return found


def evaluate(args: Args) -> dict[str, Any]:
    """Measures a run folder and writes ``evaluation.json`` there; returns what it holds.

    Raises:
        UserError: not a run folder, no held-out data, or anything that the models' loading refuses.
    """
    from open_lm_linear import config

    run = Path(args.run)
    cfg = config.read_run_config(run)
    device = resolve_device(args.device)
    load = loaders(run, cfg, device)
    result: dict[str, Any] = {"format_version": 1, "run": str(run), "machine": machine(device), "seconds": {}}
    begin = time.perf_counter()

    def clock(part: str) -> None:
        nonlocal begin
        result["seconds"][part] = time.perf_counter() - begin
        begin = time.perf_counter()

    if "perplexity" not in args.skip:
        result["perplexity"] = _perplexities(load, cfg, args)
        clock("perplexity")
    if not {"decoding", "samples"} <= set(args.skip):
        dtype = fastest_dtype(device)
        pair = {name: loader(dtype) for name, loader in load.items() if name != "swapped"}
        result["model"] = pair["uptrained"].config.to_json()
        result["parameters"] = _parameters(pair["uptrained"])
        if "decoding" not in args.skip:
            result["decoding"] = _decodings(pair, args, device)
            clock("decoding")
        if "samples" not in args.skip:
            result["samples"] = _samples(pair, run, args)
            clock("samples")
    _write(run / FILE, result)
    return result


def _perplexities(load: Mapping[str, Loader], cfg: Config, args: Args) -> dict[str, Any]:
    """Held-out perplexity of each model; one of them in memory at a time."""
    import torch

    from open_lm_linear.data.stream import validation_batches

    data = cfg.data
    if args.val_data:
        data = dataclasses.replace(data, val_data=args.val_data, val_num_samples=None)
    if args.max_val_tokens is not None:
        data = dataclasses.replace(data, val_num_samples=args.max_val_tokens)
    if not data.val_data:
        raise UserError("this run has no held-out data: give --val-data DIR/manifest.jsonl, or --skip perplexity.")
    autocast = torch.bfloat16 if args.precision == "amp_bf16" else None
    result: dict[str, Any] = {"precision": args.precision, "data": data.val_data, "models": {}}
    for name, loader in load.items():
        _progress(f"held-out perplexity of the {name} model")
        model = loader(torch.float32).eval()
        seq_len = result["seq_len"] = data.seq_len or model.config.seq_len
        batches = validation_batches(
            data, global_batch_size=8, rank=0, world_size=1, seq_len=seq_len, vocab_size=model.config.vocab_size
        )
        result["models"][name] = dataclasses.asdict(perplexity(model, _shown(batches), autocast=autocast))
        del model
        gc.collect()
    return result


def _decodings(pair: Mapping[str, Transformer], args: Args, device: torch.device) -> dict[str, Any]:
    limit = args.prefill_up_to
    if limit is None and device.type == "cpu":
        limit = CPU_PREFILL_TOKENS
    rows = decoding(pair, args.contexts, tokens=args.timed_tokens, prefill_up_to=limit, progress=_progress)
    weights = str(pair["uptrained"].head_weight().dtype).removeprefix("torch.")
    return {"weights": weights, "text": "random ids", "prefill_up_to": limit, "rows": [vars(r) for r in rows]}


def _samples(pair: Mapping[str, Transformer], run: Path, args: Args) -> dict[str, Any]:
    from open_lm_linear import pretrained

    _progress("samples")
    rows = samples(pair, pretrained.load_tokenizer(run), args.prompts)
    return {"temperature": 0.0, "repetition_penalty": REPETITION_PENALTY, "max_new_tokens": SAMPLE_TOKENS, "rows": rows}


def _parameters(model: Transformer) -> dict[str, int]:
    new = model.new_keys()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return {"total": sum(sizes.values()), "new": sum(n for name, n in sizes.items() if name in new)}


def _shown(batches: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    from tqdm import tqdm

    return tqdm(batches, unit="batch", leave=False, disable=None)  # None: no bar where the output is not a terminal


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all. JSON has no NaN: a model that diverged is written with null."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@command
def main() -> None:
    args = parse(
        Args,
        prog="python -m open_lm_linear.evaluate",
        description="Measure a run: held-out perplexity, decoding at growing context, samples; then report.",
    )
    from open_lm_linear import report

    evaluate(args)
    report.report(Path(args.run))


if __name__ == "__main__":
    main()
