"""Killed from outside (kill -9) amid a long job: what was done stays done, and no half is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from memspan.data import HashingEmbedder
from memspan.recall.chat import ChatClient
from memspan.recall.memorybank import MemoryBankPolicy
from memspan.recall.scm import SummarizeLong
from memspan.recall.store import SQLiteStore
from memspan.recall.summarize import ExtractiveSummarizer
from recall.scripted_server import Answer, ScriptedServer

BOOK = " ".join(f"Chapter {i} tells that the key number {i} is made of metal {i * 7}." for i in range(40))
PATHS = [path for path in sys.path if path]

SUMMARIZE = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from memspan.recall.chat import ChatClient
from memspan.recall.scm import SummarizeLong
job = SummarizeLong(ChatClient({url!r}, "scripted", retries=0), 150, 100, chunk_summary_tokens=60)
job.run(Path({book!r}))
"""


def said(body: Any) -> str:
    return f"Chapter {str(body['messages'][-1]['content']).split('Chapter ')[-1][:3]} and a key."


class Held:
    """Answers until the call with this number, which waits for ever: the place of the kill."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0
        self.reached, self.never = threading.Event(), threading.Event()

    def __call__(self, body: Any) -> Answer | str:
        self.calls += 1
        if self.calls < self.number:
            return said(body)
        self.reached.set()
        return Answer("too late", wait=self.never)


def kill_when(reached: threading.Event, script: Path) -> None:
    process = subprocess.Popen([sys.executable, str(script)])
    assert reached.wait(120)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL


def test_a_long_summary_that_was_killed_makes_exactly_the_missing_calls(tmp_path: Path) -> None:
    book, script = tmp_path / "book.txt", tmp_path / "job.py"
    book.write_text(BOOK)

    def job(server: ScriptedServer) -> SummarizeLong:
        return SummarizeLong(ChatClient(server.url, "scripted", retries=0), 150, 100, chunk_summary_tokens=60)

    with ScriptedServer(said) as server:
        whole = job(server).run(BOOK)
        every = len(server)
    held = Held(4)
    with ScriptedServer(held) as server:
        script.write_text(SUMMARIZE.format(path=PATHS, url=server.url, book=str(book)))
        kill_when(held.reached, script)
        held.never.set()
    with ScriptedServer(said) as server:
        resumed = job(server).run(book)
        assert len(server) == every - 3
    assert (resumed.text, resumed.levels, resumed.chunks) == (whole.text, whole.levels, whole.chunks)


CONDENSE = """
import sys
sys.path[:0] = {path!r}
from datetime import datetime, timezone
from memspan.data import HashingEmbedder
from memspan.recall.chat import ChatClient
from memspan.recall.memorybank import MemoryBankPolicy
from memspan.recall.store import SQLiteStore
from memspan.recall.summarize import LLMSummarizer
user = SQLiteStore({store!r}, HashingEmbedder(32)).for_user("emily")
policy = MemoryBankPolicy(summarizer=LLMSummarizer(ChatClient({url!r}, "scripted", retries=0)))
policy.condense(user, datetime(2023, 6, 1, tzinfo=timezone.utc))
"""

SWEEP = """
import sys
sys.path[:0] = {path!r}
from datetime import datetime, timezone
from memspan.data import HashingEmbedder
from memspan.recall.memorybank import MemoryBankPolicy, days
from memspan.recall.store import SQLiteStore
user = SQLiteStore({store!r}, HashingEmbedder(32)).for_user("emily")
policy = MemoryBankPolicy(time_scale=days(1), mode="threshold", salt="s")
erase = user.erase
def told(ids, **more):
    erase(ids, **more)
    print("one", flush=True)
user.erase = told
policy.forget(user, datetime(2023, 6, 1, tzinfo=timezone.utc))
"""


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    store = SQLiteStore(tmp_path / "m.db", HashingEmbedder(32))
    user, policy = store.for_user("emily"), MemoryBankPolicy()
    for day in range(4):
        for number in range(60):
            at = datetime(2023, 5, 1 + day, 9, tzinfo=UTC) + timedelta(minutes=number)
            policy.observe(user, [{"role": "user", "content": f"day {day} word{number}"}], at)
    store.close()
    return tmp_path / "m.db"


def test_a_kill_while_days_are_summarised_keeps_turns_and_whole_summaries(
    filled: Path, tmp_path: Path
) -> None:
    script, held = tmp_path / "job.py", Held(3)
    with ScriptedServer(held) as server:
        script.write_text(CONDENSE.format(path=PATHS, url=server.url, store=str(filled)))
        kill_when(held.reached, script)
        held.never.set()
    store = SQLiteStore(filled, HashingEmbedder(32))
    user = store.for_user("emily")
    assert store.check() == []
    assert user.count(kinds=("turn",)) == 240
    done = [one.metadata["day"] for one in user.iterate(kinds=("summary",))]
    assert done == ["2023-05-01", "2023-05-02"]
    again = MemoryBankPolicy(summarizer=ExtractiveSummarizer(HashingEmbedder(32)))
    again.condense(user, datetime(2023, 6, 1, tzinfo=UTC))
    days = sorted(one.metadata["day"] for one in user.iterate(kinds=("summary",)) if one.metadata.get("day"))
    assert days == ["2023-05-01", "2023-05-02", "2023-05-03", "2023-05-04"]
    store.close()


def test_a_kill_in_a_sweep_leaves_all_or_none_of_it(filled: Path, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(SWEEP.format(path=PATHS, store=str(filled)))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        assert process.stdout.readline() == "one\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    store = SQLiteStore(filled, HashingEmbedder(32))
    user = store.for_user("emily")
    assert store.check() == []
    gone = len(list(user.iterate(states=("deleted",))))
    assert (gone, user.count()) in ((0, 240), (240, 0))
    store.close()
