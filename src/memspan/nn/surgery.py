"""Surgery on a user's own model: find parts, tap features, split in two, swap a module and put it back.

Parts are named as in ``model.named_modules()``. What is changed in place is remembered on the model itself
and undone by :func:`restore_`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from memspan.base import nearest, refuse

__all__ = ["FeatureTap", "find_blocks", "recast_", "restore_", "select", "split_at", "swap_"]

_SWAPPED = "_memspan_swapped"
_RECAST = "_memspan_recast"
_ABSENT = object


def select(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """Modules whose name matches one of the patterns, in the order of the model.

    Args:
        model: any module.
        patterns: shell patterns over names, such as ``"layer4"``, ``"blocks.*.mlp"``, ``"*.norm?"``.

    Raises:
        BadInput: a pattern matches nothing; near names are offered.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> list(select(model, ["0", "2"]))
        ['0', '2']
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    modules = dict(model.named_modules())
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            refuse("patterns", pattern, f"no module has such a name; {nearest(pattern, _shallow(modules))}")
    return {
        name: module
        for name, module in modules.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    }


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a network: the class of child that holds most parameters in its containers.

    Looks at every ``ModuleList`` and ``Sequential`` whose children are all of one class with children of its
    own. A network in stages (ResNet) gives the blocks of all its stages.

    Returns:
        Blocks by name, in the order of the model; empty where nothing repeats.

    Example:
        >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU())
        >>> list(find_blocks(nn.Sequential(nn.Linear(4, 4), nn.ModuleList([block(), block()]))))
        ['1.0', '1.1']
    """
    groups: dict[type[nn.Module], dict[str, nn.Module]] = {}
    for name, container in model.named_modules():
        children = dict(container.named_children())
        kinds = {_plain(type(child)) for child in children.values()}
        if not isinstance(container, nn.ModuleList | nn.Sequential) or len(kinds) != 1:
            continue
        kind = kinds.pop()
        if any(True for child in children.values() for _ in child.children()):
            group = groups.setdefault(kind, {})
            group.update({f"{name}.{key}" if name else key: child for key, child in children.items()})
    repeated = [group for group in groups.values() if len(group) > 1]
    return max(repeated, key=_parameters, default={})


class FeatureTap:
    """Collect what chosen modules give, while the block runs; or layer by layer with :meth:`run`.

    Args:
        model: any module.
        names: names or patterns of modules (see :func:`select`); of the modules that one pattern matches,
            those inside another are left out, so that ``"encoder.layer.*"`` gives the layers. Or
            ``"hidden_states"``: what a transformers model gives under ``output_hidden_states``, the
            embedding's output first; or ``"forward_intermediates"``: what a timm model gives there. The
            latter two work with ``run`` alone.
        detach: keep values without their graph; ``run`` then computes none.
        pick: what to take of an output that is no tensor, for ``run``: a function, or a place in a tuple.
        dtype: what ``run`` stores tensors as at once, such as ``torch.bfloat16``; None leaves them.

    Raises:
        BadInput: no module has such a name, or the model has no such layer-wise features.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with FeatureTap(model, ["0"]) as tap:
        ...     _ = model(torch.zeros(4, 2))
        >>> tap["0"].shape
        torch.Size([4, 3])
        >>> [feature.shape for feature in FeatureTap(model, "*").run(torch.zeros(4, 2))]
        [torch.Size([4, 3]), torch.Size([4, 3])]
    """

    def __init__(
        self,
        model: nn.Module,
        names: str | Sequence[str],
        *,
        detach: bool = True,
        pick: Callable[[Any], Tensor] | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._model, self._detach, self._pick, self._dtype = model, detach, pick, dtype
        self._whole = names if isinstance(names, str) and names in _WHOLE and _gives(model, names) else ""
        self._modules = {} if self._whole else _outermost(model, names)
        self._handles: list[RemovableHandle] = []
        self._taken: dict[str, Any] = {}
        #: What the model itself gave in the latest :meth:`run`.
        self.output: Any = None

    @property
    def names(self) -> list[str]:
        """The modules tapped, in the order of the names given; empty for whole-model features."""
        return list(self._modules)

    def run(self, *inputs: Any, **named: Any) -> list[Tensor]:
        """Run the model and give what was tapped, in the order of ``names``, the shallowest layer first.

        Args:
            inputs: the model's inputs.
            named: likewise.

        Raises:
            BadInput: a module was not run, was run twice, gave no tensor, or what it gave was changed in
                place afterwards.
        """
        with torch.no_grad() if self._detach else contextlib.nullcontext():
            if self._whole:
                self.output, found = _run_whole(self._model, self._whole, inputs, named)
                return [self._stored(one) for one in found]
            counted: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in self._modules}

            def taker(name: str) -> Any:
                def take(_module: nn.Module, _inputs: Any, output: Any) -> None:
                    tensor = self._tensor(name, output)
                    stored = self._stored(tensor)
                    shared = stored.data_ptr() == tensor.data_ptr() if _real(stored) else False
                    counted[name].append((stored, stored._version if shared else -1))

                return take

            handles = [m.register_forward_hook(taker(name)) for name, m in self._modules.items()]
            try:
                self.output = self._model(*inputs, **named)
            finally:
                for handle in handles:
                    handle.remove()
        return [_once(name, taken) for name, taken in counted.items()]

    def __enter__(self) -> FeatureTap:
        if self._whole:
            refuse(
                "names", self._whole, "features of the whole model are read by run(...), not by a with block"
            )
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._taker(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, name: str) -> Any:
        if name not in self._taken:
            refuse(
                "name",
                name,
                f"nothing was taken there; run the model inside the block. {nearest(name, self._taken)}",
            )
        return self._taken[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken)

    def __len__(self) -> int:
        return len(self._taken)

    def _taker(self, name: str) -> Any:
        def take(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._taken[name] = output.detach() if self._detach and isinstance(output, Tensor) else output

        return take

    def _tensor(self, name: str, output: Any) -> Tensor:
        if self._pick is not None:
            output = output[self._pick] if isinstance(self._pick, int) else self._pick(output)
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            refuse("pick", self._pick, f"{name} gives a {kind}: say what to take of it, such as pick=0")
        return output

    def _stored(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach() if self._detach else tensor
        return tensor if self._dtype is None else tensor.to(self._dtype)


def split_at(model: nn.Module, at: str, *, example: Tensor | None = None) -> tuple[nn.Module, nn.Module]:
    """Split a network in two before the module ``at``: ``tail(head(x)) == model(x)``.

    The parts share the model's own modules and parameters (copy the model first to leave it apart). Only the
    containers around ``at`` are traced, every other module is kept whole, so that control flow inside
    them does not matter. Works for the ResNets, EfficientNets and ViTs of torchvision and timm.

    Args:
        model: a module of one tensor input; the tracing keeps its present train or eval behaviour in code
            outside of modules (``F.dropout(x, training=self.training)``).
        at: the name of the first module of the tail, e.g. ``"layer4"``, ``"blocks.6"``, ``"stage3"``.
        example: an input; when given, the parts are run in eval mode and compared with the model.

    Returns:
        The head and the tail; the head is an identity when ``at`` is the first module.

    Raises:
        BadInput: no such module (near names are offered); a network whose parts cannot be separated by one
            tensor; parts that share parameters; a network that cannot be traced.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> head, tail = split_at(model, "2")
        >>> x = torch.randn(5, 4)
        >>> bool(torch.equal(tail(head(x)), model(x)))
        True
    """
    modules = dict(model.named_modules())
    if not at or at not in modules:
        refuse("at", at, f"no module has this name; {nearest(at, _shallow(modules))}")
    tracer = _AroundTracer(at)
    try:
        graph = tracer.trace(model, concrete_args=_defaults(model))
    except Exception as error:  # a trace runs the user's own code: anything can come out of it
        refuse(
            "at", at, f"the code around it cannot be traced ({error}); give the two parts as a pair (g, s)"
        )
    for node in graph.nodes:
        node.type = (
            None  # annotations that are strings end up in the code's globals, and no pickle takes them
        )
    head, tail = _cut(model, graph, at)
    shared = {id(p) for p in head.parameters()} & {id(p) for p in tail.parameters()}
    if shared:
        refuse("at", at, f"{len(shared)} parameters are used on both sides; split where the parts share none")
    for part in (head, tail):
        part.train(model.training)
    if example is not None:
        _check(model, head, tail, example, at)
    return head, tail


def swap_(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Put other modules in the place of named ones; :func:`restore_` undoes it.

    Args:
        model: changed in place.
        replacements: new modules by the name of the old ones.

    Returns:
        The model.

    Raises:
        BadInput: no such module, or the model was changed already; nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> swap_(model, {"1": nn.GELU()})[1], restore_(model)[1]
        (GELU(approximate='none'), ReLU())
    """
    modules = dict(model.named_modules())
    if _SWAPPED in vars(model):
        refuse("model", type(model).__name__, "modules were swapped already; restore_(model) first")
    for name in replacements:
        if not name or name not in modules:
            refuse("replacements", name, f"no module has this name; {nearest(name, _shallow(modules))}")
    # Kept in a plain list: a registered module would count, train and be saved twice.
    vars(model)[_SWAPPED] = [(name, modules[name]) for name in replacements]
    for name, module in replacements.items():
        _put(model, name, module)
    return model


