"""The starts that are compared, and the published claims that they test: data, one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from hf_ws import AutoSubclone
from hf_ws.errors import HfWsError
from hf_ws.sizes import sizes_of

MAIN, ABLATION = "main", "ablation"


@dataclass(frozen=True)
class Arm:
    """How a start is made: the arguments of `AutoSubclone.from_pretrained`, beside source and sizes."""

    options: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False  # is given calibration sequences
    group: str = ABLATION
    every_head: bool = False  # keeps all heads, each with fewer channels, at about the same parameters


def _subclone(
    calibrated: bool = True, policy: str | None = None, every_head: bool = False, **options: Any
) -> Arm:
    return Arm(
        {"method": "subclone", "layer_policy": policy, "method_args": options},
        calibrated,
        every_head=every_head,
    )


def _selected(policy: str | None = None, **options: Any) -> Arm:
    return Arm({"method": "weight_selection", "layer_policy": policy, "method_args": options})


ARMS: dict[str, Arm] = {
    "random": Arm({"method": "random"}, group=MAIN),
    "weight_selection": Arm({"method": "weight_selection"}, group=MAIN),
    "subclone": Arm({"method": "subclone"}, calibrated=True, group=MAIN),
    "rotation": Arm({"method": "rotation"}, calibrated=True, group=MAIN),
    "subclone, no gains": _subclone(rescale=False),
    "subclone, first layers": _subclone(policy="first"),
    "subclone, block influence": _subclone(policy="block_influence"),
    "subclone, magnitude": _subclone(calibrated=False),
    "subclone, split heads": _subclone(every_head=True),
    "weight_selection, middle dropped": _selected("middle_dropped"),
    "weight_selection, consecutive": _selected(selection="consecutive"),
    "weight_selection, random indices": _selected(selection="random"),
    "weight_selection, random, not consistent": _selected(selection="random", consistent=False),
    "rotation, middle dropped": Arm(
        {"method": "rotation", "layer_policy": "middle_dropped"}, calibrated=True
    ),
}


@dataclass(frozen=True)
class Claim:
    """A published ordering: the first arm is said to be better than the second."""

    says: str
    better: str
    worse: str


CLAIMS = (
    Claim("subcloning: gains help", "subclone", "subclone, no gains"),
    Claim(
        "subcloning: reordering by importance helps (both without gains, middle dropped)",
        "subclone, no gains",
        "weight_selection, middle dropped",
    ),
    Claim("subcloning: dropping the middle beats the first layers", "subclone", "subclone, first layers"),
    Claim("subcloning: activations rank better than weights", "subclone", "subclone, magnitude"),
    Claim(
        "weight selection: consistency is what matters",
        "weight_selection, random indices",
        "weight_selection, random, not consistent",
    ),
    Claim(
        "weight selection: evenly spaced, not consecutive",
        "weight_selection",
        "weight_selection, consecutive",
    ),
    Claim(
        "weight selection: first layers, not the middle dropped",
        "weight_selection",
        "weight_selection, middle dropped",
    ),
    Claim("peers: whole heads, not a part of every head", "subclone", "subclone, split heads"),
    Claim("ours: block influence beats the middle drop", "subclone, block influence", "subclone"),
)


def sizes_for(arm: Arm, config: PreTrainedConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """The target's sizes as an arm reaches them."""
    asked = dict(sizes)
    if not arm.every_head or "heads" not in sizes:
        return asked
    before = sizes_of(config)
    channels = sizes["heads"] * before["head_dim"] // before["heads"]
    return asked | {
        "heads": before["heads"],
        "kv_heads": before["kv_heads"],
        "head_dim": channels - channels % 2,  # rotary channels go in pairs
    }


def refusal(arm: Arm, source: str, config: PreTrainedConfig, sizes: Mapping[str, int]) -> str | None:
    """Why this version of the library has no such start of this source; None if it has."""
    if arm.every_head and "heads" not in sizes:
        return "every head is kept by every arm"
    try:
        AutoSubclone.plan(source, **arm.options, **sizes_for(arm, config, sizes))
    except HfWsError as error:
        return str(error)
    return None
