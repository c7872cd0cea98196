"""What a dynamic graph network keeps of each node: a memory row, the events to come in, recent neighbours.

Everything is a tensor of fixed width in the module's buffers, so that a state_dict holds all of it and a
stream that stops today goes on tomorrow. Sums over one batch cost O(batch), whatever the number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memspan.base import refuse

__all__ = ["Events", "NodeMemory", "Pending", "RecentRing", "last_of_each"]

RowType = Literal["float32", "bfloat16", "int8"]


class Events(NamedTuple):
    """A batch of timed edges, in the order of the stream.

    Attributes:
        src: (B,) int64.
        dst: (B,) int64.
        t: (B,) float64, since the stream's origin, never falling.
        msg: (B, F) floating; F may be 0.
        component: (B,) int64 kinds of event, or None where all are of one kind.
        negatives: (B, K) int64 destinations that did not happen, or None.
    """

    src: Tensor
    dst: Tensor
    t: Tensor
    msg: Tensor
    component: Tensor | None = None
    negatives: Tensor | None = None

    def to(self, device: torch.device | str) -> Events:
        """The same events on a device."""
        return self.map(lambda part: part.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Events:
        """The events with every column changed by the same function, such as a slice."""
        kind, wrong = self.component, self.negatives
        return Events(
            change(self.src), change(self.dst), change(self.t), change(self.msg),
            None if kind is None else change(kind), None if wrong is None else change(wrong),
        )  # fmt: skip


class Pending(NamedTuple):
    """The messages that wait: message m is for ``nodes[group[m]]``, from ``partner[m]`` in ``event[m]``."""

    nodes: Tensor
    partner: Tensor
    event: Tensor
    group: Tensor | None
    last: Tensor  # for each node, its last event


def last_of_each(nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values, rising, and the last place of each: one sort, no loop.

    Example:
        >>> last_of_each(torch.tensor([7, 3, 7, 3, 3]))
        (tensor([3, 7]), tensor([4, 2]))
    """
    count = nodes.numel()
    key = (nodes * count + torch.arange(count, device=nodes.device)).sort().values
    sorted_nodes = key // max(count, 1)
    end = torch.ones(count, dtype=torch.bool, device=nodes.device)
    torch.ne(sorted_nodes[1:], sorted_nodes[:-1], out=end[:-1])
    key = key[end]
    kept = sorted_nodes[end]
    return kept, key - kept * count


class _Kept(nn.Module):
    """Buffers of which some are times, which stay float64, and some change their length."""

    _times: tuple[str, ...] = ()
    _any_length: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        times = {name: getattr(self, name) for name in self._times}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, exact in times.items():  # .half() or .to(bfloat16) would lose hours
            moved = getattr(self, name)
            if moved.dtype != torch.float64:
                setattr(self, name, exact.to(moved.device))
        return self

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name in self._any_length:
            found = state.get(prefix + name)
            if found is not None:
                own = getattr(self, name)
                setattr(self, name, own.new_zeros(found.shape))
        super()._load_from_state_dict(state, prefix, *rest)  # type: ignore[arg-type]

    def _grown_(self, count: int, names: tuple[str, ...], fill: Mapping[str, float] | None = None) -> None:
        for name in names:
            old = getattr(self, name)
            if count < len(old):
                refuse("num_nodes", count, f"there are {len(old)} already; memory only grows")
            new = old.new_full((count, *old.shape[1:]), (fill or {}).get(name, 0))
            new[: len(old)] = old
            setattr(self, name, new)


