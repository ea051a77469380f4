"""Opens a checkpoint of any kind by what lies in its place. Only configs and headers are read here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from open_lm_linear import checkpoint
from open_lm_linear.architecture import ModelConfig, shipped
from open_lm_linear.cli import UserError, nearest
from open_lm_linear.model import Transformer, read_config
from open_lm_linear.pretrained import families, llama_cpp, meta, openlm
from open_lm_linear.pretrained.gguf_files import GGUFReader
from open_lm_linear.pretrained.places import LocalPlace, Place, find_place
from open_lm_linear.pretrained.presets import PRESETS, Wheel, fetch_wheel
from open_lm_linear.pretrained.readers import ModelParallelReader, ModelReader, Reader, SafetensorsReader, TorchReader
from open_lm_linear.pretrained.shards import ShardsReader
from open_lm_linear.stages import stage_folders

INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
TOKENIZER_FILES = re.compile(r"(tokenizer.*|special_tokens_map|added_tokens|vocab|merges|chat_template)\.\w+")


@dataclass
class Source:
    """A checkpoint that is ready to be read.

    ``keys`` maps our parameter names to the reader's, several of which are the rows of one of ours; what is not in it
    has no place. ``layout`` is the rotary layout in which the rows of queries and keys lie; ``config`` says in which
    they will be used.
    """

    name: str
    family: str
    config: ModelConfig
    reader: Reader
    keys: dict[str, tuple[str, ...]]
    layout: str
    tokenizer: Callable[[], tuple[str, dict[str, Any]] | None] = lambda: None
    notes: list[str] = field(default_factory=list)
    doubled: list[tuple[str, str]] = field(default_factory=list)  # names of one tensor, which must agree
    checksums: dict[str, str] = field(default_factory=dict)  # SHA-256 of tensors by the reader's names
    untrained: frozenset[str] = frozenset()  # parameters that a conversion added and nothing has trained yet
    hugging_face: dict[str, Any] | None = None  # the config.json of a transformers model
    place: Place | None = None


def open_source(source: str, model: str = "") -> Source:
    """Opens a preset, a path, a URL or a hub id (``owner/name@revision``).

    Args:
        model: the architecture (a known name or a JSON) of weights that do not say their own.

    Raises:
        UserError: nothing of that name, or a format or config that we cannot read; one sentence.
    """
    name = str(source)
    if name in PRESETS:  # a folder of that name is ./name
        where = PRESETS[name].source
        place = LocalPlace(fetch_wheel(where)) if isinstance(where, Wheel) else find_place(where)
    else:
        place = find_place(name)
    if place is None:
        raise UserError(
            f"no pretrained model {name!r}: not a preset ({nearest(name, PRESETS)}), not an existing path, "
            "not a URL, not a hub id (owner/name)."
        )
    opened = _open(place, name, model)
    if model and opened.family != "openlm":
        raise UserError(f"{name} says its own architecture: leave out --model.")
    return opened


def _open(place: Place, name: str, model: str) -> Source:
    if place.single is not None:
        return _open_file(place, place.single, name, model)
    if isinstance(place, LocalPlace):
        place = LocalPlace(stage_folders(place.folder)[-1])
    if isinstance(place, LocalPlace) and (place.folder / "checkpoints").is_dir():
        place = _newest(LocalPlace(place.folder / "checkpoints"))
        if place.single is not None:
            return _open_file(place, place.single, name, model)
    files = place.files()
    if "model.json" in files:
        return _open_checkpoint(place, name)
    weights = [f for f in files if f.endswith(".safetensors") and not f.startswith("consolidated")]
    if "params.json" in files and not ("config.json" in files and weights):
        return _open_meta(place, name)
    if "config.json" in files:
        return _open_hugging_face(place, name)
    ggufs = sorted(f for f in files if f.endswith(".gguf"))
    if len(ggufs) == 1:
        return _open_gguf(place, ggufs[0], name)
    if ggufs:
        raise UserError(f"{name} holds {len(ggufs)} GGUF files: name one of {', '.join(ggufs)}.")
    raise UserError(
        f"{name} holds no checkpoint: no config.json, model.json, params.json or checkpoints/, and no .gguf file."
    )


def _open_file(place: Place, file: str, name: str, model: str) -> Source:
    if file.endswith(".gguf"):
        return _open_gguf(place, file, name)
    if file.endswith(TORCH_SUFFIXES):
        return _open_openlm(TorchReader(place, [file]), place, name, model)
    if file.endswith(".safetensors"):
        return _open_openlm(SafetensorsReader(place, [file], prefix="module."), place, name, model)
    known = ", ".join((".gguf", ".safetensors", *TORCH_SUFFIXES))
    raise UserError(f"{name} is not a checkpoint that can be read: give a folder or a file of {known}.")


def _newest(folder: LocalPlace) -> LocalPlace:
    """The newest checkpoint of a run of ours or of OpenLM's."""
    ours = sorted(folder.folder.glob("step_*"))
    theirs = [(int(m[1]), file) for file in folder.files() if (m := re.fullmatch(r"epoch_(\d+)\.pt", file))]
    if not ours and not theirs:
        raise UserError(f"{folder.folder.parent} has no checkpoint yet.")
    return LocalPlace(ours[-1] if ours else folder.folder / max(theirs)[1])


