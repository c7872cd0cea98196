"""The planner's trace is the real step: same bytes, same holders, nothing allocated."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memspan.base import BadInput
from memspan.ledger import AllocatorPeak, Ledger, load_factory, methods, nbytes, plan, training_step
from memspan.ledger.planner import job
from memspan.recipes.ledger.models import BERT, GPT, MLP, classify, model_cases

CASES = {case.name: case for case in model_cases()}
SINGLE = functools.partial(torch.optim.AdamW, foreach=False)


def batch_of(kind, size, values=False):
    count = torch.arange(size)
    images, labels = torch.zeros(size, 3, 32, 32), count % 4
    tokens = (torch.arange(size * 128) % 1000).view(size, 128)
    return {
        "flat": (torch.zeros(size, 256), labels),
        "image": (images, labels),
        "pixels": (images, labels.view(size, 1, 1).expand(size, 32, 32).contiguous()),
        "next": (tokens, tokens.clone()),
        "text": (tokens, labels),
    }[kind]


def gpt_figure(batch):
    return 18_473_176 + (batch - 1) * 5_880_832


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32])
def test_gpt_peak_is_the_known_straight_line_in_the_batch(size):
    p = plan(GPT, batch_of("next", size), SINGLE, loss=classify)
    assert p.total == gpt_figure(size) == sum(p.by_category.values())
    assert p.exact
    assert p.phase == "backward"  # in no module: the loss
    assert p.parameters == p.trained == 1_049_344


@pytest.mark.parametrize("size", [1, 4])
def test_gpt_real_step_lies_on_the_same_line(size):
    model = GPT()
    optimizer = SINGLE(model.parameters())
    batch = batch_of("next", size)
    training_step(model, optimizer, batch, classify)
    with Ledger(model, optimizer) as led:
        training_step(model, optimizer, batch, classify)
    assert led.peak.total == gpt_figure(size)


def test_mlp_second_step_has_the_reference_figure():
    assert plan(MLP, batch_of("flat", 64), SINGLE, loss=classify).total == 10_625_732


def _agrees_at_three_levels(name, method, size=3):
    """Trace, dispatch ledger and allocator: the first two by category, the last to 0.1 %."""
    case = CASES[name]
    batch = batch_of(case.kind, size)
    one = job(case.build, batch, method=method, loss=classify)
    try:
        model, optimizer = one.ready()
    except BadInput as error:
        pytest.skip(f"{method} refuses {name}: {error}")
    model.train()
    one.step(model, optimizer, batch)
    with Ledger(model, optimizer, inputs=batch, allocator=True) as led:
        one.step(model, optimizer, batch)
    traced, counted = one.trace(size), led.peak
    held = {key: size for key, size in counted.by_category.items() if key != "unattributed"}
    assert traced.exact
    assert (traced.by_category, traced.phase) == (held, counted.phase)
    assert counted.ratio == pytest.approx(1, abs=1e-3), counted.by_category


@pytest.mark.parametrize("method", [(), *methods()])
@pytest.mark.parametrize(
    "name", ["MLP", "CNN", "GPT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("BERT", "U-Net"))]
)
def test_trace_ledger_and_allocator_agree_for_every_method(name, method):
    _agrees_at_three_levels(name, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", [(), *methods()])
def test_trace_ledger_and_allocator_agree_on_efficientnet(method):
    _agrees_at_three_levels("EfficientNet-Lite0", method, size=2)  # its 16-bit convolutions are slow


@pytest.mark.parametrize("maker", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("foreach", [False, True])
def test_optimizers_and_accumulation_are_traced_as_they_run(maker, foreach):
    optimizer = functools.partial(maker, lr=0.01, foreach=foreach)
    one = job(MLP, batch_of("flat", 16), optimizer, loss=classify, accumulate=2)
    assert one.trace(16).by_category == one.measure(16).by_category


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.l1_loss, F.huber_loss])
def test_losses_that_keep_more_than_their_number_are_traced_so(loss):
    batch = (torch.zeros(32, 40), torch.ones(32, 30))
    one = job(functools.partial(nn.Linear, 40, 30), batch, loss=loss)
    assert one.trace(32).by_category == one.measure(32).by_category


def test_binary_cross_entropy_is_traced_as_it_runs():
    batch = (torch.zeros(32, 40), torch.ones(32, 30))
    for loss in (F.binary_cross_entropy_with_logits, lambda y, t: F.binary_cross_entropy(y.sigmoid(), t)):
        one = job(functools.partial(nn.Linear, 40, 30), batch, loss=loss)
        assert one.trace(32).by_category == one.measure(32).by_category


def _conversions():
    return {
        "to": lambda model: model.to(torch.bfloat16),
        "half": lambda model: model.half(),
        "double": lambda model: model.double(),
        "to the device where it is": lambda model: model.to("cpu"),
    }


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.norm(self.other(self.one(x)))


@pytest.mark.parametrize("name", list(_conversions()))
def test_a_builder_that_converts_its_model_is_planned_as_it_runs(name):
    convert = _conversions()[name]
    x = convert(nn.Linear(1, 1)).weight.new_zeros(8, 16)
    one = job(lambda: convert(_Tied()), x, loss=lambda y, _: y.sum())
    assert one.trace(8).by_category == one.measure(8).by_category
    assert len({id(p) for p in one.ready()[0].parameters()}) == 5


def test_compiled_models_are_traced_as_they_run_uncompiled_and_never_called_exact():
    def compiled_call():
        model = _Tied()
        model.compile()
        return model

    x = torch.zeros(8, 16)
    plain = plan(_Tied, x, loss=lambda y, _: y.sum())
    for build in (lambda: torch.compile(_Tied()), compiled_call):
        p = plan(build, x, loss=lambda y, _: y.sum())
        assert (p.total, p.exact) == (plain.total, False)
        assert "uncompiled" in p.note


@pytest.mark.parametrize("maker", [torch.optim.Adafactor, torch.optim.NAdam, torch.optim.Rprop])
def test_an_optimizer_that_reads_numbers_is_traced_all_the_same(maker):
    one = job(MLP, batch_of("flat", 4), maker, loss=classify)
    assert one.trace(4).by_category == one.measure(4).by_category


class _Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.body = kind(12, 16, **options)
        self.head = nn.Linear(16 * (1 + options.get("bidirectional", False)), 4)

    def forward(self, x):
        return self.head(self.body(x)[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.LSTM, {"batch_first": True}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True, "dropout": 0.1}),
        (nn.GRU, {"batch_first": True}),
        (nn.RNN, {"nonlinearity": "relu"}),
    ],
)
def test_recurrent_networks_are_planned_to_the_byte(kind, options):
    build = functools.partial(_Recurrent, kind, **options)
    one = job(build, torch.zeros(6, 20, 12), loss=lambda y, _: y.sum())
    model, optimizer = one.ready()
    one.step(model, optimizer, one.batch)
    with Ledger(model, optimizer, inputs=one.batch, allocator=True) as led:
        one.step(model, optimizer, one.batch)
    p = one.trace(6)
    assert p.exact
    assert p.total == led.peak.allocator


def _wide():
    return nn.Sequential(nn.Linear(2**18, 2**17), nn.ReLU(), nn.Linear(2**17, 2**18))


def test_a_model_of_69_billion_parameters_is_planned_without_its_bytes():
    with AllocatorPeak("cpu") as truth:
        p = plan(_wide, torch.zeros(1, 2**18), SINGLE, loss=lambda y, _: y.mean())
    assert p.parameters > 68e9
    assert p.total > 16 * p.parameters
    assert truth.peak < 16 * 2**20  # the example batch is 1 MiB


def test_a_module_that_exists_is_planned_and_left_alone():
    model = nn.Sequential(nn.Linear(20, 20), nn.BatchNorm1d(20))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = (torch.randn(6, 20), torch.zeros(6, 20))
    p = plan(model, batch, loss=F.mse_loss, method="linear_probe")
    assert p.trained == 420
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_planning_draws_no_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    plan(BERT, batch_of("text", 2), loss=classify)
    assert torch.equal(torch.rand(4), expected)


class _Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embedding(input_ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def test_a_batch_may_be_named_and_the_loss_come_from_the_model():
    ids = torch.zeros(3, 7, dtype=torch.long)
    p = plan(_Named, {"input_ids": ids, "labels": ids.clone()})
    assert p.by_category["inputs"] == nbytes([ids, ids.clone()])
    same = plan(
        _Named,
        {"input_ids": ids, "target": ids.clone()},
        loss=lambda out, batch: F.cross_entropy(out["logits"].flatten(0, 1), batch["target"].flatten()),
    )
    assert same.total == p.total


def test_a_tuple_output_gives_its_first_entry_as_the_loss():
    class Model(nn.Linear):
        def forward(self, x, target):
            y = super().forward(x)
            return F.mse_loss(y, target), y

    assert plan(lambda: Model(4, 4), (torch.zeros(2, 4), torch.zeros(2, 4))).exact


class _Ragged(nn.Module):
    """Keeps only positive rows: the shape depends on values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x):
        y = self.layer(x)
        return y[x[:, 0] > 0].square().sum()


