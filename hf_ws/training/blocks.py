"""The settings that come in blocks: the start that a run makes for itself, and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_ws.axes import AXES

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class Subclone:
    """The student is made inside the run, from a source of another size; as `AutoSubclone.from_pretrained` takes it.

    `calibration` counts training blocks that the source is run on; methods that look at no data leave them alone.
    `set` holds config fields in their own spelling (`n_inner: 2048`). The weights are made in float32, as they are
    trained.
    """

    source: str
    hidden: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int | None = None
    vocab: int | None = None
    experts: int | None = None
    params: str | int | None = None
    ratio: float | None = None
    set: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    method_args: dict[str, Any] = field(default_factory=dict)
    layer_policy: str | list[int] | None = None
    compensation: list[str] | None = None
    calibration: int = 64
    seed: int = 0
    model_class: str | None = None
    revision: str | None = None
    local_files_only: bool = False

    @property
    def where(self) -> dict[str, Any]:
        """How to find the source."""
        return {"revision": self.revision, "local_files_only": self.local_files_only}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `AutoSubclone.plan` and `from_pretrained`, less the source and calibration."""
        values = asdict(self)
        fields = values.pop("set")
        del values["source"], values["calibration"]
        return fields | values

    def faults(self) -> Iterator[str]:
        """What is out of range; what sizes are legal the plan says."""
        if not self.source:
            yield "subclone.source is empty; give a folder or Hub id"
        for name in ("calibration", "seed"):
            if getattr(self, name) < 0:
                yield f"subclone.{name}={getattr(self, name)}; at least 0"
        if own := [name for name in self.set if name in AXES]:
            yield f"subclone.set.{own[0]}; that is a key of subclone itself"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of low rank are trained instead of all weights: y = W x + (alpha / r) B A x, W as it was.

    `targets` is `all-linear` (every linear module but the head), or names of modules, each the end of one
    (`q_proj`, `layers.0.mlp.up_proj`). `merge` writes the model with the adapters in its weights besides.

    Source: LoRA, Hu et al. 2021 (arXiv 2106.09685), section 4.1; on all linear modules as in QLoRA, Dettmers et al.
    2023 (arXiv 2305.14314), section 4.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = ALL_LINEAR
    merge: bool = False

    @property
    def names(self) -> list[str]:
        """The modules named; empty for `all-linear`."""
        named = [self.targets] if isinstance(self.targets, str) else self.targets
        return [] if named == [ALL_LINEAR] else named

    def faults(self) -> Iterator[str]:
        """What is out of range."""
        if self.r < 1:
            yield f"lora.r={self.r}; at least 1"
        if not 0 < self.alpha < float("inf"):
            yield f"lora.alpha={self.alpha}; above 0"
        if not 0 <= self.dropout < 1:
            yield f"lora.dropout={self.dropout}; from 0 to below 1"
        if not self.targets:
            yield f"lora.targets={self.targets!r}; {ALL_LINEAR}, or names of modules"
