"""What shares a row: walks over documents and conversations, and the packers that fill rows with them.

A packed row starts with the item that has waited longest, so that none waits forever. Its rest is filled from a buffer:
by an item that fits exactly, else by two that do together, else by the largest that fits. Every packer has `next_row()`,
which returns (inputs, targets) of T tokens each, and `state()`, a JSON value that resumes it just after that row.
This file knows nothing of tensors, devices and ranks.
"""

import random
from bisect import bisect_left, bisect_right, insort
from collections import deque
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np

from nanochat.common import UserError
from nanochat.dataset import read_row_groups

LONG = 8192  # tokens; if documents are longer on average, fewer of them wait in the buffer ...
FEW = 32  # ... but at least this many, so that one enormous document does not fill whole batches

Row = tuple[np.ndarray, np.ndarray]  # (inputs, targets) of T tokens each
Chunk = tuple[list[int], list[int]]  # (inputs, targets) of a part of a conversation; target -1 is not trained on


class BestFitBuffer:
    """Items waiting for rows, retrieved by age or by length."""

    def __init__(self):
        self.items = {}  # arrival number -> (length, item), oldest first
        self.arrivals = {}  # length -> deque of arrival numbers, oldest first
        self.lengths = []  # the keys of `arrivals`, sorted
        self.arrived = 0

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator:
        """The items from oldest to newest."""
        return (item for _, item in self.items.values())

    def add(self, length: int, item) -> None:
        self.items[self.arrived] = (length, item)
        if length not in self.arrivals:
            self.arrivals[length] = deque()
            insort(self.lengths, length)
        self.arrivals[length].append(self.arrived)
        self.arrived += 1

    def _pop(self, length: int):
        """Remove and return the oldest item of this length."""
        same = self.arrivals[length]
        _, item = self.items.pop(same.popleft())
        if not same:
            del self.arrivals[length]
            self.lengths.remove(length)
        return item

    def pop_oldest(self):
        length, _ = next(iter(self.items.values()))
        return self._pop(length)

    def pop_shortest(self):
        return self._pop(self.lengths[0])

    def pop_best(self, room: int):
        """Remove and return the item that fills `room` best; None if none fits.

        An item that fills it exactly comes first, then the longer of two items that fill it together (of all pairs the
        one with the most equal lengths), then the longest item that fits.
        """
        fitting = self.lengths[: bisect_right(self.lengths, room)]
        if not fitting:
            return None
        if fitting[-1] < room:
            for longer in fitting[bisect_left(fitting, room / 2) :]:
                needed = 2 if 2 * longer == room else 1
                if len(self.arrivals.get(room - longer, ())) >= needed:
                    return self._pop(longer)
        return self._pop(fitting[-1])


# -----------------------------------------------------------------------------
# Documents


class Position(NamedTuple):
    """Where a document is in the endless sequence of epochs."""

    epoch: int  # counts from 1
    shard: int
    group: int  # row group of the shard
    row: int  # row of the row group


