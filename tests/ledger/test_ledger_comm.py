"""What crosses between ranks: payload and ring bytes, and ledgers brought together without pickle."""

import contextlib
import functools
import json
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from memspan.base import BadInput
from memspan.ledger import Gathered, Holding, Snapshot, Traffic, gather_ledgers, plan, ring_bytes
from memspan.recipes.ledger.models import GPT, classify


def test_ring_bytes_follow_the_closed_forms() -> None:
    n, ranks = 1200, 4
    assert ring_bytes("all_reduce", n, ranks=ranks) == 2 * 3 * n // 4
    for name in ("all_gather", "reduce_scatter", "all_to_all"):
        assert ring_bytes(name, n, ranks=ranks) == 3 * n // 4
    assert ring_bytes("broadcast", n, ranks=ranks) == n
    assert ring_bytes("all_reduce", n, ranks=1) == 0


def test_one_process_alone_gathers_itself() -> None:
    snapshot = Snapshot.of([Holding(8, "replay")])
    assert gather_ledgers(snapshot) == Gathered((snapshot,))


# Each program runs in a process group and a namespace of its own, all in the same two processes: to load
# torch takes longer than any of them.
RANK = """
import json, sys
import torch
import torch.distributed as dist

torch.set_num_threads(1)
rank = int(sys.argv[1])
for program, port in zip(json.load(sys.stdin), sys.argv[2:], strict=True):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    space = {"rank": rank}
    exec(program, space)
    print("ANSWER" + json.dumps(space["answer"]), flush=True)
    dist.destroy_process_group()
    del space
"""

COUNTED = """
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from memspan.ledger import CommLedger, Ledger, gather_ledgers

with CommLedger() as comm, Ledger() as led:
    x = torch.ones(100 * (rank + 1))
    part = torch.ones(50)
    dist.all_reduce(part)
    dist.all_reduce(part)
    parts = [torch.zeros(50) for _ in range(2)]
    dist.all_gather(parts, part)
    dist.broadcast(part, 0)
    whole = functional.all_gather_tensor(part, 0, dist.group.WORLD) + 0
gathered = gather_ledgers(led)
answer = {
    "traffic": {name: [t.calls, t.payload, t.ring] for name, t in comm.by_collective.items()},
    "communication": led.peak.category("communication"),
    "gathered": gathered and [gathered.worst, gathered.maximum - gathered.minimum, gathered.imbalance > 1],
}
"""


SHARDED = """
import torch
from torch.distributed.fsdp import fully_shard
from memspan.ledger import Ledger

model = torch.nn.Sequential(*(torch.nn.Linear(128, 128, bias=False) for _ in range(4)))
for layer in model:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.Adam(model.parameters(), foreach=True)
with Ledger(model, optimizer) as led:
    model(torch.ones(4, 128)).sum().backward()
    optimizer.step()
answer = [led.current.by_category, led.peak.by_category]
"""


PLANNED = """
import torch
from memspan.ledger import Ledger, training_step
from memspan.ledger.world import shard_
from memspan.recipes.ledger.models import GPT, classify
from torch.distributed.device_mesh import init_device_mesh

mesh = init_device_mesh("cpu", (2,))
answer = []
for foreach in (False, True):
    model = shard_(GPT(depth=2), mesh)
    optimizer = torch.optim.Adam(model.parameters(), foreach=foreach)
    tokens = torch.arange(256).view(2, 128)
    batch = (tokens, tokens.clone())
    training_step(model, optimizer, batch, classify)
    with Ledger(model, optimizer) as led:
        training_step(model, optimizer, batch, classify)
    with Ledger(model, optimizer, inputs=batch, allocator=True) as asked:
        training_step(model, optimizer, batch, classify)
    answer.append([led.peak.by_category, led.peak.phase, asked.peak.ratio])
"""


@functools.cache
def _on_two_ranks() -> dict[str, list[Any]]:
    """What each of two ranks answered, by program."""
    programs = {"counted": COUNTED, "sharded": SHARDED, "planned": PLANNED}
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in programs]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [str(probe.getsockname()[1]) for probe in probes]
    given = json.dumps(list(programs.values()))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(n), *ports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    for rank in ranks:  # both before either is waited for: they wait for each other
        assert rank.stdin is not None
        rank.stdin.write(given)
        rank.stdin.close()
        rank.stdin = None
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    answers = [[json.loads(part.splitlines()[0]) for part in text.split("ANSWER")[1:]] for text in outputs]
    return {name: list(pair) for name, pair in zip(programs, zip(*answers, strict=True), strict=True)}


