"""Settle merged key/value heads: the one head that comes nearest to several, and what reads it instead of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_ws.axes import HEAD_DIM, HEADS, KV_HEADS, Product, kind_of, parse, sibling
from hf_ws.errors import PlanError
from hf_ws.evidence import Evidence
from hf_ws.layouts import Certificate
from hf_ws.layouts.irregular import rotary_pairs
from hf_ws.maps import AxisMap, Blocks, Dense, Gather, Merge
from hf_ws.plan import Plan
from hf_ws.sizes import owner
from hf_ws.store import Source

_ROLES = {"q": r"(.*_)?(q|query)(_.*)?", "k": r"(.*_)?(k|key)(_.*)?", "v": r"(.*_)?(v|value)(_.*)?"}
"""What modules are called that write queries, keys and values."""

_FLOOR = (
    1e-6  # what is read least is taken for this share of what is read most, lest it be divided by nothing
)


def settle_merge(
    plan: Plan,
    source: Source,
    certificate: Certificate,
    evidence: Evidence | None,
    key: str,
    maps: Mapping[str, AxisMap],
) -> dict[str, AxisMap]:
    """The maps of one layer's heads: what is written of queries, keys and values, and read of the context.

    Neighbouring heads with values v_g become one of values u, such that U_g u is nearest to v_g; u are the leading
    directions of all v_g together, and what reads the context of a head in group g reads U_g of it. With keys it is
    the same, and queries take U_g^T; but where rotary positions turn pairs of channels, only maps that commute with
    that will do: one complex number for each pair. Errors count as what reads them weighs them, so in what basis
    a head was stored makes no difference. With second moments of the layer's inputs at hand, they are over these.

    Args:
        plan: With the merge still open.
        source: Its weights are read.
        certificate: The source's.
        evidence: Its moments are taken where there are some.
        key: Of the merge, an axis in a layer.
        maps: Those of the plan, the query heads' settled.

    Raises:
        PlanError: queries, keys, values and output are not four matrices, or something stands between that does not
            commute, such as a norm of each head.
    """
    axis, _, scope = key.partition("@")
    merge = maps[key]
    assert isinstance(merge, Merge)
    part = _Part.of(plan, source, certificate, evidence, axis, scope)
    heads = maps.get(f"{sibling(axis, HEADS)}@{scope}", maps.get(sibling(axis, HEADS)))
    chosen = heads.index if isinstance(heads, Gather) else tuple(range(part.groups * part.width))
    several = merge.size // merge.keep
    pairs = rotary_pairs(owner(source.config, axis), part.channels)
    made: dict[str, list[Tensor]] = {"k": [], "v": []}
    read: dict[str, list[Tensor]] = {"q": [], "o": []}
    for first in range(0, merge.size, several):
        group = slice(first, first + several)
        values = _nearest(part.written("v")[group], part.reading("o")[group], part.moments)
        keys = (_nearest if pairs is None else _nearest_turned)(
            part.written("k")[group],
            part.reading("q")[group],
            part.moments,
            *(() if pairs is None else (pairs,)),
        )
        for name, reader, (own, theirs) in (("k", "q", keys), ("v", "o", values)):
            made[name].append(own)
            read[reader] += [theirs[g] for g in range(several)]
    settled: dict[str, AxisMap] = {}
    for role, of_heads in made.items():
        settled |= dict.fromkeys(
            part.keys(axis, role), Blocks(tuple(range(merge.size)), torch.stack(of_heads).float().numpy())
        )
    for role, of_groups in read.items():
        blocks = torch.stack([of_groups[h // part.width] for h in chosen])[:, None]
        settled |= dict.fromkeys(
            part.keys(sibling(axis, HEADS), role), Blocks(tuple(chosen), blocks.float().numpy())
        )
    shares = np.kron(np.eye(merge.keep), np.ones((1, several)))  # for whatever else there may be
    return settled | {
        key: Dense(shares / several, shares, by=f"least-squares merges of {several} neighbours of the")
    }


@dataclass(frozen=True)
class _Part:
    """One layer's attention: its matrices, by what they are."""

    weights: Mapping[str, Tensor]
    """Of q, k, v: [heads, channels, inputs and one for the bias]; of o: [heads, channels, outputs]. In float64."""
    names: Mapping[str, tuple[str, ...]]
    """The target's names of each matrix and its bias."""
    groups: int
    width: int
    """Query heads of a group."""
    moments: Tensor
    """Second moments of the inputs and one, or the identity."""

    @property
    def channels(self) -> int:
        return self.weights["k"].shape[1]

    def written(self, role: str) -> Tensor:
        """What the key/value heads write: [groups, channels, inputs]."""
        return self.weights[role]

    def reading(self, role: str) -> Tensor:
        """What the query heads of each group make of it: [groups, heads of it, channels, others]."""
        return self.weights[role].unflatten(0, (self.groups, self.width))

    def keys(self, axis: str, role: str) -> list[str]:
        return [f"{axis}@{name}" for name in self.names[role]]

    @classmethod
    def of(
        cls,
        plan: Plan,
        source: Source,
        certificate: Certificate,
        evidence: Evidence | None,
        axis: str,
        scope: str,
    ) -> _Part:
        sizes, inputs = plan.source_sizes, ""
        found: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        heads, head_dim = sibling(axis, HEADS), sibling(axis, HEAD_DIM)
        names: dict[str, list[str]] = {}
        for name, stored, pattern, layer in certificate.spelled(plan.layers):
            layout = parse(plan.layouts[pattern])
            if str(layer) != scope or not {axis, heads, head_dim} & {a for dim in layout for a in dim.axes}:
                continue
            role, text = _role(name, plan.layouts[pattern]), plan.layouts[pattern]
            (at, dim), *more = [(at, d) for at, d in enumerate(layout) if {axis, heads, head_dim} & {*d.axes}]
            own, bias = axis if role in ("k", "v") else heads, name.endswith(".bias") and len(layout) == 1
            plain = not more and dim.expression == Product((own, head_dim)) and len(layout) <= 2
            if role is None or not plain or role in (biases if bias else found) or layer is None:
                raise PlanError(
                    f"kv_merge='least_squares': {name} ({text}) is not one of four matrices of queries, keys, values "
                    "and output, or their bias; take kv_merge='mean', or None to select"
                )
            wide = source.tensor(stored).double().movedim(at, 0).reshape(sizes[own], sizes[head_dim], -1)
            (biases if bias else found)[role] = wide
            names.setdefault(role, []).append(name)
            inputs = stored if role == "k" and not bias else inputs
        if missing := {"q", "k", "v", "o"} - found.keys():
            raise PlanError(
                f"kv_merge='least_squares': layer {scope} has no matrix of its own for {', '.join(sorted(missing))} "
                "(of queries, keys, values and output); take kv_merge='mean', or None to select"
            )
        for role in ("q", "k", "v"):
            found[role] = torch.cat(
                [found[role], biases.get(role, torch.zeros_like(found[role][..., :1]))], dim=-1
            )
        groups = sizes[axis]
        moments = _moments(evidence, inputs, found["k"].shape[-1])
        return cls(found, {r: tuple(n) for r, n in names.items()}, groups, sizes[heads] // groups, moments)


def _role(name: str, text: str) -> str | None:
    """Whether a parameter writes queries, keys or values, or reads the context; by its place and its module's name."""
    if any(dim.reads and any(kind_of(a) in (HEADS, KV_HEADS) for a in dim.axes) for dim in parse(text)):
        return "o"
    module = name.split(".")[-2]
    return next((role for role, pattern in _ROLES.items() if re.fullmatch(pattern, module)), None)


def _moments(evidence: Evidence | None, name: str, size: int) -> Tensor:
    """Second moments of a matrix's inputs, and of one; the identity where nothing was seen."""
    seen = getattr(evidence, "moments", {}).get(name)
    if seen is None:
        return torch.eye(size, dtype=torch.float64)
    mean = seen.mean.double()
    return torch.cat(
        [torch.cat([seen.second.double(), mean[:, None]], 1), torch.cat([mean, mean.new_ones(1)])[None]]
    )


def _nearest(written: Tensor, reading: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """The head nearest to several in all bases: what makes it of them, and what they are made of it.

    Args:
        written: [several, channels, inputs].
        reading: What reads each of them: [several, heads, channels, others].
        moments: Of the inputs.

    Returns:
        [several, channels, channels of each], and the same for each reader.
    """
    weighs = torch.einsum("ghci,ghdi->gcd", reading, reading)
    level, basis = torch.linalg.eigh(weighs)
    level = level.clamp(min=float(level.max()) * _FLOOR).sqrt()
    root = torch.einsum("gcl,gl,gdl->gcd", basis, level, basis)
    inverse = torch.einsum("gcl,gl,gdl->gcd", basis, 1 / level, basis)
    seen = (root @ written).flatten(0, 1)
    leading = _signed(torch.linalg.eigh(seen @ moments @ seen.T)[1][:, -written.shape[1] :])
    own = leading.unflatten(0, written.shape[:2])  # [several, channels, channels of the new head]
    return own.mT @ root, own.mT @ inverse


def _nearest_turned(
    written: Tensor, reading: Tensor, moments: Tensor, pairs: list[tuple[int, bool]]
) -> tuple[Tensor, Tensor]:
    """The same where each pair of channels is turned: it is a complex number, and so is what maps it."""
    firsts = torch.tensor([pairs.index((pair, False)) for pair in range(len(pairs) // 2)])
    seconds = torch.tensor([pairs.index((pair, True)) for pair in range(len(pairs) // 2)])
    keys = torch.complex(written[:, firsts], written[:, seconds])
    asked = torch.complex(reading[:, :, firsts], reading[:, :, seconds])
    inner = moments.to(keys.dtype)
    weighs = torch.einsum("ghpi,ij,ghpj->gp", asked, inner, asked.conj()).real
    level = weighs.clamp(min=float(weighs.max()) * _FLOOR).sqrt()
    seen = keys * level[..., None]
    gram = torch.einsum("gpi,ij,fpj->pgf", seen, inner, seen.conj())
    leading = _signed(torch.linalg.eigh(gram)[1][:, :, -1].T)  # [several, pairs]
    makes, made_of = leading.conj() * level, leading / level

    def blocks(by: Tensor) -> Tensor:
        filled = torch.zeros(len(by), len(pairs), len(pairs), dtype=torch.float64)
        filled[:, firsts, firsts] = filled[:, seconds, seconds] = by.real
        filled[:, seconds, firsts], filled[:, firsts, seconds] = by.imag, -by.imag
        return filled

    return blocks(makes), blocks(made_of.conj())


def _signed(vectors: Tensor) -> Tensor:
    """Columns whose largest entry is positive: of an eigenvector's signs, or phases, always the same."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.conj() / largest.abs()
