"""The policy of continuous batching, played through on plain lists."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.scheduler import Copy, Prefill, Sequence, Scheduler, Slot


def make_sequence(tokens, write=3):
    return Sequence(tokens=list(tokens), limit=len(tokens) + write)


class Machine:
    """A scheduler and a memory that knows which token lies at each place of each slot, so that a lie would show."""

    def __init__(self, max_sequences, prefill_budget):
        self.scheduler = Scheduler(max_sequences, prefill_budget)
        self.memory = {}  # (slot, position) -> token
        self.read, self.copied, self.joined = [], [], []

    def plan(self):
        before = set(self.scheduler.running)
        work = self.scheduler.plan()
        for item in work:
            if isinstance(item, Copy):
                for position in range(item.length):
                    self.memory[item.target, position] = self.memory[item.source, position]
                self.copied.append(item)
            else:
                assert self.holds(item.slot, item.seq.tokens[: item.start]), "what comes before is there"
                for position in range(item.start, item.end):
                    self.memory[item.slot, position] = item.seq.tokens[position]
                self.read.append(item)
        self.joined += [seq for seq in self.scheduler.running if seq not in before]
        assert sum(item.end - item.start for item in work if isinstance(item, Prefill)) <= self.scheduler.prefill_budget
        slots = [slot.index for slot in self.scheduler.slot_of.values()]
        assert len(slots) == len(set(slots)) <= self.scheduler.max_sequences
        return work

    def holds(self, slot, tokens):
        return [self.memory.get((slot, position)) for position in range(len(tokens))] == tokens

    def round(self):
        """Plan, and let each running seq write a token that is unlike any other's."""
        self.plan()
        for seq in list(self.scheduler.running):
            slot = self.scheduler.slot_of[seq].index
            assert seq.computed == len(seq.tokens) - 1
            assert self.holds(slot, seq.tokens[:-1])
            self.memory[slot, seq.computed] = seq.tokens[-1]
            seq.computed = len(seq.tokens)
            seq.tokens.append(hash((id(seq), len(seq.tokens))))
            if len(seq.tokens) == seq.limit:
                self.scheduler.end(seq, "length")


def run_until_idle(machine, rounds=1000):
    for _ in range(rounds):
        if not machine.scheduler.busy:
            return
        machine.round()
    raise AssertionError("it never ends")


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), max_sequences=st.integers(1, 5), budget=st.integers(1, 12))
def test_rows_that_come_and_go_at_random_all_get_what_is_theirs(seed, max_sequences, budget):
    """The machine's memory is checked at each step; here: everybody is served, in order of arrival, and leaves no trace."""
    rng = random.Random(seed)
    machine = Machine(max_sequences, budget)
    seqs, cancelled = [], set()
    for _ in range(60):
        if rng.random() < 0.4:
            # Prompts of few letters, and continuations of what others have written, so that much is shared.
            root = rng.choice(seqs).tokens if seqs and rng.random() < 0.5 else []
            tokens = root[: rng.randrange(len(root) + 1)] + [rng.randrange(3) for _ in range(rng.randint(1, 9))]
            seqs.append(make_sequence(tokens, write=rng.randint(1, 6)))
            machine.scheduler.add(seqs[-1])
        open_rows = [seq for seq in seqs if seq.finish_reason is None]
        if open_rows and rng.random() < 0.1:
            cancelled.add(seq := rng.choice(open_rows))
            machine.scheduler.end(seq, "cancelled")
        machine.round()
    run_until_idle(machine)
    assert all(seq.finish_reason == ("cancelled" if seq in cancelled else "length") for seq in seqs)
    assert all(len(seq.tokens) == seq.limit for seq in seqs if seq not in cancelled)
    order = [seqs.index(seq) for seq in machine.joined]
    assert order == sorted(order)
    assert not machine.scheduler.slot_of and not machine.scheduler.running and machine.scheduler.prefilling is None
    assert len(machine.scheduler.slots) <= max_sequences


def test_a_long_prompt_is_read_in_pieces_while_others_write():
    machine = Machine(max_sequences=2, prefill_budget=4)
    short, long = make_sequence([1, 2], write=9), make_sequence(range(10, 23), write=1)
    machine.scheduler.add(short)
    machine.round()
    machine.scheduler.add(long)
    lengths = []
    while long.finish_reason is None:
        machine.round()
        lengths.append(len(short.tokens))
    assert [(item.start, item.end) for item in machine.read if item.seq is long] == [(0, 4), (4, 8), (8, 12)]
    assert lengths == [4, 5, 6]  # one token each round, as if nobody had come


