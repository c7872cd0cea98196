"""Very many memories of one user: time, bytes and recall as ratios to Chroma, LanceDB and mem0.

Vectors are ``unit(zW + .3g)`` with z in R^32, W 32 x 384 of N(0, 1/32), z and g standard normal
(independent directions would defeat any graph index), queries alike; texts are 25 words of 50,000 (Zipf-
Mandelbrot). At 100,000 memories all stores hold the same texts and vectors on disk; queries are interleaved
in changing order. Ours is measured exact, approximate (HNSW, rescored), and as users have it: words and
vectors. mem0 (``infer=False``, the same vectors handed to it) is measured at 5,000 with ours beside it.

On a busy machine wall time says little: searches of ours are also told in seconds of this thread's CPU.

Parts: ``--part large`` (ours, Chroma, LanceDB), ``--part mem0``, ``--part users`` (ten thousand other users
beside one with 100,000 memories), ``--million`` (ours alone). Each writes its own entry of
``benchmarks/results/recall_scale.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base.files import atomic_write
from memspan.base.rng import rng
from memspan.data.embed import HashingEmbedder
from memspan.recall import Record, SQLiteStore
from memspan.recipes.tracks.retrieval import close_mem0, open_mem0

RESULT = Path(__file__).parent / "results" / "recall_scale.json"
DIM, K = 384, 10
WHEN = datetime(2024, 1, 1, tzinfo=UTC)
Array = NDArray[np.float32]


def vectors(n: int, name: str) -> Array:
    mix = rng("recall scale", "W").standard_normal((32, DIM)) / np.sqrt(32)
    draw = rng("recall scale", name)
    rows = np.empty((n, DIM), np.float32)
    for start in range(0, n, 10_000):
        part = slice(start, min(n, start + 10_000))
        size = part.stop - part.start
        rows[part] = draw.standard_normal((size, 32)) @ mix + 0.3 * draw.standard_normal((size, DIM))
        rows[part] /= np.linalg.norm(rows[part], axis=1, keepdims=True)
    return rows


def texts(n: int, name: str, words: int = 25) -> list[str]:
    draw = rng("recall scale", "texts", name)
    weights = 1 / (np.arange(50_000) + 30)
    ranks = draw.choice(50_000, (n, words), p=weights / weights.sum())
    return [" ".join(f"w{rank}" for rank in row) for row in ranks]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def recall(found: list[list[int]], rows: Array, queries: Array) -> float:
    truth = np.argsort(-(queries @ rows.T), axis=1)[:, :K]
    return float(np.mean([len(set(a) & set(b.tolist())) / K for a, b in zip(found, truth, strict=True)]))


def chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(n, start + size)) for start in range(0, n, size))


def fill(store: SQLiteStore, user: str, rows: Array, said: list[str]) -> float:
    handle, begin = store.for_user(user), time.perf_counter()
    for part in chunks(len(rows), 1000):
        handle.add(
            [
                Record(text, WHEN, id=f"{i:07d}")
                for i, text in zip(range(part.start, part.stop), said[part], strict=True)
            ],
            vectors=rows[part],
        )
    return time.perf_counter() - begin


def interleaved(
    searches: dict[str, Callable[[int], Any]],
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each search for each query, after one round that warms up."""
    times: dict[str, list[float]] = {name: [] for name in searches}
    order = list(searches)
    for query in [0, *range(count)]:
        random.shuffle(order)
        for name in order:
            begin = clock()
            searches[name](query)
            times[name].append(clock() - begin)
    return {name: values[1:] for name, values in times.items()}


def quantiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}_ms": round(float(np.percentile(seconds, p)) * 1000, 3) for p in (50, 95, 99)}


