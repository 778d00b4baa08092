"""The laws of the design, on every family: identity, dead weight, replay, stock, whole heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from hf_ws import AutoSubclone, Plan
from hf_ws.axes import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, MOE_FFN, parse, positions
from hf_ws.layouts import certify, generic
from hf_ws.layouts.select import select
from hf_ws.maps import Blocks
from hf_ws.methods import METHODS
from hf_ws.sizes import field_of, sizes_of
from tests import families

TRANSFERRING = [name for name in METHODS if name != "random"]
IDS = families.tokens(4, 16)


def half(source: PreTrainedModel) -> dict[str, int]:
    """Half of hidden, ffn, heads and layers at once; rotary head_dim stays."""
    return {"hidden": sizes_of(source.config)[HIDDEN] // 2, "layers": 2}


@pytest.mark.parametrize("method", TRANSFERRING)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_equal_sizes_give_bit_identical_weights(family: str, method: str) -> None:
    source = families.model(family)
    target = AutoSubclone.from_pretrained(source, method=method, calibration=IDS)
    wanted, made = source.state_dict(), target.state_dict()
    assert wanted.keys() == made.keys()
    assert all(torch.equal(wanted[name], made[name]) for name in wanted)
    assert torch.equal(families.logits(source), families.logits(target))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_shrunk_model_is_stock(family: str, method: str, tmp_path: Path) -> None:
    """Saved, Transformers loads it with every key in place and ties kept; it generates alike with and without cache."""
    source = families.model(family)
    calibration = IDS if method == "rotation" else None
    target = AutoSubclone.from_pretrained(source, method=method, calibration=calibration, **half(source))
    assert sizes_of(target.config)[HIDDEN] == sizes_of(source.config)[HIDDEN] // 2
    assert (
        sizes_of(target.config)[HEADS] * sizes_of(target.config)[HEAD_DIM] >= sizes_of(target.config)[HEADS]
    )
    target.save_pretrained(tmp_path)
    again, info = type(source).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(
        info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    assert sizes_of(AutoConfig.from_pretrained(tmp_path)) == sizes_of(target.config)
    if again.config.tie_word_embeddings == source.config.tie_word_embeddings:  # a turned stream is untied
        assert again.get_expanded_tied_weights_keys(all_submodels=True).keys() == (
            source.get_expanded_tied_weights_keys(all_submodels=True).keys()
        )
    out = families.logits(again)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, families.logits(target), rtol=0, atol=0)
    if again.can_generate() and family in families.DECODERS:
        prompt = families.tokens(1, 5)
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached = again.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **settings)
        plain = again.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **settings)
        assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_dead_neurons_leave_without_a_trace(family: str) -> None:
    """A third of the neurons are silenced at random; ranking by activation, gains off, removes just these."""
    source = families.model(family)
    certificate, sizes = certify(type(source), source.config), sizes_of(source.config)
    inner = next((axis for axis in (MOE_FFN, FFN) if axis in certificate.axes), FFN)
    if field_of(source.config, inner) is None:  # BLOOM and MPT: ffn is 4 x hidden, always
        with pytest.raises(ValueError, match="it follows the other sizes"):
            AutoSubclone.plan(source, ffn=sizes[inner] - 32)
        return
    dead = torch.randperm(sizes[inner])[: sizes[inner] // 3]
    _silence(source, inner, dead)
    keep = sizes[inner] - len(dead)
    asked = {"ffn": keep} if inner == FFN else {"moe_intermediate_size": keep}
    target = AutoSubclone.from_pretrained(
        source, method="subclone", method_args={"rescale": False}, calibration=IDS, **asked
    )
    _assert_same_function(source, target)


@pytest.mark.parametrize("selection", ["uniform", "consecutive", "random"])
def test_the_source_is_only_read(selection: str) -> None:
    """The target shares no memory with a live source, whichever way its tensors were cut."""
    source = families.model("gpt2")
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    target = AutoSubclone.from_pretrained(
        source, method="weight_selection", method_args={"selection": selection}, **half(source)
    )
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())


def _assert_same_function(source: PreTrainedModel, target: PreTrainedModel) -> None:
    wanted = families.logits(source, IDS)
    tolerance = (1e-12 if _exact(source) else 2e-6) * float(wanted.abs().max())
    torch.testing.assert_close(families.logits(target, IDS), wanted, rtol=0, atol=tolerance)


def _exact(source: PreTrainedModel) -> bool:
    """Whether the class computes in the model's own precision throughout; RMSNorm classes use float32 inside."""
    return not any("RMSNorm" in type(module).__name__ for module in source.modules())


