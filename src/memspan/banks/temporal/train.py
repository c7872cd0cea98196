"""Training and testing on a stream: link prediction, node classification, models and rules alike.

Each epoch starts from an empty memory and goes through the training events once, in order. Validation and
test go on from there: the stream updates the memory, weights and tracker stay. Negatives of a test depend
on the seed alone, and its batch (200) does not depend on the training batch, so that two batch sizes face
the same test.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from memspan.banks.temporal.events import Sampling, TemporalBatches, TemporalData
from memspan.banks.temporal.memory import Events
from memspan.banks.temporal.models import TemporalModel, View
from memspan.banks.temporal.rules import Rule
from memspan.base import optional, refuse
from memspan.base.rng import rng
from memspan.nn.best import BestState

__all__ = [
    "LinkResult",
    "NodeClassifier",
    "NodeResult",
    "Scores",
    "evaluate_links",
    "evaluate_rule",
    "reciprocal_ranks",
    "score_parts",
    "train_link_prediction",
    "train_node_classification",
]

Floats = NDArray[np.float64]
EVALUATION_BATCH = 200


class Scores(NamedTuple):
    """What a test found.

    Attributes:
        ap: average precision, pooled over the whole part.
        ap_batches: mean of one average precision a batch, as the official code takes it: .006 higher on
            average.
        auroc: area under the ROC curve, pooled.
        mrr: mean reciprocal rank of each event among its negatives.
        inductive_ap: of events with a node that training never saw; NaN where there are none.
        events: number.
    """

    ap: float
    ap_batches: float
    auroc: float
    mrr: float
    inductive_ap: float
    events: int


@dataclass(frozen=True)
class LinkResult:
    """What a training run of :func:`train_link_prediction` found.

    Attributes:
        test: of the epoch that was best on validation.
        valid_ap: of each epoch.
        loss: mean training loss of each epoch.
        best_epoch: from 0.
        steps: optimizer steps in all.
        seconds: of training, without the tests.
        cpu_seconds: the same on the processor's clock.
        events_per_second: trained on, by the processor's clock.
        negatives: how the tests' negatives were drawn.
        evaluation_batch: events in a batch of the tests.
    """

    test: Scores
    valid_ap: tuple[float, ...]
    loss: tuple[float, ...]
    best_epoch: int
    steps: int
    seconds: float
    cpu_seconds: float
    events_per_second: float
    negatives: Sampling
    evaluation_batch: int = EVALUATION_BATCH


def train_link_prediction(
    model: TemporalModel,
    data: TemporalData,
    batch_size: int = 200,
    *,
    epochs: int = 50,
    lr: float = 1e-3,
    scale_lr: bool = False,
    base_batch: int = 200,
    sub_batch: int | None = None,
    patience: int | None = 5,
    hold_out: float = 0.0,
    negatives: Sampling = "uniform",
    split: tuple[float, float] = (0.15, 0.15),
    keep_tracker: bool = True,
    evaluation_batch: int = EVALUATION_BATCH,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> LinkResult:
    """Train a model to tell events from negatives; the best epoch on validation is kept in it.

    Args:
        model: TGN, JODIE, APAN, or a subclass of theirs.
        data: the stream; the first 70 % train.
        batch_size: events in a training batch.
        epochs: passes at most.
        lr: of Adam, at ``base_batch``.
        scale_lr: multiply it by the square root of ``batch_size / base_batch``: try this before PRES.
        base_batch: the batch that ``lr`` was chosen at.
        sub_batch: send so many events at a time through memory and scores, and add gradients up to one step
            a batch: as few steps as a large batch, without its discontinuity.
        patience: epochs without a better validation AP before it stops; None trains all.
        hold_out: share of nodes whose events training never sees, for the inductive test.
        negatives: of the tests: ``"uniform"`` or ``"historical"``; training draws uniform ones.
        split: shares of validation and test.
        keep_tracker: PRES's tracker lives on from epoch to epoch.
        evaluation_batch: events in a batch of the tests; AP depends on it.
        seed: of negatives and held-out nodes; weights are the model's.
        device: where to train.
        progress: called after each epoch with its number and validation AP.

    Raises:
        BadInput: sizes below 1, more nodes than the model has, an empty part, features of another width, a
            loss that is not finite.
    """
    for name, value in (("batch_size", batch_size), ("epochs", epochs), ("sub_batch", sub_batch or 1)):
        if not isinstance(value, int) or value < 1:
            refuse(name, value, "give a whole number of 1 or more")
    if not 0 <= hold_out < 1:
        refuse("hold_out", hold_out, "give a share below 1")
    if int(data.num_nodes or 0) > model.memory.num_nodes:
        refuse("data", f"{data.num_nodes} nodes", f"the model has {model.memory.num_nodes}; use grow_")
    if data.msg_dim != model.memory.msg_dim:
        refuse("data", f"msg_dim {data.msg_dim}", f"the model was made for {model.memory.msg_dim}")
    train, valid, test = data.chronological_split(*split)
    new = np.zeros(int(data.num_nodes or 0), bool)
    if hold_out:
        later = np.unique(np.concatenate([valid.src, valid.dst, test.src, test.dst]))
        new[rng("temporal.hold_out", seed).permutation(later)[: math.ceil(hold_out * len(new))]] = True
        train = train.keep(~(new[train.src] | new[train.dst]))
        if not len(train):
            refuse("hold_out", hold_out, "no training event is left without these nodes")
    else:
        new[:] = True
        new[train.src] = new[train.dst] = False
    model.to(device)
    if not float(model.time_scale) > 0:
        model.time_scale.fill_(train.mean_gap)
    rate = lr * math.sqrt(batch_size / base_batch) if scale_lr else lr
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=True)
    best = BestState(model, patience)
    candidates = data.destinations
    ahead: dict[str, Any] = {
        "candidates": candidates, "seed": seed, "sampling": negatives, "device": device, "new": new,
    }  # fmt: skip
    losses: list[float] = []
    aps: list[float] = []
    steps, seconds, cpu = 0, 0.0, 0.0
    for epoch in range(epochs):
        begun, begun_cpu = time.perf_counter(), time.process_time()
        model.train()
        model.reset_()
        if model.pres is not None and not keep_tracker:
            model.pres.size_(model.memory.num_nodes, model.memory.dim)
        batches = TemporalBatches(train, batch_size, candidates=candidates, seed=f"train {seed} {epoch}")
        total = 0.0
        for batch in batches:
            total += _step(model, optimizer, batch.to(device), sub_batch)
            steps += 1
        seconds += time.perf_counter() - begun
        cpu += time.process_time() - begun_cpu
        losses.append(total / len(train))
        found = evaluate_links(model, valid, evaluation_batch, history=train, **ahead)
        aps.append(found.ap)
        if progress is not None:
            progress(epoch, found.ap)
        if best.update(found.ap):
            break
    best.restore_()
    tested = evaluate_links(
        model, test, evaluation_batch, history=data.part(0, len(data) - len(test)), **ahead
    )
    return LinkResult(
        tested, tuple(aps), tuple(losses), best.epoch, steps, seconds, cpu,
        len(aps) * len(train) / max(cpu, 1e-9), negatives, evaluation_batch,
    )  # fmt: skip


def _step(
    model: TemporalModel, optimizer: torch.optim.Optimizer, batch: Events, sub_batch: int | None
) -> float:
    """One optimizer step over a batch; gives the summed loss of its events."""
    count = len(batch.src)
    size = sub_batch or count
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for start in range(0, count, size):
        part = batch
        if size < count:
            part = batch.map(lambda column, start=start: column[start : start + size])  # type: ignore[misc]
        view = model.view()
        positive, negative = model.score(view, part)
        loss = _link_loss(positive, negative)
        share = len(part.src) / count
        whole = (loss + model.coherence_loss(view)) * share
        whole.backward()  # type: ignore[no-untyped-call]
        told = float(loss.detach())
        if not math.isfinite(told):
            refuse("loss", told, "training has diverged: lower lr, or keep PRES's clip on")
        total += told * len(part.src)
        model.write_(view, part)
    optimizer.step()
    return total


def _link_loss(positive: Tensor, negative: Tensor) -> Tensor:
    return F.softplus(-positive).mean() + F.softplus(negative).mean()


# -- tests --


@torch.no_grad()
def evaluate_links(
    model: TemporalModel,
    part: TemporalData,
    batch_size: int = EVALUATION_BATCH,
    *,
    candidates: NDArray[Any] | None = None,
    seed: int = 0,
    sampling: Sampling = "uniform",
    history: TemporalData | None = None,
    new: NDArray[np.bool_] | None = None,
    negatives: int = 1,
    device: torch.device | str = "cpu",
) -> Scores:
    """Score a part of the stream, which goes on from where the model's memory stands; the memory is updated.

    Args:
        model: put in eval mode; its weights and tracker stay.
        part: the events.
        batch_size: of the test.
        candidates: destinations for negatives; the part's own when None.
        seed: of the negatives.
        sampling: see :class:`TemporalBatches`.
        history: the stream before, for historical negatives.
        new: (N,) nodes that count as unseen for the inductive figure.
        negatives: for each event; with more than one, AP takes the first and MRR all.
        device: where the model is.
    """
    model.eval()
    model.ready()
    batches = TemporalBatches(
        part, batch_size, candidates=candidates, history=history, seed=f"test {seed}",
        sampling=sampling, negatives=negatives,
    )  # fmt: skip

    def scored() -> Iterable[tuple[Floats, Floats]]:
        for batch in batches:
            there = batch.to(device)
            view = model.view()
            right, wrong = model.score(view, there)
            model.write_(view, there)
            yield right.double().cpu().numpy(), wrong.double().cpu().numpy()

    return score_parts(list(scored()), part, new)


def evaluate_rule(
    rule: Rule,
    data: TemporalData,
    batch_size: int = EVALUATION_BATCH,
    *,
    split: tuple[float, float] = (0.15, 0.15),
    seed: int = 0,
    sampling: Sampling = "uniform",
) -> Scores:
    """The test of :func:`train_link_prediction` for a rule: same events, negatives and batches.

    Args:
        rule: one without events yet.
        data: the whole stream; the rule sees what comes before the test, then each batch after it was scored.
        batch_size: of the test.
        split: shares of validation and test.
        seed: of the negatives.
        sampling: see :class:`TemporalBatches`.
    """
    train, valid, test = data.chronological_split(*split)
    before = data.part(0, len(train) + len(valid))
    since = data.t.dtype.type(data.origin or 0)
    rule.update(before.src, before.dst, (before.t - since).astype(np.float64))
    found = []
    for batch in TemporalBatches(
        test, batch_size, candidates=data.destinations, history=before, seed=f"test {seed}", sampling=sampling
    ):
        src, dst, t = batch.src.numpy(), batch.dst.numpy(), batch.t.numpy()
        assert batch.negatives is not None
        wrong = rule.score(src, batch.negatives[:, 0].numpy(), t)
        found.append((rule.score(src, dst, t), wrong[:, None]))
        rule.update(src, dst, t)
    new = np.ones(int(data.num_nodes or 0), bool)
    new[train.src] = new[train.dst] = False
    return score_parts(found, test, new)


def reciprocal_ranks(positive: Floats, negative: Floats) -> Floats:
    """1 / rank of each positive (B,) among its negatives (B, K); ties take the mean of best and worst place.

    Example:
        >>> reciprocal_ranks(np.array([0.5]), np.array([[0.1, 0.5, 0.9]])).tolist()
        [0.4]
    """
    above = (negative > positive[:, None]).sum(1)
    level = (negative >= positive[:, None]).sum(1)
    ranks: Floats = 1 + (above + level) / 2
    return 1 / ranks


def score_parts(
    found: list[tuple[Floats, Floats]], part: TemporalData, new: NDArray[np.bool_] | None
) -> Scores:
    """The figures of a test from its batches' scores.

    Args:
        found: for each batch (B,) scores of the events and (B, K) of their negatives.
        part: the events.
        new: (N,) nodes that count as unseen, or None.
    """
    metrics = optional("sklearn.metrics", extra="recipes")
    right = np.concatenate([a for a, _ in found])
    wrong = np.concatenate([b for _, b in found])

    def ap(a: Floats, b: Floats) -> float:
        truth = np.repeat([1, 0], [len(a), len(b)])
        return float(metrics.average_precision_score(truth, np.concatenate([a, b])))

    truth = np.repeat([1, 0], [len(right), len(right)])
    unseen = np.zeros(len(part), bool) if new is None else new[part.src] | new[part.dst]
    return Scores(
        ap=ap(right, wrong[:, 0]),
        ap_batches=float(np.mean([ap(a, b[:, 0]) for a, b in found])),
        auroc=float(metrics.roc_auc_score(truth, np.concatenate([right, wrong[:, 0]]))),
        mrr=float(reciprocal_ranks(right, wrong).mean()),
        inductive_ap=ap(right[unseen], wrong[unseen, 0]) if unseen.any() else math.nan,
        events=len(part),
    )


# -- labels of nodes --


class NodeClassifier(nn.Module):
    """A two-layer network over a source's embedding at an event: one logit.

    Example:
        >>> NodeClassifier(4)(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    def __init__(self, dim: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(dim, 1))

    def forward(self, embedding: Tensor) -> Tensor:
        """(B,) logits of (B, D) embeddings."""
        out: Tensor = self.layers(embedding).squeeze(-1)
        return out


@dataclass(frozen=True)
class NodeResult:
    """What :func:`train_node_classification` found.

    Attributes:
        auroc: on the test events.
        ap: on the test events.
        valid_auroc: of each epoch.
        classifier: of the best epoch on validation.
    """

    auroc: float
    ap: float
    valid_auroc: tuple[float, ...]
    classifier: NodeClassifier = field(repr=False)


def train_node_classification(
    model: TemporalModel,
    data: TemporalData,
    *,
    epochs: int = 50,
    lr: float = 1e-3,
    patience: int | None = 5,
    batch_size: int = EVALUATION_BATCH,
    split: tuple[float, float] = (0.15, 0.15),
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> NodeResult:
    """Train a classifier of the source's label at each event, on the embeddings of a trained, frozen model.

    The embedding is that before the event: neither the event nor its label is in it.

    Args:
        model: trained by :func:`train_link_prediction`; stays as it is, but for its memory, which goes once
            through the stream.
        data: with ``label`` of 0 and 1.
        epochs: passes over the embeddings at most.
        lr: of Adam.
        patience: epochs without a better validation AUROC.
        batch_size: events in a batch of the stream.
        split: shares of validation and test.
        seed: of the classifier's weights and the order of its batches.
        device: where the model is.

    Raises:
        BadInput: no labels, other labels than 0 and 1, or a part with one label alone.
    """
    if data.label is None or not np.isin(data.label, (0, 1)).all():
        refuse("data.label", None if data.label is None else "other values", "give 0 or 1 for each event")
    parts = data.chronological_split(*split)
    for name, part in zip(("training", "validation", "test"), parts, strict=True):
        if part.label is None or len(np.unique(part.label)) < 2:
            refuse("data.label", f"one value in the {name} part", "choose a split in which both occur")
    metrics = optional("sklearn.metrics", extra="recipes")
    model.to(device).eval()
    model.ready()
    model.reset_()
    found = []
    with torch.no_grad():
        for batch in TemporalBatches(data, batch_size, negatives=0):
            there = batch.to(device)
            view: View = model.view()
            found.append(model.embed(view, there.src, there.t))
            model.write_(view, there)
    embedding = torch.cat(found)
    label = torch.from_numpy(np.array(data.label, np.float32)).to(device)
    cut = [len(parts[0]), len(parts[1]), len(parts[2])]
    (x, x_valid, x_test), (y, y_valid, y_test) = torch.split(embedding, cut), torch.split(label, cut)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = NodeClassifier(model.memory.dim).to(device)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)
    rare = (len(y) - y.sum()) / y.sum()
    best = BestState(classifier, patience)
    seen = []
    for epoch in range(epochs):
        classifier.train()
        order = torch.from_numpy(rng("temporal.labels", seed, epoch).permutation(len(x))).to(device)
        for rows in torch.split(order, batch_size):
            optimizer.zero_grad(set_to_none=True)
            loss = F.binary_cross_entropy_with_logits(classifier(x[rows]), y[rows], pos_weight=rare)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        classifier.eval()
        with torch.no_grad():
            seen.append(float(metrics.roc_auc_score(y_valid.cpu(), classifier(x_valid).cpu())))
        if best.update(seen[-1]):
            break
    best.restore_()
    with torch.no_grad():
        told = classifier(x_test).cpu()
    truth = y_test.cpu()
    return NodeResult(
        float(metrics.roc_auc_score(truth, told)), float(metrics.average_precision_score(truth, told)),
        tuple(seen), classifier,
    )  # fmt: skip
