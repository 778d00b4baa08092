"""LayerScale: which parameters multiply, channel by channel, what a matrix adds to the stream. Seen by trying them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_ws.axes import parse
from hf_ws.layouts import run
from hf_ws.layouts.bench import TOLERANCE
from hf_ws.layouts.certify import Certificate
from hf_ws.layouts.infer import tensors_of
from hf_ws.layouts.norms import is_norm
from hf_ws.layouts.outputs import distance


def layer_scales(
    model: PreTrainedModel, given: Mapping[str, Tensor], certificate: Certificate, axis: str
) -> dict[str, tuple[str, ...]]:
    """Of each gain that is no norm's, what writes what it multiplies: a weight, and its bias if it has one.

    Twice the gain is then the same function as twice the matrix.

    Args:
        model: A miniature.
        given: Its inputs.
        certificate: Its layouts; names here are as there.
        axis: The stream.
    """
    gains, writers = [*_gains(model, certificate, axis)], [*_writers(certificate, axis)]
    if not gains:
        return {}
    plain, found = run.run(model, given), {}
    for gain in gains:
        wanted = _doubled(model, given, certificate, (gain,))
        if distance(wanted, plain, {}) <= TOLERANCE:
            continue  # it does nothing here
        for writer in writers:
            if distance(_doubled(model, given, certificate, writer), wanted, {}) <= TOLERANCE:
                found[gain] = writer
                break
    return found


def _gains(model: PreTrainedModel, certificate: Certificate, axis: str) -> Iterator[str]:
    """One number a channel, in a layer, that is neither a norm's nor a matrix's bias."""
    modules = dict(model.named_modules())
    for name in dict(model.named_parameters()):
        owner, pattern = modules[name.rpartition(".")[0]], certificate.pattern(name)
        layout = parse(certificate.layouts.get(pattern, ""))
        alone = all(parameter.ndim < 2 for parameter in owner.parameters(recurse=False))
        if (
            len(layout) == 1
            and layout[0].expression == axis
            and alone
            and not is_norm(owner)
            and "*" in pattern
        ):
            yield pattern


def _writers(certificate: Certificate, axis: str) -> Iterator[tuple[str, ...]]:
    """Every matrix of a layer that writes the stream, with its bias."""
    for pattern, text in certificate.layouts.items():
        layout, bias = parse(text), f"{pattern.removesuffix('weight')}bias"
        written = [dim.expression for dim in layout if not dim.reads]
        if len(layout) == 2 and written == [axis] and "*" in pattern and pattern.endswith(".weight"):
            yield (pattern, bias) if bias in certificate.layouts else (pattern,)


def _doubled(
    model: PreTrainedModel, given: Mapping[str, Tensor], certificate: Certificate, patterns: tuple[str, ...]
) -> dict[str, Tensor]:
    """What the model gives with these parameters twice as large, in every layer."""
    own = [tensor for name, tensor in tensors_of(model).items() if certificate.pattern(name) in patterns]
    with torch.no_grad():
        for tensor in own:
            tensor.mul_(2.0)
        found = run.run(model, given)
        for tensor in own:
            tensor.mul_(0.5)
    return found
