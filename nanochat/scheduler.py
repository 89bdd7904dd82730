"""Which tokens are computed next: continuous batching as plain Python, without a tensor.

The one idea: a seq is a list of tokens, and a slot of the cache holds the keys and values of its
first `computed` tokens. A seq whose last token alone is not computed is *running*: each round
feeds that token of every running seq to the model in one batch and appends what comes out. Until
then its prompt is *read*, in chunks of a few tokens between the rounds, so that those who already
run are never held up for long. Rows join and leave between any two rounds.

A seq that has ended leaves its tokens' keys and values in its slot until the slot is needed. A
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
class Sequence:
    """One sequence being written, and how it is to be written."""

    tokens: list[int]  # the prompt and all that was written after it
    limit: int  # the number of tokens at which it ends at the latest
    exhausted: str = "length"  # why it ends there: "length", or "context" where the model holds no more
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop: tuple[bytes, ...] = ()  # text that ends it
    rng: random.Random | None = None
    forced: deque[int] = field(default_factory=deque)  # tokens that a tool has put in line
    call: list[int] | None = None  # the tool call it is in the middle of
    tail: bytes = b""  # its newest text, as far as that may be the beginning of a stop
    masks: list[int] = field(default_factory=list)  # of what was written: 1 sampled, 0 forced by a tool
    log_probs: list[float] = field(default_factory=list)  # of what was sampled, under the seq's settings; 0 where forced
    finish_reason: str | None = None  # "stop", "length", "context" or "cancelled" once it has ended
    prompt_length: int = 0
    computed: int = 0  # how many of its tokens' keys and values its slot holds
    reused: int = 0  # how many of these it found there

    def __post_init__(self):
        self.prompt_length = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclass(eq=False)
class Slot:
    """A place in the cache. `tokens[:computed]` is what its keys and values are of."""

    index: int
    seq: Sequence | None = None  # who writes here
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    left_at: int = 0  # when its last seq ended, in ended seqs

    def common_prefix(self, tokens: list[int]) -> int:
        """How many tokens both begin with, of those computed here and short of the last one of `tokens`.

        >>> Slot(0, tokens=[1, 2, 3, 4], computed=3).common_prefix([1, 2, 3, 4, 5])
        3
        """
        limit = min(self.seq.computed if self.seq else self.computed, len(tokens) - 1)
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
class Prefill:
    """Compute tokens start .. end of a seq's prompt."""

    seq: Sequence
    slot: int
    start: int
    end: int


class Scheduler:
    """Deals slots to seqs and rounds to their tokens. `prefill_budget`: prompt tokens that one round may read."""

    def __init__(self, max_sequences: int, prefill_budget: int):
        self.max_sequences, self.prefill_budget = max_sequences, prefill_budget
        self.slots: list[Slot] = []  # grows up to max_sequences, so that a cache need not be larger than it was ever used
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None  # at most one prompt is half read
        self.running: list[Sequence] = []
        self.slot_of: dict[Sequence, Slot] = {}
        self.ended = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.slot_of)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def plan(self) -> list[Copy | Prefill]:
        """What to do, in this order, before the next round. Afterwards `running` says who takes part in it."""
        work, budget = [], self.prefill_budget
        while True:
            if self.prefilling is None:
                slot = self._slot_for_next()
                if slot is None:
                    return work
                self.prefilling = seq = self.waiting.popleft()
                work += self._place(seq, slot)
            seq, slot = self.prefilling, self.slot_of[self.prefilling]
            end = min(len(seq.tokens) - 1, seq.computed + budget)
            if end > seq.computed:
                work.append(Prefill(seq, slot.index, seq.computed, end))
                budget -= end - seq.computed
                seq.computed = end
            if seq.computed < len(seq.tokens) - 1:
                return work
            self.running.append(seq)
            self.prefilling = None

    def end(self, seq: Sequence, reason: str) -> None:
        """`seq` has ended, wherever it stands. What its slot holds may serve others until the slot is needed."""
        seq.finish_reason = reason
        if seq in self.slot_of:
            slot = self.slot_of.pop(seq)
            self.ended += 1
            slot.seq, slot.computed, slot.left_at = None, seq.computed, self.ended
            if seq is self.prefilling:
                self.prefilling = None
            else:
                self.running.remove(seq)
        else:
            self.waiting.remove(seq)

    def _slot_for_next(self) -> Slot | None:
        """The slot that the first in line should write to; None where nobody waits or no slot is free.

        A slot that holds its beginning is taken over when that is half of what it holds or more. Otherwise an
        unused slot is taken before one whose tokens may still serve, and of those the one that was left first.
        """
        if not self.waiting:
            return None
        tokens = self.waiting[0].tokens
        free = [slot for slot in self.slots if slot.seq is None]
        best = max(free, key=lambda slot: slot.common_prefix(tokens), default=None)
        if best is not None and best.common_prefix(tokens) > 0 and 2 * best.common_prefix(tokens) >= best.computed:
            return best
        if len(self.slots) < self.max_sequences:
            self.slots.append(Slot(len(self.slots)))
            return self.slots[-1]
        return min(free, key=lambda slot: slot.left_at, default=None)

    def _place(self, seq: Sequence, slot: Slot) -> list[Copy]:
        """Give `slot` to `seq` with the longest beginning that any slot has of it."""
        source = max(self.slots, key=lambda other: other.common_prefix(seq.tokens))
        seq.computed = seq.reused = source.common_prefix(seq.tokens)
        copy = [Copy(source.index, slot.index, seq.reused)] if source is not slot and seq.reused else []
        slot.seq, slot.tokens = seq, seq.tokens
        self.slot_of[seq] = slot
        return copy
