"""Every system under the contracts: one line each. A line is all that a new system adds to this folder."""

from __future__ import annotations

import functools

import torch
from torch import nn

from conformance.contracts import System
from memspan.banks.temporal import PRES, TGN, Events
from memspan.continual.memo import MEMOClassifier
from memspan.ledger import plan
from memspan.models.efficientvit import EfficientViT
from memspan.models.memoryformer import MemoryFormerConfig, MemoryFormerLM
from memspan.models.unet3d import ReversibleUNet3d
from memspan.nn.spiking import LIF, Unrolled
from memspan.recall import MemoryBankPolicy, SCMPolicy, TiMPolicy
from memspan.training import peqa, slimfit, sltt
from memspan.training.unipt import UniPT


def _images() -> tuple[torch.Tensor]:
    return (torch.randn(4, 3, 112, 112, generator=torch.Generator().manual_seed(0)),)


def _four_channels(model: nn.Module) -> object:
    return model(torch.zeros(1, 4, 112, 112))


def _tokens() -> tuple[torch.Tensor]:
    return (torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)),)


def _unipt() -> UniPT:
    blocks = (nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
    return UniPT(nn.Sequential(*blocks).eval(), "?", out_dim=6)


def _events(count: int, start: float) -> Events:
    draws = torch.Generator().manual_seed(0)
    src, dst, wrong = torch.randint(0, 9, (3, count), generator=draws)
    t = start + torch.arange(count, dtype=torch.float64)
    return Events(src, dst, t, torch.randn(count, 2, generator=draws), None, wrong.unsqueeze(1))


def _temporal() -> TGN:
    model = TGN(9, 2, 8, pres=PRES(), time_scale=1.0, message_dim=6, dropout=0.0)
    for start in (0, 20):
        model.write_(model.view(), _events(12, start))
    return model


def _volumes() -> tuple[torch.Tensor]:
    return (torch.randn(4, 1, 8, 8, 8),)


_MEMO = functools.partial(MEMOClassifier, "resnet8", "2MiB", steps=2, batch_size=8, horizon=(2, 4))
_EFFICIENTVIT = functools.partial(
    EfficientViT, 112, num_classes=3, embed_dim=(16, 32, 48), depth=(1, 1, 1), num_heads=(2, 2, 2)
)


def _on_an_8_bit_grid(seed: int) -> nn.Module:
    """Layers whose weights 8 bits hold exactly, so that undoing brings them back."""
    model = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 8))
    for layer in (model[0], model[2]):
        whole = torch.randint(-128, 128, layer.weight.shape)
        whole[:, 0], whole[:, 1] = -128, 127
        layer.weight.data = whole / 512
    return model


def _rows() -> tuple[torch.Tensor]:
    return (torch.randn(6, 24),)


SYSTEMS = [
    System(
        "efficientvit",
        "module",
        build=lambda seed: _EFFICIENTVIT(),
        example=_images,
        refused=(_four_channels,),
    ),
    System("ledger", "tool", refused=(lambda _: plan(nn.Linear(2, 2), torch.zeros(1, 2), device="abacus"),)),
    System("memo", "learner", build=lambda seed: _MEMO(seed=seed)),
    System("memorybank", "tool", refused=(lambda _: MemoryBankPolicy(time_scale=0),)),
    System(
        "memoryformer",
        "module",
        build=lambda seed: MemoryFormerLM(MemoryFormerConfig(16, 24, 2, 2, bits=4, max_len=8)),
        example=lambda: (torch.arange(64).view(8, 8) % 13,),
        refused=(lambda model: model(torch.full((1, 2), 16)), lambda model: model(torch.zeros(1, 9).long())),
    ),
    System(
        "peqa",
        "inplace",
        build=_on_an_8_bit_grid,
        example=_rows,
        convert=functools.partial(peqa.quantize_, bits=8),
        undo=peqa.dequantize_,
        refused=(peqa.quantize_, lambda model: peqa.set_task(model, peqa.Task({}, "other"))),
    ),
    System(
        "pres",
        "module",
        build=lambda seed: _temporal(),
        example=lambda: (_events(12, 40),),
        loss=lambda answer: answer[0].sum() + answer[1].square().sum(),
        refused=(
            lambda model: model.write_(model.view(), _events(4, -90)),
            lambda model: model(_events(4, 40)._replace(negatives=None)),
        ),
    ),
    System("scm", "tool", refused=(lambda _: SCMPolicy(gamma=0),)),
    System(
        "slimfit",
        "inplace",
        build=lambda seed: nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True),
        example=lambda: (torch.randn(2, 5, 16),),
        convert=slimfit.compress_,
        undo=slimfit.decompress_,
        refused=(slimfit.compress_, lambda model: slimfit.FreezingScheduler(model, 1.0)),
    ),
    System(
        "sltt",
        "inplace",
        build=lambda seed: Unrolled(nn.Sequential(nn.Linear(8, 12), LIF(2.0), nn.Linear(12, 3))),
        example=_tokens,
        convert=sltt.convert_,
        undo=sltt.restore_,
        refused=(sltt.convert_, lambda model: model(torch.zeros(3)), lambda _: LIF(tau=1.0)),
    ),
    System("tim", "tool", refused=(lambda _: TiMPolicy(organise_every=0),)),
    System(
        "unet3d",
        "module",
        build=lambda seed: ReversibleUNet3d(1, 2, (4, 8), depth=2),
        example=_volumes,
        refused=(
            lambda model: model(torch.zeros(1, 1, 8, 9, 8)),
            lambda model: model(torch.zeros(1, 2, 8, 8, 8)),
        ),
    ),
    System(
        "unipt",
        "module",
        build=lambda seed: _unipt(),
        example=_tokens,
        refused=(lambda model: model(*_tokens(), mask=torch.ones(3, 4)),),
    ),
]
