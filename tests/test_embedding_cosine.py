"""The distillation of embeddings against float64 closed forms and the symmetries it must have."""

import math

import pytest
import torch

from hf_ws.distill import embedding_cosine, mean_pool
from hf_ws.errors import DistillationError


def embeddings(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(channels: int, keep: int) -> torch.Tensor:
    """Orthonormal columns [channels, keep]."""
    return torch.linalg.qr(embeddings(7, channels, channels))[0][:, :keep]


def plain(student: list[list[float]], teacher: list[list[float]], temperature: float) -> float:
    """The definition, one pair of sentences at a time, in Python's floats."""

    def nearness(table: list[list[float]], at: int) -> dict[int, float]:
        def cosine(u: list[float], v: list[float]) -> float:
            return sum(a * b for a, b in zip(u, v, strict=True)) / math.hypot(*u) / math.hypot(*v)

        weights = {
            i: math.exp(cosine(table[at], row) / temperature) for i, row in enumerate(table) if i != at
        }
        return {i: weight / sum(weights.values()) for i, weight in weights.items()}

    total = 0.0
    for at in range(len(teacher)):
        p, q = nearness(teacher, at), nearness(student, at)
        total += sum(p[i] * math.log(p[i] / q[i]) for i in p)
    return total / len(teacher)


@pytest.mark.parametrize("temperature", [0.1, 0.3, 2.0])
@pytest.mark.parametrize("sentences", [2, 5])
def test_is_the_closed_form(temperature: float, sentences: int) -> None:
    student, teacher = embeddings(0, sentences, 4), embeddings(1, sentences, 6)
    expected = plain(student.tolist(), teacher.tolist(), temperature)
    assert embedding_cosine(student, teacher, temperature=temperature).item() == pytest.approx(
        expected, abs=1e-12
    )
    single = embedding_cosine(student.float(), teacher.float(), temperature=temperature)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, abs=1e-4)


def test_is_zero_for_the_same_geometry_in_another_width() -> None:
    teacher = embeddings(0, 6, 3)
    assert embedding_cosine(teacher.clone(), teacher).abs() < 1e-12
    wider = 5.0 * teacher @ rotation(8, 3).T
    assert embedding_cosine(wider, teacher).abs() < 1e-12
    assert embedding_cosine(embeddings(1, 6, 3), teacher) > 0.01


def test_a_rotation_or_the_length_of_the_students_embeddings_changes_nothing() -> None:
    student, teacher = embeddings(0, 6, 4), embeddings(1, 6, 9)
    before = embedding_cosine(student, teacher)
    assert torch.allclose(embedding_cosine(student @ rotation(4, 4), teacher), before, atol=1e-12)
    lengths = torch.tensor([1.0, 2.0, 0.1, 30.0, 4.0, 0.5], dtype=torch.float64)[:, None]
    assert torch.allclose(embedding_cosine(student * lengths, teacher), before, atol=1e-12)


def test_the_gradient_is_right_and_none_reaches_the_teacher() -> None:
    student, teacher = embeddings(0, 5, 4).requires_grad_(), embeddings(1, 5, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: embedding_cosine(s, teacher, temperature=0.3), student)
    embedding_cosine(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    student, teacher = embeddings(0, 8, 4).bfloat16(), embeddings(1, 8, 6)
    expected = embedding_cosine(student.float(), teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embedding_cosine(student, teacher), expected)
    assert expected.dtype == torch.float32


def test_padding_is_inert_in_the_mean_and_in_its_gradient() -> None:
    hidden, mask = embeddings(0, 3, 4, 5), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
    expected = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0), hidden[2, [1, 3]].mean(0)])
    hidden[mask == 0] = float("nan")
    hidden.requires_grad_()
    pooled = mean_pool(hidden, mask)
    assert torch.allclose(pooled, expected, atol=1e-12)
    pooled.sum().backward()
    assert not hidden.grad[mask == 0].any()
    assert hidden.grad.isfinite().all()
    assert not mean_pool(hidden, mask * 0).any()
    assert mean_pool(hidden.bfloat16(), mask).dtype == torch.float32


@pytest.mark.parametrize(
    ("student", "teacher", "temperature", "message"),
    [
        ((3, 4), (3, 4), 0.0, r"temperature=0.0; it must be above 0"),
        ((3, 4), (2, 4), 0.1, r"student embeddings \(3, 4\) and teacher embeddings \(2, 4\) do not fit"),
        ((1, 4), (1, 4), 0.1, r"two or more sentences"),
        ((3, 4, 2), (3, 4), 0.1, r"do not fit"),
    ],
)
def test_bad_arguments_are_refused(student: tuple, teacher: tuple, temperature: float, message: str) -> None:
    with pytest.raises(DistillationError, match=message):
        embedding_cosine(torch.ones(student), torch.ones(teacher), temperature=temperature)
