"""Ask a teacher once about all the blocks of a run, and keep what it says (see `hf_ws.training.teacher_cache`).

cache_teacher(TrainConfig(model="student", teacher="teacher", train_files=["stdlib"], steps=1000), "cache")
train(TrainConfig(model="student", teacher_cache="cache", train_files=["stdlib"], steps=1000, output="run"))
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from hf_ws.distill import Favourites, head
from hf_ws.distill.logits import logits_in_chunks
from hf_ws.distill.outcomes import FLOOR
from hf_ws.errors import DistillationError, PlanError
from hf_ws.store import check_output, new_folder
from hf_ws.training.config import TrainConfig
from hf_ws.training.data import Packed
from hf_ws.training.job import Job, prepare, print_of_model
from hf_ws.training.run_folder import write_json
from hf_ws.training.sharding import engine
from hf_ws.training.teacher_cache import (
    Contents,
    TeacherCache,
    print_of_data,
    write_manifest,
)
from hf_ws.training.vocabularies import print_of_tokenizer

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SHARD = 256 * 2**20
"""Bytes of a shard at most, so of what is lost when the work is interrupted."""


def cache_teacher(
    config: TrainConfig,
    folder: str | Path,
    *,
    k: int = 32,
    dtype: str = "float16",
    every_block: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher: PreTrainedModel | None = None,
    train_blocks: Packed | datasets.Dataset | Tensor | None = None,
) -> TeacherCache:
    """Write the teacher's k likeliest tokens after every token of the blocks that a run with these settings takes.

    The folder appears whole or not at all. What was interrupted goes on where it stopped when it is asked for again:
    finished shards wait in the hidden folder `.<name>.partial` beside it. Under `accelerate launch` the processes share
    the work; as many as the run will have, or the same batch in all, for that decides which blocks it takes.

    Args:
        config: The settings of the run, with `teacher`.
        folder: Where to write; it must not exist, or be empty.
        k: Tokens kept, at most the vocabulary.
        dtype: Of the log-probabilities, "float16" or "float32".
        every_block: All blocks of the data, however many the run takes.
        model: As in `train`, and so are the following.
        tokenizer: As in `train`.
        teacher: As in `train`.
        train_blocks: As in `train`.

    Returns:
        The cache, opened.

    Raises:
        PlanError, CheckpointError, DataError, DistillationError, OutputError: Before any work.
    """
    if k < 1 or dtype not in ("float16", "float32"):
        raise PlanError(f"k={k}, dtype={dtype!r}; k is at least 1, dtype float16 or float32")
    if not config.distils or (teacher is None and config.teacher is None):
        raise PlanError("no teacher to ask: set teacher= to a folder or Hub id, and kd_weight above 0")
    if config.streaming:
        raise PlanError("a cache is of data in memory; leave out streaming, or train from a live teacher")
    target = Path(folder).expanduser()
    check_output(target)
    state = PartialState(**engine())
    given: dict[str, Any] = {
        "model": model,
        "tokenizer": tokenizer,
        "teacher": teacher,
        "train_blocks": train_blocks,
    }
    job = prepare(replace(config, teacher_cache=None), **given)
    assert job.teacher is not None
    asked, blocks = job.teacher.to(state.device), job.blocks
    contents = _contents(job, k, dtype)
    numbers = list(range(len(blocks))) if every_block else sorted(set(job.order().tolist()))
    source: Any = config.teacher if teacher is None else teacher
    del job  # and with it the student
    partial = target.with_name(f".{target.name}.partial")
    _write(partial, contents, blocks, numbers, asked, config)
    if state.is_main_process:
        with new_folder(target) as staging:
            for file in partial.glob("*.safetensors"):
                file.rename(staging / file.name)
            write_manifest(staging, contents, _name(source))
        shutil.rmtree(partial)
    state.wait_for_everyone()
    return TeacherCache(target)


def _contents(job: Job, k: int, dtype: str) -> Contents:
    """What the cache is of."""
    assert job.teacher is not None
    vocabulary = job.teacher.config.get_text_config().vocab_size
    return Contents(
        teacher=print_of_model(job.teacher),
        tokenizer=None if job.tokenizer is None else print_of_tokenizer(job.tokenizer),
        data=print_of_data(job.blocks, progress=job.config.progress and PartialState().is_main_process),
        block=len(job.blocks[0]["input_ids"]),
        temperature=job.config.kd_temperature,
        vocabulary=vocabulary,
        k=min(k, vocabulary),
        dtype=dtype,
    )


def _name(teacher: Any) -> str:
    """A Hub id, or the last part of a path: where it lies on this machine is nobody's business."""
    text = str(teacher) if isinstance(teacher, str | Path) else type(teacher).__name__
    return Path(text).resolve().name if Path(text).expanduser().exists() else text


