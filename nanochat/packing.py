"""What shares a row: the best-fit buffer, and conversations dealt out through it.

The one idea to know: a row opens with the piece that has waited longest, then takes pieces that
fill the rest of it exactly, or the largest that fits, again and again. So nothing waits for ever,
and little of a row is left over. Pure Python without tensors: `dataloader` turns rows into batches,
and packs documents likewise.
"""

from __future__ import annotations

from collections import deque
from itertools import groupby
from operator import itemgetter
from typing import Any, Callable, Iterator

from nanochat.common import UserError


class BestFitBuffer:
    """Pieces of text that wait for a row of `row` places, found by age or by length.

    If every row opens with the oldest, a piece that finds n others waiting is in one of the next
    n + 1 rows. Without that rule, pieces that are hard to place slowly fill the buffer.
    """

    def __init__(self, row: int) -> None:
        self.row = row
        self.pieces: dict[int, tuple[int, Any]] = {}  # arrival number -> (length, piece), oldest first
        self.arrivals: dict[int, deque[int]] = {}  # length, row + 1 for all that are longer -> who has it, oldest first
        self.there = self.mirror = 0  # sets of lengths: bit n of the one, bit row - n of the other
        self.total = 0  # of all lengths
        self.arrived = 0

    def __len__(self) -> int:
        return len(self.pieces)

    def __iter__(self) -> Iterator[Any]:
        """The pieces from oldest to newest."""
        return map(itemgetter(1), self.pieces.values())

    def add(self, length: int, piece: Any) -> None:
        self.pieces[self.arrived] = (length, piece)
        self.total += length
        length = min(length, self.row + 1)
        if length not in self.arrivals:
            self.arrivals[length] = deque()
            self._mark(length)
        self.arrivals[length].append(self.arrived)
        self.arrived += 1

    def _mark(self, length: int) -> None:
        self.there ^= 1 << length
        self.mirror ^= 1 << self.row >> length

    def _pop(self, length: int) -> Any:
        """The oldest piece of this length."""
        same = self.arrivals[length]
        length, piece = self.pieces.pop(same.popleft())
        self.total -= length
        if not same:
            length = min(length, self.row + 1)
            del self.arrivals[length]
            self._mark(length)
        return piece

    def pop_oldest(self) -> Any:
        length, _ = next(iter(self.pieces.values()))
        return self._pop(min(length, self.row + 1))

    def pop_shortest(self) -> Any:
        return self._pop((self.there & -self.there).bit_length() - 1)

    def pop_largest(self, room: int) -> Any | None:
        """The longest piece of at most `room`, of equals the oldest; None where none fits."""
        fitting = self.there & (2 << room) - 1
        return self._pop(fitting.bit_length() - 1) if fitting else None

    def pop_best(self, room: int) -> Any | None:
        """The piece that fills `room` exactly; or the longer of two that do together, as equal as can be; or the
        longest that fits; or None."""
        if room in self.arrivals:
            return self._pop(room)
        longer = self._longer_of_two(room)
        return self._pop(longer) if longer else self.pop_largest(room)

    def _longer_of_two(self, room: int) -> int:
        """Of two lengths, as equal as can be, that fill `room` together, the longer; 0 where there are no two."""
        half = -(-room // 2)
        found = (self.there & self.mirror >> self.row - room) >> half  # bit n: lengths half + n and room - half - n
        if 2 * half == room and found & 1 and len(self.arrivals[half]) == 1:
            found ^= 1
        return half + (found & -found).bit_length() - 1 if found else 0


def split_conversation(ids: list[int], mask: list[int], T: int, supervise: str) -> list[tuple[list[int], list[int]]]:
    """A conversation's (inputs, targets) in consecutive pieces of at most T pairs; target -1 is not trained on.

    ids [7, 8, 9], mask [0, 1, 0], T = 1, supervise "assistant" -> [([7], [8]), ([8], [-1])]
    """
    assert supervise in ("assistant", "all"), supervise
    targets = ids[1:] if supervise == "all" else [i if m else -1 for i, m in zip(ids[1:], mask[1:])]
    return [(ids[i : min(i + T, len(targets))], targets[i : i + T]) for i in range(0, len(targets), T)]


class Conversations:
    """The pieces of one lane's conversations, epoch after epoch, each epoch in an order of its own.

    A conversation belongs to lane (epoch + index) % lanes. An epoch is read once the pieces of the one before
    are packed, so each piece is packed exactly once per epoch.
    """

    def __init__(
        self, dataset, render: Callable, order: Callable, lane: int, lanes: int, was_read: Callable, buffer_size: int,
        T: int, state: dict,
    ):
        """`render(conversation)` gives its pieces of at most T pairs, `order(epoch)` all indices, for all lanes.

        `was_read([epoch, position in the order], epoch + index)`: whether to leave a conversation out.
        """
        self.dataset, self.render, self.order, self.was_read = dataset, render, order, was_read
        self.lane, self.lanes, self.buffer_size, self.T = lane, lanes, buffer_size, T
        self.buffer = BestFitBuffer(T)
        self.skipped = state["skipped"]  # pieces without any supervised target, so far
        self.read = state["finished"]  # conversations read so far, in all epochs
        self.barren = 0  # epochs in a row without anything to train on
        self._begin_epoch(*state["next"])
        for (epoch, index), there in groupby(state["buffer"], key=lambda place: place[:2]):
            pieces = render(dataset[index])
            self.read += 1
            for *_, number in there:
                if number >= len(pieces):
                    raise UserError(f"the data set has changed: conversation {index} is shorter than when this run "
                                    "read it. Bring the old data back, or start this stage again.")
                self._add(epoch, index, number, pieces[number])

    def _begin_epoch(self, epoch: int, position: int = 0) -> None:
        self.epoch, self.position, self.indices = epoch, position, self.order(epoch)
        self.found = position > 0  # the rest of an epoch may have nothing to train on

    def _add(self, epoch: int, index: int, number: int, piece: tuple[list[int], list[int]]) -> None:
        self.buffer.add(len(piece[0]), ([epoch, index, number], piece))

    def refill(self) -> None:
        """Read on in this epoch until the buffer is full."""
        while len(self.buffer) < self.buffer_size and self.position < len(self.indices):
            place, index = [self.epoch, self.position], self.indices[self.position]
            self.position += 1
            if (self.epoch + index) % self.lanes != self.lane:
                continue
            if self.was_read(place, self.epoch + index):
                self.found = True
                continue
            self.read += 1
            for number, piece in enumerate(self.render(self.dataset[index])):
                if all(target == -1 for target in piece[1]):
                    self.skipped += 1
                else:
                    self.found = True
                    self._add(self.epoch, index, number, piece)

    def next_row(self) -> list[tuple[list[int], list[int]]]:
        """The (inputs, targets) that share the next row of T pairs; never none."""
        self.refill()
        while not self.buffer:
            self.barren = 0 if self.found else self.barren + 1
            if self.barren > self.lanes:
                raise UserError(
                    f"nothing to train on: none of the {len(self.dataset)} conversations has a token that is supervised. "
                    "Check the data set."
                )
            self._begin_epoch(self.epoch + 1)
            self.refill()
        row, room, popped = [], self.T, self.buffer.pop_oldest()
        while popped:
            _, piece = popped
            row.append(piece)
            room -= len(piece[0])
            self.refill()
            popped = self.buffer.pop_best(room)
        return row

    def state(self) -> dict:
        waiting = [place for place, _ in self.buffer]
        return {
            "next": [self.epoch, self.position],
            "buffer": waiting,
            "finished": self.read - len({(epoch, index) for epoch, index, _ in waiting}),
            "skipped": self.skipped,
        }
