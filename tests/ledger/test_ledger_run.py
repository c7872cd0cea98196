"""The ledger on real steps: exact figures, the allocator's truth, conservation, categories, phases."""

import contextlib
import gc
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memspan.base import BadInput
from memspan.ledger import CATEGORIES, AllocatorPeak, Ledger, Snapshot
from memspan.ledger.corrections import corrected
from memspan.ledger.workspaces import workspace_bytes


class Block(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.qkv, self.proj = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ln2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class GPT(nn.Module):
    def __init__(
        self, words: int = 1000, d: int = 128, layers: int = 4, heads: int = 4, again: bool = False
    ) -> None:
        super().__init__()
        self.emb = nn.Embedding(words, d)
        self.blocks = nn.ModuleList(Block(d, heads) for _ in range(layers))
        self.ln, self.head, self.again = nn.LayerNorm(d), nn.Linear(d, words, bias=False), again

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.emb(tokens)
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
                if self.again
                else block(x)
            )
        return self.head(self.ln(x))


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.LayerNorm(256), nn.Linear(256, 10)
    )


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def make(kind: str, batch: int = 4):
    """A model and a function from the model to its loss; inputs are made here and held by the function."""
    if kind == "mlp":
        model, x, y = mlp(), torch.randn(64, 256), torch.randint(0, 10, (64,))
    elif kind == "cnn":
        model, x, y = cnn(), torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    else:
        model = GPT(again=kind == "checkpointed")
        x, y = torch.randint(0, 1000, (batch, 128)), torch.randint(0, 1000, (batch * 128,))
    return model, lambda: F.cross_entropy(model(x).flatten(0, -2), y), (x, y)


def run(loss, opt, times: int = 1, cast: bool = False) -> None:
    opt.zero_grad(set_to_none=True)
    for _ in range(times):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            value = loss()
        value.backward()
    opt.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, foreach=False),
    "adam": lambda p: torch.optim.AdamW(p, foreach=False),
    "adam foreach": lambda p: torch.optim.AdamW(p, foreach=True),
}
WAYS = {"plain": {}, "accumulate": {"times": 3}, "bf16": {"cast": True}}


def test_the_mlp_holds_exactly_what_the_reference_run_held() -> None:
    model, loss, inputs = make("mlp")
    opt = OPTIMIZERS["adam"](model.parameters())
    run(loss, opt)
    opt.zero_grad(set_to_none=True)
    with Ledger(model, opt, inputs=inputs, allocator=True) as led:
        run(loss, opt)
    peak = led.peak
    assert peak.attributed == 10_625_732
    assert peak.phase == "optimizer"
    assert abs(peak.allocator - peak.attributed) <= 64


@pytest.mark.parametrize("fake", [True, False])
def test_the_gpt_holds_exactly_the_affine_figure_real_and_fake(fake: bool) -> None:
    for batch in (1, 4):
        with FakeTensorMode() if fake else contextlib.nullcontext():
            model, loss, _ = make("gpt", batch)
            opt = OPTIMIZERS["adam"](model.parameters())
            run(loss, opt)
            with Ledger(model, opt) as led:
                run(loss, opt)
        assert sum(p.numel() for p in model.parameters()) == 1_049_344
        assert led.peak.total == 18_473_176 + (batch - 1) * 5_880_832
        assert led.peak.phase == "backward"
        top = max(led.peak.holdings, key=lambda block: block.bytes * block.category.startswith("temp"))
        assert "nll_loss_backward" in top.operator or "softmax" in top.operator


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("kind", ["mlp", "cnn", "gpt", "checkpointed"])
def test_the_ledger_agrees_with_the_allocator_and_with_the_fake_trace(
    kind: str, optimizer: str, way: str
) -> None:
    totals = []
    for fake in (False, True):
        with contextlib.ExitStack() as modes:
            if fake:
                modes.enter_context(FakeTensorMode())
                modes.enter_context(corrected("cpu", "cpu"))
            model, loss, inputs = make(kind)
            opt = OPTIMIZERS[optimizer](model.parameters())
            run(loss, opt, **WAYS[way])
            with Ledger(model, opt, inputs=inputs, allocator=not fake) as led:
                run(loss, opt, **WAYS[way])
        totals.append(led.peak.attributed)
        if not fake:
            assert led.peak.ratio == pytest.approx(1, abs=1e-3), led.peak.by_category
            assert led.peak.total == led.peak.allocator == sum(led.peak.by_category.values())
    assert totals[0] == totals[1]


