"""What every rank of a group checks; run by ``test_zero_ranks.py``."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks  # noqa: F401  # loaded before the fork
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from memspan.base import BadInput
from memspan.base.files import CorruptFile
from memspan.ledger import CommLedger, Ledger
from memspan.training import zero
from training.ranks import on

AdamW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


class Awkward(nn.Module):
    """Tied, frozen, empty, odd-sized, unused and sometimes used parameters, and one larger than a small
    bucket."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(31, 7)
        self.inside = nn.Linear(7, 23)
        self.frozen = nn.Linear(23, 23)
        self.wide = nn.Linear(23, 61, bias=False)
        self.back = nn.Linear(61, 7)
        self.sometimes = nn.Linear(7, 7)
        self.never = nn.Linear(5, 3)
        self.head = nn.Linear(7, 31, bias=False)
        self.head.weight = self.tokens.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.frozen.requires_grad_(False)

    def forward(self, ids: torch.Tensor, extra: bool = False) -> torch.Tensor:
        x = self.tokens(ids)
        x = self.back(torch.tanh(self.wide(torch.tanh(self.frozen(self.inside(x))))))
        if extra:
            x = x + self.sometimes(x)
        return self.head(x * self.scale)


def awkward(empty: bool = True) -> Awkward:
    torch.manual_seed(3)
    model = Awkward()
    if not empty:
        del model.nothing
    return model


def mlp(width: int = 64) -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    )


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
    return torch.randint(31, (2, 5), generator=draw), torch.randint(31, (2, 5), generator=draw)


def rows(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(8, 16, generator=draw), torch.randn(8, 4, generator=draw)


def loss_of(model: nn.Module, step: int, micro: int, rank: int) -> torch.Tensor:
    ids, wanted = batch(step, micro, rank)
    extra = step % 2 == 0 and rank == 0  # on rank 0 alone, every second step
    return F.cross_entropy(model(ids, extra).flatten(0, 1), wanted.flatten())


def groups_of(model: nn.Module) -> list[dict[str, object]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 0.02}]


