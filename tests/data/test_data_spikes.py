"""Spike encoders: sound, pictures, camera events."""

import numpy as np
import pytest

from memspan.base import BadInput
from memspan.data.spikes import audio_to_spikes, bin_events, image_to_events

DTYPE = [("x", int), ("y", int), ("t", int), ("p", int)]


def tone(rate=8000, hertz=440.0, seconds=0.5):
    return np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def test_a_clip_at_another_level_gives_the_same_spikes_bit_for_bit():
    draws = np.random.default_rng(0)
    wave = tone() + 0.3 * draws.normal(size=4000)
    first = audio_to_spikes(wave, 8000)
    assert first.shape == (100, 64)
    assert first.dtype == np.uint8
    assert 0.02 < first.mean() < 0.9
    for factor in (2.0, 0.5, 1024.0):
        assert np.array_equal(first, audio_to_spikes(factor * wave, 8000))


def test_silence_gives_no_spikes():
    for silent in (np.zeros(900), np.zeros((900, 2), np.int16), np.full(900, 128, np.uint8)):
        assert audio_to_spikes(silent, 8000).sum() == 0


@pytest.mark.parametrize(("rate", "n_fft"), [(8000, 256), (44_100, 1024), (48_000, 1024)])
def test_a_tone_lands_in_its_band_at_any_rate(rate, n_fft):
    for hertz in (300.0, 1200.0):
        counts = audio_to_spikes(tone(rate, hertz), rate, n_fft=n_fft).sum(0)
        edges = np.geomspace(100, rate / 2, 66)
        middle = edges[1:-1][counts.argmax()]
        assert middle == pytest.approx(hertz, rel=0.15)


def test_the_current_of_one_frame_by_hand():
    wave = tone(seconds=0.032)  # one window
    spikes = audio_to_spikes(wave, 8000, channels=1, steps=1, low=100.0)
    assert spikes.tolist() == [[1]]  # the loudest band of the loudest frame has current 1: it fires at once
    many = audio_to_spikes(tone(), 8000, channels=8, steps=50)
    assert many.max() == 1
    assert many.sum(0).max() <= 50


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_pcm_and_stereo_are_taken_as_they_are(dtype):
    wave = tone()
    scale = np.iinfo(dtype).max / 2 if np.issubdtype(dtype, np.integer) else 0.5
    pcm = (wave * scale).astype(dtype)
    plain = audio_to_spikes(wave, 8000)
    assert (audio_to_spikes(pcm, 8000) != plain).mean() < 0.01
    stereo = np.stack([pcm, pcm], 1)
    assert np.array_equal(audio_to_spikes(stereo, 8000), audio_to_spikes(pcm, 8000))
    unsigned = (wave * 100 + 128).astype(np.uint8)
    assert (audio_to_spikes(unsigned, 8000) != plain).mean() < 0.1


@pytest.mark.parametrize(
    ("wave", "options", "match"),
    [
        (np.zeros(0), {}, "wave"), (np.array([0.0, np.nan]), {}, "NaN"), (np.array([0.0, np.inf]), {}, "NaN"),
        (np.zeros((2, 900)), {}, "transpose"), (np.zeros((2, 2, 2)), {}, "wave"),
        (np.array(["a"]), {}, "wave"),
        (np.zeros(9), {"steps": 0}, "steps"), (np.zeros(9), {"channels": 0}, "channels"),
        (np.zeros(9), {"low": 4000.0}, "low"), (np.zeros(9), {"low": 0.0}, "low"),
        (np.zeros(9), {"floor": 0.0}, "floor"), (np.zeros(9), {"n_fft": 1}, "n_fft"),
    ],
)  # fmt: skip
def test_bad_sound_is_refused(wave, options, match):
    with pytest.raises(BadInput, match=match):
        audio_to_spikes(wave, 8000, **options)


def test_a_short_clip_and_a_long_one_have_the_same_shape():
    assert audio_to_spikes(np.ones(3), 8000).shape == audio_to_spikes(tone(seconds=3), 8000).shape


