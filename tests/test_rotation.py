"""Rotation: which classes can be turned, that turning is exact, and what is kept when directions are dropped."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    Qwen2ForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_ws import AutoSubclone, Plan
from hf_ws.axes import HIDDEN, parse, positions
from hf_ws.distill.states import Correspondence, state_losses, watched
from hf_ws.errors import CalibrationError, UnsupportedArchitectureError
from hf_ws.layouts import certify, generic, run, select
from hf_ws.layouts.norms import eps_of
from hf_ws.layouts.turn import turned, turning, with_mean, zero_mean_basis
from hf_ws.maps import Dense, Turn
from hf_ws.methods import Request
from hf_ws.sizes import sizes_of
from hf_ws.turns import level
from tests import families

IDS = families.tokens(8, 16)

TIED = [
    family for family in families.FAMILIES if getattr(families.config(family), "tie_word_embeddings", False)
]
AFTER_THE_SUM = ("opt_350m", *families.ENCODERS)
"""The norm's output is the stream."""
ON_WHAT_IS_ADDED = ("gemma2", "gemma3_text", "olmo2")
"""A norm between a block and the sum."""
ON_THE_EMBEDDING = ("bloom",)
REFUSED = {*AFTER_THE_SUM, *ON_WHAT_IS_ADDED, *ON_THE_EMBEDDING}
TURNED = [family for family in families.FAMILIES if family not in REFUSED]


def whole(request: Request) -> Plan:
    """The stream turned, with nothing left out."""
    found = turning(request.model_class, request.source_config, request.certificate)
    size = request.before[HIDDEN]
    return request.untied().plan({HIDDEN: Turn(size, size, found.centred)}, folds=found.folds)


@pytest.mark.parametrize("family", TURNED)
def test_at_full_size_the_function_stays(family: str) -> None:
    source = families.model(family).double()
    target = AutoSubclone.from_pretrained(source, method=whole, calibration=IDS, dtype="float64")
    with run.plain_arithmetic(source.config):  # some norms compute in float32 inside
        wanted = families.logits(source)
        error = float((families.logits(target) - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-9
    name = next(name for name, t in target.named_parameters() if t.ndim == 2)
    assert not torch.equal(dict(target.named_parameters())[name], source.state_dict()[name])


@torch.no_grad()
@pytest.mark.parametrize("family", TURNED)
def test_at_full_size_in_single_precision(family: str) -> None:
    source = families.model(family)
    target = AutoSubclone.from_pretrained(source, method=whole, calibration=IDS)
    wanted, found = (model(IDS, use_cache=False).logits for model in (source, target))
    assert wanted.dtype == found.dtype == torch.float32
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4


VISION = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96, "image_size": 32,
    "patch_size": 8, "num_labels": 5, "mlp_ratio": 2,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
PEGASUS = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "tie_word_embeddings": False,
    "pad_token_id": 0, "decoder_start_token_id": 0, "max_position_embeddings": 32,
}  # fmt: skip
WORDS = torch.arange(24).view(2, 12) % 60 + 3
ELSEWHERE = {
    "vit": lambda: (ViTForImageClassification(ViTConfig(**VISION)), "pixel_values"),
    "deit": lambda: (DeiTForImageClassification(DeiTConfig(**VISION)), "pixel_values"),
    "beit": lambda: (BeitForImageClassification(BeitConfig(**VISION)), "pixel_values"),  # LayerScale
    "dinov2": lambda: (Dinov2ForImageClassification(Dinov2Config(**VISION)), "pixel_values"),  # two tokens' norms
    "dinov2, gated": lambda: (
        Dinov2ForImageClassification(Dinov2Config(**VISION, use_swiglu_ffn=True)), "pixel_values"),
    "data2vec": lambda: (
        Data2VecVisionForImageClassification(Data2VecVisionConfig(**VISION)), "pixel_values"),
    "deit with teacher": lambda: (
        DeiTForImageClassificationWithTeacher(DeiTConfig(**VISION)), "pixel_values"),
    "pegasus": lambda: (PegasusForConditionalGeneration(PegasusConfig(**PEGASUS)), "decoder_input_ids"),
    "classifier": lambda: (
        Qwen2ForSequenceClassification(families.config("qwen2", num_labels=5)), "input_ids"),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_at_full_size_the_function_of_other_classes_stays(name: str) -> None:
    """Images, an encoder with a decoder, a classifier."""
    torch.manual_seed(2)
    source, given = ELSEWHERE[name]()
    with torch.no_grad():
        for parameter in source.eval().double().parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32).double()} if given == "pixel_values" else {}
    batch |= {key: WORDS for key in ("input_ids", "decoder_input_ids") if given.endswith(key)}
    target = AutoSubclone.from_pretrained(source, method=whole, calibration=[batch], dtype="float64")
    with run.plain_arithmetic(source.config):
        wanted, found = (model(**batch) for model in (source, target))
    key = "logits" if "logits" in wanted else "last_hidden_state"
    assert float((found[key] - wanted[key]).abs().max() / wanted[key].abs().max()) < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "phi", "starcoder2"])