def test_a_prompt_of_one_token_needs_no_reading():
    machine = Machine(max_sequences=1, prefill_budget=4)
    machine.scheduler.add(seq := make_sequence([7], write=1))
    machine.round()
    assert seq.finish_reason == "length" and not machine.read


def test_many_samples_of_a_prompt_read_it_once():
    machine = Machine(max_sequences=8, prefill_budget=100)
    seqs = [make_sequence(range(50)) for _ in range(8)]
    for seq in seqs:
        machine.scheduler.add(seq)
    machine.plan()
    assert len(machine.scheduler.running) == 8
    assert [(item.seq, item.start, item.end) for item in machine.read] == [(seqs[0], 0, 49)]
    assert {(item.source, item.length) for item in machine.copied} == {(0, 49)}


def test_the_next_turn_reads_only_what_is_new():
    machine = Machine(max_sequences=4, prefill_budget=100)
    machine.scheduler.add(first := make_sequence(range(20), write=5))
    run_until_idle(machine)
    machine.scheduler.add(second := make_sequence([*first.tokens, 1, 2, 3]))
    machine.plan()
    # The last token that was written had not been fed to the model.
    assert second.reused == 24 and not machine.copied
    assert (machine.read[-1].start, machine.read[-1].end) == (24, 27)
    assert machine.read[-1].slot == machine.read[0].slot


def test_the_next_turn_of_a_conversation_is_found_among_others():
    machine = Machine(max_sequences=4, prefill_budget=100)
    conversations = [make_sequence([0, 100 * i, *range(100 * i, 100 * i + 20)]) for i in range(4)]
    for seq in conversations:
        machine.scheduler.add(seq)
    run_until_idle(machine)
    for seq in reversed(conversations):
        machine.scheduler.add(turn := make_sequence([*seq.tokens, 5, 6, 7]))
        run_until_idle(machine)
        assert turn.reused == len(seq.tokens) - 1
    assert not [item for item in machine.copied if item.length > 1]


def test_a_newcomer_takes_an_unused_slot_then_the_one_left_first():
    machine = Machine(max_sequences=2, prefill_budget=100)
    for base in (100, 200, 300):
        machine.scheduler.add(make_sequence([base, base + 1, base + 2]))
        run_until_idle(machine)
    assert [item.slot for item in machine.read] == [0, 1, 0]


def test_a_conversation_is_not_overwritten_by_one_that_only_begins_alike():
    machine = Machine(max_sequences=2, prefill_budget=100)
    machine.scheduler.add(first := make_sequence([0, 1, *range(100, 130)]))
    run_until_idle(machine)
    machine.scheduler.add(other := make_sequence([0, 1, *range(200, 230)]))
    run_until_idle(machine)
    assert other.reused == 2 and machine.copied == [Copy(0, 1, 2)]
    machine.scheduler.add(turn := make_sequence([*first.tokens, 9]))
    run_until_idle(machine)
    assert turn.reused == len(first.tokens) - 1


def test_a_cancelled_row_frees_its_place_at_once_wherever_it_stands():
    machine = Machine(max_sequences=1, prefill_budget=2)
    running, prefilling, waiting, last = (make_sequence(range(base, base + 6)) for base in (0, 10, 20, 30))
    machine.scheduler.add(running)
    while running not in machine.scheduler.running:
        machine.round()
    for seq in (prefilling, waiting, last):
        machine.scheduler.add(seq)
    machine.round()
    machine.scheduler.end(running, "cancelled")
    machine.round()
    assert machine.scheduler.prefilling is prefilling and prefilling.computed == 2
    machine.scheduler.end(waiting, "cancelled")
    machine.scheduler.end(prefilling, "cancelled")
    machine.round()
    assert machine.scheduler.prefilling is last
    run_until_idle(machine)
    assert last.finish_reason == "length"
    with pytest.raises((ValueError, KeyError)):
        machine.scheduler.end(last, "cancelled")  # once is enough; the engine looks first


@given(a=st.lists(st.integers(0, 2), max_size=12), b=st.lists(st.integers(0, 2), min_size=1, max_size=12), n=st.integers(0, 12))
def test_what_is_shared_is_the_common_beginning_short_of_the_last_token(a, b, n):
    n = min(n, len(a))
    shared = 0
    while shared < min(n, len(b) - 1) and a[shared] == b[shared]:
        shared += 1
    assert Slot(0, tokens=a, computed=n).common_prefix(b) == shared
