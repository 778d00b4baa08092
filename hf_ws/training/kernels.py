"""Liger's GPU kernels in a model's body: norms, rotary positions, gated MLPs.

The losses stay ours. They too are made of the head's product a chunk at a time; but cross-entropy and every divergence
share one product, in float32, where Liger's fused losses are one each. `benchmarks/training.py` compares them on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from hf_ws.errors import PlanError
from hf_ws.training.sharding import on_cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Asked = Literal["auto"] | bool
"""Whether to use them; `auto`: where there is a GPU, the package, and kernels for the model's type."""

_NOTHING = object()


def kernels_for(model_type: str, asked: Asked) -> Callable[..., None] | None:
    """What puts kernels into a model of this type; None where there is nothing to put.

    Raises:
        PlanError: They are asked for with True, and there is no GPU, no package, or nothing for this type.
    """
    if asked is False:
        return None
    known, why = _known(model_type)
    if known is None and asked is True:
        raise PlanError(f"liger=true: {why}; or set liger: auto, which does without")
    return known


@contextmanager
def kernels_in(model: PreTrainedModel, asked: Asked) -> Iterator[bool]:
    """Put kernels into a model in place, and take them out again at the end; whether there were any.

    Rotary positions are a function of the class's module, so other live models of the class take the kernel as well.
    It runs on a GPU alone: were it left there, the next model of the class could not be run on a CPU.

    Raises:
        PlanError: As `kernels_for`.
    """
    put = kernels_for(model.config.model_type, asked)
    if put is None:
        yield False
        return
    places = [vars(module) for module in model.modules()]
    places += [vars(sys.modules[name]) for name in sorted({type(m).__module__ for m in model.modules()})]
    before = [dict(place) for place in places]
    put(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    changed = [
        (place, name, old)
        for place, names in zip(places, before, strict=True)
        for name in place
        if place[name] is not (old := names.get(name, _NOTHING))
    ]
    try:
        yield True
    finally:
        for place, name, old in changed:
            if old is _NOTHING:
                place.pop(name, None)
            else:
                place[name] = old


def _known(model_type: str) -> tuple[Callable[..., None] | None, str]:
    """What puts kernels into a model of this type, or why there is nothing."""
    device = None if on_cpu() else torch.accelerator.current_accelerator()
    if device is None or device.type not in ("cuda", "xpu"):
        return None, "its kernels run on a GPU, and this run takes none"
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        return None, f"the package cannot be imported ({error}); pip install liger-kernel"
    known: Mapping[str, Callable[..., None]] = MODEL_TYPE_TO_APPLY_LIGER_FN
    return known.get(model_type), f"it has no kernels for {model_type}, only for {', '.join(sorted(known))}"
