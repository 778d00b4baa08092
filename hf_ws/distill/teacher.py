"""The teacher: loaded in its own dtype, never trained, and only if it speaks the student's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ws.errors import CheckpointError, DistillationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(source: str | Path, dtype: Any = "auto") -> PreTrainedModel:
    """The causal language model in a folder or at a Hub id; as `load_model`."""
    return load_model(source, "AutoModelForCausalLM", dtype)


def load_model(source: str | Path, auto_class: str, dtype: Any = "auto") -> PreTrainedModel:
    """The model in a folder or at a Hub id, whole, from safetensors, running no remote code.

    Raises:
        CheckpointError: It cannot be read, or weights are missing or misshapen (Transformers would only warn
            and fill them at random).
    """
    import transformers

    try:
        model, report = getattr(transformers, auto_class).from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{source} could not be loaded with {auto_class}: {error}") from error
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        raise CheckpointError(
            f"{source} lacks {len(lacking)} weights, the first being {lacking[0]}; get it whole"
        )
    return model


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder or at a Hub id; None if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None


def load_teacher(
    teacher: str | Path | PreTrainedModel, auto_class: str = "AutoModelForCausalLM"
) -> PreTrainedModel:
    """The teacher in eval mode, in its own dtype. A live model is used as it is.

    Raises:
        DistillationError: It cannot be loaded.
    """
    if isinstance(teacher, str | Path):
        try:
            teacher = load_model(teacher, auto_class)
        except CheckpointError as error:
            raise DistillationError(f"the teacher cannot be used: {error}") from error
        teacher.requires_grad_(False)
    return teacher.eval()


def check_vocabulary(
    student: PreTrainedModel | PreTrainedConfig,
    teacher: PreTrainedModel | PreTrainedConfig,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    Sizes are always compared; the maps from token to id where both tokenizers are known.

    Raises:
        DistillationError: Another size, or the same size with other tokens or another order.
    """
    sizes = [_vocabulary_size(model) for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise DistillationError(
            f"the teacher's vocabulary has {sizes[1]} entries, the student's {sizes[0]}; they must agree. "
            "Take a teacher with the student's tokenizer, or train without one"
        )
    if student_tokenizer is None or teacher_tokenizer is None:
        return
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        differing = sorted(
            token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)
        )
        token = differing[0]
        raise DistillationError(
            f"the teacher's tokenizer gives other ids to {len(differing)} tokens, such as {token!r}: "
            f"{theirs.get(token)} there, {ours.get(token)} in the student's. "
            "Take a teacher with the student's tokenizer, or train without one"
        )


def _vocabulary_size(model: PreTrainedModel | PreTrainedConfig) -> int:
    config = getattr(model, "config", model)
    return int(config.get_text_config().vocab_size)
