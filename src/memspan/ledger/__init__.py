"""Who holds which bytes at the peak, and what a change would buy before it is run."""

from memspan.ledger.allocator import AllocatorPeak
from memspan.ledger.bytes import Budget, HoldsBytes, header_bytes, memory_bytes, nbytes
from memspan.ledger.comm import CommLedger, Gathered, Traffic, gather_ledgers, ring_bytes
from memspan.ledger.factory import load_factory
from memspan.ledger.fitting import Candidate, Fit, Verified, fit, verify
from memspan.ledger.flops import flops, macs
from memspan.ledger.formulas import (
    bert_block_bytes,
    gpt_block_bytes,
    kv_cache_bytes,
    rules_of_thumb,
    state_bytes,
)
from memspan.ledger.graph import saved_bytes
from memspan.ledger.methods import Method, methods
from memspan.ledger.named import load_model
from memspan.ledger.planner import plan
from memspan.ledger.prediction import Plan
from memspan.ledger.snapshot import CATEGORIES, Holding, Point, Snapshot, Timeline
from memspan.ledger.step import training_step
from memspan.ledger.tracker import Ledger

__all__ = [
    "CATEGORIES",
    "AllocatorPeak",
    "Budget",
    "Candidate",
    "CommLedger",
    "Fit",
    "Gathered",
    "Holding",
    "HoldsBytes",
    "Ledger",
    "Method",
    "Plan",
    "Point",
    "Snapshot",
    "Timeline",
    "Traffic",
    "Verified",
    "bert_block_bytes",
    "fit",
    "flops",
    "gather_ledgers",
    "gpt_block_bytes",
    "header_bytes",
    "kv_cache_bytes",
    "load_factory",
    "load_model",
    "macs",
    "memory_bytes",
    "methods",
    "nbytes",
    "plan",
    "ring_bytes",
    "rules_of_thumb",
    "saved_bytes",
    "state_bytes",
    "training_step",
    "verify",
]
