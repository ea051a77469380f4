"""A run's whole configuration: defaults < the preset's recipe < --config file < flags. Composes, and nothing else.

A file holds the flags' names as flat keys (`lr: 3e-5`, `attn_name: linear`), which is also the form in which the
resolved configuration is written into the run folder: a run's config.yaml is a --config file that repeats the run.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from open_lm_linear import cli
from open_lm_linear.architecture import ModelSection, shipped
from open_lm_linear.checkpoint import CheckpointConfig
from open_lm_linear.cli import UserError, did_you_mean
from open_lm_linear.data.stream import DataConfig
from open_lm_linear.gauges import EvalConfig, MeasureConfig
from open_lm_linear.objectives import ObjectiveConfig
from open_lm_linear.optim import OptimConfig
from open_lm_linear.parallel import ParallelConfig
from open_lm_linear.retired import RETIRED
from open_lm_linear.stages import stage_folder

PROG = "python -m open_lm_linear.main"
DESCRIPTION = "Train a model: from scratch, or uptrain a pretrained one with its attention swapped."
SHORTEST = (
    "torchrun -m open_lm_linear.main --attn-name linear --pretrained mistral --train-data DATA/train/manifest.jsonl"
)


@dataclass(frozen=True)
class RunConfig:
    """The run."""

    config: str = ""
    """YAML file of flags, flat; flags on the command line beat it. A name under configs/runs works too."""
    name: str = ""
    """Name of the run's folder under --logs. Empty: from the model and the attention."""
    logs: str = "./logs/"
    """Folder of all runs."""
    seed: int = 0
    """Seed of the new parameters and of the data's order."""
    train_num_samples: int | None = None
    """Tokens per epoch (OpenLM's name; it counts tokens). None: one pass over the data."""
    epochs: int = 1
    """Epochs of --train-num-samples tokens; a checkpoint and a validation follow each."""
    global_batch_size: int = 64
    """Sequences per optimiser step, over all ranks."""
    accum_freq: int = 1
    """Pieces in which a rank works through its share of a global batch; the update does not depend on it."""
    init_tokens: int = 0
    """Before the first step, choose for every swapped head the decay, scale of the feature map and the like with which
    its output is most like that of the teacher's head, on this many tokens of training data. 0: not, as in the
    paper."""
    fit_tokens: int = 0
    """Before the first step, fit the swapped layers' output projections to the teacher's attention output, in closed
    form, on this many tokens of training data. 0: not, as in the paper."""
    first_sample: int = 0
    """Begin with this sample of the data's order; a later stage begins where the one before ended."""
    val_frequency: int = 1
    """Validate every this many epochs; the start and the end are always validated."""
    log_every_n_steps: int = 100
    """Steps between log lines."""
    report_to: str = ""
    """tensorboard, wandb, or both with a comma."""
    wandb_project_name: str = "open-lm-linear"
    """Project under which wandb files the run."""
    dry_run: bool = False
    """Print the plan, run one micro-batch forward and backward, and stop."""


@dataclass(frozen=True)
class NoOptions:
    """Options of the attention: name one with --attn-name to see them."""


