"""The policy of continuous batching, played through on plain lists."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.scheduler import Copy, Read, Row, Scheduler, Slot


def make_row(tokens, write=3):
    return Row(tokens=list(tokens), limit=len(tokens) + write)


class Machine:
    """A scheduler and a memory that knows which token lies at each place of each slot, so that a lie would show."""

    def __init__(self, max_rows, read_budget):
        self.scheduler = Scheduler(max_rows, read_budget)
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
                assert self.holds(item.slot, item.row.tokens[: item.start]), "what comes before is there"
                for position in range(item.start, item.end):
                    self.memory[item.slot, position] = item.row.tokens[position]
                self.read.append(item)
        self.joined += [row for row in self.scheduler.running if row not in before]
        assert sum(item.end - item.start for item in work if isinstance(item, Read)) <= self.scheduler.read_budget
        slots = [slot.index for slot in self.scheduler.slot_of.values()]
        assert len(slots) == len(set(slots)) <= self.scheduler.max_rows
        return work

    def holds(self, slot, tokens):
        return [self.memory.get((slot, position)) for position in range(len(tokens))] == tokens

    def round(self):
        """Plan, and let each running row write a token that is unlike any other's."""
        self.plan()
        for row in list(self.scheduler.running):
            slot = self.scheduler.slot_of[row].index
            assert row.computed == len(row.tokens) - 1
            assert self.holds(slot, row.tokens[:-1])
            self.memory[slot, row.computed] = row.tokens[-1]
            row.computed = len(row.tokens)
            row.tokens.append(hash((id(row), len(row.tokens))))
            if len(row.tokens) == row.limit:
                self.scheduler.end(row, "length")


def run_until_idle(machine, rounds=1000):
    for _ in range(rounds):
        if not machine.scheduler.busy:
            return
        machine.round()
    raise AssertionError("it never ends")


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**9), max_rows=st.integers(1, 5), budget=st.integers(1, 12))
def test_rows_that_come_and_go_at_random_all_get_what_is_theirs(seed, max_rows, budget):
    """The machine's memory is checked at each step; here: everybody is served, in order of arrival, and leaves no trace."""
    dice = random.Random(seed)
    machine = Machine(max_rows, budget)
    rows, cancelled = [], set()
    for _ in range(60):
        if dice.random() < 0.4:
            # Prompts of few letters, and continuations of what others have written, so that much is shared.
            root = dice.choice(rows).tokens if rows and dice.random() < 0.5 else []
            tokens = root[: dice.randrange(len(root) + 1)] + [dice.randrange(3) for _ in range(dice.randint(1, 9))]
            rows.append(make_row(tokens, write=dice.randint(1, 6)))
            machine.scheduler.add(rows[-1])
        open_rows = [row for row in rows if row.finish_reason is None]
        if open_rows and dice.random() < 0.1:
            cancelled.add(row := dice.choice(open_rows))
            machine.scheduler.end(row, "cancelled")
        machine.round()
    run_until_idle(machine)
    assert all(row.finish_reason == ("cancelled" if row in cancelled else "length") for row in rows)
    assert all(len(row.tokens) == row.limit for row in rows if row not in cancelled)
    order = [rows.index(row) for row in machine.joined]
    assert order == sorted(order)
    assert not machine.scheduler.slot_of and not machine.scheduler.running and machine.scheduler.reading is None
    assert len(machine.scheduler.slots) <= max_rows


def test_a_long_prompt_is_read_in_pieces_while_others_write():
    machine = Machine(max_rows=2, read_budget=4)
    short, long = make_row([1, 2], write=9), make_row(range(10, 23), write=1)
    machine.scheduler.add(short)
    machine.round()
    machine.scheduler.add(long)
    lengths = []
    while long.finish_reason is None:
        machine.round()
        lengths.append(len(short.tokens))
    assert [(item.start, item.end) for item in machine.read if item.row is long] == [(0, 4), (4, 8), (8, 12)]
    assert lengths == [4, 5, 6]  # one token each round, as if nobody had come


def test_a_prompt_of_one_token_needs_no_reading():
    machine = Machine(max_rows=1, read_budget=4)
    machine.scheduler.add(row := make_row([7], write=1))
    machine.round()
    assert row.finish_reason == "length" and not machine.read


def test_many_samples_of_a_prompt_read_it_once():
    machine = Machine(max_rows=8, read_budget=100)
    rows = [make_row(range(50)) for _ in range(8)]
    for row in rows:
        machine.scheduler.add(row)
    machine.plan()
    assert len(machine.scheduler.running) == 8
    assert [(item.row, item.start, item.end) for item in machine.read] == [(rows[0], 0, 49)]
    assert {(item.source, item.length) for item in machine.copied} == {(0, 49)}


def test_the_next_turn_reads_only_what_is_new():
    machine = Machine(max_rows=4, read_budget=100)
    machine.scheduler.add(first := make_row(range(20), write=5))
    run_until_idle(machine)
    machine.scheduler.add(second := make_row([*first.tokens, 1, 2, 3]))
    machine.plan()
    # The last token that was written had not been fed to the model.
    assert second.reused == 24 and not machine.copied
    assert (machine.read[-1].start, machine.read[-1].end) == (24, 27)
    assert machine.read[-1].slot == machine.read[0].slot


def test_the_next_turn_of_a_conversation_is_found_among_others():
    machine = Machine(max_rows=4, read_budget=100)
    conversations = [make_row([0, 100 * i, *range(100 * i, 100 * i + 20)]) for i in range(4)]
    for row in conversations:
        machine.scheduler.add(row)
    run_until_idle(machine)
    for row in reversed(conversations):
        machine.scheduler.add(turn := make_row([*row.tokens, 5, 6, 7]))
        run_until_idle(machine)
        assert turn.reused == len(row.tokens) - 1
    assert not [item for item in machine.copied if item.length > 1]


def test_a_newcomer_takes_an_unused_slot_then_the_one_left_first():
    machine = Machine(max_rows=2, read_budget=100)
    for base in (100, 200, 300):
        machine.scheduler.add(make_row([base, base + 1, base + 2]))
        run_until_idle(machine)
    assert [item.slot for item in machine.read] == [0, 1, 0]


def test_a_conversation_is_not_overwritten_by_one_that_only_begins_alike():
    machine = Machine(max_rows=2, read_budget=100)
    machine.scheduler.add(first := make_row([0, 1, *range(100, 130)]))
    run_until_idle(machine)
    machine.scheduler.add(other := make_row([0, 1, *range(200, 230)]))
    run_until_idle(machine)
    assert other.reused == 2 and machine.copied == [Copy(0, 1, 2)]
    machine.scheduler.add(turn := make_row([*first.tokens, 9]))
    run_until_idle(machine)
    assert turn.reused == len(first.tokens) - 1


def test_a_cancelled_row_frees_its_place_at_once_wherever_it_stands():
    machine = Machine(max_rows=1, read_budget=2)
    running, reading, waiting, last = (make_row(range(base, base + 6)) for base in (0, 10, 20, 30))
    machine.scheduler.add(running)
    while running not in machine.scheduler.running:
        machine.round()
    for row in (reading, waiting, last):
        machine.scheduler.add(row)
    machine.round()
    machine.scheduler.end(running, "cancelled")
    machine.round()
    assert machine.scheduler.reading is reading and reading.computed == 2
    machine.scheduler.end(waiting, "cancelled")
    machine.scheduler.end(reading, "cancelled")
    machine.round()
    assert machine.scheduler.reading is last
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
    assert Slot(0, tokens=a, computed=n).shares(b) == shared
