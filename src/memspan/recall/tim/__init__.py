"""Think-in-Memory: reason once, right after each reply, and keep the conclusion.

When raw dialogue is recalled, a model must reason over it again for every question and may conclude otherwise
each time. TiM (Liu et al. 2023, arXiv 2311.08719) turns an exchange into thoughts (one fact in one sentence,
with its triple), keeps them tidy (insert, forget contradictions, merge), and finds them by locality-sensitive
hashing. The gain reported by the paper is the form of the memory, not the index: its hash alone misses most
neighbours, and exact search over a few hundred vectors is faster.

Example:
    >>> from datetime import UTC, datetime
    >>> RuleExtractor()("I moved to Oslo yesterday.", "", datetime(2023, 5, 2, tzinfo=UTC), "Ann")[0].text
    'Ann lives in Oslo (2023-05-01).'
    >>> round(collision_probability(0.5, 16), 2)
    0.23

Extraction loses wording: turns are kept beside the thoughts. When all turns fit the prompt, thoughts gain
nothing.
"""

from memspan.recall.tim.extract import Extractor, Fact, LLMExtractor, RuleExtractor, rule_traits
from memspan.recall.tim.lsh import AngularLSH, LSHPlan, collision_probability, plan_lsh, probe_probability
from memspan.recall.tim.organise import (
    Drop,
    Edit,
    Keep,
    LLMOrganiser,
    Merge,
    Organiser,
    RuleOrganiser,
    apply_ops,
    check_ops,
)
from memspan.recall.tim.policy import TiMPolicy
from memspan.recall.tim.thoughts import Thought, ThoughtStore, fact_key

__all__ = [
    "AngularLSH",
    "Drop",
    "Edit",
    "Extractor",
    "Fact",
    "Keep",
    "LLMExtractor",
    "LLMOrganiser",
    "LSHPlan",
    "Merge",
    "Organiser",
    "RuleExtractor",
    "RuleOrganiser",
    "Thought",
    "ThoughtStore",
    "TiMPolicy",
    "apply_ops",
    "check_ops",
    "collision_probability",
    "fact_key",
    "plan_lsh",
    "probe_probability",
    "rule_traits",
]
