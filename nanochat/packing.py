"""What shares a row: walks over documents and conversations, and the packers that fill rows with them.

A packed row starts with the item that has waited longest. The rest of it is filled from a buffer: by an item that
fits exactly, else by two that do together, else by the largest that fits. So no item waits forever and little of a
row is wasted. Every packer has `next_row()`, which returns (inputs, targets) of T tokens each, and `state()`, a JSON
value that resumes the packer just after that row. This file knows nothing of tensors, devices and ranks.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right, insort
from collections import deque
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import numpy as np

from nanochat.common import UserError
from nanochat.dataset import read_row_groups

LONG = 8192  # tokens; if documents are longer on average, fewer of them wait in the buffer ...
FEW = 32  # ... but at least this many, so that one enormous document does not fill whole batches


class BestFitBuffer:
    """Items waiting for rows of `row` tokens, retrieved by age or by length.

    If every row starts with the oldest item, an item that is added behind n others is packed within the next
    n + 1 rows. Otherwise items that are hard to place would slowly fill the buffer.
    """

    def __init__(self, row: int) -> None:
        self.row = row
        self.items: dict[int, tuple[int, Any]] = {}  # arrival number -> (length, item), oldest first
        self.arrivals: dict[int, deque[int]] = {}  # length (row + 1 for all longer ones) -> arrival numbers, oldest first
        self.lengths: list[int] = []  # the keys of `arrivals`, sorted
        self.total = 0  # sum of all lengths
        self.arrived = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        """The items from oldest to newest."""
        return map(itemgetter(1), self.items.values())

    def add(self, length: int, item: Any) -> None:
        self.items[self.arrived] = (length, item)
        self.total += length
        length = min(length, self.row + 1)
        if length not in self.arrivals:
            self.arrivals[length] = deque()
            insort(self.lengths, length)
        self.arrivals[length].append(self.arrived)
        self.arrived += 1

    def _pop(self, length: int) -> Any:
        """Remove and return the oldest item of this length."""
        same = self.arrivals[length]
        full_length, item = self.items.pop(same.popleft())
        self.total -= full_length
        if not same:
            del self.arrivals[length]
            self.lengths.remove(length)
        return item

    def pop_oldest(self) -> Any:
        length, _ = next(iter(self.items.values()))
        return self._pop(min(length, self.row + 1))

    def pop_shortest(self) -> Any:
        return self._pop(self.lengths[0])

    def pop_best(self, room: int) -> Any | None:
        """Remove and return the item that fills `room` best; None if none fits.

        An item that fills it exactly comes first, then the longer of two items that fill it together (of all pairs the
        one with the most equal lengths), then the longest item that fits.
        """
        fitting = self.lengths[: bisect_right(self.lengths, room)]
        if not fitting:
            return None
        best = fitting[-1]
        if best < room:
            for longer in fitting[bisect_left(fitting, room / 2) :]:
                same_length = 2 * longer == room
                if room - longer in self.arrivals and not (same_length and len(self.arrivals[longer]) == 1):
                    best = longer
                    break
        return self._pop(best)


# -----------------------------------------------------------------------------
# Documents


class Position(NamedTuple):
    """Where a document is in the endless sequence of epochs."""

    epoch: int  # counts from 1
    shard: int
    group: int  # row group of the shard
    row: int  # row of the row group


class Documents:
    """An endless walk over the documents of some shards, tokenized a chunk at a time.

    A new walk from `position` continues exactly like this one.
    """

    def __init__(self, paths: list[Path], encode: Callable, chunk_size: int, position: Position):
        """`encode(texts)` returns the ids of each text in an array, without bos."""
        self.paths, self.encode, self.chunk_size = paths, encode, chunk_size
        self._texts = self._walk(position)
        self._ahead = next(self._texts)

    @property
    def position(self) -> Position:
        """Where the next chunk starts."""
        return self._ahead[0]

    def read(self) -> list[tuple[Position, np.ndarray]]:
        """The next `chunk_size` documents as (position, ids), fewer at the end of an epoch."""
        chunk, epoch = [], self.position.epoch
        while len(chunk) < self.chunk_size and self.position.epoch == epoch:
            chunk.append(self._ahead)
            self._ahead = next(self._texts)
        positions, texts = zip(*chunk)
        return list(zip(positions, self.encode(texts)))

    def _walk(self, start: Position) -> Iterator[tuple[Position, str]]:
        epoch, first_shard, first_group, first_row = start
        while True:
            found = False
            for number in range(first_shard, len(self.paths)):
                for group, texts in read_row_groups(self.paths[number], first_group):
                    for row in range(first_row, len(texts)):
                        if texts[row]:
                            found = True
                            yield Position(epoch, number, group, row), texts[row]
                    first_row = 0
                first_group = 0
            if not found:
                raise UserError(f"no document with text in {len(self.paths)} shard(s) of {self.paths[0].parent}")
            epoch, first_shard = epoch + 1, 0

    def read_again(self, waiting: list[list[int]]) -> Iterator[tuple[Position, int, np.ndarray]]:
        """(position, start, ids) of the documents in a state's buffer, in which each is [*position, start]."""
        texts = {}  # (shard, group, row) -> text
        rows = {tuple(entry[1:4]) for entry in waiting}
        for shard, group in sorted({row[:2] for row in rows}):
            _, found = next(read_row_groups(self.paths[shard], group), (group, []))
            texts |= {(shard, group, row): text for row, text in enumerate(found) if (shard, group, row) in rows}
        ids = dict(zip(texts, self.encode(list(texts.values()))))
        for *position, start in waiting:
            row = tuple(position[1:])
            if row not in ids or start > len(ids[row]):
                path = self.paths[row[0]]
                raise UserError(f"{path} has changed since this run read it. Restore it, or start this stage again.")
            yield Position(*position), start, ids[row]


