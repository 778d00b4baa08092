"""What a call of `AutoSubclone` asks for, sorted and checked as far as no source need be read."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_ws.axes import AXES, VOCAB
from hf_ws.depth import LayerPolicy
from hf_ws.errors import CalibrationError, PlanError, unknown
from hf_ws.evidence import Evidence
from hf_ws.maps import called
from hf_ws.methods import METHODS, Method, default_method
from hf_ws.search.goal import Goal
from hf_ws.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The arguments of a call, sorted."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    goal: Goal | None = None
    method: str | Method | None = None
    method_args: Mapping[str, Any] = field(default_factory=dict)
    layer_policy: str | LayerPolicy | Sequence[int] | None = None
    calibration: Any = None
    compensation: Sequence[str] | None = None
    seed: int = 0
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    where: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise PlanError(f"seed={self.seed!r}: wanted is a whole number, 0 to {2**63 - 1}")
        if self.goal is not None and self.calibration is not None:
            self._check_scored()
        try:
            torch.empty(0, device=self.device or "cpu")
        except (AssertionError, RuntimeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise PlanError(f"device={self.device!r} cannot be used here: {reason}") from None

    def _check_scored(self) -> None:
        """Refuse what no start can be scored on. Raises CalibrationError, PlanError."""
        if isinstance(self.calibration, Evidence):
            raise CalibrationError(
                f"{self.goal} scores starts on calibration data, and this is evidence; pass the data, or sizes"
            )
        if self.vocabulary is not None or VOCAB in self.sizes:
            raise PlanError(
                f"{self.goal} scores starts on the source's token ids, and with vocab= they know others; take the "
                "sizes that the search finds without calibration, or without vocab="
            )

    def decided(self) -> Ask:
        """The same with a method. Raises PlanError: options of a method that is not named."""
        if self.method is not None:
            return self
        if self.method_args:
            named = ", ".join(self.method_args)
            raise PlanError(
                f"method_args gives {named}, and no method is named; name the one whose options these are: method= one "
                f"of {', '.join(METHODS)}"
            )
        method, options = default_method(self.calibration is not None)
        return replace(self, method=method, method_args=options)

    @property
    def chosen(self) -> Method:
        """The method, its options checked."""
        assert self.method is not None, "decided() comes first"
        return _method(self.method, self.method_args)

    @property
    def policies(self) -> tuple[str | LayerPolicy | Sequence[int], ...]:
        """The layer policy asked for; or the method's own, each to be taken where none before it can be had."""
        asked: Any = self.layer_policy
        if asked is None:
            asked = getattr(self.chosen, "layer_policy", "first")
        several = isinstance(asked, tuple) and bool(asked) and all(isinstance(one, str) for one in asked)
        return asked if several else (asked,)

    @property
    def listed(self) -> Sequence[int] | None:
        """The layers themselves, if they were asked for by their numbers."""
        first = self.policies[0]
        return None if isinstance(first, str) or callable(first) else first

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Ask:
        """From the arguments of `AutoSubclone.from_pretrained`, by name."""
        source, dtype, vocab = arguments["source"], arguments["dtype"], arguments["vocab"]
        chosen = vocab if isinstance(vocab, Vocabulary) else None
        arguments = {**arguments, VOCAB: None if chosen else vocab}
        live = source.dtype if isinstance(source, PreTrainedModel) else None
        return cls(
            dtype=dtype_of(dtype) or live,
            vocabulary=chosen,
            sizes={axis: arguments[axis] for axis in AXES if arguments.get(axis) is not None},
            fields=arguments["config_fields"],
            goal=Goal.of(arguments["params"], arguments["ratio"]),
            method_args=arguments["method_args"] or {},
            compensation=arguments["compensation"],
            where={name: arguments[name] for name in ("revision", "token", "cache_dir", "local_files_only")},
            **{name: arguments[name] for name in ("method", "layer_policy", "calibration", "seed", "device")},
        )


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A type of floating-point numbers by its name; None for the source's own. Raises PlanError."""
    if dtype is None or dtype == "auto":
        return None
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise PlanError(
            f"dtype={dtype!r} is unknown; allowed are float32, bfloat16, float16, float64 and auto"
        )
    return found


def _method(method: str | Method, arguments: Mapping[str, Any]) -> Method:
    if not callable(method) and not (isinstance(method, str) and method in METHODS):
        raise unknown("method", method, METHODS)
    found = method if callable(method) else METHODS[method]
    try:
        inspect.signature(found).bind(None, **arguments)
    except TypeError as error:
        options = ", ".join(list(inspect.signature(found).parameters)[1:]) or "none"
        raise PlanError(f"method {called(method)}: {error}; its options are: {options}") from None
    return found