def source_of(model: Transformer) -> Source:
    """A model in memory as a checkpoint."""
    reader = ModelReader(model)
    layout = model.config.positional_embedding_type
    return Source("the model", "open_lm_linear", model.config, reader, {k: (k,) for k in reader.names()}, layout)


# ---- one function a format -----------------------------------------------------------------------------------------


def _open_gguf(place: Place, file: str, name: str) -> Source:
    reader = GGUFReader(place, file)
    factors = {f: reader.read(f).flatten().tolist() for f in llama_cpp.FACTORS if f in reader.names()}
    config = llama_cpp.config_from_gguf(reader.fields, reader.names(), factors, source=name)
    kind = str(reader.fields["general.architecture"])
    keys = llama_cpp.keys_from_gguf(kind, config.n_layers)
    layout = "llama_rotary" if llama_cpp.FAMILIES[kind].interleaved else "rotary"

    def tokenizer() -> tuple[str, dict[str, Any]]:
        path = place.local(file)
        return str(path.parent), {"gguf_file": path.name}

    return Source(name, f"GGUF {kind}", config, reader, keys, layout, tokenizer, place=place)


def _open_checkpoint(place: Place, name: str) -> Source:
    """A checkpoint of a run of ours, or a converted copy."""
    record = checkpoint.require_files(place.text("state.json") if "state.json" in place else "", place.files(), name)
    config = ModelConfig.from_json(place.json("model.json"), source=f"{name}/model.json")
    reader: Reader = (
        ShardsReader(place)
        if checkpoint.SHARDS in place
        else SafetensorsReader(place, _listed(place, INDEX, ["model.safetensors"]))
    )
    found = Source(name, "open_lm_linear", config, reader, {}, config.positional_embedding_type, place=place)
    found.keys = {key: (key,) for key in reader.names()}
    found.checksums = dict(record.get("sha256", {}))
    found.untrained = frozenset(record.get("untrained", ()))
    found.family = record.get("family", found.family)
    found.tokenizer = _tokenizer(place)
    return found


def _open_meta(place: Place, name: str) -> Source:
    pths = sorted(f for f in place.files() if re.fullmatch(r"consolidated\.\d+\.pth", f))
    if pths:
        parts: list[Reader] = [TorchReader(place, [file]) for file in pths]
    elif "consolidated.safetensors" in place:
        parts = [SafetensorsReader(place, ["consolidated.safetensors"])]
    else:
        raise UserError(f"{name} holds params.json and no consolidated.*.pth or consolidated.safetensors beside it.")
    params = place.json("params.json")
    reader = ModelParallelReader(parts, int(params.get("dim", 0))) if len(parts) > 1 else parts[0]
    config, notes = meta.config_from_params(params, reader, source=f"{name}/params.json")
    keys = families.expand(meta.KEYS, config.n_layers)
    return Source(name, "Meta", config, reader, keys, "llama_rotary", _tokenizer(place), notes, place=place)


