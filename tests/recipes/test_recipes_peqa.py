"""The recipe of PEQA: its claims are read from the right rows and can fail."""

from __future__ import annotations

from memspan.recipes import peqa as recipe
from memspan.recipes.engine import Measurements
from memspan.report.schema import Claim, Measurement

QUALITY = {
    "full precision, untuned": 4.0,
    "full fine-tuning": 2.0,
    "LoRA": 2.2,
}
BY_WIDTH = {  # bits per byte at 4, 3 and 2 bits
    "quantized, untuned": (4.0, 4.2, 5.0),
    "LoRA, then quantized": (2.6, 2.9, 4.0),
    "PEQA": (2.4, 2.5, 2.8),
    "QLoRA-like": (2.3, 2.4, 2.6),
    "QLoRA-like, merged": (2.5, 2.7, 3.6),
}


def row(method: str, seed: int, quality: dict[str, float], **setting: str | int) -> Measurement:
    seconds = {"swap": 1e-4, "reload": 5e-2 * (1 + 0.01 * seed)} if setting.get("part") == "switch" else {}
    return Measurement(
        method=method,
        seed=seed,
        setting=dict(setting),
        quality=quality,
        bytes={"parameters": 4},
        seconds=seconds,
    )


def measured(naive: float = 1.1, shift: float = 0.0) -> Measurements:
    rows = []
    for seed in range(5):  # fewer equal units decide nothing
        off = 0.01 * seed
        rows += [row(m, seed, {"bits_per_byte": v + off}) for m, v in QUALITY.items()]
        for method, values in BY_WIDTH.items():
            for bits, value in zip((4, 3, 2), values, strict=True):
                for init in (
                    ("rtn", "optq") if method in ("quantized, untuned", "LoRA, then quantized") else ("rtn",)
                ):
                    worse = shift if method == "PEQA" else 0.0
                    told = {"bits_per_byte": value + off * (4 - bits) + worse, "held_bits": bits + 0.2}
                    rows.append(row(method, seed, told, bits=bits, groups="channel", init=init))
        rows.append(row("PEQA", seed, {"numbers": 6912.0}, part="switch"))
    for name, peak in {"full fine-tuning": 1.0, "PEQA": 0.46, "PEQA by plain autograd": naive}.items():
        told = {"peak": 1e6 * peak, "states": 1e6 * peak**3}
        rows.append(row(name, 0, told, part="memory", tokens=256))
    return Measurements(rows)


def verdicts(claims: list[Claim]) -> dict[str, bool | None]:
    return {one.text: one.holds for one in claims}


def test_claims_hold_on_rows_that_show_them() -> None:
    claims = recipe.judge(measured(), recipe.Options())
    assert len(claims) == 1 + 4 + 1 + 3 + 3 + 3 + 1
    assert all(verdicts(claims).values())
    first = claims[0]
    assert first.measured is not None
    assert 0.7 < first.measured < 0.8  # (4.2 - 2.5) / (4.2 - 2.0)


def test_claims_fail_on_rows_that_do_not() -> None:
    told = verdicts(recipe.judge(measured(naive=0.9, shift=1.5), recipe.Options()))
    assert told["by plain autograd the peak at 256 tokens is above full fine-tuning's"] is False
    assert told["tuning LoRA first and quantizing to 3 bits later (rtn) is worse than PEQA"] is False
    assert next(iter(told.values())) is False


def test_one_timing_of_a_switch_decides_nothing() -> None:
    rows = measured()
    claims = recipe.memory_claims(Measurements(r for r in rows if r.seed == 0), [4, 3, 2])
    assert claims[-1].holds is None


def test_figures_show_quality_by_width_and_the_peak_by_tokens() -> None:
    assert len(recipe.figures(measured(), recipe.Options())) == 3