def recast_(
    model: nn.Module,
    changes: Iterable[tuple[nn.Module, type[nn.Module] | None, Mapping[str, Any]]],
    *,
    by: str,
    freeze: bool = False,
) -> nn.Module:
    """Give modules of a model another class, keeping everything they hold; :func:`restore_` undoes it.

    Parameters, buffers, hooks and names stay where they are, so an optimizer made before still fits, and a
    module that is used in several places is changed in all of them.

    Args:
        model: changed in place; it remembers the change.
        changes: (module, new class or None to keep it, attributes to set).
        by: who asks; a second change by the same one is refused.
        freeze: also stop the training of every parameter; what was trained before is trained again
            afterwards.

    Returns:
        The model.

    Raises:
        BadInput: the model, or a part of it, was changed by the same one already; nothing is changed then.

    Example:
        >>> class Quiet(nn.ReLU):
        ...     pass
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> recast_(model, [(model[1], Quiet, {})], by="example")[1]
        Quiet()
        >>> restore_(model)[1]
        ReLU()
    """
    if any(by in vars(part).get(_RECAST, {}) for part in model.modules()):
        refuse("model", type(model).__name__, f"{by} changed parts of it already; restore_ first")
    done: list[tuple[nn.Module, type[nn.Module], dict[str, Any]]] = []
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for module, kind, attributes in changes:
        before = {name: getattr(module, name, _ABSENT) for name in attributes}
        done.append((module, type(module), before))
        _set(module, kind or type(module), attributes)
    if freeze:
        model.requires_grad_(False)
    # Kept in plain containers: a registered module would count, train and be saved twice.
    vars(model).setdefault(_RECAST, {})[by] = (done, trained if freeze else None)
    return model


