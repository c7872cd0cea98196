"""A result as a recipe would leave it: two methods, two budgets, three seeds, every kind of claim."""

import numpy as np
import pytest

from memspan.report import Claim, DataSource, Interval, Measurement, Result, claim

PAPER = "A paper, 2023"


@pytest.fixture
def result() -> Result:
    draws = np.random.default_rng(0)
    measurements = [
        Measurement(
            method=method,
            seed=seed,
            setting={"budget": budget, "data": "digits"},
            quality={"average_accuracy": 0.6 + gain + float(draws.normal() * 0.01)},
            bytes={"parameters": 4096, "replay.exemplars": budget - 4096},
            seconds={"train": 1.5},
            flops=2_000_000,
        )
        for method, gain in (("MEMO", 0.2), ("Replay", 0.1))
        for budget in (2**20, 2**21)
        for seed in range(3)
    ]
    claims: list[Claim] = [
        claim("MEMO is ahead", PAPER, Interval(3.0, 1.0, 5.0, 3), "> 0", "points"),
        claim("MEMO is far ahead", PAPER, Interval(3.0, 1.0, 5.0, 3), "> 10", "points"),
        claim(
            "MEMO is always ahead", PAPER, Interval(-1, -2.0, -0.5, 3), "> 0", expected=False, why="too few"
        ),
        claim("the order flips", PAPER, Interval(0.5, -1.0, 2.0, 3), "> 0", "points"),
    ]
    return Result(
        recipe="memo",
        mode="quick",
        config={"epochs": 8, "budgets": ["1MiB", "2MiB"]},
        environment={"device": "cpu", "torch": "2.13.0"},
        data=[DataSource(name="digits", source="scikit-learn", sha256="ab" * 32, licence="BSD-3-Clause")],
        measurements=measurements,
        claims=claims,
        notes=["equal steps"],
    )
