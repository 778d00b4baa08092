"""What the results say: committed JSON, Markdown tables, the plot. Reads results alone, and no source."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.starting.arms import ARMS, CLAIMS, DEFAULT, MAIN
from benchmarks.starting.units import CHOOSING, ENOUGH, HALF, LONG, PER_STEP, SHORT
from hf_ws.compare.report import tokens_to

BASELINE, PUBLISHED = "random", "subclone"
RUNS = (0, HALF, SHORT, LONG, ENOUGH)  # steps
SHOWN = (0, 50, 200, 1000)  # steps, and the end
HALF_WAY = 200 * PER_STEP  # tokens: the subclone arm's loss there is what others are to reach


class Report:
    """The results of one source."""

    def __init__(self, told: dict[str, Any], units: list[dict[str, Any]]) -> None:
        self.told = told
        self.units = sorted(units, key=lambda one: json.dumps(one["unit"], sort_keys=True))
        self._runs: dict[tuple[str, str, int], dict[int, dict[str, Any]]] = defaultdict(dict)
        rates: dict[tuple[str, str, int], float | None] = {}  # the best with the first seed
        for one in sorted(self.units, key=_end):
            unit = one["unit"]
            run = unit["target"], unit["arm"], unit["steps"]
            if unit["seed"] == 0:
                rates.setdefault(run, unit["rate"])
        for one in self.units:
            unit = one["unit"]
            run = unit["target"], unit["arm"], unit["steps"]
            if unit["rate"] == rates.get(run, unit["rate"]):
                self._runs[run][unit["seed"]] = one

    @classmethod
    def read(cls, file: Path) -> Report:
        """What was committed."""
        kept = json.loads(file.read_text(encoding="utf-8"))
        return cls(kept["source"], kept["units"])

    def write(self, folder: Path) -> None:
        """Write the results, a line a unit."""
        lines = ",\n".join(json.dumps(one, separators=(",", ":")) for one in self.units)
        told = json.dumps(self.told, separators=(",", ":"))
        folder.mkdir(parents=True, exist_ok=True)
        text = f'{{"source":{told},\n"units":[\n{lines}\n]}}\n'
        (folder / f"{self.told['name']}.json").write_text(text, encoding="utf-8")

    def runs(self, arm: str, steps: int, target: str = CHOOSING) -> dict[int, dict[str, Any]]:
        """An arm's results of that many steps, by seed."""
        return self._runs.get((target, arm, steps), {})

    def arms(self, steps: int, target: str = CHOOSING) -> list[str]:
        """The arms that have results, in the order of the table of arms; then those it no longer has."""
        found = [arm for at, arm, count in self._runs if at == target and count == steps]
        return [arm for arm in ARMS if arm in found] + sorted(set(found) - ARMS.keys())

    def started(self) -> list[str]:
        """The arms whose loss before training is known, in a run or alone; but for the baseline."""
        found = dict.fromkeys(arm for steps in RUNS for arm in self.arms(steps))
        return [arm for arm in found if arm != BASELINE]

    def first_loss(self, arm: str, target: str = CHOOSING) -> float | None:
        """Held-out loss before training, the median over every run of the arm."""
        starts = {
            seed: one["curve"][0][1] for steps in RUNS for seed, one in self.runs(arm, steps, target).items()
        }
        return statistics.median(starts.values()) if starts else None

    def gap_closed(self, arm: str, target: str = CHOOSING) -> float | None:
        """The share of the gap between a random start and the source that a start closes before training."""
        own, random = self.first_loss(arm, target), self.first_loss(BASELINE, target)
        if own is None or random is None:
            return None
        return (random - own) / (random - self.told["loss"])

    def per_seed(
        self, arm: str, steps: int, target: str, what: Callable[[dict[str, Any], int], float | None]
    ) -> list[float | None]:
        """A figure of every seed's run."""
        return [what(one, seed) for seed, one in sorted(self.runs(arm, steps, target).items())]

    def tokens_to_end_of(
        self, other: str, arm: str, steps: int, target: str = CHOOSING
    ) -> list[float | None]:
        """Tokens to the other arm's final loss, seed by seed."""
        ends = {seed: one["curve"][-1][1] for seed, one in self.runs(other, steps, target).items()}
        return self._tokens_to(ends, arm, steps, target)

    def tokens_to_half_way(self, arm: str, steps: int, target: str = CHOOSING) -> list[float | None]:
        """Tokens to what the subclone arm has after 200 steps, seed by seed."""
        return self._tokens_to(
            {s: loss_at(one, HALF_WAY) for s, one in self.runs(PUBLISHED, steps, target).items()},
            arm,
            steps,
            target,
        )

    def _tokens_to(
        self, wanted: dict[int, float | None], arm: str, steps: int, target: str
    ) -> list[float | None]:
        def needed(one: dict[str, Any], seed: int) -> float | None:
            loss = wanted.get(seed)
            return math.nan if loss is None else tokens_to(one["curve"], loss)

        return [n for n in self.per_seed(arm, steps, target, needed) if n is None or not math.isnan(n)]


