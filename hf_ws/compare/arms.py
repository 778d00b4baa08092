"""Train several starts of one student on the same batches, and say how much sooner each gets there.

    result = compare("gpt2-large", sizes={"hidden": 512}, data="stdlib", steps=500, output="comparison")
    print(result)                                   # the table; comparison/compare.png is the picture

Every arm sees the same blocks in the same order under the same schedule. Only the peak learning rate is its own,
the best of a small grid, for a good start wants a smaller one than a random start. The speed-up of a start is
what the random start needed in all, over what this start needs to reach the random start's final loss.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from hf_ws._version import __version__
from hf_ws.compare.report import Arm, Comparison
from hf_ws.distill.teacher import load_tokenizer
from hf_ws.errors import DataError, DivergenceError, PlanError
from hf_ws.store import check_output
from hf_ws.training import TrainConfig, train
from hf_ws.training.data import Packed, load_text, pack, split_held_out
from hf_ws.training.job import as_dataset, print_of_model, print_of_rows
from hf_ws.training.run_folder import write_json

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

Start = Callable[[int], "PreTrainedModel"]
_RESULT = "result.json"
_CALIBRATION_BLOCKS = 64


def compare(
    source: str | Path | PreTrainedModel,
    *,
    output: str | Path,
    steps: int,
    sizes: Mapping[str, Any] | None = None,
    methods: Sequence[str] = ("random", "weight_selection", "subclone"),
    starts: Mapping[str, Start] | None = None,
    data: Any = "stdlib",
    held_out: Any = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    block: int = 512,
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    search_steps: int | None = None,
    seeds: Sequence[int] = (0,),
    baseline: str = "random",
    teacher: str | Path | PreTrainedModel | None = None,
    save_models: bool = False,
    progress: bool = True,
    **training: Any,
) -> Comparison:
    """Train every start and report. An arm that `output` already holds, with the same settings, is not run again.

    Args:
        source: Folder, Hub id or live model that the starts are made from.
        output: Folder for compare.json, compare.md, compare.png, and arms/ with each run's own record.
        steps: Optimizer steps of every run.
        sizes: The target's sizes, as `AutoSubclone.from_pretrained` takes them: {"hidden": 512, "layers": 12}.
        methods: Names of methods, made by `AutoSubclone`.
        starts: More arms: a name, and a function from seed to live model. An arm is known by its name, so one
            that makes another model needs another name or another output.
        data: What to train on: blocks that `pack` made, or whatever `load_text` takes ("stdlib", a file, folder,
            glob or Hub name, a list of paths or of texts).
        held_out: The same, to evaluate on; by default a hash holds out one text in twenty.
        calibration: What methods that rank by activation look at; by default some of the training blocks.
        tokenizer: By default the source's.
        block: Tokens in a sequence, where `data` is text.
        learning_rates: The grid each arm chooses from: a good start wants a smaller one. One for all if it holds one.
        search_steps: Choose from the grid on a run this short; by default on the full run. Always at the first
            seed; the other seeds take what was chosen.
        seeds: Of the starts and of the order of the batches.
        baseline: The arm that speed-ups are measured against.
        teacher: Distil every arm from this model too.
        save_models: Keep every trained model, in arms/<arm>/model.
        progress: Show a bar over the runs, and one in each.
        training: Further settings of TrainConfig: batch_size, grad_accum, schedule, precision, kd_weight, ...

    Raises:
        PlanError, DataError, DistillationError, OutputError: Before any training.
        DivergenceError: Every learning rate of an arm diverges.
    """
    folder = Path(output).expanduser()
    if not (folder / "compare.json").is_file():
        check_output(folder)
    makers = _starts(source, sizes or {}, methods, starts or {}, learning_rates, seeds)
    tokenizer = tokenizer or (load_tokenizer(source) if isinstance(source, str | Path) else None)
    blocks, eval_blocks = _blocks(data, held_out, tokenizer, block, progress)
    settings: dict[str, Any] = {"eval_at": _early(steps), "eval_every": max(1, steps // 20)}
    settings |= {"log_every": max(1, min(10, steps // 10)), **training}
    config = TrainConfig(steps=steps, save_model=save_models, progress=progress, **settings)
    if calibration is None:
        rows = as_dataset(blocks)[0]
        keep = min(len(rows), _CALIBRATION_BLOCKS)
        calibration = rows.select([i * len(rows) // keep for i in range(keep)])[:]["input_ids"]
    bench = _Bench(
        folder=folder,
        config=config,
        makers=makers,
        calibration=calibration,
        tokenizer=tokenizer,
        teacher=teacher,
        blocks=blocks,
        held_out=eval_blocks,
        known={
            "source": _name(source),
            "sizes": dict(sizes or {}),
            "teacher": None if teacher is None else _name(teacher),
            "version": __version__,
        },
    )
    result = Comparison(folder, baseline, _how(learning_rates, search_steps, seeds))
    for arm in bench.run(list(learning_rates), search_steps, list(seeds)):
        result.arms.append(arm)
        result.write()
    return result


@dataclass(frozen=True)
class _Bench:
    """All that the runs share."""

    folder: Path
    config: TrainConfig
    makers: Mapping[str, Callable[[int, Any], PreTrainedModel]]
    calibration: Any
    tokenizer: PreTrainedTokenizerBase | None
    teacher: PreTrainedModel | str | Path | None
    blocks: Packed | datasets.Dataset | Tensor
    held_out: Packed | datasets.Dataset | Tensor
    known: Mapping[str, Any]

    def run(self, rates: list[float], search_steps: int | None, seeds: list[int]) -> Iterator[Arm]:
        """The chosen run of every method and seed, in order."""
        searches = len(rates) > 1
        runs = len(self.makers) * (len(seeds) + (len(rates) - (search_steps is None) if searches else 0))
        bar = tqdm(total=runs, desc="comparing", unit=" runs", disable=not self.config.progress)
        for method in self.makers:
            rate, best = rates[0], None
            if searches:
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
        bar.close()

    def arm(
        self, method: str, seed: int, rate: float, steps: int | None, bar: Any, must_end: bool = False
    ) -> Arm:
        """One run, or its record if it was made before; a loss that diverged counts as infinite."""
        config = replace(self.config, learning_rate=rate, seed=seed)
        if steps is not None:
            config = replace(config, steps=steps, tokens=None, eval_at=[], eval_every=steps, save_model=False)
        settings = {"method": method, **self.known, **asdict(config), **self._data()}
        for silent in (
            "output",
            "resume",
            "progress",
            "threads",
            "report_to",
            "save_every",
            "keep_checkpoints",
        ):
            settings.pop(silent)
        settings = json.loads(json.dumps(settings, default=str))
        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        name = re.sub(r"[^\w.+-]+", "_", f"{method}-seed{seed}-lr{rate:g}") + ("-search" if steps else "")
        place = self.folder / "arms" / f"{name}-{mark}"
        bar.set_postfix_str(name)
        if (place / _RESULT).is_file():
            record = json.loads((place / _RESULT).read_text(encoding="utf-8"))
        else:
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
        return Arm(method, seed, rate, curve, bits, record["rows"][-1]["seconds"], model)

    def _train(self, method: str, config: TrainConfig, place: Path, must_end: bool) -> dict[str, Any]:
        model = self.makers[method](config.seed, self.calibration)
        rows: list[dict[str, Any]] = []
        try:
            rows = train(
                replace(config, output=str(place), resume=True),
                model=deepcopy(model),  # a callable may hand out the same model twice
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
        return {"rows": rows, "diverged": False}

    def _data(self) -> dict[str, str]:
        return {
            "blocks": print_of_rows(as_dataset(self.blocks)[0]),
            "held_out": print_of_rows(as_dataset(self.held_out)[0]),
        }


def _starts(
    source: str | Path | PreTrainedModel,
    sizes: Mapping[str, Any],
    methods: Sequence[str],
    starts: Mapping[str, Start],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
) -> dict[str, Callable[[int, Any], PreTrainedModel]]:
    """How each arm's start is made from a seed and calibration, checked as far as no weight need be read."""
    names = [*methods, *starts]
    for what, values in (("arms", names), ("learning_rates", learning_rates), ("seeds", seeds)):
        if not values or len(set(values)) < len(values):
            raise PlanError(f"{what}={list(values)}; give at least one, and each once")
    makers: dict[str, Callable[[int, Any], PreTrainedModel]] = {}
    if methods:
        from hf_ws.auto import AutoSubclone  # reading a source is not needed where live starts are given

        for method in methods:
            AutoSubclone.plan(source, method=method, **sizes)

            def make(seed: int, calibration: Any, method: str = method) -> PreTrainedModel:
                return AutoSubclone.from_pretrained(
                    source, method=method, calibration=calibration, seed=seed, **sizes
                )

            makers[method] = make
    for name, start in starts.items():

        def hand_over(seed: int, calibration: Any, start: Start = start) -> PreTrainedModel:
            return start(seed)

        makers[name] = hand_over
    return makers


