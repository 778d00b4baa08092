"""Keep the first layers."""


def first(depth: int, keep: int) -> tuple[int, ...]:
    """Layers 0 to keep - 1. Source: Weight Selection (2311.18823), layer selection."""
    return tuple(range(min(depth, keep)))
