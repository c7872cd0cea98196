"""Conversations with questions whose evidence is known: real ones where they are, else generated."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memspan import data
from memspan.base.files import fingerprint
from memspan.base.lines import records
from memspan.base.rng import rng
from memspan.data.embed import Embedder
from memspan.recall.memory import default_embedder
from memspan.recall.turns import turn_text
from memspan.recipes.engine import Task

__all__ = [
    "CachedEmbedder",
    "Conversation",
    "Question",
    "Turn",
    "conversations",
    "embedder_for",
    "generated",
    "locomo",
    "memorybank",
]


@dataclass(frozen=True)
class Turn:
    """One piece: its text as it is indexed, and what was said."""

    id: str
    text: str
    query: str
    response: str
    at: datetime
    session: str = ""


@dataclass(frozen=True)
class Question:
    """A question with the ids of the turns that answer it, and a category where there is one."""

    text: str
    evidence: tuple[str, ...]
    category: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Conversation:
    """All turns of one user, and questions about them."""

    user: str
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]


class Generated(NamedTuple):
    """What a run records of conversations that were made here."""

    name: str
    source: str
    sha256: str


class CachedEmbedder:
    """An embedder whose vectors are kept by content, for texts that runs embed again and again.

    Args:
        inner: computes.
    """

    def __init__(self, inner: Embedder) -> None:
        self.inner, self.dim, self.id = inner, inner.dim, inner.id
        self._known: dict[str, NDArray[np.float32]] = {}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed; what was seen in this process is not computed again."""
        new = list(dict.fromkeys(text for text in texts if text not in self._known))
        if new:
            self._known.update(zip(new, self.inner(new), strict=True))
        return (
            np.stack([self._known[text] for text in texts])
            if len(texts)
            else np.zeros((0, self.dim), np.float32)
        )

    def warm(self, texts: Sequence[str]) -> None:
        """Embed many texts, or take them from the feature cache on disk."""
        import torch

        new = sorted(dict.fromkeys(text for text in texts if text not in self._known))
        if not new:
            return
        key = {"embedder": self.id, "texts": fingerprint(new)}
        batches = (new[i : i + 64] for i in range(0, len(new), 64))
        rows = data.features.cache_features(
            lambda batch: torch.from_numpy(self.inner(batch)), batches, key
        ).numpy()
        self._known.update(zip(new, rows, strict=True))


def embedder_for(name: str) -> CachedEmbedder:
    """MiniLM, or hashed words where it is absent or asked for."""
    inner = data.HashingEmbedder(256) if name == "hashing" else default_embedder()
    return CachedEmbedder(inner)


def conversations(task: Task[Any], name: str) -> list[Conversation]:
    """Those of a name (memorybank, locomo, generated) that have questions; generated where it is absent."""
    found = memorybank(task) if name == "memorybank" else locomo(task) if name == "locomo" else None
    if found is None:
        if name != "generated":
            task.note(f"conversations are generated: {name} is not there (see MEMSPAN_DATA)")
        found = generated(task)
    return [talk for talk in found if talk.questions]


def memorybank(task: Task[Any] | None = None, language: str = "en") -> list[Conversation] | None:
    """The dialogues of 15 users; English ("en") questions have evidence, Chinese ones ("cn") have not.

    None: they are absent.
    """
    try:
        files = data.load("memorybank", data.FileSet)
    except data.DataNotFound:
        return None
    if task is not None:
        task.use(files)
    bank = json.loads(files[f"memory_bank_{language}"].read_text(encoding="utf-8"))
    asked: dict[str, list[Question]] = {}
    if language == "en":
        for line in records(files["evidence_en"].read_text(encoding="utf-8")):
            one = json.loads(line)
            ids = tuple(f"{place['date']}/{place['turn']}" for place in one["evidence"])
            asked.setdefault(one["user"].strip(), []).append(Question(one["question"], ids))
    else:
        for line in records(files[f"probing_questions_{language}"].read_text(encoding="utf-8")):
            for name, questions in json.loads(line).items():
                asked.setdefault(name.strip(), []).extend(Question(text, ()) for text in questions)
    found = []
    for name, person in bank.items():
        turns = []
        for day, said in sorted(person["history"].items()):
            start = datetime.fromisoformat(day).replace(hour=9, tzinfo=UTC)
            for place, one in enumerate(said):
                at = start + timedelta(minutes=place)
                text = turn_text(one["query"], one["response"], at)
                turns.append(Turn(f"{day}/{place}", text, one["query"], one["response"], at, day))
        found.append(Conversation(name.strip(), tuple(turns), tuple(asked.get(name.strip(), ()))))
    return found


def locomo(task: Task[Any] | None = None) -> list[Conversation] | None:
    """Ten long conversations; questions of categories 1 to 4 with a valid id. None: they are absent."""
    try:
        files = data.load("locomo", data.FileSet)
    except data.DataNotFound:
        return None
    if task is not None:
        task.use(files)
    return [_locomo_sample(one) for one in json.loads(files["locomo10"].read_text(encoding="utf-8"))]


