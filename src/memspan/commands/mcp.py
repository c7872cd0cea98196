"""``memspan mcp``: one user's memory, for an agent."""

from __future__ import annotations

import click

from memspan.base import optional
from memspan.commands._memory import EMBEDDER, KEY_OF, LLM, POLICY, STORE, client_of, embedder_of, secret_of

__all__ = ["mcp"]


@click.command()
@STORE
@click.option("--user", default="me", show_default=True, help="Whose memories this connection reaches.")
@POLICY
@EMBEDDER
@LLM
@KEY_OF
def mcp(store: str, user: str, policy: str, embedder: str, llm: str | None, key_env: str | None) -> None:
    """Serve one user's memory to an agent over MCP on stdin and stdout."""
    optional("mcp", extra="serve")
    from memspan.recall.memory import default_embedder
    from memspan.recall.store import open_store
    from memspan.server.memories import Memories
    from memspan.server.tools import make_mcp

    secret = secret_of(key_env)
    opened = open_store(store, embedder_of(embedder, secret) or default_embedder())
    try:
        memories = Memories(opened, policy, client_of(llm, secret))
        memories.of(user)  # a bad name is refused here
        make_mcp(memories, lambda ctx: user).run("stdio")
    finally:
        opened.close()
