"""Token ids in configs: which there are, and what they become in another vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_OTHERS = re.compile(r"^(codec|codebook|t2u|tts_codec)_")  # of sounds, not of text
_ONE = re.compile(r"(^|_)token_(id|ids|index)$|^(bos|eos|pad|unk|mask)_index$")
_NAMED = ("lang_to_id", "task_to_id", "forced_decoder_ids")
_BANNED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
"""Lists whose entries may go: a token that there is not any more need not be forbidden."""


def token_ids(values: Mapping[str, Any]) -> set[int]:
    """Every id that a config's dict or a generation config's names, and that must therefore stay."""
    found = {
        i
        for name, value in values.items()
        if _speaks_of_tokens(name)
        for i in _leaves([second for _, second in value] if name == "forced_decoder_ids" and value else value)
    }
    return {i for i in found if i >= 0}  # -1 stands for none, -100 for what no loss counts


def renumbered(values: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The fields of a config's dict, or of a generation config's, that change when ids do.

    Args:
        values: The dict.
        new: Each kept id's new one. An id that is not kept stays as it is, in lists of what is forbidden it goes.
    """
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name in _BANNED and value:
            changed[name] = [_mapped(entry, new) for entry in value if {*_leaves(entry)} <= new.keys()]
        elif name == "forced_decoder_ids" and value:
            changed[name] = [[place, _mapped(i, new)] for place, i in value]
        elif _speaks_of_tokens(name):
            changed[name] = _mapped(value, new)
    return {name: value for name, value in changed.items() if value != values[name]}


def _speaks_of_tokens(name: str) -> bool:
    return name in _NAMED or bool(_ONE.search(name) and not _OTHERS.search(name))


def _leaves(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _mapped(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, Mapping):
        return {name: _mapped(entry, new) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(entry, new) for entry in value]
    return new.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value
