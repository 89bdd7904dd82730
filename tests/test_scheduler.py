"""The policy of continuous batching, simulated with plain lists."""

import random

from hypothesis import given, settings, strategies as st

from nanochat.scheduler import Scheduler, Sequence


def make_sequence(tokens, new_tokens=3):
    return Sequence(tokens=list(tokens), limit=len(tokens) + new_tokens)


class Machine:
    """A scheduler, and a cache that holds the token of each position of each slot, to check what is reused."""

    def __init__(self, max_sequences, prefill_budget):
        self.scheduler = Scheduler(max_sequences, prefill_budget)
        self.cache = {}  # (slot, position) -> token
        self.work = []

    def holds(self, slot, tokens):
        return [self.cache.get((slot, position)) for position in range(len(tokens))] == tokens

    def step(self):
        """Execute the plan, then generate a unique token for each running sequence."""
        scheduler = self.scheduler
        before = scheduler.running
        work = scheduler.plan()
        assert set(before) <= set(scheduler.running), "no sequence waits for the prompts of others"
        self.work += work
        for seq, start, end, source in work:
            for position in range(start if source is not None else 0):
                self.cache[seq.slot, position] = self.cache[source, position]
            assert self.holds(seq.slot, seq.tokens[:start]), "the tokens before it are cached"
            for position in range(start, end):
                self.cache[seq.slot, position] = seq.tokens[position]
        assert sum(item.end - item.start for item in work) <= scheduler.prefill_budget * (1 if before else 4)
        assert len(scheduler.slots) <= scheduler.max_sequences
        for seq in scheduler.running:
            assert seq.slot not in scheduler.free and self.holds(seq.slot, seq.tokens[:-1])
            self.cache[seq.slot, seq.computed] = seq.tokens[-1]
            seq.computed = len(seq.tokens)
            seq.tokens.append(hash((id(seq), len(seq.tokens))))
            if len(seq.tokens) == seq.limit:
                scheduler.end(seq, "length")

    def finish(self, *seqs):
        """Add sequences and step until all have finished."""
        self.scheduler.waiting += seqs
        for _ in range(1000):
            self.step()
        assert not self.scheduler.waiting and len(self.scheduler.free) == len(self.scheduler.slots)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), max_sequences=st.integers(1, 5), budget=st.integers(1, 12))
def test_random_arrivals_and_cancellations(seed, max_sequences, budget):
    """Each step checks the cache; here: all sequences finish, start in order of arrival, and free their slots."""
    rng = random.Random(seed)
    machine = Machine(max_sequences, budget)
    seqs, cancelled = [], set()
    for _ in range(60):
        if rng.random() < 0.4:
            # Few letters, and continuations of other sequences, so that many have common prefixes
            root = rng.choice(seqs).tokens if seqs and rng.random() < 0.5 else []
            tokens = root[: rng.randrange(len(root) + 1)] + [rng.randrange(3) for _ in range(rng.randint(1, 9))]
            seqs.append(make_sequence(tokens, new_tokens=rng.randint(1, 6)))
            machine.scheduler.waiting.append(seqs[-1])
        unfinished = [seq for seq in seqs if seq.finish_reason is None]
        if unfinished and rng.random() < 0.1:
            cancelled.add(seq := rng.choice(unfinished))
            machine.scheduler.end(seq, "cancelled")
        machine.step()
    machine.finish()
    assert all(seq.finish_reason == ("cancelled" if seq in cancelled else "length") for seq in seqs)
    assert all(len(seq.tokens) == seq.limit for seq in seqs if seq not in cancelled)
    started = list(dict.fromkeys(seq for seq, *_ in machine.work))
    assert started == [seq for seq in seqs if seq in started], "in order of arrival"


def test_a_new_slot_is_preferred_then_that_which_was_left_first_and_a_long_common_prefix_to_both():
    machine = Machine(max_sequences=2, prefill_budget=100)
    first, other, last = make_sequence([0, 1, *range(30)]), make_sequence([0, 1, *range(50, 80)]), make_sequence([7])
    machine.finish(first)
    machine.finish(other)
    assert (other.slot, other.reused, machine.work[-1].source) == (1, 2, 0), "a short common prefix is copied"
    machine.finish(turn := make_sequence([*first.tokens, 9]))
    assert (turn.slot, turn.reused, machine.work[-1].source) == (0, len(first.tokens) - 1, None)
    machine.finish(last)
    assert last.slot == 1
