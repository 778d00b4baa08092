"""From sums to averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hf_ws.axes import HIDDEN, kind_of
from hf_ws.errors import CalibrationError
from hf_ws.evidence.record import PER_AXIS, Evidence, Key, Moments, layer_of
from hf_ws.evidence.sites import Site, by_axis
from hf_ws.evidence.sums import Sums, mirrored


def finish(
    sums: Sums,
    seen: Iterable[Site],
    sizes: Mapping[str, int],
    wants: tuple[str, ...],
    fingerprint: Mapping[str, str],
) -> Evidence:
    """The averages.

    Raises:
        CalibrationError: no token was left by the attention masks, no block ran, or something is not finite.
    """
    sites = [site for site in seen if f"count|{site.key}" in sums]
    if sites and not any(sums.number(f"count|{site.key}") for site in sites):
        raise CalibrationError("the attention_mask of the calibration data leaves no token; give some text")
    if not sites:
        raise CalibrationError(
            "nothing that is watched ran on the calibration data: it is not what this model takes, or the class has no "
            "layers that are counted (ALBERT); then leave calibration out"
        )
    for key, total in sums.items():
        # A square of moments is finite where its diagonal is, which is read at once.
        if torch.isfinite(total.diagonal() if total.ndim == 2 else total).all():
            continue
        name = key.partition("|")[2].partition(":")[0]
        raise CalibrationError(
            f"the source gives numbers that are not finite on the calibration data, first seen at {name}: a weight is "
            "not finite, or its type is too narrow for what it computes; check it, and load float16 in float32"
        )
    return Evidence(
        wants=wants,
        fingerprint=fingerprint,
        statistics={name: _statistic(name, sums, sites, sizes) for name in PER_AXIS if name in wants},
        moments=_moments(sums) if "moments" in wants else {},
        similarity={
            layer_of(key): float(total) / max(sums.number(f"cosines|{key}"), 1.0)
            for key, total in sums.under("cosine").items()
        },
        angles={
            axis: total / max(sums.number(f"angles|{axis}"), 1.0)
            for axis, total in sums.under("angle").items()
        },
        routes=_per_sent(sums, "routed"),
        route_weights=_per_sent(sums, "weighted"),
    )


def _statistic(name: str, sums: Sums, sites: Iterable[Site], sizes: Mapping[str, int]) -> dict[Key, Tensor]:
    """One statistic by axis and layer; where several matrices of a layer read an axis, over all they read."""
    totals: dict[Key, Tensor] = {}
    counts: dict[Key, float] = {}
    for site in sites:
        count = sums.number(f"count|{site.key}")
        mean = _of_site(name, sums, site, count, sizes)
        if mean is not None:
            key = (site.axis, site.layer)
            totals[key] = totals.get(key, torch.zeros_like(mean)) + mean * count
            counts[key] = counts.get(key, 0.0) + count
    found = {key: total / max(counts[key], 1.0) for key, total in totals.items()}
    if name == "rms":
        found = {key: values.sqrt() for key, values in found.items()}
    streams: dict[str, list[Tensor]] = {}
    for (axis, _), values in found.items():
        if kind_of(axis) == HIDDEN:
            streams.setdefault(axis, []).append(values)
    return found | {(axis, None): torch.stack(blocks).sum(0) for axis, blocks in streams.items()}


def _of_site(name: str, sums: Sums, site: Site, count: float, sizes: Mapping[str, int]) -> Tensor | None:
    """What is averaged over the tokens of one site: float64 [size of its axis]; None if it was not seen."""
    if name == "taylor":
        total = sums.get(f"taylor|{site.key}")
        return None if total is None else total / max(count, 1.0)
    mean = {
        word: total / max(count, 1.0)
        for word in ("abs", "sum", "square")
        if (total := sums.get(f"{word}|{site.key}")) is not None
    }
    values = {
        "mean_abs": lambda: mean["abs"],
        "mean": lambda: mean["sum"],
        "rms": lambda: mean["square"],
        "variance": lambda: (mean["square"] - mean["sum"].square()).clamp(min=0),
    }[name]()
    return by_axis(values, site.dim, site.axis, sizes)


def _moments(sums: Sums) -> dict[str, Moments]:
    """By parameter; one whose reads were not always shared with the same others is left out."""
    found: dict[str, Moments] = {}
    reads: dict[str, dict[str, Tensor]] = {}
    for key, times in sums.under("read").items():
        parameter, _, by = key.partition("|")
        reads.setdefault(parameter, {})[by] = times
    for by, second in sums.under("second").items():
        count = sums.number(f"tokens|{by}")
        mean = sums[f"first|{by}"] / max(count, 1.0)
        found[by] = Moments(
            count, mean, mirrored(second.div_(max(count, 1.0))).float()
        )  # in place: they are large
    return {
        parameter: found[by]
        for parameter, bys in reads.items()
        for by, times in bys.items()
        if len(bys) == 1 and torch.equal(times, reads[by][by])
    }


def _per_sent(sums: Sums, word: str) -> dict[int | str, Tensor]:
    return {
        layer_of(key): total / max(sums.number(f"sent|{key}"), 1.0) for key, total in sums.under(word).items()
    }
