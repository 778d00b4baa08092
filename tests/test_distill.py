"""The distillation losses against float64 and autograd, and the teacher that may give them."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ws.distill import LOSSES, Favourites, Head, token_losses
from hf_ws.distill.teacher import check_vocabulary, load_teacher
from hf_ws.distill.tokens import WHOLE
from hf_ws.errors import DistillationError

VOCAB = 11


def logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3


def labels(*shape: int) -> torch.Tensor:
    found = torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(9))
    found[:, ::3] = -100
    return found


def loss_of(name: str, student: torch.Tensor, teacher, marks: torch.Tensor, **options) -> torch.Tensor:
    return token_losses(student, marks, teacher, weights={name: 1.0}, **options)[0]


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    @pytest.mark.parametrize("cut", [{}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 5, "top_p": 0.7}], ids=str)
    def test_is_zero_at_equality_and_positive_elsewhere(self, name: str, cut: dict) -> None:
        if cut and name in WHOLE:
            with pytest.raises(DistillationError, match="compares all logits"):
                loss_of(name, logits(0, 2, 7), logits(1, 2, 7), labels(2, 7), **cut)
            return
        same = logits(0, 2, 7)
        assert (
            loss_of(name, same, same + 2.5, labels(2, 7), **cut).abs() < 1e-5
        )  # logits mean nothing up to a constant
        assert loss_of(name, same, logits(1, 2, 7), labels(2, 7), **cut) > 0.01

    def test_masked_tokens_are_inert(self, name: str) -> None:
        student, teacher, marks = logits(0, 2, 7), logits(1, 2, 7), labels(2, 7)
        before = loss_of(name, student, teacher, marks)
        student[marks == -100], teacher[marks == -100] = float("nan"), float("inf")
        student.requires_grad_()
        after = loss_of(name, student, teacher, marks)
        after.backward()
        assert torch.equal(before, after.detach())
        assert not student.grad[marks == -100].any()
        assert student.grad.isfinite().all()
        assert student.grad[marks != -100].any()

    def test_no_gradient_reaches_the_teacher(self, name: str) -> None:
        student, teacher = logits(0, 2, 7).requires_grad_(), logits(1, 2, 7).requires_grad_()
        loss_of(name, student, teacher, labels(2, 7)).backward()
        assert student.grad is not None
        assert teacher.grad is None

    def test_micro_batches_add_up_to_the_whole(self, name: str) -> None:
        student, teacher, marks = logits(0, 4, 7), logits(1, 4, 7), labels(4, 7)
        items = (marks != -100).sum()
        rows = ([0], [1, 2, 3])
        parts = [loss_of(name, student[i], teacher[i], marks[i], num_items_in_batch=items) for i in rows]
        assert torch.allclose(sum(parts), loss_of(name, student, teacher, marks), atol=1e-6)

    def test_nothing_counted_is_zero(self, name: str) -> None:
        assert loss_of(name, logits(0, 1, 3), logits(1, 1, 3), torch.full((1, 3), -100)) == 0

    def test_a_token_that_both_rule_out_adds_nothing(self, name: str) -> None:
        student, teacher, marks = logits(0, 1, 3), logits(1, 1, 3), torch.ones(1, 3, dtype=torch.long)
        student[..., 0] = teacher[..., 0] = -torch.inf
        student.requires_grad_()
        made = loss_of(name, student, teacher, marks)
        made.backward()
        if name not in WHOLE:  # a mean over outcomes counts them
            rest = loss_of(name, student[..., 1:].detach(), teacher[..., 1:], marks - 1)
            assert torch.allclose(made.detach(), rest, atol=1e-6)
        assert student.grad[..., 1:].isfinite().all()

    @pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
    @pytest.mark.parametrize("chunk", [1, 4, 1000])
    def test_is_the_closed_form_in_value_and_gradient(
        self, name: str, temperature: float, chunk: int
    ) -> None:
        teacher, marks = logits(1, 3, 5, dtype=torch.float64), labels(3, 5)
        student = logits(0, 3, 5, dtype=torch.float64).requires_grad_()
        counted = marks != -100
        plain = closed_form(name, student[counted] / temperature, teacher[counted] / temperature)
        plain = plain.mean() * temperature**2
        (expected,) = torch.autograd.grad(plain, student)

        ours = loss_of(name, student, teacher, marks, temperature=temperature, chunk=chunk)
        (gradient,) = torch.autograd.grad(ours * 2.0, student)
        assert torch.allclose(ours, plain, atol=1e-12)
        assert torch.allclose(gradient, expected * 2.0, atol=1e-12)
        single = loss_of(name, student.float(), teacher.float(), marks, temperature=temperature, chunk=chunk)
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), plain, atol=1e-4 if name in WHOLE else 1e-5)

    def test_passes_gradcheck(self, name: str) -> None:
        student = logits(0, 1, 4, dtype=torch.float64).requires_grad_()
        teacher, marks = logits(1, 1, 4, dtype=torch.float64), labels(1, 4)
        assert torch.autograd.gradcheck(
            lambda s: loss_of(name, s, teacher, marks, temperature=2.0, chunk=2), student
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_from_hidden_states_equals_from_logits(self, name: str, dtype: torch.dtype) -> None:
        """With the plain formula on whole float64 logits as the oracle, gradients of states and head included."""
        draw = torch.Generator().manual_seed(3)
        states, taught = (torch.randn(2, 7, d, generator=draw).to(dtype) for d in (6, 9))
        weight, bias, theirs = (
            torch.randn(s, generator=draw).to(dtype) for s in ((VOCAB, 6), (VOCAB,), (VOCAB, 9))
        )
        marks = labels(2, 7)
        ours = [tensor.clone().requires_grad_() for tensor in (states, weight, bias)]
        head = Head(ours[1], ours[2], scale=0.5, cap=4.0)
        made = token_losses(
            ours[0], marks, taught, weights={name: 0.7, "cross_entropy": 0.3}, student_head=head,
            teacher_head=Head(theirs), temperature=1.5, chunk=3,
        )[0]  # fmt: skip
        made.backward()

        exact = [tensor.double().requires_grad_() for tensor in (states, weight, bias)]
        logits_ = 4 * torch.tanh((exact[0] @ exact[1].T + exact[2]) * 0.5 / 4)
        counted = marks != -100
        soft = closed_form(name, logits_[counted] / 1.5, (taught.double() @ theirs.double().T)[counted] / 1.5)
        plain = 0.7 * soft.mean() * 1.5**2 + 0.3 * cross_entropy(logits_[counted], marks[counted])
        plain.backward()
        limit = 1e-5 if dtype == torch.float32 else 3e-2
        assert abs(made - plain) < limit * plain
        for one, other in zip(ours, exact, strict=True):
            assert one.grad.dtype == dtype
            assert (one.grad.double() - other.grad).norm() < limit * other.grad.norm()


def closed_form(name: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The loss per token as its paper writes it, on probabilities."""
    q, p = student.softmax(-1), teacher.softmax(-1)

    def kl(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one * (one / other).log()).sum(-1)

    if name == "logit_mse":
        return (
            (student - student.mean(-1, keepdim=True) - teacher + teacher.mean(-1, keepdim=True))
            .pow(2)
            .mean(-1)
        )
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
        "skew_kl": lambda: kl(p, 0.1 * p + 0.9 * q),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[name]()