@pytest.mark.slow
def test_two_ranks_count_their_traffic_and_gather_their_peaks() -> None:
    first, second = _on_two_ranks()["counted"]
    expected = {"all_reduce": [2, 400, 400], "all_gather": [2, 800, 400], "broadcast": [1, 200, 200]}
    assert first["traffic"] == second["traffic"] == expected
    assert first["communication"] == 400
    assert (first["gathered"], second["gathered"]) == ([1, 400, True], None)


@pytest.mark.slow
def test_a_sharded_model_holds_its_shard_and_nothing_of_the_global_shape() -> None:
    shard = 4 * 128 * 128 * 4 // 2
    for now, peak in _on_two_ranks()["sharded"]:
        assert now == {"parameters.trained": shard, "gradients": shard, "optimizer_state": 2 * shard + 4 * 4}
        assert peak == {**now, "temporaries.optimizer": shard}


def test_traffic_adds_up() -> None:
    assert sum([Traffic(1, 2, 3)] * 3, Traffic()) == Traffic(3, 6, 9)


@pytest.mark.slow
def test_one_rank_of_two_is_planned_as_two_real_ranks_hold_it() -> None:
    tokens = torch.arange(256).view(2, 128)
    build = functools.partial(GPT, depth=2)
    planned = [
        plan(
            build,
            (tokens, tokens.clone()),
            functools.partial(torch.optim.Adam, foreach=foreach),
            loss=classify,
            world=2,
        )
        for foreach in (False, True)
    ]
    assert not dist.is_initialized()
    for found in _on_two_ranks()["planned"]:
        for p, (held, phase, ratio) in zip(planned, found, strict=True):
            assert p.exact
            assert (p.by_category, p.phase) == (held, phase)
            assert ratio == pytest.approx(1, abs=0.01)


def test_more_ranks_hold_a_smaller_shard_and_the_gathered_blocks_are_communication() -> None:
    tokens = torch.arange(128).view(1, 128)
    build = functools.partial(GPT, d=64, depth=2)
    one, four, many = (
        plan(build, (tokens, tokens.clone()), torch.optim.Adam, loss=classify, world=n, kernels=None)
        for n in (1, 4, 64)
    )
    assert one.parameters == four.parameters == many.parameters
    for p, n in ((four, 4), (many, 64)):
        assert p.snapshot is not None
        held = p.by_category["parameters.trained"]
        assert 4 * p.parameters / n <= held < 4 * p.parameters / n + 4 * 64 * 40  # padding of uneven rows
        assert p.by_category["optimizer_state"] < 2 * held + 4 * 100
        assert p.by_category["communication"] > 0
    assert many.total < four.total < one.total
    assert not dist.is_initialized()


def test_foreach_optimizers_over_shards_count_no_global_tensor() -> None:
    wide = functools.partial(torch.nn.Linear, 512, 512, bias=False)
    p = plan(
        wide, torch.zeros(2, 512), functools.partial(torch.optim.Adam, foreach=True), loss=_mean, world=8
    )
    shard = 4 * 512 * 512 // 8
    assert p.by_category["optimizer_state"] == 2 * shard + 4
    assert p.total < 3 * 4 * 512 * 512


def _mean(output: torch.Tensor, _: object) -> torch.Tensor:
    return output.mean()


def test_a_world_that_cannot_be_is_refused() -> None:
    for world in (0, True, 1.5):
        with pytest.raises(BadInput, match=r"world=.*give the number of ranks, 1 or more"):
            plan(torch.nn.Linear, torch.zeros(2, 4), loss=_mean, world=world)  # type: ignore[arg-type]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(BadInput, match="belongs to a process group"):
            plan(functools.partial(torch.nn.Linear, 4, 4), torch.zeros(2, 4), loss=_mean, world=4)
    finally:
        dist.destroy_process_group()
