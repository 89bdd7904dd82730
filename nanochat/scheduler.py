"""Which tokens are computed next: continuous batching in plain Python, without tensors.

A sequence is a list of tokens, and its slot in the cache holds the keys and values of the first `computed` of them.
A sequence of which only the last token is not computed is running: each step feeds that token of every running
sequence to the model in one batch and appends the result. Before that its prompt is prefilled in chunks of a few
tokens between the steps, so that running sequences never wait long. Sequences join and leave between any two steps.

A finished sequence leaves its keys and values in its slot until the slot is needed, and this is the prefix cache: a
new sequence that starts with the same tokens as any slot, finished or running, continues from there. So the next turn
of a conversation prefills only what is new, and many samples of one prompt prefill it once.

Nothing here samples, decodes or knows of a model (engine.py does).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field


@dataclass(eq=False)
class Sequence:
    """A sequence and its sampling settings."""

    tokens: list[int]  # the prompt and everything generated after it
    limit: int  # maximum number of tokens, prompt included
    exhausted: str = "length"  # finish reason at the limit: "length", or "context" if the model's context is full
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    rng: random.Random | None = None
    forced: deque[int] = field(default_factory=deque)  # tokens of a tool's output that come next
    call: list[int] | None = None  # tokens of an unfinished tool call
    masks: list[int] = field(default_factory=list)  # of the generated tokens: 1 sampled, 0 forced by a tool
    log_probs: list[float] = field(default_factory=list)  # of the generated tokens under the settings; 0 if forced
    finish_reason: str | None = None  # "stop", "length", "context" or "cancelled" once finished
    prompt_length: int = 0
    computed: int = 0  # number of tokens whose keys and values its slot holds
    reused: int = 0  # of which the prefix cache had so many

    def __post_init__(self):
        self.prompt_length = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]


@dataclass(eq=False)
class Slot:
    """A place in the cache, which holds the keys and values of `tokens[:computed]`."""

    index: int
    seq: Sequence | None = None  # the sequence that uses it
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    left_at: int = 0  # when its last sequence finished, in finished sequences

    def common_prefix(self, tokens: list[int]) -> int:
        """Length of the common prefix of the computed tokens and `tokens` without its last one.

        >>> Slot(0, tokens=[1, 2, 3, 4], computed=3).common_prefix([1, 2, 3, 4, 5])
        3
        """
        limit = min(self.seq.computed if self.seq else self.computed, len(tokens) - 1)
        if self.tokens[:limit] == tokens[:limit]:  # nearly always, or they differ at the start
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
    """Compute tokens start .. end of a sequence's prompt."""

    seq: Sequence
    slot: int
    start: int
    end: int


class Scheduler:
    """Assigns slots to sequences and plans steps. `prefill_budget`: prompt tokens that are prefilled per step."""

    def __init__(self, max_sequences: int, prefill_budget: int):
        self.max_sequences, self.prefill_budget = max_sequences, prefill_budget
        self.slots: list[Slot] = []  # grows up to max_sequences, so that the cache is not larger than needed
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None  # at most one prompt is partly prefilled
        self.running: list[Sequence] = []
        self.slot_of: dict[Sequence, Slot] = {}
        self.ended = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.slot_of)

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def plan(self) -> list[Copy | Prefill]:
        """The work before the next step, in order. Afterwards `running` holds the sequences of that step."""
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
        """Finish `seq` in any state. The content of its slot stays in the prefix cache until the slot is needed."""
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
        """The slot for the first waiting sequence; None if none waits or no slot is free.

        A free slot whose content it extends is taken over if the common prefix is at least half of that content.
        Otherwise a new slot comes before the free slot that was left first, whose content may still be useful.
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
        """Assign `slot` to `seq`, with the longest prefix that any slot has."""
        source = max(self.slots, key=lambda other: other.common_prefix(seq.tokens))
        seq.computed = seq.reused = source.common_prefix(seq.tokens)
        copy = [Copy(source.index, slot.index, seq.reused)] if source is not slot and seq.reused else []
        slot.seq, slot.tokens = seq, seq.tokens
        self.slot_of[seq] = slot
        return copy
