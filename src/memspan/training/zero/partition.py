"""Where each parameter lies in the flat buckets, and which run of it each rank owns. Pure arithmetic.

Parameters are laid one after another into buckets. Every bucket is cut into as many equal slices as there
are ranks, and rank ``r`` owns slice ``r`` of EVERY bucket: a bucket then travels as it lies, every rank works
at all times, and a parameter has at most one run of elements on each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memspan.base import refuse

__all__ = ["FlatPartition", "Place"]


class Place(NamedTuple):
    """Where a parameter lies: its bucket, its first element there, and its number of elements."""

    bucket: int
    start: int
    size: int


class FlatPartition:
    """Buckets of a list of parameters, cut over ranks.

    Args:
        sizes: elements of each parameter, in the order in which they are laid down.
        world: number of ranks, 1 or more.
        bucket: elements that a bucket may hold; a bucket closes before the parameter that would carry it
            past this. A larger parameter is a bucket of its own.
        align: slices are whole multiples of this many elements.
        by: ``"element"``, or ``"parameter"``: whole parameters to ranks, the largest first to the rank
            with the least, all in one bucket.

    Attributes:
        buckets: elements of each bucket, padding included; multiples of ``world * align``.
        places: a :class:`Place` for each parameter.

    Raises:
        BadInput: a size below 0, or a number below 1 elsewhere.

    Example:
        >>> cut = FlatPartition([5, 3, 20, 2], world=2, bucket=8)
        >>> cut.buckets
        (8, 20, 2)
        >>> [cut.run(0, rank) for rank in range(2)]
        [(0, 4), (4, 5)]
        >>> FlatPartition([5, 3, 20, 2], world=2, bucket=8, by="parameter").run(2, 0)
        (0, 20)
    """

    def __init__(
        self, sizes: Sequence[int], world: int, bucket: int, align: int = 1, by: str = "element"
    ) -> None:
        for name, number in (("world", world), ("bucket", bucket), ("align", align)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                refuse(name, number, "give a whole number, 1 or more")
        if any(size < 0 for size in sizes):
            refuse("sizes", min(sizes), "numbers of elements are 0 or more")
        if by not in ("element", "parameter"):
            refuse("by", by, 'use "element" or "parameter"')
        self.world, self.align, self.by = world, align, by
        if by == "parameter":
            self.buckets, self.places = _whole(sizes, world, align)
        else:
            self.buckets, self.places = _in_order(sizes, world, bucket, align)

    def slice(self, bucket: int, rank: int) -> tuple[int, int]:
        """The elements of a bucket that a rank owns: first, and one past the last."""
        share = self.buckets[bucket] // self.world
        return rank * share, (rank + 1) * share

    def run(self, parameter: int, rank: int) -> tuple[int, int]:
        """The elements of a parameter that a rank owns: first, and one past the last (equal: none)."""
        place = self.places[parameter]
        low, high = self.slice(place.bucket, rank)
        start = min(max(low - place.start, 0), place.size)
        return start, max(start, min(high - place.start, place.size))

    def owner(self, parameter: int) -> int:
        """The rank that owns a parameter's first element; rank 0 for a parameter without elements."""
        place = self.places[parameter]
        share = self.buckets[place.bucket] // self.world
        return place.start // share if place.size else 0

    def owned(self, rank: int) -> int:
        """Elements of parameters that a rank owns, padding left out."""
        runs = (self.run(index, rank) for index in range(len(self.places)))
        return sum(stop - start for start, stop in runs)


def _in_order(
    sizes: Sequence[int], world: int, bucket: int, align: int
) -> tuple[tuple[int, ...], tuple[Place, ...]]:
    buckets: list[int] = []
    places: list[Place] = []
    for size in sizes:
        if not buckets or (size and buckets[-1] and buckets[-1] + size > bucket):
            buckets.append(0)
        places.append(Place(len(buckets) - 1, buckets[-1], size))
        buckets[-1] += size
    return tuple(_up(size, world * align) for size in buckets), tuple(places)


def _whole(sizes: Sequence[int], world: int, align: int) -> tuple[tuple[int, ...], tuple[Place, ...]]:
    loads = [0] * world
    homes: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = loads.index(min(loads))
        homes[index] = rank, loads[rank]
        loads[rank] += _up(sizes[index], align)
    share = _up(max(loads), align)
    places = (Place(0, rank * share + start, sizes[index]) for index, (rank, start) in sorted(homes.items()))
    return (share * world,) if sizes else (), tuple(places)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
