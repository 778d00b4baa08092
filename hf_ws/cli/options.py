"""The flags that several commands share: what `AutoSubclone.from_pretrained` takes, spelled for a shell."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from hf_ws.errors import CalibrationError, DataError, PlanError

CALIBRATION_CHARACTERS = 100_000
"""Of calibration text read: some 25,000 tokens, with which mean activations have long settled."""

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="A Hub id, or a folder that save_pretrained wrote.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _size(text: str) -> Any:
    return typer.Option(metavar="N", help=text)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What to make, by which method, from where."""

    hidden: Annotated[int | None, _size("Width of the residual stream.")] = None
    layers: Annotated[int | None, _size("Number of layers.")] = None
    heads: Annotated[int | None, _size("Query heads.")] = None
    kv_heads: Annotated[int | None, _size("Key/value heads.")] = None
    head_dim: Annotated[int | None, _size("Channels in a head.")] = None
    ffn: Annotated[int | None, _size("Neurons of a feed-forward block.")] = None
    vocab: Annotated[int | None, _size("Rows of the token embedding.")] = None
    experts: Annotated[int | None, _size("Routed experts in a layer.")] = None
    params: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Parameters in all, such as 125M, in place of sizes: the best shape near it is searched for.",
        ),
    ] = None
    ratio: Annotated[
        float | None,
        typer.Option(metavar="X", help="The same as a part of the source's parameters, such as 0.4."),
    ] = None
    set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="A field of the config in its own spelling (vision_config.hidden_size=384); may be repeated.",
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How to choose: rotation, subclone, weight_selection or random. By default rotation with "
            "--calibration (a tied head stays tied), else subclone.",
        ),
    ] = None
    method_arg: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An option of the method, such as rescale=false; may be repeated."
        ),
    ] = None
    layer_policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|0,1,5",
            help="Which layers stay: first, middle_dropped, block_influence, ..., or their numbers.",
        ),
    ] = None
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|stdlib",
            help=f"Text to rank by activation on, the first {CALIBRATION_CHARACTERS:,} characters of a sample of its "
            "documents; stdlib is Python's own sources; may be repeated.",
        ),
    ] = None
    compensation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What is done, with that text, against what is lost: least_squares, least_squares_hidden, rms, "
            "mean_bias, least_squares_drifted, output; may be repeated.",
        ),
    ] = None
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything random.")] = 0
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of the new weights, such as bfloat16; the source's by default."),
    ] = None
    model_class: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Instead of the class that the checkpoint names.")
    ] = None
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a Hub id.")
    ] = None
    cache_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where downloads are kept.")] = None
    local_files_only: Annotated[bool, typer.Option("--local-files-only", help="Download nothing.")] = False

    @property
    def where(self) -> dict[str, Any]:
        """How to find the source."""
        return {name: getattr(self, name) for name in ("revision", "cache_dir", "local_files_only")}

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `AutoSubclone.plan` and `from_pretrained` that these flags mean.

        Raises:
            PlanError: a pair that is not `key=value`, or a config field that has a flag of its own.
            CalibrationError: no such text.
        """
        config_fields = pairs("--set", self.set)
        if own := next((one.name for one in fields(self) if one.name in config_fields), None):
            raise PlanError(f"--set {own}=...: that is a flag, say --{own.replace('_', '-')}")
        return {
            **{
                one.name: getattr(self, one.name)
                for one in fields(self)
                if one.name not in ("set", "method_arg")
            },
            "method_args": pairs("--method-arg", self.method_arg),
            "layer_policy": layer_policy(self.layer_policy),
            "calibration": calibration_texts(self.calibration),
            **config_fields,
        }

    def given(self, but: Sequence[str] = ()) -> dict[str, Any]:
        """The flags that differ from their defaults, less those in `but`."""
        return {
            one.name: getattr(self, one.name)
            for one in fields(self)
            if one.name not in but and getattr(self, one.name) not in (one.default, [])
        }

    def spelled(self) -> str:
        """These flags as they would be typed, without anything that names a place on this machine."""
        words: list[str] = []
        for name, value in self.given(but=("cache_dir", "local_files_only")).items():
            for one in value if isinstance(value, list) else [value]:
                words += [
                    f"--{name.replace('_', '-')}",
                    Path(one).name if name == "calibration" else str(one),
                ]
        return shlex.join(words)


def with_flags(but: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes of a command's parameters that are dataclasses one option for each field, less those in `but`."""

    def spell_out(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        blocks = {
            name: {one.name: one for one in fields(kind) if one.name not in but}
            for name, kind in hints.items()
            if is_dataclass(kind)
        }

        @functools.wraps(command)
        def spelled_out(**given: Any) -> None:
            made = {
                name: hints[name](**{one: given.pop(one) for one in taken}) for name, taken in blocks.items()
            }
            command(**made, **given)

        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
            parameters += _options(hints[name], blocks[name]) if name in blocks else [own]
        spelled_out.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        spelled_out.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return spelled_out

    return spell_out


def _options(block: type, taken: Mapping[str, Field[Any]]) -> list[inspect.Parameter]:
    """The options that the fields of a block are."""
    hints = get_type_hints(block, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            name,
            kind,
            annotation=hints[name],
            default=inspect.Parameter.empty if one.default is MISSING else one.default,
        )
        for name, one in taken.items()
    ]


def quiet_unless_seen() -> None:
    """In a log, Transformers' bars for saving and loading are noise."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def sources(given: list[str] | None) -> str | list[Path] | None:
    """One source of text by its name, which may be a dataset's; several as files."""
    if not given:
        return None
    return given[0] if len(given) == 1 else [Path(one) for one in given]


def pairs(option: str, given: Sequence[str] | None) -> dict[str, Any]:
    """`key=value` flags as a dictionary, the values read as YAML: `n=3`, `rescale=false`, `ids=[1, 2]`.

    Raises:
        PlanError: no `=`, no key, a key given twice, or a value that is not YAML.
    """
    import yaml

    found: dict[str, Any] = {}
    for pair in given or ():
        key, equals, text = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):  # a dot leads into a sub-config
            raise PlanError(f"{option} {pair!r}: wanted is name=value, such as {option} rescale=false")
        if key in found:
            raise PlanError(f"{option} {key} is given twice; keep one")
        # YAML 1.1 takes 1e6 for text; nobody who types it means that.
        number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", text)
        try:
            found[key] = float(text) if number else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PlanError(f"{option} {pair!r}: the value is not YAML: {error}") from error
    return found


def layer_policy(given: str | None) -> str | list[int] | None:
    """A policy's name, or layer numbers parted by commas."""
    if given is None or not re.fullmatch(r"[\d,\s]+", given):
        return given
    return [int(number) for number in given.split(",") if number.strip()]


def calibration_texts(given: Sequence[str] | None) -> list[str] | None:
    """Evenly spread documents of these files, `CALIBRATION_CHARACTERS` at most.

    Raises:
        CalibrationError: a file that is missing or holds no text.
    """
    if not given:
        return None
    from hf_ws.training.data import text_files

    try:
        documents = text_files(given)
    except DataError as error:
        raise CalibrationError(f"--calibration: {error}") from error
    every = -(-sum(len(document.text) for document in documents) // CALIBRATION_CHARACTERS)
    texts, left = [], CALIBRATION_CHARACTERS
    for document in documents[:: max(every, 1)]:
        texts.append(document.text[:left])
        left -= len(texts[-1])
    return [text for text in texts if text.strip()]
