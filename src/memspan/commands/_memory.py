"""What the commands of a memory ask alike: the store, the policy, the embedder, the models behind."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from memspan.base import refuse

if TYPE_CHECKING:
    from memspan.data.embed import Embedder
    from memspan.recall.chat import Chat

__all__ = [
    "EMBEDDER",
    "KEY_OF",
    "LLM",
    "POLICY",
    "STORE",
    "client_of",
    "embedder_of",
    "local_model",
    "secret_of",
]

STORE = click.option(
    "--store", default="memory.db", show_default=True, help="A file, or postgresql://... for many servers."
)
POLICY = click.option(
    "--policy", type=click.Choice(["memorybank", "tim", "scm"]), default="memorybank", show_default=True,
    help="What is kept, recalled and forgotten.",
)  # fmt: skip
EMBEDDER = click.option(
    "--embedder", default="auto", show_default=True,
    help="auto (MiniLM where installed, else hashing), minilm, hashing, or URL#MODEL of an endpoint.",
)  # fmt: skip
LLM = click.option(
    "--llm",
    help="URL#MODEL of an OpenAI-compatible endpoint that writes summaries and facts; none: rules do.",
)
KEY_OF = click.option(
    "--upstream-key-env",
    "key_env",
    metavar="NAME",
    help="Environment variable that holds the endpoints' key.",
)


def secret_of(name: str | None) -> str:
    if name is None:
        return ""
    if not os.environ.get(name):
        refuse("upstream-key-env", name, "this environment variable is not set")
    return os.environ[name]


def client_of(address: str | None, secret: str) -> Chat | None:
    if not address:
        return None
    url, _, model = address.rpartition("#")
    if not url or not model:
        refuse("llm", address, "give URL#MODEL, such as http://127.0.0.1:8000/v1#my-model")
    from memspan.recall.chat import ChatClient

    return ChatClient(url, model, api_key=secret)


def embedder_of(name: str, secret: str) -> Embedder | None:
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


def local_model() -> Chat:
    from memspan.recall.chat import LocalChat

    return LocalChat()
