"""A race of starts: halving, resuming, equal time, and a verdict that is as sure as it may be."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_ws.compare import Race, race
from hf_ws.compare.race import rungs
from hf_ws.compare.setup import Setup
from hf_ws.compare.spelling import Spelled, parsed, parted
from hf_ws.compare.verdict import verdict
from hf_ws.errors import DataError, DivergenceError, PlanError
from tests.test_compare import Counted, blocks, fresh


@pytest.fixture(scope="module")
def learned():
    """A start that has seen the language already."""
    from hf_ws.training import TrainConfig, train

    model = fresh(3)
    train(TrainConfig(steps=25, learning_rate=1e-2, progress=False), model=model, train_blocks=blocks(5))
    return model


def run(output, starts, **changes) -> Race:
    settings = {"steps": 8, "batch_size": 8, "learning_rates": [1e-2], "progress": False, "seeds": (0, 1)}
    settings |= {"data": blocks(0), "held_out": blocks(1, 16), "methods": []}
    settings |= changes
    if "seconds" in changes:
        del settings["steps"]
    return race("not read", output=output, starts=starts, **settings)


def test_the_better_half_goes_on_and_the_best_is_named(tmp_path, learned) -> None:
    starts = {"a": fresh, "b": lambda seed: fresh(seed + 10), "learned": lambda _: learned}
    starts |= {"c": lambda seed: fresh(seed + 20)}
    result = run(tmp_path, starts)
    assert [len(rung.standings) for rung in result.rungs] == [4, 2]
    assert [rung.budget for rung in result.rungs] == ["4 steps", "8 steps"]
    for rung in result.rungs:
        losses = [one.loss for one in rung.standings]
        assert losses == sorted(losses)
        assert rung.standings[0].label == "learned"
    assert {one.label for one in result.rungs[1].standings} == {
        one.label for one in result.rungs[0].standings[:2]
    }
    end = result.verdict
    assert end is not None
    assert (end.winner, end.seeds, end.blocks) == ("learned", 2, 8)
    assert end.confidence == 1.0
    assert 0 < end.low < end.lead < end.high

    for file in tmp_path.glob(
        "arms/*/result.json"
    ):  # nothing is measured on the way, for the end alone counts
        rows = json.loads(file.read_text())["rows"]
        assert {row["step"] for row in rows if row.get("eval_loss") is not None} == {0, rows[-1]["step"]}

    saved = json.loads((tmp_path / "race.json").read_text())
    assert saved["verdict"]["winner"] == "learned"
    assert [len(rung["starts"]) for rung in saved["rungs"]] == [4, 2]
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "race.md").read_text()
    assert table.count("\n| ") == 5
    assert "Winner: learned. Confidence 100.0% against" in table
    assert str(result) in table


def test_of_two_that_are_the_same_none_wins(tmp_path) -> None:
    end = run(tmp_path, {"one": fresh, "other": fresh}).verdict
    assert end is not None
    assert (end.lead, end.confidence, end.decided) == (0.0, 0.5, False)
    assert "Undecided; ahead at the end: one. Confidence 50.0% against other" in str(end)


def test_a_race_that_was_killed_goes_on(tmp_path) -> None:
    class Killed(Counted):
        def __call__(self, seed: int):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(seed)

    def starts(last) -> dict:
        return {"a": lambda seed: fresh(seed + 5), "b": fresh, "c": last}

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", starts(Killed(lambda seed: fresh(seed + 9))))
    first = Counted(lambda seed: fresh(seed + 5))
    resumed = run(tmp_path / "killed", {**starts(lambda seed: fresh(seed + 9)), "a": first})
    whole = run(tmp_path / "whole", starts(lambda seed: fresh(seed + 9)))
    for ours, theirs in zip(resumed.rungs, whole.rungs, strict=True):
        assert [one.losses for one in ours.standings] == [one.losses for one in theirs.standings]
    assert resumed.verdict == whole.verdict
    again = Counted(lambda seed: fresh(seed + 5))
    assert (
        run(tmp_path / "killed", {**starts(lambda seed: fresh(seed + 9)), "a": again}).verdict
        == whole.verdict
    )
    assert again.calls == 0
    assert first.calls <= 2  # the first rung's were there


def test_what_chooses_is_not_what_judges(tmp_path) -> None:
    from hf_ws.compare.race import _parted

    held_out = blocks(1, 17)
    setup = Setup.of(
        {
            "source": "",
            "output": tmp_path,
            "methods": [],
            "starts": {"a": fresh},
            "data": blocks(0),
            "held_out": held_out,
        }
    )
    bench = _parted(setup.bench(4, "race.json"))
    chooses, judges = (rows[:]["input_ids"] for rows in (bench.held_out, bench.judged))
    assert torch.equal(torch.cat([chooses, judges]), torch.cat([held_out[::2], held_out[1::2]]))


def test_equal_time_is_equal_steps_in_one_shape_and_measured_once(tmp_path) -> None:
    starts = {"a": fresh, "b": lambda seed: fresh(seed + 1)}
    result = run(tmp_path, starts, seconds=0.5, seeds=[0])
    speeds = [json.loads(file.read_text()) for file in tmp_path.glob("arms/speed-*/result.json")]
    assert len(speeds) == 2  # live starts may have any shape
    steps = {one.label: one.steps for one in result.rungs[0].standings}
    assert sorted(steps.values()) == sorted(max(1, round(0.5 / record["seconds"])) for record in speeds)
    again = Counted()
    assert run(tmp_path, {**starts, "a": again}, seconds=0.5, seeds=[0]).verdict == result.verdict
    assert again.calls == 0
    assert result.rungs[0].budget == "0.5 s"
    assert "equal training time" in str(result)


def test_only_the_best_before_training_enter(tmp_path, learned) -> None:
    starts = {"a": fresh, "learned": lambda _: learned, "b": lambda seed: fresh(seed + 10)}
    result = run(tmp_path, starts, best=2)
    assert len(result.rungs) == 1
    rows = blocks(1, 16)[::2]
    with torch.no_grad():
        own = float(learned.eval()(rows, labels=rows).loss)
    assert result.before["learned"] == pytest.approx(own, abs=1e-5)
    entered = sorted(result.before, key=result.before.__getitem__)[:2]
    assert {one.label for one in result.rungs[0].standings} == set(entered)
    assert "before training" in str(result)
    assert str(result).count("\n| ") == 4


def test_a_start_that_diverges_is_out_and_two_must_be_left(tmp_path) -> None:
    def broken(seed: int):
        model = fresh(seed)
        with torch.no_grad():
            model.lm_head.weight.fill_(math.nan)
        return model

    result = run(tmp_path / "a", {"a": fresh, "b": lambda seed: fresh(seed + 1), "broken": broken})
    assert [one.label for one in result.rungs[0].standings][-1] == "broken"
    assert "diverged" in str(result)
    with pytest.raises(DivergenceError, match="1 of 2 starts got through 8 steps"):
        run(tmp_path / "b", {"a": fresh, "broken": broken})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seconds": 3.0, "steps": 3}, PlanError, "give one of the two"),
        ({"seconds": -1.0}, PlanError, "seconds=-1.0; above 0"),
        ({"best": 1}, PlanError, "best=1; between 0 and 1, and at least 2"),
        ({"keep": 1.0}, PlanError, "keep=1.0"),
        ({"starts": {"a": fresh}}, PlanError, "a: a race is between two starts at least"),
        ({"held_out": blocks(1, 3)}, DataError, "3 held-out blocks; a race takes 4 at least"),
        ({"shapes": 2, "methods": ["random"]}, PlanError, "more than one only with params= or ratio="),
        ({"stepz": 2}, TypeError, "stepz"),
    ],
)
def test_bad_races_are_refused_before_work(tmp_path, changes, error, message) -> None:
    settings = {"steps": 4, "data": blocks(0), "held_out": blocks(1, 16), "methods": [], "progress": False}
    settings |= {"starts": {"a": fresh, "b": fresh}} | changes
    if "seconds" in changes and "steps" not in changes:
        del settings["steps"]
    with pytest.raises(error, match=message):
        race("not read", output=tmp_path / "new", **settings)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("arms", "keep"), [(2, 0.5), (3, 0.5), (7, 0.5), (20, 0.25), (5, 0.9)])
def test_rungs_shrink_to_two(arms: int, keep: float) -> None:
    counts = rungs(arms, keep)
    assert (counts[0], counts[-1]) == (arms, 2)
    for before, after in pairwise(counts):
        assert after < before
        assert after >= keep * before or after == before - 1


def test_confidence_is_that_of_a_paired_bootstrap() -> None:
    """Against what is known: a constant lead, symmetry, and the standard error of a mean over many blocks."""
    draw = np.random.default_rng(1)
    ours = draw.normal(3.0, 1.0, (1, 400)).repeat(3, axis=0)  # blocks differ far more than starts
    lead = draw.normal(0.01, 0.05, (1, 400)).repeat(3, axis=0)
    end = verdict("a", ours, "b", ours + lead)
    error = lead[0].std() / 20
    assert end.lead == pytest.approx(lead.mean())
    assert end.high - end.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    normal = 0.5 * (1 + math.erf(lead.mean() / error / math.sqrt(2)))
    assert end.confidence == pytest.approx(normal, abs=0.01)
    assert verdict("b", ours + lead, "a", ours).confidence == pytest.approx(1 - end.confidence, abs=1e-12)
    sure = verdict("a", ours, "b", ours + 0.25)
    assert (sure.confidence, sure.low, sure.high) == pytest.approx((1.0, 0.25, 0.25))
    luck = verdict("a", np.zeros((3, 400)), "b", np.array([[0.1], [-0.1], [0.05]]).repeat(400, axis=1))
    assert not luck.decided  # any number of blocks cannot say which seeds are the usual ones


def test_methods_options_and_shapes_race_as_they_are_in_the_table(tmp_path) -> None:
    """A method that wants data, one with a policy that does, and compensation: none is refused before it has them."""
    source = fresh(0)
    methods = ["rotation", "subclone(compensation=[least_squares])", "subclone(layer_policy=block_influence)"]
    result = race(
        source,
        output=tmp_path,
        steps=2,
        sizes={"ratio": 0.6},
        methods=methods,
        data=blocks(0),
        held_out=blocks(1, 16),
        learning_rates=[1e-3],
        seeds=[0],
        progress=False,
    )
    assert {one.label for one in result.rungs[0].standings} == set(methods)
    assert result.verdict is not None


def test_starts_are_spelled_with_their_options() -> None:
    assert parted("random, subclone(a=1, b=[2, 3]) ,x") == ["random", "subclone(a=1, b=[2, 3])", "x"]
    assert parsed("random") == Spelled("random", "random")
    found = parsed(" subclone( rescale=false,layer_policy=[0, 3], hidden=8 )")
    assert found.label == "subclone(rescale=false, layer_policy=[0, 3], hidden=8)"
    assert found.method_args == {"rescale": False}
    assert found.arguments == {"layer_policy": [0, 3], "hidden": 8}
    for wrong in ("subclone(", "subclone)", "subclone(rescale)", "subclone(a=1, a=2)", "a b", ""):
        with pytest.raises(PlanError):
            parsed(wrong) if wrong != "subclone)" else parted(wrong)