def test_one_grey_gives_no_events_and_an_edge_gives_both_kinds():
    grey = np.full((2, 12, 12), 77, np.uint8)
    assert image_to_events(grey).sum() == 0
    edge = grey.copy()
    edge[:, :, 6:] = 255
    events = image_to_events(edge, steps=20)
    assert events.shape == (2, 20, 12, 12, 2)
    assert events[..., 0].sum() > 0
    assert events[..., 1].sum() > 0
    assert not (events[..., 0] & events[..., 1]).any()
    assert np.array_equal(events[0], events[1])


def test_events_of_a_pixel_add_up_to_its_change_of_log_intensity():
    draws = np.random.default_rng(1)
    picture = draws.integers(0, 256, (1, 10, 10)).astype(np.uint8)
    path = [(0.0, 0.0), (0.0, 2.0)]  # ends on a whole pixel: the last view is the picture, rolled
    threshold = 0.01
    events = image_to_events(picture, 200, threshold, path).astype(int)
    level = np.log(0.1 + picture[0] / 255)
    change = np.roll(level, 2, axis=1) - level
    # a step tells one event at most, whatever its size: in 200 small steps few are larger
    net = (events[0, ..., 0] - events[0, ..., 1]).sum(0) * threshold
    assert (np.sign(net) == np.sign(change))[np.abs(change) > 0.2].mean() > 0.95


def test_a_path_and_steps_are_checked():
    picture = np.zeros((1, 4, 4), np.uint8)
    for bad, match in (
        ({"steps": 0}, "steps"),
        ({"threshold": 0.0}, "threshold"),
        ({"path": [(0, 0)]}, "path"),
    ):
        with pytest.raises(BadInput, match=match):
            image_to_events(picture, **bad)
    for wrong in (np.zeros((4, 4), np.uint8), np.zeros((1, 4, 4))):
        with pytest.raises(BadInput, match="uint8 pictures"):
            image_to_events(wrong)


def test_unsorted_events_with_bool_polarity_are_counted_all():
    draws = np.random.default_rng(2)
    events = np.zeros(500, [("t", np.uint32), ("x", np.int16), ("y", np.int16), ("p", bool)])
    for name, end in (("x", 6), ("y", 4), ("p", 2), ("t", 1_000_000)):
        events[name] = draws.integers(0, end, 500)
    frames = bin_events(events, (6, 4), 10)
    assert frames.sum() == 500
    assert np.array_equal(frames, bin_events(np.sort(events, order="t"), (6, 4), 10))
    assert frames[:, 1].sum() == events["p"].sum()
    assert bin_events(events, (6, 4), 10, by="count").sum(axis=(1, 2, 3)).tolist() == [50] * 10


def test_a_crop_keeps_the_middle():
    events = np.array([(0, 0, 0, 1), (2, 2, 1, 1), (5, 3, 2, 0)], DTYPE)
    frames = bin_events(events, (6, 4), 1, crop=(4, 2))
    assert frames.shape == (1, 2, 2, 4)
    assert frames.sum() == 1
    assert frames[0, 1, 1, 1] == 1


def test_no_events_and_one_event():
    assert bin_events(np.zeros(0, DTYPE), (6, 4), 3).shape == (3, 2, 4, 6)
    assert bin_events(np.array([(1, 1, 7, 0)], DTYPE), (6, 4), 3).sum() == 1


@pytest.mark.parametrize(
    ("events", "options", "match"),
    [
        (np.zeros(3), {}, "structured"), (np.array([(9, 0, 0, 0)], DTYPE), {}, "sensor"),
        (np.array([(0, -1, 0, 0)], DTYPE), {}, "sensor"),
        (np.array([(0, 0, 0, -1)], DTYPE), {}, "map -1 to 0"),
        (np.array([(0, 0, 0, 2)], DTYPE), {}, "polarity"), (np.zeros(1, DTYPE), {"steps": 0}, "steps"),
        (np.zeros(1, DTYPE), {"by": "frame"}, "by"), (np.zeros(1, DTYPE), {"crop": (7, 2)}, "crop"),
        (np.zeros(40_000, DTYPE), {"steps": 1}, "more steps"),
    ],
)  # fmt: skip
def test_bad_events_are_refused(events, options, match):
    with pytest.raises(BadInput, match=match):
        bin_events(events, (6, 4), **{"steps": 3} | options)
