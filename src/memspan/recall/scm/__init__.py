"""Self-controlled memory: a prompt that never exceeds its budget, and a controller that decides what goes in.

A model with a small window converses for hundreds of turns when each turn asks three things: does this
message need earlier turns at all; which of them; and does each go in whole, as its summary, or not at all.
SCM (Wang et al. 2023, arXiv 2304.13343) keeps every turn with a summary and answers these by two gates and a
ranking by recency and likeness; long documents are summarised chunk by chunk, then group by group. The
paper's ablation: with retrieval unchanged the controller is worth 18 points, 26 on questions over several
turns.

Example:
    >>> items = [Item(2, "the long answer", "short", score=0.9), Item(1, "another one", "brief", 0.5)]
    >>> [choice.kind for choice in pack(items, budget=22, tokens=len).choices]
    ['summary', 'raw']

When the whole dialogue fits the window, give it whole: nothing beats it. A small controller model can be
worse than none, so the heuristic controller is the default and a model is tested before it is trusted.
"""

from memspan.recall.scm.control import (
    Controller,
    Decision,
    HeuristicController,
    LearnedController,
    LLMController,
    read_choice,
)
from memspan.recall.scm.documents import DocumentSummary, Node, SummarizeLong
from memspan.recall.scm.packing import Choice, Item, Packing, pack
from memspan.recall.scm.policy import SCMPolicy, SelfControlledMemory

__all__ = [
    "Choice",
    "Controller",
    "Decision",
    "DocumentSummary",
    "HeuristicController",
    "Item",
    "LLMController",
    "LearnedController",
    "Node",
    "Packing",
    "SCMPolicy",
    "SelfControlledMemory",
    "SummarizeLong",
    "pack",
    "read_choice",
]