class NodeMemory(_Kept):
    """One row for each node, the time of its last event, and the raw events of the last batch.

    Args:
        num_nodes: N.
        dim: D, width of a row.
        msg_dim: F, width of an event's features.
        dtype: of the stored rows: ``"float32"``, ``"bfloat16"`` (half the bytes), or ``"int8"`` with one
            scale
            for each row (a quarter). They are read as floats of the module's precision.

    Attributes:
        rows: (N, D) of ``dtype``, zero at the start.
        last_update: (N,) float64, since the origin of the stream.
        clock: float64, the latest event stored.
        pending_src: (P,), and so on: the events that are not in the rows yet; at most one batch.

    Raises:
        BadInput: sizes below 1, another dtype.

    Example:
        >>> memory = NodeMemory(5, 2)
        >>> one, t = torch.tensor([0]), torch.tensor([4.0]).double()
        >>> memory.store_(Events(one, one + 3, t, torch.zeros(1, 0)))
        >>> memory.pending().nodes.tolist(), memory.memory_bytes()
        ([0, 3], {'memory_rows': 80, 'pending': 24, 'buffers': 8})
    """

    _times = ("last_update", "clock", "pending_t")
    _any_length = ("pending_src", "pending_dst", "pending_t", "pending_msg", "pending_component")

    def __init__(self, num_nodes: int, dim: int, msg_dim: int = 0, dtype: RowType = "float32") -> None:
        super().__init__()
        for name, value, least in (("num_nodes", num_nodes, 1), ("dim", dim, 1), ("msg_dim", msg_dim, 0)):
            if not isinstance(value, int) or value < least:
                refuse(name, value, f"give a whole number of {least} or more")
        if dtype not in ("float32", "bfloat16", "int8"):
            refuse("dtype", dtype, 'use "float32", "bfloat16" or "int8"')
        self.dim, self.msg_dim, self.dtype = dim, msg_dim, dtype
        self.register_buffer("rows", torch.zeros(num_nodes, dim, dtype=getattr(torch, dtype)))
        if dtype == "int8":
            self.register_buffer("scale", torch.zeros(num_nodes))
        self.register_buffer("last_update", torch.zeros(num_nodes, dtype=torch.float64))
        self.register_buffer("clock", torch.zeros((), dtype=torch.float64))
        self.register_buffer("pending_src", torch.zeros(0, dtype=torch.long))
        self.register_buffer("pending_dst", torch.zeros(0, dtype=torch.long))
        self.register_buffer("pending_t", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("pending_msg", torch.zeros(0, msg_dim))
        self.register_buffer("pending_component", torch.zeros(0, dtype=torch.long))

    rows: Tensor
    scale: Tensor
    last_update: Tensor
    clock: Tensor
    pending_src: Tensor
    pending_dst: Tensor
    pending_t: Tensor
    pending_msg: Tensor
    pending_component: Tensor

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.rows)

    def read(self, nodes: Tensor) -> Tensor:
        """Rows of nodes of any shape (...,): (..., D), in the precision of the events' features."""
        rows = self.rows.index_select(0, nodes.reshape(-1))
        if self.dtype == "int8":
            rows = rows * self.scale.index_select(0, nodes.reshape(-1)).unsqueeze(-1)
        return rows.to(self.pending_msg.dtype).view(*nodes.shape, self.dim)

    @torch.no_grad()
    def write_(self, nodes: Tensor, rows: Tensor, t: Tensor) -> None:
        """Overwrite rows and times of distinct nodes; keeps no graph."""
        if self.dtype == "int8":
            scale = rows.abs().amax(1) / 127
            self.scale.index_copy_(0, nodes, scale.to(self.scale.dtype))
            rows = (rows / scale.clamp_min(torch.finfo(scale.dtype).tiny).unsqueeze(1)).round()
        self.rows.index_copy_(0, nodes, rows.to(self.rows.dtype))
        self.last_update.index_copy_(0, nodes, t)

    @torch.no_grad()
    def store_(self, events: Events) -> None:
        """Keep a batch's raw events until the next update; what waited before is dropped.

        Raises:
            BadInput: an event earlier than one stored before, a node outside 0 to N - 1, features of another
                width. Nothing is stored then.
        """
        self.check(events)
        self.pending_src, self.pending_dst = events.src.clone(), events.dst.clone()
        self.pending_t = events.t.double()
        self.pending_msg = events.msg.to(self.pending_msg.dtype, copy=True)
        component = events.component
        self.pending_component = events.src.new_zeros(0) if component is None else component.clone()
        if len(events.t):
            self.clock = self.pending_t[-1].clone()

    def check(self, events: Events) -> None:
        """Refuse events that cannot follow those stored so far."""
        if events.msg.shape != (len(events.src), self.msg_dim):
            refuse("msg", tuple(events.msg.shape), f"this memory takes ({len(events.src)}, {self.msg_dim})")
        if not len(events.t):
            return
        earlier = events.t < torch.cat([self.clock.view(1), events.t[:-1]])
        if bool(earlier.any()):
            at = int(earlier.nonzero()[0])
            refuse(
                "t", float(events.t[at]), f"event {at} lies before an event stored already; sort the stream"
            )
        ends = torch.cat([events.src, events.dst])
        if bool((ends < 0).any()) or bool((ends >= self.num_nodes).any()):
            wrong = int(ends[((ends < 0) | (ends >= self.num_nodes)).nonzero()[0, 0]])
            refuse("nodes", wrong, f"ids run from 0 to {self.num_nodes - 1}; use grow_ for new nodes")

    def pending(self, aggregate: Literal["last", "mean"] = "last") -> Pending:
        """The waiting messages, two for each event (its source first), by node.

        Args:
            aggregate: ``"last"`` keeps the last message of each node in the order of the stream; ``"mean"``
                keeps all, with the node each belongs to.
        """
        node = torch.stack([self.pending_src, self.pending_dst], 1).view(-1)
        partner = torch.stack([self.pending_dst, self.pending_src], 1).view(-1)
        nodes, place = last_of_each(node)
        if aggregate == "last":
            event = place // 2
            return Pending(nodes, partner[place], event, None, event)
        every = torch.arange(len(node), device=node.device) // 2
        return Pending(nodes, partner, every, torch.searchsorted(nodes, node), place // 2)

    def reset_(self) -> None:
        """Zero rows, times 0, nothing waiting."""
        for name in ("rows", "last_update", "clock", *(("scale",) if self.dtype == "int8" else ())):
            getattr(self, name).zero_()
        for name in self._any_length:
            setattr(self, name, getattr(self, name)[:0].clone())

    def grow_(self, num_nodes: int) -> None:
        """Room for more nodes, with zero rows."""
        names = ("rows", "last_update", *(("scale",) if self.dtype == "int8" else ()))
        self._grown_(num_nodes, names)

    def memory_bytes(self) -> dict[str, int]:
        """Rows (with scales), waiting events, and the rest."""
        rows = self.rows.nbytes + (self.scale.nbytes if self.dtype == "int8" else 0) + self.last_update.nbytes
        pending = sum(getattr(self, name).nbytes for name in self._any_length)
        return {"memory_rows": rows, "pending": pending, "buffers": self.clock.nbytes}


class RecentRing(_Kept):
    """The last k items of each node, newest over oldest: neighbours of a TGN, mails of an APAN.

    Args:
        num_nodes: N.
        k: items kept for each node.
        width: of the payload of an item: an edge's features, or a mail.
        partners: keep the item's other node too.

    Attributes:
        partner: (N, k) int64 (with ``partners`` alone).
        t: (N, k) float64.
        payload: (N, k, width).
        count: (N,) items ever put in.

    Example:
        >>> ring = RecentRing(3, 2)
        >>> one = torch.zeros(3, dtype=torch.long)
        >>> t = torch.tensor([5.0, 6.0, 7.0]).double()
        >>> ring.insert_(one, torch.tensor([1, 2, 1]), t, torch.zeros(3, 0))
        >>> sorted(ring.t[0].tolist()), ring.fetch(torch.tensor([0, 1]))[3].tolist()
        ([6.0, 7.0], [[True, True], [False, False]])
    """

    _times = ("t",)

    def __init__(self, num_nodes: int, k: int = 10, width: int = 0, *, partners: bool = True) -> None:
        super().__init__()
        if k < 1 or num_nodes < 1 or width < 0:
            refuse("num_nodes, k, width", (num_nodes, k, width), "give 1 or more nodes and items")
        self.k, self.partners = k, partners
        if partners:
            self.register_buffer("partner", torch.full((num_nodes, k), -1))
        self.register_buffer("t", torch.full((num_nodes, k), -1.0, dtype=torch.float64))
        self.register_buffer("payload", torch.zeros(num_nodes, k, width))
        self.register_buffer("count", torch.zeros(num_nodes, dtype=torch.long))

    partner: Tensor
    t: Tensor
    payload: Tensor
    count: Tensor

    @torch.no_grad()
    def insert_(
        self,
        nodes: Tensor,
        partner: Tensor | None,
        t: Tensor,
        payload: Tensor,
        which: Tensor | None = None,
    ) -> None:
        """Put items in, in order; of more than k for one node the last k stay.

        Args:
            nodes: (M,) whose item it is.
            partner: (M,) the other node, or None without ``partners``.
            t: (M,) float64.
            payload: (M, width), or (L, width) where ``which`` tells for each item the row it takes.
            which: (M,) int64, or None.
        """
        total = len(nodes)
        if not total:
            return
        key = (nodes * total + torch.arange(total, device=nodes.device)).sort().values
        node = key // total
        place = key - node * total
        first = torch.ones(total, dtype=torch.bool, device=nodes.device)
        torch.ne(node[1:], node[:-1], out=first[1:])
        start = first.nonzero().view(-1)
        length = torch.diff(start, append=start.new_tensor([total]))
        # slots go on from each node's count: the place in the sorted batch, less where its node starts
        shift = (self.count[node[start]] - start).repeat_interleave(length)
        slot = (shift + torch.arange(total, device=nodes.device)) % self.k
        if int(length.max()) > self.k:
            stay = torch.arange(total, device=nodes.device) >= (start + length - self.k).repeat_interleave(
                length
            )
            node, place, slot = node[stay], place[stay], slot[stay]
        flat = node * self.k + slot
        if partner is not None:
            self.partner.view(-1)[flat] = partner[place]
        self.t.view(-1)[flat] = t[place]
        if payload.shape[1]:
            row = place if which is None else which[place]
            self.payload.view(-1, payload.shape[1])[flat] = payload[row].to(self.payload.dtype)
        self.count.index_add_(0, key[start] // total, length)

    def fetch(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Partners, times, payloads and which slots are filled, of nodes (Q,): (Q, k) each; in no order.

        The partner of an empty slot is node 0, and its time is not meant: read the mask.
        """
        filled = torch.arange(self.k, device=nodes.device) < self.count[nodes].unsqueeze(1)
        partner = self.partner[nodes].clamp_min(0) if self.partners else nodes.new_zeros(0)
        return partner, self.t[nodes], self.payload[nodes], filled

    def reset_(self) -> None:
        """Empty: what a slot holds is read only where the count says so."""
        self.count.zero_()

    def grow_(self, num_nodes: int) -> None:
        """Room for more nodes."""
        names = (*(("partner",) if self.partners else ()), "t", "payload", "count")
        self._grown_(num_nodes, names, {"partner": -1, "t": -1.0})

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the slots."""
        held = self.t.nbytes + self.payload.nbytes + self.count.nbytes
        return {"neighbours": held + (self.partner.nbytes if self.partners else 0)}
