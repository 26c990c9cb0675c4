"""A transformer that torch exported runs in ONNX's evaluator on our attention."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [test] leaves it out for its size; [torch] has it")
pytest.importorskip("onnxscript", reason="torch exports with it")

import torch
from onnx.reference import ReferenceEvaluator
from torch.nn import functional as F

from qkv_fast.integrations import onnx as adapter

WIDTH, HEADS, KV_HEADS, WORDS = 32, 4, 2, 50


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.o = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.k, self.v = (torch.nn.Linear(WIDTH, WIDTH // HEADS * KV_HEADS) for _ in range(2))
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, mask):
        y = self.norms[0](x)
        heads = ((self.q, HEADS), (self.k, KV_HEADS), (self.v, KV_HEADS))
        q, k, v = (f(y).unflatten(-1, (n, WIDTH // HEADS)).transpose(1, 2) for f, n in heads)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(torch.nn.Module):
    """The first layer is causal, the second sees what a mask of numbers leaves."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.scores = torch.nn.Linear(WIDTH, WORDS)

    def forward(self, ids, bias):
        x = self.words(ids)
        for block, mask in zip(self.blocks, (None, bias), strict=True):
            x = block(x, mask)
        return self.scores(x)


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_runs_on_ours(monkeypatch):
    """With lengths that it was not exported with; ONNX's own operator gives the same."""
    torch.manual_seed(0)
    model = Transformer().eval()

    def inputs(batch, length):
        ids = torch.randint(0, WORDS, (batch, length))
        hidden = torch.ones(length, length).triu(1) > 0
        return ids, torch.randn(batch, 1, length, length).masked_fill(hidden, -torch.inf)

    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    sizes = {0: batch, 1: length}, {0: batch, 2: length, 3: length}
    program = torch.onnx.export(model, inputs(2, 9), opset_version=23, dynamic_shapes=sizes, verbose=False)
    proto = program.model_proto
    assert [node.op_type for node in proto.graph.node].count("Attention") == 2
    calls = []
    attention = adapter.attention
    monkeypatch.setattr(adapter, "attention", lambda *x, **options: calls.append(options) or attention(*x, **options))
    given = inputs(3, 7)
    feeds = dict(zip((x.name for x in proto.graph.input), (x.numpy() for x in given), strict=True))
    (ours,) = adapter.Evaluator(proto).run(None, feeds)
    assert len(calls) == 2
    with torch.no_grad():
        np.testing.assert_allclose(ours, model(*given).numpy(), rtol=1e-4, atol=1e-5)
    (theirs,) = ReferenceEvaluator(proto).run(None, feeds)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
