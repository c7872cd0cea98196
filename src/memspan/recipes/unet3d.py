"""Reversible 3-D U-Net: what is a volume's worth of activations exchanged for, and is anything lost?

*Training*: the same network, start and crops of a real brain, run plainly and reversibly, beside MONAI's
U-Net of as many parameters and two rivals that learn nothing. *Bytes*: allocator peaks of a training step
against depth. *Budget*: what fits in the bytes of the plain network, by bisection on measured peaks. *Speed*:
steps of all methods in rounds; ratios are taken inside a round, where all meet the same load.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.base.files import load_state, save_state
from memspan.base.rng import rng, seed_of
from memspan.data.volumes import Volume, read_volume
from memspan.ledger import AllocatorPeak, nbytes, saved_bytes
from memspan.models.unet3d import ReversibleUNet3d, dice_scores, soft_dice_loss
from memspan.recipes import _unet3d_brains as brains
from memspan.recipes import _unet3d_show as show
from memspan.recipes._unet3d_cases import load_cases
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report import Claim, Figure, Lines, Series, claim
from memspan.report.stats import Interval, mean_interval, paired_difference

PAPER = "Reversible 3D U-Net, BrainLes 2020"
PLAIN, CHECKPOINT, OURS, MONAI, MONAI_CHECKPOINT = show.METHODS
EMPTY, COPY = "no mask", "training masks copied"
WAYS: dict[str, Any] = {PLAIN: "store", CHECKPOINT: "checkpoint", OURS: "reversible"}
CAPS = {"volume": 6, "depth": 8, "channels": 4}  # times the plain network, where the search ends


@dataclass(frozen=True)
class Options:
    """What is trained on how much, and how much is measured."""

    brain: Literal["first", "colin27", "mni152"] = option(
        "mni152", "brain to train on; colin27 has regions that need long training; first takes it if there"
    )
    cases: Path | None = option(  # noqa: RUF009
        None, "a folder of labelled NIfTI scans to train on instead: the Decathlon's layout or BraTS's"
    )
    limit: int = option(24, "scans taken from that folder at most", minimum=3)
    channels: tuple[int, ...] = option((16, 32, 64), "widths of the three levels, even", minimum=2)
    depth: int = option(1, "couplings in each chain, in training", minimum=1)
    steps: int = option(40, "training steps, one crop each", unit="steps", minimum=1)
    crop: int = option(24, "side of the crops, a multiple of 4", unit="voxels", minimum=8)
    rate: float = option(3e-3, "learning rate of Adam")
    size: int = option(16, "side of the cube whose bytes are measured", unit="voxels", minimum=8)
    depths: tuple[int, ...] = option((1, 2, 4), "depths whose peaks are measured", minimum=1)
    grow: bool = option(True, "find what fits in the plain network's bytes")
    rounds: int = option(5, "timing rounds; 0 leaves out the speed part", unit="rounds")
    peers: bool = option(True, "measure MONAI's networks too, where they are installed")
    volume: Path | None = option(None, "a NIfTI volume to segment with the trained network")  # noqa: RUF009


def run(task: Task[Options]) -> None:
    """Measure bytes, budgets, speed and quality; then segment the user's own volume."""
    o = task.options
    for name in ("crop", "size"):
        if getattr(o, name) % brains.MULTIPLE:
            refuse(name, getattr(o, name), f"give a multiple of {brains.MULTIPLE}")
    if len(o.channels) != 3:
        refuse("channels", o.channels, "give three widths")
    own = None if o.volume is None else read_volume(o.volume)  # a bad file is refused before any work
    known = brains.load_brains(o.brain) if o.cases is None else load_cases(o.cases, o.limit)
    if own is not None and (count := (*own.values.shape, 1)[3]) != known.images:
        refuse("volume", str(o.volume), f"it holds {count} images, training has {known.images}")
    for dataset in known.sets:
        task.use(dataset)
    task.note(known.note)
    makers = networks(task, o, known)
    for depth in o.depths:
        for method in makers if depth == min(o.depths) else WAYS:
            work = partial(step_bytes, make=partial(makers[method], depth=depth), known=known, size=o.size)
            task.measure(method=method, seed=0, setting={"part": "bytes", "depth": depth}, work=work)
    for grow in CAPS if o.grow else ():
        work = partial(largest, grow=grow, known=known, o=o)
        task.measure(method=OURS, seed=0, setting={"part": "budget", "grow": grow}, work=work)
    for turn in range(o.rounds):
        for method, make in makers.items():
            work = partial(step_time, make=make, known=known, size=o.crop)
            task.measure(method=method, seed=turn, setting={"part": "speed"}, work=work)
    for seed in task.seeds:
        learn = (name for name in makers if name not in (CHECKPOINT, MONAI_CHECKPOINT))
        for method in (*learn, EMPTY, *((COPY,) if same_space(known) else ())):
            work = partial(train, make=makers.get(method), known=known, o=o, out=task.out)
            task.measure(method=method, seed=seed, setting={"part": "training"}, work=work)
    if own is not None and o.volume is not None:
        name = o.volume.name.removesuffix(".gz").removesuffix(".nii") + "_mask.nii.gz"
        work = partial(segment, own=own, make=makers[OURS], o=o, target=task.out / name, weights=task.out)
        task.measure(method=OURS, seed=0, setting={"part": "your volume"}, work=work)
        task.note(f"{name}, beside this report, holds the mask of {o.volume.name}: {regions_told(known)}.")