class DocumentPacker:
    """Rows of T + 1 tokens that start with bos, packed by best fit, without padding and without losing a token.

    If no document fits into the rest of a row, the shortest is cut. What is left of a document that was cut or is
    longer than a row goes to the end of the queue, and starts with bos again when its turn comes.
    Other rules are compared in dev/LOG.md, 10.
    """

    def __init__(self, documents: Documents, T: int, bos: int, waiting: list[list[int]], buffer_size: int):
        self.documents, self.T, self.bos, self.buffer_size = documents, T, bos, buffer_size
        self.buffer = BestFitBuffer(T + 1)  # items: ([*position, number of ids that are used up], ids)
        for item in documents.read_again(waiting):
            self._add(*item)

    def _add(self, position: Position, start: int, ids: np.ndarray) -> None:
        self.buffer.add(1 + len(ids) - start, ([*position, start], ids))

    def _refill(self) -> None:
        """Read one chunk if there is room: a buffer that grows over its first rows starts without delay.

        Of a corpus smaller than the buffer, hold only this epoch and the next.
        """
        limit = self.buffer_size
        if self.buffer.total >= self.buffer_size * LONG:
            limit = min(limit, FEW)
        if len(self.buffer) >= limit:
            return
        epochs = [epoch for (epoch, *_), _ in self.buffer]
        if not epochs or self.documents.position.epoch <= 1 + min(epochs):
            for position, ids in self.documents.read():
                self._add(position, 0, ids)

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.full(self.T + 1, self.bos, np.int32)  # bos is in place before each document is copied behind it
        used = 0
        while used < self.T:  # if a single place is left, it keeps its bos
            self._refill()
            room = self.T + 1 - used
            if used:
                item = self.buffer.pop_best(room) or self.buffer.pop_shortest()
            else:
                item = self.buffer.pop_oldest()
            (*position, start), ids = item
            end = min(len(ids), start + room - 1)
            tokens[used + 1 : used + 1 + end - start] = ids[start:end]
            used += 1 + end - start
            if end < len(ids):
                self._add(position, end, ids)
        return tokens[:-1], tokens[1:]

    def state(self) -> dict:
        position = self.documents.position
        return {"epoch": position.epoch, "next": list(position), "buffer": [place for place, _ in self.buffer]}


class StreamPacker:
    """Rows from one plain stream of documents with bos before each, cut wherever a row ends; no token is lost."""

    def __init__(self, documents: Documents, T: int, bos: int, waiting: list[list[int]]):
        self.documents, self.T, self.bos = documents, T, bos
        self.queue = deque()  # (position, number of tokens that are used up, tokens with bos)
        for item in documents.read_again(waiting):
            self._add(*item)

    def _add(self, position: Position, start: int, ids: np.ndarray) -> None:
        self.queue.append((position, start, np.concatenate([[self.bos], ids], dtype=np.int32)))

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        row, used = np.empty(self.T + 1, np.int32), 0
        while used < self.T + 1:
            if not self.queue:
                for position, ids in self.documents.read():
                    self._add(position, 0, ids)
            position, start, tokens = self.queue.popleft()
            end = min(len(tokens), start + self.T + 1 - used)
            row[used : used + end - start] = tokens[start:end]
            used += end - start
        self.queue.appendleft((position, end - 1, tokens))  # the last target is the first input of the next row
        return row[:-1], row[1:]

    def state(self) -> dict:
        waiting = [[*at, start] for at, start, _ in self.queue]
        return {"epoch": waiting[0][0], "next": list(self.documents.position), "buffer": waiting}


