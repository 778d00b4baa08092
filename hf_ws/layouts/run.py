"""Run a miniature: in float64, eager, one thread, every parameter perturbed, and look at all it gives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.layouts import irregular, zoo
from hf_ws.layouts.miniature import apart, unfilled
from hf_ws.sizes import nodes

Outputs = dict[str, Tensor]
"""What a model gave, by the name in its output and the place in that."""


@contextlib.contextmanager
def plain_arithmetic(config: PreTrainedConfig) -> Iterator[None]:
    """Float64 throughout, and head slopes of zero where a family gives each head its own.

    One thread: a miniature's matrices are too small to share, and on a busy machine sharing costs seconds.
    """
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]), torch.no_grad():
            stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
            for name in ("float", "float32"):
                stack.enter_context(mock.patch.object(torch, name, torch.float64))
            stack.enter_context(mock.patch("torch.nn.functional.grid_sample", _sampled))
            if builder := irregular.HEAD_BIASES.get(config.model_type):
                stack.enter_context(mock.patch(builder, _without_slopes(builder)))
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)


def _without_slopes(builder: str) -> Any:
    module, _, name = builder.rpartition(".")
    original = getattr(__import__(module, fromlist=[name]), name)
    return lambda *args, **kwargs: torch.zeros_like(original(*args, **kwargs))


def _sampled(values: Tensor, grid: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`grid_sample` of a table that a model keeps in float32 by a grid that is in float64 here."""
    return _GRID_SAMPLE(values.to(grid.dtype), grid, *args, **kwargs)


_GRID_SAMPLE = torch.nn.functional.grid_sample


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model in float64, eager, in evaluation mode."""
    config = type(config).from_dict(config.to_dict())
    own = (zoo.ATTENTION.get(node.model_type) for _, node in nodes(config))
    config._attn_implementation = next(filter(None, own), "eager")
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return apart(model_class(config).to(torch.float64).eval())


def frame(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """As `build`, with parameters that are still to be written: whatever was in their memory."""
    with unfilled(), mock.patch.object(PreTrainedModel, "initialize_weights", return_value=None):
        return build(model_class, config)


def without_tables(model: PreTrainedModel, widths: set[int]) -> tuple[str, ...]:
    """Set to zero every table of positions that is computed, not learned, and added to a stream; returns their names.

    Such a table (Vaswani's sines) gives each channel a frequency by its number, so the stream's channels are no
    symmetry with it. The target computes its own.
    """
    found = []
    for path, module in model.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}
        computed = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        own = plain | module._buffers | module._parameters
        if type(module).__name__.endswith(_SINES) and not own:  # computed for each picture, each text
            module.forward = _zeros_of(module.forward)
            found.append(path)
            continue
        for name, table in (plain | computed).items():
            if (
                table is not None
                and table.is_floating_point()
                and table.ndim >= 2
                and table.shape[-1] in widths
            ):
                table.zero_()
                found.append(f"{path}.{name}".lstrip("."))
    return tuple(found)


_SINES = ("SinePositionEmbedding", "SinusoidalPositionalEmbedding")
"""What modules are called that give each position its sines: some keep a table of them, some compute it each time."""


def _zeros_of(forward: Any) -> Any:
    return lambda *args, **kwargs: torch.zeros_like(forward(*args, **kwargs))


def perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Weights of a size at which every parameter matters: gains and biases too, which start at one and zero."""
    torch.manual_seed(0)
    filters = {id(p) for m in model.modules() if isinstance(m, _ConvNd) for p in m.parameters()}
    for parameter in model.parameters():
        read = parameter.shape[1:] if id(parameter) in filters else parameter.shape[-1:]
        scale = 0.3 if parameter.ndim < 2 else 1.0 / read.numel() ** 0.5
        parameter.add_(torch.randn_like(parameter), alpha=scale)
    saved = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in saved and name.endswith("running_var"):
            buffer.mul_(0.5 + torch.rand_like(buffer))
        elif name in saved and buffer.is_floating_point():
            buffer.add_(torch.randn_like(buffer), alpha=0.3)
    return model


def load(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Give a model this state; what it keeps from earlier runs (LeViT its biases) is forgotten."""
    model.load_state_dict(dict(state), strict=False)
    model.train()
    model.eval()


def run(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Outputs:
    """Every floating-point tensor that the model gives for these inputs; the random numbers it draws are the same."""
    torch.manual_seed(0)
    return dict(tensors("", model(**inputs)))


def tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor in what a module gave, by its place in that."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from tensors(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list | tuple):
        for at, inner in enumerate(value):
            yield from tensors(f"{name}.{at}", inner)
