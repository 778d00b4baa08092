"""Pictures changed by chance, so that a model learns what stays the same."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def random_crop(
    picture: Image.Image, size: tuple[int, int], least: float, draw: np.random.Generator
) -> Image.Image:
    """A part of a picture, between `least` of it and the whole, 3:4 to 4:3, brought to `size` [rows, columns].

    Source: Inception, Szegedy et al. 2014 (arXiv 1409.4842), section 6.
    """
    from PIL import Image

    width, height = picture.size
    for _ in range(10):
        area = width * height * draw.uniform(least, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            break
    else:
        w, h, left, top = width, height, 0, 0
    box = (left, top, left + w, top + h)
    return picture.resize(size[::-1], Image.Resampling.BICUBIC, box=box)


def erased(pixels: Tensor, draw: np.random.Generator) -> Tensor:
    """A picture [channels, rows, columns] with a rectangle of it, 2 % to a third, turned to noise.

    Source: Random erasing, Zhong et al. 2017 (arXiv 1708.04896), algorithm 1, with noise per pixel.
    """
    rows, columns = pixels.shape[-2:]
    for _ in range(10):
        area = rows * columns * draw.uniform(0.02, 1 / 3)
        ratio = math.exp(draw.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w < columns and 0 < h < rows:
            top, left = int(draw.integers(rows - h + 1)), int(draw.integers(columns - w + 1))
            noise = draw.normal(size=(len(pixels), h, w)).astype(np.float32)
            changed = pixels.clone()
            changed[:, top : top + h, left : left + w] = torch.from_numpy(noise)
            return changed
    return pixels


def mixed(
    pixels: Tensor, other: Tensor, draw: np.random.Generator, *, mixup: float, cutmix: float
) -> tuple[Tensor, float]:
    """One picture of two [channels, rows, columns], and the first one's share of it, 0 to 1.

    With both asked for, each is done half of the time.

    Source: mixup, Zhang et al. 2017 (arXiv 1710.09412), section 2; CutMix, Yun et al. 2019 (arXiv 1905.04899),
    section 3.1.
    """
    if mixup and (not cutmix or draw.random() < 0.5):
        share = float(draw.beta(mixup, mixup))
        return share * pixels + (1 - share) * other, share
    rows, columns = pixels.shape[-2:]
    side = math.sqrt(1 - draw.beta(cutmix, cutmix))
    middle = int(draw.integers(rows)), int(draw.integers(columns))
    (top, bottom), (left, right) = (
        (max(0, at - int(size * side) // 2), min(size, at + int(size * side) // 2))
        for at, size in zip(middle, (rows, columns), strict=True)
    )
    changed = pixels.clone()
    changed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    return changed, 1 - (bottom - top) * (right - left) / (rows * columns)
