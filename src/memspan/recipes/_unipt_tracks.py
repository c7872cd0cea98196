"""The encoders and data of UniPT's recipe: one pretrained text encoder, one small ViT where it is absent."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memspan import data, training
from memspan.base.rng import rng
from memspan.nn.pool import masked_mean
from memspan.nn.surgery import find_blocks
from memspan.recipes.engine import Task
from memspan.recipes.engine.trained import trained_once
from memspan.training import unipt

MOVIE = "movie"


@dataclass(frozen=True)
class Case:
    """An encoder, its data, and how it is read.

    Attributes:
        name: of the encoder.
        pretrained: whether claims are decided on it.
        encoder: kept; :meth:`fresh` copies it.
        taps: where its layers are read.
        sizes: widths of what the taps give.
        classes: of the task.
        thin: names of the layers that LoRA changes, by their end.
        parts: ``train``, ``test`` and further test sets -> (inputs, mask, labels).
        key: what the inputs depend on.
    """

    name: str
    pretrained: bool
    encoder: nn.Module
    taps: Any
    sizes: tuple[int, ...]
    classes: int
    thin: tuple[str, ...]
    parts: dict[str, tuple[Tensor, Tensor, Tensor]]
    key: dict[str, Any]

    def fresh(self) -> nn.Module:
        """A copy of the encoder that may be trained."""
        return copy.deepcopy(self.encoder)

    def to(self, device: torch.device) -> Case:
        """The same on a device."""
        parts = {
            name: (x.to(device), mask.to(device), y.to(device)) for name, (x, mask, y) in self.parts.items()
        }
        return replace(self, encoder=self.encoder.to(device), parts=parts)

    @property
    def width(self) -> int:
        """Of the last layer."""
        return self.sizes[-1]


class Classifier(nn.Module):
    """An encoder or what stands beside it, the mean over positions, a linear layer."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.top = body, nn.Linear(width, classes)

    def forward(self, x: Any, mask: Tensor) -> Tensor:
        """Logits of inputs, or of hidden states where the body is a head."""
        hidden = self.body(x, mask) if isinstance(x, list) else self.body(x, attention_mask=mask)
        hidden = hidden if isinstance(hidden, Tensor) else hidden.last_hidden_state
        logits: Tensor = self.top(masked_mean(hidden, mask))
        return logits


class LastLayer(nn.Module):
    """The linear probe's body: the last hidden state as it is."""

    def forward(self, hidden: list[Tensor], mask: Tensor) -> Tensor:
        """The last of the hidden states."""
        return hidden[-1].float()


def low_rank(case: Case) -> nn.Module:
    """LoRA of rank 8 on queries and values."""
    model = Classifier(case.fresh(), case.width, case.classes)
    names = [name for name, part in model.named_modules() if name.endswith(case.thin)]
    return training.lora_(model, 8, layers=names, head="top")


def side(case: Case, **options: Any) -> nn.Module:
    """UniPT beside the encoder."""
    out = options.pop("out_dim", case.width)
    return Classifier(unipt.UniPT(case.fresh().eval(), case.taps, out, **options), out, case.classes)


def ladder(case: Case) -> nn.Module:
    """LST beside the encoder."""
    return Classifier(unipt.LadderSideNetwork(case.fresh().eval(), case.taps), case.width, case.classes)


def plain(case: Case) -> nn.Module:
    """The encoder, all of it trained."""
    return Classifier(case.fresh(), case.width, case.classes)


