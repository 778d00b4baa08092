"""What a class's norms do with their gain, and with what all channels have in common: seen by trying them."""

from __future__ import annotations

import contextlib
import json
import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.axes import HIDDEN, kind_of, parse
from hf_ws.layouts import run
from hf_ws.layouts.certify import Certificate
from hf_ws.layouts.miniature import miniatures
from hf_ws.layouts.stacks import generic


class Norm(NamedTuple):
    """How a norm's output depends on what it is given."""

    offset: float
    """What the class adds to the gain it keeps: one (Gemma), or nothing."""
    centred: bool
    """Whether it takes out the mean over channels."""
    eps: float
    """What it adds to the mean square before it takes the root."""


_NORMS: dict[tuple[type[PreTrainedModel], str], dict[str, Norm]] = {}


def norms_of(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, certificate: Certificate
) -> dict[str, Norm]:
    """Every norm of a stream of `model_class(config)` that has a gain, by the gain's name in `layouts`; remembered.

    Those that take more than rows of channels (I-BERT's, with their scales) are left out.
    """
    key = (model_class, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _NORMS:
        small, found = miniatures(model_class, config)[0], {}
        with run.plain_arithmetic(small):
            model = run.perturbed(run.build(model_class, small))
            stacks = certificate.stacks.of(small)
            for name, module in model.named_modules():
                pattern = generic(f"{name}.weight", stacks)[0]
                axes = [dim.expression for dim in parse(certificate.layouts.get(pattern, ""))]
                if not is_norm(module) or len(axes) != 1 or kind_of(str(axes[0])) != HIDDEN:
                    continue
                size = len(module.get_parameter("weight"))
                with contextlib.suppress(IndexError, RuntimeError, TypeError, ValueError):
                    found[pattern] = Norm(offset_of(module), centres(module, size), eps_of(module, size))
        _NORMS[key] = found
    return _NORMS[key]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is called a norm."""
    return "norm" in type(module).__name__.lower()


def offset_of(norm: nn.Module) -> float:
    """What the class adds to the gain: with a gain of zero there is still an output if it is one (Gemma)."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return 0.0
    kept = weight.clone()
    weight.zero_()
    probe = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(1)).to(weight)
    bias = getattr(norm, "bias", None)
    moved = _normed(norm, probe) - (0.0 if bias is None else bias)
    weight.copy_(kept)
    return float(bool(moved.abs().max() > 0))


def centres(norm: nn.Module, size: int) -> bool:
    """Whether the norm does not see what all channels have in common."""
    probe = torch.randn(2, size, generator=torch.Generator().manual_seed(1))
    return bool(torch.allclose(_normed(norm, probe), _normed(norm, probe + 3.0), atol=1e-6))


def eps_of(norm: nn.Module, size: int) -> float:
    """What the norm adds to the mean square, from how much quieter it makes what is nearly nothing.

    Of x of mean square one and t x it gives what is r times as loud, r^2 = t^2 (1 + eps) / (t^2 + eps).
    """
    few = 1e-3
    probe = torch.ones(1, size)
    probe[:, ::2] = -1.0
    if size % 2:
        probe[:, -1] = 0.0
        probe *= (size / (size - 1)) ** 0.5
    none, whole, quiet = (_normed(norm, probe * by).double() for by in (0.0, 1.0, few))
    ratio = float(((quiet - none).norm() / (whole - none).norm()) ** 2)
    if not few**2 < ratio < math.inf:  # it is as much quieter (batches), or knows no loudness
        return 0.0
    return max(few**2 * (1 - ratio) / (ratio - few**2), 0.0)


def _normed(norm: nn.Module, probe: torch.Tensor) -> torch.Tensor:
    """What a norm makes of [rows, channels], given as pictures of one pixel to one that takes only these."""
    try:
        return norm(probe)
    except (RuntimeError, ValueError):
        return norm(probe[:, :, None, None])[:, :, 0, 0]
