"""Several models side by side on a suite of tasks, task by task, so that an interrupted evaluation goes on.

What a model scored on a task is written to ``OUT/MODEL/TASK.json`` the moment it is known, with the key that it belongs
to; a later call measures what is not there or has another key, and makes the tables of all of it.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import importlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from open_lm_linear.cli import UserError
from open_lm_linear.evaluation import harness, tables
from open_lm_linear.evaluation.run import machine, progress, write_json
from open_lm_linear.evaluation.suites import Entry, Suite, read_suite
from open_lm_linear.parallel import resolve_device

if TYPE_CHECKING:
    import torch

    from open_lm_linear.evaluation.subject import Subject

PROBES = 256  # values of each tensor that the fingerprint of a model is made of


@dataclass(frozen=True)
class SuiteArgs:
    """Measure models side by side on a suite of tasks."""

    models: tuple[str, ...] = ()
    """Presets, run folders, files, Hugging Face folders or hub ids, each as SOURCE or NAME=SOURCE."""
    suite: str = "paper_table1"
    """A name under configs/suites, or a .yaml path."""
    out: str = ""
    """Folder of the results. Not given: ./evaluations/SUITE."""
    teacher: str = ""
    """Name of the model that relative scores refer to. Not given: the first."""
    limit: int | None = None
    """Examples of each task to use at most, for a try: such scores are no results."""
    include_path: str = ""
    """Folder of task files for lm-evaluation-harness; a TASK_local of theirs stands in for TASK."""
    batch_size: int | Literal["auto"] = "auto"
    """Requests at a time. auto: what the GPU's memory takes, or 8 on a CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights. auto: bfloat16 on a GPU, float32 on a CPU."""
    max_length: int | None = None
    """Tokens that requests are cut to, from the left; tasks at a longer context are left out. Not given: the length
    that each model was trained at."""
    form: Literal["parallel", "recurrent"] = "parallel"
    """Log-likelihoods through the parallel form, or through the recurrent state, which is slower and must agree."""
    log_samples: bool = False
    """Write every request with its answer, to OUT/MODEL/TASK.samples.jsonl."""
    seed: int = 0
    """Of the choice of examples in prompts and of the made-up tasks."""


