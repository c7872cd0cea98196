"""What kernels take and give back before they return is measured alone, and changes nothing."""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memspan.ledger import AllocatorPeak, Ledger, plan, training_step
from memspan.ledger.kernels import (
    HALVES,
    MIXED,
    ON_CUDA,
    SCRATCH,
    UNEVEN,
    invocation,
    kind_of,
    may_hold,
    scratch_bytes,
)
from memspan.ledger.probe import measure
from memspan.recipes.ledger.models import classify

IMAGES = torch.randn(3, 3, 32, 32)
LABELS = torch.arange(3)


def convolution(size=4):
    x, w = torch.randn(size, 8, 9, 9), torch.randn(4, 8, 3, 3)
    return torch.ops.aten.convolution.default, (x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def small():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 28 * 28, 4)
    )


def step_of(model, optimizer, target=LABELS):
    training_step(model, optimizer, (IMAGES, target), classify)


def test_the_scratch_is_the_allocators_own_figure():
    operator, args = convolution()
    operator(*args)
    with AllocatorPeak("cpu") as truth:
        result = operator(*args)
    assert scratch_bytes(invocation(operator, args, None), 2**30) == truth.peak - truth.growth > 0
    assert result.shape == (4, 4, 9, 9)


def test_a_scratch_that_makes_the_peak_is_a_holding_of_its_own_with_place_and_operator():
    model = small()
    model(IMAGES)
    with Ledger(model, level="timeline") as led:
        model(IMAGES)
    peak = led.peak
    (block,) = [block for block in peak.holdings if block.category == "temporaries.kernel"]
    assert block.operator == "aten.convolution.default"
    assert block.module in ("0", "2")
    assert peak.total == sum(peak.by_category.values()) == sum(peak.by_module().values())
    assert led.timeline().peak().total == peak.total == max(led.phase_peaks().values())
    for point in led.timeline(modules=1):
        assert sum(point.by_category.values()) == point.total == sum(point.by_module.values())


def test_asking_changes_no_random_number_no_gradient_and_no_mode():
    model = small()
    step_of(model, None)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with Ledger(model, optimizer) as led:
        step_of(model, optimizer)
    state = torch.get_rng_state()
    kept = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert led.peak.by_category["temporaries.kernel"] > 0
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    for parameter, (value, gradient) in zip(model.parameters(), kept, strict=True):
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, gradient)


def test_it_can_be_switched_off():
    model = small()
    model(IMAGES)
    with Ledger(model) as whole:
        model(IMAGES)
    with Ledger(model, kernels=None) as between:
        model(IMAGES)
    assert between.peak.category("temporaries.kernel") == 0
    assert between.peak.total < whole.peak.total
    assert between.unknown_kernels == []
    assert plan(small, (IMAGES, LABELS), loss=classify, kernels=None).exact


def test_operators_above_the_limit_are_named_and_the_plan_is_not_exact():
    build = functools.partial(nn.Conv2d, 3, 5, 3)
    p = plan(build, IMAGES, loss=lambda y, _: y.mean(), kernels="1KiB")
    assert not p.exact
    assert "aten.convolution" in p.note
    assert plan(build, IMAGES, loss=lambda y, _: y.mean()).exact


def test_under_another_profiler_it_is_measured_all_the_same():
    operator, args = convolution(size=7)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert scratch_bytes(invocation(operator, args, None), 2**30) > 0


def test_an_operator_that_ends_its_process_is_unknown_and_the_next_is_measured():
    x, w = torch.zeros(4, 3, 6), torch.zeros(32, 6)
    hidden, state, none = torch.zeros(32, 8), torch.zeros(3, 8), torch.zeros(0, dtype=torch.uint8)
    bias, y = torch.zeros(32), torch.zeros(4, 3, 8)
    args = (x, w, hidden, bias, bias, state, state, y, state, state, y, None, None)
    torn = (*args, False, 2, 8, 1, True, True, False, [], False, none)  # the workspace is missing
    backward = torch.ops.aten.mkldnn_rnn_layer_backward.default
    assert scratch_bytes(invocation(backward, torn, None), 2**30) is None
    operator, args = convolution(size=6)
    assert scratch_bytes(invocation(operator, args, None), 2**30) > 0


@torch.library.custom_op("foreign::double", mutates_args=())
def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@_double.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_operator_of_another_library_is_counted_and_its_plan_not_called_exact():
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda module, args, output: output + _double(output.detach()))
    p = plan(model, torch.zeros(2, 4), loss=lambda y, _: y.sum())
    assert not p.exact
    assert "foreign.double" in p.note


