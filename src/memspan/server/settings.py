"""What an operator sets, checked before anything is opened."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from memspan.base import refuse

__all__ = ["Settings", "is_loopback"]

_RATE = re.compile(r"\d+/(second|minute|hour|day)")


@dataclass(frozen=True)
class Settings:
    """How the server runs.

    Attributes:
        store: a file, ``sqlite:///path`` or a ``postgresql://`` address.
        upstream: base address of an OpenAI-compatible endpoint, such as ``http://127.0.0.1:8000/v1``; "" for
            none.
        upstream_key: bearer token for the upstream. Without it, and without keys of its own, the server
            passes the client's ``Authorization`` on.
        policy: ``memorybank``, ``tim`` or ``scm``.
        keys: file of API keys (``memspan key`` writes it); None serves one local user on loopback alone.
        user: that local user.
        host: address to listen on. Any but loopback needs ``keys``.
        port: port to listen on.
        hostnames: further names by which clients may address the server.
        rate: requests of one key, such as ``600/minute``; "" for no limit.
        max_body: longest request body, in bytes.
        recalled: memories put before a message at most.
        budget_tokens: tokens that they may take.
        timeout: for the upstream to begin its answer, in seconds.
        traces: keep how each reply came about; it is deleted with its user.
        maintenance: seconds between two rounds of pending summaries and expiry; 0 for none.
        drain: seconds that a server which ends gives to thoughts that wait; the rest waits in the store.

    Raises:
        BadInput: an address without a key, an upstream that is no address, or numbers out of range.

    Example:
        >>> Settings(host="0.0.0.0")
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: host='0.0.0.0': other machines could read the memories; set keys, or
        listen on 127.0.0.1
    """

    store: str = "memory.db"
    upstream: str = ""
    upstream_key: str = field(default="", repr=False)
    policy: str = "memorybank"
    keys: Path | None = None
    user: str = "me"
    host: str = "127.0.0.1"
    port: int = 8765
    hostnames: tuple[str, ...] = ()
    rate: str = "600/minute"
    max_body: int = 32 << 20
    recalled: int = 6
    budget_tokens: int = 1500
    timeout: float = 600.0
    traces: bool = True
    maintenance: float = 600.0
    drain: float = 10.0

    def __post_init__(self) -> None:
        if self.keys is None and not is_loopback(self.host):
            refuse(
                "host", self.host, "other machines could read the memories; set keys, or listen on 127.0.0.1"
            )
        if self.upstream and not re.match(r"https?://[^/\s]", self.upstream):
            refuse("upstream", self.upstream, "give an address such as http://127.0.0.1:8000/v1")
        if self.rate and not _RATE.fullmatch(self.rate):
            refuse("rate", self.rate, "give a number per second, minute, hour or day, such as 600/minute")
        if not 0 < self.port < 65536:
            refuse("port", self.port, "between 1 and 65535")
        for name in ("max_body", "recalled", "budget_tokens", "timeout"):
            if getattr(self, name) <= 0:
                refuse(name, getattr(self, name), "more than 0")
        for name in ("maintenance", "drain"):
            if getattr(self, name) < 0:
                refuse(name, getattr(self, name), "0 or more seconds")


def is_loopback(host: str) -> bool:
    """Whether an address is this machine alone.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
        (True, True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
