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
from dataclasses import dataclass

import numpy as np

from .cases import Case
from .method import Refused, describe, timed

PATIENCE = 300.0  # seconds without an answer after which a peer counts as hung
SETTLE = 0.005  # a pool's threads spin for a while after a call, on a core that the next contestant needs
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}  # times max|v|: far above rounding, far below a narrower type


@dataclass(frozen=True)
class Ready:
    """What a peer says when it is ready to be timed on a case."""

    label: str  # the operator used, if the library has several
    version: str
    threads: int
    error: float  # largest difference to the reference in the rows that were looked at


def check(case: Case, answer: np.ndarray) -> float:
    """Largest error of an answer (batch, heads, q_len, value_dim) against the reference; Refused if wrong.

    The reference stores whole score matrices, so long cases are compared in three bands of queries.
    """
    from .. import reference

    expected_shape = (case.batch, case.heads, case.q_len, case.value_dim)
    if answer.shape != expected_shape:
        raise Refused(f"wrong answer: shape {answer.shape}, not {expected_shape}")
    if answer.dtype != case.dtype:
        raise Refused(f"wrong answer: type {answer.dtype}, not {case.dtype}")
    q, k, v = case.inputs()
    if case.layout == "blhd":
        q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    length, band = case.q_len, 32
    starts = [0] if length <= 3 * band else [0, length // 2, length - band]
    worst = 0.0
    for start in starts:
        rows = slice(start, length if len(starts) == 1 else start + band)
        arguments = case.arguments()
        if case.causal or case.window:
            lengths = np.array(case.kv_lengths or (case.kv_len,) * case.batch)
            arguments["q_offset"] = lengths - length + start
        exact = reference.attention(q[:, :, rows], k, v, **arguments)
        difference = np.abs(answer[:, :, rows].astype(np.float64) - exact)
        worst = max(worst, float(difference.max(initial=0.0)) if not np.isnan(difference).any() else np.inf)
    allowed = TOLERANCE[case.dtype] * float(np.abs(v).max(initial=0.0))
    if worst > allowed:
        raise Refused(f"wrong answer: error {worst:.1e}, allowed {allowed:.1e}")
    return worst


def best_way(peer, case: Case) -> tuple:
    """(label, call, error) of the fastest way that gives the right answer."""
    good, reasons = [], []
    ways = peer.prepare(case)
    for label, call, fetch in ways:
        try:
            error = check(case, fetch())
            seconds = min(timed(call, 1) for _ in range(3)) if len(ways) > 1 else 0.0
            good.append((seconds, label, call, error))
        except Exception as failure:  # one operator of several may be missing or wrong
            reasons.append(f"{label}: {describe(failure)}" if label else describe(failure))
    if not good:
        raise Refused("; ".join(reasons))
    _, label, call, error = min(good, key=lambda entry: entry[0])
    return label, call, error


def serve(pipe, adapter: type, threads: int) -> None:
    """The process: answer ("prepare", case) and ("sample", repeats) until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    peer, call = None, None
    settle = 0.0
    while True:
        try:
            request, argument = pipe.recv()
        except (EOFError, OSError):  # the parent is done, or gone
            return
        try:
            if request == "prepare":
                call = None
                peer = peer or adapter(threads)
                label, call, error = best_way(peer, argument)
                settle = 0.0 if threads == 1 else getattr(peer, "settle", SETTLE)
                pipe.send(Ready(label, peer.version, peer.threads, error))
            else:
                seconds = timed(call, argument)
                time.sleep(settle)
                pipe.send(seconds)
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

    def prepare(self, case: Case) -> Ready:
        """Load the case and check the answer; Refused says why the peer is refused."""
        return self._ask("prepare", case)

    def sample(self, repeats: int) -> float:
        return self._ask("sample", repeats)

    def close(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(1.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def _ask(self, request: str, argument: object):
        try:
            self.pipe.send((request, argument))
            if not self.pipe.poll(self.patience):
                self.process.kill()
                raise Refused(f"no answer in {self.patience:g} s")
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1.0)
            raise Refused(f"crashed (exit code {self.process.exitcode})") from None
        if isinstance(answer, Exception):
            raise answer
        return answer
