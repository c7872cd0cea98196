"""``memspan chat``: a companion in the terminal that remembers."""

from __future__ import annotations

import click

from memspan.commands._memory import (
    EMBEDDER,
    KEY_OF,
    POLICY,
    STORE,
    client_of,
    embedder_of,
    local_model,
    secret_of,
)

__all__ = ["chat"]


@click.command()
@STORE
@click.option("--user", default="me", show_default=True, help="Whose memory it is.")
@click.option(
    "--model", "endpoint", metavar="URL#MODEL", help="OpenAI-compatible endpoint; none: a small local model."
)
@KEY_OF
@POLICY
@EMBEDDER
@click.option("--recalled", default=6, show_default=True, help="Memories put before a message at most.")
def chat(
    store: str,
    user: str,
    endpoint: str | None,
    key_env: str | None,
    policy: str,
    embedder: str,
    recalled: int,
) -> None:
    """Chat in the terminal with a companion that remembers.

    /help lists what it can do.
    """
    from memspan.recall.memory import Memory
    from memspan.server.companion import talk

    secret = secret_of(key_env)
    client = client_of(endpoint, secret) or local_model()
    with Memory(store, user, policy, embedder_of(embedder, secret)) as memory:
        talk(memory, client, recalled)