@pytest.mark.parametrize(
    "family", [f for f in families.DECODERS if field_of(families.config(f), HEAD_DIM) is not None]
)
def test_dead_heads_leave_without_a_trace(family: str) -> None:
    """Half of the kv groups are silenced with their query heads; ranking removes just these, in each layer."""
    source = families.model(family)
    sizes = sizes_of(source.config)
    dead = torch.randperm(sizes[KV_HEADS])[: sizes[KV_HEADS] // 2]
    _silence(source, KV_HEADS, dead)
    target = AutoSubclone.from_pretrained(
        source,
        heads=sizes[HEADS] // 2,
        kv_heads=sizes[KV_HEADS] // 2,
        method="subclone",
        method_args={"rescale": False},
        calibration=IDS,
    )
    _assert_same_function(source, target)


@torch.no_grad()
def _silence(source: PreTrainedModel, axis: str, dead: torch.Tensor) -> None:
    """Zero what these indices write."""
    certificate, sizes = certify(type(source), source.config), sizes_of(source.config)
    alive = sorted(set(range(sizes[axis])) - set(dead.tolist()))
    maps, smaller = {axis: alive}, {**sizes, axis: len(alive)}
    if axis == KV_HEADS:  # the query heads of a group stay with it
        width = sizes[HEADS] // sizes[KV_HEADS]
        maps[HEADS] = [g * width + i for g in alive for i in range(width)]
        smaller[HEADS] = len(maps[HEADS])
    for name, parameter in source.named_parameters():
        pattern, layer = generic(name, certificate.stacks)
        for at, dim in enumerate(parse(certificate.layouts[pattern])):
            if layer is None or not set(dim.axes) & set(maps) or dim.reads:
                continue
            kept = torch.from_numpy(positions(dim, sizes, smaller, maps))
            mask = torch.zeros(parameter.shape[at])
            mask[kept] = 1
            parameter.mul_(mask.view([-1 if d == at else 1 for d in range(parameter.ndim)]))


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_saved_plan_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    """From one file or many shards, with one thread or two, from a plan that went through JSON."""
    source = families.model(family)
    source.save_pretrained(tmp_path / "whole")
    source.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    first = AutoSubclone.from_pretrained(tmp_path / "whole", calibration=IDS, **half(source))
    first.save_pretrained(tmp_path / "first")
    first.hf_ws_plan.save(tmp_path / "plan.json")
    replayed = Plan.load(tmp_path / "plan.json")
    assert replayed == first.hf_ws_plan
    replayed.apply(tmp_path / "whole").save_pretrained(tmp_path / "second")
    sharded = AutoSubclone.from_pretrained(tmp_path / "shards", calibration=IDS, **half(source))
    sharded.save_pretrained(tmp_path / "third")
    bytes_of = {n: (tmp_path / n / "model.safetensors").read_bytes() for n in ("first", "second", "third")}
    assert bytes_of["first"] == bytes_of["second"] == bytes_of["third"]
    assert load_file(tmp_path / "first" / "model.safetensors")


@pytest.mark.parametrize("family", families.FAMILIES)
def test_layer_lists_follow_the_kept_layers(family: str) -> None:
    """Dropping a layer equals skipping it in the source: pre-norm or not, the other layers run as they did."""
    source = families.model(family)
    kept = [0, 2, 3]
    target = AutoSubclone.from_pretrained(source, layer_policy=kept, method="weight_selection")
    (stack,) = certify(type(source), source.config).stacks
    layers = source.get_submodule(stack)
    pruned = torch.nn.ModuleList(layers[i] for i in kept)
    parent, _, name = stack.rpartition(".")
    setattr(source.get_submodule(parent), name, pruned)
    for key in ("num_hidden_layers", "layer_types"):
        if key in vars(target.config):
            setattr(source.config, key, getattr(target.config, key))
    torch.testing.assert_close(families.logits(target), families.logits(source), rtol=0, atol=0)
    assert sizes_of(target.config)[LAYERS] == 3


@pytest.mark.parametrize("kind", ["selected", "copied", "turned", "mixed heads"])
def test_a_tensor_on_another_device_stays_there(kind: str) -> None:
    """As the weights of a live model on a GPU do; the device without memory stands for it."""
    given = {
        "selected": np.array([3, 0]),
        "copied": np.array([0, 0, 1, 1, 2, 3]),
        "turned": (np.ones((2, 4)), np.ones((2, 4))),
        "mixed heads": Blocks((0, 1, 2, 3), np.ones((2, 2, 3, 3))),
    }[kind]
    target = {"hidden": len(given[0]) if isinstance(given, tuple) else len(given), "head_dim": 3}
    tensor = torch.empty(5, 12, device="meta")
    made = select(
        tensor, parse("5 <(hidden head_dim)"), {"hidden": 4, "head_dim": 3}, target, {"hidden": given}
    )
    assert made.device == tensor.device
    assert made.shape == (5, 3 * target["hidden"])
