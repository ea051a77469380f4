"""Loads an export in a fresh process, as its reader will, and compares its logits on a text with the source's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import open_lm_linear
from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import ProofError
from open_lm_linear.hf.formats import Format
from open_lm_linear.pretrained.layerwise import layerwise_logits
from open_lm_linear.pretrained.sources import Source

Tensor = torch.Tensor

LIMIT = 1e-5  # of the relative difference in float32
HALF_LIMIT = 2e-2  # in 16 bits
FOLD_LIMIT = 1e-3  # of folding, in float32: another rounding, grown through the layers of a deep model
MAX_TOKENS = 192
TEXT = """\
The lighthouse at the end of the harbour was built in 1874, when the ships that came for grain still had to find the
channel by the light of a fire on the beach. Its keeper wrote down the weather every evening: the wind, the height of
the waves, and how many boats had not come back. "Fog again," he wrote in March, "and the bell is cracked." For three
weeks nothing could leave. Then, on the 29th, a sailor named Ines rowed out alone with a lantern and 60 metres of rope,
tied one end to the pier and the other to a buoy, and led eleven ships along it, one after the other, into the open
sea. Nobody asked her to. When the new bell arrived in summer, the village engraved her name on it, and it is there
still; you can read it if you climb the 112 steps and wipe off the salt.
"""

# Run in an empty folder: loads an export without this package and writes its logits.
STRANGER = """
import json, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "open_lm_linear":
            raise ModuleNotFoundError("open_lm_linear is not here", name=name)

sys.meta_path.insert(0, Nothing())
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, ids, out = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
with torch.no_grad():
    save_file({"logits": model(torch.tensor([ids]), use_cache=False).logits[0].contiguous()}, out)
"""

# The same by our own loader, which reads every other format.
OURS = """
import json, sys
import torch
from safetensors.torch import save_file
from open_lm_linear.pretrained.layerwise import layerwise_logits
from open_lm_linear.pretrained.sources import open_source

source, ids, out, model, dtype = sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:]
save_file({"logits": layerwise_logits(open_source(source, model), ids, getattr(torch, dtype))}, out)
"""


class ExportError(ProofError):
    """The folder that was written does not load, or is not the model. Nothing was put in its place."""


@dataclass(frozen=True)
class Differences:
    """Relative differences ||out - ref|| / ||ref|| of logits on ``tokens`` tokens of text.

    ``total`` is what a reader of the export gets against the source in float32 (or wider). Its parts, each against the
    one before: ``folding`` in float32 (None: nothing was folded), ``cast`` of weights and arithmetic to the export's
    dtype (None: it is the source's), ``reloaded`` of the export in a fresh process against what was to be written.
    """

    tokens: int
    total: float
    folding: float | None
    cast: float | None
    reloaded: float

    def __str__(self) -> str:
        named = {"folding": self.folding, "the cast": self.cast, "writing and reloading": self.reloaded}
        parts = ", ".join(f"{name} {value:.1e}" for name, value in named.items() if value is not None)
        return f"{self.total:.1e} relative on {self.tokens} tokens of text ({parts})"


def text_ids(tokenizer: Any, config: ModelConfig) -> list[int]:
    """The text as ids; without a tokenizer its bytes stand for them."""
    ids = list(TEXT.encode()) if tokenizer is None else tokenizer(TEXT)["input_ids"]
    return [i % config.vocab_size for i in ids[: min(MAX_TOKENS, config.seq_len)]]


class Proof:
    """What an export must give, computed from its source one layer at a time before anything is written.

    Raises:
        UserError: a tensor of the source that does not fit.
        ExportError: the folded model is not the source's function.
    """

    def __init__(self, source: Source, written: Source, dtype: torch.dtype, ids: list[int]) -> None:
        self.ids, self.dtype = ids, dtype
        wide = torch.promote_types(source.reader.dtype(source.keys["tok_embeddings.weight"][0]), torch.float32)
        self.original = layerwise_logits(source, ids, wide)
        self.folding: float | None = None
        self.cast: float | None = None
        before = self.original
        if written is not source:
            before = layerwise_logits(written, ids, wide)
            self.folding = relative(before, self.original)
            if not self.folding <= FOLD_LIMIT:
                raise ExportError(
                    f"the folded model's logits differ from those of {source.name} by {self.folding:.1e} relative "
                    f"(limit {FOLD_LIMIT:.0e}); nothing was written."
                )
        self.expected = before
        if dtype != wide:
            self.expected = layerwise_logits(written, ids, dtype)
            self.cast = relative(self.expected, before)

    def of(self, folder: Path, format: Format) -> Differences:
        """Loads the folder in a fresh process, by transformers alone where the format is theirs, and compares.

        Raises:
            ExportError: it does not load, or is not the model.
        """
        code, arguments = STRANGER, []
        if not format.stranger:
            config = str(folder / format.config) if format.config else ""
            code, arguments = OURS, [config, str(self.dtype).removeprefix("torch.")]
        logits = logits_of_a_fresh_process(code, folder / format.weights, self.ids, arguments)
        reloaded = relative(logits, self.expected)
        limit = HALF_LIMIT if self.dtype.itemsize < 4 else LIMIT
        if not reloaded <= limit:  # nan is a failure too
            raise ExportError(
                f"the export was dropped: reloaded in a fresh process, its logits differ from the model's by "
                f"{reloaded:.1e} relative (limit {limit:.0e})."
            )
        return Differences(len(self.ids), relative(logits, self.original), self.folding, self.cast, reloaded)


def relative(out: Tensor, ref: Tensor) -> float:
    out, ref = out.double(), ref.double()
    return ((out - ref).norm() / ref.norm()).item()


def logits_of_a_fresh_process(code: str, path: Path, ids: list[int], arguments: list[str]) -> Tensor:
    """Logits (T, vocab_size) that ``code`` computes from an export."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        here = str(Path(open_lm_linear.__file__).parent.parent)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(Path(scratch) / "modules"),
            "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", "")))),
        }
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), json.dumps(ids), str(out), *arguments],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ExportError(f"the export was dropped: it does not load in a fresh process: {reason}")
        return load_file(out)["logits"]
