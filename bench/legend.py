"""What names of rows and columns mean, said under the table: only those that are in it."""

from __future__ import annotations

from .cases import SHORT, Case

COLUMNS = {
    "thr": "threads",
    "time": "median of a call",
    "spread": "interquartile range over it",
    "rate": "useful work per second",
    "% limit": "rate over what the CPU or its memory can do at most",
    "at least": "what the row is held to",
}
LABELS = {
    "decode": "new tokens against a longer cache",
    "sd": "an image model",
    "short": "many short sentences or sets",
    "cross": "few queries against a long text",
    "scaling": "the same work in sequences of several lengths",
    "scores": "Q Kᵀ alone",
    "values": "weights times V alone",
    "softmax": "the softmax alone",
    "train": "forward and backward",
    "linear": "x of q rows and d elements times weights of 4096 rows; +packed: these are packed before",
    "project": "queries, keys and values in one product",
    "rope": "rotary positions; +tables: with cosines and sines given",
    "received": "the weight that each key receives",
    "pooled": "the weights in 256 by 256 cells",
    "top_keys": "the five heaviest keys of each query",
    "entropy": "of each query's weights",
    "largest": "each query's largest score",
}


def of_names(cases: list[Case]) -> str:
    """The first name in words, and what the others' further parts say."""
    if not cases:
        return ""
    first = cases[0]
    shape = f"{first.batch}x{first.heads}x{first.q_len}-d{first.dim}"
    heads, queries = count(first.heads, "head", "heads"), count(first.q_len, "query", "queries")
    parts = [f"{shape}: batch {first.batch}, {heads}, {queries} and as many keys, head dimension {first.dim}"]
    for c in [c for c in cases if c.kv_len != c.q_len][:1]:
        parts.append(f"-k{c.kv_len}: {c.kv_len} keys")
    for c in [c for c in cases if c.kv_heads != c.heads][:1]:
        parts.append(f"-kv{c.kv_heads}: {count(c.kv_heads, 'head', 'heads')} of keys and values")
    if any(c.causal for c in cases):
        parts.append("-causal: no key after the query")
    if any(c.window for c in cases):
        parts.append("-window: how many keys before and after the query it sees")
    if any(c.kv_lengths for c in cases):
        parts.append("-ragged: sequences of several lengths")
    if any(c.layout == "blhd" for c in cases):
        parts.append("-blhd: heads after lengths")
    for dtype in dict.fromkeys(c.dtype for c in cases if c.dtype != "float32"):
        parts.append(f"-{SHORT[dtype]}: {dtype}, else float32")
    if any(c.kv_dtype for c in cases):
        parts.append("-kv_int8: stored keys and values of that type")
    if any(c.isa for c in cases):
        parts.append("@avx2: that CPU path")
    for label, meaning in LABELS.items():
        if any(c.name.startswith((f"{label}:", f"{label}+")) for c in cases):
            parts.append(f"{label}: {meaning}")
    if any("+lse:" in c.name for c in cases):
        parts.append("+lse: given what an earlier call of attention returned")
    return "names: " + "; ".join(parts)


def count(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"


def of_columns(columns: list[str]) -> str:
    """The columns that need a word."""
    return "columns: " + "; ".join(f"{name}: {COLUMNS[name]}" for name in columns if name in COLUMNS)
