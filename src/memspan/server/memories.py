"""The memories of all users behind one server: handles by user, one writer a user, work that can wait."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from anyio import to_thread

from memspan.recall.chat import Chat
from memspan.recall.memory import Memory
from memspan.recall.records import Policy
from memspan.recall.store import Store

__all__ = ["Memories"]

T = TypeVar("T")
_HANDLES = 1024  # of users kept at hand; a handle is small and made again at once

log = logging.getLogger("memspan.server")


class Memories:
    """Gives each user's :class:`~memspan.recall.memory.Memory`; blocking work runs in threads.

    Args:
        store: of all users.
        policy: a name or a policy; it holds no state of a user.
        llm: for the policy's writing; None calls no model.
    """

    def __init__(self, store: Store, policy: str | Policy = "memorybank", llm: Chat | None = None) -> None:
        self.store, self.llm = store, llm
        self.policy = Memory(store, "-", policy, llm=llm).policy
        self._handles: OrderedDict[str, Memory] = OrderedDict()
        self._turns: dict[str, asyncio.Lock] = {}
        self._touched: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    def of(self, user: str) -> Memory:
        """One user's memory.

        Raises:
            BadInput: an empty user, or one of more than 256 bytes.
        """
        if user not in self._handles:
            self._handles[user] = Memory(self.store, user, self.policy, llm=self.llm)
            while len(self._handles) > _HANDLES:
                self._handles.popitem(last=False)
        self._handles.move_to_end(user)
        return self._handles[user]

    async def do(self, user: str, work: Callable[[Memory], T]) -> T:
        """Run work on a user's memory in a thread."""
        return await to_thread.run_sync(work, self.of(user))

    async def write(self, user: str, work: Callable[[Memory], T]) -> T:
        """As :meth:`do`, one at a time a user, in their order; it ends even if its caller goes."""
        task = asyncio.create_task(self._in_turn(user, work))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        self._touched.add(user)
        return await asyncio.shield(task)

    async def _in_turn(self, user: str, work: Callable[[Memory], T]) -> T:
        async with self._turns.setdefault(user, asyncio.Lock()):
            return await self.do(user, work)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen, even if the caller has gone

    async def maintain(self, every: float) -> None:
        """Pending summaries of users that were written to, and expiry, again and again."""
        while True:
            await asyncio.sleep(every)
            await self.tidy()

    async def tidy(self) -> None:
        """One round of :meth:`maintain`; a failure is logged, without content, and tried again."""
        users, self._touched = self._touched, set()
        for user in users:
            try:
                await self._in_turn(user, lambda memory: memory.condense())
            except Exception as error:
                self._touched.add(user)
                log.warning("a user's pending summaries failed: %s", type(error).__name__)
        await to_thread.run_sync(self.store.sweep_expired, datetime.now(UTC))

    async def finish(self) -> None:
        """Wait for what is being written."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
