"""Writes a model as a Hugging Face folder that needs nothing of this package, and proves it before it is there.

    python -m open_lm_linear.hf.export SOURCE FOLDER [--dtype bfloat16] [--overwrite]

The folder is written beside its place, loaded in a fresh process that cannot import open_lm_linear, compared with the
model by its logits, and only then given its name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import open_lm_linear
from open_lm_linear.cli import ProofError, UserError, command, parse
from open_lm_linear.hf.bundle import bundle
from open_lm_linear.hf.modeling import OpenLMLinearForCausalLM
from open_lm_linear.hf.wrap import wrap
from open_lm_linear.model import Transformer

MODULE = "modeling_open_lm_linear"
AUTO_MAP = {"AutoConfig": f"{MODULE}.OpenLMLinearConfig", "AutoModelForCausalLM": f"{MODULE}.OpenLMLinearForCausalLM"}
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-5}  # of the relative difference; other dtypes:
HALF_LIMIT = 2e-2
PROBE_TOKENS = 16

# Run in an empty folder: loads an export as a stranger would and writes its logits.
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
    save_file({"logits": model(torch.tensor([ids]), use_cache=False).logits.contiguous()}, out)
"""


class ExportError(ProofError):
    """The folder that was written does not load, or is not the model. Nothing was put in its place."""


@dataclass(frozen=True)
class Exported:
    """What an export measured, as relative differences ||out - ref|| / ||ref|| of the logits.

    ``difference`` is that of the reloaded folder from the model in the folder's dtype, ``cast`` that of the model in
    the folder's dtype from the model as it was (0 where the dtype is the same).
    """

    folder: Path
    difference: float
    cast: float
    size: int  # bytes of the weights