def _blocks(
    data: Any, held_out: Any, tokenizer: PreTrainedTokenizerBase | None, block: int, progress: bool
) -> tuple[Any, Any]:
    """Training and held-out blocks, packed from text where text was given."""
    if _is_blocks(data):
        if held_out is None:
            raise DataError("blocks came without held-out blocks; give held_out= as well")
        return data, held_out if _is_blocks(held_out) else _packed(
            load_text(held_out), tokenizer, block, progress
        )
    documents = load_text(data)
    if _is_blocks(held_out):
        return _packed(documents, tokenizer, block, progress), held_out
    documents, others = split_held_out(documents) if held_out is None else (documents, load_text(held_out))
    return _packed(documents, tokenizer, block, progress), _packed(others, tokenizer, block, progress)


def _packed(documents: Any, tokenizer: PreTrainedTokenizerBase | None, block: int, progress: bool) -> Packed:
    if tokenizer is None:
        raise DataError("text came without a tokenizer; give tokenizer=, or a source folder that holds one")
    return pack(documents, tokenizer, block, progress=progress)


def _is_blocks(data: Any) -> bool:
    return isinstance(data, Packed | Tensor) or "input_ids" in (getattr(data, "column_names", None) or [])


def _early(steps: int) -> list[int]:
    """Powers of two before the first regular evaluation, where good starts pass the random one's end."""
    return [2**power for power in range(max(1, steps // 20).bit_length()) if 2**power < steps // 20]


def _how(rates: Sequence[float], search_steps: int | None, seeds: Sequence[int]) -> str:
    if len(rates) == 1:
        return f"Learning rate {rates[0]:g} for every start."
    grid = ", ".join(f"{rate:g}" for rate in rates)
    run = "the full run" if search_steps is None else f"a run of {search_steps} steps"
    return f"Learning rate of each start: the one of {grid} with the lowest held-out loss on {run} (seed {seeds[0]})."


def _name(source: str | Path | PreTrainedModel) -> str:
    return str(source) if isinstance(source, str | Path) else print_of_model(source)
