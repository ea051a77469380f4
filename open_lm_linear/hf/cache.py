"""What an exported model remembers of a batch: forks, files, and tensors that a compiled step writes in place."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from open_lm_linear.architecture import ModelConfig
from open_lm_linear.attention.base import Tensor
from open_lm_linear.cli import UserError
from open_lm_linear.model import Past

CACHE_FORMAT = "open_lm_linear cache 1"
NOT_OF_STATES = ("vocab_size", "seq_len")  # fields of an architecture that its states do not depend on


class OpenLMLinearCache:
    """What the model remembers of a batch, with the methods that `generate()` calls on a cache.

    With linear attention its size does not grow. A call of the model renews it in place. The states inside never
    change in place, so ``fork()``, ``copy.copy`` and ``copy.deepcopy`` cost nothing and the forks go separate ways.

    A ``static`` cache is for compiled steps: it has tensors of its own, which each call writes in place and a CUDA
    graph can rely on. Its forks copy them. It takes no part in gradients, and its size must not grow.
    """

    is_croppable = False

    def __init__(self, *, static: bool = False) -> None:
        self.static = static
        self.past: Past | None = None
        self.config: ModelConfig | None = None  # of the model whose states these are
        self._columns: int | Tensor = 0  # a tensor in a static cache: a number would be another graph for each value

    @property
    def is_compileable(self) -> bool:
        """Whether `generate()` compiles its decode steps, where the device is worth it."""
        return self.static

    @property
    def rows(self) -> int | None:
        """Rows of the batch; None before the first call."""
        return None if self.past is None else self.past.positions.shape[0]

    def check(self, rows: int, config: ModelConfig) -> None:
        """Refuses to go on with another number of rows, or with another model, than those that were read so far."""
        if self.rows is not None and self.rows != rows:
            raise UserError(
                f"the cache holds {_count(self.rows)} and the input {rows}: see the cache's batch_repeat_interleave "
                "and batch_select_indices."
            )
        if self.config is not None and self.config is not config:
            _check_architecture("past_key_values", _architecture(self.config), config)

    def renew(self, past: Past, tokens: int, config: ModelConfig) -> None:
        """Takes the past after ``tokens`` columns more."""
        if not self.static:
            self.past, self._columns = past, self._columns + tokens
        elif isinstance(self._columns, Tensor) and self.past is not None:
            _write(self.past, past)
            self._columns.add_(tokens)
        else:
            self.past, self._columns = _own(past), _static(past.positions.new_tensor(tokens))
        if self.config is None:
            self.config = config

    def fork(self, *, static: bool | None = None) -> OpenLMLinearCache:
        """A cache that goes on from here by itself. ``static`` makes it a static one, or not; None: as this one."""
        fork = OpenLMLinearCache(static=self.static if static is None else static)
        fork.past, fork.config, fork._columns = self.past, self.config, self._columns
        if self.past is not None and (fork.static or self.static):
            columns = self.get_seq_length()
            fork.past = _own(self.past)
            fork._columns = _static(self.past.positions.new_tensor(columns)) if fork.static else columns
        return fork

    def __copy__(self) -> OpenLMLinearCache:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenLMLinearCache:
        return self.fork()

    def reset(self) -> None:
        """Forgets everything."""
        self.past, self._columns = None, 0

    def nbytes(self) -> int:
        """Bytes of all layers' states together, all rows."""
        return 0 if self.past is None else self.past.nbytes()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch that went in, padding included."""
        return int(self._columns)

    def crop(self, *_: Any) -> None:
        raise UserError("a recurrent state cannot be cut back to fewer tokens: fork() the cache before reading on.")

    # ---- rows ------------------------------------------------------------------------------------------------------

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes what row ``indices[i]`` was."""
        if self.past is None:
            return
        chosen = self.past.select(indices.to(self.past.positions.device))
        if not self.static:
            self.past = chosen
        elif len(indices) == self.rows:
            _write(self.past, chosen)
        else:
            self.past = _own(chosen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, side by side: one prompt read, several answers."""
        if self.rows is not None:
            self.batch_select_indices(torch.arange(self.rows).repeat_interleave(repeats))

    # ---- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, which the model's ``load_cache`` reads. A fork of it may go on meanwhile."""
        from safetensors.torch import save_file

        if self.past is None or self.config is None:
            raise UserError("this cache is empty: there is nothing to save before the model has read something.")
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        architecture = json.dumps(_architecture(self.config), sort_keys=True)
        columns = str(self.get_seq_length())
        metadata = {"format": CACHE_FORMAT, "architecture": architecture, "columns": columns}
        tensors = {name: x.detach().contiguous() for name, x in self.past.tensors().items()}
        save_file(tensors, partial, metadata)
        os.replace(partial, path)  # whoever reads the path meanwhile finds the old file or the new one

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: ModelConfig, kind: Past) -> OpenLMLinearCache:
        """Reads a file of ``save``.

        Args:
            config: of the model that is to read on.
            kind: any past of that model: which states it has, and on which devices.

        Raises:
            UserError: no such file, another kind of file, a cache of another architecture.
        """
        from safetensors import SafetensorError, safe_open

        devices = {name: x.device for name, x in kind.tensors().items()}
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != CACHE_FORMAT:
                    raise UserError(f"{path} is not a saved cache (or of another version of it).")
                _check_architecture(path, json.loads(metadata["architecture"]), config)
                held = {name: file.get_tensor(name).to(device) for name, device in devices.items()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as a saved cache: {error}.") from error
        cache = cls()
        cache.renew(kind.with_tensors(held), int(metadata["columns"]), config)
        return cache


def _architecture(config: ModelConfig) -> dict[str, Any]:
    """What two models must have in common for one to read on from the other's states, as JSON has it."""
    values = json.loads(json.dumps(config.to_json()))
    return {key: value for key, value in values.items() if key not in NOT_OF_STATES}


def _check_architecture(path: Any, saved: dict[str, Any], config: ModelConfig) -> None:
    ours = _architecture(config)
    for key in sorted({*saved, *ours}):
        if saved.get(key) != ours.get(key):
            raise UserError(
                f"{path} is the cache of another model: its {key} is {saved.get(key)!r}, and here {ours.get(key)!r}."
            )


def _count(rows: int) -> str:
    return f"{rows} row" + "s" * (rows != 1)


def _static(x: Tensor) -> Tensor:
    """``x``, which from now on stays where it is: CUDA graphs then need no copy of it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(x)
    return x


def _own(past: Past) -> Past:
    """A copy with tensors that can be written in place at any time, also outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return past.with_tensors({name: _static(x.detach().clone()) for name, x in past.tensors().items()})


@torch.no_grad()
def _write(past: Past, new: Past) -> None:
    """Puts the content of ``new`` into the tensors of ``past``."""
    source = new.tensors()
    for name, x in past.tensors().items():
        if x.shape != source[name].shape:
            raise UserError("a static cache cannot hold what grows with the text: use fork(static=False).")
        x.copy_(source[name])
