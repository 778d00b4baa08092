"""What a config says layer by layer, rewritten for the layers that are kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from hf_ws.fields import BY_MODALITY


def follow_layers(
    values: dict[str, Any],
    kept: Sequence[int],
    layers: int,
    sizes: Collection[str] = (),
    *,
    decoder: bool = False,
) -> None:
    """Every per-layer entry of a config's dict rewritten for the kept layers, in place.

    `sizes` are the names of the fields that are sizes; a list of them may say one for each layer. Layers of a
    `decoder` that share the config with an encoder's leave alone what is the encoder's.
    """
    for name, value in values.items():
        if not isinstance(value, list | tuple) or (
            name == "mlp_only_layers" and "decoder_sparse_step" in values
        ):
            continue
        if decoder and name in ENCODERS:
            continue
        if name in FROM_ONE:
            values[name] = [j + 1 for j, i in enumerate(kept) if i + 1 in value]
        elif _counts_layers(name, value, layers):  # which layers are of a kind
            values[name] = [j for j, i in enumerate(kept) if i in value]
        elif (values.get("model_type"), name) in BY_MODALITY:
            continue
        elif len(value) == layers and (_tells_layers(name) or name in sizes):
            values[name] = [value[i] for i in kept]
    if values.get("out_indices") and len(values.get("stage_names", ())) == layers + 1:
        values["out_indices"] = _spread(values["out_indices"], layers, len(kept))
        values["out_features"] = values["stage_names"] = None
    if "per_layer_config" in values:
        exceptions = {int(i): own for i, own in values["per_layer_config"].items()}
        values["per_layer_config"] = {str(j): exceptions[i] for j, i in enumerate(kept) if i in exceptions}
    if (
        "attention_types" in values
    ):  # GPT-Neo writes its list run by run, and derives `attention_layers` from it
        values["attention_types"] = [[list(values["attention_layers"]), 1]]
    if (
        "mlp_only_layers" in values and "decoder_sparse_step" in values
    ):  # Qwen MoE: dense by index, or by a step
        dense, step = set(values["mlp_only_layers"] or ()), values["decoder_sparse_step"]
        dense |= {i for i in range(layers) if (i + 1) % step}
        values["mlp_only_layers"] = [j for j, i in enumerate(kept) if i in dense]
        values["decoder_sparse_step"] = 1
    steps = f"num_sparse_{'decoder' if decoder else 'encoder'}_layers"
    if isinstance(values.get(steps), int):
        _follow_steps(values, steps, kept, layers)
    for name in LEADING & values.keys():
        if isinstance(values[name], int):
            values[name] = sum(i < values[name] for i in kept)
    for name in TRAILING & values.keys():
        if isinstance(values[name], int):
            values[name] = sum(i >= layers - values[name] for i in kept)


def _follow_steps(values: dict[str, Any], name: str, kept: Sequence[int], layers: int) -> None:
    """How many layers are sparse where they come at equal steps (Switch), if that can say which kept ones are."""

    def sparse(depth: int, count: int) -> list[bool]:
        step = depth // count if count else depth
        return [i % step == 1 or step == 1 for i in range(depth)] if step else [False] * depth

    before = sparse(layers, values[name])
    wanted = [before[i] for i in kept]
    counts = (count for count in range(len(kept) + 1) if sparse(len(kept), count) == wanted)
    values[name] = next(counts, values[name])


def _spread(indices: Sequence[int], layers: int, kept: int) -> list[int]:
    """After which layers a backbone gives features: as far up as before, and each after another layer."""
    new: list[int] = []
    for at, index in enumerate(indices):
        last = kept - (len(indices) - 1 - at)  # leaves one for each that follows
        new.append(max(new[-1] + 1 if new else 0, min(last, round(index % (layers + 1) * kept / layers))))
    return new


LEADING = {"first_k_dense_replace", "max_window_layers", "num_hash_layers", "num_dense_layers"}
"""Fields that say how many layers, from the first on, are of a kind."""

TRAILING = {"num_kv_shared_layers", "num_timestamp_prediction_layers"}
"""Fields that say how many layers, from the last on, are of a kind."""


FROM_ONE = {"ple_layer_ids"}
"""Lists of layers' numbers that call the first layer 1 (Qwen4-Exp)."""

ENCODERS = {"attention_window", "block_sizes"}
"""Lists with one entry per layer that are about the encoder's layers alone (LED), or its stages (Funnel)."""

LEVELS = {"encode_proj_layers", "target_layer_ids"}
"""Fields that number levels of features, or layers of another model, whatever they are called."""


def _tells_layers(name: str) -> bool:
    return name not in LEVELS and any(
        part in name for part in ("layer", "pattern", "_types", "attention_window")
    )


def _counts_layers(name: str, value: Sequence[Any], layers: int) -> bool:
    """Whether this is a list of layers' numbers: `[3, 7, 11]`."""
    endings = (
        "layers",
        "_idxs",
        "layer_ids",
        "layer_indices",
        "layers_idx",
        "_indexes",
        "block_indices",
        "_attention_blocks",
    )
    if not name.endswith(endings) or name in LEVELS or not value:
        return False
    numbers = [v for v in value if isinstance(v, int) and not isinstance(v, bool)]
    if len(numbers) < len(value) or numbers != sorted({*numbers}):
        return False
    return numbers[0] >= 0 and numbers[-1] < layers
