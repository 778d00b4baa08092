"""What a run tells its readers: a picture of its course, and a page that says what was trained and what came of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ws._version import __version__
from hf_ws.distill import LOSSES, STATE_LOSSES
from hf_ws.training.run_folder import METRICS, PICTURE

if TYPE_CHECKING:
    from hf_ws.training.job import Job

Rows = list[dict[str, Any]]


def speeds(rows: Rows) -> list[tuple[int, float]]:
    """What had been seen, and how much of it went by a second since the row before; evaluations left out."""
    found = []
    for before, row in pairwise(rows):
        # An evaluation's time is in the row that it wrote, at the step of the row before.
        if row["tokens"] > before["tokens"] and row["seconds"] > before["seconds"]:
            found.append(
                (row["tokens"], (row["tokens"] - before["tokens"]) / (row["seconds"] - before["seconds"]))
            )
    return found


def draw(folder: Path, rows: Rows, unit: str = "tokens", predicts: str = "token") -> None:
    """Draw the losses, the learning rate and the speed of a run, over what it has seen, into `loss.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    loss, rate, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    names = {"loss": "training", "ce_loss": "cross-entropy", "kd_loss": "distillation"}
    names |= {name: name.replace("_", " ") for name in (*LOSSES, *STATE_LOSSES)}
    shown = [name for name in names if name == "loss" or any(name in row for row in rows)]
    for number, name in enumerate(shown):
        _line(loss, _points(rows, name), color=f"C{number + (number > 0)}", lw=1, label=names[name])
    _line(loss, _points(rows, "eval_loss"), color="C1", lw=2, marker="o", ms=3, label="held out")
    if loss.lines:
        loss.legend(frameon=False)
    _line(rate, _points(rows, "learning_rate"), color="C0", lw=1)
    _line(speed, speeds(rows), color="C0", lw=1)
    loss.set_ylabel(f"loss, nats per {predicts}")
    rate.set_ylabel("learning rate")
    speed.set(ylabel=f"{unit} a second", xlabel=f"training {unit}")
    speed.set_ylim(bottom=0)
    for axes in (loss, rate, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / PICTURE, dpi=110)


def _points(rows: Rows, key: str) -> list[tuple[int, float]]:
    return [(row["tokens"], row[key]) for row in rows if row.get(key) is not None]


def _line(axes: Any, points: Iterable[tuple[int, float]], **style: Any) -> None:
    if points := list(points):
        axes.plot(*zip(*points, strict=True), **style)


def summary(job: Job, rows: Rows) -> str:
    """The page `train.md`, in Markdown: settings that decide what is learned, and the figures before and after."""
    config, task = job.config, job.task
    taught = "no teacher"
    if config.distils and (job.teacher is not None or config.teacher_cache):
        losses = ", ".join(f"{name} {weight}" for name, weight in config.kd_losses.items())
        said = f"the cache {Path(config.teacher_cache).name}" if config.teacher_cache else _teacher(job)
        taught = f"{said}; {config.kd_weight} of the loss on {losses}, temperature {config.kd_temperature:g}"
    named = [*config.train_files, *config.mixture, *([config.dataset] if config.dataset else [])]
    data = ", ".join(map(_short, named)) or "given rows"
    pace = [speed for _, speed in speeds(rows)]
    rows_of = f"rows of {task.length(job.blocks)} {task.unit}"
    facts = {
        "task": type(task).__name__,
        "data": f"{data}; a stream of {rows_of}" if job.stream else f"{data}; {len(job.blocks):,} {rows_of}",
        "seen": f"{job.steps * job.tokens_per_step:,} {task.unit} in {job.steps:,} steps",
        "optimizer": f"AdamW, learning rate {config.learning_rate:g}, {config.schedule}, weight decay "
        f"{config.weight_decay:g}, seed {config.seed}",
        "teacher": taught,
        "speed": f"{statistics.median(pace):,.0f} {task.unit} a second, the median"
        if pace
        else "not measured",
    }
    if config.lora:
        facts["adapters"] = f"LoRA of rank {config.lora.r}, alpha {config.lora.alpha:g}"
    versions = {"hf-ws": __version__}  # not asked of the installed packages: a checkout runs too
    versions |= {name: version(name) for name in ("transformers", "accelerate", "torch")}
    facts["with"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    return "\n".join(["## Training", "", *lines, "", *_before_and_after(rows, task.predicts)]) + "\n"


def _before_and_after(rows: Rows, predicts: str) -> list[str]:
    names = {
        "eval_loss": f"held-out loss, nats per {predicts}",
        "eval_perplexity": "perplexity",
        "eval_bits_per_byte": "bits per byte",
        "eval_accuracy": "accuracy",
        "eval_word_error_rate": "wrong words for each that was said",
    }
    evaluated = [row for row in rows if row.get("eval_loss") is not None]
    if not evaluated:
        return ["Nothing was held out, so nothing was measured."]
    first, last = evaluated[0], evaluated[-1]
    lines = [f"| | step {first['step']} | step {last['step']} |", "|---|---|---|"]
    lines += [
        f"| {said} | {first[key]:.4g} | {last[key]:.4g} |" for key, said in names.items() if key in last
    ]
    return [*lines, "", f"Every row is in `{METRICS}`, the course in `{PICTURE}`, in the folder of the run."]


def _teacher(job: Job) -> str:
    return _short(job.config.teacher) if job.config.teacher else f"a {type(job.teacher).__name__}"


def _short(name: Any) -> str:
    """A source as it can be published: a Hub id, or the name of a folder or file without its path."""
    text = str(name)
    return Path(text).name if Path(text).expanduser().exists() else text
