"""A matrix in the conductances of resistive cells: spread, noise, stuck cells, tiles, converters, and energy.

A weight is the difference of two neighbouring cells' conductances. A vector of voltages on the rows gives, on
each pair of columns, a current that is the product; each tile's currents are digitised and added. Fresh cells
that were never programmed have a natural spread, which serves as random weights. All parameters are a model,
not a measurement of a macro. Source: Lin et al., "Resistive memory-based zero-shot liquid state machine for
multimodal event data learning", Nature Computational Science 2025; noise per output is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from memspan.base import refuse
from memspan.base.rng import rng
from memspan.nn import surgery

__all__ = ["Cost", "Crossbar", "CrossbarLinear", "ResistiveDevice", "Swept", "convert_", "robustness_sweep"]


@dataclass(frozen=True)
class ResistiveDevice:
    """One kind of cell; conductances in microsiemens.

    Attributes:
        mean: of the normal distribution of fresh cells, before truncation.
        std: of the same.
        g_min: lowest conductance; a draw outside the range is drawn anew, not clipped.
        g_max: highest.
        read_noise: relative standard deviation, drawn anew at each read.
        p_stuck_on: share of cells that stay at ``g_max``.
        p_stuck_off: share of cells that stay at ``g_min``.
        levels: conductances that programming can reach; None is any.
        program_error: standard deviation of programming, as a share of the range.
        drift_nu: conductance falls as ``age ** -drift_nu``.
        samples: measured conductances to draw fresh cells from, instead of the normal distribution.

    Raises:
        BadInput: negative conductances, an empty range, a mean outside of it, shares outside 0 to 1.

    Example:
        >>> ResistiveDevice(g_min=5, g_max=5)
        Traceback (most recent call last):
        memspan.base.refusal.BadInput: g_max=5: give a range 0 <= g_min < g_max; g_min is 5
    """

    mean: float = 20.0
    std: float = 6.0
    g_min: float = 1.0
    g_max: float = 60.0
    read_noise: float = 0.01
    p_stuck_on: float = 0.001
    p_stuck_off: float = 0.001
    levels: int | None = None
    program_error: float = 0.0
    drift_nu: float = 0.0
    samples: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.g_min < self.g_max < math.inf:
            refuse("g_max", self.g_max, f"give a range 0 <= g_min < g_max; g_min is {self.g_min}")
        if not self.g_min <= self.mean <= self.g_max:
            refuse("mean", self.mean, f"it lies within the range, {self.g_min} to {self.g_max}")
        for name in ("std", "read_noise", "program_error", "drift_nu"):
            if not 0 <= getattr(self, name) < math.inf:
                refuse(name, getattr(self, name), "give 0 or more")
        if min(self.p_stuck_on, self.p_stuck_off) < 0 or self.p_stuck_on + self.p_stuck_off > 1:
            refuse("p_stuck_on", (self.p_stuck_on, self.p_stuck_off), "shares of cells: 0 to 1 together")
        if self.levels is not None and self.levels < 2:
            refuse("levels", self.levels, "at least 2, or None")
        if self.samples and not self.g_min <= min(self.samples) <= max(self.samples) <= self.g_max:
            refuse("samples", f"{min(self.samples)} to {max(self.samples)}", "they lie within g_min to g_max")

    @classmethod
    def stochastic(cls) -> ResistiveDevice:
        """Cells after forming, never programmed."""
        return cls()

    @classmethod
    def ideal(cls) -> ResistiveDevice:
        """No noise, no stuck cells, any level."""
        return cls(read_noise=0.0, p_stuck_on=0.0, p_stuck_off=0.0)

    @classmethod
    def from_samples(cls, g: Iterable[float]) -> ResistiveDevice:
        """Fresh cells drawn from measured conductances, in microsiemens.

        Example:
            >>> ResistiveDevice.from_samples([10.0, 30.0]).sample((2, 3), seed=0).shape
            torch.Size([2, 3])
        """
        known = tuple(float(value) for value in g)
        if len(known) < 2 or not all(math.isfinite(value) and value >= 0 for value in known):
            refuse("g", known[:5], "give two or more conductances, 0 or more")
        mean = sum(known) / len(known)
        return cls(mean=mean, g_min=min(known), g_max=max(known), samples=known)

    def sample(self, shape: tuple[int, ...], *, seed: int, part: str = "cells") -> Tensor:
        """Fresh conductances, stuck cells among them: float32 of ``shape``.

        Stuck cells come from a stream of their own, so that all others are the same at every share.
        """
        draws = rng("crossbar", seed, part)
        if self.samples:
            g = np.asarray(self.samples)[draws.integers(len(self.samples), size=shape)]
        else:
            low, high = ((end - self.mean) / max(self.std, 1e-12) for end in (self.g_min, self.g_max))
            cdf = [0.5 * (1 + math.erf(end / math.sqrt(2))) for end in (low, high)]
            place = cdf[0] + (cdf[1] - cdf[0]) * draws.random(shape)
            normal = torch.special.ndtri(torch.from_numpy(np.clip(place, 1e-300, 1 - 1e-16))).numpy()
            g = np.clip(self.mean + self.std * normal, self.g_min, self.g_max)
        return self._stuck(torch.from_numpy(g).float(), seed, part)

    def _stuck(self, g: Tensor, seed: int, part: str) -> Tensor:
        place = torch.from_numpy(rng("crossbar", seed, part, "stuck").random(tuple(g.shape)))
        g = torch.where(place < self.p_stuck_on, g.new_tensor(self.g_max), g)
        return torch.where(place >= 1 - self.p_stuck_off, g.new_tensor(self.g_min), g)


class Cost(NamedTuple):
    """Energy of one input vector, in joules, and the constants behind it (all can be given anew).

    Attributes:
        cells: current through active cells.
        adc: conversions.
        event_fp32: the digital twin that adds active rows alone, in float32.
        event_int8: the same in int8 with 32-bit sums.
        dense_fp32: the digital twin that multiplies all.
        conversions: analogue to digital, per vector.
    """

    cells: float
    adc: float
    event_fp32: float
    event_int8: float
    dense_fp32: float
    conversions: int


class Crossbar(nn.Module):
    """A matrix (in, out) held in pairs of cells.

    Args:
        g_plus: conductances (in, out) of the positive columns, microsiemens.
        g_minus: the same of the negative columns.
        scale: weight of one microsiemens.
        device: what the cells are.
        tile: rows and columns of cells of a macro; a weight takes two columns.
        adc_bits: of each tile's converters, 1 to 16; None is exact.
        seed: that the array was drawn with; noise uses torch's generator or ``generator``.

    Shapes: ``(..., in)`` to ``(..., out)``. ``eval()`` does not silence the physics; ``read_noise=False`` on
    the module does.

    Example:
        >>> xb = Crossbar.random(64, 200, seed=0)
        >>> xb(torch.ones(3, 64)).shape, xb.tiles, xb.cells
        (torch.Size([3, 200]), [(0, 64, 0, 200)], 25600)
    """

    g_plus: Tensor
    g_minus: Tensor
    g_square: Tensor
    adc_range: Tensor
    scale: Tensor

    def __init__(
        self,
        g_plus: Tensor,
        g_minus: Tensor,
        scale: float,
        device: ResistiveDevice,
        *,
        tile: tuple[int, int] = (512, 512),
        adc_bits: int | None = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if g_plus.dim() != 2 or g_plus.shape != g_minus.shape or not g_plus.numel():
            refuse(
                "g_plus", tuple(g_plus.shape), f"give two matrices (in, out); g_minus {tuple(g_minus.shape)}"
            )
        for name, g in (("g_plus", g_plus), ("g_minus", g_minus)):
            if not bool(torch.isfinite(g).all()) or float(g.min()) < 0:
                refuse(name, float(g.min()), "conductances are 0 or more, in microsiemens")
        if min(tile) < 1:
            refuse("tile", tile, "a tile has 1 row and 1 column of weights or more")
        if adc_bits is not None and not 1 <= adc_bits <= 16:
            refuse("adc_bits", adc_bits, "use 1 to 16 bits, or None for an exact reading")
        self.device, self.tile, self.adc_bits, self.seed = device, tile, adc_bits, seed
        self.register_buffer("scale", torch.tensor(float(scale)))
        #: Whether reads are noisy.
        self.read_noise = True
        #: Time since programming over the reference time; with ``drift_nu`` conductances fall with it.
        self.age = 1.0
        self.register_buffer("g_plus", g_plus.float().clone())
        self.register_buffer("g_minus", g_minus.float().clone())
        self.register_buffer("g_square", torch.empty(0))
        self.register_buffer("adc_range", torch.empty(0))
        self._settle()

    @classmethod
    def random(
        cls,
        inputs: int,
        outputs: int,
        device: ResistiveDevice | None = None,
        *,
        scale: float = 1.0,
        tile: tuple[int, int] = (512, 512),
        adc_bits: int | None = 8,
        seed: int = 0,
    ) -> Crossbar:
        """Random weights out of fresh cells: mean 0, standard deviation ``scale * sqrt(2) * std``.

        Example:
            >>> a, b, other = (Crossbar.random(9, 9, seed=seed).weight for seed in (1, 1, 2))
            >>> bool((a == b).all()), bool((a == other).all())
            (True, False)
        """
        device = device or ResistiveDevice.stochastic()
        plus, minus = (device.sample((inputs, outputs), seed=seed, part=part) for part in ("plus", "minus"))
        return cls(plus, minus, scale, device, tile=tile, adc_bits=adc_bits, seed=seed)

    @classmethod
    def programmed(
        cls,
        weight: Tensor,
        device: ResistiveDevice | None = None,
        *,
        tile: tuple[int, int] = (512, 512),
        adc_bits: int | None = 8,
        seed: int = 0,
    ) -> Crossbar:
        """A trained matrix (in, out), written as :meth:`program_` does.

        Example:
            >>> w = torch.tensor([[0.5, -1.0], [0.25, 0.0]])
            >>> xb = Crossbar.programmed(w, ResistiveDevice.ideal(), adc_bits=None)
            >>> torch.allclose(xb.weight, w)
            True
        """
        device = device or ResistiveDevice.ideal()
        empty = torch.full(tuple(weight.shape), device.g_min)
        return cls(empty, empty, 1.0, device, tile=tile, adc_bits=adc_bits, seed=seed).program_(weight)

    @torch.no_grad()
    def program_(self, weight: Tensor) -> Crossbar:
        """Write a matrix: ``|w| / max|w|`` of the range above ``g_min`` on the cell of its sign.

        Raises:
            BadInput: another shape, or values that are not finite; nothing is written then.
        """
        if weight.shape != self.g_plus.shape or not bool(torch.isfinite(weight).all()):
            refuse("weight", tuple(weight.shape), f"give finite weights of shape {tuple(self.g_plus.shape)}")
        span = self.device.g_max - self.device.g_min
        top = float(weight.abs().max()) or 1.0
        for part, cells, side in (("plus", self.g_plus, weight), ("minus", self.g_minus, -weight)):
            share = side.detach().float().cpu().clamp(min=0) / top
            if self.device.levels is not None:
                share = (share * (self.device.levels - 1)).round() / (self.device.levels - 1)
            if self.device.program_error:
                draws = rng("crossbar", self.seed, part, "program").standard_normal(tuple(share.shape))
                share = (share + self.device.program_error * torch.from_numpy(draws).float()).clamp(0, 1)
            cells.copy_(self.device._stuck(self.device.g_min + span * share, self.seed, part))
        self.scale.fill_(top / span)
        self._settle()
        return self

    @property
    def weight(self) -> Tensor:
        """The matrix (in, out) that the cells hold, without noise."""
        return self.scale * self._aged * (self.g_plus - self.g_minus)

    @property
    def _aged(self) -> float:
        return float(self.age**-self.device.drift_nu)

    @property
    def tiles(self) -> list[tuple[int, int, int, int]]:
        """Macros by first row, end row, first output, end output."""
        rows, pairs = self.tile[0], max(1, self.tile[1] // 2)
        inputs, outputs = self.g_plus.shape
        return [
            (r, min(r + rows, inputs), c, min(c + pairs, outputs))
            for r in range(0, inputs, rows)
            for c in range(0, outputs, pairs)
        ]

    @property
    def cells(self) -> int:
        """Cells that hold weights."""
        return 2 * self.g_plus.numel()

    @property
    def utilisation(self) -> float:
        """Share of the macros' cells that hold weights."""
        return self.cells / (len(self.tiles) * self.tile[0] * 2 * max(1, self.tile[1] // 2))

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of the simulation: conductances, their squares for noise, ranges of converters."""
        return {f"crossbar.{name}": buffer.nbytes for name, buffer in self.named_buffers()}

    @torch.no_grad()
    def calibrate_(self, x: Tensor, percentile: float = 99.9) -> Crossbar:
        """Set each tile's full scale to a percentile of the currents that ``x`` gives."""
        if not 0 < percentile <= 100:
            refuse("percentile", percentile, "above 0, up to 100")
        ranges = []
        for r, r_end, c, c_end in self.tiles:
            part = (x[..., r:r_end].float() @ self.weight[r:r_end, c:c_end]).abs().flatten()
            ranges.append(max(float(np.percentile(part.cpu().numpy(), percentile)), 1e-12))
        self.adc_range.copy_(torch.tensor(ranges))
        return self

    def forward(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The analogue product, read once: noise per output, in distribution that of noise per cell.

        A sum of independent Gaussians is one Gaussian: its variance is ``sigma^2 sum x^2 (G+^2 + G-^2)`` per
        tile, before that tile's converter.

        Raises:
            BadInput: another width, or values that are not finite.
        """
        self._check(x)
        wide = x.float()
        weight, noise = self.weight, self.device.read_noise if self.read_noise else 0.0
        out = wide.new_zeros(*x.shape[:-1], self.g_plus.shape[1])
        for place, (r, r_end, c, c_end) in enumerate(self.tiles):
            part = wide[..., r:r_end] @ weight[r:r_end, c:c_end]
            if noise:
                variance = (wide[..., r:r_end] ** 2) @ self.g_square[r:r_end, c:c_end]
                drawn = torch.empty_like(part, requires_grad=False).normal_(generator=generator)
                part = part + noise * self.scale * self._aged * drawn * variance.detach().sqrt()
            out[..., c:c_end] = out[..., c:c_end] + self._digitised(part, place)
        return out.to(x.dtype) if x.is_floating_point() else out

    def read_cells(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """The reference: every cell draws its own noise for every input vector."""
        self._check(x)
        rows = x.float().reshape(-1, x.shape[-1])
        sigma = self.device.read_noise if self.read_noise else 0.0
        out = rows.new_zeros(len(rows), self.g_plus.shape[1])
        for place, (r, r_end, c, c_end) in enumerate(self.tiles):
            read = []
            for cells in (self.g_plus, self.g_minus):
                g = cells[r:r_end, c:c_end].expand(len(rows), -1, -1)
                drawn = torch.empty_like(g, memory_format=torch.contiguous_format).normal_(
                    generator=generator
                )
                read.append(torch.einsum("br,brc->bc", rows[:, r:r_end], g * (1 + sigma * drawn)))
            part = self.scale * self._aged * (read[0] - read[1])
            out[:, c:c_end] += self._digitised(part, place)
        return out.reshape(*x.shape[:-1], -1)

    def energy(
        self,
        x: Tensor,
        *,
        volts: float = 0.2,
        seconds: float = 10e-9,
        adc: float = 2e-12,
        add: float = 0.9e-12,
        mac: float = 4.6e-12,
        byte: float = 1.25e-12,
        add_int: float = 0.1e-12,
    ) -> Cost:
        """Joules of an average input vector of ``x``, beside digital twins.

        Args:
            x: inputs (n, in); 1 is a row at the reading voltage.
            volts: of a read.
            seconds: of a read.
            adc: of a conversion at 8 bits; it doubles with each further bit.
            add: of a float32 addition (45 nm, Horowitz 2014), as all below.
            mac: of a float32 multiplication and addition.
            byte: read from a small SRAM.
            add_int: of an int32 addition.

        Example:
            >>> g = torch.full((2, 2), 20.0)
            >>> xb = Crossbar(g, g, 1.0, ResistiveDevice.ideal())
            >>> cost = xb.energy(torch.tensor([[1.0, 0.0]]))
            >>> round(cost.cells * 1e15, 3), round(cost.adc * 1e12, 3), cost.conversions
            (32.0, 4.0, 2)
        """
        self._check(x)
        rows = x.float().reshape(-1, x.shape[-1])
        per_row = 1e-6 * self._aged * (self.g_plus + self.g_minus).sum(1)
        cells = float(((volts * rows) ** 2 @ per_row).mean()) * seconds
        conversions = sum(c_end - c for _, _, c, c_end in self.tiles)
        bits = 8 if self.adc_bits is None else self.adc_bits
        active = float((rows != 0).float().sum(1).mean()) * self.g_plus.shape[1]
        return Cost(
            cells=cells,
            adc=conversions * adc * 2.0 ** (bits - 8),
            event_fp32=active * (add + 4 * byte),
            event_int8=active * (add_int + byte),
            dense_fp32=self.g_plus.numel() * (mac + 4 * byte),
            conversions=conversions,
        )

    def extra_repr(self) -> str:
        """Told beside the class in a printed model."""
        inputs, outputs = self.g_plus.shape
        return f"{inputs}, {outputs}, tiles={len(self.tiles)}, adc_bits={self.adc_bits}"

    def _digitised(self, part: Tensor, place: int) -> Tensor:
        if self.adc_bits is None:
            return part
        half = 2 ** (self.adc_bits - 1)
        step = self.adc_range[place] / half
        code = (part / step).round().clamp(-half, half - 1) * step
        through: Tensor = part + (code - part).detach()  # gradients pass straight through
        return through

    def _settle(self) -> None:
        """What follows from the conductances: their squares, and full scales that nothing exceeds."""
        self.g_square = self.g_plus**2 + self.g_minus**2
        weight = self.weight.abs()
        tops = [float(weight[r:e, c:d].sum(0).max()) for r, e, c, d in self.tiles]
        self.adc_range = torch.tensor([max(top, 1e-12) for top in tops], device=weight.device)

    def _check(self, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[-1] != self.g_plus.shape[0]:
            refuse("x", tuple(x.shape), f"the last dimension has {self.g_plus.shape[0]} rows of the array")
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            refuse("x", "values", "it holds NaN or infinity")


class CrossbarLinear(nn.Module):
    """A linear layer on a crossbar; its bias stays digital.

    Example:
        >>> layer = nn.Linear(4, 3)
        >>> on_chip = CrossbarLinear.of(layer, ResistiveDevice.ideal(), adc_bits=None)
        >>> torch.allclose(on_chip(torch.ones(2, 4)), layer(torch.ones(2, 4)), atol=1e-5)
        True
    """

    def __init__(self, crossbar: Crossbar, bias: Tensor | None) -> None:
        super().__init__()
        self.crossbar = crossbar
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def of(
        cls,
        layer: nn.Linear,
        device: ResistiveDevice,
        *,
        tile: tuple[int, int] = (512, 512),
        adc_bits: int | None = 8,
        seed: int = 0,
    ) -> CrossbarLinear:
        """A trained layer, programmed; it is not changed."""
        weight = layer.weight.detach().t()
        xb = Crossbar.programmed(weight, device, tile=tile, adc_bits=adc_bits, seed=seed)
        return cls(xb.to(layer.weight.device), layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``x W + b`` through the array."""
        out = self.crossbar(x)
        return out if self.bias is None else out + self.bias  # type: ignore[no-any-return]


def convert_(
    model: nn.Module,
    device: ResistiveDevice,
    *,
    tile: tuple[int, int] = (512, 512),
    adc_bits: int | None = 8,
    seed: int = 0,
    calibrate: Tensor | None = None,
) -> nn.Module:
    """Put every ``nn.Linear`` of a trained network on crossbars; ``nn.surgery.restore_`` undoes it.

    Args:
        model: changed in place.
        device: the cells.
        tile: see :class:`Crossbar`.
        adc_bits: likewise.
        seed: each layer's array is drawn from it and the layer's name.
        calibrate: example inputs of the model, to set the converters' full scales layer by layer; None
            leaves scales that nothing exceeds, which waste most of the bits.

    Raises:
        BadInput: no linear layers, or converted already.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> type(convert_(model, ResistiveDevice.ideal())[0]).__name__
        'CrossbarLinear'
        >>> type(surgery.restore_(model)[0]).__name__
        'Linear'
    """
    layers = {name: part for name, part in model.named_modules() if type(part) is nn.Linear and name}
    if not layers:
        refuse("model", type(model).__name__, "it has no nn.Linear inside to put on an array")
    made = {
        name: CrossbarLinear.of(
            layer, device, tile=tile, adc_bits=adc_bits, seed=int(rng("crossbar", seed, name).integers(2**31))
        )
        for name, layer in layers.items()
    }
    seen: dict[str, list[Tensor]] = {}
    if calibrate is not None:
        handles = [
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].detach())
            )
            for name, layer in layers.items()
        ]
        with torch.no_grad():
            model(calibrate)
        for handle in handles:
            handle.remove()
    for name, found in seen.items():
        made[name].crossbar.calibrate_(torch.cat([one.reshape(-1, one.shape[-1]) for one in found]))
    return surgery.swap_(model, made)


