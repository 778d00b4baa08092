"""`make demo`, all of it but the length of its training."""

import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

DEMO = Path(__file__).parents[1] / "recipes" / "demo" / "demo.py"


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(DEMO), "--steps", "2", "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "It continues `def `:\n\ndef " in done.stdout
    assert "| rotation(untie=false) |" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(output / "start").config.hidden_size == 128
