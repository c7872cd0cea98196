"""TGN, JODIE and APAN: three ways to read a node's memory, over one way to keep it.

Work goes in the order that leaks nothing: update the memory with the events of the batch before, embed,
score, take the loss, then store this batch's events. The update is eager, as in TGN's code: every node that
waits is updated at once, and its partner's memory is the one before that update. (PyG's ``TGNMemory`` in
training is
lazy: a node is updated when it next occurs, with its partner's memory of that later moment.) The gradient
reaches the updater through the update at the start of a batch; a memory that is updated at its end gives it
none.

Sources: Rossi et al. 2020 (TGN, arXiv 2006.10637); Kumar et al. 2019 (JODIE, KDD); Wang et al. 2021 (APAN,
    SIGMOD).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from memspan.banks.temporal.memory import Events, NodeMemory, RecentRing, RowType
from memspan.banks.temporal.pres import PRES, coherence
from memspan.base import refuse
from memspan.ledger.bytes import nbytes

__all__ = [
    "APAN",
    "JODIE",
    "TGN",
    "LinkPredictor",
    "TemporalAttention",
    "TemporalModel",
    "TimeEncode",
    "View",
]

M = TypeVar("M", bound="TemporalModel")


class TimeEncode(nn.Module):
    """``cos(w dt + b)`` with frequencies from 1 to 1e-9 at the start, both learned.

    Args:
        dim: d, width of the code.
        log: of ``log(1 + dt)`` in the place of dt. Where gaps grow late in a stream (on CollegeMsg the test's
            are 12 times the training's), a code of dt itself meets values it never saw.

    Example:
        >>> TimeEncode(4)(torch.zeros(3)).shape
        torch.Size([3, 4])
    """

    def __init__(self, dim: int, log: bool = False) -> None:
        super().__init__()
        if dim < 2:
            refuse("dim", dim, "give 2 or more")
        self.log = log
        self.weight = nn.Parameter(10.0 ** (-9 * torch.arange(dim) / (dim - 1)).unsqueeze(1))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, gap: Tensor) -> Tensor:
        """Codes (..., d) of time differences (...), in units of the mean gap between events."""
        if self.log:
            gap = gap.clamp_min(0).log1p()
        code = nn.functional.linear(gap.unsqueeze(-1).to(self.weight.dtype), self.weight, self.bias)
        return torch.cos(code)


class TemporalAttention(nn.Module):
    """Attention of a node over a few items, worked in the items' own space.

    A key is ``K item`` and a value ``V item``, so that ``query · K item = (K' query) · item``: the matrices
    are applied once a query and never to the items, of which there are ten times as many.

    Args:
        query_dim: width of a query.
        item_dim: width of an item.
        dim: width of the answer, a multiple of ``heads``.
        heads: parallel attentions.

    Example:
        >>> attend = TemporalAttention(3, 5, 4)
        >>> attend(torch.zeros(2, 3), torch.zeros(2, 7, 5), torch.zeros(2, 7).bool()).shape
        torch.Size([2, 4])
    """

    def __init__(self, query_dim: int, item_dim: int, dim: int, heads: int = 2) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            refuse("heads", heads, f"give a divisor of {dim}")
        self.heads, self.size = heads, dim // heads
        self.query = nn.Linear(query_dim, dim)
        self.key = nn.Parameter(torch.empty(heads, self.size, item_dim))
        self.value = nn.Parameter(torch.empty(heads, item_dim, self.size))
        bound = 1 / math.sqrt(item_dim)
        nn.init.uniform_(self.key, -bound, bound)
        nn.init.uniform_(self.value, -bound, bound)

    def forward(self, query: Tensor, items: Tensor, mask: Tensor) -> Tensor:
        """Answers (Q, dim); zero where a query has no item.

        Args:
            query: (Q, query_dim).
            items: (Q, k, item_dim).
            mask: (Q, k) bool, which items are there.
        """
        asked = self.query(query).view(-1, self.heads, self.size).transpose(0, 1)  # (h, Q, size)
        wanted = torch.bmm(asked, self.key).transpose(0, 1)  # (Q, h, item_dim)
        score = torch.bmm(wanted, items.transpose(1, 2)) / math.sqrt(self.size)
        score = score.masked_fill(~mask.unsqueeze(1), -1e30).softmax(-1) * mask.unsqueeze(1)
        seen = torch.bmm(score, items).transpose(0, 1)  # (h, Q, item_dim)
        return torch.bmm(seen, self.value).transpose(0, 1).reshape(len(query), -1)


class LinkPredictor(nn.Module):
    """A two-layer network over a source's and a destination's embedding, the source's part worked once.

    Example:
        >>> LinkPredictor(4)(torch.zeros(3, 4), torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, 1)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits: of (B, D) against (B, K, D) gives (B, K)."""
        hidden = (self.source(source).unsqueeze(1) + self.target(target)).relu()
        logit: Tensor = self.out(hidden).squeeze(-1)
        return logit


class View(NamedTuple):
    """The memory once the waiting events are in, not written yet: the updated nodes and their rows.

    Attributes:
        nodes: (n,) int64, rising.
        memory: (n, D) with the gradient of the updater.
        before: (n, D) rows before the update.
        t: (n,) float64 time of the update.
        t_before: (n,) of the update before.
        component: (n,) kind of the last event, or None.
    """

    nodes: Tensor
    memory: Tensor
    before: Tensor
    t: Tensor
    t_before: Tensor
    component: Tensor | None


class TemporalModel(nn.Module):
    """What TGN, JODIE and APAN share: the memory, its update, the order of work, the link score.

    Args:
        num_nodes: N.
        msg_dim: F, width of an event's features.
        memory_dim: D.
        time_dim: width of the time code; D when None.
        time: what the time code is of: ``"log"``, log(1 + dt) (ours), or ``"linear"``, dt as in the papers:
            attention fails with it where gaps grow late in the stream.
        aggregate: which of a node's messages in a batch count: the ``"last"``, or their ``"mean"``.
        message_dim: width of a two-layer network over the raw messages; None hands them on as they are.
        pres: prediction, correction and coherence; None does without.
        dropout: on embeddings, in training.
        dtype: of the stored rows (see :class:`NodeMemory`).
        time_scale: unit of time; None: ``train_link_prediction`` takes the mean gap of the training events.

    Raises:
        BadInput: sizes below 1, or a PRES with a unit of time of its own.
    """

    time_scale: Tensor

    def __init__(
        self,
        num_nodes: int,
        msg_dim: int = 0,
        memory_dim: int = 100,
        *,
        time_dim: int | None = None,
        time: Literal["log", "linear"] = "log",
        aggregate: Literal["last", "mean"] = "last",
        message_dim: int | None = None,
        pres: PRES | None = None,
        dropout: float = 0.1,
        dtype: RowType = "float32",
        time_scale: float | None = None,
        cell: type[nn.RNNCell] | type[nn.GRUCell] = nn.GRUCell,
    ) -> None:
        super().__init__()
        if time not in ("log", "linear"):
            refuse("time", time, 'use "log" or "linear"')
        if aggregate not in ("last", "mean"):
            refuse("aggregate", aggregate, 'use "last" or "mean"')
        if time_scale is not None and not 0 < time_scale < math.inf:
            refuse("time_scale", time_scale, "give a time above 0, such as data.mean_gap")
        if pres is not None and pres.time_scale is not None:
            refuse("pres.time_scale", pres.time_scale, "leave it out: a model has its own unit of time")
        self.aggregate = aggregate
        self.memory = NodeMemory(num_nodes, memory_dim, msg_dim, dtype)
        self.encode = TimeEncode(time_dim or memory_dim, log=time == "log")
        width = 2 * memory_dim + msg_dim + (time_dim or memory_dim)
        self.message: nn.Module = nn.Identity()
        if message_dim is not None:
            hidden = nn.Linear(width, width // 2)
            self.message = nn.Sequential(hidden, nn.ReLU(), nn.Linear(width // 2, message_dim))
        self.updater = cell(width if message_dim is None else message_dim, memory_dim)
        self.predict = LinkPredictor(memory_dim)
        self.dropout = nn.Dropout(dropout)
        self.pres = pres
        if pres is not None:
            pres.size_(num_nodes, memory_dim).time_scale = 1.0  # times come to it in the model's unit
        self.register_buffer("time_scale", torch.tensor(time_scale or 0.0, dtype=torch.float64))

    # -- the order of work --

    def view(self) -> View:
        """Update what waits, with the gradient, and write nothing."""
        memory = self.memory
        waits = memory.pending(self.aggregate)
        owner = waits.nodes if waits.group is None else waits.nodes[waits.group]
        t_event = memory.pending_t[waits.event]
        before, t_before = memory.read(waits.nodes), memory.last_update[waits.nodes]
        if not len(waits.nodes):
            return View(waits.nodes, before, before, t_before, t_before, None)
        own = before if waits.group is None else memory.read(owner)
        code = self.encode(self._gap(t_event, memory.last_update[owner]))
        parts = [own, memory.read(waits.partner), memory.pending_msg[waits.event], code]
        message = self.message(torch.cat(parts, 1))
        if waits.group is not None:
            total = message.new_zeros(len(before), message.shape[1]).index_add(0, waits.group, message)
            message = total / torch.bincount(waits.group, minlength=len(before)).unsqueeze(1)
        t = memory.pending_t[waits.last]
        kinds = memory.pending_component
        component = kinds[waits.last] if len(kinds) else None
        after = self.updater(message, before)
        if self.pres is not None:
            scaled = (self._scaled(t_before), self._scaled(t))
            after = self.pres.correct(
                waits.nodes, before, after, *scaled, observe=False, component=component
            )  # fmt: skip
        return View(waits.nodes, after, before, t, t_before, component)

    def embed(self, view: View, nodes: Tensor, t: Tensor) -> Tensor:
        """Embeddings (Q, D) of nodes (Q,) at times (Q,)."""
        raise NotImplementedError

    def score(self, view: View, events: Events) -> tuple[Tensor, Tensor]:
        """Logits of the events (B,) and of their negatives (B, K)."""
        if events.negatives is None:
            refuse("negatives", None, "give (B, K) destinations that did not happen")
        count, k = events.negatives.shape
        nodes = torch.cat([events.src, events.dst, events.negatives.reshape(-1)])
        t = torch.cat([events.t, events.t, events.t.repeat_interleave(k)])
        source, target, wrong = torch.split(self.embed(view, nodes, t), [count, count, count * k])
        told = self.predict(source, torch.cat([target.unsqueeze(1), wrong.view(count, k, -1)], 1))
        return told[:, 0], told[:, 1:]

    def forward(self, events: Events) -> tuple[Tensor, Tensor]:
        """:meth:`view` and :meth:`score`; changes nothing."""
        return self.score(self.view(), events)

    def coherence_loss(self, view: View) -> Tensor:
        """``beta (1 - cos)`` of the updated rows against those before; 0 without PRES."""
        if self.pres is None or not self.pres.beta:
            return view.memory.new_zeros(())
        return self.pres.beta * coherence(view.memory, view.before)

    @torch.no_grad()
    def write_(self, view: View, events: Events) -> None:
        """Write the updated rows, without their graph, and store the events; in training PRES observes.

        Raises:
            BadInput: see :meth:`NodeMemory.store_`; nothing is written then.
        """
        self.memory.check(events)
        if len(view.nodes):
            self.memory.write_(view.nodes, view.memory, view.t)
            if self.pres is not None and self.training:
                scaled = (self._scaled(view.t_before), self._scaled(view.t))
                self.pres.observe_(view.nodes, view.before, view.memory, *scaled, view.component)
        self._deliver_(events)
        self.memory.store_(events)

    def _deliver_(self, events: Events) -> None:
        """What else a model keeps of a batch's events."""

    # -- reading --

    def rows(self, view: View, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Memory (Q, D) and last update (Q,) of nodes (Q,) in a view."""
        memory = self.memory
        stored, t = memory.read(nodes), memory.last_update[nodes]
        if not len(view.nodes):
            return stored, t
        place = torch.searchsorted(view.nodes, nodes).clamp_max(len(view.nodes) - 1)
        hit = view.nodes[place] == nodes
        fresh = view.memory.index_select(0, place)
        return torch.where(hit.unsqueeze(1), fresh, stored), torch.where(hit, view.t[place], t)

    def _gap(self, t: Tensor, before: Tensor) -> Tensor:
        return self._scaled(t - before).to(self.encode.weight.dtype)

    def _scaled(self, t: Tensor) -> Tensor:
        return t / self.time_scale

    # -- state --

    def ready(self) -> None:
        """Refuse to work without a unit of time."""
        if not float(self.time_scale) > 0:
            refuse("time_scale", float(self.time_scale), "give the model time_scale=data.mean_gap")

    def reset_(self) -> None:
        """Empty memory, nothing waiting, no neighbours; PRES keeps its tracker."""
        for part in self._stores():
            part.reset_()

    def grow_(self, num_nodes: int) -> None:
        """Room for nodes that come later; their rows are zero."""
        for part in self._stores():
            part.grow_(num_nodes)
        if self.pres is not None:
            self.pres.grow_(num_nodes)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the memory, of what waits and of the neighbours, for :meth:`restore_`."""
        return {
            f"{i}.{name}": tensor.clone()
            for i, part in enumerate(self._stores())
            for name, tensor in part.state_dict().items()
        }

    def restore_(self, snapshot: dict[str, Tensor]) -> None:
        """Go back to a :meth:`snapshot`; weights and tracker stay."""
        for i, part in enumerate(self._stores()):
            mine = {name.partition(".")[2]: x for name, x in snapshot.items() if name.startswith(f"{i}.")}
            part.load_state_dict(mine)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes by what holds them."""
        held = {"parameters": sum(parameter.nbytes for parameter in self.parameters())}
        held["buffers"] = nbytes(self.time_scale)
        parts: list[Any] = [*self._stores(), *([] if self.pres is None else [self.pres])]
        for part in parts:
            for name, value in part.memory_bytes().items():
                if name != "parameters":
                    held[name] = held.get(name, 0) + value
        return held

    def _stores(self) -> list[NodeMemory | RecentRing]:
        return [self.memory]


class TGN(TemporalModel):
    """Temporal graph network: a GRU updates the memory, attention over recent neighbours reads it.

    Neighbours of one batch do not see each other (PyG's protocol; TGN's own code shows a batch's earlier
    events).

    Args:
        num_nodes: N.
        msg_dim: F.
        memory_dim: D.
        neighbours: most recent ones of each node, k.
        heads: of the attention.
        at: the moment of an embedding: ``"event"``, the time of the query, as in TGN; or ``"update"``, the
            node's
            last update, as in PyG's example: then a node is embedded once a batch, however often it is asked.
        options: as :class:`TemporalModel`.

    Example:
        >>> model = TGN(5, memory_dim=8, time_scale=1.0)
        >>> t = torch.tensor([1.0, 2.0]).double()
        >>> events = Events(torch.tensor([0, 1]), torch.tensor([2, 3]), t, torch.zeros(2, 0), None,
        ...                 torch.tensor([[4], [4]]))
        >>> positive, negative = model(events)
        >>> positive.shape, negative.shape
        (torch.Size([2]), torch.Size([2, 1]))
    """

    def __init__(
        self,
        num_nodes: int,
        msg_dim: int = 0,
        memory_dim: int = 100,
        *,
        neighbours: int = 10,
        heads: int = 2,
        at: Literal["event", "update"] = "event",
        **options: Any,
    ) -> None:
        super().__init__(num_nodes, msg_dim, memory_dim, **options)
        if at not in ("event", "update"):
            refuse("at", at, 'use "event" or "update"')
        self.at = at
        time = len(self.encode.bias)
        self.recent = RecentRing(num_nodes, neighbours, msg_dim)
        self.attend = TemporalAttention(memory_dim + time, memory_dim + msg_dim + time, memory_dim, heads)
        self.merge = nn.Sequential(
            nn.Linear(2 * memory_dim, memory_dim), nn.ReLU(), nn.Linear(memory_dim, memory_dim)
        )

    def embed(self, view: View, nodes: Tensor, t: Tensor) -> Tensor:
        """One layer of attention over the recent neighbours."""
        if self.at == "event":
            return self._embedded(view, nodes, t)
        asked, place = torch.unique(nodes, return_inverse=True)
        return self._embedded(view, asked, self.rows(view, asked)[1]).index_select(0, place)

    def _embedded(self, view: View, nodes: Tensor, t: Tensor) -> Tensor:
        partner, t_then, msg, mask = self.recent.fetch(nodes)
        distinct, place = torch.unique(torch.cat([nodes, partner.view(-1)]), return_inverse=True)
        rows, _ = self.rows(view, distinct)
        own = rows.index_select(0, place[: len(nodes)])
        theirs = rows.index_select(0, place[len(nodes) :]).view(*partner.shape, -1)
        code = self.encode(self._gap(t.unsqueeze(1), t_then))
        now = self.encode.bias.cos().expand(len(nodes), -1)  # the code of no time
        seen = self.attend(torch.cat([own, now], 1), torch.cat([theirs, msg.to(own.dtype), code], 2), mask)
        merged: Tensor = self.dropout(self.merge(torch.cat([seen, own], 1)))
        return merged

    def _deliver_(self, events: Events) -> None:
        nodes, partner = torch.cat([events.src, events.dst]), torch.cat([events.dst, events.src])
        self.recent.insert_(*_alternating(nodes, partner), events.t.repeat_interleave(2), _twice(events.msg))

    def _stores(self) -> list[NodeMemory | RecentRing]:
        return [self.memory, self.recent]


class JODIE(TemporalModel):
    """The memory projected in time: ``h = s (1 + w z)``, with z from the time since its last update.

    Args:
        num_nodes: N.
        msg_dim: F.
        memory_dim: D.
        projection: ``"log"``: z = log(1 + dt) / 5 - 1, dt in mean gaps (ours); ``"linear"``: z = dt, the
            paper's, with which the model collapses where gaps grow late in the stream.
        cell: what updates the memory: ``"gru"``, or ``"rnn"`` as in the paper.
        options: as :class:`TemporalModel`.

    Example:
        >>> JODIE(5, memory_dim=8, time_scale=1.0).memory_bytes()["memory_rows"]
        200
    """

    def __init__(
        self,
        num_nodes: int,
        msg_dim: int = 0,
        memory_dim: int = 100,
        *,
        projection: Literal["log", "linear"] = "log",
        time: Literal["log", "linear"] = "linear",
        cell: Literal["gru", "rnn"] = "gru",
        **options: Any,
    ) -> None:
        if projection not in ("log", "linear"):
            refuse("projection", projection, 'use "log" or "linear"')
        if cell not in ("gru", "rnn"):
            refuse("cell", cell, 'use "gru" or "rnn"')
        kind = nn.GRUCell if cell == "gru" else nn.RNNCell
        super().__init__(num_nodes, msg_dim, memory_dim, time=time, cell=kind, **options)
        self.projection = projection
        self.drift = nn.Parameter(torch.zeros(memory_dim))

    def embed(self, view: View, nodes: Tensor, t: Tensor) -> Tensor:
        """The projected memory."""
        rows, t_then = self.rows(view, nodes)
        gap = self._gap(t, t_then)
        z = gap.clamp_min(0).log1p() / 5 - 1 if self.projection == "log" else gap
        projected: Tensor = self.dropout(rows * (1 + z.unsqueeze(1) * self.drift))
        return projected


class APAN(TemporalModel):
    """Messages are mailed to the neighbours after the event; a node reads its own mailbox when it is asked.

    No neighbour is fetched at the time of a query: the mails of an event, both memories and its features,
    went to its ends and to their recent neighbours when it was stored.

    Args:
        num_nodes: N.
        msg_dim: F.
        memory_dim: D.
        mails: kept for each node.
        neighbours: of each end that get a mail.
        heads: of the attention.
        options: as :class:`TemporalModel`.

    Example:
        >>> APAN(5, memory_dim=8, mails=3, time_scale=1.0).mailbox.payload.shape
        torch.Size([5, 3, 16])
    """

    def __init__(
        self, num_nodes: int, msg_dim: int = 0, memory_dim: int = 100, *, mails: int = 10,
        neighbours: int = 10, heads: int = 2, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(num_nodes, msg_dim, memory_dim, **options)
        time, width = len(self.encode.bias), 2 * memory_dim + msg_dim
        self.recent = RecentRing(num_nodes, neighbours)
        self.mailbox = RecentRing(num_nodes, mails, width, partners=False)
        self.attend = TemporalAttention(memory_dim + time, width + time, memory_dim, heads)
        self.merge = nn.Sequential(
            nn.Linear(2 * memory_dim, memory_dim), nn.ReLU(), nn.Linear(memory_dim, memory_dim)
        )

    def embed(self, view: View, nodes: Tensor, t: Tensor) -> Tensor:
        """Attention over the own mailbox."""
        own, _ = self.rows(view, nodes)
        _, t_then, mails, mask = self.mailbox.fetch(nodes)
        code = self.encode(self._gap(t.unsqueeze(1), t_then))
        now = self.encode.bias.cos().expand(len(nodes), -1)
        seen = self.attend(torch.cat([own, now], 1), torch.cat([mails.to(own.dtype), code], 2), mask)
        merged: Tensor = self.dropout(self.merge(torch.cat([seen, own], 1)))
        return merged

    def _deliver_(self, events: Events) -> None:
        """Mail each event to its ends and to the neighbours they had before the batch."""
        count = len(events.src)
        near_src, _, _, has_src = self.recent.fetch(events.src)
        near_dst, _, _, has_dst = self.recent.fetch(events.dst)
        always = torch.ones(count, 2, dtype=torch.bool, device=events.src.device)
        to = torch.cat([events.src.unsqueeze(1), events.dst.unsqueeze(1), near_src, near_dst], 1)
        there = torch.cat([always, has_src, has_dst], 1)
        which = torch.arange(count, device=to.device).unsqueeze(1).expand_as(to)[there]
        mail = torch.cat([self.memory.read(events.src), self.memory.read(events.dst), events.msg], 1)
        # only the mails that stay are copied: payloads are looked up after the slots are known
        self.mailbox.insert_(to[there], None, events.t[which], mail, which)
        nodes, partner = torch.cat([events.src, events.dst]), torch.cat([events.dst, events.src])
        self.recent.insert_(
            *_alternating(nodes, partner), events.t.repeat_interleave(2), events.msg[:, :0]
        )  # fmt: skip

    def _stores(self) -> list[NodeMemory | RecentRing]:
        return [self.memory, self.recent, self.mailbox]


def _alternating(nodes: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """From all sources, then all destinations, to source and destination of event after event."""
    return nodes.view(2, -1).t().reshape(-1), partner.view(2, -1).t().reshape(-1)


def _twice(msg: Tensor) -> Tensor:
    return msg.repeat_interleave(2, 0) if msg.shape[1] else msg
