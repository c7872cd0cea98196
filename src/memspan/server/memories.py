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
        line: users that may wait for the policy to think about what they said. The store itself marks what
            waits, so who finds no place is served by the next round, or after a restart.
    """

    def __init__(
        self, store: Store, policy: str | Policy = "memorybank", llm: Chat | None = None, line: int = 10_000
    ) -> None:
        self.store, self.llm = store, llm
        self.policy = Memory(store, "-", policy, llm=llm).policy
        self._handles: OrderedDict[str, Memory] = OrderedDict()
        self._turns: dict[str, asyncio.Lock] = {}
        self._touched: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._line: OrderedDict[str, None] = OrderedDict()
        self._most, self._woken = line, asyncio.Event()
        self._thinking = False

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

    @property
    def thinks_later(self) -> bool:
        """Whether the policy leaves turns to be thought about when their chat is over."""
        return bool(getattr(self.policy, "thinks_later", False))

    @property
    def waiting(self) -> int:
        """Users in the line."""
        return len(self._line)

    def later(self, user: str) -> bool:
        """Put a user into the line; False where it is full (the store knows what waits)."""
        if user not in self._line:
            if len(self._line) >= self._most:
                self._touched.add(user)
                return False
            self._line[user] = None
        self._woken.set()
        return True

    async def think(self) -> None:
        """Serve the line, one user at a time, beside their chats; first, what an earlier server left."""
        if not self.thinks_later:
            return
        for user in await to_thread.run_sync(self.store.users):
            self.later(user)
        while True:
            await self._woken.wait()
            await self._serve()

    async def _serve(self) -> None:
        self._thinking = True
        try:
            while self._line:
                user, _ = self._line.popitem(last=False)
                await self._condense(user)
        finally:
            self._thinking = False
            self._woken.clear()

    async def _condense(self, user: str) -> None:
        """Without the user's turn: a model may be slow, and chats go on."""
        task = asyncio.create_task(self.do(user, lambda memory: memory.condense()))
        self._tasks.add(task)
        task.add_done_callback(self._done)
        try:
            await asyncio.shield(task)
        except Exception as error:
            self._touched.add(user)
            log.warning("thinking about what a user said failed: %s", type(error).__name__)

    async def maintain(self, every: float) -> None:
        """Pending summaries of users that were written to, and expiry, again and again."""
        while True:
            await asyncio.sleep(every)
            await self.tidy()

    async def tidy(self) -> None:
        """One round of :meth:`maintain`; a failure is logged, without content, and tried again."""
        users, self._touched = self._touched, set()
        for user in users:
            await self._condense(user)
        await to_thread.run_sync(self.store.sweep_expired, datetime.now(UTC))

    async def finish(self, seconds: float = 10.0) -> None:
        """Wait for what is being written, and so long for the line; what is left of it waits in the store."""
        end = asyncio.get_running_loop().time() + seconds
        while (self._line or self._thinking) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        self._line.clear()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