def test_an_operator_that_cannot_run_on_zeros_is_unknown():
    x = torch.eye(4)
    assert scratch_bytes(invocation(torch.ops.aten.linalg_cholesky_ex.default, (x, True), {}), 2**20) in (
        0,
        None,
    )
    assert scratch_bytes(invocation(torch.ops.aten.cholesky.default, (x,), None), 2**20) is None


def test_calls_that_differ_in_values_alone_are_one_and_other_layouts_are_another():
    operator, args = convolution()
    same = invocation(operator, (torch.zeros_like(args[0]), *args[1:]), None)
    other = invocation(operator, (args[0].to(memory_format=torch.channels_last), *args[1:]), None)
    assert invocation(operator, args, None) == same
    assert same != other
    assert invocation(operator, (args[0].to("meta"), *args[1:]), None) is None


def test_operators_are_sorted_by_what_their_kernels_can_hold():
    aten = torch.ops.aten
    for plain in (aten.cat.default, aten.view.default, aten.zeros.default, aten._foreach_add_.List):
        assert kind_of(plain) == 0
    x = torch.zeros(2, 2)
    assert kind_of(aten.mm.default) == HALVES | UNEVEN | ON_CUDA
    assert [may_hold(HALVES, (one, one), cuda=False) for one in (x, x.bfloat16())] == [False, True]
    expanded = torch.zeros(1, 1).expand(2, 2)
    assert [may_hold(UNEVEN, (one, x), cuda=False) for one in (x, x.T, expanded)] == [False, False, True]
    assert kind_of(aten._softmax.default) == ON_CUDA
    assert [may_hold(ON_CUDA, (x,), cuda) for cuda in (False, True)] == [False, True]
    assert kind_of(aten.add.Tensor) == MIXED
    assert kind_of(aten.convolution_backward.default) == SCRATCH
    assert kind_of(aten.nonzero.default) == 0


def test_sums_of_two_dtypes_cast_a_copy():
    x, y = torch.zeros(1000), torch.zeros(1000, dtype=torch.bfloat16)
    with Ledger(inputs=(x, y)) as led:
        x + y
    assert led.peak.by_category == {
        "inputs": 6000,
        "temporaries.forward": 4000,
        "temporaries.kernel": 4000,
    }


def test_the_state_that_a_checkpoint_keeps_of_the_generator_is_counted():
    with Ledger() as led:
        state = torch.get_rng_state()
        assert led.current.total == state.nbytes
    del state
    assert led.current.total == 0


def test_sections_keep_their_own_kernels():
    layer = nn.Conv2d(3, 32, 3)
    layer(IMAGES)
    with Ledger(layer) as led:
        for _ in range(2):
            led.mark("with")
            layer(IMAGES)
            led.mark("without")
            F.relu(IMAGES)
    assert led.peak_of("with").category("temporaries.kernel") > 0
    assert led.peak_of("without").category("temporaries.kernel") == 0
    assert led.peak.total == led.peak_of("with").total


def _calls_of(info):
    """Calls of aten's operators in a few samples of one of torch's own test entries, forward and backward."""
    seen = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if func.namespace == "aten" and not func.is_view:
                one = invocation(func, args, kwargs)
                if one is not None and one.nbytes < 2**20:
                    seen[one] = may_hold(kind_of(func), args, cuda=False)
            return found

    for sample in itertools.islice(info.sample_inputs("cpu", torch.float32, requires_grad=True), 4):
        leaves = [one for one in tree_leaves((sample.input, sample.args, sample.kwargs)) if _learns(one)]
        with contextlib.suppress(RuntimeError, NotImplementedError, IndexError, ValueError), Watch():
            outputs = tree_leaves(info(sample.input, *sample.args, **sample.kwargs))
            outputs = [one for one in outputs if _learns(one)]
            given = [torch.randn_like(one) for one in outputs]
            torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    return seen


def _learns(value):
    return isinstance(value, torch.Tensor) and value.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_an_operator_that_is_not_asked_holds_nothing(part):
    """The table of operators against torch's own samples of them: a ninth of them, the same every time."""
    pytest.importorskip("expecttest", reason="torch's own test entries need expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    chosen = [
        info for info in op_db[part :: 9 * 3] if info.supports_autograd and torch.float32 in info.dtypes
    ]
    assert len(chosen) > 10
    missed = {}
    for info in chosen:
        for one, asked in _calls_of(info).items():
            if not asked and (held := measure(one)) is not None and held.scratch > 64:  # a few numbers aside
                missed[str(one.operator)] = (held.scratch, one)
    assert not missed
