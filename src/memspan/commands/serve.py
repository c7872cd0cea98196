"""``memspan serve``: a memory behind any chat application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from memspan.base import optional, refuse
from memspan.commands._memory import (
    EMBEDDER,
    KEY_OF,
    LLM,
    POLICY,
    STORE,
    client_of,
    embedder_of,
    local_model,
    secret_of,
)

__all__ = ["serve"]


@click.command()
@STORE
@click.option(
    "--upstream",
    default="",
    help="OpenAI-compatible endpoint behind the proxy, e.g. http://127.0.0.1:8000/v1.",
)
@KEY_OF
@click.option("--local", is_flag=True, help="Answer by a small model on this machine (memspan[local]).")
@LLM
@POLICY
@EMBEDDER
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
    """Put a memory behind any chat application.

    An OpenAI-compatible proxy, REST, MCP and pages to look inside, on one port.
    """
    uvicorn = optional("uvicorn", extra="serve")
    optional("fastapi", extra="serve")
    from memspan.server.app import create_app
    from memspan.server.settings import Settings

    if keys is not None and not keys.exists():
        refuse("keys", str(keys), "no such file; make it with: memspan key NAME --file FILE")
    secret = secret_of(key_env)
    settings = Settings(store=store, upstream=upstream, upstream_key=secret, policy=policy, keys=keys, **more)
    app = create_app(
        settings,
        embedder=embedder_of(embedder, secret),
        llm=client_of(llm, secret),
        local=local_model() if local else None,
    )
    base = f"http://{settings.host if ':' not in settings.host else f'[{settings.host}]'}:{settings.port}"
    behind = upstream or ("the local model" if local else "nothing yet: set --upstream or --local")
    click.echo(
        f"chat    {base}/v1   (behind it: {behind})\npages   {base}/ui\nmcp     {base}/mcp\n", err=True
    )
    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning", server_header=False)
