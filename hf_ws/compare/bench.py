"""The runs of a comparison: each start made, trained and recorded, and none made twice."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from hf_ws.compare.report import Arm
from hf_ws.errors import DivergenceError
from hf_ws.evaluation import block_losses
from hf_ws.training import TrainConfig, train
from hf_ws.training.data import Packed
from hf_ws.training.job import as_dataset, print_of_rows
from hf_ws.training.run_folder import write_json

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Maker = Callable[[int, Any], "PreTrainedModel"]
"""A start, made from a seed and calibration data."""

_RESULT = "result.json"
_SILENT = ("output", "resume", "progress", "threads", "report_to", "save_every", "keep_checkpoints")
"""Settings that do not change what is learned."""


@dataclass(frozen=True)
class Bench:
    """All that the runs share."""

    folder: Path
    config: TrainConfig
    makers: Mapping[str, Maker]
    """The arms by their labels."""
    shapes: Mapping[str, str]
    """What tells an arm's shape from others: arms of one shape train equally fast."""
    calibration: Any
    tokenizer: PreTrainedTokenizerBase | None
    teacher: PreTrainedModel | str | Path | None
    blocks: Packed | datasets.Dataset | Tensor
    held_out: Packed | datasets.Dataset | Tensor
    known: Mapping[str, Any]
    judged: datasets.Dataset | None = None
    """Further held-out blocks, on each of which what was trained is measured at the end."""
    _prints: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def runs(self, rates: list[float], search_steps: int | None, seeds: list[int]) -> int:
        """How many runs `run` makes."""
        searches = len(rates) > 1
        return len(self.makers) * (len(seeds) + (len(rates) - (search_steps is None) if searches else 0))

    def run(
        self, rates: list[float], search_steps: int | None, seeds: list[int], bar: Any = None
    ) -> Iterator[Arm]:
        """The chosen run of every method and seed, in order.

        Raises:
            DivergenceError: an arm diverges at every rate, or at the one chosen with another seed.
        """
        own = None
        if bar is None:
            total = self.runs(rates, search_steps, seeds)
            bar = own = tqdm(total=total, desc="comparing", unit=" runs", disable=not self.config.progress)
        for method in self.makers:
            rate, best = rates[0], None
            if len(rates) > 1:
                tried = [self.arm(method, seeds[0], one, search_steps, bar) for one in rates]
                best = min(tried, key=lambda arm: arm.final_loss)
                if not math.isfinite(best.final_loss):
                    raise DivergenceError(
                        f"{method} diverges at every learning rate of {rates}; give smaller ones"
                    )
                rate = best.learning_rate
            for seed in seeds:
                reuse = best is not None and search_steps is None and seed == seeds[0]
                yield best if reuse and best else self.arm(method, seed, rate, None, bar, must_end=True)
        if own is not None:
            own.close()

    def arm(
        self, method: str, seed: int, rate: float, steps: int | None, bar: Any, must_end: bool = False
    ) -> Arm:
        """One run, or its record if it was made before; a loss that diverged counts as infinite."""
        config = replace(self.config, learning_rate=rate, seed=seed)
        if steps is not None:
            config = replace(config, steps=steps, tokens=None, eval_at=[], eval_every=steps, save_model=False)
        place, settings = self._place(method, f"seed{seed}-lr{rate:g}", asdict(config), bool(steps))
        bar.set_postfix_str(place.name)
        record = _read(place)
        if record is None:
            record = {"settings": settings, **self._train(method, config, place, must_end)}
            write_json(place / _RESULT, record)
        bar.update()
        model = place / "model" if (place / "model").is_dir() else None
        curve = [
            (row["tokens"], row["eval_loss"]) for row in record["rows"] if row.get("eval_loss") is not None
        ]
        bits = next(
            (r["eval_bits_per_byte"] for r in record["rows"][::-1] if "eval_bits_per_byte" in r), None
        )
        if record["diverged"]:
            curve.append((curve[-1][0] if curve else 0, math.inf))
        seconds, judged = record["rows"][-1]["seconds"], record.get("judged")
        return Arm(method, seed, rate, curve, bits, seconds, model, judged)

    def first_loss(self, method: str, seed: int) -> float:
        """Held-out loss of a start before any training, or what was recorded of it."""
        place, settings = self._place(method, f"seed{seed}-start", {"start": seed}, False)
        record = _read(place)
        if record is None:
            model = self.makers[method](seed, self.calibration).float()
            losses = block_losses(model, as_dataset(self.held_out)[0], progress=self.config.progress)
            record = {"settings": settings, "loss": float(losses.mean())}
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / _RESULT, record)
        return float(record["loss"])

    def seconds_per_step(self, method: str, steps: int = 12) -> float:
        """What a training step of an arm takes here, the median of a few, measured once for each shape and recorded.

        Evaluations, and what is done once in a run, are not in it.
        """
        config = replace(self.config, steps=steps, eval_every=0, eval_at=[], log_every=1, save_model=False)
        place, settings = self._place(f"speed {self.shapes[method]}", "", asdict(config), False)
        place = place.with_name(f"speed-{place.name.rpartition('-')[2]}")
        record = _read(place)
        if record is None:
            rows = train(
                replace(config, progress=False),
                model=deepcopy(self.makers[method](config.seed, self.calibration)),
                tokenizer=self.tokenizer,
                teacher=self.teacher,
                train_blocks=self.blocks,
            ).rows
            seconds = [row["seconds"] for row in rows][steps // 4 :]  # the first are slower
            each = sorted(after - before for before, after in pairwise(seconds))
            record = {"settings": settings, "seconds": max(each[len(each) // 2], 1e-6)}
            place.mkdir(parents=True, exist_ok=True)
            write_json(place / _RESULT, record)
        return float(record["seconds"])

    def _place(
        self, method: str, what: str, config: Mapping[str, Any], short: bool
    ) -> tuple[Path, dict[str, Any]]:
        """The folder of a run, and the settings that it is known by."""
        settings = {"method": method, **self.known, **config, **self._data()}
        settings = {name: value for name, value in settings.items() if name not in _SILENT}
        settings = json.loads(json.dumps(settings, default=str))
        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.+-]+", "_", f"{method}-{what}")[:120] + ("-search" if short else "")
        return self.folder / "arms" / f"{name}-{mark}", settings

    def _train(self, method: str, config: TrainConfig, place: Path, must_end: bool) -> dict[str, Any]:
        # a callable may hand out the same model twice
        model = deepcopy(self.makers[method](config.seed, self.calibration))
        rows: list[dict[str, Any]] = []
        try:
            rows = train(
                replace(config, output=str(place), resume=True),
                model=model,
                tokenizer=self.tokenizer,
                teacher=self.teacher,
                train_blocks=self.blocks,
                eval_blocks=self.held_out,
            ).rows
        except DivergenceError as error:
            if must_end:
                raise
            logger.warning("%s: %s", place.name, error)
            return {"rows": [{"step": 0, "tokens": 0, "seconds": 0.0}], "diverged": True}
        found: dict[str, Any] = {"rows": rows, "diverged": False}
        if self.judged is not None:
            found["judged"] = block_losses(model, self.judged, progress=config.progress).tolist()
        return found

    def _data(self) -> dict[str, str]:
        if not self._prints:
            for name, rows in (("blocks", self.blocks), ("held_out", self.held_out)):
                self._prints[name] = print_of_rows(as_dataset(rows)[0])
            if self.judged is not None:
                self._prints["judged"] = print_of_rows(self.judged)
        return self._prints


def _read(place: Path) -> dict[str, Any] | None:
    """The record of a run that has ended."""
    file = place / _RESULT
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
