"""The model card of an export: what the model is, where it comes from, how it was made, measured and is run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_lm_linear
from open_lm_linear.cli import UserError
from open_lm_linear.metrics import human_bytes
from open_lm_linear.pretrained.places import HUB_ID
from open_lm_linear.pretrained.presets import PRESETS
from open_lm_linear.stages import stage_folders

if TYPE_CHECKING:
    from open_lm_linear.hf.export import Exported
    from open_lm_linear.model import Transformer
    from open_lm_linear.pretrained.sources import Source

LONG = 16384  # tokens at which a growing cache is named
# Of a run's configuration, in this order, where they say something.
RECIPE = (
    *("train_num_samples", "epochs", "global_batch_size", "seq_len", "lr", "lr_new", "lr_cooldown_end", "warmup", "wd"),
    *(
        "beta1",
        "beta2",
        "grad_clip_norm",
        "z_loss_coefficient",
        "precision",
        "init_tokens",
        "fit_tokens",
        "train_params",
        "seed",
    ),
)
# The hub's identifiers of licences that presets name otherwise.
LICENCES = {"Llama 2 Community": "llama2", "Llama 3 Community": "llama3"}


@dataclass(frozen=True)
class History:
    """What a card says of a model beyond its architecture.

    ``base_model`` is what it was made from, ``licence`` that model's, ``recipe`` the configuration of its run,
    ``evaluation`` the content of the run's evaluation.json, and ``suites`` the tables (markdown) of suites of tasks.
    """

    base_model: str | None = None
    licence: str = "unknown"
    tokens: int | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    suites: tuple[str, ...] = ()


def history_of(source: Source) -> History:
    """What the folders of a run, a checkpoint, a converted copy or an export tell; of anything else, its name.

    Only local files are read.
    """
    folder = _checkpoint(Path(source.name))
    record = _json(folder / "state.json")
    if not record:
        return History(_published(source.name), _licence(source.name, source))
    run = folder.parent.parent
    newest = (run / "checkpoints").is_dir() and _checkpoint(run) == folder
    stages = stage_folders(run.parent)
    records, evaluated = [record], run if newest else folder
    if run in stages:  # it began where the first one did, and learnt from the tokens of all so far
        records = [_json(_checkpoint(stage) / "state.json") for stage in stages[: stages.index(run)]] + records
        evaluated = run.parent if newest and run == stages[-1] else folder
    base = _first_text(records[0].get("config") or {}, "pretrained")
    return History(
        base_model=None if base is None else _published(base),
        licence="unknown" if base is None else _licence(base),
        tokens=sum(r.get("tokens") or 0 for r in records) or None,
        recipe=record.get("config") or {},
        evaluation=_json(evaluated / "evaluation.json"),
    )


def _checkpoint(path: Path) -> Path:
    """The newest checkpoint of a run folder, of its last stage where it has stages; anything else is its own."""
    newest = sorted((stage_folders(path)[-1] / "checkpoints").glob("step_*"))
    return newest[-1] if newest else path


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _first_text(values: Any, key: str) -> str | None:
    """The first text under ``key`` at any depth of nested dicts."""
    if not isinstance(values, dict):
        return None
    if isinstance(values.get(key), str):
        return values[key] or None
    return next((found for value in values.values() if (found := _first_text(value, key))), None)


def _published(name: str) -> str:
    """The hub id of a preset; any other name as it is."""
    return PRESETS[name].hub_id if name in PRESETS else name


def _licence(name: str, source: Source | None = None) -> str:
    """The licence of a model by what is said of it on this machine: a preset, a GGUF's header, a model card."""
    if name in PRESETS:
        licence = PRESETS[name].licence
        return LICENCES.get(licence, licence.lower())
    fields = getattr(getattr(source, "reader", None), "fields", {})
    if "general.license" in fields:
        return str(fields["general.license"])
    card = Path(name) / "README.md"
    if HUB_ID.fullmatch(name.partition("@")[0]) and not Path(name).exists():
        from huggingface_hub import try_to_load_from_cache

        card = Path(str(try_to_load_from_cache(name.partition("@")[0], "README.md") or ""))
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    found = re.search(r"^license: *(\S+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else "unknown"


# ---- the text ------------------------------------------------------------------------------------------------------

CARD = """\
---
{front}---

# {name}

{what}

{run}
{history}{evaluation}## What was checked

Written by open_lm_linear {version}: {attn_name} attention, {parameters:,} parameters, {dtype}.{folded}
Loaded in a fresh process {how}, and compared by its logits with the model that it was
written from, computed in float32:

{differences}.
"""


def card(
    name: str, model: Transformer, format: str, dtype: str, history: History, exported: Exported, tokenizer: bool
) -> str:
    """The text of README.md.

    Args:
        name: what a reader gives to ``from_pretrained``: the folder, or its id on the hub.
        model: the exported architecture, on any device.
        tokenizer: whether one lies beside it.
    """
    front = ["pipeline_tag: text-generation"]
    if format == "hf":
        front.insert(0, "library_name: transformers")
    base = history.base_model
    if base is not None and HUB_ID.fullmatch(base) and not Path(base).exists():
        front.append(f"base_model: {base}")
    front += [f"license: {history.licence}", "tags:", "- open_lm_linear"]
    fold = f" Its feature maps are folded into the projections: {exported.saved:,} parameters fewer."
    return CARD.format(
        front="".join(f"{line}\n" for line in front),
        name=name.rpartition("/")[2],
        what=_what(model, history),
        run=_how_to_run(name, format, tokenizer),
        history=_training(history),
        evaluation=_evaluation(history.evaluation, history.suites),
        version=open_lm_linear.__version__,
        attn_name=model.config.attn_name,
        parameters=exported.parameters,
        dtype=dtype,
        how="that cannot import that package" if format == "hf" else "with open_lm_linear",
        differences=f"a difference of {exported.differences}",
        folded=fold if exported.saved else "",
    )


def _what(model: Transformer, history: History) -> str:
    origin = f" made from {history.base_model}" if history.base_model else ""
    licence = f" Licence of the base model: {history.licence}." if history.base_model else ""
    short, long = (model.state_bytes(1, tokens) for tokens in (1, LONG))
    if short == long:
        return (
            f"A linear recurrent language model{origin}: in place of a growing key-value cache it keeps "
            f"{human_bytes(short)} a sequence, at any length of context.{licence}"
        )
    cache = f"with a key-value cache of {human_bytes(long)} a sequence at {LONG} tokens"
    return f"A language model{origin}, {cache}.{licence}"


TRANSFORMERS = """\
```python
from transformers import pipeline

pipe = pipeline("text-generation", "{name}", trust_remote_code=True)
print(pipe("Once upon a time", max_new_tokens=50)[0]["generated_text"])
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

As a server with OpenAI's interface (`pip install 'open_lm_linear[serve]'`):

```
python -m open_lm_linear.serve {name}
```
"""
WITHOUT_TOKENIZER = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
print(model.generate(token_ids, max_new_tokens=50))  # (1, tokens): no tokenizer came with this model
```
"""
OURS = """\
```
python -m open_lm_linear.generate --checkpoint {name}{file} --input-text "Once upon a time" --max-new-tokens 50
```
"""
SUPRA = """\
The folder has the layout of linear_open_lm (`model_type: openlm`), whose classes load it; so does open_lm_linear.
linear_open_lm computes rotary angles in the dtype of the weights: load it there in float32, unless the model was
trained with such angles.

"""
PLAIN = """\
`model.safetensors` holds one tensor a parameter under OpenLM's names, `model.json` the architecture:

```python
import open_lm_linear as oll
from safetensors.torch import load_file

model = oll.create_model("{name}/model.json")
model.load_state_dict(load_file("{name}/model.safetensors"))
```

"""


def _how_to_run(name: str, format: str, tokenizer: bool) -> str:
    text = {
        "hf": TRANSFORMERS if tokenizer else WITHOUT_TOKENIZER,
        "openlm": OURS,
        "safetensors": PLAIN + OURS,
        "supra": SUPRA + OURS,
    }[format]
    file = f"/model.safetensors --model {name}/model.json --tokenizer {name}" if format == "safetensors" else ""
    return "## How to run it\n\n" + text.format(name=name, file=file)


def _training(history: History) -> str:
    lines = [] if not history.tokens else [f"{history.tokens:,} tokens since it left its base model.", ""]
    rows = [(key, history.recipe[key]) for key in RECIPE if history.recipe.get(key) not in (None, "", 0, 0.0, [])]
    if rows:
        lines += ["| setting | value |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows), ""]
    return "\n".join(["## Training", "", *lines, ""]) if lines else ""


def suite_table(folder: Path) -> str:
    """The table of a suite that `evaluate --suite` has left in ``folder``.

    Raises:
        UserError: there is none.
    """
    path = folder / "table.md"
    if not path.is_file():
        raise UserError(f"{folder} holds no table.md: give a folder that `evaluate --suite` wrote (its --out).")
    return path.read_text(encoding="utf-8")


def _evaluation(evaluation: Mapping[str, Any], suites: Sequence[str]) -> str:
    """Held-out perplexity, and decoding at the contexts that were measured, of the model and what it came from."""
    lines = []
    perplexities = evaluation.get("perplexity", {}).get("models", {})
    if perplexities:
        lines += ["| model | held-out perplexity | nats per token | tokens |", "| --- | --- | --- | --- |"]
        for name, row in perplexities.items():
            numbers = (_number(row["perplexity"], ".2f"), _number(row["nats_per_token"], ".4f"), f"{row['tokens']:,}")
            lines.append(f"| {name} | {' | '.join(numbers)} |")
        lines.append("")
    rows = evaluation.get("decoding", {}).get("rows", [])
    if rows:
        machine = evaluation["machine"]
        lines += [f"Decoding one sequence on {machine.get('gpu') or machine['cpu']}:", ""]
        lines += ["| model | context | ms per token | state or cache |", "| --- | --- | --- | --- |"]
        for row in rows:
            measured = f"{row['milliseconds_per_token']:.1f} | {human_bytes(row['state_bytes'])}"
            lines.append(f"| {row['model']} | {row['context_tokens']:,} | {measured} |")
        lines.append("")
    for suite in suites:  # their headings go below this one's
        lines += [*(re.sub("^#+", "###", line) for line in suite.strip().splitlines()), ""]
    return "\n".join(["## Evaluation", "", *lines, ""]) if lines else ""


def _number(value: float | None, how: str) -> str:
    """A model that diverged has no number."""
    return "-" if value is None else format(value, how)
