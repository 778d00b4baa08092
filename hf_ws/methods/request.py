"""What a method is asked: the two configs, the proven layouts, the kept layers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ws._version import __version__
from hf_ws.axes import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LABELS,
    LAYERS,
    POSITIONS,
    VOCAB,
    WAVES,
    kind_of,
    layer_key,
    length,
    parse,
    sibling,
)
from hf_ws.errors import PlanError, SizeError
from hf_ws.layouts import Certificate, stack_of
from hf_ws.layouts.census import census
from hf_ws.layouts.irregular import alibi_index, rotary_index
from hf_ws.layouts.prove import TOLERANCE
from hf_ws.maps import AxisMap, Fold, Gather, called
from hf_ws.methods.kv import copied
from hf_ws.plan import Plan
from hf_ws.sizes import field_of, nodes, owner, sizes_of
from hf_ws.vocabulary import BY_COUNT, Vocabulary

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A transfer that a method is to plan. Nothing here reads a weight."""

    source: str
    revision: str | None
    model_class: type[PreTrainedModel]
    source_config: PreTrainedConfig
    target_config: PreTrainedConfig
    certificate: Certificate
    layers: Mapping[str, tuple[int, ...]]
    """The source layer of each target layer, by the axis that counts them."""
    parameters: tuple[int, int]
    """How many the source has and the target will have."""
    more: int = 0
    """How many of them a head takes that was untied."""
    blends: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """The target layers that are sums of the source's, as a plan has them."""
    method: str = ""
    method_args: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    calibrated: bool = False
    """Whether evidence from data will be there when the plan is settled."""
    compensation: tuple[str, ...] = ()
    """What is to be done against what the maps lose."""
    vocabulary: Vocabulary | None = None
    """The tokens that stay, where they were chosen; the first ids else."""

    @cached_property
    def before(self) -> dict[str, int]:
        """Sizes of the source."""
        return sizes_of(self.source_config)

    @cached_property
    def after(self) -> dict[str, int]:
        """Sizes of the target."""
        return sizes_of(self.target_config)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes of the tensors, key/value heads included even where they are the query heads."""
        found: list[str] = []
        for axis in self.certificate.occurring:
            pair = (KV_HEADS, HEADS) if kind_of(axis) in (HEADS, KV_HEADS) else ()
            found += [axis, *(sibling(axis, kind) for kind in pair)]
        return tuple(axis for axis in dict.fromkeys(found) if axis in self.before and kind_of(axis) != LAYERS)

    def places(self, axis: str) -> tuple[str, ...]:
        """The keys under which a plan maps an axis: each target layer's own where layers may differ, else one."""
        leader = (
            sibling(axis, HEADS) if kind_of(axis) == KV_HEADS else axis
        )  # kv heads that show nowhere are the heads
        if leader not in self.certificate.layerwise:
            return (axis,)
        stacks = dict.fromkeys(
            self.certificate.stacks[stack_of(name)]
            for name, text in self.certificate.layouts.items()
            if any({axis, leader} & set(dim.axes) for dim in parse(text))
        )
        return tuple(f"{axis}@{layer_key(s, i)}" for s in stacks for i in range(len(self.layers[s])))

    def fixed_maps(self) -> dict[str, AxisMap]:
        """The maps no method chooses: token ids and positions keep their numbers, rotary pairs their frequency.

        A head with an ALiBi slope keeps that, for a local head is of no use as a global one; the slopes of the target
        then say which heads it takes.

        Raises:
            SizeError: a smaller head_dim in a family whose rotary pairs cannot be told apart, or fewer heads where
                they have slopes and share key/value heads too.
        """
        maps: dict[str, AxisMap] = {**self._chosen_tokens(), **copied(self)}
        for axis in (axis for axis in self.axes if axis not in maps):
            before, after = self.before[axis], self.after[axis]
            if after > before:
                continue
            if kind_of(axis) in (VOCAB, POSITIONS, LABELS):
                maps[axis] = Gather(tuple(range(after)), before)
            elif kind_of(axis) == WAVES:  # sines of relative positions: the nearest frequency of the source's
                maps[axis] = Gather(tuple(round(j * before / after) for j in range(after)), before)
            elif kind_of(axis) == HEAD_DIM and self.certificate.errors.get(axis, 1.0) > TOLERANCE:
                maps[axis] = Gather(rotary_index(owner(self.source_config, axis), before, after), before)
        if HEADS not in self.before:
            return maps
        heads, kv_heads = self.before[HEADS], self.before[KV_HEADS]
        sloped = alibi_index(self.source_config, heads, self.after[HEADS])
        if sloped is not None and self.after[HEADS] < heads:
            if kv_heads not in (1, heads):
                raise SizeError(
                    f"heads={self.after[HEADS]}: {self.source_config.model_type} gives each head a slope by its "
                    "number, and no whole groups of heads have the slopes of fewer; leave heads as they are"
                )
            maps[HEADS] = Gather(sloped, heads)
            maps[KV_HEADS] = maps[HEADS] if kv_heads == heads else Gather((0,), 1)
        return maps

    def _chosen_tokens(self) -> dict[str, AxisMap]:
        """The maps of a vocabulary that was chosen by counts, whatever the method."""
        if self.vocabulary is None:
            return {}
        kept = self.vocabulary.kept
        return {
            axis: Gather(kept[:size], self.before[axis], BY_COUNT)
            for axis, size in self.vocabulary.sizes(self.source_config).items()
        }

    def check_fixed(self) -> None:
        """Refuse to change an axis that is not proven.

        Raises:
            SizeError: naming every such axis, and why.
        """
        certificate, wrong = self.certificate, []
        for axis, before in self.before.items():
            if self.after.get(axis) == before or axis in certificate.axes:
                continue
            if axis in certificate.fixed and kind_of(axis) != HEAD_DIM:
                wrong.append(f"{axis} stays {before}, not {self.after.get(axis)}: {certificate.fixed[axis]}")
            elif kind_of(axis) == LAYERS:
                wrong.append(
                    f"{axis} stays {before}, not {self.after.get(axis)}: no list of layers has that length"
                )
        if wrong:
            raise SizeError(
                f"{certificate.model_class} is proven for {', '.join(certificate.axes)}; {'; '.join(wrong)}"
            )

    def fresh_head(self) -> tuple[str, ...]:
        """The classifier, where the user changed its labels: it says nothing about the new ones."""
        if self.before.get(LABELS) == self.after.get(LABELS):
            return ()
        return tuple(
            n for n, text in self.certificate.layouts.items() if any(LABELS in d.axes for d in parse(text))
        )

    def check_growth(self) -> None:
        """Refuse any axis longer than the source's; labels may be new, and key/value heads copies.

        Raises:
            SizeError: naming every axis that grows.
        """
        before, after = self.before, self.after
        longer = [
            axis
            for axis, size in before.items()
            if after.get(axis, 0) > size and kind_of(axis) not in (LABELS, LAYERS) and axis in self._sized()
        ]
        if {kind_of(axis) for axis in longer} <= {KV_HEADS} and (not longer or copied(self)):
            return  # key/value heads alone become more by copying
        grown = [f"{axis} from {before[axis]} to {after[axis]}" for axis in longer]
        hint = ""
        if (
            after.get(HEAD_DIM, 0) > before.get(HEAD_DIM, 0)
            and field_of(self.target_config, HEAD_DIM) is None
        ):
            width = after[HEADS] * before[HEAD_DIM]
            hint = f". Here head_dim is hidden / heads: heads={after[HEADS]} goes with hidden={width}"
        raise SizeError(
            f"{self.method} cannot grow {', '.join(grown)}; ask for at most the source's size, or for a method that "
            f"grows, such as random{hint}"
        )

    def _sized(self) -> set[str]:
        heads = {axis for axis in self.before if kind_of(axis) in (HEADS, KV_HEADS, HEAD_DIM)}
        return {*self.certificate.occurring, *heads}

    def check_kinds(self) -> None:
        """Raises PlanError where none of the kept layers has an axis that others of the source have (`head_dim.1`)."""
        every = {stack: range(self.before[stack]) for stack in self.layers}
        for axis in (axis for axis in self.axes if axis not in self.after):
            having = dict.fromkeys(
                own.layer
                for own in self.certificate.spelled(every)
                if any(axis in dim.axes for dim in parse(self.certificate.layouts[own.pattern]))
            )
            raise PlanError(
                f"no layer that is kept has {axis}, as layers {', '.join(map(str, having))} of the source have; keep "
                "one of them: name them (layer_policy=[...]), or another policy"
            )

    def check_heads(self, but: Collection[str] = ()) -> None:
        """Refuse more query heads to a key/value head than the source has: selection would split a group.

        Args:
            but: Axes of key/value heads that are merged, where a group takes in its neighbours.

        Raises:
            SizeError: with the numbers that would do.
        """
        for axis in (
            axis for axis in self.axes if kind_of(axis) == HEADS and sibling(axis, KV_HEADS) not in but
        ):
            groups, wanted = sibling(axis, KV_HEADS), self.after[axis]
            width_before, width_after = self.before[axis] // self.before[groups], wanted // self.after[groups]
            if width_after > width_before:
                enough = next(n for n in range(-(-wanted // width_before), wanted + 1) if wanted % n == 0)
                raise SizeError(
                    f"{wanted} query heads over {self.after[groups]} kv heads are {width_after} to a group, the "
                    f"source has {width_before}: query heads move only with their kv head. Ask for at least "
                    f"{groups}={enough}, or merge kv heads with method_args={{'kv_merge': 'least_squares'}}"
                )

    @property
    def tied(self) -> bool:
        """Whether the target's head is its embedding; a class without a head has none, whatever its config says."""
        said = any(getattr(node, "tie_word_embeddings", False) for _, node in nodes(self.target_config))
        return said and bool(self.certificate.tied)

    @property
    def tied_axes(self) -> set[str]:
        """The streams that a head reads which is the target's embedding."""
        layouts = [
            parse(self.certificate.layouts.get(name, "")) for name in self.certificate.tied if self.tied
        ]
        return {axis for layout in layouts for dim in layout for axis in dim.axes if kind_of(axis) == HIDDEN}

    def untied(self) -> Request:
        """The same, for a target whose head is a tensor of its own."""
        if not self.tied:
            return self
        config = deepcopy(self.target_config)
        for _, node in nodes(config):
            if getattr(node, "tie_word_embeddings", False):
                node.tie_word_embeddings = False
        parameters = sum(map(math.prod, census(self.model_class, config).values()))
        more = parameters - self.parameters[1]
        logger.warning("the head is untied from the embedding: %s parameters more", f"{more:,}")
        return replace(self, target_config=config, parameters=(self.parameters[0], parameters), more=more)

    def fan_in_gains(self, without: Collection[str] = ()) -> dict[str, float]:
        """sqrt(fan-in of the source / fan-in of the target) for every matrix that reads a shrunk axis.

        Nothing is rescaled where it is not proven which side reads.

        Args:
            without: Axes that do not count: what is read of them is made up for otherwise.
        """
        if not self.certificate.reads:
            logger.warning(
                "%s: which side of each tensor reads is not proven, so nothing is rescaled",
                self.certificate.model_class,
            )
            return {}
        gains = {}
        for name, text in self.certificate.layouts.items():
            reading = [dim for dim in parse(text) if dim.reads and not {*dim.axes} & {*without}]
            gain = float(np.prod([np.sqrt(length(d, self.before) / length(d, self.after)) for d in reading]))
            if gain != 1.0:
                gains[name] = gain
        return self._tied_gains(gains)

    def _tied_gains(self, gains: dict[str, float]) -> dict[str, float]:
        """With a tied head, the head's gain moves to the norm before it, or is left out where there is none."""
        if not self.tied:
            return gains
        for name in self.certificate.tied:
            gain = gains.pop(name, 1.0)
            if name == self.certificate.head and gain != 1.0 and not self.embedding_gains():
                gains |= dict.fromkeys(self.certificate.head_norm, gain)
        return gains

    def embedding_gains(self) -> dict[str, float]:
        """What makes up for a class that multiplies embeddings by sqrt(hidden), which is less in the target (Gemma).

        A tied head is multiplied along, which is just its gain of fan-in.
        """
        return {
            name: float(np.sqrt(self.before[axis] / self.after[axis]))
            for name, axis in self.certificate.scaled.items()
            if self.before[axis] != self.after[axis]
        }

    def plan(
        self,
        maps: Mapping[str, AxisMap],
        *,
        gains: Mapping[str, float] | None = None,
        fresh: tuple[str, ...] = (),
        folds: Mapping[str, Fold] | None = None,
    ) -> Plan:
        """The plan with these maps."""
        fresh = tuple(dict.fromkeys([*fresh, *self.fresh_head()]))
        there = {name for own in self.certificate.spelled(self.layers) for name in (own.name, own.pattern)}
        return Plan(
            source=self.source,
            revision=self.revision,
            fingerprint=None,
            model_class=self.certificate.model_class,
            method=self.method,
            method_args={n: called(v) if callable(v) else v for n, v in self.method_args.items()},
            seed=self.seed,
            version=__version__,
            source_config=_plain(self.source_config),
            target_config=_plain(self.target_config),
            source_sizes=self.before,
            target_sizes=self.after,
            layouts=dict(self.certificate.layouts),
            parameters=self.parameters,
            untied=self.more,
            layers={axis: tuple(kept) for axis, kept in self.layers.items()},
            blends=dict(self.blends),
            maps={**maps, **self._chosen_tokens()},
            gains={name: gain for name, gain in (gains or {}).items() if name in there and name not in fresh},
            fresh=fresh,
            folds=dict(folds or {}),
            compensation=tuple(self.compensation),
        )


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says, as JSON gives it back: a plan that was saved equals the one that was not."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {
        name: value for name, value in values.items() if name not in ("transformers_version", "_name_or_path")
    }
