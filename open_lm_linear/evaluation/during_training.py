"""Evaluation of a model while it trains: multiple-choice tasks and fixed prompts, every so many steps.

The requests are shared out over the ranks, which make equally many calls of the model, so that shards keep step and no
rank waits for another's share. Random states are put back: a run goes on as if there had been no evaluation.
"""

from __future__ import annotations

import contextlib
import io
import random
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from open_lm_linear import generate as generation
from open_lm_linear.cli import UserError
from open_lm_linear.config import Config
from open_lm_linear.evaluation import harness
from open_lm_linear.evaluation.suites import Suite, read_suite
from open_lm_linear.ops.losses import IGNORE
from open_lm_linear.parallel import Context, reshard, unsharded

if TYPE_CHECKING:
    from open_lm_linear.checkpoint import TrainState
    from open_lm_linear.metrics import Logger, Window
    from open_lm_linear.model import Transformer

FILE = "evaluations.jsonl"

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, ids of the context, ids of the continuation


class Evaluator:
    """Scores a suite and goes on from prompts every ``--eval-every`` steps and after the last."""

    def __init__(self, cfg: Config, ctx: Context, vocab_size: int, seq_len: int, steps: int) -> None:
        """Reads suite, data and tokenizer, so that what is missing is said before training begins.

        Raises:
            UserError: no tokenizer or another model's, an unknown suite, a task without data or not of multiple choice.
        """
        self.cfg, self.ctx, self.seq_len, self.steps = cfg.evaluation, ctx, seq_len, steps
        self.rows = cfg.run.global_batch_size // ctx.world_size // cfg.run.accum_freq
        self.seed = cfg.run.seed
        self.suite: Suite | None = None
        if not self.cfg.eval_every:
            return
        source = self.cfg.eval_tokenizer or cfg.model.pretrained
        if not source:
            raise UserError("evaluation during training needs a tokenizer: give --eval-tokenizer.")
        from open_lm_linear.pretrained import load_tokenizer

        self.tokenizer = load_tokenizer(source)
        if len(self.tokenizer) > vocab_size:
            raise UserError(
                f"the tokenizer of {source} has {len(self.tokenizer)} tokens and the model only {vocab_size}: give the "
                "model's own with --eval-tokenizer."
            )
        if self.cfg.eval_suite:
            self.suite = read_suite(self.cfg.eval_suite)
            with _random_states_kept(ctx):
                self.tasks = _multiple_choice(self.suite, self.cfg.eval_include_path)

    def after_step(self, model: Transformer, log: Logger, state: TrainState, window: Window) -> None:
        """Evaluates where this step is due: a row of evaluations.jsonl, TensorBoard and wandb."""
        every = self.cfg.eval_every
        if not every or (state.step % every and state.step != self.steps):
            return
        began = time.perf_counter()
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.ctx.autocast(), _random_states_kept(self.ctx):
            row = {"step": state.step, "tokens": state.tokens} | self._scores(model)
            row["prompts"] = self._continuations(model)
        reshard(model)  # a forward pass without gradients leaves FSDP's root gathered
        model.train(was_training)
        if self.ctx.device.type == "cuda":
            torch.cuda.empty_cache()
        row["seconds"] = time.perf_counter() - began
        log.row(FILE, row)
        log.say(_line(row))
        window.reset()  # the next log line's speed is that of training

    def _scores(self, model: Transformer) -> dict[str, Any]:
        if self.suite is None:
            return {}
        found: dict[str, Any] = {}
        scorer = _scorer(self, model)
        for entry in self.suite.tasks:
            task = self.tasks[entry.label]
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar a task, on every rank
                results = harness.evaluate(scorer, task, limit=self.cfg.eval_limit, seed=self.seed)
            row = harness.row_of(results, entry, task)
            name = f"{entry.label}/{entry.metric}"
            found |= {name: row["value"], f"{name}_standard_error": row["standard_error"], f"{name}_n": row["n"]}
        return found

    def log_likelihoods(self, model: Transformer, requests: Sequence[Request]) -> list[float]:
        """Summed log-probability of each continuation after its context, every rank computing its share of them."""
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        found = torch.zeros(len(requests), dtype=torch.float64, device=self.ctx.device)
        together = self.rows * self.ctx.world_size
        for begin in range(0, len(order), together):
            share = order[begin : begin + together]
            own = share[self.ctx.rank :: self.ctx.world_size]
            # Each rank makes this call, in the same shape, one without requests on a blank row.
            width = min(self.seq_len, max(len(requests[i][1]) + len(requests[i][2]) for i in share) - 1)
            shape = (-(-len(share) // self.ctx.world_size), width)
            inputs = torch.zeros(shape, dtype=torch.long)
            targets = torch.full(shape, IGNORE)
            for row, i in enumerate(own):
                _, context, continuation = requests[i]
                ids = torch.tensor((context + continuation)[-(width + 1) :])  # cut from the left
                inputs[row, : len(ids) - 1] = ids[:-1]
                scored = slice(max(0, len(ids) - 1 - len(continuation)), len(ids) - 1)
                targets[row, scored] = ids[1:][scored]
            inputs, targets = inputs.to(self.ctx.device), targets.to(self.ctx.device)
            losses = model.loss(inputs, targets, per_sequence=True)[: len(own), 0]
            found[own] = -losses.double()
        return self.ctx.sum(found).tolist()

    def _continuations(self, model: Transformer) -> list[dict[str, str]]:
        """What follows each prompt; all ranks compute all prompts, in one batch."""
        prompts = self.cfg.eval_prompts
        if not prompts:
            return []
        encoded = [generation.encode(self.tokenizer, prompt)[0] for prompt in prompts]
        width = max(map(len, encoded))
        ids = torch.zeros(len(encoded), width, dtype=torch.long)
        mask = torch.zeros(len(encoded), width, dtype=torch.long)
        for row, prompt_ids in enumerate(encoded):
            ids[row, width - len(prompt_ids) :] = prompt_ids
            mask[row, width - len(prompt_ids) :] = 1
        device = self.ctx.device
        with unsharded(model):
            out = generation.generate(
                model, ids.to(device), attention_mask=mask.to(device), max_new_tokens=self.cfg.eval_tokens
            )
        texts = self.tokenizer.batch_decode(out[:, width:].tolist())
        return [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]


@contextlib.contextmanager
def _random_states_kept(ctx: Context) -> Iterator[None]:
    """Python's, numpy's and torch's random states are afterwards what they were: libraries draw from them."""
    import numpy as np

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[ctx.device] if ctx.device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _multiple_choice(suite: Suite, include_path: str) -> dict[str, harness.Task]:
    """The suite's tasks, none of which generates text or needs anything else than log-likelihoods of choices."""
    for entry in suite.tasks:
        if entry.kind != "harness":
            raise UserError(
                f"--eval-suite {suite.name}: {entry.task} is of the kind {entry.kind}; during training only "
                "multiple-choice tasks are scored: take it out and use open_lm_linear.evaluate for it."
            )
    tasks = harness.load_tasks(suite.tasks, include_path)
    for label, task in tasks.items():
        kinds = {part.OUTPUT_TYPE for part in task.parts.values()} - {"multiple_choice"}
        if kinds:
            raise UserError(
                f"--eval-suite {suite.name}: {label} is a task of {kinds.pop()}; during training only multiple-choice "
                "tasks are scored: take it out and use open_lm_linear.evaluate for it."
            )
    return tasks


def _scorer(evaluator: Evaluator, model: Transformer) -> Any:
    """The model in training as one of lm-evaluation-harness, for log-likelihoods alone."""
    harness.library()
    from lm_eval.api.model import TemplateLM

    tokenizer = evaluator.tokenizer

    class Scorer(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return tokenizer.encode(string, **options)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
            return [(value, False) for value in evaluator.log_likelihoods(model, requests)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise AssertionError("only multiple-choice tasks come here")

        generate_until = loglikelihood_rolling

    return Scorer()


def _line(row: dict[str, Any]) -> str:
    """For people: every score, and what followed the prompts."""
    scores = [
        f"{name} {row[name]:.4f}"
        + ("" if row[f"{name}_standard_error"] is None else f" +- {row[f'{name}_standard_error']:.4f}")
        for name in (key.removesuffix("_n") for key in row if key.endswith("_n"))
    ]
    said = [f"{found['prompt']!r} -> {found['text']!r}" for found in row["prompts"]]
    return "\n  ".join([f"evaluation at step {row['step']} ({row['seconds']:.1f} s): {', '.join(scores)}", *said])
