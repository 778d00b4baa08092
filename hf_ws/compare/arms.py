"""Train several starts of one student on the same batches, and say how much sooner each gets there.

    result = compare("gpt2-large", sizes={"hidden": 512}, data="stdlib", steps=500, output="comparison")
    print(result)                                   # the table; comparison/compare.png is the picture

Every arm sees the same blocks in the same order under the same schedule. Only the peak learning rate is its own,
the best of a small grid, for a good start wants a smaller one than a random start. The speed-up of a start is
what the random start needed in all, over what this start needs to reach the random start's final loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ws.compare.report import Comparison
from hf_ws.compare.setup import Setup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compare(
    source: str | Path | PreTrainedModel,
    *,
    output: str | Path,
    steps: int,
    search_steps: int | None = None,
    baseline: str = "random",
    **settings: Any,
) -> Comparison:
    """Train every start and report. An arm that `output` already holds, with the same settings, is not run again.

    Args:
        source: Folder, Hub id or live model that the starts are made from.
        output: Folder for compare.json, compare.md, compare.png, and arms/ with each run's own record.
        steps: Optimizer steps of every run.
        search_steps: Choose the rate on a run this short; by default on the full run. Always at the first seed; the
            other seeds take what was chosen.
        baseline: The arm that speed-ups are measured against.
        settings: The other fields of `Setup` (sizes, methods, starts, data, held_out, learning_rates, seeds, ...) and
            of TrainConfig (batch_size, schedule, precision, ...).

    Raises:
        PlanError, DataError, DistillationError, OutputError: Before any training.
        DivergenceError: Every learning rate of an arm diverges.
    """
    setup = Setup.of({"source": source, "output": output, **settings})
    bench = setup.bench(steps, "compare.json")
    result = Comparison(setup.folder, baseline, _how(setup.learning_rates, search_steps, setup.seeds))
    for arm in bench.run(list(setup.learning_rates), search_steps, list(setup.seeds)):
        result.arms.append(arm)
        result.write()
    return result


def _how(rates: Sequence[float], search_steps: int | None, seeds: Sequence[int]) -> str:
    if len(rates) == 1:
        return f"Learning rate {rates[0]:g} for every start."
    grid = ", ".join(f"{rate:g}" for rate in rates)
    run = "the full run" if search_steps is None else f"a run of {search_steps} steps"
    return f"Learning rate of each start: the one of {grid} with the lowest held-out loss on {run} (seed {seeds[0]})."
