"""Each statistic against plain float64 arithmetic on activations captured by name; saving, resuming, adding up."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, from_file
from transformers import PreTrainedModel

from hf_ws.errors import CalibrationError, OutputError
from hf_ws.evidence import BATCH, STATISTICS, Evidence, cache, calibrate, sums
from tests import families

IDS = families.tokens(rows=3, length=8)
MASK = torch.ones_like(IDS)
MASK[0, 5:], MASK[2, 3:] = 0, 0
PADDED = [{"input_ids": IDS, "attention_mask": MASK}]
KEPT = MASK.flatten().bool()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return families.model("llama").double()


def captured(model: PreTrainedModel, *names: str, **inputs: Tensor) -> tuple[dict[str, Tensor], Any]:
    """What enters each of these modules, gradients kept, and the model's output."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            value.retain_grad()
            seen[name] = value

        return keep

    hooks = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names]
    output = model(**inputs)
    for one in hooks:
        one.remove()
    return seen, output


def close(found: Tensor | None, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected.double(), rtol=tolerance, atol=tolerance)


def flat(values: Tensor) -> Tensor:
    return values.detach().flatten(0, 1)[KEPT].double()


PLACES = {
    ("ffn", 1): "model.layers.1.mlp.down_proj",
    ("heads", 2): "model.layers.2.self_attn.o_proj",
    ("hidden", 0): "model.layers.1",  # what enters a block is what the one before put out
}


@pytest.mark.parametrize("key", PLACES, ids=str)
def test_every_statistic_of_an_axis(llama: PreTrainedModel, key: tuple[str, int]) -> None:
    found = calibrate(llama, PADDED, wants=("rms", "mean", "variance", "taylor"))
    labels = IDS.masked_fill(MASK == 0, -100)
    seen, output = captured(llama, PLACES[key], **PADDED[0], labels=labels)
    (output.loss * (labels[:, 1:] != -100).sum()).backward()
    values = seen[PLACES[key]]
    groups = 8 if key[0] == "heads" else values.shape[-1]
    a = flat(values).unflatten(-1, (groups, -1))  # [tokens, size, channels of one index]
    g = flat(values.grad).unflatten(-1, (groups, -1))
    llama.zero_grad()
    close(found[key], a.abs().mean((0, 2)))
    close(found.statistic("rms", *key), a.pow(2).mean((0, 2)).sqrt())
    close(found.statistic("mean", *key), a.mean((0, 2)))
    close(found.statistic("variance", *key), a.var(0, correction=0).mean(1))
    close(found.statistic("taylor", *key), (a * g).sum(2).abs().mean(0), 1e-9)


def test_of_the_whole_net_the_blocks_are_summed(llama: PreTrainedModel) -> None:
    found = calibrate(llama, IDS, wants=("rms", "mean", "variance", "taylor"))
    for name in ("mean_abs", "rms", "mean", "variance", "taylor"):
        blocks = [found.statistic(name, "hidden", layer) for layer in range(4)]
        close(found.statistic(name, "hidden", None), torch.stack(blocks).sum(0))


def test_taylor_is_the_loss_of_setting_an_activation_to_zero_to_first_order() -> None:
    """Against a difference quotient: one neuron scaled up and down a little (GPT-2: float64 throughout)."""
    model, name = families.model("gpt2").double(), "transformer.h.2.mlp.c_proj"
    ids = families.tokens(rows=1, length=6)

    def loss(scale: float) -> float:
        def scaled(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            changed = args[0].clone()
            changed[..., 7] *= scale
            return (changed,)

        hook = model.get_submodule(name).register_forward_pre_hook(scaled)
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        hook.remove()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))

    slope = (loss(1 + 1e-4) - loss(1 - 1e-4)) / 2e-4  # d loss / d scale = sum over tokens of a dL/da
    seen, output = captured(model, name, input_ids=ids, labels=ids)
    (output.loss * 5).backward()
    each = (seen[name] * seen[name].grad).detach()[0, :, 7]
    assert float(each.sum()) == pytest.approx(slope, rel=1e-5)
    found = calibrate(model, ids, wants=("taylor",)).statistic("taylor", "ffn", 2)
    assert float(found[7]) == pytest.approx(float(each.abs().mean()), rel=1e-6)


