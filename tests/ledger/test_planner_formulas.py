"""Closed forms for models that are never built, against what the graph of a real block keeps."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memspan.base import BadInput
from memspan.ledger import Ledger, kv_cache_bytes, nbytes, saved_bytes
from memspan.ledger.formulas import bert_block_bytes, gpt_block_bytes, rules_of_thumb, state_bytes
from memspan.models.lm import CausalLM

DROPOUT = 0.1


class _Mask(torch.autograd.Function):
    """Dropout as CUDA has it: a mask of one byte an element is kept."""

    @staticmethod
    def forward(ctx, x):
        mask = torch.rand(x.shape) > DROPOUT
        ctx.save_for_backward(mask)
        return x * mask / (1 - DROPOUT)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0] / (1 - DROPOUT)


class Block(nn.Module):
    """An encoder (post-norm) or decoder (pre-norm) block with eager attention."""

    def __init__(self, width: int, heads: int, pre: bool) -> None:
        super().__init__()
        self.heads, self.pre = heads, pre
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        return x.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        return _Mask.apply(self.o((_Mask.apply(weights) @ v).transpose(1, 2).reshape(x.shape)))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return _Mask.apply(self.down(F.gelu(self.up(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre:
            x = x + self.attend(self.norm1(x))
            return x + self.feed(self.norm2(x))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.feed(x))


@pytest.mark.parametrize(("batch", "length", "width", "heads"), [(4, 32, 64, 4), (2, 10, 24, 3)])
def test_the_form_of_an_encoder_block_is_what_its_graph_keeps(batch, length, width, heads):
    block = Block(width, heads, pre=False)
    x = torch.randn(batch, length, width, requires_grad=True)
    statistics = 2 * 2 * 4 * batch * length  # mean and deviation of a row, two norms
    kept = saved_bytes(block(x), exclude=[block])
    assert kept == bert_block_bytes(batch, length, width, heads) + statistics


@pytest.mark.parametrize(("batch", "length", "width", "heads"), [(4, 32, 64, 4), (2, 10, 24, 3)])
def test_the_form_of_a_decoder_block_in_16_bits_is_what_its_graph_keeps(batch, length, width, heads):
    block = Block(width, heads, pre=True).to(torch.bfloat16)
    x = torch.randn(batch, length, width, dtype=torch.bfloat16, requires_grad=True)
    kept = saved_bytes(block(x), exclude=[block])
    statistics = kept - gpt_block_bytes(batch, length, width, heads)
    assert statistics in (2 * 2 * size * batch * length for size in (2, 4))


@pytest.mark.parametrize("mixed", [False, True])
def test_the_states_of_adam_are_those_of_a_real_step(mixed):
    model = nn.Linear(30, 20, bias=False)
    held = model.to(torch.bfloat16) if mixed else model
    master = [nn.Parameter(p.detach().float()) for p in held.parameters()] if mixed else None
    optimizer = torch.optim.Adam(master or held.parameters(), foreach=False)
    with Ledger(held, optimizer) as led:
        held(torch.ones(1, 30, dtype=held.weight.dtype)).sum().backward()
        if master:
            master[0].grad = held.weight.grad.float()
        optimizer.step()
        if master:
            master[0].grad = None
    said, found = state_bytes(600, mixed=mixed), led.current.by_category
    counter = 4
    copies = 4 * 600 if mixed else 0  # the master copy is a parameter to the ledger, a state to the rule
    assert found["gradients"] == said["gradients"]
    assert found["parameters.trained"] - copies == said["parameters.trained"]
    assert found["optimizer_state"] + copies - counter == said["optimizer_state"]


def test_the_form_of_a_cache_is_what_a_model_allocates_for_it():
    lm = CausalLM(50, d_model=32, n_layers=3, n_heads=4, max_len=20)
    held = nbytes(lm.new_cache(batch=2))
    assert held == kv_cache_bytes(layers=3, kv_heads=4, head_dim=8, tokens=20, batch=2, dtype_bytes=4)


def test_rules_of_thumb_share_their_second_term_over_ranks():
    assert rules_of_thumb(1000, world=4)["2Ψ + 18Ψ/N"] == 2000 + 4500
    assert rules_of_thumb(7, world=4)["2Ψ + 18Ψ/N"] == 14 + 32  # rounded up to whole bytes


@pytest.mark.parametrize("number", [0, -1, 1.5, True])
def test_numbers_that_count_nothing_are_refused(number):
    for call in (
        lambda: bert_block_bytes(number, 1, 1, 1),
        lambda: gpt_block_bytes(1, number, 1, 1),
        lambda: kv_cache_bytes(1, 1, 1, number),
        lambda: state_bytes(number),
        lambda: rules_of_thumb(1, number),
    ):
        with pytest.raises(BadInput, match="1 or more"):
            call()
