"""A preparation in small: what the tests of ``prepare`` share, and the process that they kill.

As a script it prepares ``--input`` as often as there are moments to be killed at: see ``main``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from open_lm_linear.cli import UserError
from open_lm_linear.data import inputs, prepare, shuffle, tokenise

EOD = 256


class ByteTokenizer:
    """One token per byte, then the end of text: id 256; it looks like a fast tokenizer of transformers."""

    eos_token_id = EOD

    def __init__(self) -> None:
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        self.backend_tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.backend_tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab()

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()


def stand_in() -> ModuleType:
    """For open_lm_linear.pretrained, which would ask the hub and load torch."""
    module = ModuleType("open_lm_linear.pretrained")
    module.__path__ = [str(Path(prepare.__file__).parents[1] / "pretrained")]  # its submodules stay real
    module.load_tokenizer = lambda source: ByteTokenizer()  # type: ignore[attr-defined]
    return module


SMALL = {
    (inputs, "SMALLEST_PIECE"): 4000,
    (inputs, "PIECES"): 8,
    (shuffle, "RUN_BYTES"): 1000,
    (shuffle, "BUCKET_BYTES"): 1000,
    (tokenise, "BATCH_CHARACTERS"): 500,
}


def texts(number: int = 300) -> list[str]:
    return [f"<{i}> " + "word " * (i % 17) + f"</{i}>" for i in range(number)]


def jsonl(documents: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text}) + "\n" for text in documents).encode()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def config(source: str, output: Path, **settings: Any) -> prepare.PrepareConfig:
    settings = {"seq_len": 31, "holdout_documents": 0.2, "sequences_per_shard": 40, "workers": 1, **settings}
    return prepare.PrepareConfig((source,), "t", output, **settings)


class Moments:
    """Counts the moments at which something changes on the disk below a folder, and dies at one of them."""

    def __init__(self, folder: Path, last: int = 0) -> None:
        self.folder, self.last, self.count = str(folder), last, 0
        sys.addaudithook(self.see)

    def see(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(args[1], str) and args[1][0] in "wax"
        else:
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        if changes and str(args[0]).startswith(self.folder):
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def in_child(cfg: prepare.PrepareConfig, last: int = 0) -> tuple[int, int, int]:
    """Prepares in a process of its own that dies at moment ``last``; its (signal, pieces tokenised, moments)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        tokenised = []
        original = prepare.tokenise_piece
        prepare.tokenise_piece = lambda *args: tokenised.append(args[1]) or original(*args)  # type: ignore
        moments = Moments(cfg.output, last)
        try:
            prepare.prepare(cfg)
        except UserError as error:
            os._exit(0 if "exists: choose another --output" in str(error) else 1)  # it was just done
        else:
            os.write(writer, json.dumps([len(tokenised), moments.count]).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        said = json.loads(file.read() or b"[0, 0]")
    return os.waitpid(child, 0)[1] & 0x7F, *said


def kill_at_moments(cfg: prepare.PrepareConfig, step: int) -> dict[str, Any]:
    """Kills the preparation at every ``step``-th moment, goes on, and compares all bytes with an uninterrupted run."""
    _, pieces, moments = in_child(cfg)
    whole = contents(cfg.output)
    found = []
    for last in range(1, moments + 1, step):
        shutil.rmtree(cfg.output)
        killed, _, _ = in_child(cfg, last)
        journal = cfg.output / ".work" / "journal.jsonl"
        done = journal.read_text().count('"counts"') if journal.exists() else 0
        _, tokenised, _ = in_child(cfg)
        same = contents(cfg.output) == whole
        found.append({"moment": last, "killed": killed, "done": done, "tokenised": tokenised, "same": same})
    return {"pieces": pieces, "moments": moments, "found": found}


def main() -> None:
    """``prepare_run.py kill INPUT OUTPUT STEP``, or ``prepare_run.py run INPUT OUTPUT WORKERS``."""
    sys.modules["open_lm_linear.pretrained"] = stand_in()
    for (module, name), value in SMALL.items():
        setattr(module, name, value)
    what, source, output, number = sys.argv[1:]
    if what == "kill":
        print(json.dumps(kill_at_moments(config(source, Path(output)), int(number))))
    else:
        prepare.prepare(config(source, Path(output), workers=int(number)))


if __name__ == "__main__":
    main()
