"""memspan: memory as a first-class resource in machine learning.

Bytes held, by whom, for how long, and what quality they bought. The rooms are imported by name
(``memspan.ledger``, ``memspan.continual``, ...); importing this package loads no heavy library.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("memspan")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
