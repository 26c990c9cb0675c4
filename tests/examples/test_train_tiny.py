"""examples/train_tiny.py: its gradients, and torch's run beside it."""

import itertools

import numpy as np
import pytest
import train_tiny
from _examples import run
from train_tiny import BETAS, RATE, TINY, Model, batches, new_weights, train

import qkv_fast


def text(n, seed=0):
    """Bytes that have something to learn: each but every fourth is the one before and one."""
    rng = np.random.default_rng(seed)
    return np.add.accumulate(np.where(np.arange(n) % 4, 1, rng.integers(0, 256, n))).astype(np.uint8)


def test_gradients_by_differences():
    """Along a random direction of each weight, in float64."""
    rng = np.random.default_rng(0)
    model = Model(new_weights(rng, 16, 2, "float64"))
    tokens, targets = next(batches(text(1000), rng, 3, 20))
    loss, grads = model.loss_and_gradients(tokens, targets)
    assert grads.keys() == model.weights.keys() and loss > 0
    for name, w in model.weights.items():
        step = 1e-6 * rng.standard_normal(w.shape)
        losses = []
        for sign in (1, -1):
            model.weights[name] = w + sign * step
            losses.append(model.loss_and_gradients(tokens, targets)[0])
        model.weights[name] = w
        # relu has corners, but none lies within the step; the error of differences is of the order of step^2.
        np.testing.assert_allclose(losses[0] - losses[1], 2 * np.sum(grads[name] * step), rtol=1e-4, atol=1e-13)


def test_it_learns():
    """Of four bytes three are certain, so a quarter of the eight bits are left at best."""
    rng = np.random.default_rng(0)
    losses = [*train(Model(new_weights(rng, 32, 2)), batches(text(20000), rng, 8, 32), 150)]
    assert losses[0] > 5 and np.mean(losses[-10:]) < 0.7 * losses[0]


def torch_losses(torch, weights, given, steps, heads=4):
    """The same model and the same run in torch, whose autograd and Adam do what train_tiny.py writes out."""
    functional = torch.nn.functional
    w = {name: torch.from_numpy(x.copy()).requires_grad_() for name, x in weights.items()}
    layers = sum(name.endswith(".qkv") for name in w)
    slopes = torch.from_numpy(qkv_fast.alibi_slopes(heads).astype("f4"))[:, None, None]
    adam = torch.optim.Adam(w.values(), lr=RATE, betas=BETAS, eps=TINY)

    def norm(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)

    for tokens, targets in itertools.islice(given, steps):
        tokens, targets = (torch.from_numpy(x.astype("i8")) for x in (tokens, targets))
        at = torch.arange(tokens.shape[1])
        behind = at[:, None] - at
        bias = (-slopes * behind).masked_fill(behind < 0, -torch.inf)
        x = w["embed"][tokens]
        for i in range(layers):
            q, k, v = (norm(x) @ w[f"{i}.qkv"]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            out = functional.scaled_dot_product_attention(q, k, v, bias)
            x = x + out.transpose(1, 2).flatten(-2) @ w[f"{i}.mix"]
            x = x + (norm(x) @ w[f"{i}.up"]).relu() @ w[f"{i}.down"]
        loss = functional.cross_entropy((norm(x) @ w["out"]).flatten(0, 1), targets.flatten())
        adam.zero_grad()
        loss.backward()
        adam.step()
        yield loss.item()


def test_torch_has_the_same_losses():
    torch = pytest.importorskip("torch", reason="the extra [test] leaves it out for its size; [torch] has it")
    weights = new_weights(np.random.default_rng(1), 64, 2)
    data = np.frombuffer("\n".join(train_tiny.topics.values()).encode("ascii", "replace"), np.uint8)

    def given():
        return batches(data, np.random.default_rng(2), 4, 64)

    theirs = [*torch_losses(torch, weights, given(), 50)]
    ours = [*train(Model(weights), given(), 50)]
    assert theirs[-1] < 0.8 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_the_program(tmp_path):
    curve = tmp_path / "loss.png"
    small = ("--steps", 3, "--batch", 2, "--length", 16, "--width", 16, "--layers", 1, "--sample", 10)
    pytest.importorskip("matplotlib")
    done = run("train_tiny.py", *small, "--curve", curve)
    assert done.returncode == 0, done.stderr
    assert "bits per byte after 3 steps" in done.stdout and "The " in done.stdout and "3/3" in done.stderr
    assert curve.read_bytes().startswith(b"\x89PNG")
    assert run("train_tiny.py", "--width", 10).returncode == 2
