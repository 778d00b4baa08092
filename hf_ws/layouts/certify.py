"""Proof of a layout: permute an axis wherever the layout says it occurs, and the function must not change.

Two symmetries settle it, on the miniature, with every parameter perturbed, in float64 and eager attention:

*Permutation.* Reorder one axis (hidden; ffn; experts; whole kv groups and the query heads inside each) in every
tensor. The output must not move; for the vocabulary it must move along. A factor in the wrong order, a parameter
left out, a q taken for a k, each breaks this.

*Duplication.* Copy every channel, neuron and head once, and share what reads them. The output must not move. This
proves which side of each tensor reads, on which gains and growth depend.

The order inside a head is not claimed (rotary pairs are no symmetry), nor is that of positions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.axes import (
    EMBEDDING,
    EXPERTS,
    FFN,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LABELS,
    MOE_FFN,
    VOCAB,
    coordinates,
    parse,
)
from hf_ws.errors import UnsupportedArchitectureError
from hf_ws.layouts import irregular
from hf_ws.layouts.infer import Inferred, build_on_meta, generic, infer
from hf_ws.layouts.select import select
from hf_ws.sizes import resize, sizes_of

TOLERANCE = 2e-5
"""Of the largest output. Norms compute in float32 whatever the model's dtype; float64 elsewhere is far below this."""

SPECIAL = 3
"""Ids below this are padding, start and end in a miniature."""


@dataclass(frozen=True)
class Certificate:
    """The proven layouts of a model class, for one kind of config."""

    model_class: str
    layouts: Mapping[str, str]
    """Layout by parameter name, the layer's number written `*`."""
    stacks: tuple[str, ...]
    axes: tuple[str, ...]
    """The axes that occur in the layouts."""
    errors: Mapping[str, float]
    """What each proof moved the output by, as a share of its largest value."""
    tied: tuple[str, ...] = ()
    """Parameters that are another name of one earlier in `layouts` where the config ties embeddings."""
    head: str | None = None
    """The matrix that gives the logits."""
    head_norm: tuple[str, ...] = ()
    """Gain and bias of the norm whose output the head reads; empty if there is none, or its gain is not a factor."""

    def pattern(self, name: str) -> str:
        """A parameter's name as `layouts` spells it."""
        return generic(name, self.stacks)[0]


_CERTIFICATES: dict[tuple[type[PreTrainedModel], str], Certificate] = {}


