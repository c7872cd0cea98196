"""``memspan key``, ``serve`` and ``chat`` as a person types them."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from rich.console import Console

from memspan.base import BadInput
from memspan.commands.key import key
from memspan.commands.mcp import mcp
from memspan.commands.serve import serve
from memspan.data import HashingEmbedder
from memspan.recall import Memory
from memspan.recall.chat import ChatClient
from memspan.server.companion import talk
from recall.scripted_server import Answer, ScriptedServer


def test_a_key_is_shown_once_listed_without_itself_and_removed(tmp_path: Path) -> None:
    file = ["--file", str(tmp_path / "keys.json")]
    made = CliRunner().invoke(key, ["emily", *file])
    token = made.stdout.strip()
    assert token.startswith("msk_")
    listed = CliRunner().invoke(key, file).stdout
    assert "emily" in listed
    assert token not in listed
    id = listed.split()[0]
    assert "removed the key of emily" in CliRunner().invoke(key, ["--remove", id, *file]).stdout
    assert CliRunner().invoke(key, file).stdout == ""


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        (serve, ["--host", "0.0.0.0"], "set keys"),
        (serve, ["--keys", "none.json"], "memspan key"),
        (serve, ["--upstream", "nowhere"], "give an address"),
        (serve, ["--upstream-key-env", "MEMSPAN_NO_SUCH_KEY"], "not set"),
        (serve, ["--embedder", "what"], "URL#MODEL"),
        (mcp, ["--user", "", "--embedder", "hashing"], "user"),
    ],
)
def test_what_would_not_work_is_refused_before_anything_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: object, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command, arguments)  # type: ignore[arg-type]
    assert isinstance(result.exception, BadInput)
    assert told in str(result.exception)


@pytest.mark.slow
def test_a_server_that_is_killed_has_lost_nothing_that_it_acknowledged(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "memspan", "serve", "--embedder", "hashing", "--rate", ""]
    more = ["--store", str(tmp_path / "me.db"), "--port", str(port)]
    transport = httpx.HTTPTransport(retries=40)  # waits for the port with a growing pause
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=60) as http:
        kept: list[str] = []
        for start in range(2):
            process = subprocess.Popen([*command, *more], env={**os.environ, "OMP_NUM_THREADS": "1"})
            try:
                while True:
                    try:
                        http.get("/healthz")
                        break
                    except httpx.ConnectError:
                        assert process.poll() is None
                found = http.get("/memories", params={"limit": 500}).json()["memories"]
                assert [one["id"] for one in found] == kept
                for i in range(20):
                    kept += http.post("/memories", json={"text": f"note {start} {i}"}).json()["ids"]
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()


def _lines(*lines: str) -> Callable[[str], str]:
    rest = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read


def test_the_companion_remembers_explains_and_forgets(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, color_system=None)
    with (
        ScriptedServer(lambda body: Answer("[bold]noted[/]")) as model,
        Memory(tmp_path / "me.db", "emily", embedder=HashingEmbedder(64)) as memory,
    ):
        client = ChatClient(model.url, "scripted")
        talk(
            memory,
            client,
            read=_lines("My cat is called Tom", "what is my cat called?", "/used"),
            console=console,
        )
        assert "[bold]noted[/]" in out.getvalue()  # what a model says is never markup
        assert "Tom" in str(model.calls[-1].body["messages"])
        (first, *_) = [record.id for record in memory.store.iterate(kinds=["turn"])]
        asked = (
            "/memories",
            f"/why {first[-8:]}",
            "/search cat",
            f"/forget {first}",
            f"/undo {first}",
            "/what",
        )
        talk(memory, client, read=_lines(*asked), console=console)
        told = out.getvalue()
        assert "strength" in told
        assert "forgotten" in told
        assert "it is back" in told
        assert "/forget-me" in told
        talk(
            memory, client, read=_lines("/forget-me", "bob", "/forget-me", "emily", "/quit"), console=console
        )
        assert "nothing was erased" in out.getvalue()
        assert memory.store.count() == 0


def test_a_model_that_fails_ends_neither_the_talk_nor_the_memory(tmp_path: Path) -> None:
    out = io.StringIO()
    with (
        ScriptedServer(Answer(status=400)) as model,
        Memory(tmp_path / "me.db", "emily", embedder=HashingEmbedder(64)) as memory,
    ):
        client = ChatClient(model.url, "scripted", retries=0)
        talk(memory, client, read=_lines("hello", "/memories"), console=Console(file=out, color_system=None))
    assert "400" in out.getvalue()
