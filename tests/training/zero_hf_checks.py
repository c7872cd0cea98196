"""What every rank checks beside Hugging Face's libraries; run by ``test_zero_hf.py``."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import nn

from memspan.base.mismatch import broken_torchvision_hidden
from memspan.ledger import CommLedger, nbytes
from memspan.training import zero
from training.ranks import on
from training.zero_checks import AdamW, mlp, rows, same, whole

with broken_torchvision_hidden(transformers):
    import accelerate
    import peft
    from transformers import Trainer, TrainingArguments


@on(2)
def check_lora_by_peft_most_layers_frozen(rank: int, world: int) -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(1)
        nets.append(
            peft.get_peft_model(
                mlp(), peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
            )
        )
    one, model = nets
    alone = AdamW([p for p in one.parameters() if p.requires_grad])
    optimizer = zero.shard_(model, AdamW, stage=2, deterministic=True)
    for step in range(3):
        alone.zero_grad()
        for each in range(world):
            x, y = rows(step, each)
            (F.mse_loss(one(x), y) / world).backward()
        alone.step()
        x, y = rows(step, rank)
        optimizer.backward(F.mse_loss(model(x), y))
        with CommLedger() as sent:
            optimizer.step()
    same(whole(model), whole(one))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sent.ring < 4 * trained  # nothing frozen travels


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = mlp(32)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": F.mse_loss(self.body(x), y)}


class Rows(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        return {"x": torch.randn(16, generator=draw), "y": torch.randn(4, generator=draw)}


def trainer(folder: str, steps: int, sharded: bool, callbacks: bool = True) -> Any:
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_grad_norm=0.1, learning_rate=0.01, lr_scheduler_type="cosine", warmup_steps=2, save_steps=3,
        use_cpu=True, report_to=[], disable_tqdm=True,
        logging_steps=100, seed=3, weight_decay=0.1, ddp_backend="gloo",
    )  # fmt: skip
    kind = zero.Sharded(torch.optim.AdamW) if sharded else torch.optim.AdamW
    return Trainer(
        Net(), args, train_dataset=Rows(), optimizer_cls_and_kwargs=(kind, {"lr": 0.01}),
        callbacks=[zero.save_shards_callback()] if sharded and callbacks else [],
    )  # fmt: skip


def as_torchrun(rank: int, world: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "ACCELERATE_USE_CPU": "true"}


@on(2)
def check_trainer_saves_and_resumes(rank: int, world: int) -> None:
    as_torchrun(rank, world)
    told = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(told)
    runs = []
    for sharded in (False, True):
        one = trainer(f"{told[0]}/{sharded}", 6, sharded)
        one.train()
        runs.append(whole(one.model))
    same(*runs)
    held = nbytes([*one.optimizer.optimizer.state.values()])
    elements = sum(p.numel() for p in one.model.parameters())
    assert held <= 8 * elements / world + 4 * 40
    again = trainer(f"{told[0]}/True", 6, True)
    again.train(resume_from_checkpoint=f"{told[0]}/True/checkpoint-3")
    same(whole(again.model), runs[0])
    if rank == 1:  # rank 0's part came back, and nothing else: this rank may not go on
        lost = trainer(f"{told[0]}/True", 6, True, callbacks=False)
        lost.create_optimizer()
        lost.optimizer.load_state_dict(
            torch.load(f"{told[0]}/True/checkpoint-3/optimizer.pt", weights_only=True)
        )
        with contextlib.suppress(RuntimeError):
            lost.optimizer.step()
            raise AssertionError("a step with rank 0's states on rank 1")
    else:
        trainer(f"{told[0]}/True", 6, True, callbacks=False).create_optimizer()


@on(2)
def check_accelerate_without_ddp(rank: int, world: int) -> None:
    as_torchrun(rank, world)
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare_model(mlp(), evaluation_mode=True).train()
    optimizer = zero.shard_(model, AdamW, stage=2, deterministic=True)
    one = mlp()
    alone = AdamW(one.parameters())
    for step in range(3):
        alone.zero_grad()
        for each in range(world):
            x, y = rows(step, each)
            (F.mse_loss(one(x), y) / world).backward()
        zero.clip_grad_norm_(one.parameters(), 0.1)
        alone.step()
        x, y = rows(step, rank)
        optimizer.backward(F.mse_loss(model(x), y))
        optimizer.clip_grad_norm_(0.1)
        optimizer.step()
    same(whole(model), whole(one))
