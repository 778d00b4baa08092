"""The settings of a training run, from a YAML file, from flags, or in Python.

    learning_rate: 1e-4        # a number, though YAML 1.1 reads it as text
    train_files: [stdlib]

A flag wins over the file, the file over the default. A key that does not exist is an error that names its
line and the nearest key that does.
"""

from __future__ import annotations

import argparse
import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from hf_ws.distill import LOSSES, STATE_LOSSES
from hf_ws.errors import PlanError
from hf_ws.training.blocks import Lora, Subclone
from hf_ws.training.kernels import Asked
from hf_ws.training.presets import PRESETS
from hf_ws.training.typed import block_of, check_types, made, pair, read_settings, say

Weight = float | list[float]
"""A loss's weight; of a pair, the weight at the start of the run and that at its end, moving evenly."""

# fmt: off
AT_LEAST = {
    "steps": 1, "tokens": 1, "batch_size": 1, "grad_accum": 1, "block": 2, "threads": 1, "workers": 0,
    "seed": 0, "shuffle_buffer": 1, "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "nonfinite_steps": 0,
    "log_every": 1, "eval_every": 0, "max_eval_blocks": 0, "save_every": 0, "keep_checkpoints": 2,
    "mean_span": 1, "mixup": 0, "cutmix": 0, "kd_top_k": 1,
}
# fmt: on
"""The least that a number may be, where it has no most."""


