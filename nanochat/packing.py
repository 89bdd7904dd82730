"""What shares a row: the best-fit buffer, and conversations dealt out through it.

The one idea to know: a row opens with the piece that has waited longest, then takes the largest
that fits, again and again. So nothing waits for ever, and little of a row is left over. Pure
Python without tensors: `dataloader` turns rows into batches, and packs documents likewise.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right, insort
from itertools import groupby
from typing import Any, Callable, Iterator

from nanochat.common import UserError


class BestFitBuffer:
    """Pieces of text that wait for a row, found by age or by length.

    If every row opens with the oldest, a piece that finds n others waiting is in one of the next
    n + 1 rows. Without that rule, pieces that are hard to place slowly fill the buffer.
    """

    def __init__(self) -> None:
        self.pieces: dict[int, tuple[int, Any]] = {}  # arrival number -> (length, piece), oldest first
        self.lengths: list[tuple[int, int]] = []  # sorted (length, -arrival number)
        self.arrivals = 0

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[Any]:
        """The pieces from oldest to newest."""
        return (piece for _, piece in self.pieces.values())

    def add(self, length: int, piece: Any) -> None:
        self.pieces[self.arrivals] = (length, piece)
        insort(self.lengths, (length, -self.arrivals))
        self.arrivals += 1

    def oldest(self) -> Any:
        return next(iter(self))

    def pop_oldest(self) -> Any:
        arrival = next(iter(self.pieces))
        length, piece = self.pieces.pop(arrival)
        del self.lengths[bisect_left(self.lengths, (length, -arrival))]
        return piece

    def pop_largest(self, limit: int) -> Any | None:
        """The longest piece of at most `limit`, of equals the oldest; None where none fits."""
        after = bisect_right(self.lengths, (limit, 0))
        if not after:
            return None
        _, arrival = self.lengths.pop(after - 1)
        return self.pieces.pop(-arrival)[1]

    def pop_shortest(self) -> Any:
        return self.pop_largest(self.lengths[0][0])


def split_conversation(ids: list[int], mask: list[int], T: int, supervise: str) -> list[tuple[list[int], list[int]]]:
    """A conversation's (inputs, targets) in consecutive pieces of at most T pairs; target -1 is not trained on.

    ids [7, 8, 9], mask [0, 1, 0], T = 1, supervise "assistant" -> [([7], [8]), ([8], [-1])]
    """
    assert supervise in ("assistant", "all"), supervise
    targets = ids[1:] if supervise == "all" else [i if m else -1 for i, m in zip(ids[1:], mask[1:])]
    return [(ids[i : min(i + T, len(targets))], targets[i : i + T]) for i in range(0, len(targets), T)]


class Conversations:
    """The pieces of one rank's conversations, epoch after epoch, each epoch in an order of its own.

    Packing never mixes two epochs in the buffer, so each piece is packed exactly once per epoch.
    """

    def __init__(self, dataset, render: Callable, rank: int, world_size: int, seed: int, buffer_size: int, state: dict):
        """`render(conversation)` gives its pieces."""
        self.dataset, self.render = dataset, render
        self.rank, self.world_size, self.seed, self.buffer_size = rank, world_size, seed, buffer_size
        self.buffer = BestFitBuffer()
        self.skipped = state["skipped"]  # pieces without any supervised target, so far
        self._begin_epoch(state["epoch"])
        self.read = state["read"]  # conversations of this epoch read so far
        if (state["rank"], state["world_size"]) != (rank, world_size):
            self.read = int((state["progress"] - state["epoch"] + 1) * len(self.order))  # about as far
            state = {**state, "buffer": []}
        self.found = self.read > 0
        for index, there in groupby(state["buffer"], key=lambda place: place[0]):
            pieces = render(dataset[index])
            for _, number in there:
                self._add(index, number, pieces[number])

    def _begin_epoch(self, epoch: int) -> None:
        self.order = list(range(self.rank, len(self.dataset), self.world_size))  # the same ones in every epoch
        random.Random(f"{self.seed}, epoch {epoch}").shuffle(self.order)
        self.epoch, self.read, self.found = epoch, 0, False

    def _add(self, index: int, number: int, piece: tuple[list[int], list[int]]) -> None:
        self.buffer.add(len(piece[0]), (index, number, *piece))

    def refill(self) -> None:
        """Read on in this epoch until the buffer is full."""
        while len(self.buffer) < self.buffer_size and self.read < len(self.order):
            index = self.order[self.read]
            self.read += 1
            for number, piece in enumerate(self.render(self.dataset[index])):
                if all(target == -1 for target in piece[1]):
                    self.skipped += 1
                else:
                    self.found = True
                    self._add(index, number, piece)

    def next_row(self, T: int) -> list[tuple[list[int], list[int]]]:
        """The (inputs, targets) that share the next row of T pairs; never none."""
        self.refill()
        while not self.buffer:
            if not self.found:
                raise UserError(
                    f"nothing to train on: none of the {len(self.order)} conversations for rank {self.rank} "
                    f"of {self.world_size} has a token that is supervised. Check the data set."
                )
            self._begin_epoch(self.epoch + 1)
            self.refill()
        row, piece = [], self.buffer.pop_oldest()
        while piece:
            row.append(piece[2:])
            T -= len(piece[2])
            self.refill()
            piece = self.buffer.pop_largest(T)
        return row

    def state(self) -> dict:
        waiting = [[index, number] for index, number, *_ in self.buffer]
        finished = self.read - len({index for index, _ in waiting})
        return {
            "epoch": self.epoch,
            "progress": self.epoch - 1 + finished / len(self.order),
            "read": self.read,
            "buffer": waiting,
            "skipped": self.skipped,
            "num_conversations": len(self.dataset),
            "rank": self.rank,
            "world_size": self.world_size,
        }
