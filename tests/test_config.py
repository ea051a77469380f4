"""Configuration: precedence, files, recipes, the attention's own flags, and one sentence for every wrong input."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from open_lm_linear.architecture import ModelConfig, shipped
from open_lm_linear.cli import UserError
from open_lm_linear.config import Config, from_cli, read_run_config, stages_from_cli, write_run_config
from open_lm_linear.model import read_config
from open_lm_linear.pretrained import PRESETS
from open_lm_linear.retired import RETIRED

BASE = ["--model", "linear_tiny", "--dataset-type", "synthetic"]


def written(tmp_path: Path, **values: object) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    file = written(tmp_path, lr=0.25, warmup=7, train_data="a.jsonl")
    cfg = from_cli(["--model", "linear_tiny", "--config", file, "--lr", "0.5"])
    assert (cfg.optim.lr, cfg.optim.warmup, cfg.optim.beta2) == (0.5, 7, 0.95)
    assert cfg.data.train_data == ("a.jsonl",)


def test_a_file_beats_the_recipe_of_its_preset(tmp_path: Path) -> None:
    plain = from_cli(["--pretrained", "mistral", "--train-data", "x"])
    assert (plain.optim.lr, plain.optim.warmup, plain.run.global_batch_size) == (3e-5, 1000, 1024)
    changed = from_cli(["--pretrained", "mistral", "--train-data", "x", "--config", written(tmp_path, lr="1e-4")])
    assert (changed.optim.lr, changed.optim.warmup) == (1e-4, 1000)


def test_options_of_the_attention_become_flags_and_only_the_given_ones_are_kept(tmp_path: Path) -> None:
    cfg = from_cli([*BASE, "--attn-name", "linear", "--no-use-decay", "--feature-map", "per_head"])
    assert cfg.model.attn == {"use_decay": False, "feature_map": "per_head"}
    from_file = from_cli([*BASE, "--config", written(tmp_path, attn_name="linear_attn", decay_start=0.5)])
    assert from_file.model.attn == {"decay_start": 0.5}
    both = from_cli(
        [*BASE, "--config", written(tmp_path, attn_name="linear", decay_start=0.5), "--decay-start", "0.75"]
    )
    assert both.model.attn == {"decay_start": 0.75}
    with pytest.raises(UserError, match="unknown flag --feature-map"):
        from_cli([*BASE, "--feature-map", "per_head"])


def test_a_run_folders_config_repeats_the_run(tmp_path: Path) -> None:
    cfg = from_cli([*BASE, "--attn-name", "linear", "--feature-map-init", "identity", "--qk-norm", "--seed", "3"])
    write_run_config(cfg, tmp_path)
    assert read_run_config(tmp_path) == cfg
    assert from_cli(["--config", str(tmp_path / "config.yaml")]).flat() == cfg.flat()


@pytest.mark.parametrize("words", [["--lr=2e-4"], ["--lr", "2e-4"], ["--", "--lr", "2e-4"]])
def test_ways_to_write_a_flag(words: list[str]) -> None:
    head = ["--"] if words[0] == "--" else []
    assert from_cli([*head, *BASE, *[w for w in words if w != "--"]]).optim.lr == 2e-4


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([*BASE, "--global-batch-sise", "8"], "unknown flag --global-batch-sise. Did you mean '--global-batch-size'?"),
        ([*BASE, "--moe-freq", "2"], "--moe-freq is not taken: mixtures of experts"),
        ([*BASE, "stray"], "unexpected word 'stray'"),
        ([*BASE, "--attn-name", "linaer"], "unknown attention 'linaer'; known: linear"),
        ([*BASE, "--epochs", "0"], "--epochs must be at least 1"),
        ([*BASE, "--report-to", "mlflow"], "--report-to 'mlflow' is not one of tensorboard, wandb"),
        ([*BASE, "--config", "nowhere.yaml"], "the config file nowhere.yaml does not exist"),
        (["--dataset-type", "synthetic"], "no model: give --pretrained or --model"),
        (["--attn-name", "linear", "--pretrained", "mistral"], "no training data: give --train-data; the shortest"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(argv: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        from_cli(argv)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"warmpu": 3}, "unknown config key 'warmpu'. Did you mean 'warmup'?"),
        ({"warmup": 2.5}, "the config key 'warmup' must be of type int, not 2.5"),
        ({"lr": "fast"}, "the config key 'lr' must be of type float, not 'fast'"),
        ({"fsdp": "yes please"}, "the config key 'fsdp' must be of type bool"),
        ({"precision": "fp8"}, "must be one of amp_bf16"),
        ({"moe_freq": 2}, "the config key 'moe_freq' is not taken"),
    ],
)
def test_a_wrong_config_file_is_one_sentence(tmp_path: Path, values: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        from_cli([*BASE, "--config", written(tmp_path, **values)])
    assert sentence in str(error.value)


def test_every_shipped_recipe_is_read_and_every_shipped_model_is_built() -> None:
    import torch

    from open_lm_linear.model import Transformer

    recipes, models = shipped("runs", ".yaml"), shipped("models", ".json")
    assert {p.recipe for p in PRESETS.values()} <= set(recipes)
    words = ["--pretrained", "smollm2", "--attn-name", "linear", "--train-data", "x"]
    for cfg in (cfg for name in recipes for cfg in stages_from_cli(["--config", name, *words])):
        tokens = (cfg.run.train_num_samples or 0) * cfg.run.epochs
        cfg.optim.check(tokens // (cfg.run.global_batch_size * (cfg.data.seq_len or 1)))
    for name in models:
        config = read_config(name)
        assert isinstance(config, ModelConfig)
        with torch.device("meta"):
            assert sum(p.numel() for p in Transformer(config).parameters()) > 1e6


def test_the_papers_model_sizes() -> None:
    import torch

    from open_lm_linear.model import Transformer

    with torch.device("meta"):
        sizes = {
            n: sum(p.numel() for p in Transformer(read_config(n)).parameters())
            for n in ("mistral_7b", "mistral_7b_linear")
        }
    assert sizes["mistral_7b"] == 7_241_732_096
    # 32 layers of a 4096 x 4096 map for queries and a 1024 x 1024 one for keys, with their biases
    assert sizes["mistral_7b_linear"] - sizes["mistral_7b"] == 32 * (4096 * 4097 + 1024 * 1025)


def test_openlm_flags_are_taken_or_answered() -> None:
    from open_lm_linear.cli import flag_names

    taken = set(flag_names(Config)) | {"--use-decay", "--use-retnet-slopes", "--decay-start"}
    assert not taken & set(RETIRED)
    openlm = "--global-batch-size --accum-freq --train-num-samples --lr-cooldown-end --fsdp --z-loss-coefficient --seed"
    assert set(openlm.split()) <= taken


def test_help_answers_at_once_and_without_torch() -> None:
    code = (
        "import sys\nfrom open_lm_linear.config import stages_from_cli, from_cli\n"
        "try: from_cli(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--global-batch-size" in done.stdout and "optim options" in done.stdout
    assert time.perf_counter() - began < 30  # a hang, not a benchmark


def test_main_exits_2_with_one_line() -> None:
    command = [sys.executable, "-m", "open_lm_linear.main", "--attn-name", "linear", "--pretrained", "mistral"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: no training data")
