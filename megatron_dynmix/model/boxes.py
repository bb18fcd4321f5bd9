"""A range of a tensor's memory as boxes of the tensor, which is what a checkpoint can hold of it."""

from __future__ import annotations

from collections.abc import Iterator

Shape = tuple[int, ...]


def boxes(shape: Shape, strides: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """Yield (offset, shape) of boxes that together hold all elements with memory offsets in a range.

    Parts along one axis do not lie among one another: the tensor is contiguous, transposed, or a part of such
    a one. A row-major matrix has three boxes at most: the end of a row, whole rows, the beginning of a row.
    """
    extents = [(size - 1) * step for size, step in zip(shape, strides, strict=True)]
    extent = 1 + sum(extents)
    if start <= 0 and extent <= stop:
        yield (0,) * len(shape), shape
        return
    if stop <= 0 or extent <= start:
        return
    axis = max(range(len(shape)), key=extents.__getitem__)
    step, inner = strides[axis], extent - extents[axis]
    low, high = max(0, start // step), min(shape[axis] - 1, (stop - 1) // step)
    first, last = max(low, -(-start // step)), min(high, (stop - inner) // step)
    whole = [(first, last)] if first <= last else []
    partial = [index for index in range(low, high + 1) if not (first <= index <= last)]
    for begin, end in sorted([*whole, *((index, index) for index in partial)]):
        size = (*shape[:axis], end - begin + 1, *shape[axis + 1 :])
        far = begin * step
        for offset, box in boxes(size, strides, start - far, stop - far):
            yield (*offset[:axis], offset[axis] + begin, *offset[axis + 1 :]), box
