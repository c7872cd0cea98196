"""Records as rows and as lines of JSON, checked at the door; shared by the backends, knows no database."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from memspan.base import refuse
from memspan.recall.records import KINDS, TRUST, Record, Source, State

__all__ = [
    "COLUMNS",
    "STATES",
    "Filter",
    "as_vector",
    "checked_name",
    "checked_record",
    "checked_vectors",
    "filters",
    "from_json",
    "from_micros",
    "from_row",
    "micros",
    "to_json",
    "to_row",
    "ulids",
]

#: States by their number in a row.
STATES: tuple[State, ...] = get_args(State)
#: Columns of a record's row that a :class:`~memspan.recall.Record` fills, in the order of :func:`to_row`.
COLUMNS = (
    "id",
    "kind",
    "state",
    "text",
    "created_at",
    "valid_from",
    "valid_to",
    "role",
    "session",
    "channel",
    "trust",
    "evidence",
    "strength",
    "last_recalled",
    "expires_at",
    "metadata",
    "key",
)
Filter = tuple[str, list[Any]]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LONGEST_TEXT = 1_000_000  # bytes of UTF-8
_LONGEST_NAME = 256  # bytes of UTF-8
_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_KEY = re.compile(r"[\w.-]{1,64}", re.ASCII)
_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_TIMES = ("created_at", "valid_from", "valid_to", "last_recalled", "expires_at")
_SOURCE = ("session", "role", "trust", "channel")
_PLAIN = (*_SOURCE, "key")


def checked_name(argument: str, name: object) -> str:
    r"""A user or application name in NFC; any Unicode, 1 to 256 bytes. Blanks at the ends are kept.

    Example:
        >>> checked_name("user", " Jason "), len(checked_name("user", "e\u0301"))
        (' Jason ', 1)
    """
    if not isinstance(name, str) or not name:
        refuse(argument, name, "give a text that is not empty")
    name = unicodedata.normalize("NFC", name)
    if not _writable(name) or len(name.encode()) > _LONGEST_NAME:
        refuse(argument, name, f"at most {_LONGEST_NAME} bytes of valid Unicode without NUL")
    return name


def micros(argument: str, moment: datetime) -> int:
    """Microseconds since 1970 in UTC; a moment without a time zone is refused."""
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        refuse(argument, moment, "give a datetime with a time zone, such as datetime.now(UTC)")
    return (moment - _EPOCH) // _MICROSECOND


def from_micros(value: int) -> datetime:
    """The moment, in UTC."""
    return _EPOCH + value * _MICROSECOND


def checked_record(record: Record) -> Record:
    """The record, or a refusal that names the field."""
    if not isinstance(record, Record):
        refuse("records", record, "give Record objects")
    if record.id and not _ID.fullmatch(record.id):
        refuse("id", record.id, "1 to 64 of A-Z a-z 0-9 _ . : - or empty for a new one")
    if not isinstance(record.text, str) or not record.text.strip():
        refuse("text", record.text, "give a text that is not empty")
    if not _writable(record.text):
        refuse("text", record.text, "valid Unicode without NUL")
    if len(record.text) > _LONGEST_TEXT or len(record.text.encode()) > _LONGEST_TEXT:
        refuse("text", f"{len(record.text)} characters", "at most 1 MB; split a longer document into records")
    if record.kind not in KINDS:
        refuse("kind", record.kind, f"use one of {', '.join(KINDS)}")
    if record.state not in STATES:
        refuse("state", record.state, f"use one of {', '.join(STATES)}")
    source = dict(record.source)
    if set(source) - set(_SOURCE) or not all(isinstance(v, str) and _writable(v) for v in source.values()):
        refuse("source", source, f"texts for {', '.join(_SOURCE)}")
    if source.get("trust", "user") not in TRUST:
        refuse("source.trust", source["trust"], f"use one of {', '.join(TRUST)}")
    if isinstance(record.evidence, str) or not all(
        isinstance(id, str) and _ID.fullmatch(id) for id in record.evidence
    ):
        refuse("evidence", record.evidence, "give ids of records")
    if not (isinstance(record.strength, int | float) and 0 < record.strength < float("inf")):
        refuse("strength", record.strength, "give a finite number above 0")
    for name in _TIMES:
        moment = getattr(record, name)
        if moment is not None or name == "created_at":
            micros(name, moment)
    if not isinstance(record.key, str) or not _writable(record.key) or len(record.key) > _LONGEST_NAME:
        refuse("key", record.key, f"a text of at most {_LONGEST_NAME} characters")
    _json("metadata", dict(record.metadata))
    return record


def to_row(record: Record) -> tuple[Any, ...]:
    """Values of :data:`COLUMNS`."""
    created = micros("created_at", record.created_at)
    times = {name: None if (t := getattr(record, name)) is None else micros(name, t) for name in _TIMES}
    return (
        record.id,
        KINDS.index(record.kind),
        STATES.index(record.state),
        record.text,
        created,
        created if times["valid_from"] is None else times["valid_from"],
        times["valid_to"],
        record.source.get("role"),
        record.source.get("session"),
        record.source.get("channel"),
        record.source.get("trust"),
        _json("evidence", list(record.evidence)) if record.evidence else None,
        float(record.strength),
        created if times["last_recalled"] is None else times["last_recalled"],
        times["expires_at"],
        _json("metadata", dict(record.metadata)) if record.metadata else None,
        record.key or None,
    )


def from_row(row: Sequence[Any]) -> Record:
    """The record of the values of :data:`COLUMNS`."""
    value = dict(zip(COLUMNS, row, strict=True))
    source: Source = {name: value[name] for name in _SOURCE if value[name] is not None}  # type: ignore[assignment]
    return Record(
        id=value["id"],
        text=value["text"],
        kind=KINDS[value["kind"]],
        state=STATES[value["state"]],
        source=source,
        evidence=tuple(json.loads(value["evidence"])) if value["evidence"] else (),
        strength=value["strength"],
        metadata=json.loads(value["metadata"]) if value["metadata"] else {},
        key=value["key"] or "",
        created_at=from_micros(value["created_at"]),
        **{
            name: None if value[name] is None else from_micros(value[name])
            for name in _TIMES
            if name != "created_at"
        },
    )


def to_json(record: Record) -> str:
    """One line that :func:`from_json` reads; keys are the record's fields."""
    plain = {f.name: getattr(record, f.name) for f in fields(record)}
    plain["source"], plain["metadata"] = dict(record.source), dict(record.metadata)
    for name in _TIMES:
        if plain[name] is not None:
            plain[name] = plain[name].isoformat()
    return json.dumps(plain, ensure_ascii=False, sort_keys=True)