def forward_kl_alone() -> dict[str, Weight]:
    """What distils where nothing else is asked for."""
    return {"forward_kl": 1.0}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, how long and how. Checked when made; raises PlanError listing every fault.

    The comment after a field is its help text on the command line.
    """

    # What is trained, and where the run is written.
    model: str | None = None  # folder or Hub id of the start; its weights are trained in float32
    subclone: Subclone | None = None  # instead of model: the source and sizes of a start made inside the run
    output: str | None = None  # folder of the run: metrics, picture, checkpoints, and the result in model/
    save_model: bool = True  # write the trained model and its tokenizer to <output>/model
    resume: bool = False  # continue the run in `output` from its last whole checkpoint, or start it

    # Text.
    train_files: list[str] = field(default_factory=list)  # files, folders, globs; or stdlib, Python's sources
    eval_files: list[str] = field(default_factory=list)  # held-out text; else a hash holds out one in 20
    dataset: str | None = None  # Hub name of a dataset, instead of train_files
    dataset_config: str | None = None  # its configuration, if it has several
    dataset_split: str = "train"  # its split
    text_column: str = "text"  # the column or JSON key that holds the text
    mixture: dict[str, Weight] = field(default_factory=dict)  # sources of text, and their weights
    streaming: bool = False  # read text while training: a dataset of the Hub, or files too large for memory
    shuffle_buffer: int = 10_000  # texts of a stream that are shuffled among each other; 1 for none
    skip_bad_rows: bool = False  # leave out rows that hold no text, with a count; else stop at the first
    block: int = 512  # tokens in a training sequence
    documents_apart: bool = True  # no token sees another document of its block, where the model can (clm)
    mask_probability: float = 0.15  # tokens hidden (mlm) or cut out in spans (seq2seq), as a part of a block
    mean_span: float = 3.0  # tokens in a span that is cut out (seq2seq)
    eval_split: str | None = None  # the split of the dataset that is held out, instead of one row in 20
    source_column: str | None = None  # of pairs of texts (seq2seq), instead of text with spans cut out
    target_column: str | None = None  # what is predicted from it
    max_eval_blocks: int = 256  # held-out sequences used at most, in whole batches; 0 for all

    # Images, and sound.
    image_column: str = "image"  # the column of pictures (image_classification)
    label_column: str = "label"  # the column of their classes
    crop: float = 1.0  # least part of a picture that a random crop keeps; 1 for the whole
    flip: bool = False  # turn every other picture's left to its right
    randaugment: float = 0.0  # strength, up to 10, of changes of pictures drawn by chance; 0 for none
    label_smoothing: float = 0.0  # of a label's weight, the part given to all classes alike
    mixup: float = 0.0  # pictures blended in pairs, by a share drawn from Beta(mixup, mixup); 0 for none
    cutmix: float = 0.0  # rectangles of pictures put into others, as large as a share of Beta(cutmix, cutmix)
    erase: float = 0.0  # the part of pictures that lose a rectangle to noise
    audio_column: str = "audio"  # the column of sound (speech); its text is in text_column
    word_errors: bool = False  # write down held-out clips at every evaluation, and count the wrong words
    language: str | None = None  # of that text, where the tokenizer marks languages

    # How long, and how much at a time.
    steps: int | None = None  # optimizer steps; give this or tokens
    tokens: int | None = None  # training tokens in all, rounded down to whole steps
    batch_size: int = 8  # sequences a process takes at a time
    grad_accum: int = 1  # batches a process adds up before an optimizer step

    # What is trained of it, and at what price.
    lora: Lora | None = None  # adapters of low rank instead of all weights
    gradient_checkpointing: bool = False  # compute activations again in the backward pass, to save memory
    compile: bool = False  # compile every layer with torch.compile
    liger: Asked = "auto"  # Liger's kernels; auto: where installed, on a GPU, for the model's type

    # Optimizer and schedule.
    preset: Literal["inherited"] | None = None  # fills what is not given; inherited: lower rate and decay
    learning_rate: float = 3e-4  # at its peak
    layer_lr_decay: float | None = None  # a layer's rate, as a part of the rate of the layer after it
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warm-up
    min_lr_ratio: float = 0.1  # where the cosine ends, as a part of the peak
    warmup_steps: int | None = None  # linear from 0; by default one step in fifty
    weight_decay: float = 0.1  # AdamW's; not on biases and norms
    max_grad_norm: float = 1.0  # longer gradients are cut to this; 0 for no limit
    adam_beta1: float = 0.9  # decay of the first moment
    adam_beta2: float = 0.95  # decay of the second moment
    adam_epsilon: float = 1e-8  # added to the root of the second moment
    nonfinite_steps: int = 0  # steps in a row that may be left out because their gradient is not finite
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # the launcher's, else bf16 on a GPU, fp32
    seed: int = 0  # order of the batches, dropout
    workers: int = 0  # processes beside the training that read and prepare batches
    threads: int | None = None  # CPU threads; by default torch's own choice

    # Distillation.
    teacher: str | None = None  # folder or Hub id of a model with the same vocabulary
    teacher_cache: str | None = None  # folder that `hf-ws cache-teacher` wrote, instead of a teacher
    kd_weight: Weight = 0.5  # w in loss = (1 - w) x cross-entropy + w x kd_losses; 0 loads no teacher
    kd_losses: dict[str, Weight] = field(default_factory=forward_kl_alone)  # losses and their weights
    kd_temperature: float = 1.0  # softens both distributions
    kd_top_k: int | None = None  # compare the teacher's k likeliest tokens, the rest as one outcome
    kd_top_p: float | None = None  # compare its likeliest tokens up to this probability, the rest as one
    kd_beta: float = 0.5  # the teacher's share of the mixture in jensen_shannon
    kd_alpha: float = 0.1  # the teacher's share of the mixture in skew_kl

    # What is recorded.
    eval_every: int | None = None  # steps between evaluations; by default a tenth of the run. 0 for none
    eval_at: list[int] = field(default_factory=list)  # further steps at which to evaluate
    log_every: int = 10  # steps between lines of metrics.jsonl
    save_every: int = 0  # steps between checkpoints; 0 for none
    keep_checkpoints: int = 2  # newest ones kept, at least 2: one is whole while the other is written
    report_to: list[str] = field(default_factory=list)  # trackers: trackio, tensorboard, wandb, ...
    progress: bool = True  # show progress bars

    @property
    def distils(self) -> bool:
        """Whether a teacher has any weight at any time."""
        return self.kd_weight not in (0.0, [0.0, 0.0]) and bool(self.kd_losses)

    def __new__(cls, **given: Any) -> Self:
        """Remembers what was given, which a preset leaves as it is."""
        config = object.__new__(cls)
        object.__setattr__(config, "_given", frozenset(given))
        return config

    def __post_init__(self) -> None:
        given: frozenset[str] = self._given  # type: ignore[attr-defined]
        for name, value in PRESETS.get(str(self.preset), {}).items():
            if name not in given:
                object.__setattr__(self, name, value)
        for name, hint in typing.get_type_hints(TrainConfig).items():
            value, block = getattr(self, name), block_of(hint)
            if block and isinstance(value, Mapping):
                object.__setattr__(self, name, made(block, value, name))
        faults = list(check_types(self)) or [*_contradictions(self), *_out_of_range(self)]
        if faults:
            raise PlanError("training settings: " + "; and ".join(faults))


def load_config_file(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, its keys and their types checked against TrainConfig.

    Raises:
        PlanError: No such file, not a mapping, an unknown or repeated key, a wrong type; with the line.
    """
    return read_settings(path, TrainConfig)


