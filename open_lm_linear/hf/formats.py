"""What the folders of an export hold beside weights, tokenizer and card, and how its tensors are called there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import transformers

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.hf.bundle import bundle
from open_lm_linear.hf.modeling import OpenLMLinearConfig, OpenLMLinearForCausalLM
from open_lm_linear.hf.wrap import generation_config
from open_lm_linear.pretrained.openlm import config_to_folder, folder_names

MODULE = "modeling_open_lm_linear"
AUTO_MAP = {"AutoConfig": f"{MODULE}.OpenLMLinearConfig", "AutoModelForCausalLM": f"{MODULE}.OpenLMLinearForCausalLM"}


@dataclass(frozen=True)
class Format:
    """One format.

    ``names`` gives the tensors that are written for one of our parameters, ``texts`` the small files: name -> content.
    Our loader is given the folder, or the file ``weights`` in it with the architecture in ``config``.
    """

    names: Callable[[ModelConfig, str], tuple[str, ...]]
    texts: Callable[[ModelConfig, OpenLMLinearConfig], dict[str, str]]
    stranger: bool = False
    """Whether transformers alone loads it."""
    weights: str = ""
    config: str = ""


def _hf_texts(config: ModelConfig, hf: OpenLMLinearConfig) -> dict[str, str]:
    source = bundle({"linear", "softmax", config.attn_name, *config.attn_layers})
    hf.architectures = [OpenLMLinearForCausalLM.__name__]
    hf.auto_map = dict(AUTO_MAP)
    return {
        "config.json": hf.to_json_string(),
        "generation_config.json": generation_config(hf).to_json_string(),
        f"{MODULE}.py": source,
    }


def _supra_texts(config: ModelConfig, hf: OpenLMLinearConfig) -> dict[str, str]:
    values = config_to_folder(config, str(hf.dtype).removeprefix("torch."))
    return {
        "config.json": _json(values | {"transformers_version": transformers.__version__}),
        "generation_config.json": generation_config(hf).to_json_string(),
    }


def _json(values: object) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


FORMATS = {
    "hf": Format(lambda config, name: (f"model.{name}",), _hf_texts, stranger=True),
    "openlm": Format(lambda config, name: (name,), lambda config, hf: {}),  # its records tell of the files too
    "safetensors": Format(
        lambda config, name: (name,),
        lambda config, hf: {"model.json": _json(config.to_json())},
        weights="model.safetensors",
        config="model.json",
    ),
    "supra": Format(folder_names, _supra_texts),
}
