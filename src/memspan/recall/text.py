"""Cutting and counting text: chunks that join to the input, and counts that never promise too little.

A budget of tokens holds only if the counter does not undercount. Where the model's tokenizer is at hand it
counts; where it is not, :class:`CautiousCounter` counts characters by script so that it stays at or above
what the usual byte-pair tokenizers give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

from memspan.base import optional, refuse

__all__ = [
    "CUT",
    "CautiousCounter",
    "HFCounter",
    "TiktokenCounter",
    "TokenCounter",
    "content_words",
    "is_chinese",
    "sentences",
    "shorten",
    "split",
    "token_counter",
]

#: The mark at the end of a text that was shortened.
CUT = " [cut]"

# After a full stop, question or exclamation mark (and closing quotes) with a blank behind it; after a
# Chinese or Japanese one at once; after a line break.
_END = re.compile(r"""(?:[.!?]+["'”’)\]]*(?=\s)\s*|[。！？；]+[”’」』）]*\s*|\r?\n\s*|\r\s*)""")
_WORD = re.compile(r"\S+\s*|\s+")
_PIECES = re.compile(r"[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]|\s+")
# No word of a language: keys, hashes, encoded bytes; these cost up to a token a letter.
_GIBBERISH = re.compile(r"[^aeiouyAEIOUY]{6}|[a-z][A-Z]+[a-z]+[A-Z]|.{24}")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


@runtime_checkable
class TokenCounter(Protocol):
    """Text -> how many tokens it costs."""

    def __call__(self, text: str) -> int:
        """Count."""
        ...


class CautiousCounter:
    """Tokens of a text without its tokenizer, on the safe side.

    A third of a letter run (the whole where it is no word), 1 a digit or ASCII sign, and by UTF-8 length
    beyond ASCII: 1 for two bytes, 2 for three (Chinese), 4 for four (emoji). The usual byte-pair vocabularies
    stay below on English, Chinese, code and emoji; it overcounts English prose by about half.

    Example:
        >>> CautiousCounter()("I went to the park.")
        8
    """

    def __call__(self, text: str) -> int:
        """Count."""
        total = 0
        for piece in _PIECES.findall(text):
            if piece.isascii():
                if piece.isalpha():
                    total += -(-len(piece) // (1 if _GIBBERISH.search(piece) else 3))
                elif piece.isspace():  # the blank before a word belongs to the word
                    total += 0 if piece == " " else -(-len(piece) // 2)
                else:
                    total += 1
            else:
                total += sum((0, 1, 1, 2, 4)[len(sign.encode("utf-8", "replace"))] for sign in piece)
        return total


class TiktokenCounter:
    """Counts with a tiktoken encoding (which tiktoken downloads once).

    Args:
        encoding: such as ``"o200k_base"`` or ``"cl100k_base"``.
    """

    def __init__(self, encoding: str = "o200k_base") -> None:
        self._encoding = optional("tiktoken", extra="recall").get_encoding(encoding)

    def __call__(self, text: str) -> int:
        """Count; special tokens in the text are counted as the plain text they are."""
        return len(self._encoding.encode(text, disallowed_special=()))


class HFCounter:
    """Counts with a Hugging Face tokenizer (anything whose ``encode`` gives a list of ids).

    Args:
        tokenizer: from transformers.
    """

    def __init__(self, tokenizer: object) -> None:
        if not hasattr(tokenizer, "encode"):
            refuse("tokenizer", tokenizer, "give a tokenizer with encode(text) -> ids")
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> int:
        """Count, without the marks of beginning and end."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))


def token_counter(how: TokenCounter | Callable[[str], int] | str | None = None) -> Callable[[str], int]:
    """A counter from what a user gives: None (cautious), a tiktoken encoding's name, or any function.

    Example:
        >>> token_counter(len)("abc"), token_counter()("abc")
        (3, 1)
    """
    if how is None:
        return CautiousCounter()
    if isinstance(how, str):
        return TiktokenCounter(how)
    if not callable(how):
        refuse(
            "counter", how, "give a function from text to a number of tokens, a tiktoken encoding, or None"
        )
    return how


def sentences(text: str) -> list[str]:
    """Sentences with the blanks behind them; joined they are the text, byte for byte.

    Example:
        >>> sentences("One. Two?  Three")
        ['One. ', 'Two?  ', 'Three']
        >>> sentences("他来了。她没来。")
        ['他来了。', '她没来。']
    """
    ends = [0, *(match.end() for match in _END.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(ends) if b > a]


def split(
    text: str, max_tokens: int, counter: TokenCounter | Callable[[str], int] | None = None
) -> list[str]:
    """Cut at sentence ends, greedily, into chunks of at most ``max_tokens``.

    A sentence longer than that is cut at words, and a word longer than that between letters.

    Args:
        text: any text; an empty one gives no chunk.
        max_tokens: of a chunk.
        counter: None is cautious.

    Returns:
        Chunks whose concatenation equals ``text`` exactly.

    Raises:
        BadInput: ``max_tokens`` below 1.

    Example:
        >>> parts = split("First one. Second one. A third.", 5)
        >>> parts, "".join(parts)
        (['First one. ', 'Second one. ', 'A third.'], 'First one. Second one. A third.')
    """
    if max_tokens < 1:
        refuse("max_tokens", max_tokens, "at least 1")
    count = token_counter(counter)
    chunks: list[str] = []
    for part in _greedy(sentences(text), max_tokens, count):
        if count(part) <= max_tokens:
            chunks.append(part)
            continue
        for words in _greedy(_WORD.findall(part), max_tokens, count):
            if count(words) <= max_tokens:
                chunks.append(words)
            else:
                chunks.extend(_greedy(list(words), max_tokens, count))
    return chunks


def shorten(
    text: str, max_tokens: int, counter: TokenCounter | Callable[[str], int] | None = None, mark: str = CUT
) -> str:
    """The text if it fits, else as many of its sentences (or words) as fit, with a mark behind.

    Gives ``""`` where not even the mark fits.

    Example:
        >>> shorten("First one. Second one. A third.", 8)
        'First one. [cut]'
    """
    count = token_counter(counter)
    if count(text) <= max_tokens:
        return text
    for pieces in (sentences(text), _WORD.findall(text), list(text)):
        low, high = 0, len(pieces)
        while low < high:  # the longest prefix that fits
            middle = (low + high + 1) // 2
            fits = count("".join(pieces[:middle]).rstrip() + mark) <= max_tokens
            low, high = (middle, high) if fits else (low, middle - 1)
        while (
            low and count("".join(pieces[:low]).rstrip() + mark) > max_tokens
        ):  # counters need not be monotone
            low -= 1
        if low:
            return "".join(pieces[:low]).rstrip() + mark
    return mark.strip() if count(mark.strip()) <= max_tokens else ""


def content_words(text: str) -> set[str]:
    """Words that carry content: lower-cased, without stop words; Chinese and Japanese as pairs of signs.

    Example:
        >>> sorted(content_words("Which park did I go to?"))
        ['go', 'park']
    """
    from memspan.recall.rank import STOP_WORDS

    plain = text.lower().replace("’", "'")
    found = {
        word
        for word in re.findall(r"[^\W_]+", _CJK.sub(" ", plain))
        if word not in STOP_WORDS and word != "t"
    }
    for run in re.findall(f"{_CJK.pattern}+", plain):
        found.update(a + b for a, b in pairwise(run))
        if len(run) == 1:
            found.add(run)
    return found


def is_chinese(text: str) -> bool:
    """Whether most letters are Chinese or Japanese signs.

    Example:
        >>> is_chinese("你好 world"), is_chinese("你好吗")
        (False, True)
    """
    signs = len(_CJK.findall(text))
    return signs > 0 and 2 * signs >= sum(letter.isalpha() for letter in text)


def _greedy(pieces: Sequence[str], limit: int, count: Callable[[str], int]) -> list[str]:
    """Join pieces while they fit; one that does not fit alone stands alone. Near linear in the text."""
    groups: list[str] = []
    start = 0
    while start < len(pieces):
        end, room, total = start + 1, limit, count(pieces[start])
        # Counts of parts bound the whole closely; the whole is counted before it is accepted.
        while end < len(pieces) and total + (more := count(pieces[end])) <= room:
            total, end = total + more, end + 1
        while end - start > 1 and count("".join(pieces[start:end])) > limit:
            end -= 1
        groups.append("".join(pieces[start:end]))
        start = end
    return groups
