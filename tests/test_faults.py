"""What a long run meets: kills at any moment, full disks, broken files, steps without a number, signals, lost nodes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import Ranks
from test_train import data, make_data, rows, weights, words, worst

from open_lm_linear.checkpoint import TrainState, checkpoints, latest_whole, require_readable
from open_lm_linear.faults import EXIT_STOPPED, SampleLog, Stopped, signals

__all__ = ["data"]  # a fixture


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that outlives a test, with data in it, so that the runs that others are compared with are made once."""
    folder = tmp_path_factory.mktemp("shared")
    make_data(folder)
    return folder


EACH = ["--fsdp", "--save-every-steps", "1", "--resume", "latest"]


@pytest.fixture(scope="module")
def one(shared: Path, ranks: Ranks) -> Path:
    """Six updates by one rank, each saved; nothing went wrong."""
    assert ranks.run(1, words(shared, shared / "data" / "manifest.jsonl", "one", *EACH)) == [0], ranks.text()
    return shared / "logs" / "one"


@pytest.fixture(scope="module")
def two(shared: Path, ranks: Ranks) -> Path:
    """The same by two ranks under FSDP."""
    assert ranks.run(2, words(shared, shared / "data" / "manifest.jsonl", "two", *EACH)) == [0, 0], ranks.text()
    return shared / "logs" / "two"


def same(a: Path, b: Path) -> None:
    """Two runs ended with the same bits, in weights and optimiser."""
    for part in ("model", "optimizer"):
        one, two = weights(a, part), weights(b, part)
        assert set(one) == set(two)
        assert all(torch.equal(one[k], two[k]) for k in one)


def consumed(folder: Path) -> list[dict]:
    """samples.jsonl, in which every sample is once and in order."""
    found = rows(folder, "samples.jsonl")
    at = 0
    for row in found:
        assert row["first_sample"] == at, (at, row)
        at += row["samples"]
    return found


def undisturbed(folder: Path, steps: int, batch: int = 8) -> None:
    found = consumed(folder)
    assert [r["step"] for r in found] == list(range(1, steps + 1))
    assert sum(r["samples"] for r in found) == steps * batch and not any(r["skipped"] for r in found)


# ---- ranks ---------------------------------------------------------------------------------------------------------

CUTS = [(1, False, 2), (2, False, 1), (2, True, 2), (4, True, 1)]
MORE = [(2, False, 2), (2, True, 1), (4, False, 1), (4, False, 2), (4, True, 2)]


@pytest.mark.parametrize(
    ("world", "fsdp", "pieces"), [*CUTS, *(pytest.param(*cut, marks=pytest.mark.slow) for cut in MORE)]
)
def test_the_update_does_not_depend_on_ranks(
    tmp_path: Path, data: Path, ranks: Ranks, one: Path, world: int, fsdp: bool, pieces: int
) -> None:
    more = ["--accum-freq", str(pieces), *(["--fsdp"] if fsdp else [])]
    assert ranks.run(world, words(tmp_path, data, "many", *more)) == [0] * world
    assert worst(weights(tmp_path / "logs" / "many"), weights(one)) < 2e-6
    undisturbed(tmp_path / "logs" / "many", 6)


