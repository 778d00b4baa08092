"""Start a transformer of one size from the pretrained weights of another.

from hf_ws import AutoSubclone

model = AutoSubclone.from_pretrained("gpt2-large", hidden=512)
model.save_pretrained("student")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_ws._version import __version__

if TYPE_CHECKING:
    from hf_ws.auto import AutoSubclone
    from hf_ws.certifying import certify
    from hf_ws.derive import derive_config
    from hf_ws.errors import (
        CalibrationError,
        CheckpointError,
        DataError,
        DistillationError,
        DivergenceError,
        HfWsError,
        OutputError,
        PlanError,
        ResumeError,
        SizeError,
        UnsupportedArchitectureError,
    )
    from hf_ws.evidence import Evidence, calibrate
    from hf_ws.plan import Plan
    from hf_ws.vocabulary import Vocabulary, choose_vocabulary, trim_tokenizer

_ROOMS = {
    "AutoSubclone": "auto",
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "DataError": "errors",
    "DistillationError": "errors",
    "DivergenceError": "errors",
    "Evidence": "evidence",
    "HfWsError": "errors",
    "OutputError": "errors",
    "Plan": "plan",
    "PlanError": "errors",
    "ResumeError": "errors",
    "SizeError": "errors",
    "UnsupportedArchitectureError": "errors",
    "Vocabulary": "vocabulary",
    "calibrate": "evidence",
    "certify": "certifying",
    "choose_vocabulary": "vocabulary",
    "derive_config": "derive",
    "trim_tokenizer": "vocabulary",
}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
