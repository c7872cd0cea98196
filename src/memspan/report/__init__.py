"""What a run found, for people: validated results, claims with intervals, tables, figures, one HTML page.

A recipe ends here. :class:`~memspan.report.schema.Result` is the document; :func:`claim` decides a claim from
an :class:`~memspan.report.stats.Interval`; :func:`gain` sets ours against a rival over seeds;
:class:`~memspan.report.frontier.Frontier` is quality against bytes; :func:`write_page` and
:func:`print_result` show it. :func:`memory_page` shows what a ledger saw.
"""

from memspan.report import figures, metrics, stats
from memspan.report.claims import claim
from memspan.report.figures import Bars, Figure, Icicle, Images, Lines, Series, StackedArea
from memspan.report.frontier import Frontier
from memspan.report.memory import memory_figure, memory_page
from memspan.report.page import compare_page, write_index, write_page
from memspan.report.pairing import gain, gain_over_items
from memspan.report.results import collate
from memspan.report.schema import Claim, DataSource, Measurement, Result, read_result, write_result
from memspan.report.stats import Interval
from memspan.report.tables import print_comparison, print_result
from memspan.report.units import human_bytes

__all__ = [
    "Bars",
    "Claim",
    "DataSource",
    "Figure",
    "Frontier",
    "Icicle",
    "Images",
    "Interval",
    "Lines",
    "Measurement",
    "Result",
    "Series",
    "StackedArea",
    "claim",
    "collate",
    "compare_page",
    "figures",
    "gain",
    "gain_over_items",
    "human_bytes",
    "memory_figure",
    "memory_page",
    "metrics",
    "print_comparison",
    "print_result",
    "read_result",
    "stats",
    "write_index",
    "write_page",
    "write_result",
]
