"""What the graph keeps: closed forms to the byte, and three independent ways to the same set."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from memspan.base import BadInput
from memspan.ledger import Ledger, saved_bytes
from memspan.ledger.bytes import storages
from memspan.ledger.graph import saved_tensors


class PostNormBlock(nn.Module):
    """The encoder block of BERT with eager attention and dropout on the attention weights too."""

    def __init__(self, hidden: int, heads: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        return x.view(batch, length, self.heads, hidden // self.heads).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        mixed = (F.dropout(weights, self.dropout) @ v).transpose(1, 2).reshape(x.shape)
        x = self.norm1(x + F.dropout(self.o(mixed), self.dropout))
        return self.norm2(x + F.dropout(self.down(F.gelu(self.up(x))), self.dropout))


@pytest.mark.parametrize(("frozen", "expected"), [(False, 788_480), (True, 559_104)])
def test_an_eager_bert_block_keeps_the_closed_form_to_the_byte(frozen: bool, expected: int) -> None:
    batch, length, hidden, heads = 4, 32, 64, 4
    block = PostNormBlock(hidden, heads).requires_grad_(not frozen)
    x = torch.randn(batch, length, hidden, requires_grad=True)
    n = batch * length * hidden
    closed = (44 if frozen else 72) * n + 12 * batch * heads * length**2 + 16 * batch * length
    assert saved_bytes(block(x), exclude=[block]) == closed == expected


@pytest.mark.parametrize("trained", [True, False])
def test_a_linear_layer_keeps_its_input_only_when_it_is_trained(trained: bool) -> None:
    layer = nn.Linear(24, 8).requires_grad_(trained)
    x = torch.randn(5, 24, requires_grad=True)
    assert saved_bytes(layer(x), exclude=[layer]) == (5 * 24 * 4 if trained else 0)


@pytest.mark.parametrize("function", [F.gelu, torch.tanh, lambda x: torch.softmax(x, -1)])
def test_gelu_tanh_and_softmax_keep_one_tensor(function) -> None:
    x = torch.randn(6, 7, requires_grad=True)
    assert saved_bytes(function(x)) == 6 * 7 * 4


def test_relu_shares_its_output_with_the_linear_layer_behind_it() -> None:
    first, second = nn.Linear(8, 16), nn.Linear(16, 4)
    x = torch.randn(3, 8)
    assert saved_bytes(second(torch.relu(first(x))), exclude=[x]) == 3 * 16 * 4


@pytest.mark.parametrize("trained", [True, False])
def test_layer_norm_keeps_its_input_and_two_numbers_a_row_frozen_or_not(trained: bool) -> None:
    norm = nn.LayerNorm(16).requires_grad_(trained)
    x = torch.randn(5, 16, requires_grad=True)
    assert saved_bytes(norm(x), exclude=[norm]) == 5 * 16 * 4 + 5 * 2 * 4


def test_an_embedding_keeps_its_indices_at_eight_bytes_each() -> None:
    assert saved_bytes(nn.Embedding(11, 3)(torch.randint(0, 11, (4, 5)))) == 4 * 5 * 8


def test_dropout_on_the_cpu_keeps_four_bytes_an_element() -> None:
    assert saved_bytes(F.dropout(torch.randn(9, 9, requires_grad=True), 0.5)) == 9 * 9 * 4


def test_fused_attention_keeps_queries_keys_values_output_and_log_sums() -> None:
    q, k, v = (torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3))
    assert saved_bytes(F.scaled_dot_product_attention(q, k, v)) == 16_896


def test_one_projection_for_queries_keys_and_values_is_one_storage() -> None:
    project = nn.Linear(32, 96)
    x = torch.randn(2, 16, 32)
    q, k, v = project(x).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v)
    assert saved_bytes(out, exclude=[x]) == (3 + 1) * 2 * 16 * 32 * 4 + 2 * 4 * 16 * 4


def test_storages_are_counted_once_and_parameters_not() -> None:
    model = nn.Sequential(
        nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256), nn.LayerNorm(256), nn.Linear(256, 10)
    )
    loss = F.cross_entropy(model(torch.randn(64, 256)), torch.randint(0, 10, (64,)))
    raw = sum(tensor.numel() * tensor.element_size() for tensor in saved_tensors([loss]))
    assert (raw, saved_bytes(loss)) == (1_787_908, 724_484)


def test_python_numbers_are_not_tensors_but_zero_dimensional_tensors_are() -> None:
    x = torch.randn(3, requires_grad=True)
    assert saved_bytes(x / 4.0) == 0
    assert saved_bytes(x / torch.tensor(4.0, dtype=torch.float64)) == 8


def test_a_graph_that_was_released_keeps_nothing() -> None:
    loss = torch.randn(8, requires_grad=True).exp().sum()
    assert saved_bytes(loss) == 32
    loss.backward()
    assert saved_bytes(loss) == 0


def test_reading_a_graph_with_an_overwritten_tensor_neither_raises_nor_hides_the_error() -> None:
    x = torch.randn(8, requires_grad=True)
    y = x.exp()
    loss = y.sum()
    y.detach().add_(1)
    assert saved_bytes(loss) == 32
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_reading_a_checkpoint_recomputes_nothing_and_finds_its_input() -> None:
    calls = []

    def part(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x.sin().exp().cos()

    x = torch.randn(16, requires_grad=True)
    y = x * 1.0
    loss = checkpoint(part, y, use_reentrant=False, preserve_rng_state=False).sum()
    assert saved_bytes(loss) == 64
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


def test_reading_does_not_run_the_users_hooks_and_counts_what_they_packed() -> None:
    def never(_: object) -> torch.Tensor:
        raise AssertionError("unpacked")

    x = torch.randn(16, requires_grad=True)
    with saved_tensors_hooks(lambda t: t.half(), never):
        y = x.exp()
    assert saved_bytes(y) == 32


def test_no_tensor_is_refused_with_a_remedy() -> None:
    with pytest.raises(BadInput, match="loss"):
        saved_bytes("nothing")
    assert saved_bytes(torch.zeros(3)) == 0


# -- graph walk = hooks = what is alive after the forward pass ----------------------------------------------


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x * x)
        ctx.extra = torch.ones(5)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3 * ctx.saved_tensors[1]


def _mlp(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x.exp().sigmoid() * 0.5)


OPERATIONS = {
    "linear": lambda x, w: F.linear(x, w),
    "gelu": lambda x, w: F.gelu(x),
    "relu": lambda x, w: F.relu(x),
    "inplace_relu": lambda x, w: F.relu_(x + 1),
    "softmax": lambda x, w: torch.softmax(x, -1),
    "norm": lambda x, w: F.layer_norm(x, x.shape[-1:]),
    "view": lambda x, w: x.t().contiguous().t().mul(x[0]),
    "chunk": lambda x, w: torch.cat([part.sin() for part in x.chunk(2, dim=1)], dim=1),
    "complex": lambda x, w: torch.fft.fft(x).abs() / 6,
    "custom": lambda x, w: Cube.apply(x),
    "checkpoint": lambda x, w: checkpoint(_mlp, x, use_reentrant=False, preserve_rng_state=False),
    "index": lambda x, w: x[torch.tensor([1, 0, 2, 2])],
    "divide": lambda x, w: x / 3.0 + x / (x.detach().abs() + 1),
    "max": lambda x, w: x.max(dim=0).values + x.cummax(dim=0).values,
    "einsum": lambda x, w: torch.einsum("bi,ij->bj", x, w),
    "sparse": lambda x, w: torch.sparse.mm(torch.eye(4).to_sparse(), x),
    "nested": lambda x, w: torch.nested.to_padded_tensor(
        torch.nested.nested_tensor([x[:1].detach(), x[1:].detach()]).sin(), 0.0
    )[1, :1] * x,
    "second": lambda x, w: x
    + torch.autograd.grad(x.pow(3).sum() + (x @ w).pow(2).sum(), x, create_graph=True)[0] * 0.01,
}  # fmt: skip


def _forward(names: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    held = [torch.randn(4, 6), *(nn.Parameter(torch.randn(6, 6) / 3) for _ in names)]
    x = held[0] * 1.0
    x.requires_grad_()
    held.append(x)
    for name, weight in zip(names, held[1:-1], strict=True):
        x = OPERATIONS[name](x, weight)
    return x.square().mean(), held


def _keys(tensors, without) -> dict[int, int]:
    known = {storage._cdata for tensor in without for storage in storages(tensor)}
    return {
        storage._cdata: storage.nbytes()
        for tensor in tensors
        for storage in storages(tensor)
        if storage._cdata not in known and storage.nbytes()
    }


def _walked(names: list[str]) -> tuple[list[int], dict[int, int], dict[int, int]]:
    with Ledger() as led:
        loss, held = _forward(names)
    walk = _keys(saved_tensors([loss]), held)
    alive = {
        key: record.bytes
        for key, record in led._book.live.items()
        if record.bytes and key not in _keys([*held, loss], [])
    }
    return sorted(walk.values()), walk, alive


def _hooked(names: list[str]) -> list[int]:
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        for storage in storages(tensor):
            if storage.nbytes():
                sizes[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss, held = _forward(names)
    known = _keys(held, [])
    return sorted(size for key, size in sizes.items() if key not in known)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.sampled_from([n for n in OPERATIONS if n not in ("nested", "second")]), min_size=1, max_size=6
    )
)
def test_graph_walk_hooks_and_what_lives_after_forward_agree_on_random_nets(names: list[str]) -> None:
    sizes, walk, alive = _walked(names)
    assert walk == alive
    extra = [20] * names.count("custom")  # a tensor on ctx: hooks do not see it, the walk and the ledger do
    assert sizes == sorted(_hooked(names) + extra)


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_graph_walk_equals_hooks_on_each_operation_alone(name: str) -> None:
    sizes, walk, alive = _walked([name])
    if name != "second":  # the inner backward pass saved tensors too, which it has released
        assert sizes == sorted(_hooked([name]) + [20] * (name == "custom"))
    assert walk == alive


@pytest.mark.parametrize(
    "use",
    [
        lambda x, w: x @ w.t(),
        lambda x, w: F.linear(x, w.view(6, 6)),
        lambda x, w: x @ w.chunk(2)[0].t(),
        lambda x, w: x * w[0],
    ],
)
def test_views_of_frozen_parameters_are_held_anyway(use):
    weight = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    x = torch.randn(4, 6, requires_grad=True)
    assert saved_bytes(use(x, weight), exclude=[x]) == 0
    assert saved_bytes(use(x, weight), exclude=[x], parameters=True) == weight.nbytes
