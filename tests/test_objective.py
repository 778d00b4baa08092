"""The objective of training against the plain formula on whole logits, for heads of every make."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_ws import AutoSubclone
from hf_ws.distill.states import Correspondence
from hf_ws.errors import DistillationError
from hf_ws.training import TrainConfig
from hf_ws.training.objective import Objective

VOCAB = 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIG = TrainConfig(steps=10, kd_weight=0.4, kd_temperature=1.5)

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "gemma2, a cap": Gemma2Config(**SIZES, head_dim=4, num_key_value_heads=2, final_logit_softcapping=5.0),
    "cohere, a scale": CohereConfig(**SIZES | IDS, logit_scale=0.3),
    "granite, a scale": GraniteConfig(**SIZES, logits_scaling=4.0),
}  # fmt: skip


def model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.train()


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0], labels[1, 4:] = -100, -100
    return {"input_ids": ids, "labels": labels}


def plain(
    student: PreTrainedModel, teacher: PreTrainedModel, given: dict, config: TrainConfig
) -> torch.Tensor:
    """The loss as one writes it with whole logits."""
    logits, taught = (
        student(given["input_ids"]).logits[:, :-1],
        teacher(given["input_ids"]).logits[:, :-1].detach(),
    )
    marks = given["labels"][:, 1:]
    q, p = (x[marks != -100] / config.kd_temperature for x in (logits, taught))
    kd = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean() * config.kd_temperature**2
    return 0.6 * cross_entropy(logits.flatten(0, 1), marks.flatten()) + 0.4 * kd


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_is_the_plain_loss_in_value_and_gradient(config: PreTrainedConfig) -> None:
    given, other = batch(), model(config, 1).eval()
    student = model(config)
    objective = Objective(CONFIG, student, other, batch=given)
    assert objective.apart
    assert objective.teacher_apart
    loss, parts, _ = objective(student, given, progress=0.0)
    loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    expected = plain(student, other, given, CONFIG)
    expected.backward()
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(0.6 * parts["ce_loss"] + 0.4 * parts["kd_loss"], loss, atol=1e-5)
    for name, parameter in student.named_parameters():
        assert torch.allclose(ours[name], parameter.grad, atol=1e-5, rtol=1e-4), name
    assert all(parameter.grad is None for parameter in other.parameters())
    student.eval()
    evaluated, *_ = objective(student, given)
    logits = student(given["input_ids"]).logits
    assert torch.allclose(
        evaluated, cross_entropy(logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten())
    )


class Doubling(LlamaForCausalLM):
    """Its logits are not what its config says."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


def test_a_head_that_does_more_than_its_config_says_makes_whole_logits(caplog) -> None:
    given, other = batch(), model(CONFIGS["llama"], 1).eval()
    student = Doubling(CONFIGS["llama"])
    objective = Objective(CONFIG, student, other, batch=given)
    assert not objective.apart
    assert "Doubling makes its logits in a way of its own" in caplog.text
    assert torch.allclose(
        objective(student, given, progress=0.0)[0], plain(student, other, given, CONFIG), atol=1e-5
    )


def test_masked_and_encoder_decoder_models_predict_their_own_labels() -> None:
    ids = batch()["input_ids"]
    labels = ids.clone()
    labels[:, ::2] = -100
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**SIZES | IDS)).eval()
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    ).eval()
    for student, given in ((bert, {"input_ids": ids}), (t5, {"input_ids": ids, "decoder_input_ids": ids})):
        objective = Objective(CONFIG, student, shifts=False, batch=given | {"labels": labels})
        assert objective.apart
        loss, *_ = objective(student, given | {"labels": labels}, progress=0.0)
        whole = student(**given).logits.flatten(0, 1)
        assert torch.allclose(loss, cross_entropy(whole, labels.flatten()), atol=1e-6)


