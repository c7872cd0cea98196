"""What is measured: bytes, seconds, and accuracy under leaks from fast to slow."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memspan import data
from memspan.base.rng import rng, seed_of
from memspan.ledger import saved_bytes
from memspan.ledger.planner import job
from memspan.nn.spiking import LIF, Unrolled, reset_
from memspan.recipes.engine import Cell, Outcome, Task, option
from memspan.recipes.tracks.linear import logistic
from memspan.recipes.tracks.spiking import (
    Case,
    by_hand,
    conv,
    dense,
    events,
    images,
    jelly,
    jelly_there,
    loss,
    mixed,
    optimized,
    ottt,
    snntorch,
    sounds,
)
from memspan.training import sltt

CONTROL = "never train"
LINEAR = "logistic regression"
OTTT = "OTTT (SpikingJelly)"
JELLY, JELLY_SLTT, MEMOPT, SNN = (
    "SpikingJelly BPTT",
    "SpikingJelly SLTT",
    "SpikingJelly memopt",
    "snnTorch BPTT",
)
TAUS = (1.1, 2.0, 20.0)


@dataclass(frozen=True)
class Options:
    """What a run can change."""

    steps: tuple[int, ...] = option((4, 16), "T of the bytes, the first also of the images", minimum=1)
    rounds: int = option(5, "of the comparison in time, at T = 16", minimum=1)
    batch_size: int = option(64, "examples a step", unit="examples", minimum=2)
    train: int = option(1000, "digits as still images", unit="images", minimum=10)
    image_test: int = option(1000, "test digits as still images", unit="images", minimum=10)
    images: int = option(
        8, "channels of the first convolution there; the second has twice as many", minimum=1
    )
    image_epochs: int = option(2, "passes over the images", unit="epochs", minimum=1)
    image_seeds: int = option(2, "pairs of networks there", minimum=1)
    event_train: int = option(1000, "digits as events", unit="images", minimum=10)
    event_test: int = option(1000, "test digits as events", unit="images", minimum=10)
    event_epochs: int = option(8, "passes over the events", unit="epochs", minimum=1)
    event_seeds: int = option(3, "pairs of networks there", minimum=1)
    sound_train: int = option(1350, "spoken digits", unit="clips", minimum=10)
    sound_epochs: int = option(6, "passes over the clips", unit="epochs", minimum=1)
    sound_seeds: int = option(2, "pairs of networks there", minimum=1)
    recall_steps: int = option(150, "optimization steps of delayed recall", unit="steps", minimum=1)
    recall_seeds: int = option(3, "pairs of networks there", minimum=1)


FULL = Options(
    steps=(4, 8, 16, 32), rounds=7, train=2000, image_seeds=6, event_test=2000, event_seeds=12, sound_seeds=4,
    recall_steps=250,
)  # fmt: skip
TINY = Options(
    steps=(2, 4), rounds=1, batch_size=8, train=40, image_test=40, event_train=40, event_test=40,
    event_epochs=1, sound_train=40, sound_epochs=1, recall_steps=3, image_seeds=1, event_seeds=1,
    sound_seeds=1, recall_seeds=1,
)  # fmt: skip
STEPS: dict[str, Callable[[nn.Module, int], Any]] = {
    "BPTT": lambda net, T: sltt.BPTTStep(net, loss, time_dim=1),
    "truncated BPTT": lambda net, T: sltt.TBPTTStep(net, loss, 4, time_dim=1),
    "SLTT": lambda net, T: online(net),
    "SLTT-1": lambda net, T: online(net, 1),
    "SLTT-1, unbiased": lambda net, T: online(net, 1, "unbiased"),
    "SLTT-T/4": lambda net, T: online(net, max(1, T // 4)),
    "SLTT-T/4, unbiased": lambda net, T: online(net, max(1, T // 4), "unbiased"),
    "checkpointed BPTT": lambda net, T: sltt.CheckpointedStep(net, loss, time_dim=1),
}
PAIR = ("BPTT", "SLTT")


def run(task: Task[Options]) -> None:
    """The six parts, shortest first."""
    o = task.options
    for T in o.steps:
        for name in ("BPTT", "SLTT", MEMOPT):
            if name != MEMOPT or (o.steps[0] == T and jelly_there(task.note)):
                work = partial(bytes_of, T=T, size=o.batch_size)
                task.measure(method=name, seed=0, setting={"part": "bytes", "T": T}, work=work)
    for network in ("convolutional", "fully connected"):
        for turn in range(o.rounds):
            work = partial(seconds_of, network=network, size=o.batch_size, peers=jelly_there(task.note))
            task.measure(
                method="all ways", seed=turn, setting={"part": "time", "network": network}, work=work
            )
    for seed in range(o.recall_seeds):
        for T, tau, names in ((10, 20.0, (*PAIR, CONTROL)), (20, 20.0, PAIR), (10, 1.1, PAIR[:1])):
            for name in names:
                setting = {"part": "recall", "T": T, "tau": tau}
                work = partial(recall, T=T, tau=tau, steps=o.recall_steps)
                task.measure(method=name, seed=seed, setting=setting, work=work)
    digits = mixed(task.use(data.load_first(("mnist", "mnist-5k", "fashion-mnist"), data.ImageSet)))
    compare(
        task,
        "images",
        images(digits, o.train, o.image_test, o.steps[0], o.images, o.image_epochs),
        (1.1,),
        (*PAIR, CONTROL),
        o.image_seeds,
    )
    every = ("truncated BPTT", *list(STEPS)[3:7], OTTT)
    compare(
        task,
        "events",
        events(digits, o.event_train, o.event_test, o.event_epochs),
        TAUS,
        PAIR,
        o.event_seeds,
        once=(2.0, (*every, CONTROL, LINEAR)),
    )
    try:
        clips = task.use(data.load("fsdd", data.ArraySet))
    except data.DataNotFound as error:
        task.note(f"spoken digits are left out: {error}")
        return
    compare(
        task,
        "sound",
        sounds(clips, o.sound_train, o.sound_epochs),
        (20.0,),
        PAIR,
        o.sound_seeds,
        once=(20.0, (LINEAR,)),
    )


def compare(
    task: Task[Options], part: str, case: Case, taus: tuple[float, ...], names: tuple[str, ...], seeds: int,
    once: tuple[float, tuple[str, ...]] = (0.0, ()),
) -> None:  # fmt: skip
    """The pair at every leak and seed, and the others at one leak for up to three seeds."""
    for seed in range(seeds):
        for tau in taus:
            more = once[1] if tau == once[0] and seed < 3 else ()
            for name in (*names, *more):
                if name == OTTT and not jelly_there(task.note):
                    continue
                setting = {"part": part, "tau": tau}
                work = partial(learn, case=case, tau=tau, size=task.options.batch_size, part=part)
                task.measure(method=name, seed=seed, setting=setting, work=work)


def online(net: nn.Module, k: int | None = None, scale: Any = "reference") -> sltt.OnlineStep:
    """SLTT whatever the leak: that is what is measured here."""
    return sltt.OnlineStep(sltt.convert_(net, max_decay=1), loss, k, scale, time_dim=1)


# -- cells -------------------------------------------------------------------------------------------------


def learn(cell: Cell, case: Case, tau: float, size: int, part: str) -> Outcome:
    """Train one network and test it: the sum of outputs over time decides."""
    if cell.method == LINEAR:
        cut = len(case.x) * 4 // 5
        x, x_test = case.x.sum(1).numpy(), case.x_test.sum(1).numpy()
        fitted = logistic((x[:cut], case.y[:cut]), (x[cut:], case.y[cut:]))
        score = fitted.score(x_test, case.y_test)
        return Outcome({"accuracy": score}, {"parameters": 8 * fitted.trained}, trained=fitted.trained)
    torch.manual_seed(seed_of("sltt", part, cell.seed))  # the same first weights for every method
    T, kept = case.x.shape[1], 0
    net: nn.Module
    step: Any
    if cell.method == OTTT:
        net, step = ottt(case.make, tau)
    else:
        net = case.make(lambda: LIF(tau))
        step = None if cell.method == CONTROL else STEPS[cell.method](net, T)
        first = case.x[:size, 0].clone()
        steps_kept = {"BPTT": T, "truncated BPTT": 4}.get(cell.method, 1)
        kept = saved_bytes(net(first), exclude=[first]) * steps_kept
        reset_(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    total = case.epochs * -(-len(case.x) // size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    done = 0
    with cell.timed("training"):
        for epoch in range(case.epochs if step else 0):
            order = torch.from_numpy(rng("sltt", part, cell.seed, epoch).permutation(len(case.x)))
            for rows in order.split(size):  # type: ignore[no-untyped-call]
                if len(rows) > 1:
                    step(case.x[rows], case.y[rows])
                    optimizer.step()
                    optimizer.zero_grad()
                schedule.step()
                done += 1
                cell.step(done, total)
    held = {"saved_activations": kept, "parameters": sum(p.nbytes for p in net.parameters())}
    trained = sum(p.numel() for p in net.parameters()) if step else 0
    return Outcome({"accuracy": tested(net, case)}, held, trained=trained)


def tested(net: nn.Module, case: Case) -> float:
    """Share of right answers."""
    right = 0
    net.eval()
    with torch.no_grad():
        for x, y in zip(case.x_test.split(250), case.y_test.split(250), strict=True):  # type: ignore[no-untyped-call]
            reset_(net)
            right += int((sum(net(now) for now in x.unbind(1)).argmax(1) == y).sum())  # type: ignore[union-attr]
    reset_(net)
    return right / len(case.y_test)


def recall(cell: Cell, T: int, tau: float, steps: int) -> Outcome:
    """A cue, a stretch of distractors, a signal to answer: the loss stands at the last step alone."""
    torch.manual_seed(seed_of("recall", cell.seed))
    net: nn.Module = nn.Sequential(nn.Linear(13, 64), LIF(tau), nn.Linear(64, 4))
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    step: Any = (
        sltt.OnlineStep(sltt.convert_(net, max_decay=1), F.cross_entropy, loss_at="last")
        if cell.method == "SLTT"
        else sltt.BPTTStep(net, F.cross_entropy, loss_at="last")
    )
    for turn in range(0 if cell.method == CONTROL else steps):
        step(*cues("train", cell.seed, turn, T, 128))
        optimizer.step()
        if turn < steps - 1:
            optimizer.zero_grad()
        cell.step(turn + 1, steps)
    if cell.method == CONTROL:
        step(*cues("train", cell.seed, 0, T, 128))
    of_cue = net[0].weight.grad[:, :4].abs().max()  # type: ignore[index, union-attr]
    x, y = cues("test", cell.seed, 0, T, 1000)
    with torch.no_grad():
        reset_(net)
        out = [net(now) for now in x][-1]
    quality = {"accuracy": float((out.argmax(1) == y).float().mean()), "cue gradient": float(of_cue)}
    trained = 0 if cell.method == CONTROL else sum(p.numel() for p in net.parameters())
    return Outcome(quality, {"parameters": sum(p.nbytes for p in net.parameters())}, trained=trained)


def cues(part: str, seed: int, turn: int, T: int, n: int) -> tuple[Tensor, Tensor]:
    """(T, n, 13) spikes: 4 cues at the first step, 8 distractors, 1 signal at the last."""
    draws = rng("recall", part, seed, turn)
    y = draws.integers(0, 4, n)
    x = np.zeros((T, n, 13), np.float32)
    x[0, np.arange(n), y] = 1
    x[1:-1, :, 4:12] = draws.random((T - 2, n, 8)) < 0.3
    x[-1, :, 12] = 1
    return torch.from_numpy(x), torch.from_numpy(y)


def bytes_of(cell: Cell, T: int, size: int) -> Outcome:
    """What the graph keeps before its backward pass, and the peak of a whole training step."""
    x = torch.rand(size, 1, 28, 28)
    y = torch.arange(size) % 10
    net = conv(lambda: LIF(1.1)) if cell.method != MEMOPT else optimized(conv(jelly("LIFNode")), x, T)
    graphs = 1 if cell.method == "SLTT" else T
    kept = saved_bytes(torch.stack([loss(net(x), y) for _ in range(graphs)]).mean(), exclude=[x, y])
    reset_(net)
    trained = sum(p.numel() for p in net.parameters())
    if cell.method == MEMOPT:
        return Outcome({"saved": kept}, {"saved_activations": kept}, trained=trained)
    batch = (x[:, None].repeat(1, T, 1, 1, 1), y)
    method = ["sltt"] if cell.method == "SLTT" else []
    plain = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    whole = job(Unrolled(net), batch, plain, method, over_time)
    planned = whole.predict(size)
    return Outcome({"saved": kept, "peak": planned.total}, {"saved_activations": kept}, trained=trained)


def over_time(out: Tensor, y: Tensor) -> Tensor:
    """The loss of (B, T, C) outputs, a mean over steps."""
    return torch.stack([loss(now, y) for now in out.unbind(1)]).mean()


def seconds_of(cell: Cell, network: str, size: int, peers: bool) -> Outcome:
    """CPU seconds of one gradient at T = 16 (10 for the dense network), every way in turn."""
    T, make = (16, conv) if network == "convolutional" else (10, dense)
    shape = (size, T, 1, 28, 28) if make is conv else (size, T, 256)
    x = torch.rand(size, 1, 1, 28, 28).expand(shape) if make is conv else (torch.rand(shape) < 0.12).float()
    y = torch.arange(size) % 10
    ways: dict[str, Callable[[], object]] = {}
    for name, step in STEPS.items():
        net = make(lambda: LIF(1.1))
        ways[name] = partial(one_gradient, net, partial(step(net, T), x, y))
    if peers:
        for name, neuron in (
            (JELLY, jelly("LIFNode")),
            (JELLY_SLTT, jelly("SLTTLIFNode")),
            (SNN, snntorch()),
        ):
            net = make(neuron)
            ways[name] = partial(one_gradient, net, partial(by_hand, net, x, y, name == JELLY_SLTT))
        if make is conv:
            net = optimized(make(jelly("LIFNode")), x[:, 0], T)
            ways[MEMOPT] = partial(one_gradient, net, partial(by_hand, net, x, y, False))
    names = list(ways)
    random.shuffle(names)
    for way in names:  # warms up
        ways[way]()
    seconds = {}
    for way in names:
        begun = time.process_time()
        ways[way]()
        seconds[way] = time.process_time() - begun
    trained = sum(p.numel() for p in make(lambda: LIF(1.1)).parameters())
    return Outcome({}, {"parameters": 4 * trained}, seconds, trained=trained)


def one_gradient(net: nn.Module, way: Callable[[], object]) -> None:
    """One call from gradients of None."""
    net.zero_grad(set_to_none=True)
    way()