def test_a_bias_that_the_norm_has_no_room_for_goes_to_its_readers(family: str) -> None:
    """A LayerNorm model whose stream never leaves half of its directions, and whose dropped heads say nothing, loses
    nothing, though its norms' biases leave them."""
    source, sizes = _half_asleep(family)
    half = {axis: sizes[axis] // 2 for axis in ("hidden", "heads", "kv_heads")}
    target = AutoSubclone.from_pretrained(
        source, ffn=sizes["ffn"], method="rotation", calibration=IDS, dtype="float64", **half
    )
    wanted = families.logits(source)
    assert float((families.logits(target) - wanted).abs().max() / wanted.abs().max()) < 1e-6


def _half_asleep(family: str) -> tuple[PreTrainedModel, dict[str, int]]:
    """A model of which half of the heads, and of the directions of the stream, could as well not be there. Its stream
    is loud, so that a norm's epsilon is nothing beside it. Where a head has no bias, the last norm's stays inside."""
    source = families.model(family, tie_word_embeddings=False).double()
    certificate, sizes = certify(type(source), source.config), sizes_of(source.config)
    found = turning(type(source), source.config, certificate)
    size, parameters = sizes[HIDDEN], dict(source.named_parameters())
    generator = torch.Generator().manual_seed(3)
    free = torch.randn(size - 1, size // 2 - 1, generator=generator, dtype=torch.float64)
    basis = torch.from_numpy(zero_mean_basis(size)) @ torch.linalg.qr(free)[0]
    inside = basis @ basis.T + 1 / size
    gone = {axis: np.arange(sizes[axis] // 2, sizes[axis]) for axis in ("heads", "kv_heads")}
    half = sizes | {axis: len(index) for axis, index in gone.items()}
    norms = {*found.folds, *(fold.bias for fold in found.folds.values())}
    with torch.no_grad():
        for name, tensor in parameters.items():
            pattern = certificate.pattern(name)
            layout = () if pattern in norms else parse(certificate.layouts[pattern])
            for at, dim in enumerate(layout):
                if dim.expression == HIDDEN and not dim.reads:
                    tensor.copy_(torch.tensordot(tensor, inside, dims=([at], [0])).movedim(-1, at))
                    tensor.mul_(1.0 if layout[0].expression != "vocab" else 100.0)
                if dim.reads and "heads" in dim.axes:
                    tensor.index_fill_(at, torch.from_numpy(positions(dim, sizes, half, gone)), 0.0)
            fold = found.folds.get(pattern)
            readers = [reader.removesuffix("weight") for reader in fold.readers] if fold else []
            if any(f"{reader}bias" not in certificate.layouts for reader in readers):
                bias = parameters[f"{name.removesuffix('weight')}bias"]
                bias.copy_(tensor * (inside @ bias))
    return source, sizes


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_cannot_be_turned_is_said_and_selected_from(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = families.model(family)
    with pytest.raises(UnsupportedArchitectureError, match="hidden cannot be turned"):
        turning(type(source), source.config, certify(type(source), source.config))
    hidden = {HIDDEN: 32}
    with caplog.at_level(logging.WARNING, "hf_ws"):
        target = AutoSubclone.from_pretrained(
            source, method="rotation", calibration=IDS, compensation=(), **hidden
        )
    assert "selected by importance instead" in caplog.text
    asked = {"method": "subclone", "method_args": {"score": "explained"}, **hidden}
    chosen = AutoSubclone.from_pretrained(source, calibration=IDS, **asked)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), chosen.parameters(), strict=True))


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "gemma"]
)  # the others' heads are as wide as hidden says
def test_what_lies_in_a_subspace_is_kept_whole(family: str) -> None:
    """A source whose stream never leaves some 32 of 64 directions, none of them a channel, loses nothing."""
    small = families.model(family, hidden_size=32, tie_word_embeddings=False)
    source = _in_a_subspace(family, small)
    torch.testing.assert_close(families.logits(source), families.logits(small), rtol=2e-4, atol=2e-4)
    target = AutoSubclone.from_pretrained(
        source, hidden=32, heads=8, kv_heads=4, ffn=96, method="rotation", calibration=IDS
    )
    torch.testing.assert_close(families.logits(target), families.logits(small), rtol=2e-3, atol=2e-3)


