"""The benchmark of starts: what comes next, going on after a kill, and what the tables say."""

from __future__ import annotations

import json
import lzma
import sysconfig
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks import starts
from benchmarks.starting import report as reporting
from benchmarks.starting import sources, units
from benchmarks.starting.arms import ARMS, CLAIMS, refusal, sizes_for
from benchmarks.starting.report import Report, final_table, tables
from benchmarks.starting.sources import RECIPES, Recipe, Source
from benchmarks.starting.units import LONG, PER_STEP, SHORT, Bench, Results, Stage, Unit
from hf_ws import AutoSubclone

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
SIZES = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 24}


def bench_of(tmp_path: Path, arms: list[str], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose source needs no training; only these arms, none refused."""
    monkeypatch.setattr(units, "ARMS", {name: ARMS[name] for name in arms})
    monkeypatch.setattr(units, "_refusal", lambda folder, arm, sizes: None)
    told = {"name": "demo", "fingerprint": "f"}
    source = Source("demo", tmp_path, {}, told, {"both-40": {}, "depth-1/2": {}})
    return Bench(source, Results(tmp_path / "cache", tmp_path / "committed"))


def result(unit: Unit, losses: list[float], **changes: Any) -> dict[str, Any]:
    """A result whose losses were measured at the first, a later, and the last step."""
    steps = [0, *(s for s in (50, 200, 1000) if s < unit.steps), unit.steps][: len(losses)]
    curve = [[step * PER_STEP, loss] for step, loss in zip(steps, losses, strict=True)]
    known = {"unit": asdict(unit), "fingerprint": "f", "parameters": 10, "seconds": 60.0, "diverged": False}
    return known | {"curve": curve, "final": {"start": losses[0], "end": losses[-1]}} | changes


# --- what comes next ---


def test_rates_are_chosen_on_whole_runs_and_the_grid_goes_on_at_its_edge(tmp_path, monkeypatch) -> None:
    bench = bench_of(tmp_path, ["subclone, no gains"], monkeypatch)
    monkeypatch.setattr(units, "STAGES", (Stage("ablations", SHORT, (0, 1), False),))
    best, ran = 1.6e-2, []
    while todo := list(units.left(bench)):
        unit = todo[0]
        ran.append((unit.steps, unit.seed, unit.rate))
        loss = abs(torch.log2(torch.tensor(unit.rate / best))).item()
        bench.results.add(unit, result(unit, [5.0, 4.0, 3.0, loss]))
    tried = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]  # the best is inside
    assert ran == [*((SHORT, 0, rate) for rate in tried), (SHORT, 1, best)]
    report = Report({"name": "demo"}, bench.results.all("demo", "f"))
    chosen = report.runs("subclone, no gains", SHORT).items()
    assert {seed: one["unit"]["rate"] for seed, one in chosen} == {0: best, 1: best}


def test_a_rate_that_diverges_is_not_chosen(tmp_path, monkeypatch) -> None:
    arm = "subclone, no gains"
    bench = bench_of(tmp_path, [arm], monkeypatch)
    for unit, loss in zip(bench.tried(arm), (3.0, 2.0, 1.0), strict=True):
        bench.results.add(unit, result(unit, [5.0, loss], diverged=loss == 1.0))
    assert bench.best_rate(arm) == 2e-3


def test_the_most_informative_units_come_first(tmp_path, monkeypatch) -> None:
    bench = bench_of(tmp_path, ["random", "subclone", "subclone, no gains"], monkeypatch)
    order = list(units.every(bench))
    assert [unit.steps for unit in order[:4]] == [0, 0, 0, SHORT]
    main, ablations = (
        next(i for i, u in enumerate(order) if u.arm == a and u.steps)
        for a in ("subclone", "subclone, no gains")
    )
    assert main < ablations
    assert len({unit.key for unit in order}) == len(order)
    assert {unit.target for unit in order if unit.rate} == {"both-40"}  # where rates are chosen


def test_committed_results_count_unless_the_source_is_another(tmp_path, monkeypatch) -> None:
    bench = bench_of(tmp_path, ["random"], monkeypatch)
    unit = Unit("demo", "both-40", "random", 0, 0)
    Report({"name": "demo"}, [result(unit, [5.0])]).write(tmp_path / "committed")
    again = Results(tmp_path / "cache", tmp_path / "committed")
    assert again.of(unit, "f") == result(unit, [5.0])
    assert again.of(unit, "another training") is None
    assert not bench.done(unit)
    assert Bench(bench.source, again).done(unit)


# --- the whole, in miniature ---


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A source of three layers on some modules of the library, runs of a few steps: the command line for it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for part, names in {
        "train": ["argparse", "ast", "csv", "shutil"],
        "test": ["calendar", "datetime", "dis"],
    }.items():
        text = "\n".join(f"==== {name}.py ====\n{(library / f'{name}.py').read_text()}" for name in names)
        (tmp_path / f"{part}.txt.xz").write_bytes(lzma.compress(text.encode()))
    made = Recipe("peps", {"both-40": SIZES}, partial(LlamaConfig, **TINY), LlamaForCausalLM, 3 * PER_STEP)
    monkeypatch.setitem(RECIPES, "llama-peps", made)
    monkeypatch.setattr(sources, "VOCAB", 300)
    monkeypatch.setattr(sources, "MEASURED", 16)
    monkeypatch.setattr(units, "CALIBRATION", 4)
    for module in (units, reporting):
        monkeypatch.setattr(module, "SHORT", 3)
    for name, value in {"RATES": (1e-3,), "LEAST": 1e-3, "MOST": 1e-3}.items():
        monkeypatch.setattr(units, name, value)
    few = {name: ARMS[name] for name in ("random", "subclone", "subclone, split heads")}
    stages = (Stage("start", 0, (0,), None), Stage("main", 3, (0,), True))
    for module in (units, starts):
        monkeypatch.setattr(module, "ARMS", few)
        monkeypatch.setattr(module, "STAGES", stages)
    command = ["--sources", "llama-peps", "--peps", str(tmp_path), "--cache", str(tmp_path / "cache")]
    return [*command, "--results", str(tmp_path / "results")]


def test_a_run_goes_on_where_it_was_and_leaves_results_and_plot(tiny, tmp_path, capsys) -> None:
    starts.main([*tiny, "--minutes", "0"])  # trains the source, begins no unit
    assert not list((tmp_path / "cache" / "units").iterdir())
    starts.main([*tiny, "--steps-up-to", "0"])
    made = {file.name: file.read_bytes() for file in (tmp_path / "cache" / "units").iterdir()}
    assert len(made) == 3
    starts.main(tiny)
    starts.main([*tiny, "--status"])
    assert "main: 2 of 2 done, 0.0 h left" in capsys.readouterr().out

    files = {file: file.read_bytes() for file in (tmp_path / "cache" / "units").iterdir()}
    assert len(files) == 3 + 2
    assert (
        made.items() <= {file.name: data for file, data in files.items()}.items()
    )  # what was there is not redone
    lost = next(file for file in files if "subclone--3steps" in file.name)
    lost.unlink()
    starts.main(tiny)
    again, before = json.loads(lost.read_text()), json.loads(files[lost])
    assert again["curve"] == before["curve"]  # the same unit again is the same run
    assert {file: file.read_bytes() for file in files if file != lost} == {
        file: data for file, data in files.items() if file != lost
    }
    assert not list((tmp_path / "cache" / "running").glob("*"))

    starts.main([*tiny, "--table"])
    printed = capsys.readouterr().out
    assert "| subclone, split heads |" in printed
    assert "final" not in printed
    kept = Report.read(tmp_path / "results" / "llama-peps.json")
    assert len(kept.units) == len(files)
    assert (tmp_path / "results" / "llama-peps.png").stat().st_size > 10_000
    starts.main([*tiny, "--final"])
    assert "final part: end" in capsys.readouterr().out


def test_results_of_another_training_of_a_source_are_not_mixed(tiny, tmp_path) -> None:
    starts.main([*tiny, "--only-sources"])
    other = {"name": "llama-peps", "fingerprint": "another"}
    Report(other, []).write(tmp_path / "results")
    with pytest.raises(SystemExit, match=r"another training of llama-peps \(another\) than the cache"):
        starts.main([*tiny, "--table"])


def test_the_peps_want_a_folder(tiny) -> None:
    with pytest.raises(SystemExit, match="give --peps FOLDER"):
        sources.documents("peps", None)


def test_nothing_trained_on_is_measured_on() -> None:
    parts = sources.documents("stdlib", None)
    names = {part: {one.name for one in found} for part, found in parts.items()}
    assert all(len(found) > 20 for found in names.values())
    assert not names["train"] & names["validation"] | names["train"] & names["final"]
    assert not names["validation"] & names["final"]


# --- arms ---


def test_every_arm_is_known_or_waits_for_something_named() -> None:
    """A row that is mistyped would wait for ever."""
    config = AutoConfig.from_pretrained(sources.DEMO)
    sizes = RECIPES["demo"].targets["both-40"]
    for name, arm in ARMS.items():
        why = refusal(arm, str(sources.DEMO), config, sizes)
        assert why is None or "the same as another arm" in why, f"{name}: {why}"


def test_split_heads_keep_every_head_at_about_the_same_parameters() -> None:
    arm, config = ARMS["subclone, split heads"], LlamaConfig(**sources.LLAMA)
    asked = sizes_for(arm, config, sources.WIDE_LLAMA["both-40"])
    assert (asked["heads"], asked["kv_heads"], asked["head_dim"]) == (6, 3, 42)
    assert refusal(arm, "none", config, {"layers": 4}) == "every head is kept by every arm"


def test_targets_have_about_the_parameters_that_they_are_named_after() -> None:
    for name in ("llama", "gpt2"):
        recipe = RECIPES[name]
        model_class, made = recipe.model_class, recipe.config(vocab_size=4096)
        with torch.device("meta"):
            whole = model_class(made).num_parameters(exclude_embeddings=False)
            table = 4096 * model_class(made).get_input_embeddings().embedding_dim
        rest = whole - table * (1 if made.tie_word_embeddings else 2)
        for target, sizes in recipe.targets.items():
            plan = AutoSubclone.plan(model_class(made), method="random", **sizes)
            own = plan.parameters[1] - 4096 * plan.target_sizes["hidden"] * (
                1 if made.tie_word_embeddings else 2
            )
            if target.endswith("-40"):
                assert 0.35 < plan.parameters[1] / whole < 0.45
            else:
                assert abs(own / rest - (0.5 if target.endswith("1/2") else 0.25)) < 0.03


def test_arms_and_claims_belong_together() -> None:
    assert all({claim.better, claim.worse} <= ARMS.keys() for claim in CLAIMS)
    assert len({(claim.better, claim.worse) for claim in CLAIMS}) == len(CLAIMS)


# --- the report ---


def told(**changes: Any) -> dict[str, Any]:
    known = {
        "name": "demo",
        "fingerprint": "f",
        "parameters": 10,
        "without_embeddings": 6,
        "trained_tokens": None,
    }
    return known | {"loss": 2.0, "bits_per_byte": 1.0, "final": {"loss": 2.1}} | changes


def runs(arm: str, losses: list[list[float]], steps: int = SHORT) -> list[dict[str, Any]]:
    return [result(Unit("demo", "both-40", arm, steps, seed, 1e-3), own) for seed, own in enumerate(losses)]


def test_figures_follow_from_the_curves() -> None:
    found = Report(told(), runs("random", [[8.0, 6.0, 5.0, 4.0]]) + runs("subclone", [[5.0, 3.0, 2.8, 2.6]]))
    assert found.gap_closed("subclone") == pytest.approx(0.5)  # 3 of 6 nats
    # Between step 0 (5.0) and step 50 (3.0) the random start's 4.0 lies half way.
    assert found.tokens_to_end_of("random", "subclone", SHORT) == [25 * PER_STEP]
    assert found.tokens_to_half_way("subclone", SHORT) == [200 * PER_STEP]
    assert found.tokens_to_end_of("subclone", "random", SHORT) == [None]
    row = next(line for line in tables(found).splitlines() if line.startswith("| subclone |"))
    assert row == (
        "| subclone | 0.001 | 50 % | 5.000 | 3.000 | 2.800 | 2.600 | 1 | 102,400 | 1/16 | 819,200 | 1,638,400 |"
    )
    assert (
        "| random | 0.001 | 0 % | 8.000 | 6.000 | 5.000 | 4.000 | 1 | 1,638,400 | 1/1 | never | never |"
        in tables(found)
    )


@pytest.mark.parametrize(
    ("ends", "verdict"),
    [
        ([2.5, 2.5, 2.5], "does not hold"),
        ([3.5, 3.52, 3.51], "holds"),
        ([3.2, 3.01, 3.01], "holds, barely"),
        ([3.1, 2.9, 3.1], "no difference"),
        ([3.1], "one seed: holds"),
    ],
)
def test_a_claim_holds_if_every_seed_says_so(ends: list[float], verdict: str) -> None:
    better = runs("subclone", [[5.0, 4.0, 3.5, 3.0]] * len(ends))
    worse = runs("subclone, no gains", [[5.5, 4.0, 3.5, end] for end in ends])
    row = next(line for line in tables(Report(told(), better + worse)).splitlines() if "gains help" in line)
    assert row.endswith(f"| {len(ends)} | {verdict} |")
    assert "| +0.500 |" in row


def test_aims_are_told_of_the_best_start_that_is_not_published() -> None:
    known = runs("random", [[8.0, 6.0, 5.0, 4.0]]) + runs("subclone", [[5.0, 3.0, 2.8, 2.6]])
    assert "Aims" not in tables(Report(told(), known))
    text = tables(Report(told(), known + runs("rotation", [[2.6, 2.5, 2.45, 2.4]])))
    assert "what `rotation` reached" in text
    assert "| gap closed at step 0 | at least 90 % | 90 % |" in text
    assert "| tokens to subclone's end | less than 1/2 of them | none |" in text
    assert f"| ahead of every published start, {SHORT} steps | always | at every checkpoint |" in text
    behind = Report(told(), known + runs("rotation", [[2.6, 2.5, 2.9, 2.7]]))
    assert "behind at step 200, 400" in tables(behind)


def test_the_second_held_out_part_is_in_one_table_alone() -> None:
    one = runs("random", [[8.0, 6.0, 5.0, 4.0]])
    one[0]["final"] = {"start": 7.777, "end": 3.333}
    found = Report(told(final={"loss": 1.111}), one)
    assert not any(text in tables(found) for text in ("7.777", "3.333", "1.111"))
    assert all(text in final_table(found) for text in ("7.777", "3.333", "1.111"))


def test_long_runs_have_a_table_of_their_own() -> None:
    found = Report(told(), runs("random", [[8.0, 6.0, 5.0, 4.0, 3.5]], LONG))
    assert f"| 0 | 50 | 200 | 1000 | end ({LONG}) |" in tables(found)
