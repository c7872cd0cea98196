"""Counts for an operator's monitoring: numbers alone, never a user, a text or an id."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_DOORS = frozenset({"v1", "memories", "users", "mcp", "ui", "healthz", "metrics", "static", "openapi.json"})


class Metrics:
    """One server's counters, in a register of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "memspan_requests", "Requests", ["door", "method", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "memspan_request_seconds", "Seconds a request", ["door"], registry=self.registry
        )
        self._memory = Counter(
            "memspan_memory", "Memory work beside chats", ["work", "outcome"], registry=self.registry
        )
        self._bytes = Gauge("memspan_store_bytes", "Bytes held", ["category"], registry=self.registry)

    def request(self, door: str, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        door = door if door in _DOORS else "other"
        method = method if method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS") else "other"
        self._requests.labels(door, method, str(status)).inc()
        self._seconds.labels(door).observe(seconds)

    def memory(self, work: str, outcome: str) -> None:
        """Count a recall or a write beside a chat: ``ok`` or ``failed``."""
        self._memory.labels(work, outcome).inc()

    def text(self, held: dict[str, int]) -> bytes:
        """The register in Prometheus' text form."""
        for category, count in held.items():
            self._bytes.labels(category).set(count)
        return generate_latest(self.registry)
