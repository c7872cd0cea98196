"""API keys: who a caller is. Only digests are kept on disk; a key is shown once, when it is made."""

from __future__ import annotations

import hashlib
import json
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memspan.base import refuse
from memspan.base.files import CorruptFile, atomic_write

__all__ = ["Caller", "KeyRing"]

_PREFIX = "msk_"


@dataclass(frozen=True)
class Caller:
    """Who is asking.

    Attributes:
        user: whose memories the call reaches.
        trusted: may act for other users (header ``X-Memspan-User``), list them and read the metrics.
        id: of the key, for rate limits and logs: the first digits of its digest, never the key.
    """

    user: str
    trusted: bool = False
    id: str = "local"


class KeyRing:
    """Keys in a JSON file of digests.

    Args:
        path: the file; an absent one holds no key.

    Raises:
        CorruptFile: the file is not a list of keys.

    Example:
        >>> import tempfile
        >>> ring = KeyRing(Path(tempfile.mkdtemp()) / "keys.json")
        >>> token = ring.add("emily")
        >>> ring.find(token).user, ring.find("msk_guess")
        ('emily', None)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._callers: dict[str, Caller] = {}
        self._seen: tuple[int, ...] = ()
        self._load()

    def __len__(self) -> int:
        return len(self._callers)

    def add(self, user: str, trusted: bool = False) -> str:
        """Make a key for a user; the only time that it is seen.

        Args:
            user: whose memories it opens.
            trusted: it may act for other users: for a server of your own, not for a person.

        Returns:
            The key.

        Raises:
            BadInput: an empty user, or one of more than 256 bytes.
        """
        if not user or len(user.encode()) > 256:
            refuse("user", user, "give 1 to 256 bytes")
        self._load()
        token = _PREFIX + secrets.token_urlsafe(32)
        digest = _digest(token)
        self._callers[digest] = Caller(user, trusted, digest[:12])
        self._write()
        return token

    def remove(self, id: str) -> Caller:
        """Take a key back by its id.

        Raises:
            BadInput: no such key.
        """
        self._load()
        for digest, caller in self._callers.items():
            if caller.id == id:
                del self._callers[digest]
                self._write()
                return caller
        refuse("id", id, f"choose from {', '.join(caller.id for caller in self.callers()) or 'none'}")

    def callers(self) -> list[Caller]:
        """All callers, without their keys."""
        return list(self._callers.values())

    def find(self, token: str) -> Caller | None:
        """The caller of a key; looking up a digest tells nothing about other keys by its time.

        A key that another process made or took back counts from the next call on.
        """
        with suppress(CorruptFile):  # half a file of somebody's editor: what was known holds on
            self._load()
        return self._callers.get(_digest(token)) if token.startswith(_PREFIX) else None

    def holds(self, id: str) -> bool:
        """Whether a key of this id is still there."""
        with suppress(CorruptFile):
            self._load()
        return any(caller.id == id for caller in self._callers.values())

    def _load(self) -> None:
        """Read the file where it is not the one that was read last."""
        try:
            now = self.path.stat()
        except FileNotFoundError:
            self._callers, self._seen = {}, ()
            return
        seen = (now.st_mtime_ns, now.st_size, now.st_ino)
        if seen != self._seen:
            entries = _read(self.path)
            self._callers = {
                entry["sha256"]: Caller(entry["user"], entry["trusted"], entry["sha256"][:12])
                for entry in entries
            }
            self._seen = seen

    def _write(self) -> None:
        entries = [
            {"sha256": digest, "user": caller.user, "trusted": caller.trusted}
            for digest, caller in self._callers.items()
        ]
        atomic_write(self.path, json.dumps(entries, indent=1, ensure_ascii=False))
        self.path.chmod(0o600)


def _digest(token: str) -> str:
    # The key has 256 random bits, so a fast digest cannot be guessed back.
    return hashlib.sha256(token.encode()).hexdigest()


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text("utf-8"))
        for entry in entries:
            if not (
                isinstance(entry["user"], str)
                and isinstance(entry["trusted"], bool)
                and len(bytes.fromhex(entry["sha256"])) == 32
            ):
                raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path} is no file of keys; make one with: memspan key USER --file NEW") from error
    return list(entries)