# -----------------------------------------------------------------------------
# Conversations


def split_conversation(ids: list[int], mask: list[int], T: int, supervise: str) -> list[tuple[list[int], list[int]]]:
    """A conversation's (inputs, targets) in consecutive chunks of at most T pairs; target -1 is not trained on.

    ids [7, 8, 9], mask [0, 1, 0], T = 1, supervise "assistant" -> [([7], [8]), ([8], [-1])]
    """
    assert supervise in ("assistant", "all"), supervise
    targets = ids[1:] if supervise == "all" else [i if m else -1 for i, m in zip(ids[1:], mask[1:])]
    return [(ids[i : min(i + T, len(targets))], targets[i : i + T]) for i in range(0, len(targets), T)]


class ConversationPacker:
    """Rows of conversations, in which every chunk with a supervised token appears exactly once per epoch.

    Each epoch has an order of its own, and starts once all chunks of the epoch before are packed. The rest of a row
    into which no waiting chunk fits is padding: inputs bos, targets -1.
    """

    def __init__(self, dataset, render: Callable, T: int, bos: int, buffer_size: int, seed: int, state: dict | None = None):
        """`render(conversation)` returns its chunks of at most T pairs, as `split_conversation` does."""
        self.dataset, self.render, self.T, self.bos = dataset, render, T, bos
        self.buffer_size, self.seed = buffer_size, seed
        self.buffer = BestFitBuffer(T)  # items: ([epoch, index, number of the chunk], (inputs, targets))
        state = state or {"next": [1, 0], "buffer": [], "skipped": 0}
        self.skipped = state["skipped"]  # chunks without a supervised target
        self._begin_epoch(*state["next"])
        for index, places in groupby(state["buffer"], key=itemgetter(1)):
            chunks = render(dataset[index])
            for *_, number in places:
                if number >= len(chunks):
                    raise UserError(f"the data set has changed: conversation {index} is shorter than when this run read it. "
                                    "Restore the old data, or start this stage again.")
                self._add(index, number, chunks[number])

    def _begin_epoch(self, epoch: int, position: int = 0) -> None:
        self.epoch, self.position = epoch, position
        self.found = position > 0  # whether this epoch has a supervised token; its remainder may have none
        self.order = list(range(len(self.dataset)))
        random.Random(f"{self.seed}, epoch {epoch}").shuffle(self.order)

    def _add(self, index: int, number: int, chunk: tuple[list[int], list[int]]) -> None:
        self.buffer.add(len(chunk[0]), ([self.epoch, index, number], chunk))

    def _refill(self) -> None:
        """Read conversations of this epoch until the buffer is full."""
        while len(self.buffer) < self.buffer_size and self.position < len(self.order):
            index = self.order[self.position]
            self.position += 1
            for number, chunk in enumerate(self.render(self.dataset[index])):
                if all(target == -1 for target in chunk[1]):
                    self.skipped += 1
                else:
                    self.found = True
                    self._add(index, number, chunk)

    def next_row(self) -> tuple[np.ndarray, np.ndarray]:
        self._refill()
        while not self.buffer:
            if not self.found:
                raise UserError(f"nothing to train on: none of the {len(self.dataset)} conversations has a supervised token")
            self._begin_epoch(self.epoch + 1)
            self._refill()
        inputs, targets = np.full(self.T, self.bos, np.int32), np.full(self.T, -1, np.int64)
        used, item = 0, self.buffer.pop_oldest()
        while item:
            _, chunk = item
            end = used + len(chunk[0])
            inputs[used:end], targets[used:end] = chunk
            used = end
            self._refill()
            item = self.buffer.pop_best(self.T - used)
        return inputs, targets

    def state(self) -> dict:
        waiting = [place for place, _ in self.buffer]
        read = (self.epoch - 1) * len(self.order) + self.position  # conversations, over all epochs
        finished = read - len({index for _, index, _ in waiting})
        return {
            "epoch": self.epoch,
            "next": [self.epoch, self.position],
            "buffer": waiting,
            "finished": finished,
            "skipped": self.skipped,
        }
