"""What to keep of the past as data streams by.

:mod:`~memspan.continual.memo` learns new classes within a byte budget. Shared parts: ``buffers`` (exemplars
at their true size), ``nets`` (small backbones), ``budget`` (aligned bytes), ``analysis`` (layer drift).
"""

from memspan.continual.buffers import ExemplarSet
from memspan.continual.memo import Learner, MEMOClassifier, budget_sweep

__all__ = ["ExemplarSet", "Learner", "MEMOClassifier", "budget_sweep"]