def _write(
    partial: Path,
    contents: Contents,
    blocks: datasets.Dataset,
    numbers: list[int],
    teacher: PreTrainedModel,
    config: TrainConfig,
) -> None:
    """Write every shard that is not there yet, each process its share."""
    state = PartialState()
    size = max(1, SHARD // (contents.bytes_per_token * contents.block))
    shards = {
        f"shard-{at // size:05}.safetensors": numbers[at : at + size] for at in range(0, len(numbers), size)
    }
    if state.is_main_process:
        _begin(partial, json.loads(json.dumps({**asdict(contents), "numbers": numbers})))
    state.wait_for_everyone()
    mine = list(shards)[state.process_index :: state.num_processes]
    missing = [name for name in mine if not _is_whole(partial / name)]
    if len(missing) < len(mine):
        logger.warning("%d of %d shards are there already: going on", len(mine) - len(missing), len(mine))
    bar = tqdm(
        total=sum(len(shards[name]) for name in mine) * contents.block,
        initial=sum(len(shards[name]) for name in set(mine) - set(missing)) * contents.block,
        desc="asking the teacher", unit=" tokens", unit_scale=True, leave=False,
        disable=not (config.progress and state.is_main_process),
    )  # fmt: skip
    with bar:
        apart = bool(missing) and head.is_known(teacher, _inputs(teacher, blocks, [0]))
        for name in missing:
            parts = []
            for tensors in _asked(teacher, apart, blocks, shards[name], contents, config.batch_size):
                parts.append(tensors)
                bar.update(tensors["rest"].numel())
            whole = {part: torch.cat([one[part] for one in parts]) for part in parts[0]}
            save_file(whole, partial / f"{name}.part")
            (partial / f"{name}.part").replace(partial / name)
    state.wait_for_everyone()


def _begin(partial: Path, made_of: dict[str, Any]) -> None:
    """Keep the folder of an interrupted attempt at the same cache; clear away any other."""
    record = partial / "made_of.json"
    try:
        same = json.loads(record.read_text(encoding="utf-8")) == made_of
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_json(record, made_of)


def _is_whole(file: Path) -> bool:
    """Whether a shard got its name before the work stopped; safetensors compares sizes as it opens."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


@torch.no_grad()
def _asked(
    teacher: PreTrainedModel,
    apart: bool,
    blocks: datasets.Dataset,
    numbers: list[int],
    contents: Contents,
    batch_size: int,
) -> Iterator[dict[str, Tensor]]:
    """The tensors of these blocks, a batch at a time, with logits for some hundred tokens at a time."""
    for at in range(0, len(numbers), batch_size):
        some = numbers[at : at + batch_size]
        found = []
        for logits in logits_in_chunks(teacher, _inputs(teacher, blocks, some), apart=apart):
            log_p = (logits[:, : contents.vocabulary] / contents.temperature).log_softmax(-1)
            found.append(Favourites.of(log_p.clamp(min=FLOOR), contents.k))
        favourites = Favourites(
            *(torch.cat([getattr(one, part) for one in found]) for part in ("ids", "log_probs", "rest"))
        )
        if not favourites.log_probs.isfinite().all():
            raise DistillationError(
                f"the teacher's logits are not finite in one of the blocks {some}; load it in another dtype"
            )
        yield contents.pack(some, favourites)


def _inputs(teacher: PreTrainedModel, blocks: datasets.Dataset, numbers: list[int]) -> dict[str, Any]:
    given = blocks[numbers].items()
    return {name: value.to(teacher.device) for name, value in given if name != "labels"} | {
        "use_cache": False
    }
