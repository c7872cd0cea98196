"""Replay against Avalanche's: the same network, images, optimizer, schedule, steps, batches, buffer size."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from memspan.continual import nets
from memspan.continual.memo import Replay, grow_linear_, run_stream
from memspan.continual.memo.inputs import to_input
from memspan.data import ClassTask, ImageSet, class_tasks, load

pytestmark = [pytest.mark.peers, pytest.mark.slow]

PER_CLASS, STEPS, HALF = 96, 60, 32  # a task of 192 images is 6 halves of a batch: 10 epochs are 60 steps
MEMORY = 2 * PER_CLASS  # as large as a task, so that half of every batch is old in both libraries
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}


def _network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nets.SmallResNet(1, 1, (4, 8, 16), 1)


def _ours(stream: Sequence[ClassTask], seed: int) -> float:
    network = _network(seed)
    budget = 4 * sum(p.numel() for p in network.parameters()) + MEMORY * 64
    learner = Replay(
        network,
        budget,
        steps=STEPS,
        batch_size=2 * HALF,
        lr=SGD["lr"],
        weight_decay=(SGD["weight_decay"],) * 2,
        selection="random",  # as the buffer of the other library
        byte_rule="paper",
        seed=seed,
    )
    run = run_stream(learner, stream)
    assert run.bytes[0]["replay.exemplars"] == MEMORY * 64
    return run.average


def _theirs(stream: Sequence[ClassTask], seed: int) -> float:
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin, LRSchedulerPlugin, ReplayPlugin
    from avalanche.training.storage_policy import ClassBalancedBuffer

    order = [label for task in stream for label in task.classes]  # outputs in the order of discovery

    def tensors(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return to_input(x, "cpu"), torch.as_tensor([order.index(label) for label in y])

    model = nn.Sequential(_network(seed), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), **SGD)
    shares = ((0.3, 0.6, 0.85), (80 / 170, 120 / 170, 150 / 170))  # of a task, where the rate falls
    strategy = Naive(
        model=model,
        optimizer=optimizer,
        criterion=nn.CrossEntropyLoss(),
        evaluator=EvaluationPlugin(loggers=[]),
        plugins=[
            ReplayPlugin(
                MEMORY,
                batch_size=HALF,
                batch_size_mem=HALF,
                storage_policy=ClassBalancedBuffer(MEMORY, adaptive_size=True),
            )
        ],
    )
    accuracy = []
    parts = [tensors(task.x_train, task.y_train) for task in stream]
    benchmark = tensors_benchmark(train_tensors=parts, test_tensors=parts, task_labels=[0] * len(parts))
    for b, experience in enumerate(benchmark.train_stream):
        if b:  # outputs of classes to come would be pushed down before they are met; both heads grow
            grow_linear_(model[1], 16, 2 * (b + 1))
            optimizer.param_groups[0]["params"] = list(model.parameters())
        strategy.train_mb_size, strategy.train_epochs = (2 * HALF, 20) if b == 0 else (HALF, 10)
        milestones = [round(share * STEPS) for share in shares[min(b, 1)]]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
        once = LRSchedulerPlugin(schedule, reset_lr=True, step_granularity="iteration")
        strategy.plugins.append(once)
        strategy.train(experience, num_workers=0)
        strategy.plugins.remove(once)
        for group in optimizer.param_groups:
            group["lr"] = SGD["lr"]
        model.eval()
        with torch.no_grad():
            tests = [tensors(task.x_test, task.y_test) for task in stream[: b + 1]]
            right = torch.cat([model(x).argmax(1) == y for x, y in tests])
        accuracy.append(float(right.double().mean()))
    return float(np.mean(accuracy))


def test_replay_is_as_accurate_as_that_of_avalanche(avalanche):
    logging.disable(logging.INFO)
    try:
        pairs = []
        for seed in range(3):
            images = load("digits", ImageSet).subset(PER_CLASS, seed=0)
            stream = class_tasks(images, per_task=2, seed=seed)
            pairs.append((_ours(stream, seed), _theirs(copy.deepcopy(stream), seed)))
    finally:
        logging.disable(logging.NOTSET)
    difference = np.mean([ours - theirs for ours, theirs in pairs])
    assert abs(difference) <= 0.03, pairs
    assert min(theirs for _, theirs in pairs) > 0.5  # both learn, and neither remembers by chance
