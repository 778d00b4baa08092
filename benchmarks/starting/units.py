"""Units of work: one start of one source, trained with one learning rate and one seed; or not trained at all.

Each unit's result is one JSON file, written whole or not at all, so that a run may be killed at any time. Which unit
comes next follows from the results that are there and from `STAGES`, the most informative first.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, PreTrainedModel

from benchmarks.starting.arms import ARMS, MAIN, refusal, sizes_for
from benchmarks.starting.sources import BATCH, BLOCK, DEVICE, SAVED, Source, loss_of, machine, measured
from hf_ws import AutoSubclone, __version__, turns
from hf_ws.errors import DivergenceError, ResumeError
from hf_ws.training import TrainConfig, train
from hf_ws.training.run_folder import write_json

PER_STEP = BLOCK * BATCH  # tokens
CHOOSING = "both-40"  # the target that learning rates are chosen on
RATES = (1e-3, 2e-3, 4e-3)  # and beyond, by factors of 2, while the best is at an edge
LEAST, MOST = 1.25e-4, 3.2e-2
HALF, SHORT, LONG = 200, 400, 1500  # steps
ENOUGH = 11_250  # steps: 20 tokens a parameter of the demo's student
EVALUATED = (
    *(3, 6, 12, 25, 50, 75, 100, 150, 200, 250, 300, 350, 400, 500, 600, 800, 1000, 1250, 1500),
    *range(2000, ENOUGH, 500),
    ENOUGH,
)
CALIBRATION = 64  # sequences of BLOCK tokens


@dataclass(frozen=True)
class Unit:
    """One start of a source, trained for `steps` (0: only measured)."""

    source: str
    target: str
    arm: str
    steps: int
    seed: int
    rate: float | None = None  # peak learning rate; of a run that is not chosen yet, None

    @property
    def key(self) -> str:
        """The name of its file."""
        words = [self.source, self.target, self.arm, f"{self.steps}steps", f"seed{self.seed}"]
        return "--".join(
            re.sub(r"[^\w.]+", "-", word) for word in [*words, f"{self.rate:g}" if self.rate else "start"]
        )


@dataclass(frozen=True)
class Stage:
    """Units that belong together."""

    says: str
    steps: int
    seeds: tuple[int, ...]
    main: bool | None  # the arms of the main table, the others, or all
    elsewhere: bool = False  # on all targets but the one that rates are chosen on
    only: str | None = None  # of this source


STAGES = (
    Stage("every start, not trained", 0, (0,), None),
    Stage("main arms, seed 0, every rate", SHORT, (0,), True),
    Stage("main arms, seeds 1 and 2", SHORT, (1, 2), True),
    Stage("main arms, 20 tokens a parameter, seed 0", ENOUGH, (0,), True, only="demo"),
    Stage("main arms, longer, seed 0", LONG, (0,), True),
    Stage("main arms, other targets, seed 0", SHORT, (0,), True, elsewhere=True),
    Stage("main arms, half as long", HALF, (0, 1, 2), True),
    Stage("ablations, seed 0, every rate", SHORT, (0,), False),
    Stage("ablations, seeds 1 and 2", SHORT, (1, 2), False),
    Stage("every start, not trained, other targets", 0, (0,), None, elsewhere=True),
    Stage("main arms, longer, seeds 1 and 2", LONG, (1, 2), True),
    Stage("main arms, other targets, seeds 1 and 2", SHORT, (1, 2), True, elsewhere=True),
)


class Results:
    """What is done, by the units' keys: committed results, and the files of the cache over them."""

    def __init__(self, cache: Path, committed: Path) -> None:
        self.folder, self.committed = cache / "units", committed
        self.folder.mkdir(parents=True, exist_ok=True)
        self._done: dict[str, dict[str, Any]] = {}
        for file in sorted(committed.glob("*.json")):
            kept = json.loads(file.read_text(encoding="utf-8"))
            self._done |= {Unit(**unit["unit"]).key: unit for unit in kept["units"]}
        for file in sorted(self.folder.glob("*.json")):
            self._done[file.stem] = json.loads(file.read_text(encoding="utf-8"))

    def of(self, unit: Unit, fingerprint: str) -> dict[str, Any] | None:
        """The result of a unit from the source with this fingerprint."""
        file = self.folder / f"{unit.key}.json"
        if unit.key not in self._done and file.is_file():  # by another process
            self._done[unit.key] = json.loads(file.read_text(encoding="utf-8"))
        found = self._done.get(unit.key)
        return found if found and found["fingerprint"] == fingerprint else None

    def all(self, source: str, fingerprint: str) -> list[dict[str, Any]]:
        """Every result of a source."""
        return [
            one
            for one in self._done.values()
            if one["unit"]["source"] == source and one["fingerprint"] == fingerprint
        ]

    def add(self, unit: Unit, result: dict[str, Any]) -> None:
        """Keep a result, whole or not at all."""
        write_json(self.folder / f"{unit.key}.json", result)
        self._done[unit.key] = result


@contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Whether the file is this process's, until it is done with it or dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@dataclass(frozen=True)
class Bench:
    """One source, and what is done with it."""

    source: Source
    results: Results

    def units(self) -> Iterator[tuple[Stage, Unit]]:
        """Every unit in order, done or not; a run whose learning rate is not chosen yet has none."""
        for stage in STAGES:
            if stage.only not in (None, self.source.name):
                continue
            targets = [t for t in self.source.targets if (t != CHOOSING) == stage.elsewhere]
            for seed in stage.seeds:
                for target in targets:
                    for arm in self.source.arms or ARMS:
                        if stage.main in (None, ARMS[arm].group == MAIN) and not self.refusal(arm, target):
                            yield from ((stage, unit) for unit in self._for(stage, target, arm, seed))

    def _for(self, stage: Stage, target: str, arm: str, seed: int) -> Iterator[Unit]:
        name = self.source.name
        if stage.steps == 0:
            yield Unit(name, target, arm, 0, seed)
            return
        if self.refusal(arm, CHOOSING):
            return
        yield from self.tried(arm)
        if (stage.steps, seed, target) != (SHORT, 0, CHOOSING):  # that is one of those
            yield Unit(name, target, arm, stage.steps, seed, self.best_rate(arm))

    def tried(self, arm: str) -> list[Unit]:
        """The whole runs that an arm's rate is chosen on: the grid, and beyond while its best is at an edge."""
        rates = list(RATES)
        while True:
            units = [Unit(self.source.name, CHOOSING, arm, SHORT, 0, rate) for rate in rates]
            found = [self._end(unit) for unit in units]
            if None in found:
                return units
            best = rates[found.index(min(found))]  # type: ignore[type-var]
            if best == min(rates) and best > LEAST:
                rates.insert(0, best / 2)
            elif best == max(rates) and best < MOST:
                rates.append(best * 2)
            else:
                return units

    def best_rate(self, arm: str) -> float | None:
        """The rate of the run that ends lowest; None while one is not done."""
        found = {unit.rate: self._end(unit) for unit in self.tried(arm)}
        return None if None in found.values() else min(found, key=found.__getitem__)  # type: ignore[arg-type]

    def _end(self, unit: Unit) -> float | None:
        result = self.results.of(unit, self.source.fingerprint)
        return None if result is None else math.inf if result["diverged"] else result["curve"][-1][1]

    def done(self, unit: Unit) -> bool:
        """Whether there is a result."""
        chosen = unit.steps == 0 or unit.rate is not None
        return chosen and self.results.of(unit, self.source.fingerprint) is not None

    def refusal(self, arm: str, target: str) -> str | None:
        """Why there is no such start."""
        return _refusal(str(self.source.folder), arm, tuple(self.source.targets[target].items()))

    def start(self, unit: Unit) -> PreTrainedModel:
        """The model that a unit trains, in float32. Another seed calibrates on other sequences of the training text."""
        arm, blocks = ARMS[unit.arm], self.source.blocks["train"]
        drawn = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(1000 + unit.seed))
        sizes = self.source.targets[unit.target]
        with mock.patch.object(turns, "weight_of", arm.weight_of or turns.weight_of):
            return AutoSubclone.from_pretrained(
                self.source.folder,
                **arm.options,
                **sizes_for(arm, AutoConfig.from_pretrained(self.source.folder), sizes),
                calibration=blocks[drawn[: arm.sequences or CALIBRATION]] if arm.calibrated else None,
                seed=unit.seed,
                dtype=torch.float32,
                device=DEVICE,
            )

    def run(self, unit: Unit, scratch: Path) -> dict[str, Any]:
        """Measure a unit's start, train it, and keep the result."""
        began = time.monotonic()
        model = self.start(unit)
        plan = model.hf_ws_plan
        blocks = self.source.blocks
        result: dict[str, Any] = {
            "unit": asdict(unit),
            "fingerprint": self.source.fingerprint,
            "date": time.strftime("%Y-%m-%d"),
            "version": __version__,
            "machine": machine(),
            "parameters": model.num_parameters(),
            "layers": list(plan.layers["layers"]),
            "making": round(time.monotonic() - began, 1),
            "curve": [[0, loss_of(model, blocks["validation"])]],
            "final": {
                "start": loss_of(model, blocks["final"])
            },  # the second held-out part: read once, by --final
            "diverged": False,
        }
        if unit.steps:
            result |= self._trained(unit, model, scratch)
            if not result["diverged"]:
                result["final"] = {**result["final"], "end": loss_of(model, blocks["final"])}
        result["seconds"] = round(time.monotonic() - began, 1)
        self.results.add(unit, result)
        shutil.rmtree(scratch / unit.key, ignore_errors=True)
        return result

    def _trained(self, unit: Unit, model: PreTrainedModel, scratch: Path) -> dict[str, Any]:
        """The curve, [tokens, held-out loss]; a run that was killed goes on from its last checkpoint."""
        assert unit.rate is not None
        at = [step for step in EVALUATED if step <= unit.steps]
        config = TrainConfig(
            steps=unit.steps, batch_size=BATCH, learning_rate=unit.rate, precision="bf16", seed=unit.seed,
            warmup_steps=20, eval_every=0, eval_at=at, log_every=unit.steps, progress=False,
            save_every=max(100, unit.steps // 10) * SAVED, output=str(scratch / unit.key), resume=True,
            save_model=False,
        )  # fmt: skip
        try:
            return self._curve(config, model)
        except ResumeError:  # what is left there is of another start by this name: the library has changed
            shutil.rmtree(scratch / unit.key)
            return self._curve(config, model)

    def _curve(self, config: TrainConfig, model: PreTrainedModel) -> dict[str, Any]:
        blocks = self.source.blocks
        held_out = measured(blocks["validation"])
        try:
            history = train(config, model=model, train_blocks=blocks["train"], eval_blocks=held_out)
        except DivergenceError:
            return {"diverged": True}
        return {"curve": [[tokens, loss] for tokens, loss in history.evaluations]}


def every(bench: Bench) -> dict[Unit, Stage]:
    """Every unit in order, with the first stage that wants it."""
    found: dict[Unit, Stage] = {}
    for stage, unit in bench.units():
        found.setdefault(unit, stage)
    return found


def left(bench: Bench) -> dict[Unit, Stage]:
    """The units that are not done, in order."""
    return {unit: stage for unit, stage in every(bench).items() if not bench.done(unit)}


def seconds_a_unit(bench: Bench, units: list[Unit]) -> float:
    """How long units will take by those of this source that were done on such a machine; 0 where none was."""
    done = bench.results.all(bench.source.name, bench.source.fingerprint)
    done = [one for one in done if one.get("machine") == machine()]
    trained = [
        one["seconds"] / one["unit"]["steps"] / one["parameters"] for one in done if one["unit"]["steps"]
    ]
    measured_only = [one["seconds"] for one in done if not one["unit"]["steps"]]
    if not trained or not measured_only:
        return 0.0
    sizes = {one["unit"]["target"]: one["parameters"] for one in done}
    usual = statistics.median(sizes.values())
    return sum(
        unit.steps * sizes.get(unit.target, usual) * statistics.median(trained)
        if unit.steps
        else statistics.median(measured_only)
        for unit in units
    )


@cache
def _refusal(folder: str, arm: str, sizes: tuple[tuple[str, int], ...]) -> str | None:
    return refusal(ARMS[arm], folder, AutoConfig.from_pretrained(folder), dict(sizes))