def _end(one: dict[str, Any]) -> float:
    """Held-out loss after training."""
    return math.inf if one["diverged"] else float(one["curve"][-1][1])


def loss_at(one: dict[str, Any], tokens: int) -> float | None:
    """Held-out loss after that many tokens, if it was measured there."""
    return dict(map(tuple, one["curve"])).get(tokens)


# --- Markdown ---


def tables(report: Report) -> str:
    """Every table that the results give."""
    told = report.told
    size = f"{told['parameters']:,} parameters ({told['without_embeddings']:,} without embeddings)"
    loss = f"held-out loss {told['loss']:.3f} nats per token, {told['bits_per_byte']:.3f} bits per byte"
    parts = [f"### From `{told['name']}`\n\n{size}, {_trained(told)}{loss}."]
    for steps in RUNS[1:]:
        targets = dict.fromkeys(target for target, _, count in report._runs if count == steps)
        parts += [_training_table(report, steps, target) for target in targets]
    parts += [part for part in (_start_table(report), _claims_table(report), _aims(report)) if part]
    return "\n\n".join(parts) + "\n"


def _trained(told: dict[str, Any]) -> str:
    return f"{told['trained_tokens']:,} training tokens, " if told["trained_tokens"] else ""


def _training_table(report: Report, steps: int, target: str) -> str:
    shown = [step for step in SHOWN if step < steps]
    head = ["start", "rate", "gap closed at step 0", *map(str, shown), f"end ({steps})", "seeds"]
    head += ["tokens to random's end", "of its tokens", "to subclone at 0.8 M", "to subclone's end"]
    rows = []
    for arm in report.arms(steps, target):
        runs = report.runs(arm, steps, target)
        first = next(iter(runs.values()))
        losses = [_middle([loss_at(one, step * PER_STEP) for one in runs.values()], ".3f") for step in shown]
        to_random = report.tokens_to_end_of(BASELINE, arm, steps, target)
        rows.append([
            arm, f"{first['unit']['rate']:g}", _percent(report.gap_closed(arm, target)), *losses,
            _span([one["curve"][-1][1] for one in runs.values()]), str(len(runs)), _middle(to_random, ",.0f"),
            _share(to_random, steps * PER_STEP), _middle(report.tokens_to_half_way(arm, steps, target), ",.0f"),
            _middle(report.tokens_to_end_of(PUBLISHED, arm, steps, target), ",.0f"),
        ])  # fmt: skip
    return f"Target `{target}`, {steps} steps of {PER_STEP:,} tokens:\n\n{_markdown(head, rows)}"


def _start_table(report: Report) -> str:
    targets = list(dict.fromkeys(one["unit"]["target"] for one in report.units))
    arms = report.started()
    rows = [
        [
            arm,
            _middle([report.first_loss(arm)], ".3f"),
            *(_percent(report.gap_closed(arm, target)) for target in targets),
        ]
        for arm in sorted(arms, key=lambda arm: report.first_loss(arm) or math.inf)
    ]
    head = ["start", f"loss, {CHOOSING}", *(f"gap closed, {target}" for target in targets)]
    return f"Before training:\n\n{_markdown(head, rows)}" if rows else ""


