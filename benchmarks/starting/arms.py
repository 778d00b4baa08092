"""The starts that are compared, and the published claims that they test: data, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig

from hf_ws import AutoSubclone
from hf_ws.errors import CalibrationError, HfWsError
from hf_ws.sizes import sizes_of

MAIN, ABLATION = "main", "ablation"
DEFAULT = "rotation, explained"  # what the library does where it is given text and no method


@dataclass(frozen=True)
class Arm:
    """How a start is made: the arguments of `AutoSubclone.from_pretrained`, beside source and sizes."""

    options: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False  # is given calibration sequences
    group: str = ABLATION
    sequences: int | None = None  # of calibration text; None for the usual number
    weight_of: Callable[[Tensor], float] | None = None  # in place of the library's, which balances the layers
    every_head: bool = False  # keeps all heads, each with fewer channels, at about the same parameters
    only_if: Callable[[PreTrainedConfig], bool] | None = (
        None  # of other sources it is the same as another arm
    )


def tied(config: PreTrainedConfig) -> bool:
    """Whether the head is the embedding."""
    return bool(config.tie_word_embeddings)


def biased(config: PreTrainedConfig) -> bool:
    """Whether matrices that read a cut axis have biases."""
    return config.model_type == "gpt2"


def _subclone(policy: str | None = None, group: str = ABLATION, **options: Any) -> Arm:
    """Subcloning with a layer policy and further method arguments, importance seen on data."""
    return Arm({"method": "subclone", "layer_policy": policy, "method_args": options}, True, group)


def _selected(policy: str | None = None, group: str = ABLATION, **options: Any) -> Arm:
    """Weight selection with a layer policy and further method arguments."""
    return Arm({"method": "weight_selection", "layer_policy": policy, "method_args": options}, group=group)


def _rotated(
    policy: str = "middle_dropped", group: str = ABLATION, score: str = "activation", **options: Any
) -> Arm:
    """Rotation with a layer policy and a score, in place of its own, and further arguments of `from_pretrained`."""
    given = {"score": score, **options.pop("method_args", {})}
    return Arm({"method": "rotation", "layer_policy": policy, "method_args": given, **options}, True, group)


ARMS: dict[str, Arm] = {
    "random": Arm({"method": "random"}, group=MAIN),
    "weight_selection": _selected(group=MAIN),
    "subclone": _subclone(group=MAIN),
    DEFAULT: _rotated("lowest_loss", MAIN, "explained"),
    "rotation": _rotated(),
    "rotation, lowest loss": _rotated("lowest_loss"),
    "rotation, block influence": _rotated("block_influence"),
    "rotation, angular distance": _rotated("angular_distance"),
    "rotation, loss increase": _rotated("loss_increase"),
    "rotation, drifted, output": _rotated(compensation=["least_squares", "least_squares_drifted", "output"]),
    "rotation, drifted": _rotated(compensation=["least_squares", "least_squares_drifted"]),
    "rotation, no least squares": _rotated(compensation=[]),
    "rotation, first layers": _rotated("first"),
    "rotation, merged neighbours": _rotated("merge_neighbours"),
    "rotation, not balanced": replace(_rotated(), weight_of=lambda second: 1.0),
    "rotation, 8 sequences": replace(_rotated(), sequences=8),
    "rotation, 256 sequences": replace(_rotated(), sequences=256),
    "rotation, output": _rotated(compensation=["least_squares", "output"]),
    "rotation, head tied": replace(
        _rotated("lowest_loss", score="explained", method_args={"untie": False}), only_if=tied
    ),  # the default of such a source
    "subclone, no gains": _subclone(rescale=False),
    "subclone, first layers": _subclone("first"),
    "subclone, block influence": _subclone("block_influence"),
    "subclone, least squares": Arm({"method": "subclone", "compensation": ["least_squares"]}, True),
    "subclone, both least squares": Arm(
        {"method": "subclone", "compensation": ["least_squares", "least_squares_hidden"]}, True
    ),
    "subclone, both least squares, drifted": Arm(
        {
            "method": "subclone",
            "compensation": ["least_squares", "least_squares_hidden", "least_squares_drifted"],
        },
        True,
    ),
    "subclone, mean bias": Arm({"method": "subclone", "compensation": ["mean_bias"]}, True, only_if=biased),
    "subclone, rms": Arm({"method": "subclone", "compensation": ["rms"]}, True),
    "subclone, output": Arm({"method": "subclone", "compensation": ["output"]}, True),
    "subclone, explained": _subclone(score="explained"),
    "subclone, explained, both least squares": Arm(
        {
            "method": "subclone",
            "method_args": {"score": "explained"},
            "compensation": ["least_squares", "least_squares_hidden"],
        },
        True,
    ),
    "subclone, split heads": Arm({"method": "subclone"}, True, every_head=True),
    "subclone, magnitude": Arm({"method": "subclone"}),
    "subclone, L2": _subclone(score="l2_activation"),
    "subclone, Taylor": _subclone(score="taylor"),
    "subclone, variance": _subclone(score="variance"),
    "weight_selection, middle dropped": _selected("middle_dropped"),
    "weight_selection, consecutive": _selected(selection="consecutive"),
    "weight_selection, random indices": _selected(selection="random"),
    "weight_selection, random, not consistent": _selected(selection="random", consistent=False),
    "subclone, evenly spaced layers": _subclone("evenly_spaced"),
    "subclone, angular distance": _subclone("angular_distance"),
    "subclone, loss increase": _subclone("loss_increase"),
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
    Claim("peers: least squares helps, on selection", "subclone, least squares", "subclone"),
    Claim("peers: least squares helps, on rotation", "rotation", "rotation, no least squares"),
    Claim("prototype: every layer counts alike in the basis", "rotation", "rotation, not balanced"),
    Claim("peers: refitting to the drifted stream helps, on rotation", "rotation, drifted", "rotation"),
    Claim(
        "peers: merging layers beats dropping them, on rotation", "rotation, merged neighbours", "rotation"
    ),
    Claim("peers: L2 ranks better than the mean absolute activation", "subclone, L2", "subclone"),
    Claim("peers: block influence beats the middle drop", "subclone, block influence", "subclone"),
    Claim(
        "ours: rotation beats selection, both without compensation", "rotation, no least squares", "subclone"
    ),
    Claim(
        "ours: block influence beats the middle drop, on rotation", "rotation, block influence", "rotation"
    ),
    Claim(
        "ours: angular distance beats the middle drop, on rotation", "rotation, angular distance", "rotation"
    ),
    Claim("ours: the lowest loss beats the middle drop, on rotation", "rotation, lowest loss", "rotation"),
    Claim("ours: loss increase beats the middle drop, on rotation", "rotation, loss increase", "rotation"),
    Claim(
        "ours: what least squares cannot make up for ranks better than activation, on rotation",
        "rotation, explained",
        "rotation, lowest loss",
    ),
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
    if arm.only_if is not None and not arm.only_if(config):
        return f"the same as another arm, for this source is not {arm.only_if.__name__}"
    if arm.every_head and "heads" not in sizes:
        return "every head is kept by every arm"
    try:
        AutoSubclone.plan(source, **arm.options, **sizes_for(arm, config, sizes))
    except CalibrationError:  # it looks at data, which it will be given
        return None
    except HfWsError as error:
        return str(error)
    return None