def test_what_the_allocator_alone_saw_is_reported_as_unattributed() -> None:
    with Ledger(allocator=True) as led:
        led._tracker.paused += 1
        hidden = torch.zeros(1000)
        led._tracker.paused -= 1
        seen = torch.zeros(10)
    assert led.peak.by_category == {"temporaries.forward": 40, "unattributed": 4000}
    assert led.peak.by_module() == {"(unattributed)": 4000, "": 40}
    assert len(hidden) > len(seen)


def test_the_allocators_peak_counts_releases_and_what_was_alive_before() -> None:
    with AllocatorPeak("cpu", before=100) as truth:
        a = torch.zeros(250)
        b = a + 1
        del a
        b = b * 2
    assert truth.growth == 1000
    assert 2100 <= truth.peak <= 2116  # a Python number becomes a tensor of a few bytes
    assert len(b) == 250


@pytest.mark.parametrize("kind", ["mlp", "cnn", "gpt", "checkpointed"])
def test_categories_and_modules_sum_to_the_total_at_every_point(kind: str) -> None:
    model, loss, inputs = make(kind, 2)
    opt = OPTIMIZERS["adam"](model.parameters())
    stores = {"replay": [torch.zeros(7), torch.zeros(9)], "cache": bytearray(55)}
    with Ledger(model, opt, level="timeline", stores=stores, inputs=inputs) as led:
        run(loss, opt)
        led.mark("second")
        stores["replay"].append(torch.zeros(3))
        run(loss, opt)
    line = led.timeline(modules=2)
    assert len(line) > 150
    assert line.dropped == 0
    for point in line:
        assert sum(point.by_category.values()) == sum(point.by_module.values()) == point.total
        assert all(n > 0 for n in point.by_category.values())
    assert line.peak().total == led.peak.total
    assert line.peak().by_category == led.peak.by_category
    assert sum(led.peak.by_module(1).values()) == led.peak.total
    assert [name for _, name in line.marks] == ["second"]
    keys = {category.split(".")[0] for point in line for category in point.by_category}
    assert keys <= {category.split(".")[0] for category in CATEGORIES}
    assert line[-1].total == led.current.total


def test_peak_and_timeline_levels_find_the_same_peak() -> None:
    found = []
    for level in ("peak", "timeline"):
        torch.manual_seed(0)
        model, loss, inputs = make("cnn")
        opt = OPTIMIZERS["adam"](model.parameters())
        with Ledger(model, opt, level=level, inputs=inputs) as led:
            run(loss, opt)
        found.append((led.peak.total, led.peak.by_category, led.peak.by_module(), led.peak.phase))
    assert found[0] == found[1]


@pytest.mark.parametrize("foreach", [False, True])
def test_optimizer_state_and_optimizer_temporaries_are_named_apart(foreach: bool) -> None:
    model, loss, inputs = make("mlp")
    opt = torch.optim.Adam(model.parameters(), foreach=foreach)
    with Ledger(model, opt, inputs=inputs) as led:
        run(loss, opt)
        led.mark("second")
        run(loss, opt)
    psi = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    count = len(list(model.parameters()))
    assert led.current.by_category["optimizer_state"] == 2 * 4 * psi + 4 * count
    second = led.peak_of("second")
    assert second.phase == "optimizer"
    temporaries = second.by_category["temporaries.optimizer"]
    expected = 4 * psi if foreach else 2 * 4 * largest
    assert expected <= temporaries <= expected * 1.01
    assert (
        led.peak_of("").by_category["optimizer_state"] == 2 * 4 * psi + 4 * count
    )  # known only after the step


def test_gradients_saved_activations_and_inputs_are_told_apart() -> None:
    model, loss, inputs = make("mlp")
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with Ledger(model, opt, inputs=inputs, level="timeline") as led:
        value = loss()
        middle = led.current.by_category
        value.backward()
        del value
        end = led.current.by_category
    bytes_of_parameters = 4 * sum(p.numel() for p in model.parameters())
    held = sum(x.numel() * x.element_size() for x in inputs)
    # what the graph keeps, less the input, and the targets that the loss keeps
    assert middle["saved_activations"] == 724_484 - held
    assert middle["inputs"] == held
    assert end == {
        "parameters.trained": bytes_of_parameters,
        "gradients": bytes_of_parameters,
        "inputs": held,
    }


