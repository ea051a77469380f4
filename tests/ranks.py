"""Starts ranks by forking a process that has loaded everything: a second a run, where torchrun takes ten."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LIMIT = 240.0  # seconds that a run may take


class Ranks:
    """A process that forks ranks on request. ``log`` takes what they print."""

    def __init__(self, log: Path) -> None:
        self.log, self.begin = log, 0
        log.touch()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(log)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(
        self,
        world: int,
        argv: Sequence[str],
        poison: Any = None,
        full: Any = None,
        late: float = 0,
        program: Path | None = None,
    ) -> list[int]:
        """Starts ``main``, or a program, with these words on so many ranks; their process ids.

        Args:
            poison: [rank, [step, ...]]: before the gradients of these attempts are clipped, one gradient of this rank
                becomes NaN. Attempts are counted from 0 in each start.
            full: [rank, count]: the disk of this rank is full after so many tensors.
            late: seconds that rank 0 takes to give a written checkpoint its name.
            program: a Python file to run in place of ``main``.
        """
        assert self.process.stdin and self.process.stdout
        self.begin = self.log.stat().st_size
        job = {"world": world, "argv": list(argv), "poison": poison, "full": full, "late": late}
        job["program"] = program and str(program)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self) -> list[int]:
        """The exit codes. When one rank fails, the others are ended as torchrun would; after LIMIT all are."""
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def run(self, world: int, argv: Sequence[str], **options: Any) -> list[int]:
        self.start(world, argv, **options)
        return self.wait()

    def text(self) -> str:
        """What the ranks of the last start printed."""
        return self.log.read_bytes()[self.begin :].decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def _serve(log: str) -> None:
    import torch._dynamo  # every optimiser's first step asks for it
    import torch.distributed.fsdp  # noqa: F401
    import torch.distributed.tensor  # noqa: F401

    import open_lm_linear.train  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = []
        for rank in range(job["world"]):
            pid = os.fork()
            if pid == 0:
                _rank(log, rank, job, port)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps(_wait(pids)), flush=True)


def _rank(log: str, rank: int, job: dict[str, Any], port: int) -> None:
    from open_lm_linear import main

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(handle, number)
    world = str(job["world"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [job["program"] or "main", *job["argv"]]
    if job["poison"] and job["poison"][0] == rank:
        _poison(job["poison"][1])
    if job["full"] and job["full"][0] == rank:
        _fill(job["full"][1])
    if job["late"]:
        _delay(job["late"])
    code = 1
    try:
        if job["program"]:
            runpy.run_path(job["program"], run_name="__main__")
        else:
            main.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _poison(steps: list[int]) -> None:
    from open_lm_linear import parallel

    clip, attempts = parallel.clip_gradients, itertools.count()

    def poisoned(model: Any, limit: Any) -> float:
        if next(attempts) in steps:
            next(p for p in model.parameters() if p.grad is not None).grad.mul_(float("nan"))
        return clip(model, limit)

    parallel.clip_gradients = poisoned


def _fill(count: int) -> None:
    from open_lm_linear.pretrained.safetensors_files import SafetensorsWriter

    write, written = SafetensorsWriter.write, itertools.count()

    def refused(self: SafetensorsWriter, name: str, rows: Any) -> None:
        if next(written) >= count:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, rows)

    SafetensorsWriter.write = refused  # type: ignore[method-assign]


def _delay(seconds: float) -> None:
    from open_lm_linear.saver import Saver

    finish = Saver._finish

    def late(self: Saver, job: Any) -> None:
        time.sleep(seconds)
        finish(self, job)

    Saver._finish = late  # type: ignore[method-assign]


def _wait(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    began, ended = time.monotonic(), 0.0
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and not ended:
                    ended = time.monotonic()
        if (ended and time.monotonic() - ended > 5) or time.monotonic() - began > LIMIT:
            for pid in set(pids) - set(codes):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    _serve(sys.argv[1])
