"""Who won, and how sure that is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000
SURE = 0.975
"""From here on a lead counts as decided: 0 is then outside the middle 95 of 100 resampled leads."""


@dataclass(frozen=True)
class Verdict:
    """The winner of a race against the runner-up, on held-out blocks that chose nothing; nats per token."""

    winner: str
    runner_up: str
    lead: float
    """The runner-up's loss less the winner's, the mean over seeds and blocks."""
    low: float
    high: float
    """Between these lie 95 of 100 resampled leads."""
    confidence: float
    """The part of the resampled leads that are above 0; ties count half."""
    seeds: int
    blocks: int

    @property
    def decided(self) -> bool:
        """Whether the confidence is 97.5 % or more."""
        return self.confidence >= SURE

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"decided": self.decided}

    def __str__(self) -> str:
        said = f"Winner: {self.winner}" if self.decided else f"Undecided; ahead at the end: {self.winner}"
        against = (
            f"against {self.runner_up}, {self.lead:+.4f} nats per token ({self.low:+.4f} to {self.high:+.4f})"
        )
        luck = " One seed: its luck is not counted." if self.seeds == 1 else ""
        return (
            f"{said}. Confidence {self.confidence:.1%} {against}, over {self.seeds} seeds and {self.blocks} held-out "
            f"blocks that chose nothing.{luck}"
        )


def verdict(winner: str, ours: Any, runner_up: str, theirs: Any, resamples: int = RESAMPLES) -> Verdict:
    """How sure it is that one start is better than another, by a paired bootstrap.

    Runs of one seed saw the same batches in the same order, and each block is the same text: the differences are taken
    pair by pair, and seeds and blocks are both drawn anew with replacement (the product bootstrap for crossed factors,
    Owen and Eckles 2012, arXiv 1106.2125, rather too careful than too sure).

    Args:
        winner: The one that was ahead on the blocks that choose.
        ours: Its losses [seeds, blocks].
        runner_up: The other.
        theirs: Its losses, for the same seeds and blocks.
        resamples: How often is drawn.
    """
    lead = np.asarray(theirs, dtype=np.float64) - np.asarray(ours, dtype=np.float64)
    seeds, blocks = lead.shape
    draw = np.random.default_rng(0)
    of_seeds = draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    of_blocks = draw.multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples) / blocks
    drawn = np.einsum("rs,sb,rb->r", of_seeds, lead, of_blocks, optimize=True)
    low, high = np.quantile(drawn, [0.025, 0.975])
    sure = float((drawn > 0).mean() + 0.5 * (drawn == 0).mean())
    return Verdict(winner, runner_up, float(lead.mean()), float(low), float(high), sure, seeds, blocks)
