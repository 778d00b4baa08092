"""Calibration: what a model's channels, heads and neurons do on real text, collected in one pass.

    evidence = calibrate(model, ["some text", "more text"], tokenizer=tokenizer)
    evidence["ffn", 3]                    # mean |activation| of each neuron of layer 3

The hooks are placed by layout, not by name: a linear module that reads `ffn` sees each neuron's activation, one that
reads `(heads head_dim)` each head's context; every block's output is the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_ws.axes import (
    FFN,
    HEADS,
    HIDDEN,
    MOE_FFN,
    POSITIONS,
    VOCAB,
    Dim,
    coordinates,
    kind_of,
    layer_key,
    parse,
)
from hf_ws.errors import CalibrationError
from hf_ws.layouts import Certificate, certify, generic
from hf_ws.sizes import sizes_of

Evidence = Mapping[tuple[str, int | str | None], Tensor]
"""Mean absolute activation, float64 [size], by axis and source layer (None: the whole net)."""

BLOCK, BATCH = 512, 8  # tokens in a calibration sequence made from text, and sequences in a forward pass


def calibrate(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    certificate: Certificate | None = None,
) -> Evidence:
    """Run `model` over `data` and average what it does.

    Under `accelerate launch` every process calls it with the same data, runs its share, and gets the same averages.

    Args:
        model: Run as it is, in evaluation mode, without gradients; left as it was.
        data: Token ids [sequences, tokens]; or a list of texts, or a `datasets` dataset with a `text` or an
            `input_ids` column; or any iterable of the model's keyword inputs. Padding is left out where an
            `attention_mask` says so.
        tokenizer: Needed for texts.
        certificate: The model's layouts, if they are at hand.

    Raises:
        CalibrationError: there is no data, or texts came without a tokenizer.
    """
    certificate = certificate or certify(type(model), model.config)
    collector = _Collector(model, certificate)
    longest = sizes_of(model.config)[POSITIONS] if POSITIONS in certificate.occurring else None
    # No logits are looked at: of one token they cost nothing, of all they are larger than everything else.
    spare = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), collector:
            batches = list(inputs_of(data, tokenizer, longest))
            for inputs in (
                batches
            ):  # all of them in every process: one that stopped alone would leave the others waiting
                check_ids(inputs.get("input_ids"), model.config, longest)
            rank, processes = _share()
            own = batches[rank::processes]
            for inputs in tqdm(own, desc="calibrating", unit="batch", delay=2, disable=rank > 0):
                collector.mask = inputs.get("attention_mask")
                moved = {name: value.to(model.device) for name, value in inputs.items()}
                model(**moved, **({} if "labels" in moved else spare))
    finally:
        for module, was in training.items():
            module.training = was
    collector.gather(processes)
    return collector.means()


def calibration_inputs(
    config: PreTrainedConfig, data: Any, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[dict[str, Tensor]]:
    """Calibration data in any of its forms as keyword inputs of the model, checked; args and errors of `calibrate`."""
    longest = sizes_of(config).get(POSITIONS)
    batches = list(inputs_of(data, tokenizer, longest))
    for inputs in batches:
        check_ids(inputs.get("input_ids"), config, longest)
    return batches


def _share() -> tuple[int, int]:
    """Which of how many processes this is."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def inputs_of(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, longest: int | None
) -> Iterator[dict[str, Tensor]]:
    """Keyword inputs of the model, one batch at a time."""
    if hasattr(data, "column_names"):
        columns = data.column_names or list(next(iter(data), {}))  # a stream may not know its own
        if "input_ids" not in columns and "text" not in columns:
            raise CalibrationError(
                f"the calibration dataset has columns {columns}; it needs text or input_ids"
            )
        column = "input_ids" if "input_ids" in columns else "text"
        data = [row[column] for row in data.select_columns(column)]
    if isinstance(data, str | Mapping):
        data = [data]
    if isinstance(data, list) and data and isinstance(data[0], str):
        data = _tokenize(data, tokenizer, longest)
    if isinstance(data, list) and data and not isinstance(data[0], Mapping):
        if not all(hasattr(row, "__len__") for row in data):
            raise CalibrationError(
                f"calibration data is a list that holds a {type(data[0]).__name__}; wanted are rows of token ids"
            )
        lengths = {len(row) for row in data}
        if len(lengths) > 1:
            data = [row[: min(lengths)] for row in data]
        data = torch.as_tensor(np.asarray(data))
    if isinstance(data, np.ndarray) and data.dtype != object:
        data = torch.as_tensor(data)
    if isinstance(data, Tensor):
        if data.ndim != 2 or not data.numel() or data.is_floating_point():
            raise CalibrationError(
                f"calibration token ids have shape {tuple(data.shape)} and type {data.dtype}; "
                "wanted are whole numbers [sequences, tokens], at least one of each"
            )
        yield from ({"input_ids": batch} for batch in data.long().split(BATCH))
        return
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"calibration data is a {type(data).__name__}; wanted are token ids, texts, a dataset or model inputs"
        )
    count = 0
    for inputs in data:
        if not isinstance(inputs, Mapping):
            raise CalibrationError(
                f"the calibration data gives a {type(inputs).__name__}; an iterable gives the model's inputs by name"
            )
        count += 1
        yield dict(inputs)
    if not count:
        raise CalibrationError(
            "the calibration data is empty; give at least one sequence, better a few dozen"
        )


