"""Training, tests and rules: one set of events for all, selection on validation, rules in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from memspan.banks.temporal import (
    APAN,
    JODIE,
    PRES,
    TGN,
    EdgeBank,
    RecencyRule,
    TemporalBatches,
    TemporalData,
    evaluate_links,
    evaluate_rule,
    train_link_prediction,
    train_node_classification,
)
from memspan.banks.temporal.train import reciprocal_ranks
from memspan.base import BadInput

metrics = pytest.importorskip("sklearn.metrics")


def recurring(count=1200, nodes=40, seed=0, **more):
    """Three destinations at a time are in fashion, others later: what was met lately is likelier."""
    draw = np.random.default_rng(seed)
    src = draw.integers(0, nodes // 2, count)
    dst = nodes // 2 + (np.arange(count) // 60 * 3 + draw.integers(0, 3, count)) % (nodes // 2)
    return TemporalData(src, dst, np.cumsum(draw.integers(1, 9, count)), num_nodes=nodes, **more)


def made(kind, data, seed=0, **options):
    torch.manual_seed(seed)
    return kind(data.num_nodes, data.msg_dim, 16, **options)


@pytest.mark.parametrize("kind", [TGN, JODIE, APAN])
def test_training_beats_chance_and_one_seed_repeats(kind):
    data = recurring()
    told = [
        train_link_prediction(made(kind, data, pres=PRES()), data, 60, epochs=3, lr=5e-3) for _ in range(2)
    ]
    assert told[0].test[:4] == told[1].test[:4]
    assert told[0].loss == told[1].loss
    assert max(told[0].valid_ap) > 0.62
    assert told[0].loss[-1] < told[0].loss[0]
    assert told[0].steps == 3 * 14


def test_the_epoch_that_was_best_on_validation_is_tested():
    data = recurring()
    model = made(JODIE, data)
    found = train_link_prediction(model, data, 60, epochs=8, lr=0.03, patience=3)
    assert found.best_epoch == int(np.argmax(found.valid_ap)) < len(found.valid_ap) - 1
    short = made(JODIE, data)
    again = train_link_prediction(short, data, 60, epochs=found.best_epoch + 1, lr=0.03, patience=None)
    assert again.test[:4] == found.test[:4]  # the epochs after the best one left no trace
    assert torch.equal(short.memory.rows, model.memory.rows)


def test_sub_batches_of_the_whole_batch_change_nothing_and_smaller_ones_keep_the_steps():
    data = recurring(400)
    one, same, finer = (
        train_link_prediction(made(JODIE, data, dropout=0.0), data, 140, epochs=2, sub_batch=size)
        for size in (None, 140, 20)
    )
    assert one.loss == same.loss != finer.loss
    assert one.steps == same.steps == finer.steps == 4


def test_the_rate_grows_with_the_root_of_the_batch():
    data = recurring(400)
    scaled = train_link_prediction(
        made(JODIE, data), data, 140, epochs=2, lr=1e-3, scale_lr=True, base_batch=35
    )
    by_hand = train_link_prediction(made(JODIE, data), data, 140, epochs=2, lr=2e-3)
    assert scaled.loss == by_hand.loss


def test_held_out_nodes_are_never_trained_on():
    data = recurring()
    seen = set()

    class Watched(JODIE):
        def write_(self, view, events):
            if self.training:
                seen.update(events.src.tolist(), events.dst.tolist())
            super().write_(view, events)

    found = train_link_prediction(made(Watched, data), data, 60, epochs=1, hold_out=0.1)
    assert len(seen) <= 36
    assert 0 < found.test.inductive_ap <= 1
    whole = train_link_prediction(made(JODIE, data), data, 60, epochs=1)
    assert math.isnan(whole.test.inductive_ap)  # all nodes were seen


def test_historical_negatives_are_harder():
    draw = np.random.default_rng(0)
    src = draw.integers(0, 20, 1200)
    dst = 20 + (src + draw.integers(0, 6, 1200)) % 20  # six partners of its own
    data = TemporalData(src, dst, np.arange(1200), num_nodes=40)
    uniform, historical = (
        evaluate_rule(EdgeBank(), data, 20, sampling=how).ap for how in ("uniform", "historical")
    )
    assert uniform > 0.75 > 0.6 > historical
    found = train_link_prediction(made(JODIE, data), data, 60, epochs=1, negatives="historical")
    other = train_link_prediction(made(JODIE, data), data, 60, epochs=1)
    assert (found.negatives, other.negatives) == ("historical", "uniform")
    assert found.loss == other.loss
    assert found.test.ap != other.test.ap


def test_a_part_of_the_stream_with_all_of_its_events_is_tested_at_every_batch():
    data = recurring(300)
    model = made(JODIE, data, time_scale=data.mean_gap)
    kept = model.snapshot()
    for size in (1, 7, 300):
        model.restore_(kept)
        assert evaluate_links(model, data, size).events == 300


def test_a_classifier_learns_the_label_of_a_node_and_leaves_the_model():
    draw = np.random.default_rng(0)
    data = recurring()
    marked = data.src % 4 == 0  # their events are of another kind, and so their label comes to be
    troubled = marked & (draw.random(len(data)) < 0.8)
    features = np.repeat(marked[:, None], 2, 1).astype(np.float32)
    labelled = recurring(msg=features, label=troubled.astype(np.float32))
    model = made(TGN, labelled)
    train_link_prediction(model, labelled, 60, epochs=2, lr=5e-3)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    found = train_node_classification(model, labelled, epochs=30, lr=1e-2)
    assert found.auroc > 0.7
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    drawn = recurring(msg=features, label=draw.integers(0, 2, len(data)).astype(np.float32))
    assert abs(train_node_classification(model, drawn, epochs=5).auroc - 0.5) < 0.15
    for label, says in ((None, "0 or 1"), (data.t.astype(np.float32), "0 or 1"), (data.t * 0.0, "one value")):
        with pytest.raises(BadInput, match=says):
            train_node_classification(model, recurring(msg=features, label=label))


# -- rules --


def by_hand(data, kind, size):
    """Every score of the test in plain Python."""
    first = int(len(data) * 0.85)
    events = list(zip(data.src.tolist(), data.dst.tolist(), (data.t - data.t[0]).tolist(), strict=True))
    pairs, both, last = set(), set(), {}
    told = []

    def take(i, j, t):
        pairs.add((i, j))
        both.update({(i, j), (j, i)})
        last[i] = last[j] = t

    def value(i, j, t):
        recency = -(t - last[j]) if j in last else -math.inf
        return {"directed": (i, j) in pairs, "undirected": (i, j) in both, "destination": recency,
                "pair": ((i, j) in both, recency)}[kind]  # fmt: skip

    for event in events[:first]:
        take(*event)
    wrong = [b.negatives[:, 0].tolist() for b in TemporalBatches(data.part(first, len(data)), size,
             candidates=data.destinations, seed="test 0")]  # fmt: skip
    for number, start in enumerate(range(first, len(data), size)):
        part = events[start : start + size]
        told += [(value(i, j, t), value(i, k, t)) for (i, j, t), k in zip(part, wrong[number], strict=True)]
        for event in part:
            take(*event)
    ranks = {score: place for place, score in enumerate(sorted({s for pair in told for s in pair}))}
    scores = [ranks[right] for right, _ in told] + [ranks[wrong] for _, wrong in told]
    return metrics.average_precision_score([1] * len(told) + [0] * len(told), scores)


RULES = {
    "directed": lambda n: EdgeBank(),
    "undirected": lambda n: EdgeBank(directed=False),
    "destination": RecencyRule,
    "pair": lambda n: RecencyRule(n, "pair"),
}


@pytest.mark.parametrize("size", [1, 50])
@pytest.mark.parametrize("kind", RULES)
def test_rules_equal_plain_python(kind, size):
    draw = np.random.default_rng(1)
    data = TemporalData(*draw.integers(0, 30, (2, 800)), np.cumsum(draw.integers(0, 4, 800)), num_nodes=30)
    assert evaluate_rule(RULES[kind](30), data, size).ap == pytest.approx(
        by_hand(data, kind, size), abs=1e-12
    )


@pytest.mark.parametrize(
    ("name", "size", "kind", "expected", "within"),
    [
        ("collegemsg", 1, "directed", 0.832209, 0.005),
        ("collegemsg", 200, "undirected", 0.793, 0.005),
        ("collegemsg", 200, "destination", 0.889, 0.005),
        ("collegemsg", 200, "pair", 0.932, 0.005),
        ("bitcoinotc", 200, "directed", 0.5, 1e-9),
    ],
)
def test_rules_on_known_streams(name, size, kind, expected, within):
    from memspan import data

    try:
        found = data.load(name, data.TableSet)
    except data.DataNotFound as error:
        pytest.skip(str(error))
    known = TemporalData.from_arrays(found["source"], found["target"], found["time"])
    assert evaluate_rule(RULES[kind](known.num_nodes), known, size).ap == pytest.approx(expected, abs=within)


def test_ties_take_the_mean_of_the_best_and_the_worst_place():
    one = reciprocal_ranks(np.array([0.5]), np.array([[0.1, 0.5, 0.9]]))
    two = reciprocal_ranks(np.array([0.5, 0.2]), np.array([[0.1, 0.5, 0.9], [0.3, 0.4, 0.5]]))
    assert (one.mean(), two.mean()) == (pytest.approx(0.4), pytest.approx(0.325))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"epochs": 0}, "epochs=0"),
        ({"sub_batch": -1}, "sub_batch=-1"),
        ({"hold_out": 1.0}, "hold_out=1.0"),
        ({"split": (0.6, 0.4)}, "below 1"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change, says):
    data = recurring(60)
    with pytest.raises(BadInput, match=says):
        train_link_prediction(made(JODIE, data), data, **{"epochs": 1, **change})


def test_a_model_for_other_data_is_refused_before_training():
    data = recurring(60)
    with pytest.raises(BadInput, match="grow_"):
        train_link_prediction(JODIE(3), data)
    with pytest.raises(BadInput, match="made for 2"):
        train_link_prediction(JODIE(data.num_nodes, 2), data)
    with pytest.raises(BadInput, match="mean_gap"):
        evaluate_links(made(JODIE, data), data)
    model = made(JODIE, data)
    model.predict.out.weight.data.fill_(math.inf)
    with pytest.raises(BadInput, match="diverged"):
        train_link_prediction(model, data, epochs=1)