def restore_(model: nn.Module, by: str | None = None) -> nn.Module:
    """Undo :func:`swap_`, or what :func:`recast_` did.

    Args:
        model: changed by one of them.
        by: who changed it by :func:`recast_`; None undoes the last change of that kind, else the swap.

    Raises:
        BadInput: nothing was changed.
    """
    recast = vars(model).get(_RECAST, {})
    if by is None and recast and _SWAPPED not in vars(model):
        by = next(reversed(recast))
    if by is not None:
        if by not in recast:
            refuse("model", type(model).__name__, f"{by} changed nothing in it")
        done, trained = recast.pop(by)
        if not recast:
            del vars(model)[_RECAST]
        for module, kind, attributes in reversed(done):
            _set(module, kind, attributes)
        if trained is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in set(trained))
        return model
    if _SWAPPED not in vars(model):
        refuse("model", type(model).__name__, "nothing was swapped in it")
    for name, module in reversed(vars(model).pop(_SWAPPED)):
        _put(model, name, module)
    return model


def _set(module: nn.Module, kind: type[nn.Module], attributes: Mapping[str, Any]) -> None:
    module.__class__ = kind
    for name, value in attributes.items():
        if name in vars(module) or name in module._modules:
            delattr(module, name)  # a function may take the place of a module and the other way round
        if value is not _ABSENT:
            setattr(module, name, value)


_WHOLE = ("hidden_states", "forward_intermediates")


def _gives(model: nn.Module, whole: str) -> bool:
    """Whether a model gives such layer-wise features; a module of that name is tapped like any other."""
    if whole in dict(model.named_modules()):
        return False
    has = hasattr(model, "config") if whole == "hidden_states" else callable(getattr(model, whole, None))
    if not has:
        library = "a transformers model" if whole == "hidden_states" else "timm's models"
        shown = nearest(whole, _shallow(dict(model.named_modules())))
        refuse("names", whole, f"{type(model).__name__} is not {library}: name modules instead; {shown}")
    return True


def _run_whole(model: nn.Module, whole: str, inputs: Any, named: Any) -> tuple[Any, Sequence[Tensor]]:
    if whole == "hidden_states":
        output = model(*inputs, **named, output_hidden_states=True, return_dict=True)
        found = getattr(output, "hidden_states", None)
        if found is None:
            refuse("names", whole, f"{type(model).__name__} gave none; name modules instead")
        return output, list(found)
    output, found = model.forward_intermediates(*inputs, **named)  # type: ignore[operator]
    return output, list(found)


