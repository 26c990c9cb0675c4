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
    "cross": "few queries against a long text",
    "scaling": "the same work in sequences of several lengths",
    "scores": "Q Kᵀ alone",
    "values": "weights times V alone",
    "softmax": "the softmax alone",
}


def of_names(cases: list[Case]) -> str:
    """The first name in words, and what the others' further parts say."""
    if not cases:
        return ""
    first = min(cases, key=lambda c: len(c.name))
    shape = f"{first.batch}x{first.heads}x{first.q_len}-d{first.dim}"
    parts = [
        f"{shape}: batch {first.batch}, {first.heads} heads, {first.q_len} queries each, head dimension {first.dim}"
    ]
    names = [c.name for c in cases]
    if any(c.kv_len == c.q_len and "-k" not in c.name for c in cases):
        parts.append("as many keys as queries unless -k says")
    if any(c.kv_len != c.q_len for c in cases):
        parts.append("-k4096: 4096 keys")
    if any(c.kv_heads != c.heads for c in cases):
        parts.append("-kv8: 8 heads of keys and values")
    if any(c.causal for c in cases):
        parts.append("-causal: no key after the query")
    if any(c.window for c in cases):
        parts.append("-window255_0: keys that far before and after it")
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
        if any(name.startswith(f"{label}:") for name in names):
            parts.append(f"{label}: {meaning}")
    return "names: " + "; ".join(parts)


def of_columns(columns: list[str]) -> str:
    """The columns that need a word."""
    return "columns: " + "; ".join(f"{name}: {COLUMNS[name]}" for name in columns if name in COLUMNS)
