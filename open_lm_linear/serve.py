"""Serves a model over OpenAI's HTTP interface, by transformers' own server.

    python -m open_lm_linear.serve MODEL [--port 8000]

Nothing of a server is written here. MODEL is laid out as a Hugging Face folder in a temporary place, with what the
server wants and a folder may lack (a chat template, sampling as OpenAI's clients mean it), and transformers' server is
started on it in this process. docs/serving.md says what it answers and how requests share the model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from open_lm_linear.cli import UserError, command, parse
from open_lm_linear.parallel import resolve_device

PROG = "python -m open_lm_linear.serve"

# For models that were never taught a chat: the messages' text, a line each, which the model then continues.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ '' if loop.last else '\n' }}{% endfor %}"

# transformers takes the likeliest token unless told otherwise; a client of OpenAI's that names no temperature means 1.
OPENAI_SAMPLING = {"do_sample": True, "top_k": 0}


@dataclass(frozen=True)
class ServeArgs:
    """Serve a model over OpenAI's HTTP interface, by transformers' own server."""

    model: tyro.conf.Positional[str]
    """An export, a run or checkpoint folder, any Hugging Face folder or hub id that loads, a GGUF file, or a preset."""
    host: str = "localhost"
    """Address to listen at; 0.0.0.0 for every network."""
    port: int = 8000
    """Port to listen at."""
    device: str = "auto"
    """auto: the first GPU, or the CPU where there is none."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights. auto: an export's own; else bfloat16 on a GPU, float32 on a CPU."""
    name: str = ""
    """What clients call the model (default: the last part of MODEL)."""
    tokenizer: str = ""
    """Where the tokenizer lies, if not with the model."""
    chat_template: str = ""
    """A Jinja file to put messages into a prompt with, in place of the tokenizer's own."""


@command
def main() -> None:
    run(parse(ServeArgs, prog=PROG, description=ServeArgs.__doc__ or ""))


def run(args: ServeArgs) -> None:
    """Serves until it is interrupted or terminated.

    Raises:
        UserError: a package that is missing, an address that cannot be listened at, nothing to serve there.
    """
    serve = _stock_server()
    _check_address(args.host, args.port)
    name = args.name or re.sub(r"[^\w.-]+", "-", Path(args.model).resolve().name)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name {name!r}: give letters, digits, '.', '_' and '-' alone, a letter or digit first.")
    device = str(resolve_device(args.device))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the temporary folder goes too
    with tempfile.TemporaryDirectory(prefix="open_lm_linear-serve-") as scratch:
        _introduce(name)
        dtype = _lay_out(args, Path(scratch) / name, device)
        os.chdir(scratch)  # a name that is a folder here is that folder to transformers, and short to clients
        print(f"{args.model} on {device} as model {name!r} at http://{args.host}:{args.port}/v1", flush=True)
        serve(force_model=name, device=device, dtype=dtype, host=args.host, port=args.port)


def _stock_server() -> Any:
    """transformers' server, which runs where it is made."""
    try:
        from transformers.cli.serve import Serve
        from transformers.cli.serving import completion  # noqa: F401  (the server as it has been since 5.17)
        from transformers.utils.import_utils import is_accelerate_available, is_serve_available

        if is_serve_available() and is_accelerate_available():
            return Serve
    except ImportError:
        pass
    raise UserError("serving needs transformers' server, of 5.17 or later: pip install 'open_lm_linear[serve]'.")


def _check_address(host: str, port: int) -> None:
    """Refuses before minutes of loading what the server would refuse after."""
    if not 0 < port < 65536:
        raise UserError(f"--port {port} is not a port: give 1 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror}; give another --port or --host.") from error


# ---- the folder ----------------------------------------------------------------------------------------------------


def _lay_out(args: ServeArgs, folder: Path, device: str) -> str:
    """Writes what the server will load, and returns the dtype for it. The user's files are read and never written."""
    from open_lm_linear.pretrained import load_tokenizer

    template = _read_template(args.chat_template)
    source, dtype = Path(args.model), args.dtype
    tokenizer = load_tokenizer(args.tokenizer or args.model)
    if _is_export(source):
        _link(source, folder)
    else:
        if dtype == "auto":
            dtype = "bfloat16" if device.startswith("cuda") else "float32"
        _write(args.model, folder, tokenizer, dtype)
    if not (template or tokenizer.chat_template):
        template = _plain_template(tokenizer)
        print(f"{args.model} has no chat template: the text of the messages is the prompt, a line each.", flush=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    own = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**OPENAI_SAMPLING, **own}))
    return dtype


def _read_template(path: str) -> str:
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {path} cannot be read ({error}): give a Jinja file.") from error


def _plain_template(tokenizer: Any) -> str:
    """Opens with the token that the tokenizer itself puts before a text, which templates are not given."""
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE


def _is_export(source: Path) -> bool:
    try:
        return json.loads((source / "config.json").read_text()).get("model_type") == "open_lm_linear"
    except (OSError, ValueError):
        return False  # what reads it as a checkpoint says what is wrong with it


def _link(export: Path, folder: Path) -> None:
    """An export's weights where they are, and copies of its settings. Its code, the package's own, stays there."""
    folder.mkdir()
    for path in export.resolve().iterdir():
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        elif path.suffix == ".json":
            shutil.copyfile(path, folder / path.name)


def _write(source: str, folder: Path, tokenizer: Any, dtype: str) -> None:
    """What is no export yet, as one; proofs and remote code are for strangers, and the server here is none."""
    import torch

    from open_lm_linear.hf.wrap import wrap
    from open_lm_linear.pretrained import load_pretrained

    model = load_pretrained(source, dtype=getattr(torch, dtype))
    print(f"{source} is no Hugging Face export: it is written as one to {folder} while it is served.", flush=True)
    wrap(model, tokenizer=tokenizer).save_pretrained(folder)


# ---- the server ----------------------------------------------------------------------------------------------------


def _introduce(name: str) -> None:
    """Makes the model known where the server looks for models: by its class's name in transformers, and in a list.

    It looks there with and without remote code, so a class from elsewhere has to be put there; and it lists the hub's
    cache, of which this model is none.
    """
    import transformers
    from transformers.cli.serving.model_manager import ModelManager

    from open_lm_linear.hf import OpenLMLinearForCausalLM

    transformers.OpenLMLinearForCausalLM = OpenLMLinearForCausalLM  # type: ignore[attr-defined]
    listed = {"id": name, "object": "model", "created": 0, "owned_by": "open_lm_linear"}
    ModelManager.get_gen_models = staticmethod(lambda: [listed])  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    main()
