"""Liger's kernels: put where they can run, else left out, or refused where they were asked for.

No kernel runs here, for there is no GPU: `benchmarks/training.py` compares them with ours on one.
"""

import sys
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from hf_ws.errors import PlanError
from hf_ws.training import TrainConfig, kernels, train
from hf_ws.training.config import config_from_flags
from hf_ws.training.kernels import kernels_in

ROWS = torch.arange(64).view(4, 16)


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there was a GPU."""
    monkeypatch.setattr(kernels, "on_cpu", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A package that notes what it is asked for, and knows Llama alone."""
    made: list[dict] = []
    package = ModuleType("liger_kernel.transformers.monkey_patch")
    package.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": lambda **asked: made.append(asked)}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return made


def test_a_cpu_does_without(calls: list[dict]) -> None:
    with kernels_in(llama(), "auto") as put:
        assert not put
    train(TrainConfig(steps=1, batch_size=2, progress=False), model=llama(), train_blocks=ROWS)
    assert not calls


def test_a_gpu_takes_those_of_the_body_and_no_losses(gpu: None, calls: list[dict]) -> None:
    model = llama()
    with kernels_in(model, "auto") as put:
        assert put
    assert calls == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]
    model.config.model_type = "gpt2"
    for asked in ("auto", False):
        with kernels_in(model, asked) as put:
            assert not put
    assert len(calls) == 1


def test_they_are_taken_out_again(gpu: None, calls: list[dict]) -> None:
    """Else the trained model, and every later one of its class, could not be run on a CPU."""

    def only_on_a_gpu(*_: object, **__: object) -> None:
        raise ValueError("cpu tensor?")

    def put(model: LlamaForCausalLM, **_: object) -> None:
        modeling_llama.apply_rotary_pos_emb = only_on_a_gpu
        modeling_llama.LlamaRMSNorm = only_on_a_gpu
        model.model.norm.forward = only_on_a_gpu
        model.model.norm.offset = 0.0

    sys.modules["liger_kernel.transformers.monkey_patch"].MODEL_TYPE_TO_APPLY_LIGER_FN["llama"] = put
    model = llama().eval()
    expected = model(ROWS).logits
    with pytest.raises(ValueError, match="cpu tensor"), kernels_in(model, True):  # a run that fails, too
        model(ROWS)
    assert torch.equal(model(ROWS).logits, expected)
    assert not hasattr(model.model.norm, "offset")
    llama()(ROWS)


@pytest.mark.parametrize("missing", ["gpu", "package", "type"])
def test_what_is_asked_for_and_cannot_be_is_refused(
    missing: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, before any work."""
    model, message = llama(), "its kernels run on a GPU, and this run takes none"
    if missing != "gpu":
        request.getfixturevalue("gpu")
        message = r"cannot be imported .*; pip install liger-kernel"
        monkeypatch.setitem(sys.modules, "liger_kernel", None)
    if missing == "type":
        request.getfixturevalue("calls")
        model.config.model_type, message = "gpt2", "it has no kernels for gpt2, only for llama"
    with pytest.raises(PlanError, match=rf"liger=true: .*{message}; or set liger: auto"):
        train(TrainConfig(steps=1, liger=True), model=model, train_blocks=ROWS)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("true", True), ("false", False)])
def test_the_flag_and_the_key(tmp_path, text: str, value: object) -> None:
    (tmp_path / "run.yaml").write_text(f"steps: 1\nliger: {text}\n")
    assert config_from_flags(["--config", str(tmp_path / "run.yaml")], "").liger == value
    assert config_from_flags(["--steps", "1", "--liger", text], "").liger == value


def test_another_word_is_refused() -> None:
    with pytest.raises(PlanError, match="liger='always'; allowed: auto or true or false"):
        TrainConfig(steps=1, liger="always")
