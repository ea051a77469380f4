"""Exports a run or a checkpoint to a format that others load, and proves it as it is written.

    python -m open_lm_linear.export RUN_OR_CHECKPOINT DST [--dtype bf16] [--fold-feature-map]
        [--format hf|openlm|safetensors|supra] [--push-to-hub OWNER/NAME [--private]]

Torch is imported inside, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from open_lm_linear.cli import UserError, command, parse

if TYPE_CHECKING:
    from open_lm_linear.hf.export import Exported

PROG = "python -m open_lm_linear.export"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class ExportArgs:
    """Export a run or checkpoint to a format that others load."""

    source: tyro.conf.Positional[str]
    """Run or checkpoint folder, or whatever else `convert` reads: a Hugging Face folder or hub id, a GGUF, a preset."""
    folder: tyro.conf.Positional[Path]
    """Folder to write."""
    format: Literal["hf", "openlm", "safetensors", "supra"] = "hf"
    """hf: transformers loads it with trust_remote_code and nothing of ours.
    openlm: a checkpoint of ours, in OpenLM's keys.
    safetensors: one plain file and its config.
    supra: the folders of linear_open_lm (model_type: openlm)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"] = "auto"
    """Of the weights. auto: the source's (float32 where it was quantised)."""
    fold_feature_map: bool = False
    """Fold the feature map of linear attention into the projection before it."""
    overwrite: bool = False
    """Replace an export that is in the folder."""
    max_shard_gb: float = 5.0
    """Most gigabytes of one file."""
    model: str = ""
    """Architecture of weights that do not say their own (an OpenLM .pt): a known name or a .json path."""
    tokenizer: str = ""
    """Where the tokenizer lies, if not with the source."""
    evaluation: tuple[Path, ...] = ()
    """Folders of `evaluate --suite`, whose tables go into the model card."""
    push_to_hub: str = ""
    """OWNER/NAME: upload the export there, once it is proved."""
    private: bool = False
    """--push-to-hub: make the repository private."""


def main(argv: list[str] | None = None) -> None:
    args = parse(ExportArgs, argv, prog=PROG, description=ExportArgs.__doc__ or "")
    if not 0 < args.max_shard_gb < float("inf"):
        raise UserError(f"--max-shard-gb must be above 0, not {args.max_shard_gb}.")
    if args.private and not args.push_to_hub:
        raise UserError("--private belongs to --push-to-hub: give that too.")
    hub = connect(args.push_to_hub) if args.push_to_hub else None  # before minutes of work
    import torch

    from open_lm_linear.hf.card import history_of, suite_table
    from open_lm_linear.hf.export import check_folder, export
    from open_lm_linear.pretrained import open_source

    check_folder(args.folder.resolve(), args.overwrite)
    suites = tuple(suite_table(folder) for folder in args.evaluation)
    source = open_source(args.source, args.model)
    exported = export(
        source,
        args.folder,
        format=args.format,
        tokenizer=_tokenizer(args, source.config.vocab_size),
        dtype=None if args.dtype == "auto" else getattr(torch, DTYPES.get(args.dtype, args.dtype)),
        fold=args.fold_feature_map,
        history=dataclasses.replace(history_of(source), suites=suites),
        name=args.push_to_hub,
        overwrite=args.overwrite,
        max_shard_bytes=int(args.max_shard_gb * 10**9),
    )
    print(summary(exported))
    if hub is not None:
        print(upload(hub, args.push_to_hub, exported, private=args.private))


def summary(exported: Exported) -> str:
    """What an export wrote and measured, for people."""
    lines = [f"{exported.folder}: {exported.nbytes / 1e6:,.1f} MB of weights, {exported.parameters:,} parameters"]
    if exported.saved:
        share = exported.saved / (exported.parameters + exported.saved)
        lines.append(f"folding saved {exported.saved:,} parameters ({share:.1%})")
    lines.append(f"reloaded in a fresh process, the logits differ from the source's by {exported.differences}")
    return "\n".join(lines)


def _tokenizer(args: ExportArgs, vocab_size: int) -> Any:
    """The tokenizer of the source or the one that was named; None, with a note, where there is none."""
    from open_lm_linear.pretrained import load_tokenizer
    from open_lm_linear.pretrained.loading import tokenizer_source

    if not args.tokenizer:
        try:
            tokenizer_source(args.source)
        except UserError as error:
            print(f"note: the export will have no tokenizer: {error}", file=sys.stderr)
            return None
    tokenizer = load_tokenizer(args.tokenizer or args.source)
    if len(tokenizer) < 0.9 * vocab_size:  # rows that no token uses fill a vocabulary up to a round number
        print(
            f"note: the tokenizer has {len(tokenizer)} tokens and the model {vocab_size}: make sure that it is the "
            "model's own.",
            file=sys.stderr,
        )
    return tokenizer


# ---- the hub -------------------------------------------------------------------------------------------------------


def connect(repository: str) -> Any:
    """The hub's interface, once it has been asked whether the token is valid.

    Raises:
        UserError: no OWNER/NAME, no token, or one that the hub does not take.
    """
    import huggingface_hub

    from open_lm_linear.pretrained.places import HUB_ID

    if not HUB_ID.fullmatch(repository):
        raise UserError(f"--push-to-hub {repository!r} is not OWNER/NAME.")
    if huggingface_hub.get_token() is None:
        raise UserError("--push-to-hub needs a Hugging Face token: run `hf auth login`, or set HF_TOKEN.")
    hub = huggingface_hub.HfApi()
    try:
        hub.whoami()
    except Exception as error:  # of the network, of the hub, of the token: all end the same way
        raise UserError(f"--push-to-hub: the hub does not take the token: {_first_line(error)}") from error
    return hub


def upload(hub: Any, repository: str, exported: Exported, *, private: bool = False) -> str:
    """Uploads an export, and nothing else that lies in its folder; says where it is.

    Raises:
        UserError: the upload failed; the export on this machine stays.
    """
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        url = hub.upload_folder(
            repo_id=repository,
            folder_path=exported.folder,
            allow_patterns=[pattern for name in exported.files for pattern in (name, f"{name}/*")],
            commit_message="Export of open_lm_linear",
        )
    except Exception as error:  # as above
        raise UserError(
            f"{exported.folder} is written but not uploaded: {_first_line(error)}; "
            f"`hf upload {repository} {exported.folder}` tries again."
        ) from error
    return f"uploaded to {url}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


if __name__ == "__main__":
    command(main)()
