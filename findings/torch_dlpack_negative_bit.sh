#!/usr/bin/env bash
# torch 2.13.0: DLPack hands out a tensor that has the negative bit with the opposite sign.
#
# The imaginary part of a conjugate is a view: torch notes that it is to be negated, and the memory stays as it was. `.numpy()` and
# `__array__` refuse such a tensor and name the way out (`resolve_neg()`), as DLPack refuses one with the conjugate bit. With the
# negative bit it does not: numpy.from_dlpack and torch.from_dlpack, torch's own, both return the numbers before the negation.
# So what a library computes from such a tensor depends on which of the two protocols it asks first.
#
# Seen: the tensor is [-2, 4]; both arrays are [2, -4]; `.numpy()` and DLPack of the conjugate raise.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>"$folder/log" || { cat "$folder/log"; exit 1; }
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import torch

print(torch.__version__)
conjugate = torch.tensor([1 + 2j, 3 - 4j]).conj()
imaginary = conjugate.imag
print(imaginary, "negative bit:", imaginary.is_neg())
print("numpy.from_dlpack:", np.from_dlpack(imaginary), "torch.from_dlpack:", torch.from_dlpack(imaginary))
assert imaginary.is_neg() and imaginary.tolist() == [-2, 4]
assert np.from_dlpack(imaginary).tolist() == [2, -4], "the behaviour has changed"
assert torch.from_dlpack(imaginary).tolist() == [2, -4], "the behaviour has changed"
assert np.from_dlpack(imaginary.resolve_neg()).tolist() == [-2, 4]

for refused, ask in ((imaginary, torch.Tensor.numpy), (conjugate, np.from_dlpack)):
    try:
        ask(refused)
    except Exception as error:
        print(type(error).__name__, str(error).splitlines()[0])
    else:
        raise AssertionError("the behaviour has changed")
PY
