"""The recipe of PRES: a real stream on a bare machine, and claims that read the right rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memspan import data
from memspan.recipes.engine import Measurements, execute
from memspan.recipes.pres import RECIPE
from memspan.recipes.pres.claims import judge
from memspan.recipes.pres.measure import COHERENCE, OURS, PAIR, SCALED, STANDARD, Options
from memspan.recipes.tracks.events import stream_of
from memspan.report.schema import Measurement


def row(
    method: str, seed: int, ap: float, table: str = "epochs", seconds: float = 0.0, **setting: object
) -> Measurement:
    return Measurement(
        method=method, seed=seed, setting={"table": table, "data": "collegemsg", **setting},
        quality={"ap": ap, "events": 100.0},
        bytes={"memory_rows": 1}, seconds={"train": seconds, "step": seconds} if seconds else {},
    )  # fmt: skip


def test_claims_are_paired_by_seed_and_read_their_table() -> None:
    rows = []
    for seed in range(5):
        base = 0.8 + 0.01 * seed  # seeds differ more than arms do
        for method, batch, ap in (
            (STANDARD, 200, 0.10), (OURS, 200, 0.09), (STANDARD, 800, 0.05), (OURS, 800, 0.0),
            (STANDARD, 4000, 0.0), (OURS, 4000, 0.02), (SCALED, 4000, 0.04), (COHERENCE, 4000, 0.01),
        ):  # fmt: skip
            rows.append(row(method, seed, base + ap, batch=batch))
        rows.append(row(PAIR, seed, base + 0.13, "rules"))
        rows += [row(STANDARD, seed, base + up, "steps", batch=b) for b, up in ((200, 0.0), (800, 0.01))]
        load = 1.0 + seed  # another load in each round
        for method, batch, seconds in ((STANDARD, 200, 3.0), (STANDARD, 800, 1.0), (OURS, 800, 1.1)):
            rows.append(row(method, seed, 0.0, "speed", seconds * load, batch=batch))
    told = {claim.text: claim for claim in judge(Measurements(rows), Options(steps=420))}

    def found(part: str) -> tuple[float, bool | None]:
        (one,) = [claim for text, claim in told.items() if part in text]
        return pytest.approx(one.measured), one.holds

    assert found("share of the AP lost") == (20, False)
    assert found("less that of standard at 200") == (-10, False)
    assert found("lr x sqrt(k) less") == (2, True)
    assert found("coherence term alone less") == (-1, True)
    assert found("after equal steps") == (1, True)
    assert found("best network") == (3, True)
    assert found("events per second") == (3, True)
    assert found("a step with PRES") == (1.1, True)


def test_clock_changes_are_a_stream_that_a_package_carries() -> None:
    table = data.load("clock-changes", data.TableSet)
    stream = stream_of(table)
    assert len(stream) > 15_000
    assert stream.bipartite
    berlin = table["zone"] == "Europe/Berlin"
    clocks = [
        clock for clock, t in zip(table["clock"][berlin], table["time"][berlin], strict=True) if t > 1.7e9
    ]
    assert clocks == ["CEST 7200", "CET 3600", "CEST 7200", "CET 3600"]  # 2024 and 2025
    assert int(table["time"].max()) < 1_767_225_600


@pytest.mark.slow
def test_a_bare_machine_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMSPAN_DATA", raising=False)
    assert RECIPE.tiny is not None
    finished = execute(RECIPE, replace(RECIPE.tiny, speed=2), seeds=1, out=tmp_path / "run")
    rows = Measurements(finished.result.measurements)
    assert set(rows.settings("table")) == {"rules", "epochs", "steps", "speed"}
    trained = rows.where(table="epochs", method=OURS, batch=200)[0]
    assert trained.bytes["tracker"] == (1 + 8) * 4 * trained.bytes["memory_rows"] // (4 * 8 + 8)
    assert "tracker" not in rows.where(table="epochs", method=COHERENCE)[0].bytes
    assert all(claim.holds is None for claim in finished.result.claims if "CollegeMsg" in claim.text)
