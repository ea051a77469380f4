"""Builds and calls `native.cpp`: what a CPU decodes by, and in training its losses and what lies between its products.

No release carries it compiled: it is built at first use by the machine's own C++ compiler for its own processor, in
two seconds, and kept in the cache folder. $CXX names the compiler; OPEN_LM_LINEAR_NATIVE=0 switches it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_lm_linear.cache import cache_folder

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = sorted(SOURCE.parent.glob("native*.h")) + [SOURCE]
NATIVE_VARIABLE = "OPEN_LM_LINEAR_NATIVE"
NATIVE_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)

INT, FLOAT, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


def _fields(kind: Any, names: str) -> list[Any]:
    return [(name, kind) for name in names.split()]


class NativeMatrix(ctypes.Structure):
    """``Matrix`` of native.cpp."""

    _fields_ = _fields(POINTER, "w b") + _fields(INT, "out in_ bfloat16")


class NativeNorm(ctypes.Structure):
    """``Norm`` of native.cpp."""

    _fields_ = _fields(INT, "kind") + _fields(POINTER, "gain bias") + _fields(FLOAT, "eps")


class NativeBlock(ctypes.Structure):
    """``Block`` of native.cpp."""

    _fields_ = (
        _fields(INT, "dim hidden heads kv_heads k_dim v_dim map_rows features map_layout map_activation")
        + _fields(INT, "norms_at norms_per_head rotary_at rotary_pairs interleaved normaliser ffn")
        + _fields(FLOAT, "normaliser_eps sum_least key_scale exp_limit rotary_magnitude")
        + _fields(POINTER, "decay")
        + _fields(NativeNorm, "before_attention after_attention before_ffn after_ffn q_norm k_norm")
        + _fields(NativeMatrix, "in_proj q_map k_map gate out_proj ffn_gate ffn_up ffn_down")
    )


class NativeLayer(ctypes.Structure):
    """``Layer`` of native.cpp."""

    _fields_ = _fields(POINTER, "block frequencies S Z next_S next_Z")


class NativeCall(ctypes.Structure):
    """``Call`` of native.cpp."""

    _fields_ = (
        _fields(INT, "rows threads dim layers")
        + _fields(POINTER, "layer positions")
        + _fields(INT, "position_stride")
        + _fields(POINTER, "next_positions")
        + _fields(POINTER, "x y")
        + _fields(INT, "bfloat16")
        + _fields(POINTER, "ids logits")
        + _fields(NativeMatrix, "embedding head")
        + _fields(FLOAT, "embedding_scale")
        + _fields(NativeNorm, "after_embedding before_head")
        + _fields(POINTER, "memory")
    )


class NativeTurn(ctypes.Structure):
    """``Turn`` of native_pointwise.h."""

    _fields_ = (
        _fields(INT, "batch tokens heads dim batch_stride token_stride head_stride")
        + _fields(POINTER, "cos sin")
        + _fields(INT, "pairs table_batch_stride interleaved")
        + _fields(FLOAT, "sign")
    )


@functools.lru_cache(maxsize=1)
def native_library() -> ctypes.CDLL | None:
    """The compiled code; None where it cannot be had, which is said once with the reason."""
    if os.environ.get(NATIVE_VARIABLE) == "0":
        return None
    try:
        library = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        reason = detail.strip().splitlines()[0] if detail.strip() else type(error).__name__
        warnings.warn(
            f"decoding and losses on a CPU take torch's own operators, which are slower: {SOURCE.name} cannot be built "
            f"({reason}); install g++ or name a C++ compiler in $CXX, or {NATIVE_VARIABLE}=0 for no attempt",
            stacklevel=2,
        )
        return None
    library.token_memory.restype = INT
    library.token_memory.argtypes = library.token_step.argtypes = [ctypes.POINTER(NativeCall)]
    library.entropy_rows.argtypes = [POINTER, POINTER, INT, INT, FLOAT, INT, POINTER, INT, INT]
    library.divergence_rows.argtypes = [POINTER, POINTER, POINTER, INT, INT, FLOAT, FLOAT, INT, POINTER, INT, INT]
    library.swiglu.argtypes = [POINTER, POINTER, POINTER, INT, INT, INT, INT]
    library.turn.argtypes = [ctypes.POINTER(NativeTurn), POINTER, POINTER, INT, INT]
    library.few_rows.argtypes = [ctypes.POINTER(NativeMatrix), INT, POINTER, POINTER, POINTER, INT, INT]
    return library


def _built() -> Path:
    """The compiled code in the cache folder, built where it is not there.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, one that fails, or a folder that cannot be written.
    """
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler: {' or '.join(names)}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    key = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES))
    for part in (version, _processor(), *NATIVE_FLAGS):  # a home folder may be shared by unlike machines
        key.update(part.encode())
    target = cache_folder() / "native" / f"{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *NATIVE_FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            made.replace(target)  # two processes may build at once: the last one's is as good
    return target


def _processor() -> str:
    """What -march=native goes by."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return "\n".join([platform.machine(), platform.processor(), *kinds])


def native_matrix(weight: Tensor | None, bias: Tensor | None = None, rows: slice | None = None) -> NativeMatrix:
    """A contiguous matrix (out, in), or some of its rows, and a float32 bias, both of which must outlive it."""
    if weight is None:
        return NativeMatrix()
    weight = weight.detach()
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    pointer = None if bias is None else bias.data_ptr()
    *_, out, inputs = weight.shape
    return NativeMatrix(weight.data_ptr(), pointer, out, inputs, weight.dtype == torch.bfloat16)


def native_threads(elements: int) -> int:
    """Threads for a product that reads so many weights: a second one costs more than a small matrix does."""
    return torch.get_num_threads() if elements >= 1 << 16 else 1


def takes_native(*tensors: Tensor) -> bool:
    """Whether the compiled code can read these where they lie, and nobody wants to see what is done to them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    plain = all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors)  # no fake ones
    return plain and all(x.dtype in NATIVE_DTYPES for x in tensors) and native_library() is not None


def takes_matrix(weight: Tensor) -> bool:
    """Whether the compiled code can read this matrix where it lies."""
    return weight.device.type == "cpu" and weight.dtype in NATIVE_DTYPES and weight.is_contiguous()
