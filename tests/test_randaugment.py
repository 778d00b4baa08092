"""RandAugment: each change against what it says of single pixels, and how often pictures are changed."""

import numpy as np
import pytest
from PIL import Image

from hf_ws.errors import PlanError
from hf_ws.training import TrainConfig
from hf_ws.training.randaugment import CHANGES, randaugment

VALUES = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
PICTURES = {"RGB": Image.fromarray(VALUES), "L": Image.fromarray(VALUES[..., 0])}
STILL = set(CHANGES) - {"autocontrast", "equalize", "invert", "posterize"}  # what level 0 leaves as it is


@pytest.mark.parametrize("mode", PICTURES)
@pytest.mark.parametrize("name", CHANGES)
def test_every_change_gives_a_picture_of_the_kind_it_got(name: str, mode: str) -> None:
    picture = PICTURES[mode]
    for sign in (-1.0, 1.0):
        changed = CHANGES[name](picture, 0.9, sign)
        assert (changed.size, changed.mode) == (picture.size, picture.mode)
        assert np.array_equal(CHANGES[name](picture, 0.0, sign), picture) or name not in STILL


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("invert", 0.3, lambda x: 255 - x),
        ("posterize", 0.5, lambda x: x // 64 * 64),  # two bits of eight are left
        ("posterize", 1.0, lambda x: x * 0),
        ("solarize", 0.5, lambda x: np.where(x < 128, x, 255 - x)),
        ("solarize_add", 1.0, lambda x: np.where(x < 128, x + 110, x)),
    ],
)
def test_changes_of_values(name: str, level: float, expected) -> None:
    changed = np.asarray(CHANGES[name](PICTURES["RGB"], level, 1.0))
    assert np.array_equal(changed, expected(VALUES.astype(int)))


def test_changes_of_place() -> None:
    """By whole pixels, a picture is moved and the rest is grey; a shear moves row n by 0.3 n."""
    picture = PICTURES["RGB"]
    moved = np.asarray(CHANGES["translate_x"](picture, 4 / (0.45 * 20), 1.0))
    assert np.abs(moved[:, :-4].astype(int) - VALUES[:, 4:]).max() <= 1  # 0.45 has no exact binary form
    assert (moved[:, -4:] == 128).all()
    moved = np.asarray(CHANGES["translate_y"](picture, 6 / (0.45 * 24), -1.0))
    assert np.abs(moved[6:].astype(int) - VALUES[:-6]).max() <= 1
    ramp = Image.fromarray(np.tile(np.arange(20, dtype=np.uint8) * 10, (24, 1)))
    sheared = np.asarray(CHANGES["shear_x"](ramp, 1.0, 1.0)).astype(float)
    for row in (0, 10, 20):
        places = np.arange(20) + 0.3 * (row + 0.5)
        inside = slice(1, 12)
        assert np.abs(sheared[row, inside] - 10 * places[inside]).max() <= 1
    sheared = np.asarray(CHANGES["shear_y"](ramp.transpose(Image.Transpose.TRANSPOSE), 1.0, 1.0)).astype(
        float
    )
    assert np.abs(sheared[1:12, 10] - 10 * (np.arange(20) + 0.3 * 10.5)[1:12]).max() <= 1
    assert np.array_equal(
        CHANGES["rotate"](picture, 0.5, 1.0),
        picture.rotate(15, Image.Resampling.BILINEAR, fillcolor=(128,) * 3),
    )


def test_brightness_is_a_factor() -> None:
    darker = np.asarray(CHANGES["brightness"](PICTURES["RGB"], 0.5, -1.0)).astype(int)
    assert np.abs(darker - 0.55 * VALUES).max() <= 1


def test_a_quarter_is_left_alone_and_the_draw_decides() -> None:
    picture = PICTURES["RGB"]
    made = [randaugment(picture, 9.0, np.random.default_rng(i)) for i in range(400)]
    same = sum(np.array_equal(one, picture) for one in made)
    assert 70 <= same <= 140  # 100 by two coins, and a few more that a change left alone
    assert all(
        np.array_equal(one, randaugment(picture, 9.0, np.random.default_rng(i)))
        for i, one in enumerate(made[:40])
    )


def test_the_strength_has_an_end() -> None:
    with pytest.raises(PlanError, match=r"randaugment=11.0; from 0 to 10"):
        TrainConfig(steps=1, randaugment=11)
