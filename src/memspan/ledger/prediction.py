"""What a plan says, and the straight line through two of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from memspan.ledger.bytes import Budget
from memspan.ledger.snapshot import Snapshot, table_of

__all__ = ["Plan", "extended", "lines_at"]


@dataclass(frozen=True)
class Plan:
    """The predicted peak of one training step.

    Attributes:
        total: bytes at the peak.
        by_category: bytes by ledger category; sums to ``total``.
        phase: what runs at the peak, such as ``"backward:blocks.3.mlp"``.
        exact: True when the step itself was traced for this device: the figure is then the dispatch ledger's
            of the real step, with the scratch of its kernels (see ``kernels``).
        phases: the highest total within each phase of the step (forward, backward, recompute, optimizer).
        note: how the figure was obtained, and what it leaves out.
        batch: examples in the batch (per pass, where gradients accumulate).
        device: the device planned for.
        methods: names of the methods applied.
        parameters: numbers in the model's parameters.
        trained: of these, the ones that receive gradients.
        flops: of the whole step's matrix products and convolutions, 2 per multiply-add; None when not traced.
        snapshot: the peak in full (by module, largest blocks), where traced.
    """

    total: int
    by_category: dict[str, int]
    phase: str
    exact: bool
    note: str
    batch: int
    device: str
    methods: tuple[str, ...]
    parameters: int
    trained: int
    phases: dict[str, int] = field(default_factory=dict)
    flops: int | None = None
    snapshot: Snapshot | None = field(default=None, repr=False, compare=False)

    def table(self) -> list[tuple[str, int, float]]:
        """Rows (category, bytes, share of the peak), largest first."""
        rows = sorted(self.by_category.items(), key=lambda item: -item[1])
        return [(name, size, size / self.total if self.total else 0.0) for name, size in rows]

    def fits(self, budget: str | int | Budget) -> bool:
        """Whether the peak is within the budget."""
        return self.total <= Budget.parse(budget).bytes

    def __str__(self) -> str:
        """The peak as a table, the parameters, what would lower it."""
        about = "" if self.exact else "about "
        head = f"{about}{Budget(self.total)} on {self.device}, {self.phase}, batch {self.batch}"
        numbers = f"{self.parameters:,} parameters, {self.trained:,} trained"
        return "\n".join([table_of(head, self.by_category), numbers, self.advice])

    @property
    def advice(self) -> str:
        """One sentence: what holds the peak, and what kind of change lowers it."""
        largest = max(self.by_category, key=lambda name: self.by_category[name], default="")
        for start, sentence in _ADVICE.items():
            if largest.startswith(start):
                return f"At the peak ({self.phase}) most bytes are {largest}: {sentence}"
        return f"At the peak ({self.phase}) most bytes are {largest}."


_ADVICE = {
    "saved_activations": "recompute blocks in the backward pass, use 16-bit floats, or a smaller batch.",
    "temporaries.optimizer": "step one tensor at a time (foreach=False), or a plainer optimizer.",
    "temporaries": "a smaller batch, or a loss that works through the batch or vocabulary in parts.",
    "optimizer_state": "train fewer parameters, keep smaller moments, or shard the state over ranks.",
    "gradients": "train fewer parameters, or shard gradients over ranks.",
    "parameters": "store frozen weights in fewer bits, or shard parameters over ranks.",
    "inputs": "load the batch in a smaller dtype, or in parts.",
}


def lines_at(small: Plan, large: Plan, size: int) -> dict[str, int]:
    """Each phase's own peak at a batch size, on the straight line through two plans."""
    if large.batch == small.batch:
        return dict(large.phases)
    steps = (size - large.batch) / (large.batch - small.batch)
    tops = {}
    for name, b in large.phases.items():
        a = small.phases.get(name, b)
        tops[name] = round(b + (b - a) * steps)
    return tops


def extended(small: Plan, large: Plan, size: int, reason: str) -> Plan | None:
    """The straight line of the phase that holds the peak at ``size``; None if another held it before."""
    tops = lines_at(small, large, size)
    winner = max(tops, key=lambda name: tops[name])
    if {plan.phase.partition(":")[0] for plan in (small, large)} != {winner}:
        return None
    steps = (size - large.batch) / (large.batch - small.batch)
    sums = {}
    for name in dict.fromkeys((*small.by_category, *large.by_category)):
        a, b = small.by_category.get(name, 0), large.by_category.get(name, 0)
        sums[name] = max(0, round(b + (b - a) * steps))
    return replace(
        large,
        total=sum(sums.values()),
        by_category=sums,
        phases=tops,
        exact=False,
        batch=size,
        snapshot=None,
        note=f"{reason}: real steps of {small.batch} and {large.batch} examples, extended as a straight line",
    )
