"""The result of a recipe as one validated document, the same for every system.

Validated when written and when read; unknown fields are refused, so that a result says exactly what the
schema says. The version rises when the meaning of a field changes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memspan.base.files import CorruptFile, atomic_write

__all__ = ["Claim", "DataSource", "Measurement", "Result", "read_result", "write_result"]

Finite = Annotated[float, Field(allow_inf_nan=False)]
Bytes = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSource(_Strict):
    """The data a run used: name, where it came from, SHA-256 of its content, licence where known."""

    name: str
    source: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    licence: str = ""


class Measurement(_Strict):
    """What one method did once: quality, bytes held, seconds.

    Attributes:
        method: the method's name, as tables and legends show it.
        seed: the seed (class order, initialisation, draws) of this unit.
        setting: what else tells this unit from others, e.g. ``{"budget": 1205862, "data": "fashion-mnist"}``.
        quality: metric -> value; higher or lower is better as the metric's name says.
        bytes: category[.part] -> bytes held.
        seconds: phase -> wall-clock seconds. The only part that differs between two equal runs.
        trained: how many numbers this row trained; 0 for a control, None in results older than the field.
        flops: floating-point operations, 2 per multiply-add, where counted.
        series: named curves, e.g. accuracy after each task.
    """

    method: str
    seed: int
    setting: dict[str, str | int | float] = {}
    quality: dict[str, Finite]
    bytes: dict[str, Bytes]
    seconds: dict[str, Annotated[Finite, Field(ge=0)]]
    trained: Annotated[int, Field(ge=0)] | None = None
    flops: Annotated[int, Field(ge=0)] | None = None
    series: dict[str, list[Finite]] = {}


class Claim(_Strict):
    """A statement of the paper, put to the test on this run's own measurements.

    ``holds`` is None when the run is too small to decide. ``expected`` is False for a published claim that
    is known not to survive an honest protocol (at this size); ``why`` then tells the reason. ``needs`` is set
    where this run is below the least size at which the claim is tested: it was not judged at all.
    """

    text: str
    paper: str
    measured: Finite | None
    low: Finite | None = None
    high: Finite | None = None
    unit: str
    expected: bool = True
    holds: bool | None
    why: str = ""
    needs: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Claim:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low={self.low} is above high={self.high}")
        if (not self.expected or self.holds is False) and not self.why:
            raise ValueError(f"claim {self.text!r} is unexpected or does not hold: say why")
        if self.needs and (self.holds is not None or self.measured is not None):
            raise ValueError(f"claim {self.text!r} is judged below its least size ({self.needs})")
        return self

    @property
    def mark(self) -> str:
        """✓ holds, ✗ does not, ? not decided at this size, – not judged below its least size."""
        if self.needs:
            return "–"
        return {True: "✓", False: "✗", None: "?"}[self.holds]


class Result(_Strict):
    """One run of one recipe: ``result.json``.

    Attributes:
        mode: ``"quick"`` with the defaults alone, ``"full"`` with ``--full`` alone, else ``"custom"``.
        changed: for a custom run, the options that make it one, as on the command line.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    recipe: str
    mode: Literal["quick", "full", "custom"]
    changed: dict[str, Any] = {}
    config: dict[str, Any]
    environment: dict[str, Any]
    data: list[DataSource]
    measurements: list[Measurement]
    claims: list[Claim]
    notes: list[str] = []

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def without_times(self) -> dict[str, Any]:
        """The document less everything that may differ between two equal runs (seconds, environment)."""
        document = self.model_dump(by_alias=True, exclude={"environment"})
        for measurement in document["measurements"]:
            del measurement["seconds"]
        return document


def write_result(path: str | os.PathLike[str], result: Result) -> None:
    """Write a result, atomically, never over an earlier one.

    Raises:
        FileExistsError: there is a result already.
        CorruptFile: the result does not validate (a metric is NaN, a byte count negative, ...).
    """
    try:
        text = json.dumps(result.model_dump(by_alias=True), indent=1, ensure_ascii=False, allow_nan=False)
        Result.model_validate_json(text)
    except (ValueError, ValidationError) as error:
        raise CorruptFile(f"the result for {path} does not validate, nothing was written: {error}") from error
    atomic_write(path, text + "\n", overwrite=False)


def read_result(path: str | os.PathLike[str]) -> Result:
    """Read and validate a result.

    Args:
        path: ``result.json``, or the folder that holds it.

    Raises:
        FileNotFoundError: there is none.
        CorruptFile: truncated, not of this schema, or from another version; says where.

    Example:
        >>> read_result("nowhere/result.json")
        Traceback (most recent call last):
        FileNotFoundError: no result at nowhere/result.json
    """
    path = Path(path)
    path = path / "result.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no result at {path}")
    try:
        return Result.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CorruptFile(f"{path} is truncated or not a result of schema 1: {error}") from error
