"""A liquid state machine: a fixed random recurrent spiking network as an encoder that is never trained.

Its spike counts are the features; a small linear read-out, or a projection that aligns two modalities, is all
that learns. Weights may be tensors or crossbars of fresh cells. Source: Lin et al., Nature Computational
Science 2025; the update is the ``"zero"`` form of :func:`memspan.nn.spiking.lif_step`. The temperature and
the standardisation of counts are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from memspan.base import refuse
from memspan.base.rng import rng, seed_of
from memspan.hardware.crossbar import Crossbar, ResistiveDevice
from memspan.nn.spiking import lif_step

__all__ = [
    "LSMTransformer",
    "LiquidStateMachine",
    "ProjectionHead",
    "ZeroShotAligner",
    "cross_modal_retrieval",
    "multi_positive_contrastive",
]

SILENT, SATURATED = 0.005, 0.5  # firing rates outside of which a liquid tells little


class LiquidStateMachine(nn.Module):
    """A fixed recurrent spiking network; its features are spike counts.

    Args:
        w_in: (C, N), a tensor or a crossbar.
        w_rec: (N, N), likewise.
        decay: share of the potential that stays, 0 to 1.
        v_threshold: above 0; ``math.inf`` never fires.
        features: ``"count"`` of spikes, ``"trace"`` (counts that decay), or ``"binned:k"`` (counts in k parts
            of time, which a read-out can tell apart).

    Shapes: spikes ``(T, B, C)`` to ``(B, N)``, or ``(B, k N)``.

    Raises:
        BadInput: shapes that do not fit, a decay outside 0 to 1, no time steps, inputs that are not 0 or 1.

    Example:
        >>> lsm = LiquidStateMachine.random(8, 20, seed=0)
        >>> lsm((torch.rand(30, 4, 8) < 0.2).float()).shape
        torch.Size([4, 20])
    """

    def __init__(
        self,
        w_in: Tensor | Crossbar,
        w_rec: Tensor | Crossbar,
        decay: float = 0.97,
        v_threshold: float = 1.0,
        features: str = "count",
    ) -> None:
        super().__init__()
        into, back = (w.weight if isinstance(w, Crossbar) else w for w in (w_in, w_rec))
        if into.dim() != 2 or back.shape != (into.shape[1], into.shape[1]):
            refuse("w_rec", tuple(back.shape), f"give (N, N) beside w_in (C, N) = {tuple(into.shape)}")
        if not 0 <= decay <= 1:
            refuse("decay", decay, "a share of the potential: 0 to 1")
        if not v_threshold > 0:
            refuse("v_threshold", v_threshold, "give a threshold above 0")
        kind, _, count = features.partition(":")
        if kind not in ("count", "trace", "binned") or (
            kind == "binned" and not (count.isdigit() and int(count))
        ):
            refuse("features", features, 'use "count", "trace" or "binned:3"')
        self.decay, self.v_threshold, self.features = float(decay), float(v_threshold), features
        for name, weight in (("w_in", w_in), ("w_rec", w_rec)):
            if isinstance(weight, Crossbar):
                setattr(self, name, weight)
            else:
                self.register_buffer(name, weight.detach().clone())

    @classmethod
    def random(
        cls,
        channels: int,
        neurons: int,
        *,
        const: float = 0.07,
        gain: float = 1.0,
        device: ResistiveDevice | None = None,
        decay: float = 0.97,
        v_threshold: float = 1.0,
        features: str = "count",
        seed: int = 0,
        adc_bits: int | None = None,
    ) -> LiquidStateMachine:
        """Arrays of fresh cells whose weights have standard deviation ``const`` (times ``gain`` inside)."""
        device = device or ResistiveDevice.stochastic()
        one = const / (math.sqrt(2) * device.std)
        seeds = [seed_of("liquid", seed, part) % 2**31 for part in ("in", "rec")]
        w_in = Crossbar.random(channels, neurons, device, scale=one, adc_bits=adc_bits, seed=seeds[0])
        w_rec = Crossbar.random(neurons, neurons, device, scale=gain * one, adc_bits=adc_bits, seed=seeds[1])
        return cls(w_in, w_rec, decay, v_threshold, features)

    @torch.no_grad()
    def spikes(self, x: Tensor) -> Tensor:
        """All spikes, (T, B, N)."""
        into = self._times(self.w_in, x)  # the inputs of all steps in one product
        v, fired, found = None, into.new_zeros(into.shape[1:]), []
        for now in into:
            fired, v = lif_step(now + self._times(self.w_rec, fired), v, self.decay, self.v_threshold, "zero")
            found.append(fired)
        return torch.stack(found)

    def forward(self, x: Tensor) -> Tensor:
        """Features of sequences of spikes."""
        if x.dim() != 3 or not x.shape[0]:
            refuse("x", tuple(x.shape), "give spikes (T, B, C) with T of 1 or more")
        if not bool(((x == 0) | (x == 1)).all()):
            refuse("x", "values", "spikes are 0 or 1; count them into steps first, or binarise")
        fired = self.spikes(x.float())
        kind, _, count = self.features.partition(":")
        if kind == "count":
            return fired.sum(0)
        if kind == "trace":
            weights = self.decay ** torch.arange(len(fired) - 1, -1, -1, device=fired.device)
            return torch.einsum("t,tbn->bn", weights, fired)
        return torch.cat([part.sum(0) for part in fired.tensor_split(int(count))], dim=1)

    def firing_rate(self, x: Tensor) -> float:
        """Share of neurons and steps with a spike."""
        return float(self.spikes(x.float()).mean())

    def spectral_radius(self) -> float:
        """Largest absolute eigenvalue of the recurrent weights."""
        back = self.w_rec.weight if isinstance(self.w_rec, Crossbar) else self.w_rec
        return float(torch.linalg.eigvals(back.float()).abs().max())  # type: ignore[union-attr]

    def calibrate_(self, x: Tensor, target_rate: float = 0.05) -> LiquidStateMachine:
        """Set the threshold so that neurons fire at a rate.

        Raises:
            BadInput: no threshold reaches a rate between 0.5 % and 50 % near the target on these inputs.
        """
        if not SILENT <= target_rate <= SATURATED:
            refuse("target_rate", target_rate, "between 0.005 and 0.5: outside a liquid tells little")
        low, high = -12.0, 12.0
        before = self.v_threshold
        for _ in range(24):
            middle = (low + high) / 2
            self.v_threshold = before * 2.0**middle
            low, high = (middle, high) if self.firing_rate(x) > target_rate else (low, middle)
        rate = self.firing_rate(x)
        if not SILENT <= rate <= SATURATED:
            self.v_threshold = before
            refuse("x", f"rate {rate:.3g}", "no threshold gives these inputs a rate near the target")
        return self

    def _times(self, weight: Any, x: Tensor) -> Tensor:
        product: Tensor = weight(x) if isinstance(weight, Crossbar) else x @ weight
        return product


class LSMTransformer:
    """The liquid as a scikit-learn transformer: ``fit`` draws the array, ``transform`` gives counts.

    Args:
        n_neurons: N.
        const: standard deviation of the weights, against a threshold of 1.
        gain: of the recurrent weights over the input's.
        decay: see :class:`LiquidStateMachine`.
        features: likewise.
        seed: of the array. Accuracy varies by array: never report one alone.

    Example:
        >>> X = (np.random.default_rng(0).random((6, 30, 8)) < 0.2).astype(np.uint8)
        >>> LSMTransformer(20).fit(X).transform(X).shape
        (6, 20)
    """

    def __init__(
        self,
        n_neurons: int = 200,
        const: float = 0.07,
        gain: float = 1.0,
        decay: float = 0.97,
        features: str = "count",
        seed: int = 0,
    ) -> None:
        self.n_neurons, self.const, self.gain = n_neurons, const, gain
        self.decay, self.features, self.seed = decay, features, seed

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Arguments by name."""
        names = ("n_neurons", "const", "gain", "decay", "features", "seed")
        return {name: getattr(self, name) for name in names}

    def set_params(self, **params: Any) -> LSMTransformer:
        """Change arguments; takes effect with the next ``fit``."""
        for name, value in params.items():
            if name not in self.get_params():
                refuse("params", name, f"use {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self

    def fit(self, X: ArrayLike, y: Any = None) -> LSMTransformer:
        """Draw the array for the channels of ``X`` (n, T, C); labels are not looked at."""
        spikes = np.asarray(X)
        if spikes.ndim != 3 or not spikes.shape[1]:
            refuse("X", spikes.shape, "give spikes (n, steps, channels)")
        self.n_features_in_ = spikes.shape[2]
        self.liquid_ = LiquidStateMachine.random(
            spikes.shape[2], self.n_neurons, const=self.const, gain=self.gain, decay=self.decay,
            features=self.features, seed=self.seed,
        )  # fmt: skip
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float32]:
        """Features (n, N) of spikes (n, T, C)."""
        spikes = torch.from_numpy(np.asarray(X)).transpose(0, 1)
        found = [self.liquid_(part) for part in spikes.split(256, dim=1)]  # type: ignore[no-untyped-call]
        return torch.cat(found).numpy()

    def fit_transform(self, X: ArrayLike, y: Any = None) -> NDArray[np.float32]:
        """Both in one."""
        return self.fit(X, y).transform(X)


