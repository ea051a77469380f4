"""lm-evaluation-harness as a library: its tasks, prompts and metrics over any `Subject`.

Its own ``hf`` model class runs the requests: log-likelihoods through one parallel pass that keeps no state, generation
through the cache, which of a recurrent model is its state.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from open_lm_linear.cli import UserError, did_you_mean
from open_lm_linear.evaluation.run import progress
from open_lm_linear.evaluation.subject import Subject
from open_lm_linear.evaluation.suites import Entry

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
Form = Literal["parallel", "recurrent"]

PIECE = 16  # tokens that the recurrent form reads at once: few, so that the state is used on short requests too
CPU_BATCH = 8  # what `auto` means without a GPU, whose memory is what lm-eval's own search for a batch size fills
BOOTSTRAP = 1000  # resamples for the standard errors of metrics that are no means
PERCENT = ("scrolls_qasper", "scrolls_narrativeqa")  # tasks that count their F1 from 0 to 100


def library() -> Any:
    """The imported package `lm_eval`, its warnings off.

    Raises:
        UserError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UserError(
            f"evaluation on tasks needs lm-evaluation-harness ({error}): pip install 'open_lm_linear[eval]'."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def version() -> str:
    """Of lm-evaluation-harness."""
    from importlib.metadata import version as installed

    return installed("lm-eval")


# ---- tasks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task of the harness with its data."""

    name: str
    loaded: Any
    """What lm-eval's TaskManager.load returned: one task, or the tasks of one group."""

    @property
    def parts(self) -> Mapping[str, Any]:
        """The harness's task objects by name."""
        return self.loaded["tasks"]


def load_tasks(entries: Iterable[Entry], include_path: str = "") -> dict[str, Task]:
    """Label of each entry -> its task with data and number of examples, before anything is computed.

    With ``include_path``, a task of its files named ``TASK_local`` (or the entry's ``offline``) is taken instead.

    Raises:
        UserError: no harness, an unknown task, a tag in place of a task, or a task without data.
    """
    manager = library().tasks.TaskManager
    included = manager(include_path=include_path, include_defaults=False) if include_path else None
    found: dict[str, Task] = {}
    for entry in entries:
        names = (entry.offline or f"{entry.task}_local", entry.task)
        name = next((name for name in names if included and name in included.all_tasks), None)
        if name is not None:
            found[entry.label] = Task(name, _load(included, name, "check the files that it names"))
        else:
            advice = "give --include-path with task files that have it"
            found[entry.label] = Task(entry.task, _load(own_tasks(), entry.task, advice))
        for part in found[entry.label].parts.values():
            if part.get_config("num_fewshot") != 0:  # a task that says 0 itself means it
                part.set_config(key="num_fewshot", value=entry.shots)
    return found


@functools.cache
def own_tasks() -> Any:
    """The tasks that come with lm-evaluation-harness, indexed where they are needed: it takes seconds."""
    return library().tasks.TaskManager()


def _load(manager: Any, name: str, advice: str) -> Any:
    if name not in manager.all_tasks:
        near = did_you_mean(name, manager.all_tasks)
        raise UserError(f"lm-evaluation-harness {version()} has no task {name!r}, nor has --include-path.{near}")
    if name in manager.all_tags:
        raise UserError(f"{name!r} is a tag for several tasks without a score of its own: name the tasks.")
    try:
        return manager.load([name])
    except Exception as error:  # the hub, the files and the task each fail in ways of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the task {name} has no data here ({reason}): {advice}.") from error


# ---- the model -----------------------------------------------------------------------------------------------------


def language_model(subject: Subject, batch_size: int | Literal["auto"] = "auto", form: Form = "parallel") -> Any:
    """The subject as a model of the harness.

    Args:
        batch_size: ``auto`` lets lm-eval find what a GPU's memory takes; on a CPU it is 8.
        form: ``recurrent`` reads log-likelihood requests piece by piece through the state, to prove the parallel form.

    Raises:
        UserError: the recurrent form of a model that is none of ours.
    """
    library()
    import torch
    from lm_eval.models.huggingface import HFLM

    from open_lm_linear.hf.modeling import OpenLMLinearForCausalLM

    ours = isinstance(subject.model, OpenLMLinearForCausalLM)
    if form == "recurrent" and not ours:
        raise UserError(f"--form recurrent: {subject.name} is no model of this package.")
    if batch_size == "auto" and subject.device.type == "cpu":
        batch_size = CPU_BATCH

    class SubjectLM(HFLM):
        batch_size_per_gpu: Any

        @torch.no_grad()
        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            _check_memory(inps, self.model.get_input_embeddings().num_embeddings)
            if form == "parallel":
                return self.model(inps, use_cache=False).logits
            cache, logits = None, []
            for piece in inps.split(PIECE, dim=1):
                out = self.model(piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                logits.append(out.logits)
            return torch.cat(logits, dim=1)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            if ours or not getattr(self.model, "_is_stateful", False):
                return super().generate_until(requests, disable_tqdm)
            # Other recurrent models of transformers let the padding of shorter prompts into their states.
            progress(f"{subject.name} generates one prompt at a time: {type(self.model).__name__} takes no padding")
            together, self.batch_size_per_gpu = self.batch_size_per_gpu, 1
            try:
                return super().generate_until(requests, disable_tqdm)
            finally:
                self.batch_size_per_gpu = together

    model = SubjectLM(
        pretrained=subject.model,
        tokenizer=subject.tokenizer,
        backend="causal",
        max_length=subject.max_length,
        batch_size=batch_size,
    )
    model.model.eval()
    return model


def _check_memory(ids: torch.Tensor, vocab_size: int) -> None:
    """Refuses logits that the machine has no memory for; a GPU says so itself, but Linux kills the process."""
    import psutil

    if ids.device.type != "cpu":
        return
    needed = 2 * 4 * ids.numel() * vocab_size  # logits and their log-softmax, float32
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"{ids.shape[0]} requests of {ids.shape[1]} tokens need {needed / 1e9:.1f} GB for their logits and "
            f"{available / 1e9:.1f} GB are free: lower --batch-size or --max-length."
        )


# ---- scores --------------------------------------------------------------------------------------------------------


def evaluate(
    model: Any, task: Task, *, limit: int | None = None, seed: int = 0, log_samples: bool = False
) -> Mapping[str, Any]:
    """What lm-eval's evaluator returns on a task, the examples in prompts drawn anew from ``seed``.

    No global random state is set or drawn from.
    """
    for part in task.parts.values():
        part.set_fewshot_seed(seed=seed)
    return library().evaluator.evaluate(
        model, task.loaded, limit=limit, log_samples=log_samples, bootstrap_iters=BOOTSTRAP
    )


def score(
    subject: Subject,
    entry: Entry,
    task: Task,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    form: Form = "parallel",
    log_samples: bool = False,
) -> tuple[Row, list[dict[str, Any]]]:
    """The entry's row, and the samples where asked.

    Args:
        limit: examples of each task, the first ones (default: all).
        seed: of the choice of examples in prompts.

    Raises:
        UserError: a metric that the task does not have, or a context beyond the device's memory.
    """
    import torch

    subject = dataclasses.replace(subject, max_length=entry.context or subject.max_length)
    model = language_model(subject, batch_size, form)
    try:
        results = evaluate(model, task, limit=limit, seed=seed, log_samples=log_samples)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        raise UserError(
            f"the task {entry.label} with requests of up to {subject.max_length} tokens does not fit the memory of "
            f"{subject.device}: lower --batch-size or --max-length."
        ) from error
    samples = [{"task": name, **sample} for name, rows in (results.get("samples") or {}).items() for sample in rows]
    return row_of(results, entry, task), samples


def row_of(results: Mapping[str, Any], entry: Entry, task: Task) -> Row:
    """What the harness reported on an entry, in our terms."""
    values = results["results"].get(task.name) or results.get("groups", {})[task.name]
    value, error = _metric(values, entry)
    scale = 100 if task.name in PERCENT else 1
    counts = {name: results["n-samples"][name]["effective"] for name in task.parts}
    row = {
        "task": entry.task,
        "harness_task": task.name,
        "shots": entry.shots,
        "metric": entry.metric,
        "value": value / scale,
        "standard_error": error / scale if error is not None else None,
        "n": sum(counts.values()),
        "chance": entry.chance,
    }
    if entry.context is not None:
        row["context"] = entry.context
    if len(counts) > 1:
        row["parts"] = {
            name: {"value": _metric(results["results"][name], entry)[0], "n": n} for name, n in counts.items()
        }
    return row


def _metric(values: Mapping[str, Any], entry: Entry) -> tuple[float, float | None]:
    """A metric and its standard error; lm-eval's keys are ``metric,filter`` and ``metric_stderr,filter``."""
    keys = [key for key in values if key.split(",")[0] == entry.metric]
    if not keys:
        known = sorted({k.split(",")[0] for k in values if "," in k and "_stderr" not in k})
        raise UserError(f"the task {entry.task} has no metric {entry.metric!r}; it has {', '.join(known)}.")
    error = values.get(keys[0].replace(entry.metric, f"{entry.metric}_stderr", 1))
    return float(values[keys[0]]), float(error) if isinstance(error, (int, float)) else None