def _outermost(model: nn.Module, names: str | Sequence[str]) -> dict[str, nn.Module]:
    """Modules in the order of the patterns; of one pattern's, those inside another are left out."""
    found: dict[str, nn.Module] = {}
    for pattern in [names] if isinstance(names, str) else names:
        matched = select(model, pattern)
        inside = {name for name in matched for other in matched if other and name.startswith(f"{other}.")}
        found.update(
            {name: module for name, module in matched.items() if (name or not pattern) and name not in inside}
        )
    return found


def _once(name: str, taken: list[tuple[Tensor, int]]) -> Tensor:
    if len(taken) != 1:
        refuse("names", name, f"it was run {len(taken)} times in one pass; tap a module that runs once")
    tensor, version = taken[0]
    if version >= 0 and tensor._version != version:
        refuse("names", name, "its output is changed in place later on; tap the module that changes it")
    return tensor


def _real(tensor: Tensor) -> bool:
    """Whether a tensor has a place in memory and counts its changes."""
    return type(tensor) is Tensor and not tensor.is_meta and not tensor.is_inference()


class _AroundTracer(fx.Tracer):
    """Looks inside the modules that contain ``at`` and keeps all others whole."""

    def __init__(self, at: str) -> None:
        super().__init__()
        parents = at.split(".")[:-1]
        self._open = {".".join(parents[:depth]) for depth in range(len(parents) + 1)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._open


def _defaults(model: nn.Module) -> dict[str, Any]:
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def _cut(model: nn.Module, graph: fx.Graph, at: str) -> tuple[nn.Module, nn.Module]:
    defaults = {node for node in graph.nodes if node.op == "placeholder" and node.args}
    for node in graph.nodes:  # what the trace asserts of arguments that keep their defaults
        if node.all_input_nodes and all(one in defaults for one in node.all_input_nodes):
            defaults.add(node)
    nodes = [node for node in graph.nodes if node not in defaults]
    inputs = [node for node in nodes if node.op == "placeholder"]
    calls = [node for node in nodes if node.op == "call_module" and node.target == at]
    if len(calls) != 1:
        refuse(
            "at",
            at,
            f"it is called {len(calls)} times in a forward pass; split at a module that is called once",
        )
    if len(inputs) != 1:
        refuse("model", [node.name for node in inputs], "only networks of one tensor input are split")
    start = nodes.index(calls[0])
    before, after = nodes[:start], nodes[start:]
    crossing = [
        node for node in before if node.op != "get_attr" and any(user in set(after) for user in node.users)
    ]
    if len(crossing) != 1:
        names = ", ".join(node.name for node in crossing)
        refuse("at", at, f"{len(crossing)} values cross here ({names}); split where only one tensor passes")
    head, tail = fx.Graph(), fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in before:
        copied[node] = head.node_copy(node, lambda n: copied[n])
    head.output(copied[crossing[0]])
    moved: dict[fx.Node, fx.Node] = {crossing[0]: tail.placeholder("x")}
    for node in (*(n for n in before if n.op == "get_attr"), *after):
        moved[node] = tail.node_copy(node, lambda n: moved[n])
    return (
        nn.Identity() if crossing[0] is inputs[0] else _part(model, head, "Head"),
        _part(model, tail, "Tail"),
    )


def _part(model: nn.Module, graph: fx.Graph, name: str) -> fx.GraphModule:
    whole = fx.GraphModule(model, graph, name)
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(whole, graph, name)  # anew, so that it holds only what its graph calls


def _check(model: nn.Module, head: nn.Module, tail: nn.Module, example: Tensor, at: str) -> None:
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            whole = model.eval()(example)
            parts = tail.eval()(head.eval()(example))
    finally:
        for module in training:
            module.training = True
        head.train(model.training)
        tail.train(model.training)
    if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=1e-4, atol=1e-5):
        refuse("at", at, "the parts give another output than the model; give the two parts as a pair (g, s)")


def _plain(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a block had before a training method gave it a subclass of its own."""
    while "_memspan_was" in vars(kind):
        kind = vars(kind)["_memspan_was"][1]
    return kind


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def _shallow(modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in modules if name and name.count(".") < 2]


def _parameters(group: Mapping[str, nn.Module]) -> int:
    return sum(parameter.numel() for module in group.values() for parameter in module.parameters())