def _claims_table(report: Report) -> str:
    rows = []
    for claim in CLAIMS:
        better, worse = (report.first_loss(arm) for arm in (claim.better, claim.worse))
        if better is None or worse is None:
            continue
        pair = [report.runs(arm, SHORT) for arm in (claim.better, claim.worse)]
        seeds = sorted(set(pair[0]) & set(pair[1]))
        leads = [pair[1][seed]["curve"][-1][1] - pair[0][seed]["curve"][-1][1] for seed in seeds]
        rows.append([
            claim.says, f"{worse - better:+.3f}", _span(leads, "+.3f") if leads else "not run", str(len(leads)),
            _verdict(leads),
        ])  # fmt: skip
    head = ["claim", "lead at step 0", f"lead at the end ({SHORT} steps)", "seeds", "verdict after training"]
    return f"What was claimed (a lead above 0 is as claimed):\n\n{_markdown(head, rows)}" if rows else ""


def _verdict(leads: Sequence[float]) -> str:
    """Of paired seeds: all on one side, and further from 0 than they spread."""
    if len(leads) < 2:
        return "open" if not leads else "one seed: holds" if leads[0] > 0 else "one seed: does not hold"
    if min(leads) > 0 or max(leads) < 0:
        clear = abs(statistics.mean(leads)) > max(leads) - min(leads)
        return ("holds" if leads[0] > 0 else "does not hold") + ("" if clear else ", barely")
    return "no difference"


def _aims(report: Report) -> str:
    """How far the best start that is not a published one is from what was aimed at."""
    published = [
        name
        for name, arm in ARMS.items()
        if arm.options["method"] in ("random", "weight_selection", "subclone")
    ]
    own = [arm for arm in report.arms(SHORT) if arm not in published]
    if not own:
        return ""
    best = min(
        own, key=lambda arm: statistics.median(o["curve"][-1][1] for o in report.runs(arm, SHORT).values())
    )
    total = SHORT * PER_STEP
    to_random, to_published = (report.tokens_to_end_of(arm, best, SHORT) for arm in (BASELINE, PUBLISHED))
    half_way = report.tokens_to_half_way(best, SHORT)
    aims = [
        ["gap closed at step 0", "at least 90 %", _percent(report.gap_closed(best))],
        ["tokens to the random start's end", "less than 1/16 of them", _share(to_random, total)],
        [f"tokens to {PUBLISHED}'s loss at 0.8 M", "1/8 of them", _share(half_way, HALF_WAY)],
        [f"tokens to {PUBLISHED}'s end", "less than 1/2 of them", _share(to_published, total)],
    ]
    if (halves := report.runs(best, HALF)) and report.runs(PUBLISHED, SHORT):
        ends = report.runs(PUBLISHED, SHORT)
        leads = [ends[s]["curve"][-1][1] - halves[s]["curve"][-1][1] for s in sorted(set(ends) & set(halves))]
        aims.append(
            [
                f"below {PUBLISHED}'s end after half its steps, by a schedule of that length",
                "yes",
                _span(leads, "+.3f"),
            ]
        )
    if report.runs(best, ENOUGH):
        found = report.tokens_to_end_of(BASELINE, best, ENOUGH)
        aims.append(
            [
                f"tokens to the random start's end, {ENOUGH} steps",
                "less than 1/8 of them",
                _share(found, ENOUGH * PER_STEP),
            ]
        )
    for steps in (SHORT, LONG, ENOUGH):
        if report.runs(best, steps):
            aims.append(
                [
                    f"ahead of every published start, {steps} steps",
                    "always",
                    _ahead(report, best, published, steps),
                ]
            )
    return f"Aims, and what `{best}` reached:\n\n{_markdown(['aim', 'wanted', 'reached'], aims)}"