def check_ids(ids: Any, config: PreTrainedConfig, longest: int | None) -> None:
    """Refuse token ids that the model has no embedding or no position for. Raises CalibrationError."""
    vocab = sizes_of(config).get(VOCAB, 0)
    if ids is not None and vocab and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise CalibrationError(
            f"calibration token ids run from {int(ids.min())} to {int(ids.max())}, the model knows 0 to {vocab - 1}; "
            "tokenize with the source's own tokenizer"
        )
    if ids is not None and longest is not None and ids.shape[-1] > longest:
        raise CalibrationError(
            f"calibration sequences have {ids.shape[-1]} tokens, the model knows {longest} positions; cut them"
        )


def _tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase | None, longest: int | None) -> Tensor:
    """Token ids [sequences, BLOCK], the texts end to end; one shorter row if there is less."""
    if tokenizer is None:
        raise CalibrationError(
            "calibration texts need a tokenizer, and the source has none; pass token ids instead"
        )
    ids = torch.tensor([i for row in tokenizer(texts, verbose=False)["input_ids"] for i in row])
    if not len(ids):
        raise CalibrationError("the calibration texts hold no tokens; give at least one sentence")
    block = min(BLOCK, len(ids), getattr(tokenizer, "model_max_length", BLOCK), longest or BLOCK)
    return ids[: len(ids) // block * block].view(-1, block).long()


class _Collector:
    """Sums of |activation| by axis and layer, from forward hooks; a context manager that removes them."""

    def __init__(self, model: PreTrainedModel, certificate: Certificate) -> None:
        self.mask: Tensor | None = None
        self._sums: dict[tuple[str, int | str | None], Tensor] = {}
        self._counts: dict[tuple[str, int | str | None], float] = {}
        self._model, self._certificate = model, certificate
        self._sizes = sizes_of(model.config)
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self._model.named_modules():
            pattern, layer = generic(f"{name}.weight", self._certificate.stacks)
            if isinstance(module, nn.Linear | Conv1D) and layer is not None:
                for dim in parse(self._certificate.layouts[pattern]):
                    self._watch(module, dim, layer)
            stack, _, number = name.rpartition(".")
            if stack in self._certificate.stacks and (stream := self._stream(stack)):
                layer = layer_key(self._certificate.stacks[stack], int(number))
                self._hooks.append(module.register_forward_hook(self._block_hook(stream, layer)))

    def _stream(self, stack: str) -> str | None:
        """The axis of the residual stream of a stack's layers."""
        for name, text in self._certificate.layouts.items():
            for dim in parse(text) if name.startswith(f"{stack}.*") else ():
                if isinstance(dim.expression, str) and kind_of(dim.expression) == HIDDEN:
                    return dim.expression
        return None

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _watch(self, module: nn.Module, dim: Dim, layer: int | str) -> None:
        for axis in dim.axes if dim.reads else ():
            if kind_of(axis) in (FFN, MOE_FFN, HEADS):

                def hook(_: nn.Module, inputs: tuple[Tensor, ...], axis: str = axis) -> None:
                    self._add((axis, layer), inputs[0], lambda v: by_axis(v, dim, axis, self._sizes))

                self._hooks.append(module.register_forward_pre_hook(hook))

    def _block_hook(self, axis: str, layer: int | str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            if isinstance(stream, Tensor) and stream.shape[-1] == self._sizes[axis]:
                self._add((axis, layer), stream, lambda v: v)

        return hook

    def _add(
        self, key: tuple[str, int | str | None], values: Tensor, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        flat = values.detach().abs().reshape(-1, values.shape[-1])
        count = float(len(flat))
        if self.mask is not None and self.mask.numel() == len(flat):
            kept = self.mask.reshape(-1).to(flat.device).bool()
            flat, count = flat[kept], float(kept.sum())
        added = reduce(flat.sum(0, dtype=torch.float64).cpu())
        self._sums[key] = self._sums.get(key, torch.zeros_like(added)) + added
        self._counts[key] = self._counts.get(key, 0.0) + count

    def gather(self, processes: int) -> None:
        """Add up what all processes saw, in the same order everywhere."""
        if processes == 1:
            return
        seen: list[Any] = [None] * processes
        dist.all_gather_object(seen, (self._sums, self._counts))
        self._sums, self._counts = {}, {}
        for sums, counts in seen:
            for key, total in sums.items():
                self._sums[key] = self._sums.get(key, torch.zeros_like(total)) + total
                self._counts[key] = self._counts.get(key, 0.0) + counts[key]

    def means(self) -> Evidence:
        means = {key: total / max(self._counts[key], 1.0) for key, total in self._sums.items()}
        if means and not any(self._counts.values()):
            raise CalibrationError(
                "the attention_mask of the calibration data leaves no token; give some text"
            )
        streams: dict[str, list[Tensor]] = {}
        for (axis, _), values in means.items():
            if kind_of(axis) == HIDDEN:
                streams.setdefault(axis, []).append(values)
        if not streams:
            raise CalibrationError("no block ran on the calibration data; is it what this model takes?")
        return means | {(axis, None): torch.stack(found).sum(0) for axis, found in streams.items()}


def by_axis(values: Tensor, dim: Dim, axis: str, sizes: Mapping[str, int]) -> Tensor:
    """`values` [length of `dim`], averaged over everything in the dimension but one axis: float64 [size]."""
    if dim.expression == axis:
        return values
    place = torch.from_numpy(coordinates(dim, sizes)[axis])
    present = place >= 0
    total = torch.zeros(sizes[axis], dtype=torch.float64).index_add_(
        0, place[present], values[present].double()
    )
    counts = torch.zeros(sizes[axis], dtype=torch.float64).index_add_(
        0, place[present], torch.ones(int(present.sum()), dtype=torch.float64)
    )
    return total / counts.clamp(min=1)
