import gzip
import hashlib
import os
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from memspan import data
from memspan.base import BadInput
from memspan.base.files import CorruptFile
from memspan.data import loading
from memspan.data.catalog import Entry, entry
from memspan.data.download import Remote
from memspan.data.readers import idx
from memspan.data.resolvers import Debian, Download, Folder, Package

SHARED = os.environ.get("MEMSPAN_DATA")
needs_shared = pytest.mark.skipif(not SHARED, reason="MEMSPAN_DATA is not set")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSPAN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    monkeypatch.delenv("MEMSPAN_DATA", raising=False)
    real = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda self: "datasets" not in self.parts and real(self))


def idx_files(folder, counts=(4, 2)):
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for part, count in zip(("train", "test"), counts, strict=True):
        images = bytes(range(count * 4))
        labels = bytes(i % 2 for i in range(count))
        files[f"x_{part}"] = struct.pack(">HBB3I", 0, 8, 3, count, 2, 2) + images
        files[f"y_{part}"] = struct.pack(">HBBI", 0, 8, 1, count) + labels
    for key, content in files.items():
        (folder / f"{key}.gz").write_bytes(gzip.compress(content, mtime=0))
    return {key: folder / f"{key}.gz" for key in files}


def made_entry(*ways):
    return Entry(name="made", kind=data.ImageSet, title="t", licence="l", origin="o", size=1, ways=ways)


@pytest.fixture
def put(monkeypatch):
    def put(*ways):
        monkeypatch.setattr(loading, "entry", lambda name: made_entry(*ways))
        monkeypatch.setattr(loading, "catalog", lambda: {"made": None})

    return put


def test_every_entry_says_licence_origin_size_and_how_to_get_it():
    for name, item in data.catalog().items():
        assert item.name == name
        assert item.licence
        assert item.origin
        assert item.size > 0
        assert item.ways
        assert len(item.title) < 100
        order = ["embedded", "package", "folder", "download"]
        assert list(item.resolvers) == sorted(item.resolvers, key=order.index), name
        for way in item.ways:
            if isinstance(way, Download):
                assert way.name == name or name.startswith(way.name)
                for remote in way.remotes.values():
                    algorithm, _, digest = remote.checksum.partition(":")
                    assert len(digest) == {"md5": 32, "sha256": 64}[algorithm]


def test_what_nobody_has_is_refused_with_every_resolver_named_in_order(nowhere, no_network):
    with pytest.raises(data.DataNotFound) as error:
        data.load("fashion-mnist")
    text = str(error.value)
    places = [text.index(f"\n  {name}: ") for name in ("embedded", "package", "folder", "download")]
    assert places == sorted(places)
    for remedy in ("apt-get install dataset-fashion-mnist", "MEMSPAN_DATA", "memspan data get fashion-mnist"):
        assert remedy in text


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(BadInput, match="did you mean fashion-mnist"):
        data.load("fashon-mnist")
    with pytest.raises(BadInput, match="via='hub'"):
        data.load("digits", via="hub")


def test_load_first_takes_what_can_be_had_without_the_network(nowhere, no_network):
    assert data.load_first(("fashion-mnist", "cifar10", "digits")).name == "digits"
    with pytest.raises(data.DataNotFound, match=r"(?s)fashion-mnist cannot.*cifar10 cannot"):
        data.load_first(("fashion-mnist", "cifar10"))
    with pytest.raises(BadInput):
        data.load_first(("digitz",))
    with pytest.raises(BadInput):
        data.load_first(())


def test_another_kind_than_wanted_is_refused():
    with pytest.raises(BadInput, match="it is an ImageSet; here a TableSet is wanted"):
        data.load("digits", data.TableSet)


def test_digits_hold_every_digit_of_scikit_learn_once():
    from sklearn.datasets import load_digits

    digits, bunch = data.load("digits", data.ImageSet), load_digits()
    assert (len(digits.x_train), len(digits.x_test)) == (1438, 359)
    ours = np.concatenate([digits.x_train, digits.x_test]).reshape(1797, -1)
    theirs = np.rint(bunch.images * (255 / 16)).astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))
    share = np.bincount(digits.y_test) / np.bincount(bunch.target)
    assert np.allclose(share, 0.2, atol=0.005)
    assert digits.sha256 == "80413f9c0f237019a04ed60cd2f6e73f3e3752542841c96864eb201042c71e7b"


def test_a_debian_package_answers_before_the_folder(put, tmp_path, monkeypatch):
    paths = idx_files(tmp_path / "deb")
    monkeypatch.setenv("MEMSPAN_DATA", str(tmp_path))
    put(
        Debian(package="dataset-made", paths={k: str(p) for k, p in paths.items()}, read=idx("ab")),
        Folder(paths={k: f"deb/{p.name}" for k, p in paths.items()}, read=idx("ab")),
    )
    first, second = data.load("made"), data.load("made", via="folder")
    assert first.source == f"Debian package dataset-made: {(tmp_path / 'deb').as_posix()}"
    assert second.source == "MEMSPAN_DATA: deb"
    assert first.sha256 == second.sha256
    assert first.x_train.tolist() == np.arange(16).reshape(4, 2, 2).tolist()


