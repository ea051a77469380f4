"""Where pieces of work are done: in this process, in one process per core, or as tasks on a Ray cluster.

Every engine runs the same functions, whose results depend on nothing but their arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from open_lm_linear.cli import UserError

WAITING = 2  # tasks handed out per worker, so that none waits for its next


class Serial:
    """In this process; its tokenizer may have threads.

    Args:
        job: the first argument of every task.
        threads: threads of the tokenizer.
    """

    workers = 1

    def __init__(self, job: Any, threads: int) -> None:
        self.job, self.threads = job, threads

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """The results of ``function(job, *task)``, as they are done."""
        for task in tasks:
            yield function(self.job, *task)

    def __enter__(self) -> Any:
        self.before = {name: os.environ.get(name) for name in _thread_settings(1)}
        os.environ.update(_thread_settings(self.threads))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for name, value in self.before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class Processes(Serial):
    """In processes of their own, which end with this one however it ends."""

    def __init__(self, job: Any, threads: int, workers: int) -> None:
        super().__init__(job, threads)
        self.workers = workers

    def __enter__(self) -> Any:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        self.others = set(multiprocessing.active_children())
        self.pool = ProcessPoolExecutor(
            self.workers,
            mp_context=multiprocessing.get_context("spawn"),  # threads of the tokenizer do not survive a fork
            initializer=_begin,
            initargs=(self.job, self.threads),
        )
        return self

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        from concurrent.futures import FIRST_COMPLETED, wait
        from concurrent.futures.process import BrokenProcessPool

        left = iter(tasks)
        running: set[Any] = set()
        try:
            while True:
                while len(running) < WAITING * self.workers and (task := next(left, None)) is not None:
                    running.add(self.pool.submit(_call, function, task))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, perhaps for want of memory: the same command goes on where it stopped; "
                "give it fewer --workers."
            ) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        import multiprocessing

        if kind is not None:  # what is running is not worth its end
            for process in set(multiprocessing.active_children()) - self.others:
                process.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)


class Ray(Serial):
    """As tasks of the cluster at RAY_ADDRESS, or of a cluster on this machine alone where that is not set."""

    def __init__(self, job: Any, workers: int) -> None:
        super().__init__(job, threads=1)
        self.workers = workers

    def __enter__(self) -> Any:
        try:
            import ray
        except ImportError:
            raise UserError(
                "--engine ray needs the package `ray`, which is not installed: pip install 'open_lm_linear[ray]'."
            ) from None
        self.ray, self.begun = ray, not ray.is_initialized()
        if self.begun:
            if os.environ.get("RAY_ADDRESS"):
                ray.init(log_to_driver=False)
            else:
                ray.init(address="local", num_cpus=self.workers, include_dashboard=False, log_to_driver=False)
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self.shared = ray.put(self.job)
        return self

    def run(self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        remote = self.ray.remote(num_cpus=1)(_remote)
        left = iter(tasks)
        running: list[Any] = []
        while True:
            while len(running) < WAITING * self.workers and (task := next(left, None)) is not None:
                running.append(remote.remote(function, self.shared, task))
            if not running:
                return
            done, running = self.ray.wait(running)
            try:
                yield from self.ray.get(done)
            except self.ray.exceptions.RayTaskError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, UserError):
                    raise UserError(str(cause)) from None
                raise
            except self.ray.exceptions.RayError as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(f"the Ray cluster lost a task ({reason}): the same command goes on there.") from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.begun:
            self.ray.shutdown()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose(name: str, job: Any, workers: int, tasks: int) -> Serial:
    """The engine for a number of tasks: processes times the tokenizer's threads are ``workers`` (0: all cores)."""
    workers = workers or cores()
    if name == "ray":
        return Ray(job, workers)
    processes = max(1, min(workers, tasks))
    threads = workers // processes
    return Serial(job, threads) if processes == 1 else Processes(job, threads, processes)


def _thread_settings(threads: int) -> dict[str, str]:
    """The environment from which the tokenizer takes its threads, when it is first used."""
    return {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false"}


_job: Any = None


def _begin(job: Any, threads: int) -> None:
    """Begins a worker process."""
    import signal

    global _job
    _job = job
    os.environ.update(_thread_settings(threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers it, and ends us
    _end_with_parent()


def _end_with_parent() -> None:
    """Ends this process when its parent is gone: a parent that was killed says nothing, and the queue stays open."""
    import threading
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(function: Callable[..., Any], task: tuple[Any, ...]) -> Any:
    return function(_job, *task)


def _remote(function: Callable[..., Any], job: Any, task: tuple[Any, ...]) -> Any:
    os.environ.update(_thread_settings(1))
    return function(job, *task)
