"""Streams of events at their borders: ids, times, formats, files larger than memory, and what is refused."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest
import torch

from memspan.banks.temporal import TemporalBatches, TemporalData, batch_report
from memspan.base import BadInput
from memspan.base.files import CorruptFile

COLUMNS = ("src", "dst", "t", "msg", "label", "component")


def stream(count=60, nodes=8, seed=0, width=2):
    draw = np.random.default_rng(seed)
    src, dst = draw.integers(0, nodes, (2, count))
    return TemporalData(
        src, dst, np.sort(draw.integers(0, 500, count)), draw.random((count, width)).astype(np.float32),
        num_nodes=nodes,
    )  # fmt: skip


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("src", "dst", "t", "msg")
    )


# -- ids --


@pytest.mark.parametrize(
    "names",
    [
        ["ann", "bob", "cy", "di"],
        [2**62 + 1, 2**62 + 2, -5, 2**63 - 1],
        [3, 7, 1000, 10**9],
        ["1", "01", "001", " 1"],
    ],
    ids=["text", "hashes", "gaps", "text like numbers"],
)
def test_ids_of_any_kind_become_numbers_in_the_order_of_appearance(names):
    src, dst = [names[1], names[0], names[1]], [names[2], names[3], names[0]]
    data = TemporalData.from_arrays(src, dst, [1, 2, 3])
    assert (data.src.tolist(), data.dst.tolist()) == ([0, 2, 0], [1, 3, 2])
    assert data.nodes.tolist() == [names[1], names[2], names[0], names[3]]


def test_the_same_id_on_both_sides_is_one_node_or_two():
    one = TemporalData.from_arrays([5, 6], [6, 5], [0, 1])
    two = TemporalData.from_arrays([5, 6], [6, 5], [0, 1], bipartite=True)
    assert (one.num_nodes, two.num_nodes) == (2, 4)
    assert (two.src.tolist(), two.dst.tolist(), two.nodes.tolist()) == ([0, 2], [1, 3], [5, 6, 6, 5])
    assert two.is_source.tolist() == [True, False, True, False]
    assert TemporalData.from_arrays(["u"], [3], [0], bipartite=True).nodes.tolist() == ["u", 3]


def test_tomorrows_events_go_on_with_todays_ids_and_origin():
    for bipartite in (False, True):
        today = TemporalData.from_arrays(["a", "b"], ["x", "a"], [100, 110], bipartite=bipartite)
        next_day = TemporalData.from_arrays(
            ["c", "a"], ["x", "new"], [120, 121], bipartite=bipartite, like=today
        )
        whole = TemporalData.from_arrays(
            ["a", "b", "c", "a"], ["x", "a", "x", "new"], [100, 110, 120, 121], bipartite=bipartite
        )
        assert whole.src.tolist() == [*today.src, *next_day.src]
        assert whole.dst.tolist() == [*today.dst, *next_day.dst]
        assert (next_day.num_nodes, next_day.origin) == (whole.num_nodes, 100)
    with pytest.raises(BadInput, match="ends at 110"):
        TemporalData.from_arrays(["c"], ["x"], [90], like=today, bipartite=True)


# -- times --


def test_one_moment_is_one_moment_in_every_unit_and_zone():
    dates = ["2024-05-01T12:00:00+02:00", "2024-05-01T10:00:01Z", "2024-05-01T06:00:02.500-04:00"]
    told = TemporalData.from_arrays([0, 1, 2], [1, 2, 0], dates)
    utc = np.array(["2024-05-01T10:00:00", "2024-05-01T10:00:01", "2024-05-01T10:00:02.5"], "datetime64[ns]")
    exact = TemporalData.from_arrays([0, 1, 2], [1, 2, 0], utc)
    assert told.t.tolist() == exact.t.tolist() == [1714557600000000, 1714557601000000, 1714557602500000]
    moments = [dt.datetime.fromisoformat(date) for date in dates]
    assert (
        TemporalData.from_arrays([0, 1, 2], [1, 2, 0], np.array(moments, object)).t.tolist()
        == told.t.tolist()
    )
    for unit in (1, 1000, 10**9):
        data = TemporalData.from_arrays([0, 1], [1, 0], np.array([1_714_557_600, 1_714_557_601]) * unit)
        (batch,) = TemporalBatches(data, 2)
        assert (batch.t / data.mean_gap).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("t", "says"),
    [
        (np.array([1.7e9, 1.7e9 + 90], np.float32), "lost whole units.*int64 or float64"),
        ([3, 2, 5], "event 1 lies before.*sort=True"),
        ([-1, 2, 3], "event 0: times are finite"),
        ([0.0, np.nan, 1.0], "NaN"),
        ([0.0, 1.0, np.inf], "NaN or infinite"),
        (["2024-01-01", "2024-01-01T00:00:00Z", "2024-01-02"], "event 1: some dates have a zone"),
        (["2024-01-01", "yesterday", "2024-01-02"], "event 1: give a number or an ISO date"),
        (np.array(["2024-01-01", "NaT", "2024-01-02"], "datetime64[s]"), "NaT"),
        ([True, False, True], "bool"),
        ([1, 2], "one of each"),
    ],
)
def test_times_that_cannot_be_meant_are_refused(t, says):
    count = len(t) if len(t) == 2 and not isinstance(t, list) else 3
    with pytest.raises(BadInput, match=says):
        TemporalData.from_arrays(range(count), range(count), t)


def test_small_float32_times_and_equal_times_are_taken_as_they_are():
    data = TemporalData.from_arrays([0, 1, 2], [1, 2, 0], np.array([0, 0.5, 0.5], np.float32))
    assert (data.t.dtype, data.t.tolist()) == (np.float64, [0, 0.5, 0.5])


def test_sorting_keeps_the_order_of_equal_times():
    data = TemporalData.from_arrays(
        [0, 1, 2, 3], [1, 2, 3, 0], [5, 1, 5, 1], msg=[0.0, 1.0, 2.0, 3.0], sort=True
    )
    assert data.msg[:, 0].tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: TemporalData.from_arrays([0.5], [1], [0]), "src.*floats? cannot|whole numbers or text"),
        (lambda: TemporalData.from_arrays(np.array(["a", None], object), [1, 2], [0, 1]), "missing id"),
        (lambda: TemporalData.from_arrays(["a"], [1], [0]), "text_ids"),
        (lambda: TemporalData.from_arrays([0], [1], [0], msg=[[np.nan]]), "NaN"),
        (lambda: TemporalData.from_arrays([0], [1], [0], msg=[[1.0], [2.0]]), "2 rows.*1 times"),
        (lambda: TemporalData(np.array([0]), np.array([5]), np.array([0]), num_nodes=3), "names node 5"),
        (lambda: TemporalData(np.array([-1]), np.array([5]), np.array([0])), "src=-1"),
        (lambda: TemporalData(np.array([0.0]), np.array([5]), np.array([0])), "whole numbers"),
        (lambda: stream().chronological_split(0.5, 0.5), "below 1"),
        (lambda: stream(2).chronological_split(), "empty"),
        (lambda: TemporalBatches(stream(), 0), "batch_size=0"),
        (lambda: TemporalBatches(stream(), 3, time_window=3), "one of the two"),
        (lambda: TemporalBatches(stream(), time_window=0), "time_window=0"),
        (lambda: TemporalBatches(stream(), 3, candidates=np.array([], int)), "candidates"),
        (lambda: batch_report(stream(), 0), "batch_size=0"),
    ],
)
def test_what_is_no_stream_is_refused_with_the_remedy(made, says):
    with pytest.raises(BadInput, match=says):
        made()


# -- files --


def write(path, rows, header="who,what,when,x"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_gives_the_stream_of_its_columns(tmp_path, cached):
    draw = np.random.default_rng(0)
    who, what = draw.integers(100, 110, 50).tolist(), [f"i{k}" for k in draw.integers(0, 5, 50)]
    when, x = np.sort(draw.integers(0, 900, 50)).tolist(), draw.random(50).round(3).tolist()
    rows = [f"{a},{b},{c},{d}" for a, b, c, d in zip(who, what, when, x, strict=True)]
    path = write(tmp_path / "a.csv", rows)
    cache = {"cache": tmp_path / "columns"} if cached else {}
    read = TemporalData.from_csv(path, "who", "what", "when", ["x"], bipartite=True, **cache)
    made = TemporalData.from_arrays(who, what, when, msg=x, bipartite=True)
    assert same(read, made)
    assert read.nodes.tolist() == made.nodes.tolist()
    assert isinstance(read.src, np.memmap) == cached
    if cached:
        stamp = (tmp_path / "columns" / "src.bin").stat().st_mtime_ns
        assert same(TemporalData.from_csv(path, "who", "what", "when", ["x"], bipartite=True, **cache), made)
        assert (tmp_path / "columns" / "src.bin").stat().st_mtime_ns == stamp
        write(path, rows[:-1])
        assert len(TemporalData.from_csv(path, "who", "what", "when", ["x"], bipartite=True, **cache)) == 49
        with (tmp_path / "columns" / "t.bin").open("ab") as file:
            file.write(b"x")
        with pytest.raises(CorruptFile, match="cut short"):
            TemporalData.from_csv(path, "who", "what", "when", ["x"], bipartite=True, **cache)


def test_a_mapped_file_is_sorted_on_the_disk(tmp_path):
    path = write(tmp_path / "a.csv", ["1,2,9,0.5", "3,1,4,1.5", "2,2,9,2.5", "1,3,4,3.5"])
    given = {"cache": tmp_path / "columns", "sort": True}
    read = TemporalData.from_csv(path, "who", "what", "when", ["x"], **given)
    assert (read.t.tolist(), read.msg[:, 0].tolist()) == ([4, 4, 9, 9], [1.5, 3.5, 0.5, 2.5])
    with pytest.raises(BadInput, match="sort=True"):
        TemporalData.from_csv(path, "who", "what", "when", ["x"], cache=tmp_path / "other")
    assert not (tmp_path / "other" / "events.json").exists()


def test_parquet_dates_and_pandas_frames_are_the_same_stream(tmp_path):
    polars, pandas = pytest.importorskip("polars"), pytest.importorskip("pandas")
    when = [dt.datetime(2024, 5, 1, 12, second, tzinfo=dt.UTC) for second in (1, 2, 3)]
    frame = polars.DataFrame({"a": ["x", "y", "x"], "b": ["y", "x", "x"], "t": when, "m": [1.0, 2.0, 3.0]})
    frame.write_parquet(tmp_path / "a.parquet")
    read = TemporalData.from_parquet(tmp_path / "a.parquet", "a", "b", "t", ["m"])
    held = TemporalData.from_pandas(
        pandas.DataFrame({"a": frame["a"].to_list(), "b": frame["b"].to_list(), "t": pandas.to_datetime(when),
                          "m": [1.0, 2.0, 3.0]}).assign(t=lambda f: f["t"].dt.tz_convert("America/New_York")),
        "a", "b", "t", ["m"],
    )  # fmt: skip
    assert same(read, held)
    assert read.t[0] == int(when[0].timestamp()) * 10**6


def test_leading_zeros_are_kept_where_ids_are_text(tmp_path):
    path = write(tmp_path / "a.csv", ["007,7,1,0", "7,007,2,0"])
    assert TemporalData.from_csv(path, "who", "what", "when").num_nodes == 1
    assert TemporalData.from_csv(path, "who", "what", "when", text_ids=True).num_nodes == 2


def test_jodies_rows_are_longer_than_their_header(tmp_path):
    rows = ["0,0,0.0,0,0.5,1.5", "1,0,3.0,1,2.5,3.5"]
    path = write(
        tmp_path / "wiki.csv", rows, "user_id,item_id,timestamp,state_label,comma_separated_list_of_features"
    )
    data = TemporalData.from_jodie(path)
    assert (data.num_nodes, data.bipartite, data.label.tolist()) == (3, True, [0, 1])
    assert data.msg.tolist() == [[0.5, 1.5], [2.5, 3.5]]
    write(path, [*rows, "1,0,3.0,1,2.5"], "h,h,h,h,h")
    with pytest.raises(CorruptFile):
        TemporalData.from_jodie(path)


def test_snaps_format_has_no_header(tmp_path):
    (tmp_path / "a.txt").write_text("1 2 10\n3 1 12\n")
    data = TemporalData.from_snap(tmp_path / "a.txt")
    assert (data.src.tolist(), data.dst.tolist(), data.t.tolist()) == ([0, 2], [1, 0], [10, 12])


def test_a_short_row_is_refused_not_filled(tmp_path):
    path = write(tmp_path / "a.csv", ["1,2,3,4", "1,2,5", "1,2,6,7"])
    with pytest.raises(CorruptFile, match="row 3 has 3 values"):
        TemporalData.from_csv(path, "who", "what", "when", ["x"])


def test_pygs_data_goes_in_and_out():
    pytest.importorskip("torch_geometric")
    data = stream()
    back = TemporalData.from_pyg(data.to_pyg())
    assert (data.to_pyg().t.tolist(), data.to_pyg().msg.shape) == ((data.t - data.t[0]).tolist(), (60, 2))
    assert back.nodes is None or back.nodes[back.src].tolist() == data.src.tolist()


# -- batches --


def test_batches_hold_every_event_once_in_order_and_the_same_negatives_at_every_size():
    data = stream()
    for options in ({"batch_size": 7}, {"batch_size": 100}, {"time_window": 90.0}):
        batches = list(TemporalBatches(data, seed="a", **options))
        assert torch.cat([batch.src for batch in batches]).tolist() == data.src.tolist()
        if "batch_size" in options:
            wrong = torch.cat([batch.negatives for batch in batches])
            (whole,) = TemporalBatches(data, len(data), seed="a")
            assert torch.equal(wrong, whole.negatives)
        else:
            windows = [((batch.t + data.t[0]) // 90).unique() for batch in batches]
            assert all(float(batch.t[-1] - batch.t[0]) < 90 for batch in batches)
            assert len(windows) == len(batches)
    (other,) = TemporalBatches(data, len(data), seed="b")
    assert not torch.equal(other.negatives, whole.negatives)


def test_historical_negatives_were_met_before_and_are_not_in_the_batch():
    data = stream(400, 12)
    history, rest = data.part(0, 200), data.part(200, 400)
    met = {}
    for i, j in zip(history.src, history.dst, strict=True):
        met.setdefault(int(i), set()).add(int(j))
    historical = 0
    for batch in TemporalBatches(rest, 10, sampling="historical", history=history, candidates=np.array([11])):
        now = set(zip(batch.src.tolist(), batch.dst.tolist(), strict=True))
        for i, wrong in zip(batch.src.tolist(), batch.negatives[:, 0].tolist(), strict=True):
            if wrong != 11:
                assert wrong in met[i]
                assert (i, wrong) not in now
                historical += 1
        for i, j in now:
            met.setdefault(i, set()).add(j)
    assert historical > 100


def test_a_report_counts_by_hand_and_a_batch_of_one_hides_nothing():
    data = TemporalData.from_arrays([0, 1, 4, 2, 6], [1, 2, 5, 3, 6], [0, 1, 2, 3, 4])
    report = batch_report(data, 5)  # 0-1, 1-2 after it, 4-5, 2-3 after both, 6-6
    assert (report.pending_share, report.lost_messages, report.rounds, report.batches) == (2 / 5, 3, 3, 1)
    one = batch_report(data, 1)
    assert (one.pending_share, one.rounds) == (0, 5)
    assert "40.0%" in str(report)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "collegemsg",
            {200: (0.828278, 83954, 14429), 800: (0.925445, 99010, 12728), 4000: (0.978708, 110680, 12224)},
        ),
        ("bitcoinotc", {200: (0.838896, 47079, 5824)}),
    ],
)
def test_the_report_of_known_streams(name, expected):
    from memspan import data

    try:
        found = data.load(name, data.TableSet)
    except data.DataNotFound as error:
        pytest.skip(str(error))
    known = TemporalData.from_arrays(found["source"], found["target"], found["time"])
    for size, told in expected.items():
        report = batch_report(known, size)
        assert (round(report.pending_share, 6), report.lost_messages, report.rounds) == told
