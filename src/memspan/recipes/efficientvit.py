"""EfficientViT: is a network fast because few operators wait for memory, and what does its attention buy?

*Training*: one small network with four kinds of attention, same steps and seeds: cascaded groups, groups
without the cascade, plain multi-head attention (parameters within 3%), and none, the control. *Speed*:
networks with random weights classify the same images one after another, in rounds; ratios are taken inside
a round, where all meet the same load.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memspan import data
from memspan.base.rng import rng, seed_of
from memspan.ledger import Ledger, macs, nbytes, saved_bytes
from memspan.models.efficientvit import (
    EfficientViT,
    head_similarity,
    memory_bound_share,
    optimizer_and_schedule,
)
from memspan.recipes import _efficientvit_networks as nets
from memspan.recipes.engine import Cell, Measurements, Outcome, Recipe, Task, option
from memspan.report import Bars, Claim, Figure, Lines, Series, claim
from memspan.report.stats import mean_interval, paired_difference

CVPR = "EfficientViT, CVPR 2023"
CGA, GROUP, MHSA, NONE = "CGA", "CGA without cascade", "multi-head attention", "no attention"
KINDS: dict[str, dict[str, Any]] = {
    CGA: {"mixer": "cga"},
    GROUP: {"mixer": "group"},
    MHSA: {"mixer": "mhsa", "key_dim": 4},  # 16 channels of keys in all: parameters within 3% of the others
    NONE: {"mixer": None},
}


@dataclass(frozen=True)
class Options:
    """What is trained on how much, and how long the clock runs."""

    images: int = option(600, "training images", unit="images", minimum=10)
    test_images: int = option(400, "test images", unit="images", minimum=10)
    size: int = option(112, "side of the images in training", unit="pixels", minimum=64)
    widths: tuple[int, ...] = option((32, 64, 96), "channels of the three stages in training", minimum=8)
    epochs: int = option(4, "passes over the training images", unit="epochs", minimum=1)
    batch: int = option(50, "images in a training step", unit="images", minimum=2)
    rate: float = option(2e-3, "peak learning rate, absolute")
    rounds: int = option(4, "timing rounds; 0 leaves out the speed part", unit="rounds")
    batches: tuple[int, ...] = option((1, 8), "images classified at once", unit="images", minimum=1)


def run(task: Task[Options]) -> None:
    """Train the kinds of attention and a modern peer, then time the networks in rounds."""
    o, images = task.options, task.use(data.load_first(("cifar10-jpeg", "digits"), data.ImageSet))
    timm, why = nets.timm_models()
    if timm is None:
        task.note(why)
    for seed in task.seeds:
        for method in (*KINDS, *([nets.MOBILENET_V4] if timm else ())):
            work = partial(train, timm=timm, images=images, o=o)
            task.measure(method=method, seed=seed, setting={"part": "training"}, work=work)
    networks = nets.contestants(timm) if o.rounds else {}
    for turn in range(o.rounds):
        for batch in o.batches:
            for method, network in networks.items():
                clock = partial(forward_time, network=network, batch=batch)
                task.measure(method=method, seed=turn, setting={"part": "speed", "batch": batch}, work=clock)


def train(cell: Cell, timm: nets.Factory | None, images: data.ImageSet, o: Options) -> Outcome:
    """One network, trained as in the paper at a smaller scale: AdamW, cosine, label smoothing, flips."""
    classes, device = len(images.classes), cell.device
    if cell.method in KINDS:
        model: nn.Module = EfficientViT(o.size, 3, classes, o.widths, **KINDS[cell.method])
    else:
        assert timm is not None
        model = timm("mobilenetv4_conv_small", num_classes=classes)
    model = model.to(device).train()
    keep = rng("efficientvit", cell.seed).permutation(len(images.x_train))[: o.images]
    x, y = images.x_train[keep], torch.from_numpy(images.y_train[keep])
    per_epoch = max(1, len(keep) // o.batch)
    steps = per_epoch * o.epochs
    optimizer, schedule = optimizer_and_schedule(model, o.rate, steps, warmup_steps=steps // 8)
    draw, saved = torch.Generator().manual_seed(seed_of("order", cell.seed)), 0
    order = torch.cat(
        [torch.randperm(len(keep), generator=draw)[: per_epoch * o.batch] for _ in range(o.epochs)]
    )
    with cell.timed("train"):
        for step, pick in enumerate(torch.split(order, o.batch)):
            batch = pixels(x[pick.numpy()], o.size, device)
            flips = torch.rand(len(pick), generator=draw) < 0.5
            batch = torch.where(flips.to(device)[:, None, None, None], batch.flip(3), batch)
            loss = F.cross_entropy(model(batch), y[pick].to(device), label_smoothing=0.1)
            saved = saved or saved_bytes(loss, exclude=[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            cell.step(step + 1, steps)
    model.eval()
    x_test, y_test = images.x_test[: o.test_images], images.y_test[: o.test_images]
    with torch.inference_mode():
        parts = (pixels(x_test[at : at + 100], o.size, device) for at in range(0, len(x_test), 100))
        guess = torch.cat([model(part).argmax(1).cpu() for part in parts]).numpy()
    quality = {"accuracy": 100 * float((guess == y_test).mean())}
    if cell.method in (CGA, GROUP, MHSA):
        similarity = head_similarity(model, pixels(x_test[:64], o.size, device))
        quality["head_similarity"] = sum(similarity.values()) / len(similarity)
    held = {"parameters": sum(p.nbytes for p in model.parameters()), "saved_activations": saved}
    return Outcome(quality, held, flops=2 * macs(model, pixels(x[:1], o.size, device)))


def pixels(images: Any, size: int, device: torch.device) -> Tensor:
    """uint8 ``(B, H, W[, 3])`` to float ``(B, 3, size, size)`` between -2 and 2."""
    x = torch.from_numpy(images)
    x = (x[:, None].expand(-1, 3, -1, -1) if x.dim() == 3 else x.permute(0, 3, 1, 2)).to(device).float()
    return F.interpolate(x / 64 - 2, size=(size, size), mode="bilinear")


@torch.inference_mode()
def forward_time(cell: Cell, network: nn.Module, batch: int) -> Outcome:
    """Seconds of a forward pass at 224 pixels, split by what bounds the operators; bytes at its peak."""
    network, x = network.to(cell.device), torch.randn(batch, 3, 224, 224, device=cell.device)
    share, times = memory_bound_share(network, x, repeats=1), []
    for _ in range(3 if batch > 1 else 9):
        start, out = time.perf_counter(), network(x)
        if out.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    middle = sorted(times)[len(times) // 2]
    with Ledger(network) as ledger:
        network(x)
    held = {"parameters": nbytes(network), "temporaries": ledger.peak.category("temporaries")}
    split = {"memory-bound": middle * share.memory_bound, "compute-bound": middle * share.compute_bound}
    return Outcome({}, held, seconds=split, flops=2 * macs(network, x))


def judge(found: Measurements, o: Options) -> Sequence[Claim]:
    """The paper's claims on speed, on where the time goes, and on what the cascade buys."""
    big, ours = max(o.batches), found.where(method=nets.M5)
    slow_one = (
        "timed at 16 images in the paper; at one image the number of operators decides, and M5 has more"
    )
    alike = "so far the other way round: a head that reads the previous one looks at more similar places"
    count = mean_interval([(ours[0].flops or 0) / 2e6 / float(ours[0].setting["batch"])]) if ours else None
    v3, points, section = nets.MOBILENET_V3, "points of accuracy", f"{CVPR}, section 2"

    def faster(
        text: str, other: str, batch: int = big, us: str = nets.M5, bar: str = "> 1", why: str = ""
    ) -> Claim:
        a, b = (found.where(method=m, part="speed", batch=batch) for m in (us, other))
        ratios = [seconds(two) / seconds(one) for one, two in zip(a, b, strict=False)]
        paper = "memspan" if "timm" in text else f"{CVPR}, table 2"
        interval = mean_interval(ratios) if ratios else None
        return claim(text, paper, interval, bar, "x", expected=not why, why=why)

    def gain(text: str, other: str, metric: str, bar: str, unit: str = points, why: str = "") -> Claim:
        a, b = (found.where(method=m, part="training") for m in (CGA, other))
        interval = paired_difference(a.values(metric), b.values(metric)) if a and b else None
        return claim(text, f"{CVPR}, table 5", interval, bar, unit, expected=not why, why=why)

    shares = [
        [100 * one.seconds["memory-bound"] / seconds(one) for one in found.where(method=m, batch=big)]
        for m in (nets.M5, nets.DEIT)
    ]
    waits = paired_difference(*shares) if ours else None
    return [
        faster(f"M5 outruns MobileNetV3-Large at {big} images (paper: 1.45 times, CPU, 16 images)", v3),
        faster("M5 outruns MobileNetV3-Large at one image", v3, batch=min(o.batches), why=slow_one),
        faster(f"M2 outruns MobileViT-XXS at {big} images (paper: 3.7 times)", nets.MOBILEVIT, us=nets.M2),
        faster("Fusing the norms makes M5 faster", nets.M5_PLAIN),
        faster("M5 fused is at least as fast as timm's M5", nets.TIMM, bar=">= 1"),
        faster("M5 fused keeps up with timm's M5 fused", nets.TIMM_FUSED, bar=">= 0.95"),
        claim(
            "M5 waits for memory a smaller share of its time than a plain ViT",
            section,
            waits,
            "< 0",
            "points",
        ),
        claim(
            "M5 needs 522 million multiply-adds", f"{CVPR}, table 2", count, "in [521, 523]", "M", exact=True
        ),
        gain("Cascaded groups beat multi-head attention at equal parameters", MHSA, "accuracy", "> 0"),
        gain("The cascade raises accuracy", GROUP, "accuracy", "> 0"),
        gain("Attention raises accuracy at all", NONE, "accuracy", "> 0"),
        gain("It beats MobileNetV4-conv-S at equal epochs and rate", nets.MOBILENET_V4, "accuracy", "> 0"),
        gain(
            "Heads are less alike than in multi-head attention",
            MHSA,
            "head_similarity",
            "< 0",
            "cosine",
            alike,
        ),
        gain("The cascade makes heads less alike", GROUP, "head_similarity", "< 0", "cosine", alike),
    ]