def test_the_limits_of_the_mixtures() -> None:
    """Jensen-Shannon tends to either KL, skew KL to the forward one: Agarwal et al. 2023, section 2."""
    student, teacher, marks = (
        *(logits(i, 1, 4, dtype=torch.float64) / 3 for i in (0, 1)),
        torch.zeros(1, 4).long(),
    )
    of = {name: float(loss_of(name, student, teacher, marks)) for name in ("forward_kl", "reverse_kl")}
    for beta, name, share in ((1e-6, "forward_kl", 1e-6), (1 - 1e-6, "reverse_kl", 1e-6)):
        mixed = loss_of("jensen_shannon", student, teacher, marks, options={"jensen_shannon": {"beta": beta}})
        assert mixed / share == pytest.approx(of[name], rel=1e-4)
    skewed = loss_of("skew_kl", student, teacher, marks, options={"skew_kl": {"alpha": 1e-9}})
    assert skewed == pytest.approx(of["forward_kl"], rel=1e-6)
    beta = {"jensen_shannon": {"beta": 0.3}}
    assert (
        loss_of("jensen_shannon", student * 30, teacher * -30, marks, options=beta) <= 0.6109
    )  # its bound H(beta)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in WHOLE])
def test_merged_outcomes_are_the_coarser_distributions(name: str) -> None:
    """Against the closed form on probabilities merged by hand."""
    student, teacher = (logits(i, 1, 6, dtype=torch.float64) for i in (0, 1))
    marks = torch.zeros(1, 6, dtype=torch.long)
    q, p = student[0].softmax(-1), teacher[0].softmax(-1)
    order = p.argsort(-1, descending=True)
    for cut, kept in (
        ({"top_k": 3}, [3] * 6),
        ({"top_p": 0.6}, [int((r.cumsum(0) < 0.6).sum()) + 1 for r in p.gather(1, order)]),
    ):
        expected = []
        for row, count in enumerate(kept):
            both = [x[row][order[row]] for x in (q, p)]
            coarse = [torch.cat([x[:count], x[count:].sum(0, keepdim=True)]).log() for x in both]
            expected.append(closed_form(name, *coarse))
        assert loss_of(name, student, teacher, marks, **cut) == pytest.approx(
            float(torch.stack(expected).mean())
        )
    favourites = Favourites.of(teacher[0].log_softmax(-1), 3)
    assert torch.allclose(
        loss_of(name, student, favourites, marks), loss_of(name, student, teacher, marks, top_k=3), atol=1e-12
    )
    more = Favourites.of(teacher[0].log_softmax(-1), 7)
    assert torch.allclose(
        loss_of(name, student, more, marks, top_k=3),
        loss_of(name, student, teacher, marks, top_k=3),
        atol=1e-12,
    )
    whole = loss_of(name, student, teacher, marks)
    assert loss_of(name, student, teacher, marks, top_k=VOCAB) == pytest.approx(float(whole))
    assert loss_of(name, student, teacher, marks, top_k=3) <= whole