@dataclass(frozen=True)
class Config:
    """Everything; each part of the program takes its own section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        chosen = Path(self.model.pretrained or self.model.model).stem
        return Path(self.run.logs) / (self.run.name or "-".join(filter(None, (chosen, self.model.attn_name))))

    def flat(self) -> dict[str, Any]:
        """Flat flags; options of the attention among them."""
        values: dict[str, Any] = {}
        for section in dataclasses.fields(self):
            values |= dataclasses.asdict(getattr(self, section.name))
        options = values.pop("attn")
        del values["config"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | dict(options)


SECTIONS = {f.name: typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)}


def from_cli(argv: Sequence[str] | None = None) -> Config:
    """The configuration that a command line asks for.

    Raises:
        UserError: an unknown flag, key, file or attention, a value of the wrong kind, or a run without model or data.
    """
    found = stages_from_cli(argv)
    if len(found) > 1:
        raise UserError("the config file has several stages: start it with `python -m open_lm_linear.main`.")
    return found[0]


def stages_from_cli(argv: Sequence[str] | None = None) -> list[Config]:
    """The configurations of a run's stages, of which there is one unless the file has a list ``stages``.

    An item of that list holds flags, which beat the file's others, and may have a ``stage_name``. Each stage is a run
    of its own in a folder inside the run's; all but the first begin with the weights that the one before left behind.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["--"]:  # torchrun takes --logs for an abbreviation of its own; `-m ... -- --logs X` gets it past
        argv = argv[1:]
    path = cli.peek(argv, "config")
    file = _read_file(path) if path else {}
    stages = file.pop("stages", None)
    if stages is None:
        return [_from_values(argv, file)]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError(f"the config file {path}: stages must be a list of mappings of flags to values.")
    found: list[Config] = []
    for number, stage in enumerate(stages):
        values = {str(k).replace("-", "_"): v for k, v in stage.items()}
        label = str(values.pop("stage_name", number))
        cfg = _from_values(argv, {**file, **values})
        run = dataclasses.replace(cfg.run, logs=str(cfg.folder), name=stage_folder(number, label))
        model, objective = cfg.model, cfg.objective
        if found:  # what the first stage swapped in stays
            model = dataclasses.replace(model, pretrained=str(found[-1].folder), model="", attn_name="", attn={})
            run = dataclasses.replace(run, init_tokens=0, fit_tokens=0)
            objective = objective.taught_by(cfg.model.pretrained)
        found.append(dataclasses.replace(cfg, run=run, model=model, objective=objective))
    return found


def _from_values(argv: Sequence[str], file: Mapping[str, Any]) -> Config:
    """The configuration of flags over a file's values over the preset's recipe."""
    pretrained = cli.peek(argv, "pretrained") or file.get("pretrained")
    values = {**_recipe(pretrained), **file}
    attn_name = cli.peek(argv, "attn_name") or values.get("attn_name")
    options = options_class(attn_name)
    default = _compose({**values, **({"attn_name": attn_name} if attn_name else {})}, options)
    given = dict(default.model.attn)
    schema, filled = _schema(default, options, given)
    parsed = cli.parse(schema, argv, prog=PROG, description=DESCRIPTION, default=filled, retired=RETIRED)
    if options is not None:
        flags = {f.name for f in dataclasses.fields(options)} & cli.flags_in(argv)
        given |= {name: getattr(parsed.attention, name) for name in flags}  # type: ignore[attr-defined]
    sections = {name: getattr(parsed, name) for name in SECTIONS}
    chosen = {f.name: getattr(parsed.model, f.name) for f in dataclasses.fields(ModelSection)}
    sections["model"] = ModelSection(**{**chosen, "attn": given})
    cfg = Config(**sections)
    check(cfg)
    return cfg


