"""The public door: which names, how light the import, and the examples behind it."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from inspect import isclass, isfunction

import pytest

import hf_ws

NAMES = [
    "AutoSubclone",
    "CalibrationError",
    "CheckpointError",
    "DataError",
    "DistillationError",
    "DivergenceError",
    "Evidence",
    "HfWsError",
    "OutputError",
    "Plan",
    "PlanError",
    "ResumeError",
    "SizeError",
    "UnsupportedArchitectureError",
    "Vocabulary",
    "__version__",
    "calibrate",
    "certify",
    "choose_vocabulary",
    "derive_config",
    "trim_tokenizer",
]


def test_the_public_names_are_exactly_these() -> None:
    assert hf_ws.__all__ == NAMES == sorted(NAMES)
    assert dir(hf_ws) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_resolves_and_says_what_it_is(name: str) -> None:
    found = getattr(hf_ws, name)
    assert name == "__version__" or (isclass(found) or isfunction(found))
    assert name == "__version__" or (found.__name__ == name and found.__doc__)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hf_ws' has no attribute 'AutoSubclones'"):
        _ = hf_ws.AutoSubclones


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "peft", "matplotlib")


def test_the_import_is_light() -> None:
    # Processor time: a busy machine may take its own time. The best of three, for the first fills the caches.
    code = (
        "import sys, time; start = time.process_time(); import hf_ws; spent = time.process_time() - start; "
        f"print(spent, sorted(set({HEAVY}) & set(sys.modules)))"
    )
    seconds, loaded = zip(*(_python(code).split(" ", 1) for _ in range(3)), strict=True)
    assert set(loaded) == {"[]"}
    assert min(map(float, seconds)) < 0.5


def test_errors_are_one_tree_and_need_nothing_heavy() -> None:
    code = f"import sys, hf_ws; hf_ws.SizeError; print(sorted(set({HEAVY}) & set(sys.modules)))"
    assert _python(code) == "[]"
    builtins = {
        "PlanError": ValueError,
        "SizeError": hf_ws.PlanError,
        "UnsupportedArchitectureError": hf_ws.PlanError,
        "CheckpointError": ValueError,
        "CalibrationError": ValueError,
        "DataError": ValueError,
        "DistillationError": ValueError,
        "ResumeError": ValueError,
        "DivergenceError": ArithmeticError,
        "OutputError": OSError,
    }
    for name, parent in builtins.items():
        error = getattr(hf_ws, name)
        assert issubclass(error, hf_ws.HfWsError)
        assert issubclass(error, parent)
        assert 0 < error.exit_code < 10
    assert set(builtins) == {name for name in NAMES if name.endswith("Error")} - {"HfWsError"}


@pytest.mark.parametrize("room", ["axes", "sizes", "layouts.infer"])
def test_the_examples_in_the_docstrings_run(room: str) -> None:
    assert doctest.testmod(importlib.import_module(f"hf_ws.{room}"), raise_on_error=True).attempted > 0


def test_autosubclone_is_called_and_not_made() -> None:
    with pytest.raises(TypeError, match=r"call AutoSubclone\.from_pretrained\(source, hidden=\.\.\.\)"):
        hf_ws.AutoSubclone()
