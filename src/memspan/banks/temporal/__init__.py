"""Memory-based dynamic graph networks in large batches: TGN, JODIE, APAN, PRES, and the rules they must beat.

A stream of interactions trains a network whose memory of each node changes at each of its events. Events of
one batch do not see each other, so that large batches lose precision, and small ones crawl. Here: the store,
exact and vectorised; :func:`batch_report`, which tells what a batch size hides; and three remedies side by
side: a learning rate scaled with the batch (try it first), PRES (:class:`PRES`), and rules without a network.

Source: PRES: Toward Scalable Memory-Based Dynamic Graph Neural Networks, ICLR 2024; Rossi et al. 2020 (TGN).
"""

from memspan.banks.temporal.events import BatchReport, TemporalBatches, TemporalData, batch_report
from memspan.banks.temporal.memory import Events, NodeMemory, RecentRing
from memspan.banks.temporal.models import (
    APAN,
    JODIE,
    TGN,
    LinkPredictor,
    TemporalAttention,
    TemporalModel,
    TimeEncode,
    View,
)
from memspan.banks.temporal.pres import PRES, RateTracker, coherence
from memspan.banks.temporal.rules import EdgeBank, RecencyRule, Rule
from memspan.banks.temporal.train import (
    LinkResult,
    NodeClassifier,
    NodeResult,
    Scores,
    evaluate_links,
    evaluate_rule,
    train_link_prediction,
    train_node_classification,
)

__all__ = [
    "APAN",
    "JODIE",
    "PRES",
    "TGN",
    "BatchReport",
    "EdgeBank",
    "Events",
    "LinkPredictor",
    "LinkResult",
    "NodeClassifier",
    "NodeMemory",
    "NodeResult",
    "RateTracker",
    "RecencyRule",
    "RecentRing",
    "Rule",
    "Scores",
    "TemporalAttention",
    "TemporalBatches",
    "TemporalData",
    "TemporalModel",
    "TimeEncode",
    "View",
    "batch_report",
    "coherence",
    "evaluate_links",
    "evaluate_rule",
    "train_link_prediction",
    "train_node_classification",
]
