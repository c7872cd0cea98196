"""The contracts that every system keeps, each as one function that raises when it is broken.

Parameters and buffers are randomised before anything is compared: zero-initialised parts make any two
networks agree, and starve most of a network of gradients.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memspan.base import BadInput
from memspan.base.files import load_state, save_state
from memspan.ledger.bytes import memory_bytes
from memspan.report.schema import Measurement

Kind = Literal["module", "inplace", "optimizer", "learner", "estimator", "adapter", "scorer", "tool"]


@dataclass(frozen=True)
class System:
    """One component under the contracts; a recipe with two components has two lines.

    Attributes:
        name: of the component, as test names show it.
        kind: which contracts apply.
        build: ``build(seed)`` makes the component (kind tool: None).
        example: inputs: a tuple for ``forward``, (X, y) pairs of two tasks for a learner, two batches of one
            shape for an adapter, what ``fit`` takes for an estimator or a scorer.
        loss: scalar of the component's output; None sums a random projection of all floating outputs.
        refused: calls that take the component and must raise BadInput.
        convert: for kind inplace, the function that ends in ``_``.
        undo: for kind inplace, what takes it back.
        recipe: whose component it is, and whose docs page tells of it; where it is not ``name``.
    """

    name: str
    kind: Kind
    build: Callable[[int], Any] | None = None
    example: Callable[[], Any] | None = None
    loss: Callable[[Any], Tensor] | None = None
    convert: Callable[[nn.Module], nn.Module] | None = None
    undo: Callable[[nn.Module], nn.Module] | None = None
    refused: tuple[Callable[[Any], object], ...] = ()
    recipe: str = ""

    @property
    def story(self) -> str:
        """Name of its recipe and docs page."""
        return self.recipe or self.name


# ---- what is looked at ----------------------------------------------------------------------------------


def made(system: System, seed: int = 0) -> Any:
    """A component; after its first task or fit where it has one; converted where that is the system."""
    assert system.build is not None
    torch.manual_seed(1000 + seed)
    np.random.seed(1000 + seed)  # noqa: NPY002  components may draw from it
    thing = system.build(seed)
    if system.convert is not None:
        thing = system.convert(thing)
    if system.kind == "learner":
        X, y = examples(system)[0]
        thing.partial_fit_task(X, y)
    if system.kind in ("estimator", "scorer"):
        thing.fit(*examples(system))
    if system.kind == "adapter":
        thing.adapt(examples(system)[0])
    return thing


def examples(system: System) -> Any:
    """Two tasks of two classes of small images for a learner; what the system says for others."""
    if system.example is not None:
        with torch.random.fork_rng(devices=[]):  # inputs that are drawn come out the same each time
            torch.manual_seed(7)
            return system.example()
    draws = np.random.default_rng(0)
    tasks = []
    for first in (0, 2):
        y = np.repeat([first, first + 1], 12)
        X = draws.integers(0, 60, (24, 8, 8)).astype(np.uint8)
        X[np.arange(24), y, :] += 150
        tasks.append((X, y))
    return tasks


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every floating parameter and buffer drawn anew; running variances stay positive."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=draws, dtype=torch.float64)
                positive = "var" in name.rsplit(".", 1)[-1]
                tensor.copy_(drawn.abs() + 0.5 if positive else 0.3 * drawn)
    return module


def outputs(system: System, thing: Any) -> list[np.ndarray]:
    """What the component answers, as arrays; an answer that ignores its input would prove nothing."""
    if system.kind in ("learner", "estimator"):
        X = (
            np.concatenate([task[0] for task in examples(system)])
            if system.kind == "learner"
            else examples(system)[0]
        )
        read = getattr(thing, "decision_function", None) or thing.predict
        return [np.asarray(read(X))]
    if system.kind == "adapter":
        return [_array(thing.predict(x)) for x in examples(system)]
    if system.kind == "scorer":
        return list(_results(thing).values())
    thing.eval()
    with torch.no_grad():
        found = [tensor.double().numpy() for tensor in _floats(thing(*examples(system)))]
    assert any(array.std(axis=0).max() > 1e-4 for array in found), "all rows are answered alike"
    return found


def calibrated(system: System, module: nn.Module) -> nn.Module:
    """Running statistics taken from the example, so that the signal lives through randomised layers."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        module.train()
        with torch.no_grad():
            module(*examples(system))
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    return module