class Documents:
    """An endless walk over the documents of some shards, tokenized a chunk at a time."""

    def __init__(self, paths: list[Path], encode: Callable, chunk_size: int, state: dict | None = None):
        """`encode(texts)` returns the ids of each text in an array, without bos; `state` is a packer's, to resume it."""
        self.paths, self.encode, self.chunk_size = paths, encode, chunk_size
        state = state or {"next": [1, 0, 0, 0], "buffer": []}
        self._waiting = state["buffer"]
        self._texts = self._walk(*state["next"])
        self._ahead = next(self._texts)

    @property
    def position(self) -> Position:
        """Where the next chunk starts."""
        return self._ahead[0]

    def read(self) -> Iterator[tuple]:
        """The next `chunk_size` documents as (position, 0, ids), fewer at the end of an epoch."""
        chunk, epoch = [], self.position.epoch
        while len(chunk) < self.chunk_size and self.position.epoch == epoch:
            chunk.append(self._ahead)
            self._ahead = next(self._texts)
        positions, texts = zip(*chunk)
        return zip(positions, repeat(0), self.encode(texts))

    def _walk(self, epoch: int, first_shard: int, first_group: int, first_row: int):
        """Yield (position, text) endlessly."""
        while True:
            found = False
            for shard in range(first_shard, len(self.paths)):
                for group, texts in read_row_groups(self.paths[shard], first_group):
                    for row in range(first_row, len(texts)):
                        if texts[row]:
                            found = True
                            yield Position(epoch, shard, group, row), texts[row]
                    first_row = 0
                first_group = 0
            if not found:
                raise UserError(f"no document with text in {len(self.paths)} shard(s) of {self.paths[0].parent}")
            epoch, first_shard = epoch + 1, 0

    def read_waiting(self) -> Iterator[tuple]:
        """The documents of the state's buffer, in which each is [*position, start], as (position, start, ids)."""

        @cache
        def texts_of(shard, group):
            _, texts = next(read_row_groups(self.paths[shard], group), (group, []))
            return texts

        texts = ["".join(texts_of(shard, group)[row : row + 1]) for _, shard, group, row, _ in self._waiting]
        for (*position, start), ids in zip(self._waiting, self.encode(texts)):
            if not 0 <= start <= len(ids) > 0:
                path = self.paths[position[1]]
                raise UserError(f"{path} has changed since this run read it. Restore it, or start this stage again.")
            yield Position(*position), start, ids


class DocumentPacker:
    """Rows of T + 1 tokens that start with bos, packed by best fit, without padding and without losing a token.

    If no document fits into the rest of a row, the shortest is cut. What is left of a document that was cut or is
    longer than a row waits again, as the newest, and starts with bos, too. Other rules are compared in dev/LOG.md, 10.
    """

    def __init__(self, documents: Documents, T: int, bos: int, buffer_size: int):
        self.documents, self.T, self.bos, self.buffer_size = documents, T, bos, buffer_size
        self.buffer = BestFitBuffer()  # items: (position, number of ids that are used up, ids)
        self._add(documents.read_waiting())

    def _add(self, documents: Iterable[tuple]) -> None:
        for position, start, ids in documents:
            length = min(1 + len(ids) - start, self.T + 2)  # all that are longer than a row are equal
            self.buffer.add(length, (position, start, ids))

    def _refill(self) -> None:
        """Read one chunk if there is room: a buffer that grows over its first rows starts without delay."""
        if len(self.buffer) >= self.buffer_size:
            return
        if len(self.buffer) >= FEW:
            tokens = sum(1 + len(ids) - start for _, start, ids in self.buffer)
            if tokens >= self.buffer_size * LONG:
                return
        # Of a corpus smaller than the buffer, hold only this epoch and the next.
        next_epoch = self.documents.position.epoch
        if next_epoch <= 1 + min((position.epoch for position, _, _ in self.buffer), default=next_epoch):
            self._add(self.documents.read())

    def next_row(self) -> Row:
        tokens = np.full(self.T + 1, self.bos, np.int32)  # bos is in place before each document is copied behind it
        used = 0
        while used < self.T:  # if a single place is left, it keeps its bos
            self._refill()
            room = self.T + 1 - used
            if used:
                position, start, ids = self.buffer.pop_best(room) or self.buffer.pop_shortest()
            else:
                position, start, ids = self.buffer.pop_oldest()
            end = min(len(ids), start + room - 1)
            tokens[used + 1 : used + 1 + end - start] = ids[start:end]
            used += 1 + end - start
            if end < len(ids):
                self._add([(position, end, ids)])
        return tokens[:-1], tokens[1:]

    def state(self) -> dict:
        position = self.documents.position
        waiting = [[*position, start] for position, start, _ in self.buffer]
        return {"epoch": position.epoch, "next": list(position), "buffer": waiting}