def compare(args: SuiteArgs, device: str = "auto") -> Path:
    """Measures what is not measured yet and writes ``result.json``; returns the folder that it is in.

    Raises:
        UserError: no such suite, task, data or model, or a request beyond the memory. What was measured is kept.
    """
    import transformers

    sources = _sources(args.models)
    teacher = args.teacher or next(iter(sources))
    if teacher not in sources:
        raise UserError(f"--teacher {teacher!r} is not one of the models: {', '.join(sources)}.")
    for name in ("limit", "max_length"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    place = resolve_device(device)
    suite = _within(read_suite(args.suite), args.max_length)
    wanted = [entry for entry in suite.tasks if entry.kind == "harness"]
    tasks = harness.load_tasks(wanted, args.include_path) if wanted else {}
    for label, task in tasks.items():
        if task.name != label.partition("@")[0]:
            progress(f"{label}: taking the task {task.name} of {args.include_path}")
    out = Path(args.out or f"evaluations/{suite.name}")
    rows: list[dict[str, Any]] = []
    models: dict[str, dict[str, Any]] = {}
    for name, source in sources.items():
        models[name], found = _measure(name, source, suite, tasks, args, place, out)
        rows += found
    result = {
        "format_version": 1,
        "suite": {"name": suite.name, "title": suite.title, "average": suite.average, "published": suite.published},
        "teacher": teacher,
        "limit": args.limit,
        "form": args.form,
        "models": models,
        "rows": tables.complete(rows, teacher=teacher, average=suite.average, published=suite.published),
        "versions": {"lm_eval": harness.version() if wanted else None, "transformers": transformers.__version__},
        "machine": machine(place),
    }
    write_json(out / tables.RESULT, result)
    return out


def _sources(models: Sequence[str]) -> dict[str, str]:
    """Name -> source; a name that is not given is the source's last part."""
    found: dict[str, str] = {}
    for word in models:
        name, _, source = word.rpartition("=")
        name = name or Path(source).name
        if name in found:
            raise UserError(f"two models are called {name}: give each a name of its own, NAME={source}.")
        found[name] = source
    if not found:
        raise UserError("no model: give --models, such as --models smollm2 logs/my-run.")
    return found


def _within(suite: Suite, max_length: int | None) -> Suite:
    """The suite without the contexts beyond ``max_length``, which are named."""
    beyond = [e.label for e in suite.tasks if max_length is not None and (e.context or 0) > max_length]
    if not beyond:
        return suite
    if len(beyond) == len(suite.tasks):
        raise UserError(f"every task of the suite {suite.name} has a context beyond --max-length {max_length}.")
    progress(f"left out, beyond --max-length {max_length}: {', '.join(beyond)}")
    return dataclasses.replace(suite, tasks=tuple(e for e in suite.tasks if e.label not in beyond))


def _measure(
    name: str,
    source: str,
    suite: Suite,
    tasks: Mapping[str, harness.Task],
    args: SuiteArgs,
    device: torch.device,
    out: Path,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is to be known of a model, and its rows; it is in memory for as long as this runs."""
    import torch

    from open_lm_linear.evaluation.subject import load_subject

    dtype = args.dtype if args.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    progress(f"loading {name}")
    subject = load_subject(source, name=name, dtype=getattr(torch, dtype), device=device, max_length=args.max_length)
    card = {
        "source": source,
        "fingerprint": fingerprint(subject),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "dtype": dtype,
        "max_length": subject.max_length,
    }
    rows = []
    for entry in suite.tasks:
        key = _key(entry, tasks.get(entry.label), args, card)
        path = out / name / f"{entry.label}.json"
        logged = path.with_suffix(".samples.jsonl")
        known = _read(path)
        if known.get("key") != key or (args.log_samples and entry.kind == "harness" and not logged.exists()):
            progress(f"{name}: {entry.label}")
            began = time.perf_counter()
            found, samples = _run(subject, entry, tasks, args)
            known = {"key": key, "seconds": time.perf_counter() - began, "rows": found}
            path.parent.mkdir(parents=True, exist_ok=True)
            if samples:
                lines = (json.dumps(sample, default=str, ensure_ascii=False) + "\n" for sample in samples)
                logged.write_text("".join(lines), encoding="utf-8")
            write_json(path, known)
        rows += [{"model": name, "label": _label(entry, row), **row} for row in known["rows"]]
    del subject
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return card, rows


def _run(
    subject: Subject, entry: Entry, tasks: Mapping[str, harness.Task], args: SuiteArgs
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if entry.kind != "harness":
        # The kind is the module's name: perplexity, recall, generation.
        module = importlib.import_module(f"open_lm_linear.evaluation.{entry.kind}")
        subject = dataclasses.replace(subject, max_length=entry.context or subject.max_length)
        return module.run(subject, {"task": entry.task, **entry.options}, args.limit, args.seed), []
    row, samples = harness.score(
        subject,
        entry,
        tasks[entry.label],
        limit=args.limit,
        seed=args.seed,
        batch_size=args.batch_size,
        form=args.form,
        log_samples=args.log_samples,
    )
    return [row], samples


def _label(entry: Entry, row: Mapping[str, Any]) -> str:
    """A row's name in tables: a kind may report on several tasks, contexts and parts of these at once."""
    if entry.kind == "harness":
        return entry.label
    name = str(row["task"]) if row.get("context") is None else f"{row['task']}@{row['context']}"
    parts = tables.parts_of(row).items()
    shown = (f"{key} {'-'.join(map(str, v)) if isinstance(v, (list, tuple)) else v}" for key, v in parts)
    return ", ".join([name, *shown])


def _key(entry: Entry, task: harness.Task | None, args: SuiteArgs, card: Mapping[str, Any]) -> dict[str, Any]:
    """What a stored score depends on, as JSON gives it back."""
    key = {
        **dataclasses.asdict(entry),
        "harness": None if task is None else {"task": task.name, "version": harness.version()},
        "limit": args.limit,
        "form": args.form,
        "seed": args.seed,
        **{name: card[name] for name in ("fingerprint", "dtype", "max_length")},
    }
    return json.loads(json.dumps(key))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def fingerprint(subject: Subject) -> str:
    """A model's architecture, a sample of every tensor, and how its tokenizer reads a sentence, as one hash."""
    import torch

    config = {
        k: v for k, v in subject.model.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")
    }
    probe = "The 3 quick brown foxes\n\tjump: être, 日本 <s>"
    found = hashlib.sha256(json.dumps([config, subject.tokenizer.encode(probe)], sort_keys=True, default=str).encode())
    for name, value in sorted(subject.model.state_dict().items()):
        flat = value.detach().flatten()
        some = flat[:: max(1, flat.numel() // PROBES)].to(torch.float32).cpu()
        found.update(f"{name} {tuple(value.shape)}".encode() + some.numpy().tobytes())
    return found.hexdigest()[:16]