@functools.cache
def plain(
    world: int, steps: int, accumulate: int, clip: float, empty: bool = True
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """One process that accumulates in the order (micro-batch, rank)."""
    model, norms = awkward(empty), []
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            for rank in range(world):
                (loss_of(model, step, micro, rank) / (world * accumulate)).backward()
        norms.append(zero.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.named_parameters()}, norms


def train(
    model: nn.Module,
    optimizer: zero.ZeroOptimizer,
    rank: int,
    steps: range,
    accumulate: int = 1,
    clip: float = 0.5,
) -> list[float]:
    norms = []
    for step in steps:
        for micro in range(accumulate):
            optimizer.backward(loss_of(model, step, micro, rank), accumulate)
        norms.append(optimizer.clip_grad_norm_(clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().full_tensor() if hasattr(value, "full_tensor") else value.detach().clone()
        for name, value in model.named_parameters()
    }


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), (name, (one[name] - two[name]).abs().max())


def new_folder() -> Path:
    told = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(told)
    return Path(told[0]) / "checkpoint"


def refused(call: object, *args: object, match: str, **kw: object) -> str:
    with pytest.raises((BadInput, CorruptFile, RuntimeError)) as caught:
        call(*args, **kw)  # type: ignore[operator]
    assert match in str(caught.value), str(caught.value)
    return str(caught.value)


@on(1, 2, 3, 4)
def check_deterministic_runs_are_one_process_bit_for_bit(rank: int, world: int) -> None:
    wanted, norms = plain(world, 6, 1, 0.5)
    for stage in (1, 2):
        for bucket in (None, 1024):
            model = awkward()
            optimizer = zero.shard_(
                model, torch.optim.AdamW, stage=stage, params=groups_of(model), bucket_bytes=bucket,
                deterministic=True, lr=0.01,
            )  # fmt: skip
            assert train(model, optimizer, rank, range(6)) == norms
            same(whole(model), wanted)


@on(2, 3, 4)
def check_stage_3_is_one_process_bit_for_bit(rank: int, world: int) -> None:
    wanted, norms = plain(world, 6, 1, 0.5, empty=False)
    model = awkward(empty=False)
    optimizer = zero.shard_(
        model, torch.optim.AdamW, stage=3, params=groups_of(model), deterministic=True, lr=0.01
    )
    assert train(model, optimizer, rank, range(6)) == norms
    same(whole(model), wanted)


@on(2, 3)
def check_two_micro_batches(rank: int, world: int) -> None:
    wanted, norms = plain(world, 4, 2, 0.5)
    for stage in (1, 2):
        model = awkward()
        optimizer = zero.shard_(
            model, torch.optim.AdamW, stage=stage, params=groups_of(model), bucket_bytes=1024,
            deterministic=True, lr=0.01,
        )  # fmt: skip
        found = train(model, optimizer, rank, range(4), accumulate=2)
        if stage == 2:
            assert found == norms
            same(whole(model), wanted)
        else:  # stage 1 adds a rank's micro-batches up before it sends
            assert all(torch.allclose(value, wanted[name], atol=1e-5) for name, value in whole(model).items())


@on(2, 4)
def check_bytes_and_traffic_follow_the_closed_forms(rank: int, world: int) -> None:
    width = 256
    for stage in (1, 2, 3):
        model = mlp(width)
        size = sum(p.numel() for p in model.parameters())
        optimizer = zero.shard_(model, AdamW, stage=stage, bucket_bytes=1 << 16)
        x, y = rows(0, rank)
        held: dict[str, int] = {}
        for step in range(3):
            with CommLedger() as sent, Ledger(model, optimizer) as led:
                F.mse_loss(model(x), y).backward()
                backward = dict(led.current.by_category)
                optimizer.step()
                held = dict(led.current.by_category)
            if step == 2:
                wanted = zero.predict_bytes(model=model, world=world, stage=stage)
                ideal = zero.predict_bytes(size, world, stage, parameter_bytes=4)
                pieces = sum(len(group["params"]) for group in optimizer.param_groups)
                assert held["optimizer_state"] <= wanted["optimizer_state"] + 4 * pieces
                assert abs(held["optimizer_state"] / ideal["optimizer_state"] - 1) < 0.02
                assert abs(held["parameters.trained"] / ideal["parameters.trained"] - 1) < 0.02
                assert abs(backward["gradients"] / ideal["gradients"] - 1) < 0.02, (backward, ideal)
                if stage != 3:
                    assert held.get("gradients", 0) == 0
                root = 0 if stage != 3 else sum(p.numel() for p in model[4].parameters())
                expected = zero.predict_traffic(size, world, stage, parameter_bytes=4)
                del root
                assert abs(sent.ring / expected - 1) < 0.02, (stage, sent.by_collective, expected)
            optimizer.zero_grad()


@on(2)
def check_buffers_do_not_grow_with_the_model(rank: int, world: int) -> None:
    """What a backward pass holds beyond states and autograd's own gradients: three buckets, and a slice
    arriving."""
    bucket = 1 << 14
    over = []
    for width in (128, 256):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(width * 4, 64), nn.Linear(64, width), nn.Linear(width, width))
        optimizer = zero.shard_(model, AdamW, stage=2, bucket_bytes=bucket)
        taken = []
        pack, land = optimizer._reducer._launch, optimizer._reducer._land

        def launch(
            one: object, pack: object = pack, reducer: object = optimizer._reducer, taken: list = taken
        ) -> None:
            pack(one)  # type: ignore[operator]
            flight = reducer._flying  # type: ignore[attr-defined]
            if flight is not None:
                taken.append(
                    flight.sent.untyped_storage().nbytes() + flight.received.untyped_storage().nbytes()
                )

        optimizer._reducer._launch = launch  # type: ignore[method-assign]
        for _ in range(2):
            model(torch.arange(4)).sum().backward()
            optimizer.step()
        over.append(max(taken))
        del land
    assert over[1] <= 2 * (bucket + 64), over
    assert over[1] <= over[0] + 128, over


@on(1, 2, 3, 4)
def check_a_checkpoint_goes_on_as_if_nothing_had_been(rank: int, world: int) -> None:
    wanted, _ = plain(world, 5, 1, 0.5, empty=False)
    for stage in (2,) if world == 1 else (1, 2, 3):
        folder = new_folder()
        first = awkward(empty=False)
        options = {"params": groups_of(first), "deterministic": True, "lr": 0.01}
        optimizer = zero.shard_(first, torch.optim.AdamW, stage=stage, bucket_bytes=1024, **options)
        train(first, optimizer, rank, range(3))
        optimizer.save(folder)
        refused(optimizer.save, folder, match="new folder")
        for other in {stage, 2 if world > 1 else 1}:
            torch.manual_seed(99)
            model = Awkward()
            del model.nothing
            options = {"params": groups_of(model), "deterministic": True, "lr": 0.5}
            again = zero.shard_(model, torch.optim.AdamW, stage=other, **options)
            again.load(folder)
            train(model, again, rank, range(3, 5))
            same(whole(model), wanted)


