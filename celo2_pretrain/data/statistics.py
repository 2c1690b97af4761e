"""What a corpus looks like in tokens: how long its documents are, and how well the vocabulary fits it."""

import numpy as np

# Document lengths fall into bins: exact up to 100 tokens, then 1 % wide, so that a corpus of any size needs a few KB.
EDGES = np.unique(np.concatenate([np.arange(101), np.geomspace(100, 1e10, 1852).astype(np.int64)]))
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Statistics:
    """Counts, document by document. state() goes through JSON and begins another one at the same place."""

    def __init__(self, vocab_size: int, state: dict | None = None):
        self.ids = np.array(state["ids"], np.int64) if state else np.zeros(vocab_size, np.int64)
        self.lengths = np.array(state["lengths"], np.int64) if state else np.zeros(len(EDGES), np.int64)
        self.bytes = state["bytes"] if state else 0
        self.extremes = state["extremes"] if state else [2**62, 0]  # the shortest and the longest document, tokens

    def add(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Count documents: their ids (tokens,), their lengths (documents,) in tokens, their bytes of UTF-8 in all."""
        self.ids += np.bincount(ids, minlength=len(self.ids))
        self.lengths += np.bincount(np.searchsorted(EDGES, lengths, "right") - 1, minlength=len(EDGES))
        self.bytes += text_bytes
        self.extremes = [min(self.extremes[0], int(lengths.min())), max(self.extremes[1], int(lengths.max()))]

    def state(self) -> dict:
        return {"ids": self.ids.tolist(), "lengths": self.lengths.tolist(), "bytes": self.bytes, "extremes": self.extremes}

    def quantile(self, q: float) -> int:
        """The length that a fraction `q` of the documents doesn't exceed: exact up to 100 tokens, then to 1 %."""
        index = np.searchsorted(np.cumsum(self.lengths), q * self.lengths.sum())
        return min(max(int(EDGES[index]), self.extremes[0]), self.extremes[1])

    def summary(self, unk_id: int | None, byte_ids: list[int]) -> dict:
        """For index.json. Rates are fractions of all tokens; coverage is the fraction of the vocabulary that occurs."""
        tokens = int(self.ids.sum())
        return {
            "documents": int(self.lengths.sum()),
            "tokens": tokens,
            "bytes": self.bytes,
            "bytes_per_token": round(self.bytes / tokens, 4),
            "vocabulary_coverage": round(float((self.ids > 0).mean()), 6),
            "unknown_rate": 0.0 if unk_id is None else float(self.ids[unk_id] / tokens),
            "byte_fallback_rate": float(self.ids[byte_ids].sum() / tokens),
            "tokens_per_document": {
                "least": self.extremes[0],
                **{f"{q:.0%}": self.quantile(q) for q in QUANTILES},
                "most": self.extremes[1],
            },
        }


def describe(index: dict, out: str) -> str:
    """A few lines for people about a folder of prepared data, from its index.json."""
    kind, all_of = index["tokenizer"]["kind"], index["statistics"]
    lines = [f"{out}: vocabulary {index['vocab_size']:,} ({kind}), {index['dtype']}, from {index['source']}"]
    for split, part in index["splits"].items():
        lines.append(
            f"  {split:5}  {part['documents']:>9,} documents  {part['bytes'] / 1e6:>9,.1f} MB"
            f"  {part['tokens']:>13,} tokens  {part['bytes'] / part['tokens']:.2f} bytes a token"
            f"  {len(part['shards'])} file(s)"
        )
    lines.append(
        f"  {all_of['vocabulary_coverage']:.1%} of the vocabulary occurs; {all_of['unknown_rate']:.3%} of the "
        f"tokens are unknown, {all_of['byte_fallback_rate']:.3%} single bytes of characters without a piece"
    )
    lengths = ", ".join(f"{name} {value:,}" for name, value in all_of["tokens_per_document"].items())
    lines.append(f"  tokens a document: {lengths}")
    return "\n".join(lines)