def certify(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Certificate:
    """Infer the layouts of `model_class(config)` and prove them; seconds at most, and remembered.

    Raises:
        UnsupportedArchitectureError: a dimension without an explanation, or an axis whose proof failed.
    """
    key = (model_class, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _CERTIFICATES:
        try:
            _CERTIFICATES[key] = prove(model_class, infer(model_class, config))
        except UnsupportedArchitectureError:
            raise
        except (
            Exception
        ) as error:  # a miniature may break a class in any way; whatever it is, there is no proof
            raise UnsupportedArchitectureError(
                f"{model_class.__name__}: no miniature of it can be built and run, so its layouts are not proven: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    return _CERTIFICATES[key]


def prove(model_class: type[PreTrainedModel], inferred: Inferred) -> Certificate:
    """The certificate for inferred layouts. Raises UnsupportedArchitectureError naming each axis that failed."""
    sizes = sizes_of(inferred.miniature)
    axes = {axis for text in inferred.layouts.values() for dim in parse(text) for axis in dim.axes}
    with _plain_arithmetic(inferred.miniature):
        model = _perturbed(_build(model_class, inferred.miniature))
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        tokens = _tokens(sizes[VOCAB])
        output = _run(model, tokens)
        errors = {}
        for axis, maps in _permutations(sizes, axes):
            errors[axis] = _moved_by(partial(_permuted, model, state, inferred, tokens, output, maps))
        errors["reads"] = _moved_by(partial(_duplicated, model_class, inferred, axes, state, tokens, output))
    failed = [
        f"{axis} (moved the output by {error:.1e})"
        for axis, error in errors.items()
        if not error <= TOLERANCE
    ]
    if failed:
        raise UnsupportedArchitectureError(
            f"{model_class.__name__}: its layouts were inferred but not proven: {', '.join(failed)}. Nothing is "
            "transferred on a guess; a fused or interleaved tensor needs a row in hf_ws/layouts/irregular.py"
        )
    return Certificate(
        model_class=model_class.__name__,
        layouts=inferred.layouts,
        stacks=inferred.stacks,
        axes=tuple(sorted(axes)),
        errors=errors,
        tied=_tied(model_class, inferred.miniature),
        **_head(model_class, inferred, tokens),
    )


def _tied(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[str, ...]:
    model = build_on_meta(model_class, resize(config, {}, tie_word_embeddings=True))
    return tuple(model.get_expanded_tied_weights_keys(all_submodels=True))


def _head(model_class: type[PreTrainedModel], inferred: Inferred, tokens: Tensor) -> dict[str, Any]:
    """The matrix that gives the logits, and the norm right before it: found by following the tensor."""
    with _plain_arithmetic(inferred.miniature):
        model = _build(model_class, inferred.miniature)
        head = model.get_output_embeddings()
        if head is None:
            return {}
        read: list[Tensor] = []
        written: list[tuple[str, Tensor]] = []
        hooks = [head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))]
        for name, module in model.named_modules():
            if "norm" in type(module).__name__.lower():
                hooks.append(
                    module.register_forward_hook(
                        lambda _, __, output, name=name: written.append((name, output))
                    )
                )
        _run(model, tokens)
        for hook in hooks:
            hook.remove()
        names = [name for name, output in written if output.data_ptr() == read[0].data_ptr()]
        # A class that starts its gains at zero multiplies by one plus the gain (Gemma): no factor can move there.
        plain = names and all(
            bool((p == 1).all())
            for n, p in model.get_submodule(names[-1]).named_parameters()
            if n == "weight"
        )
        norm = (
            [f"{names[-1]}.{n}" for n, _ in model.get_submodule(names[-1]).named_parameters()]
            if plain
            else []
        )
        (matrix,) = [f"{name}.weight" for name, module in model.named_modules() if module is head]
        return {"head": matrix, "head_norm": tuple(norm)}


def _permutations(sizes: Mapping[str, int], axes: set[str]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """For each axis, a permutation of it: kv groups move whole, with their query heads reordered inside."""
    rng = np.random.default_rng(0)
    for axis in (HIDDEN, FFN, MOE_FFN, EXPERTS, EMBEDDING, VOCAB, LABELS):
        if axis in axes:
            fixed = SPECIAL if axis == VOCAB else 0  # RoBERTa counts positions by where the padding id stands
            yield axis, {axis: np.r_[:fixed, fixed + rng.permutation(sizes[axis] - fixed)]}
    kv_heads = sizes[KV_HEADS]
    groups = rng.permutation(kv_heads)
    inside = np.stack([rng.permutation(sizes[HEADS] // kv_heads) for _ in groups])
    yield HEADS, {KV_HEADS: groups, HEADS: (groups[:, None] * inside.shape[1] + inside).ravel()}


def _moved_by(proof: Callable[[], float]) -> float:
    """What a proof finds; infinity where the layout does not even give tensors of the right shape."""
    try:
        return proof()
    except (RuntimeError, ValueError, IndexError):
        return float("inf")


def _permuted(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    inferred: Inferred,
    tokens: Tensor,
    output: Tensor,
    maps: Mapping[str, np.ndarray],
) -> float:
    """How far the output moves when these axes are permuted."""
    sizes = sizes_of(inferred.miniature)
    model.load_state_dict(_transferred(state, inferred, sizes, sizes, maps), strict=False)
    return _distance(_run(model, tokens, maps), _follow(output, maps))


def _duplicated(
    model_class: type[PreTrainedModel],
    inferred: Inferred,
    axes: set[str],
    state: Mapping[str, Tensor],
    tokens: Tensor,
    output: Tensor,
) -> float:
    """How far the output moves when every channel, neuron and head is there twice, its reading shared one to two.

    Uneven shares tell the sides apart: weighting the copies on the side that writes would change each of them.
    """
    config = inferred.miniature
    sizes = sizes_of(config)
    twice = [axis for axis in (HIDDEN, FFN, MOE_FFN, EMBEDDING, HEADS, KV_HEADS) if axis in sizes]
    target_config = resize(config, {axis: 2 * sizes[axis] for axis in twice})
    target = sizes_of(target_config)
    maps = {axis: np.arange(target[axis]) % sizes[axis] for axis in twice if axis in axes or axis == HIDDEN}
    model = _build(model_class, target_config)
    _same_constants(_build(model_class, config), model)
    doubled = _transferred(state, inferred, sizes, target, maps)
    for name, tensor in doubled.items():
        for at, dim in enumerate(parse(inferred.layouts[generic(name, inferred.stacks)[0]])):
            if axis := next((axis for axis in dim.axes if dim.reads and axis in maps), None):
                second = torch.from_numpy(coordinates(dim, target)[axis]) >= sizes[axis]
                share = torch.where(second, 4 / 3, 2 / 3)  # `select` halved both
                tensor = tensor * share.view([-1 if d == at else 1 for d in range(tensor.ndim)])
        doubled[name] = tensor
    model.load_state_dict(doubled, strict=False)
    return _distance(_run(model, tokens), output)


def _same_constants(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """An embedding's scale may be computed from the width (Gemma); widening must not change it here."""
    for name, module in source.named_modules():
        if hasattr(module, "embed_scale"):
            target.get_submodule(name).embed_scale = module.embed_scale


def _transferred(
    state: Mapping[str, Tensor],
    inferred: Inferred,
    source: Mapping[str, int],
    target: Mapping[str, int],
    maps: Mapping[str, np.ndarray],
) -> dict[str, Tensor]:
    return {
        name: select(tensor, parse(inferred.layouts[generic(name, inferred.stacks)[0]]), source, target, maps)
        for name, tensor in state.items()
    }


@contextlib.contextmanager
def _plain_arithmetic(config: PreTrainedConfig) -> Iterator[None]:
    """Float64 throughout, and head slopes of zero where a family gives each head its own.

    One thread: a miniature's matrices are too small to share, and on a busy machine sharing costs seconds.
    """
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]), torch.no_grad():
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


def _build(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    config = type(config).from_dict(config.to_dict())
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return model_class(config).to(torch.float64).eval()


def _perturbed(model: PreTrainedModel) -> PreTrainedModel:
    """Weights of a size at which every parameter matters: gains and biases too, which start at one and zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        scale = 0.3 if parameter.ndim < 2 else 1.0 / parameter.shape[-1] ** 0.5
        parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


def _tokens(vocab: int) -> Tensor:
    return torch.randint(SPECIAL, vocab, (2, 9), generator=torch.Generator().manual_seed(1))


def _run(model: PreTrainedModel, tokens: Tensor, maps: Mapping[str, np.ndarray] | None = None) -> Tensor:
    """The first output, logits where the class has them; the tokens renumbered as the vocabulary was."""
    if maps and VOCAB in maps:
        tokens = torch.from_numpy(np.argsort(maps[VOCAB]))[tokens]
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0]


def _follow(output: Tensor, maps: Mapping[str, np.ndarray]) -> Tensor:
    """The output as it must come after a permutation: classes move with it, states without a head with `hidden`."""
    for axis_map in maps.values():
        if output.shape[-1] == len(axis_map):
            return output[..., torch.from_numpy(axis_map)]
    return output


def _distance(one: Tensor, other: Tensor) -> float:
    if (
        one.shape[-1] == 2 * other.shape[-1]
    ):  # a class without a head returns the doubled residual stream itself
        other = torch.cat([other, other], -1)
    return float((one - other).abs().max() / other.abs().max())
