"""Maps of one axis: for every index of the target, which index of the source it is, or which sum of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

DATA_FREE = frozenset({"magnitude", "random", "uniform"})
"""The scores in `hf_ws.scores.SCORES` that need no calibration data."""


@dataclass(frozen=True)
class Gather:
    """Each target index is one source index."""

    index: tuple[int, ...]
    size: int
    """The axis's length in the source."""
    by: str = ""
    """The score that these were the highest by; empty if none was asked."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def as_array(self) -> np.ndarray:
        """The indices as integers [target length]."""
        return np.asarray(self.index, dtype=np.int64)

    def __str__(self) -> str:
        if self.index == tuple(range(self.size)):
            return "all"
        steps = set(np.diff(self.index).tolist())
        why = f" (highest by {self.by})" if self.by else ""
        if steps == {1} or len(self) == 1:
            return (f"{self.index[0]} to {self.index[-1]}" if len(self) > 1 else str(self.index[0])) + why
        regular = len(steps) == 1 and min(steps) > 1
        every = f", every {_ordinal(steps.pop())}" if regular else ""
        pieces = _runs(self.as_array)
        whole = len(pieces) <= (4 if regular else 8)
        shown = ", ".join(pieces if whole else [*pieces[:4], "..."])
        return f"{len(self)} of {self.size}{every}: {shown}{why}"


@dataclass(frozen=True)
class Rank:
    """The `keep` indices that score highest; which they are is settled when the weights or the data are read."""

    keep: int
    size: int
    """The axis's length in the source."""
    score: str | Callable[..., Any]
    """A name in `hf_ws.scores.SCORES`, or a score itself."""

    def __len__(self) -> int:
        return self.keep

    @property
    def by(self) -> str:
        """What the score is called."""
        return called(self.score)

    @property
    def wants_data(self) -> bool:
        """Whether the score looks at more than weights."""
        if isinstance(self.score, str):
            return self.score not in DATA_FREE
        return bool(getattr(self.score, "wants", ()))

    def __str__(self) -> str:
        return "all" if self.keep == self.size else f"the {self.keep} of {self.size} highest by {self.by}"


def called(thing: str | Callable[..., Any]) -> str:
    """The name of what may be named, or be the callable itself."""
    return thing if isinstance(thing, str) else getattr(thing, "__name__", type(thing).__name__)


@dataclass(frozen=True)
class Turn:
    """The `keep` directions in which the stream moves most; which they are is settled when the data are read."""

    keep: int
    size: int
    """The axis's length in the source."""
    centred: bool = False
    """Whether the mean over channels is one of them: LayerNorm takes it out."""

    def __len__(self) -> int:
        return self.keep

    def __str__(self) -> str:
        return f"the {self.keep} of {self.size} directions that move most"


@dataclass(frozen=True, eq=False)
class Dense:
    """Each target index is a weighted sum of source indices: what writes the axis is multiplied by `write`, what
    reads it by `read`, both [target length, source length]."""

    write: np.ndarray
    read: np.ndarray
    by: str = ""
    """What the sums are, for people."""

    @property
    def size(self) -> int:
        """The axis's length in the source."""
        return int(self.write.shape[1])

    def __len__(self) -> int:
        return int(self.write.shape[0])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Dense)
            and self.by == other.by
            and np.array_equal(self.write, other.write)
            and np.array_equal(self.read, other.read)
        )

    def __str__(self) -> str:
        return f"{len(self)} {self.by or 'sums of the'} {self.size}"


@dataclass(frozen=True)
class Merge:
    """Each target head stands for several neighbours, by least squares; how is settled when the weights are read."""

    keep: int
    size: int
    """The axis's length in the source."""

    def __len__(self) -> int:
        return self.keep

    def __str__(self) -> str:
        return f"{self.keep} least-squares merges of {self.size // self.keep} neighbours each"


@dataclass(frozen=True, eq=False)
class Blocks:
    """In one parameter each target head is a sum of source heads, each multiplied by a matrix of its own."""

    index: tuple[int, ...]
    """The source heads, those of one target head after those of another."""
    blocks: np.ndarray
    """[target heads, source heads of each, channels, channels of the source]."""

    def __len__(self) -> int:
        return int(self.blocks.shape[0])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Blocks)
            and self.index == other.index
            and np.array_equal(self.blocks, other.blocks)
        )

    def __str__(self) -> str:
        return f"{len(self)} made of {self.blocks.shape[1]} each, channels mixed"


@dataclass(frozen=True, eq=False)
class Refit:
    """How one matrix of the target reads: what its inputs say of the source's inputs to that matrix.

    The source computes W a; the target sees b instead of a. `read` [target inputs, source inputs] is such that
    read^T b comes nearest to a, so W read^T is what the target's matrix is made of. `rest` [source inputs] is what b
    never says of a, on average; W rest goes into the bias where there is one.
    """

    read: np.ndarray
    rest: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Refit) or (self.rest is None) != (other.rest is None):
            return False
        same = self.rest is None or other.rest is None or np.array_equal(self.rest, other.rest)
        return same and np.array_equal(self.read, other.read)


@dataclass(frozen=True, eq=False)
class Given:
    """A parameter of the target that was fitted whole, and is taken as it is."""

    value: np.ndarray

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and np.array_equal(self.value, other.value)


@dataclass(frozen=True)
class Fold:
    """A norm whose gain moves into what reads its output, or a LayerScale, whose gain moves into what writes what it
    multiplies; its own becomes one number for all channels."""

    axis: str
    """The stream."""
    readers: tuple[str, ...]
    """The matrices, layer numbers written `*`."""
    bias: str = ""
    """The norm's bias, if it has one."""
    offset: float = 0.0
    """What the class adds to the gain it keeps: one, or nothing."""
    eps: float = 0.0
    """What it adds to the mean square before it takes the root."""
    writers: tuple[str, ...] = ()
    """Of a LayerScale: the matrix, and its bias."""


AxisMap = Gather | Rank | Turn | Dense | Merge | Blocks
KINDS = {kind.__name__: kind for kind in (Gather, Rank, Turn, Dense, Merge, Blocks, Refit, Given, Fold)}


def to_json(key: str, value: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """A map as JSON can hold it; its matrices go into `arrays` under the key, and are named in their place."""
    fields: dict[str, Any] = {"kind": type(value).__name__}
    for name, content in vars(value).items():
        if isinstance(content, np.ndarray):
            arrays[f"{key}/{name}"] = np.ascontiguousarray(content)
            content = f"{key}/{name}"
        fields[name] = content
    return fields


def from_json(fields: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    """The map that `to_json` wrote. Raises KeyError for an unknown kind or a matrix that is not there."""
    own = dict(fields)
    kind = KINDS[own.pop("kind")]
    for name in ("write", "read", "rest", "blocks", "value"):
        if isinstance(own.get(name), str):
            own[name] = arrays[own[name]]
    own |= {name: tuple(own[name]) for name in ("index", "readers", "writers") if name in own}
    return kind(**own)


def _runs(index: np.ndarray) -> list[str]:
    """The indices in words, three or more in a row as "first to last"."""
    words: list[str] = []
    for run in np.split(index, np.flatnonzero(np.diff(index) != 1) + 1):
        words += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    return words


def _ordinal(number: int) -> str:
    return {1: "", 2: "second", 3: "third"}.get(number, f"{number}th")
