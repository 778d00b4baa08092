"""What a teacher says of every token of a run's blocks, kept in a folder, so that training needs no teacher.

    cache.json               what it was made of: teacher, tokenizer, data, temperature; the size of each shard
    shard-00000.safetensors  some blocks: their numbers, the k likeliest tokens, their log-probabilities, the rest's

A token takes k x (2 + bytes of an id) + 2 bytes: 130 with k = 32 and a vocabulary of at most 65,536, 162 beyond. Shards
are memory-mapped and read block by block, so memory does not grow with the cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from hf_ws.distill import STATE_LOSSES, Favourites
from hf_ws.distill.tokens import WHOLE
from hf_ws.errors import DistillationError
from hf_ws.training.vocabularies import print_of_tokenizer

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from hf_ws.training.config import TrainConfig

MANIFEST = "cache.json"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a cache was made of."""

    teacher: str
    """Its fingerprint."""
    tokenizer: str | None
    """The fingerprint of its vocabulary, where the teacher came with a tokenizer."""
    data: str
    """The fingerprint of all the blocks, also of those that are left out."""
    block: int
    temperature: float
    vocabulary: int
    k: int
    dtype: str = "float16"
    """Of the log-probabilities."""

    @property
    def bytes_per_id(self) -> int:
        """As few as tell the ids of the vocabulary apart."""
        return -(-(self.vocabulary - 1).bit_length() // 8) or 1

    @property
    def bytes_per_token(self) -> int:
        """In a shard."""
        each = _DTYPES[self.dtype].itemsize
        return self.k * (self.bytes_per_id + each) + each

    def pack(self, numbers: Sequence[int], favourites: Favourites) -> dict[str, Tensor]:
        """A shard's tensors, of favourites whose rows are [blocks x block]."""
        shape, dtype = (len(numbers), self.block), _DTYPES[self.dtype]
        octets = favourites.ids.cpu().numpy().astype("<i4").view(np.uint8).reshape(*shape, self.k, 4)
        return {
            "numbers": torch.tensor(numbers, dtype=torch.int64),
            "ids": torch.from_numpy(octets[..., : self.bytes_per_id].copy()),
            "log_probs": favourites.log_probs.to("cpu", dtype).view(*shape, self.k),
            "rest": favourites.rest.to("cpu", dtype).view(shape),
        }

    def unpack_ids(self, octets: Tensor) -> Tensor:
        """The ids [..., k] that `pack` laid in bytes [..., k, bytes_per_id]."""
        whole = np.zeros((*octets.shape[:-1], 4), np.uint8)
        whole[..., : self.bytes_per_id] = octets.numpy()
        return torch.from_numpy(whole.view("<i4")[..., 0].astype(np.int64))


class TeacherCache:
    """A cache on disk.

    Raises:
        DistillationError: No cache there, or one that is not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.contents, self.shards = self._manifest()
        for name, size in self.shards.items():
            file = self.folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                what = "is missing" if found is None else f"has {found} bytes, not {size}"
                raise DistillationError(f"teacher_cache {self.folder}: {name} {what}; {_AGAIN}")
        self._open: dict[str, Any] = {}

    def _manifest(self) -> tuple[Contents, dict[str, int]]:
        try:
            found = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            known = {one.name for one in fields(Contents)}
            contents = Contents(**{name: value for name, value in found.items() if name in known})
            return contents, {str(name): int(size) for name, size in found["shards"].items()}
        except FileNotFoundError as error:
            raise DistillationError(
                f"teacher_cache {self.folder} holds no {MANIFEST}, so it is no finished cache; {_AGAIN}"
            ) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DistillationError(
                f"teacher_cache {self.folder}: {MANIFEST} cannot be read ({error}); {_AGAIN}"
            ) from error

    @cached_property
    def _places(self) -> np.ndarray:
        """For every block the number of its shard and its row there, [blocks, 2]; -1 where the block is in none."""
        found = [self._shard(name).get_tensor("numbers").numpy() for name in self.shards]
        places = np.full((max((int(numbers.max()) for numbers in found), default=-1) + 1, 2), -1, np.int32)
        for shard, numbers in enumerate(found):
            places[numbers] = np.stack([np.full(len(numbers), shard), np.arange(len(numbers))], axis=1)
        return places

    def __len__(self) -> int:
        return int((self._places[:, 0] >= 0).sum())

    @property
    def tokens(self) -> int:
        """That it says something of."""
        return len(self) * self.contents.block

    @property
    def bytes(self) -> int:
        """Of all shards."""
        return sum(self.shards.values())

    def __contains__(self, number: int) -> bool:
        return number < len(self._places) and self._places[number, 0] >= 0

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """What the teacher says of a block, as a batch carries it: at t, of the token that follows t.

        Returns:
            `teacher_ids` and `teacher_log_probs` [block, k], `teacher_rest` [block], in float32.
        """
        at, row = self._places[number].tolist()
        name = list(self.shards)[at]
        shard = self._shard(name)
        one = {part: shard.get_slice(part)[row] for part in ("ids", "log_probs", "rest")}
        ids = self.contents.unpack_ids(one["ids"])
        if int(ids.max()) >= self.contents.vocabulary or not one["log_probs"].isfinite().all():
            raise DistillationError(
                f"teacher_cache {self.folder}: {name} is damaged at block {number}; {_AGAIN}"
            )
        return {
            "teacher_ids": ids,
            "teacher_log_probs": one["log_probs"].float(),
            "teacher_rest": one["rest"].float(),
        }

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(self.folder / name, "pt")
            except (OSError, SafetensorError) as error:
                raise DistillationError(f"teacher_cache {self.folder}: {name}: {error}; {_AGAIN}") from error
        return self._open[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": {}}  # open files do not travel to the workers of a data loader

    def check_settings(
        self, config: TrainConfig, student: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Refuse what can be seen before any data is read.

        Raises:
            DistillationError: Losses or a temperature that the cache does not serve, or another vocabulary.
        """
        contents, vocabulary = self.contents, student.get_text_config().vocab_size
        asked = [name for name in config.kd_losses if name in WHOLE or name in STATE_LOSSES]
        faults = {
            f"{', '.join(asked)} in kd_losses: it holds likeliest tokens, and neither all logits nor inner states; "
            "take a live teacher": asked,
            f"made at kd_temperature={contents.temperature:g}, and the run's is {config.kd_temperature:g}": (
                contents.temperature != config.kd_temperature
            ),
            f"made for a vocabulary of {contents.vocabulary}, and the student's has {vocabulary}": (
                contents.vocabulary != vocabulary
            ),
            "made with a tokenizer that gives other ids than the student's": (
                tokenizer is not None and contents.tokenizer not in (None, print_of_tokenizer(tokenizer))
            ),
            f"holds {contents.k} tokens, and kd_top_k={config.kd_top_k}": (config.kd_top_k or 0) > contents.k,
        }
        if found := [fault for fault, there in faults.items() if there]:
            raise DistillationError(f"teacher_cache {self.folder}: {'; and '.join(found)}. Else {_AGAIN}")

    def check_blocks(self, blocks: datasets.Dataset, order: Tensor, *, progress: bool = True) -> None:
        """Refuse other data than the cache was made of, or a run that takes blocks which are not in it.

        Raises:
            DistillationError: Naming what differs.
        """
        length, where = len(blocks[0]["input_ids"]), f"teacher_cache {self.folder}"
        if length != self.contents.block:
            raise DistillationError(
                f"{where}: made for block={self.contents.block}, and the run's is {length}; {_AGAIN}"
            )
        found = print_of_data(blocks, progress=progress)
        if found != self.contents.data:
            raise DistillationError(
                f"{where}: made of other data ({self.contents.data}; the run's: {found}); {_AGAIN}"
            )
        wanted = set(order.tolist())
        if lacking := sum(number not in self for number in wanted):
            raise DistillationError(
                f"{where}: {lacking} of the {len(wanted)} blocks that this run takes are not in it; make it with "
                "the same steps, batch and seed, or of every block"
            )


_AGAIN = "make it again with `hf-ws cache-teacher` and the settings of the run"


def write_manifest(folder: Path, contents: Contents, teacher: str) -> None:
    """Record the shards of a folder, and what they are made of. `teacher` is its name, for people."""
    shards = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    found = {"teacher_name": teacher, **asdict(contents)}
    found |= {"bytes_per_token": contents.bytes_per_token, "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def print_of_data(blocks: datasets.Dataset, *, progress: bool = True) -> str:
    """A fingerprint of all that a model is given of all blocks. A bar appears when it takes over two seconds."""
    seen = hashlib.sha256()
    names = sorted(set(blocks.column_names) - {"labels"})
    batches = blocks.select_columns(names).with_format("numpy").iter(1000)
    for batch in tqdm(
        batches,
        "fingerprint of the data",
        -(-len(blocks) // 1000),
        delay=2,
        leave=False,
        disable=not progress,
    ):
        for name in names:
            seen.update(np.ascontiguousarray(batch[name], dtype=np.int64).tobytes())
    return f"{len(blocks)} blocks, {', '.join(names)}, {seen.hexdigest()[:16]}"