@on(1, 2, 3, 4)
def check_a_checkpoint_of_four_is_loaded_at_any_number_of_ranks(rank: int, world: int) -> None:
    folder = Path(tempfile.gettempdir()) / f"zero-elastic-{os.getppid()}"
    model = awkward()
    optimizer = zero.shard_(
        model, torch.optim.AdamW, stage=2, params=groups_of(model), deterministic=True, lr=0.01
    )
    if world == 4:  # the first group to run
        train(model, optimizer, rank, range(3))
        optimizer.save(folder)
        return
    optimizer.load(folder)
    state = optimizer.full_state_dict(rank0_only=False)
    one = awkward()
    plainly = torch.optim.AdamW(groups_of(one), lr=0.01)
    for step in range(3):
        plainly.zero_grad()
        for each in range(4):
            (loss_of(one, step, 0, each) / 4).backward()
        zero.clip_grad_norm_(one.parameters(), 0.5)
        plainly.step()
    same(whole(model), whole(one))
    theirs = plainly.state_dict()
    assert state["param_groups"] == theirs["param_groups"]
    assert state["state"].keys() == theirs["state"].keys()
    for number, values in theirs["state"].items():
        assert values.keys() == state["state"][number].keys()
        for key, value in values.items():
            assert torch.equal(value, state["state"][number][key]), (number, key)
    fresh = torch.optim.AdamW(groups_of(awkward()), lr=0.3)
    fresh.load_state_dict(copy.deepcopy(state))
    back = awkward()
    sharded = zero.shard_(
        back, torch.optim.AdamW, stage=2, params=groups_of(back), deterministic=True, lr=0.3
    )
    sharded.load_state_dict(fresh.state_dict())
    again = sharded.full_state_dict(rank0_only=False)
    assert all(
        torch.equal(value, again["state"][number][key])
        for number, values in state["state"].items()
        for key, value in values.items()
    )


@on(2)
def check_bad_checkpoints_are_refused_before_anything_is_loaded(rank: int, world: int) -> None:
    model = awkward()
    optimizer = zero.shard_(model, AdamW, stage=2)
    base = new_folder()
    for step in range(2):
        loss_of(model, step, 0, rank).backward()
        optimizer.step()
        optimizer.save(base / str(step))
    loss_of(model, 2, 0, rank).backward()
    optimizer.step()
    before, state = whole(model), copy.deepcopy(optimizer.state_dict())

    def broken(what: str) -> Path:
        path = base / what
        if rank == 0:
            shutil.copytree(base / "1", path)
        dist.barrier()
        return path

    def spoil(path: Path, how: object) -> None:
        if rank == 0:
            how(sorted(path.glob("shard*"))[1])  # type: ignore[operator]
        dist.barrier()

    cases = {
        "missing": (lambda file: file.unlink(), "is missing"),
        "cut": (lambda file: file.write_bytes(file.read_bytes()[:-40]), "it was cut or replaced"),
        "mixed": (lambda file: shutil.copy(base / "0" / file.name, file), "from another step"),
        "unfinished": (lambda file: (file.parent / "manifest.json").unlink(), "was not finished"),
        "torn": (
            lambda file: (file.parent / "manifest.json").write_text('{"format": "mem'),
            "cannot be read",
        ),
    }
    for what, (how, told) in cases.items():
        path = broken(what)
        spoil(path, how)
        refused(optimizer.load, path, match=told)
    other = mlp()
    refused(zero.shard_(other, AdamW, stage=2).load, base / "1", match="another model")
    wider = awkward()
    wider.wide = nn.Linear(23, 61, bias=True)
    refused(zero.shard_(wider, AdamW, stage=2).load, base / "1", match="wide.bias")
    plainer = awkward()
    refused(zero.shard_(plainer, torch.optim.SGD, stage=2, lr=0.1).load, base / "1", match="it is of AdamW")
    same(whole(model), before)
    for key, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state["state"][key][name]) for name, value in values.items())
    if rank == 0:
        zero.export(base / "1", base / "model.safetensors")
        from safetensors.torch import load_file

        found = load_file(base / "model.safetensors")
        assert found["tokens.weight"].shape == (31, 7)
        assert {*found} == {name for name, _ in model.named_parameters()}
    optimizer.load(base / "1")
    dist.barrier()
    if rank == 0:
        held = load_file(base / "model.safetensors")
        assert all(torch.equal(held[name], value) for name, value in whole(model).items())


