"""A ledger is a good guest: whatever happens inside, it leaves nothing behind and counts the right things."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from memspan.ledger import Ledger, Snapshot


def traces(model: nn.Module | None = None) -> tuple[object, ...]:
    """Everything global that an open ledger touches."""
    return (
        torch.UntypedStorage.resize_,
        "resize_" in torch.UntypedStorage.__dict__,
        torch.autograd.backward,
        torch.autograd.grad,
        len(module_hooks._global_forward_hooks),
        len(module_hooks._global_forward_pre_hooks),
        len(module_hooks._global_forward_hooks_always_called),
        len(optimizer_hooks._global_optimizer_pre_hooks),
        len(optimizer_hooks._global_optimizer_post_hooks),
        _get_current_dispatch_mode(),
        [len(p._post_accumulate_grad_hooks or ()) for p in (model.parameters() if model else ())],
    )


def test_an_exception_closes_the_ledger_and_removes_every_hook() -> None:
    model = nn.Linear(3, 3)
    with Ledger(model):
        pass  # hook dictionaries exist from now on
    before = traces(model)
    with pytest.raises(ZeroDivisionError), Ledger(model) as led:
        assert traces(model) != before
        model(torch.zeros(1, 3)).sum().backward()
        raise ZeroDivisionError
    assert traces(model) == before
    assert led.peak.total > 0
    torch.zeros(5)
    assert led.current.total == led.current.total


def test_an_exception_inside_a_module_or_a_step_does_not_confuse_the_phases() -> None:
    class Bad(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    class BadStep(torch.optim.SGD):
        def step(self, closure=None):
            raise ValueError("no")

    model = nn.Sequential(nn.Linear(3, 3), Bad())
    good = nn.Linear(2, 2)
    with Ledger(model, level="timeline") as led:
        with pytest.raises(ValueError):
            model(torch.zeros(1, 3))
        outside = torch.zeros(100)
        with pytest.raises(ValueError):
            BadStep(good.parameters(), 0.1).step()
        good(torch.zeros(1, 2))
    made = [block for block in led.current.holdings if block.bytes == 400]
    assert [(block.module, block.phase) for block in made] == [("", "forward")]
    assert any(point.phase == "forward:Linear" for point in led.timeline())
    assert len(outside) == 100


def test_a_ledger_can_be_entered_again_inside_itself_and_afterwards() -> None:
    model = nn.Linear(4, 4)
    opt = torch.optim.Adam(model.parameters())
    led = Ledger(model, opt)
    before = None
    for _ in range(3):
        with led, led:
            opt.zero_grad()
            model(torch.zeros(2, 4)).sum().backward()
            opt.step()
        before = before or traces(model)
        assert traces(model) == before
    assert led.current.by_category == {
        "parameters.trained": 80,
        "gradients": 80,
        "optimizer_state": 168,
    }
    first = led.peak.total
    with led:
        pass
    assert led.peak.total == first


def test_what_happens_between_two_entries_is_known_at_the_second() -> None:
    model = nn.Linear(4, 4)
    with Ledger(model) as led:
        pass
    model(torch.zeros(2, 4)).sum().backward()
    with led:
        assert led.current.by_category == {"parameters.trained": 80, "gradients": 80}
    model.zero_grad(set_to_none=True)
    assert led.current.by_category == {"parameters.trained": 80}


def test_nested_ledgers_count_alike_and_close_in_any_order() -> None:
    model = nn.Linear(4, 4)
    clean = traces()
    with Ledger(model) as outer:
        with Ledger(model) as inner:
            y = model(torch.zeros(2, 4))
        y.sum().backward()
        assert inner.current.total < outer.current.total + 1
    assert outer.peak.total >= inner.peak.total > 80
    first, second = Ledger(), Ledger()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    x = torch.zeros(10)
    second.__exit__(None, None, None)
    assert (first.current.total, second.current.total) == (0, 40)
    assert traces() == clean
    assert len(x) == 10


def test_another_mode_put_on_top_survives_a_ledger_that_leaves_below_it() -> None:
    class Counting(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            type(self).seen += 1
            return func(*args, **(kwargs or {}))

    led, mode = Ledger(), Counting()
    led.__enter__()
    mode.__enter__()
    led.__exit__(None, None, None)
    seen = Counting.seen
    torch.zeros(3)
    assert Counting.seen == seen + 1
    mode.__exit__(None, None, None)
    assert _get_current_dispatch_mode() is None


def test_a_ledger_held_open_by_a_generator_closes_with_it() -> None:
    clean = traces()

    def batches():
        with Ledger() as led:
            for _ in range(3):
                yield led, torch.zeros(10)

    source = batches()
    led, x = next(source)
    assert led.current.total == 40
    with Ledger() as other:
        y = torch.zeros(5)
        source.close()
        z = torch.zeros(5)
    assert (led.current.total, other.current.total) == (60, 40)
    assert traces() == clean
    assert len(x) + len(y) + len(z) == 20


def test_other_threads_are_not_disturbed_and_their_results_are_found() -> None:
    model, other = nn.Linear(4, 4), nn.Linear(6, 6)
    made: list[torch.Tensor] = []

    def work() -> None:
        for _ in range(20):
            loss = other(torch.ones(3, 6)).sum()
            loss.backward()
        made.append(torch.ones(2, 4))

    with Ledger(model, level="timeline") as led:
        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(20):
            model(torch.zeros(2, 4)).sum().backward()
        thread.join()
        model(made[0])
    assert torch.equal(other.weight.grad, torch.full((6, 6), 60.0))
    assert not any("6" in str(block.shape) for block in led.peak.holdings)
    assert led.current.by_category == {"parameters.trained": 80, "gradients": 80, "inputs": 32}
    for point in led.timeline():
        assert sum(point.by_category.values()) == point.total


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_data_loader_are_inputs(workers: int) -> None:
    model = nn.Linear(4, 4)
    data = TensorDataset(torch.randn(32, 4), torch.randn(32, 4))
    with Ledger(model) as led:
        for x, y in DataLoader(data, batch_size=8, num_workers=workers):
            F.mse_loss(model(x), y).backward()
    assert led.peak.by_category["parameters.trained"] == 80
    assert led.peak.by_category["inputs"] >= 2 * 8 * 4 * 4
    del x, y
    assert led.current.category("temporaries") == 0


def test_shared_modules_and_reused_lists_count_once_under_their_first_name() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = self.one
            self.many = nn.ModuleList([nn.Linear(4, 4)] * 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in (self.one, self.two, *self.many, *self.many):
                x = layer(x).relu()
            return x

    model = Shared()
    with Ledger(model) as led:
        model(torch.ones(2, 4)).sum().backward()
    assert led.current.by_category["parameters.trained"] == 2 * 80
    assert led.current.by_category["gradients"] == 2 * 80
    assert {"one", "many.0"} <= set(led.current.by_module()) <= {"one", "many.0", ""}


def test_tied_weights_are_one_storage() -> None:
    emb, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = emb.weight
    with Ledger(nn.Sequential(emb, head)) as led:
        pass
    assert led.current.total == 160


def test_code_without_modules_is_counted_and_its_parameters_are_recognised() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    opt = torch.optim.SGD([weight], 0.1, momentum=0.9)
    with Ledger() as led:
        (torch.ones(4, 8) @ weight).square().sum().backward()
        opt.step()
    assert led.current.by_category == {
        "parameters.trained": 256,
        "gradients": 256,
        "optimizer_state": 256,
    }


def test_a_model_that_was_not_given_is_named_by_its_class() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with Ledger() as led:
        model(torch.randn(3, 4)).sum().backward()
    assert led.current.by_category["buffers"] == 4 * 4 * 2 + 8
    assert {"Sequential.0", "Sequential.1"} <= set(led.current.by_module())


def test_a_compiled_model_falls_back_to_the_allocator_with_a_notice() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4)), backend="aot_eager")
    x = torch.randn(32, 16)
    expected = model(x).sum()
    led = Ledger(model)
    with pytest.warns(UserWarning, match="compiled"):
        led.__enter__()
    loss = model(x).sum()
    loss.backward()
    led.__exit__(None, None, None)
    assert torch.equal(loss, expected)
    assert led.peak.allocator is not None
    assert led.peak.total == led.peak.allocator == sum(led.peak.by_category.values())
    assert led.peak.by_category["parameters.trained"] == 4 * (16 * 64 + 64 + 64 * 4 + 4)


def test_no_notice_without_a_compiled_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Ledger(nn.Linear(2, 2)):
            pass


def test_reentrant_checkpoints_double_backward_and_closures_are_followed() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    opt = torch.optim.LBFGS(model.parameters(), max_iter=2)
    x = torch.randn(5, 6, requires_grad=True)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        out = checkpoint(model, x, use_reentrant=True).sum()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        loss = out + slope.square().sum()
        loss.backward()
        return loss

    with Ledger(model, opt, level="timeline") as led:
        opt.step(closure)
    phases = {point.phase.split(":")[0] for point in led.timeline()}
    assert phases == {"forward", "backward", "recompute", "optimizer"}
    assert led.current.by_category["optimizer_state"] > 0
    for point in led.timeline():
        assert sum(point.by_category.values()) == point.total
    assert led.timeline().peak().total == led.peak.total


def test_several_losses_over_one_graph_keep_what_is_still_needed() -> None:
    x = torch.randn(100, requires_grad=True)
    with Ledger(inputs=x) as led:
        y = x.exp()
        one, two = y.sum(), y.sin().sum()
        one.backward(retain_graph=True)
        assert led.current.by_category["saved_activations"] == 400
        two.backward()
        del y, one, two
        assert led.current.category("saved_activations") == 0


def test_an_optimizer_inside_the_backward_pass_is_seen() -> None:
    model = nn.Linear(16, 16, bias=False)
    opt = torch.optim.Adam(model.parameters(), foreach=False)

    def update(_: torch.Tensor) -> None:
        opt.step()
        opt.zero_grad()

    model.weight.register_post_accumulate_grad_hook(update)
    with Ledger(model, opt) as led:
        model(torch.ones(2, 16)).sum().backward()
    assert led.current.by_category == {"parameters.trained": 1024, "optimizer_state": 2 * 1024 + 4}


def test_wrapper_subclasses_are_counted_by_what_they_wrap() -> None:
    class Pair(torch.Tensor):
        @staticmethod
        def __new__(cls, a, b):
            return torch.Tensor._make_wrapper_subclass(cls, a.shape, dtype=a.dtype)

        def __init__(self, a, b):
            self.a, self.b = a, b

        def __tensor_flatten__(self):
            return ["a", "b"], None

        @staticmethod
        def __tensor_unflatten__(inner, context, size, stride):
            return Pair(inner["a"], inner["b"])

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            take = lambda name: [getattr(a, name) if isinstance(a, Pair) else a for a in args]  # noqa: E731
            return Pair(func(*take("a"), **(kwargs or {})), func(*take("b"), **(kwargs or {})))

    with Ledger() as led:
        pair = Pair(torch.zeros(10), torch.zeros(10))
        double = pair + pair
        del pair
    assert led.current.total == 80
    assert led.peak.total == 160
    assert isinstance(double, Pair)


def test_one_device_can_be_counted_alone() -> None:
    with Ledger(device="cuda") as led:
        x = torch.zeros(10)
        torch.zeros(10, device="meta")
    assert led.peak.total == 0
    assert led.peak.device == "cuda"
    assert len(x) == 10


def test_snapshots_of_two_ways_can_be_subtracted() -> None:
    def peak(size: int) -> Snapshot:
        with Ledger() as led:
            torch.zeros(size)
        return led.peak

    difference = peak(30) - peak(10)
    assert difference.total == 80
    assert difference.by_category == {"temporaries.forward": 80}


def test_a_tensors_death_after_the_ledger_itself_is_gone_is_harmless() -> None:
    with Ledger() as led:
        x = torch.zeros(10)
    del led
    del x
