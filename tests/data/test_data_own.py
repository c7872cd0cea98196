import numpy as np
import pytest

from memspan import data
from memspan.base import BadInput
from memspan.base.files import CorruptFile


@pytest.fixture
def images():
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (40, 6, 5), dtype=np.uint8), np.repeat(np.arange(4), 10)


def folder_of_images(root, shapes=((8, 8),), mode="RGB", classes=("cat", "dog"), count=5):
    pillow = pytest.importorskip("PIL.Image")
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            high, wide = shapes[i % len(shapes)]
            shade = 10 + c * 100 + i
            pillow.new(mode, (wide, high), shade if mode == "L" else (shade,) * 3).save(
                root / name / f"{i}.png"
            )
    return root


def test_npz_with_both_parts_is_taken_as_it_is(tmp_path, images):
    x, y = images
    np.savez(tmp_path / "a.npz", x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y[30:])
    mine = data.load(str(tmp_path / "a.npz"), data.ImageSet)
    assert (mine.x_train == x[:30]).all()
    assert mine.y_test.tolist() == y[30:].tolist()
    assert mine.source == f"own data: {tmp_path / 'a.npz'}"


def test_npz_without_a_test_part_is_split_by_seed_and_class(tmp_path, images):
    x, y = images
    np.savez(tmp_path / "a.npz", x=x, y=y)
    one, same, other = (data.read(tmp_path / "a.npz", seed=seed) for seed in (0, 0, 1))
    assert np.bincount(one.y_test).tolist() == [2] * 4
    assert one.sha256 == same.sha256 != other.sha256
    together = np.concatenate([one.x_train, one.x_test])
    assert sorted(map(bytes, together.reshape(40, -1))) == sorted(map(bytes, x.reshape(40, -1)))


def test_labels_may_be_names(tmp_path, images):
    x, y = images
    names = np.array(["d", "b", "a", "c"])[y]
    np.savez(tmp_path / "a.npz", x_train=x, y_train=names, x_test=x, y_test=names)
    mine = data.read(tmp_path / "a.npz")
    assert mine.classes == ("a", "b", "c", "d")
    assert np.array(mine.classes)[mine.y_train].tolist() == names.tolist()


def test_arrays_that_are_no_images_are_kept_as_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.ones((4, 3)), y=np.zeros(4), z=np.arange(2))
    mine = data.read(tmp_path / "a.npz")
    assert isinstance(mine, data.ArraySet)
    assert mine.arrays.keys() == {"X", "y", "z"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x_train": np.ones((4, 2, 2))}, "must be uint8"),
        ({"y_train": np.ones(3, int)}, "one label each"),
        ({"y_train": np.ones(4)}, "integers or strings"),
        ({"y_train": None}, "images need labels"),
        ({"x_test": np.ones((4, 2, 2), np.uint8)}, "both x_test and y_test"),
        ({"classes": np.array(["a"])}, "labels in"),
    ],
)
def test_an_npz_file_that_cannot_be_used_is_refused_with_the_remedy(tmp_path, change, says):
    arrays = {"x_train": np.ones((4, 2, 2), np.uint8), "y_train": np.array([0, 0, 1, 1])} | change
    np.savez(tmp_path / "a.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(BadInput, match=says):
        data.read(tmp_path / "a.npz")


def test_a_folder_of_class_folders_is_split_by_seed_and_class(tmp_path):
    root = folder_of_images(tmp_path / "photos")
    mine = data.load(str(root), data.ImageSet)
    assert mine.classes == ("cat", "dog")
    assert mine.x_train.shape == (8, 8, 8, 3)
    assert np.bincount(mine.y_test).tolist() == [1, 1]
    assert ((mine.x_train[:, 0, 0, 0] >= 110) == (mine.y_train == 1)).all()


def test_a_folder_with_train_and_test_keeps_its_split(tmp_path):
    folder_of_images(tmp_path / "p" / "train", mode="L")
    folder_of_images(tmp_path / "p" / "test", mode="L", count=2)
    mine = data.read(tmp_path / "p")
    assert mine.x_train.shape == (10, 8, 8)
    assert mine.x_test.shape == (4, 8, 8)


def test_images_of_different_sizes_need_a_size(tmp_path):
    root = folder_of_images(tmp_path / "p", shapes=((8, 8), (4, 6)))
    with pytest.raises(BadInput, match=r"size=None.*2 sizes"):
        data.read(root)
    assert data.read(root, size=7).x_train.shape[1:] == (7, 7, 3)


def test_a_damaged_image_is_named(tmp_path):
    root = folder_of_images(tmp_path / "p")
    (root / "dog" / "3.png").write_bytes(b"not an image")
    with pytest.raises(CorruptFile, match=r"3\.png"):
        data.read(root)


def test_tables_and_texts_are_read(tmp_path):
    (tmp_path / "a.tsv").write_text("x\ty\n1\tred\n2\tblue\n")
    table = data.read(tmp_path / "a.tsv", target="y")
    assert (len(table), table.target, table["x"].tolist()) == (2, "y", [1, 2])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "b.txt").write_text("second")
    (tmp_path / "notes" / "a.md").write_text("first")
    notes = data.read(tmp_path / "notes")
    assert notes.parts["documents"] == ("first", "second")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "year": 1}\n{"text": "two", "year": 2}\n')
    lines = data.read(tmp_path / "a.jsonl")
    assert lines.text("documents") == "one\ntwo"
    assert lines.meta["documents"][1] == {"year": 2}
    with pytest.raises(BadInput, match="part='train'"):
        lines.text("train")


