"""Drop a run of layers from the middle."""


def middle_dropped(depth: int, keep: int) -> tuple[int, ...]:
    """The first ceil(keep / 2) and the last floor(keep / 2) layers.

    Source: Weight Subcloning (2312.09299): blocks near the middle change the residual stream least. The paper names
    no exact split; GPT-2 large to medium keeps 0 to 11 and 24 to 35 of 36.
    """
    head = (keep + 1) // 2
    return (*range(head), *range(depth - (keep - head), depth))
