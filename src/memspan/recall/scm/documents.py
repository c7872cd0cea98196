"""Summaries of texts of any length: chunk by chunk, then group by group, resumable after a kill."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from memspan.base import refuse
from memspan.base.files import fingerprint
from memspan.base.lines import records
from memspan.recall.chat import Chat
from memspan.recall.summarize import LLMSummarizer, Summarizer
from memspan.recall.text import TokenCounter, content_words, sentences, split, token_counter

__all__ = ["DocumentPlan", "DocumentSummary", "DoesNotShrink", "Node", "SummarizeLong", "group_target"]

Background = Literal["previous", "raw_tail", "none"]


class DoesNotShrink(RuntimeError):
    """Summaries of summaries stopped getting fewer: the model repeats what it is given."""


@dataclass(frozen=True)
class Node:
    """One text of the tree.

    Attributes:
        level: 0 is a chunk's summary.
        place: in its level.
        text: the summary.
        children: places in the level below; of level 0 the chunk's place.
    """

    level: int
    place: int
    text: str
    children: tuple[int, ...]


@dataclass(frozen=True)
class DocumentPlan:
    """What a run will cost at most: each summary taken as long as it may be."""

    chunks: int
    calls: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class DocumentSummary:
    """A finished summary with the tree that it came from.

    Attributes:
        text: the summary.
        chunks: of the document; joined they are the document.
        levels: nodes by level, chunks' summaries first.
        calls: summaries made in this run (others came from the checkpoint).
    """

    text: str
    chunks: tuple[str, ...]
    levels: tuple[tuple[Node, ...], ...]
    calls: int

    def sources(self, place: int, level: int | None = None) -> list[int]:
        """Chunks that a node stems from."""
        at = len(self.levels) - 1 if level is None else level
        places = [place]
        for nodes in reversed(self.levels[: at + 1]):
            places = [child for place in places for child in nodes[place].children]
        return places

    def verify(self, least: float = 0.5) -> list[tuple[str, float]]:
        """Sentences of whose content words fewer than ``least`` stand in the document, with the share."""
        known = content_words("".join(self.chunks))
        found = []
        for sentence in sentences(self.text):
            words = content_words(sentence)
            share = len(words & known) / len(words) if words else 1.0
            if share < least:
                found.append((sentence.strip(), share))
        return found


class SummarizeLong:
    """Divide-and-conquer summaries (section 3.4 of the paper).

    Args:
        model: a chat client, or any :class:`~memspan.recall.summarize.Summarizer` (the extractive one needs
            no model).
        chunk_tokens: of a chunk; cut at sentence ends.
        group_tokens: of the summaries that are joined in one call; a longer one stands alone.
        chunk_summary_tokens: of a chunk's summary (500 words).
        flash_tokens: the chunk before is background raw below this, else as its summary.
        background: ``"previous"`` (the paper), ``"raw_tail"`` (its last 300 tokens, so that chunks can run in
            parallel), or ``"none"``.
        counter: of tokens; None is cautious.

    Raises:
        BadInput: sizes below 50 tokens.

    Example:
        >>> from memspan.recall.summarize import ExtractiveSummarizer
        >>> text = " ".join(f"Fact {i} says that the number of the key is {i}." for i in range(40))
        >>> done = SummarizeLong(ExtractiveSummarizer(), 120, 120, chunk_summary_tokens=50).run(text)
        >>> "".join(done.chunks) == text, len(done.levels) > 1
        (True, True)
    """

    def __init__(
        self,
        model: Chat | Summarizer,
        chunk_tokens: int = 3000,
        group_tokens: int = 2300,
        chunk_summary_tokens: int = 670,
        flash_tokens: int = 500,
        background: Background = "previous",
        counter: TokenCounter | Callable[[str], int] | None = None,
    ) -> None:
        for name, value in (("chunk_tokens", chunk_tokens), ("group_tokens", group_tokens)):
            if value < 50:
                refuse(name, value, "at least 50")
        if background not in ("previous", "raw_tail", "none"):
            refuse("background", background, 'use "previous", "raw_tail" or "none"')
        self.counter = token_counter(counter)
        self.summarize: Summarizer = (
            LLMSummarizer(model, counter=counter) if isinstance(model, Chat) else model
        )
        self.chunk_tokens, self.group_tokens = chunk_tokens, group_tokens
        self.chunk_summary_tokens, self.flash_tokens, self.background = (
            chunk_summary_tokens,
            flash_tokens,
            background,
        )

    def plan(self, text: str) -> DocumentPlan:
        """Calls and tokens at most; nothing is done."""
        sizes = [self.counter(chunk) for chunk in split(text, self.chunk_tokens, self.counter)]
        calls, sent, made = len(sizes), sum(sizes) + max(0, len(sizes) - 1) * self.chunk_summary_tokens, 0
        level = [min(size, self.chunk_summary_tokens) for size in sizes]
        made += sum(level)
        while len(level) > 1:
            groups = _group_sizes(level, self.group_tokens)
            if len(groups) == len(level):
                break
            calls += len(groups)
            sent += sum(level)
            level = [min(size, group_target(size, self.group_tokens, len(groups) == 1)) for size in groups]
            made += sum(level)
        return DocumentPlan(len(sizes), calls, sent, made)

    def run(
        self,
        source: str | Path | IO[str] | IO[bytes],
        checkpoint: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> DocumentSummary:
        """Summarise a text, a path, or an open file.

        Args:
            source: a ``str`` is the text itself.
            checkpoint: file that keeps every finished node; None takes ``NAME.summary.jsonl`` beside a named
                file, and nothing for a text.
            progress: called with the calls done and planned.

        Raises:
            BadInput: not text (its first bad bytes are shown), or nothing but blanks.
            DoesNotShrink: a level is not smaller than the one below; names the chunks.
        """
        text, name = _read(source)
        if not text.strip():
            refuse("source", "nothing but blanks", "give a text")
        where = (
            Path(checkpoint)
            if checkpoint is not None
            else name and name.with_name(f"{name.name}.summary.jsonl")
        )
        done = _Finished(
            where, fingerprint({"text": fingerprint(text.encode()), "settings": self._settings()})
        )
        chunks = split(text, self.chunk_tokens, self.counter)
        planned = self.plan(text).calls
        level: list[Node] = []
        for place, chunk in enumerate(chunks):
            background = self._before(chunks, level, place)
            made = done.get(0, place) or done.keep(
                0,
                place,
                self.summarize(
                    [chunk], job="chunk", max_tokens=self.chunk_summary_tokens, background=background
                ),
            )
            level.append(Node(0, place, made, (place,)))
            if progress:
                progress(place + 1, planned)
        levels = [tuple(level)]
        while len(levels[-1]) > 1:
            groups = self._groups(levels[-1])
            depth = len(levels)
            if len(groups) >= len(levels[-1]):
                longest = max(levels[-1], key=lambda node: self.counter(node.text))
                raise DoesNotShrink(
                    f"level {depth - 1} has {len(levels[-1])} summaries that do not join within "
                    f"{self.group_tokens} tokens; the longest ({self.counter(longest.text)}) is of chunk "
                    f"{longest.place}: the model repeats its input, or group_tokens is too small"
                )
            nodes = []
            for place, members in enumerate(groups):
                texts = [levels[-1][i].text for i in members]
                size = sum(self.counter(text) for text in texts)
                target = group_target(size, self.group_tokens, len(groups) == 1)
                made = done.get(depth, place) or done.keep(
                    depth, place, self.summarize(texts, job="group", max_tokens=target)
                )
                nodes.append(Node(depth, place, made, tuple(members)))
            levels.append(tuple(nodes))
        return DocumentSummary(levels[-1][0].text, tuple(chunks), tuple(levels), done.calls)

    def _before(self, chunks: Sequence[str], level: Sequence[Node], place: int) -> str:
        if place == 0 or self.background == "none":
            return ""
        before = chunks[place - 1]
        if self.background == "raw_tail":
            tail: list[str] = []
            for part in reversed(sentences(before)):
                if self.counter("".join([part, *tail])) > 300:
                    break
                tail.insert(0, part)
            return "".join(tail)
        return before if self.counter(before) < self.flash_tokens else level[place - 1].text

    def _groups(self, nodes: Sequence[Node]) -> list[list[int]]:
        groups: list[list[int]] = []
        room = 0
        for node in nodes:
            size = self.counter(node.text)
            if groups and size <= room:
                groups[-1].append(node.place)
                room -= size
            else:
                groups.append([node.place])
                room = self.group_tokens - size
        return groups

    def _settings(self) -> dict[str, Any]:
        names = ("chunk_tokens", "group_tokens", "chunk_summary_tokens", "flash_tokens", "background")
        return {name: getattr(self, name) for name in names} | {"by": self.summarize.id}


def group_target(tokens: int, group_tokens: int = 2300, last: bool = False) -> int:
    """Longest summary of a group: ``min(4000 - max(tokens, 2300) - 400, 1000)``, at least 100.

    The last group of all may have 1,500. With smaller groups it is at most half of the group, so that levels
    shrink.

    Example:
        >>> group_target(2300), group_target(3550), group_target(2000, last=True)
        (1000, 100, 1500)
    """
    target = 1500 if last else max(100, min(4000 - max(tokens, 2300) - 400, 1000))
    return target if group_tokens >= 2300 else max(25, min(target, group_tokens // 2))


class _Finished:
    """Nodes on disk, one JSON line each, written through before the next call is made."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key, self.calls = path, key, 0
        self._known: dict[tuple[int, int], str] = {}
        if path is None or not path.exists():
            return
        for line in records(path.read_text(encoding="utf-8")):
            try:
                one = json.loads(line)
            except ValueError:  # the last line of a killed run
                continue
            if one.get("key") == key:
                self._known[(one["level"], one["place"])] = one["text"]

    def get(self, level: int, place: int) -> str | None:
        return self._known.get((level, place))

    def keep(self, level: int, place: int, text: str) -> str:
        self.calls += 1
        if self.path is not None:
            line = json.dumps(
                {"key": self.key, "level": level, "place": place, "text": text}, ensure_ascii=False
            )
            with self.path.open("a", encoding="utf-8") as file:
                if file.tell() and not _ends_line(self.path):
                    file.write("\n")
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())
        return text


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _group_sizes(sizes: Sequence[int], limit: int) -> list[int]:
    groups: list[int] = []
    for size in sizes:
        if groups and groups[-1] + size <= limit:
            groups[-1] += size
        else:
            groups.append(size)
    return groups


def _read(source: str | Path | IO[str] | IO[bytes]) -> tuple[str, Path | None]:
    if isinstance(source, str):
        return source, None
    name: Path | None = None
    if isinstance(source, Path):
        raw: bytes | str = source.read_bytes()
        name = source
    else:
        named = getattr(source, "name", None)
        name = Path(named) if isinstance(named, str) and not isinstance(source, io.StringIO) else None
        try:
            raw = source.read()
        except UnicodeDecodeError as error:
            refuse("source", error.object[error.start : error.end], "no UTF-8; open it with its encoding")
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            shown = raw[error.start : error.start + 4]
            refuse("source", shown, f"no UTF-8 at byte {error.start}; decode it with its encoding first")
    if "\x00" in raw:
        refuse("source", "a NUL character", "give text, not a binary file")
    return raw, name
