"""What a method is asked: the two configs, the proven layouts, the kept layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from hf_ws._version import __version__
from hf_ws.axes import AXES, HEAD_DIM, HEADS, KV_HEADS, LABELS, POSITIONS, VOCAB, length, parse
from hf_ws.errors import SizeError
from hf_ws.layouts import Certificate
from hf_ws.layouts.irregular import alibi_index, rotary_index
from hf_ws.plan import AxisMap, Gather, Plan
from hf_ws.sizes import field_of, sizes_of


@dataclass(frozen=True, kw_only=True)
class Request:
    """A transfer that a method is to plan. Nothing here reads a weight."""

    source: str
    revision: str | None
    source_config: PreTrainedConfig
    target_config: PreTrainedConfig
    certificate: Certificate
    layers: tuple[int, ...]
    """The source layer of each target layer."""
    parameters: tuple[int, int]
    """How many the source has and the target will have."""
    method: str
    method_args: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    calibrated: bool = False
    """Whether evidence from data will be there when the plan is settled."""

    @property
    def before(self) -> dict[str, int]:
        """Sizes of the source."""
        return sizes_of(self.source_config)

    @property
    def after(self) -> dict[str, int]:
        """Sizes of the target."""
        return sizes_of(self.target_config)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the parameters, key/value heads included even where they are the query heads."""
        return tuple(dict.fromkeys([*self.certificate.axes, KV_HEADS, HEADS]))

    def fixed_maps(self) -> dict[str, AxisMap]:
        """The maps no method chooses: token ids and positions keep their numbers, rotary pairs their frequency.

        A head with an ALiBi slope keeps that, for a local head is of no use as a global one; the slopes of the target
        then say which heads it takes.

        Raises:
            SizeError: a smaller head_dim in a family whose rotary pairs cannot be told apart, or fewer heads where
                they have slopes and share key/value heads too.
        """
        maps: dict[str, AxisMap] = {}
        for axis in (VOCAB, POSITIONS, LABELS):
            if axis in self.axes and self.after[axis] <= self.before[axis]:
                maps[axis] = Gather(tuple(range(self.after[axis])), self.before[axis])
        if self.after[HEAD_DIM] <= self.before[HEAD_DIM]:
            index = rotary_index(self.source_config, self.before[HEAD_DIM], self.after[HEAD_DIM])
            maps[HEAD_DIM] = Gather(index, self.before[HEAD_DIM])
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

    def fresh_head(self) -> tuple[str, ...]:
        """The classifier, where the user changed its labels: it says nothing about the new ones."""
        if self.before[LABELS] == self.after[LABELS]:
            return ()
        return tuple(
            n for n, text in self.certificate.layouts.items() if any(LABELS in d.axes for d in parse(text))
        )

    def check_growth(self) -> None:
        """Refuse any axis longer than the source's; the labels alone may be new.

        Raises:
            SizeError: naming every axis that grows.
        """
        axes = {*self.certificate.axes, HEADS, KV_HEADS, HEAD_DIM} - {LABELS}
        before, after = self.before, self.after
        grown = [
            f"{axis} from {before[axis]} to {after[axis]}"
            for axis in AXES
            if axis in axes and after[axis] > before[axis]
        ]
        if not grown:
            return
        hint = ""
        if after[HEAD_DIM] > before[HEAD_DIM] and field_of(self.target_config, HEAD_DIM) is None:
            width = after[HEADS] * before[HEAD_DIM]
            hint = f". Here head_dim is hidden / heads: heads={after[HEADS]} goes with hidden={width}"
        raise SizeError(
            f"{self.method} cannot grow {', '.join(grown)}; ask for at most the source's size, or for a method that "
            f"grows{hint}"
        )

    def check_heads(self) -> None:
        """Refuse more query heads to a key/value head than the source has: selection would split a group.

        Raises:
            SizeError: with the numbers that would do.
        """
        width_before = self.before[HEADS] // self.before[KV_HEADS]
        width_after = self.after[HEADS] // self.after[KV_HEADS]
        if width_after > width_before:
            enough = next(
                n
                for n in range(-(-self.after[HEADS] // width_before), self.after[HEADS] + 1)
                if self.after[HEADS] % n == 0
            )
            raise SizeError(
                f"{self.after[HEADS]} query heads over {self.after[KV_HEADS]} kv heads are {width_after} to a group, "
                f"the source has {width_before}: query heads move only with their kv head. Ask for at least "
                f"kv_heads={enough}"
            )

    def fan_in_gains(self) -> dict[str, float]:
        """sqrt(fan-in of the source / fan-in of the target) for every matrix that reads a shrunk axis."""
        gains = {}
        for name, text in self.certificate.layouts.items():
            reading = [dim for dim in parse(text) if dim.reads]
            gain = float(np.prod([np.sqrt(length(d, self.before) / length(d, self.after)) for d in reading]))
            if gain != 1.0:
                gains[name] = gain
        return self._tied_gains(gains)

    def _tied_gains(self, gains: dict[str, float]) -> dict[str, float]:
        """With a tied head, the head's gain moves to the norm before it, or is left out where there is none."""
        if not self.target_config.tie_word_embeddings:
            return gains
        for name in self.certificate.tied:
            gain = gains.pop(name, 1.0)
            if name == self.certificate.head and gain != 1.0:
                gains |= dict.fromkeys(self.certificate.head_norm, gain)
        return gains

    def plan(
        self,
        maps: Mapping[str, AxisMap],
        *,
        gains: Mapping[str, float] | None = None,
        fresh: tuple[str, ...] = (),
    ) -> Plan:
        """The plan with these maps."""
        fresh = tuple(dict.fromkeys([*fresh, *self.fresh_head()]))
        return Plan(
            source=self.source,
            revision=self.revision,
            fingerprint=None,
            model_class=self.certificate.model_class,
            method=self.method,
            method_args=dict(self.method_args),
            seed=self.seed,
            version=__version__,
            source_config=_plain(self.source_config),
            target_config=_plain(self.target_config),
            source_sizes=self.before,
            target_sizes=self.after,
            layouts=dict(self.certificate.layouts),
            parameters=self.parameters,
            layers=self.layers,
            maps=dict(maps),
            gains={name: gain for name, gain in (gains or {}).items() if name not in fresh},
            fresh=fresh,
        )


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says, as JSON gives it back: a plan that was saved equals the one that was not."""
    values = json.loads(json.dumps(config.to_dict(), default=str))
    return {
        name: value for name, value in values.items() if name not in ("transformers_version", "_name_or_path")
    }
