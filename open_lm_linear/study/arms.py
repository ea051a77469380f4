"""Runs a study: every arm trained by the trainer in a process of its own, then measured as all the others are.

    OUTPUT/arms/ARM/SEED/arm.yaml          the trainer's --config file
                         train.log         what the trainer said;  run/: its run folder
                         training.json     tokens, seconds and curve, once it is trained
                         weights/          the trained model, without the optimiser
                         evaluation.json   what was measured, once all of it is

A file is there whole or not at all, so the same command goes on after any interruption: a trained arm is not trained
again, and one that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from open_lm_linear import config, faults, optim, parallel, pretrained
from open_lm_linear.cli import UserError
from open_lm_linear.config import Config
from open_lm_linear.data import masks, stream
from open_lm_linear.data.manifest import CARD
from open_lm_linear.distillation import objective_of
from open_lm_linear.evaluation.compare import SuiteArgs, compare
from open_lm_linear.evaluation.run import machine, samples, write_json
from open_lm_linear.evaluation.tables import RESULT
from open_lm_linear.metrics import human_time, whole_rows
from open_lm_linear.model import Transformer
from open_lm_linear.ops.products import autocast
from open_lm_linear.plan import Plan, architecture
from open_lm_linear.pretrained.copies import convert
from open_lm_linear.pretrained.copies import prepare as prepare_copy
from open_lm_linear.study.grid import Arm, Grid, arm_config

TEACHER = "teacher"
TRAINING, EVALUATION, DATA = "training.json", "evaluation.json", "data.json"
PLACES = ("logs", "model", "train_data", "val_data")  # of a configuration: what moves with folders


@dataclass(frozen=True)
class Study:
    """A grid and where it runs."""

    grid: Grid
    output: Path
    train_data: str
    val_data: str
    data: Mapping[str, str]
    """Fingerprints of both."""
    device: str = "auto"
    include_path: str = ""

    def folder(self, name: str, seed: int) -> Path:
        return self.output / "arms" / name / f"seed_{seed}"

    def seeds(self, arm: Arm) -> tuple[int, ...]:
        """What is not trained is the same for every seed, and is measured once."""
        return self.grid.settings.seeds if arm.stages else self.grid.settings.seeds[:1]

    def runs(self, arms: Sequence[Arm]) -> Iterator[tuple[Arm, int, Path]]:
        """Every arm with every seed and its folder, all arms of one seed before the next."""
        for seed in self.grid.settings.seeds:
            yield from ((arm, seed, self.folder(arm.name, seed)) for arm in arms if seed in self.seeds(arm))

    @property
    def teacher(self) -> str:
        return self.grid.run["pretrained"]


# ---- before anything is trained ------------------------------------------------------------------------------------


def lay_out(study: Study, arms: Sequence[Arm]) -> None:
    """Writes the configuration of every arm and seed; without data, for the report alone, it looks and writes nothing.

    Raises:
        UserError: the folder holds an arm of the same name with other settings, or arms on other data.
    """
    for arm, seed, folder in study.runs(arms):
        path = folder / "arm.yaml"
        values = arm_config(study.grid, arm, seed, folder, study.train_data, study.val_data)
        before = yaml.safe_load(path.read_text()) if path.exists() else values
        other = [k for k in [*values, *before] if k not in PLACES and values.get(k) != before.get(k)]
        if other:
            raise UserError(
                f"{folder} holds the arm {arm.name} with other settings ({other[0]}): choose another --output, or "
                "remove it."
            )
        if study.train_data:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(values, sort_keys=False))
    if not study.train_data:
        return
    write_json(study.output / DATA, study.data)
    if any(arm.from_scratch for arm in arms):
        write_json(study.output / "teacher.json", pretrained.open_source(study.teacher).config.to_json())


def data_of(train_data: str, val_data: str) -> dict[str, str]:
    """Fingerprints of what manifests list and what is said of it, so that data may move and not change."""
    found = {}
    for name, path in (("train_data", train_data), ("val_data", val_data)):
        files = (Path(path), Path(path).with_name(CARD))
        content = b"".join(file.read_bytes() for file in files if file.exists())
        found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def forecast(study: Study, arms: Sequence[Arm]) -> dict[str, float]:
    """Seconds of each arm, after a look at headers and data that refuses what cannot be trained.

    They are those of starting a process, and of the operations at the speed of the teacher's forward and backward
    pass, both measured here. Linear attention does fewer operations a second, so it is rough.

    Raises:
        UserError: whatever the trainer would refuse, with the name of the arm.
    """
    begin = time.time() - psutil.Process().create_time()  # what every process takes before it works
    work: dict[str, tuple[list[Config], float]] = {}
    for arm in arms:
        try:
            stages = _stages(study, arm)
            work[arm.name] = stages, sum(_operations(stages))
        except UserError as error:
            raise UserError(f"the arm {arm.name}: {error}") from error
    load, rate, forward = _pace(study)
    found = {}
    for arm in arms:
        stages, operations = work[arm.name]
        looks = 2 + sum(1 + cfg.run.epochs for cfg in stages)  # validations, and the evaluation at half the speed
        seconds = begin + load + (operations + looks * study.grid.settings.heldout_tokens * forward) / rate
        found[arm.name] = seconds * len(study.seeds(arm))
    return found


def _words(study: Study, folder: Path) -> list[str]:
    return ["--config", str(folder / "arm.yaml"), "--resume", "latest", "--device", study.device]


def _stages(study: Study, arm: Arm) -> list[Config]:
    if not arm.stages:
        return []
    return config.stages_from_cli(_words(study, study.folder(arm.name, study.grid.settings.seeds[0])))


def _operations(stages: Sequence[Config]) -> list[float]:
    """FLOPs of each stage, from headers alone, as the trainer's own plan does it."""
    if not stages:
        return []
    first, found, taken = stages[0], [], 0
    with parallel.setup(first.parallel) as ctx:
        source = pretrained.open_source(first.model.pretrained, first.model.model) if first.model.pretrained else None
        with torch.device("meta"):
            model = Transformer(architecture(first, source))
        if source is not None:
            pretrained.match(model, source)
        for cfg in stages:
            seq_len = cfg.data.seq_len or model.config.seq_len
            data = masks.resolved(cfg.data, model.config.vocab_size)
            stream.check(data, seq_len, model.config.vocab_size)
            cfg = dataclasses.replace(cfg, data=data, run=dataclasses.replace(cfg.run, first_sample=taken))
            objective = objective_of(cfg, model, source, ctx)
            plan = Plan.of(cfg, model, source, seq_len, ctx, objective)
            trained = set(optim.trained_names(model, cfg.optim, plan.new, objective.reached))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
            found.append(plan.steps * plan.tokens_per_step * objective.flops(model, seq_len))
            taken += plan.steps * cfg.run.global_batch_size
    return found


