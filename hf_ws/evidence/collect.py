"""The hooks of calibration: what they see goes into `Sums`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ws.evidence import sites
from hf_ws.evidence.fused import See, watched
from hf_ws.evidence.masks import Masks, encoder_of, masks_of
from hf_ws.evidence.sites import Site
from hf_ws.evidence.sums import Sums, add_square, zeros
from hf_ws.layouts import Certificate
from hf_ws.sizes import sizes_of

RECENT = 4  # tensors that are remembered, to know again what several matrices read
PIECE = 2**17  # numbers that are added up at a time on a CPU
SAMPLE = 256  # tokens of a batch whose angles are taken


class Collector:
    """A context manager: while it lasts, every forward pass of `model` adds to `sums`."""

    def __init__(
        self, model: PreTrainedModel, certificate: Certificate, wants: tuple[str, ...], sums: Sums
    ) -> None:
        self.only_last = False
        """Whether the head is to see the last token alone: its input is counted, its logits are not looked at."""
        self.leaves: list[Tensor] = []
        """Where gradients begin in the batch that runs, if they are wanted."""
        self._model, self._certificate, self.wants, self.sums = model, certificate, wants, sums
        self.sees_head = certificate.head in sites.inputs(model, certificate).values()
        """Whether what the head reads has moments."""
        self._sizes = sizes_of(model.config)
        self._masks = Masks(None, None)
        self._encodes, self._encoded = False, None  # whether the encoder runs, and what it gave
        self._hooks: list[Any] = []
        self._fused = ExitStack()
        self._recent: list[tuple[Tensor, str]] = []
        self._boundaries: dict[str, list[Tensor]] = {}
        self._routes: dict[int | str, tuple[str, Tensor, Tensor | None]] = {}
        self._told: set[int | str] = set()  # layers whose experts are told which tokens are theirs

    def __enter__(self) -> None:
        modules = dict(self._model.named_modules())
        if (encoder := encoder_of(self._model)) is not None:
            self._hooks.append(encoder.register_forward_pre_hook(self._begin_encoding))
            self._hooks.append(encoder.register_forward_hook(self._end_encoding))
        for name, own in sites.readers(self._model, self._certificate).items():
            self._before(modules[name], self._reader(own))
        fused = sites.fused(self._model, self._certificate)
        shown = {modules[name]: self._expert(site, f"{name}.down_proj") for name, site in fused.items()}
        self._fused.enter_context(watched(shown))
        for name, (site, counts) in sites.blocks(self._model, self._certificate).items():
            hook = modules[name].register_forward_hook(self._block(site, counts), with_kwargs=True)
            self._hooks.append(hook)
        if "moments" in self.wants:
            for name, parameter in sites.inputs(self._model, self._certificate).items():
                gain = getattr(modules[name], "weight", None)
                width = len(gain) if isinstance(gain, Tensor) and gain.ndim == 1 else None
                self._before(modules[name], self._input(parameter, width))
        if "routes" in self.wants:
            for name, (axis, layer) in sites.experts(self._model, self._certificate).items():
                hook = modules[name].register_forward_pre_hook(self._routed(axis, layer), with_kwargs=True)
                self._hooks.append(hook)
            for name, (axis, layer) in sites.routers(self._model, self._certificate).items():
                self._hooks.append(modules[name].register_forward_hook(self._chosen(axis, layer)))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._fused.close()
        self.end_batch()

    def begin_batch(self, inputs: Mapping[str, Tensor]) -> None:
        """Know which tokens of the batch are padding."""
        self._masks = masks_of(self._model, inputs)

    def end_batch(self) -> None:
        """Let go of the batch's tensors, the angles between the boundaries taken."""
        for layer, route in self._routes.items():
            if layer not in self._told:
                self._add_routes(layer, *route)
        self._routes.clear()
        for counts, streams in self._boundaries.items():
            self._angles(counts, streams)
        self._recent, self._boundaries, self.leaves = [], {}, []
        self._encodes, self._encoded = False, None

    def _begin_encoding(self, *_: object) -> None:
        self._encodes = True

    def _end_encoding(self, _: nn.Module, __: Any, output: Any) -> None:
        self._encodes, self._encoded = False, output[0]

    def _before(self, module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> None:
        """See the first input of a module; what `see` returns takes its place."""

        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            first = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
            if not isinstance(first, Tensor) or (other := see(first)) is None:
                return None
            if args:
                return (other, *args[1:]), kwargs
            return args, {key: other if value is first else value for key, value in kwargs.items()}

        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _kept(self, places: Sequence[int], values: Tensor | None = None) -> Tensor | None:
        """Which of the tokens at these places are no padding; None where all are, or no mask is theirs."""
        read_across = values is not None and values is self._encoded
        return self._masks.among(places, self._encodes or read_across)

    def _rows(self, values: Tensor) -> Tensor:
        """[tokens, width], padding left out."""
        flat = values.detach().reshape(-1, values.shape[-1])
        kept = self._kept(values.shape[:-1], values)
        return flat if kept is None else flat[kept.to(flat.device)]

    def _flat(self, values: Tensor) -> Tensor:
        """The same in float32, if it was less."""
        return _wide(self._rows(values))

    # ------------------------------------------------------------------------------------------ along an axis

    def _reader(self, own: tuple[Site, ...]) -> Callable[[Tensor], Tensor | None]:
        def see(values: Tensor) -> Tensor | None:
            leaf = self._leaf(values)
            for site in own:
                self._add(site, values if leaf is None else leaf)
            return leaf

        return see

    def _expert(self, site: Site, parameter: str) -> See:
        """Neurons of a layer's experts: all these are one site, and one `parameter` reads them."""

        def see(values: Tensor, tokens: Tensor, count: int) -> Tensor | None:
            leaf, kept = self._leaf(values), self._kept((count,))

            def rows(values: Tensor) -> Tensor:
                return values.detach() if kept is None else values.detach()[kept.to(tokens.device)[tokens]]

            self._add(site, values if leaf is None else leaf, rows)
            if "moments" in self.wants:
                self._add_moments(parameter, rows(values))
                self.sums.add(f"read|{parameter}|{parameter}", 1.0)
            return leaf

        return see

    def _leaf(self, values: Tensor) -> Tensor | None:
        """In place of these values, where gradients begin: at the first watched. None where they began before."""
        if "taylor" not in self.wants or values.requires_grad:
            return None
        leaf = values.detach().requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def _add(self, site: Site, values: Tensor, rows_of: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add what is seen at a site; `rows_of` takes [tokens, width] without padding out of it, or of its gradient."""
        rows_of = rows_of or self._rows
        rows, wants = rows_of(values), {*self.wants}
        self.sums.add(f"count|{site.key}", float(len(rows)))
        totals = {"abs": rows.new_zeros(rows.shape[1], dtype=torch.float64)}
        totals |= {"sum": totals["abs"].clone()} if {"mean", "variance"} & wants else {}
        totals |= {"square": totals["abs"].clone()} if {"rms", "variance"} & wants else {}
        for wide in _pieces(rows):
            if "sum" in totals:
                totals["sum"] += wide.sum(0)
            if "square" in totals:
                totals["square"] += wide.square().sum(0)
            totals["abs"] += wide.abs().sum(0)
        for word, total in totals.items():
            self.sums.add(f"{word}|{site.key}", total.cpu())
        if "taylor" in self.wants and values.requires_grad:
            values.register_hook(lambda gradient: self._add_taylor(site, rows, rows_of(gradient)))

    def _add_taylor(self, site: Site, rows: Tensor, gradient: Tensor) -> None:
        """|sum of a dL/da|, the sum over what belongs to an index: of a head, over its channels."""
        product = _wide(rows).mul(_wide(gradient))
        if site.dim.expression != site.axis:
            place = sites.place(site.dim, site.axis, self._sizes).to(product.device)
            summed = product.new_zeros(len(product), self._sizes[site.axis])
            product = summed.index_add_(1, place[place >= 0], product[:, place >= 0])
        self.sums.add(f"taylor|{site.key}", product.abs().sum(0, dtype=torch.float64).cpu())

    # ------------------------------------------------------------------------------------------ blocks

    def _block(self, site: Site, counts: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            width = self._sizes[site.axis]
            after = _stream(output[0] if isinstance(output, tuple | list) else output, width)
            if after is None:
                return
            self._add(site, after)
            before = _stream(args[0] if args else kwargs.get("hidden_states"), width)
            if before is not None and before.shape == after.shape:
                self._compare(site, counts, before, after)

        return hook

    def _compare(self, site: Site, counts: str, before: Tensor, after: Tensor) -> None:
        """How far one block turns the stream."""
        if "similarity" in self.wants:
            cosines = torch.cosine_similarity(self._flat(before), self._flat(after), dim=-1)
            self.sums.add(f"cosine|{site.layer}", cosines.sum(dtype=torch.float64).cpu())
            self.sums.add(f"cosines|{site.layer}", float(len(cosines)))
        if "angles" in self.wants:
            streams = self._boundaries.setdefault(counts, [])
            streams += [self._sample(before)] * (not streams) + [self._sample(after)]

    def _sample(self, values: Tensor) -> Tensor:
        """Evenly spread tokens of the batch as unit vectors, float64 [tokens, width]."""
        flat = self._flat(values)
        step = -(-len(flat) // SAMPLE)
        return torch.nn.functional.normalize(flat[::step].double(), dim=-1)

    def _angles(self, counts: str, streams: list[Tensor]) -> None:
        """The angle between the streams at every two boundaries of a stack, as a share of pi."""
        if len(streams) != self._sizes[counts] + 1 or len({len(stream) for stream in streams}) > 1:
            return  # a stack that runs more than once, or not whole
        stacked = torch.stack(streams, 1).cpu()  # [tokens, boundaries, width]
        cosines = (stacked @ stacked.mT).clamp(-1, 1)
        self.sums.add(f"angle|{counts}", (cosines.arccos() / torch.pi).sum(0))
        self.sums.add(f"angles|{counts}", float(len(stacked)))

    # ------------------------------------------------------------------------------------------ moments, routes

    def _input(self, parameter: str, width: int | None) -> Callable[[Tensor], Tensor | None]:
        """Second moments of what a module reads, once for all that read the same tensor; of a norm of this width.

        `read|one|other` counts how often parameter `one` read what was counted under `other`.
        """
        head = parameter == self._certificate.head

        def see(values: Tensor) -> Tensor | None:
            by = next((by for known, by in self._recent if known is values), None)
            if by is None:
                seen = values if width is None else _stream(values, width)
                if seen is None:
                    return None
                self._add_moments(by := parameter, self._rows(seen))
                self._recent = [(values, parameter), *self._recent[: RECENT - 1]]
            self.sums.add(f"read|{parameter}|{by}", 1.0)
            return values[:, -1:] if head and self.only_last else None

        return see

    def _add_moments(self, key: str, rows: Tensor) -> None:
        flat = _wide(rows)
        self.sums.add(f"tokens|{key}", float(len(flat)))
        self.sums.add(f"first|{key}", torch.stack([wide.sum(0) for wide in _pieces(flat)]).sum(0).cpu())
        if f"second|{key}" not in self.sums:
            self.sums[f"second|{key}"] = zeros(flat.shape[1], flat.dtype)
        add_square(self.sums[f"second|{key}"], flat, rows.dtype)

    def _routed(self, axis: str, layer: int | str) -> Callable[..., None]:
        """Which experts the tokens go to: fused experts are told so, [tokens, chosen], and with which weights."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [v for v in (*args[1:], *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 2]
            chosen = next((v for v in given if not v.is_floating_point() and v.dtype != torch.bool), None)
            if chosen is None:
                return
            weights = next((v for v in given if v.is_floating_point() and v.shape[0] == len(chosen)), None)
            self._told.add(layer)
            self._add_routes(layer, axis, chosen, weights)

        return hook

    def _chosen(self, axis: str, layer: int | str) -> Callable[..., None]:
        """The same of a router that gives every expert's weight, zero where it is not chosen (Llama 4)."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            weights = output[0] if isinstance(output, tuple) else output
            if isinstance(weights, Tensor) and weights.ndim == 2 and weights.shape[1] == self._sizes[axis]:
                count = int((weights != 0).sum(1).max())
                if count < self._sizes[axis]:  # else these are no choices
                    self._routes[layer] = (axis, weights.detach().topk(count).indices, weights.detach())

        return hook

    def _add_routes(self, layer: int | str, axis: str, chosen: Tensor, weights: Tensor | None) -> None:
        """Tokens' experts [tokens, chosen], and their weights, likewise or of every expert; padding is left out."""
        size, among = self._sizes[axis], self._kept((len(chosen),))
        kept = torch.ones(len(chosen), dtype=torch.bool) if among is None else among.cpu()
        index = chosen.detach().cpu()[kept].long()
        weights = None if weights is None else weights.detach().cpu()[kept]
        routed, weighted = torch.zeros(
            2, size + 1, dtype=torch.float64
        )  # some classes use one more for "none"
        flat = index.flatten().clamp(max=size)
        routed.index_add_(0, flat, torch.ones(len(flat), dtype=torch.float64))
        if weights is not None:
            if weights.shape[1] == size:  # of every expert, not only of those chosen
                weights = weights.gather(1, index.clamp(max=size - 1))
            weighted.index_add_(0, flat, weights.flatten().double())
        self.sums.add(f"routed|{layer}", routed[:size].clone())
        self.sums.add(f"weighted|{layer}", weighted[:size].clone())
        self.sums.add(f"sent|{layer}", float(len(index)))


def _pieces(rows: Tensor) -> Iterator[Tensor]:
    """The rows [tokens, width] in float64, as many at a time as stay in the cache: a whole batch takes twenty times as
    long, and much memory."""
    size = len(rows) if rows.is_cuda else PIECE // rows.shape[1]
    return (piece.double() for piece in rows.split(max(size, 1)))


def _wide(rows: Tensor) -> Tensor:
    """In float32, if it was less."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _stream(values: Any, width: int) -> Tensor | None:
    """A stream of this width with its channels last, as pictures in convolutional nets have them second; or None."""
    if not isinstance(values, Tensor) or values.ndim < 2:
        return None
    if values.shape[-1] == width:
        return values
    return values.movedim(1, -1) if values.ndim == 4 and values.shape[1] == width else None
