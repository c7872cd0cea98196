"""Memory, models and PRES against references: a wrong order of work, a leak, a lost gradient are seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from memspan.banks.temporal import (
    APAN,
    JODIE,
    PRES,
    TGN,
    Events,
    NodeMemory,
    RateTracker,
    RecentRing,
    TemporalAttention,
    TemporalBatches,
    TemporalData,
    coherence,
    evaluate_links,
)
from memspan.base import BadInput
from memspan.base.files import load_state, save_state

MODELS = [TGN, JODIE, APAN]
NODES, WIDTH = 12, 2


def stream(count=120, nodes=NODES, seed=0, width=WIDTH, step=6):
    draw = np.random.default_rng(seed)
    src, dst = draw.integers(0, nodes, (2, count))
    t = np.cumsum(draw.integers(0, step, count))
    return TemporalData(src, dst, t, draw.random((count, width)).astype(np.float32), num_nodes=nodes)


def model_of(kind, data, pres=None, seed=0, **options):
    torch.manual_seed(seed)
    made = kind(int(data.num_nodes), data.msg_dim, 8, pres=pres, time_scale=data.mean_gap, **options).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "encode" not in name and "raw_gamma" not in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape))
    return made


def run(model, batches, train=False):
    """Scores of every event, and the stream in the memory, the last batch too."""
    model.train(train)
    if train:
        model.dropout.p = 0.0
    told = []
    for batch in batches:
        view = model.view()
        right, wrong = model.score(view, batch)
        told.append(torch.cat([right[:, None], wrong], 1).detach())
        model.write_(view, batch)
    return told


def corrected(pres):
    rows, t = torch.zeros(2, 1, 1), torch.zeros(2, 1)
    return pres.correct(torch.tensor([0]), *rows, *t, observe=False)


def settled(model):
    """Memory rows and times with what waits."""
    view = model.view()
    rows, t = model.rows(view, torch.arange(model.memory.num_nodes))
    return rows.detach(), t


# -- batches and order --


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_of_one_is_sequential_processing(kind):
    data = stream(40)
    model = model_of(kind, data)
    run(model, TemporalBatches(data, 1))
    rows, times = torch.zeros(NODES, 8), torch.zeros(NODES).double()
    for i, j, t, x in zip(data.src, data.dst, data.t - data.t[0], data.msg, strict=True):
        new = {}
        for a, b in ((i, j), (j, i)):
            gap = torch.tensor([(t - times[a]) / data.mean_gap])
            message = torch.cat([rows[a], rows[b], torch.from_numpy(x), model.encode(gap.float())[0]])
            new[a] = model.updater(message[None], rows[a][None])[0].detach()
        for a, row in new.items():
            rows[a], times[a] = row, float(t)
    found, t_found = settled(model)
    assert torch.allclose(found, rows, atol=1e-6)
    assert torch.equal(t_found, times)


@pytest.mark.parametrize("kind", MODELS)
def test_batch_sizes_agree_where_no_node_repeats_inside_a_batch(kind):
    pairs = np.array([[0, 1], [2, 3], [4, 5], [6, 7], [3, 6], [1, 4], [7, 0], [5, 2]] * 3)
    t = np.arange(len(pairs))
    data = TemporalData(pairs[:, 0], pairs[:, 1], t, np.random.default_rng(0).random((len(t), 2)).astype("f"))
    found = []
    for size in (1, 2, 4):
        model = model_of(kind, data)
        run(model, TemporalBatches(data, size))
        found.append(settled(model)[0])
    for other in found[1:]:
        assert torch.allclose(found[0], other, atol=1e-6)
    mixed = model_of(kind, data)
    run(mixed, TemporalBatches(data, 8))
    assert not torch.allclose(found[0], settled(mixed)[0], atol=1e-3)


@pytest.mark.parametrize("aggregate", ["last", "mean"])
def test_messages_equal_those_of_a_dictionary(aggregate):
    data = stream(1000, 50, step=2)
    memory = NodeMemory(50, 3, WIDTH)
    (batch,) = TemporalBatches(data, 1000)
    memory.store_(batch)
    waits = memory.pending(aggregate)
    kept = {}
    for event, (i, j) in enumerate(zip(data.src, data.dst, strict=True)):
        kept.setdefault(int(i), []).append((event, int(j)))
        kept.setdefault(int(j), []).append((event, int(i)))
    assert waits.nodes.tolist() == sorted(kept)
    assert waits.last.tolist() == [kept[n][-1][0] for n in sorted(kept)]
    if aggregate == "last":
        assert list(zip(waits.event.tolist(), waits.partner.tolist(), strict=True)) == [
            kept[n][-1] for n in sorted(kept)
        ]
        return
    told = {}
    for group, event, partner in zip(
        waits.group.tolist(), waits.event.tolist(), waits.partner.tolist(), strict=True
    ):
        told.setdefault(int(waits.nodes[group]), []).append((event, partner))
    assert told == kept


def test_the_mean_of_messages_is_the_mean():
    data = stream(30)
    model = model_of(JODIE, data, aggregate="mean")
    (batch,) = TemporalBatches(data, 30)
    model.memory.rows.normal_()
    model.memory.store_(batch)
    view = model.view()
    node = int(view.nodes[0])
    messages = []
    for i, j, t, x in zip(batch.src.tolist(), batch.dst.tolist(), batch.t, batch.msg, strict=True):
        for a, b in ((i, j), (j, i)):
            if a == node:
                code = model.encode((t / data.mean_gap).float()[None])[0]
                messages.append(torch.cat([model.memory.rows[a], model.memory.rows[b], x, code]))
    want = model.updater(torch.stack(messages).mean(0)[None], model.memory.rows[node][None])
    assert torch.allclose(view.memory[0], want[0], atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ring_keeps_the_last_k_of_each_node(seed):
    draw = np.random.default_rng(seed)
    ring, reference = RecentRing(6, 3, 1), {node: [] for node in range(6)}
    clock = 0
    for size in (1, 17, 2, 40, 5):
        nodes, partner = torch.from_numpy(draw.integers(0, 6, (2, size)))
        t = torch.arange(clock, clock + size).double()
        clock += size
        ring.insert_(nodes, partner, t, t[:, None].float() * 2)
        for n, p, at in zip(nodes.tolist(), partner.tolist(), t.tolist(), strict=True):
            reference[n] = [*reference[n], (at, p, 2 * at)][-3:]
    partner, t, payload, mask = ring.fetch(torch.arange(6))
    for node, kept in reference.items():
        found = [
            (t[node, k].item(), partner[node, k].item(), payload[node, k, 0].item())
            for k in range(3) if mask[node, k]
        ]  # fmt: skip
        assert sorted(found) == sorted(kept)


def test_attention_is_that_of_keys_and_values():
    attend = TemporalAttention(5, 7, 6, heads=2)
    query, items, mask = torch.randn(4, 5), torch.randn(4, 3, 7), torch.rand(4, 3) > 0.4
    mask[2] = False
    asked = attend.query(query).view(4, 2, 3)
    key = torch.einsum("hsi,qki->qhks", attend.key, items)
    value = torch.einsum("his,qki->qhks", attend.value, items)
    score = (torch.einsum("qhs,qhks->qhk", asked, key) / math.sqrt(3)).masked_fill(~mask[:, None], -math.inf)
    want = torch.einsum("qhk,qhks->qhs", score.softmax(-1).nan_to_num(0), value).reshape(4, 6)
    assert torch.allclose(attend(query, items, mask), want, atol=1e-6)
    assert not attend(query, items, mask)[2].any()


def test_a_node_embedded_once_a_batch_is_embedded_at_its_last_update():
    data = stream(60)
    once, each = model_of(TGN, data, at="update"), model_of(TGN, data)
    run(once, TemporalBatches(data, 10))
    run(each, TemporalBatches(data, 10))
    nodes, view = torch.tensor([3, 1, 3, 5]), each.view()
    _, t = each.rows(view, nodes)
    told = once.embed(once.view(), nodes, t + 1e4)  # the time of the query plays no part
    assert torch.allclose(told, each.embed(view, nodes, t), atol=1e-6)
    assert torch.equal(told[0], told[2])


def test_apan_mails_an_event_to_its_ends_and_to_their_neighbours_before_it():
    data = TemporalData(np.array([0, 2]), np.array([1, 0]), np.array([0, 5]), num_nodes=4)
    model = model_of(APAN, data)
    run(model, TemporalBatches(data, 1))
    got = [
        sorted(t[mask].tolist())
        for t, mask in zip(*[model.mailbox.fetch(torch.arange(4))[k] for k in (1, 3)], strict=True)
    ]
    assert got == [[0, 5], [0, 5], [5], []]  # 1 hears of the second event through 0
    row = model.mailbox.payload[2, 0]
    assert torch.equal(row, torch.cat([model.memory.rows[2], model.memory.rows[0]]))


# -- leakage --


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_of_a_batch_or_after_it_changes_earlier_scores(kind):
    data = stream(60)
    first = run(model_of(kind, data, PRES()), TemporalBatches(data, 10))
    batches = list(TemporalBatches(data, 10))
    order = torch.randperm(10)
    changed = batches[3]
    batches[3] = changed._replace(msg=changed.msg + 5, src=changed.src[order], dst=changed.dst[order])
    batches[4:] = [b._replace(src=b.src.flip(0), dst=b.dst.flip(0)) for b in batches[5:] + batches[4:5]]
    batches[4:] = [b._replace(t=b.t * 0 + 1e4) for b in batches[4:]]
    other = run(model_of(kind, data, PRES()), batches)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], other[:3], strict=True))
    assert not torch.equal(first[4], other[4])
    new_features = list(TemporalBatches(data, 10))
    new_features[3] = new_features[3]._replace(msg=new_features[3].msg + 5)
    told = run(model_of(kind, data, PRES()), new_features)
    assert torch.equal(first[3], told[3])  # an event's own features are not in its score
    assert not torch.equal(first[4], told[4])


@pytest.mark.parametrize("kind", MODELS)
def test_negatives_leave_the_memory_as_it_is(kind):
    data = stream(60)
    states = []
    for key in ("one", "other"):
        model = model_of(kind, data, PRES())
        run(model, TemporalBatches(data, 10, seed=key))
        states.append(model.snapshot())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_labels_drawn_at_random_are_told_at_random():
    pytest.importorskip("sklearn")
    data = stream(3000, 40)
    model = model_of(TGN, data)
    shuffled = []
    for batch in TemporalBatches(data, 100, seed="x"):
        swap = torch.rand(len(batch.src)) < 0.5
        wrong = torch.where(swap, batch.dst, batch.negatives[:, 0])
        shuffled.append((batch, torch.where(swap, batch.negatives[:, 0], batch.dst), wrong))
    from sklearn.metrics import average_precision_score

    truth, told = [], []
    for batch, right, wrong in shuffled:
        view = model.view()
        a, b = model.score(view, batch._replace(dst=right, negatives=wrong[:, None]))
        told += [a.detach(), b[:, 0].detach()]
        truth += [torch.ones(len(a)), torch.zeros(len(a))]
        model.write_(view, batch)
    assert average_precision_score(torch.cat(truth), torch.cat(told)) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", MODELS)
def test_the_scale_of_time_changes_nothing(kind):
    data = stream(80)
    slow = TemporalData(data.src, data.dst, data.t * 3600, data.msg, num_nodes=NODES)
    one, other = model_of(kind, data, PRES()), model_of(kind, slow, PRES())
    a, b = (run(m, TemporalBatches(d, 10), train=True) for m, d in ((one, data), (other, slow)))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))
    assert torch.allclose(one.pres.largest, other.pres.largest, atol=1e-5)


def test_nanoseconds_and_seconds_are_one_stream():
    data = stream(80)
    late = TemporalData(data.src, data.dst, (data.t + 1_714_557_600) * 10**9, data.msg, num_nodes=NODES)
    a, b = (run(model_of(JODIE, d), TemporalBatches(d, 10)) for d in (data, late))
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


def test_times_stay_exact_in_a_model_of_half_precision():
    data = stream(40)
    model = model_of(TGN, data).to(torch.bfloat16)
    late = [b._replace(t=b.t + 1_714_557_601) for b in TemporalBatches(data, 10)]
    run(model, late)
    assert model.memory.rows.dtype == torch.bfloat16
    assert model.memory.last_update.dtype == model.recent.t.dtype == torch.float64
    assert float(model.memory.clock) == float(late[-1].t[-1])


# -- PRES --


@pytest.mark.parametrize("kind", MODELS)
def test_a_share_of_one_and_no_loss_is_the_model_without_pres(kind):
    data = stream(60)
    plain, corrected = model_of(kind, data), model_of(kind, data, PRES(beta=0.0))
    corrected.pres.raw_gamma.data.fill_(40.0)  # sigmoid(40) is 1 in float32
    a = run(plain, TemporalBatches(data, 10), train=True)
    b = run(corrected, TemporalBatches(data, 10), train=True)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert int(corrected.pres.tracker.n.sum()) > 0
    left_out = model_of(kind, data, PRES(gamma=1.0))
    assert all(
        torch.equal(x, y)
        for x, y in zip(a, run(left_out, TemporalBatches(data, 10), train=True), strict=True)
    )
    assert left_out.pres.tracker is None
    assert left_out.memory_bytes().get("tracker", 0) == 0


def test_the_update_by_hand():
    pres = PRES(gamma=0.9, clip=False, time_scale=1.0).size_(1, 2)
    node, zero = torch.tensor([0]), torch.zeros(1).double()
    pres.tracker.n.fill_(1)
    pres.tracker.average.copy_(torch.tensor([[[0.5, 0.0]]]))
    before, after = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    written = pres.correct(node, before, after, zero, zero + 2, observe=True)
    assert torch.allclose(written, torch.tensor([[0.2, 0.9]]))
    assert torch.allclose(pres.tracker.mean(node), torch.tensor([[0.05, 0.225]]))
    assert pres.tracker.n.item() == 2


@pytest.mark.parametrize("rate", ["mean", "drift", "step"])
def test_a_linear_drift_is_predicted_after_one_update(rate):
    start, speed = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.3, 0.1]])
    node = torch.tensor([0])

    def at(t):
        return start + speed * t

    for clip, second, exact in ((False, 9.0, rate != "step"), (True, 8.0, True), (True, 20.0, False)):
        pres = PRES(gamma=0.5, rate=rate, clip=clip, time_scale=1.0).size_(1, 2)
        times = [torch.tensor([t]).double() for t in (0.0, 4.0, second)]
        pres.observe_(node, at(0.0), at(4.0), times[0], times[1])
        pres.raw_gamma.data.fill_(-200.0)  # the prediction alone
        told = pres.correct(node, at(4.0), at(4.0) + 7, times[1], times[2], observe=False)
        assert torch.allclose(told, at(second), atol=1e-5) == exact


def test_equal_times_and_first_updates_are_left_alone():
    pres = PRES(time_scale=1.0).size_(3, 2)
    nodes, t = torch.tensor([0, 2]), torch.tensor([5.0, 5.0]).double()
    before, after = torch.ones(2, 2), torch.zeros(2, 2)
    told = pres.correct(nodes, before, after, t, torch.tensor([5.0, 6.0]).double(), observe=True)
    assert torch.equal(told[0], after[0])
    assert torch.allclose(told[1], 0.1 * before[1])  # nothing is known: it predicts no change
    assert pres.tracker.n.view(-1).tolist() == [0, 0, 1]


def test_the_clip_stays_below_the_longest_step():
    data = stream(400, 20)
    model = model_of(JODIE, data, PRES())
    longest = 0.0
    model.train()
    for batch in TemporalBatches(data, 40):
        view = model.view()
        with torch.no_grad():
            pending = model.memory.pending()
            if len(pending.nodes):
                code = model.encode(model._gap(view.t, view.t_before))
                message = torch.cat([view.before, model.memory.read(pending.partner),
                                     model.memory.pending_msg[pending.event], code], 1)  # fmt: skip
                longest = max(
                    longest, float((model.updater(message, view.before) - view.before).norm(dim=1).max())
                )
        model.write_(view, batch)
        assert float(model.pres.largest) <= longest * (1 + 1e-6)
    assert float(model.pres.largest) > 0


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_written_is_what_was_used_and_is_observed_once(kind):
    data = stream(60)
    model = model_of(kind, data, PRES()).train()
    expected = torch.zeros(NODES)
    for batch in TemporalBatches(data, 10):
        before = {name: x.clone() for name, x in model.state_dict().items()}
        view = model.view()
        loss = model.score(view, batch)[0].sum() + model.coherence_loss(view)
        loss.backward()
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        expected[view.nodes[view.t > view.t_before]] += 1
        model.write_(view, batch)
        assert torch.equal(model.memory.rows[view.nodes], view.memory.detach())
        assert torch.equal(model.pres.tracker.n[:, 0], expected)
    assert expected.sum() > 20
    kept = {name: x.clone() for name, x in model.pres.state_dict().items()}
    later = [batch._replace(t=batch.t + 1000) for batch in TemporalBatches(data, 5)]
    run(model, later)  # eval mode: the tracker stays
    assert all(torch.equal(x, kept[name]) for name, x in model.pres.state_dict().items())


def test_kinds_of_event_are_tracked_apart():
    draw = np.random.default_rng(0)
    tracker = RateTracker(4, 3, components=2, second_moment=True)
    seen = {}
    for _ in range(200):
        nodes = torch.from_numpy(draw.permutation(4)[:3])
        value, kind = (
            torch.from_numpy(draw.normal(size=(3, 3))).float(),
            torch.from_numpy(draw.integers(0, 2, 3)),
        )
        tracker.update_(nodes, value, kind)
        for n, k, v in zip(nodes.tolist(), kind.tolist(), value.numpy(), strict=True):
            seen.setdefault((n, k), []).append(v)
    every = torch.arange(4)
    for (n, k), values in seen.items():
        assert np.allclose(tracker.average[n, k], np.mean(values, 0), atol=1e-6)
        assert np.allclose(tracker.variance(every)[n, k], np.var(values, 0), atol=1e-5)
        assert tracker.n[n, k] == len(values)
    assert torch.allclose(tracker.weights(every).sum(1), torch.ones(4))
    mixed = sum(np.sum(seen[0, k], 0) for k in (0, 1)) / sum(len(seen[0, k]) for k in (0, 1))
    assert np.allclose(tracker.mean(every)[0], mixed, atol=1e-6)
    draws = torch.stack([tracker.sample(every, torch.Generator().manual_seed(s)) for s in range(2000)])
    assert torch.allclose(draws.mean(0), tracker.mean(every), atol=0.12)
    assert tracker.memory_bytes() == {"tracker": (1 + 2 * 3) * 4 * 2 * 4}


def test_a_small_variance_survives_a_million_observations():
    tracker = RateTracker(1, 1, second_moment=True)
    tracker.n.fill_(999_000.0)
    tracker.average.fill_(1.0)
    tracker.squares.fill_(999_000.0 * 1e-6)
    draw = np.random.default_rng(0)
    for value in draw.normal(1, 1e-3, 1000):
        tracker.update_(torch.tensor([0]), torch.tensor([[value]], dtype=torch.float32))
    spread = float(tracker.variance(torch.tensor([0])).sqrt())
    assert spread == pytest.approx(1e-3, rel=0.01)
    assert float(tracker.mean(torch.tensor([0]))) == pytest.approx(1.0, abs=1e-4)


def test_the_coherence_loss_has_its_range_and_reaches_the_updater_alone():
    rows = torch.randn(5, 3)
    rows[2] = 0
    assert float(coherence(rows, rows)) == pytest.approx(0, abs=1e-6)
    assert float(coherence(-rows, rows)) == pytest.approx(2, abs=1e-6)
    moved = rows.clone()
    moved[2] = 100.0  # a row that was zero is left out
    assert float(coherence(moved, rows)) == pytest.approx(0, abs=1e-6)
    assert float(coherence(rows, rows * 0)) == 0
    old, new = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    coherence(new, old).backward()
    assert old.grad is None
    assert new.grad.abs().sum() > 0
    data = stream(60)
    model = model_of(JODIE, data, PRES())
    run(model, TemporalBatches(data, 20))
    before = model.snapshot()
    loss = model.coherence_loss(model.view())
    assert 0 < loss.item() <= 0.2
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.updater.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.snapshot().items())


def test_any_updater_takes_the_correction():
    cell = nn.RNNCell(3, 2)
    wrapped = PRES(time_scale=1.0).size_(4, 2).wrap(cell)
    nodes, before, t = torch.tensor([1, 3]), torch.randn(2, 2), torch.zeros(2).double()
    message = torch.randn(2, 3)
    told = wrapped(message, before, nodes, t, t + 1)
    assert torch.allclose(told, 0.1 * before + 0.9 * cell(message, before), atol=1e-6)
    assert wrapped.pres.tracker.n.view(-1).tolist() == [0, 1, 0, 1]
    wrapped.eval()(message, before, nodes, t, t + 1)
    assert wrapped.pres.tracker.n.sum() == 2


# -- state --


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_stream_that_stops_goes_on_from_the_file_to_the_same_scores(kind, dtype, tmp_path):
    data = stream(90)
    batches = list(TemporalBatches(data, 10))
    model = model_of(kind, data, PRES(), dtype=dtype)
    straight = run(model, batches, train=True)
    stopped = model_of(kind, data, PRES(), dtype=dtype)
    run(stopped, batches[:4], train=True)
    save_state(tmp_path / "model.safetensors", stopped.state_dict())
    resumed = model_of(kind, data, PRES(), seed=9, dtype=dtype)
    resumed.load_state_dict(load_state(tmp_path / "model.safetensors")[0])
    rest = run(resumed, batches[4:], train=True)
    assert all(torch.equal(a, b) for a, b in zip(straight[4:], rest, strict=True))


def test_a_test_twice_from_one_snapshot_is_one_result():
    pytest.importorskip("sklearn")
    data = stream(200)
    model = model_of(TGN, data, PRES())
    run(model, TemporalBatches(data.part(0, 100), 20), train=True)
    kept, tracker = model.snapshot(), model.pres.tracker.average.clone()
    one = evaluate_links(model, data.part(100, 200), 20)
    assert not torch.equal(kept["0.rows"], model.memory.rows)
    model.restore_(kept)
    assert evaluate_links(model, data.part(100, 200), 20)[:4] == one[:4]
    assert torch.equal(tracker, model.pres.tracker.average)


@pytest.mark.parametrize("kind", MODELS)
def test_nodes_that_come_later_find_zero_rows(kind):
    data = stream(60)
    small, large = model_of(kind, data, PRES()), model_of(kind, data, PRES())
    run(small, TemporalBatches(data, 10), train=True)
    run(large, TemporalBatches(data, 10), train=True)
    large.grow_(NODES + 3)
    assert torch.equal(large.memory.rows[:NODES], small.memory.rows)
    assert not large.memory.rows[NODES:].any()
    t = small.memory.clock.view(1) + 1
    new, wrong = torch.tensor([NODES + 2]), torch.tensor([[1]])
    more = Events(new, torch.tensor([0]), t, torch.zeros(1, WIDTH), None, wrong)
    for model in (small, large):
        if model is small:
            with pytest.raises(BadInput, match=f"nodes={NODES + 2}.*grow_"):
                model.write_(model.view(), more)
        else:
            run(model, [more, more._replace(t=more.t + 1)], train=True)
            assert settled(model)[0][NODES + 2].any()
    with pytest.raises(BadInput, match="only grows"):
        large.grow_(3)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_rows_of_fewer_bits_are_read_back_within_their_step(dtype, width):
    memory = NodeMemory(10, 16, dtype=dtype)
    rows = torch.randn(4, 16)
    nodes = torch.tensor([1, 3, 5, 7])
    memory.write_(nodes, rows, torch.ones(4).double())
    error = (memory.read(nodes) - rows).abs().amax(1)
    limit = {"float32": 0, "bfloat16": 2.0**-8, "int8": 0.5 / 127 + 1e-6}[dtype]
    assert bool((error <= limit * rows.abs().amax(1)).all())
    scales = 40 if dtype == "int8" else 0
    assert memory.memory_bytes()["memory_rows"] == 10 * 16 * width + 80 + scales


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b._replace(t=b.t - 1e6), "event 0 lies before"),
        (lambda b: b._replace(t=b.t.flip(0)), "lies before an event"),
        (lambda b: b._replace(dst=b.dst - 20), "ids run from 0"),
        (lambda b: b._replace(msg=b.msg[:, :1]), r"msg=\(10, 1\)"),
    ],
)
@pytest.mark.parametrize("kind", MODELS)
def test_events_that_cannot_follow_change_nothing(kind, change, says):
    data = stream(60)
    batches = list(TemporalBatches(data, 10))
    model = model_of(kind, data, PRES())
    run(model, batches[:3], train=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(BadInput, match=says):
        model.write_(model.view(), change(batches[3]))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: NodeMemory(0, 4), "num_nodes=0"),
        (lambda: NodeMemory(4, 4, dtype="int4"), "dtype='int4'"),
        (lambda: RecentRing(4, 0), "nodes and items"),
        (lambda: TGN(4, memory_dim=6, heads=4), "heads=4"),
        (lambda: TGN(4, aggregate="sum"), "aggregate"),
        (lambda: JODIE(4, projection="cubic"), "projection"),
        (lambda: TGN(4, at="noon"), "at='noon'"),
        (lambda: TGN(4, time="cubic"), "time='cubic'"),
        (lambda: JODIE(4, cell="lstm"), "cell"),
        (lambda: TGN(4, time_scale=0), "time_scale=0"),
        (lambda: TGN(4, pres=PRES(time_scale=3.0)), "leave it out"),
        (lambda: PRES(beta=-1), "beta=-1"),
        (lambda: PRES(gamma=0), "gamma=0"),
        (lambda: PRES(rate="median"), "rate='median'"),
        (lambda: PRES(time_scale=math.inf), "time_scale=inf"),
        (lambda: RateTracker(0, 1), "1 or more"),
        (lambda: RateTracker(1, 1, forget=0), "forget=0"),
        (lambda: RateTracker(1, 1).variance(torch.tensor([0])), "second_moment"),
        (lambda: RateTracker(2, 1).update_(torch.tensor([1, 1]), torch.zeros(2, 1)), "each node once"),
        (
            lambda: RateTracker(2, 1).update_(torch.tensor([1]), torch.zeros(1, 1), torch.tensor([1])),
            "component",
        ),
        (lambda: corrected(PRES().size_(1, 1)), "unit of time"),
        (lambda: corrected(PRES(time_scale=1.0)), "size_"),
        (lambda: PRES(time_scale=1.0).attach_(nn.Linear(1, 1)), "like PyG's"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(made, says):
    with pytest.raises(BadInput, match=says):
        made()


# -- theory --


def test_summed_gradients_of_an_epoch_vary_less_in_larger_batches():
    """Over draws of negatives at fixed weights. The theorem's (E / b) is a floor; independent draws give -2.

    The slope is of 10 draws, so that it may lie a little beyond.
    """
    data = stream(2400, 30)
    model = model_of(JODIE, data)
    warm, measured = data.part(0, 800), data.part(800, 2400)
    found = {"mean": [], "sum": []}
    sizes = (20, 80, 320)
    for size in sizes:
        draws = {"mean": [], "sum": []}
        for seed in range(10):
            model.reset_()
            run(model, TemporalBatches(warm, 20))
            total = {"mean": 0.0, "sum": 0.0}
            for batch in TemporalBatches(measured, size, seed=seed):
                view = model.view()
                right, wrong = model.score(view, batch)
                loss = nn.functional.softplus(-right).mean() + nn.functional.softplus(wrong).mean()
                grads = torch.autograd.grad(loss, list(model.predict.parameters()))
                flat = torch.cat([g.view(-1) for g in grads])
                total["mean"] = total["mean"] + flat
                total["sum"] = total["sum"] + flat * len(batch.src)
                model.write_(view, batch)
            for form, vector in total.items():
                draws[form].append(vector)
        for form, vectors in draws.items():
            found[form].append(float(torch.stack(vectors).var(0).sum()))
    slope = {form: np.polyfit(np.log(sizes), np.log(values), 1)[0] for form, values in found.items()}
    assert found["mean"][0] > found["mean"][1] > found["mean"][2]
    assert -2.3 <= slope["mean"] <= -1
    assert -0.3 <= slope["sum"] <= 1
