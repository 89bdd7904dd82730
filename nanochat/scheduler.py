"""Which tokens are computed next: continuous batching as plain Python, without a tensor.

The one idea: a row is a list of tokens, and a slot of the cache holds the keys and values of its
first `computed` tokens. A row whose last token alone is not computed is *running*: each round
feeds that token of every running row to the model in one batch and appends what comes out. Until
then its prompt is *read*, in chunks of a few tokens between the rounds, so that those who already
run are never held up for long. Rows join and leave between any two rounds.

A row that has ended leaves its tokens' keys and values in its slot until the slot is needed. A
newcomer that begins with the same tokens as any slot, ended or still running, starts from there:
that is how the next turn of a conversation reads only what is new, and how many samples of one
prompt read it once.

Nothing here samples, decodes or knows of a model (engine.py does).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field


@dataclass(eq=False)
class Row:
    """One sequence being written, and how it is to be written."""

    tokens: list[int]  # the prompt and all that was written after it
    limit: int  # the number of tokens at which it ends at the latest
    exhausted: str = "length"  # why it ends there: "length", or "context" where the model holds no more
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop: tuple[bytes, ...] = ()  # text that ends it
    dice: random.Random | None = None
    forced: deque[int] = field(default_factory=deque)  # tokens that a tool has put in line
    call: list[int] | None = None  # the tool call it is in the middle of
    tail: bytes = b""  # its newest text, as far as that may be the beginning of a stop
    masks: list[int] = field(default_factory=list)  # of what was written: 1 sampled, 0 forced by a tool
    log_probs: list[float] = field(default_factory=list)  # of what was sampled, under the row's settings; 0 where forced
    finish_reason: str | None = None  # "stop", "length", "context" or "cancelled" once it has ended
    prompt_length: int = 0
    computed: int = 0  # how many of its tokens' keys and values its slot holds
    reused: int = 0  # how many of these it found there

    def __post_init__(self):
        self.prompt_length = len(self.tokens)

    @property
    def written(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclass(eq=False)
class Slot:
    """A place in the cache. `tokens[:computed]` is what its keys and values are of."""

    index: int
    row: Row | None = None  # who writes here
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    left_at: int = 0  # when its last row ended, in ended rows

    def shares(self, tokens: list[int]) -> int:
        """How many tokens both begin with, of those computed here and short of the last one of `tokens`.

        >>> Slot(0, tokens=[1, 2, 3, 4], computed=3).shares([1, 2, 3, 4, 5])
        3
        """
        limit = min(self.row.computed if self.row else self.computed, len(tokens) - 1)
        if self.tokens[:limit] == tokens[:limit]:  # nearly always this or a difference at the start
            return limit
        return next(i for i in range(limit) if self.tokens[i] != tokens[i])


@dataclass(frozen=True)
class Copy:
    """Copy the first `length` positions of one slot into another."""

    source: int
    target: int
    length: int


@dataclass(frozen=True)
class Read:
    """Compute tokens start .. end of a row's prompt."""

    row: Row
    slot: int
    start: int
    end: int


class Scheduler:
    """Deals slots to rows and rounds to their tokens. `read_budget`: prompt tokens that one round may read."""

    def __init__(self, max_rows: int, read_budget: int):
        self.max_rows, self.read_budget = max_rows, read_budget
        self.slots: list[Slot] = []  # grows up to max_rows, so that a cache need not be larger than it was ever used
        self.waiting: deque[Row] = deque()
        self.reading: Row | None = None  # at most one prompt is half read
        self.running: list[Row] = []
        self.slot_of: dict[Row, Slot] = {}
        self.ended = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.slot_of)

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def plan(self) -> list[Copy | Read]:
        """What to do, in this order, before the next round. Afterwards `running` says who takes part in it."""
        work, budget = [], self.read_budget
        while True:
            if self.reading is None:
                slot = self._slot_for_next()
                if slot is None:
                    return work
                self.reading = row = self.waiting.popleft()
                work += self._place(row, slot)
            row, slot = self.reading, self.slot_of[self.reading]
            end = min(len(row.tokens) - 1, row.computed + budget)
            if end > row.computed:
                work.append(Read(row, slot.index, row.computed, end))
                budget -= end - row.computed
                row.computed = end
            if row.computed < len(row.tokens) - 1:
                return work
            self.running.append(row)
            self.reading = None

    def end(self, row: Row, reason: str) -> None:
        """`row` has ended, wherever it stands. What its slot holds may serve others until the slot is needed."""
        row.finish_reason = reason
        if row in self.slot_of:
            slot = self.slot_of.pop(row)
            self.ended += 1
            slot.row, slot.computed, slot.left_at = None, row.computed, self.ended
            if row is self.reading:
                self.reading = None
            else:
                self.running.remove(row)
        else:
            self.waiting.remove(row)

    def _slot_for_next(self) -> Slot | None:
        """The slot that the first in line should write to; None where nobody waits or no slot is free.

        A slot that holds its beginning is taken over when that is half of what it holds or more. Otherwise an
        unused slot is taken before one whose tokens may still serve, and of those the one that was left first.
        """
        if not self.waiting:
            return None
        tokens = self.waiting[0].tokens
        free = [slot for slot in self.slots if slot.row is None]
        best = max(free, key=lambda slot: slot.shares(tokens), default=None)
        if best is not None and best.shares(tokens) > 0 and 2 * best.shares(tokens) >= best.computed:
            return best
        if len(self.slots) < self.max_rows:
            self.slots.append(Slot(len(self.slots)))
            return self.slots[-1]
        return min(free, key=lambda slot: slot.left_at, default=None)

    def _place(self, row: Row, slot: Slot) -> list[Copy]:
        """Give `slot` to `row` with the longest beginning that any slot has of it."""
        source = max(self.slots, key=lambda other: other.shares(row.tokens))
        row.computed = row.reused = source.shares(row.tokens)
        copy = [Copy(source.index, slot.index, row.reused)] if source is not slot and row.reused else []
        slot.row, slot.tokens = row, row.tokens
        self.slot_of[row] = slot
        return copy
