"""ZeRO over 1 to 4 gloo ranks: every oracle that needs a group."""

from pathlib import Path

import pytest

from training import zero_checks
from training.ranks import answers, checks_of

FILE = str(Path(zero_checks.__file__))


@pytest.mark.parametrize(("check", "world"), checks_of(zero_checks))
def test_on_ranks(check: str, world: int) -> None:
    told = answers(FILE)[world][check]
    assert not told, told