def reachable(thing: Any) -> Iterator[tuple[str, Tensor | np.ndarray]]:
    """Every tensor and array that the component's attributes, lists and dictionaries lead to."""
    seen: set[int] = set()

    def walk(value: Any, path: str, depth: int) -> Iterator[tuple[str, Tensor | np.ndarray]]:
        if id(value) in seen or depth > 8:
            return
        seen.add(id(value))
        if isinstance(value, Tensor | np.ndarray):
            yield path, value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(item, f"{path}[{key!r}]", depth + 1)
        elif isinstance(value, list | tuple | set):
            for place, item in enumerate(value):
                yield from walk(item, f"{path}[{place}]", depth + 1)
        elif type(value).__module__.split(".")[0] not in ("builtins", "torch", "numpy") or isinstance(
            value, nn.Module
        ):
            for key, item in getattr(value, "__dict__", {}).items():
                yield from walk(item, f"{path}.{key}", depth + 1)

    yield from walk(thing, type(thing).__name__, 0)


# ---- the contracts --------------------------------------------------------------------------------------


def check_state_round_trip(system: System, folder: Path) -> None:
    """A state written as safetensors and loaded into a fresh component gives the same outputs."""
    one, other = made(system, 0), _fresh(system)
    if system.kind in ("module", "inplace"):
        calibrated(system, randomised(one))
    save_state(folder / "state.safetensors", one.state_dict())
    other.load_state_dict(load_state(folder / "state.safetensors")[0])
    _same(outputs(system, one), outputs(system, other), "a reloaded component answers otherwise")
    if system.kind == "learner":
        X, y = examples(system)[1]
        for learner in (one, other):
            learner.partial_fit_task(X, y)
        _same(outputs(system, one), outputs(system, other), "a reloaded learner learns on otherwise")
    if system.kind == "adapter":
        for adapter in (one, other):
            adapter.adapt(examples(system)[1])
        _same(outputs(system, one), outputs(system, other), "a reloaded adapter adapts on otherwise")


def check_everything_kept_is_in_the_state(system: System) -> None:
    """No tensor of a module hides outside its parameters and buffers, where no file and no .to() finds it."""
    thing = made(system)
    owned = {id(tensor) for tensor in (*thing.parameters(), *thing.buffers())}
    hidden = [path for path, tensor in reachable(thing) if id(tensor) not in owned and _counts(tensor)]
    assert not hidden, f"held outside the state: {', '.join(hidden)}"
    stored = {tensor.data_ptr() for tensor in thing.state_dict().values()}
    lost = [name for name, tensor in thing.named_parameters() if tensor.data_ptr() not in stored]
    assert not lost, f"not in state_dict: {', '.join(lost)}"


def check_everything_follows_to(system: System) -> None:
    """After ``.to(float64)`` no floating tensor stays behind."""
    thing = made(system).to(torch.float64)
    left = [
        path for path, tensor in reachable(thing)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    ]  # fmt: skip
    assert not left, f"does not follow .to(): {', '.join(left)}"


