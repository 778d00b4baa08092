"""The distillation losses against float64 and autograd, and the teacher that may give them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ws.distill import LOSSES, forward_kl
from hf_ws.distill.teacher import check_vocabulary, load_teacher
from hf_ws.errors import DistillationError

VOCAB = 11


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


def labels(*shape: int) -> torch.Tensor:
    found = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(9))
    found[:, ::3] = -100
    return found


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
class TestEveryLoss:
    def test_is_zero_at_equality(self, loss) -> None:
        same = logits(0, 2, 7)
        assert loss(same, same.clone(), labels(2, 7)).abs() < 1e-6

    def test_masked_tokens_are_inert(self, loss) -> None:
        student, teacher, marks = logits(0, 2, 7), logits(1, 2, 7), labels(2, 7)
        before = loss(student, teacher, marks)
        student[marks == -100], teacher[marks == -100] = float("nan"), float("inf")
        student.requires_grad_()
        after = loss(student, teacher, marks)
        after.backward()
        assert torch.equal(before, after.detach())
        assert not student.grad[marks == -100].any()
        assert student.grad.isfinite().all()

    def test_no_gradient_reaches_the_teacher(self, loss) -> None:
        student, teacher = logits(0, 2, 7).requires_grad_(), logits(1, 2, 7).requires_grad_()
        loss(student, teacher, labels(2, 7)).backward()
        assert student.grad is not None
        assert teacher.grad is None

    def test_micro_batches_add_up_to_the_whole(self, loss) -> None:
        student, teacher, marks = logits(0, 4, 7), logits(1, 4, 7), labels(4, 7)
        items = (marks != -100).sum()
        parts = [loss(student[i], teacher[i], marks[i], num_items_in_batch=items) for i in ([0], [1, 2, 3])]
        assert torch.allclose(sum(parts), loss(student, teacher, marks), atol=1e-6)

    def test_nothing_counted_is_zero(self, loss) -> None:
        assert loss(logits(0, 1, 3), logits(1, 1, 3), torch.full((1, 3), -100)) == 0


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_forward_kl_is_the_closed_form_in_value_and_gradient(temperature: float, chunk: int) -> None:
    teacher, marks = logits(1, 3, 5, dtype=torch.float64), labels(3, 5)
    student = logits(0, 3, 5, dtype=torch.float64).requires_grad_()
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    plain = (p * (p / q).log()).sum(-1)[marks != -100].mean() * temperature**2
    (expected,) = torch.autograd.grad(plain, student)

    ours = forward_kl(student, teacher, marks, temperature=temperature, chunk=chunk)
    (gradient,) = torch.autograd.grad(ours * 2.0, student)
    assert torch.allclose(ours, plain, atol=1e-12)
    assert torch.allclose(gradient, expected * 2.0, atol=1e-12)
    single = forward_kl(student.float(), teacher.float(), marks, temperature=temperature, chunk=chunk)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), plain, atol=1e-5)


def test_forward_kl_passes_gradcheck() -> None:
    student = logits(0, 1, 4, dtype=torch.float64).requires_grad_()
    teacher, marks = logits(1, 1, 4, dtype=torch.float64), labels(1, 4)
    assert torch.autograd.gradcheck(
        lambda s: forward_kl(s, teacher, marks, temperature=2.0, chunk=2), student
    )


def test_forward_kl_of_half_precision_is_computed_in_float32() -> None:
    student, teacher = logits(0, 2, 7).bfloat16().requires_grad_(), logits(1, 2, 7).bfloat16()
    loss = forward_kl(student, teacher, labels(2, 7))
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    assert torch.allclose(
        loss, forward_kl(student.detach().float(), teacher.float(), labels(2, 7)), atol=1e-6
    )


def test_a_token_the_teacher_rules_out_adds_nothing() -> None:
    student, teacher, marks = logits(0, 1, 3), logits(1, 1, 3), torch.zeros(1, 3, dtype=torch.long)
    teacher[..., 0] = -torch.inf
    student[..., 0] = -torch.inf
    assert torch.allclose(
        forward_kl(student, teacher, marks), forward_kl(student[..., 1:], teacher[..., 1:], marks), atol=1e-6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0; it must be above 0"),
        ({"labels": labels(2, 6)}, "do not fit"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, message: str) -> None:
    arguments = {"student_logits": logits(0, 2, 7), "teacher_logits": logits(1, 2, 7), "labels": labels(2, 7)}
    with pytest.raises(DistillationError, match=message):
        forward_kl(**(arguments | changes))


def llama(vocab: int) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes))


def speaks(vocabulary: dict[str, int]) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: vocabulary)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    check_vocabulary(llama(5), llama(5).config, speaks({"a": 0}), speaks({"a": 0}))
    with pytest.raises(DistillationError, match=r"teacher's vocabulary has 7 entries, the student's 5"):
        check_vocabulary(llama(5), llama(7))
    with pytest.raises(
        DistillationError, match=r"other ids to 2 tokens, such as 'a': 1 there, 0 in the student's"
    ):
        check_vocabulary(llama(5), llama(5), speaks({"a": 0, "b": 1}), speaks({"a": 1, "b": 0}))


def test_a_teacher_keeps_its_dtype_and_is_not_trained(tmp_path) -> None:
    llama(5).bfloat16().save_pretrained(tmp_path)
    teacher = load_teacher(tmp_path)
    assert teacher.dtype == torch.bfloat16
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_that_is_not_there_or_not_whole_is_refused(tmp_path) -> None:
    with pytest.raises(DistillationError, match="teacher cannot be used"):
        load_teacher(tmp_path / "nowhere")
    student = llama(5)
    weights = {name: tensor for name, tensor in student.state_dict().items() if "up_proj" not in name}
    student.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(DistillationError, match=r"lacks 1 weights, .*up_proj"):
        load_teacher(tmp_path)