def large(n: int, count: int) -> dict[str, Any]:
    rows, said, queries, asked = (
        vectors(n, "rows"),
        texts(n, "rows"),
        vectors(count, "queries"),
        texts(count, "q", 8),
    )
    figures: dict[str, Any] = {"rows": n, "queries": count}
    ingest, held, found = {}, {}, {}
    searches: dict[str, Callable[[int], Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        exact = SQLiteStore(home / "ours" / "me.db", HashingEmbedder(DIM), exact_below=10 * n)
        ingest["ours"] = fill(exact, "me", rows, said)
        mine = exact.for_user("me")
        begin = time.perf_counter()
        near = SQLiteStore(home / "ours" / "me.db", HashingEmbedder(DIM), exact_below=0)
        near.build_index(near.for_user("me"))
        figures["index_seconds"] = round(time.perf_counter() - begin, 1)
        log(f"ours: {ingest['ours']:.1f} s, index {figures['index_seconds']} s")
        held["ours"] = exact.memory_bytes()
        held["ours"] = sum(held["ours"][key] for key in ("store.rows", "store.vectors", "store.words"))
        held["ours with index"] = held["ours"] + near.memory_bytes()["store.index"]
        only = {"words": 0.0, "vector": 1.0}
        handle = near.for_user("me")

        def ids(hits: Any) -> list[int]:
            return [int(hit.record.id) for hit in hits]

        searches["ours exact"] = lambda i: ids(mine.search(vector=queries[i], k=K, weights=only))
        searches["ours approximate"] = lambda i: ids(handle.search(vector=queries[i], k=K, weights=only))
        searches["ours words and vectors"] = lambda i: ids(mine.search(asked[i], vector=queries[i], k=K))
        if importlib.util.find_spec("chromadb"):
            import chromadb
            from chromadb.config import Settings

            client = chromadb.PersistentClient(str(home / "chroma"), Settings(anonymized_telemetry=False))
            table = client.create_collection("one-user", metadata={"hnsw:space": "cosine"})
            begin = time.perf_counter()
            for part in chunks(n, 5000):
                names = [str(i) for i in range(part.start, part.stop)]
                table.add(ids=names, embeddings=rows[part], documents=said[part])
            ingest["chroma"] = time.perf_counter() - begin
            held["chroma"] = size(home / "chroma")
            log(f"chroma: {ingest['chroma']:.1f} s")
            searches["chroma"] = lambda i: [
                int(id) for id in table.query(query_embeddings=queries[i : i + 1], n_results=K)["ids"][0]
            ]
        if importlib.util.find_spec("lancedb"):
            import lancedb
            import pyarrow as pa

            schema = pa.schema(
                [("id", pa.int64()), ("text", pa.string()), ("vector", pa.list_(pa.float32(), DIM))]
            )
            lance = lancedb.connect(str(home / "lance")).create_table("me", schema=schema)
            begin = time.perf_counter()
            for part in chunks(n, 5000):
                listed = pa.FixedSizeListArray.from_arrays(pa.array(rows[part].ravel()), DIM)
                numbers = pa.array(range(part.start, part.stop), pa.int64())
                lance.add(pa.table([numbers, pa.array(said[part]), listed], schema=schema))
            ingest["lancedb"] = time.perf_counter() - begin
            held["lancedb"] = size(home / "lance")
            log(f"lancedb: {ingest['lancedb']:.1f} s")
            searches["lancedb exact"] = lambda i: [
                row["id"] for row in lance.search(queries[i]).distance_type("cosine").limit(K).to_list()
            ]
        times = interleaved(searches, count)
        own = {name: search for name, search in searches.items() if name.startswith("ours")}
        worked = interleaved(own, count, time.thread_time)
        figures["search_cpu"] = {name: quantiles(values) for name, values in worked.items()}
        found = {name: [search(i) for i in range(min(count, 100))] for name, search in searches.items()}
        figures["search"] = {
            name: quantiles(times[name])
            | (
                {}
                if "words" in name
                else {"recall@10": round(recall(found[name], rows, queries[: len(found[name])]), 4)}
            )
            for name in searches
        }
        figures["ingest_rows_per_second"] = {name: round(n / seconds) for name, seconds in ingest.items()}
        figures["bytes_per_memory"] = {name: round(total / n) for name, total in held.items()}
        figures["ratios"] = ratios(figures)
        near.close()
        exact.close()
    return figures


def ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Of ours to each peer; below 1 is less time or fewer bytes, above 1 more rows a second."""
    made = {}
    for ours, theirs in (("ours approximate", "chroma"), ("ours exact", "lancedb exact")):
        if theirs in figures["search"]:
            for p in ("p50_ms", "p99_ms"):
                made[f"{ours} / {theirs}, {p[:3]}"] = (
                    figures["search"][ours][p] / figures["search"][theirs][p]
                )
    for peer in ("chroma", "lancedb"):
        if peer in figures["bytes_per_memory"]:
            sizes, rates = figures["bytes_per_memory"], figures["ingest_rows_per_second"]
            made[f"ours / {peer}, bytes"] = sizes["ours"] / sizes[peer]
            made[f"ours with index / {peer}, bytes"] = sizes["ours with index"] / sizes[peer]
            made[f"ours / {peer}, rows a second"] = rates["ours"] / rates[peer]
            built = figures["rows"] / rates["ours"] + figures["index_seconds"]
            made[f"ours with index / {peer}, rows a second"] = figures["rows"] / built / rates[peer]
    return {name: round(value, 3) for name, value in made.items()}


def beside_mem0(n: int, count: int) -> dict[str, Any]:
    rows, said, queries = vectors(n, "rows"), texts(n, "rows"), vectors(count, "queries")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        known = dict(zip(said, rows, strict=True)) | {f"query {i}": row for i, row in enumerate(queries)}

        class Given:  # both are handed the same vectors
            dim, id = DIM, "given"

            def __call__(self, texts: Sequence[str]) -> Array:
                return np.stack([known[text] for text in texts])

        memory = open_mem0(home / "mem0", Given())
        store = SQLiteStore(home / "ours" / "me.db", HashingEmbedder(DIM))
        user = store.for_user("me")
        seconds: dict[str, list[float]] = {"ours": [], "mem0": []}
        for i, text in enumerate(said):  # one memory at a time, as a conversation brings them
            begin = time.perf_counter()
            user.add([Record(text, WHEN, id=f"{i:07d}")], vectors=rows[i : i + 1])
            middle = time.perf_counter()
            memory.add(text, user_id="me", infer=False)
            seconds["ours"].append(middle - begin)
            seconds["mem0"].append(time.perf_counter() - middle)
        only = {"words": 0.0, "vector": 1.0}
        times = interleaved(
            {
                "ours": lambda i: user.search(vector=queries[i], k=K, weights=only),
                "mem0": lambda i: memory.search(f"query {i}", user_id="me", limit=K),
            },
            count,
        )
        held = {"ours": size(home / "ours"), "mem0": size(home / "mem0")}
        store.close()
        close_mem0(memory)
    figures: dict[str, Any] = {
        "rows": n,
        "write": {name: quantiles(values) for name, values in seconds.items()},
        "search": {name: quantiles(values) for name, values in times.items()},
        "bytes_per_memory": {name: round(total / n) for name, total in held.items()},
    }
    figures["ratios"] = {
        f"ours / mem0, {kind} {p[:3]}": round(figures[kind]["ours"][p] / figures[kind]["mem0"][p], 3)
        for kind in ("write", "search")
        for p in ("p50_ms", "p99_ms")
    } | {"ours / mem0, bytes": round(held["ours"] / held["mem0"], 3)}
    return figures


def among_users(n: int, others: int, count: int) -> dict[str, Any]:
    """Does anybody else's memory cost this user time?"""
    rows, said, asked = vectors(n, "rows"), texts(n, "rows"), texts(count, "q", 8)
    queries = vectors(count, "queries")
    with tempfile.TemporaryDirectory() as folder:
        alone = SQLiteStore(Path(folder) / "alone.db", HashingEmbedder(DIM))
        shared = SQLiteStore(Path(folder) / "shared.db", HashingEmbedder(DIM))
        for store in (alone, shared):
            fill(store, "me", rows, said)
        with shared.for_user("me").transaction():
            for i in range(others):
                shared.for_user(f"other {i}").add(
                    [Record(said[i % n], WHEN)], vectors=rows[i % n : i % n + 1]
                )
        log("filled")
        times = interleaved(
            {
                "alone": lambda i: alone.for_user("me").search(asked[i], vector=queries[i], k=K),
                "among others": lambda i: shared.for_user("me").search(asked[i], vector=queries[i], k=K),
            },
            count,
        )
        for store in (alone, shared):
            store.close()
    figures: dict[str, Any] = {"rows": n, "others": others}
    figures["search"] = {name: quantiles(values) for name, values in times.items()}
    gaps = [b / a for a, b in zip(times["alone"], times["among others"], strict=True)]
    figures["ratio_median"] = round(float(np.median(gaps)), 3)
    return figures


def million(n: int, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=os.environ.get("MEMSPAN_SCRATCH")) as folder:
        rows, queries = vectors(n, "rows"), vectors(count, "queries")
        store = SQLiteStore(Path(folder) / "me.db", HashingEmbedder(DIM), exact_below=1000)
        user = store.for_user("me")
        seconds = 0.0
        for part in chunks(n, 50_000):
            said = texts(part.stop - part.start, str(part.start))
            begin = time.perf_counter()
            for inner in chunks(len(said), 1000):
                at = slice(part.start + inner.start, part.start + inner.stop)
                new = [
                    Record(text, WHEN, id=f"{i:07d}")
                    for i, text in zip(range(at.start, at.stop), said[inner], strict=True)
                ]
                user.add(new, vectors=rows[at])
            seconds += time.perf_counter() - begin
            log(f"{part.stop} rows, {seconds:.0f} s")
        begin = time.perf_counter()
        store.build_index(user)
        built = time.perf_counter() - begin
        only = {"words": 0.0, "vector": 1.0}
        search = lambda i: [int(h.record.id) for h in user.search(vector=queries[i], k=K, weights=only)]  # noqa: E731
        times = interleaved({"ours": search}, count)["ours"]
        found = [search(i) for i in range(50)]
        held = store.memory_bytes()
        store.close()
        return {
            "rows": n,
            "ingest_seconds": round(seconds),
            "index_seconds": round(built),
            "cpu_seconds": round(time.process_time()),  # of all of this, the benchmark's own work included
            "search": quantiles(times) | {"recall@10": round(recall(found, rows, queries[:50]), 4)},
            "bytes": held,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def log(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("large", "mem0", "users"), default="large")
    parser.add_argument("--million", action="store_true", help="ours alone with a million memories")
    parser.add_argument("--rows", type=int, default=None, help="fewer rows, for a try")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    random.seed(0)
    if options.million:
        name, figures = "million", million(options.rows or 1_000_000, options.queries)
    elif options.part == "large":
        name, figures = "large", large(options.rows or 100_000, options.queries)
    elif options.part == "mem0":
        name, figures = "mem0", beside_mem0(options.rows or 5_000, options.queries)
    else:
        name, figures = "users", among_users(options.rows or 100_000, 10_000, options.queries)
    result = (
        json.loads(options.out.read_text())
        if options.out.exists()
        else {"benchmark": "recall_scale", "parts": {}}
    )
    environment = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": "cpu",
    }
    result["parts"][name] = {"environment": environment, "figures": figures}
    atomic_write(options.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
