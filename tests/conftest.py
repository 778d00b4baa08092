"""What every test can rely on: nothing is downloaded, one thread, and hypothesis that does not mind a slow core."""

from __future__ import annotations

import os
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "hf_ws", deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hf_ws")


def pytest_report_header() -> str:
    """Which end of the supported range this run is."""
    return f"transformers {version('transformers')}, torch {torch.__version__}"
