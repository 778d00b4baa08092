"""Image classification: one label a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hf_ws.errors import DataError, DistillationError
from hf_ws.training.augment import erased, mixed, random_crop
from hf_ws.training.corpora import GLYPHS, glyphs
from hf_ws.training.randaugment import randaugment
from hf_ws.training.records import rows_of, split_rows
from hf_ws.training.tasks.base import Rows, Task

if TYPE_CHECKING:
    import datasets
    from PIL import Image
    from transformers import PreTrainedConfig

    from hf_ws.training.config import TrainConfig

_LOOKED_AT = (
    100_000  # pictures whose headers are read before a run; all those of a large set would take hours
)


class ImageClassification(Task):
    """Pictures in a folder a class, in Parquet, of the Hub, or `glyphs`.

    The model's own image processor brings a picture to size and scale; where its folder has none, one is made of the
    config, with a mean and deviation of 0.5, and saved with the model.

    Source of the settings: Weight selection, Xu et al. 2023 (arXiv 2311.18823), which trains as ConvNeXt does
    (arXiv 2201.03545), table 5.
    """

    auto_class = "AutoModelForImageClassification"
    unit = "samples"
    predicts = "label"

    def __init__(self, config: TrainConfig, model_config: PreTrainedConfig, processor: Any = None) -> None:
        super().__init__(config, model_config, processor or _plain_processor(model_config))
        self.mixes = bool(config.mixup or config.cutmix)
        self.channels = int(getattr(model_config, "num_channels", 3))
        self.classes = int(model_config.num_labels)
        self.size = _size(self.processor, self.channels)
        self.numbers: dict[str, int] = {}
        self._teacher: tuple[tuple[int, int] | None, Any] | None = None

    @classmethod
    def load_processor(cls, source: str) -> Any:
        """The image processor beside a model; None if there is none."""
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError):
            return None

    def read(self) -> Rows:
        """Pictures and their labels."""
        config = self.config
        if config.train_files == [GLYPHS]:
            return Rows(*split_rows(glyphs()))
        return Rows(*rows_of(config, [config.image_column, config.label_column]))

    def length(self, rows: datasets.Dataset) -> int:
        """A picture."""
        return 1

    def taught_by(self, teacher: PreTrainedConfig, processor: Any = None) -> None:
        """Refuse a teacher of other labels; one of other sizes or scales of pictures gets them in its own."""
        channels = int(getattr(teacher, "num_channels", 3))
        if (teacher.num_labels, channels) != (self.classes, self.channels):
            raise DistillationError(
                f"the teacher gives {teacher.num_labels} labels to pictures of {channels} channels, the student "
                f"{self.classes} to {self.channels}; take a teacher trained for the student's labels, or none"
            )
        ours, theirs = (_named(config) for config in (self.model_config, teacher))
        differing = [i for i in ours if ours[i] != theirs.get(i)] if ours and theirs else []
        if differing:
            i = differing[0]
            raise DistillationError(
                f"label {i} is {theirs.get(i)!r} to the teacher and {ours[i]!r} to the student; they must agree"
            )
        size = getattr(teacher, "image_size", None) if processor is None else _size(processor, channels)
        size = (size, size) if isinstance(size, int) else tuple(size) if size else None
        self._teacher = size, processor or self.processor

    def for_teacher(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The same pictures at the teacher's size, mean and deviation."""
        if self._teacher is None:
            return inputs
        size, processor = self._teacher
        pixels = inputs["pixel_values"]
        (mean, deviation), (own_mean, own_deviation) = (
            _scale(one, pixels) for one in (processor, self.processor)
        )
        if not (torch.equal(mean, own_mean) and torch.equal(deviation, own_deviation)):
            pixels = (pixels * own_deviation + own_mean - mean) / deviation
        if size and size != tuple(pixels.shape[-2:]):
            pixels = interpolate(pixels, size, mode="bilinear", antialias=True)
        return inputs | {"pixel_values": pixels}

    def ready(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows with pictures as files, and labels as numbers that the model has."""
        import datasets

        image, label = self.config.image_column, self.config.label_column
        lacking = [name for name in (image, label) if name not in rows.column_names]
        if lacking:
            raise DataError(f"the data has no column {lacking[0]!r}, only {', '.join(rows.column_names)}")
        rows = rows.select_columns([image, label])
        try:
            rows = rows.cast_column(image, datasets.Image(decode=False))
        except (TypeError, ValueError) as error:
            raise DataError(f"column {image!r} holds {rows.features[image]}, no pictures") from error
        self._check_labels(rows, label)
        for i in range(min(len(rows), _LOOKED_AT)):
            self._open(rows[i], f"row {i}").close()
        return rows

    def batch(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`pixel_values` [rows, channels, height, width] and `labels` [rows]; to train, also `soft_labels`."""
        made = [self._made(row) for row in rows]
        found = {
            "pixel_values": torch.stack([pixels for pixels, _ in made]),
            "labels": torch.tensor([self._label(row) for row in rows]),
        }
        if rows[0].get("training") and (self.mixes or self.config.label_smoothing):
            found["soft_labels"] = torch.stack(
                [self._soft(row, share) for row, (_, share) in zip(rows, made, strict=True)]
            )
        return found

    def metrics(self, chosen: Any, labels: Any) -> dict[str, float]:
        """The part of pictures whose label is the likeliest."""
        return {"accuracy": float((chosen == labels).mean())}

    def _made(self, row: dict[str, Any]) -> tuple[Tensor, float]:
        """A row's picture, and its share of it where another is mixed in."""
        if not row.get("training"):
            return self._pixels(row, None), 1.0
        draw = np.random.default_rng((self.config.seed, int(row["place"])))
        pixels, share = self._pixels(row, draw), 1.0
        if "other" in row:
            other = self._pixels(row["other"], draw)
            pixels, share = mixed(pixels, other, draw, mixup=self.config.mixup, cutmix=self.config.cutmix)
        return pixels, share

    def _pixels(self, row: dict[str, Any], draw: np.random.Generator | None) -> Tensor:
        """One picture as the model takes it, changed by chance if there is any."""
        from PIL import Image

        picture, options = self._open(row, f"the row at place {row.get('place', '?')}"), {}
        try:
            picture = picture.convert("L" if self.channels == 1 else "RGB")
        except (OSError, SyntaxError) as error:  # cut short: its header was whole
            raise DataError(
                f"the picture {_name(row[self.config.image_column])} is damaged: {error}"
            ) from error
        if draw is not None and self.config.crop < 1:
            picture = random_crop(picture, self.size, self.config.crop, draw)
            options = {
                f"do_{what}": False
                for what in ("resize", "center_crop")
                if hasattr(self.processor, f"do_{what}")
            }
        if draw is not None and self.config.flip and draw.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if draw is not None and self.config.randaugment:
            picture = randaugment(picture, self.config.randaugment, draw)
        pixels = self.processor([picture], return_tensors="pt", **options)["pixel_values"][0]
        if draw is not None and draw.random() < self.config.erase:
            pixels = erased(pixels, draw)
        return pixels

    def _soft(self, row: dict[str, Any], share: float) -> Tensor:
        """The weight of every class, in all 1."""
        smoothing = self.config.label_smoothing
        soft = torch.full((self.classes,), smoothing / self.classes)
        soft[self._label(row)] += (1 - smoothing) * share
        if "other" in row:
            soft[self._label(row["other"])] += (1 - smoothing) * (1 - share)
        return soft

    def _open(self, row: dict[str, Any], where: str) -> Image.Image:
        from PIL import Image, UnidentifiedImageError

        file = row[self.config.image_column]
        try:
            if file is None:
                raise UnidentifiedImageError("it is empty")
            return Image.open(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"]))
        except (OSError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{where}: {_name(file)} cannot be read as a picture ({type(error).__name__}); mend or remove it"
            ) from error

    def _label(self, row: dict[str, Any]) -> int:
        value = row[self.config.label_column]
        return self.numbers[value] if isinstance(value, str) else int(value)

    def _check_labels(self, rows: datasets.Dataset, label: str) -> None:
        """Refuse a label that the model does not have, or calls otherwise."""
        known = _named(self.model_config)
        named: list[str] = getattr(rows.features[label], "names", None) or []
        values = list(rows.select_columns([label]).with_format(None)[label])
        if any(isinstance(value, str) for value in values):
            names = [*known.values()] or sorted({value for value in values if value is not None})
            self.numbers = self.numbers or {name: i for i, name in enumerate(names)}
            wrong = next((i for i, value in enumerate(values) if value not in self.numbers), None)
            if wrong is not None:
                raise DataError(
                    f"row {wrong}: label {values[wrong]!r} is none of {', '.join([*self.numbers][:20])}"
                )
            values = [self.numbers[value] for value in values]
        elif named and {*named} == {*known.values()}:
            differing = [i for i, name in enumerate(named) if known[i] != name]
            if differing:
                i = differing[0]
                raise DataError(
                    f"label {i} is {named[i]!r} in the data and {known[i]!r} to the model; renumber them"
                )
        for i, value in enumerate(values):
            if not isinstance(value, int) or not 0 <= value < self.classes:
                inside = isinstance(value, int) and 0 <= value < len(named)
                name = f" ({named[value]!r})" if inside else ""
                raise DataError(
                    f"row {i}: label {value!r}{name}, but the model has {self.classes} labels, from 0; "
                    "make it with as many as the data has (--set num_labels=N), or mend the row"
                )


def _plain_processor(config: PreTrainedConfig) -> Any:
    """To a model's size, with a mean and deviation of 0.5. Raises DataError if the config names no size."""
    from transformers import ViTImageProcessor

    size, channels = getattr(config, "image_size", None), int(getattr(config, "num_channels", 3))
    if not size:
        raise DataError(
            f"the model has no image processor, and its config ({config.model_type}) names no image_size; "
            "save an image processor with the model, or give tokenizer="
        )
    height, width = (size, size) if isinstance(size, int) else size
    half = [0.5] * channels
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)


def _size(processor: Any, channels: int) -> tuple[int, int]:
    """The rows and columns that a processor brings pictures to."""
    from PIL import Image

    probe = Image.new("L" if channels == 1 else "RGB", (64, 48))
    return tuple(processor([probe], return_tensors="pt")["pixel_values"].shape[-2:])


def _scale(processor: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and deviation that a processor takes off, [channels, 1, 1]."""
    normalizes = getattr(processor, "do_normalize", False)
    mean, deviation = (processor.image_mean, processor.image_std) if normalizes else (0.0, 1.0)
    made = (torch.as_tensor(part, dtype=like.dtype, device=like.device) for part in (mean, deviation))
    first, second = (part.reshape(-1, 1, 1) for part in made)
    return first, second


def _named(config: PreTrainedConfig) -> dict[int, str]:
    """What a model calls its labels; nothing where it only counts them."""
    names = {int(i): str(name) for i, name in (config.id2label or {}).items()}
    return {} if all(name == f"LABEL_{i}" for i, name in names.items()) else dict(sorted(names.items()))


def _name(file: dict[str, Any] | None) -> str:
    return str(Path(file["path"])) if file and file["path"] else "a picture without a name"