class ProjectionHead(nn.Module):
    """Counts to a place in the shared space: standardise, linear, GELU, unit length.

    Example:
        >>> head = ProjectionHead(20, 8)
        >>> head(torch.rand(5, 20)).norm(dim=1).allclose(torch.ones(5))
        True
    """

    mean: Tensor
    std: Tensor

    def __init__(self, inputs: int, dim: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, dim)
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("std", torch.ones(inputs))

    def forward(self, counts: Tensor) -> Tensor:
        """Unit rows (B, dim)."""
        z = nn.functional.gelu(self.linear((counts - self.mean) / self.std))
        return nn.functional.normalize(z, dim=1)


def multi_positive_contrastive(
    za: Tensor, zb: Tensor, ya: Tensor, yb: Tensor, temperature: float = 0.1
) -> Tensor:
    """Symmetric cross-entropy between two sets of unit rows, where all items of a class match.

    A row or column without a match in the batch counts 0 instead of 0 / 0.

    Args:
        za: (A, D) unit rows.
        zb: (B, D) unit rows.
        ya: (A,) classes.
        yb: (B,) classes.
        temperature: above 0.

    Example:
        >>> z = nn.functional.normalize(torch.eye(3))
        >>> classes = torch.arange(3)
        >>> ours = multi_positive_contrastive(z, z, classes, classes)
        >>> bool(torch.isclose(ours, nn.functional.cross_entropy(z @ z.T / 0.1, classes)))
        True
    """
    if not temperature > 0:
        refuse("temperature", temperature, "give a value above 0; 0.1 is usual")
    logits = za @ zb.T / temperature
    same = (ya[:, None] == yb[None, :]).to(logits.dtype)
    sides = []
    for scores, match in ((logits, same), (logits.T, same.T)):
        count = match.sum(1)
        target = match / count.clamp(min=1)[:, None]
        losses = -(target * scores.log_softmax(1)).sum(1)
        sides.append(losses.mean())
    return (sides[0] + sides[1]) / 2


