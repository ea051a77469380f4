from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

INTERPRETED = ("triton>=3.7", "fla-core==0.6.0", "lightning-attn==0.0.5")
EXTRAS = {
    "gpu": ["triton", "xformers", "flash-linear-attention>=0.4", "lightning-attn"],
    "mamba": ["mamba-ssm"],  # the kernel of Mamba's scan; builds with nvcc
    "eval": ["lm-eval[hf]>=0.4.13", "matplotlib>=3.7"],
    "wandb": ["wandb"],
    "tensorboard": ["tensorboard"],
    "adamw8bit": ["torchao"],
    "remote": ["s3fs", "gcsfs", "aiohttp"],
    "report": ["matplotlib>=3.7"],
    "prepare": ["pyarrow", "datasets"],  # parquet files, data sets of the hub
    "ray": ["ray"],  # prepare --engine ray
    "serve": ["transformers[serving]>=5.17"],
    # accelerate and webdataset: what the tests compare our GGUF reader and our shards with; aiohttp: URLs;
    # pyarrow: parquet; lm-eval: the evaluation; transformers[serving]: the server, and the client that asks it; triton:
    # its interpreter runs the kernels without a GPU, from 3.7 on with numpy 2.4, and others' kernels beside ours.
    "dev": [
        *("pytest>=8", "pytest-xdist", "ruff==0.17.*", "mypy==2.4.*", "tensorboard", "matplotlib>=3.7"),
        *("accelerate", "webdataset", "aiohttp", "pyarrow", "lm-eval[hf]>=0.4.13", "transformers[serving]>=5.17"),
        *(f"{p}; sys_platform == 'linux' and platform_machine == 'x86_64'" for p in INTERPRETED),
    ],
}

setup(
    name="open_lm_linear",
    version="0.1.0",
    description="Turn a pretrained transformer into a linear recurrent model: SUPRA uptraining on the OpenLM interface",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["open_lm_linear", "open_lm_linear.*"]),
    package_data={"open_lm_linear": ["py.typed", "evaluation/published.yaml", "ops/native*"]},
    # configs/ lies beside the package in a checkout and under the environment's share/ when installed from a wheel.
    data_files=[
        (f"share/open_lm_linear/configs/{kind}", sorted(glob(f"configs/{kind}/*")))
        for kind in ("models", "runs", "studies", "suites")
    ],
    install_requires=[
        "torch>=2.6",
        "numpy",
        "safetensors>=0.4",
        "transformers>=5.0",  # tokenizers, hub downloads and the exported classes; imported where used
        "gguf>=0.10",  # reads and dequantises GGUF
        "pyyaml",
        "tyro>=0.9",  # flags, groups and --help from the dataclasses
        "tqdm",
        "fsspec",  # local, S3, GCS and HTTP paths, and gz/xz/zst, behind one open()
        "zstandard",
        "psutil",
    ],
    extras_require=EXTRAS,
    entry_points={"vllm.general_plugins": ["open_lm_linear = open_lm_linear.vllm:register"]},
)