def test_frozen_parameters_and_buffers_have_their_own_categories() -> None:
    model = cnn()
    model[0].requires_grad_(False)
    with Ledger(model) as led:
        pass
    frozen = 4 * sum(p.numel() for p in model[0].parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert led.current.by_category["parameters.frozen"] == frozen
    assert led.current.by_category["buffers"] == buffers


def test_phases_name_the_module_in_forward_backward_and_recomputation() -> None:
    model, loss, _ = make("checkpointed", 1)
    opt = OPTIMIZERS["sgd"](model.parameters())
    with Ledger(model, opt, level="timeline") as led:
        run(loss, opt)
    phases = {point.phase for point in led.timeline()}
    for expected in (
        "forward:blocks.2.up",
        "recompute:blocks.2.up",
        "backward:head",
        "forward:emb",
        "optimizer",
    ):
        assert expected in phases
    assert set(led.phase_peaks()) == {"forward", "backward", "recompute", "optimizer"}
    plain, loss, _ = make("gpt", 1)
    with Ledger(plain, level="timeline") as led:
        loss().backward()
    phases = {point.phase for point in led.timeline()}
    assert {"backward:blocks.3.up", "backward:blocks.0.qkv", "backward:emb"} <= phases
    assert not any(phase.startswith("recompute") for phase in phases)
    first = {}
    for point in led.timeline():
        first.setdefault(point.phase, point.event)
    assert first["backward:blocks.3.up"] < first["backward:blocks.0.up"]


def test_checkpointing_keeps_less_and_what_it_recomputes_counts_as_saved() -> None:
    peaks = {}
    for kind in ("gpt", "checkpointed"):
        model, loss, inputs = make(kind, 4)
        with Ledger(model, inputs=inputs) as led:
            value = loss()
            kept = led.current.category("saved_activations")
            value.backward()
            del value
        peaks[kind] = (led.peak.total, kept)
    assert peaks["checkpointed"][0] < 0.6 * peaks["gpt"][0]
    assert peaks["checkpointed"][1] < 0.5 * peaks["gpt"][1]


def test_everything_released_brings_the_ledger_back_to_its_start() -> None:
    model, loss, inputs = make("cnn")
    opt = OPTIMIZERS["adam"](model.parameters())
    with Ledger(model, opt, inputs=inputs) as led:
        start = led.current.total
        run(loss, opt)
        grown = led.current.total
        opt.zero_grad(set_to_none=True)
        opt.state.clear()
        gc.collect()
        assert led.current.total == start < grown
    del model, loss, opt, inputs
    gc.collect()
    assert led.current.total == 0
    assert led.current.holdings == ()


def test_two_hundred_steps_without_the_collector_grow_nothing() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(8, 2))
    opt = torch.optim.AdamW(model.parameters())
    x = torch.randn(4, 8)
    gc.collect()
    gc.disable()
    try:
        with Ledger(model, opt) as led:
            seen, objects = [], []
            for _ in range(200):
                opt.zero_grad(set_to_none=True)
                weight.exp().exp().sum().backward()
                weight.grad = None
                model(x).sum().backward()
                opt.step()
                seen.append((led._book.total, len(led._book.live)))
                if len(seen) in (50, 200):
                    objects.append(len(gc.get_objects()))
    finally:
        gc.enable()
    assert seen[1] == seen[-1]
    assert objects[1] - objects[0] <= 150 + 10  # the 150 entries of ``seen``


