"""How far a long pass over a corpus is: a bar on a terminal, plain lines elsewhere, with the time left."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10


class Progress:
    """Counts bytes, documents and tokens.

    Args:
        fraction: what an earlier, interrupted pass has done; the time left is reckoned from this one's speed.
    """

    def __init__(self, fraction: float | None, documents: int, tokens: int, text_bytes: int):
        self.begun = fraction or 0.0
        self.fraction, self.documents, self.tokens, self.bytes = fraction, documents, tokens, text_bytes
        self.bytes_before, self.started, self.told = text_bytes, time.time(), time.time()
        self.bar = None
        if sys.stderr.isatty():
            # The bar runs over the fraction, as the corpus's length in tokens shows only at its end.
            self.bar = tqdm(
                total=1.0,
                initial=self.begun,
                dynamic_ncols=True,
                bar_format="tokenize {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            )

    def add(self, fraction: float | None, documents: int, tokens: int, text_bytes: int) -> None:
        """Another so many are done, and with them `fraction` of the corpus, where that is known."""
        self.fraction = fraction
        self.documents, self.tokens = self.documents + documents, self.tokens + tokens
        self.bytes += text_bytes
        if self.bar is not None:
            self.bar.set_postfix_str(self.counts(), refresh=False)
            self.bar.update((fraction or 0.0) - self.bar.n)
        elif time.time() - self.told >= LINE_SECONDS:
            self.told = time.time()
            print(f"tokenize: {self.counts()}{self.left()}", flush=True)

    def counts(self) -> str:
        speed = (self.bytes - self.bytes_before) / max(1e-3, time.time() - self.started) / 1e6
        return f"{self.bytes / 1e6:,.1f} MB, {self.documents:,} documents, {self.tokens / 1e6:,.2f} M tokens, {speed:.1f} MB/s"

    def left(self) -> str:
        if not self.fraction or self.fraction <= self.begun:
            return ""
        seconds = (time.time() - self.started) * (1 - self.fraction) / (self.fraction - self.begun)
        return f", {self.fraction:.0%}, {seconds // 60:.0f}m{seconds % 60:02.0f}s left"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