def check(cfg: Config) -> None:
    """What can be refused without opening anything."""
    from open_lm_linear.metrics import check_reports

    if not (cfg.model.model or cfg.model.pretrained):
        raise UserError(f"no model: give --pretrained or --model; the shortest complete command is `{SHORTEST}`.")
    data = cfg.data
    if data.dataset_type != "synthetic" and not (data.train_data or data.dataset_manifest):
        raise UserError(f"no training data: give --train-data; the shortest complete command is `{SHORTEST}`.")
    for name in ("epochs", "global_batch_size", "accum_freq", "log_every_n_steps", "val_frequency"):
        if getattr(cfg.run, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(cfg.run, name)}.")
    for name in ("init_tokens", "fit_tokens", "first_sample"):
        if getattr(cfg.run, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {getattr(cfg.run, name)}.")
    cfg.evaluation.check()
    cfg.objective.check()
    check_reports(cfg.run.report_to)


def read_run_config(run: str | Path) -> Config:
    """The configuration that a run folder was trained with."""
    path = Path(run) / "config.yaml"
    if not path.exists():
        raise UserError(f"{run} is not a run folder: it holds no config.yaml.")
    values = _read_file(str(path))
    return _compose(values, options_class(values.get("attn_name")))


def write_run_config(cfg: Config, run: Path) -> None:
    """Writes the resolved configuration into the run folder."""
    import yaml

    (run / "config.yaml").write_text(yaml.safe_dump(cfg.flat(), sort_keys=False))


def _read_file(path: str) -> dict[str, Any]:
    import yaml

    known = shipped("runs", ".yaml")
    file = known.get(path, Path(path))
    try:
        values = yaml.safe_load(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"the config file {path} does not exist.{did_you_mean(path, known)}") from error
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"the config file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"the config file {path} is not a mapping of flags to values.")
    return {str(k).replace("-", "_"): v for k, v in values.items()}


def _recipe(pretrained: str | None) -> dict[str, Any]:
    """The hyperparameters of a preset's recipe; of anything else, none."""
    if not pretrained:
        return {}
    from open_lm_linear.pretrained.presets import PRESETS

    preset = PRESETS.get(pretrained)
    return {} if preset is None else _read_file(preset.recipe)


def options_class(attn_name: str | None) -> type | None:
    if not attn_name:
        return None
    from open_lm_linear import attention

    found = attention.resolve(attn_name).Config
    return found if dataclasses.fields(found) else None


def _compose(values: Mapping[str, Any], options: type | None) -> Config:
    """A Config from flat keys; what belongs to the attention goes to ``model.attn``."""
    homes = {f.name: (section, kind) for section, kind in SECTIONS.items() for f in dataclasses.fields(kind)}
    option_names = {f.name for f in dataclasses.fields(options)} if options else set()
    hints = {section: typing.get_type_hints(kind) for section, kind in SECTIONS.items()}
    option_hints = typing.get_type_hints(options) if options else {}
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    attn: dict[str, Any] = {}
    for key, value in values.items():
        if key in option_names:
            attn[key] = coerce(key, value, option_hints[key])
        elif key in homes and key != "attn":
            section = homes[key][0]
            sections[section][key] = coerce(key, value, hints[section][key])
        elif "--" + key.replace("_", "-") in RETIRED:
            raise UserError(f"the config key {key!r} is not taken: {RETIRED['--' + key.replace('_', '-')]}")
        else:
            known = [*homes, *option_names]
            raise UserError(f"unknown config key {key!r}.{did_you_mean(key, known)}")
    sections["model"]["attn"] = attn
    return Config(**{name: kind(**sections[name]) for name, kind in SECTIONS.items()})


def coerce(key: str, value: Any, kind: Any) -> Any:
    """A YAML value as a field's type. YAML reads 3e-5 as a string and lists where we have tuples."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else coerce(key, value, next(a for a in args if a is not type(None)))
    if origin is Literal:
        if value not in args:
            raise UserError(f"the config key {key!r} must be one of {', '.join(map(str, args))}, not {value!r}.")
        return value
    if origin is tuple:
        return tuple(coerce(key, v, args[0]) for v in (value if isinstance(value, (list, tuple)) else [value]))
    try:
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        if kind is int and (isinstance(value, bool) or float(value) != int(float(value))):
            raise ValueError
        return int(float(value)) if kind is int else kind(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"the config key {key!r} must be of type {kind.__name__}, not {value!r}.") from error


def _schema(default: Config, options: type | None, given: dict[str, Any]) -> tuple[type[Config], Config]:
    """The dataclass that is parsed: Config, with the chosen attention's options as a section of their own."""
    import tyro

    # ModelSection.attn is filled from that section; it is no flag itself.
    hidden: list[Any] = [("attn", tyro.conf.Suppress[Mapping[str, Any]], field(default_factory=dict))]
    section = dataclasses.make_dataclass("ModelSection", hidden, bases=(ModelSection,), frozen=True)
    section.__doc__ = ModelSection.__doc__
    values = {name: getattr(default, name) for name in SECTIONS}
    model = {f.name: getattr(default.model, f.name) for f in dataclasses.fields(ModelSection)} | {"attn": {}}
    kind = options or NoOptions
    fields: list[Any] = [
        ("model", section, field(default_factory=section)),
        ("attention", kind, field(default_factory=kind)),
    ]
    schema = dataclasses.make_dataclass("Config", fields, bases=(Config,), frozen=True)
    schema.__doc__ = Config.__doc__
    return schema, schema(**{**values, "model": section(**model)}, attention=kind(**given) if options else kind())
