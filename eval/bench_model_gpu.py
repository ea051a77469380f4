"""The sizes that people run, on a GPU: whole training steps, prefill and decoding beside transformers' Mistral.

`bench_model.py --device cuda` runs it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench_rows import Bench, Row, rows, show, timed

if TYPE_CHECKING:
    from open_lm_linear.architecture import ModelConfig
    from open_lm_linear.model import Transformer


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
