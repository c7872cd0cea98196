"""Texts as token numbers: a byte-pair vocabulary trained on the text at hand, or one number a character.

Small language models train their own vocabulary. Both are thin faces over the library ``tokenizers``: nothing
of it is written anew, and both give the plain object (``.tokenizer``) for what they do not offer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import optional, refuse

__all__ = ["BPETokenizer", "CharTokenizer", "train_bpe"]


class _Tokenizer:
    """Text to token numbers and back, over one object of the library ``tokenizers``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return int(self.tokenizer.get_vocab_size())

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token numbers (n,) int64 of a text."""
        return np.asarray(self.tokenizer.encode(text).ids, dtype=np.int64)

    def decode(self, tokens: Sequence[int] | NDArray[np.int64]) -> str:
        """The text of token numbers."""
        return str(self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False))

    def to_json(self) -> str:
        """The whole vocabulary as JSON text, for a file's header; see :meth:`from_json`."""
        return str(self.tokenizer.to_str())

    @classmethod
    def from_json(cls, text: str) -> Any:
        """A tokenizer from what :meth:`to_json` gave.

        Raises:
            BadInput: the text is no vocabulary.
        """
        library = optional("tokenizers", extra="tuning")
        made = cls.__new__(cls)
        try:
            made.tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            refuse("text", text, f"give the JSON that to_json made ({error})")
        return made


class BPETokenizer(_Tokenizer):
    """Byte-level byte-pair encoding: any text is encoded and comes back exactly. From :func:`train_bpe`."""


class CharTokenizer(_Tokenizer):
    """One number a character, in order of code point; characters not seen before take the number 0.

    Args:
        text: what the characters are taken from.

    Raises:
        BadInput: the text is empty.
        ImportError: the library ``tokenizers`` is not installed; the message names the extra.

    Example:
        >>> letters = CharTokenizer("hello")
        >>> len(letters), letters.encode("hole").tolist(), letters.decode(letters.encode("hole"))
        (5, [2, 4, 3, 1], 'hole')
    """

    unknown = "\N{REPLACEMENT CHARACTER}"

    def __init__(self, text: str) -> None:
        if not text:
            refuse("text", text, "give a text with at least one character")
        library = optional("tokenizers", extra="tuning")
        known = [self.unknown, *sorted(set(text) - {self.unknown})]
        model = library.models.WordLevel({c: i for i, c in enumerate(known)}, unk_token=self.unknown)
        tokenizer = library.Tokenizer(model)
        # In this dialect m lets the dot match line breaks too.
        tokenizer.pre_tokenizer = library.pre_tokenizers.Split(library.Regex("(?m:.)"), "isolated")
        tokenizer.decoder = library.decoders.Fuse()
        super().__init__(tokenizer)


def train_bpe(texts: str | Iterable[str], size: int = 2048) -> BPETokenizer:
    """Train a byte-level byte-pair vocabulary (Sennrich et al. 2016; bytes as in GPT-2).

    The same texts and size give the same vocabulary. No special token is added and no space is put in front.

    Args:
        texts: one text or several; long ones are cut at line breaks for the count.
        size: tokens, at least 256 (every byte has one). A short text may fill fewer.

    Raises:
        BadInput: size below 256, or no text.
        ImportError: the library ``tokenizers`` is not installed; the message names the extra.

    Example:
        >>> words = train_bpe("low lower lowest " * 20, size=260)
        >>> len(words), words.decode(words.encode("lowest £")), len(words.encode("low"))
        (260, 'lowest £', 1)
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 256:
        refuse("size", size, "give 256 or more: each of the 256 bytes is a token")
    library = optional("tokenizers", extra="tuning")
    whole = [texts] if isinstance(texts, str) else list(texts)
    if not any(whole):
        refuse("texts", whole, "give at least one text that is not empty")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    pieces = (line for text in whole for line in text.splitlines(keepends=True))
    tokenizer.train_from_iterator(pieces, trainer)
    return BPETokenizer(tokenizer)
