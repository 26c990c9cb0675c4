#!/usr/bin/env bash
# torch 2.13.0: the causal biases of torch.nn.attention.bias are tensors whose shape and memory are not those of a bias.
#
# `causal_upper_left(3, 6)` and `causal_lower_right(3, 6)` stand for a (3, 6) mask, and scaled_dot_product_attention reads them
# by their meaning. As tensors they have the shapes (1, 3, 6) and (2, 3, 6): the number of the variant is taken for the size of
# an axis. Their elements were never written; the mask is made only by `_materialize()`, and it is boolean where the tensor
# says float32. So code that takes any tensor as a mask (adds it, broadcasts it, converts it by NumPy) works on
# what happens to lie in memory, and no error says so: with 2 heads a lower-right one even broadcasts.
#
# Seen: (1, 3, 6) torch.float32, (2, 3, 6) torch.float32, and masks of (3, 6) torch.bool.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>"$folder/log" || { cat "$folder/log"; exit 1; }
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

print(torch.__version__)
biases = causal_upper_left(3, 6), causal_lower_right(3, 6)
found = [(tuple(b.shape), b.dtype, tuple(b._materialize().shape), b._materialize().dtype) for b in biases]
print(*found, sep="\n")
assert found == [
    ((1, 3, 6), torch.float32, (3, 6), torch.bool),
    ((2, 3, 6), torch.float32, (3, 6), torch.bool),
], "the behaviour has changed"

# Its meaning is right where torch itself takes it: a row of the lower-right one sees its key, the last row all.
q, k, v = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 6, 4), torch.arange(6.0).reshape(1, 1, 6, 1).expand(1, 2, 6, 4)
out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=biases[1])
print(out[0, 0, :, 0])
assert torch.allclose(out[0, 0, :, 0], torch.tensor([1.5, 2.0, 2.5]))
PY