def check_every_parameter_learns(system: System) -> None:
    """Every parameter that is meant to train receives a gradient and changes in a step."""
    module = randomised(made(system)).train()
    trained = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
    assert trained, "no parameter is meant to train"
    answer = module(*examples(system))
    loss = system.loss(answer) if system.loss is not None else _projection(answer)
    assert loss.requires_grad, "the loss is detached from the parameters"
    loss.backward()
    without = [
        name for name, tensor in trained.items() if tensor.grad is None or not tensor.grad.abs().sum() > 0
    ]
    assert not without, f"no gradient reaches {', '.join(without)}"
    before = {name: tensor.detach().clone() for name, tensor in trained.items()}
    torch.optim.SGD(trained.values(), lr=0.1).step()
    still = [name for name, tensor in trained.items() if torch.equal(before[name], tensor)]
    assert not still, f"a step does not change {', '.join(still)}"


def check_a_learner_changes_what_it_answers(system: System) -> None:
    """Learning a task moves the state: a learner whose loss is detached answers as before."""
    learner = made(system)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    learner.partial_fit_task(*examples(system)[1])
    after = learner.state_dict()
    moved = [
        name for name, tensor in after.items()
        if tensor.is_floating_point() and name in before and not torch.equal(before[name], tensor)
    ]  # fmt: skip
    assert moved, "no number of the state changed while learning"


def check_seeds(system: System) -> None:
    """One seed repeats, two differ."""
    one, again, other = made(system, 0), made(system, 0), made(system, 1)
    states = [thing.state_dict() for thing in (one, again, other)]
    same = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not same, f"one seed does not repeat: {', '.join(same)}"
    assert any(
        states[0][name].shape != tensor.shape or not torch.equal(states[0][name], tensor)
        for name, tensor in states[2].items()
    ), "two seeds give the same state"


def check_bytes(system: System, folder: Path) -> None:
    """Claimed bytes are those of the file that holds the state, its header aside."""
    thing = made(system)
    claimed = sum(memory_bytes(thing).values())
    state = thing.state_dict()
    path = folder / "bytes.safetensors"
    save_state(path, state)
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    slack = sum(tensor.numel() for name, tensor in state.items() if name.split(".")[-1] == "header")  # JSON
    payload = path.stat().st_size - header
    assert payload - slack <= claimed <= payload, f"{claimed} bytes claimed, {payload} on disk"


def check_state_is_not_shared(system: System) -> None:
    """A loaded state is copied: what is learnt later does not change the state that was loaded."""
    source, thing = made(system, 0), _fresh(system)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    thing.load_state_dict(state)
    if system.kind == "learner":
        thing.partial_fit_task(*examples(system)[1])
    elif system.kind == "adapter":
        thing.adapt(examples(system)[1])
    else:
        randomised(thing, seed=5)
    changed = [name for name in kept if not torch.equal(kept[name], state[name])]
    assert not changed, f"kept by reference: {', '.join(changed)}"


def check_bad_input_is_refused(system: System) -> None:
    """Each bad call is refused with BadInput, and the component is as it was."""
    calls = list(system.refused)
    if system.kind == "learner":
        X, y = examples(system)[1]
        calls += [
            lambda learner: learner.partial_fit_task(X, y[:-1]),
            lambda learner: learner.partial_fit_task(X[:0], y[:0]),
        ]
    assert calls, "say which calls must be refused"
    for call in calls:
        thing = made(system) if system.build is not None else None
        before = {name: np.array(value) for name, value in _everything(system, thing).items()}
        with pytest.raises(BadInput):
            call(thing)
        for name, value in _everything(system, thing).items():
            assert np.array_equal(before[name], value), f"a refused call changed {name}"


def check_an_adapter_adapts_and_goes_back(system: System) -> None:
    """Adapting changes what is predicted, predicting changes nothing, and a reset is a fresh adapter."""
    first, second = examples(system)
    fresh, adapter = _fresh(system), _fresh(system)
    before = _array(adapter.predict(first))
    kept = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    assert _array(adapter.adapt(first)).shape == before.shape, "adapt gives the logits of its batch"
    state = adapter.state_dict()
    assert any(not torch.equal(kept[name], state[name]) for name in kept), "adapting changes no number"
    assert not np.allclose(before, _array(adapter.predict(first)), atol=1e-7), "adapting changes no answer"
    adapted = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    adapter.predict(second)
    learnt = [name for name in adapted if not torch.equal(adapted[name], adapter.state_dict()[name])]
    assert not learnt, f"predict learns: {', '.join(learnt)}"
    adapter.reset()
    answers = [[_array(one.predict(x)) for x in (first, second)] for one in (fresh, adapter)]
    _same(*answers, "a reset adapter is not as it was")
    assert set(adapter.state_dict(only="meta")) <= set(adapter.state_dict(only="all"))


