"""What a comparison found: its arms, the table, the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ws.training.run_folder import write_json

NAME = "compare"


@dataclass(frozen=True)
class Arm:
    """One run: `evaluations` are training tokens seen and held-out loss in nats per token."""

    method: str
    seed: int
    learning_rate: float
    evaluations: list[tuple[int, float]]
    bits_per_byte: float | None  # at the end; None where the text's bytes are not known
    seconds: float
    model_folder: Path | None = None
    judged: list[float] | None = None  # loss of each further held-out block at the end, if there were any

    @property
    def first_loss(self) -> float:
        """Held-out loss before training."""
        return self.evaluations[0][1]

    @property
    def final_loss(self) -> float:
        """Held-out loss after training."""
        return self.evaluations[-1][1]

    @property
    def tokens(self) -> int:
        """Training tokens in all."""
        return self.evaluations[-1][0]


@dataclass
class Comparison:
    """The arms, and what follows from them. It prints as a Markdown table."""

    folder: Path
    baseline: str
    how: str  # how learning rates were chosen
    arms: list[Arm] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        """The arms' names, in order."""
        return list(dict.fromkeys(arm.method for arm in self.arms))

    def of(self, method: str) -> list[Arm]:
        """The runs of one method, one a seed."""
        return [arm for arm in self.arms if arm.method == method]

    def tokens_needed(self, method: str) -> list[float | None]:
        """Tokens to the baseline's final loss, one a seed; None where it is never reached.

        Between two evaluations the loss is taken to fall in a straight line, which, as loss curves bend, is
        rather late than early.
        """
        ends = {arm.seed: arm.final_loss for arm in self.of(self.baseline)}
        return [tokens_to(arm.evaluations, ends[arm.seed]) for arm in self.of(method) if arm.seed in ends]

    def speed_ups(self, method: str) -> list[float | None]:
        """The baseline's tokens over the tokens needed, one a seed; infinite where the start is already there."""
        total = {arm.seed: arm.tokens for arm in self.of(self.baseline)}
        seeds = [arm.seed for arm in self.of(method) if arm.seed in total]
        pairs = zip(seeds, self.tokens_needed(method), strict=True)
        return [None if n is None else total[seed] / n if n else math.inf for seed, n in pairs]

    def speed_up(self, method: str) -> float | None:
        """The median over seeds; None if half of them never get there."""
        found = [0.0 if factor is None else factor for factor in self.speed_ups(method)]
        return (statistics.median(found) or None) if found else None

    def table(self) -> str:
        """Markdown, one row a method; of several seeds, the median (least to most)."""
        head = ["start", "learning rate", "loss at start", "loss at end", "bits per byte"]
        head += [f"tokens to the end of {self.baseline}", "speed-up"]
        rows = [head, ["---"] * len(head)]
        for method in self.methods:
            arms = self.of(method)
            rows.append(
                [
                    method,
                    f"{arms[0].learning_rate:g}",
                    _span([arm.first_loss for arm in arms], ".3f"),
                    _span([arm.final_loss for arm in arms], ".3f"),
                    _span([arm.bits_per_byte for arm in arms], ".3f"),
                    _span(self.tokens_needed(method), ",.0f"),
                    _span(self.speed_ups(method), ".2f", "x"),
                ]
            )
        lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        return f"{lines}\n\n{self.arms[0].tokens:,} training tokens a run. {self.how}" if self.arms else lines

    def __str__(self) -> str:
        return self.table()

    def write(self) -> None:
        """Write compare.json, compare.md and compare.png into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{NAME}.md").write_text(self.table() + "\n", encoding="utf-8")
        _draw(self)
        write_json(self.folder / f"{NAME}.json", self._as_json())

    def _as_json(self) -> dict[str, Any]:
        def finite(value: float | None) -> float | None:
            return value if value is not None and math.isfinite(value) else None

        methods = {
            method: {
                "tokens_needed": self.tokens_needed(method),
                "speed_up": finite(self.speed_up(method)),  # null too where it is there from the start
                "runs": [
                    {
                        "seed": arm.seed,
                        "learning_rate": arm.learning_rate,
                        "evaluations": arm.evaluations,
                        "bits_per_byte": arm.bits_per_byte,
                        "seconds": arm.seconds,
                    }
                    for arm in self.of(method)
                ],
            }
            for method in self.methods
        }
        return {"baseline": self.baseline, "learning_rates": self.how, "methods": methods}


def tokens_to(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Tokens at which a curve first comes down to `loss`; None if it never does."""
    before: tuple[int, float] | None = None
    for tokens, now in curve:
        if now <= loss:
            if before is None:
                return float(tokens)
            return before[0] + (tokens - before[0]) * (before[1] - loss) / (before[1] - now)
        before = (tokens, now)
    return None


def _span(values: Sequence[float | None], spec: str, unit: str = "") -> str:
    """Median and range; infinite reads "at once", None reads "never" (or a dash if nothing is known)."""

    def say(value: float) -> str:
        return "never" if math.isnan(value) else "at once" if math.isinf(value) else f"{value:{spec}}{unit}"

    if all(value is None for value in values):
        return "never" if spec != ".3f" and values else "-"
    known = sorted(value for value in values if value is not None)
    missing = len(values) - len(known)
    # Never comes last where less is better (tokens) and first where more is (speed-up).
    ordered = [math.nan] * missing + known if unit else known + [math.nan] * missing
    middle = ordered[len(ordered) // 2] if missing else statistics.median(known)
    return say(middle) if len(values) == 1 else f"{say(middle)} ({say(ordered[0])} to {say(ordered[-1])})"


def _draw(result: Comparison) -> None:
    """Held-out loss against tokens, a line a method: the median over seeds, its range shaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", xlabel="training tokens", ylabel="held-out loss, nats per token")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    ends: list[tuple[float, str, str, int]] = []
    for number, method in enumerate(result.methods):
        arms, colour = result.of(method), f"C{number}"
        # A logarithmic axis has no place for 0 tokens; the loss at the start is in the table.
        tokens = [count for count, _ in arms[0].evaluations if count]
        losses = [[loss for count, loss in arm.evaluations if count] for arm in arms]
        middle = [statistics.median(column) for column in zip(*losses, strict=True)]
        axes.plot(tokens, middle, color=colour, lw=2, marker="o", ms=3)
        if len(arms) > 1:
            low, high = ([bound(column) for column in zip(*losses, strict=True)] for bound in (min, max))
            axes.fill_between(tokens, low, high, color=colour, alpha=0.2, lw=0)
        factor = result.speed_up(method) if method != result.baseline else None
        label = (
            method
            if factor is None
            else f"{method}, at once"
            if math.isinf(factor)
            else f"{method}, {factor:.1f}x"
        )
        ends.append((middle[-1], label, colour, tokens[-1]))
    baseline = [arm.final_loss for arm in result.of(result.baseline)]
    if baseline:
        axes.axhline(statistics.median(baseline), color="0.6", lw=1, ls="--")
    bottom, top = axes.get_ylim()
    place = -math.inf
    for loss, label, colour, last in sorted(ends):
        place = max(loss, place + (top - bottom) * 0.045)  # labels of close ends are pushed apart
        axes.annotate(f" {label}", (last, place), color=colour, va="center", annotation_clip=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        "The dashed line is where the random start ends" if result.baseline == "random" else "", fontsize=10
    )
    figure.savefig(result.folder / f"{NAME}.png", dpi=130)
