"""Who holds which bytes at the peak, and what a change would buy before it is run."""

from memspan.ledger.bytes import Budget, HoldsBytes, memory_bytes, nbytes
from memspan.ledger.methods import Method, methods

__all__ = ["Budget", "HoldsBytes", "Method", "memory_bytes", "methods", "nbytes"]
