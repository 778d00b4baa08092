"""A plan refuses to be inconsistent, comes back from its file as it was, and prints what it will do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertForSequenceClassification

from hf_ws import AutoSubclone, Plan
from hf_ws.errors import OutputError, PlanError
from hf_ws.methods import METHODS
from hf_ws.plan import Gather, Rank
from tests import families
from tests.tiny_checkpoints import digest, edit_config, make

Q_PROJ = "model.layers.*.self_attn.q_proj.weight"


def plan(family: str = "llama", **ask: Any) -> Plan:
    ask = {"hidden": 32, "layers": 2, "method": "weight_selection"} | ask
    return AutoSubclone.plan(families.model(family), **ask)


# ------------------------------------------------------------------------------------------------ consistency

GROUPS = {"kv_heads": Gather((0, 2), 4), "heads": Gather((0, 1, 4, 5), 8)}


def _maps(**changed: Any) -> dict[str, Any]:
    return dict(plan().maps) | {key.replace("__", "@"): value for key, value in changed.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {"layers": (0,)}}, r"1 layers are named, the target has 2"),
        ({"layers": {"layers": (0, 4)}}, r"layers \[4\] are outside the source's 0 to 3"),
        ({"layers": {"layers": (-1, 0)}}, r"layers \[-1\] are outside the source's 0 to 3"),
        ({"maps": {"width": Gather((0,), 1)}}, r"width names no axis; known are hidden, "),
        ({"maps": {"experts": Gather((0,), 1)}}, r"experts maps an axis that this model does not have"),
        (
            {"maps": {"hidden": Gather(tuple(range(16)), 64)}},
            r"hidden maps 64 to 16, the configs say 64 to 32",
        ),
        (
            {"maps": {"hidden": Gather(tuple(range(32)), 99)}},
            r"hidden maps 99 to 32, the configs say 64 to 32",
        ),
        ({"maps": {"hidden": Gather((64, *range(31)), 64)}}, r"hidden has an index outside 0 to 63"),
        ({"maps": {"hidden": Gather((-1, *range(31)), 64)}}, r"hidden has an index outside 0 to 63"),
        (
            {"maps": {"ffn@2": Rank(64, 96, "magnitude")}},
            r"ffn@2 is for a layer that the target does not have",
        ),
        (
            {"maps": {"hidden@lm_had.weight": Rank(32, 64, "magnitude")}},
            r"is for a parameter that the target does not have",
        ),
        ({"maps": {"heads": None}}, r"heads changes from 8 to 4, and no map says how"),
        (
            {"maps": {"hidden": None, "ffn": None}},
            r"ffn changes .* no map says how; hidden changes from 64 to 32",
        ),
        (
            {"maps": {"heads": Gather((0, 1, 2, 3), 8)}},
            r"heads: query head 2 comes from head 2 of kv group 1, but its kv head comes from group 2",
        ),
        (
            {"maps": {"kv_heads@1": Gather((3, 0), 4)}},
            r"layer 1: query head 0 comes from head 0 of kv group 0, but its kv head comes from group 3",
        ),
        ({"gains": {"model.nothing.weight": 2.0}}, r"gain 2.0 for model.nothing.weight"),
        ({"gains": {Q_PROJ: 0.0}}, r"gain 0.0 for model.layers"),
        ({"gains": {Q_PROJ: float("nan")}}, r"gain nan for model.layers"),
        ({"gains": {Q_PROJ: float("inf")}}, r"gain inf for model.layers"),
        ({"fresh": ("lm_had.weight",)}, r"fresh lm_had.weight: no such parameter"),
    ],
)
def test_an_inconsistent_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    good = plan()
    if "maps" in changes:
        maps = dict(good.maps) | changes["maps"]
        changes = {"maps": {key: value for key, value in maps.items() if value is not None}}
    with pytest.raises(
        PlanError, match=rf"^this weight_selection plan for LlamaForCausalLM is inconsistent: .*{message}"
    ):
        replace(good, **changes)


def test_every_problem_is_named() -> None:
    with pytest.raises(PlanError) as caught:
        replace(plan(), layers={"layers": (0, 9)}, gains={Q_PROJ: -1.0})
    assert "layers [9]" in str(caught.value)
    assert "gain -1.0" in str(caught.value)


def test_key_value_heads_reordered_alone_tear_the_groups() -> None:
    same_size = plan(hidden=64, layers=4)
    maps = {key: value for key, value in same_size.maps.items() if key != "heads"}
    replace(same_size, maps=maps)
    with pytest.raises(
        PlanError, match=r"query head 0 comes from head 0 of kv group 0, but its kv head comes"
    ):
        replace(same_size, maps=maps | {"kv_heads": Gather((1, 0, 2, 3), 4)})


def test_a_ranking_cannot_keep_more_than_there_is() -> None:
    grown = AutoSubclone.plan(families.model("llama"), ffn=100, method="random")
    with pytest.raises(PlanError, match=r"ffn keeps 100 of 96; a ranking only drops"):
        replace(grown, maps={"ffn": Rank(100, 96, "magnitude")})


def test_a_fresh_model_needs_no_maps() -> None:
    assert plan(method="random").maps == {}


# ------------------------------------------------------------------------------------------------ which map holds


def test_the_most_particular_map_holds() -> None:
    whole, layer, own = (Gather((*range(i, i + 48),), 96) for i in (0, 1, 2))
    name = "model.layers.1.mlp.up_proj.weight"
    scoped = replace(plan(ffn=48), maps=_maps(ffn=whole, ffn__1=layer) | {f"ffn@{name}": own})
    assert scoped.axis_map("ffn") == scoped.axis_map("ffn", 0) == whole
    assert (
        scoped.axis_map("ffn", 1) == scoped.axis_map("ffn", 1, "model.layers.1.mlp.down_proj.weight") == layer
    )
    assert scoped.axis_map("ffn", 1, name) == own
    assert scoped.axis_map("embedding") is None


def test_ranked_plans_are_open_and_gathered_ones_settled() -> None:
    assert plan().is_settled
    open_plan = plan(method="subclone")
    assert not open_plan.is_settled
    ranked = {key: value for key, value in open_plan.maps.items() if isinstance(value, Rank)}
    assert {key.partition("@")[0] for key in ranked} == {"hidden", "ffn", "heads", "kv_heads"}
    assert all(value.score == "magnitude" for value in ranked.values())
    applied = open_plan.apply(families.model("llama"))
    assert applied.hf_ws_plan.is_settled
    assert {k: (len(m), m.size) for k, m in applied.hf_ws_plan.maps.items()} == {
        k: (len(m), m.size) for k, m in open_plan.maps.items()
    }


# ------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe_mixed", "bert"])
def test_a_plan_comes_back_from_its_file(family: str, method: str, tmp_path: Path) -> None:
    made = plan(family, method=method)
    made.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == made
    assert str(loaded) == str(made)


@given(index=st.permutations(range(96)), keep=st.integers(1, 96))
def test_any_map_comes_back_from_its_file(
    index: list[int], keep: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    made = _with_ffn(keep, tuple(index[:keep]))
    made.save(path)
    assert Plan.load(path) == made


def _with_ffn(keep: int, index: tuple[int, ...]) -> Plan:
    return replace(
        _BASE,
        maps={"ffn": Gather(index, 96), "ffn@1": Rank(keep, 96, "activation")},
        target_sizes=_BASE.target_sizes | {"ffn": keep},
    )


_BASE = AutoSubclone.plan(families.model("llama"), method="weight_selection")


def test_saving_says_the_same_thing_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        plan(method="subclone").save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"format": 3}',
        '{"format": 3, "maps": []}',
        '{"format": 3, "maps": {"hidden": {"kind": "Gather"}}}',
        '{"format": 3, "maps": {"hidden": {"kind": "os.system", "index": [0], "size": 1}}}',
        '{"model_type": "llama", "hidden_size": 64}',
    ],
)
def test_a_file_that_is_no_plan_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"plan\.json is not a saved plan: "):
        Plan.load(path)


def test_a_binary_file_and_a_missing_one_are_no_plans(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for name in ("binary", "missing", "."):
        with pytest.raises(PlanError, match="is not a saved plan"):
            Plan.load(tmp_path / name)


def _edited(path: Path, **changes: Any) -> Path:
    plan().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_a_plan_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="is a plan of another format than 3; make it again"):
        Plan.load(_edited(tmp_path / "plan.json", format=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {"layers": [0, 7]}}, r"layers \[7\] are outside"),
        ({"layers": [0, 1]}, r"is not a saved plan"),
        ({"layers": 3}, r"is not a saved plan"),
        ({"layers": {"layers": ["0", "1"]}}, r"is not a saved plan"),
        (
            {"maps": {"hidden": {"kind": "Gather", "index": ["a"], "size": 64}}},
            r"is not a saved plan|inconsistent",
        ),
        ({"target_sizes": {}}, r"2 layers are named, the target has None"),
        ({"surprise": 1}, r"is not a saved plan"),
        ({"layouts": {"model.x": "(hidden"}}, r"is not a saved plan"),
    ],
)
def test_a_plan_that_someone_broke_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.load(_edited(tmp_path / "plan.json", **changes))


def test_a_plan_goes_nowhere_else(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the plan cannot be written to"):
        plan().save(tmp_path / "no" / "folder" / "plan.json")


# ------------------------------------------------------------------------------------------------ the right source


def test_a_plan_is_not_applied_to_another_size(tmp_path: Path) -> None:
    made = plan()
    with pytest.raises(
        PlanError, match=r"was made for LlamaForCausalLM with ffn=96, but LlamaForCausalLM has ffn=128"
    ):
        made.apply(families.model("llama", intermediate_size=128))


def test_a_plan_is_not_applied_to_another_class() -> None:
    with pytest.raises(PlanError, match="the live model is a MistralForCausalLM"):
        plan().apply(families.model("mistral"))


def test_a_settled_plan_is_only_for_the_weights_that_it_ranked() -> None:
    source = families.model("llama")
    settled = plan(method="subclone").apply(source).hf_ws_plan
    settled.apply(source)
    with torch.no_grad():
        source.model.norm.weight[0] += 1
    with pytest.raises(
        PlanError, match=r"was made for LlamaForCausalLM with fingerprint .*; make the plan again"
    ):
        settled.apply(source)


def test_a_plan_reads_nothing_but_the_config(tmp_path: Path) -> None:
    folder = make("llama", tmp_path)
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    before = digest(folder)
    for method in METHODS:
        made = AutoSubclone.plan(folder, hidden=12, layers=1, method=method)
        assert made.fingerprint is None
        assert made.target_config["hidden_size"] == 12
        assert made.parameters[1] < made.parameters[0]
    assert digest(folder) == before


def test_the_counts_in_a_plan_are_those_of_the_models() -> None:
    for family in ("llama", "gpt2", "llama_tied", "bert", "mixtral"):
        source = families.model(family)
        made = AutoSubclone.plan(source, hidden=32, layers=2, method="random")
        target = made.apply(source)
        assert made.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (source, target))


# ------------------------------------------------------------------------------------------------ printing

TABLE = """\
weight_selection(): LlamaForCausalLM from checkpoint

            source  target  keeps
