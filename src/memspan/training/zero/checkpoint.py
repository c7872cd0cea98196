"""Checkpoints that any number of ranks can load: a safetensors file a rank, and a manifest written last.

What is not cut (counters, groups' settings) and what tells whether all is there (sizes, checksums, which run
of which tensor lies in which file) stands in ``manifest.json``. A folder without it was not finished.
Everything is checked before anything is loaded: torch's own reader notices a missing file only where a
tensor ended in it. The files also carry the offsets that
``torch.distributed.checkpoint.HuggingFaceStorageReader`` reads.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from memspan.base import refuse
from memspan.base.files import CorruptFile, atomic_path, atomic_write
from memspan.training.zero import fsdp
from memspan.training.zero.buckets import exchange

if TYPE_CHECKING:
    from memspan.training.zero.optimizer import ZeroOptimizer

__all__ = ["export", "full_state", "load", "load_full", "save"]

_MANIFEST, _VERSION = "manifest.json", 1
_MASTER = "master"  # the float32 copy of a 16-bit parameter


@dataclass
class _Part:
    """What this rank owns of a trained parameter."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    run: tuple[int, int]
    first: bool
    data: Tensor  # the run, flat
    key: Any  # in the optimizer's state; None where nothing is owned
    whole: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def like(self, flat: Tensor) -> Tensor:
        """A flat tensor of all elements in the parameter's shape."""
        return flat.as_strided(self.shape, self.stride)

    def cut(self, value: Tensor) -> Tensor:
        """This rank's run of a tensor of the parameter's shape."""
        flat = torch.empty_strided(self.shape, self.stride, dtype=value.dtype, device=value.device)
        return flat.copy_(value).as_strided((self.size,), (1,))[self.run[0] : self.run[1]].clone()