@on(2)
def check_torch_s_own_are_bit_equal_at_two(rank: int, world: int) -> None:
    """20 steps of a small MLP: one process, DDP, ZeroRedundancyOptimizer, FSDP2, and our three stages."""

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        for step in range(20):
            optimizer.zero_grad()
            x, y = rows(step, rank)
            F.mse_loss(model(x), y).backward()
            optimizer.step()
        return {name.removeprefix("module."): value for name, value in whole(model).items()}

    one = mlp()
    alone = AdamW(one.parameters())
    for step in range(20):
        alone.zero_grad()
        for each in range(world):
            x, y = rows(step, each)
            (F.mse_loss(one(x), y) / world).backward()
        alone.step()
    wanted = whole(one)
    ddp = DistributedDataParallel(mlp())
    same(run(ddp, AdamW(ddp.parameters())), wanted)
    ddp = DistributedDataParallel(mlp())
    kept = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    same(run(ddp, kept), wanted)
    ddp = DistributedDataParallel(mlp())
    outer = zero.Sharded(torch.optim.AdamW)(ddp.parameters(), lr=0.01, weight_decay=0.1)
    same(run(ddp, outer), wanted)
    held = sum(
        value.numel() for state in outer.state.values() for key, value in state.items() if key != "step"
    )
    assert abs(held / sum(2 * p.numel() for p in ddp.parameters()) - 1 / world) < 0.02
    assert [len(group["params"]) for group in outer.param_groups] == [6]
    theirs = mlp()
    for layer in theirs:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(theirs)
    same(run(theirs, AdamW(theirs.parameters())), wanted)
    for stage in (1, 2, 3):
        model = mlp()
        same(run(model, zero.shard_(model, AdamW, stage=stage)), wanted)


@on(3)
def check_an_fsdp2_model_is_made_deterministic(rank: int, world: int) -> None:
    one, model = mlp(), mlp()
    alone = AdamW(one.parameters())
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    refused(zero.deterministic_, mlp(), match="fully_shard first")
    zero.deterministic_(model)
    optimizer = AdamW(model.parameters())
    for step in range(5):
        alone.zero_grad()
        for each in range(world):
            x, y = rows(step, each)
            (F.mse_loss(one(x), y) / world).backward()
        alone.step()
        optimizer.zero_grad()
        x, y = rows(step, rank)
        (F.mse_loss(model(x), y) / world).backward()
        optimizer.step()
    same(whole(model), whole(one))


@on(3)
def check_every_elementwise_optimizer(rank: int, world: int) -> None:
    for name in (
        "SGD",
        "Adam",
        "RMSprop",
        "Adagrad",
        "Adadelta",
        "NAdam",
        "RAdam",
        "Adamax",
        "ASGD",
        "Rprop",
    ):
        kw = {"lr": 0.01} | ({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})
        make = getattr(torch.optim, name)
        one, model = mlp(7), mlp(7)
        alone = make(one.parameters(), **kw)
        optimizer = zero.shard_(model, make, stage=2, deterministic=True, bucket_bytes=200, **kw)
        for step in range(4):
            alone.zero_grad()
            for each in range(world):
                x, y = rows(step, each)
                (F.mse_loss(one(x), y) / world).backward()
            alone.step()
            x, y = rows(step, rank)
            optimizer.backward(F.mse_loss(model(x), y))
            optimizer.step()
        same(whole(model), whole(one))


class Scaled(torch.optim.Optimizer):
    """LAMB's way: the step depends on the norm of the whole tensor."""

    def __init__(self, params: object, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})  # type: ignore[arg-type]

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self.state[p].setdefault("factor", torch.zeros(2)).add_(p.norm())
                    p.add_(p.grad, alpha=-group["lr"] * float(p.norm()) / (1e-3 + float(p.grad.norm())))


