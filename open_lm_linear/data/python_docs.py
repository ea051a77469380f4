"""A small corpus for demos: the documentation that every Python installation carries (PSF licence).

``python -m open_lm_linear.data.python_docs --output docs.jsonl.gz`` writes one document per topic of ``help()`` and one
per module of the standard library: its docstring, then those of its classes and functions. No module is imported.
"""

from __future__ import annotations

import ast
import gzip
import inspect
import io
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from open_lm_linear.cli import UserError, command, parse

SHORTEST = 200  # characters of a document that is worth keeping
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "lib-dynload"}


@dataclass(frozen=True)
class DocsConfig:
    """What to write."""

    output: Path
    """The JSON lines to write, .jsonl or .jsonl.gz: {"text", "source", "id"} each."""


def topics() -> Iterator[tuple[str, str]]:
    """(name, text) of the topics of ``help()``, sorted; nothing where this Python was installed without them."""
    try:
        from pydoc_data.topics import topics as texts
    except ImportError:
        return
    for name in sorted(texts):
        yield name, inspect.cleandoc(texts[name])


def modules(folder: Path) -> Iterator[tuple[str, str]]:
    """(dotted name, docstrings) of every module under ``folder``, sorted; unparsable ones and tests are skipped."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        for name in sorted(files):
            if not name.endswith(".py"):
                continue
            path = Path(parent, name)
            parts = path.relative_to(folder).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            try:
                yield module, module_docs(path.read_text(encoding="utf-8"), module)
            except (SyntaxError, ValueError, RecursionError, OSError):
                continue


def module_docs(source: str, module: str) -> str:
    """The docstrings of a module's source: its own, then each class's and function's under a line with its name.

    Raises:
        SyntaxError, ValueError: Python cannot parse the source.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources
        tree = ast.parse(source)
    docstring = ast.get_docstring(tree)
    parts = [f"{module}\n\n{docstring}"] if docstring else []
    parts += _members(tree, "")
    return "\n\n".join(parts)


def _members(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _titled(child, f"class {prefix}{child.name}")
            yield from _members(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _titled(child, f"{prefix}{child.name}({ast.unparse(child.args)})")
        else:  # definitions under `if` and `try`
            yield from _members(child, prefix)


def _titled(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, title: str) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield f"{title}\n\n{docstring}"


def write_docs(output: Path) -> tuple[int, int]:
    """Writes the corpus; returns (documents, characters). The same Python gives the same bytes.

    Raises:
        UserError: the output's name does not end in .jsonl or .jsonl.gz.
    """
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(f"--output {output} must end in .jsonl or .jsonl.gz.")
    found = [("pydoc_data.topics", name, text) for name, text in topics()]
    found += [("stdlib", name, text) for name, text in modules(Path(sysconfig.get_paths()["stdlib"]))]
    kept = [(source, name, text) for source, name, text in found if len(text) >= SHORTEST]
    lines = "".join(json.dumps({"text": text, "source": source, "id": name}) + "\n" for source, name, text in kept)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(_compress(lines.encode()) if output.suffix == ".gz" else lines.encode())
    return len(kept), sum(len(text) for _, _, text in kept)


def _compress(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as file:  # no name or time in the bytes
        file.write(content)
    return buffer.getvalue()


@command
def main() -> None:
    cfg = parse(
        DocsConfig,
        prog="python -m open_lm_linear.data.python_docs",
        description="Writes the documentation of this Python installation as JSON lines.",
    )
    documents, characters = write_docs(cfg.output)
    print(f"{cfg.output}: {documents:,} documents, {characters:,} characters")


if __name__ == "__main__":
    main()