def test_a_corrupt_file_is_refused_and_no_other_resolver_takes_its_place(put, tmp_path, monkeypatch):
    paths = idx_files(tmp_path / "deb")
    paths["x_train"].write_bytes(paths["x_train"].read_bytes()[:-9])
    monkeypatch.setenv("MEMSPAN_DATA", str(tmp_path))
    idx_files(tmp_path / "good")
    put(
        Debian(package="p", paths={k: str(p) for k, p in paths.items()}, read=idx("ab")),
        Folder(paths={k: f"good/{p.name}" for k, p in paths.items()}, read=idx("ab")),
    )
    with pytest.raises(CorruptFile, match=r"x_train\.gz is truncated"):
        data.load("made")


def test_content_other_than_the_known_is_refused(put, tmp_path, monkeypatch):
    paths = idx_files(tmp_path / "deb")
    monkeypatch.setenv("MEMSPAN_DATA", str(tmp_path))
    relative = {k: f"deb/{p.name}" for k, p in paths.items()}
    put(Folder(paths=relative, read=idx("ab"), sha256="0" * 64))
    with pytest.raises(CorruptFile, match="not the known content"):
        data.load("made")


def test_labels_beyond_the_classes_are_refused(put, tmp_path, monkeypatch):
    paths = idx_files(tmp_path / "deb")
    monkeypatch.setenv("MEMSPAN_DATA", str(tmp_path))
    put(Folder(paths={k: f"deb/{p.name}" for k, p in paths.items()}, read=idx("a")))
    with pytest.raises(CorruptFile, match="labels run from 0 to 1, 1 classes"):
        data.load("made")


def test_an_installed_package_is_read_without_importing_it(put, tmp_path, monkeypatch):
    package = tmp_path / "site" / "madepackage"
    paths = idx_files(package / "files")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    relative = {k: f"files/{p.name}" for k, p in paths.items()}
    put(Package(module="madepackage", distribution="made-package", paths=relative, read=idx("ab")))
    assert len(data.load("made").x_train) == 4
    paths["y_test"].unlink()
    with pytest.raises(data.DataNotFound, match=r"lacks files/y_test\.gz"):
        data.load("made")


def test_a_wheel_in_the_data_folder_is_read_in_place(put, tmp_path, monkeypatch):
    paths = idx_files(tmp_path / "files")
    with zipfile.ZipFile(tmp_path / "made_package-1.0-py3-none-any.whl", "w") as wheel:
        for path in paths.values():
            wheel.write(path, f"madepackage/files/{path.name}")
    relative = {k: f"files/{p.name}" for k, p in paths.items()}
    put(
        Package(
            module="madepackage", distribution="made-package", paths=relative, wheel_only=True, read=idx("ab")
        )
    )
    monkeypatch.delenv("MEMSPAN_DATA", raising=False)
    with pytest.raises(data.DataNotFound, match="pip download --no-deps made-package"):
        data.load("made")
    monkeypatch.setenv("MEMSPAN_DATA", str(tmp_path))
    assert data.load("made").source.startswith("wheel made_package-1.0-py3-none-any.whl")
    (tmp_path / "made_package-1.0-py3-none-any.whl").write_bytes(b"PK broken")
    with pytest.raises(data.DataNotFound, match="not readable"):
        data.load("made")