@on(3)
def check_whole_tensor_optimizers(rank: int, world: int) -> None:
    refused(zero.shard_, mlp(), Scaled, stage=2, match='by="parameter"')
    refused(zero.shard_, mlp(), Scaled, stage=2, by="parameter", match="stage=1")
    one, model = mlp(), mlp()
    alone = Scaled(one.parameters())
    optimizer = zero.shard_(model, Scaled, stage=1, by="parameter", deterministic=True)
    for step in range(4):
        alone.zero_grad()
        for each in range(world):
            x, y = rows(step, each)
            (F.mse_loss(one(x), y) / world).backward()
        alone.step()
        x, y = rows(step, rank)
        optimizer.backward(F.mse_loss(model(x), y))
        optimizer.step()
    same(whole(model), whole(one))
    folder = new_folder()
    optimizer.save(folder)
    again = mlp()
    other = zero.shard_(again, Scaled, stage=1, by="parameter", deterministic=True)
    other.load(folder)
    same(whole(again), whole(model))


@on(2)
def check_what_cannot_be_cut_is_refused(rank: int, world: int) -> None:
    AW = torch.optim.AdamW
    refused(zero.shard_, mlp(), AW, stage=0, match="DistributedDataParallel")
    refused(zero.shard_, mlp(), AW, stage=4, match="stage=4")
    refused(zero.shard_, DistributedDataParallel(mlp()), AW, stage=2, match="wrapped already")
    refused(zero.shard_, mlp(), AW(mlp().parameters()), stage=2, match="give the class")
    refused(zero.shard_, mlp().to("meta"), AW, stage=2, match="one device")
    complexes = nn.Linear(3, 3, dtype=torch.complex64)
    refused(zero.shard_, complexes, AW, stage=2, match="complex")
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, dtype=torch.bfloat16))
    refused(zero.shard_, mixed, AW, stage=2, match="one dtype a group")
    refused(zero.shard_, nn.Linear(3, 3).bfloat16(), AW, stage=2, deterministic=True, match="master_dtype")
    whole_numbers = nn.Linear(3, 3)
    whole_numbers.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    listed = [whole_numbers.codes, *nn.Module.parameters(whole_numbers)]
    refused(zero.shard_, whole_numbers, AW, stage=2, params=listed, match="floating-point")
    refused(zero.shard_, mlp(), AW, stage=2, deterministic=True, fused=True, match="fused")
    refused(zero.shard_, mlp(), AW, stage=2, differentiable=True, match="differentiable")
    refused(zero.shard_, nn.Embedding(4, 4, sparse=True), AW, stage=2, match="sparse=False")
    refused(zero.shard_, mlp(), torch.optim.LBFGS, stage=2, match="LBFGS")
    frozen = mlp().requires_grad_(False)
    refused(zero.shard_, frozen, AW, stage=2, match="no trainable parameter")
    twice = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    twice[1].weight = nn.Parameter(twice[0].weight.data)
    refused(zero.shard_, twice, AW, stage=2, match="storage of 0.weight")
    model = mlp(64 if rank == 0 else 65)
    told = refused(zero.shard_, model, AW, stage=2, match="ranks must agree")
    assert "rank 1" in told
    refused(zero.shard_, mlp(), AW, stage=2, lr=0.1 * (1 + rank), match="ranks must agree")
    model = mlp()
    optimizer = zero.shard_(model, AW, stage=2)
    refused(zero.shard_, model, AW, stage=2, match="sharded already")
    refused(optimizer.no_sync().__enter__, match="use stage=1")
    own = mlp()
    apart = zero.Sharded(AW)(own.parameters(), lr=0.1)
    x, y = rows(0, rank)
    F.mse_loss(own(x), y).backward()
    refused(apart.step, match="differ between ranks")
    solo = dist.new_group([rank], use_local_synchronization=True)
    refused(zero.partitioned_checkpoint, nn.Linear(2, 2), torch.ones(1, 2), group=solo, match="one rank")


