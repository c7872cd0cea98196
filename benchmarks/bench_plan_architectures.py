"""Is a plan true on networks that nobody tuned it for? Plan against the allocator, one real step each.

Thirteen architectures, small, with eight ways to train. The truth is torch's allocator alone: the profiler's
account of every allocation and release from the building of the model to the end of the second step; no
ledger looks on. A plan counts as right where it is within 1 % or does not call itself exact.
"""

from __future__ import annotations

import functools
import gc
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from memspan.base.files import atomic_write
from memspan.ledger import AllocatorPeak, plan
from memspan.ledger.planner import job

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

RESULT = Path(__file__).parent / "results" / "bench_plan_architectures.json"
Case = tuple[Callable[[], nn.Module], Callable[[], Any], Any]


def transformers_cases() -> Iterator[tuple[str, Case]]:
    """Tiny configurations of transformers' classes, drawn anew."""
    import transformers as tf

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    words = {**small, "vocab_size": 500, "max_position_embeddings": 128, "use_cache": False}
    grouped = {**words, "num_key_value_heads": 2}
    heads = {
        "Qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**grouped, head_dim=16)),
        "Gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**grouped, head_dim=16)),
        "Mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**grouped, num_local_experts=4)),
        "OPT": lambda: tf.OPTForCausalLM(
            tf.OPTConfig(**{**words, "ffn_dim": 128, "word_embed_proj_dim": 64})
        ),
        "Mamba": lambda: tf.MambaForCausalLM(
            tf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=500, state_size=8, use_cache=False)
        ),
        "T5": lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=500, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                        decoder_start_token_id=0, use_cache=False)
        ),
        "DeBERTa-v2": lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**words)),
    }  # fmt: skip
    for name, build in heads.items():
        yield name, (build, _words, None)
    yield (
        "Swin",
        (
            lambda: tf.SwinForImageClassification(
                tf.SwinConfig(image_size=64, embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=4)
            ),
            lambda: {"pixel_values": torch.zeros(4, 3, 64, 64), "labels": torch.zeros(4, dtype=torch.long)},
            None,
        ),
    )


def timm_cases() -> Iterator[tuple[str, Case]]:
    """Convolutional networks of timm, where it can be imported."""
    from torchvision_schemas import import_torchvision

    import_torchvision()
    import timm

    for name in ("convnext_atto", "regnety_002", "mobilenetv3_small_050", "coatnet_nano_rw_224"):
        size = 224 if "224" in name else 96
        build = functools.partial(timm.create_model, name, num_classes=10)
        yield name, (build, functools.partial(_images, size), cross_entropy)


class Tagger(nn.Module):
    """A recurrent tagger, as people wrote them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(500, 48)
        self.body = nn.LSTM(48, 64, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(128, 7)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(self.words(ids))[0]).flatten(0, 1)
        return found


def _tagged() -> Any:
    return torch.zeros(6, 40, dtype=torch.long), torch.zeros(6 * 40, dtype=torch.long)


def _words() -> Any:
    ids = torch.arange(4 * 48).view(4, 48) % 500
    return {"input_ids": ids, "labels": ids.clone()}


def _images(size: int) -> Any:
    return torch.zeros(4, 3, size, size), torch.zeros(4, dtype=torch.long)


WAYS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "SGD": {"optimizer": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
    "Adafactor": {"optimizer": torch.optim.Adafactor},
    "checkpointing": {"method": "checkpoint"},
    "accumulation": {"accumulate": 3},
    "bfloat16 autocast": {"method": "autocast"},
    "LoRA": {"method": "lora"},
    "frozen but the head": {"method": "linear_probe"},
}


def allocator_peak(build: Callable[[], nn.Module], batch: Callable[[], Any], loss: Any, way: Any) -> int:
    """The highest point of torch's allocator over building, a first step and the second."""
    gc.collect()
    with AllocatorPeak("cpu") as truth:
        one = job(build, batch(), loss=loss, **way)
        model, optimizer = one.ready()
        model.train()
        for _ in range(2):
            one.step(model, optimizer, one.batch)
    return truth.peak


def main() -> None:
    """Every architecture in every way; a method that refuses a model is told as such."""
    torch.set_num_threads(1)
    cases = {"LSTM tagger": (Tagger, _tagged, cross_entropy), **dict(transformers_cases())}
    cases |= dict(timm_cases())
    rows = []
    for name, (build, batch, loss) in cases.items():
        for way, chosen in WAYS.items():
            row: dict[str, Any] = {"architecture": name, "training": way}
            try:
                found = plan(build, batch(), loss=loss, **chosen)
                real = allocator_peak(build, batch, loss, chosen)
            except Exception as error:  # a table of what happens, whatever it is
                row |= {"refused": f"{type(error).__name__}: {str(error)[:200]}"}
            else:
                error = found.total / real - 1
                right = abs(error) <= 0.01 or not found.exact
                row |= {"planned": found.total, "allocator": real, "error": error, "exact": found.exact}
                row |= {"right": right, "note": found.note}
            rows.append(row)
            print(row, flush=True)
    wrong = [row for row in rows if row.get("right") is False]
    summary = {"cases": len(rows), "wrong": len(wrong), "refused": sum("refused" in row for row in rows)}
    machine = {"torch": torch.__version__, "machine": platform.machine(), "threads": 1}
    document = {"summary": summary, "rows": rows, "environment": machine}
    atomic_write(RESULT, json.dumps(document, indent=1) + "\n")
    print(summary)


if __name__ == "__main__":
    main()