def export_hf(
    model: Transformer,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    eos_token_id: int | list[int] | None = None,
    base_model: str | None = None,
    tokens_trained: int | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
) -> Exported:
    """Writes ``model`` to ``folder`` for `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

    Args:
        tokenizer: a transformers tokenizer to lay beside it, whose special tokens `generate()` then uses.
        dtype: of the weights (default: the model's).
        eos_token_id: what ends a generation (default: the tokenizer's).
        base_model: name of the pretrained model that this one began as, for the model card.
        tokens_trained: tokens that it was trained on since, for the model card.
        overwrite: replace an export that is there; other files in the folder stay.

    Raises:
        UserError: a folder in use, a tokenizer that does not fit, an attention from outside the package.
        ExportError: the written folder does not give the model's logits.
    """
    folder = Path(folder).resolve()
    _check_folder(folder, overwrite)
    source = bundle({"linear", "softmax", model.config.attn_name})
    written = wrap(model, tokenizer=tokenizer, dtype=dtype, eos_token_id=eos_token_id, auto_map=AUTO_MAP)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        written.save_pretrained(partial, max_shard_size=max_shard_size)
        (partial / f"{MODULE}.py").write_text(source, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        exported = _verify(partial, folder, model, written)
        card = _card(folder.name, written, exported, tokenizer is not None, base_model, tokens_trained)
        (partial / "README.md").write_text(card, encoding="utf-8")
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return exported


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder to export to.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{folder} is not empty: give another folder, or --overwrite to replace the export in it.")
    if not (folder / f"{MODULE}.py").exists():
        raise UserError(f"{folder} holds no export, and --overwrite replaces nothing else: give another folder.")


def _verify(partial: Path, folder: Path, model: Transformer, written: OpenLMLinearForCausalLM) -> Exported:
    """Compares the folder, loaded by a stranger, with what was meant to be written."""
    ids = [(7919 * i + 1) % model.config.vocab_size for i in range(PROBE_TOKENS)]
    device = next(model.parameters()).device
    with torch.no_grad():
        probe = torch.tensor([ids], device=device)
        ours = written(probe, use_cache=False).logits.cpu()
        before = ours if written.dtype == next(model.parameters()).dtype else model(probe)[0].cpu()
    difference = _relative(_stranger_logits(partial, ids), ours)
    limit = LIMITS.get(written.dtype, HALF_LIMIT)
    if not difference <= limit:  # nan is a failure too
        raise ExportError(
            f"the export to {folder} was dropped: reloaded without open_lm_linear, its logits differ from the model's "
            f"by {difference:.1e} relative (limit {limit:.0e})."
        )
    size = sum(p.numel() * p.element_size() for p in written.parameters())
    return Exported(folder, difference, _relative(ours, before), size)


def _relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    out, ref = out.double(), ref.double()
    return ((out - ref).norm() / ref.norm()).item()


def _stranger_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits (1, T, vocab_size) of an export in a fresh process in which open_lm_linear cannot be imported."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "logits.safetensors"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, str(folder), json.dumps(ids), str(out)],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ExportError(f"the export was dropped: it does not load without open_lm_linear: {reason}")
        return load_file(out)["logits"]


def _put_in_place(partial: Path, folder: Path) -> None:
    """Moves the files over; weights of an earlier export that are not replaced are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        old.unlink()
    for path in sorted(partial.iterdir()):
        if path.is_dir() and (folder / path.name).exists():
            shutil.rmtree(folder / path.name)
        os.replace(path, folder / path.name)


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
{base}tags:
- open_lm_linear
---

# {name}

{what}

```python
from transformers import AutoModelForCausalLM{tokenizer_import}

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
{example}
```

{trained}Written by open_lm_linear {version}: {attn_name} attention, {parameters:,} parameters, {dtype}.
Reloaded in a process without that package, its logits on {probe} tokens differed from the model's by {difference:.1e}
relative{cast}.
"""

WITH_TOKENIZER = """\
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))"""


def _card(
    name: str,
    written: OpenLMLinearForCausalLM,
    exported: Exported,
    tokenizer: bool,
    base_model: str | None,
    tokens: int | None,
) -> str:
    is_hub_id = base_model is not None and base_model.count("/") == 1 and not base_model.startswith((".", "/", "~"))
    cast = f";\nthe cast from the original dtype had changed them by {exported.cast:.1e}" if exported.cast else ""
    example = WITH_TOKENIZER.format(name=name) if tokenizer else "print(model.generate(token_ids, max_new_tokens=50))"
    return CARD.format(
        name=name,
        base=f"base_model: {base_model}\n" if is_hub_id else "",
        what=_what(written.model, base_model),
        tokenizer_import=", AutoTokenizer" if tokenizer else "",
        example=example,
        trained="" if tokens is None else f"Trained on {tokens:,} tokens since it left its base model.\n\n",
        version=open_lm_linear.__version__,
        attn_name=written.config.attn_name,
        parameters=sum(p.numel() for p in written.parameters()),
        dtype=str(written.dtype).removeprefix("torch."),
        probe=PROBE_TOKENS,
        difference=exported.difference,
        cast=cast,
    )


def _what(model: Transformer, base_model: str | None) -> str:
    origin = f" made from {base_model}" if base_model else ""
    short, long = (model.state_bytes(1, tokens) for tokens in (1, 16384))
    if short == long:
        return (
            f"A linear recurrent language model{origin}: in place of a growing key-value cache it keeps "
            f"{short / 2**20:.3g} MiB a sequence, at any length of context."
        )
    return f"A language model{origin}, with a key-value cache of {long / 2**20:.3g} MiB a sequence at 16384 tokens."


@dataclass(frozen=True)
class ExportArgs:
    """Export to a Hugging Face folder that loads without this package."""

    source: tyro.conf.Positional[str]
    """Run or checkpoint folder, Hugging Face folder or hub id, GGUF file, or a preset such as smollm2."""
    folder: tyro.conf.Positional[Path]
    """Folder to write."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights."""
    overwrite: bool = False
    """Replace an export that is in the folder."""
    model: str = ""
    """Architecture of weights that do not say their own (an OpenLM .pt): a known name or a .json path."""
    tokenizer: str = ""
    """Where the tokenizer lies, if not with the source."""


def main(argv: list[str] | None = None) -> None:
    from open_lm_linear.pretrained import load_pretrained, load_tokenizer

    prog = "python -m open_lm_linear.hf.export"
    args = parse(ExportArgs, argv, prog=prog, description=ExportArgs.__doc__ or "")
    _check_folder(args.folder.resolve(), args.overwrite)  # before minutes of loading
    base_model, tokens = _history(args.source)
    exported = export_hf(
        load_pretrained(args.source, model=args.model),
        args.folder,
        tokenizer=load_tokenizer(args.tokenizer or args.source),
        dtype=getattr(torch, args.dtype),
        base_model=base_model,
        tokens_trained=tokens,
        overwrite=args.overwrite,
    )
    cast = f"; the cast to {args.dtype} changed them by {exported.cast:.1e}" if exported.cast else ""
    print(
        f"{exported.folder}: {exported.size / 1e6:,.1f} MB of weights; reloaded without open_lm_linear, "
        f"the logits differ by {exported.difference:.1e} relative{cast}."
    )


def _history(source: str) -> tuple[str | None, int | None]:
    """Base model and tokens trained of a run or checkpoint of ours; of anything else its own name and None."""
    folder = Path(source)
    if (folder / "checkpoints").is_dir():
        from open_lm_linear.checkpoint import latest

        folder = latest(folder)
    if not (folder / "state.json").exists():
        return source, None
    record = json.loads((folder / "state.json").read_text())
    return _find(record.get("config"), "pretrained"), record.get("tokens")


def _find(values: Any, key: str) -> str | None:
    """The first text under ``key`` at any depth of nested dicts."""
    if not isinstance(values, dict):
        return None
    if isinstance(values.get(key), str):
        return values[key] or None
    return next((found for value in values.values() if (found := _find(value, key))), None)


if __name__ == "__main__":
    command(main)()
