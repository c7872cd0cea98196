"""One user's memory: a store, a policy and an embedder bound together.

Put it beside any chat application::

    mem = Memory("me.db", user="emily")
    mem.observe(user="I went to Green Meadow Park", assistant="What did you see?")
    mem.prompt("which park did I visit?")  # one message, marked as data, within a budget of tokens
    mem.why(mem.recall("park")[0].record.id)
    mem.forget_me()

Reading never calls a language model unless the policy's controller is one; writing calls one only where a
policy was given one, and :meth:`Memory.plan` tells the price before.
"""

from __future__ import annotations

import asyncio
import functools
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, ParamSpec, Self, TypeVar

from memspan.base import nearest, refuse
from memspan.data.embed import Embedder, HashingEmbedder, MiniLMEmbedder
from memspan.recall.memorybank import MemoryBankPolicy
from memspan.recall.pack import Packed
from memspan.recall.records import Forgotten, Hit, Message, Plan, Policy, Record, Source, Trust
from memspan.recall.store import Store, UserStore, open_store
from memspan.recall.text import TokenCounter, content_words, split, token_counter
from memspan.recall.turns import check_time

if TYPE_CHECKING:
    from memspan.recall.chat import Chat, Reply

__all__ = ["Memory", "Plan", "default_embedder", "find_secrets", "make_policy"]

MAX_TEXT = 1_000_000
_log = logging.getLogger("memspan.recall")
P = ParamSpec("P")
T = TypeVar("T")


class Memory:
    """One user's long-term memory.

    Args:
        path_or_url: a file (``"me.db"`` or ``"sqlite:///me.db"``), ``":memory:"``, a ``postgresql://``
            address, or a store that is open already.
        user: the user's id: any text of at most 256 bytes, never part of a path.
        policy: ``"memorybank"``, ``"tim"``, ``"scm"``, or an object with the five calls of ``Policy``.
        embedder: None takes MiniLM where it is installed, else hashed words.
        llm: a chat client for the policy's writing (summaries, thoughts); None: no model is called at all.
        app: keeps applications apart in one store.
        secrets: what to do with text that looks like a key or a card number: ``"flag"`` it in the record's
            metadata, ``"refuse"`` it, or ``"keep"`` it silently.
        counter: of tokens; None is cautious.

    Raises:
        BadInput: an unknown policy, an empty user, an embedder other than the store's.

    Example:
        >>> import tempfile
        >>> from memspan.data import HashingEmbedder
        >>> mem = Memory(tempfile.mkdtemp() + "/me.db", user="emily", embedder=HashingEmbedder(64))
        >>> _ = mem.observe(user="I went to Green Meadow Park", assistant="What did you see?")
        >>> _ = mem.observe(user="My cat is called Tom", assistant="A fine name!")
        >>> mem.recall("Which park was it?", k=1)[0].record.metadata["query"]
        'I went to Green Meadow Park'
        >>> mem.forget_me()
        2
        >>> mem.close()
    """

    def __init__(
        self,
        path_or_url: str | Path | Store = "memory.db",
        user: str = "me",
        policy: str | Policy = "memorybank",
        embedder: Embedder | None = None,
        llm: Chat | None = None,
        *,
        app: str = "default",
        secrets: Literal["flag", "refuse", "keep"] = "flag",
        counter: TokenCounter | Callable[[str], int] | None = None,
    ) -> None:
        if secrets not in ("flag", "refuse", "keep"):
            refuse("secrets", secrets, 'use "flag", "refuse" or "keep"')
        self.counter = token_counter(counter)
        self.policy: Policy = make_policy(policy, llm, counter) if isinstance(policy, str) else policy
        if not isinstance(self.policy, Policy):
            refuse("policy", policy, "give a name, or an object of a class below memspan.recall.Policy")
        self._owns = isinstance(path_or_url, str | Path)
        self.database: Store = (
            path_or_url
            if not isinstance(path_or_url, str | Path)
            else open_store(path_or_url, embedder or default_embedder())
        )
        try:
            self.store: UserStore = self.database.for_user(user, app)
        except Exception:
            self.close()
            raise
        self.user, self.app, self.secrets, self.llm = user, app, secrets, llm
        self.last_used: list[str] = []
        self.last_trace: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store, where this memory opened it."""
        if self._owns:
            self.database.close()

    def observe(
        self, user: str = "", assistant: str = "", at: datetime | None = None, session: str = ""
    ) -> list[str]:
        """Remember one exchange.

        Args:
            user: the user's words (not an id).
            assistant: the reply.
            at: when, with a zone; None is now.
            session: kept in the record's source.

        Returns:
            Ids of what was written.

        Raises:
            BadInput: nothing said, a time without a zone, a text over 1 MB (use :meth:`read`), or a secret
                where these are refused.
        """
        if not user.strip() and not assistant.strip():
            refuse("user", user, "give the user's words, the reply, or both")
        messages = [Message(role="user", content=user)] if user.strip() else []
        messages += [Message(role="assistant", content=assistant)] if assistant.strip() else []
        return self.observe_messages(messages, at, session)

    def observe_messages(
        self,
        messages: Sequence[Message],
        at: datetime | None = None,
        session: str = "",
        **metadata: Any,
    ) -> list[str]:
        """Remember messages in the form of the OpenAI API; arguments as :meth:`observe`.

        Args:
            messages: user and assistant messages are kept; system and tool messages are not the user's and
                are left out.
            at: when.
            session: kept in the source.
            metadata: JSON values kept with each record.
        """
        at = _now(at)
        found: set[str] = set()
        for message in messages:
            for text in _texts(message):
                _check_text(text)
                if self.secrets != "keep":
                    found |= set(find_secrets(text))
        if found and self.secrets == "refuse":
            refuse(
                "messages",
                f"text with {', '.join(sorted(found))}",
                "take the secret out, or open with secrets='flag'",
            )
        if found:
            metadata["secrets"] = sorted(found)
        with self.store.transaction():
            ids = self.policy.observe(self.store, messages, at)
            if metadata or session:
                for record in self.store.get(ids):
                    changes: dict[str, Any] = {"metadata": {**record.metadata, **metadata}}
                    if session:
                        changes["source"] = {**record.source, "session": session}
                    self.store.update(record.id, **changes)
        return ids

    def remember(self, text: str, at: datetime | None = None, trust: Trust = "user", **metadata: Any) -> str:
        """Write one note as it is, outside any conversation; its id."""
        _check_text(text)
        if not text.strip():
            refuse("text", text, "give text that is not empty")
        found = find_secrets(text) if self.secrets != "keep" else []
        if found and self.secrets == "refuse":
            refuse(
                "text", f"text with {', '.join(found)}", "take the secret out, or open with secrets='flag'"
            )
        told = {**metadata, **({"secrets": found} if found else {})}
        return self.store.add(
            [Record(text, _now(at), source=Source(role=trust, trust=trust), metadata=told)]
        )[0]

    def read(
        self, text: str, title: str, at: datetime | None = None, trust: Trust = "web", chunk_tokens: int = 300
    ) -> list[str]:
        """Remember a document in chunks that end at sentence ends; ids in order."""
        when, parts = _now(at), split(text, chunk_tokens, self.counter)
        source = Source(role=trust, trust=trust)
        return self.store.add(
            [
                Record(part, when, kind="document", source=source, metadata={"title": title, "part": i})
                for i, part in enumerate(parts) if part.strip()
            ]
        )  # fmt: skip

    def recall(
        self, query: str, k: int = 6, budget_tokens: int | None = None, *, at: datetime | None = None
    ) -> list[Hit]:
        """The best ``k`` memories for a query, with every part of each score; nothing is changed.

        Args:
            query: what is wanted; not empty.
            k: how many at most, 1 to 1,000.
            budget_tokens: stop before the texts exceed this.
            at: as of when ages count; None is now.
        """
        _check_query(query, k)
        hits = self.policy.recall(self.store, query, k, _now(at))
        if budget_tokens is None:
            return hits
        ends = accumulate(self.counter(hit.record.text) for hit in hits)
        return [hit for hit, end in zip(hits, ends, strict=True) if end <= budget_tokens]

    def prompt(
        self,
        query: str,
        k: int = 6,
        budget_tokens: int = 1500,
        *,
        at: datetime | None = None,
        present: Sequence[Message] = (),
    ) -> Packed:
        """Messages to put before the user's message: what was recalled, marked as data.

        Args:
            query: the user's message.
            k: how many memories at most.
            budget_tokens: of all messages together.
            at: as of when.
            present: messages that the model is given anyway: what stands in them is not recalled again.

        Returns:
            No or one message; ``.used`` tells the ids, ``.tokens`` the cost. None for small talk and
            questions about the world. Tell :meth:`used` what was replied, so that what helped grows stronger.
        """
        _check_query(query, k)
        shown = {" ".join(text.split()) for message in present for text in _texts(message)}
        found = self.policy.recall(self.store, query, k + min(len(shown), 20), _now(at))
        if shown:
            fresh = [hit for hit in found if " ".join(_said(hit.record).split()) not in shown]
            found = fresh
        hits = self.policy.relevant(self.store, query, found[:k] if len(found) > k else found)
        packed = self.policy.context(self.store, query, hits, budget_tokens)
        if not isinstance(packed, Packed):
            packed = Packed(packed, [hit.record.id for hit in hits])
        packed.hits = list(hits)
        return packed

    def used(self, packed: Packed, reply: str, at: datetime | None = None) -> list[str]:
        """Strengthen the placed memories that a reply used; their ids.

        Best effort: a store that is busy or full is left alone.
        """
        if self.policy.reinforce == "never":
            return []
        placed = set(packed.used)
        ids = self.policy.used([hit for hit in packed.hits if hit.record.id in placed], reply)
        if ids:
            with suppress(OSError):
                self.store.reinforce(ids, _now(at))
        return ids

    def chat(
        self,
        client: Chat,
        messages: Sequence[Message] | str,
        k: int = 6,
        budget_tokens: int = 1500,
        *,
        at: datetime | None = None,
        **params: Any,
    ) -> Reply:
        """Recall, ask the model, remember the exchange.

        Args:
            client: of the model.
            messages: of the chat, the user's last; or the user's words.
            k: memories at most.
            budget_tokens: of the recalled block.
            at: when; None is now.
            params: for the model.

        Returns:
            The model's reply; :attr:`last_used` names the memories that it was given.
        """
        chat, query, packed, when = self._prepare(messages, k, budget_tokens, at)
        reply = client.complete(chat, **params)
        self._after(query, reply.text, packed, when)
        return reply

    def stream(
        self,
        client: Chat,
        messages: Sequence[Message] | str,
        k: int = 6,
        budget_tokens: int = 1500,
        *,
        at: datetime | None = None,
        **params: Any,
    ) -> Iterator[str]:
        """As :meth:`chat`, in pieces; written when it ends, marked ``partial`` when broken off."""
        chat, query, packed, when = self._prepare(messages, k, budget_tokens, at)
        parts: list[str] = []
        whole = False
        try:
            for piece in client.stream(chat, **params):
                parts.append(piece)
                yield piece
            whole = True
        finally:
            self._after(query, "".join(parts), packed, when, partial=not whole)

    def why(self, id: str) -> dict[str, float | str]:
        """Why a record stands where it stands: strength, retention, evidence, state."""
        return self.policy.explain(self.store, id)

    def forget(
        self,
        what: str | Sequence[str] | None = None,
        *,
        query: str | None = None,
        before: datetime | None = None,
        hard: bool = False,
        dry_run: bool = False,
        at: datetime | None = None,
    ) -> list[Forgotten]:
        """Forget named records, what a query finds, or what is older than a date.

        Args:
            what: an id or ids.
            query: forget what holds all of the query's content words; look with ``dry_run=True`` first.
            before: forget what was said before this.
            hard: leave no trace, with no undo: what a person's wish for privacy asks for.
            dry_run: tell what would be forgotten.
            at: when.

        Returns:
            What was (or would be) forgotten; :meth:`undo` brings it back unless ``hard``.

        Raises:
            BadInput: not exactly one of ``what``, ``query``, ``before``.
        """
        if sum(given is not None for given in (what, query, before)) != 1:
            refuse("what, query, before", (what, query, before), "give exactly one of them")
        if query is not None:
            ids = self._holding(query)
        elif before is not None:
            check_time(before)
            ids = [r.id for r in self.store.iterate(where={"until": before}) if r.created_at < before]
        else:
            ids = [what] if isinstance(what, str) else list(what or ())
        chosen = self.policy.forget(self.store, _now(at), ids, dry_run=True)
        if chosen and not dry_run:
            if hard:
                ids = [one.id for one in chosen]
                with self.store.transaction():
                    ids += self.policy.before_erase(self.store, ids)
                    self.store.erase(ids, hard=True, reason="asked for")
            else:
                self.policy.forget(self.store, _now(at), [one.id for one in chosen])
        return chosen

    def undo(self, ids: str | Sequence[str]) -> list[str]:
        """Bring back what was forgotten softly; the ids that came back."""
        return self.store.restore([ids] if isinstance(ids, str) else list(ids))

    def forget_me(self) -> int:
        """Erase everything of this user for good; how many records there were."""
        return self.store.erase_all()

    def export(self, to: IO[str] | str | Path | None = None) -> str | int:
        """All records as JSON lines: as text, or into a file (then how many)."""
        if to is None:
            buffer = io.StringIO()
            self.store.export(buffer)
            return buffer.getvalue()
        if isinstance(to, str | Path):
            with Path(to).open("w", encoding="utf-8") as file:
                return self.store.export(file)
        return self.store.export(to)

    def sweep(self, at: datetime | None = None, dry_run: bool = False) -> list[Forgotten]:
        """Forget what the policy lets go, and condense the days that are over; what went, and why."""
        when = _now(at)
        gone = self.policy.forget(self.store, when, None, dry_run)
        if not dry_run:
            self.condense(when)
            if self._owns:
                self.database.sweep_expired(when)
        return gone

    def thoughts(self, entity: str | None = None, as_of: datetime | None = None) -> list[Any]:
        """What a policy that thinks (``"tim"``) concluded about an entity, with evidence and validity."""
        return self.policy.thoughts(self.store, entity, as_of)

    def condense(self, at: datetime | None = None) -> list[str]:
        """Let the policy do its pending writing (summaries, thoughts); ids of what was written."""
        return self.policy.condense(self.store, _now(at))

    def plan(self, messages: Sequence[Message]) -> Plan:
        """Calls, tokens and records that remembering these messages will cost; nothing is done."""
        return self.policy.plan(messages, self.counter)

    # Asynchronous twins: the store is blocking, so each runs in a thread.
    async def aobserve(self, *args: Any, **kwargs: Any) -> list[str]:
        """:meth:`observe` without blocking the event loop."""
        return await _in_thread(self.observe, *args, **kwargs)

    async def aobserve_messages(self, *args: Any, **kwargs: Any) -> list[str]:
        """:meth:`observe_messages` without blocking the event loop."""
        return await _in_thread(self.observe_messages, *args, **kwargs)

    async def arecall(self, *args: Any, **kwargs: Any) -> list[Hit]:
        """:meth:`recall` without blocking the event loop."""
        return await _in_thread(self.recall, *args, **kwargs)

    async def aprompt(self, *args: Any, **kwargs: Any) -> Packed:
        """:meth:`prompt` without blocking the event loop."""
        return await _in_thread(self.prompt, *args, **kwargs)

    async def achat(self, *args: Any, **kwargs: Any) -> Reply:
        """:meth:`chat` without blocking the event loop."""
        return await _in_thread(self.chat, *args, **kwargs)

    async def aforget(self, *args: Any, **kwargs: Any) -> list[Forgotten]:
        """:meth:`forget` without blocking the event loop."""
        return await _in_thread(self.forget, *args, **kwargs)

    async def asweep(self, *args: Any, **kwargs: Any) -> list[Forgotten]:
        """:meth:`sweep` without blocking the event loop."""
        return await _in_thread(self.sweep, *args, **kwargs)

    def _prepare(
        self, messages: Sequence[Message] | str, k: int, budget_tokens: int, at: datetime | None
    ) -> tuple[list[Message], str, Packed, datetime]:
        chat = [Message(role="user", content=messages)] if isinstance(messages, str) else list(messages)
        if not chat or chat[-1].get("role") != "user":
            refuse("messages", [m.get("role") for m in chat], "end with the user's message")
        query, when = "\n".join(_texts(chat[-1])), _now(at)
        packed = Packed()
        if query.strip():
            try:
                packed = self.prompt(query, k, budget_tokens, at=when, present=chat[:-1])
            except Exception as error:  # a memory that fails must not stop the chat
                _log.warning("nothing was recalled (%s)", type(error).__name__)
        self.last_used, self.last_trace = packed.used, packed.trace
        chat[-1:-1] = packed
        return chat, query, packed, when

    def _after(self, query: str, reply: str, packed: Packed, at: datetime, partial: bool = False) -> None:
        said = [Message(role="user", content=query)] if query.strip() else []
        said += [Message(role="assistant", content=reply)] if reply else []
        if said:
            extra: dict[str, Any] = {"partial": True} if partial else {}
            ids = self.observe_messages(said, at, **extra)
            if self.last_trace and self.policy.trace:
                # Its evidence is the turn: it is erased with it.
                record = Record("trace", at, kind="trace", evidence=tuple(ids), metadata=self.last_trace)
                self.store.add([record])
        self.used(packed, reply, at)

    def _holding(self, query: str) -> list[str]:
        """Ids of records that hold every content word of a query: forgetting must not guess."""
        wanted = content_words(query)
        if not wanted:
            refuse("query", query, "give at least one word that is no stop word")
        return [r.id for r in self.store.iterate() if r.kind != "trace" and wanted <= content_words(r.text)]


def make_policy(
    name: str, llm: Chat | None = None, counter: TokenCounter | Callable[[str], int] | None = None
) -> Policy:
    """A policy by name, with its defaults; a language model makes it write summaries or thoughts.

    Raises:
        BadInput: an unknown name.
    """
    from memspan.recall.summarize import LLMSummarizer

    if name == "memorybank":
        return MemoryBankPolicy(summarizer=LLMSummarizer(llm) if llm else None, counter=counter)
    if name == "scm":
        from memspan.recall.scm import SCMPolicy

        return SCMPolicy(summarizer=LLMSummarizer(llm) if llm else None, counter=counter)
    if name == "tim":
        from memspan.recall.tim import LLMExtractor, LLMOrganiser, TiMPolicy

        if llm is None:
            return TiMPolicy(counter=counter)
        return TiMPolicy(LLMExtractor(llm), LLMOrganiser(llm), counter=counter)
    refuse("policy", name, nearest(name, ("memorybank", "scm", "tim")))


@functools.cache
def default_embedder() -> Embedder:
    """MiniLM where it is installed, else hashed words (then meanings are not found, only words)."""
    try:
        return MiniLMEmbedder()
    except (ImportError, LookupError, OSError) as error:
        warnings.warn(f"texts are embedded by hashing, since MiniLM is absent: {error}", stacklevel=2)
        return HashingEmbedder()


_SECRETS = {
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "API key": re.compile(
        r"\b(?:sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{10,}"
        r"|AIza[0-9A-Za-z_-]{35}|glpat-[A-Za-z0-9_-]{20,})\b"
    ),
    "token": re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
}
_CARD = re.compile(r"(?<!\d)(?:\d[ -]?){12,18}\d(?!\d)")


def find_secrets(text: str) -> list[str]:
    """Kinds of secrets that a text seems to hold: keys, tokens, card numbers with a valid checksum.

    Example:
        >>> find_secrets("my card is 4111 1111 1111 1111"), find_secrets("call 4111 1111 1111 1112")
        (['card number'], [])
    """
    found = [name for name, pattern in _SECRETS.items() if pattern.search(text)]
    if any(_luhn(re.sub(r"\D", "", match[0])) for match in _CARD.finditer(text)):
        found.append("card number")
    return found


def _luhn(digits: str) -> bool:
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0 and len(set(digits)) > 1


def _now(at: datetime | None) -> datetime:
    if at is None:
        return datetime.now(UTC)
    check_time(at)
    return at


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return [str(part["text"]) for part in content if isinstance(part, dict) and "text" in part]
    return []


def _said(record: Record) -> str:
    return str(record.metadata.get("query") or record.text)


def _check_text(text: str) -> None:
    if len(text) > MAX_TEXT // 4 and len(text.encode("utf-8", "replace")) > MAX_TEXT:
        refuse("text", f"{len(text)} characters", "at most 1 MB; store it as a document with Memory.read")
    if "\x00" in text:
        refuse("text", "a NUL character", "give text, not a binary file")
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse("text", "half of a surrogate pair", "give valid Unicode")


def _check_query(query: str, k: int) -> None:
    if not query.strip():
        refuse("query", query, "give text that is not empty")
    _check_text(query)
    if not 1 <= k <= 1000:
        refuse("k", k, "between 1 and 1000")


async def _in_thread(fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    return await asyncio.to_thread(fn, *args, **kwargs)
