"""Load by name: try the resolvers in order, check what they give, and say where it came from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar, overload

from memspan.base import refuse
from memspan.base.files import CorruptFile
from memspan.data.catalog import Entry, catalog, entry
from memspan.data.own import read
from memspan.data.readers import content
from memspan.data.resolvers import DataNotFound, Download, Way
from memspan.data.sets import AnySet, DataSet, content_sha256

__all__ = ["Resolver", "get", "load", "load_first"]

Resolver = Literal["embedded", "package", "folder", "download"]
_RESOLVERS = ("embedded", "package", "folder", "download")
Kind = TypeVar("Kind", bound=DataSet)


@overload
def load(
    name: str, kind: type[Kind], *, via: Resolver | None = None, allow_download: bool = False
) -> Kind: ...
@overload
def load(
    name: str, kind: None = None, *, via: Resolver | None = None, allow_download: bool = False
) -> AnySet: ...
def load(
    name: str,
    kind: type[DataSet] | None = None,
    *,
    via: Resolver | None = None,
    allow_download: bool = False,
) -> DataSet:
    """Load a data set of the catalogue, or the user's own data by its path.

    The resolvers are tried in order: embedded, package, folder (``MEMSPAN_DATA``), download. What a download
    brought earlier is used; the network itself is used only when allowed.

    Args:
        name: a name of :func:`catalog`, or the path of the user's own data (see :func:`read`).
        kind: the kind that the caller can use, e.g. ``ImageSet``; any other is refused.
        via: use this resolver alone.
        allow_download: fetch the official files when nothing else answers.

    Returns:
        An :class:`ImageSet`, :class:`TextSet`, :class:`TableSet`, :class:`ArraySet` or :class:`FileSet`.

    Raises:
        BadInput: no such name and no such path, or not of the wanted kind.
        DataNotFound: known, but no resolver can give it here; says what each one lacks.
        CorruptFile: a file is there but truncated or altered. No other resolver takes its place silently.

    Example:
        >>> digits = load("digits")
        >>> digits.x_train.shape, digits.x_train.dtype, len(digits.classes)
        ((1438, 8, 8), dtype('uint8'), 10)
    """
    if via is not None and via not in _RESOLVERS:
        refuse("via", via, f"one of {', '.join(_RESOLVERS)}, or None for all in this order")
    if name not in catalog() and Path(name).exists():
        own = read(name)
        if kind is not None and not isinstance(own, kind):
            refuse("name", name, f"it is {_a(type(own))}; here {_a(kind)} is wanted")
        return own
    item = entry(name)
    if kind is not None and item.kind is not kind:
        refuse("name", name, f"it is {_a(item.kind)}; here {_a(kind)} is wanted")
    lacks = []
    for way in item.ways:
        if via is not None and way.resolver != via:
            continue
        missing = way.missing()
        if missing is None:
            return _read(item, way)
        if isinstance(way, Download) and allow_download:
            way.get()
            return _read(item, way)
        lacks.append(f"{way.resolver}: {missing}")
    for resolver in _RESOLVERS if via is None else (via,):
        if resolver not in item.resolvers:
            lacks.append(f"{resolver}: {item.name} does not come this way")
    lines = sorted(lacks, key=lambda line: _RESOLVERS.index(line.split(":")[0]))
    raise DataNotFound(
        f"{name} cannot be had here ({item.licence}; {item.origin}). Tried in this order:\n  "
        + "\n  ".join(lines)
    )


@overload
def load_first(names: Sequence[str], kind: type[Kind], *, allow_download: bool = False) -> Kind: ...
@overload
def load_first(names: Sequence[str], kind: None = None, *, allow_download: bool = False) -> AnySet: ...
def load_first(
    names: Sequence[str], kind: type[DataSet] | None = None, *, allow_download: bool = False
) -> DataSet:
    """The first of several sets that can be had: without the network, unless downloads are allowed.

    Args:
        names: names in order of preference.
        kind: the kind that the caller can use; any other is refused.
        allow_download: let the official download answer, too, for the first name that has one.

    Raises:
        DataNotFound: none can be had; says for each name what is lacking.
        BadInput: an unknown name, or none at all.

    Example:
        >>> load_first(("digits",)).name
        'digits'
    """
    if not names:
        refuse("names", names, "give at least one name")
    reasons = []
    for name in names:
        try:
            return load(name, kind, allow_download=allow_download)
        except DataNotFound as error:
            reasons.append(str(error))
    raise DataNotFound("\n".join(reasons))


def get(name: str, *, progress: bool = True) -> AnySet:
    """Fetch a data set so that :func:`load` finds it from now on; uses the network where it must.

    Args:
        name: a name of :func:`catalog`.
        progress: show progress bars on standard error.

    Returns:
        The loaded set.

    Raises:
        DataNotFound: it has no official download; says how else to get it.
        DownloadFailed: the server could not be reached or refuses; what arrived is kept.
        CorruptFile: what arrived is not what is published.
    """
    item = entry(name)
    way = item.available()
    if way is not None:
        return _read(item, way)
    for candidate in item.ways:
        if isinstance(candidate, Download):
            candidate.get(progress=progress)
            return _read(item, candidate)
    return load(name)


def _read(item: Entry, way: Way) -> AnySet:
    fields = way.read(way.files())
    sha256 = content_sha256(content(fields))
    if way.sha256 is not None and sha256 != way.sha256:
        raise CorruptFile(
            f"{item.name} from {way.source()} is not the known content (SHA-256 {sha256[:16]}..., expected "
            f"{way.sha256[:16]}...): replace it with a whole copy, or remove it to let others answer"
        )
    return item.kind(name=item.name, source=way.source(), sha256=sha256, licence=item.licence, **fields)


def _a(kind: type[DataSet]) -> str:
    return f"an {kind.__name__}" if kind.__name__[0] in "AI" else f"a {kind.__name__}"