def _pace(study: Study) -> tuple[float, float, float]:
    """Seconds to load the teacher, its FLOPs/s forward and backward, and its FLOPs of a token forward."""
    place = parallel.resolve_device(study.device)
    before = time.perf_counter()
    model = pretrained.load_pretrained(study.teacher, device=place)
    load = time.perf_counter() - before
    seq_len = study.grid.run["seq_len"]
    rows = max(1, study.grid.run["global_batch_size"] // study.grid.run.get("accum_freq", 1))
    ids = torch.randint(model.config.vocab_size, (rows, seq_len + 1), device=place)
    half = study.grid.run.get("precision", "amp_bf16") != "fp32"
    for _ in range(1 if place.type == "cpu" else 2):  # a GPU's first pass pays for what comes but once
        began = time.perf_counter()
        with autocast(place) if half else nullcontext():
            model.loss(ids[:, :-1], ids[:, 1:])[-1].backward()
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        seconds = time.perf_counter() - began
    forward = model.flops_per_token(seq_len)
    del model
    _free(place)
    return load, 3 * forward * rows * seq_len / seconds, forward


def _free(place: torch.device) -> None:
    gc.collect()
    if place.type == "cuda":
        torch.cuda.empty_cache()


def plan_text(study: Study, arms: Sequence[Arm], foreseen: Mapping[str, float]) -> str:
    """What the study is about to do, for people."""
    settings = study.grid.settings
    seeds = f" with each of the seeds {', '.join(map(str, settings.seeds))}" if len(settings.seeds) > 1 else ""
    lines = [
        f"grid {study.grid.name}: {len(arms)} arms of {settings.tokens:,} tokens in {study.grid.steps:,} steps{seeds}, "
        f"{settings.heldout_tokens:,} held-out tokens"
    ]
    width = max(len(arm.name) for arm in arms)
    for arm in arms:
        of = foreseen.get(arm.name)
        tokens = settings.tokens if arm.stages else 0
        shown = ", ".join(f"{k} {v}" for k, v in arm.flags.items())
        stages = " -> ".join(str(s.get("stage_name", s.get("train_params", "all"))) for s in arm.stages) or "untrained"
        mark = "trained" if of is None else f"about {human_time(of)}"
        lines.append(f"  {arm.name:<{width}}  {tokens:>13,} tokens  {mark:>12}  {stages}  ({shown})")
    if foreseen:
        seconds = human_time(sum(foreseen.values()))
        lines.append(f"forecast for what is not trained yet, from one micro-batch of the teacher: {seconds}")
    return "\n".join(lines)


def trained(study: Study, arm: Arm) -> bool:
    """Whether there is nothing left to train of an arm."""
    return all((study.folder(arm.name, seed) / TRAINING).exists() for seed in study.seeds(arm))


# ---- training ------------------------------------------------------------------------------------------------------


def launch(words: Sequence[str], log: Path) -> int:
    """Runs the trainer, what it says added to ``log``; returns its exit code.

    A SIGTERM is handed on, so that the run is saved; when this process is killed, the trainer is too.
    """
    command = [sys.executable, "-m", "open_lm_linear.main", *words]
    with (
        log.open("ab") as out,
        subprocess.Popen(command, stdout=out, stderr=out, preexec_fn=faults.die_with_parent) as trainer,
    ):
        before = signal.signal(signal.SIGTERM, lambda *_: trainer.terminate())
        try:
            return trainer.wait()
        finally:
            signal.signal(signal.SIGTERM, before)


def train_arm(study: Study, arm: Arm, seed: int) -> None:
    """Trains an arm, or goes on with it, and keeps its weights alone.

    Raises:
        UserError: the trainer ended without an end of the run; what it said last is in the sentence.
        Stopped: it was told to stop, and saved the run.
    """
    folder = study.folder(arm.name, seed)
    if (folder / TRAINING).exists():
        return
    if not arm.stages:
        _keep(study, arm, study.teacher, folder / "weights")
        write_json(folder / TRAINING, {"tokens": 0, "seconds": 0.0, "stages": [], "curve": []})
        return
    code = launch(_words(study, folder), folder / "train.log")
    if code == faults.EXIT_STOPPED:
        raise faults.Stopped(f"the arm {arm.name} was stopped and is saved; the same command goes on.")
    if code:
        said = (folder / "train.log").read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise UserError(f"the arm {arm.name} ended with code {code}: {said[-1]} (all of it: {folder / 'train.log'})")
    stages = sorted((folder / "run").glob("stage_*"), key=lambda stage: int(stage.name.split("_")[1]))
    found = training_of(stages)
    _keep(study, arm, str(stages[-1]), folder / "weights")
    write_json(folder / TRAINING, found)
    for stage in stages:  # 12 bytes a parameter for each; the weights are kept
        shutil.rmtree(stage / "checkpoints")


def _keep(study: Study, arm: Arm, source: str, folder: Path) -> None:
    """The weights that an arm is measured with, and the tokenizer that belongs to them."""
    swap = {} if arm.stages else dict(arm.flags)  # the trainer has done it where there is one
    job = prepare_copy(pretrained.open_source(source), swap.pop("attn_name", None), **swap)
    convert(job, folder, overwrite=folder.exists())
    pretrained.load_tokenizer(study.teacher).save_pretrained(folder)


def training_of(stages: Sequence[Path]) -> dict[str, Any]:
    """Tokens, seconds and the held-out loss over the tokens of all stages, from what the trainer wrote.

    A point of the curve is [tokens, loss in nats, standard error]; of several at the same number the last stands, which
    is what the next stage begins with.
    """
    curve: dict[int, list[float]] = {}
    parts, tokens, seconds = [], 0, 0.0
    for stage in stages:
        for _, row in whole_rows(stage / "results.jsonl"):
            if "average" not in row:
                at = tokens + row["tokens"]
                curve[at] = [at, row["loss"], row["standard_error"]]
        *_, (_, last) = whole_rows(stage / "metrics.jsonl")
        parts.append({"stage": stage.name, "tokens": last["tokens"], "seconds": last["seconds"]})
        tokens, seconds = tokens + last["tokens"], seconds + last["seconds"]
    return {"tokens": tokens, "seconds": seconds, "stages": parts, "curve": [curve[at] for at in sorted(curve)]}


# ---- measuring -----------------------------------------------------------------------------------------------------


def measure(study: Study, name: str, source: str, folder: Path) -> None:
    """Held-out loss by position, the grid's suites and samples of one model, all to ``folder``/evaluation.json."""
    if measured(study, folder) is not None:
        return
    settings, place = study.grid.settings, parallel.resolve_device(study.device)
    began = time.perf_counter()
    suite = study.output / "heldout.yaml"
    options = {
        **{"data": [study.val_data], "contexts": [study.grid.run["seq_len"]], "windows": 1},
        **{"tokens": settings.heldout_tokens, "first_bucket": settings.first_bucket},
    }
    suite.write_text(yaml.safe_dump([{"task": "heldout", "kind": "perplexity", "options": options}]))
    rows = _compared(study, name, source, str(suite), None, folder)
    suites = {one.suite: _compared(study, name, source, one.suite, one.limit, folder) for one in study.grid.suites}
    model = pretrained.load_pretrained(source, device=place)
    said = samples({name: model}, pretrained.load_tokenizer(source), settings.prompts)
    del model
    _free(place)
    found = {"key": _evaluation_key(study), "heldout": rows, "suites": suites, "machine": machine(place)}
    found["samples"] = [{"prompt": row["prompt"], "text": row[name]} for row in said]
    write_json(folder / EVALUATION, found | {"seconds": time.perf_counter() - began})


def measured(study: Study, folder: Path) -> dict[str, Any] | None:
    """What is known of a model; None where it was not measured, or not as this grid says."""
    path = folder / EVALUATION
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if found.get("key") == _evaluation_key(study) else None


def _evaluation_key(study: Study) -> dict[str, Any]:
    """What a measurement depends on beside the model, as JSON gives it back."""
    settings = study.grid.settings
    return {
        "val_data": study.data["val_data"],
        "suites": [dataclasses.asdict(suite) for suite in study.grid.suites],
        "heldout_tokens": settings.heldout_tokens,
        "first_bucket": settings.first_bucket,
        "prompts": list(settings.prompts),
    }


def _compared(
    study: Study, name: str, source: str, suite: str, limit: int | None, folder: Path
) -> list[dict[str, Any]]:
    out = folder / "scores" / Path(suite).stem
    args = SuiteArgs(
        models=(f"{name}={source}",), suite=suite, out=str(out), limit=limit, include_path=study.include_path
    )
    compare(args, study.device)
    return json.loads((out / RESULT).read_text())["rows"]
