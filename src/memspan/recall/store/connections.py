"""Connections: a few, shared by all threads, one transaction at a time in each.

A thread that works on the store takes a connection for its outermost transaction and gives it back behind
it, so that no connection outlives the work of a thread and no burst of threads opens more than the bound.
Writers of one process stand in a line of their own: the database's own waiting (asking again and again) lets
the late pass the early.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from memspan.recall.store.interface import StoreBusy

__all__ = ["Held", "Line", "Pool"]


class Held(threading.local):
    """What this thread holds: a connection, and how deep it stands in its transaction.

    Attributes:
        connection: None outside a transaction.
        depth: writing transactions around this point; 0 while only reading.
        dirty: something was written that others cannot see yet.
        private: arrays by owner, of a transaction that is dirty.
        removed: owners whose rows were removed for good.
        user: whom the database is told to act for (Postgres).
    """

    connection: Any = None
    depth: int = 0
    dirty: bool = False
    user: Any = None

    def __init__(self) -> None:
        self.private: dict[int, Any] = {}
        self.removed: set[int] = set()


class Pool:
    """At most ``most`` connections.

    Args:
        connect: opens one.
        most: in all.
        seconds: that a thread waits for one.
        alive: whether one may be used again.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        most: int,
        seconds: float,
        alive: Callable[[Any], bool] = lambda connection: True,
    ) -> None:
        self._connect, self._seconds, self._alive = connect, seconds, alive
        self._places = threading.BoundedSemaphore(most)
        self._lock, self._pid = threading.Lock(), os.getpid()
        self._idle: list[Any] = []

    @contextlib.contextmanager
    def lease(self) -> Iterator[Any]:
        """A connection, for as long as the block lasts.

        Raises:
            StoreBusy: all are taken for longer than a thread waits.
        """
        if not self._places.acquire(timeout=self._seconds):
            raise StoreBusy(f"all connections were taken for {self._seconds} s; try again")
        try:
            with self._lock:
                if self._pid != os.getpid():  # a fork must not share its parent's connections
                    self._idle, self._pid = [], os.getpid()
                connection = self._idle.pop() if self._idle else None
            connection = connection or self._connect()
            try:
                yield connection
            finally:
                if self._alive(connection):
                    with self._lock:
                        self._idle.append(connection)
                else:
                    connection.close()
        finally:
            self._places.release()

    def close(self) -> None:
        """Close what nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


class Line:
    """Who comes first writes first.

    Args:
        seconds: that a thread waits.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._guard = seconds, threading.Lock()
        self._taken, self._waiting = False, list[threading.Event]()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for one's turn.

        Raises:
            StoreBusy: it did not come in time.
        """
        mine = threading.Event()
        with self._guard:
            if self._taken:
                self._waiting.append(mine)
            else:
                self._taken = True
                mine.set()
        if not mine.wait(self._seconds):
            with self._guard:
                if not mine.is_set():
                    self._waiting.remove(mine)
                    raise StoreBusy(f"other writers held the store for {self._seconds} s; try again")
        try:
            yield
        finally:
            with self._guard:
                if self._waiting:
                    self._waiting.pop(0).set()
                else:
                    self._taken = False
