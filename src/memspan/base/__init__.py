"""What everything stands on: refusals, optional imports, files, keyed draws. Loads no torch."""

from memspan.base.refusal import BadInput, nearest, optional, refuse

__all__ = ["BadInput", "nearest", "optional", "refuse"]