def save(optimizer: ZeroOptimizer, path: Any) -> None:
    """See :meth:`ZeroOptimizer.save`.

    Raises:
        BadInput: the folder exists and is not empty; two checkpoints in one folder could be mixed.
    """
    path = Path(path)
    used = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if any(exchange(used, optimizer.group)):
        refuse("path", str(path), "give a new folder for every checkpoint: this one holds something already")
    path.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    runs: dict[str, list[int]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    whole: dict[str, list[int]] = {}
    parts = list(_parts(optimizer))
    for part in parts:
        owned = part.run[1] > part.run[0] or (part.first and not part.size)
        if optimizer.model is not None and owned:
            tensors[part.name], runs[part.name] = part.data, list(part.run)
        for key, value in _state_of(optimizer, part).items():
            name = f"state.{part.name}.{key}"
            kind, value = _kind(part, value)
            if kind == "run" and owned:
                tensors[name], runs[name] = value, list(part.run)
            elif kind == "whole" and part.first:
                tensors[name], runs[name] = value, [0, value.numel()]
                whole[name] = list(value.shape)
            elif kind == "scalar" and part.first:
                scalars.setdefault(part.name, {})[key] = _told(value)
    for name, value in _rest(optimizer, {part.name for part in parts}):
        low, high = 0, value.numel()
        if optimizer.stage != 3 and optimizer.rank:
            continue
        if optimizer.stage == 3:
            found = dict(optimizer.model.named_parameters()) if optimizer.model is not None else {}
            if name in found:
                low, high = _rows(found[name], optimizer)
            elif optimizer.rank:
                continue
        tensors[name], runs[name] = value, [low, high]
    file = path / f"shard-{optimizer.rank:05d}-of-{optimizer.world:05d}.safetensors"
    _write(file, tensors, runs)
    told = {
        "file": file.name,
        "bytes": file.stat().st_size,
        "sha256": _checksum(file),
        "runs": runs,
        "scalars": scalars,
        "whole": whole,
    }
    everyone = exchange(told, optimizer.group)
    if optimizer.rank == 0:
        shapes = {part.name: [list(part.shape), list(part.stride), str(part.data.dtype)] for part in parts}
        shapes |= {
            name: [list(value.shape), list(value.stride()), str(value.dtype)]
            for name, value in _rest(optimizer, set(shapes), whole=True)
        }
        manifest = {
            "format": "memspan.zero",
            "version": _VERSION,
            "world": optimizer.world,
            "stage": optimizer.stage,
            "optimizer": type(optimizer.inner).__name__,
            "tensors": shapes,
            "trained": [part.name for part in parts],
            "groups": _groups_told(optimizer),
            "ranks": everyone,
        }
        atomic_write(path / _MANIFEST, json.dumps(manifest))
    exchange(True, optimizer.group)  # nobody goes on before the manifest is there


def load(optimizer: ZeroOptimizer, path: Any) -> None:
    """See :meth:`ZeroOptimizer.load`."""
    path = Path(path)
    manifest, trouble = None, ""
    try:
        manifest = _checked(path, optimizer.rank, optimizer.world)
    except CorruptFile as error:
        trouble = str(error)
    found = [text for text in exchange(trouble, optimizer.group) if text]
    if found or manifest is None:
        raise CorruptFile(found[0])
    parts = list(_parts(optimizer))
    _same_model(optimizer, manifest, parts, path)
    where = _where(manifest)
    staged: list[tuple[_Part, Tensor | None, dict[str, Any]]] = []
    for part in parts:
        values: dict[str, Any] = {}
        if part.key is not None:
            for name in where:
                start = f"state.{part.name}."
                if name.startswith(start) and "." not in name[len(start) :]:
                    values[name[len(start) :]] = _state_value(manifest, where, path, name, part)
            for rank in manifest["ranks"]:
                for key, told in rank["scalars"].get(part.name, {}).items():
                    values[key] = _untold(told, part)
        has = part.name in where and part.run[1] > part.run[0]
        staged.append((part, _read(where, path, part.name, *part.run) if has else None, values))
    rest = {
        name: _read(where, path, name, *_span(name, value, optimizer))
        for name, value in _rest(optimizer, {part.name for part in parts})
        if name in where
    }
    with torch.no_grad():  # all is here: from now on nothing can fail
        for part, data, values in staged:
            if data is not None:
                part.data.copy_(data)
            if part.key is not None:
                _adopt_state(optimizer, part, values)
        for name, value in _rest(optimizer, {part.name for part in parts}):
            if name in rest and value.numel():
                value.copy_(rest[name].view(value.shape))
        if optimizer.model is not None and optimizer.stage != 3:
            optimizer._publish(optimizer._buckets)
    assert optimizer.inner is not None
    for group, saved in zip(optimizer.inner.param_groups, manifest["groups"], strict=True):
        group.update({key: _option(value) for key, value in saved["options"].items()})


def export(path: Any, out: Any) -> None:
    """Write the whole tensors of a checkpoint's model into one safetensors file; needs no ranks.

    Args:
        path: folder of a checkpoint.
        out: the file to write. Tied weights stand under their first name.

    Raises:
        CorruptFile: a file is missing, cut or from another step.
        BadInput: the checkpoint was written by ``Sharded``, which holds no model.
    """
    path = Path(path)
    manifest = _checked(path, 0, 1)
    where = _where(manifest)
    names = [name for name in manifest["tensors"] if name in where]
    if not names:
        refuse(
            "path", str(path), "it holds states alone: the trainer that used Sharded saved the model itself"
        )
    tensors = {}
    for name in names:
        shape, stride, _ = manifest["tensors"][name]
        flat = _read(where, path, name, 0, math.prod(shape))
        tensors[name] = (
            flat.as_strided(shape, stride) if name in manifest["trained"] else flat.view(shape)
        ).contiguous()
    from safetensors.torch import save_file

    with atomic_path(out) as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt"})


def full_state(optimizer: ZeroOptimizer, rank0_only: bool) -> dict[str, Any]:
    """See :meth:`ZeroOptimizer.full_state_dict`."""
    assert optimizer.inner is not None
    parts = {part.name: part for part in _parts(optimizer)}
    kinds: dict[str, dict[str, Any]] = {}
    for part in parts.values():
        for key, value in _state_of(optimizer, part).items():
            kind, value = _kind(part, value)
            if kind == "scalar" and not part.first:
                continue
            told = (
                _told(value)
                if kind == "scalar"
                else [str(value.dtype).removeprefix("torch."), list(value.shape)]
            )
            kinds.setdefault(part.name, {})[key] = [kind, optimizer.rank, told]
    merged: dict[str, dict[str, Any]] = {}
    for theirs in exchange(kinds, optimizer.group):
        for name, keys in theirs.items():
            merged[name] = keys | merged.get(name, {})
    keeps = optimizer.rank == 0 or not rank0_only
    states: dict[int, dict[str, Any]] = {}
    groups, index = [], 0
    for group, whole in zip(optimizer.inner.param_groups, optimizer._whole, strict=True):
        numbers = range(index, index + len(whole))
        groups.append(
            {key: value for key, value in group.items() if key != "params"} | {"params": list(numbers)}
        )
        for number, parameter in zip(numbers, whole, strict=True):
            name = optimizer._names.get(parameter, "")
            for key, (kind, rank, told) in merged.get(name, {}).items():
                if key == _MASTER:
                    continue
                part = parts[name]
                found: Any = (
                    _untold(told, part)
                    if kind == "scalar"
                    else _gathered(optimizer, part, key, kind, rank, told, keeps)
                )
                if keeps:
                    states.setdefault(number, {})[key] = found
        index += len(whole)
    return {"state": states, "param_groups": groups} if keeps else {}


def load_full(optimizer: ZeroOptimizer, state_dict: Mapping[str, Any]) -> None:
    """This rank's runs of an unsharded optimizer's state; all is checked first.

    Raises:
        BadInput: other groups, or a state of another shape.
    """
    assert optimizer.inner is not None
    parts = {part.name: part for part in _parts(optimizer)}
    groups = state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(whole) for whole in optimizer._whole]:
        seen = [len(group["params"]) for group in groups]
        refuse("state_dict", seen, f"groups of these sizes are wanted: {[len(w) for w in optimizer._whole]}")
    new: list[tuple[_Part, dict[str, Any]]] = []
    for group, whole in zip(groups, optimizer._whole, strict=True):
        for number, parameter in zip(group["params"], whole, strict=True):
            part = parts.get(optimizer._names.get(parameter, ""))
            if part is None:
                continue
            values = {}
            for key, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dim() and tuple(value.shape) == part.shape:
                    values[key] = part.cut(value)
                elif isinstance(value, Tensor) and value.dim() and not part.whole:
                    refuse(part.name, tuple(value.shape), f"the state {key} must have shape {part.shape}")
                else:
                    values[key] = value.clone() if isinstance(value, Tensor) else value
            if part.key is not None:
                new.append((part, values))
    for part, values in new:
        _adopt_state(optimizer, part, values)
    for mine, group in zip(optimizer.inner.param_groups, groups, strict=True):
        mine.update({key: value for key, value in group.items() if key != "params"})
    optimizer._awaits = None
    optimizer._adopt()