def test_a_download_needs_leave_and_is_kept_and_checked_from_then_on(put, tmp_path, monkeypatch):
    paths, fetched = idx_files(tmp_path / "server"), []
    remotes = {
        key: Remote(
            f"http://example.invalid/{path.name}",
            1,
            "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for key, path in paths.items()
    }

    def stream(remote, part, progress):
        fetched.append(remote.url)
        part.write_bytes((tmp_path / "server" / remote.filename).read_bytes())
        return True

    monkeypatch.setattr("memspan.data.download._stream", stream)
    put(Download(name="made", remotes=remotes, read=idx("ab")))
    with pytest.raises(data.DataNotFound, match="memspan data get made"):
        data.load("made")
    assert fetched == []
    assert len(data.get("made", progress=False).x_test) == 2
    assert len(fetched) == 4
    assert data.load("made").source.startswith("download: http://example.invalid/x_train.gz")
    data.load("made", allow_download=True)
    assert len(fetched) == 4
    (tmp_path / "cache" / "downloads" / "made" / "x_test.gz").write_bytes(b"other")
    with pytest.raises(CorruptFile, match="remove it and fetch it again"):
        data.load("made")


def test_get_without_a_download_says_how_else(nowhere, no_network):
    with pytest.raises(data.DataNotFound, match="MEMSPAN_DATA is not set"):
        data.get("adult")


def test_rows_tell_what_would_answer_without_touching_the_network(nowhere, no_network):
    rows = {row.entry.name: row for row in data.rows()}
    assert rows.keys() == data.catalog().keys()
    assert rows["digits"].available == "embedded"
    assert rows["cifar10"].available is None
    assert "memspan data get cifar10" in rows["cifar10"].source


def test_importing_data_loads_no_torch():
    heavy = "('torch', 'sklearn', 'PIL')"
    code = f"import sys, memspan.data as d; d.rows(); print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_subset_keeps_order_and_takes_the_same_number_of_each_class():
    digits = data.load("digits", data.ImageSet)
    small = digits.subset(7, 3)
    assert np.bincount(small.y_train).tolist() == [7] * 10
    first = [np.flatnonzero(digits.y_train == label)[:7] for label in range(10)]
    assert (small.x_train == digits.x_train[np.sort(np.concatenate(first))]).all()
    assert digits.subset(7, 3, seed=1).sha256 == digits.subset(7, 3, seed=1).sha256
    assert len({small.sha256, digits.sha256, digits.subset(7, 3, seed=1).sha256}) == 3
    with pytest.raises(BadInput, match="train_per_class=1000"):
        digits.subset(1000)


@pytest.mark.parametrize(
    ("per_task", "first", "sizes"), [(2, None, [2] * 5), (1, 5, [5] + [1] * 5), (10, None, [10])]
)
def test_tasks_share_no_class_and_hold_every_image_once(per_task, first, sizes):
    digits = data.load("digits", data.ImageSet)
    tasks = data.class_tasks(digits, per_task, seed=3, first=first)
    assert [len(task.classes) for task in tasks] == sizes
    assert sorted(label for task in tasks for label in task.classes) == list(range(10))
    for task in tasks:
        assert set(task.y_train) == set(task.y_test) == set(task.classes)
    together = np.concatenate([task.x_train for task in tasks])
    assert sorted(x.tobytes() for x in together) == sorted(x.tobytes() for x in digits.x_train)
    orders = [[t.classes for t in data.class_tasks(digits, 2, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("per_task", "first"), [(3, None), (0, None), (11, None), (2, 11), (4, 5)])
def test_uneven_tasks_are_refused(per_task, first):
    with pytest.raises(BadInput):
        data.class_tasks(data.load("digits", data.ImageSet), per_task, 0, first=first)


@needs_shared
@pytest.mark.parametrize("name", sorted(n for n, e in data.catalog().items() if "folder" in e.resolvers))
def test_every_set_of_the_data_folder_loads_with_its_known_checksum(name):
    item = entry(name)
    way = next(way for way in item.ways if way.resolver == "folder")
    loaded = data.load(name, via="folder")
    assert loaded.sha256 == way.sha256
    assert loaded.source.startswith("MEMSPAN_DATA: ")
    assert isinstance(loaded, item.kind)


@needs_shared
def test_known_facts_of_the_image_sets_hold():
    fashion = data.load("fashion-mnist", data.ImageSet, via="folder")
    assert np.bincount(fashion.y_train).tolist() == [1000] * 10
    assert np.bincount(fashion.y_test).tolist() == [200] * 10
    mnist = data.load("mnist", data.ImageSet, via="folder")
    assert len(mnist.x_train) == 10_000
    assert not {x.tobytes() for x in mnist.x_train} & {x.tobytes() for x in mnist.x_test}
    cifar = data.load("cifar10-jpeg", data.ImageSet)
    assert cifar.y_train.tolist() == [i % 10 for i in range(8000)]
    assert cifar.x_test.shape == (2000, 32, 32, 3)
    assert len(cifar.jpeg_train) == 8000
    assert cifar.classes[0] == "airplane"


@needs_shared
def test_known_facts_of_texts_and_tables_hold():
    shakespeare = data.load("tiny-shakespeare", data.TextSet)
    text = shakespeare.text("train") + shakespeare.text("valid")
    assert hashlib.sha256(text.encode()).hexdigest().startswith("86c4e6aa9db7c042")
    sick = data.load("sick", data.TableSet)
    labels, counts = np.unique(sick["entailment_label"].astype(str), return_counts=True)
    assert dict(zip(labels.tolist(), counts.tolist(), strict=True)) == {
        "CONTRADICTION": 1424,
        "ENTAILMENT": 2821,
        "NEUTRAL": 5595,
    }
    messages = data.load("collegemsg", data.TableSet)
    assert len(messages) == 59_835
    assert (np.diff(messages["time"]) >= 0).all()
    assert len(set(messages["source"]) | set(messages["target"])) == 1899
    assert len(data.load("sotu", data.TextSet).parts["documents"]) == 233
    sounds = data.load("fsdd", data.ArraySet)
    assert sounds["test"].sum() == 300
    with pytest.raises(BadInput, match="wave"):
        sounds["wave"]
