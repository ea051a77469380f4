"""Memory and time of a conversion at Mistral-7B's size, on a made-up checkpoint of exactly its shapes.

    python eval/measure_convert.py --folder /tmp/7b [--layers 32] [--ranks 4] [--keep]

Writes a Hugging Face folder in bfloat16 (14.5 GB at 32 layers, files of 5 GB), converts it with the attention swapped,
loads the original under FSDP2 on several processes, prints what each took, and deletes everything again. Needs twice
the checkpoint's size on the disk. Peak memory is the process's high-water mark, of which what it had after its imports
is taken off; pages of files that are mapped count in it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Mistral checkpoint, in the order of its files."""
    dim, ffn, kv, vocab = 4096, 14336, 1024, 32000
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, dim)}
    for i in range(layers):
        out |= {
            f"model.layers.{i}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (dim, dim),
                "self_attn.k_proj": (kv, dim),
                "self_attn.v_proj": (kv, dim),
                "self_attn.o_proj": (dim, dim),
                "mlp.gate_proj": (ffn, dim),
                "mlp.up_proj": (ffn, dim),
                "mlp.down_proj": (dim, ffn),
                "input_layernorm": (dim,),
                "post_attention_layernorm": (dim,),
            }.items()
        }
    return out | {"model.norm.weight": (dim,), "lm_head.weight": (vocab, dim)}


def make(folder: Path, layers: int) -> int:
    """Writes the made-up checkpoint; its bytes."""
    import torch

    from open_lm_linear.pretrained.safetensors_files import SafetensorsWriter

    folder.mkdir(parents=True)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    for name, shape in shapes(layers).items():
        nbytes = 2 * torch.Size(shape).numel()
        if size + nbytes > 5e9:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size, total = size + nbytes, total + nbytes
    files = {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
    values = torch.randn(1 << 23, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for count, (file, group) in enumerate(files.items()):
        tensors = {name: (torch.bfloat16, shape) for name, shape in group.items()}
        with SafetensorsWriter(folder / file, tensors, {"format": "pt"}) as writer:
            for name, shape in group.items():
                width = torch.Size(shape[1:]).numel()
                for begin in range(0, shape[0], 512):
                    rows = min(512, shape[0] - begin)
                    values[0] = float(begin + count)  # no two blocks alike
                    writer.write(name, values[: rows * width].view(rows, *shape[1:]))
            writer.close()
    weight_map = {name: file for file, group in files.items() for name in group}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return total


CHILD_CONVERT = """
import resource, sys, time
import open_lm_linear.pretrained.copies as c
from transformers import AutoConfig
from open_lm_linear.pretrained import open_source
AutoConfig.for_model("mistral")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
job = c.prepare(open_source(sys.argv[1]), sys.argv[3] or None)
done = c.convert(job, sys.argv[2])
print(f"{done.nbytes / 1e9:.2f} GB in {done.files} files, {done.seconds:.0f} s ({done.nbytes / 1e6 / done.seconds:.0f} "
      f"MB/s), peak memory {peak() - before:.0f} MiB above the {before:.0f} MiB of the interpreter")
"""

CHILD_LOAD = """
import os, resource, sys, time
import torch
from open_lm_linear import parallel, pretrained
from open_lm_linear.model import Transformer
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with parallel.setup(parallel.ParallelConfig(device="cpu", precision="bf16", fsdp=True)) as ctx:
    source = pretrained.open_source(sys.argv[1])
    with torch.device("meta"):
        model = Transformer(source.config).to(torch.bfloat16)
    model = parallel.apply(model, parallel.ParallelConfig(fsdp=True), ctx)
    before = peak()
    began = time.perf_counter()
    model.to_empty(device="cpu")
    pretrained.load_weights(model, source)
    seconds = time.perf_counter() - began
    shard = sum(p.to_local().nbytes for p in model.parameters())
    total = sum(p.numel() * 2 for p in model.parameters())
    for rank in range(ctx.world_size):
        ctx.barrier()
        if rank == ctx.rank:
            read = source.reader.bytes_read
            print(f"rank {rank}: shards {shard / 1e9:.3f} GB of {total / 1e9:.3f} GB, read {read / 1e9:.3f} GB "
                  f"in {seconds:.0f} s, peak memory {peak() - before:.0f} MiB above {before:.0f} MiB "
                  f"({(peak() - before) / (shard / 2**20):.2f} x its shards)", flush=True)
"""


def run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    print(done.stdout.strip())
    if done.returncode:
        sys.exit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on a disk with room")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint and its copy")
    args = parser.parse_args()
    source, copy = args.folder / "mistral", args.folder / "copy"
    if args.folder.exists():
        sys.exit(f"{args.folder} exists: give a new folder.")
    try:
        began = time.perf_counter()
        size = make(source, args.layers)
        print(
            f"made {size / 1e9:.2f} GB, {args.layers} layers of Mistral-7B's shapes, "
            f"{time.perf_counter() - began:.0f} s"
        )
        pair = 2 * 2 * 14336 * 4096 / 2**20
        print(
            f"largest pair of tensors needed at once (gate and up): {pair:.0f} MiB; "
            f"1.5 times that is {1.5 * pair:.0f} MiB"
        )
        for name in ("", "linear"):
            print(f"convert{f' --attn-name {name}' if name else ''}: ", end="", flush=True)
            run([sys.executable, "-c", CHILD_CONVERT, str(source), str(copy), name])
            if not args.keep or not name:
                shutil.rmtree(copy)
        script = args.folder / "load.py"
        script.write_text(CHILD_LOAD)
        print(f"load under FSDP2 on {args.ranks} processes, bfloat16, from meta:", flush=True)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(args.ranks)]
        run([*torchrun, str(script), str(source)])
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
