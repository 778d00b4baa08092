"""Model types of every kind: proven as docs/architectures.md says, and stock when they are made smaller.

The sources are the miniatures on which the types are proven, with random weights; what is proven of the full size is
taken for them too, so that nothing is proven twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, logging

from hf_ws import AutoSubclone
from hf_ws.axes import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, MOE_FFN, SHARED_FFN, kind_of, sibling
from hf_ws.cli.architectures import row
from hf_ws.errors import PlanError
from hf_ws.layouts import catalogue, certify, run
from hf_ws.layouts.catalogue import Verdict
from hf_ws.layouts.certify import _CERTIFICATES, Certificate, anchored
from hf_ws.layouts.miniature import inputs, miniatures
from hf_ws.sizes import field_of, near, places, sizes_of

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
COMMAND = "hf-ws certify --all --markdown > docs/architectures.md"

UNITS = (1, 2, 4, 8, 16)
"""What a smaller width is a multiple of, where nothing else says: the first that the class takes."""

POLICIES = ("middle_dropped", "first")
"""Which layers stay: the last as well, or the first where the config counts from there what each layer is."""

SPECIAL: Mapping[str, Mapping[str, float]] = {
    "xlstm": {"hidden": 128, "heads": 8},  # widths inside its heads are rounded up to multiples of 64
    "bros": {
        "hidden": 64,
        "heads": 4,
    },  # of sixty-fourths: sines and cosines of eight numbers, in a quarter of it
    "lilt": {"hidden": 144, "heads": 9},  # whole sixths, and whole quarters
    "cvt": {"layers.1": 2, "layers.2": 3},  # the class counts stages where it means layers
    "regnet": {"hidden.0": 24, "hidden.1": 42, "hidden.2": 48, "hidden.3": 66},  # whole groups
    "textnet": {"hidden.0": 24, "hidden.1": 24},  # equal, or the first stage has one branch less
    "xclip": {"vision_config.mit.heads": 12},  # they share out what the text is projected to
    "efficientnet": {"width_coefficient": 0.35},
    "mobilenet_v1": {"depth_multiplier": 0.2},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "mobilevitv2": {"width_multiplier": 0.6},
    "pp_lcnet": {"scale": 0.35},
}
"""Sizes that a type needs and no rule gives, and the number that all widths of a net follow."""

_OWN = "the stock class itself gives another text with a cache than without, at any size"
_AUDIO = "what it generates is sound, or wants sound at each step"

WITHOUT_CACHE: Mapping[str, str] = {
    **dict.fromkeys(("cpmant", "minimax", "prophetnet", "trocr"), _OWN),
    **dict.fromkeys(("musicgen", "musicgen_melody", "qwen2_audio", "voxtral_realtime"), _AUDIO),
    "blt": "the stock class makes no cache: its config does not say how many layers there are",
    "jamba": "the layer that its miniature loses is the only one of attention, and Transformers' cache wants one",
    "rwkv": "the stock class makes a state as wide as hidden for an attention that is not",
    "xlnet": "the stock class does not generate without a cache",
}
"""Decoders that are not asked for the same text with and without a cache, and why."""


OVERWRITTEN: Mapping[str, str] = {"zaya": "balancing_biases"}
"""Buffers whose last element the stock class sets to one number whenever it loads, whatever a checkpoint says."""


@dataclass
class Case:
    """One model type."""

    name: str

    @cached_property
    def verdict(self) -> Verdict:
        logging.set_verbosity_error()
        return catalogue.verdict(self.name)

    @cached_property
    def source(self) -> PreTrainedModel:
        """The miniature in float32, of which the library is told what it has proven."""
        model_class, config = catalogue.default_of(self.name, catalogue.types()[self.name])
        small = miniatures(model_class, config)[0]
        torch.manual_seed(0)
        made = model_class(type(small).from_dict(small.to_dict())).float().eval()
        computed = {n: made.state_dict()[n].clone() for n in made._keys_to_ignore_on_save or ()}
        with torch.no_grad():
            run.perturbed(made)
            for table in (
                m for m in made.modules() if isinstance(m, nn.Embedding) and m.padding_idx is not None
            ):
                table.weight[table.padding_idx] = 0  # as stock classes do when they load
        made.load_state_dict(computed, strict=False)
        for name, buffer in made.named_buffers():
            if name.endswith(OVERWRITTEN.get(self.name, "*")):
                buffer[-1] = -1.0
        key = (model_class, json.dumps(made.config.to_dict(), sort_keys=True, default=str))
        _CERTIFICATES[key] = anchored(certify(model_class, config), model_class, made.config)
        return made

    @property
    def certificate(self) -> Certificate:
        return certify(type(self.source), self.source.config)


SHOWN = (Path(__file__).parent / "zoo_types.txt").read_text().split()
"""The types that the laws are shown for in CI; the others on the page have been proven, and no more."""


@pytest.fixture(scope="module", params=SHOWN)
def case(request: pytest.FixtureRequest) -> Case:
    """One for both tests of a type: pytest runs them one after the other."""
    return Case(request.param)


@pytest.mark.filterwarnings("ignore")  # what a class of Transformers warns of
def test_the_page_says_what_the_proof_says(case: Case) -> None:
    if not PAGE.exists():
        pytest.fail(f"{PAGE} is missing; write it: {COMMAND}")
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith(f"- `{case.name}` ")]
    assert lines == [row(case.verdict)], f"write it again: {COMMAND}"


@pytest.mark.filterwarnings("ignore")
def test_a_type_keeps_the_laws(case: Case, tmp_path: Path) -> None:
    """Identity, one call that shrinks all it can, a stock checkpoint, finite outputs, the same text without a cache."""
    if case.verdict.verdict == "refused":
        assert case.verdict.reason
        return
    for method in ("weight_selection", "subclone"):
        _assert_same_weights(AutoSubclone.from_pretrained(case.source, method=method), case.source)
    target = shrunk(case)
    again = _assert_stock(target, tmp_path)
    with run.plain_arithmetic(again.config):  # some are made with the model's help
        given = inputs(again.double())
    floats = {n for n, t in given.items() if isinstance(t, Tensor) and t.is_floating_point()}
    given = {n: t.float() if n in floats else t for n, t in given.items()}
    again.float()
    _assert_same_outputs(target, again, case.source, given)
    if generates(case.name) and again.can_generate():
        _assert_same_text_without_cache(again, given)


def shrunk(case: Case) -> PreTrainedModel:
    """The type with fewer of everything that may change, in one call."""
    source, refused = case.source, []
    for unit, policy in product(UNITS, POLICIES):
        asked = smaller(source.config, case.certificate, unit) | SPECIAL.get(case.name, {})
        try:
            target = AutoSubclone.from_pretrained(
                source, method="weight_selection", layer_policy=policy, **asked
            )
        except PlanError as error:
            refused.append(f"{policy} {asked}: {error}")
            continue
        made, before = sizes_of(target.config), sizes_of(source.config)
        assert [axis for axis in asked if axis in made and made[axis] != asked[axis]] == []
        if not any(made[axis] < before[axis] for axis in made):
            assert case.verdict.verdict == "certified in part"
        return target
    raise AssertionError(f"{case.name} is refused in every size: " + "\n".join(refused))


def smaller(config: PreTrainedConfig, certificate: Certificate, unit: int) -> dict[str, int]:
    """Sizes for every axis that may change and has a field of its own: two thirds, and one layer less."""
    sizes, free = sizes_of(config), set(certificate.axes)
    fields = places(config)
    own = [axis for axis in sizes if axis in fields]
    asked: dict[str, int] = {}
    for axis in own:
        if kind_of(axis) in (HEADS, KV_HEADS, FFN, MOE_FFN, SHARED_FFN) and axis not in free:
            asked[axis] = sizes[axis]  # or it would follow the width
        elif kind_of(axis) in (FFN, MOE_FFN, SHARED_FFN):
            asked[axis] = less(sizes[axis], unit)
        elif kind_of(axis) == LAYERS and axis in free and sizes[axis] > 1:
            asked[axis] = sizes[axis] - 1
    stacks = [_Stack.of(config, axis, free) for axis in own if kind_of(axis) == HEADS]
    for stack in (
        stack for stack in stacks if stack.free and not stack.factor
    ):  # the width does not tell how many they are
        groups = less(stack.groups)
        width = stack.width if groups < stack.groups else less(stack.width)
        asked |= stack.named(groups, width, stack.head_dim)
    for axis in (axis for axis in own if kind_of(axis) == HIDDEN and axis in free):
        over = [stack.axis for stack in stacks if stack.hidden == axis and stack.free and not stack.factor]
        whole = math.lcm(unit, *(asked[name] for name in over if sizes[axis] % sizes[name] == 0))
        filling = [stack for stack in stacks if stack.hidden == axis and stack.factor]
        asked |= _widths(axis, sizes[axis], filling, whole)
    return asked


def less(size: int, unit: int = 1) -> int:
    """Two thirds, as a multiple of the unit."""
    return max(unit, min(size - 1, size - size // 3) // unit * unit) if size > 1 else 1


@dataclass(frozen=True)
class _Stack:
    """The heads of one stack, and how they fill the width they read: heads x head_dim = factor x hidden."""

    axis: str
    hidden: str | None
    groups: int
    width: int
    """How many query heads have one key/value head."""
    head_dim: int
    factor: int
    """Zero where they do not fill it."""
    asks_groups: bool
    head_dim_axis: str | None
    """Where heads may be narrower too, in a field of its own."""
    narrows: bool
    free: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, axis: str, free: set[str]) -> _Stack:
        sizes = sizes_of(config)
        hidden, head_dim, groups = (
            near(axis, HIDDEN, sizes),
            near(axis, HEAD_DIM, sizes),
            sibling(axis, KV_HEADS),
        )
        asks = groups in sizes and field_of(config, groups) is not None
        fewer = sizes[groups] if groups in sizes and (groups in free or not asks) else 1
        stage = axis.rpartition(".")[2]
        if hidden and not head_dim and stage.isdigit():  # each stage is twice as wide as the one before
            factor = 1 if hidden[-1].isdigit() else 2 ** int(stage)
            own = sizes[hidden] * factor // sizes[axis]
        else:
            own = sizes[head_dim] if head_dim else 0
            factor, rest = divmod(sizes[axis] * own, sizes[hidden]) if hidden else (0, 1)
            factor = 0 if rest else factor
        named = head_dim if head_dim and field_of(config, head_dim) is not None else None
        narrows = named in free if named else head_dim is None or head_dim in free
        return cls(
            axis,
            hidden,
            fewer,
            sizes[axis] // fewer,
            own,
            factor,
            asks and groups in free,
            named if narrows else None,
            narrows,
            axis in free,
        )

    def named(self, groups: int, width: int, head_dim: int) -> dict[str, int]:
        asked = {self.axis: groups * width}
        if self.asks_groups:
            asked[sibling(self.axis, KV_HEADS)] = groups
        if self.head_dim_axis and head_dim != self.head_dim:
            asked[self.head_dim_axis] = head_dim
        return asked

    def filling(self, hidden: int, narrower: bool) -> dict[str, int] | None:
        """The most whole groups that fill a smaller width, with heads as wide as before if that can be."""
        total = self.factor * hidden
        found = []
        for groups in range(self.groups, 0, -1) if self.free else (self.groups,):
            for width in range(self.width, 0, -1) if self.free else (self.width,):
                head_dim, rest = divmod(total, groups * width)
                same = head_dim == self.head_dim
                if (
                    not rest
                    and (same or (narrower and self.narrows and head_dim < self.head_dim))
                    and head_dim
                ):
                    found.append((same, groups < self.groups, width == self.width, head_dim, groups, width))
        if not found:
            return None
        *_, head_dim, groups, width = max(found)
        return self.named(groups, width, head_dim)


def _widths(axis: str, size: int, stacks: list[_Stack], unit: int) -> dict[str, int]:
    """The largest width, of two thirds or less, that all these stacks can fill, and how they do.

    With heads as wide as before if there is one, for not every kind of positions lets them be narrower.
    """
    for narrower in (False, True):
        for hidden in range(less(size, unit), 0, -unit):
            found = [stack.filling(hidden, narrower) for stack in stacks]
            if None not in found:
                return {axis: hidden} | {name: size for own in found if own for name, size in own.items()}
    return {}


def generates(name: str) -> bool:
    """Whether the type is held to generating text: decoders, and encoder-decoders of text."""
    first = next(kind for kind in catalogue.KINDS if name in catalogue.types(kind))
    return first in ("causal-lm", "seq2seq") and name not in WITHOUT_CACHE


def _assert_same_weights(made: PreTrainedModel, wanted: PreTrainedModel) -> None:
    made, wanted = made.state_dict(), wanted.state_dict()
    assert made.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(made[name], wanted[name])] == []


def _assert_stock(target: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """What Transformers loads of it, which is all of it."""
    target.save_pretrained(folder)
    again, info = type(target).from_pretrained(folder, output_loading_info=True)
    assert {kind: names for kind, names in info.items() if names} == {}
    _assert_same_weights(again, target)
    return again


@torch.no_grad()
def _assert_same_outputs(
    target: PreTrainedModel, again: PreTrainedModel, source: PreTrainedModel, given: Mapping[str, Tensor]
) -> None:
    """Finite, and of the model at hand the same as of the one that was saved and loaded."""
    for model in (target, again):
        model.config._experts_implementation = (
            "eager"  # the grouped product wants widths in multiples of four
        )
    made, wanted = run.run(target, given), run.run(again, given)
    assert wanted
    odd = [name for name, value in wanted.items() if not value.isfinite().all()]
    if odd:  # a mask may say minus infinity, where the source's own does
        whole = deepcopy(source).double()
        with run.plain_arithmetic(source.config):
            before = run.run(whole, inputs(whole))
        for name in odd:
            assert (wanted[name].isfinite() | wanted[name].isneginf()).all(), name
            assert before[name].isneginf().any(), name
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            made[name], value, rtol=0, atol=1e-6 * float(value[value.isfinite()].abs().max())
        )


@torch.no_grad()
def _assert_same_text_without_cache(model: PreTrainedModel, given: Mapping[str, Tensor]) -> None:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if model.config.is_encoder_decoder:
        settings["decoder_start_token_id"] = 1
    prompt = {name: tensor for name, tensor in given.items() if not name.startswith("decoder_")}
    cached = model.generate(**prompt, use_cache=True, **settings)
    plain = model.generate(**prompt, use_cache=False, **settings)
    assert cached.shape == plain.shape
    assert torch.equal(cached, plain)
