"""Times a whole model: prefill, decoding and training, against what it replaces, both sides in one run.

    python eval/bench_model.py                       # what `make bench` runs: hidden 512, 8 layers
    python eval/bench_model.py --json bench.json     # the same figures as JSON too
    python eval/bench_model.py --device cuda         # training, prefill and decoding at the sizes people run

On a CPU the other side is the same model with the published implementation's ways: a prompt is read by a loop over its
tokens in every layer and all its logits are made; training takes the masked T x T form, which stands in for a kernel
that only GPUs have, and cross entropy over whole float32 logits. Our side trains as the trainer does, which keeps the
memory that it frees (`open_lm_linear/heap.py`); of both, the second of two steps is timed. On a GPU the other side is
transformers' softmax Mistral with its key-value cache. The sides take turns, so that a drift of the machine hits both.

The floor of decoding is the time in which this machine reads as many bytes as the weights have that every token needs,
measured in the same rounds by a plain sum. It prints what was measured and asserts nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from bench_linear_attention import processor

from open_lm_linear import cli

if TYPE_CHECKING:
    import torch

    from open_lm_linear.architecture import ModelConfig
    from open_lm_linear.model import Transformer

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Bench:
    """What is timed."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run; the flags below it say for which of them they are."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """cpu: of the weights; a GPU takes bfloat16."""
    hidden_dim: int = 512
    """cpu: of the model, whose heads have 64 dimensions."""
    n_layers: int = 8
    """cpu: of the model."""
    vocab_size: int = 50_432
    """cpu: of the model."""
    tokens: int = 1024
    """cpu: of the prompt and of a training sequence."""
    batch: int = 2
    """cpu: training sequences."""
    growth: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768, 65536)
    """cpu: lengths over which the operator's time and memory are fitted."""
    decoded: int = 24
    """Tokens timed one by one."""
    runs: int = 5
    """Timed rounds of prefill and training; the median stands in the table."""
    threads: int = 0
    """CPU threads (0: torch's choice)."""
    models: tuple[Literal["smollm2", "1b", "mistral_7b"], ...] = ("smollm2", "1b", "mistral_7b")
    """cuda: shapes to train, with random weights."""
    lengths: tuple[int, ...] = (2048, 8192, 32768)
    """cuda: training sequences."""
    contexts: tuple[int, ...] = (512, 2048, 8192, 32768, 131072)
    """cuda: tokens before the decoded ones, of Mistral-7B's shapes."""
    batches: tuple[int, ...] = (1, 16, 64, 256)
    """cuda: sequences decoded at once."""
    json: str = ""
    """Also write the rows to this file."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    side: str
    per_second: float
    """Tokens a second, of the median time."""
    milliseconds: float
    """Median."""
    least: float
    most: float
    ratio: float | None = None
    """The other side's median over ours; None in other rows than ours."""
    note: str = ""


def timed(
    calls: Calls,
    runs: int,
    warmup: int,
    wait: Callable[[], None] = lambda: None,
    around: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each side's calls, in turn; with ``around``, of the second of two within what it has of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + runs):
        for name, call in calls.items():
            with (around or {}).get(name, nullcontext)():
                if around is not None:
                    call()
                wait()
                begin = time.perf_counter()
                call()
                wait()
                if turn >= warmup:
                    times[name].append(1000 * (time.perf_counter() - begin))
    return times


def rows(what: str, times: dict[str, list[float]], tokens: int, note: str = "") -> list[Row]:
    """A row a side, the first of them ours, the second what it is compared with."""
    middle = {name: statistics.median(each) for name, each in times.items()}
    found = [
        Row(what, name, 1000 * tokens / middle[name], middle[name], min(each), max(each))
        for name, each in times.items()
    ]
    ratio = found[1].milliseconds / found[0].milliseconds if len(found) > 1 else None
    found[0] = dataclasses.replace(found[0], ratio=ratio, note=note)
    return found


def show(found: Sequence[Row]) -> None:
    for row in found:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x"
        spread = f"{row.milliseconds:10.1f}{row.least:10.1f}{row.most:10.1f}"
        print(f"{row.what:44}{row.side:14}{row.per_second:10.0f}{spread}{ratio:>9}  {row.note}", flush=True)


# ---- CPU: the published implementation's ways ------------------------------------------------------------------------


def token_loop(q: Any, k: Any, v: Any, log_decay: Any = None, state: Any = None, first: Any = None) -> Any:
    """The operator as a loop over the tokens, every one read from and written to a state of the activations' dtype."""
    import torch

    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    decay = log_decay.exp().to(q.dtype)[:, None, None]
    S = torch.zeros(*q.shape[::2], q.shape[3], v.shape[3], dtype=q.dtype) if state is None else state
    outs = []
    for t in range(q.shape[1]):
        S = decay * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], S))
    return torch.stack(outs, 1), S


