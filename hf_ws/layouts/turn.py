"""Which streams may be turned: where another basis of the residual stream leaves the function as it was.

A norm's gain stands in the way of a rotation, for it belongs to single channels. It moves into the matrices that read
the norm's output; what is left of the norm commutes with every orthonormal map (RMSNorm), or with those that
leave the channels' mean alone (LayerNorm). Which matrices read which norm is seen by following tensors through a
miniature; that nothing was overlooked is proven by turning it at random: in float64 the output must stay.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws.axes import HIDDEN, parse
from hf_ws.errors import UnsupportedArchitectureError
from hf_ws.layouts import run
from hf_ws.layouts.bench import TOLERANCE
from hf_ws.layouts.certify import Certificate, anchored
from hf_ws.layouts.infer import tensors_of
from hf_ws.layouts.layer_scale import layer_scales
from hf_ws.layouts.miniature import inputs, miniatures
from hf_ws.layouts.norms import centres, eps_of, is_norm, offset_of
from hf_ws.layouts.outputs import distance
from hf_ws.layouts.select import Sides, select
from hf_ws.layouts.stacks import generic
from hf_ws.maps import Fold
from hf_ws.sizes import nodes, resize, sizes_of


@dataclass(frozen=True)
class Turning:
    """How a stream is turned, and the proof that it may be."""

    axis: str
    folds: Mapping[str, Fold]
    """By the norm's gain, layer numbers written `*`."""
    centred: bool
    """Whether the norms take out the mean over channels: then that direction stays, and the others turn."""
    error: float
    """What a random rotation moved the output by, as a share of its largest value."""


_TURNINGS: dict[tuple[type[PreTrainedModel], str, str], Turning] = {}


def turning(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, certificate: Certificate, axis: str = HIDDEN
) -> Turning:
    """How the residual stream `axis` of `model_class(config)` is turned; remembered.

    Raises:
        UnsupportedArchitectureError: it cannot be, with the reason.
    """
    key = (model_class, json.dumps(config.to_dict(), sort_keys=True, default=str), axis)
    if key not in _TURNINGS:
        small = resize(miniatures(model_class, config)[0], {}, None, **_untied(config))
        with run.plain_arithmetic(small):
            _TURNINGS[key] = _proven(model_class, small, anchored(certificate, model_class, small), axis)
    return _TURNINGS[key]


_UNTIED: dict[tuple[type[PreTrainedModel], str], bool] = {}


