"""Records a line: JSON lines, events of a stream, exports.

``str.splitlines`` and the line iterators of HTTP clients also cut at U+2028, U+0085, form feeds and six other
characters, all of which may stand unescaped inside a JSON string: a record is cut in two and its text lost.
Here a line ends at a line feed, with or without a carriage return before it, and nowhere else.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

__all__ = ["records"]


def records(source: str | bytes | Iterable[bytes]) -> Iterator[str]:
    r"""The lines of a text, or of a stream of UTF-8 as it comes in; blank lines are left out.

    Args:
        source: a whole text, or pieces of bytes cut anywhere, also inside a character.

    Raises:
        UnicodeDecodeError: bytes that are not UTF-8.

    Example:
        >>> list(records('{"a": "one\u2028two"}\r\n\n{"b": 1}\n'))
        ['{"a": "one\u2028two"}', '{"b": 1}']
        >>> list(records([b'{"a": "\xc3', b'\xa9"}\n{"b"', b': 1}']))
        ['{"a": "é"}', '{"b": 1}']
    """
    if isinstance(source, str):
        yield from filter(None, map(_ended, source.split("\n")))
        return
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest = ""
    for piece in [source] if isinstance(source, bytes) else source:
        *whole, rest = (rest + decoder.decode(piece)).split("\n")
        yield from filter(None, map(_ended, whole))
    if last := _ended(rest + decoder.decode(b"", final=True)):
        yield last


def _ended(line: str) -> str:
    line = line.removesuffix("\r")
    return "" if line.isspace() else line