----------  ------  ------  ---------------------------------------
hidden          24      12  12 of 24, every second: 0, 2, 4, 6, ...
heads            4       2  0 to 1
kv_heads         2       1  0
head_dim         6       6  all
ffn             40      16  16 of 40: 0, 3, 5, 8, ...
vocab           61      61  all
layers           2       1  0
parameters  12,264   2,508  20.5%
bytes       49,056  10,032"""


def test_a_plan_prints_as_a_table(tmp_path: Path) -> None:
    folder = make("llama", tmp_path).rename(tmp_path / "checkpoint")
    lines = str(AutoSubclone.plan(folder, hidden=12, layers=1, method="weight_selection")).splitlines()
    assert lines[0].endswith("checkpoint")
    assert lines[1:] == TABLE.splitlines()[1:]


def test_an_open_plan_prints_what_will_be_ranked(tmp_path: Path) -> None:
    text = str(
        AutoSubclone.plan(
            make("llama", tmp_path), hidden=12, layers=1, method="subclone", method_args={"rescale": False}
        )
    )
    assert text.startswith("subclone(rescale=False): LlamaForCausalLM from ")
    assert "the 12 of 24 highest by magnitude" in text
    assert "the 16 of 40 highest by magnitude" in text


def test_a_fresh_model_prints_that_nothing_is_kept(tmp_path: Path) -> None:
    text = str(AutoSubclone.plan(make("llama", tmp_path), hidden=12, method="random"))
    assert text.count("nothing: every weight is new") == 7


def test_indices_by_layer_and_by_parameter_are_said_to_differ() -> None:
    settled = plan(method="subclone").apply(families.model("llama")).hf_ws_plan
    assert "by layer; in the first, 64 of 96: " in str(settled)
    own = plan(method_args={"selection": "random", "consistent": False})
    assert "each parameter has indices of its own, for example hidden@" in str(own)


@pytest.mark.parametrize(
    ("axis_map", "text"),
    [
        (Gather((0, 1, 2), 3), "all"),
        (Gather((0, 1), 3), "0 to 1"),
        (Gather((4,), 6), "4"),
        (Gather((1, 3, 5), 6), "3 of 6, every second: 1, 3, 5"),
        (Gather((0, 3), 6), "2 of 6, every third: 0, 3"),
        (Gather((0, 4, 8, 12, 16), 20), "5 of 20, every 4th: 0, 4, 8, 12, ..."),
        (Gather((0, 2, 3), 6), "3 of 6: 0, 2, 3"),
        (Gather((*range(6), 8, 9, *range(11, 14)), 14), "11 of 14: 0 to 5, 8, 9, 11 to 13"),
        (Gather((0, *range(1, 33, 2)), 36), "17 of 36: 0, 1, 3, 5, ..."),
        (Gather((2, 1, 0), 6), "3 of 6: 2, 1, 0"),
        (Gather((1, 1, 1), 6), "3 of 6: 1, 1, 1"),
        (Rank(2, 6, "activation"), "the 2 of 6 highest by activation"),
        (Rank(6, 6, "activation"), "all"),
    ],
)
def test_a_map_says_what_it_keeps(axis_map: Gather | Rank, text: str) -> None:
    assert str(axis_map) == text


def test_bytes_are_those_of_the_stored_type(tmp_path: Path) -> None:
    made = AutoSubclone.plan(make("llama_bf16", tmp_path), hidden=12)
    assert f"bytes  {2 * made.parameters[0]:,}  {2 * made.parameters[1]:,}" in " ".join(
        str(made).split()
    ).replace("bytes ", "bytes  ").replace(f"{2 * made.parameters[0]:,} ", f"{2 * made.parameters[0]:,}  ")


def test_the_config_may_change_but_the_plan_does_not(tmp_path: Path) -> None:
    folder = make("llama", tmp_path)
    made = AutoSubclone.plan(folder, hidden=12, method="weight_selection")
    before = made.target_config["rms_norm_eps"]
    edit_config(folder, rms_norm_eps=1.0)
    assert made.apply(folder).config.rms_norm_eps == before


def test_a_settled_plan_says_by_what_it_ranked() -> None:
    source = families.model("mixtral")
    made = AutoSubclone.plan(
        source, method="subclone", hidden=32, experts=3, calibration=families.tokens(4, 16)
    )
    by = {key.partition("@")[0]: axis_map.by for key, axis_map in made.maps.items() if axis_map.by}
    assert by == {
        "hidden": "activation",
        "heads": "activation",
        "kv_heads": "activation",
        "ffn": "activation",
        "experts": "activation",  # by what the router gives them
    }
    assert "(highest by activation)" in str(made)
    assert "highest by" not in str(plan())


def test_a_fresh_classifier_is_not_said_to_be_kept_nor_rescaled() -> None:
    source = BertForSequenceClassification(families.config("bert", num_labels=4))
    made = AutoSubclone.plan(source, hidden=32, num_labels=2)
    assert made.fresh == ("classifier.weight", "classifier.bias")
    assert not set(made.fresh) & set(made.gains)
    assert re.search(r"labels +4 +2  nothing: every weight is new", str(made))


# ------------------------------------------------------------------------------------------------ one plan, two doors


def test_the_model_carries_the_plan_that_plan_makes(tmp_path: Path) -> None:
    folder, ids = make("llama", tmp_path), families.tokens(2, 8) % 61
    model = AutoSubclone.from_pretrained(folder, hidden=12, calibration=ids)
    assert model.hf_ws_plan == AutoSubclone.plan(folder, hidden=12, calibration=ids)
    again = model.hf_ws_plan.apply()  # it knows its folder
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_plan_that_does_not_know_where_its_source_is_asks_for_it() -> None:
    with pytest.raises(
        PlanError, match=r"made for LlamaForCausalLM, which is no folder here: give the source"
    ):
        plan().apply()


def test_the_dtype_asked_for_when_applying_is_in_the_plan() -> None:
    source = families.model("llama")
    made = plan().apply(source, dtype="bfloat16")
    assert made.dtype == made.config.dtype == torch.bfloat16
    assert made.hf_ws_plan.apply(source).dtype == torch.bfloat16