@on(2)
def check_later_groups_schedulers_closures_and_moved_parameters(rank: int, world: int) -> None:
    one, model = mlp(), mlp()
    results = []
    for net, sharded in ((one, False), (model, True)):
        net[0].requires_grad_(False)
        first = [{"params": list(net[2].parameters())}, {"params": list(net[4].parameters()), "lr": 0.003}]
        if sharded:
            optimizer = zero.shard_(net, AdamW, stage=2, params=first, deterministic=True)
        else:
            optimizer = AdamW(first)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 0.01], total_steps=20)
        for step in range(6):
            if step == 2:
                net[0].requires_grad_(True)
                optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 0.004})
            if step == 3:
                net[2].requires_grad_(False)  # frozen later
                for parameter in net[2].parameters():
                    parameter.grad = None
            if step == 4 and sharded:
                for parameter in net.parameters():  # as model.to(another device) and back
                    parameter.data = parameter.data.clone()
            if step == 5 and sharded:
                net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
                net[2].requires_grad_(False)

            def closure(
                net: nn.Module = net, optimizer: object = optimizer, sharded: bool = sharded, step: int = step
            ) -> torch.Tensor:
                optimizer.zero_grad()  # type: ignore[attr-defined]
                total = torch.zeros(())
                for each in [rank] if sharded else range(world):
                    x, y = rows(step, each)
                    loss = F.mse_loss(net(x), y)
                    optimizer.backward(loss) if sharded else (loss / world).backward()  # type: ignore[attr-defined]
                    total += loss.detach()
                return total

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert isinstance(optimizer.step(closure), torch.Tensor)
            if step < 1:
                schedule.step()
        results.append(whole(net))
    same(*results)


@on(2)
def check_a_step_with_nan_gradients_is_torch_s(rank: int, world: int) -> None:
    one, model = mlp(), mlp()
    alone = AdamW(one.parameters())
    optimizer = zero.shard_(model, AdamW, stage=2, deterministic=True)
    x, y = rows(0, 0)
    for net in (one, model):
        bad = torch.where(torch.arange(4) == 0, torch.nan, net(x)).sum() if net is one else None
        if net is one:
            net[4].bias.register_hook(lambda g: g * torch.nan)
            F.mse_loss(net(x), y).backward()
        else:
            if rank == 0:
                net[4].bias.register_hook(lambda g: g * torch.nan)
            optimizer.backward(F.mse_loss(net(x), y))
        del bad
    assert zero.clip_grad_norm_(one.parameters(), 1e9).isnan()
    assert optimizer.clip_grad_norm_(1e9).isnan()
    optimizer.zero_grad()
    optimizer.backward(F.mse_loss(model(x), y))
    optimizer.step()
    assert model[4].bias.isnan().all()
    assert not model[0].weight.isnan().any()
    del alone