def check_a_scorer_scores_every_row(system: System) -> None:
    """``fit`` gives the scorer back, leaves its data alone, and leaves a finite score for each row."""
    given = examples(system)
    copies = [np.array(part, copy=True) for part in given]
    assert system.build is not None
    scorer = system.build(0)
    assert not _results(scorer), "a scorer has results before it was fitted"
    assert scorer.fit(*given) is scorer, "fit gives the scorer back"
    for part, copy in zip(given, copies, strict=True):
        assert np.array_equal(np.asarray(part), copy), "fit changes the data it is given"
    rows = len(given[0])
    scores = [value for value in _results(scorer).values() if value.shape == (rows,)]
    assert scores, f"no result that ends in _ has one number for each of the {rows} rows"
    assert any(np.ptp(value) > 0 for value in scores), "all rows score alike"
    again = type(scorer)(**scorer.get_params())
    _same(
        list(_results(again.fit(*given)).values()),
        list(_results(scorer).values()),
        "parameters do not make it",
    )


def check_scorer_seeds(system: System) -> None:
    """One seed repeats, two differ."""
    one, again, other = (_results(made(system, seed)) for seed in (0, 0, 1))
    _same(list(one.values()), list(again.values()), "one seed does not repeat")
    assert any(not np.array_equal(one[name], other[name]) for name in one), "two seeds give the same scores"


def check_undo(system: System) -> None:
    """What was converted in place comes back: same names, same outputs."""
    assert system.build is not None
    assert system.convert is not None
    assert system.undo is not None
    module = system.build(0)
    names, before = sorted(module.state_dict()), outputs(system, module)
    assert system.convert(module) is module, "a function that ends in _ gives its model back"
    assert system.undo(module) is module
    assert sorted(module.state_dict()) == names
    _same(before, outputs(system, module), "undoing does not bring the model back")


def check_trained(found: Sequence[Measurement], control: str) -> None:
    """Numbers that rows trained, where they tell: full fine-tuning > LoRA > a linear probe > 0 = control.

    A "full fine-tuning" of a frozen network trains its head alone, and looks like a win for every rival.
    """
    ranks = (("full", 3), ("lora", 2), ("linear probe", 1))
    told: dict[str, dict[int, set[int]]] = {}
    for row in found:
        if row.trained is None:
            continue
        name = row.method.lower()
        rank = 0 if row.method == control else next((n for start, n in ranks if name.startswith(start)), None)
        if name.startswith("full precision"):  # a precision, not a way to tune
            continue
        if rank is not None:
            told.setdefault(repr(sorted(row.setting.items())), {}).setdefault(rank, set()).add(row.trained)
    for setting, by_rank in told.items():
        assert by_rank.get(0, {0}) == {0}, f"the control trains {by_rank[0]} numbers ({setting})"
        order = [by_rank[rank] for rank in sorted(by_rank) if rank]
        assert all(min(one) > 0 for one in order), f"a row that tunes trains nothing ({setting})"
        assert all(max(few) < min(many) for few, many in pairwise(order)), (
            f"more is not trained by what is to train more: {order} ({setting})"
        )


