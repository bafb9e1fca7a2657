"""Which sequences share a row: bin packing with a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], budget: int, *, max_sequences: int | None = None) -> list[list[int]]:
    """Bins of at most ``budget`` tokens: the longest sequence first, each into the first bin with room for it.

    At most 11/9 of the fewest possible bins, plus 6/9 of one (Dósa, The tight bound of first fit decreasing
    bin-packing algorithm, 2007). n sequences take O(n log n) time. Packing the sequences of some of the bins again
    gives those bins again, so that bins may be grouped into batches::

        bins = first_fit_decreasing(lengths, 4096)
        loader = DataLoader(dataset, batch_sampler=bins, collate_fn=PackCollate(capacity=4096))

    Args:
        lengths: tokens of each sequence.
        budget: the most tokens of a bin.
        max_sequences: the most sequences of a bin; None for no limit.

    Returns:
        The indices into ``lengths`` in each bin, bins in the order in which they were opened. Sequences of equal length
        keep their order.

    Raises:
        ValueError: for a sequence longer than the budget, or a limit below 1.
    """
    if budget < 1 or (max_sequences is not None and max_sequences < 1):
        raise ValueError(
            "first_fit_decreasing: budget and max_sequences must be at least 1, "
            f"got budget={budget}, max_sequences={max_sequences}"
        )
    for index, length in enumerate(lengths):
        if not 0 <= length <= budget:
            raise ValueError(
                f"first_fit_decreasing: every sequence must fit into a bin, got {length} tokens in sequence {index}, "
                f"budget={budget}; truncate it, split it, or raise the budget"
            )
    room = _Room(len(lengths), budget)
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        chosen = room.first(lengths[index])
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        full = len(bins[chosen]) == max_sequences
        room.take(chosen, room.left(chosen) + 1 if full else lengths[index])
    return bins


class _Room:
    """The room left in each of ``count`` bins: a binary tree whose inner nodes hold the most of what is below."""

    def __init__(self, count: int, budget: int) -> None:
        self.leaves = 1 << max(count - 1, 0).bit_length()
        self.most = [budget] * (2 * self.leaves)

    def left(self, bin: int) -> int:
        return self.most[self.leaves + bin]

    def first(self, length: int) -> int:
        """The first bin with room for so many tokens. There is one: a bin for each sequence."""
        node = 1
        while node < self.leaves:
            node *= 2
            if self.most[node] < length:
                node += 1
        return node - self.leaves

    def take(self, bin: int, length: int) -> None:
        node = self.leaves + bin
        self.most[node] -= length
        while node > 1:
            node //= 2
            self.most[node] = max(self.most[2 * node], self.most[2 * node + 1])
