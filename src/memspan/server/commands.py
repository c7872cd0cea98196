"""``memspan serve | key | mcp | chat``: the server and its companions on the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from memspan.base import optional, refuse

if TYPE_CHECKING:
    from memspan.data.embed import Embedder
    from memspan.recall.chat import Chat

__all__ = ["COMMANDS", "chat", "key", "mcp", "serve"]

_STORE = click.option(
    "--store", default="memory.db", show_default=True, help="A file, or postgresql://... for many servers."
)
_POLICY = click.option(
    "--policy", type=click.Choice(["memorybank", "tim", "scm"]), default="memorybank", show_default=True,
    help="What is kept, recalled and forgotten.",
)  # fmt: skip
_EMBEDDER = click.option(
    "--embedder", default="auto", show_default=True,
    help="auto (MiniLM where installed, else hashing), minilm, hashing, or URL#MODEL of an endpoint.",
)  # fmt: skip
_LLM = click.option(
    "--llm",
    help="URL#MODEL of an OpenAI-compatible endpoint that writes summaries and facts; none: rules do.",
)
_KEY_OF = click.option(
    "--upstream-key-env",
    "key_env",
    metavar="NAME",
    help="Environment variable that holds the endpoints' key.",
)


@click.command()
@_STORE
@click.option(
    "--upstream",
    default="",
    help="OpenAI-compatible endpoint behind the proxy, e.g. http://127.0.0.1:8000/v1.",
)
@_KEY_OF
@click.option("--local", is_flag=True, help="Answer by a small model on this machine (memspan[local]).")
@_LLM
@_POLICY
@_EMBEDDER
@click.option(
    "--keys", type=click.Path(path_type=Path, dir_okay=False), help="File of API keys (see memspan key)."
)
@click.option("--user", default="me", show_default=True, help="The one user, where no keys are set.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need --keys."
)
@click.option("--port", default=8765, show_default=True, help="Port to listen on.")
@click.option(
    "--hostname", "hostnames", multiple=True, help="A further name of this server; may be repeated."
)
@click.option("--rate", default="600/minute", show_default=True, help="Requests of one key; '' for no limit.")
@click.option("--recalled", default=6, show_default=True, help="Memories put before a message at most.")
@click.option("--budget-tokens", default=1500, show_default=True, help="Tokens that they may take.")
@click.option("--traces/--no-traces", default=True, show_default=True, help="Keep how each reply came about.")
def serve(
    store: str,
    upstream: str,
    key_env: str | None,
    local: bool,
    llm: str | None,
    policy: str,
    embedder: str,
    keys: Path | None,
    **more: Any,
) -> None:
    """Put a memory behind any chat application: proxy, REST, MCP and pages on one port."""
    uvicorn = optional("uvicorn", extra="serve")
    optional("fastapi", extra="serve")
    from memspan.server.app import create_app
    from memspan.server.settings import Settings

    if keys is not None and not keys.exists():
        refuse("keys", str(keys), "no such file; make it with: memspan key NAME --file FILE")
    secret = _key(key_env)
    settings = Settings(store=store, upstream=upstream, upstream_key=secret, policy=policy, keys=keys, **more)
    app = create_app(
        settings,
        embedder=_embedder(embedder, secret),
        llm=_client(llm, secret),
        local=_local() if local else None,
    )
    base = f"http://{settings.host if ':' not in settings.host else f'[{settings.host}]'}:{settings.port}"
    behind = upstream or ("the local model" if local else "nothing yet: set --upstream or --local")
    click.echo(
        f"chat    {base}/v1   (behind it: {behind})\npages   {base}/ui\nmcp     {base}/mcp\n", err=True
    )
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning", server_header=False)


@click.command()
@click.argument("user", required=False)
@click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("keys.json"),
    show_default=True,
    help="File of keys.",
)
@click.option(
    "--trusted", is_flag=True, help="It may act for any user: for a server of your own, not for a person."
)
@click.option("--remove", metavar="ID", help="Take a key back.")
def key(user: str | None, path: Path, trusted: bool, remove: str | None) -> None:
    """Make an API key for USER and show it once; without USER, list the keys."""
    from memspan.server.keys import KeyRing

    ring = KeyRing(path)
    if remove is not None:
        click.echo(f"removed the key of {ring.remove(remove).user}; restart the server")
    elif user is None:
        for caller in ring.callers():
            click.echo(f"{caller.id}  {caller.user}{'  trusted' if caller.trusted else ''}")
    else:
        click.echo(ring.add(user, trusted))
        click.echo(f"kept as a digest in {path}; it is not shown again", err=True)


@click.command()
@_STORE
@click.option("--user", default="me", show_default=True, help="Whose memories this connection reaches.")
@_POLICY
@_EMBEDDER
@_LLM
@_KEY_OF
def mcp(store: str, user: str, policy: str, embedder: str, llm: str | None, key_env: str | None) -> None:
    """Serve one user's memory to an agent over MCP on stdin and stdout."""
    optional("mcp", extra="serve")
    from memspan.recall.memory import default_embedder
    from memspan.recall.store import open_store
    from memspan.server.memories import Memories
    from memspan.server.tools import make_mcp

    secret = _key(key_env)
    opened = open_store(store, _embedder(embedder, secret) or default_embedder())
    try:
        memories = Memories(opened, policy, _client(llm, secret))
        memories.of(user)  # a bad name is refused here
        make_mcp(memories, lambda ctx: user).run("stdio")
    finally:
        opened.close()


@click.command()
@_STORE
@click.option("--user", default="me", show_default=True, help="Whose memory it is.")
@click.option(
    "--model", "endpoint", metavar="URL#MODEL", help="OpenAI-compatible endpoint; none: a small local model."
)
@_KEY_OF
@_POLICY
@_EMBEDDER
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
    """Chat in the terminal with a companion that remembers; /help lists what it can do."""
    from memspan.recall.memory import Memory
    from memspan.server.companion import talk

    secret = _key(key_env)
    client = _client(endpoint, secret) or _local()
    with Memory(store, user, policy, _embedder(embedder, secret)) as memory:
        talk(memory, client, recalled)


COMMANDS = (serve, key, mcp, chat)


def _key(name: str | None) -> str:
    if name is None:
        return ""
    if not os.environ.get(name):
        refuse("upstream-key-env", name, "this environment variable is not set")
    return os.environ[name]


def _client(address: str | None, secret: str) -> Chat | None:
    if not address:
        return None
    url, _, model = address.rpartition("#")
    if not url or not model:
        refuse("llm", address, "give URL#MODEL, such as http://127.0.0.1:8000/v1#my-model")
    from memspan.recall.chat import ChatClient

    return ChatClient(url, model, api_key=secret)


def _embedder(name: str, secret: str) -> Embedder | None:
    from memspan.data.embed import HashingEmbedder, MiniLMEmbedder

    if name == "auto":
        return None
    if name == "hashing":
        return HashingEmbedder()
    if name == "minilm":
        return MiniLMEmbedder()
    url, _, model = name.rpartition("#")
    if not url or not model:
        refuse("embedder", name, "use auto, minilm, hashing, or URL#MODEL")
    from memspan.recall.chat import OpenAIEmbedder

    return OpenAIEmbedder(url, model, api_key=secret)


def _local() -> Chat:
    from memspan.recall.chat import LocalChat

    return LocalChat()
