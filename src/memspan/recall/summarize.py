"""Summaries by a language model, or by picking sentences where there is none.

Both have one face, so that every policy also runs, and is measured, without a model. What is summarised
enters prompts as data (JSON strings), never as bare text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from memspan.base import refuse
from memspan.data.embed import Embedder, HashingEmbedder
from memspan.recall.chat import BadReply, Chat, Language, language_of, load_prompt
from memspan.recall.pack import as_data
from memspan.recall.rank import mmr
from memspan.recall.text import TokenCounter, is_chinese, sentences, shorten, token_counter

__all__ = ["ExtractiveSummarizer", "Job", "LLMSummarizer", "Summarizer"]

Job = Literal["day", "global", "turn", "chunk", "group"]


@runtime_checkable
class Summarizer(Protocol):
    """Texts in order -> one summary."""

    id: str  # changes whenever summaries would

    def __call__(
        self, texts: Sequence[str], *, job: Job, max_tokens: int, day: str = "", background: str = ""
    ) -> str:
        """Summarise.

        Args:
            texts: in order: turns of a day, summaries of days, one turn, one chunk, or summaries of chunks.
            job: which of these.
            max_tokens: of the summary.
            day: of the texts, for prompts.
            background: what came before a chunk; not to be repeated.
        """
        ...


class LLMSummarizer:
    """Summaries by a language model with the library's prompts.

    Args:
        client: a :class:`~memspan.recall.chat.ChatClient` or any other ``Chat``.
        language: of the prompts; None follows the text.
        counter: what ``max_tokens`` is counted with.
    """

    def __init__(
        self,
        client: Chat,
        language: Language | None = None,
        counter: TokenCounter | Callable[[str], int] | None = None,
    ) -> None:
        self.client, self.language, self.counter = client, language, token_counter(counter)
        self.id = f"llm-{client.model}"

    def __call__(
        self, texts: Sequence[str], *, job: Job, max_tokens: int, day: str = "", background: str = ""
    ) -> str:
        """Summarise; one call.

        Raises:
            ChatFailed: no answer.
            BadReply: an empty answer.
        """
        _checked(texts, max_tokens)
        whole = "\n".join(texts)
        language = self.language or language_of(whole)
        prompt = load_prompt(
            {"day": "day_summary", "global": "global_summary"}.get(job, f"{job}_summary"), language
        )
        lines = "\n".join(as_data(text) for text in texts)
        # Three quarters of a word a token; the answer's limit leaves room for a counter that differs.
        words = max(10, max_tokens * 3 // 4 if language == "en" else max_tokens)
        messages = prompt.messages(
            lines=lines,
            text=lines,
            day=day,
            words=words,
            background=as_data(background) if background else "none",
        )
        answer = self.client.complete(messages, max_tokens=2 * max_tokens).text.strip()
        if not answer:
            raise BadReply(f"{self.client.model}: an empty summary", 200)
        return shorten(answer, max_tokens, self.counter)


class ExtractiveSummarizer:
    """The sentences that say most of a text with least repetition, in their order.

    Maximal marginal relevance: a sentence's weight is its likeness to the whole text plus a bonus for
    standing first; each further pick loses what an earlier pick says already (Carbonell and Goldstein 1998).
    No model is needed beyond the embedder.

    Args:
        embedder: None hashes words.
        diversity: how much repetition costs, 0 to 1.
        lead: bonus of the first sentence, falling with the place.
        counter: what ``max_tokens`` is counted with.

    Example:
        >>> text = "Ann likes tea. Ann likes tea a lot. The train to Rome leaves at nine."
        >>> ExtractiveSummarizer()([text], job="day", max_tokens=20)
        'Ann likes tea. The train to Rome leaves at nine.'
    """

    def __init__(
        self,
        embedder: Embedder | None = None,
        diversity: float = 0.5,
        lead: float = 0.2,
        counter: TokenCounter | Callable[[str], int] | None = None,
    ) -> None:
        if not 0 <= diversity <= 1:
            refuse("diversity", diversity, "between 0 and 1")
        self.embedder: Embedder = embedder or HashingEmbedder(256)
        self.diversity, self.lead, self.counter = diversity, lead, token_counter(counter)
        self.id = f"extractive-1-{self.embedder.id}"

    def __call__(
        self, texts: Sequence[str], *, job: Job = "day", max_tokens: int, day: str = "", background: str = ""
    ) -> str:
        """Summarise; sentences like the background are passed over."""
        _checked(texts, max_tokens)
        parts = [part for text in texts for part in sentences(text) if part.strip()]
        whole = "".join(texts)
        if self.counter(_join(parts, whole)) <= max_tokens and not background:
            return _join(parts, whole)
        if not parts:
            return ""
        vectors = self.embedder([part.strip() for part in parts])
        centre = vectors.mean(axis=0)
        weight = vectors @ (centre / max(float(np.linalg.norm(centre)), 1e-9))
        weight = weight + self.lead / (1 + np.arange(len(parts)))
        known = self.embedder([background]) if background else None
        order = mmr(vectors, weight, len(parts), balance=1 - self.diversity, chosen=known)
        picked: list[int] = []
        left = max_tokens
        for place in order:
            if (cost := self.counter(parts[place])) <= left:
                picked.append(place)
                left -= cost
        if not picked:  # one sentence longer than the summary may be
            return shorten(parts[int(weight.argmax())].strip(), max_tokens, self.counter)
        return shorten(_join([parts[i] for i in sorted(picked)], whole), max_tokens, self.counter)


def _join(parts: Sequence[str], whole: str) -> str:
    return ("" if is_chinese(whole) else " ").join(part.strip() for part in parts)


def _checked(texts: Sequence[str], max_tokens: int) -> None:
    if isinstance(texts, str):
        refuse("texts", texts, "give a sequence of str")
    if max_tokens < 1:
        refuse("max_tokens", max_tokens, "at least 1")