def check_optimizer(system: System, folder: Path) -> None:
    """A reloaded optimizer steps as the first one would have."""
    assert system.build is not None
    runs = []
    for reload in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        optimizer = system.build(list(model.parameters()))
        assert isinstance(optimizer, torch.optim.Optimizer)
        for step in range(4):
            if step == 2 and reload:
                state = json.loads(json.dumps(optimizer.state_dict()["param_groups"]))
                kept = {"state": optimizer.state_dict()["state"], "param_groups": state}
                optimizer = system.build(list(model.parameters()))
                optimizer.load_state_dict(kept)
            optimizer.zero_grad()
            model(torch.ones(3, 4)).square().sum().backward()
            optimizer.step()
        runs.append([tensor.detach().clone() for tensor in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "a reloaded optimizer steps otherwise"


CHECKS: dict[str, tuple[Callable[..., None], ...]] = {
    "module": (
        check_state_round_trip, check_everything_kept_is_in_the_state, check_everything_follows_to,
        check_every_parameter_learns, check_seeds, check_bytes, check_state_is_not_shared,
        check_bad_input_is_refused,
    ),
    "inplace": (
        check_state_round_trip, check_everything_kept_is_in_the_state, check_everything_follows_to,
        check_every_parameter_learns, check_bytes, check_undo, check_bad_input_is_refused,
    ),
    "optimizer": (check_optimizer,),
    "learner": (
        check_state_round_trip, check_a_learner_changes_what_it_answers, check_seeds, check_bytes,
        check_state_is_not_shared, check_bad_input_is_refused,
    ),
    "estimator": (check_state_round_trip, check_seeds, check_bytes, check_bad_input_is_refused),
    "adapter": (
        check_an_adapter_adapts_and_goes_back, check_state_round_trip, check_seeds, check_bytes,
        check_state_is_not_shared, check_bad_input_is_refused,
    ),
    "scorer": (check_a_scorer_scores_every_row, check_scorer_seeds, check_bad_input_is_refused),
    "tool": (check_bad_input_is_refused,),
}  # fmt: skip


def run_check(check: Callable[..., None], system: System, folder: Path) -> None:
    """Run one contract; those that write files get a folder."""
    takes_folder = "folder" in check.__code__.co_varnames[: check.__code__.co_argcount]
    check(system, folder) if takes_folder else check(system)


def component(path: str) -> Any:
    """What a dotted path names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _fresh(system: System) -> Any:
    assert system.build is not None
    if system.kind in ("learner", "estimator", "adapter"):
        return system.build(0)
    return made(system, 1)


def _everything(system: System, thing: Any) -> dict[str, np.ndarray]:
    """What a refused call must leave as it is."""
    if thing is None:
        return {}
    if system.kind == "scorer":
        return _results(thing)
    return {name: _array(tensor) for name, tensor in thing.state_dict().items()}


def _results(scorer: Any) -> dict[str, np.ndarray]:
    """The arrays that a scorer found; their names end in _."""
    return {
        name: value
        for name, value in sorted(vars(scorer).items())
        if name.endswith("_") and not name.startswith("_") and isinstance(value, np.ndarray)
    }


def _array(answer: Any) -> np.ndarray:
    return answer.detach().cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)


def _floats(answer: Any) -> list[Tensor]:
    if isinstance(answer, Tensor):
        return [answer] if answer.is_floating_point() else []
    items = (
        answer.values() if isinstance(answer, Mapping) else answer if isinstance(answer, list | tuple) else ()
    )
    return [tensor for item in items for tensor in _floats(item)]


def _projection(answer: Any) -> Tensor:
    draws = torch.Generator().manual_seed(3)
    parts = [(tensor * torch.randn(tensor.shape, generator=draws)).sum() for tensor in _floats(answer)]
    return torch.stack(parts).sum()


def _counts(tensor: Tensor | np.ndarray) -> bool:
    return tensor.numel() > 1 if isinstance(tensor, Tensor) else tensor.size > 1


def _same(one: list[np.ndarray], other: list[np.ndarray], message: str) -> None:
    assert len(one) == len(other), message
    for a, b in zip(one, other, strict=True):
        assert a.shape == b.shape, message
        assert np.allclose(a, b, atol=1e-6), message