@pytest.mark.parametrize("kind", ["mlp", "cnn", "checkpointed"])
@pytest.mark.parametrize("level", ["peak", "timeline"])
def test_counting_changes_no_bit_of_losses_gradients_or_random_state(kind: str, level: str) -> None:
    outcomes = []
    for counted in (False, True):
        torch.manual_seed(3)
        random.seed(3)
        model, loss, _ = make(kind, 2)
        opt = OPTIMIZERS["adam"](model.parameters())
        values = []
        with Ledger(model, opt, level=level) if counted else contextlib.nullcontext():
            for _ in range(3):
                opt.zero_grad()
                value = loss()
                value.backward()
                opt.step()
                values.append(value.detach())
        grads = [p.grad for p in model.parameters()]
        outcomes.append((values, grads, list(model.parameters()), [torch.get_rng_state()]))
    for plain, counted in zip(*outcomes, strict=True):
        for a, b in zip(plain, counted, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("counted", [False, True])
def test_overwriting_a_saved_tensor_still_raises(counted: bool) -> None:
    x = torch.randn(8, requires_grad=True)
    with Ledger() if counted else contextlib.nullcontext():
        y = x.exp()
        loss = y.sum()
        y.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = x.sin().sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_views_and_in_place_operations_add_nothing() -> None:
    with Ledger() as led:
        x = torch.zeros(100)
        y = x.view(10, 10).t()[2:].unsqueeze(0).expand(4, 8, 10)
        x.add_(1)
        assert led.current.total == 400
        del x
        assert led.current.total == 400
        del y
        assert led.current.total == 0
    assert led.peak.total == 400


def test_resizing_a_storage_is_followed_both_ways() -> None:
    with Ledger() as led:
        x = torch.zeros(100)
        x.untyped_storage().resize_(0)
        assert led.current.total == 0
        x.untyped_storage().resize_(800)
        assert led.current.total == 800
        x.resize_(50)
        assert led.current.total == 800
        y = torch.empty(0)
        torch.add(torch.ones(25), 1, out=y)
        assert led.current.total == 900
    assert led.peak.total == 1000


def test_marks_give_each_section_its_own_peak() -> None:
    with Ledger() as led:
        a = torch.zeros(1000)
        del a
        led.mark("small")
        b = torch.zeros(10)
        led.mark("both")
        c = torch.zeros(20)
    assert (led.peak_of("").total, led.peak_of("small").total, led.peak_of("both").total) == (4000, 40, 120)
    assert led.peak.total == 4000
    assert led.diff(led.peak_of("both")).total == 3880
    assert len(b) < len(c)
    with pytest.raises(BadInput, match="small"):
        led.peak_of("big")


def test_a_budget_is_asserted_with_the_holders_named() -> None:
    with Ledger() as led:
        x = torch.zeros(1024)
    led.assert_below("4KiB")
    with pytest.raises(AssertionError, match=r"temporaries.forward +4,096"):
        led.assert_below("4kB")
    with pytest.raises(BadInput, match="GiB"):
        led.assert_below("4 parsecs")
    assert len(x) == 1024


def test_the_ring_buffer_keeps_the_latest_events_and_true_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memspan.ledger.tracker._EVENTS", 50)
    with Ledger(level="timeline") as led:
        held = [torch.zeros(4) for _ in range(100)]
    line = led.timeline()
    assert len(line) == 50
    assert line.dropped == 50
    assert [point.total for point in line] == [16 * n for n in range(51, 101)]
    assert led.peak.total == 1600 == 16 * len(held)


def test_bad_input_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="level"):
        Ledger(level="all")
    with pytest.raises(BadInput, match="to_empty"):
        Ledger(nn.Linear(2, 2, device="meta"))
    with pytest.raises(BadInput, match="model"):
        Ledger(3)
    with pytest.raises(BadInput, match="optimizer"):
        Ledger(nn.Linear(2, 2), [3])
    with pytest.raises(BadInput, match="category"):
        Ledger().track(torch.zeros(2), "fudge")
    with pytest.raises(BadInput, match="timeline"):
        Ledger().timeline()
    with pytest.raises(BadInput, match="device"):
        AllocatorPeak("xla")


def test_an_empty_ledger_answers_with_nothing() -> None:
    with Ledger() as led:
        pass
    assert isinstance(led.peak, Snapshot)
    assert led.current.total == 0 == len(led.current.holdings)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_blocks_are_rounded_and_agree_with_the_allocator() -> None:
    model = mlp().cuda()
    opt = torch.optim.AdamW(model.parameters())
    x, y = torch.randn(64, 256, device="cuda"), torch.randint(0, 10, (64,), device="cuda")

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    run(loss, opt)
    with Ledger(model, opt, inputs=(x, y), allocator=True) as led:
        run(loss, opt)
    assert all(block.bytes % 512 == 0 for block in led.peak.holdings)
    kept = workspace_bytes({(False, True), (True, False)}, torch.cuda.get_device_capability())
    assert led.peak.attributed + kept == pytest.approx(led.peak.allocator, rel=0.02)