#: Methods that run the encoder in each step.
LIVE: dict[str, Callable[[Case], nn.Module]] = {
    "full": plain,
    "LoRA": low_rank,
    "adapter": lambda case: training.adapter_(plain(case), max(8, case.width // 8), head="top"),
    "BitFit": lambda case: training.bitfit_(plain(case), head="top"),
    "LST": ladder,
    "linear probe": lambda case: training.linear_probe_(plain(case), head="top"),
    "UniPT": side,
    "UniPT, recomputed": functools.partial(side, save="recompute"),
    "UniPT, 16-bit states": functools.partial(side, save="half"),
}


def on_states(case: Case, method: str) -> nn.Module:
    """A method that reads hidden states alone."""
    body: nn.Module
    if method == "linear probe":
        body = LastLayer()
    elif method == "LST":
        body = unipt.LadderHead(case.sizes, case.width, 8)
    else:
        body = unipt.UniPTHead(
            case.sizes, case.width, 2,
            interaction="no interaction" not in method, confidence="uniform" not in method,
        )  # fmt: skip
    return Classifier(body, case.width, case.classes)


def draws(seed: int, count: int, steps: int, size: int) -> Iterator[Tensor]:
    """Rows of each step's batch: equal for all methods of a seed."""
    source = rng("unipt.batches", seed)
    for _ in range(steps):
        yield torch.from_numpy(source.choice(count, min(size, count), replace=False))


# -- text --------------------------------------------------------------------------------------------------


def text_case(task: Task[Any], backbone: data.Backbone, tokens: int, train: int, test: int) -> Case:
    """MiniLM on the movie domain, tested there and on the other three."""
    table = task.use(data.load("four-domain-sentiment", data.TableSet))
    domains, texts, ratings = (table[name] for name in ("domain", "text", "mean_rating"))
    parts = {}
    for domain in dict.fromkeys(domains):
        rows = rng("unipt.split", str(domain)).permutation(np.flatnonzero(domains == domain))
        if domain == MOVIE:
            parts["train"], parts["test"] = rows[:train], rows[train : train + test]
        else:
            parts[str(domain)] = rows[: max(1, test // 4)]
    ready = {}
    for name, rows in parts.items():
        found = backbone.tokenizer(
            [str(texts[row]) for row in rows],
            padding="max_length", truncation=True, max_length=tokens, return_tensors="pt",
        )  # fmt: skip
        labels = torch.from_numpy((ratings[rows].astype(float) > 0).astype(np.int64))
        ready[name] = (found["input_ids"], found["attention_mask"], labels)
    return Case(
        "minilm", True, backbone.module, "hidden_states", (384,) * 7, 2, ("query", "value"), ready,
        {"data": table.sha256, "tokens": tokens, "train": train, "test": test},
    )  # fmt: skip


# -- where the wheels are absent ---------------------------------------------------------------------------


class PatchNet(nn.Module):
    """A small ViT on 16 x 16 grey pixels: 16 patches of 4 x 4."""

    def __init__(self, width: int = 48, depth: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(16, width), nn.LayerNorm(width))
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(depth))
        self.classify = nn.Linear(width, classes)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Patches (B, 16, 16) -> positions (B, 16, width)."""
        h = self.embed(x) + self.place
        for block in self.blocks:
            h = block(h)
        return h  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = [f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        x = self.norm1(x + self.o(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)))
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return y


def vit_case(task: Task[Any], train: int, test: int, pretraining: int) -> Case:
    """A ViT trained here on clothes (digits where they are absent), read on handwritten digits."""
    source = task.use(data.load_first(("fashion-mnist", "digits"), data.ImageSet))
    target = task.use(data.load("digits", data.ImageSet))

    def learn(model: PatchNet, images: data.ImageSet) -> None:
        x, y = patches(images.x_train), torch.from_numpy(images.y_train)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for rows in draws(0, len(x), pretraining, 64):
            loss = F.cross_entropy(model.classify(model(x[rows]).mean(1)), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    network = trained_once("unipt-vit", PatchNet, learn, source, steps=pretraining)
    parts = {}
    for name, x, y, count in (
        ("train", target.x_train, target.y_train, train),
        ("test", target.x_test, target.y_test, test),
    ):
        given = patches(x[:count])
        parts[name] = (given, torch.ones(given.shape[:2]), torch.from_numpy(y[:count]))
    return Case(
        "vit", False, network, ["embed", "blocks.*"], (48,) * 4, 10, (".q", ".v"), parts,
        {"data": target.sha256, "train": train, "test": test},
    )  # fmt: skip


def patches(images: Any) -> Tensor:
    """Grey images (N, H, W) as patches (N, 16, 16)."""
    x = torch.from_numpy(np.ascontiguousarray(images)).float()[:, None] / 255
    x = F.interpolate(x, (16, 16), mode="bilinear", antialias=True)
    return F.unfold(x, 4, stride=4).mT.contiguous()


# -- images and names --------------------------------------------------------------------------------------


class Tower(nn.Module):
    """Hidden states of one kind -> one embedding: a head, then generalised pooling."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head, self.pool = head, unipt.GPO()

    def forward(self, hidden: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """(B, out_dim)."""
        read = self.head(hidden) if mask is None else self.head(hidden, mask)
        pooled: Tensor = self.pool(read, mask)
        return pooled


class Probe(nn.Module):
    """The last layer alone, projected."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, outputs)

    def forward(self, hidden: list[Tensor], mask: Tensor | None = None) -> Tensor:
        """Positions (B, T, outputs) of the last hidden state."""
        last = hidden[-1].float()
        projected: Tensor = self.project(last.flatten(2).mT if last.dim() == 4 else last)
        return projected


class LiveTower(nn.Module):
    """A backbone that trains with what is on it: the last of its layers, projected and pooled."""

    def __init__(self, backbone: nn.Module, last: str, tower: Tower) -> None:
        super().__init__()
        self.backbone, self.last, self.tower = backbone, last, tower

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, out_dim) of images, or of token ids with their mask."""
        seen: list[Any] = []
        layer = self.backbone.get_submodule(self.last)
        handle = layer.register_forward_hook(lambda *given: seen.append(given[-1]))
        try:
            if mask is None:
                self.backbone(x)
            else:
                self.backbone(x, attention_mask=mask)
        finally:
            handle.remove()
        hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        embedded: Tensor = self.tower([hidden], mask)
        return embedded


@dataclass(frozen=True)
class Pairs:
    """Images and their names, the hidden states of both computed once, and the split.

    Attributes:
        images: stage maps.
        names: token states.
        mask: of the names.
        train: rows.
        test: rows.
        pixels: of the images, for methods that train the backbones.
        ids: of the names, likewise.
        vision: reads the images, and the name of its last stage.
        text: reads the names, and the name of its last layer.
    """

    images: unipt.HiddenCache
    names: unipt.HiddenCache
    mask: Tensor
    train: Tensor
    test: Tensor
    pixels: Tensor
    ids: Tensor
    vision: tuple[nn.Module, str]
    text: tuple[nn.Module, str]

    def towers(self, method: str, out: int = 256) -> nn.ModuleList:
        """Two towers of a method."""
        maps, tokens = [s[0] for s in self.images.shapes], [s[-1] for s in self.names.shapes]
        if method == "UniPT":
            heads: list[nn.Module] = [unipt.UniPTHead(maps, out, 2, "map"), unipt.UniPTHead(tokens, out, 2)]
        else:
            text = unipt.LadderHead(tokens, out, 8) if method == "LST" else Probe(tokens[-1], out)
            heads = [Probe(maps[-1], out), text]
        towers = [Tower(head) for head in heads]
        if method in ("LoRA", "full"):
            ends = zip((self.vision, self.text), towers, strict=True)
            live = [LiveTower(copy.deepcopy(end), last, tower) for (end, last), tower in ends]
            if method == "LoRA":  # it changes linear layers, of which the CNN has none inside
                live[0].backbone.requires_grad_(False)
                names = [n for n, _ in live[1].backbone.named_modules() if n.endswith(("query", "value"))]
                training.lora_(live[1].backbone, 8, layers=names, head="")
            return nn.ModuleList(live)
        return nn.ModuleList(towers)

    def embed(self, towers: nn.ModuleList, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of images and names, where the towers are."""
        home = next(towers.parameters()).device
        mask = self.mask[rows].to(home)
        if isinstance(towers[0], LiveTower):
            return towers[0](self.pixels[rows].to(home)), towers[1](self.ids[rows].to(home), mask)
        return towers[0](states(self.images, rows, home)), towers[1](states(self.names, rows, home), mask)


def states(cache: unipt.HiddenCache, rows: Tensor | slice, device: torch.device) -> list[Tensor]:
    """Hidden states of some samples; the cache stays in the computer's memory."""
    return [one.to(device) for one in cache[rows]]


STAGES = ["blocks.2", "blocks.4", "blocks.10", "blocks.15"]  # strides 4, 8, 16, 32


def emoji_pairs(task: Task[Any], text: data.Backbone, pixels: int, train: int) -> Pairs:
    """Emoji and their official names, through both backbones once."""
    emoji = task.use(data.load("emoji32", data.ArraySet))
    vision = data.backbone("efficientnet-lite0", size=pixels)
    assert vision.transform is not None
    names = [str(name) for name in emoji["names"]]
    found = text.tokenizer(names, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    ids, mask = found["input_ids"], found["attention_mask"]
    pixels_of = vision.transform(emoji["images"])
    images = unipt.cache_hidden(
        unipt.SpatialUniPT(vision.module.to(task.device), STAGES, 64),
        (pixels_of[i : i + 64].to(task.device) for i in range(0, len(ids), 64)),
        {"data": emoji.sha256, "pixels": pixels},
    )
    tokens = unipt.cache_hidden(
        unipt.UniPT(text.module.to(task.device), "hidden_states"),
        (
            {"input_ids": one.to(task.device), "attention_mask": seen.to(task.device)}
            for one, seen in zip(ids.split(64), mask.split(64), strict=True)
        ),
        {"data": emoji.sha256, "tokens": 16},
    )
    order = torch.from_numpy(rng("unipt.emoji").permutation(len(ids)))
    last = list(find_blocks(text.module))[-1]
    return Pairs(
        images, tokens, mask, order[:train], order[train:], pixels_of, ids,
        (vision.module, STAGES[-1]), (text.module, last),
    )  # fmt: skip


def recalls(one: Tensor, other: Tensor) -> dict[str, float]:
    """R@1 and R@5 of images by names, and Rsum: R@1, 5 and 10 in both directions, in percent."""
    scores = F.normalize(one, dim=1) @ F.normalize(other, dim=1).mT
    own = scores.diagonal()
    places = [(scores > own[None]).sum(0), (scores > own[:, None]).sum(1)]  # names -> images, images -> names
    hits = {k: [100 * float((place < k).float().mean()) for place in places] for k in (1, 5, 10)}
    return {"R@1": hits[1][0], "R@5": hits[5][0], "Rsum": sum(map(sum, hits.values()))}
