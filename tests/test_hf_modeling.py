"""The model in transformers: `hf_behaviours.py` on the package's class, and in a process without the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_behaviours
import pytest
import torch
from conftest import tiny
from hf_behaviours import *  # noqa: F403
from test_hf_export import ARCHITECTURES, build, make_tokenizer

from open_lm_linear.hf import OpenLMLinearForCausalLM
from open_lm_linear.hf.bundle import bundle
from open_lm_linear.hf.wrap import wrap

SWAPPED = {name: config for name, config in ARCHITECTURES.items() if config.attn_name != "mamba"}
HERE = ["linear_gqa_qk_norm", "softmax_of_another_family"]  # one of each attention; the process alone takes them all
MODULE = "modeling_open_lm_linear"
CLASSES = {"AutoConfig": "OpenLMLinearConfig", "AutoModelForCausalLM": "OpenLMLinearForCausalLM"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every architecture as a folder that brings its own code."""
    root = tmp_path_factory.mktemp("exports")
    tokenizer = make_tokenizer()
    source = bundle({"linear", "softmax"})
    for name, config in SWAPPED.items():
        auto_map = {auto: f"{MODULE}.{own}" for auto, own in CLASSES.items()}
        wrap(build(config), tokenizer=tokenizer, auto_map=auto_map).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        (root / name / f"{MODULE}.py").write_text(source, encoding="utf-8")
    return {name: str(root / name) for name in SWAPPED}


@pytest.fixture(params=HERE)
def folder(request: pytest.FixtureRequest, folders: dict[str, str]) -> str:
    return folders[request.param]


@pytest.fixture
def load() -> Callable[..., Any]:
    return lambda folder, **options: OpenLMLinearForCausalLM.from_pretrained(folder, **options).eval()


def test_all_of_it_in_a_process_without_the_package(folders: dict[str, str], tmp_path: Path) -> None:
    names = [name for name in dir(hf_behaviours) if name.startswith("test_")]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {**os.environ, "EXPORTS": json.dumps(folders), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-c", "pytest.ini", "--rootdir", "."]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, hf_behaviours.__file__],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > (len(names) - 2) * len(folders) and "skipped" not in done.stdout


def test_a_scaled_embedding_is_rounded_as_its_weights_are() -> None:
    """The scale is made on the device, and must be the number that Gemma's is: the float rounded to the dtype."""
    model = build(tiny("linear", embedding_scale=5.537)).to(torch.bfloat16)
    ids = torch.tensor([[3, 4]])
    with torch.no_grad():
        wanted = model.tok_embeddings.weight[ids] * torch.tensor(5.537, dtype=torch.bfloat16)
        assert torch.equal(model.tok_embeddings(ids), wanted)