def test_the_states_of_a_turned_stream_are_compared_in_its_basis() -> None:
    """Nothing is lost of a stream in a subspace: the start gives its source's states, in the plan's directions."""
    source = _in_a_subspace("llama", families.model("llama", hidden_size=32, tie_word_embeddings=False))
    target = AutoSubclone.from_pretrained(
        source, hidden=32, heads=8, kv_heads=4, ffn=96, method="rotation", calibration=IDS
    )
    pairs = Correspondence.of(target, source, target.hf_ws_plan)
    seen = []
    for model, names in (
        (target, [pair.student for pair in pairs.layers]),
        (source, [pair.teacher for pair in pairs.layers]),
    ):
        with torch.no_grad(), watched(model, names, []) as states:
            model(IDS)
        seen.append(states)
    losses = state_losses(["hidden_mse", "hidden_cosine"], pairs, *seen, None)
    assert max(losses.values()) < 1e-5


@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_of_fewer_channels_gives_what_it_gave(centred: bool) -> None:
    """LayerNorm and RMSNorm of what lies in the kept directions, against PyTorch's own."""
    basis = torch.linalg.qr(torch.randn(64 - centred, 32 - centred).double())[0].numpy()
    matrix = with_mean(zero_mean_basis(32), zero_mean_basis(64) @ basis) if centred else basis.T
    kept = torch.from_numpy(matrix)
    stream = torch.randn(5, 32).double() @ kept
    if centred:
        stream = stream - stream.mean(1, keepdim=True)
    stream = stream / stream.norm(
        dim=1, keepdim=True
    )  # 1/64 is the mean square of all 64, 1/32 of the 32 kept
    norm = torch.nn.functional.layer_norm if centred else torch.nn.functional.rms_norm
    for eps in (0.0, 1e-3):
        wanted = norm(stream, (64,), eps=eps) @ kept.T
        given = norm(stream @ kept.T, (32,), eps=eps) * level(1 / 32, 1 / 64, eps)
        torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)
    assert level(1 / 32, 1 / 64, 0.0) == pytest.approx(2**0.5)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-6, 1e-5, 1e-2])
@pytest.mark.parametrize("kind", [torch.nn.LayerNorm, LlamaRMSNorm, GemmaRMSNorm])
def test_the_epsilon_of_a_norm_is_found(kind: type[torch.nn.Module], eps: float) -> None:
    norm = kind(9, eps=eps).double()
    with torch.no_grad(), run.plain_arithmetic(families.config("llama")):
        for parameter in norm.parameters():
            parameter.add_(torch.rand_like(parameter))
        assert eps_of(norm, 9) == pytest.approx(eps, rel=1e-6, abs=1e-13)


