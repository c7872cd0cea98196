"""The temporal store against PyG's, a TGN epoch against its example's, and tables past memory.

On the same batches, in the same rounds, in changing order: storing a batch, gathering its messages and
keeping the last of each node, without and with the GRU (PyG in eval mode, whose memory equals ours to the
bit; its aggregator is right there, as every node has a message); the ring of recent neighbours; one training
pass of a TGN over 8,000 events. Then events read from CSV and Parquet, with the anonymous memory of the
process at one and at ten million rows, and numeric columns against the csv module.

    python benchmarks/bench_temporal.py            # about 3 min on two cores; 0.4 GB of disk
    python benchmarks/bench_temporal.py --quick    # a tenth of the rows, fewer rounds; writes nothing

Figures go to ``benchmarks/results/bench_temporal.json``. Needs the extras ``memspan[tables,peers]``.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import Way, environment, interleaved, options, ratios, reason, show, tried

from memspan import data as sets
from memspan.banks.temporal import (
    JODIE,
    PRES,
    TGN,
    RecentRing,
    TemporalBatches,
    TemporalData,
    train_link_prediction,
)
from memspan.base.files import atomic_write
from memspan.data import tables
from memspan.recipes.tracks.events import stream_of, train_pyg

RESULT = Path(__file__).parent / "results" / "bench_temporal.json"
DIM, WIDTH = 100, 16


def stream() -> TemporalData:
    """CollegeMsg, or the clock changes where it is not here, with 16 features drawn at random."""
    for name in ("collegemsg", "clock-changes"):
        try:
            found = stream_of(sets.load(name, sets.TableSet))
        except sets.DataNotFound:
            continue
        features = np.random.default_rng(0).random((len(found), WIDTH)).astype(np.float32)
        return TemporalData(found.src, found.dst, found.t, features, num_nodes=found.num_nodes)
    raise sets.DataNotFound("no stream of events is here")


def stores(data: TemporalData, size: int, rounds: int, device: str) -> dict[str, Any]:
    """A batch's way into the memory: one call takes ten batches of the stream, each way its own."""
    from torch_geometric.nn.models import tgn

    nodes = int(data.num_nodes or 0)
    batches = [batch.to(device) for batch in TemporalBatches(data, size, negatives=0)]

    def theirs() -> Any:
        torch.manual_seed(0)
        message = tgn.IdentityMessage(WIDTH, DIM, DIM)
        memory = tgn.TGNMemory(nodes, WIDTH, DIM, DIM, message, tgn.LastAggregator()).to(device)
        memory.eval()  # which gives None
        memory.reset_state()
        return memory

    def ours() -> JODIE:
        model = JODIE(nodes, WIDTH, DIM, time="linear", time_scale=1.0).to(device).eval()
        peer = theirs()
        model.updater.load_state_dict(peer.gru.state_dict())
        model.encode.weight.data.copy_(peer.time_enc.lin.weight.data)
        model.encode.bias.data.copy_(peer.time_enc.lin.bias.data)
        return model

    def over(step: Callable[[Any], None], reset: Callable[[], None]) -> Way:
        turn: Iterator[int] = cycle(range(max(1, len(batches) // 10)))

        @torch.no_grad()
        def way() -> None:
            reset()
            first = next(turn) * 10
            for batch in batches[first : first + 10]:
                step(batch)

        return way

    def pyg_messages() -> Way:
        memory = theirs()

        def step(batch: Any) -> None:
            src, dst, t = batch.src, batch.dst, batch.t.long()
            memory._update_msg_store(src, dst, t, batch.msg, memory.msg_s_store)
            memory._update_msg_store(dst, src, t, batch.msg, memory.msg_d_store)
            n_id = torch.cat([src, dst]).unique()
            memory._assoc[n_id] = torch.arange(n_id.size(0), device=n_id.device)
            parts = [
                memory._compute_msg(n_id, memory.msg_s_store, memory.msg_s_module),
                memory._compute_msg(n_id, memory.msg_d_store, memory.msg_d_module),
            ]
            index = torch.cat([part[2] for part in parts])
            message, moment = (torch.cat([part[k] for part in parts]) for k in (0, 1))
            memory.aggr_module(message, memory._assoc[index], moment, n_id.size(0))

        return over(step, memory.reset_state)

    def our_messages() -> Way:
        model = ours()
        kept: dict[str, Any] = {}

        class Kept(torch.nn.Module):
            def forward(self, message: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
                kept["message"] = message
                return before

        model.updater = Kept()

        def step(batch: Any) -> None:
            model.memory.store_(batch)
            model.view()

        return over(step, model.reset_)

    def pyg_update() -> Way:
        memory = theirs()
        return over(
            lambda b: memory.update_state(b.src, b.dst, b.t.long(), b.msg), memory.reset_state
        )  # fmt: skip

    def our_update() -> Way:
        model = ours()

        def step(batch: Any) -> None:
            model.memory.store_(batch)
            view = model.view()
            model.memory.write_(view.nodes, view.memory, view.t)

        return over(step, model.reset_)

    def pyg_ring() -> Way:
        loader = tgn.LastNeighborLoader(nodes, 10, device=device)
        return over(lambda b: loader.insert(b.src, b.dst), loader.reset_state)

    def our_ring() -> Way:
        ring = RecentRing(nodes, 10).to(device)
        empty = [(b, b.msg[:, :0]) for b in batches]
        bare = {id(b): part for b, part in empty}

        def step(b: Any) -> None:
            src_dst = torch.stack([b.src, b.dst], 1)
            ring.insert_(src_dst.view(-1), src_dst.flip(1).reshape(-1), b.t.repeat_interleave(2), bare[id(b)])

        return over(step, ring.reset_)

    ways, absent = tried(
        {"PyG, messages": pyg_messages, "messages": our_messages, "PyG, update": pyg_update,
         "update": our_update, "PyG, ring": pyg_ring, "ring": our_ring}, device,
    )  # fmt: skip
    times = interleaved(ways, rounds, device=device)
    pairs = {
        "store, gather, message, last: PyG / ours": ("PyG, messages", "messages"),
        "with the GRU: PyG / ours": ("PyG, update", "update"),
        "ring: LastNeighborLoader / ours": ("PyG, ring", "ring"),
    }
    return ratios(times, absent, pairs)


def same_memory(data: TemporalData) -> float:
    """Largest difference of the two memories after twenty batches: 0, or the ratios compare nothing."""
    from torch_geometric.nn.models import tgn

    nodes = int(data.num_nodes or 0)
    torch.manual_seed(0)
    message = tgn.IdentityMessage(WIDTH, DIM, DIM)
    peer = tgn.TGNMemory(nodes, WIDTH, DIM, DIM, message, tgn.LastAggregator())
    peer.eval()
    peer.reset_state()
    model = JODIE(nodes, WIDTH, DIM, time="linear", time_scale=1.0).eval()
    model.updater.load_state_dict(peer.gru.state_dict())
    model.encode.weight.data.copy_(peer.time_enc.lin.weight.data)
    model.encode.bias.data.copy_(peer.time_enc.lin.bias.data)
    distinct = TemporalData(data.src, data.dst, np.arange(len(data)), data.msg, num_nodes=nodes)
    with torch.no_grad():
        for batch in TemporalBatches(distinct.part(0, 4000), 200, negatives=0):
            peer.update_state(batch.src, batch.dst, batch.t.long(), batch.msg)
            model.write_(model.view(), batch)
        rows, _ = model.rows(model.view(), torch.arange(nodes))
    return (rows - peer.memory).abs().max().item()


def epochs(data: TemporalData, size: int, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of a TGN's training pass over 8,000 events, ours against PyG's example; tests not counted."""
    short = data.part(0, 10_000)
    seconds: dict[str, list[float]] = {
        "PyG's example": [],
        "TGN": [],
        "TGN at updates": [],
        "TGN with PRES": [],
    }
    for turn in range(rounds + 1):
        found = {"PyG's example": train_pyg(short, size, 1, 1e-3, DIM, turn, split=(0.1, 0.1)).seconds}
        for name, more in (
            ("TGN", {}),
            ("TGN at updates", {"at": "update"}),
            ("TGN with PRES", {"pres": PRES()}),
        ):
            model = TGN(int(short.num_nodes or 0), WIDTH, DIM, **more)
            told = train_link_prediction(
                model, short, size, epochs=1, split=(0.1, 0.1), seed=turn, device=device
            )  # fmt: skip
            found[name] = told.cpu_seconds if device == "cpu" else told.seconds
        if turn:
            for name, value in found.items():
                seconds[name].append(value)
    pairs = {
        "an epoch: PyG's example / ours": ("PyG's example", "TGN"),
        "the same, a node embedded once a batch as in the example": ("PyG's example", "TGN at updates"),
        "PRES / none": ("TGN with PRES", "TGN"),
    }
    told = ratios(seconds, {}, pairs)
    told["events per second"] = {name: round(8000 / float(np.median(one))) for name, one in seconds.items()}
    return told


_READ = """
import re, sys, time
from memspan.data import read_chunks
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
path = sys.argv[1]
next(iter(read_chunks(path, {"src": int, "dst": int, "t": int, "x": float}, rows=1000)))
start, rows, highest = time.process_time(), 0, 0
for number, chunk in enumerate(read_chunks(path, {"src": int, "dst": int, "t": int, "x": float})):
    rows += len(chunk["src"])
    if number % 4 == 0:
        highest = max(highest, anonymous())
print(rows, time.process_time() - start, highest)
"""

_MAP = """
import re, sys, time
from memspan.banks.temporal import TemporalBatches, TemporalData
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
data = TemporalData.from_csv(sys.argv[1], "src", "dst", "t", ["x"], cache=sys.argv[2])
highest = 0
start = time.process_time()
for number, batch in enumerate(TemporalBatches(data, 10_000, negatives=0)):
    if number % 20 == 0:
        highest = max(highest, anonymous())
print(len(data), time.process_time() - start, highest)
"""


def reading(million: int) -> dict[str, Any]:
    """Rows a second of the processor, and RssAnon at its highest, for made events from both formats."""
    import polars

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in (million, 10 * million):
            draw = np.random.default_rng(0)
            frame = polars.DataFrame(
                {"src": draw.integers(0, 100_000, rows), "dst": draw.integers(0, 100_000, rows),
                 "t": np.arange(rows) * 3, "x": draw.random(rows).round(4)}
            )  # fmt: skip
            frame.write_csv(f"{folder}/{rows}.csv")
            frame.write_parquet(f"{folder}/{rows}.parquet", row_group_size=1 << 17)
            del frame
            for kind in ("csv", "parquet"):
                done = run(_READ, f"{folder}/{rows}.{kind}")
                found[f"{kind}, {rows} rows"] = {
                    "rows per processor second": round(done[0] / done[1]), "RssAnon, bytes": int(done[2]),
                }  # fmt: skip
            mapped = run(_MAP, f"{folder}/{rows}.parquet", f"{folder}/columns{rows}")
            mapped = run(_MAP, f"{folder}/{rows}.parquet", f"{folder}/columns{rows}")  # mapped by now
            found[f"mapped, {rows} rows"] = {
                "rows per processor second": round(mapped[0] / mapped[1]), "RssAnon, bytes": int(mapped[2]),
            }  # fmt: skip
        found["numeric columns: csv module / polars"] = against_csv(Path(f"{folder}/{million}.csv"))
    return found


def run(code: str, *arguments: str) -> list[float]:
    """Rows, seconds of the processor and bytes that a process of its own tells."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )  # fmt: skip
    return [float(word) for word in done.stdout.split()]


def against_csv(path: Path, rounds: int = 3) -> dict[str, float]:
    """Seconds of the processor of the csv module's way, which was the only one before, over polars'."""
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "short.csv"
        with path.open() as source, short.open("w") as target:
            target.writelines(line for _, line in zip(range(200_001), source, strict=False))
        text = tables._Text(short, ",", None, 0)
        types: dict[str, type | None] = {"src": int, "dst": int, "t": int, "x": float}
        seconds: dict[str, list[float]] = {"csv": [], "polars": []}
        for _ in range(rounds + 1):
            for name, way in (
                ("csv", lambda: text._by_csv(dict(types), 65536)),
                ("polars", lambda: text.chunks(dict(types), 65536)),
            ):
                start = time.process_time()
                for _ in way():
                    pass
                seconds[name].append(time.process_time() - start)
    told = ratios({k: v[1:] for k, v in seconds.items()}, {}, {"ratio": ("csv", "polars")})
    return dict(told["ratio"])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the rows, fewer rounds; writes nothing"
    )
    parser.add_argument(
        "--part", choices=("all", "batches"), default="all", help="batches: leaves the tables as they are"
    )
    asked = options(parser, RESULT)
    torch.set_num_threads(1)
    data = stream()
    result: dict[str, Any] = {
        "what": "median over rounds of rival / our seconds, above 1 ours is faster; D = 100, F = 16",
        "environment": environment(asked.device, threads=1),
    }
    try:
        result["largest difference of the memories"] = same_memory(data)
        for size in (200, 2000):
            found = stores(data, size, 5 if asked.quick else 15, asked.device)
            found |= epochs(data, size, 2 if asked.quick else 3, asked.device)
            result[f"batch {size}"] = found
    except ImportError as error:
        result["PyG"] = {"error": reason(error)}
    if asked.part == "all":
        result["tables"] = reading(100_000 if asked.quick else 1_000_000)
    else:
        result["tables"] = json.loads(asked.out.read_text("utf-8"))["tables"]
    result["environment"] = copy.deepcopy(environment(asked.device, threads=1))
    print(json.dumps(result, indent=1))
    show(result)
    if not asked.quick:
        atomic_write(asked.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
