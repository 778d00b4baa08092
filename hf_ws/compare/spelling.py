"""How a start is spelled: a method's name, and its options in brackets.

    random
    subclone(score=activation, rescale=false)
    subclone(layer_policy=first, layers=6)

Values are read as YAML. What `AutoSubclone.from_pretrained` takes by name (`layer_policy`, sizes) goes there, anything
else is an option of the method.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from hf_ws.auto import AutoSubclone
from hf_ws.errors import PlanError
from hf_ws.training.typed import pair

OWN = frozenset(
    {
        "source",
        "method",
        "method_args",
        "calibration",
        "seed",
        "dtype",
        "device",
        "model_class",
        "params",
        "ratio",
    }
    | {"revision", "token", "cache_dir", "local_files_only", "config_fields"}
)
"""Of `AutoSubclone.from_pretrained`, what all starts of a comparison share, or their methods' options are given by."""


@dataclass(frozen=True)
class Spelled:
    """A start as it was asked for."""

    label: str
    method: str
    method_args: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of `AutoSubclone.from_pretrained`: all that is not in `OWN`."""


def parsed(text: str) -> Spelled:
    """A start of its spelling.

    Raises:
        PlanError: brackets that do not close, or an option that is not `name=value`.
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise PlanError(f"start {text!r}: wanted is a method, or method(option=value, ...)")
    options: dict[str, Any] = {}
    for part in parted(match[2] or ""):
        try:
            key, value = pair(part)
        except (ValueError, yaml.YAMLError):
            raise PlanError(f"start {text!r}: {part!r} is not name=value") from None
        if key in options:
            raise PlanError(f"start {text!r}: {key} is given twice; keep one")
        options[key] = value
    label = match[1] + (f"({', '.join(parted(match[2]))})" if options else "")
    taken = inspect.signature(AutoSubclone.plan).parameters.keys() - OWN
    arguments = {name: options.pop(name) for name in list(options) if name in taken}
    return Spelled(label, match[1], options, arguments)


def parted(text: str) -> list[str]:
    """The parts of `a, b(c=1, d=[2, 3]), e`: commas in brackets part nothing. Raises PlanError for a bad bracket."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth < 0:
            break
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    if depth:
        raise PlanError(f"{text!r}: brackets do not match")
    return [part.strip() for part in parts if part.strip()]