def _open_hugging_face(place: Place, name: str) -> Source:
    values = place.json("config.json")
    if not isinstance(values, dict):
        raise UserError(f"{name}/config.json is not an object of config fields.")
    kind, tokenizer = str(values.get("model_type")), _tokenizer(place)
    source = f"{name}/config.json"
    if kind == "open_lm_linear":
        config, reader = families.config_from_own(values, source=source), _hugging_face_reader(place, name, "model.")
    elif kind == "openlm":
        reader = _hugging_face_reader(place, name, "model.")
        config = openlm.config_from_folder(values, reader, source=source)
    else:
        config = families.from_hugging_face(values, source=source)
        keys = families.FAMILIES[kind].table(config.n_layers)
        reader = _hugging_face_reader(place, name)
        return Source(name, kind, config, reader, keys, "rotary", tokenizer, hugging_face=values, place=place)
    family = {"openlm": "linear_open_lm"}.get(kind, kind)
    found = Source(name, family, config, reader, {}, config.positional_embedding_type, tokenizer, place=place)
    found.keys, found.doubled = openlm.keys_of(reader.names())
    if kind == "openlm" and "bfloat16" in str(values.get("dtype") or values.get("torch_dtype")):
        found.notes.append(
            "the reference computes rotary angles in the model's dtype: if this one was trained in bfloat16, "
            "--rotary-rounding bfloat16 gives the angles that it learned"
        )
    return found


def _open_openlm(reader: Reader, place: Place, name: str, model: str) -> Source:
    """A file of OpenLM's parameters, whose architecture stands elsewhere."""
    config = read_config(model) if model else _params_txt(place, name)
    if config is None:
        raise UserError(
            f"{name} holds weights and not their architecture: give it with --model, a .json path or one of "
            f"{', '.join(sorted(shipped('models', '.json')))}."
        )
    keys, doubled = openlm.keys_of(reader.names())
    return Source(name, "openlm", config, reader, keys, config.positional_embedding_type, doubled=doubled, place=place)


def _params_txt(place: Place, name: str) -> ModelConfig | None:
    """By the params.txt of the run whose checkpoints/ folder the file lies in."""
    folder = place.parent()
    run = None if folder is None else folder.parent()
    if run is None or not isinstance(run, LocalPlace) or "params.txt" not in run:
        return None
    return openlm.config_from_params_txt(run.text("params.txt"), source=f"{name}: params.txt")


def _hugging_face_reader(place: Place, name: str, prefix: str = "") -> Reader:
    files = place.files()
    safe = [f for f in files if f.endswith(".safetensors") and not f.startswith("consolidated")]
    if INDEX in files or safe:
        return SafetensorsReader(place, _listed(place, INDEX, sorted(safe)), prefix)
    if BIN_INDEX in files or "pytorch_model.bin" in files:
        return TorchReader(place, _listed(place, BIN_INDEX, ["pytorch_model.bin"]), prefix)
    raise UserError(f"{name} holds no weights: no .safetensors file, no pytorch_model.bin and no index of them.")


def _listed(place: Place, index: str, otherwise: list[str]) -> list[str]:
    """The files that an index names, where there is one."""
    if index not in place:
        return otherwise
    try:
        files = sorted(set(place.json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place.name}/{index} is not an index of weights (no weight_map).") from error
    for file in files:
        if file not in place:
            raise UserError(f"{place.name}/{index} names {file}, which is not there; download the folder again.")
    return files


def _tokenizer(place: Place) -> Callable[[], tuple[str, dict[str, Any]] | None]:
    def find() -> tuple[str, dict[str, Any]] | None:
        files = [f for f in place.files() if TOKENIZER_FILES.fullmatch(f)]
        config = ["config.json"] if "config.json" in place else []
        return (str(place.local_folder(files + config)), {}) if files else None

    return find
