"""What each start knows before training: held-out loss of the demo's source cut to half its width and 6 of 8 layers.

python benchmarks/before_training.py         # half a minute on 2 cores
"""

from __future__ import annotations

import logging
import sysconfig
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hf_ws import AutoSubclone

SOURCE = Path(__file__).parents[1] / "recipes" / "demo" / "source"
FILES = ["argparse.py", "ast.py", "calendar.py", "configparser.py", "csv.py", "datetime.py", "shutil.py"]
STARTS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "weight_selection": {"method": "weight_selection"},
    "weight_selection, middle dropped": {"method": "weight_selection", "layer_policy": "middle_dropped"},
    "weight_selection, consecutive": {
        "method": "weight_selection",
        "method_args": {"selection": "consecutive"},
    },
    "weight_selection, random": {"method": "weight_selection", "method_args": {"selection": "random"}},
    "weight_selection, random, not consistent": {
        "method": "weight_selection",
        "method_args": {"selection": "random", "consistent": False},
    },
    "subclone, activation": {"calibrated": True},
    "subclone, activation, first layers": {"calibrated": True, "layer_policy": "first"},
    "subclone, activation, no gains": {"calibrated": True, "method_args": {"rescale": False}},
    "subclone, activation, least squares": {"calibrated": True, "compensation": ["least_squares"]},
    "subclone, magnitude": {},
    "subclone, magnitude, first layers": {"layer_policy": "first"},
    "subclone, magnitude, no gains": {"method_args": {"rescale": False}},
    "rotation": {"calibrated": True, "method": "rotation", "compensation": []},
    "rotation, least squares": {"calibrated": True, "method": "rotation"},
    "rotation, least squares, first layers": {
        "calibrated": True,
        "method": "rotation",
        "layer_policy": "first",
    },
    "rotation, least squares, block influence": {
        "calibrated": True,
        "method": "rotation",
        "layer_policy": "block_influence",
    },
}


def main() -> None:
    """Print one line a start."""
    logging.getLogger("hf_ws").setLevel(logging.ERROR)  # that magnitude ranks without data is the point here
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    code = "".join((Path(sysconfig.get_paths()["stdlib"]) / name).read_text() for name in FILES)
    ids = torch.tensor(tokenizer(code)["input_ids"][: 32 * 128]).view(32, 128)
    print(f"{loss(AutoModelForCausalLM.from_pretrained(SOURCE), ids[16:]):.3f}  the source itself")
    for name, options in STARTS.items():
        settings = dict(options)
        calibration = ids[:16] if settings.pop("calibrated", False) else None
        start = AutoSubclone.from_pretrained(
            SOURCE, hidden=128, layers=6, calibration=calibration, **settings
        )
        print(f"{loss(start, ids[16:]):.3f}  {name}")


@torch.no_grad()
def loss(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Nats per token in float32."""
    return float(model.float()(input_ids=ids, labels=ids).loss)


if __name__ == "__main__":
    main()
