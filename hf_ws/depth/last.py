"""Keep the last layers."""


def last(depth: int, keep: int) -> tuple[int, ...]:
    """Layers depth - keep to depth - 1: the baseline that `first` is to be held against."""
    return tuple(range(depth - min(depth, keep), depth))
