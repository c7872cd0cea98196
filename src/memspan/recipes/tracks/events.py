"""Streams of events by name, and PyG's TGN as its example trains it on the same events and test as ours."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memspan import data as sets
from memspan.banks.temporal import PRES, Scores, TemporalBatches, TemporalData
from memspan.banks.temporal.train import score_parts
from memspan.base import optional

__all__ = ["PyGResult", "PyGTGN", "stream_of", "train_pyg"]


def stream_of(table: sets.TableSet) -> TemporalData:
    """A stream of a catalogue's table."""
    if table.name == "ml-100k":
        return TemporalData.from_arrays(
            table["user"], table["item"], table["time"], msg=np.asarray(table["rating"], float) / 5,
            bipartite=True, sort=True,
        )  # fmt: skip
    if table.name == "clock-changes":
        since = table["time"] - table["time"][0]
        return TemporalData.from_arrays(table["zone"], table["clock"], since, bipartite=True)
    rating = table["rating"] / 10 if "rating" in table.columns else None
    return TemporalData.from_arrays(table["source"], table["target"], table["time"], rating, sort=True)


class PyGResult(NamedTuple):
    """What :func:`train_pyg` found."""

    scores: Scores
    seconds: float
    trained: int
    memory_bytes: dict[str, int]


class PyGTGN(nn.Module):
    """TGNMemory with a right last aggregator, attention over ten recent neighbours, and a link predictor."""

    def __init__(self, stream: TemporalData, dim: int) -> None:
        super().__init__()
        tgn = optional("torch_geometric.nn.models.tgn", extra="peers")
        conv = optional("torch_geometric.nn", extra="peers").TransformerConv
        self.nodes, width = int(stream.num_nodes or 0), stream.msg_dim
        message = tgn.IdentityMessage(width, dim, dim)
        self.memory = tgn.TGNMemory(self.nodes, width, dim, dim, message, LastMessage())
        self.loader = tgn.LastNeighborLoader(self.nodes, size=10)
        self.conv = conv(dim, dim // 2, heads=2, dropout=0.1, edge_dim=width + dim)
        self.source, self.target, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 1)
        self.t, self.msg = torch.zeros(0, dtype=torch.long), torch.zeros(0, width)
        self.assoc = torch.zeros(self.nodes, dtype=torch.long)

    def score(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits of the events and of their negatives."""
        wrong = batch.negatives[:, 0]
        n_id, edges, e_id = self.loader(torch.unique(torch.cat([batch.src, batch.dst, wrong])))
        self.assoc[n_id] = torch.arange(len(n_id))
        z, last = self.memory(n_id)
        gap = (last[edges[0]] - self.t[e_id]).to(z.dtype)
        edge = torch.cat([self.memory.time_enc(gap), self.msg[e_id]], 1)
        z = self.conv(z, edges, edge)
        i, j, k = (z[self.assoc[nodes]] for nodes in (batch.src, batch.dst, wrong))
        one = self.source(i)
        return tuple(self.out((one + self.target(end)).relu()).view(-1) for end in (j, k))  # type: ignore[return-value]

    def take(self, batch: Any) -> None:
        """Store a batch in the memory and in the neighbour loader."""
        self.memory.update_state(batch.src, batch.dst, batch.t.long(), batch.msg)
        self.loader.insert(batch.src, batch.dst)
        self.t, self.msg = torch.cat([self.t, batch.t.long()]), torch.cat([self.msg, batch.msg])

    def reset(self) -> None:
        """Empty."""
        self.memory.reset_state()
        self.loader.reset_state()
        self.t, self.msg = self.t[:0], self.msg[:0]


class LastMessage(nn.Module):
    """The last message of each node; PyG's own aggregator is wrong without torch-scatter."""

    def forward(self, msg: Tensor, index: Tensor, t: Tensor, size: int) -> Tensor:
        """One row a node, zero without a message."""
        order = torch.argsort(t, stable=True)
        out = msg.new_zeros(size, msg.shape[1])
        place = torch.full((size,), -1)
        place.scatter_reduce_(0, index[order], torch.arange(len(order)), "amax")
        there = place >= 0
        out[there] = msg[order[place[there]]]
        return out


def train_pyg(
    stream: TemporalData,
    batch_size: int,
    epochs: int,
    lr: float,
    dim: int,
    seed: int,
    pres: PRES | None = None,
    split: tuple[float, float] = (0.15, 0.15),
) -> PyGResult:
    """Its example's loop; the test of the epoch that is best on validation.

    Its memory fails on events without features (2.8.1), so that these get one of 0.
    """
    if not stream.msg_dim:
        stream = replace(stream, msg=np.zeros((len(stream), 1), np.float32))
    train, valid, test = stream.chronological_split(*split)
    model = PyGTGN(stream, dim)
    parameters = list(model.parameters())
    if pres is not None:
        parameters += list(pres.attach_(model.memory).parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    best, scores, seconds = -1.0, None, 0.0
    shared: dict[str, Any] = {"candidates": stream.destinations}
    for epoch in range(epochs):
        start = time.process_time()
        model.train()
        model.reset()
        for batch in TemporalBatches(train, batch_size, seed=f"train {seed} {epoch}", **shared):
            optimizer.zero_grad()
            right, wrong = model.score(batch)
            loss = F.softplus(-right).mean() + F.softplus(wrong).mean()
            (loss if pres is None else loss + pres.coherence_loss()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            model.take(batch)
            model.memory.detach()
        seconds += time.process_time() - start
        tested = []
        model.eval()
        for part in (valid, test):
            found = []
            with torch.no_grad():
                for batch in TemporalBatches(part, 200, seed=f"test {seed}", **shared):
                    right, wrong = model.score(batch)
                    model.take(batch)
                    found.append((right.double().numpy(), wrong.double().numpy()[:, None]))
            tested.append(score_parts(found, part, None))
        if tested[0].ap > best:
            best, scores = tested[0].ap, tested[1]
    assert scores is not None
    stores = [tensor for store in (model.memory.msg_s_store, model.memory.msg_d_store)
              for row in store.values() for tensor in row]  # fmt: skip
    held = {
        "parameters": sum(p.nbytes for p in parameters),
        "memory_rows": model.memory.memory.nbytes + model.memory.last_update.nbytes,
        "pending": int(np.sum([tensor.nbytes for tensor in stores])),
        "neighbours": sum(x.nbytes for x in (model.loader.neighbors, model.loader.e_id, model.t, model.msg)),
    }  # fmt: skip
    if pres is not None and pres.tracker is not None:
        held |= pres.tracker.memory_bytes()
    return PyGResult(scores, seconds, sum(p.numel() for p in parameters), held)
