"""Every model type that Transformers has, and what came of proving it.

>>> verdict("llama").axes
('hidden', 'heads', 'kv_heads', 'ffn', 'vocab', 'head_dim', 'layers')
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from types import ModuleType

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from hf_ws.axes import FFN, HEADS, HIDDEN, KV_HEADS, LAYERS, MOE_FFN, kind_of
from hf_ws.errors import HfWsError, UnsupportedArchitectureError
from hf_ws.layouts import zoo
from hf_ws.layouts.census import census, check_census
from hf_ws.layouts.certify import certify
from hf_ws.sizes import fitted, nodes

KINDS: dict[str, tuple[str, ...]] = {
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",),
    "masked-lm": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    "causal-lm": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    "speech": ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_CTC_MAPPING_NAMES"),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",),
    "multimodal": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    "base": ("MODEL_MAPPING_NAMES",),
}
"""Kinds of models, as Transformers' auto classes sort them; a type's class is that of the first kind it is of."""

CORE = (HIDDEN, FFN, MOE_FFN, HEADS, KV_HEADS, LAYERS)
"""The kinds of axes that a certified type must be able to change wherever it has them."""


@dataclass(frozen=True)
class Verdict:
    """What came of one proof."""

    name: str
    model_class: str | None
    verdict: str
    """`certified`, `certified in part` (an axis of a kind in `CORE` is fixed) or `refused`."""
    axes: tuple[str, ...] = ()
    """The axes that may change."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """The axes that may not, and why."""
    reads: bool = False
    tables: tuple[str, ...] = ()
    """Computed position tables, at zero in the proof."""
    largest_error: float | None = None
    """What the worst of the proofs that passed moved the output by, as a share of its largest value."""
    seconds: float = 0.0
    reason: str | None = None
    """Why it was refused."""
    layouts: Mapping[str, str] | None = None

    def __str__(self) -> str:
        start = f"{self.name}: {self.verdict}  {self.seconds:.1f} s"
        if self.verdict == "refused":
            return f"{start}  {' '.join((self.reason or '').split())}"
        end = "".join(f"; {axis} stays: {why}" for axis, why in self.fixed.items())
        return f"{start}  error {self.largest_error:.0e}  {self.model_class}: {' '.join(self.axes)}{end}"


def types(kind: str | None = None) -> dict[str, str]:
    """The class by model type: all of one kind, or every type with the first kind of class it has."""
    found: dict[str, str] = {}
    for own in KINDS if kind is None else (kind,):
        for mapping in KINDS[own]:
            for name, classes in getattr(auto, mapping).items():
                found.setdefault(name, classes if isinstance(classes, str) else classes[0])
    return found


def default_of(name: str, class_name: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """A type's class and default config. Raises UnsupportedArchitectureError where there is none here."""
    try:
        config = _completed(CONFIG_MAPPING[name](**zoo.DEFAULTS.get(name, {})))
        found = getattr(transformers, class_name, None) or getattr(_modeling(config), class_name)
        if not isinstance(config, found.config_class):  # a text class listed under the name of the whole
            config = next((node for _, node in nodes(config) if isinstance(node, found.config_class)), config)
        return found, config
    except (
        Exception
    ) as error:  # a class whose default config does not even pass its own checks, or a package missing
        raise UnsupportedArchitectureError(
            f"{class_name}: its default config cannot be made here: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error


def _modeling(config: PreTrainedConfig) -> ModuleType:
    """Where the model classes of a config are: not all are among Transformers' own names."""
    return import_module(type(config).__module__.replace(".configuration_", ".modeling_"))


def _completed(config: PreTrainedConfig) -> PreTrainedConfig:
    """A default config with what every published one has besides, and parts that fit together."""
    for _, node in nodes(config):
        for name, value in zoo.FIELDS.get(node.model_type, {}).items():
            if isinstance(value, zoo.Open) and getattr(node, name, None) is None:
                setattr(node, name, value[0])
    return fitted(config)


def verdict_of(name: str, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Verdict:
    """Prove a class for a config, and that the proof speaks of every tensor of the model of that size."""
    start = time.perf_counter()
    try:
        certificate = certify(model_class, config)
        check_census(census(model_class, config), config, certificate)
    except HfWsError as error:
        return _refused(name, model_class.__name__, error, start)
    stuck = [axis for axis in certificate.fixed if kind_of(axis) in CORE]
    wide = any(kind_of(axis) == HIDDEN for axis in certificate.axes)
    passed = [certificate.errors[axis] for axis in certificate.axes if axis in certificate.errors]
    return Verdict(
        name,
        model_class.__name__,
        "certified" if wide and not stuck else "certified in part",
        axes=certificate.axes,
        fixed=certificate.fixed,
        reads=certificate.reads,
        tables=certificate.tables,
        largest_error=max((error for error in passed if error < 1e-3), default=0.0),
        seconds=time.perf_counter() - start,
        layouts=dict(certificate.layouts),
    )


def _refused(name: str, class_name: str | None, error: Exception, start: float) -> Verdict:
    reason = " ".join(str(error).split())
    return Verdict(name, class_name, "refused", seconds=time.perf_counter() - start, reason=reason)


def verdict(name: str, kind: str | None = None) -> Verdict:
    """What comes of proving one model type, with its default config."""
    start, class_name = time.perf_counter(), types(kind)[name]
    try:
        return verdict_of(name, *default_of(name, class_name))
    except HfWsError as error:
        return _refused(name, class_name, error, start)


def verdicts(names: Sequence[str], kind: str | None = None, jobs: int = 1) -> Iterator[Verdict]:
    """What comes of proving these model types, in their order, in so many processes."""
    if jobs == 1:
        yield from (verdict(name, kind) for name in names)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(verdict, kind=kind), names)
