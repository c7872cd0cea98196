"""The liquid against a plain loop and two libraries; the aligner and its refusals."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from memspan.base import BadInput
from memspan.hardware import (
    LiquidStateMachine,
    LSMTransformer,
    ResistiveDevice,
    ZeroShotAligner,
    cross_modal_retrieval,
    multi_positive_contrastive,
)


def loop(x, w_in, w_rec, decay, threshold):
    """Spikes by the equation, one number at a time."""
    T, B, _ = x.shape
    n = w_in.shape[1]
    u, s = np.zeros((B, n)), np.zeros((B, n))
    out = np.zeros((T, B, n))
    for t in range(T):
        u = decay * u * (1 - s) + x[t] @ w_in + s @ w_rec
        s = (u >= threshold).astype(float)
        out[t] = s
    return out


@pytest.mark.parametrize("case", range(20))
def test_every_spike_is_that_of_a_plain_loop(case):
    draws = np.random.default_rng(case)
    x = (draws.random((15, 3, 7)) < 0.3).astype(float)
    w_in, w_rec = draws.normal(size=(7, 11)), 0.4 * draws.normal(size=(11, 11))
    decay = draws.random()
    lsm = LiquidStateMachine(torch.from_numpy(w_in), torch.from_numpy(w_rec), decay, 1.3)
    found = lsm.spikes(torch.from_numpy(x)).numpy()
    assert np.array_equal(found, loop(x, w_in, w_rec, decay, 1.3))
    scaled = LiquidStateMachine(torch.from_numpy(4 * w_in), torch.from_numpy(4 * w_rec), decay, 5.2)
    assert np.array_equal(found, scaled.spikes(torch.from_numpy(x)).numpy())


def test_special_cases():
    x = (torch.rand(20, 2, 5) < 0.4).float()
    w, zero = torch.rand(5, 6), torch.zeros(6, 6)
    assert LiquidStateMachine(w, zero, 0.9, math.inf)(x).sum() == 0
    memoryless = LiquidStateMachine(w, zero, 0.0, 1.0)(x)
    assert torch.equal(memoryless, ((x @ w) >= 1.0).float().sum(0))
    drive = LiquidStateMachine(torch.tensor([[0.3]]), torch.zeros(1, 1), 1.0, 1.0)
    fired = drive.spikes(torch.ones(12, 1, 1)).flatten().tolist()
    assert fired == [0, 0, 0, 1] * 3


def test_two_streams_that_agree_later_meet():
    w, decay = 0.01 * torch.rand(5, 6, dtype=torch.float64), 0.8
    from memspan.nn.spiking import lif_step

    a, b = torch.rand(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    first = (a - b).abs().max()
    for _ in range(10):
        current = torch.ones(5, dtype=torch.float64) @ w
        (_, a), (_, b) = (lif_step(current, v, decay, math.inf, "zero") for v in (a, b))
    torch.testing.assert_close((a - b).abs().max(), first * decay**10)


@pytest.mark.peers
def test_libraries_give_the_same_spikes():
    snn = pytest.importorskip("snntorch", reason="pip install 'memspan[peers]'")
    x = (torch.rand(40, 3, 5) < 0.4).float()
    w = torch.randn(5, 9)
    ours = LiquidStateMachine(w, torch.zeros(9, 9), 0.9, 1.1).spikes(x)
    for delay in (True, False):
        leaky = snn.Leaky(
            beta=0.9, threshold=1.1, reset_mechanism="zero", reset_delay=delay, init_hidden=True
        )
        assert torch.equal(torch.stack([leaky(now @ w) for now in x]), ours)
    neuron = pytest.importorskip(
        "spikingjelly.activation_based.neuron", reason="pip install --no-deps -r requirements-peers-alone.txt"
    )
    node = neuron.LIFNode(tau=10.0, decay_input=False, v_threshold=1.1, v_reset=0.0)
    assert torch.equal(torch.stack([node(now @ w) for now in x]), ours)


def test_features_have_their_shapes_and_sums():
    x = (torch.rand(31, 4, 8) < 0.2).float()
    made = {
        name: LiquidStateMachine.random(8, 20, const=0.3, features=name, device=ResistiveDevice(read_noise=0))
        for name in ("count", "binned:3", "trace")
    }
    count, binned, trace = (made[name](x) for name in made)
    assert binned.shape == (4, 60)
    assert torch.equal(binned.reshape(4, 3, 20).sum(1), count)
    assert bool((trace <= count).all())
    assert made["count"].spectral_radius() > 0


def test_calibrating_reaches_the_rate_or_says_so():
    x = (torch.rand(40, 6, 8) < 0.2).float()
    lsm = LiquidStateMachine.random(8, 50, const=1e-3, device=ResistiveDevice(read_noise=0))
    assert lsm.firing_rate(x) < 0.005
    assert lsm.calibrate_(x, 0.1).firing_rate(x) == pytest.approx(0.1, abs=0.03)
    with pytest.raises(BadInput, match="rate"):
        lsm.calibrate_(torch.zeros(40, 6, 8), 0.1)


def test_order_changes_counts():
    x = (torch.rand(60, 16, 8) < 0.2).float()
    lsm = LiquidStateMachine.random(8, 50, const=0.3, device=ResistiveDevice(read_noise=0))
    assert not torch.equal(lsm(x), lsm(x.flip(0)))


def test_in_a_scikit_learn_pipeline():
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    draws = np.random.default_rng(0)
    y = np.arange(60) % 2
    X = (draws.random((60, 20, 8)) < np.where(y == 1, 0.4, 0.1)[:, None, None]).astype(np.uint8)
    pipe = make_pipeline(LSMTransformer(30, const=0.3), LogisticRegression(max_iter=500)).fit(X, y)
    assert pipe.score(X, y) > 0.9
    assert clone(pipe[0]).get_params()["const"] == 0.3
    one, two = (LSMTransformer(30, seed=s).fit(X).liquid_.w_in.weight for s in (0, 1))
    assert not torch.equal(one, two)


def test_the_contrastive_loss():
    torch.manual_seed(0)
    za, zb = (nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1) for _ in range(2))
    distinct = torch.arange(6)
    logits = za @ zb.T / 0.1
    symmetric = (
        nn.functional.cross_entropy(logits, distinct) + nn.functional.cross_entropy(logits.T, distinct)
    ) / 2
    torch.testing.assert_close(multi_positive_contrastive(za, zb, distinct, distinct), symmetric)
    one = torch.zeros(6, dtype=torch.long)
    same = za[:1].expand(6, -1)
    assert multi_positive_contrastive(same, same, one, one).item() == pytest.approx(math.log(6))
    ya, yb = torch.tensor([0, 1, 1, 2, 3, 9]), torch.tensor([1, 0, 5, 5, 3, 3])
    loss = multi_positive_contrastive(za, zb, ya, yb)
    assert torch.isfinite(loss)
    order = torch.randperm(6)
    torch.testing.assert_close(loss, multi_positive_contrastive(za[order], zb, ya[order], yb))
    none = multi_positive_contrastive(za, zb, ya, yb + 50)
    assert none.item() == 0
    assert torch.autograd.gradcheck(
        lambda a, b: multi_positive_contrastive(a, b, ya, yb), (za.requires_grad_(), zb.requires_grad_())
    )


def test_random_embeddings_are_at_chance():
    torch.manual_seed(0)
    y = torch.arange(4000) % 4
    za, zb = (nn.functional.normalize(torch.randn(4000, 16), dim=1) for _ in range(2))
    assert cross_modal_retrieval(za, zb, y, y) == pytest.approx(0.25, abs=3 * math.sqrt(0.25 * 0.75 / 4000))


def shared(permute=False):
    """Two views of ten classes without common structure: seen classes align, unseen ones cannot."""
    torch.manual_seed(0)
    y = torch.arange(400) % 10
    views = [torch.randn(10, 24)[y] + 0.3 * torch.randn(400, 24) for _ in range(2)]
    other = (y + 1) % 8 if permute else y
    return y, views, other


def test_seen_classes_align_and_permuted_ones_as_well_but_unseen_ones_do_not():
    scores = {}
    for permute in (False, True):
        y, (a, b), other = shared(permute)
        seen = y < 8
        yb = torch.where(seen, other, y)
        aligner = ZeroShotAligner((24, 24), dim=16).fit(a[seen], y[seen], b[seen], yb[seen], steps=150)
        scores[permute] = (
            aligner.score(a[seen], y[seen], b[seen], yb[seen])[0],
            aligner.score(a[~seen], y[~seen], b[~seen], y[~seen])[0],
        )
    assert min(scores[False][0], scores[True][0]) > 0.9
    with pytest.raises(BadInput, match="as many test items"):
        aligner.score(a[:25], y[:25], b, y)
    with pytest.raises(BadInput, match="same classes"):
        aligner.fit(a, y, b[y < 9], y[y < 9])
    assert torch.equal(
        ZeroShotAligner((4, 4), seed=3).heads[0].linear.weight,
        ZeroShotAligner((4, 4), seed=3).heads[0].linear.weight,
    )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: LiquidStateMachine(torch.ones(2, 3), torch.ones(2, 2)), "w_rec"),
        (lambda: LiquidStateMachine(torch.ones(2, 3), torch.ones(3, 3), 1.1), "decay"),
        (lambda: LiquidStateMachine(torch.ones(2, 3), torch.ones(3, 3), 0.9, 0.0), "v_threshold"),
        (lambda: LiquidStateMachine(torch.ones(2, 3), torch.ones(3, 3), features="sum"), "features"),
        (lambda: LiquidStateMachine.random(2, 3)(torch.zeros(0, 1, 2)), "x="),
        (lambda: LiquidStateMachine.random(2, 3)(0.5 * torch.ones(4, 1, 2)), "0 or 1"),
        (lambda: LSMTransformer().fit(np.zeros((3, 4))), "X="),
        (lambda: LSMTransformer().set_params(width=3), "params"),
        (lambda: multi_positive_contrastive(*(torch.ones(1, 1),) * 4, 0.0), "temperature"),
        (lambda: cross_modal_retrieval(*(torch.full((1, 2), float("nan")),) * 4), "NaN"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, match):
    with pytest.raises(BadInput, match=match):
        call()