def figures(found: Measurements, o: Options) -> Sequence[Figure]:
    """Accuracy against the bytes of a training step, and the time of an image by what bounds it."""
    trained, timed = found.where(part="training"), found.where(part="speed", batch=max(o.batches))
    curves = {}
    for method in trained.methods:
        one = trained.where(method=method)
        curves[method] = Series([sum(m.bytes.values()) for m in one], one.values("accuracy"))
    axes = "weights and saved activations of a step", "accuracy, %"
    drawn: list[Figure] = [Lines("Accuracy against bytes", *axes, curves, x_unit="bytes")] if curves else []
    rows = {}
    for method in timed.methods:
        cells = timed.where(method=method)
        rows[method] = {
            part: 1e3 * sum(m.seconds[part] for m in cells) / len(cells) / max(o.batches)
            for part in ("memory-bound", "compute-bound")
        }
    return [*drawn, Bars("Time of one image, by what bounds the operators", "ms", rows)] if rows else drawn


def seconds(one: Any) -> float:
    """Median seconds of a measured forward pass."""
    return float(one.seconds["memory-bound"] + one.seconds["compute-bound"])


RECIPE = Recipe(
    name="efficientvit",
    title="EfficientViT: image backbones for machines that wait for memory",
    paper="EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention, CVPR 2023",
    room="models",
    component="memspan.models.efficientvit.EfficientViT",
    problem="classify images fast where memory traffic, not arithmetic, sets the time",
    answer="time goes to convolutions; heads that see a slice of the channels each cost a fraction",
    quick_cost="about 3 min",
    options=Options,
    quick=Options(),
    full=Options(images=8000, test_images=2000, epochs=20, rounds=15, batches=(1, 16)),
    threads=1,
    tiny=Options(images=40, test_images=40, widths=(16, 32, 48), epochs=1, batch=20, rounds=0),
    run=run,
    judge=judge,
    figures=figures,
    control=NONE,
    seeds=(3, 5),
    extras=("recipes",),
)