def _in_a_subspace(family: str, small: PreTrainedModel) -> PreTrainedModel:
    """The same function in twice as many channels, none of which says anything alone: read and written through a
    random isometry, the norms making up for the larger number of channels."""
    source = families.model(family, tie_word_embeddings=False)
    size, found = (
        sizes_of(small.config),
        turning(type(small), small.config, certify(type(small), small.config)),
    )
    free = size[HIDDEN] - found.centred
    into = torch.linalg.qr(torch.randn(2 * size[HIDDEN] - found.centred, free).double())[0].numpy()
    if found.centred:
        isometry = with_mean(zero_mean_basis(2 * size[HIDDEN]) @ into, zero_mean_basis(size[HIDDEN]))
    else:
        isometry = into
    state = small.state_dict()
    names = {generic(name, certify(type(small), small.config).stacks): t for name, t in state.items()}
    certificate, made = certify(type(small), small.config), {}
    for name, tensor in state.items():
        pattern, layer = generic(name, certificate.stacks)

        def gain(norm: str, layer: int | str | None = layer) -> torch.Tensor | None:
            return names.get((norm, layer), names.get((norm, None)))

        sides = isometry, isometry
        value, own = turned(tensor, pattern, found.folds, sides, gain, lambda _: 0.5**0.5)
        layout = parse(certificate.layouts[pattern])
        sizes = sizes_of(source.config)
        made[name] = select(tensor, layout, size, sizes, {HIDDEN: own}) if value is None else value
    if family == "gemma":  # its class multiplies by the root of hidden, which is twice as long
        made["model.embed_tokens.weight"] *= 0.5**0.5
    source.load_state_dict(made)
    return source


def test_a_tied_head_may_stay_tied() -> None:
    """Then the basis is a selection, and the model has no parameter more than its sizes say."""
    source = families.model("llama", tie_word_embeddings=True)
    options = {"hidden": 32, "heads": 8, "kv_heads": 4, "calibration": IDS, "method": "rotation"}
    free = AutoSubclone.from_pretrained(source, **options)
    tied = AutoSubclone.from_pretrained(source, method_args={"untie": False}, **options)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert free.num_parameters() - tied.num_parameters() == families.VOCAB * 32
    for model in (free, tied):
        assert model.hf_ws_plan.parameters == (source.num_parameters(), model.num_parameters())
    kept = list(tied.hf_ws_plan.maps[HIDDEN].index)
    assert torch.equal(tied.lm_head.weight, source.lm_head.weight[:, kept])
    untied = families.model("llama", tie_word_embeddings=False)
    plans = [AutoSubclone.plan(untied, method_args=args, **options).maps for args in ({}, {"untie": False})]
    assert plans[0] == plans[1]


def test_without_data_there_is_no_basis() -> None:
    with pytest.raises(CalibrationError, match="pass calibration="):
        AutoSubclone.from_pretrained(families.model("llama"), hidden=32, method="rotation")


def test_a_saved_plan_gives_the_same_bytes(tmp_path: Path) -> None:
    source = families.model("llama")
    first = AutoSubclone.from_pretrained(
        source, hidden=32, layers=3, method="rotation", calibration=IDS, compensation=("least_squares",)
    )
    first.hf_ws_plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == first.hf_ws_plan
    assert all(map(torch.equal, first.parameters(), again.apply(source).parameters()))


def test_a_plan_without_its_matrices_is_named(tmp_path: Path) -> None:
    model = AutoSubclone.from_pretrained(
        families.model("llama"), hidden=32, method="rotation", calibration=IDS
    )
    model.hf_ws_plan.save(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(ValueError, match="is not a saved plan"):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("size", [2, 7, 64])
def test_the_zero_mean_basis_is_orthonormal(size: int) -> None:
    basis = zero_mean_basis(size)
    np.testing.assert_allclose(basis.T @ basis, np.eye(size - 1), atol=1e-12)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-12)
    np.testing.assert_allclose(with_mean(basis, basis), np.eye(size), atol=1e-12)


@pytest.mark.parametrize("family", sorted({*TIED} & {*TURNED}))
def test_what_untying_costs_is_in_the_plan(family: str) -> None:
    """Against the models themselves: with the head a tensor of its own, and with the same sizes tied."""
    source = families.model(family)
    made, tied = (AutoSubclone.plan(source, hidden=32, method=name) for name in ("rotation", "subclone"))
    own, wanted = (sum(p.numel() for p in _empty(source, plan).parameters()) for plan in (made, tied))
    assert made.parameters[1] == own
    assert made.untied == own - wanted > 0
    assert tied.untied == 0
    line = next(line for line in str(made).splitlines() if line.startswith("of them untied"))
    assert line.split()[4] == f"{own - wanted:,}"
    assert "untied" not in str(tied)


