"""Measures a run against the model that it came from: held-out perplexity, decoding at growing context, samples.

What was measured goes to ``evaluation.json`` in the run folder. The functions take models and batches, so that a script
or a notebook can measure what it likes. Torch is imported inside, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from open_lm_linear import generate as generation
from open_lm_linear.cli import UserError
from open_lm_linear.data.stream import DataConfig
from open_lm_linear.decoding import CONTEXTS, decoding
from open_lm_linear.evaluation.estimates import ratio
from open_lm_linear.parallel import resolve_device
from open_lm_linear.stages import stage_folders

if TYPE_CHECKING:
    import torch

    from open_lm_linear.config import Config
    from open_lm_linear.model import Transformer

FILE = "evaluation.json"
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
    model: Transformer,
    batches: Iterable[torch.Tensor],
    *,
    autocast: torch.dtype | None = None,
    data: DataConfig | None = None,
) -> Perplexity:
    """Perplexity over ``batches`` (B, T + 1) of ids, each token predicted from those before it in its row.

    Args:
        batches: on any device; an id of -100 is not predicted.
        autocast: dtype of the matrix products, such as ``torch.bfloat16``; None computes in the weights' dtype.
        data: what is masked and where documents begin, as in training; None: nothing, one document a row.

    Raises:
        UserError: there is nothing to predict.
    """
    import torch

    from open_lm_linear.data.masks import inputs_and_targets
    from open_lm_linear.ops import products
    from open_lm_linear.ops.losses import IGNORE

    device = model.head_weight().device
    context = products.autocast(device, autocast) if autocast is not None else nullcontext()
    sums: list[float] = []
    counts: list[int] = []
    begin = generation.now(device)
    with torch.no_grad(), context:
        for batch in batches:
            if not len(batch):
                continue
            inputs, targets, first = inputs_and_targets(batch.to(device), data or DataConfig())
            sums += model.loss(inputs, targets, first=first, per_sequence=True)[:, 0].tolist()
            counts += (targets != IGNORE).sum(1).tolist()
    if not sum(counts):
        raise UserError("there are no held-out tokens to measure on: give --val-data a manifest that has some.")
    mean, error = ratio(sums, counts)
    seconds = generation.now(device) - begin
    return Perplexity(sum(counts), len(sums), mean, error, math.exp(min(mean, 700.0)), seconds)


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
class RunArgs:
    """Measure a run: held-out perplexity, decoding at growing context, samples; then report."""

    run: str = ""
    """The run folder; of a run with stages the one that holds them."""
    beside: tuple[str, ...] = ()
    """Other runs' folders, whose losses the report draws beside this one's."""
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


Loader = Callable[["torch.dtype"], "Transformer"]


def loaders(run: Path, cfg: Config, device: torch.device) -> dict[str, Loader]:
    """How to load what is compared: teacher (where the run began from one), swapped (before step 0) and uptrained.

    They come laid out for decoding.

    Args:
        run: the folder of the run or of its last stage.
        cfg: what it began with, which in a run with stages is the first one's.
    """
    from open_lm_linear import pretrained

    def teacher(dtype: torch.dtype) -> Transformer:
        return pretrained.load_pretrained(cfg.model.pretrained, dtype=dtype, device=device, model=cfg.model.model)

    def swapped(dtype: torch.dtype) -> Transformer:
        return pretrained.build_model(cfg.model, dtype=dtype, device=device, seed=cfg.run.seed)

    def uptrained(dtype: torch.dtype) -> Transformer:
        return pretrained.load_pretrained(run, dtype=dtype, device=device)

    found: dict[str, Loader] = {"teacher": teacher, "swapped": swapped, "uptrained": uptrained}
    if not cfg.model.pretrained:
        del found["teacher"]
    return {name: _laid_out(load) for name, load in found.items()}


def _laid_out(load: Loader) -> Loader:
    return lambda dtype: generation.lay_out(load(dtype))


def evaluate_run(args: RunArgs, device: str = "auto") -> dict[str, Any]:
    """Measures a run folder and writes ``evaluation.json`` there; returns what it holds.

    Raises:
        UserError: not a run folder, no held-out data, or anything that the models' loading refuses.
    """
    import torch

    from open_lm_linear import config
    from open_lm_linear.ops.products import product_dtype

    run = Path(args.run)
    stages = stage_folders(run)
    cfg = config.read_run_config(stages[-1])
    place = resolve_device(device)
    load = loaders(stages[-1], config.read_run_config(stages[0]), place)
    result: dict[str, Any] = {"format_version": 1, "run": str(run), "machine": machine(place), "seconds": {}}
    if args.beside:
        for other in args.beside:
            config.read_run_config(stage_folders(Path(other))[0])  # is it a run?
        result["beside"] = list(args.beside)
    begin = time.perf_counter()

    def clock(part: str) -> None:
        nonlocal begin
        result["seconds"][part] = time.perf_counter() - begin
        begin = time.perf_counter()

    if "perplexity" not in args.skip:
        result["perplexity"] = _perplexities(load, cfg, args)
        clock("perplexity")
    if not {"decoding", "samples"} <= set(args.skip):
        dtype = product_dtype(torch.bfloat16, place)
        pair = {name: loader(dtype) for name, loader in load.items() if name != "swapped"}
        result["model"] = pair["uptrained"].config.to_json()
        result["parameters"] = _parameters(pair["uptrained"])
        if "decoding" not in args.skip:
            result["decoding"] = _decodings(pair, args, place)
            clock("decoding")
        if "samples" not in args.skip:
            result["samples"] = _samples(pair, stages[-1], args)
            clock("samples")
    write_json(run / FILE, result)
    return result


def _perplexities(load: Mapping[str, Loader], cfg: Config, args: RunArgs) -> dict[str, Any]:
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
        known = None if args.val_data or args.max_val_tokens is not None else _of_the_trainer(name, cfg, args)
        if known is not None:
            result["models"][name] = dataclasses.asdict(known)
            continue
        progress(f"held-out perplexity of the {name} model")
        model = loader(torch.float32).eval()
        seq_len = result["seq_len"] = data.seq_len or model.config.seq_len
        batches = validation_batches(
            data, global_batch_size=8, rank=0, world_size=1, seq_len=seq_len, vocab_size=model.config.vocab_size
        )
        result["models"][name] = dataclasses.asdict(perplexity(model, _shown(batches), autocast=autocast, data=data))
        del model
        gc.collect()
    return result


def _of_the_trainer(name: str, cfg: Config, args: RunArgs) -> Perplexity | None:
    """What the trainer measured itself, before the first and after the last step, on the same data and precision."""
    path = stage_folders(Path(args.run))[0 if name == "swapped" else -1] / "results.jsonl"
    if (
        name == "teacher"
        or len(cfg.data.val_data) != 1
        or args.precision != cfg.parallel.precision
        or not path.exists()
    ):
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if (row["step"] == 0) == (name == "swapped") and not row["fitted"]]
    if not rows:
        return None
    row = rows[-1]
    return Perplexity(
        row["counted"], row["sequences"], row["loss"], row["standard_error"], row["perplexity"], row["seconds"]
    )


def _decodings(pair: Mapping[str, Transformer], args: RunArgs, device: torch.device) -> dict[str, Any]:
    limit = args.prefill_up_to
    if limit is None and device.type == "cpu":
        limit = CPU_PREFILL_TOKENS
    rows = decoding(pair, args.contexts, tokens=args.timed_tokens, prefill_up_to=limit, progress=progress)
    weights = str(pair["uptrained"].head_weight().dtype).removeprefix("torch.")
    return {"weights": weights, "text": "random ids", "prefill_up_to": limit, "rows": [vars(r) for r in rows]}


def _samples(pair: Mapping[str, Transformer], run: Path, args: RunArgs) -> dict[str, Any]:
    from open_lm_linear import pretrained

    progress("samples")
    rows = samples(pair, pretrained.load_tokenizer(run), args.prompts)
    return {"temperature": 0.0, "repetition_penalty": REPETITION_PENALTY, "max_new_tokens": SAMPLE_TOKENS, "rows": rows}


def _parameters(model: Transformer) -> dict[str, int]:
    new = model.new_keys()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    return {"total": sum(sizes.values()), "new": sum(n for name, n in sizes.items() if name in new)}


def _shown(batches: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    from tqdm import tqdm

    return tqdm(batches, unit="batch", leave=False, disable=None)  # None: no bar where the output is not a terminal


def progress(line: str) -> None:
    """Says on stderr what is done now."""
    print(line, file=sys.stderr, flush=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
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