def same_space(known: brains.Brains) -> bool:
    """Whether masks of training lie on the other parts, so that they can be copied."""
    shape = known.train[0].y.shape
    return len(known.train) == 1 and all(part.y.shape == shape for part in (*known.valid, *known.test))


def networks(task: Task[Options], o: Options, known: brains.Brains) -> dict[str, Callable[..., nn.Module]]:
    """Makers of all networks; MONAI's where it is installed."""
    images, regions = known.images, len(known.regions)

    def ours(way: Any, depth: int = o.depth, channels: Sequence[int] = o.channels) -> nn.Module:
        return ReversibleUNet3d(images, regions, channels, depth, memory=way)

    makers: dict[str, Callable[..., nn.Module]] = {name: partial(ours, way) for name, way in WAYS.items()}
    monai, why = (
        show.monai_networks(o.channels, images, regions)
        if o.peers
        else ({}, "MONAI's networks were left out.")
    )
    if not monai:
        task.note(why)
    return makers | monai


def random_step(
    known: brains.Brains, size: int, device: torch.device, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """A volume and masks for one step; bytes and time do not depend on what is in them."""
    shape = (size, size, length or size)
    x = torch.randn(1, known.images, *shape, device=device)
    return x, (torch.rand(1, len(known.regions), *shape, device=device) > 0.5).float()


def step_bytes(cell: Cell, make: Callable[..., nn.Module], known: brains.Brains, size: int) -> Outcome:
    """Allocator peak of a training step beyond weights and input, and what of it was saved for backward."""
    model, (x, y) = make().to(cell.device), random_step(known, size, cell.device)
    saved = saved_bytes(soft_dice_loss(model(x), y), exclude=[x, y])
    peak = step_peak(model, x, y)
    held = {"parameters": nbytes(model), "saved_activations": saved, "temporaries": peak - saved}
    return Outcome({"peak_bytes": peak, "parameters": sum(p.numel() for p in model.parameters())}, held)


def step_peak(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes at the highest point of a forward and backward pass, beyond those held before."""
    model.zero_grad(set_to_none=True)
    before = nbytes(model) + x.nbytes + y.nbytes if x.is_cuda else 0
    with AllocatorPeak(x.device) as truth:
        soft_dice_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
    return truth.peak - before


def largest(cell: Cell, grow: str, known: brains.Brains, o: Options) -> Outcome:
    """The largest reversible step in the bytes of the plain one, by bisection on measured peaks."""
    first, step = {"volume": (o.size, 4), "depth": (1, 1), "channels": (o.channels[0], 2)}[grow]

    def peak(value: int, way: Any = "reversible") -> int:
        depth = value if grow == "depth" else 1
        widths = [2 * round(c * value / first / 2) for c in o.channels] if grow == "channels" else o.channels
        model = ReversibleUNet3d(known.images, len(known.regions), widths, depth, memory=way).to(cell.device)
        x, y = random_step(known, o.size, cell.device, value if grow == "volume" else o.size)
        return step_peak(model, x, y)

    budget = peak(first, "store")
    values = range(first, CAPS[grow] * first + 1, step)
    low, high = 0, len(values) - 1
    if grow != "depth" or peak(values[high]) > budget:  # depth has no end: its cap fits
        while high - low > 1:
            middle = (low + high) // 2
            cell.step(middle, high, f"{grow} {values[middle]}")
            low, high = (middle, high) if peak(values[middle]) <= budget else (low, middle)
        high = low
    return Outcome(
        {"ratio": values[high] / first, "budget_bytes": budget}, {"temporaries": peak(values[high])}
    )


def step_time(cell: Cell, make: Callable[..., nn.Module], known: brains.Brains, size: int) -> Outcome:
    """Seconds of a training step, the faster of two after one that warms up."""
    model, (x, y) = make().to(cell.device), random_step(known, size, cell.device)
    times = []
    for _ in range(3):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        soft_dice_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return Outcome({}, {"parameters": nbytes(model)}, seconds={"step": min(times[1:])})


def train(
    cell: Cell, make: Callable[..., nn.Module] | None, known: brains.Brains, o: Options, out: Path
) -> Outcome:
    """One network on random crops of the training part, scored on whole parts that it has not seen."""
    if make is None:
        masks = known.train[0].y
        give = torch.zeros_like if cell.method == EMPTY else lambda _: masks
        guesses = [[give(part.y) for part in parts] for parts in (known.valid, known.test)]
        kept = {"parameters": 0 if cell.method == EMPTY else masks.numel() // 8}  # masks as bits
        series = show.packed(known.test[0], guesses[1][0]) if cell.seed == 0 else {}
        return Outcome(scores(guesses, known, o.peers), kept, series=series)
    torch.manual_seed(seed_of("unet3d", cell.seed))  # the same start for all ways to spend memory
    model = make().to(cell.device)
    optimizer = torch.optim.Adam(model.parameters(), o.rate, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, o.rate, total_steps=o.steps + 1)
    draw, saved = rng("unet3d.crops", cell.seed), 0
    with cell.timed("train"):
        for step in range(o.steps):
            part = known.train[int(draw.integers(len(known.train)))]
            x, y = crop(part, o.crop, draw, cell.device)
            loss = soft_dice_loss(model(x), y)
            saved = saved or saved_bytes(loss, exclude=[x, y])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            cell.step(step + 1, o.steps, f"loss {loss.item():.3f}")
    model.eval()
    with torch.no_grad():
        guesses = [
            [(model(part.x.to(cell.device)) > 0).cpu() for part in parts]
            for parts in (known.valid, known.test)
        ]
    if cell.seed == 0 and cell.method == OURS:
        save_state(
            out / "unet3d.safetensors", model.state_dict(), {"channels": list(o.channels), "depth": o.depth}
        )
    series = show.packed(known.test[0], guesses[1][0]) if cell.seed == 0 else {}
    held = {
        "parameters": nbytes(model),
        "optimizer_state": nbytes([*optimizer.state.values()]),
        "saved_activations": saved,
    }
    return Outcome(scores(guesses, known, o.peers), held, series=series)


def crop(
    part: brains.Part, side: int, draw: np.random.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A random cube with some of the second region, turned over at random, its greys shifted a little."""
    shape, inner = part.x.shape[2:], min(1, part.y.shape[1] - 1)
    sides = [min(side, whole) for whole in shape]
    for _ in range(20):
        ends = [int(draw.integers(one, whole + 1)) for whole, one in zip(shape, sides, strict=True)]
        d, h, w = (slice(end - one, end) for end, one in zip(ends, sides, strict=True))
        place = (slice(None), slice(None), d, h, w)
        if float(part.y[place][:, inner].sum()) > 0:
            break
    turned = [axis for axis in (2, 3, 4) if draw.random() < 0.5]
    x = part.x[place] * float(draw.uniform(0.9, 1.1)) + float(draw.uniform(-0.1, 0.1))
    return x.flip(turned).to(device), part.y[place].flip(turned).to(device)


def scores(guesses: Sequence[Sequence[Tensor]], known: brains.Brains, distances: bool) -> dict[str, float]:
    """Dice on the validation and the test parts, mean over regions and of each; 95% Hausdorff distance."""
    valid, test = (
        torch.stack([dice_scores(g, part.y)[0] for g, part in zip(some, parts, strict=True)]).mean(0)
        for some, parts in zip(guesses, (known.valid, known.test), strict=True)
    )
    each = {f"dice_{place + 1}": float(value) for place, value in enumerate(test)}
    if distances:
        far = [show.hausdorff_95(g, part.y) for g, part in zip(guesses[1], known.test, strict=True)]
        if all(far):
            each["hd95_mm"] = sum(one["hd95_mm"] for one in far) / len(far)
    return {"dice": float(test.mean()), "dice_valid": float(valid.mean()), **each}


def segment(
    cell: Cell, own: Volume, make: Callable[..., nn.Module], o: Options, target: Path, weights: Path
) -> Outcome:
    """The user's volume in sliding windows, and its mask as NIfTI: 1, 2, 3 from the outermost region in."""
    model = make().to(cell.device).eval()
    model.load_state_dict(load_state(weights / "unet3d.safetensors")[0])
    with cell.timed("segment"):
        sizes = show.segment_volume(model, own, target, window=2 * o.crop, device=cell.device)
    return Outcome(
        {f"millilitres_{place + 1}": ml for place, ml in enumerate(sizes)}, {"parameters": nbytes(model)}
    )


def regions_told(known: brains.Brains) -> str:
    """What the numbers in a mask mean."""
    return ", ".join(f"{place + 1} {name}" for place, name in enumerate(known.regions))


def judge(found: Measurements, o: Options) -> Sequence[Claim]:
    """The paper's claims on bytes and budgets, and that quality and time are not their price."""
    sizes = found.where(part="bytes")

    def peak(method: str, depth: int) -> float | None:
        rows = sizes.where(method=method, depth=depth)
        return rows.values("peak_bytes")[0] if rows else None

    def exactly(value: float | None) -> Interval | None:
        return None if value is None else Interval(value, value, value, 1)

    def less(depth: int) -> Interval | None:
        plain, ours = peak(PLAIN, depth), peak(OURS, depth)
        return exactly(plain / ours if plain and ours else None)

    shallow, deep = min(o.depths), max(o.depths)
    ends = [peak(method, depth) for method in (PLAIN, OURS) for depth in (shallow, deep)]
    a, b, c, d = (end or 0.0 for end in ends)
    slope = exactly(100 * (d - c) / (b - a)) if None not in ends and b > a else None

    def fits(grow: str) -> Interval | None:
        rows = found.where(part="budget", grow=grow)
        return exactly(rows.values("ratio")[0]) if rows else None

    def slower(than: str) -> Interval | None:
        one, two = (found.where(part="speed", method=name) for name in (OURS, than))
        ratios = [x.seconds["step"] / y.seconds["step"] for x, y in zip(one, two, strict=False)]
        return mean_interval(ratios) if ratios else None

    trained = [found.where(part="training", method=name) for name in (OURS, PLAIN)]
    gap = paired_difference(*(rows.values("dice") for rows in trained)) if all(trained) else None
    times = partial(claim, unit="x", exact=True)
    five = f"A plain step peaks at five times the bytes of a reversible one at depth {deep}"
    flat = "The reversible peak grows with depth by less than 5% of the plain peak's growth"
    inside = "In the bytes of the plain network fits a reversible one of"
    same = "Mean Dice differs by less than 0.02 from the plain network's, same start and crops"
    return [
        times(f"A plain step peaks at twice the bytes at depth {shallow}", PAPER, less(shallow), ">= 2"),
        times(five, PAPER, less(deep), ">= 5"),
        times(flat, PAPER, slope, "< 5", unit="%"),
        times(f"{inside} 2.5 times the volume (paper: 3)", PAPER, fits("volume"), ">= 2.5"),
        times(f"{inside} 1.25 times the depth (paper: 1.25)", PAPER, fits("depth"), ">= 1.25"),
        times(f"{inside} 1.6 times the channels (paper: 2)", PAPER, fits("channels"), ">= 1.6"),
        claim(same, PAPER, gap, "in [-0.02, 0.02]", "Dice"),
        claim("A step takes at most 1.6 times the plain one", "memspan", slower(PLAIN), "<= 1.6", "x"),
        claim("A step takes at most 1.1 times one with torch.utils.checkpoint", "memspan", slower(CHECKPOINT),
              "<= 1.1", "x"),
    ]  # fmt: skip


def figures(found: Measurements, o: Options) -> Sequence[Figure]:
    """Bytes against depth, what fits, masks over a slice, and quality against bytes."""
    drawn: list[Figure] = []
    curves = {}
    for method in found.where(part="bytes").methods:
        rows = found.where(part="bytes", method=method)
        curves[method] = Series([float(one.setting["depth"]) for one in rows], rows.values("peak_bytes"))
    if curves:
        axes = "couplings in each chain", "peak of a step"
        drawn.append(Lines("Bytes of a training step against depth", *axes, curves, y_unit="bytes"))
    trained = found.where(part="training")
    slices: list[Figure] = [*show.slices(trained.where(seed=0))]
    points = {}
    for method in trained.methods:
        rows = trained.where(method=method)
        points[method] = Series([sum(one.bytes.values()) for one in rows], rows.values("dice"))
    if points:
        held = "weights, optimizer and saved activations"
        slices.append(Lines("Dice against bytes", held, "mean Dice", points, x_unit="bytes"))
    return [*drawn, *slices]


RECIPE = Recipe(
    name="unet3d",
    title="Reversible 3-D U-Net: larger volumes in the same bytes",
    paper="Memory Efficient 3D U-Net with Reversible Mobile Inverted Bottlenecks, BrainLes at MICCAI 2020",
    room="models",
    component="memspan.models.unet3d.ReversibleUNet3d",
    problem="train on volumes whose activations do not fit",
    answer="a chain of reversible couplings keeps its last output alone; the rest comes back when needed",
    quick_cost="about 3 min",
    options=Options,
    quick=Options(),
    full=Options(brain="first", steps=400, crop=48, size=48, depths=(1, 2, 4, 8), rounds=15),
    tiny=Options(
        channels=(4, 8, 8),
        steps=2,
        crop=8,
        size=8,
        depths=(1, 2),
        grow=False,
        rounds=0,
        peers=False,
    ),
    threads=1,
    run=run,
    judge=judge,
    figures=figures,
    control=EMPTY,
    seeds=(3, 5),
    extras=("volumes",),
)