class Swept(NamedTuple):
    """One point of a sweep: what was varied, its value, the array's seed, and the score."""

    what: str
    value: float
    seed: int
    score: float


def robustness_sweep(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    device: ResistiveDevice | None = None,
    *,
    noise: Iterable[float] = (),
    stuck: Iterable[float] = (),
    bits: Iterable[int] = (),
    seeds: Iterable[int] = (0, 1, 2),
    calibrate: Tensor | None = None,
) -> list[Swept]:
    """Score of a network on arrays that get worse one way at a time, paired by array.

    Args:
        model: left as it is.
        score: of a converted model, such as its accuracy.
        device: what is varied; None starts from an ideal one.
        noise: read noises.
        stuck: shares of stuck cells, half on and half off.
        bits: of the converters; the other points read exactly.
        seeds: arrays; one alone says little.
        calibrate: see :func:`convert_`.

    Returns:
        A row a point (``pandas.DataFrame(rows)`` has them as a table).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> rows = robustness_sweep(model, lambda m: float(m(torch.ones(1, 4)).sum()), noise=[0.1], seeds=[0])
        >>> rows[0].what, rows[0].value, type(model[0]).__name__
        ('noise', 0.1, 'Linear')
    """
    device = device or ResistiveDevice.ideal()
    points: list[tuple[str, float, ResistiveDevice, int | None]] = []
    points += [("noise", value, replace(device, read_noise=value), None) for value in noise]
    points += [
        ("stuck", value, replace(device, p_stuck_on=value / 2, p_stuck_off=value / 2), None)
        for value in stuck
    ]
    points += [("bits", value, device, value) for value in bits]
    if not points:
        refuse("noise", (), "give values of noise, stuck or bits to sweep over")
    rows = []
    for seed in seeds:
        for what, value, varied, converter in points:
            convert_(model, varied, adc_bits=converter, seed=seed, calibrate=calibrate)
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad():
                    torch.manual_seed(seed)
                    rows.append(Swept(what, float(value), seed, float(score(model))))
            finally:
                surgery.restore_(model)
    return rows