@contextmanager
def by(operator: Callable[..., Any]) -> Iterator[None]:
    """Linear attention by another operator, and all between the products by torch's, for as long as the block runs."""
    operators, compiled = "open_lm_linear.ops.backends.linear_attention", "open_lm_linear.ops.native_pointwise"
    with mock.patch(operators, operator), mock.patch(f"{compiled}.takes_native", lambda *_: False):
        yield


def small_model(bench: Bench, dtype: str) -> Transformer:
    import torch

    from open_lm_linear.architecture import ModelConfig
    from open_lm_linear.model import create_model

    config = ModelConfig(
        bench.hidden_dim,
        bench.n_layers,
        max(1, bench.hidden_dim // 64),
        bench.vocab_size,
        seq_len=bench.tokens,
        model_norm="gain_only_lp_layer_norm",
        qk_norm=True,
        attn_name="linear",
    )
    torch.manual_seed(0)
    return create_model(config, dtype=getattr(torch, dtype))


def prefill_calls(ours: Transformer, theirs: Transformer, ids: torch.Tensor) -> Calls:
    """Reading a prompt (1, T), to the logits behind it."""
    import torch

    from open_lm_linear.generate import prefill

    def all_logits() -> None:
        with torch.no_grad(), by(token_loop):
            theirs(ids, use_cache=True)

    return {"ours": lambda: prefill(ours, ids), "token loop": all_logits}


def decode_calls(ours: Transformer, theirs: Transformer, ids: torch.Tensor) -> tuple[Calls, int]:
    """One token behind a prompt, on each side and by a plain sum over as many bytes as weights; and these bytes."""
    import torch

    from open_lm_linear.generate import prefill

    token, past = ids[:, -1:], prefill(ours, ids[:, :-1])[1]
    with torch.no_grad(), by(token_loop):
        _, _, old = theirs(ids[:, :-1], use_cache=True)

    def by_loop() -> None:
        with torch.no_grad(), by(token_loop):
            theirs(token, past_key_values=old, use_cache=True)

    weights = sum(p.numel() * p.element_size() for n, p in ours.named_parameters() if "tok_embeddings" not in n)
    buffer = torch.ones(weights // 4)
    return {"ours": lambda: prefill(ours, token, past=past), "token loop": by_loop, "floor": buffer.sum}, weights


def training_calls(model: Transformer, ids: torch.Tensor) -> Calls:
    """Forward and backward of ids (B, T + 1)."""
    import torch.nn.functional as F

    from open_lm_linear.ops import linear_attention as ops

    inputs, targets = ids[:, :-1], ids[:, 1:].contiguous()

    def ours() -> None:
        model.zero_grad(set_to_none=True)
        (model.loss(inputs, targets)[-1] / targets.numel()).backward()

    def quadratic() -> None:
        model.zero_grad(set_to_none=True)
        with by(lambda q, k, v, log_decay, state, first: (ops.quadratic(q, k, v, log_decay), state)):
            F.cross_entropy(model(inputs)[0].flatten(0, 1), targets.flatten()).backward()

    return {"ours": ours, "quadratic": quadratic}


def growth(bench: Bench) -> list[Row]:
    """The operator, forward and backward in float32 (4 heads of 64), at growing length; prints how it grows."""
    import torch

    from open_lm_linear.attention.linear import lightning_slopes
    from open_lm_linear.ops.linear_attention import linear_attention

    decay = -torch.tensor(lightning_slopes(4))
    calls: Calls = {}
    kept: dict[int, int] = {}
    for length in bench.growth:
        leaves = [torch.randn(1, length, 4, 64).requires_grad_() for _ in range(3)]

        def call(leaves: list[torch.Tensor] = leaves) -> None:
            torch.autograd.grad(linear_attention(*leaves, decay)[0].sum(), leaves)

        def count(x: torch.Tensor, length: int = length) -> torch.Tensor:
            kept[length] = kept.get(length, 0) + x.numel() * x.element_size()
            return x

        calls[str(length)] = call
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            linear_attention(*leaves, decay)
    found = [
        Row("operator, forward + backward", f"{name} tokens", 1000 * int(name) / middle, middle, min(each), max(each))
        for name, each in timed(calls, bench.runs, 1).items()
        for middle in (statistics.median(each),)
    ]
    show(found)
    by_time = exponent(bench.growth, [row.milliseconds for row in found])
    by_memory = exponent(bench.growth, [kept[length] for length in bench.growth])
    print(f"time grows as tokens^{by_time:.2f}, what backward keeps as tokens^{by_memory:.2f} (1: linear)\n")
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the straight line through (log x, log y), by least squares; 0 for a single point."""
    if len(x) < 2:
        return 0.0
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def on_cpu(bench: Bench) -> list[Row]:
    """Prefill, decoding and training of the small model in each dtype."""
    import torch

    from open_lm_linear.generate import lay_out
    from open_lm_linear.heap import kept_memory

    found = growth(bench)
    for dtype in bench.dtypes:
        model, ours = small_model(bench, dtype), lay_out(small_model(bench, dtype).eval())
        ids = torch.randint(bench.vocab_size, (1, bench.tokens + 1), generator=torch.Generator().manual_seed(0))
        batch = ids.expand(bench.batch, -1)
        calls, weights = decode_calls(ours, model, ids[:, :65])
        as_trained = {"ours": kept_memory}  # what a run on a CPU does, for all of its steps
        jobs = {
            f"prefill of {bench.tokens}": (prefill_calls(ours, model, ids[:, 1:]), bench.runs, 1, bench.tokens, None),
            "decode": (calls, bench.decoded, 3, 1, None),
            f"forward + backward, {bench.tokens} x {bench.batch}": (
                *(training_calls(model, batch), bench.runs, 0),
                *(batch[:, 1:].numel(), as_trained),
            ),
        }
        for what, (calls, runs, warmup, tokens, around) in jobs.items():
            new = rows(f"{what}, {dtype}", timed(calls, runs, warmup, around=around), tokens)
            notes = []
            if what == "decode":
                share = new[-1].milliseconds / new[0].milliseconds
                notes.append(f"{share:.0%} of the floor, {weights / 1e6:.0f} MB a token")
            wide = [row for row in found if row.what == f"{what}, float32"]
            if wide:
                notes.append(f"{wide[1].milliseconds / new[0].milliseconds:.2f} x float32's {wide[1].side}")
            new[0] = dataclasses.replace(new[0], note="; ".join(notes))
            show(new)
            found += new
    return found


# ---- GPU: the sizes that people run ----------------------------------------------------------------------------------


def shapes(name: str, attn_name: str) -> ModelConfig:
    """An architecture of the paper, or SmolLM2-135M's."""
    from open_lm_linear.architecture import ModelConfig
    from open_lm_linear.model import read_config

    if name != "smollm2":
        return read_config({"1b": "open_lm_1b", "mistral_7b": "mistral_7b"}[name], attn_name)
    return ModelConfig(
        576,
        30,
        9,
        49_152,
        n_heads_kv=3,
        intermediate_dim_ffn=1536,
        model_norm="rms_norm",
        weight_tying=True,
        attn_name=attn_name,
    )


def random_model(config: ModelConfig) -> Transformer:
    import torch

    from open_lm_linear.model import create_model

    return create_model(config, dtype=torch.bfloat16, device="cuda")


def train_on_gpu(bench: Bench, name: str, length: int) -> list[Row]:
    """Whole steps in pure bf16 with recomputation and fused AdamW, at the largest batch of a power of two that fits."""
    import torch

    model = random_model(dataclasses.replace(shapes(name, "linear"), seq_len=length)).train()
    model.grad_checkpointing = 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(batch: int) -> None:
        ids = torch.randint(model.config.vocab_size, (batch, length + 1), device="cuda")
        (model.loss(ids[:, :-1], ids[:, 1:])[-1] / (batch * length)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    batch, what = max(1, 131_072 // length), f"train {name}, {length} tokens"
    while True:
        try:
            torch.cuda.reset_peak_memory_stats()
            times = timed({"ours": functools.partial(step, batch)}, bench.runs, 1, torch.cuda.synchronize)
            break
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            if batch == 1:
                print(f"{what}: one sequence does not fit", flush=True)
                return []
            batch //= 2
    peak = torch.cuda.max_memory_allocated() / 2**30
    return rows(f"{what} x {batch}", times, batch * length, f"{peak:.1f} GiB")


def softmax_calls(config: ModelConfig, context: int, batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """transformers' Mistral of the same shapes: its prefill of one prompt, and a token of ``batch`` copies of it."""
    import torch
    import transformers

    theirs = transformers.MistralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.kv_heads,
        sliding_window=None,
        max_position_embeddings=max(context + 4096, 32_768),
    )
    with torch.device("cuda"):
        model = transformers.MistralForCausalLM(theirs).to(torch.bfloat16).eval()
    ids = torch.randint(config.vocab_size, (1, context), device="cuda")

    def prefill() -> Any:
        with torch.no_grad():
            return model(ids, use_cache=True, logits_to_keep=1).past_key_values

    cache, token = prefill(), ids[:, -1:].expand(batch, 1)
    cache.batch_repeat_interleave(batch)

    def decode() -> None:
        with torch.no_grad():
            model(token, past_key_values=cache, use_cache=True)

    return prefill, decode


def our_calls(config: ModelConfig, context: int, batch: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The same of the linear model."""
    import torch

    from open_lm_linear import generate

    model = random_model(config).eval()
    ids = torch.randint(config.vocab_size, (1, context), device="cuda")
    past = generate.prefill(model, ids)[1].select(torch.zeros(batch, dtype=torch.long, device="cuda"))
    token = ids[:, -1:].expand(batch, 1)
    return lambda: generate.prefill(model, ids), lambda: generate.prefill(model, token, past=past)


def infer_on_gpu(bench: Bench, context: int, batch: int) -> list[Row]:
    """Prefill of one prompt (with the first batch alone) and a decoded token of ``batch`` sequences, side by side."""
    import torch

    config, calls = shapes("mistral_7b", "linear"), {}
    for name, make in (("ours", our_calls), ("transformers", softmax_calls)):
        try:
            calls[name] = make(config, context, batch)
        except torch.cuda.OutOfMemoryError:
            print(f"{name} does not fit at context {context}, batch {batch}", flush=True)
    found: list[Row] = []
    for i, (what, tokens, runs) in enumerate((("prefill", context, bench.runs), ("decode", batch, bench.decoded))):
        if what == "prefill" and batch != bench.batches[0]:
            continue
        size = f", batch {batch}" if what == "decode" else ""
        try:
            times = timed({name: pair[i] for name, pair in calls.items()}, runs, 2, torch.cuda.synchronize)
        except torch.cuda.OutOfMemoryError:
            print(f"{what} does not fit at context {context}{size}", flush=True)
            continue
        found += rows(f"{what}, context {context}{size}", times, tokens)
    return found


def on_gpu(bench: Bench) -> list[Row]:
    """Training at every length of every model, then prefill and decoding at every context and batch."""
    import gc

    import torch

    jobs = [lambda n=n, length=length: train_on_gpu(bench, n, length) for n in bench.models for length in bench.lengths]
    jobs += [lambda c=c, b=b: infer_on_gpu(bench, c, b) for c in bench.contexts for b in bench.batches]
    found: list[Row] = []
    for job in jobs:
        new = job()
        show(new)
        found += new
        gc.collect()
        torch.cuda.empty_cache()
    return found


@cli.command
def main() -> None:
    """Reads the flags, names the machine, prints the table."""
    bench = cli.parse(Bench, prog="bench_model.py", description=str(__doc__).split("\n")[0])
    counts = bench.hidden_dim, bench.n_layers, bench.vocab_size, bench.tokens, bench.batch, bench.decoded, bench.runs
    if min(*counts, *bench.growth, *bench.lengths, *bench.contexts, *bench.batches) < 1:
        raise cli.UserError("sizes, lengths, contexts, batches and numbers of runs must be above 0.")
    if bench.hidden_dim % 64:
        raise cli.UserError(f"--hidden-dim {bench.hidden_dim} is no multiple of 64, the dimensions of a head.")
    import torch

    if bench.device == "cuda" and not torch.cuda.is_available():
        raise cli.UserError("--device cuda: torch sees no CUDA device here.")
    if bench.threads:
        torch.set_num_threads(bench.threads)
    machine = f"{processor(bench.device)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    note = " (others are computing here: the times below are theirs too)" if busy > 0.5 else ""
    print(f"{machine}\nload average before the start {busy:.2f}{note}\n")
    heads = f"{'tokens/s':>10}{'median ms':>10}{'min':>10}{'max':>10}{'ratio':>9}"
    print(f"{'':58}{heads}")
    found = on_cpu(bench) if bench.device == "cpu" else on_gpu(bench)
    if bench.json:
        figures = {"machine": machine, "load": busy, "rows": [dataclasses.asdict(row) for row in found]}
        Path(bench.json).parent.mkdir(parents=True, exist_ok=True)
        Path(bench.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
