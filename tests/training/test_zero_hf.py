"""ZeRO beside peft, transformers' Trainer and accelerate, on two gloo ranks."""

import importlib.util
from pathlib import Path

import pytest

from training.ranks import answers

if not all(map(importlib.util.find_spec, ("peft", "accelerate", "transformers"))):
    pytest.skip("needs the extras peers and tuning", allow_module_level=True)

FILE = str(Path(__file__).with_name("zero_hf_checks.py"))
CHECKS = ["lora_by_peft_most_layers_frozen", "trainer_saves_and_resumes", "accelerate_without_ddp"]


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("check", CHECKS)
def test_beside_hugging_face(check: str) -> None:
    told = answers(FILE)[2][f"check_{check}"]
    assert not told, told
