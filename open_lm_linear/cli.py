"""What every command of the package shares: one-sentence errors, exit codes and parsing a dataclass from flags."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")

EXIT_USER_ERROR = 2


class UserError(ValueError):
    """Something the user gave is wrong. The message is one sentence: what is wrong, where, and what to do."""


class ProofError(RuntimeError):
    """What was made did not pass its own proof. Nothing was put in its place."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names as a list for an error message, those most like ``name`` first."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=max(1, len(known)), cutoff=0.6)
    return ", ".join(close + sorted(set(known) - set(close)))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with the known name most like ``name``, or nothing when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def parse(
    schema: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    default: T | None = None,
    retired: Mapping[str, str] | None = None,
) -> T:
    """Parses flags into a (possibly nested) dataclass; nested sections become groups of ``--help``.

    Args:
        schema: the dataclass; its fields are the flags (``global_batch_size`` is ``--global-batch-size``).
        argv: the words after the program's name; ``None`` takes them from ``sys.argv``.
        default: an instance whose values stand where no flag is given.
        retired: flag -> sentence, for flags of OpenLM that this project answers with what to use instead.

    Raises:
        UserError: an unknown or a retired flag. A value of the wrong type ends in tyro's message and exit code 2.
    """
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    kwargs = {} if default is None else {"default": default}
    # The section's name is left out of its flags, as in OpenLM: --lr, not --optim.lr.
    value, unknown = tyro.cli(  # type: ignore
        tyro.conf.OmitArgPrefixes[schema],  # type: ignore
        args=argv,
        prog=prog,
        description=description,
        return_unknown_args=True,
        **kwargs,
    )
    if not unknown:
        return value
    flag = unknown[0].split("=", 1)[0]
    if not flag.startswith("-"):
        raise UserError(f"unexpected word {flag!r} on the command line; `{prog} --help` lists the flags.")
    name = "--" + flag.lstrip("-").replace("_", "-")
    if retired and name in retired:
        raise UserError(f"{name} is not taken: {retired[name]}")
    raise UserError(f"unknown flag {name}.{did_you_mean(name, flag_names(schema))} `{prog} --help` lists the flags.")


def peek(argv: Sequence[str], name: str) -> str | None:
    """The value of one flag before the rest can be parsed."""
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") == name:
            return value or (argv[i + 1] if i + 1 < len(argv) else None)
    return None


def flags_in(argv: Sequence[str]) -> set[str]:
    """The flags on a command line by their fields' names; of a switch both forms."""
    names = {w.partition("=")[0][2:].replace("-", "_") for w in argv if w.startswith("--")}
    return names | {n.removeprefix("no_") for n in names}


def flag_names(schema: type) -> list[str]:
    """Every flag that ``schema`` defines, nested sections included: ``["--train-data", ...]``."""
    import dataclasses
    import typing

    names: list[str] = []
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            names += flag_names(typing.cast(type, kind))
        else:
            names.append("--" + field.name.replace("_", "-"))
    return names


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Wraps a command's ``main``: a UserError becomes one line on stderr and exit code 2, a ProofError exit code 1."""

    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)
        except ProofError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapped
