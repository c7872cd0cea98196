"""A companion in the terminal: it remembers what you say, and shows what it knows and why."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memspan.base import BadInput
from memspan.recall.chat import Chat, ChatFailed
from memspan.recall.memory import Memory
from memspan.recall.records import Message

__all__ = ["talk"]

_HELP = """/memories [N]     the newest memories
/search WORDS     what a question would recall, with scores
/used             the memories that the last reply was given
/why ID           why a memory stands where it stands
/forget ID        forget one (undo: /undo ID)
/forget-me        erase everything of yours, for good
/quit             leave; what was said is kept"""
_HISTORY = 12  # messages of this sitting that go along


def talk(
    memory: Memory,
    client: Chat,
    recalled: int = 6,
    *,
    read: Callable[[str], str] = input,
    console: Console | None = None,
) -> None:
    """Talk until the user leaves.

    Args:
        memory: of the user.
        client: the model.
        recalled: memories put before a message at most.
        read: asks for a line; ends the talk by ``EOFError``.
        console: where to write.
    """
    out = console or Console()
    out.print(f"[bold]{escape(client.model)}[/] remembers for [bold]{escape(memory.user)}[/]; /help")
    history: list[Message] = []
    ids: dict[str, str] = {}  # short forms shown so far
    while True:
        try:
            line = read("you  ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if not line:
            continue
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            try:
                _command(memory, line, out, ids, read)
            except BadInput as error:
                out.print(f"[red]{escape(str(error))}[/]")
            continue
        history = [*history, Message(role="user", content=line)][-_HISTORY:]
        reply = ""
        out.print("[dim]···[/]  ", end="")
        try:
            for piece in memory.stream(client, history, recalled):
                out.print(escape(piece), end="", highlight=False, soft_wrap=True)
                reply += piece
        except KeyboardInterrupt:
            out.print(" [dim](stopped)[/]", end="")
        except ChatFailed as error:
            out.print(f"[red]{escape(str(error))}[/]", end="")
        out.print()
        if reply:
            history.append(Message(role="assistant", content=reply))
        else:
            history.pop()


def _command(
    memory: Memory, line: str, out: Console, ids: dict[str, str], read: Callable[[str], str]
) -> None:
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/memories":
        count = int(rest) if rest.isdigit() else 10
        found = memory.store.iterate(limit=count, newest_first=True)
        _list(out, ids, [(r.id, r.kind, r.text, "") for r in found if r.kind != "trace"])
    elif name == "/search" and rest:
        hits = memory.recall(rest, 10)
        _list(out, ids, [(h.record.id, h.record.kind, h.record.text, f"{h.score:.3f}") for h in hits])
    elif name == "/used":
        _list(out, ids, [(r.id, r.kind, r.text, "") for r in memory.store.get(memory.last_used)])
    elif name == "/why" and rest:
        for part, value in memory.why(_full(ids, rest)).items():
            out.print(
                f"  {escape(part)}: {escape(f'{value:.4g}' if isinstance(value, float) else str(value))}"
            )
    elif name == "/forget" and rest:
        gone = memory.forget(_full(ids, rest))
        out.print("forgotten; /undo brings it back" if gone else "no such memory")
    elif name == "/undo" and rest:
        out.print("it is back" if memory.undo(_full(ids, rest)) else "nothing to bring back")
    elif name == "/forget-me":
        if read(f"type {memory.user!r} to erase everything: ").strip() == memory.user:
            out.print(f"erased {memory.forget_me()} records")
        else:
            out.print("nothing was erased")
    else:
        out.print(escape(_HELP))


def _list(out: Console, ids: dict[str, str], rows: list[tuple[str, str, str, str]]) -> None:
    if not rows:
        out.print("[dim]nothing[/]")
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for id, kind, text, score in rows:
        ids[id[-8:].lower()] = id
        table.add_row(f"[dim]{id[-8:]}[/]", kind, escape(text[:200].replace("\n", " ")), score)
    out.print(table)


def _full(ids: dict[str, str], short: str) -> str:
    return ids.get(short.lower(), short)
