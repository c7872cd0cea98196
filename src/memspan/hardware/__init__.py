"""Where memory lives: weights in the conductance of resistive cells, and a liquid that is never trained."""

from memspan.hardware.crossbar import (
    Cost,
    Crossbar,
    CrossbarLinear,
    ResistiveDevice,
    Swept,
    convert_,
    robustness_sweep,
)
from memspan.hardware.liquid import (
    LiquidStateMachine,
    LSMTransformer,
    ProjectionHead,
    ZeroShotAligner,
    cross_modal_retrieval,
    multi_positive_contrastive,
)

__all__ = [
    "Cost",
    "Crossbar",
    "CrossbarLinear",
    "LSMTransformer",
    "LiquidStateMachine",
    "ProjectionHead",
    "ResistiveDevice",
    "Swept",
    "ZeroShotAligner",
    "convert_",
    "cross_modal_retrieval",
    "multi_positive_contrastive",
    "robustness_sweep",
]
