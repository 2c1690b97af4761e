"""Tokenizers: train one with sentencepiece, load a sentencepiece model or a transformers tokenizer, export.

Both kinds are used through the few things that the rest needs: encode, decode, size, end-of-text id, fingerprint.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece as spm

from celo2_pretrain.common.errors import UserError, one_line, shown
from celo2_pretrain.common.json_file import read_json

SENTENCE_CHARS = 1000  # sentencepiece skips sentences above 4,192 bytes; 1,000 characters are always below


class SentencePieceTokenizer:
    """A sentencepiece model with byte fallback: every text can be encoded, and decodes to itself."""

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        self.model = model
        self.processor = spm.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self.processor.vocab_size()
        if self.vocab_size < 2:
            raise UserError("the sentencepiece model is empty: train it again")
        self.eos_id, self.unk_id = self.processor.eos_id(), self.processor.unk_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if self.eos_id < 0:
            raise UserError("the sentencepiece model has no end-of-text piece (eos_id): train it with one")

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=1)  # `prepare` has one process a core

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def byte_ids(self) -> list[int]:
        """The ids that stand for single bytes of characters without a piece."""
        return [i for i in range(self.vocab_size) if self.processor.is_byte(i)]

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self.model)

    def save_for_transformers(self, folder: Path, context: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` that give the same ids in transformers."""
        from tokenizers import Tokenizer, decoders, normalizers
        from tokenizers.models import Unigram
        from transformers import PreTrainedTokenizerFast

        sp = self.processor
        pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.vocab_size())]
        fast = Tokenizer(Unigram(pieces, unk_id=sp.unk_id(), byte_fallback=True))
        fast.normalizer = normalizers.Replace(" ", "▁")
        fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        PreTrainedTokenizerFast(
            tokenizer_object=fast,
            unk_token=sp.id_to_piece(sp.unk_id()),
            eos_token=sp.id_to_piece(self.eos_id),
            model_max_length=context,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)


class TransformersTokenizer:
    """A tokenizer of transformers, from a folder or a hub name."""

    kind = "transformers"

    def __init__(self, name: str):
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # the hub, the network, or a folder without a tokenizer
            raise UserError(f"cannot load tokenizer {shown(name)}: {one_line(error)}") from None
        self.vocab_size = len(self.tokenizer)
        self.eos_id, self.unk_id = self.tokenizer.eos_token_id, self.tokenizer.unk_token_id
        if self.eos_id is None:
            raise UserError(f"tokenizer {name!r} has no end-of-text token: choose one that has")
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        self.fingerprint = hashlib.sha256(repr(vocabulary).encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def byte_ids(self) -> list[int]:
        return []  # byte-level vocabularies spell every text out of bytes; there is no fallback to count

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def save_for_transformers(self, folder: Path, context: int) -> None:
        self.tokenizer.save_pretrained(folder)


def load_tokenizer(where: str | Path) -> SentencePieceTokenizer | TransformersTokenizer:
    """A sentencepiece `.model` file, a folder of prepared data, or a transformers tokenizer's folder or hub name."""
    path = Path(where)
    try:
        path.exists()
    except OSError as error:
        raise UserError(f"tokenizer {shown(str(where))} can't be read: {error.strerror}") from None
    if path.is_dir() and (path / "tokenizer.model").is_file() and not (path / "tokenizer_config.json").exists():
        path = path / "tokenizer.model"
    elif path.is_dir() and (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if path.suffix == ".model":
        if not path.is_file():
            raise UserError(f"tokenizer {str(where)!r} does not exist: give a .model file, a folder or a hub name")
        try:
            tokenizer = SentencePieceTokenizer(path.read_bytes())
        except (RuntimeError, ValueError, OSError):  # ValueError: its message quotes bytes that are no text
            raise UserError(f"{path} is not a sentencepiece model") from None
        check_fingerprint(path, tokenizer.fingerprint)
        return tokenizer
    return TransformersTokenizer(str(path))


def check_fingerprint(model: Path, fingerprint: str) -> None:
    """Raises UserError when `model` lies in a folder of prepared data whose tokens were made with another."""
    index = model.with_name("index.json")
    if index.is_file():
        told = read_json(index, "prepare the data again").get("tokenizer")
        if not isinstance(told, dict) or told.get("sha256") != fingerprint:
            raise UserError(
                f"{model} is not the tokenizer that the tokens beside it were made with: copy it again, or "
                "prepare the data again"
            )


def sentences(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Up to `max_bytes` of text in chunks that sentencepiece trains on."""
    total = 0
    for text in texts:
        for line in text.replace("\0", "").splitlines(keepends=True):
            for start in range(0, len(line), SENTENCE_CHARS):
                chunk = line[start : start + SENTENCE_CHARS]
                total += len(chunk.encode())
                yield chunk
        if total >= max_bytes:
            return


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_bytes: int = 4_000_000) -> SentencePieceTokenizer:
    """Train a unigram model with byte fallback on the first `max_bytes` of `texts`; the same texts give the same model.

    Raises UserError when the text cannot support `vocab_size` pieces (256 of them are bytes).
    """
    if vocab_size < 300:
        raise UserError(f"vocabulary of {vocab_size} is too small: 256 pieces are bytes; ask for 300 or more")
    chunks = list(sentences(texts, max_bytes))  # whole, since sentencepiece would hide what reading them raises
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece="<|endoftext|>",
            num_threads=2,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        largest = re.search(r"value <= (\d+)", str(error))
        smallest = re.search(r"smaller than required_chars. (\d+) vs (\d+)", str(error))
        if largest:
            advice = f"the text supports at most {largest[1]}; lower --vocab-size or give more text"
        elif smallest:
            advice = f"the text needs at least {smallest[2]}; raise --vocab-size"
        else:
            advice = "give more text, or another --vocab-size"
        raise UserError(f"cannot train a vocabulary of {vocab_size} pieces: {advice}") from None
    return SentencePieceTokenizer(model.getvalue())
