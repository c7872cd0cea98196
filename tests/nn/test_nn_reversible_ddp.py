"""Reversible chains under DistributedDataParallel: two processes on gloo against one with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memspan.nn.reversible import ReversibleBlock, ReversibleSequential

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def network() -> nn.Module:
    """Two chains and ordinary layers around them; one part is shared by two blocks."""
    torch.manual_seed(5)
    part = lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.Tanh())  # noqa: E731
    shared = part()
    first = ReversibleSequential(ReversibleBlock(shared, part()), ReversibleBlock(shared, part()))
    second = ReversibleSequential(*(ReversibleBlock(part(), part()) for _ in range(3)))
    return nn.Sequential(first, nn.Linear(6, 6), second, nn.Linear(6, 1)).double()


def batch() -> torch.Tensor:
    return torch.randn(8, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))


def work(rank: int, port: str, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = []
    for static in (False, True):
        model = DistributedDataParallel(network(), static_graph=static)
        for _ in range(3):  # a parameter marked ready twice, or left waiting, fails in one of these
            model.zero_grad()
            model(batch()[4 * rank : 4 * rank + 4]).square().mean().backward()
        found.append([p.grad for p in model.module.parameters()])
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out = tmp_path / "gradients.pt"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    commands = [[sys.executable, __file__, str(rank), port, str(out)] for rank in range(2)]
    ranks = [subprocess.Popen(command, env=environment) for command in commands]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    model = network()
    model(batch()).square().mean().backward()
    expected = [p.grad for p in model.parameters()]
    for gradients in torch.load(out, weights_only=True):
        for one, two in zip(gradients, expected, strict=True):
            assert torch.allclose(one, two, rtol=1e-11, atol=1e-13)


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2], sys.argv[3])