def test_parquet_is_read_whole_and_in_chunks_with_the_same_values(tmp_path):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(
        {"i": range(10), "f": [i / 3 for i in range(10)], "s": [f"t{i}" for i in range(10)]}
    )
    frame.write_parquet(tmp_path / "a.parquet")
    table = data.read(tmp_path / "a.parquet")
    assert table["f"].tolist() == frame["f"].to_list()
    chunks = list(data.read_chunks(tmp_path / "a.parquet", ["s", "i"], rows=4))
    assert [len(chunk["i"]) for chunk in chunks] == [4, 4, 2]
    assert [value for chunk in chunks for value in chunk["s"]] == frame["s"].to_list()
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:50])
    with pytest.raises(CorruptFile, match=r"a\.parquet"):
        list(data.read_chunks(tmp_path / "a.parquet"))


def test_a_table_is_read_without_holding_it(tmp_path):
    import tracemalloc

    with (tmp_path / "a.csv").open("w") as file:
        file.write("a,b\n")
        for i in range(100_000):
            file.write(f"{i},{i * 2}\n")
    tracemalloc.start()
    total = sum(int(chunk["b"].sum()) for chunk in data.read_chunks(tmp_path / "a.csv", {"b": int}, rows=500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 100_000 * 99_999
    assert peak < (tmp_path / "a.csv").stat().st_size / 2


def test_a_type_is_found_in_the_whole_file_and_a_given_one_holds(tmp_path):
    (tmp_path / "a.csv").write_text("a\n1\n2\nthree\n")
    with pytest.raises(CorruptFile, match=r"three.*column a|column 'a'|column a.*three"):
        list(data.read_chunks(tmp_path / "a.csv", {"a": int}, rows=2))
    chunks = list(data.read_chunks(tmp_path / "a.csv", rows=2))
    assert [chunk["a"].tolist() for chunk in chunks] == [["1", "2"], ["three"]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"path": "gone.csv"}, "no such file"),
        ({"path": "a.xyz"}, "give a .npz"),
        ({"path": "a.csv", "target": "z"}, "has the columns"),
        ({"path": "a.csv", "test_share": 1.0}, "test_share"),
        ({"path": "empty"}, "a folder of images for each class"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.xyz").touch()
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=says):
        data.read(**arguments)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"columns": ["z"]}, "Known: x"), ({"rows": 0}, "rows=0"), ({"columns": {"x": list}}, "types")],
)
def test_chunks_of_what_is_not_there_are_refused(tmp_path, options, says):
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(BadInput, match=says):
        list(data.read_chunks(tmp_path / "a.csv", **options))
