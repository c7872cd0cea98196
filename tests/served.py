"""A running ``memspan serve`` on a loopback port, for tests that speak to it with real clients."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from memspan.data import HashingEmbedder
from memspan.server.app import create_app
from memspan.server.keys import KeyRing
from memspan.server.settings import Settings


class Served:
    """The server in a thread; a context manager.

    Args:
        folder: of the store and the keys.
        users: names that get a key; none: one local user.
        trusted: a name that gets a trusted key.
        app: arguments of ``create_app``.
        settings: of the server.
    """

    def __init__(
        self,
        folder: Path,
        users: tuple[str, ...] = (),
        trusted: str = "",
        app: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.keys: dict[str, str] = {}
        if users or trusted:
            ring = KeyRing(folder / "keys.json")
            self.keys = {user: ring.add(user) for user in users}
            if trusted:
                self.keys[trusted] = ring.add(trusted, trusted=True)
            settings["keys"] = folder / "keys.json"
        self.settings = Settings(
            store=str(folder / "memory.db"), port=self.port, **{"rate": "", "maintenance": 0, **settings}
        )
        self.app = create_app(self.settings, **{"embedder": HashingEmbedder(64), **(app or {})})
        config = uvicorn.Config(self.app, log_level="critical", timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> Served:
        self._socket.listen()  # connections queue from here on: nothing has to wait for the thread
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
        self._socket.close()

    def client(self, user: str = "", **headers: str) -> httpx.Client:
        """An HTTP client with a user's key."""
        if user:
            headers["Authorization"] = f"Bearer {self.keys[user]}"
        return httpx.Client(base_url=self.base, headers=headers, timeout=30, trust_env=False)