READ = {
    "model.layers.2.self_attn.q_proj.weight": "model.layers.2.self_attn.q_proj",
    "model.layers.2.self_attn.v_proj.weight": "model.layers.2.self_attn.q_proj",
    "model.layers.0.mlp.gate_proj.weight": "model.layers.0.mlp.up_proj",
    "model.layers.3.mlp.down_proj.weight": "model.layers.3.mlp.down_proj",
    "model.layers.1.self_attn.o_proj.weight": "model.layers.1.self_attn.o_proj",
    "model.layers.1.input_layernorm.weight": "model.layers.1",
    "model.norm.weight": "model.norm",
    "lm_head.weight": "lm_head",
}


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
def test_moments(double: bool) -> None:
    model = families.model("llama")
    model = model.double() if double else model
    found = calibrate(model, PADDED, wants=("moments",)).moments
    seen, _ = captured(model, *dict.fromkeys(READ.values()), **PADDED[0])
    for name, place in READ.items():
        a, moments = flat(seen[place]), found[name]
        assert moments.count == len(a)
        assert (moments.mean.dtype, moments.second.dtype) == (torch.float64, torch.float32)
        close(moments.mean, a.mean(0), 1e-12 if double else 1e-6)
        scale = float((a.mT @ a / len(a)).abs().max())
        torch.testing.assert_close(moments.second.double(), a.mT @ a / len(a), rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gpt_neox", "phi3", "qwen3_moe", "opt_350m"])
def test_moments_are_there_for_every_matrix_and_norm(family: str) -> None:
    """By the source's names; q, k and v share one object, and the head sees all tokens."""
    model = families.model(family)
    found = calibrate(model, IDS, wants=("moments",)).moments
    modules = dict(model.named_modules())
    assert {*found} <= {*model.state_dict()}
    for name, weight in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        if weight.ndim == 2 and type(owner).__name__ in ("Linear", "Conv1D"):
            reads = weight.shape[0] if type(owner).__name__ == "Conv1D" else weight.shape[1]
            assert found[name].mean.shape == (reads,)
            assert found[name].count == IDS.numel()
    if family == "llama":
        q, k, v, o = (found[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkvo")
        assert q is k is v
        assert o is not q


def test_moments_do_not_depend_on_batching() -> None:
    model = families.model("llama").double()
    rows = families.tokens(rows=2 * BATCH + 3, length=5)
    whole = calibrate(model, [{"input_ids": rows}], wants=("moments",)).moments
    for name, moments in calibrate(model, rows, wants=("moments",)).moments.items():
        torch.testing.assert_close(moments.second, whole[name].second, rtol=1e-6, atol=1e-8)


def test_half_of_a_symmetric_sum_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """In panels of rows up to the diagonal, the last of them narrower; more batches than one."""
    monkeypatch.setattr(sums, "PANEL", 5)
    rows = torch.randn(3, 40, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = torch.zeros(17, 17, dtype=torch.float64)
    for batch in rows:
        sums.add_square(total, batch)
    expected = torch.einsum("bni,bnj->ij", rows, rows)
    assert not torch.allclose(total, expected)
    close(sums.mirrored(total), expected)


@pytest.mark.parametrize("came_as", [None, torch.float32, torch.bfloat16])
def test_squares_of_narrow_rows_are_as_exact(came_as: torch.dtype | None) -> None:
    """By whichever units; and what the caller says of float32 products holds again."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    rows = (
        torch.randn(300, 700, generator=torch.Generator().manual_seed(0)).to(came_as or torch.float32).float()
    )
    total = torch.zeros(700, 700)
    sums.add_square(total, rows, came_as)
    expected = rows.double().T @ rows.double()
    assert float((sums.mirrored(total).double() - expected).abs().max() / expected.abs().max()) < 2e-6
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_where_memory_is_scarce_moments_lie_in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = families.model("llama")
    expected = calibrate(model, IDS, wants=("moments",)).moments
    monkeypatch.setattr(sums.psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=25))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[str] = []
    monkeypatch.setattr(torch, "from_file", lambda name, **o: made.append(name) or from_file(name, **o))
    found = calibrate(model, IDS, wants=("moments",)).moments
    assert {Path(name).parent for name in made} == {tmp_path}
    assert len(made) == len({id(moments) for moments in found.values()})
    assert not [*tmp_path.iterdir()]
    for name, moments in found.items():
        assert torch.equal(moments.second, expected[name].second)


def test_no_room_in_memory_or_on_disk_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sums.psutil, "virtual_memory", lambda: SimpleNamespace(total=100, available=25))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OutputError, match=r"channels take .* GB of memory are left, and .* No space left .* TMPDIR"
    ):
        calibrate(families.model("llama"), IDS, wants=("moments",))
    assert not [*tmp_path.iterdir()]


def test_a_half_precision_model_s_products_are_taken_in_float32() -> None:
    """Rounding the products to bfloat16 would cost three digits."""
    model = families.model("llama").bfloat16()
    found = calibrate(model, IDS, wants=("moments",)).moments["model.layers.0.mlp.down_proj.weight"]
    with torch.no_grad():
        seen: list[Tensor] = []
        place = model.model.layers[0].mlp.down_proj
        hook = place.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
        model(IDS)
        hook.remove()
    exact = seen[0].mT @ seen[0] / len(seen[0])
    assert float((found.second.double() - exact).abs().max()) < 1e-6 * float(exact.abs().max())


def test_similarity_and_angles(llama: PreTrainedModel) -> None:
    found = calibrate(llama, PADDED, wants=("similarity", "angles"))
    names = [f"model.layers.{i}" for i in range(4)] + ["model.norm"]
    seen, _ = captured(llama, *names, **PADDED[0])
    units = [flat(seen[name]) / flat(seen[name]).norm(dim=1, keepdim=True) for name in names]
    assert found.angles["layers"].shape == (5, 5)
    for i, one in enumerate(units):
        for j, other in enumerate(units):
            angle = (one * other).sum(1).clamp(-1, 1).arccos().mean() / math.pi
            assert float(found.angles["layers"][i, j]) == pytest.approx(float(angle), abs=1e-7)
    for layer in range(4):
        expected = (units[layer] * units[layer + 1]).sum(1).mean()
        assert found.similarity[layer] == pytest.approx(float(expected), rel=1e-9)


def test_routes_are_what_the_router_chose() -> None:
    model = families.model("mixtral")
    found = calibrate(model, PADDED, wants=("routes",))
    with torch.no_grad():
        logits = model(**PADDED[0], output_router_logits=True).router_logits
    for layer in range(4):
        chosen = logits[layer].softmax(-1)[KEPT].double().topk(2)
        weights = chosen.values / chosen.values.sum(1, keepdim=True)
        dense = torch.zeros(int(KEPT.sum()), 6, dtype=torch.float64)
        close(found.routes[layer], dense.scatter(1, chosen.indices, 1.0).mean(0))
        close(found.route_weights[layer], dense.scatter(1, chosen.indices, weights).mean(0), 1e-6)


# ------------------------------------------------------------------------------------------------ what is left behind

EVERYTHING = tuple(STATISTICS)


def test_the_model_is_left_as_it_was_by_everything_at_once() -> None:
    model = families.model("mixtral")
    model.model.layers[0].mlp.gate.weight.requires_grad_(False)
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, IDS, wants=EVERYTHING)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_else_is_collected_changes_no_number() -> None:
    model = families.model("llama").double()
    alone, together = calibrate(model, IDS), calibrate(model, IDS, wants=EVERYTHING)
    for key, values in alone.items():
        torch.testing.assert_close(values, together[key], rtol=1e-12, atol=1e-12)


def test_an_unknown_statistic_and_one_not_collected_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(CalibrationError, match="statistic 'median' is unknown; known are mean_abs, rms"):
        calibrate(llama, IDS, wants=("median",))
    with pytest.raises(
        CalibrationError, match="this evidence holds mean_abs, not rms; collect it with calibrate"
    ):
        calibrate(llama, IDS, wants=("mean_abs",)).statistic("rms", "ffn", 0)
    assert calibrate(llama, IDS, wants=("rms",)).statistic("rms", "ffn", 99) is None
    with pytest.raises(CalibrationError, match="BertForMaskedLM gives no loss without labels"):
        calibrate(families.model("bert"), IDS, wants=("taylor",))


# ------------------------------------------------------------------------------------------------ saved and resumed


def same(one: Evidence, other: Evidence, tolerance: float = 0.0) -> None:
    def equal(a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    assert one.wants == other.wants
    for mine, theirs in (
        *((one.statistics[name], other.statistics[name]) for name in one.statistics),
        *((getattr(one, n), getattr(other, n)) for n in ("angles", "routes", "route_weights")),
    ):
        assert mine.keys() == theirs.keys()
        for key, values in mine.items():
            equal(values, theirs[key])
    assert one.moments.keys() == other.moments.keys()
    for name, moments in one.moments.items():
        assert moments.count == other.moments[name].count
        equal(moments.mean, other.moments[name].mean)
        torch.testing.assert_close(
            moments.second, other.moments[name].second, rtol=max(tolerance, 1e-6), atol=1e-7
        )
    assert one.similarity == pytest.approx(other.similarity, rel=max(tolerance, 1e-15))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_saved_evidence_is_the_same_evidence(family: str, tmp_path: Path) -> None:
    found = calibrate(families.model(family), IDS, wants=EVERYTHING)
    found.save(tmp_path / "evidence.safetensors")
    again = Evidence.load(tmp_path / "evidence.safetensors")
    same(again, found)
    assert again.fingerprint == found.fingerprint
    attention = "model.layers.0.self_attn.{}_proj.weight"
    assert again.moments[attention.format("q")] is again.moments[attention.format("v")]


def test_files_that_are_no_evidence_are_refused(tmp_path: Path, llama: PreTrainedModel) -> None:
    (tmp_path / "text").write_text("nothing of the kind")
    for name in ("text", "absent"):
        with pytest.raises(CalibrationError, match=f"{name} is no saved evidence"):
            Evidence.load(tmp_path / name)
    calibrate(llama, IDS, cache=tmp_path / "sums")
    with pytest.raises(CalibrationError, match=r"sums is no saved evidence; a cache is passed to calibrate"):
        Evidence.load(tmp_path / "sums")
    with pytest.raises(OutputError, match="evidence cannot be written to"):
        calibrate(llama, IDS).save(tmp_path / "absent" / "evidence")
    with pytest.raises(CalibrationError, match="text is no saved evidence"):
        calibrate(llama, IDS, cache=tmp_path / "text")


class Killed(BaseException):
    """What stops a run, whatever catches errors."""


def test_a_killed_calibration_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After three of five batches: the other two are run, and the sums are bit for bit those of one go."""
    model, ids = families.model("llama"), families.tokens(rows=4 * BATCH + 1, length=6)
    monkeypatch.setattr(cache, "EVERY", 0.0)
    monkeypatch.setattr(cache, "SHARE", 0.0)
    whole = calibrate(model, ids, wants=EVERYTHING)
    run, ran = model.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if len(ran) == 3:
            raise Killed
        ran.append(1)
        return run(*args, **kwargs)

    model.forward = forward
    with pytest.raises(Killed):
        calibrate(model, ids, wants=EVERYTHING, cache=tmp_path / "sums")
    assert [path.name for path in tmp_path.iterdir()] == ["sums"]
    counted: list[int] = []
    model.forward = lambda *args, **kwargs: counted.append(1) or run(*args, **kwargs)
    same(calibrate(model, ids, wants=EVERYTHING, cache=tmp_path / "sums"), whole)
    assert len(counted) == 2
    same(calibrate(model, ids, wants=EVERYTHING, cache=tmp_path / "sums"), whole)
    assert len(counted) == 2  # it is done: nothing runs


@pytest.mark.parametrize("what", ["weights", "data", "code", "wants"])
def test_a_cache_of_something_else_is_refused(
    what: str, llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(llama, IDS, wants=("mean_abs",), cache=tmp_path / "sums")
    model, ids, wants = llama, IDS, ("mean_abs",)
    if what == "weights":
        model = families.model("llama").double()
        with torch.no_grad():
            model.model.norm.weight[0] += 1
    elif what == "data":
        ids = IDS.roll(1, 0)
    elif what == "code":
        monkeypatch.setattr("hf_ws.evidence.fingerprint.FORMAT", 0)
    else:
        wants = ("mean_abs", "rms")
    with pytest.raises(CalibrationError, match=f"sums is of other {what}; remove it, or name another file"):
        calibrate(model, ids, wants=wants, cache=tmp_path / "sums")


def test_processes_add_up_everything(tmp_path: Path) -> None:
    """Two processes with a cache give what one gives, and leave one file; a third run finds it done."""
    model, ids = families.model("mixtral"), families.tokens(rows=3 * BATCH, length=6)
    whole = calibrate(model, ids, wants=EVERYTHING)
    torch.multiprocessing.spawn(_share, (model, ids, tmp_path), 2)
    for rank in range(2):
        same(Evidence.load(tmp_path / f"{rank}.evidence"), whole, 1e-5)
    assert sorted(path.name for path in tmp_path.iterdir() if "sums" in path.name) == ["sums"]
    same(calibrate(model, ids, wants=EVERYTHING, cache=tmp_path / "sums"), whole, 1e-5)


def _share(rank: int, model: PreTrainedModel, ids: Tensor, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    cache.EVERY = 0.0
    calibrate(model, ids, wants=EVERYTHING, cache=folder / "sums").save(folder / f"{rank}.evidence")
    torch.distributed.destroy_process_group()