def _parts(optimizer: ZeroOptimizer) -> Iterator[_Part]:
    if optimizer.stage == 3:
        for whole in optimizer._whole:
            for parameter in whole:
                if parameter.requires_grad:
                    low, high = _rows(parameter, optimizer)
                    shape = tuple(parameter.shape)
                    stride = tuple(torch.empty(shape, device="meta").stride())
                    name, data = optimizer._names[parameter], fsdp.local(parameter.detach()).view(-1)
                    yield _Part(name, shape, stride, (low, high), optimizer.rank == 0, data, parameter, False)
        return
    slots = {slot.parameter: (bucket, slot) for bucket in optimizer._buckets for slot in bucket.slots}
    for whole in optimizer._whole:
        for parameter in whole:
            if parameter in slots:
                bucket, slot = slots[parameter]
                low, high = slot.run
                data = bucket.data[slot.start + low : slot.start + high]
                yield _Part(
                    slot.name,
                    slot.shape,
                    slot.stride,
                    slot.run,
                    slot.first,
                    data,
                    slot.piece,
                    high - low == slot.size,
                )


def _rows(parameter: Tensor, optimizer: ZeroOptimizer) -> tuple[int, int]:
    """The run of a parameter that FSDP2 has cut along its first dimension."""
    if not parameter.dim() or not parameter.numel():
        return (0, parameter.numel()) if optimizer.rank == 0 else (0, 0)
    rest = parameter.numel() // parameter.shape[0]
    low = min(optimizer.rank * -(-parameter.shape[0] // optimizer.world), parameter.shape[0]) * rest
    return low, low + fsdp.local(parameter).numel()


def _rest(optimizer: ZeroOptimizer, trained: set[str], whole: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Frozen parameters and buffers, by name: this rank's part, or the (possibly distributed) whole."""
    if optimizer.model is None:
        return
    state = optimizer.model.state_dict(keep_vars=True)
    parameters = dict(optimizer.model.named_parameters())
    every = dict(optimizer.model.named_parameters(remove_duplicate=False))
    for name, value in state.items():
        if name in trained or not isinstance(value, Tensor) or (name in every and name not in parameters):
            continue
        yield name, value.detach() if whole else fsdp.local(value.detach())


def _span(name: str, value: Tensor, optimizer: ZeroOptimizer) -> tuple[int, int]:
    assert optimizer.model is not None
    parameter = dict(optimizer.model.named_parameters()).get(name)
    return (
        _rows(parameter, optimizer) if optimizer.stage == 3 and parameter is not None else (0, value.numel())
    )


def _state_of(optimizer: ZeroOptimizer, part: _Part) -> dict[str, Any]:
    if part.key is None:
        return {}
    assert optimizer.inner is not None
    found = dict(optimizer.inner.state.get(part.key, {}))
    if isinstance(part.key, nn.Parameter) and optimizer.stage != 3 and part.key.dtype != part.data.dtype:
        found[_MASTER] = part.key.detach()
    return found


def _kind(part: _Part, value: Any) -> tuple[str, Any]:
    if not isinstance(value, Tensor) or not value.dim():
        return "scalar", value
    held = fsdp.local(value.detach())
    if held.numel() == part.run[1] - part.run[0]:
        if held.dim() > 1 and tuple(held.shape) == part.shape and held.stride() != part.stride:
            return "run", part.cut(held)
        return "run", held.as_strided((held.numel(),), (1,), held.storage_offset())
    return "whole", held


def _adopt_state(optimizer: ZeroOptimizer, part: _Part, values: dict[str, Any]) -> None:
    assert optimizer.inner is not None
    key, state = part.key, {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.dim() and value.numel() == part.run[1] - part.run[0]:
            if name == _MASTER:
                key.data.view(-1).copy_(value)
                continue
            fresh = torch.zeros_like(key, dtype=value.dtype)
            fsdp.local(fresh).view(-1).copy_(value.reshape(-1))
            value = fresh.detach()
        state[name] = value
    if state:
        optimizer.inner.state[key] = state
    else:
        optimizer.inner.state.pop(key, None)


def _gathered(
    optimizer: ZeroOptimizer, part: _Part, key: str, kind: str, rank: int, told: Any, keeps: bool
) -> Tensor | None:
    dtype, shape = getattr(torch, told[0]), told[1]
    device = part.data.device
    size = part.size if kind == "run" else math.prod(shape)
    flat = torch.zeros(size, dtype=dtype, device=device)
    mine = _state_of(optimizer, part).get(key)
    if mine is not None and (kind == "run" or rank == optimizer.rank):
        low, high = part.run if kind == "run" else (0, size)
        flat[low:high] = _kind(part, mine)[1].reshape(-1)
    if optimizer.world > 1:
        dist.all_reduce(flat, group=optimizer.group)  # the others hold zeros there
    if not keeps:
        return None
    return part.like(flat) if kind == "run" else flat.view(shape)


def _write(file: Path, tensors: Mapping[str, Tensor], runs: Mapping[str, list[int]]) -> None:
    from safetensors.torch import save_file

    flat = {name: value.detach().reshape(-1).cpu().clone() for name, value in tensors.items()}
    offsets = {name: {"saved_offsets": [runs[name][0]]} for name in flat}
    with atomic_path(file) as temporary:
        save_file(flat, str(temporary), metadata={"DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"})


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _checked(path: Path, rank: int, world: int) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there; each rank reads its share of them."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        if (manifest["format"], manifest["version"]) != ("memspan.zero", _VERSION):
            raise ValueError(f"version {manifest['version']}")
        ranks = manifest["ranks"]
        if len(ranks) != manifest["world"]:
            raise ValueError("it tells another number of ranks")
    except FileNotFoundError:
        raise CorruptFile(
            f"{path} has no {_MANIFEST}: it was not finished, or is no checkpoint; load an earlier one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(
            f"{path / _MANIFEST} cannot be read ({error}); load an earlier checkpoint"
        ) from error
    for index, told in enumerate(ranks):
        file = path / Path(told["file"]).name
        if not file.is_file():
            raise CorruptFile(f"{file} is missing; bring it back, or load an earlier checkpoint")
        if file.stat().st_size != told["bytes"]:
            raise CorruptFile(
                f"{file} has {file.stat().st_size} bytes of {told['bytes']}: it was cut or replaced"
            )
        if index % world == rank and _checksum(file) != told["sha256"]:
            raise CorruptFile(f"{file} is not the file that was saved here: altered, or from another step")
    runs: dict[str, list[list[int]]] = {}
    for told in ranks:
        for name, run in told["runs"].items():
            runs.setdefault(name, []).append(run)
    for name, found in runs.items():
        end = 0
        for low, high in sorted(found):
            if low != end and high > low:
                raise CorruptFile(f"{path}: elements {end} to {low} of {name} are in no file")
            end = max(end, high)
        shape = (
            manifest["tensors"].get(name.removeprefix("state."), [None])[0]
            if name in manifest["tensors"]
            else None
        )
        if shape is not None and end != math.prod(shape):
            raise CorruptFile(f"{path}: elements {end} to {math.prod(shape)} of {name} are in no file")
    return dict(manifest)


def _where(manifest: Mapping[str, Any]) -> dict[str, list[tuple[int, int, str]]]:
    found: dict[str, list[tuple[int, int, str]]] = {}
    for told in manifest["ranks"]:
        for name, (low, high) in told["runs"].items():
            found.setdefault(name, []).append((low, high, Path(told["file"]).name))
    return found


def _read(
    where: Mapping[str, list[tuple[int, int, str]]], path: Path, name: str, low: int, high: int
) -> Tensor:
    """Elements of a flat tensor from the files that hold them."""
    from safetensors import safe_open

    parts = []
    for start, stop, file in sorted(where[name]):
        first, last = max(low, start), min(high, stop)
        if first < last or (low == high == start == stop):
            with safe_open(path / file, framework="pt") as opened:
                parts.append(opened.get_slice(name)[first - start : last - start])
    return torch.cat(parts) if parts else torch.empty(0)


def _state_value(
    manifest: Mapping[str, Any],
    where: Mapping[str, list[tuple[int, int, str]]],
    path: Path,
    name: str,
    part: _Part,
) -> Tensor:
    shape = next((rank["whole"][name] for rank in manifest["ranks"] if name in rank["whole"]), None)
    if shape is None:
        return _read(where, path, name, *part.run).to(part.data.device)
    if not part.whole:
        refuse("path", str(path), f'the state {name} belongs to a whole tensor: use by="parameter"')
    return _read(where, path, name, 0, math.prod(shape)).view(shape).to(part.data.device)


def _same_model(
    optimizer: ZeroOptimizer, manifest: Mapping[str, Any], parts: list[_Part], path: Path
) -> None:
    saved = {name: manifest["tensors"][name] for name in manifest["trained"]}
    for part in parts:
        if part.name not in saved:
            refuse("path", str(path), f"it is of another model: it does not hold {part.name}")
        if saved[part.name][0] != list(part.shape) or saved[part.name][1] != list(part.stride):
            seen, wanted = tuple(saved[part.name][0]), part.shape
            refuse("path", str(path), f"it is of another model: {part.name} has shape {seen}, here {wanted}")
    missing = set(saved) - {part.name for part in parts}
    if missing:
        refuse("path", str(path), f"it is of another model: {min(missing)} is not trained here")
    assert optimizer.inner is not None
    if manifest["optimizer"] != type(optimizer.inner).__name__:
        refuse(
            "path",
            str(path),
            f"it is of {manifest['optimizer']}, and this is {type(optimizer.inner).__name__}",
        )
    if [g["names"] for g in manifest["groups"]] != [g["names"] for g in _groups_told(optimizer)]:
        refuse("path", str(path), "its parameters stand in other groups: give params= as when it was saved")


def _groups_told(optimizer: ZeroOptimizer) -> list[dict[str, Any]]:
    assert optimizer.inner is not None
    return [
        {
            "options": {key: _told(value) for key, value in group.items() if key != "params"},
            "names": [optimizer._names[p] for p in whole if p in optimizer._names],
        }
        for group, whole in zip(optimizer.inner.param_groups, optimizer._whole, strict=True)
    ]


def _told(value: Any) -> Any:
    """A scalar as JSON: a tensor tells its dtype, and whether it lay on the CPU."""
    if isinstance(value, Tensor):
        return {
            "value": value.item(),
            "dtype": str(value.dtype).removeprefix("torch."),
            "cpu": value.device.type == "cpu",
        }
    return list(value) if isinstance(value, tuple) else value


def _untold(told: Any, part: _Part) -> Any:
    if not isinstance(told, dict):
        return told
    return torch.tensor(
        told["value"], dtype=getattr(torch, told["dtype"]), device="cpu" if told["cpu"] else part.data.device
    )


def _option(value: Any) -> Any:
    if isinstance(value, dict):
        return torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]))
    return tuple(value) if isinstance(value, list) else value