@on(2)
def check_gradient_scalers_agree_or_are_refused(rank: int, world: int) -> None:
    runs = []
    for stage in (1, 2):
        model = mlp()
        optimizer = zero.shard_(model, torch.optim.SGD, stage=stage, lr=0.1)
        scaler = ShardedGradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(5):
            x, y = rows(step, rank)
            loss = F.mse_loss(model(x), y)
            if step == 1 and rank == 1:
                loss = loss * torch.inf
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if step == 3:
                scaler.unscale_(optimizer)
                optimizer.clip_grad_norm_(0.1)
            scaler.step(optimizer)
            scaler.update()
        runs.append((whole(model), scaler.get_scale()))
        scales = [0.0] * world
        dist.all_gather_object(scales, scaler.get_scale())
        assert len(set(scales)) == 1
        assert not any(value.isnan().any() for value in runs[-1][0].values())
        plain_one = torch.amp.GradScaler("cpu")
        x, y = rows(0, rank)
        plain_one.scale(F.mse_loss(model(x), y)).backward()
        refused(plain_one.step, optimizer, match="ShardedGradScaler")
        optimizer.zero_grad()
    same(runs[0][0], runs[1][0])
    ddp = DistributedDataParallel(mlp())
    optimizer = zero.Sharded(torch.optim.SGD)(ddp.parameters(), lr=0.1)
    other = DistributedDataParallel(mlp())
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    for net, opt in ((ddp, optimizer), (other, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # gradients are whole: any scaler will do
        for step in range(3):
            opt.zero_grad()
            x, y = rows(step, rank)
            loss = F.mse_loss(net(x), y) * (torch.inf if step == 1 and rank == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.unscale_(opt)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
    same(whole(ddp), whole(other))


@on(2)
def check_compiled_and_recomputed_models(rank: int, world: int) -> None:
    class Blocks(nn.Module):
        def __init__(self, reentrant: bool | None) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3))
            self.reentrant = reentrant

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for index in (0, 1, 2, 0):  # the first is used twice
                block = self.blocks[index]
                x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            return x

    found = []
    for reentrant in (None, False, True):
        model = Blocks(reentrant)
        optimizer = zero.shard_(model, AdamW, stage=2, deterministic=True, bucket_bytes=1100)
        for step in range(3):
            x = rows(step, rank)[0].requires_grad_(True)
            optimizer.backward(model(x).square().mean())
            optimizer.step()
        found.append(whole(model))
    same(found[0], found[1])
    for name, value in found[2].items():  # pieces of a reentrant pass are added up in another order
        assert torch.allclose(value, found[0][name], atol=1e-6), name
    model = Blocks(None)
    optimizer = zero.shard_(model, AdamW, stage=2, deterministic=True, bucket_bytes=1100)
    quick = torch.compile(model, backend="aot_eager")
    for step in range(2):
        optimizer.backward(quick(rows(step, rank)[0]).square().mean())
        optimizer.step()
    plainly = Blocks(None)
    optimizer = zero.shard_(plainly, AdamW, stage=2, deterministic=True, bucket_bytes=1100)
    for step in range(2):
        optimizer.backward(plainly(rows(step, rank)[0]).square().mean())
        optimizer.step()
    same(whole(model), whole(plainly))


@on(2, 3)
def check_no_sync_uneven_data_and_broken_passes(rank: int, world: int) -> None:
    for alone_first in (False, True):
        one, model = mlp(), mlp()
        alone = AdamW(one.parameters())
        optimizer = zero.shard_(model, AdamW, stage=1, deterministic=True, bucket_bytes=5000)
        for step in range(4):
            alone.zero_grad()
            sums = []
            for each in range(world):  # stage 1 adds a rank's micro-batches up before it sends
                part = mlp()
                part.load_state_dict(one.state_dict())
                for micro in range(2):
                    x, y = rows(10 * step + micro, each)
                    (F.mse_loss(part(x), y) / (2 * world)).backward()
                sums.append([p.grad for p in part.parameters()])
            for index, parameter in enumerate(one.parameters()):
                parameter.grad = sums[0][index].clone()
                for other in sums[1:]:
                    parameter.grad += other[index]
            alone.step()
            x, y = rows(10 * step, rank)
            with optimizer.no_sync(), CommLedger() as quiet:
                (F.mse_loss(model(x), y) / (2 * world)).backward()
            assert quiet.ring == 0
            x, y = rows(10 * step + 1, rank)
            with optimizer.no_sync() if alone_first else contextlib.nullcontext():
                (F.mse_loss(model(x), y) / (2 * world)).backward()
            optimizer._divided = True
            optimizer.step()
        same(whole(model), whole(one))
    # A rank whose data have ended adds nothing.
    one, model = mlp(), mlp()
    alone = AdamW(one.parameters())
    optimizer = zero.shard_(model, AdamW, stage=2, deterministic=True)
    for step in range(3):
        alone.zero_grad()
        for each in range(world):
            if each == 0 or step < 2:
                x, y = rows(step, each)
                (F.mse_loss(one(x), y) / world).backward()
        alone.step()
        if rank == 0 or step < 2:
            x, y = rows(step, rank)
            optimizer.backward(F.mse_loss(model(x), y))
        else:
            optimizer._divided = True
        optimizer.step()
    same(whole(model), whole(one))
    # An exception between backward and step, and one inside backward, on every rank.
    before = whole(model)
    x, y = rows(7, rank)
    optimizer.backward(F.mse_loss(model(x), y))
    optimizer.zero_grad()
    hook = model[0].weight.register_hook(lambda g: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        optimizer.backward(F.mse_loss(model(x), y))
    hook.remove()
    refused(optimizer.step, match="did not end")
    optimizer.zero_grad()
    same(whole(model), before)
    optimizer.backward(F.mse_loss(model(x), y))
    optimizer.step()
    alone.zero_grad()
    for each in range(world):
        x, y = rows(7, each)
        (F.mse_loss(one(x), y) / world).backward()
    alone.step()
    same(whole(model), whole(one))


@on(2)
def check_sixteen_bit_parameters_with_a_float32_copy(rank: int, world: int) -> None:
    one = mlp()
    model = mlp().bfloat16()
    masters = [p.detach().bfloat16().float().requires_grad_() for p in one.parameters()]
    alone = AdamW(masters)
    net = mlp().bfloat16()
    optimizer = zero.shard_(model, AdamW, stage=2, deterministic=True, master_dtype=torch.float32)
    for step in range(4):
        grads = []
        for each in range(world):
            net.zero_grad()
            x, y = rows(step, each)
            (F.mse_loss(net(x.bfloat16()).float(), y) / world).backward()
            grads.append([p.grad.float() for p in net.parameters()])
        for index, master in enumerate(masters):
            master.grad = grads[0][index] + grads[1][index]
        alone.step()
        with torch.no_grad():
            for held, master in zip(net.parameters(), masters, strict=True):
                held.copy_(master)
        x, y = rows(step, rank)
        optimizer.backward(F.mse_loss(model(x.bfloat16()).float(), y))
        optimizer.step()
    same(whole(model), whole(net))
    folder = new_folder()
    optimizer.save(folder)
    again = mlp().bfloat16()
    other = zero.shard_(again, AdamW, stage=1, deterministic=True, master_dtype=torch.float32)
    other.load(folder)
    x, y = rows(9, rank)
    for net, opt in ((model, optimizer), (again, other)):
        opt.backward(F.mse_loss(net(x.bfloat16()).float(), y))
        opt.step()
    same(whole(model), whole(again))
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(zeros)  # in place: the float32 copies follow
    optimizer.step()
    assert all(not value.any() for value in whole(model).values())


@on(2, 4)
def check_unshard_gives_the_whole_model_back(rank: int, world: int) -> None:
    for stage in (1, 2, 3):
        model = awkward(empty=False)
        optimizer = zero.shard_(model, AdamW, stage=stage)
        loss_of(model, 1, 0, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        held = whole(model)
        refused(zero.unshard_, mlp(), optimizer, match="made for this model")
        zero.unshard_(model, optimizer)
        assert type(model) is Awkward
        assert all(type(value) is nn.Parameter for value in model.parameters())
        assert model.head.weight is model.tokens.weight
        same(whole(model), held)
        loss_of(model, 1, 0, 0).backward()
        assert model.wide.weight.grad is not None
        zero.shard_(model, AdamW, stage=stage)


@on(2, 3)
def check_partitioned_checkpoints_are_checkpoints(rank: int, world: int) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(7, 7), nn.Dropout(0.3), nn.Linear(7, 7))

    def call(
        x: torch.Tensor, mask: torch.Tensor, nothing: None, times: int, *, add: torch.Tensor
    ) -> torch.Tensor:
        assert nothing is None
        assert mask.dtype == torch.long
        return block(x) * mask.view(-1, 1) * times + add

    def nested(x: torch.Tensor, *args: object, **kw: object) -> torch.Tensor:
        return zero.partitioned_checkpoint(call, torch.tanh(x), *args, group=dist.group.WORLD, **kw)

    buffer = zero.ContiguousBuffer(4 * 200)
    ways = {
        "torch": lambda f, *a, **k: checkpoint(f, *a, use_reentrant=False, **k),
        "ours": functools.partial(zero.partitioned_checkpoint, group=dist.group.WORLD),
        "offload": functools.partial(zero.partitioned_checkpoint, group=dist.group.WORLD, offload=True),
        "buffer": functools.partial(zero.partitioned_checkpoint, group=dist.group.WORLD, buffer=buffer),
    }
    for fn in (call, nested):
        wanted = None
        for way in ways.values():
            torch.manual_seed(4)
            x = torch.sin(torch.arange(5.0 * 7)).view(5, 7).requires_grad_()
            add = torch.ones(7, requires_grad=True)
            block.zero_grad()
            way(fn, x, torch.arange(5), None, 3, add=add).square().sum().backward()
            found = [x.grad, add.grad, *(p.grad.clone() for p in block.parameters())]
            if wanted is None:
                wanted = found
            assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
            buffer.reset()
    kept: list[int] = []
    own = zero.ContiguousBuffer(4000)
    x = torch.ones(5, 7, requires_grad=True)
    y = zero.partitioned_checkpoint(block, x, group=dist.group.WORLD, buffer=own)
    kept.append(own.used)
    assert kept == [-(-35 // world) * 4]
    y.sum().backward()
