"""A peer in a process of its own, asked over a pipe.

So a peer that crashes becomes its column's text, its thread count can be set by environment variables before
it is imported, its threads and memory are its own, and nothing that it does to the process touches what else
is timed. Interleaving is unharmed: one process works at a time, the others wait on their pipes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from .. import _runtime
from . import memory
from .answers import Exact
from .cases import Case
from .method import Refused, describe, rotate, timed

PATIENCE = 300.0  # seconds without an answer after which a peer counts as hung
SETTLE = 0.005  # a pool's threads spin for a while after a call, on a core that the next contestant needs


@dataclass(frozen=True)
class Ready:
    """What a peer says when it is ready to be timed on a case."""

    label: str  # the operator used, if the library has several
    version: str
    threads: int
    error: float  # largest difference to the reference in the rows that were looked at


def ways(peer, case: Case) -> list[tuple]:
    if case.operation not in getattr(peer, "operations", ("attention",)):
        raise Refused(f"no {case.operation}")
    return peer.prepare(case)


def best_way(peer, case: Case, exact: Exact) -> tuple[str, Callable, float]:
    """(label, call, error) of the fastest way that gives the right answer; calls take the sets of inputs in turn."""
    good, reasons = [], []
    found = ways(peer, case)
    for label, calls, fetch in found:
        try:
            error = exact.error(fetch())
            call = rotate(calls)
            seconds = min(timed(call, 1) for _ in range(2)) if len(found) > 1 else 0.0
            good.append((seconds, label, call, error))
        except Exception as failure:  # one operator of several may be missing or wrong
            reasons.append(f"{label}: {describe(failure)}" if label else describe(failure))
    if not good:
        raise Refused("; ".join(reasons))
    _, label, call, error = min(good, key=lambda entry: entry[0])
    return label, call, error


def first_call(peer, case: Case, label: str) -> Callable:
    """The call of a way by its label, on one set of inputs."""
    return next(calls[0] for name, calls, _ in ways(peer, replace(case, stream=False)) if name == label)


def serve(pipe, adapter: type, threads: int) -> None:
    """The process: answer "prepare" (case, exact), "sample" (repeats), "memory" (case, label) until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    memory.be_first_to_go()
    peer, call = None, None
    settle = 0.0
    while True:
        try:
            request, *arguments = pipe.recv()
        except (EOFError, OSError):  # the parent is done, or gone
            return
        try:
            if request == "sample":
                seconds = timed(call, *arguments)
                time.sleep(settle)
                pipe.send(seconds)
                continue
            call = None  # and with it the last case's inputs
            peer = peer or adapter(threads)
            case = arguments[0]
            if request == "prepare":
                label, call, error = best_way(peer, *arguments)
                settle = 0.0 if threads == 1 else getattr(peer, "settle", SETTLE)
                pipe.send(Ready(label, peer.version, peer.threads, error))
            else:
                first = first_call(peer, *arguments)
                with _runtime.force_isa(case.isa) if case.isa else nullcontext():
                    pipe.send(memory.growth(first))
        except Exception as error:  # told to the parent, which decides
            pipe.send(Refused(describe(error)))


class Worker:
    """The parent's end: a contestant whose calls happen in the process of a peer."""

    def __init__(self, adapter: type, threads: int, patience: float = PATIENCE) -> None:
        self.name, self.patience = adapter.name, patience
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, adapter, threads), daemon=True)
        before = dict(os.environ)
        os.environ.update(adapter.environment(threads))
        try:
            self.process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()

    def prepare(self, case: Case, exact: Exact) -> Ready:
        """Load the case and check the answer; Refused says why the peer is refused."""
        return self._ask("prepare", case, exact)

    def sample(self, repeats: int) -> float:
        return self._ask("sample", repeats)

    def memory(self, case: Case, label: str) -> int | None:
        """Bytes that the first call of a way adds; to be asked of a process that has called nothing yet."""
        return self._ask("memory", case, label)

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(1.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _ask(self, *request):
        try:
            self.pipe.send(request)
            if not self.pipe.poll(self.patience):
                self.process.kill()
                raise Refused(f"no answer in {self.patience:g} s")
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1.0)
            code = self.process.exitcode
            raise Refused("killed (out of memory?)" if code == -9 else f"crashed (exit code {code})") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def first_call_memory(adapter: type, case: Case, threads: int, label: str = "") -> int | None:
    """Bytes that a call adds to a fresh process, at its peak, the result included; None if the system can't say."""
    worker = Worker(adapter, threads)
    try:
        return worker.memory(case, label)
    finally:
        worker.close()
