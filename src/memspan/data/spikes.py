"""Sound, pictures and camera events as spikes: numpy in, numpy out, the same numbers on any machine.

Three encoders. Sound goes through a log-frequency filter bank and an integrate-and-fire neuron for each
band. A picture is moved along a short path, as cameras recorded N-MNIST, and each pixel fires where its log
intensity changes. Events of a real camera are counted in frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from memspan.base import refuse

__all__ = ["audio_to_spikes", "bin_events", "image_to_events"]

Array = NDArray[Any]
PATH = ((-3, -3), (0, 3), (3, -3), (-3, -3))  # row, column: out and two ways back, as N-MNIST's saccades


def audio_to_spikes(
    wave: ArrayLike,
    rate: int,
    channels: int = 64,
    steps: int = 100,
    n_fft: int = 256,
    low: float = 100.0,
    floor: float = 0.1,
) -> NDArray[np.uint8]:
    """A clip as spikes of a bank of bands, stretched to a fixed number of steps.

    Short-time power spectrum, triangular bands in log frequency, amplitude relative to the loudest of the
    clip, ``log1p`` compression, then one integrate-and-fire neuron a band (threshold 1, reset by
    subtraction). A clip that is twice as loud gives the same spikes.

    Args:
        wave: samples (n,), float, or integer PCM of any width; two dimensions (n, c) are averaged over
            channels. uint8 is taken as unsigned PCM around 128.
        rate: samples a second.
        channels: bands, geometric from ``low`` to ``rate / 2``.
        steps: time steps; the hop is ``ceil(n / steps)`` samples.
        n_fft: samples of a window; raise it with the rate (256 at 8 kHz is 32 ms).
        low: lowest edge in Hz.
        floor: relative amplitude at which compression begins.

    Returns:
        uint8 (steps, channels), 0 or 1.

    Raises:
        BadInput: no samples, values that are not finite, more than two dimensions, or a band edge outside
            the spectrum.

    Example:
        >>> tone = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)
        >>> spikes = audio_to_spikes(tone, 8000)
        >>> spikes.shape, int(spikes.sum(0).argmax()) == int(audio_to_spikes(2 * tone, 8000).sum(0).argmax())
        ((100, 64), True)
        >>> int(audio_to_spikes(np.zeros(800), 8000).sum())
        0
    """
    samples = np.asarray(wave)
    if samples.dtype == np.uint8:
        samples = samples.astype(np.float64) - 128
    elif samples.dtype.kind in "iuf":
        samples = samples.astype(np.float64)
    else:
        refuse("wave", str(samples.dtype), "give float or integer samples")
    if samples.ndim == 2:
        if samples.shape[1] > 32:
            refuse("wave", samples.shape, "channels stand last: (samples, channels); transpose it")
        samples = samples.mean(axis=1)
    if samples.ndim != 1 or not samples.size:
        refuse("wave", samples.shape, "give one clip: (samples,) or (samples, channels)")
    if not np.isfinite(samples).all():
        refuse("wave", "values", "it holds NaN or infinity: mend the recording first")
    for name, value, least in (
        ("rate", rate, 1),
        ("channels", channels, 1),
        ("steps", steps, 1),
        ("n_fft", n_fft, 2),
    ):
        if value < least:
            refuse(name, value, f"at least {least}")
    if not 0 < low < rate / 2:
        refuse("low", low, f"the lowest edge lies between 0 and half the rate, {rate / 2:g} Hz")
    if not floor > 0:
        refuse("floor", floor, "give a relative amplitude above 0; 0.1 is usual")
    largest = np.abs(samples).max()
    if largest:  # a power of two, so that the same clip at another level goes through the same numbers
        samples = samples * 2.0 ** -math.frexp(largest)[1]
    hop = -(-samples.size // steps)
    around = np.zeros(steps * hop + 2 * n_fft)
    around[n_fft // 2 : n_fft // 2 + samples.size] = samples
    frames = np.lib.stride_tricks.sliding_window_view(around, n_fft)[: steps * hop : hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(n_fft), axis=1)) ** 2
    loud = np.sqrt(power @ _bands(rate, n_fft, channels, low).T)
    top = loud.max()
    current = np.log1p((loud / top if top else loud) / floor) / math.log1p(1 / floor)
    held = np.zeros(channels)
    spikes = np.zeros((steps, channels), np.uint8)
    for t in range(steps):
        held += current[t]
        spikes[t] = held >= 1
        held -= spikes[t]
    return spikes


def image_to_events(
    images: ArrayLike,
    steps: int = 50,
    threshold: float = 0.3,
    path: Sequence[tuple[float, float]] | None = None,
) -> NDArray[np.uint8]:
    """What an event camera sees of a picture that moves: ON and OFF events of every pixel.

    The log intensity of each pixel is compared with the value at its last event; a step of ``threshold``
    gives an event.

    Args:
        images: (N, H, W), uint8 0 to 255.
        steps: time steps, spread evenly over the segments of the path at constant speed.
        threshold: in log intensity.
        path: offsets (row, column) in pixels that the picture passes through; None is that of N-MNIST.

    Returns:
        uint8 (N, steps, H, W, 2): ON, OFF.

    Raises:
        BadInput: other shapes or dtypes, no steps, or a threshold at or below 0.

    Example:
        >>> square = np.zeros((1, 16, 16), np.uint8)
        >>> square[:, 5:11, 5:11] = 255
        >>> events = image_to_events(square)
        >>> events.shape, bool(events.any()), bool(image_to_events(np.full_like(square, 90)).any())
        ((1, 50, 16, 16, 2), True, False)
    """
    pictures = np.asarray(images)
    if pictures.ndim != 3 or pictures.dtype != np.uint8:
        refuse("images", f"{pictures.dtype} {pictures.shape}", "give uint8 pictures (N, H, W), 0 to 255")
    if steps < 1:
        refuse("steps", steps, "at least 1")
    if not threshold > 0:
        refuse("threshold", threshold, "give a step in log intensity above 0; 0.3 is usual")
    points = np.asarray(PATH if path is None else path, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 2:
        refuse("path", path, "give two or more (row, column) offsets")
    level = np.log(0.1 + pictures / 255.0)
    along = np.linspace(0, len(points) - 1, steps + 1)
    segment = np.minimum(along.astype(int), len(points) - 2)
    places = points[segment] + (along - segment)[:, None] * (points[segment + 1] - points[segment])
    reference = _moved(level, places[0])
    events = np.zeros((len(pictures), steps, *pictures.shape[1:], 2), np.uint8)
    for t in range(steps):
        change = np.trunc((_moved(level, places[t + 1]) - reference) / threshold)
        events[:, t, :, :, 0] = change > 0
        events[:, t, :, :, 1] = change < 0
        reference += change * threshold
    return events


def bin_events(
    events: Array,
    sensor_size: tuple[int, int],
    steps: int,
    by: Literal["time", "count"] = "time",
    crop: tuple[int, int] | None = None,
) -> NDArray[np.int16]:
    """Camera events counted in frames: tonic's ``ToFrame``, without losing any.

    Frames are tonic's. It drops what is left over after the last whole frame (the last event, and more where
    the division leaves a rest); here that stands in the last frame, so that all events are counted.

    Args:
        events: structured array with fields x, y, t, p (tonic's), in any order of time; t in microseconds or
            any unit; p as 0 and 1, or bool. Empty gives empty frames.
        sensor_size: width, height.
        steps: frames.
        by: frames of equal ``"time"``, or of equal ``"count"`` of events.
        crop: width, height of the middle to keep; None keeps all.

    Returns:
        int16 (steps, 2, height, width): counts by polarity, OFF first as p = 0.

    Raises:
        BadInput: missing fields, an event outside of the sensor, a polarity other than 0 and 1, more events
            in a pixel and frame than int16 holds.

    Example:
        >>> dtype = [("x", int), ("y", int), ("t", int), ("p", bool)]
        >>> two = np.array([(3, 1, 900, True), (0, 0, 100, False)], dtype)
        >>> frames = bin_events(two, (4, 2), steps=2)
        >>> frames.shape, int(frames[0, 0, 0, 0]), int(frames[1, 1, 1, 3])
        ((2, 2, 2, 4), 1, 1)
    """
    if events.dtype.names is None or not {"x", "y", "t", "p"} <= set(events.dtype.names):
        refuse("events", str(events.dtype), "give a structured array with fields x, y, t, p")
    if steps < 1:
        refuse("steps", steps, "at least 1")
    if by not in ("time", "count"):
        refuse("by", by, 'use "time" or "count"')
    width, height = sensor_size
    left, top, right, bottom = 0, 0, width, height
    if crop is not None:
        if not (0 < crop[0] <= width and 0 < crop[1] <= height):
            refuse("crop", crop, f"give a width and height of 1 or more within the sensor's {sensor_size}")
        left, top = (width - crop[0]) // 2, (height - crop[1]) // 2
        right, bottom = left + crop[0], top + crop[1]
    frames = np.zeros((steps, 2, bottom - top, right - left), np.int64)
    if not len(events):
        return frames.astype(np.int16)
    order = np.argsort(events["t"], kind="stable")
    x, y, t = (events[name][order].astype(np.int64) for name in ("x", "y", "t"))
    p = events["p"][order].astype(np.int64)
    for name, values, end in (("x", x, width), ("y", y, height), ("p", p, 2)):
        if values.min() < 0 or values.max() >= end:
            told = "polarity is 0 or 1 (map -1 to 0)" if name == "p" else f"the sensor is {sensor_size}"
            refuse(f"events[{name!r}]", f"{values.min()} to {values.max()}", told)
    # tonic's windows; what it leaves over after the last one counts in the last frame here
    if by == "count":
        frame = np.arange(len(t)) // max(len(t) // steps, 1)
    else:
        frame = (t - t[0]) // max(int(t[-1] - t[0]) // steps, 1)
    frame = np.minimum(frame, steps - 1)
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    np.add.at(frames, (frame[inside], p[inside], y[inside] - top, x[inside] - left), 1)
    if frames.max() > np.iinfo(np.int16).max:
        refuse("steps", steps, f"{frames.max()} events fall in one pixel and frame: use more steps")
    return frames.astype(np.int16)


def _bands(rate: int, n_fft: int, channels: int, low: float) -> NDArray[np.float64]:
    """Weights (channels, n_fft // 2 + 1) of triangular bands; an empty one takes its nearest bin."""
    edges = np.geomspace(low, rate / 2, channels + 2)
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    log_edges = np.log(edges)
    place = np.full(bins.shape, -np.inf)
    place[1:] = np.log(bins[1:])
    weights = np.zeros((channels, len(bins)))
    for band in range(channels):
        first, middle, last = log_edges[band : band + 3]
        rising, falling = (place - first) / (middle - first), (last - place) / (last - middle)
        weights[band] = np.clip(np.minimum(rising, falling), 0, None)
        if not weights[band].any():
            weights[band, int(np.abs(bins - edges[band + 1]).argmin())] = 1
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _moved(level: NDArray[np.float64], place: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pictures shifted by a fraction of pixels: bilinear, periodic borders."""
    whole = np.floor(place).astype(int)
    part = place - whole
    moved = np.zeros_like(level)
    for row in (0, 1):
        for column in (0, 1):
            weight = (part[0] if row else 1 - part[0]) * (part[1] if column else 1 - part[1])
            if weight:
                moved += weight * np.roll(level, (whole[0] + row, whole[1] + column), axis=(1, 2))
    return moved