def _empty(source: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    return type(source)(type(source.config).from_dict(dict(plan.target_config)))


NEVER_APART = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**SEQ2SEQ, feed_forward_proj="gated-gelu")),
    "switch": lambda: SwitchTransformersForConditionalGeneration(
        SwitchTransformersConfig(
            **SEQ2SEQ, num_experts=2, num_sparse_encoder_layers=0, num_sparse_decoder_layers=0
        )
    ),
}


@pytest.mark.parametrize("family", NEVER_APART)
def test_a_head_that_cannot_be_untied_is_said_and_stays(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The config class ties T5's again; Switch scales what a tied head reads."""
    torch.manual_seed(0)
    source = NEVER_APART[family]().eval()
    ids = torch.arange(24).view(2, 12) % 64
    data = [{"input_ids": ids, "decoder_input_ids": ids}]
    with caplog.at_level(logging.WARNING, "hf_ws"):
        target = AutoSubclone.from_pretrained(source, hidden=24, method="rotation", calibration=data)
    assert "its head cannot be untied from the embedding" in caplog.text
    assert target.config.tie_word_embeddings
    assert target.hf_ws_plan.parameters[1] == target.num_parameters()
    target.save_pretrained(tmp_path)
    again = type(target).from_pretrained(tmp_path)
    torch.testing.assert_close(again(**data[0]).logits, target(**data[0]).logits)


def test_a_head_stays_tied_where_only_another_stream_is_turned(caplog: pytest.LogCaptureFixture) -> None:
    """The picture tower of BLIP-2; its text may not be untied and may be as it was."""
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = Blip2Config(
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        qformer_config=tower | {"encoder_hidden_size": 32, "vocab_size": families.VOCAB},
        text_config=families.config("opt").to_dict() | {"tie_word_embeddings": True},
        num_query_tokens=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    source = Blip2ForConditionalGeneration(config)
    with caplog.at_level(logging.WARNING, "hf_ws"):
        plans = [
            AutoSubclone.plan(
                source,
                **{"vision_config.hidden": 24, "vision_config.heads": 3},
                method=method,
                method_args=args,
            )
            for method, args in (("rotation", {}), ("rotation", {"untie": False}), ("subclone", {}))
        ]
    assert not any(plan.untied for plan in plans)
    assert len({plan.parameters for plan in plans}) == 1
    assert [type(plan.maps["vision_config.hidden"]) for plan in plans[:2]] == [Turn, Turn]
    assert "untied" not in caplog.text


def test_channels_in_groups_are_said_to_stay(caplog: pytest.LogCaptureFixture) -> None:
    """The positions of Wav2Vec2 are a convolution in groups of channels."""
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=30,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "hf_ws"):
        AutoSubclone.plan(Wav2Vec2ForCTC(config), hidden=16, method="rotation")
    assert (
        "hidden cannot be turned, a part of it works on groups of channels; its channels are sel"
        in caplog.text
    )


def test_a_class_without_a_head_is_turned_whatever_its_config_says() -> None:
    """A classifier of a tied checkpoint has nothing to untie, and gets the better start by default."""
    torch.manual_seed(0)
    config = families.config("qwen2")
    config.tie_word_embeddings, config.num_labels, config.pad_token_id = True, 3, 0
    source = Qwen2ForSequenceClassification(config).eval()
    target = AutoSubclone.from_pretrained(source, hidden=32, calibration=IDS)
    assert isinstance(target.hf_ws_plan.maps["hidden"], Dense)
    assert target.hf_ws_plan.parameters[1] == target.num_parameters()


def test_a_stream_of_zeros_is_refused_in_words() -> None:
    source = families.model("llama")
    with torch.no_grad():
        source.model.embed_tokens.weight.zero_()
    with pytest.raises(
        CalibrationError, match="no norm of the stream ran on the calibration data, or it is zero there"
    ):
        AutoSubclone.from_pretrained(source, hidden=32, method="rotation", calibration=IDS)
