"""Times a whole model: prefill, decoding and training, against what it replaces, both sides in one run.

    python eval/bench_model.py                       # what `make bench` runs: hidden 512, 8 layers
    python eval/bench_model.py --json bench.json     # the same figures as JSON too
    python eval/bench_model.py --device cuda         # training, prefill and decoding at the sizes people run

On a CPU the other side is the same model with the published implementation's ways: a prompt is read by a loop over its
tokens in every layer and all its logits are made; training takes the masked T x T form, which stands in for a kernel
that only GPUs have, and cross entropy over whole float32 logits. Our side trains as the trainer does, which keeps the
memory that it frees (`open_lm_linear/heap.py`); a step of either is the second of a process of its own. On a GPU the
other side is transformers' softmax Mistral with its key-value cache. The sides take turns, so that a drift of the
machine hits both.

The floor of decoding is the time in which this machine reads as many bytes as the weights have that every token needs,
measured in the same rounds by a plain sum, from pages as malloc gives them and from huge ones. It prints what was
measured and asserts nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench_rows import Bench, Calls, Row, rows, show, timed
from machine import in_words, others, processor

from open_lm_linear import cli

if TYPE_CHECKING:
    import torch

    from open_lm_linear.model import Transformer


IN_A_ROW = 8  # tokens that a side decodes before the next has its turn


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


def prompt(bench: Bench) -> torch.Tensor:
    """(1, tokens + 1) ids."""
    import torch

    return torch.randint(bench.vocab_size, (1, bench.tokens + 1), generator=torch.Generator().manual_seed(0))


def prefill_calls(ours: Transformer, theirs: Transformer, ids: torch.Tensor) -> Calls:
    """Reading a prompt (1, T), to the logits behind it."""
    import torch

    from open_lm_linear.generate import prefill

    def all_logits() -> None:
        with torch.no_grad(), by(token_loop):
            theirs(ids, use_cache=True)

    return {"ours": lambda: prefill(ours, ids), "token loop": all_logits}


def decode_calls(ours: Transformer, theirs: Transformer, ids: torch.Tensor) -> tuple[Calls, int]:
    """The next token of a generation on each side, plain sums over as many bytes as weights; and these bytes."""
    import torch

    from open_lm_linear.generate import prefill
    from open_lm_linear.heap import to_huge_pages

    token, past = ids[:, -1:], prefill(ours, ids[:, :-1])[1]
    with torch.no_grad(), by(token_loop):
        _, _, old = theirs(ids[:, :-1], use_cache=True)

    def compiled() -> None:
        nonlocal past
        past = prefill(ours, token, past=past)[1]

    def by_loop() -> None:
        nonlocal old
        with torch.no_grad(), by(token_loop):
            _, _, old = theirs(token, past_key_values=old, use_cache=True)

    weights = sum(p.numel() * p.element_size() for n, p in ours.named_parameters() if "tok_embeddings" not in n)
    buffer, huge = (torch.nn.Parameter(torch.ones(weights // 4), requires_grad=False) for _ in range(2))
    to_huge_pages([huge])
    return {"ours": compiled, "token loop": by_loop, "floor": buffer.sum, "floor, huge": huge.sum}, weights


def decode_times(calls: Calls, tokens: int) -> dict[str, list[float]]:
    """Milliseconds a token of each side, in turns of some tokens in a row, as a generation has them."""
    row = min(tokens, IN_A_ROW)
    turns: Calls = {side: lambda call=call: [call() for _ in range(row)] for side, call in calls.items()}
    return {side: [t / row for t in each] for side, each in timed(turns, -(-tokens // row), 1).items()}


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


def trained(bench: Bench, dtype: str, side: str) -> float:
    """Milliseconds of the second training step of a new process."""
    import torch

    from open_lm_linear.heap import kept_memory

    torch.set_num_threads(bench.threads or torch.get_num_threads())
    model, ids = small_model(bench, dtype), prompt(bench)
    call = training_calls(model, ids.expand(bench.batch, -1))[side]
    with kept_memory() if side == "ours" else nullcontext():
        return timed({side: call}, 1, 1)[side][0]


def training_times(bench: Bench, dtype: str) -> dict[str, list[float]]:
    """Milliseconds of steps of each side, in turn, each in a process of its own: they share an allocator otherwise."""
    times: dict[str, list[float]] = {"ours": [], "quadratic": []}
    for _ in range(bench.runs):
        for side, found in times.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                found.append(process.submit(trained, bench, dtype, side).result())
    return times


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
    from open_lm_linear.ops.products import product_dtype

    found = growth(bench)
    for dtype in bench.dtypes:
        model, ours = small_model(bench, dtype), lay_out(small_model(bench, dtype).eval())
        ids = prompt(bench)
        decoding, weights = decode_calls(ours, model, ids[:, :65])
        jobs = {
            f"prefill of {bench.tokens}": (timed(prefill_calls(ours, model, ids[:, 1:]), bench.runs, 1), bench.tokens),
            "decode": (decode_times(decoding, bench.decoded), 1),
        }
        if product_dtype(getattr(torch, dtype), ids.device) == getattr(torch, dtype):
            training = f"forward + backward, {bench.tokens} x {bench.batch}"
            jobs[training] = (training_times(bench, dtype), bench.tokens * bench.batch)
        else:
            print(f"no training in {dtype}: this CPU has no instruction for its products")
        for what, (times, tokens) in jobs.items():
            new = rows(f"{what}, {dtype}", times, tokens)
            notes = []
            if what == "decode":
                plain, huge = (row.milliseconds / new[0].milliseconds for row in new[-2:])
                notes.append(f"{plain:.0%} of the floor, {huge:.0%} of the huge one, {weights / 1e6:.0f} MB")
            wide = [row for row in found if row.what == f"{what}, float32"]
            if wide:
                notes.append(f"{wide[1].milliseconds / new[0].milliseconds:.2f} x float32's {wide[1].side}")
            new[0] = dataclasses.replace(new[0], note="; ".join(notes))
            show(new)
            found += new
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
    busy = others()
    print(f"{machine}\n{in_words(busy)}\n")
    heads = f"{'tokens/s':>10}{'median ms':>10}{'min':>10}{'max':>10}{'ratio':>9}"
    print(f"{'':58}{heads}")
    if bench.device == "cpu":
        found = on_cpu(bench)
    else:
        from bench_model_gpu import on_gpu

        found = on_gpu(bench)
    if bench.json:
        figures = {"machine": machine, "others": busy, "rows": [dataclasses.asdict(row) for row in found]}
        Path(bench.json).parent.mkdir(parents=True, exist_ok=True)
        Path(bench.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