def _locomo_sample(sample: dict[str, Any]) -> Conversation:
    spoken = sample["conversation"]
    turns: list[Turn] = []
    number = 1
    while f"session_{number}_date_time" in spoken:
        day = spoken[f"session_{number}_date_time"]
        at = datetime.strptime(day, "%I:%M %p on %d %B, %Y").replace(tzinfo=UTC)
        for place, turn in enumerate(spoken.get(f"session_{number}", ())):
            said = " ".join(part for part in (turn["text"], turn.get("blip_caption", "")) if part)
            words, when = f"{day} {turn['speaker']}: {said}", at + timedelta(seconds=place)
            text = turn_text(words, "", when)
            turns.append(Turn(turn["dia_id"], text, words, "", when, f"session_{number}"))
        number += 1
    known = {turn.id for turn in turns}
    questions = []
    for one in sample["qa"]:
        ids = tuple(dict.fromkeys(id for id in _ids(one.get("evidence", ())) if id in known))
        if one["category"] in (1, 2, 3, 4) and ids:
            questions.append(Question(one["question"], ids, str(one["category"]), str(one.get("answer", ""))))
    return Conversation(sample["sample_id"], tuple(turns), tuple(questions))


def _ids(told: Any) -> list[str]:
    texts = [told] if isinstance(told, str) else [str(one) for one in told]
    return [
        text for text in texts if re.fullmatch(r"D\d+:\d+", text)
    ]  # some strings hold several: no valid id


def generated(
    task: Task[Any] | None = None, users: int = 8, days: int = 12, seed: int = 0
) -> list[Conversation]:
    """Users that tell facts between small talk, with questions in other words."""
    found = []
    for number in range(users):
        draw = rng("recall.generated", seed, number)
        name = _NAMES[number % len(_NAMES)]
        turns: list[Turn] = []
        told: list[tuple[str, str, str]] = []
        for day in range(days):
            start = datetime(2024, 3, 1, 9, tzinfo=UTC) + timedelta(days=day)
            kind, say, ask = _FACTS[int(draw.integers(len(_FACTS)))]
            value = str(draw.choice(_VALUES[kind]))
            lines = [(say.format(value), f"Thank you for telling me about {value}.")]
            lines += [_TALK[int(i)] for i in draw.choice(len(_TALK), 3, replace=False)]
            for place in draw.permutation(len(lines)):
                query, response = lines[int(place)]
                at = start + timedelta(minutes=len(turns))
                id = f"{number}/{len(turns)}"
                if int(place) == 0:
                    told.append((kind, ask, id))
                turns.append(Turn(id, turn_text(query, response, at), query, response, at, f"{at:%Y-%m-%d}"))
        latest = {(kind, ask): id for kind, ask, id in told}
        questions = tuple(Question(ask, (id,)) for (_, ask), id in latest.items())
        found.append(Conversation(name, tuple(turns), questions))
    if task is not None:
        texts = [turn.text for talk in found for turn in talk.turns]
        task.use(
            Generated("generated-conversations", "memspan.recipes.tracks.conversations", fingerprint(texts))
        )
    return found


_NAMES = ("Ada", "Ben", "Chloe", "Dan", "Eva", "Finn", "Gita", "Hugo")
_FACTS = (
    ("city", "Last week I moved to {}.", "Which city do I live in now?"),
    ("pet", "I adopted a {} from the shelter.", "What animal did I take home?"),
    ("dish", "Yesterday I cooked {} for my friends.", "What meal did I prepare for guests?"),
    ("book", "I finished reading {} on the train.", "Which novel did I read while travelling?"),
    ("sport", "I started {} lessons on Mondays.", "What sport am I learning?"),
    ("job", "I got an offer to work as a {}.", "What profession was I offered?"),
    ("plant", "I planted {} on the balcony.", "What grows on my balcony?"),
    ("film", "We watched {} at the cinema.", "Which movie did we see?"),
)
_VALUES: dict[str, tuple[str, ...]] = {
    "city": ("Lisbon", "Oslo", "Kyoto", "Quito"),
    "pet": ("tortoise", "greyhound", "parrot", "hamster"),
    "dish": ("paella", "ramen", "goulash", "risotto"),
    "book": ("Middlemarch", "Solaris", "Emma", "Ivanhoe"),
    "sport": ("fencing", "rowing", "judo", "archery"),
    "job": ("baker", "surveyor", "librarian", "welder"),
    "plant": ("basil", "lavender", "tomatoes", "ivy"),
    "film": ("Metropolis", "Alien", "Casablanca", "Amelie"),
}
_TALK = (
    ("How are you today?", "I am well, thank you. How are you?"),
    ("It rained the whole morning.", "Rain can be calming."),
    ("Can you tell me a joke?", "Why did the scarecrow win a prize? He was outstanding in his field."),
    ("I am a bit tired.", "A short walk may help."),
    ("What should I do this evening?", "You could read or call a friend."),
    ("My meeting was long.", "Long meetings are exhausting."),
    ("I need to clean the kitchen.", "Start with the sink, then the floor."),
    ("Thanks for your help!", "You are welcome."),
)
