"""A race of starts: all are trained a little, the better part a little longer, the last two to the end.

    result = race("gpt2-large", sizes={"params": "125M"}, shapes=3, methods=["subclone", "subclone(rescale=false)"],
                  seconds=600, output="race")
    print(result)                                   # the table and the winner; race/race.png is the picture

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943), by mean held-out loss over seeds: in each rung
every arm left is trained anew, under a whole schedule of that rung's length, with the learning rate that is best for it
there. Half of the held-out blocks choose rates and who goes on; the other half only say how sure the end is.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hf_ws.compare.bench import Bench
from hf_ws.compare.race_report import Race, Rung, Standing
from hf_ws.compare.report import Arm
from hf_ws.compare.setup import Setup
from hf_ws.compare.verdict import verdict
from hf_ws.errors import DataError, DivergenceError, PlanError
from hf_ws.training.data import Packed
from hf_ws.training.job import as_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class _Budget:
    """What a run of the last rung has: steps, or seconds that are turned into steps by a measured speed."""

    steps: int | None
    seconds: float | None

    def in_steps(self, part: float, bench: Bench, arm: str) -> int:
        """Of a part of it, for an arm."""
        if self.seconds is None:
            return max(1, round((self.steps or 1) * part))
        return max(1, round(self.seconds * part / bench.seconds_per_step(arm)))

    def say(self, part: float) -> str:
        """A part of it, in words."""
        if self.seconds is None:
            return f"{max(1, round((self.steps or 1) * part))} steps"
        return f"{self.seconds * part:.4g} s"


def race(
    source: str | Path | PreTrainedModel,
    *,
    output: str | Path,
    steps: int | None = None,
    seconds: float | None = None,
    best: int | None = None,
    keep: float = 0.5,
    **settings: Any,
) -> Race:
    """Find the best of many starts. A race that was stopped goes on where it was: no run is made twice.

    Args:
        source: Folder, Hub id or live model that the starts are made from.
        output: Folder for race.json, race.md, race.png, and arms/ with each run's own record.
        steps: Optimizer steps of the last rung's runs, the same for all: as many tokens for every arm.
        seconds: Or their training time: what a step takes is measured here once for each shape, and an arm gets as
            many steps as fit. Evaluations do not count.
        best: Only so many arms, those with the lowest held-out loss before training, enter the first rung.
        keep: The part of the arms that goes on to the next rung, whose budget is longer by the inverse.
        settings: The other fields of `Setup` (sizes, shapes, methods, starts, data, learning_rates, seeds, ...) and of
            TrainConfig. Three seeds by default.

    Raises:
        PlanError, DataError, DistillationError, OutputError: Before any training.
        DivergenceError: Fewer than two arms are left because the others diverge at every learning rate.
    """
    _check(steps, seconds, best, keep)
    settings = {"seeds": SEEDS, **{name: value for name, value in settings.items() if value is not None}}
    setup = Setup.of({"source": source, "output": output, **settings})
    bench = _parted(setup.bench(steps or 1, "race.json"))
    if len(bench.makers) < 2:
        raise PlanError(f"{', '.join(bench.makers)}: a race is between two starts at least; give more")
    budget = _Budget(steps, seconds)
    found = Race(setup.folder, _how(setup, budget))
    arms = _entered(bench, best, setup.seeds[0], found)
    counts = rungs(len(arms), keep)
    for number, count in enumerate(counts):
        last = number == len(counts) - 1
        part = keep ** (len(counts) - 1 - number)
        rung = _rung(setup, bench if last else replace(bench, judged=None), arms[:count], budget, part)
        found.rungs.append(rung)
        arms = [one.label for one in rung.standings if math.isfinite(one.loss)]
        if len(arms) < 2:
            raise DivergenceError(
                f"{len(arms)} of {len(rung.standings)} starts got through {rung.budget}, the others diverge at every "
                f"learning rate of {list(setup.learning_rates)}; give smaller ones"
            )
        if last:
            first, second = rung.standings[:2]
            found.verdict = verdict(first.label, first.judged, second.label, second.judged)
        found.write()
    return found


def _check(steps: int | None, seconds: float | None, best: int | None, keep: float) -> None:
    """Raises PlanError for a budget or a part that cannot be."""
    if (steps is None) == (seconds is None):
        raise PlanError(f"steps={steps} and seconds={seconds}: a race has one budget; give one of the two")
    if seconds is not None and not 0 < seconds < math.inf:
        raise PlanError(f"seconds={seconds}; above 0")
    if not 0 < keep < 1 or (best is not None and best < 2):
        raise PlanError(f"keep={keep}, best={best}; between 0 and 1, and at least 2")


def rungs(arms: int, keep: float) -> list[int]:
    """How many arms run in each rung: a part of those before, two at least, until there are two."""
    counts = [arms]
    while counts[-1] > 2:
        counts.append(min(counts[-1] - 1, max(2, math.ceil(counts[-1] * keep))))
    return counts


def _parted(bench: Bench) -> Bench:
    """The bench with every other held-out block kept for the end. Raises DataError if there are too few."""
    rows, bytes_per_token = as_dataset(bench.held_out)
    keep = min(len(rows), 2 * (bench.config.max_eval_blocks or len(rows)))
    if keep < 4:
        raise DataError(
            f"{len(rows)} held-out blocks; a race takes 4 at least, half of them to choose by and half to be sure by"
        )
    spread = [i * len(rows) // keep for i in range(keep)]
    chooses, judges = rows.select(spread[::2]), rows.select(spread[1::2])
    held_out: Any = chooses
    if isinstance(bench.held_out, Packed) and bytes_per_token is not None:
        held_out = replace(bench.held_out, dataset=chooses)
    return replace(bench, held_out=held_out, judged=judges)


def _entered(bench: Bench, best: int | None, seed: int, found: Race) -> list[str]:
    """The arms that race: all, or those that are best before any training."""
    arms = list(bench.makers)
    if best is None or best >= len(arms):
        return arms
    bar = tqdm(arms, desc="scoring starts", unit=" starts", disable=not bench.config.progress)
    found.before = {arm: bench.first_loss(arm, seed) for arm in bar}
    return sorted(arms, key=lambda arm: _order(found.before[arm]))[:best]


def _rung(setup: Setup, bench: Bench, arms: Sequence[str], budget: _Budget, part: float) -> Rung:
    """Every arm trained for a part of the whole budget, best first."""
    rates, seeds = list(setup.learning_rates), list(setup.seeds)
    benches = []
    for arm in arms:
        config = setup.config(budget.in_steps(part, bench, arm), curve=False)  # the end alone counts
        benches.append(replace(bench, config=config, makers={arm: bench.makers[arm]}))
    total = sum(one.runs(rates, None, seeds) for one in benches)
    name = f"racing {len(arms)} starts for {budget.say(part)}"
    bar = tqdm(total=total, desc=name, unit=" runs", disable=not setup.progress)
    standings = []
    for arm, own_bench in zip(arms, benches, strict=True):
        try:
            runs = list(own_bench.run(rates, None, seeds, bar))
        except DivergenceError as error:
            logger.warning("%s is out: %s", arm, error)
            runs = []
        standings.append(_standing(arm, runs, own_bench.config.steps or 0))
    bar.close()
    return Rung(budget.say(part), sorted(standings, key=lambda one: _order(one.loss)))


def _standing(arm: str, runs: Sequence[Arm], steps: int) -> Standing:
    losses = [run.final_loss for run in runs] or [math.inf]
    judged = [run.judged for run in runs if run.judged is not None]
    rate = runs[0].learning_rate if runs else math.nan
    seconds = statistics.median(run.seconds for run in runs) if runs else math.nan
    return Standing(arm, rate, steps, losses, seconds, judged)


def _order(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _how(setup: Setup, budget: _Budget) -> str:
    grid = ", ".join(f"{rate:g}" for rate in setup.learning_rates)
    seeds = ", ".join(map(str, setup.seeds))
    equal = "equal training time" if budget.steps is None else "equal steps and tokens"
    return (
        f"All starts of a rung have {equal}, as its column names. Losses are held-out, in nats per token, the "
        f"mean over seeds {seeds} (least to most); the learning rate is the best of {grid} in that rung at seed "
        f"{setup.seeds[0]}."
    )
