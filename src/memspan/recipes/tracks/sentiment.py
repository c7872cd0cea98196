"""Rated texts for recipes that tune an encoder: reviews of four domains, or sentences inside a package."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memspan import data

__all__ = ["Reviews", "reviews"]


@dataclass(frozen=True)
class Reviews:
    """Texts with a clear opinion.

    Attributes:
        table: the data set that they come from.
        texts: (N,) objects of str.
        liked: (N,) bool.
        domain: (N,) objects of str.
    """

    table: data.TableSet
    texts: NDArray[np.object_]
    liked: NDArray[np.bool_]
    domain: NDArray[np.object_]


def reviews() -> Reviews:
    """The four rated domains where they are at hand, else sentences of film reviews from a package.

    Raises:
        DataNotFound: neither is; says what to install.
    """
    table = data.load_first(("four-domain-sentiment", "movie-sentences"), data.TableSet)
    if table.name == "movie-sentences":
        films = np.full(len(table), "films", dtype=object)
        return Reviews(table, table["text"], table["label"] == 1, films)
    clear = np.abs(table["mean_rating"]) > 0.5
    return Reviews(table, table["text"][clear], table["mean_rating"][clear] > 0, table["domain"][clear])
