"""The user's own data: an npz file, a folder of images or texts, a table, a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memspan.base import BadInput, optional, refuse
from memspan.base.files import CorruptFile
from memspan.data import readers
from memspan.data.formats import read_content, read_delimited, whole
from memspan.data.pictures import IMAGE_ENDINGS, read_picture
from memspan.data.sets import AnySet, ArraySet, ImageSet, TableSet, TextSet, content_sha256
from memspan.data.tables import read_chunks

__all__ = ["read"]

_TEXTS = (".txt", ".md")
_SPLITS = ("train", "test")


def read(
    path: str | Path,
    *,
    seed: int = 0,
    test_share: float = 0.2,
    size: int | None = None,
    target: str | None = None,
    skip_broken: bool = False,
) -> AnySet:
    """Read the user's own data.

    Args:
        path: one of

            - ``.npz`` with ``x_train``, ``y_train`` and perhaps ``x_test``, ``y_test``, or with ``x``, ``y``;
              uint8 images become an :class:`ImageSet`, other arrays an :class:`ArraySet` of all in it;
            - a folder with a folder of images for each class, or with ``train`` and ``test`` above those;
            - ``.csv``, ``.tsv`` (also packed, ``.gz``) or ``.parquet``: a :class:`TableSet`;
            - ``.txt``, ``.md`` (also packed), a folder of those, or ``.jsonl`` with the key ``text``: a
              :class:`TextSet`.
        seed: draws the test part where the data has none; of each class the same share.
        test_share: share of the test part, above 0 and below 1.
        size: side in pixels to which images are scaled; needed where their sizes differ.
        target: of a table: the column to be predicted.
        skip_broken: of a folder of images: go on without those that cannot be used. How many, and what was
            done to the others (turned, scaled from 16 bits, laid on white), stands in the set's ``source``.

    Raises:
        BadInput: what is there cannot be used; says what would be.
        CorruptFile: a file is damaged; of a folder, how many and the first of them.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mine.csv"
        >>> _ = path.write_text("colour,price" + chr(10) + "red,1.5" + chr(10) + "blue,2")
        >>> table = read(path, target="price")
        >>> table.columns["price"].tolist(), table.target
        ([1.5, 2.0], 'price')
    """
    path = Path(path)
    if not 0 < test_share < 1:
        refuse("test_share", test_share, "above 0 and below 1")
    if size is not None and size < 1:
        refuse("size", size, "at least 1 pixel")
    if not path.exists():
        refuse("path", str(path), "there is no such file or folder")
    name = path.name.lower().removesuffix(".gz").removesuffix(".xz")
    ending = Path(name).suffix
    packed = name != path.name.lower()
    kind: type[AnySet]
    done = ""
    if path.is_dir():
        kind, fields, done = _folder(path, seed, test_share, size, skip_broken)
    elif ending == ".npz":
        kind, fields = _npz(path, seed, test_share)
    elif ending in (".csv", ".tsv") or (ending == ".parquet" and not packed):
        kind, fields = TableSet, {"columns": _table(path, ending), "target": target}
        if target is not None and target not in fields["columns"]:
            refuse("target", target, f"{path} has the columns {', '.join(fields['columns'])}")
    elif ending == ".jsonl":
        kind, fields = TextSet, readers.json_lines({"jsonl": path})
    elif ending in _TEXTS:
        kind, fields = TextSet, readers.texts({"text": path})
    else:
        refuse(
            "path",
            str(path),
            "give a .npz, .csv, .tsv, .parquet, .jsonl, .txt or .md file, or a folder of images or texts",
        )
    return kind(
        name=str(path),
        source=f"own data: {path}" + (f" ({done})" if done else ""),
        sha256=content_sha256(readers.content(fields)),
        licence="the user's own",
        **fields,
    )


def _npz(path: Path, seed: int, test_share: float) -> tuple[type[AnySet], dict[str, Any]]:
    with whole(path), np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
    x, y = arrays.get("x_train", arrays.get("x", arrays.get("X"))), arrays.get("y_train", arrays.get("y"))
    if x is None or x.ndim not in (3, 4):
        return ArraySet, {"arrays": arrays}
    if y is None:
        refuse("path", str(path), f"it holds {', '.join(arrays)}; images need labels: add y_train (or y)")
    test_keys = [key for key in ("x_test", "y_test") if key in arrays]
    if len(test_keys) == 1:
        refuse("path", str(path), f"it holds {test_keys[0]} alone; give both x_test and y_test, or none")
    parts = {"train": (x, y)}
    if test_keys:
        parts["test"] = (arrays["x_test"], arrays["y_test"])
    given = arrays.get("classes")
    return ImageSet, _labelled(path, parts, given, seed, test_share)


def _labelled(
    path: Path,
    parts: dict[str, tuple[NDArray[Any], NDArray[Any]]],
    given: NDArray[Any] | None,
    seed: int,
    test_share: float,
) -> dict[str, Any]:
    for part, (x, y) in parts.items():
        if x.dtype != np.uint8:
            refuse(
                f"x_{part}",
                str(x.dtype),
                f"images in {path} must be uint8, 0 to 255; from 0..1: (x * 255).round().astype('uint8')",
            )
        if y.ndim != 1 or len(y) != len(x):
            refuse(f"y_{part}", y.shape, f"{path} has {len(x)} images in this part: one label each")
        if y.dtype.kind not in "iuU":
            refuse(f"y_{part}", str(y.dtype), f"labels in {path} are integers or strings")
    labels = np.concatenate([y for _, y in parts.values()])
    values, codes = np.unique(labels, return_inverse=True)
    if given is not None and labels.dtype.kind in "iu":  # labels are positions in the given names
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(given):
            refuse("classes", len(given), f"labels in {path} run from {labels.min()} to {labels.max()}")
        values, codes = given, labels
    codes = codes.astype(np.int64)
    x_train, _ = parts["train"]
    if "test" in parts:
        train, test = slice(0, len(x_train)), slice(len(x_train), None)
        x_test, y_train, y_test = parts["test"][0], codes[train], codes[test]
    else:
        rows, held = readers.stratified(codes, test_share, seed)
        if not len(rows) or not len(held):
            refuse(
                "path", str(path), "it is too small to be split: at least two images of a class are needed"
            )
        x_train, x_test, y_train, y_test = x_train[rows], x_train[held], codes[rows], codes[held]
    return {
        "x_train": x_train,
        "y_train": y_train,
        "x_test": x_test,
        "y_test": y_test,
        "classes": tuple(str(value) for value in values),
    }


def _folder(
    path: Path, seed: int, test_share: float, size: int | None, skip_broken: bool
) -> tuple[type[AnySet], dict[str, Any], str]:
    """The kind of set, its fields, and what was done to its pictures."""
    folders = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
    texts = sorted(item for item in path.iterdir() if item.suffix.lower() in _TEXTS)
    if texts and not folders:
        documents = []
        for item in texts:
            content = read_content(item)
            with whole(item):
                documents.append(content.decode("utf-8"))
        meta = tuple({"file": item.name} for item in texts)
        return TextSet, {"parts": {"documents": tuple(documents)}, "meta": {"documents": meta}}, ""
    names = {folder.name for folder in folders}
    split = set(_SPLITS) <= names
    if split and names != set(_SPLITS):
        extra = ", ".join(sorted(names - set(_SPLITS)))
        refuse("path", str(path), f"beside train and test it has {extra}; leave two, or none of them")
    roots = {part: path / part for part in _SPLITS} if split else {"train": path}
    found: dict[str, list[tuple[Path, str]]] = {}
    for part, root in roots.items():
        found[part] = [
            (file, folder.name)
            for folder in sorted(item for item in root.iterdir() if item.is_dir())
            for file in sorted(folder.rglob("*"))
            if file.suffix.lower() in IMAGE_ENDINGS
        ]
        if not found[part]:
            refuse("path", str(root), "give a folder that has a folder of images for each class")
    files = [file for items in found.values() for file, _ in items]
    images, done = _decode(files, size, skip_broken)
    parts, start = {}, 0
    for part, items in found.items():
        kept = [place for place in range(start, start + len(items)) if place in images]
        if not kept:
            refuse("path", str(roots[part]), "not one of its pictures can be read")
        labels = np.array([items[place - start][1] for place in kept])
        parts[part] = (np.stack([images[place] for place in kept]), labels)
        start += len(items)
    return ImageSet, _labelled(path, parts, None, seed, test_share), done


def _decode(
    files: Sequence[Path], size: int | None, skip_broken: bool
) -> tuple[dict[int, NDArray[Any]], str]:
    """Pictures by their place in ``files`` and a sentence about what was done to them."""
    pillow = optional("PIL.Image", extra="recipes")
    decoded: dict[int, NDArray[Any]] = {}
    done: Counter[str] = Counter()
    broken = []
    for place, file in enumerate(files):
        try:
            picture = read_picture(file)
        except (BadInput, CorruptFile) as error:
            broken.append(f"{error}")
            continue
        done.update(picture.done)
        decoded[place] = picture.values
        if size is not None:
            image = pillow.fromarray(picture.values).resize((size, size), pillow.Resampling.BILINEAR)
            decoded[place] = np.asarray(image)
    if broken and not (skip_broken and decoded):
        told = f"{len(broken)} of {len(files)} pictures cannot be used, the first: {broken[0]}"
        raise CorruptFile(f"{told}; mend or remove them, or give skip_broken=True to go on without them")
    if broken:
        done[f"left out, the first: {broken[0]}"] = len(broken)
    if any(image.ndim == 3 for image in decoded.values()):
        decoded = {
            place: image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
            for place, image in decoded.items()
        }
    shapes = {image.shape[:2] for image in decoded.values()}
    if len(shapes) > 1:
        shown = ", ".join(f"{high}x{wide}" for high, wide in sorted(shapes)[:3])
        refuse("size", size, f"the images have {len(shapes)} sizes ({shown}, ...): give size, e.g. size=64")
    return decoded, ", ".join(f"{count} {what}" for what, count in done.items())


def _table(path: Path, ending: str) -> dict[str, NDArray[Any]]:
    if ending != ".parquet":
        return read_delimited(path, delimiter="\t" if ending == ".tsv" else ",")
    chunks = list(read_chunks(path))
    if not chunks:
        refuse("path", str(path), "the table has no rows")
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
