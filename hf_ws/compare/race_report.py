"""What a race found: its rungs, the table, the picture."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ws.compare.verdict import Verdict
from hf_ws.training.run_folder import write_json

NAME = "race"


@dataclass(frozen=True)
class Standing:
    """An arm in one rung: the learning rate it chose, and its held-out loss at the end, one a seed."""

    label: str
    learning_rate: float
    steps: int
    losses: list[float]
    seconds: float
    """Of a run, evaluations included: the median over seeds."""
    judged: list[list[float]] = field(default_factory=list)
    """In the last rung, the loss of each block that chose nothing [seeds, blocks]."""

    @property
    def loss(self) -> float:
        """The mean over seeds; infinite if it diverged."""
        return statistics.fmean(self.losses)


@dataclass(frozen=True)
class Rung:
    """The arms that were trained for one budget, best first."""

    budget: str
    standings: list[Standing]


@dataclass
class Race:
    """The rungs, and the winner if the race is over. It prints as a Markdown table."""

    folder: Path
    how: str
    rungs: list[Rung] = field(default_factory=list)
    verdict: Verdict | None = None
    before: dict[str, float] = field(default_factory=dict)
    """Held-out loss before training, where that chose who enters."""

    @property
    def labels(self) -> list[str]:
        """The arms, those that came furthest first; in one rung, the better first."""
        trained = [one.label for rung in self.rungs[::-1] for one in rung.standings]
        return list(dict.fromkeys([*trained, *sorted(self.before, key=lambda label: self.before[label])]))

    def table(self) -> str:
        """Markdown, a row an arm, a column a rung."""
        head = ["start", "learning rate", *(["before training"] if self.before else [])]
        head += [rung.budget for rung in self.rungs]
        rows = [head, ["---"] * len(head)]
        for label in self.labels:
            found = [self._in(rung, label) for rung in self.rungs]
            last = [one for one in found if one is not None]
            rate = f"{last[-1].learning_rate:g}" if last else "-"
            before = [f"{self.before[label]:.4f}"] if self.before else []
            rows.append([label, rate, *before, *(_say(one) for one in found)])
        lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        return "\n\n".join([lines, *([str(self.verdict)] if self.verdict else []), self.how])

    def __str__(self) -> str:
        return self.table()

    def write(self) -> None:
        """Write race.json, race.md and race.png into the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{NAME}.md").write_text(self.table() + "\n", encoding="utf-8")
        _draw(self)
        write_json(self.folder / f"{NAME}.json", self._as_json())

    def _in(self, rung: Rung, label: str) -> Standing | None:
        return next((one for one in rung.standings if one.label == label), None)

    def _as_json(self) -> dict[str, Any]:
        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None

        rungs = [
            {
                "budget": rung.budget,
                "starts": [
                    {
                        "start": one.label,
                        "learning_rate": finite(one.learning_rate),
                        "steps": one.steps,
                        "loss": finite(one.loss),
                        "losses": [finite(loss) for loss in one.losses],
                        "seconds": finite(one.seconds),
                    }
                    for one in rung.standings
                ],
            }
            for rung in self.rungs
        ]
        end = None if self.verdict is None else self.verdict.as_dict()
        return {"how": self.how, "before": self.before, "rungs": rungs, "verdict": end}


def _say(one: Standing | None) -> str:
    """A loss and its range over seeds."""
    if one is None:
        return "-"
    if not math.isfinite(one.loss):
        return "diverged"
    spread = f" ({min(one.losses):.4f} to {max(one.losses):.4f})" if len(one.losses) > 1 else ""
    return f"{one.loss:.4f}{spread}"


def _draw(race: Race) -> None:
    """Held-out loss at the end of each rung, a line an arm, the range over seeds as a bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="budget of a run", ylabel="held-out loss, nats per token")
    ends: list[tuple[int, float, str, str]] = []
    for number, label in enumerate(race.labels):
        seen = [(at, one) for at, rung in enumerate(race.rungs) if (one := race._in(rung, label))]
        seen = [(at, one) for at, one in seen if math.isfinite(one.loss)]
        if not seen:
            continue
        places, means = [at for at, _ in seen], [one.loss for _, one in seen]
        reach = [
            [one.loss - min(one.losses) for _, one in seen],
            [max(one.losses) - one.loss for _, one in seen],
        ]
        axes.errorbar(places, means, yerr=reach, color=f"C{number % 10}", lw=2, marker="o", ms=4, capsize=3)
        ends.append((places[-1], means[-1], label, f"C{number % 10}"))
    bottom, top = axes.get_ylim()
    for at in range(len(race.rungs)):
        place = -math.inf
        for _, loss, label, colour in sorted(end for end in ends if end[0] == at):
            place = max(loss, place + (top - bottom) * 0.045)  # labels of close ends are pushed apart
            told = axes.annotate(f"  {label}", (at, place), color=colour, va="center", annotation_clip=False)
            told.set_in_layout(False)  # long names widen the picture, they do not narrow the plot
    axes.set_xticks(range(len(race.rungs)), [rung.budget for rung in race.rungs])
    axes.set_xlim(-0.2, max(len(race.rungs) - 1, 0) + 0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if race.verdict is not None:
        sure = race.verdict
        said = "wins" if sure.decided else "is ahead, undecided"
        axes.set_title(f"{sure.winner} {said}: confidence {sure.confidence:.1%}", fontsize=10, loc="left")
    drawn: dict[str, Any] = {"bbox_extra_artists": axes.texts, "bbox_inches": "tight"}
    figure.savefig(race.folder / f"{NAME}.png", dpi=130, **drawn)
