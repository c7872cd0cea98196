"""The CPU kernels behind :mod:`memspan.nn.lookup`: compiled once with the machine's own compiler, then kept.

``_lookup.cpp`` is compiled when a kernel is first called, never on import. The library lies in the cache
folder under a name that changes with the source, the compiler and the processor. Where anything of this
fails, :func:`library` tells why and callers go on with torch's own operators.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memspan.base.cache import cache_folder

__all__ = [
    "CannotCompile",
    "Ready",
    "hash_gradient",
    "hash_rows",
    "library",
    "lookup",
    "lookup_gradient",
]

SOURCE = Path(__file__).with_name("_lookup.cpp")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
# Tried in this order: threads and this processor's instructions are left out where a compiler lacks them.
EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
SMALL = 1 << 20  # row entries below which waking a second thread costs more than it saves

_P, _L, _D, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
_ARGUMENTS = {
    "hash": (None, (_P, _P, _P, _L, _L, _L, _D, _I, _I)),
    "sum": (_I, (_P, _P, _P, _P, _P, _L, _L, _L, _L, _I)),
    "whole": (None, (_P, _P, _L, _P)),
    "hash_gradient": (None, (_P, _P, _P, _L, _L, _L, _D, _I, _I)),
    "gradient": (None, (_P, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _I)),
}


class _Layer(ctypes.Structure):
    _fields_ = (
        ("tables", _P), ("bias", _P), ("count", _L), ("bits", _L), ("out", _L),
        ("steep", _D), ("scaled", _I), ("threads", _I),
    )  # fmt: skip


class CannotCompile(RuntimeError):
    """No kernel can be had on this machine; the message says why."""


@functools.cache
def library() -> dict[tuple[str, torch.dtype], ctypes._CFuncPtr]:  # type: ignore[name-defined]
    """The compiled functions by name and dtype; compiled now where they are not kept yet.

    Raises:
        CannotCompile: no compiler, or it fails; the same error each time, without another try.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise CannotCompile(loaded)
    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for name, (result, arguments) in _ARGUMENTS.items():
            function = getattr(loaded, f"{name}_{str(dtype).removeprefix('torch.')}", None)
            if function is not None:
                function.restype, function.argtypes = result, arguments
                found[name, dtype] = function
    return found


