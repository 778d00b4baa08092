"""How well a causal language model predicts text, and how far it is from its teacher.

    print(evaluate("student", "stdlib", teacher="teacher", block=512))

Text is laid end to end in blocks as training does it, held out as training holds it out; every token of a block but the
first counts. All is computed in float32 from the logits on, for some hundred tokens at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from tqdm import tqdm

from hf_ws.distill import head
from hf_ws.distill.forward_kl import forward_kl
from hf_ws.distill.logits import logits_in_chunks
from hf_ws.distill.outcomes import FLOOR
from hf_ws.distill.teacher import check_vocabulary, load_causal_lm, load_tokenizer
from hf_ws.errors import DataError, DistillationError, HfWsError, PlanError
from hf_ws.training.data import Document, Packed, check_ids, load_text, pack, split_held_out
from hf_ws.training.job import check_positions
from hf_ws.training.sharding import on_cpu
from hf_ws.training.tasks.causal_lm import keeps_apart

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Figure:
    """A mean over tokens, and the standard error of it over blocks; NaN if there is one block."""

    mean: float
    error: float

    @classmethod
    def of(cls, blocks: Tensor) -> Figure:
        """Of the means of blocks [blocks], all of one length."""
        return cls(
            blocks.mean().item(), (blocks.std() / len(blocks) ** 0.5).item() if len(blocks) > 1 else math.nan
        )

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + ("" if math.isnan(self.error) else f" +- {self.error:.4f}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found. Losses are in nats per token."""

    blocks: int
    block: int
    bytes_per_token: float
    """Of the text, end-of-text tokens included."""
    loss: Figure
    """Cross-entropy."""
    teacher_loss: Figure | None = None
    kl: Figure | None = None
    """KL(teacher || model)."""
    agreement: Figure | None = None
    """The share of tokens where both hold the same token for likeliest."""

    @property
    def tokens(self) -> int:
        """Tokens that were predicted: all but the first of each block."""
        return self.blocks * (self.block - 1)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(min(self.loss.mean, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits, over the UTF-8 bytes of a token."""
        return self.loss.mean / math.log(2) / self.bytes_per_token

    def as_dict(self) -> dict[str, Any]:
        """For JSON; an error that is not known is None."""
        found: dict[str, Any] = {"blocks": self.blocks, "block": self.block, "tokens": self.tokens}
        found |= {"bytes_per_token": self.bytes_per_token, "perplexity": self.perplexity}
        found |= {"bits_per_byte": self.bits_per_byte}
        for name in ("loss", "teacher_loss", "kl", "agreement"):
            if figure := getattr(self, name):
                found |= {
                    name: figure.mean,
                    f"{name}_error": None if math.isnan(figure.error) else figure.error,
                }
        return found

    def __str__(self) -> str:
        rows = {"loss, nats per token": str(self.loss), "perplexity": f"{self.perplexity:.3f}"}
        rows["bits per byte"] = f"{self.bits_per_byte:.4f}"
        if self.kl is not None:
            rows["teacher's loss"] = str(self.teacher_loss)
            rows["KL from the teacher, nats per token"] = str(self.kl)
            rows["same likeliest token as the teacher"] = str(self.agreement)
        rows["tokens"] = f"{self.tokens:,} in {self.blocks:,} blocks of {self.block}"
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def evaluate(
    model: PreTrainedModel | str | Path,
    data: Any = "stdlib",
    *,
    teacher: PreTrainedModel | str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    block: int = 512,
    all_text: bool = False,
    documents_apart: bool = False,
    max_blocks: int = 0,
    batch_size: int = 8,
    dtype: str = "float32",
    split: str = "train",
    column: str = "text",
    config_name: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Perplexity and bits per byte of a causal language model, and its distance from a teacher if one is given.

    Args:
        model: Live, a folder or a Hub id. A live model is left on its device and in its dtype, in eval mode.
        data: What `hf_ws.training.data.load_text` takes, or blocks that `pack` made.
        teacher: A model with the same vocabulary.
        tokenizer: That of the text; the model's own by default.
        block: Tokens in a sequence.
        all_text: All of the text, not only what training on it holds out.
        documents_apart: Let no token see another document of its block, as training does by default; the usual figure
            lets it.
        max_blocks: Blocks used at most, evenly spread; 0 for all.
        batch_size: Sequences at a time.
        dtype: That named models are loaded in; "auto" for their own.
        split: The split read of a Hub dataset.
        column: The column or key that holds the text.
        config_name: The configuration of a Hub dataset that has several.
        progress: Show bars.

    Raises:
        PlanError, CheckpointError, DataError, DistillationError: Naming what is wrong and what to do.
    """
    if batch_size < 1 or max_blocks < 0:
        raise PlanError(f"batch_size={batch_size}, max_blocks={max_blocks}; at least 1, and not below 0")
    tokenizer = tokenizer or _tokenizer(model)
    if not isinstance(data, Packed):
        data = _blocks(
            load_text(data, split=split, column=column, config_name=config_name),
            tokenizer,
            block,
            all_text,
            apart=documents_apart,
            progress=progress,
        )
    models = _models(model, teacher, tokenizer, dtype)
    _check_fit(models, data)
    count = min(len(data), max_blocks or len(data))
    ids = data.dataset.select([i * len(data) // count for i in range(count)])
    measured = _measured(models, ids, batch_size, progress)
    figures = {name: Figure.of(blocks) for name, blocks in measured.items()}
    return Evaluation(
        blocks=count, block=len(ids[0]["input_ids"]), bytes_per_token=data.bytes_per_token, **figures
    )


def run_tasks(
    model: PreTrainedModel | str | Path,
    tasks: Sequence[str | dict[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    dtype: str = "float32",
) -> dict[str, dict[str, float]]:
    """What the package `lm_eval` measures of a model on its tasks: for every task its metrics by name.

    Args:
        model: As in `evaluate`.
        tasks: Their names, or settings of tasks as `lm_eval` takes them.
        tokenizer: The model's own by default.
        batch_size: Sequences at a time.
        limit: Examples of every task at most; None for all.
        dtype: As in `evaluate`.

    Raises:
        PlanError: The package is not installed, or has no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise PlanError(
            f"tasks want the package lm_eval, which cannot be imported ({error}); pip install 'lm_eval[hf]', or "
            "leave the tasks out"
        ) from error
    loaded = _loaded(model, dtype)
    tokenizer = tokenizer or _tokenizer(model)
    if tokenizer is None:
        raise DataError("tasks are text and came without a tokenizer; take a model folder that holds one")
    asked = HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(model=asked, tasks=list(tasks), limit=limit, log_samples=False)
    except KeyError as error:  # what the package raises for a name it does not know
        raise PlanError(
            f"lm_eval refuses the tasks: {error.args[0]}; `lm_eval ls tasks` lists its own"
        ) from error
    assert found is not None  # None in other processes than the first
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, int | float)
        }
        for task, metrics in found["results"].items()
    }


def _models(model: Any, teacher: Any, tokenizer: Any, dtype: str) -> list[PreTrainedModel]:
    """The model, and the teacher if there is one. Raises DistillationError where it cannot teach this model."""
    models = [_loaded(model, dtype)]
    if teacher is None:
        return models
    try:
        models.append(_loaded(teacher, dtype))
    except HfWsError as error:
        raise DistillationError(f"the teacher cannot be used: {error}") from error
    check_vocabulary(models[0], models[1], tokenizer, _tokenizer(teacher))
    return models


def _check_fit(models: list[PreTrainedModel], data: Packed) -> None:
    """Refuse blocks that are too long for a model, hold ids it lacks, or documents it cannot keep apart."""
    for one, name in zip(models, ("the model", "the teacher"), strict=False):
        check_positions(one.config, len(data.dataset[0]["input_ids"]), name)
        if "position_ids" in data.dataset.column_names and not keeps_apart(one):
            raise PlanError(
                f"{name} ({type(one).__name__}) cannot keep documents apart; leave out documents_apart"
            )
    check_ids(data.dataset, models[0].config.get_text_config().vocab_size)


def _tokenizer(model: PreTrainedModel | str | Path) -> PreTrainedTokenizerBase | None:
    return load_tokenizer(model) if isinstance(model, str | Path) else None


def _loaded(model: PreTrainedModel | str | Path, dtype: str) -> PreTrainedModel:
    if not isinstance(model, str | Path):
        return model.eval()
    kind = getattr(torch, dtype, None) if dtype != "auto" else dtype
    if kind != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise PlanError(f"dtype={dtype!r}; float32, bfloat16, float16, or auto for the checkpoint's own")
    device = None if on_cpu() else torch.accelerator.current_accelerator()
    return load_causal_lm(model, kind).eval().to(device or "cpu")


def _blocks(
    documents: list[Document],
    tokenizer: PreTrainedTokenizerBase | None,
    block: int,
    all_text: bool,
    **options: bool,
) -> Packed:
    if tokenizer is None:
        raise DataError(
            "text came without a tokenizer; take a model folder that holds one, or give tokenizer="
        )
    if not all_text:
        _, documents = split_held_out(documents)
    try:
        return pack(documents, tokenizer, block, **options)
    except HfWsError as error:
        where = "the text" if all_text else "the held-out part of the text (all_text takes all of it)"
        raise DataError(f"{where}: {error}") from error


def block_losses(
    model: PreTrainedModel, rows: datasets.Dataset, *, batch_size: int = 8, progress: bool = True
) -> Tensor:
    """Cross-entropy of a live causal language model on each block, in nats per token: float64 [blocks].

    Args:
        model: As in `evaluate`; put in eval mode.
        rows: Blocks of one length, with `input_ids`, as `pack` makes them.
        batch_size: Sequences at a time.
        progress: Show a bar.
    """
    return _measured([model.eval()], rows, batch_size, progress)["loss"]


@torch.no_grad()
def _measured(models: list[PreTrainedModel], rows: Any, batch_size: int, progress: bool) -> dict[str, Tensor]:
    """The figures of each block [blocks] by their names in `Evaluation`."""
    names = ("loss", "teacher_loss", "kl", "agreement")
    found: dict[str, list[Tensor]] = {name: [] for name in names[: 1 if len(models) == 1 else None]}
    first = [{"input_ids": rows[:1]["input_ids"].to(one.device), "use_cache": False} for one in models]
    apart = [head.is_known(one, given) for one, given in zip(models, first, strict=True)]
    for start in tqdm(
        range(0, len(rows), batch_size),
        "evaluating",
        unit=" batches",
        delay=2,
        leave=False,
        disable=not progress,
    ):
        batch = {name: value for name, value in rows[start : start + batch_size].items() if name != "labels"}
        ids = batch["input_ids"]
        inputs = [
            {name: value.to(one.device) for name, value in batch.items()} | {"use_cache": False}
            for one in models
        ]
        chunks = zip(
            *(
                logits_in_chunks(one, given, apart=known)
                for one, given, known in zip(models, inputs, apart, strict=True)
            ),
            strict=True,
        )
        # The last token of a block predicts nothing; it is given a label, so that rows stay whole, and cut off below.
        labels = ids.roll(-1, dims=1).flatten()
        parts: dict[str, list[Tensor]] = {name: [] for name in found}
        at = 0
        for logits in chunks:
            for name, values in _per_token(logits, labels[at : at + len(logits[0])]).items():
                parts[name].append(values.cpu())
            at += len(logits[0])
        for name, chunk in parts.items():
            found[name].append(torch.cat(chunk).view(len(ids), -1)[:, :-1].double().mean(1))
    return {name: torch.cat(means) for name, means in found.items()}


def _per_token(logits: tuple[Tensor, ...], labels: Tensor) -> dict[str, Tensor]:
    """The figures of some tokens [tokens], of the model's logits [tokens, vocab] and the teacher's if there are any."""
    log_q, *others = (one.log_softmax(-1).clamp(min=FLOOR) for one in logits)
    labels = labels.to(log_q.device)
    found = {"loss": nll_loss(log_q, labels, reduction="none")}
    for other in others:
        log_p = other.to(log_q.device)
        found["teacher_loss"] = nll_loss(log_p, labels, reduction="none")
        found["kl"] = forward_kl(log_q, log_p)
        found["agreement"] = (log_q.argmax(-1) == log_p.argmax(-1)).float()
    return found