def cross_modal_retrieval(za: Tensor, zb: Tensor, ya: Tensor, yb: Tensor) -> float:
    """Share of rows of ``za`` whose nearest row of ``zb`` is of their class.

    Raises:
        BadInput: embeddings that are not finite: argmax would give 0 and look like chance.
    """
    if not bool(torch.isfinite(za).all() and torch.isfinite(zb).all()):
        refuse("za", "values", "embeddings hold NaN or infinity: the training diverged")
    return float((yb[(za @ zb.T).argmax(1)] == ya).float().mean())


class ZeroShotAligner(nn.Module):
    """Align the features of two modalities by class, then match classes never seen.

    Args:
        inputs: features of either modality, (N_a, N_b).
        dim: of the shared space.
        temperature: of the contrastive loss.
        seed: of weights and batches.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> y = torch.arange(60) % 3
        >>> a, b = (torch.eye(3)[y] @ torch.randn(3, 12) + 0.1 * torch.randn(60, 12) for _ in range(2))
        >>> aligner = ZeroShotAligner((12, 12), dim=8).fit(a, y, b, y, steps=100)
        >>> aligner.score(a, y, b, y) > (0.9, 0.9)
        True
    """

    def __init__(
        self, inputs: tuple[int, int], dim: int = 64, temperature: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("aligner", seed))
            self.heads = nn.ModuleList([ProjectionHead(width, dim) for width in inputs])
        self.temperature, self.seed = temperature, seed

    def fit(
        self,
        a: Tensor,
        ya: Tensor,
        b: Tensor,
        yb: Tensor,
        *,
        steps: int = 1000,
        batch_size: int = 64,
        lr: float = 1e-3,
        progress: Callable[[int], None] | None = None,
    ) -> ZeroShotAligner:
        """Train both heads on pairs drawn by class; classes of one modality alone are refused.

        Raises:
            BadInput: the modalities have different classes.
        """
        classes = torch.unique(ya)
        if not torch.equal(classes, torch.unique(yb)):
            refuse("yb", torch.unique(yb).tolist(), f"both sides need the same classes: {classes.tolist()}")
        for head, counts in zip(self.heads, (a, b), strict=True):
            head.mean.copy_(counts.mean(0))  # type: ignore[operator, union-attr]
            head.std.copy_(counts.std(0).clamp(min=1e-3))  # type: ignore[operator, union-attr]
        rows = [[torch.nonzero(y == one).flatten() for one in classes] for y in (ya, yb)]
        optimizer = torch.optim.Adam(self.parameters(), lr)
        draws = rng("aligner", self.seed, "batches")
        for step in range(steps):
            drawn = draws.integers(len(classes), size=batch_size)
            picked = [
                torch.stack([side[one][int(draws.integers(len(side[one])))] for one in drawn])
                for side in rows
            ]
            za, zb = self.embed(a[picked[0]], b[picked[1]])
            loss = multi_positive_contrastive(za, zb, ya[picked[0]], yb[picked[1]], self.temperature)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if progress is not None:
                progress(step)
        return self

    def embed(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows of either modality."""
        return self.heads[0](a), self.heads[1](b)

    @torch.no_grad()
    def score(self, a: Tensor, ya: Tensor, b: Tensor, yb: Tensor) -> tuple[float, float]:
        """Retrieval from the first modality to the second, and back.

        Raises:
            BadInput: classes of unequal size on the side that is searched: retrieval often falls on one hub,
                and the score would then be that class's share.
        """
        for name, y in (("ya", ya), ("yb", yb)):
            counts = torch.unique(y, return_counts=True)[1]
            if int(counts.min()) != int(counts.max()):
                refuse(
                    name, counts.tolist(), "give as many test items of each class: chance is 1 / classes then"
                )
        za, zb = self.embed(a, b)
        return cross_modal_retrieval(za, zb, ya, yb), cross_modal_retrieval(zb, za, yb, ya)
