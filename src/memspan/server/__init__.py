"""``memspan serve``: one memory behind any chat application, through three doors and a page.

- **OpenAI-compatible proxy** (``/v1/chat/completions``, ``/v1/embeddings``, ``/v1/models``): change one base
  URL, and the model remembers each user. What the memory does not concern passes through byte for byte.
- **REST** (``/memories``, ``/users``; OpenAPI at ``/openapi.json``): look, search, edit, explain, export,
  delete.
- **MCP** (``/mcp`` over HTTP, or ``memspan mcp`` on stdio): the same for agents.
- **Pages** (``/ui``): timeline, search with every part of a score, forgetting curve, what is fading, undo,
  export.

The user is bound by the API key, or is the one local user where no keys are set: never by the body of a
request. Nothing leaves the machine but what goes to the upstream that was configured; there is no telemetry.
The threat model is in ``docs/serve.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memspan.server.app import create_app
    from memspan.server.settings import Settings

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> object:
    if name == "create_app":
        from memspan.server.app import create_app

        return create_app
    if name == "Settings":
        from memspan.server.settings import Settings

        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