def from_json(document: Mapping[str, Any]) -> Record:
    """The record of a line's document; refused when it is none."""
    known = {f.name for f in fields(Record)}
    if not isinstance(document, Mapping) or not {"text", "created_at"} <= set(document) <= known:
        refuse("lines", document, f"a JSON object with text, created_at and no more than {sorted(known)}")
    plain = dict(document)
    for name in _TIMES:
        if plain.get(name) is not None:
            try:
                plain[name] = datetime.fromisoformat(plain[name])
            except (TypeError, ValueError):
                refuse(name, plain[name], "an ISO 8601 date and time with a time zone")
    plain["evidence"] = tuple(plain.get("evidence") or ())
    return checked_record(replace(Record(text="", created_at=_EPOCH), **plain))


def ulids(count: int, after: str, now_ms: int) -> list[str]:
    """ULIDs in rising order, all above ``after``, whatever the clock does.

    Args:
        count: how many.
        after: the last ULID given before, or anything else.
        now_ms: milliseconds since 1970.

    Example:
        >>> first, second = ulids(2, "", 0)
        >>> (third,) = ulids(1, second, -5)
        >>> len(first), first < second < third
        (26, True)
    """
    value = (max(now_ms, 0) << 80) | int.from_bytes(os.urandom(10), "big") >> 1
    if len(after) == 26 and set(after) <= set(_BASE32):
        last = 0
        for letter in after:
            last = last << 5 | _BASE32.index(letter)
        value = max(value, last + 1)
    return ["".join(_BASE32[(value + i) >> shift & 31] for shift in range(125, -1, -5)) for i in range(count)]


def as_vector(vector: object, dim: int) -> NDArray[np.float32]:
    """A query vector of unit length; NaN and wrong lengths are refused."""
    array = np.asarray(vector, np.float32)
    return np.asarray(checked_vectors(array[None] if array.ndim == 1 else array, 1, dim)[0])


def checked_vectors(vectors: object, n: int, dim: int) -> NDArray[np.float32]:
    """Rows of unit length, float32 ``(n, dim)``; NaN, zeros and other shapes are refused."""
    array = np.asarray(vectors, np.float32)
    if array.shape != (n, dim):
        refuse("vector", f"shape {array.shape}", f"shape {(n, dim)}: the store's embedder has dim={dim}")
    norms = np.linalg.norm(array.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        refuse("vector", "NaN, infinite or zero", "give finite vectors that are not zero")
    rows: NDArray[np.float32] = (array / norms).astype(np.float32)
    return rows


def filters(where: Mapping[str, Any] | None, dialect: Literal["sqlite", "postgres"]) -> list[Filter]:
    """Conditions in SQL with ``?`` for values; ``state`` is left to the caller.

    A sequence of values (not a text) means any of them.
    """
    found: list[Filter] = []
    for key, value in (where or {}).items():
        if key == "state":
            continue
        if key in ("since", "until"):
            found.append((f"created_at {'>=' if key == 'since' else '<'} ?", [micros(key, value)]))
            continue
        values = list(value) if isinstance(value, list | tuple | set | frozenset) else [value]
        if key in _PLAIN:
            if not all(isinstance(item, str) for item in values):
                refuse(f"where.{key}", value, "give a text, or several")
            conditions: list[Filter] = [(f"{key} = ?", [item]) for item in values]
        elif key.startswith("metadata.") and _KEY.fullmatch(name := key.removeprefix("metadata.")):
            conditions = [_metadata(name, item, dialect) for item in values]
        else:
            refuse("where", key, f"use {', '.join(_PLAIN)}, state, since, until or metadata.KEY")
        either = " OR ".join(sql for sql, _ in conditions) or "1 = 0"
        found.append((f"({either})", [value for _, values in conditions for value in values]))
    return found


def _metadata(name: str, value: object, dialect: str) -> Filter:
    if value is not None and not isinstance(value, str | int | float | bool):
        refuse(f"where.metadata.{name}", value, "give a text, a number, a truth value or None")
    if dialect == "postgres":
        return "(metadata::jsonb -> ?) = ?::jsonb", [name, json.dumps(value)]
    path = f'$."{name}"'
    if value is None or isinstance(value, bool):
        return "json_type(metadata, ?) = ?", [path, json.dumps(value)]
    kinds = "('text')" if isinstance(value, str) else "('integer', 'real')"
    return f"(json_type(metadata, ?) IN {kinds} AND json_extract(metadata, ?) = ?)", [path, path, value]


def _json(argument: str, value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        refuse(argument, value, f"use only what JSON can hold ({error})")
    if not _writable(text) or "\\u0000" in text:
        refuse(argument, value, "valid Unicode without NUL")
    return text


def _writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return "\0" not in text