def test_shapes_that_depend_on_values_are_run_for_real_only_where_that_is_asked_for():
    x = torch.ones(64, 16)
    with pytest.raises(BadInput, match=r"real=None: shapes depend on values .* give real='2GiB'"):
        plan(_Ragged, x)
    for little, why in (("1KiB", "weights, gradients and two moments alone"), ("6KiB", "examples take")):
        with pytest.raises(BadInput, match=f"real=.*{why}"):
            plan(_Ragged, x, real=little)
    p = plan(_Ragged, x, real="1MiB")
    assert not p.exact
    assert "straight line" in p.note
    truth = job(_Ragged, x).measure(64)
    assert p.total == pytest.approx(truth.total, rel=0.05)
    assert sum(p.by_category.values()) == p.total


def test_shapes_that_depend_on_values_need_a_batch_with_values():
    with pytest.raises(BadInput, match=r"batch=.*run for real.*hold values"):
        plan(_Ragged, torch.empty(8, 16, device="meta"), real="1MiB")


def test_a_batch_on_meta_is_enough_for_a_trace():
    real, meta = batch_of("flat", 8), tuple(t.to("meta") for t in batch_of("flat", 8))
    assert plan(MLP, meta, loss=classify).total == plan(MLP, real, loss=classify).total


def test_a_constructor_that_looks_at_values_is_built_for_real():
    class Model(nn.Linear):
        def __init__(self):
            super().__init__(8, 8)
            self.scale = float(self.weight.abs().max())

    p = plan(Model, torch.zeros(4, 8), loss=lambda y, _: y.sum())
    assert p.exact
    assert "built for real" in p.note


