"""Which tensor on disk is which parameter in memory.

The one place that touches how Transformers renames and converts checkpoints (`conversion_mapping`,
`core_model_loading`); a test compares it with `from_pretrained` itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from hf_ws.errors import CheckpointError


@dataclass(frozen=True)
class Match:
    """Names of a checkpoint laid beside those of a model."""

    stored: dict[str, str]  # name in memory -> name on disk
    unused: tuple[str, ...]  # on disk, with no parameter in the model


def match_names(model: PreTrainedModel, names: Iterable[str]) -> Match | None:
    """Pair names as `from_pretrained` does; None when it would convert tensors (merge experts)."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    if len(renamings) + len(converters) != len(transforms):
        return None
    prefix, memory = model.base_model_prefix, model.state_dict()
    stored: dict[str, str] = {}
    unused = []
    for name in names:
        renamed, converter = rename_source_key(name, renamings, converters, prefix, memory)
        if renamed not in memory and name in memory:
            renamed, converter = rename_source_key(name, [], [], prefix, memory)
        if converter is not None:
            return None
        if renamed not in memory:
            unused.append(renamed)
        elif renamed in stored:
            raise CheckpointError(
                f"{stored[renamed]!r} and {name!r} on disk are both {renamed!r} in {type(model).__name__}; "
                "remove one"
            )
        else:
            stored[renamed] = name
    return Match(stored, tuple(unused))


def ties(model: PreTrainedModel) -> dict[str, str]:
    """Tied parameters, as the config asks: name -> the name it shares its tensor with."""
    return model.get_expanded_tied_weights_keys(all_submodels=True)


def may_be_absent(model: PreTrainedModel, name: str) -> bool:
    """Whether the class says that it makes `name` itself when a checkpoint lacks it."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def out_of_place(model: PreTrainedModel, unused: Iterable[str]) -> list[str]:
    """Those of `unused` that a model of this config should have had a parameter for.

    Spare parts are harmless and common: BERT checkpoints carry a pooler and a next-sentence head that
    BertForMaskedLM has no place for. Harmful is what lies in the layers (a thirteenth layer, a norm that the
    config does not mention) or in a module that the model has (a bias switched off in the config).
    """
    ignored = list(model._keys_to_ignore_on_load_unexpected or ())
    # Transformers adds the two buffers that checkpoints of its early versions still hold.
    ignored += [r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    modules = {name for name, _ in model.named_modules()}
    return [
        name
        for name in unused
        if not any(re.search(pattern, name) for pattern in ignored)
        and (re.search(r"(^|\.)\d+\.", name) or name.rpartition(".")[0] in modules)
    ]
