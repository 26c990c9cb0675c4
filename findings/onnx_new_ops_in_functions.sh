#!/usr/bin/env bash
# onnx 1.23.2: operators given to ReferenceEvaluator by new_ops= are not used inside model-local functions.
#
# `ReferenceEvaluator(model, new_ops=[MyOp])` runs MyOp for the nodes of the graph. The nodes of a model-local function, which
# exporters make of every module, go to evaluators that were built without new_ops: the same operator there is ONNX's own. No
# warning says that half of the graph ran on another implementation.
#
# Seen: the replaced Softmax (which gives 7) in the graph, ONNX's Softmax (which gives 1/3) in the function: 7.0 0.33333334
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q onnx==1.23.2 numpy==2.4.6 2>"$folder/log" || { cat "$folder/log"; exit 1; }
"$folder/venv/bin/python" - <<'PY'
import numpy as np
import onnx
from onnx import parser
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class Softmax(OpRun):
    op_domain = ""

    def _run(self, x, axis=-1):
        return (np.full_like(x, 7),)


model = parser.parse_model("""<ir_version: 10, opset_import: ["": 20, "local": 1]>
graph (float[1, 3] x) => (float[1, 3] y, float[1, 3] z) {
    y = Softmax(x)
    z = local.block(x)
}
<domain: "local", opset_import: ["": 20]>
block (a) => (b) { b = Softmax(a) }""")
y, z = ReferenceEvaluator(model, new_ops=[Softmax]).run(None, {"x": np.zeros((1, 3), np.float32)})
print(onnx.__version__, y[0, 0], z[0, 0])
assert y[0, 0] == 7 and abs(z[0, 0] - 1 / 3) < 1e-6, "the behaviour has changed"
PY
