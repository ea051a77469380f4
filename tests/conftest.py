"""What the tests share: the measure of error, cuts of a sequence into calls, small architectures."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks

from open_lm_linear.architecture import ModelConfig

if not torch.cuda.is_available():  # Triton reads it as it is imported, and torch's compiler may import it first
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # the tensors are small, and a second thread that waits for a busy core costs most


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref||, in float64; the absolute norm where the reference is zero."""
    out, ref = out.detach().double(), ref.detach().double()
    assert out.shape == ref.shape, f"shapes {tuple(out.shape)} and {tuple(ref.shape)} differ"
    size = ref.norm().item()
    return (out - ref).norm().item() / (size if size > 0 else 1.0)


def spans(lengths: Iterable[int]) -> Iterator[slice]:
    """The slices of a sequence that is cut into calls of these lengths."""
    begin = 0
    for length in lengths:
        yield slice(begin, begin + length)
        begin += length


def tiny(attn_name: str = "linear", options: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    """A two-layer architecture of hidden 32, changed by ``fields``, with these options of its attention."""
    base: dict[str, Any] = {
        "hidden_dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "vocab_size": 61,
        "seq_len": 64,
        "intermediate_dim_ffn": 48,
        "model_norm": "rms_norm",
    }
    return ModelConfig(**{**base, **fields}, attn_name=attn_name, attn_options=options or {})


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    """A tar with these files."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Starts ranks for a test, in a second."""
    server = Ranks(tmp_path_factory.mktemp("ranks") / "log.txt")
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
