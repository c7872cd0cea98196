"""Sharded optimizers: :func:`shard_` for a model of your own, :class:`Sharded` for somebody else's loop."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from memspan.base import refuse
from memspan.training.zero import checkpoint, fsdp
from memspan.training.zero.buckets import Bucket, BucketReducer, Slot, all_gather_flat, exchange, world_of
from memspan.training.zero.elementwise import whole_tensor
from memspan.training.zero.norm import exact_norm, scale_to_norm_
from memspan.training.zero.partition import FlatPartition

__all__ = ["Sharded", "ZeroOptimizer", "default_bucket_bytes", "shard_", "unshard_"]

_MIB = 1 << 20
_ALIGN = 16  # bytes: what vector units and network cards like
_BY = "_memspan_zero"  # names the optimizer of a sharded model


def shard_(
    model: nn.Module,
    optimizer_cls: type[Optimizer] | Callable[..., Optimizer],
    *,
    stage: int,
    params: Iterable[Any] | None = None,
    group: Any = None,
    bucket_bytes: int | None = None,
    master_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    by: str = "element",
    **kw: Any,
) -> ZeroOptimizer:
    """Cut a model's training states over the ranks of a process group (Rajbhandari et al. 2020, section 5).

    Every rank calls it with the same model; rank 0's values are taken. Then train as always: the losses are
    those of data parallelism.

    Args:
        model: on one device, not wrapped. Changed in place: parameters become views into flat buckets (stages
            1 and 2) or DTensors (stage 3, by FSDP2).
        optimizer_cls: a class such as ``torch.optim.AdamW``; it is built here, on this rank's pieces.
        stage: 1 cuts optimizer states, 2 gradients too, 3 parameters too.
        params: torch parameter groups; None takes ``model.parameters()``.
        group: process group; None takes the default one.
        bucket_bytes: size of a communication buffer; None takes the model's bytes / 32 within 1 to 25 MiB.
        master_dtype: ``torch.float32`` steps float32 copies of 16-bit parameters and adds gradients up in
            float32.
        deterministic: the same bits as one process that accumulates the ranks' batches one after another,
            with ``opt.backward(loss)`` and ``opt.clip_grad_norm_``.
        by: ``"element"`` cuts everywhere; ``"parameter"`` gives whole tensors to ranks (stage 1), for
            optimizers that look at a whole tensor.
        kw: for the optimizer (``lr=3e-4``).

    Returns:
        The optimizer.

    Raises:
        BadInput: no process group, a wrapped model, parameters that cannot be cut, an optimizer that is not
            element-wise, ranks that disagree; nothing is changed then.
    """
    group = _group(group)
    if stage not in (1, 2, 3):
        remedy = "use 1 (optimizer states), 2 (and gradients) or 3 (and parameters)"
        refuse("stage", stage, remedy + "; nothing cut is torch's DistributedDataParallel")
    _check_model(model)
    _check_optimizer(optimizer_cls, by, deterministic, kw)
    if by == "parameter" and stage != 1:
        refuse("stage", stage, 'by="parameter" keeps whole gradients: use stage=1')
    groups = _groups(model, params)
    world, _ = world_of(group)
    names = {parameter: name for name, parameter in model.named_parameters()}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    bucket_bytes = default_bucket_bytes(size) if bucket_bytes is None else bucket_bytes
    if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
        refuse("bucket_bytes", bucket_bytes, "give a whole number of bytes, or None")
    _check_parameters(groups, names, master_dtype, deterministic, optimizer_cls)
    options = [
        stage,
        world,
        bucket_bytes,
        str(master_dtype),
        deterministic,
        by,
        _name(optimizer_cls),
        repr(kw),
    ]
    _agree(group, groups, names, options)
    _from_rank_0(model, group)
    if stage == 3:
        optimizer = ZeroOptimizer._of_stage_3(model, optimizer_cls, groups, names, group, deterministic, kw)
    else:
        optimizer = ZeroOptimizer(
            optimizer_cls,
            groups,
            names,
            group=group,
            stage=stage,
            bucket_bytes=bucket_bytes,
            master_dtype=master_dtype,
            deterministic=deterministic,
            by=by,
            model=model,
            options=kw,
        )
    model.__dict__[_BY] = optimizer
    return optimizer


def unshard_(model: nn.Module, optimizer: ZeroOptimizer) -> nn.Module:
    """Undo :func:`shard_`: every parameter whole, in storage of its own; the optimizer is spent.

    Take ``optimizer.full_state_dict(rank0_only=False)`` first if the states are wanted. Every rank calls it.

    Raises:
        BadInput: the optimizer does not belong to the model.
    """
    if model.__dict__.get(_BY) is not optimizer:
        refuse("optimizer", type(optimizer).__name__, "give the optimizer that shard_ made for this model")
    del model.__dict__[_BY]
    optimizer.zero_grad()
    if optimizer.stage == 3:
        optimizer._used.remove()
        return fsdp.unshard_(model)
    optimizer._detach()
    return model


def default_bucket_bytes(model_bytes: int) -> int:
    """1/32 of the model within 1 to 25 MiB: a fixed 25 MiB holds a small model twice over."""
    return min(max(model_bytes // 32, _MIB), 25 * _MIB)


class ZeroOptimizer(Optimizer):
    """A torch optimizer over this rank's pieces; made by :func:`shard_`.

    ``state`` and ``param_groups`` are the inner optimizer's own, so that schedulers and the ledger see what
    is real.

    Attributes:
        inner: the optimizer that steps the pieces.
        stage: 1, 2 or 3.
        group: process group.
        rank: this process in the group.
        world: ranks of the group.
        deterministic: as given.
    """

    inner: Optimizer | None = None

    def __init__(
        self,
        optimizer_cls: Callable[..., Optimizer],
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[nn.Parameter, str],
        *,
        group: Any,
        stage: int,
        bucket_bytes: int,
        master_dtype: torch.dtype | None,
        deterministic: bool,
        by: str,
        model: nn.Module | None,
        options: Mapping[str, Any],
    ) -> None:
        self._begin(stage, group, deterministic, model)
        self._bucket_bytes, self._master, self._by = bucket_bytes, master_dtype, by
        self._names = dict(names)
        ordered = deterministic or dist.get_backend(group) != "nccl"  # the fast path of gloo as well
        self._reducer = BucketReducer(group, stage, ordered) if model is not None else None
        self._buckets: list[Bucket] = []
        cut = [self._cut(given) for given in groups]
        self._finish_init(optimizer_cls(cut, **options))
        self._watch(self._buckets)

    def _begin(self, stage: int, group: Any, deterministic: bool, model: nn.Module | None) -> None:
        self.stage, self.group, self.deterministic, self.model = stage, group, deterministic, model
        self.world, self.rank = world_of(group)
        self._divided = False  # whether this step's gradients are divided by the ranks already
        self._awaits: str | None = None  # what is missing after load_state_dict
        self._warned = False
        self._accumulated = 0
        self._used = fsdp.Used()
        self._homes: list[tuple[nn.Module, str, Bucket, Slot]] = []
        self._whole: list[list[nn.Parameter]] = []  # as given, frozen ones too, by group

    def _finish_init(self, inner: Optimizer) -> None:
        # The base class makes hooks and wraps step; it refuses to begin without a parameter.
        Optimizer.__init__(self, [nn.Parameter(torch.empty(0))], {})
        self.inner, self.defaults = inner, inner.defaults
        self.state, self.param_groups = inner.state, inner.param_groups

    @classmethod
    def _of_stage_3(
        cls,
        model: nn.Module,
        optimizer_cls: Callable[..., Optimizer],
        groups: Sequence[Mapping[str, Any]],
        names: Mapping[nn.Parameter, str],
        group: Any,
        deterministic: bool,
        options: Mapping[str, Any],
    ) -> ZeroOptimizer:
        self = cls.__new__(cls)
        self._begin(3, group, deterministic, model)
        self._reducer, self._buckets, self._master, self._by = None, [], None, "element"
        wanted = [[names[parameter] for parameter in given["params"]] for given in groups]
        fsdp.shard_(model, group, deterministic=deterministic)
        self._used.watch(model)
        now = dict(model.named_parameters())
        self._names = {parameter: name for name, parameter in now.items()}
        self._whole = [[now[name] for name in listed] for listed in wanted]
        cut = [
            {**given, "params": [p for p in whole if p.requires_grad]}
            for given, whole in zip(groups, self._whole, strict=True)
        ]
        self._finish_init(optimizer_cls(cut, **options))
        return self

    def backward(self, loss: Tensor, accumulate: int = 1) -> None:
        """Backward pass of ``loss / (world * accumulate)``: what one process with all the batches would run.

        Args:
            loss: a mean over this rank's micro-batch.
            accumulate: micro-batches in a step; stage 1 sends at the last of them alone.
        """
        self._divided = True
        self._accumulated += 1
        last = self._accumulated >= accumulate
        self._accumulated = 0 if last else self._accumulated
        with self.no_sync() if self.stage == 1 and not last else contextlib.nullcontext():
            (loss / (self.world * accumulate)).backward()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Stage 1: backward passes inside add up on this rank; the next outside, or ``step``, sends the sum.

        Raises:
            BadInput: another stage, which keeps no local gradients to add to.
        """
        if self.stage != 1 or self._reducer is None:
            refuse("stage", self.stage, "no_sync needs whole local gradients: use stage=1")
        with self._reducer.no_sync():
            yield

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this step; they are freed, whatever ``set_to_none`` says."""
        self._divided, self._accumulated = False, 0
        if self._reducer is not None:
            self._reducer.reset()
        elif self.inner is not None:
            for whole in self._whole:
                for parameter in whole:
                    parameter.grad = None
            self.inner.zero_grad()
            self._used.parameters.clear()

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients of all ranks so that their 2-norm is at most ``max_norm``.

        Torch's function sees no gradients at stage 2, or this rank's alone. The sum is exact in any order
        (see :func:`clip_grad_norm_`), so that every number of ranks finds the same bits.

        Returns:
            The norm before clipping: float64, 0-dimensional, the same on every rank.
        """
        gradients, count = self._ready_gradients()
        total = exact_norm(gradients, count, self.group)
        scale_to_norm_(gradients, total, max_norm)
        return total

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of the optimizer over all ranks; gradients are consumed.

        A rank whose data have ended calls it without a backward pass: it adds nothing, and the others go on.

        Raises:
            RuntimeError: a rank has gone; the backward pass did not end; states are missing.
        """
        assert self.inner is not None
        if self._awaits is not None:
            raise RuntimeError(self._awaits)
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        self._attach_again()
        self._ready_gradients()
        self.inner.step()
        self._divided = False
        if self._reducer is None:
            self._used.parameters.clear()
            return value
        with torch.no_grad():
            self._publish([bucket for bucket in self._buckets if any(slot.got for slot in bucket.slots)])
        self._reducer.reset()
        return value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Cut one more group of parameters, such as layers that are unfrozen later; every rank calls it.

        Raises:
            BadInput: as :func:`shard_`; at stage 3, where FSDP2 has cut the model already.
        """
        if self.inner is None:
            super().add_param_group(param_group)
            return
        if self._reducer is None or self.model is None:
            refuse("param_group", self.stage, "groups are added later at stages 1 and 2 alone")
        self.zero_grad()
        params = param_group["params"]
        given = {**param_group, "params": [params] if isinstance(params, Tensor) else list(params)}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        known = {parameter for whole in self._whole for parameter in whole}
        self._names |= {p: names[p] for p in given["params"] if p in names}
        for parameter in given["params"]:
            if parameter in known and parameter.requires_grad and self._slot_of(parameter) is not None:
                refuse("param_group", self._names[parameter], "this parameter is in another group already")
        _check_parameters([given], self._names, self._master, self.deterministic, type(self.inner))
        _agree(self.group, [given], self._names, ["add_param_group"])
        for parameter in given["params"]:
            dist.broadcast(parameter.data, dist.get_global_rank(self.group, 0), group=self.group)
        before = len(self._buckets)
        self.inner.add_param_group(self._cut(given))
        self._watch(self._buckets[before:])

    def state_dict(self) -> dict[str, Any]:
        """This rank's part, without communication; :meth:`full_state_dict` gives the whole."""
        assert self.inner is not None
        self._pass_on()
        return {**self.inner.state_dict(), "zero": {"rank": self.rank, "world": self.world}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's part, or the whole state of an unsharded optimizer over the same parameters.

        Another rank's part (trainers save rank 0's alone) brings the groups' settings only, and ``step`` is
        refused until :meth:`load` has brought the states.

        Raises:
            BadInput: the state of another model or another number of ranks.
        """
        assert self.inner is not None
        part = state_dict.get("zero")
        if part is None:
            checkpoint.load_full(self, state_dict)
            return
        if part == {"rank": self.rank, "world": self.world}:
            self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "zero"})
        else:
            for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
                mine.update({key: value for key, value in saved.items() if key != "params"})
            self._awaits = (
                f"the state that was loaded is that of rank {part['rank']} of {part['world']}, and this is "
                f"rank {self.rank} of {self.world}: load the shards with optimizer.load(folder); with "
                "HF Trainer give callbacks=[zero.save_shards_callback()]"
            )
        self._adopt()

    def full_state_dict(self, rank0_only: bool = True) -> dict[str, Any]:
        """What the unsharded optimizer's ``state_dict`` would hold, key by key; every rank calls it.

        Args:
            rank0_only: the other ranks get an empty dictionary, and hold one parameter's state at a time.
        """
        self._pass_on()
        return checkpoint.full_state(self, rank0_only)

    def save(self, path: Any) -> None:
        """Write a checkpoint into a new folder, a safetensors file a rank; every rank calls it."""
        self._pass_on()
        checkpoint.save(self, path)

    def load(self, path: Any) -> None:
        """Load a checkpoint that any number of ranks wrote; every rank calls it.

        Raises:
            BadInput: the checkpoint is of another model, or of other groups.
            CorruptFile: a file is missing, cut or from another step. Nothing is loaded then.
        """
        checkpoint.load(self, path)
        self._awaits = None
        self._adopt()

    def _pass_on(self) -> None:
        """Settings need no passing on: the groups are the inner optimizer's own."""

    def _adopt(self) -> None:
        """The inner optimizer replaces these two when it loads."""
        assert self.inner is not None
        self.state, self.param_groups = self.inner.state, self.inner.param_groups

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Always False; GradScaler asks at the one moment when it can be seen which scaler it is."""
        asking = sys._getframe(1).f_locals.get("self")
        if self.world > 1 and isinstance(asking, torch.amp.GradScaler):
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

            if not isinstance(asking, ShardedGradScaler) and not isinstance(self, _Outer):
                refuse(
                    "scaler",
                    type(asking).__name__,
                    "it looks at this rank's gradients alone, and ranks would part at the first overflow: "
                    "use torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler",
                )
        return False

    def _cut(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter group over this rank's pieces; the parameters move into buckets."""
        self._whole.append(list(given["params"]))
        trained = list(dict.fromkeys(p for p in given["params"] if p.requires_grad))
        slots: list[Slot] = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in trained):
            slots += self._flatten([p for p in reversed(trained) if p.dtype == dtype], dtype)
        order = {parameter: index for index, parameter in enumerate(trained)}
        slots.sort(key=lambda slot: order[slot.parameter])
        return {**given, "params": [slot.piece for slot in slots if slot.piece is not None]}

    def _flatten(self, parameters: list[nn.Parameter], dtype: torch.dtype) -> list[Slot]:
        width = torch.empty(0, dtype=dtype, device="meta").element_size()
        elements = max(1, self._bucket_bytes // width)
        partition = FlatPartition(
            [parameter.numel() for parameter in parameters],
            self.world,
            elements,
            max(1, _ALIGN // width),
            self._by,
        )
        made: list[list[Slot]] = [[] for _ in partition.buckets]
        for index, parameter in enumerate(parameters):
            slot = Slot(
                self._names[parameter],
                parameter,
                partition.places[index].start,
                partition.run(index, self.rank),
                partition.owner(index) == self.rank,
            )
            made[partition.places[index].bucket].append(slot)
        summed = self._master or dtype
        for size, slots in zip(partition.buckets, made, strict=True):
            data = torch.zeros(size, dtype=dtype, device=slots[0].parameter.device)
            share = size // self.world
            large = size > elements + self.world * partition.align and sum(bool(s.size) for s in slots) == 1
            trip = max(1, elements // self.world) if large else max(share, 1)
            if self._by == "parameter":
                trip = max(share, 1)
            bucket = Bucket(slots, data, share, trip, summed)
            self._buckets.append(bucket)
            for slot in slots:
                self._settle(bucket, slot)
        return [slot for slots in made for slot in slots]

    @torch.no_grad()
    def _settle(self, bucket: Bucket, slot: Slot) -> None:
        """Move a parameter into its bucket, and make its piece."""
        view = slot.inside(bucket.data)
        view.copy_(slot.parameter)
        slot.parameter.data = view
        low, high = slot.run
        if high == low and not (slot.first and not slot.size):
            return
        owned = bucket.data[slot.start + low : slot.start + high]
        if self._by == "parameter":
            owned = owned.view(slot.shape) if slot.stride == owned.view(slot.shape).stride() else view
        slot.piece = nn.Parameter(owned.to(self._master or owned.dtype))

    def _watch(self, buckets: list[Bucket]) -> None:
        """Hooks on the parameters: buckets travel in the order in which a backward pass fills them."""
        if self.model is None or self._reducer is None:
            return
        order = {name: index for index, (name, _) in enumerate(self.model.named_parameters())}
        for bucket in sorted(buckets, key=lambda b: -min(order[slot.name] for slot in b.slots)):
            self._reducer.add(bucket)
        found = {slot.parameter: (bucket, slot) for bucket in self._buckets for slot in bucket.slots}
        self._homes = [
            (module, name, *found[parameter])
            for module in self.model.modules()
            for name, parameter in module._parameters.items()
            if parameter in found
        ]

    def _slot_of(self, parameter: nn.Parameter) -> Slot | None:
        return next((s for b in self._buckets for s in b.slots if s.parameter is parameter), None)

    def _detach(self) -> None:
        """Parameters get storage of their own again."""
        if self._reducer is not None:
            self._reducer.remove()
        for bucket in self._buckets:
            for slot in bucket.slots:
                slot.parameter.data = slot.parameter.data.clone()

    def _attach_again(self) -> None:
        """Take up parameters that got new storage behind our back (``model.to``, ``assign=True``)."""
        for bucket in self._buckets:
            for slot in bucket.slots:
                if not _lies_in(slot, slot.parameter, bucket):
                    self._move_in(bucket, slot, slot.parameter)
                if slot.piece is not None and slot.piece.dtype != bucket.data.dtype:
                    self._follow(bucket, slot)
        taken = False
        for module, name, bucket, slot in self._homes:
            now = module._parameters.get(name)
            if now is slot.parameter or now is None:
                continue
            if not _lies_in(slot, now, bucket):
                self._move_in(bucket, slot, now)
            old, slot.parameter = slot.parameter, now
            old.grad = None
            for whole in self._whole:
                whole[:] = [now if parameter is old else parameter for parameter in whole]
            self._names[now] = slot.name
            if self._reducer is not None:
                self._reducer.watch(bucket, slot)
                if now.grad is not None:  # it came while no hook was there
                    self._reducer.take(now)
                    taken = True
        if self._reducer is not None and taken:
            self._reducer.end_pass()

    @torch.no_grad()
    def _follow(self, bucket: Bucket, slot: Slot) -> None:
        """Where 16-bit values were loaded in place, their float32 copy takes them up."""
        assert slot.piece is not None
        now = bucket.data[slot.start + slot.run[0] : slot.start + slot.run[1]].view_as(slot.piece)
        kept = now == slot.piece.to(now.dtype)
        slot.piece.copy_(torch.where(kept, slot.piece, now.to(slot.piece.dtype)))

    def _move_in(self, bucket: Bucket, slot: Slot, parameter: nn.Parameter) -> None:
        view = slot.inside(bucket.data)
        if (parameter.shape, parameter.dtype, parameter.device) != (view.shape, view.dtype, view.device):
            seen = f"{tuple(parameter.shape)}, {parameter.dtype}, {parameter.device}"
            refuse(
                slot.name, seen, f"it was {tuple(view.shape)}, {view.dtype}, {view.device} when it was cut"
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"parameters such as {slot.name!r} were given new storage after they were cut; they are "
                "taken up again with their present values",
                stacklevel=4,
            )
        with torch.no_grad():
            view.copy_(parameter)
            parameter.data = view

    def _ready_gradients(self) -> tuple[list[Tensor], int]:
        """This rank's gradients, summed over ranks, and the number of elements on all ranks."""
        if self._reducer is None:
            trained = [p for whole in self._whole for p in whole if p.requires_grad]
            for parameter, got in zip(
                trained, self._anywhere([p in self._used.parameters for p in trained]), strict=True
            ):
                if not got:
                    parameter.grad = None  # nobody's: torch would skip it
            return self._whole_gradients()
        self._reducer.finish()
        slots = [slot for bucket in self._buckets for slot in bucket.slots]
        for slot, got in zip(slots, self._anywhere([slot.got for slot in slots]), strict=True):
            slot.got = got
        gradients = []
        for slot in slots:
            if slot.piece is not None and slot.piece.grad is not None:
                if not slot.got:
                    slot.piece.grad = None  # nobody's: torch would skip it too
                else:
                    gradients.append(slot.piece.grad)
        if not self._divided:
            for bucket in self._buckets:
                if bucket.total is not None and self.world > 1:
                    bucket.total.div_(self.world)
            self._divided = True
        return gradients, sum(slot.size for slot in slots if slot.got)

    def _anywhere(self, flags: list[bool]) -> list[bool]:
        """Of each parameter, whether any rank got a gradient: a byte each."""
        if self.world == 1 or dist.get_backend(self.group) == "fake":  # a fake group answers with nothing
            return flags
        device = self._whole[0][0].device
        told = torch.tensor(flags, dtype=torch.uint8, device=device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in told.tolist()]

    def _whole_gradients(self) -> tuple[list[Tensor], int]:
        gradients, count = [], 0
        for whole in self._whole:
            for parameter in whole:
                if parameter.grad is not None:
                    gradients.append(fsdp.local(parameter.grad))
                    count += parameter.numel()
        return gradients, count

    def _publish(self, buckets: list[Bucket]) -> None:
        """Send what this rank has stepped to the others, a bucket at a time."""
        works = []
        for bucket in buckets:
            low = self.rank * bucket.share
            mine = bucket.data[low : low + bucket.share]
            if self._master is not None:
                for slot in bucket.slots:
                    if slot.piece is not None and slot.piece.dtype != bucket.data.dtype:
                        start = slot.start + slot.run[0]
                        bucket.data[start : slot.start + slot.run[1]].copy_(slot.piece.view(-1))
            if self.world == 1 or not bucket.share:
                continue
            if not bucket.alone:
                works.append(all_gather_flat(bucket.data, mine, self.group, async_op=True))
                continue
            for start in range(0, bucket.share, bucket.trip):
                width = min(bucket.trip, bucket.share - start)
                received = torch.empty(self.world, width, dtype=mine.dtype, device=mine.device)
                sent = mine[start : start + width].contiguous()
                all_gather_flat(received.view(-1), sent, self.group)
                bucket.data.view(self.world, bucket.share)[:, start : start + width] = received
        for work in works:
            work.wait()


class _Outer(ZeroOptimizer):
    """Stage 1 in somebody else's loop: gradients come whole and averaged, states are cut."""

    base: Callable[..., Optimizer]

    def __init__(self, params: Iterable[Any], **kw: Any) -> None:
        group = _group(None)
        groups = _listed(params)
        _check_optimizer(type(self).base, "element", False, kw)
        named = [(f"{g}.{i}", p) for g, given in enumerate(groups) for i, p in enumerate(given["params"])]
        names = {parameter: name for name, parameter in named}
        _check_parameters(groups, names, None, False, type(self).base)
        _agree(group, groups, names, [_name(type(self).base), repr(kw)])
        size = sum(p.numel() * p.element_size() for _, p in named)
        self._compared = False
        super().__init__(
            type(self).base,
            groups,
            names,
            group=group,
            stage=1,
            bucket_bytes=default_bucket_bytes(size),
            master_dtype=None,
            deterministic=False,
            by="element",
            model=None,
            options=kw,
        )
        self._adopt()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Step this rank's pieces of the whole gradients, and gather the parameters.

        Raises:
            BadInput: gradients differ between ranks: nobody averages them.
        """
        assert self.inner is not None
        if self._awaits is not None:
            raise RuntimeError(self._awaits)
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        self._attach_again()
        self._pass_on()
        stepped = []
        for bucket in self._buckets:
            for slot in bucket.slots:
                gradient = slot.parameter.grad
                if gradient is not None and gradient.layout is not torch.strided:
                    refuse(slot.name, str(gradient.layout), "sparse gradients are not cut: use sparse=False")
                if slot.piece is not None:
                    slot.piece.grad = None if gradient is None else _run_of(slot, gradient)
            if any(slot.parameter.grad is not None for slot in bucket.slots):
                stepped.append(bucket)
        self._compare_once()
        self.inner.step()
        for bucket in self._buckets:
            for slot in bucket.slots:
                if slot.piece is not None:
                    slot.piece.grad = None
        with torch.no_grad():
            self._publish(stepped)
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's own: the gradients are the caller's."""
        Optimizer.zero_grad(self, set_to_none)

    def backward(self, loss: Tensor, accumulate: int = 1) -> None:
        """Not here: DistributedDataParallel averages."""
        refuse(
            "optimizer", "Sharded", "call loss.backward() yourself; shard_ gives an optimizer with backward"
        )

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The exact norm of the whole gradients; torch's function works as well."""
        gradients, count = self._whole_gradients()
        total = exact_norm(gradients, count)
        scale_to_norm_(gradients, total, max_norm)
        return total

    def _pass_on(self) -> None:
        """What schedulers set in the groups, to the groups inside."""
        assert self.inner is not None
        for mine, given in zip(self.inner.param_groups, self.param_groups, strict=True):
            mine.update({key: option for key, option in given.items() if key != "params"})

    def _adopt(self) -> None:
        """The groups hold the caller's whole parameters, where others clip and scale; inside are pieces."""
        assert self.inner is not None
        self.state = self.inner.state
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.inner.param_groups]
        if self.param_groups is self.inner.param_groups:
            self.param_groups = [{"params": list(whole)} for whole in self._whole]
        for held, fresh in zip(self.param_groups, settings, strict=True):
            held.update(fresh)

    def _compare_once(self) -> None:
        if self._compared or self.world == 1 or dist.get_backend(self.group) == "fake":
            return
        self._compared = True
        sums = [
            repr(float(p.grad.double().sum())) for whole in self._whole for p in whole if p.grad is not None
        ]
        if any(other != sums for other in exchange(sums, self.group)):
            refuse(
                "params",
                "gradients that differ between ranks",
                "Sharded steps what DistributedDataParallel has averaged: wrap the model, or use shard_",
            )


def Sharded(optimizer_cls: Callable[..., Optimizer]) -> Callable[..., ZeroOptimizer]:
    """A class that steps this rank's share of the states under anybody's DistributedDataParallel.

    ``Trainer(..., optimizer_cls_and_kwargs=(zero.Sharded(torch.optim.AdamW), {"lr": 3e-4}))`` is the whole
    change: gradients stay whole and averaged, so that clipping, ``no_sync`` and gradient scalers of others
        work;
    the optimizer's states are cut over the ranks (stage 1).

    Args:
        optimizer_cls: an element-wise optimizer such as ``torch.optim.AdamW``.

    Returns:
        A class: ``Sharded(AdamW)(params, lr=3e-4)``, under a process group.

    Example:
        >>> Sharded(torch.optim.AdamW).__name__
        'ShardedAdamW'
    """
    return type(f"Sharded{_name(optimizer_cls)}", (_Outer,), {"base": staticmethod(optimizer_cls)})


def _run_of(slot: Slot, gradient: Tensor) -> Tensor:
    if gradient.stride() != slot.stride:
        empty = torch.empty_strided(slot.shape, slot.stride, dtype=gradient.dtype, device=gradient.device)
        gradient = empty.copy_(gradient)
    return gradient.as_strided((slot.size,), (1,))[slot.run[0] : slot.run[1]]


def _lies_in(slot: Slot, parameter: Tensor, bucket: Bucket) -> bool:
    here, there = parameter.untyped_storage(), bucket.data.untyped_storage()
    return (here._cdata == there._cdata and parameter.storage_offset() == slot.start) or not slot.size


def _group(group: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        refuse(
            "group",
            group,
            "there is no process group: start with torchrun --nproc-per-node N and call "
            "torch.distributed.init_process_group first",
        )
    return dist.group.WORLD if group is None else group


def _name(optimizer_cls: Any) -> str:
    return getattr(getattr(optimizer_cls, "func", optimizer_cls), "__name__", type(optimizer_cls).__name__)


def _listed(params: Iterable[Any]) -> list[dict[str, Any]]:
    listed = list(params)
    if not listed or not isinstance(listed[0], dict):
        listed = [{"params": listed}]
    found = []
    for given in listed:
        own = given["params"]
        own = [own] if isinstance(own, Tensor) else list(own)
        found.append({**given, "params": [p[1] if isinstance(p, tuple) else p for p in own]})
    return found


def _groups(model: nn.Module, params: Iterable[Any] | None) -> list[dict[str, Any]]:
    groups = _listed(model.parameters() if params is None else params)
    inside = set(model.parameters())
    seen: set[nn.Parameter] = set()
    for given in groups:
        for parameter in dict.fromkeys(given["params"]):
            if parameter not in inside:
                refuse("params", tuple(parameter.shape), "give parameters of the model")
            if parameter in seen:
                refuse("params", tuple(parameter.shape), "this parameter stands in two groups")
            seen.add(parameter)
            if params is not None and not parameter.is_floating_point():
                refuse("params", parameter.dtype, "only floating-point parameters can be trained")
    return groups


def _check_model(model: nn.Module) -> None:
    wrapped = ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel")
    if _BY in model.__dict__:
        refuse(
            "model", type(model).__name__, "it is sharded already; call zero.unshard_(model, optimizer) first"
        )
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & {*wrapped, "FSDPModule"}:
            refuse(
                "model",
                type(module).__name__,
                "give the model itself: it is wrapped already (zero.Sharded works under "
                "DistributedDataParallel, zero.deterministic_ on a model of FSDP2)",
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            refuse("model", "sparse=True", "sparse gradients are not cut over ranks: use sparse=False")
    places = {parameter.device for parameter in model.parameters()}
    if len(places) > 1 or any(place.type == "meta" for place in places):
        refuse("model", sorted(map(str, places)), "bring its parameters to one device, with values")


def _check_optimizer(optimizer_cls: Any, by: str, deterministic: bool, kw: Mapping[str, Any]) -> None:
    if isinstance(optimizer_cls, Optimizer):
        remedy = "give the class and its options: it must be built on this rank's pieces"
        refuse("optimizer_cls", type(optimizer_cls).__name__, remedy)
    if not callable(optimizer_cls):
        refuse("optimizer_cls", optimizer_cls, "give a class such as torch.optim.AdamW")
    if by not in ("element", "parameter"):
        refuse("by", by, 'use "element" or "parameter"')
    settings = {**getattr(optimizer_cls, "keywords", {}), **kw}
    if settings.get("differentiable"):
        refuse("differentiable", True, "the step over pieces is not differentiable")
    if deterministic and settings.get("fused"):
        refuse(
            "fused", True, "fused kernels round a vector's rest differently: leave it out, or deterministic"
        )
    if by == "element" and (why := whole_tensor(optimizer_cls, kw)):
        refuse("optimizer_cls", _name(optimizer_cls), f'{why}: use by="parameter" with stage=1')


def _check_parameters(
    groups: Sequence[Mapping[str, Any]],
    names: Mapping[nn.Parameter, str],
    master_dtype: torch.dtype | None,
    deterministic: bool,
    optimizer_cls: Any,
) -> None:
    if master_dtype not in (None, torch.float32):
        refuse("master_dtype", master_dtype, "use torch.float32, or None")
    trained = [p for given in groups for p in given["params"] if p.requires_grad]
    if not trained:
        refuse("params", "no trainable parameter", "set requires_grad on what is to be trained")
    places: dict[int, str] = {}
    for parameter in dict.fromkeys(trained):
        name = names.get(parameter, "?")
        if parameter.is_complex():
            refuse(name, parameter.dtype, "complex parameters are not cut: hold real and imaginary parts")
        if not parameter.is_leaf:
            refuse(name, "not a leaf", "give the parameters themselves")
        if deterministic and master_dtype is None and parameter.element_size() < 4:
            refuse(name, parameter.dtype, "16-bit steps depend on the cut: use master_dtype=torch.float32")
        key = parameter.untyped_storage()._cdata
        if parameter.numel() and places.setdefault(key, name) != name and _overlap(parameter, places[key]):
            refuse(name, f"the storage of {places[key]}", "tie weights by using one Parameter in both places")
    for given in groups:
        kinds = {p.dtype for p in given["params"] if p.requires_grad}
        if len(kinds) > 1 and master_dtype is None:
            refuse("params", sorted(map(str, kinds)), "one dtype a group, or master_dtype=torch.float32")


def _overlap(parameter: Tensor, _: str) -> bool:
    """Views into one flat buffer may lie side by side (rnn weights do); whole storages shared may not."""
    return parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()


def _agree(
    group: Any, groups: Sequence[Mapping[str, Any]], names: Mapping[nn.Parameter, str], options: list[Any]
) -> None:
    """Every rank has the same model and options, or the first difference is named."""
    mine = [f"options {options}"]
    for index, given in enumerate(groups):
        settings = {key: repr(value) for key, value in given.items() if key != "params"}
        mine.append(f"group {index} {settings}")
        mine += [
            f"{names.get(p, '?')} {tuple(p.shape)} {tuple(p.stride())} {p.dtype} "
            f"{'trained' if p.requires_grad else 'frozen'}"
            for p in given["params"]
        ]
    digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
    if len(set(exchange(digest, group))) == 1:
        return
    everyone = exchange(mine, group)
    for rank, theirs in enumerate(everyone):
        for a, b in zip([*everyone[0], "nothing"], [*theirs, "nothing"], strict=False):
            if a != b:
                refuse("model", f"rank {rank}: {b}", f"ranks must agree; rank 0 has: {a}")
    raise AssertionError("digests differ, and what they are of does not")


def _from_rank_0(model: nn.Module, group: Any) -> None:
    if world_of(group)[0] == 1 or dist.get_backend(group) == "fake":
        return
    source = dist.get_global_rank(group, 0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.numel():
                sent = tensor.detach().contiguous().clone()
                dist.broadcast(sent, source, group=group)
                tensor.copy_(sent)
