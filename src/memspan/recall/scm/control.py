"""Controllers: does a message need earlier turns, and does a text suffice to answer it?"""

from __future__ import annotations

import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.data.embed import Embedder, HashingEmbedder
from memspan.recall.chat import Chat, language_of, load_prompt
from memspan.recall.choose import nearness
from memspan.recall.pack import as_data
from memspan.recall.records import Hit
from memspan.recall.text import content_words

__all__ = [
    "FEATURES",
    "Controller",
    "Decision",
    "HeuristicController",
    "LLMController",
    "LearnedController",
    "gate_features",
    "read_choice",
]


@dataclass(frozen=True)
class Decision:
    """A yes or no.

    Attributes:
        p: probability of yes.
        reason: in words.
    """

    p: float
    reason: str

    def __bool__(self) -> bool:
        return self.p >= 0.5


@dataclass(frozen=True)
class Context:
    """What a gate may know of the stream besides the last turn.

    Attributes:
        cosines: of the query to earlier turns, shape (n,).
        flash_cosine: of the query to the last turn.
        hits: what was found among them.
        embedder: id of the one that made the vectors.
    """

    cosines: Sequence[float] = field(default=())
    flash_cosine: float = 0.0
    hits: Sequence[Hit] = field(default=())
    embedder: str = ""


class Controller(ABC):
    """Two questions about a message.

    Attributes:
        calls: of a language model, so far.
        enough: the probability from which a ``"raw"`` text or a ``"summary"`` suffices.
    """

    calls: int = 0
    enough: Mapping[str, float] = MappingProxyType({"raw": 0.5, "summary": 0.5})

    @abstractmethod
    def need_memory(self, query: str, flash: str, context: Context | None = None) -> Decision:
        """Does answering need what was said before the last turn?"""

    @abstractmethod
    def sufficient(self, text: str, query: str) -> Decision:
        """Does the text hold what is needed to answer?"""

    def suffices(self, text: str, query: str, which: str) -> bool:
        """:meth:`sufficient` as a decision for packing; ``which`` is ``"raw"`` or ``"summary"``."""
        return self.sufficient(text, query).p >= self.enough[which]


#: Names of the gate's features, in the order of their weights.
FEATURES = ("cue", "possessive", "past question", "deictic", "question", "to last turn", "peak", "log turns")
_CUES = re.compile(
    r"\b(remember|recall|recollect|earlier|before|previous(?:ly)?|last time|(?:we|you|i) (?:have )?"
    r"(?:discuss|mention|talk|sa(?:id|w)|told|recommend|suggest|ask|wrote|write|generat)\w*"
    r"|you gave|as i (?:said|mentioned)|so far|again|our (?:conversation|discussion|chat|dialogue)"
    r"|(?:first|second|third|last|final) (?:question|topic|poem|story|time|thing|one|concept|answer))\b"
    r"|之前|以前|刚才|刚刚|上次|上一|记得|回忆|前面|曾经|第[一二三几]个"
    r"|我们(?:讨论|聊|谈|说)|你(?:说|推荐|提到|给)过?|我(?:说|提到|问|告诉)过?",
    re.IGNORECASE,
)
_POSSESSIVE = re.compile(r"\b(my|mine|our|ours|your|yours)\b|我的|我们的|你的|您的", re.IGNORECASE)
_PAST = re.compile(
    r"\b(did|was|were|had) (i|my|we|our|you|your|the)\b|\bhave (i|we|you)\b|吗.*过|过.*吗|了吗", re.IGNORECASE
)
_DEICTIC = re.compile(
    r"\b(it|its|that|those|these|this|they|them|their|he|she|him|her|above"
    r"|the (?:same|other|former|latter))\b"
    r"|它|那个|这个|那些|这些|他们|她们|上述|以上",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"[?？]|^\s*(what|which|who|whom|whose|when|where|why|how|do|does|did|is|are|was|were|can|could)\b"
    r"|什么|哪|谁|为什么|怎么|多少|几个|吗",
    re.IGNORECASE,
)
_COUNTING = re.compile(
    r"\b(how many|list|all (?:the|of)|every|each|which .*s\b.*\bso far)\b|多少|几个|列出|哪些|所有",
    re.IGNORECASE,
)
# Logistic regression on every other question of the recipe's gate data; the others report. The stream's
# length hardly varied there, so its weight went into the bias.
_WEIGHTS = (1.17, 0.23, -0.23, -0.94, 1.32, 0.11, 1.95, 0.0)
_BIAS = -1.36
_ENOUGH = 0.5


