"""Ctrl-C during a long call: KeyboardInterrupt within 200 ms, and the next call is right."""

import os

import numpy as np
import pytest
from _util import child_says

import qkv_fast
from qkv_fast import _runtime

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="sends itself a signal as POSIX has them"),
]

# Keys and values of stride 0: no memory, but all the work. Each call would take seconds or more.
INTERRUPTED = """
import os, signal, threading, time
import numpy as np, qkv_fast
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in what they run in the background
rng = np.random.default_rng(1)
small = rng.standard_normal((8, 300, 64)).astype("float32")
expected = qkv_fast.attention(small, small, small, num_threads=1)
q = np.broadcast_to(rng.standard_normal((1, 1, 64)).astype("float32"), (HEADS, LQ, 64))
k = np.broadcast_to(rng.standard_normal(64).astype("float32"), (HEADS, LK, 64))
if "STAGE" in ("mask", "explain"):
    mask = np.broadcast_to(rng.random((LK, 1)) < 0.5, (LK, LQ)).T
    function = qkv_fast.explain if "STAGE" == "explain" else qkv_fast.attention
    call = lambda: function(q, k, k, mask=mask, num_threads=THREADS)
elif "STAGE" == "scores":
    call = lambda: qkv_fast.scores(k.swapaxes(-1, -2)[:, :LQ], k.swapaxes(-1, -2)[:, :LQ], num_threads=THREADS)
elif "STAGE" == "weighted_values":
    call = lambda: qkv_fast.weighted_values(np.broadcast_to(np.float32(1), (HEADS, LQ, LK)), k, num_threads=THREADS)
elif "STAGE" == "grad":
    lse = np.broadcast_to(np.float32(20), (HEADS, LQ))
    call = lambda: qkv_fast.attention_grad(q, q, k, k, q, lse, num_threads=THREADS)
elif "STAGE" == "linear":
    call = lambda: qkv_fast.linear(k[0].T[:LQ], k[0].T[:LQ], num_threads=THREADS)
elif "STAGE" == "Linear":
    layer, x = qkv_fast.Linear(np.ones((32, LK), "f4")), np.broadcast_to(np.float32(1), (LQ, LK))
    call = lambda: layer(x, num_threads=THREADS)
elif "STAGE" == "MultiHeadAttention":
    layer = qkv_fast.MultiHeadAttention(*[np.eye(64, dtype="f4")] * 4, num_heads=1)
    cache = qkv_fast.KVCache(1, 1, 64, LQ)
    def call():
        try:
            layer(q, cache=cache, num_threads=THREADS)
        finally:
            assert cache.lengths.tolist() == [0]    # as it was
elif "STAGE" == "weights":
    call = lambda: qkv_fast.spotlight.weights(q, k, keys=[0], num_threads=THREADS)
elif "STAGE" == "ring":
    cache = qkv_fast.KVCache(1, 1, 64, LQ + LK + 5000, window=LK, keep=5000)
    cache.append(k[None, :, :1].repeat(LQ + LK + 5000, axis=2), k[None, :, :1].repeat(LQ + LK + 5000, axis=2))
    call = lambda: cache.received(q[None], num_threads=THREADS)
elif "STAGE" in qkv_fast.spotlight.__all__:
    arrays = (q, k, k) if "STAGE" == "influence" else (q, k)
    call = lambda: qkv_fast.spotlight.STAGE(*arrays, num_threads=THREADS)
else:
    call = lambda: qkv_fast.attention(q, k, k, num_threads=THREADS)
waited = []
for i in range(SIGNALS):
    sent = []
    def send():
        time.sleep(0.1 + 0.17 / SIGNALS * i)     # at any phase between two looks
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=send)
    thread.start()
    try:
        call()
        raise SystemExit("the call ended by itself")
    except KeyboardInterrupt:
        waited.append(time.monotonic() - sent[0])
    thread.join()
    assert np.array_equal(qkv_fast.attention(small, small, small, num_threads=THREADS), expected)
print(max(waited))
"""