@pytest.mark.skipif(torch.cuda.is_available(), reason="without CUDA alone")
def test_cuda_without_cuda_is_an_estimate_with_its_rules_named():
    on_cpu, on_cuda = (plan(BERT, batch_of("text", 4), loss=classify, device=d) for d in ("cpu", "cuda"))
    assert not on_cuda.exact
    assert "cuBLAS" in on_cuda.note
    assert on_cuda.total % 512 == 0
    kept = [p.snapshot.category("saved_activations") for p in (on_cpu, on_cuda)]
    assert kept[1] < kept[0]  # masks of one byte
    mlp = plan(MLP, batch_of("flat", 8), loss=classify, device="cuda")
    assert mlp.by_category["temporaries.optimizer"] > 0.9 * 4 * mlp.parameters  # multi-tensor path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": None}, "batch=None: a plan needs example inputs"),
        ({"batch": "text"}, "batch='text': give example inputs"),
        ({"batch": torch.zeros(0, 4)}, "at least one example"),
        ({"method": "chekpoint"}, "method='chekpoint': did you mean checkpoint"),
        ({"method": ["bitfit", "lora"]}, "do not combine"),
        ({"method": ["autocast", "autocast"]}, "name each method once"),
        ({"device": "tpu"}, "device='tpu': plan for"),
        ({"world": 0}, "world=0: give the number of ranks"),
        ({"optimizer": 3}, "optimizer=3: give an optimizer class"),
        ({"accumulate": 0}, "accumulate=0: give the number"),
        ({"loss": None}, "loss=None: the model returned Tensor of shape .2, 4., which holds no loss"),
        ({"loss": lambda y, _: y}, "that returns one number"),
        ({"build_model": 7}, "build_model=7: give a function"),
    ],
)
def test_bad_input_is_refused_with_the_argument_and_a_remedy(change, message):
    given = {
        "build_model": lambda: nn.Linear(4, 4),
        "batch": torch.zeros(2, 4),
        "loss": lambda y, _: y.sum(),
        **change,
    }
    with pytest.raises(BadInput, match=message):
        plan(**given)


def test_a_factory_is_read_from_the_users_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "def small():\n    return (lambda: nn.Linear(4, 4)), torch.zeros(2, 4), (lambda y, _: y.sum())\n"
        "def wrong():\n    return 3\n"
    )
    made = load_factory(f"{file}:small")
    assert plan(made.build_model, made.batch, loss=made.loss).parameters == 20
    for where, message in {
        f"{file}:absent": "has no function absent; it has: small, wrong",
        f"{file}:wrong": "but it returned int",
        f"{tmp_path}/none.py:small": "there is no file",
        "resnet50": "write path/to/file.py:function",
    }.items():
        with pytest.raises(BadInput, match=message):
            load_factory(where)


def test_the_advice_names_what_holds_the_peak():
    assert "recompute" in plan(GPT, batch_of("next", 8), loss=classify).advice
    assert "moments" in plan(MLP, batch_of("flat", 1), loss=classify).advice
    assert plan(MLP, batch_of("flat", 1), loss=classify).fits("12MB")