class StreamPacker:
    """Rows from one plain stream of documents with bos before each, cut wherever a row ends; no token is lost."""

    def __init__(self, documents: Documents, T: int, bos: int):
        self.documents, self.T, self.bos = documents, T, bos
        self.queue = deque(documents.read_waiting())  # (position, number of tokens with bos that are used up, ids)

    def next_row(self) -> Row:
        row, used = np.full(self.T + 1, self.bos, np.int32), 0  # bos is in place before each document
        while used < self.T + 1:
            if not self.queue:
                self.queue.extend(self.documents.read())
            position, start, ids = self.queue.popleft()
            end = min(1 + len(ids), start + self.T + 1 - used)
            first = max(start, 1)
            row[used + first - start : used + end - start] = ids[first - 1 : end - 1]
            used += end - start
        self.queue.appendleft((position, end - 1, ids))  # the last target is the first input of the next row
        return row[:-1], row[1:]

    def state(self) -> dict:
        waiting = [[*position, start] for position, start, _ in self.queue]
        return {"epoch": waiting[0][0], "next": list(self.documents.position), "buffer": waiting}


# -----------------------------------------------------------------------------
# Conversations


def split_conversation(ids: list[int], mask: list[int], T: int, supervise: str) -> list[Chunk]:
    """A conversation in consecutive chunks of at most T pairs.

    ids [7, 8, 9], mask [0, 1, 0], T = 1, supervise "assistant" -> [([7], [8]), ([8], [-1])]
    """
    assert supervise in ("assistant", "all"), supervise
    inputs, targets = ids[:-1], ids[1:]
    if supervise == "assistant":
        targets = [target if supervised else -1 for target, supervised in zip(targets, mask[1:])]
    return [(inputs[i : i + T], targets[i : i + T]) for i in range(0, len(targets), T)]


class ConversationPacker:
    """Rows of conversations, in which every chunk with a supervised token appears exactly once per epoch.

    Each epoch has an order of its own, and starts once all chunks of the epoch before are packed. The rest of a row
    into which no waiting chunk fits is padding: inputs bos, targets -1.
    """

    def __init__(self, dataset, render: Callable, T: int, bos: int, buffer_size: int, seed: int, state: dict | None = None):
        """`render(conversation)` returns its chunks of at most T pairs, as `split_conversation` does."""
        self.dataset, self.render, self.T, self.bos = dataset, render, T, bos
        self.buffer_size, self.seed = buffer_size, seed
        self.buffer = BestFitBuffer()  # items: ([epoch, index, number of the chunk], (inputs, targets))
        state = state or {"next": [1, 0], "buffer": []}
        self._begin_epoch(*state["next"])
        chunks = cache(lambda index: render(dataset[index]))
        for _, index, number in state["buffer"]:
            if number >= len(chunks(index)):
                raise UserError(f"the data set has changed: conversation {index} is shorter than when this run read it. "
                                "Restore the old data, or start this stage again.")
            self._add(index, number, chunks(index)[number])

    def _begin_epoch(self, epoch: int, position: int = 0) -> None:
        self.epoch, self.position = epoch, position
        self.order = list(range(len(self.dataset)))
        random.Random(f"{self.seed}, epoch {epoch}").shuffle(self.order)

    def _add(self, index: int, number: int, chunk: Chunk) -> None:
        self.buffer.add(len(chunk[0]), ([self.epoch, index, number], chunk))

    def _refill(self) -> None:
        """Read conversations of this epoch until the buffer is full."""
        while len(self.buffer) < self.buffer_size and self.position < len(self.order):
            index = self.order[self.position]
            self.position += 1
            for number, chunk in enumerate(self.render(self.dataset[index])):
                if any(target != -1 for target in chunk[1]):
                    self._add(index, number, chunk)

    def next_row(self) -> Row:
        self._refill()
        if not self.buffer:  # the epoch is over
            self._begin_epoch(self.epoch + 1)
            self._refill()
            if not self.buffer:
                raise UserError(f"nothing to train on: none of the {len(self.dataset)} conversations has a supervised token")
        inputs = np.full(self.T, self.bos, np.int32)
        targets = np.full(self.T, -1, np.int64)
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
        return {"epoch": self.epoch, "next": [self.epoch, self.position], "buffer": waiting, "finished": finished}