@pytest.fixture
def longest_wait(request):
    """The longest wait for a KeyboardInterrupt, over several signals; each takes a fifth of a second."""
    signals = 10 if request.config.option.full else 4

    def run(heads, lq, lk, threads, stage="attention", **environment):
        code = INTERRUPTED.replace("STAGE", stage)
        for name, n in dict(HEADS=heads, LQ=lq, LK=lk, THREADS=threads, SIGNALS=signals).items():
            code = code.replace(name, str(n))
        return float(child_says(code, **environment))

    return run


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "heads, lq, lk",
    [
        (1, 1, 2**27),  # one task of one row, which may be another thread's
        (1, 48, 2**27),
        (1, 48 * 40, 2**23),  # tasks of seconds each
        (2**10, 2**10, 2**11),  # short ones
    ],
)
def test_signals(longest_wait, heads, lq, lk, threads):
    assert longest_wait(heads, lq, lk, threads) < 0.2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("stage, lq, lk", [("scores", 48, 2**28), ("weighted_values", 512, 2**25)])
def test_signals_to_a_stage(longest_wait, stage, lq, lk, threads):
    """One task of seconds: the looks are between groups of rows and passes of terms."""
    assert longest_wait(1, lq, lk, threads, stage) < 0.2


@pytest.mark.parametrize(
    "stage, lq, lk", [("linear", 48, 2**28), ("Linear", 2**21, 2**13), ("MultiHeadAttention", 2**18, 1)]
)
def test_signals_to_a_layer(longest_wait, stage, lq, lk):
    """One task of seconds; packed weights; attention behind projections, in a cache that stays as it was."""
    assert longest_wait(1, lq, lk, 2, stage) < 0.2


@pytest.mark.parametrize("question", ["largest", "entropy", "top_keys", "received", "weights", "pooled"])
def test_signals_to_a_question(longest_wait, question):
    assert longest_wait(1, 48 * 40, 2**23, 2, question) < 0.2


@pytest.mark.parametrize("threads", [1, 2])
def test_signals_to_gradients(longest_wait, threads):
    assert longest_wait(1, 2**17, 2**17, threads, "grad") < 0.2


def test_signals_to_a_question_of_a_cache(longest_wait):
    """A ring, whose kept tokens are asked first."""
    assert longest_wait(1, 2**17, 2**16, 2, "ring") < 0.2


@pytest.mark.parametrize("axis, most", [(0, 2**24), (1, 2**20)])
def test_softmax_looks_every_few_milliseconds(axis, most):
    """Between tasks, which are no more than so many elements but where a single strip is more: some 10 ms."""
    x = np.zeros((64, 2**19), "float32")
    with _runtime.counters() as counts:
        qkv_fast.softmax(x, axis, out=x, num_threads=1)
    assert counts["tasks"] >= x.size // most


def test_signals_on_the_slowest_path(longest_wait):
    assert longest_wait(8, 20000, 20000, 2, QKV_FAST_ISA="portable") < 0.2


def test_a_handler_that_does_not_raise():
    """It runs while the call goes on, and the call is right."""
    code = """
import os, signal, threading, time
import numpy as np, qkv_fast
seen = []
signal.signal(signal.SIGUSR1, lambda *args: seen.append(qkv_fast.attention(x[:1, :50], x[:1], x[:1])))
x = np.random.default_rng(1).standard_normal((4, 3000, 64)).astype("float32")
expected = qkv_fast.attention(x, x, x), qkv_fast.attention(x[:1, :50], x[:1], x[:1])
running = True
def send():
    while running:
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)
threading.Thread(target=send, daemon=True).start()
deadline = time.monotonic() + 1
calls = 0
while time.monotonic() < deadline or not seen:
    assert np.array_equal(qkv_fast.attention(x, x, x, num_threads=2), expected[0])
    calls += 1
running = False
assert all(np.array_equal(out, expected[1]) for out in seen)
print("right" if calls else "none")
"""
    assert child_says(code) == "right"


@pytest.mark.parametrize("stage", ["mask", "explain"])
def test_signals_with_a_mask(longest_wait, stage):
    """One that is looked at key by key, and more of it than a call has computed when the signal comes."""
    assert longest_wait(4, 2**17, 2**17, 2, stage) < 0.2