def test_cross_entropy_is_torchs() -> None:
    student, marks = logits(0, 3, 5, dtype=torch.float64).requires_grad_(), labels(3, 5)
    made, parts = token_losses(student, marks, weights={"cross_entropy": 2.0}, chunk=2)
    plain = cross_entropy(student.flatten(0, 1), marks.flatten())
    assert torch.allclose(made, 2 * plain)
    assert torch.allclose(parts["cross_entropy"], plain)
    assert torch.allclose(*(torch.autograd.grad(value, student)[0] for value in (made, 2 * plain)))


def test_autocast_leaves_the_loss_in_float32() -> None:
    student, teacher, marks = logits(0, 2, 7), logits(1, 2, 7), labels(2, 7)
    weights = {"cross_entropy": 0.3, "forward_kl": 0.7}
    plain, _ = token_losses(student, marks, teacher, weights=weights)
    with torch.autocast("cpu", torch.bfloat16):
        inside, parts = token_losses(student, marks, teacher, weights=weights)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)
    assert sum(weights[name] * value for name, value in parts.items()) == pytest.approx(float(plain), rel=1e-6)


def test_a_padded_table_is_compared_on_the_common_ids() -> None:
    student, teacher, marks = logits(0, 2, 4), logits(1, 2, 4), labels(2, 4)
    padded = torch.cat([teacher, torch.full((2, 4, 3), 9.0)], -1)
    plain = loss_of("forward_kl", student, teacher, marks)
    assert torch.allclose(loss_of("forward_kl", student, padded, marks, vocabulary=VOCAB), plain)
    wider = torch.cat([student, torch.full((2, 4, 3), 9.0)], -1)
    assert torch.allclose(loss_of("forward_kl", wider, teacher, marks, vocabulary=VOCAB), plain)


def test_no_whole_table_is_ever_made() -> None:
    """No tensor made on the way to the loss and its gradient is larger than a chunk's."""
    tokens, vocab, chunk = 64, 500, 8
    states, weight = torch.randn(1, tokens, 4).requires_grad_(), torch.randn(vocab, 4).requires_grad_()
    taught, theirs = torch.randn(1, tokens, 5), torch.randn(vocab, 5)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            largest = max(largest, made.numel() if isinstance(made, torch.Tensor) else 0)
            return made

    with Watch():
        token_losses(
            states, torch.zeros(1, tokens, dtype=torch.long), taught, weights={"cross_entropy": 1, "forward_kl": 1},
            student_head=Head(weight), teacher_head=Head(theirs), chunk=chunk,
        )[0].backward()  # fmt: skip
    assert largest <= vocab * chunk


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, r"temperature=0.0; it must be above 0"),
        ({"labels": labels(2, 6)}, "do not fit"),
        ({"teacher": None}, "forward_kl compare with a teacher, and there is none"),
        ({"weights": {"backward_kl": 1.0}}, "no loss is called backward_kl; there are forward_kl"),
        ({"top_p": 1.5}, "top_k=None, top_p=1.5"),
        ({"top_k": 0}, "top_k=0"),
        ({"teacher": torch.zeros(2, 7, VOCAB + 1)}, "of vocabularies 11 and 12, do not fit"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, message: str) -> None:
    arguments = {"student": logits(0, 2, 7), "teacher": logits(1, 2, 7), "labels": labels(2, 7)}
    with pytest.raises(DistillationError, match=message):
        token_losses(**(arguments | {"weights": {"forward_kl": 1.0}} | changes))


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
