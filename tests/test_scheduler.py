"""The policy of continuous batching, simulated with plain lists."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.scheduler import Copy, Prefill, Scheduler, Sequence


def make_sequence(tokens, new_tokens=3):
    return Sequence(tokens=list(tokens), limit=len(tokens) + new_tokens)


class Machine:
    """A scheduler, and a cache that holds the token of each position of each slot, to check what is reused."""

    def __init__(self, max_sequences, prefill_budget):
        self.scheduler = Scheduler(max_sequences, prefill_budget)
        self.cache = {}  # (slot, position) -> token
        self.prefilled, self.copied, self.started = [], [], []

    def holds(self, slot, tokens):
        return [self.cache.get((slot, position)) for position in range(len(tokens))] == tokens

    def step(self):
        """Execute the plan, then generate a unique token for each running sequence."""
        scheduler, before = self.scheduler, set(self.scheduler.running)
        work = scheduler.plan()
        for item in work:
            if isinstance(item, Copy):
                for position in range(item.length):
                    self.cache[item.target, position] = self.cache[item.source, position]
                self.copied.append(item)
            else:
                assert self.holds(item.seq.slot, item.seq.tokens[: item.start]), "the tokens before it are cached"
                for position in range(item.start, item.end):
                    self.cache[item.seq.slot, position] = item.seq.tokens[position]
                self.prefilled.append((item.seq, item.start, item.end))
        assert sum(item.end - item.start for item in work if isinstance(item, Prefill)) <= scheduler.prefill_budget
        self.started += [seq for seq in scheduler.running if seq not in before]
        slots = [seq.slot for seq in scheduler.running]
        assert len(slots) == len(set(slots)) and len(scheduler.slots) <= scheduler.max_sequences
        assert not set(slots) & set(scheduler.free)
        for seq in list(scheduler.running):
            assert seq.computed == len(seq.tokens) - 1 and self.holds(seq.slot, seq.tokens[:-1])
            self.cache[seq.slot, seq.computed] = seq.tokens[-1]
            seq.computed = len(seq.tokens)
            seq.tokens.append(hash((id(seq), len(seq.tokens))))
            if len(seq.tokens) == seq.limit:
                scheduler.end(seq, "length")

    def finish(self, *seqs):
        """Add sequences and step until all have finished."""
        for seq in seqs:
            self.scheduler.add(seq)
        for _ in range(1000):
            if not self.scheduler.busy:
                return
            self.step()
        raise AssertionError("sequences never finish")


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
            machine.scheduler.add(seqs[-1])
        unfinished = [seq for seq in seqs if seq.finish_reason is None]
        if unfinished and rng.random() < 0.1:
            cancelled.add(seq := rng.choice(unfinished))
            machine.scheduler.end(seq, "cancelled")
        machine.step()
    machine.finish()
    assert all(seq.finish_reason == ("cancelled" if seq in cancelled else "length") for seq in seqs)
    assert all(len(seq.tokens) == seq.limit for seq in seqs if seq not in cancelled)
    order = [seqs.index(seq) for seq in machine.started]
    assert order == sorted(order)
    assert sorted(machine.scheduler.free) == list(range(len(machine.scheduler.slots)))


def test_a_long_prompt_is_prefilled_in_chunks_while_others_generate():
    machine = Machine(max_sequences=2, prefill_budget=4)
    short, long = make_sequence([1, 2], new_tokens=9), make_sequence(range(10, 23), new_tokens=1)
    machine.scheduler.add(short)
    machine.step()
    machine.scheduler.add(long)
    lengths = []
    while long.finish_reason is None:
        machine.step()
        lengths.append(len(short.tokens))
    assert machine.prefilled[1:] == [(long, 0, 4), (long, 4, 8), (long, 8, 12)]
    assert lengths == [4, 5, 6]  # one token per step throughout


def test_a_new_sequence_takes_a_new_slot_then_that_which_was_left_first():
    machine = Machine(max_sequences=2, prefill_budget=100)
    for base in (100, 200, 300):
        machine.finish(make_sequence([base, base + 1, base + 2]))
    assert [seq.slot for seq, _, _ in machine.prefilled] == [0, 1, 0]


def test_a_short_common_prefix_is_copied_and_its_slot_not_overwritten():
    machine = Machine(max_sequences=2, prefill_budget=100)
    machine.finish(first := make_sequence([0, 1, *range(100, 130)]))
    machine.finish(other := make_sequence([0, 1, *range(200, 230)]))
    assert other.reused == 2 and machine.copied == [Copy(0, 1, 2)]
    machine.finish(turn := make_sequence([*first.tokens, 9]))
    assert turn.reused == len(first.tokens) - 1 and turn.slot == first.slot and len(machine.copied) == 1