# ---- kills ---------------------------------------------------------------------------------------------------------


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], pids: list[int], seconds: float = 20.0) -> None:
    """Until the condition holds, or a process is gone, which is then a zombie and says no more."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        with contextlib.suppress(OSError):
            if any(s.read_text().rpartition(")")[2].split()[0] == "Z" for s in states):
                return
        time.sleep(0.001)


def through_kills(
    ranks: Ranks, folder: Path, argv: list[str], worlds: list[int], seconds: float, chance: random.Random
) -> int:
    """One start for each of ``worlds``, each killed at a moment of chance; how many were really cut short."""
    cut = 0
    for turn, world in enumerate(worlds):
        pids = ranks.start(world, argv)
        kind = ("all", "one", "saving")[turn % 3]
        if kind == "saving":  # inside the writing of a checkpoint that is not there yet
            seen = set((folder / "checkpoints").glob(".step_*"))
            wait_for(lambda seen=seen: bool(set((folder / "checkpoints").glob(".step_*")) - seen), pids)
            time.sleep(chance.uniform(0, 0.01))
        else:
            time.sleep(chance.uniform(0.1, 1.0) * seconds)
        kill(pids if kind != "one" else [chance.choice(pids)])
        cut += any(code != 0 for code in ranks.wait())
    return cut


KILLS = [pytest.param(3, id="3"), pytest.param(20, id="20", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", KILLS)
def test_a_run_that_is_killed_ends_as_one_that_is_not(tmp_path: Path, data: Path, ranks: Ranks, count: int) -> None:
    more = ["--fsdp", "--save-every-steps", "2", "--keep-last", "2", "--epochs", "4", "--resume", "latest"]
    whole, folder = tmp_path / "logs" / "whole", tmp_path / "logs" / "killed"
    began = time.monotonic()
    assert ranks.run(2, words(tmp_path, data, "whole", *more)) == [0, 0]
    seconds = time.monotonic() - began
    assert [r["step"] for r in rows(whole, "metrics.jsonl")] == list(range(1, 13))
    argv = words(tmp_path, data, "killed", *more)
    cut = through_kills(ranks, folder, argv, [2] * count, seconds / (1 + count // 6), random.Random(count))
    assert cut >= min(count, 3) - 1
    assert ranks.run(2, argv) == [0, 0]
    same(folder, whole)
    undisturbed(folder, 12)
    assert [r["loss"] for r in rows(folder, "metrics.jsonl")] == [r["loss"] for r in rows(whole, "metrics.jsonl")]
    assert not list((folder / "checkpoints").glob(".*"))
    assert [p.name for p in checkpoints(folder)] == ["step_00000010", "step_00000012"]


def test_a_killed_run_goes_on_at_another_world_size(tmp_path: Path, data: Path, ranks: Ranks, two: Path) -> None:
    folder = tmp_path / "logs" / "moved"
    argv = words(tmp_path, data, "moved", *EACH)
    for world, step in ((2, 2), (4, 4)):
        pids = ranks.start(world, argv)
        wait_for(lambda step=step: (folder / "checkpoints" / f"step_{step:08d}").exists(), pids)
        kill(pids)
        ranks.wait()
    assert ranks.run(1, argv) == [0]
    assert worst(weights(folder), weights(two)) < 2e-6
    undisturbed(folder, 6)


# ---- disks and files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(
    tmp_path: Path, data: Path, ranks: Ranks, one: Path, two: Path, world: int
) -> None:
    more = ["--fsdp", "--save-every-steps", "2", "--resume", "latest"]
    whole = one if world == 1 else two
    argv, folder = words(tmp_path, data, "full", *more), tmp_path / "logs" / "full"
    tensors = sum(len(weights(whole, part)) for part in ("model", "optimizer"))
    codes = ranks.run(world, argv, full=[world - 1, tensors + 20])  # in the second checkpoint
    assert codes[-1] == 2 and all(codes)
    said = ranks.text()
    file = "model.safetensors" if world == 1 else "-rank00001.safetensors"
    sentence = next(line for line in said.splitlines() if "No space left on device" in line)
    assert file in sentence and "step_00000002: make room or mend the disk" in sentence and "Traceback" not in said
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000002"]
    require_readable(folder / "checkpoints" / "step_00000002")
    assert ranks.run(world, argv) == [0] * world
    same(folder, whole)
    undisturbed(folder, 6)


@pytest.mark.parametrize("wrong", ["cut", "header", "state", "missing", "shards"])
def test_a_broken_newest_checkpoint_is_passed_over(
    tmp_path: Path, data: Path, ranks: Ranks, one: Path, two: Path, wrong: str
) -> None:
    world, whole = (2, two) if wrong == "shards" else (1, one)
    argv = words(tmp_path, data, "broken", *EACH)
    folder = tmp_path / "logs" / "broken"
    shutil.copytree(whole, folder)
    newest = checkpoints(folder)[-1]
    file = newest / {"state": "state.json", "shards": "shards.json"}.get(wrong, "model.safetensors")
    content = file.read_bytes()
    if wrong in ("cut", "state"):
        file.write_bytes(content[: len(content) // 2])
    elif wrong == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\xff" * 40 + content[40:])
    (newest.parent / ".step_00000009.partial").mkdir()
    assert ranks.run(world, argv) == [0] * world
    said = [line for line in ranks.text().splitlines() if line.startswith("warning: passed over")]
    assert len(said) == 1 and file.name in said[0] and "step_00000006" in said[0]
    same(folder, whole)
    undisturbed(folder, 6)
    assert not list(newest.parent.glob(".*"))


# ---- steps without a number ----------------------------------------------------------------------------------------


def test_one_step_without_a_number_is_as_if_its_data_were_not_there(
    tmp_path: Path, data: Path, ranks: Ranks, two: Path
) -> None:
    folder, other = tmp_path / "logs" / "nan", tmp_path / "logs" / "without"
    assert ranks.run(2, words(tmp_path, data, "nan", *EACH), poison=[1, [3]]) == [0, 0]
    found = consumed(folder)
    assert [r["skipped"] for r in found] == [False] * 3 + [True] + [False] * 3
    assert [r["step"] for r in found] == [1, 2, 3, 4, 4, 5, 6]
    assert "no update is made of samples 24 to 31 (1 in a row)" in (folder / "out.log").read_text()
    record = require_readable(checkpoints(folder)[-1])
    assert (record["skipped"], record["samples"], record["skipped_in_row"]) == ([[24, 8]], 56, 0)
    # the same from a run that is put behind that batch by hand
    shutil.copytree(two, other)
    for path in checkpoints(other)[3:]:
        shutil.rmtree(path)
    state = checkpoints(other)[-1] / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "samples": 32}))
    assert ranks.run(2, words(tmp_path, data, "without", *EACH)) == [0, 0]
    same(folder, other)


def test_a_row_of_them_goes_back_and_past_the_data(tmp_path: Path, data: Path, ranks: Ranks) -> None:
    more = ["--fsdp", "--save-every-steps", "2", "--max-skipped-steps", "2", "--resume", "latest", "--epochs", "3"]
    argv, folder = words(tmp_path, data, "back", *more), tmp_path / "logs" / "back"
    assert ranks.run(2, argv, poison=[0, [5, 6]]) == [0, 0]  # updates 1 to 5 are made, 6 is tried twice
    assert "back to step 4" in (folder / "out.log").read_text()
    found = consumed(folder)
    assert [r["skipped"] for r in found] == [False] * 4 + [True] * 3 + [False] * 5
    assert [r["step"] for r in rows(folder, "metrics.jsonl")] == list(range(1, 10))
    amended = next(p for p in checkpoints(folder) if p.name == "step_00000004")
    record = require_readable(amended)
    assert (record["samples"], record["skipped"], record["rollbacks"]) == (56, [[32, 24]], 1)
    # killed before the next checkpoint, it does the same
    shutil.copytree(folder, tmp_path / "logs" / "first")
    for path in checkpoints(folder):
        if path > amended:
            shutil.rmtree(path)
    assert ranks.run(2, argv) == [0, 0]
    same(folder, tmp_path / "logs" / "first")
    assert consumed(folder) == found


def test_a_run_that_keeps_failing_stops_with_the_reason(tmp_path: Path, data: Path, ranks: Ranks) -> None:
    more = ["--save-every-steps", "2", "--max-skipped-steps", "2", "--max-rollbacks", "2", "--resume", "latest"]
    argv, folder = words(tmp_path, data, "failing", *more), tmp_path / "logs" / "failing"
    assert ranks.run(2, argv, poison=[1, list(range(4, 99))]) == [2, 2]
    said = ranks.text()
    assert "error: step 5: 2 steps in a row had no finite loss and gradients, after 2 returns to a checkpoint" in said
    assert "Traceback" not in said
    assert sum(r["skipped"] for r in consumed(folder)) == 6
    # the count of returns is part of the checkpoint
    assert ranks.run(2, argv, poison=[1, list(range(99))]) == [2, 2]
    assert (folder / "out.log").read_text().count("back to step 4") == 2


def test_no_rank_returns_to_a_checkpoint_before_it_has_its_name(tmp_path: Path, data: Path, ranks: Ranks) -> None:
    more = ["--save-every-steps", "2", "--max-skipped-steps", "1"]
    argv, folder = words(tmp_path, data, "late", *more), tmp_path / "logs" / "late"
    codes = ranks.run(2, argv, poison=[1, [4]], late=0.5)
    assert codes == [0, 0], ranks.text()
    assert "back to step 4" in (folder / "out.log").read_text()


def test_ranges_of_skipped_samples() -> None:
    state = TrainState()
    for first, count in ((8, 8), (16, 8), (40, 8)):
        state.skip(first, count)
    assert state.skipped == [[8, 16], [40, 8]]
    copy = state.copy()
    state.skip(24, 40)  # touches the first and holds the second
    assert state.skipped == [[8, 56]] and copy.skipped == [[8, 16], [40, 8]]


def test_the_sample_log_is_cut_and_marked(tmp_path: Path) -> None:
    log = SampleLog(tmp_path / "samples.jsonl", True)
    for step in range(4):
        log.add(step + 1, step * 8, 8, False)
    with log.path.open("a") as file:
        file.write('{"step": 5, "first')  # a kill
    log.rewind(TrainState(2, 24, skipped=[[16, 8]]))
    assert [(r["first_sample"], r["skipped"]) for r in rows(tmp_path, "samples.jsonl")] == [
        (0, False),
        (8, False),
        (16, True),
    ]


# ---- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_saves_and_ends_with_its_own_code(
    tmp_path: Path, data: Path, ranks: Ranks, world: int, number: signal.Signals
) -> None:
    more = ["--epochs", "12", "--save-frequency", "50", "--resume", "latest", "--workers", "1"]
    argv, folder = words(tmp_path, data, "stopped", *more), tmp_path / "logs" / "stopped"
    pids = ranks.start(world, argv)
    wait_for(lambda: (folder / "samples.jsonl").exists() and len(rows(folder, "samples.jsonl")) >= 3, pids)
    os.kill(pids[-1], number)  # one rank hears it, all stop at the same step
    assert ranks.wait() == [EXIT_STOPPED] * world
    saved, _ = latest_whole(folder)
    assert saved is not None and require_readable(saved)["step"] == len(consumed(folder)) < 36
    assert "stopped after step" in (folder / "out.log").read_text()
    assert ranks.run(world, argv) == [0] * world
    assert ranks.run(world, words(tmp_path, data, "whole", *more)) == [0] * world
    same(folder, tmp_path / "logs" / "whole")
    undisturbed(folder, 36)


def test_handlers_go_with_the_block() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is before
    assert issubclass(Stopped, Exception)


# ---- torchrun ------------------------------------------------------------------------------------------------------


def agent(argv: list[str], *options: str, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "open_lm_linear.main", "--", *argv]
    # With the shared store of torch 2.13 a node that joins a later round waits for an address that is never set there.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with log.open("a") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=env)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in found.read_text().split()] if found.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


ALONE = ("--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "3")


@pytest.mark.slow
def test_torchrun_restarts_dies_and_is_stopped(tmp_path: Path, data: Path, ranks: Ranks) -> None:
    more = ["--fsdp", "--save-every-steps", "2", "--epochs", "60", "--resume", "latest"]
    folder, log = tmp_path / "logs" / "restarted", tmp_path / "log.txt"
    argv = words(tmp_path, data, "restarted", *more)

    def past(step: int) -> Callable[[], bool]:
        return lambda: (folder / "checkpoints" / f"step_{step:08d}").exists()

    launcher = agent(argv, *ALONE, log=log)
    wait_for(past(10), [], 60)
    kill(children(launcher.pid)[:1])  # one rank: the agent starts them all again, and they go on
    wait_for(past(40), [], 60)
    orphans = children(launcher.pid)
    kill([launcher.pid])  # the agent: its ranks go with it
    launcher.wait()
    time.sleep(1)
    assert len(orphans) == 2 and not any(alive(pid) for pid in orphans)
    at = latest_whole(folder)[0]
    assert at is not None
    launcher = agent(argv, *ALONE, log=log)
    wait_for(past(int(at.name[5:]) + 20), [], 60)
    launcher.terminate()  # what a scheduler sends; the ranks hear it from the agent
    launcher.wait(60)
    assert "SIGTERM came" in (folder / "out.log").read_text()
    launcher = agent(argv, *ALONE, log=log)
    assert launcher.wait(120) == 0, log.read_text()[-3000:]
    assert (folder / "out.log").read_text().count("resumed") == 3
    assert ranks.run(2, words(tmp_path, data, "whole", *more)) == [0, 0]
    same(folder, tmp_path / "logs" / "whole")
    undisturbed(folder, 180)


@pytest.mark.slow
def test_two_nodes_of_which_one_is_lost_and_returns(tmp_path: Path, data: Path, ranks: Ranks) -> None:
    more = ["--fsdp", "--save-every-steps", "2", "--epochs", "100", "--resume", "latest"]
    folder, log = tmp_path / "logs" / "nodes", tmp_path / "log.txt"
    argv = words(tmp_path, data, "nodes", *more)
    place = f"127.0.0.1:{free_port()}"
    options = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", place)
    options += ("--rdzv-id", "nodes", "--max-restarts", "5", "--rdzv-conf", "join_timeout=300")
    first = agent(argv, *options, log=log)
    time.sleep(2)  # it holds the meeting place
    second = agent(argv, *options, log=log)
    try:
        wait_for(lambda: (folder / "checkpoints" / "step_00000010").exists(), [], 90)
        kill([second.pid, *children(second.pid)])
        second.wait()
        time.sleep(2)
        at = latest_whole(folder)[0]
        assert at is not None
        second = agent(argv, *options, log=log)
        assert first.wait(240) == 0, log.read_text()[-5000:]
        assert second.wait(60) == 0
    finally:
        kill([first.pid, second.pid])
    assert "resumed" in (folder / "out.log").read_text()
    assert ranks.run(2, words(tmp_path, data, "whole", *more)) == [0, 0]
    same(folder, tmp_path / "logs" / "whole")
    undisturbed(folder, 300)
