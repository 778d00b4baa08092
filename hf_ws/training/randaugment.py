"""RandAugment: two changes of a picture, drawn from fifteen, all of one strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

STRONGEST = 10.0
_CHANGES = 2
_SPREAD = 0.5  # deviation of the strength around the one asked for


def randaugment(picture: Image, strength: float, draw: np.random.Generator) -> Image:
    """Two changes one after the other, each made half of the time, with a strength of about `strength` out of 10.

    Source: RandAugment, Cubuk et al. 2019 (arXiv 1909.13719), section 3; changes, ranges and chances as in timm's
    `rand-m9-mstd0.5-inc1`, with which ConvNeXt and the weight-selection paper train.
    """
    for name in draw.choice(sorted(CHANGES), _CHANGES):
        if draw.random() < 0.5:
            level = float(np.clip(draw.normal(strength, _SPREAD), 0.0, STRONGEST)) / STRONGEST
            picture = CHANGES[name](picture, level, 1.0 if draw.random() < 0.5 else -1.0)
    return picture


def _enhanced(kind: str) -> Callable[[Image, float, float], Image]:
    def change(picture: Image, level: float, sign: float) -> Image:
        from PIL import ImageEnhance

        enhancer = getattr(ImageEnhance, kind)(picture)
        made: Image = enhancer.enhance(max(0.1, 1.0 + sign * 0.9 * level))
        return made

    return change


def _moved(
    matrix: Callable[[Image, float], tuple[float, ...]],
) -> Callable[[Image, float, float], Image]:
    """By the affine map from places in the new picture to places in the old one."""

    def change(picture: Image, level: float, sign: float) -> Image:
        from PIL.Image import Resampling, Transform

        where = matrix(picture, sign * level)
        options: dict[str, Any] = {"resample": Resampling.BILINEAR, "fillcolor": _grey(picture)}
        return picture.transform(picture.size, Transform.AFFINE, where, **options)

    return change


def _rotated(picture: Image, level: float, sign: float) -> Image:
    from PIL.Image import Resampling

    return picture.rotate(30.0 * sign * level, Resampling.BILINEAR, fillcolor=_grey(picture))


def _grey(picture: Image) -> int | tuple[int, ...]:
    """What comes in from outside."""
    bands = len(picture.getbands())
    return 128 if bands == 1 else (128,) * bands


def _of_values(table: Callable[[np.ndarray, float], np.ndarray]) -> Callable[[Image, float, float], Image]:
    """By what becomes of each of the 256 values."""

    def change(picture: Image, level: float, sign: float) -> Image:
        values = table(np.arange(256), level).clip(0, 255).astype(int).tolist()
        return picture.point(values * len(picture.getbands()))

    return change


def _by_operation(name: str) -> Callable[[Image, float, float], Image]:
    def change(picture: Image, level: float, sign: float) -> Image:
        from PIL import ImageOps

        made: Image = getattr(ImageOps, name)(picture)
        return made

    return change


CHANGES: Mapping[str, Callable[[Image, float, float], Image]] = {
    "autocontrast": _by_operation("autocontrast"),
    "equalize": _by_operation("equalize"),
    "invert": _by_operation("invert"),
    "rotate": _rotated,
    "posterize": _of_values(lambda values, level: values & ~(2 ** (4 + int(4 * level)) - 1)),
    "solarize": _of_values(
        lambda values, level: np.where(values < 256 - int(256 * level), values, 255 - values)
    ),
    "solarize_add": _of_values(
        lambda values, level: np.where(values < 128, values + int(110 * level), values)
    ),
    "color": _enhanced("Color"),
    "contrast": _enhanced("Contrast"),
    "brightness": _enhanced("Brightness"),
    "sharpness": _enhanced("Sharpness"),
    "shear_x": _moved(lambda picture, level: (1, 0.3 * level, 0, 0, 1, 0)),
    "shear_y": _moved(lambda picture, level: (1, 0, 0, 0.3 * level, 1, 0)),
    "translate_x": _moved(lambda picture, level: (1, 0, 0.45 * level * picture.width, 0, 1, 0)),
    "translate_y": _moved(lambda picture, level: (1, 0, 0, 0, 1, 0.45 * level * picture.height)),
}
"""What may become of a picture: of it, the level from 0 to 1, and the sign of a movement or factor."""
