"""Which ids a student and its teacher both know, where their vocabularies are not the same."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING

from hf_ws.distill.teacher import check_vocabulary
from hf_ws.errors import DistillationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def common_ids(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """How many ids, from 0 on, mean the same to both: text may hold these, and no others.

    Tables of different lengths (one is padded) are taken where both tokenizers are there and one's vocabulary is
    the beginning of the other's, which is then proven token by token.

    Raises:
        DistillationError: Ids that mean something else, or lengths that differ where a tokenizer is not known.
    """
    sizes = [int(config.get_text_config().vocab_size) for config in (student, teacher)]
    if student_tokenizer is None or teacher_tokenizer is None:
        check_vocabulary(student, teacher)
        return sizes[0]
    ours, theirs = (
        {number: token for token, number in tokenizer.get_vocab().items()}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    if ours == theirs:
        if sizes[0] != sizes[1]:
            logger.warning(
                "the teacher's table has %d entries, the student's %d, for the same %d tokens: %d are compared",
                sizes[1], sizes[0], len(ours), min(sizes),
            )  # fmt: skip
        return min(sizes)
    short, long = sorted((ours, theirs), key=len)
    known = max(short, default=-1) + 1
    beginning = {number: token for number, token in long.items() if number < known}
    if beginning != short:
        check_vocabulary(student, student, student_tokenizer, teacher_tokenizer)  # names the tokens
        raise DistillationError("the teacher's tokenizer has other ids than the student's; train without one")
    logger.warning(
        "the tokenizers agree on the first %d ids, and the %s has %d tokens more, which the other does not know",
        known, "student's" if long is ours else "teacher's", len(long) - len(short),
    )  # fmt: skip
    return min(*sizes, known) if long is ours else min(sizes)


def print_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A fingerprint of the map from token to id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