def config_from_flags(arguments: Sequence[str] | None, description: str) -> TrainConfig:
    """The settings that a recipe's command line gives: flags over the `--config` file over the defaults.

    Every field is a flag, spelled with dashes or underscores.

    Raises:
        PlanError: What `load_config_file` and TrainConfig refuse.
    """
    hints, helps = typing.get_type_hints(TrainConfig), _field_comments()
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", help="YAML file of settings; flags win over it")
    for one in fields(TrainConfig):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        shown = f" (default: {default})" if default not in (None, []) else ""
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": one.name}
        options["help"] = (helps[one.name] + shown).replace("%", "%%")
        if block := block_of(hints[one.name]):
            options |= {"nargs": "+", "type": pair, "metavar": "KEY=VALUE"}
            options["help"] += f"; {say(block)}; over the file's, key by key"
        elif hints[one.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif hints[one.name] == Asked:
            options |= {"type": _asked, "choices": ["auto", True, False], "metavar": "auto|true|false"}
        elif get_origin(hints[one.name]) is list:
            options |= {"nargs": "+", "type": int if hints[one.name] == list[int] else str, "metavar": "X"}
        elif get_origin(hints[one.name]) is dict:
            options |= {"nargs": "+", "type": _named_weight, "metavar": "NAME=WEIGHT"}
        elif hints[one.name] == Weight:
            options |= {"type": _weight, "metavar": "FLOAT[:FLOAT]"}
        elif get_origin(hints[one.name]) is Literal:
            options["choices"] = get_args(hints[one.name])
        else:
            kinds = [
                kind for kind in get_args(hints[one.name]) or [hints[one.name]] if kind is not type(None)
            ]
            options |= {"type": kinds[0], "metavar": kinds[0].__name__.upper()}
        dashed = f"--{one.name.replace('_', '-')}"
        parser.add_argument(*dict.fromkeys((dashed, f"--{one.name}")), **options)
    given = vars(parser.parse_args(arguments))
    given |= {name: dict(value) for name, value in given.items() if get_origin(hints.get(name)) is dict}
    file = given.pop("config", None)
    values = load_config_file(file) if file else {}
    for name in [name for name in given if block_of(hints[name])]:
        given[name] = (values.get(name) or {}) | dict(given[name])
    return TrainConfig(**{**values, **given})


def _asked(text: str) -> Any:
    """A flag's `auto`, `true` or `false`."""
    return {"true": True, "false": False}.get(text, text)


def _weight(text: str) -> Weight:
    """A flag's `0.5`, or `0.9:0.1` for a weight that moves."""
    numbers = [float(part) for part in text.split(":")]
    return numbers[0] if len(numbers) == 1 else numbers


def _named_weight(text: str) -> tuple[str, Weight]:
    """A flag's `forward_kl=0.5`."""
    name, _, weight = text.partition("=")
    return name, _weight(weight or "1")


def _contradictions(config: TrainConfig) -> typing.Iterator[str]:
    """Keys that do not go together."""
    if (config.steps is None) == (config.tokens is None):
        yield f"steps={config.steps} and tokens={config.tokens}; give one of the two"
    if config.eval_split and (config.eval_files or not config.dataset):
        yield "eval_split is of a dataset, in place of eval_files; give dataset, or leave one out"
    if bool(config.train_files) + bool(config.dataset) + bool(config.mixture) > 1:
        yield "train_files, dataset and mixture: give one of the three"
    yield from _streaming(config)
    if config.model and config.subclone:
        yield f"model={config.model!r} and subclone both given; give one of the two"
    if config.compile and "attention_relation" in config.kd_losses and config.distils:
        yield "compile and attention_relation, which looks inside layers; leave out one"
    if "logit_mse" in config.kd_losses and (config.kd_top_k or config.kd_top_p):
        yield "logit_mse compares all logits; leave out kd_top_k and kd_top_p"


def _out_of_range(config: TrainConfig) -> typing.Iterator[str]:
    """Values that no run can have."""
    for name, bound in AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            yield f"{name}={value}; at least {bound}"
    for name in ("learning_rate", "kd_temperature", "adam_epsilon"):
        if not 0 < getattr(config, name) < float("inf"):
            yield f"{name}={getattr(config, name)}; above 0"
    for name in ("crop", "layer_lr_decay", "kd_top_p"):
        value = getattr(config, name)
        if value is not None and not 0 < value <= 1:
            yield f"{name}={value}; above 0, up to 1"
    for name, most in (("label_smoothing", 1), ("erase", 1), ("min_lr_ratio", 1), ("randaugment", 10)):
        if not 0 <= getattr(config, name) <= most:
            yield f"{name}={getattr(config, name)}; from 0 to {most}"
    for name in ("mask_probability", "kd_beta", "kd_alpha"):
        if not 0 < getattr(config, name) < 1:
            yield f"{name}={getattr(config, name)}; between 0 and 1"
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            yield f"{name}={getattr(config, name)}; from 0 to below 1"
    if any(isinstance(weight, list) or not 0 < weight < float("inf") for weight in config.mixture.values()):
        yield f"mixture={config.mixture}; weights are single numbers above 0"
    for block in (config.subclone, config.lora):
        yield from block.faults() if block else ()
    yield from _loss_weights(config)


def _streaming(config: TrainConfig) -> typing.Iterator[str]:
    if not config.streaming:
        return
    if config.workers:
        yield f"workers={config.workers} with streaming, which reads in the training's own process; leave it out"
    if config.teacher_cache:
        yield "teacher_cache with streaming: a cache holds the blocks of data in memory; take a live teacher"
    if not config.max_eval_blocks and not config.eval_files:
        yield "max_eval_blocks=0 with streaming, which has no end; give a number, or eval_files"
    if config.source_column or config.target_column:
        yield "streaming reads text that is packed, and no pairs; leave out source_column and target_column"


def _loss_weights(config: TrainConfig) -> typing.Iterator[str]:
    losses = {**LOSSES, **STATE_LOSSES}
    for name, weight in {"kd_weight": config.kd_weight, **config.kd_losses}.items():
        pair = weight if isinstance(weight, list) else [weight, weight]
        if name != "kd_weight" and name not in losses:
            near = difflib.get_close_matches(name, losses, n=1)
            yield f"kd_losses has {name!r}{f', meaning {near[0]!r}?' if near else ''}; allowed: {', '.join(losses)}"
        elif len(pair) != 2 or not all(
            0 <= one <= (1 if name == "kd_weight" else float("inf")) for one in pair
        ):
            yield f"{name}={weight}; {'from 0 to 1' if name == 'kd_weight' else 'not below 0'}, or a pair of such"


def _field_comments() -> dict[str, str]:
    """What the comment after each field of TrainConfig says, read from this file."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    found = (re.fullmatch(r"    (\w+): .*?  # (.+)", line) for line in lines)
    comments = {match[1]: match[2] for match in found if match}
    return {one.name: comments.get(one.name, "") for one in fields(TrainConfig)}
