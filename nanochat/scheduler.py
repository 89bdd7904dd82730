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
from typing import NamedTuple


@dataclass(eq=False)
class Sequence:
    """A sequence and its sampling settings."""

    tokens: list[int]  # the prompt and everything generated after it
    limit: float  # maximum number of tokens, prompt included
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    rng: random.Random | None = None
    forced: deque[int] = field(default_factory=deque)  # tokens of a tool's output that come next
    call: list[int] | None = None  # tokens of an unfinished tool call
    masks: list[int] = field(default_factory=list)  # of the generated tokens: 1 sampled, 0 forced by a tool
    log_probs: list[float] = field(default_factory=list)  # of the generated tokens under the settings; 0 if forced
    top_logprobs: int | None = None  # not None: `scores` are wanted, with so many of the most likely tokens
    prompt_logprobs: bool = False  # for the prompt's tokens too
    scores: list[tuple[float | None, dict[int, float]]] = field(default_factory=list)  # see engine.token_scores
    finish_reason: str | None = None  # "stop", "length", "context", "failed" or "cancelled" once finished
    prompt_length: int = 0
    slot: int | None = None  # its place in the cache, once it has one
    computed: int = 0  # number of tokens whose keys and values the slot holds
    reused: int = 0  # of which the prefix cache had so many
    source: int | None = None  # the slot from which these must be copied first, if not its own

    def __post_init__(self):
        self.prompt_length = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def running(self) -> bool:
        """Whether only the last token is not computed: its successor is generated in the next step."""
        return self.finish_reason is None and self.computed == len(self.tokens) - 1

    def common_prefix(self, tokens: list[int]) -> int:
        """Length of the common prefix of the computed tokens and `tokens` without its last one."""
        limit = min(self.computed, len(tokens) - 1)
        if self.tokens[:limit] == tokens[:limit]:  # nearly always, or they differ at the start
            return limit
        return next(i for i in range(limit) if self.tokens[i] != tokens[i])


class Prefill(NamedTuple):
    """Compute tokens start .. end of a prompt; if there is a `source`, copy those before `start` from that slot first."""

    seq: Sequence
    start: int
    end: int
    source: int | None


class Scheduler:
    """Assigns slots and plans steps. `prefill_budget`: prompt tokens per step, four times as many if no sequence is running."""

    def __init__(self, max_sequences: int, prefill_budget: int):
        self.max_sequences, self.prefill_budget = max_sequences, prefill_budget
        self.waiting: deque[Sequence] = deque()  # new sequences are appended
        # The newest sequence of each slot, finished or not; grows up to max_sequences, so that the cache is small
        self.slots: list[Sequence] = []
        self.free: list[int] = []  # slots whose sequence has finished, in the order in which they finished

    @property
    def running(self) -> list[Sequence]:
        """In order of their slots, so that attention reads neighbouring rows of the cache."""
        return [seq for seq in self.slots if seq.running]

    def plan(self) -> list[Prefill]:
        """The work before the next step, in order. Afterwards `running` holds the sequences of that step."""
        work, budget = [], self.prefill_budget * (1 if self.running else 4)
        # At most one prompt is partly prefilled; the waiting ones follow
        unfinished = (seq for seq in self.slots if seq.finish_reason is None and not seq.running)
        seq = next(unfinished, None) or self._start_next()
        while seq:
            end = min(len(seq.tokens) - 1, seq.computed + budget)
            work.append(Prefill(seq, seq.computed, end, seq.source))
            budget -= end - seq.computed
            seq.computed, seq.source = end, None
            seq = self._start_next() if seq.running else None
        return work

    def end(self, seq: Sequence, reason: str) -> None:
        """Finish `seq` in any state. The content of its slot stays in the prefix cache until the slot is needed."""
        seq.finish_reason = reason
        if seq.slot is None:
            self.waiting.remove(seq)
        else:
            self.free.append(seq.slot)

    def _start_next(self) -> Sequence | None:
        """Assign a slot to the first waiting sequence; None if none waits or no slot is free.

        It takes over the free slot with the longest common prefix if that is at least half of the slot's content.
        Otherwise it gets a new slot or, if there are enough, the slot that has been free for longest, and a copy of
        the longest common prefix that any slot has.
        """
        if not self.waiting:
            return None
        seq = self.waiting[0]
        # The prefix cache has no logits, from which the log-probabilities of a prompt are computed
        lengths = [0 if seq.prompt_logprobs else other.common_prefix(seq.tokens) for other in self.slots]
        best = max(self.free, key=lambda slot: lengths[slot], default=None)
        if best is not None and lengths[best] > 0 and 2 * lengths[best] >= self.slots[best].computed:
            seq.slot = best
        elif len(self.slots) < self.max_sequences:
            seq.slot = len(self.slots)
        elif self.free:
            seq.slot = self.free[0]
        else:
            return None
        seq.computed = seq.reused = max(lengths, default=0)
        if seq.reused and lengths.index(seq.reused) != seq.slot:
            seq.source = lengths.index(seq.reused)
        if seq.slot == len(self.slots):
            self.slots.append(seq)
        else:
            self.free.remove(seq.slot)
            self.slots[seq.slot] = seq
        return self.waiting.popleft()
