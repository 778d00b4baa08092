"""Keep evenly spaced layers."""


def evenly_spaced(depth: int, keep: int) -> tuple[int, ...]:
    """Layers at equal distances, the first and the last among them, halves rounded up; of one, the first.

    Source: DistilBERT (1910.01108), section 3, takes every second layer; spread over both ends for other ratios.
    """
    steps = max(keep - 1, 1)
    return tuple((2 * i * (depth - 1) + steps) // (2 * steps) for i in range(keep))
