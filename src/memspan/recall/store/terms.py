"""Texts as index terms, the same for every backend.

The terms are made by SQLite's own FTS5 (``porter unicode61``: lower case, accents off, English stems) in a
table in memory, so that no tokenizer is written here and both backends index exactly the same words. Scripts
without blanks between words (Chinese, Japanese, Korean) become single characters and pairs of neighbours, as
in Lucene's CJK analyzer: a word of two characters is found, which three-character windows cannot do.
"""

from __future__ import annotations

import re
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise

from memspan.recall.rank import STOP_WORDS, query_words

__all__ = ["index_terms", "query_terms"]

_DENSE = re.compile(
    "[\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f]+"
)
_LONGEST = 100  # characters of a term; longer ones are data (keys, base64), found by their beginning
_MOST = 20_000  # different terms of a text that are indexed, the most frequent first
_REMEMBERED = 100_000  # chunks whose terms are kept in memory
_CHUNK = re.compile(r"[^\x00-/:-@\[-`{-\x7f]+")


class _Tokenizer:
    """FTS5's tokenizer, asked once for each different chunk between blanks and ASCII punctuation."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, ...]] = {}
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._db.execute(
            "CREATE VIRTUAL TABLE texts"
            " USING fts5(text, content='', columnsize=0, tokenize='porter unicode61')"
        )
        self._db.execute("CREATE VIRTUAL TABLE terms USING fts5vocab(texts, instance)")

    def __call__(self, texts: Sequence[str]) -> list[Counter[str]]:
        chunked = [_CHUNK.findall(text) for text in texts]
        known = self._known
        if len(known) > _REMEMBERED:
            known.clear()
        new = sorted({chunk for chunks in chunked for chunk in chunks if chunk not in known})
        if new:
            self._learn(new)
        return [Counter(term for chunk in chunks for term in known[chunk]) for chunks in chunked]

    def _learn(self, chunks: Sequence[str]) -> None:
        found: list[list[str]] = [[] for _ in chunks]
        self._db.execute("BEGIN")
        try:
            self._db.executemany("INSERT INTO texts(rowid, text) VALUES (?, ?)", enumerate(chunks))
            for doc, term in self._db.execute("SELECT doc, term FROM terms"):
                found[doc].append(sys.intern(term[:_LONGEST]))
        finally:
            self._db.execute("ROLLBACK")
        self._known.update(zip(chunks, map(tuple, found), strict=True))


_tokenizer = threading.local()


def index_terms(texts: Sequence[str]) -> list[Counter[str]]:
    """The terms of each text with how often they occur.

    Example:
        >>> sorted(index_terms(["Two owls, an OWL"])[0].items()), sorted(index_terms(["樱花"])[0])
        ([('an', 1), ('owl', 2), ('two', 1)], ['樱', '樱花', '花'])
    """
    found = _words([_DENSE.sub(" ", text) for text in texts])
    for count, text in zip(found, texts, strict=True):
        for run in _DENSE.findall(text):
            count.update(run)
            count.update(a + b for a, b in pairwise(run))
    return [count if len(count) <= _MOST else _commonest(count) for count in found]


def query_terms(text: str, stop_words: Collection[str] = STOP_WORDS) -> Counter[str]:
    """The terms of a query; a term counts once for each different word that has it as its stem.

    Example:
        >>> sorted(query_terms("Which park, or parks, did I visit?").items())
        [('park', 2), ('visit', 1)]
    """
    dense: Counter[str] = Counter()
    for run in _DENSE.findall(text):
        for term in map("".join, pairwise(run)) if len(run) > 1 else run:
            dense[term] = 1
    words = query_words(_DENSE.sub(" ", text), ())
    kept = [word for word in words if word not in stop_words]
    if not kept and not dense:
        kept = words
    for count in _words(kept):
        dense.update(count.keys())
    return dense


def _commonest(count: Counter[str]) -> Counter[str]:
    return Counter(dict(sorted(count.items(), key=lambda item: (-item[1], item[0]))[:_MOST]))


def _words(texts: Sequence[str]) -> list[Counter[str]]:
    if not hasattr(_tokenizer, "own"):
        _tokenizer.own = _Tokenizer()
    own: _Tokenizer = _tokenizer.own
    return own(texts)