def test_a_router_is_asked_for_balance() -> None:
    config = MixtralConfig(
        **SIZES,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    student, given = model(config).eval(), batch()
    loss, *_ = Objective(CONFIG, student, batch=given)(student, given, progress=0.0)
    assert torch.allclose(loss, student(**given).loss, atol=1e-5)


def test_weights_move_over_the_run() -> None:
    config = replace(
        CONFIG, kd_weight=[0.8, 0.2], kd_losses={"forward_kl": 1.0, "total_variation": [2.0, 0.0]}
    )
    objective = Objective(config, model(CONFIGS["llama"]), model(CONFIGS["llama"], 1).eval(), batch=batch())
    for progress, expected in ((0.0, (0.2, 0.8, 1.6)), (0.5, (0.5, 0.5, 0.5)), (1.0, (0.8, 0.2, 0.0))):
        assert tuple(objective.weights(progress).values()) == pytest.approx(expected)


SMALLER = {"method": "subclone", "hidden": 8, "layers": 2, "heads": 2, "ffn": 12}


def source() -> PreTrainedModel:
    return model(LlamaConfig(**SIZES | {"num_hidden_layers": 4}, num_key_value_heads=4)).eval()


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine"])
def test_states_are_compared_as_the_plan_says(name: str) -> None:
    teacher = source()
    student = AutoSubclone.from_pretrained(teacher, **SMALLER).float()
    plan, given = student.hf_ws_plan, batch()
    config = replace(CONFIG, kd_weight=1.0, kd_losses={name: 1.0})
    loss, parts, _ = Objective(config, student, teacher, plan, batch=given)(student, given, progress=0.0)
    ours = student(given["input_ids"], output_hidden_states=True).hidden_states
    taught = teacher(given["input_ids"], output_hidden_states=True).hidden_states
    own, expected = plan.maps["hidden"].index, []
    for target, layer in enumerate(
        plan.layers["layers"][:-1]
    ):  # Transformers' last state is normed, ours is not
        s, t = ours[target + 1], taught[layer + 1][..., own]
        each = (
            (s - t).pow(2).sum(-1) / t.pow(2).sum(-1)
            if name == "hidden_mse"
            else 1 - torch.cosine_similarity(s, t, -1)
        )
        expected.append(each.mean())
    assert len(expected) == 1
    pairs = Correspondence.of(student, teacher, plan)
    assert [(pair.student, pair.teacher) for pair in pairs.layers] == [
        (f"model.layers.{i}", f"model.layers.{layer}") for i, layer in enumerate(plan.layers["layers"])
    ]
    one = replace(pairs, layers=pairs.layers[:1])
    objective = Objective(config, student, teacher, plan, batch=given)
    objective.pairs = one
    assert objective(student, given, progress=0.0)[1]["kd_loss"].item() == pytest.approx(
        expected[0].item(), rel=1e-5
    )
    loss.backward()
    assert parts["kd_loss"].item() == pytest.approx(loss.item())
    assert any(p.grad is not None and p.grad.any() for p in student.model.layers.parameters())
    assert not any(p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "attention_relation"])
def test_a_copy_of_the_teacher_has_no_loss_of_states(name: str) -> None:
    teacher = source()
    student = AutoSubclone.from_pretrained(teacher).float()
    config = replace(CONFIG, kd_weight=1.0, kd_losses={name: 1.0})
    loss, *_ = Objective(config, student, teacher, student.hf_ws_plan, batch=batch())(
        student, batch(), progress=0.0
    )
    assert abs(loss) < 1e-6


def test_relations_of_attention_need_no_widths_to_agree() -> None:
    """Against the formula written out, on the last layers' inputs to their output projections."""
    teacher = source()
    student = AutoSubclone.from_pretrained(teacher, **SMALLER).float()
    config = replace(CONFIG, kd_weight=1.0, kd_losses={"attention_relation": 1.0})
    given = batch()
    loss, *_ = Objective(config, student, teacher, student.hf_ws_plan, batch=given)(
        student, given, progress=0.0
    )
    read = []
    for one in (student, teacher):
        hook = one.model.layers[-1].self_attn.o_proj.register_forward_pre_hook(
            lambda _, x: read.append(x[0].detach())
        )
        one(given["input_ids"])
        hook.remove()
    tables = []
    for states in read:
        parts = states.view(3, 9, 8, -1).permute(0, 2, 1, 3).double()
        tables.append((parts @ parts.mT / parts.shape[-1] ** 0.5).softmax(-1))
    q, p = tables
    assert loss.item() == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-5)


def test_states_of_models_that_do_not_correspond_are_refused() -> None:
    teacher, config = source(), replace(CONFIG, kd_losses={"hidden_mse": 1.0})
    student = AutoSubclone.from_pretrained(teacher, **SMALLER).float()
    with pytest.raises(DistillationError, match=r"hidden 16 and not 8.*has no hf_ws_plan.json"):
        Objective(config, student, teacher, None, batch=batch())
    with pytest.raises(DistillationError, match=r"layers 2 and not 4.*source that the student's plan names"):
        Objective(config, student, model(CONFIGS["llama"]), student.hf_ws_plan, batch=batch())
    with pytest.raises(DistillationError, match="inner states of a BertModel"):
        Correspondence.of(student, BertModel(BertConfig(**SIZES)), student.hf_ws_plan)
