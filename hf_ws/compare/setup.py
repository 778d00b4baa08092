"""What is compared, on what: the settings that a comparison and a race share, and the bench made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from hf_ws._version import __version__
from hf_ws.auto import AutoSubclone
from hf_ws.compare.bench import Bench, Maker
from hf_ws.compare.spelling import Spelled, parsed
from hf_ws.distill.teacher import load_tokenizer
from hf_ws.errors import CalibrationError, DataError, PlanError
from hf_ws.store import check_output
from hf_ws.training import TrainConfig
from hf_ws.training.data import Packed, load_text, pack, split_held_out
from hf_ws.training.job import as_dataset, print_of_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Start = Callable[[int], "PreTrainedModel"]
_CALIBRATION_BLOCKS = 64


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The keyword arguments of `compare` and `race` that say what is compared, and on what.

    Attributes:
        source: Folder, Hub id or live model that the starts are made from.
        output: Folder for the result, and arms/ with each run's own record.
        sizes: The target's sizes, as `AutoSubclone.from_pretrained` takes them: {"hidden": 512, "layers": 12}, or
            {"params": "125M"} for the shapes nearest that.
        shapes: How many of these.
        methods: Starts that `AutoSubclone` makes, each as `hf_ws.compare.spelling` has it: "random",
            "subclone(rescale=false)".
        starts: More arms: a name, and a function from seed to live model. An arm is known by its name, so one that
            makes another model needs another name or another output.
        data: What to train on: blocks that `pack` made, or whatever `load_text` takes ("stdlib", a file, folder, glob
            or Hub name, a list of paths or of texts).
        held_out: The same, to evaluate on; by default a hash holds out one text in twenty.
        calibration: What methods that rank by activation look at; by default some of the training blocks.
        tokenizer: By default the source's.
        block: Tokens in a sequence, where `data` is text.
        learning_rates: The grid each arm chooses from: a good start wants a smaller one. One for all if it holds one.
        seeds: Of the starts and of the order of the batches; the rate is chosen at the first.
        teacher: Distil every arm from this model too.
        save_models: Keep every trained model, in arms/<arm>/model.
        progress: Show a bar over the runs, and one in each.
        training: Further settings of TrainConfig: batch_size, grad_accum, schedule, precision, kd_weight, ...
    """

    source: str | Path | PreTrainedModel
    output: str | Path
    sizes: Mapping[str, Any] = field(default_factory=dict)
    shapes: int = 1
    methods: Sequence[str] = ("random", "weight_selection", "subclone")
    starts: Mapping[str, Start] = field(default_factory=dict)
    data: Any = "stdlib"
    held_out: Any = None
    calibration: Any = None
    tokenizer: PreTrainedTokenizerBase | None = None
    block: int = 512
    learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3)
    seeds: Sequence[int] = (0,)
    teacher: str | Path | PreTrainedModel | None = None
    save_models: bool = False
    progress: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """From keyword arguments; what is no field of ours is a setting of training. None is the default."""
        own = {one.name for one in fields(cls)} - {"training"}
        ours = {name: value for name, value in settings.items() if name in own and value is not None}
        return cls(**ours, training={name: value for name, value in settings.items() if name not in own})

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return Path(self.output).expanduser()

    def bench(self, steps: int, result: str) -> Bench:
        """All that the runs share, for runs of so many steps; nothing is trained or written.

        Args:
            steps: Optimizer steps of every run.
            result: The file in the folder by which a result of ours is known.

        Raises:
            PlanError, DataError, DistillationError, OutputError: What cannot be done.
        """
        if not (self.folder / result).is_file() and not (self.folder / "arms").is_dir():
            check_output(self.folder)
        makers, shapes = self._makers()
        tokenizer = self.tokenizer
        if tokenizer is None and isinstance(self.source, str | Path):
            tokenizer = load_tokenizer(self.source)
        blocks, held_out = _blocks(self.data, self.held_out, tokenizer, self.block, self.progress)
        calibration = self.calibration
        if calibration is None:
            rows = as_dataset(blocks)[0]
            keep = min(len(rows), _CALIBRATION_BLOCKS)
            calibration = rows.select([i * len(rows) // keep for i in range(keep)])[:]["input_ids"]
        known: dict[str, Any] = {
            "source": _name(self.source),
            "sizes": dict(self.sizes),
            "version": __version__,
        }
        known["teacher"] = None if self.teacher is None else _name(self.teacher)
        return Bench(
            folder=self.folder,
            config=self.config(steps),
            makers=makers,
            shapes=shapes,
            calibration=calibration,
            tokenizer=tokenizer,
            teacher=self.teacher,
            blocks=blocks,
            held_out=held_out,
            known=known,
        )

    def config(self, steps: int, curve: bool = True) -> TrainConfig:
        """The settings of a run of so many steps, measured on its way where a curve is wanted. Raises PlanError."""
        settings: dict[str, Any] = {"eval_at": [], "eval_every": steps}
        if curve:
            settings = {"eval_at": _early(steps), "eval_every": max(1, steps // 20)}
        settings |= {"log_every": max(1, min(10, steps // 10)), **self.training}
        return TrainConfig(steps=steps, save_model=self.save_models, progress=self.progress, **settings)

    def _makers(self) -> tuple[dict[str, Maker], dict[str, str]]:
        """How each arm's start is made from a seed and calibration, checked as far as no weight need be read; and what
        tells its shape from others.
        """
        makers: dict[str, Maker] = {}
        shapes: dict[str, str] = {}
        spelled = [parsed(text) for text in self.methods]
        for label, start, sizes in self._shaped(spelled):
            makers[label], shapes[label] = _maker(self.source, start, sizes), repr(sorted(sizes.items()))
        for name, own in self.starts.items():
            makers[name], shapes[name] = _handed_over(own), name
        names = [one.label for one in spelled] + [*self.starts]
        for what, values in (("arms", names), ("learning_rates", self.learning_rates), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise PlanError(f"{what}={list(values)}; give at least one, and each once")
        return makers, shapes

    def _shaped(self, spelled: Sequence[Spelled]) -> list[tuple[str, Spelled, dict[str, Any]]]:
        """Each method in each shape: its label, and what `AutoSubclone` is asked for."""
        if not spelled:
            return []
        sizes = {name: value for name, value in self.sizes.items() if value is not None}
        goal = {name: sizes.pop(name) for name in ("params", "ratio") if name in sizes}
        if self.shapes < 1 or (self.shapes > 1 and not goal):
            raise PlanError(f"shapes={self.shapes}: at least 1; more than one only with params= or ratio=")
        shapes: list[dict[str, Any]] = [{}]
        if goal:
            # which layers and how they are mended is each start's own affair, and may take data
            plain = {
                name: value for name, value in sizes.items() if name not in ("layer_policy", "compensation")
            }
            found = AutoSubclone.plan(self.source, **plain, **goal).search["shapes"]
            shapes = [dict(row["sizes"]) for row in found[: self.shapes]]
        arms = []
        for own in shapes:
            mark = f" @ {', '.join(f'{k}={v}' for k, v in own.items())}" if len(shapes) > 1 else ""
            for start in spelled:
                asked = {**sizes, **own, **start.arguments}
                # a start that wants calibration data will have it; the rest is checked before work
                with suppress(CalibrationError):
                    AutoSubclone.plan(
                        self.source, method=start.method, method_args=dict(start.method_args), **asked
                    )
                arms.append((f"{start.label}{mark}", start, asked))
        return arms


def _maker(source: str | Path | PreTrainedModel, start: Spelled, asked: Mapping[str, Any]) -> Maker:
    def make(seed: int, calibration: Any) -> PreTrainedModel:
        given = {"method": start.method, "method_args": dict(start.method_args), **asked}
        return AutoSubclone.from_pretrained(source, calibration=calibration, seed=seed, **given)

    return make


def _handed_over(start: Start) -> Maker:
    return lambda seed, calibration: start(seed)


def _blocks(
    data: Any, held_out: Any, tokenizer: PreTrainedTokenizerBase | None, block: int, progress: bool
) -> tuple[Any, Any]:
    """Training and held-out blocks, packed from text where text was given."""
    if _is_blocks(data):
        if held_out is None:
            raise DataError("blocks came without held-out blocks; give held_out= as well")
        if _is_blocks(held_out):
            return data, held_out
        return data, _packed(load_text(held_out), tokenizer, block, progress)
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


def _name(source: str | Path | PreTrainedModel) -> str:
    return str(source) if isinstance(source, str | Path) else print_of_model(source)