def hash_rows(x: Tensor, bits: int, steep: float, scaled: bool) -> tuple[Tensor, Tensor]:
    """Codes and weights of ``x`` (n, K·bits), contiguous; ``steep`` is 2 / temperature."""
    n, d = x.shape
    code = torch.empty(n, d // bits, dtype=torch.int32)
    weight = torch.empty(n, d // bits, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    call = library()["hash", x.dtype]
    call(
        x.data_ptr(),
        code.data_ptr(),
        weight.data_ptr(),
        n,
        d // bits,
        bits,
        steep,
        scaled,
        _threads(8 * n * d),
    )
    return code, weight


def hash_gradient(x: Tensor, dweight: Tensor, bits: int, steep: float, scaled: bool) -> Tensor:
    """Gradient of ``x`` (n, K·bits) from that of the weights (n, K)."""
    n, d = x.shape
    dx = torch.empty_like(x)
    call = library()["hash_gradient", x.dtype]
    call(
        x.data_ptr(),
        dweight.data_ptr(),
        dx.data_ptr(),
        n,
        d // bits,
        bits,
        steep,
        scaled,
        _threads(8 * n * d),
    )
    return dx


def lookup(code: Tensor, weight: Tensor, tables: Tensor, bias: Tensor | None) -> Tensor | None:
    """Weighted sum of rows, (n, out); None where a code lies outside the tables."""
    (n, count), (_, rows, out) = code.shape, tables.shape
    y = torch.empty(n, out, dtype=tables.dtype)
    wrong = library()["sum", tables.dtype](
        code.data_ptr(), weight.data_ptr(), tables.data_ptr(), None if bias is None else bias.data_ptr(),
        y.data_ptr(), n, count, rows, out, _threads(n * count * out),
    )  # fmt: skip
    return None if wrong else y


def lookup_gradient(
    code: Tensor,
    weight: Tensor,
    tables: Tensor,
    dy: Tensor,
    *,
    of_tables: bool,
    of_weight: bool,
    place: Tensor | None = None,
    rows: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the tables and of the weights.

    ``place`` (K, R) says where each visited row goes among ``rows`` compact rows; None gives dense tables.
    """
    (n, count), (_, slots, out) = code.shape, tables.shape
    dtables = None
    if of_tables:
        dtables = torch.empty_like(tables) if place is None else tables.new_empty(rows, out)
    dweight = torch.empty_like(weight) if of_weight else None
    library()["gradient", tables.dtype](
        code.data_ptr(), weight.data_ptr(), tables.data_ptr(), dy.data_ptr(),
        None if dtables is None else dtables.data_ptr(), None if dweight is None else dweight.data_ptr(),
        None if place is None else place.data_ptr(), n, count, slots, out, _threads(n * count * out),
    )  # fmt: skip
    return dtables, dweight


class Ready:
    """Hashing and summing at once for given tables, with all that stays the same between tokens done before.

    One token through a layer is a matter of ten microseconds, half of which Python would take to look at
    everything again. :meth:`of` makes one where the kernel fits; a call tells whether it still does.

    It holds neither tables nor bias, and its copies and pickles are None.
    """

    way: tuple[float, str]  # temperature and form of the weight
    _tables: Callable[[], Tensor | None]
    _bias: Callable[[], Tensor | None]
    _places: tuple[int, int | None]
    _dtype: torch.dtype
    _width: int
    _out: int
    _run: tuple[Any, Any]
    _few: int  # tokens up to which one thread is enough
    _layer: _Layer
    _at: int

    @classmethod
    def of(cls, tables: Tensor, bias: Tensor | None, temperature: float, weight: str) -> Ready | None:
        """None where sizes, types or layouts do not fit or this machine has no kernel.

        ``tables`` and ``bias`` are plain tensors in CPU memory.
        """
        count, rows, out = tables.shape
        bits, run = rows.bit_length() - 1, _whole_of(tables.dtype)
        if run is None or rows != 1 << bits or not tables.is_contiguous():
            return None
        if bias is not None and (
            bias.shape != (out,) or bias.dtype != tables.dtype or not bias.is_cpu or not bias.is_contiguous()
        ):
            return None
        self = cls()
        self._tables, self._bias = weakref.ref(tables), type(None) if bias is None else weakref.ref(bias)
        self._places = tables.data_ptr(), None if bias is None else bias.data_ptr()
        self._dtype, self._width, self._out, self._run = tables.dtype, count * bits, out, run
        self.way, self._few = (temperature, weight), SMALL // max(1, count * out)
        self._layer = _Layer(*self._places, count, bits, out, 2.0 / temperature, weight == "scaled", 1)
        self._at = ctypes.addressof(self._layer)
        return self

    def __call__(self, x: Tensor, tables: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """The layer of a plain ``x`` (..., K·bits) in CPU memory.

        None where x does not fit, or these are not the very tensors it was made for, or lie elsewhere now.
        """
        tables_at, bias_at = self._places
        if tables is None or self._tables() is not tables or self._bias() is not bias:
            return None
        if tables.data_ptr() != tables_at or (None if bias is None else bias.data_ptr()) != bias_at:
            return None
        shape = x.shape
        if x.dtype is not self._dtype or not shape or shape[-1] != self._width or not x.is_contiguous():
            return None
        # Widths as arguments, not as a tuple, and type and place from x: half the time of torch.empty.
        if len(shape) == 2:
            n, y = shape[0], x.new_empty(shape[0], self._out)
        else:
            n, y = x.numel() // self._width, x.new_empty(*shape[:-1], self._out)
        if n <= self._few:
            self._run[1](x.data_ptr(), y.data_ptr(), n, self._at)
        else:
            layer = _Layer.from_buffer_copy(self._layer)
            layer.threads = torch.get_num_threads()
            self._run[0](x.data_ptr(), y.data_ptr(), n, ctypes.addressof(layer))
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


@functools.cache
def _whole_of(dtype: torch.dtype) -> tuple[Any, Any] | None:
    """The kernel of :class:`Ready`, for much work and for little, or None where this machine has none.

    Work of microseconds is not worth letting other threads of Python in: that itself takes one.
    """
    try:
        many = library().get(("whole", dtype))
    except CannotCompile:
        return None
    if many is None:
        return None
    loaded = _load()
    assert not isinstance(loaded, str)  # library() would have told
    try:
        return many, getattr(_extension(loaded._name), many.__name__)
    except ImportError:  # built without Python's headers
        few = getattr(ctypes.PyDLL(loaded._name, handle=loaded._handle), many.__name__)
        few.restype, few.argtypes = many.restype, many.argtypes
        return many, few


@functools.cache
def _extension(path: str) -> ModuleType:
    """The library as a module of Python, whose calls cost less than those of ctypes."""
    loader = importlib.machinery.ExtensionFileLoader("lookup", path)
    spec = importlib.util.spec_from_file_location("lookup", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _threads(entries: int) -> int:
    return 1 if entries < SMALL else torch.get_num_threads()


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        path = _path()
        if not path.exists():
            _compile(path)
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            return f"{path} belongs to another user; set MEMSPAN_CACHE to a folder of your own"
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError, CannotCompile) as error:
        return str(error)


def _compiler() -> list[str]:
    """The command of the C++ compiler: what CXX says, else the first of the usual names."""
    chosen = os.environ.get("CXX")
    names = [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in names:
        if command and shutil.which(command[0]):
            return command
    raise CannotCompile(f"no C++ compiler ({', '.join(name[0] for name in names if name)}) is on the path")


def _path() -> Path:
    command = _compiler()
    about = subprocess.run([*command, "--version"], capture_output=True, timeout=60, check=True).stdout
    flags = (*FLAGS, *_headers())
    digest = hashlib.sha256(SOURCE.read_bytes() + about + repr((command, flags, EXTRAS)).encode())
    digest.update(_processor().encode())
    return cache_folder() / "kernels" / f"lookup-{digest.hexdigest()[:20]}.so"


def _headers() -> tuple[str, ...]:
    """Where Python's own headers lie, if they are installed, for calls that cost less."""
    folder = Path(sysconfig.get_path("include"))
    whole = (folder / "Python.h").exists() and not sysconfig.get_config_var("Py_GIL_DISABLED")
    return (f"-I{folder}", "-DMEMSPAN_PYTHON") if whole else ()


def _processor() -> str:
    """What -march=native depends on: a kept library must not meet a processor without its instructions."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    kinds = ("flags", "Features", "model", "vendor_id", "CPU part")
    mine = sorted({line for line in lines if line.startswith(kinds)})
    return "\n".join([platform.machine(), platform.processor(), *mine])


def _compile(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built, errors = Path(folder) / path.name, b""
        for extra in EXTRAS:
            done = _run([*_compiler(), *FLAGS, *_headers(), *extra, str(SOURCE), "-o", str(built)])
            if done.returncode == 0:
                built.replace(path)  # whole or absent, also where several processes compile at once
                return
            errors = done.stderr
    raise CannotCompile(f"{' '.join(_compiler())} failed: {errors.decode(errors='replace').strip()[-400:]}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, capture_output=True, timeout=300, check=False)