def _ahead(report: Report, best: str, published: Sequence[str], steps: int) -> str:
    behind = []
    others = [report.runs(arm, steps) for arm in published if report.runs(arm, steps)]
    own = report.runs(best, steps)
    for tokens in [point[0] for point in next(iter(own.values()))["curve"]]:
        middle = statistics.median(loss_at(one, tokens) or math.inf for one in own.values())
        rivals = [
            statistics.median(loss_at(one, tokens) or math.inf for one in runs.values()) for runs in others
        ]
        if rivals and middle >= min(rivals):
            behind.append(f"{tokens // PER_STEP}")
    return f"behind at step {', '.join(behind)}" if behind else "at every checkpoint"


def final_table(report: Report) -> str:
    """The second held-out part, on which nothing was chosen: report it once."""
    rows = []
    for steps in RUNS[1:]:
        for arm in report.arms(steps):
            runs = list(report.runs(arm, steps).values())
            firsts, ends = ([one["final"].get(when, math.inf) for one in runs] for when in ("start", "end"))
            measured = [one["curve"][-1][1] for one in runs]
            rows.append([arm, str(steps), str(len(runs)), *map(_span, (firsts, ends, measured))])
    head = ["start", "steps", "seeds", "final part: at start", "final part: end", "validation: end"]
    told = f"`{report.told['name']}` itself: {report.told['final']['loss']:.3f} on the final part."
    return f"{told}\n\n{_markdown(head, rows)}\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _middle(values: Sequence[float | None], form: str) -> str:
    """The median; a seed that never got there counts as infinite."""
    if not values:
        return "-"
    middle = statistics.median(math.inf if value is None else value for value in values)
    return "never" if math.isinf(middle) else f"{middle:{form}}"


def _span(values: Sequence[float], form: str = ".3f") -> str:
    told = f"{statistics.median(values):{form}}"
    return told if len(values) == 1 else f"{told} ({min(values):{form}} to {max(values):{form}})"


def _share(tokens: Sequence[float | None], whole: int) -> str:
    middle = statistics.median(math.inf if n is None else n for n in tokens) if tokens else math.inf
    return "-" if math.isinf(middle) else "none" if middle == 0 else f"1/{whole / middle:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


# --- the plot ---


def draw(report: Report, folder: Path) -> None:
    """Loss against tokens of the main arms, median and range over seeds; and the gap that every start closes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    panels = [steps for steps in (SHORT, LONG, ENOUGH) if report.arms(steps)]
    started = sorted(report.started(), key=lambda arm: report.gap_closed(arm) or 0.0)
    size = 2 + 5.5 * (len(panels) + 1), max(5, 0.2 * len(started))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + 1, squeeze=False)[0]
    for place, steps in zip(axes, panels, strict=False):
        arms = [arm for arm in report.arms(steps) if arm in ARMS and ARMS[arm].group == MAIN]
        for number, arm in enumerate(arms):
            runs = list(report.runs(arm, steps).values())
            tokens = [count for count, _ in runs[0]["curve"] if count]
            losses = [[loss_at(one, count) or math.inf for one in runs] for count in tokens]
            place.plot(
                tokens, [statistics.median(row) for row in losses], f"C{number}o-", ms=3, label=_label(arm)
            )
            place.fill_between(
                tokens, [min(r) for r in losses], [max(r) for r in losses], color=f"C{number}", alpha=0.2
            )
        place.axhline(report.told["loss"], color="0.6", ls="--", lw=1, label="the source")
        place.set(
            xscale="log",
            xlabel="training tokens",
            ylabel="held-out loss, nats per token",
            title=f"{steps} steps",
        )
        place.xaxis.set_major_formatter(EngFormatter(sep=""))
        place.legend(frameon=False)
    gaps = [100 * (report.gap_closed(arm) or 0.0) for arm in started]
    axes[-1].barh([*map(_label, started)], gaps, color="C0")
    axes[-1].set(title="before training", xlabel="gap closed, %")
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.told['name']}, target {CHOOSING}")
    figure.savefig(folder / f"{report.told['name']}.png", dpi=110)


def _label(arm: str) -> str:
    return f"{arm} (the default)" if arm == DEFAULT else arm