def can_be_untied(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether a model of this tied config does the same with a head of its own that equals the embedding; remembered.

    Not where the config class ties it again (T5), or the class scales what a tied head reads (Switch Transformers).
    """
    key = (model_class, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _UNTIED:
        # What miniatures switch off, and a class may decide together with the tie.
        own = {
            name: value
            for name in ("scale_decoder_outputs",)
            if (value := getattr(config, name, None)) is not None
        }
        tied, apart = (
            resize(miniatures(model_class, config)[0], {}, None, tie_word_embeddings=flag, **own)
            for flag in (True, False)
        )
        if getattr(type(apart).from_dict(apart.to_dict()), "tie_word_embeddings", False):
            _UNTIED[key] = False
        else:
            with run.plain_arithmetic(tied):
                one, other = run.perturbed(run.build(model_class, tied)), run.build(model_class, apart)
                other.load_state_dict(one.state_dict(), strict=False)
                given = inputs(one)
                _UNTIED[key] = distance(run.run(other, given), run.run(one, given), {}) <= TOLERANCE
    return _UNTIED[key]


def _untied(config: PreTrainedConfig) -> dict[str, bool]:
    tied = any(getattr(node, "tie_word_embeddings", False) for _, node in nodes(config))
    return {"tie_word_embeddings": False} if tied else {}


def _proven(
    model_class: type[PreTrainedModel], small: PreTrainedConfig, certificate: Certificate, axis: str
) -> Turning:
    name = model_class.__name__
    model = run.perturbed(run.build(model_class, small))
    size = sizes_of(small)[axis]
    given = inputs(model)
    found = _followed(model, given, certificate, axis)
    wanted = {key: value for key, value in run.run(model, given).items() if size not in value.shape}
    if not wanted:
        raise UnsupportedArchitectureError(
            f"{name}: {axis} cannot be turned, it is what the class gives out: another basis would mean other outputs"
        )
    sides = random_turn(size, found.centred, torch.Generator().manual_seed(0))
    state = {key: tensor.detach().clone() for key, tensor in tensors_of(model).items()}
    try:
        run.load(model, _turned_state(state, found, certificate, sizes_of(small), sides))
        error = distance({k: v for k, v in run.run(model, given).items() if k in wanted}, wanted, {})
    except (ValueError, RuntimeError) as problem:
        raise UnsupportedArchitectureError(f"{name}: {axis} cannot be turned: {problem}") from problem
    if not error <= TOLERANCE:
        raise UnsupportedArchitectureError(
            f"{name}: {axis} cannot be turned, a random rotation moved the output by {error:.1e}: something acts on "
            "single channels of the stream; often it is a norm after the residual sum, or on what a block adds to it"
        )
    return replace(found, error=error)


def _turned_state(
    state: Mapping[str, Tensor],
    found: Turning,
    certificate: Certificate,
    sizes: Mapping[str, int],
    sides: Sides,
) -> dict[str, Tensor]:
    """A miniature's tensors in another basis of the same length."""
    norms = {generic(name, certificate.stacks): tensor for name, tensor in state.items()}
    made = {}
    for name, tensor in state.items():
        pattern, layer = generic(name, certificate.stacks)

        def gain(norm: str, layer: int | str | None = layer) -> Tensor | None:
            return norms.get((norm, layer), norms.get((norm, None)))

        value, own = turned(tensor, pattern, found.folds, sides, gain, lambda _: 1.0)
        layout = parse(certificate.layouts[pattern])
        made[name] = select(tensor, layout, sizes, sizes, {found.axis: own}) if value is None else value
    return made


def random_turn(size: int, centred: bool, generator: torch.Generator) -> Sides:
    """A random rotation of a stream [size, size]; one that leaves the mean over channels alone if `centred`."""
    free = size - centred
    square = torch.linalg.qr(torch.randn(free, free, generator=generator, dtype=torch.float64))[0].numpy()
    if centred:
        square = with_mean(zero_mean_basis(size) @ square, zero_mean_basis(size))
    return square, square


def with_mean(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The map [target length, source length] that takes the columns of `source` to those of `target`, all of zero
    mean, and the mean direction of the one to that of the other."""
    mean = np.full((len(target), len(source)), 1.0 / np.sqrt(len(target) * len(source)))
    return np.asarray(target @ source.T + mean)


def zero_mean_basis(size: int) -> np.ndarray:
    """Orthonormal columns [size, size - 1] that span all vectors whose mean is zero (Helmert's)."""
    basis = np.zeros((size, size - 1))
    for column in range(size - 1):
        basis[: column + 1, column] = 1.0
        basis[column + 1, column] = -(column + 1.0)
        basis[:, column] /= np.sqrt((column + 1.0) * (column + 2.0))
    return basis


def _followed(
    model: PreTrainedModel, given: Mapping[str, Tensor], certificate: Certificate, axis: str
) -> Turning:
    """The norms of a stream and what reads each, seen by following their outputs through a run."""
    norms: dict[str, nn.Module] = {}
    readers: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        gain = parse(certificate.layouts.get(certificate.pattern(f"{name}.weight"), ""))
        if is_norm(module) and not [*module.children()]:
            bare = not dict(module.named_parameters())
            if bare or (len(gain) == 1 and gain[0].expression == axis):
                norms[name] = module
    for name in dict(model.named_parameters()):
        layout = parse(certificate.layouts.get(certificate.pattern(name), ""))
        owner = name.rpartition(".")[0]
        if any(dim.reads and axis in dim.axes for dim in layout):
            readers.setdefault(owner, []).append(name)
    written: dict[int, tuple[str, Tensor]] = {}
    read: dict[str, set[str]] = {owner: set() for owner in readers}

    def note(owner: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            places = [value.untyped_storage().data_ptr() for value in seen]  # of one token's too
            read[owner] |= {written[place][0] for place in places if place in written}

        return hook

    def keep(owner: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            place = output.untyped_storage().data_ptr()
            written[place] = (owner, output)  # kept, so that its place is not given to another

        return hook

    hooks = [module.register_forward_hook(keep(owner)) for owner, module in norms.items()]
    hooks += [
        model.get_submodule(owner).register_forward_pre_hook(note(owner), with_kwargs=True)
        for owner in readers
    ]
    run.run(model, given)
    for hook in hooks:
        hook.remove()
    for owner in read:
        top = owner.partition(".")[0]
        if not any(own for other, own in read.items() if other == owner or other.startswith(f"{top}.")):
            read[owner] = {norm for norm in norms if _follows(model, given, owner, norm)}
    folds: dict[str, Fold] = {}
    size = sizes_of(model.config)[axis]
    for owner, module in norms.items():
        pattern, layer = generic(f"{owner}.weight", certificate.stacks)
        own = [name for reader, names in readers.items() for name in names if _reads(reader, owner, read)]
        about = {generic(name, certificate.stacks) for name in own}
        if any(place is not None and place != layer for _, place in about) and layer is not None:
            raise UnsupportedArchitectureError(
                f"{type(model).__name__}: {axis} cannot be turned, {own[0]} reads the norm of another layer ({owner})"
            )
        before = folds[pattern].readers if pattern in folds else ()  # layers of another kind have others
        patterns = tuple(sorted({name for name, _ in about}.union(before)))
        bias = certificate.pattern(f"{owner}.bias") if getattr(module, "bias", None) is not None else ""
        if patterns or getattr(module, "weight", None) is not None:  # a bare one may be of something else
            folds[pattern] = Fold(axis, patterns, bias, offset_of(module), eps_of(module, size))
    used = [
        module
        for owner, module in norms.items()
        if generic(f"{owner}.weight", certificate.stacks)[0] in folds
    ]
    scales = layer_scales(model, given, certificate, axis)
    folds |= {gain: Fold(axis, (), writers=writers) for gain, writers in scales.items()}
    return Turning(axis, folds, any(centres(module, size) for module in used), float("inf"))


def _follows(model: PreTrainedModel, given: Mapping[str, Tensor], reader: str, norm: str) -> bool:
    """Whether what a module reads is made of a norm's output and of nothing else, as tokens put side by side: then
    twice the one is twice the other."""
    seen: list[Tensor] = []
    reads = model.get_submodule(reader)
    hook = reads.register_forward_pre_hook(lambda _, args: seen.extend(one.clone() for one in args[:1]))
    run.run(model, given)
    double = model.get_submodule(norm).register_forward_hook(lambda _, __, output: 2 * output)
    run.run(model, given)
    hook.remove()
    double.remove()
    return len(seen) == 2 and bool(seen[0].any()) and torch.allclose(seen[1], 2 * seen[0], rtol=TOLERANCE)


def _reads(reader: str, norm: str, read: Mapping[str, set[str]]) -> bool:
    """Whether a matrix reads a norm's output: it was seen to, or all else in the smallest module about it does."""
    if read[reader]:
        return read[reader] == {norm}
    about = reader
    while about := about.rpartition(".")[0]:
        seen = set().union(*(own for other, own in read.items() if other.startswith(f"{about}.")))
        if seen:
            return seen == {norm}
    return False


def turned(
    tensor: Tensor,
    pattern: str,
    folds: Mapping[str, Fold],
    sides: Sides,
    gain: Callable[[str], Tensor | None],
    level: Callable[[str], float],
) -> tuple[Tensor | None, Sides]:
    """What folding the norms makes of a tensor: its value, mapped already, or None and how it is to be mapped.

    Args:
        tensor: The source's.
        pattern: Its name, the layer's number written `*`.
        folds: The norms of the stream, and its LayerScales.
        sides: The dense map of the stream.
        gain: Gives a norm's gain [source length] by its pattern, of the layer that the tensor is in; None for norms
            without one.
        level: Gives what a norm multiplies every channel by in the target.
    """
    if pattern in folds:
        return tensor.new_full((len(sides[0]),), level(pattern) - folds[pattern].offset), sides
    for norm, fold in folds.items():
        if pattern not in (fold.bias, *fold.readers, *fold.writers):
            continue
        own = gain(norm)
        by = level(norm) if own is None else own.double().cpu().numpy() + fold.offset
        if pattern in fold.writers:
            return None, (sides[0] * by, sides[1])
        if pattern in fold.readers:
            return None, (sides[0], sides[1] * by)
        return torch.from_numpy(_seen_as(tensor, sides[1] * by)), sides
    return None, sides


def unseen(bias: Tensor, gain: Tensor | float, sides: Sides) -> Tensor:
    """What of a norm's bias [source length] its readers no longer see, float64: theirs, if they have any, can say it.

    Args:
        bias: The source norm's.
        gain: What the readers' matrices are multiplied by, [source length] or one number.
        sides: The dense map of the stream.
    """
    read = sides[1] * (gain if isinstance(gain, float) else gain.double().cpu().numpy())
    return bias.double() - torch.from_numpy(read.T @ _seen_as(bias, read)).to(bias.device)


def _seen_as(bias: Tensor, read: np.ndarray) -> np.ndarray:
    """The readers see W diag(gain) R^T b'; of all b' the one for which that is W b, or nearest to it."""
    wanted = bias.double().cpu()[
        :, None
    ]  # by QR with pivots: a third of the time of numpy's, and gains may be zero
    found = torch.linalg.lstsq(torch.from_numpy(read).mT, wanted, rcond=1e-10, driver="gelsy")
    return np.asarray(found.solution[:, 0])