def gate_features(query: str, context: Context | None = None) -> NDArray[np.float64]:
    """The eight features of the gate, shape (8,); see :data:`FEATURES`.

    ``peak`` is the largest cosine of the query to the stream minus the median: how much one memory stands
    out.

    Example:
        >>> dict(zip(FEATURES, gate_features("Do you remember my cat?").tolist()))["cue"]
        1.0
    """
    known = context or Context()
    cosines = np.asarray(known.cosines, np.float64)
    peak = float(cosines.max() - np.median(cosines)) if cosines.size else 0.0
    flags = [bool(pattern.search(query)) for pattern in (_CUES, _POSSESSIVE, _PAST, _DEICTIC, _QUESTION)]
    return np.array([*flags, known.flash_cosine, peak, math.log1p(cosines.size)], np.float64)


class HeuristicController(Controller):
    """Decides without a model, by cues in the words and by likeness; the default.

    Args:
        embedder: for sufficiency; None hashes words.

    Example:
        >>> controller = HeuristicController()
        >>> bool(controller.need_memory("As we discussed earlier, which park was it?", ""))
        True
        >>> controller.sufficient("The park is called Green Meadow.", "park Green Meadow").p
        1.0
    """

    # A shared word keeps a turn; only a summary with all of the query's words replaces it.
    enough = MappingProxyType({"raw": 0.01, "summary": 1.0})

    def __init__(self, embedder: Embedder | None = None) -> None:
        self.embedder: Embedder = embedder or HashingEmbedder(256)
        self.calls = 0

    def need_memory(self, query: str, flash: str, context: Context | None = None) -> Decision:
        """By how near the nearest memory is; by cues in the words where no floor is known."""
        if context is not None and context.hits:
            near = nearness(query, context.hits, context.embedder)
            if near is not None:
                return Decision(near, "by the nearest memory")
        features = gate_features(query, context)
        p = 1 / (1 + math.exp(-(float(features @ np.array(_WEIGHTS)) + _BIAS)))
        present = [name for name, value in zip(FEATURES[:5], features[:5], strict=True) if value]
        return Decision(p, f"signs: {', '.join(present) or 'none'}")

    def sufficient(self, text: str, query: str) -> Decision:
        """The share of the query's content words that the text holds; 0 for an empty text."""
        if not text.strip():
            return Decision(0.0, "empty")
        wanted = content_words(query)
        if query.strip().lower() in text.lower():
            return Decision(1.0, "the text holds the query")
        if not wanted:
            return Decision(_ENOUGH, "the query has no content words")
        share = len(wanted & content_words(text)) / len(wanted)
        return Decision(share, f"holds {share:.0%} of the query's content words")


class LLMController(Controller):
    """Asks a language model, with one token for an answer.

    A small model can be worse than none, so ten messages with known answers are asked first
    (:meth:`self_test`) and a poor result warns.

    Args:
        client: of the model.
        test: ask the ten messages before the first decision.
    """

    def __init__(self, client: Chat, test: bool = True) -> None:
        self.client, self.calls = client, 0
        self.auc: float | None = None
        self._test = test

    def need_memory(self, query: str, flash: str, context: Context | None = None) -> Decision:
        """One call."""
        if self._test:
            self._test = False
            self.self_test()
        return self._ask("gate", query=as_data(query), flash=as_data(flash) if flash else "none", say=query)

    def sufficient(self, text: str, query: str) -> Decision:
        """One call."""
        return self._ask("sufficient", query=as_data(query), text=as_data(text), say=query)

    def self_test(self) -> float:
        """The share of pairs that are ranked the right way round; below .8 it warns."""
        asked = [(self._ask("gate", query=as_data(q), flash="none", say=q).p, need) for q, need in _SELF_TEST]
        yes = [p for p, need in asked if need]
        no = [p for p, need in asked if not need]
        self.auc = float(np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no]))
        if self.auc < 0.8:
            warnings.warn(
                f"{self.client.model} ranks messages that need memory above others in {self.auc:.0%} of "
                "pairs: HeuristicController is likely better",
                stacklevel=2,
            )
        return self.auc

    def _ask(self, name: str, say: str, **values: object) -> Decision:
        prompt = load_prompt(name, language_of(say))
        self.calls += 1
        reply = self.client.complete(
            prompt.messages(**values), max_tokens=5, temperature=0, logprobs=True, top_logprobs=10
        )
        if reply.top:
            yes, no = (_mass(reply.top, letters) for letters in (("A", "YES", "是"), ("B", "NO", "否")))
            if yes + no > 0.2:
                return Decision(yes / (yes + no), "probabilities of A and B")
        return Decision(float(read_choice(reply.text)), "the model's words")


