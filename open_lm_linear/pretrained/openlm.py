"""What OpenLM and linear_open_lm write: ``.pt`` files, ``params.txt`` two folders up, and Hugging Face folders."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from open_lm_linear import attention
from open_lm_linear.architecture import ModelConfig, shipped
from open_lm_linear.pretrained.readers import Reader

# Its Hugging Face config's names -> those of its JSON.
_RENAMED = {"dim": "hidden_dim", "norm_type": "model_norm", "apply_qk_norm": "qk_norm"}


def config_from_folder(values: Mapping[str, Any], reader: Reader, *, source: str) -> ModelConfig:
    """A ``config.json`` of ``model_type: openlm``. Key-value heads that it leaves out are counted in the weights."""
    values = {_RENAMED.get(key, key): value for key, value in values.items()}
    values.setdefault("attn_name", "linear")
    own = {f.name for f in dataclasses.fields(ModelConfig)} - {"attn_options"}
    options = {f.name for f in dataclasses.fields(attention.resolve(values["attn_name"]).Config)}
    config = ModelConfig.from_json(
        {key: value for key, value in values.items() if key in own | options or key.startswith("moe_")}, source=source
    )
    config = attention.resolve(config.attn_name).from_openlm(config)
    key = "layers.0.attention.in_proj.weight"
    if values.get("n_heads_kv") is None and key in reader.names():
        rest = reader.shape(key)[0] - config.n_heads * config.qk_dim
        config = dataclasses.replace(config, n_heads_kv=max(1, rest // (config.qk_dim + config.v_dim)))
    return config


def config_from_params_txt(text: str, *, source: str) -> ModelConfig | None:
    """The architecture of a run of OpenLM by its ``params.txt``: the model's JSON, and flags where that is silent.

    None where the model is a JSON that is not here.
    """
    flags = {}
    for line in text.splitlines():
        name, separator, value = line.partition(": ")
        if separator:
            flags[name.strip()] = _literal(value.strip())
    model = str(flags.get("model"))
    path = shipped("models", ".json").get(Path(model).stem)
    if path is None:
        return None
    values = json.loads(path.read_text())
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    name = values.get("attn_name", flags.get("attn_name") or "auto")
    if name not in attention.ALIASES and name not in attention.names():
        name = "auto"
    known |= {f.name for f in dataclasses.fields(attention.resolve(name).Config)}
    # What its models read from flags; key-value heads it never did.
    taken = {k: v for k, v in flags.items() if k in known - {"n_heads_kv", "seq_len"} and v is not None}
    config = ModelConfig.from_json({**taken, **values, "attn_name": name}, source=source)
    return attention.resolve(name).from_openlm(config)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def keys_of(names: Collection[str]) -> tuple[dict[str, tuple[str, ...]], list[tuple[str, str]]]:
    """Our key -> the file's, and the pairs of names under which it stores one tensor twice (the gelu feed-forward)."""
    keys: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    doubled = []
    for name in names:
        main = name.replace("._ff_w1.", ".feed_forward.0.").replace("._ff_w2.", ".feed_forward.2.")
        if main != name:
            del keys[name]
            if main in names:
                doubled.append((main, name))
            else:
                keys[main] = (name,)
    return keys, doubled
