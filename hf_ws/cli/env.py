"""`hf-ws env`: what an issue report should say about a machine, and nothing that it should not."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

from hf_ws._version import __version__
from hf_ws.cli.options import Json

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "huggingface_hub")


def env(as_json: Json = False) -> None:
    """Print what an issue report should hold.

    Versions, platform and device; no names, no paths, no tokens.
    """
    facts = {
        "hf_ws": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu cores": str(os.cpu_count()),
        "device": _device(),
    }
    print(
        json.dumps(facts, indent=2)
        if as_json
        else "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device() -> str:
    """What a model would be put on here."""
    try:
        import torch
    except ImportError as error:  # a broken torch is just what a report is about
        return f"torch cannot be imported: {error}"
    if torch.cuda.is_available():
        kind = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} ({kind})"
    return "mps" if torch.backends.mps.is_available() else "cpu"