class LearnedController(Controller):
    """Logistic regression over the gate's features and the query's vector; shipped without weights.

    Args:
        embedder: of queries; None uses the features alone.
        penalty: L2 penalty.
        steps: of Newton's method.

    Example:
        >>> learned = LearnedController().fit(["remember my cat?", "what is a cat?"] * 4, [1, 0] * 4)
        >>> bool(learned.need_memory("do you remember my dog?", ""))
        True
    """

    def __init__(self, embedder: Embedder | None = None, penalty: float = 1.0, steps: int = 50) -> None:
        if penalty <= 0:
            refuse("penalty", penalty, "more than 0")
        self.embedder, self.penalty, self.steps, self.calls = embedder, penalty, steps, 0
        self._sufficient = HeuristicController(embedder)

    def fit(
        self, queries: Sequence[str], y: Sequence[int], contexts: Sequence[Context] | None = None
    ) -> LearnedController:
        """Learn from messages and whether they needed memory; ``weights_`` and ``bias_`` hold the result."""
        labels = np.asarray(y, np.float64)
        if len(queries) != len(labels) or len(set(labels.tolist())) < 2:
            refuse("y", y, "give a label for each query, with both 0 and 1 among them")
        x = self._matrix(queries, contexts)
        x1 = np.column_stack([x, np.ones(len(x))])
        w = np.zeros(x1.shape[1])
        ridge = np.full(len(w), self.penalty)
        ridge[-1] = 1e-6  # the bias is free
        for _ in range(self.steps):
            p = 1 / (1 + np.exp(-x1 @ w))
            gradient = x1.T @ (p - labels) + ridge * w
            hessian = (x1 * (p * (1 - p))[:, None]).T @ x1 + np.diag(ridge)
            step = np.linalg.solve(hessian, gradient)
            w -= step
            if np.abs(step).max() < 1e-10:
                break
        self.weights_, self.bias_ = w[:-1], float(w[-1])
        return self

    def predict_proba(
        self, queries: Sequence[str], contexts: Sequence[Context] | None = None
    ) -> NDArray[np.float64]:
        """Probability of needing memory, shape (n,)."""
        if not hasattr(self, "weights_"):
            refuse("controller", "not fitted", "call fit first")
        return np.asarray(1 / (1 + np.exp(-(self._matrix(queries, contexts) @ self.weights_ + self.bias_))))

    def need_memory(self, query: str, flash: str, context: Context | None = None) -> Decision:
        """By the fitted weights."""
        return Decision(float(self.predict_proba([query], [context or Context()])[0]), "fitted")

    def sufficient(self, text: str, query: str) -> Decision:
        """As :class:`HeuristicController`."""
        return self._sufficient.sufficient(text, query)

    def _matrix(self, queries: Sequence[str], contexts: Sequence[Context] | None) -> NDArray[np.float64]:
        known = contexts or [Context()] * len(queries)
        rows = np.array([gate_features(q, c) for q, c in zip(queries, known, strict=True)])
        return rows if self.embedder is None else np.column_stack([rows, self.embedder(queries)])


def wants_scan(query: str) -> bool:
    """Whether a question counts or lists: it needs many memories shortly rather than few at length.

    Example:
        >>> wants_scan("How many concepts did I ask about?"), wants_scan("What is the first concept?")
        (True, False)
    """
    return bool(_COUNTING.search(query))


def read_choice(text: str) -> bool:
    """Yes (A) or no (B) in a model's words: the last option named; without one yes, the safer side.

    Example:
        >>> [read_choice(t) for t in ("(A)", "B.", "no", "是", "(A) yes / (B) no", "", "(B)否")]
        [True, False, False, True, False, True, False]
    """
    plain = text.strip()
    found = re.findall(r"\(\s*([ABab])\s*\)|(?<![A-Za-z])([AB])(?![A-Za-z'])|^\s*([ab])(?![A-Za-z'])", plain)
    letters = [next(filter(None, groups)).upper() for groups in found]
    if letters:
        return bool(letters[-1] == "A")
    words = re.findall(r"\b(yes|no|needed|not needed)\b|(不是|不需要|否|是|需要)", plain, re.IGNORECASE)
    said = [next(filter(None, groups)).lower() for groups in words]
    return said[-1] not in ("no", "not needed", "否", "不是", "不需要") if said else True


_SELF_TEST = (
    ("As we discussed before, how many kinds of clients are there?", True),
    ("What was the book that you recommended to me last week?", True),
    ("Do you remember the name of my sister?", True),
    ("What was the first question that I asked you?", True),
    ("Did I tell you where I live?", True),
    ("Translate 'good morning' into French.", False),
    ("What is the capital of Norway?", False),
    ("Write a short poem about the sea.", False),
    ("How do I sort a list in Python?", False),
    ("Explain photosynthesis in two sentences.", False),
)


def _mass(top: Any, words: Sequence[str]) -> float:
    return sum(math.exp(value) for token, value in top.items() if token.strip(" ().,\n").upper() in words)
