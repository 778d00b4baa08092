"""Pictures and sounds that are made and not downloaded, the same on every machine."""

from __future__ import annotations

import io
import string
import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import datasets
    from PIL import ImageFont

GLYPHS = "glyphs"  # stands for drawn letters and digits
DIALTONES = "dialtones"  # stands for the sounds of a telephone's keys
CHARACTERS = string.digits + string.ascii_uppercase
_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol"),
    *("STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10"),
)
_SIDE = 32  # pixels
_ROWS, _COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)  # Hz, ITU-T Q.23
_KEYS = ("123", "456", "789", " 0 ")


def glyphs(count: int = 3600) -> datasets.Dataset:
    """Pictures of letters and digits, as many of each: turned, moved, of several fonts and greys, in noise.

    Returns:
        `image`, 32 x 32 in grey, and `label`, by the place in `CHARACTERS`.
    """
    import datasets
    from matplotlib import get_data_path
    from PIL import Image, ImageFont

    folder = Path(get_data_path(), "fonts", "ttf")
    fonts = [ImageFont.truetype(folder / f"{name}.ttf", size) for name in _FONTS for size in (20, 22, 24)]
    draw = np.random.default_rng(0)
    pictures, labels = [], [i % len(CHARACTERS) for i in range(count)]
    for label in labels:
        file = io.BytesIO()
        Image.fromarray(_drawn(CHARACTERS[label], fonts, draw)).save(file, "png")
        pictures.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=[*CHARACTERS])
    )
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def dialtones(rate: int = 16_000, count: int = 1000) -> datasets.Dataset:
    """One to four keys pressed, in noise: each key is two tones, 100 ms with 60 ms of rest after.

    Args:
        rate: Samples a second.
        count: How many clips.

    Returns:
        `audio`, WAV files of 16 bits, and `text`, the digits.
    """
    import datasets

    draw = np.random.default_rng(0)
    tones = {
        key: _tone((low, high), rate)
        for keys, low in zip(_KEYS, _ROWS, strict=True)
        for key, high in zip(keys, _COLUMNS, strict=True)
    }
    clips, texts = [], []
    for _ in range(count):
        text = "".join(map(str, draw.integers(0, 10, draw.integers(1, 5))))
        rests = [np.zeros(int(rate * seconds)) for seconds in (draw.uniform(0.02, 0.2), 0.06)]
        pressed = [part for key in text for part in (tones[key] * draw.uniform(0.5, 1.0), rests[1])]
        clip = np.concatenate([rests[0], *pressed])
        clip = clip + draw.normal(0.0, 0.03, len(clip))
        clips.append({"bytes": _wav(clip, rate), "path": None})
        texts.append(text)
    file = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features(audio=file, text=datasets.Value("string"))
    return datasets.Dataset.from_dict({"audio": clips, "text": texts}, features=features)


def _drawn(character: str, fonts: list[ImageFont.FreeTypeFont], draw: np.random.Generator) -> np.ndarray:
    """One character, [pixels, pixels] of uint8."""
    from PIL import Image, ImageDraw

    paper, ink = int(draw.integers(0, 60)), int(draw.integers(180, 256))
    picture = Image.new("L", (_SIDE, _SIDE), paper)
    at = tuple(_SIDE / 2 + draw.uniform(-2, 2, 2))
    font = fonts[draw.integers(len(fonts))]
    ImageDraw.Draw(picture).text(at, character, fill=ink, font=font, anchor="mm")
    turned = picture.rotate(draw.uniform(-8, 8), Image.Resampling.BILINEAR, fillcolor=paper)
    noisy = np.asarray(turned, dtype=np.float64) + draw.normal(0.0, 8.0, (_SIDE, _SIDE))
    return noisy.clip(0, 255).astype(np.uint8)


def _wav(samples: np.ndarray, rate: int) -> bytes:
    """Samples from -1 to 1 as a file."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return made.getvalue()


def _tone(hertz: tuple[int, int], rate: int) -> np.ndarray:
    """A key's two tones, faded in and out so that they do not click."""
    time = np.arange(int(rate * 0.1)) / rate
    fade = np.minimum(1.0, np.minimum(time, time[::-1]) / 0.005)
    return 0.4 * fade * sum(np.sin(2 * np.pi * one * time) for one in hertz)
