"""The best-fit buffer against a plain list, and conversations packed exactly once per epoch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.packing import BestFitBuffer, ConversationPacker, split_conversation


def best_length(lengths: list[int], room: int) -> int | None:
    """Reference implementation of `pop_best`: the length that it chooses among `lengths`."""

    def longer_of_two(room):
        pairs = [(a, room - a) for a in lengths if a >= room - a]
        return min((a for a, b in pairs if b in lengths and lengths.count(a) > (a == b)), default=None)

    if room in lengths:
        return room
    return longer_of_two(room) or max((n for n in lengths if n <= room), default=None)


@given(
    st.lists(st.tuples(st.sampled_from("add add best largest oldest shortest".split()), st.integers(1, 40)), max_size=200),
    st.integers(1, 40),
)
def test_buffer_equals_a_plain_list(actions, row):
    """Except that it does not know which of two items longer than a row is the shorter."""
    buffer, plain = BestFitBuffer(row), []  # plain: (length, name), oldest first
    for name, (action, number) in enumerate(actions):
        if action == "add":
            buffer.add(number, (number, name))
            plain.append((number, name))
            continue
        room = min(number, row)
        if action == "largest":
            popped = buffer.pop_largest(room)
            expected = max((p for p in plain if p[0] <= room), key=lambda p: p[0], default=None)
        elif action == "best":
            popped = buffer.pop_best(room)
            length = best_length([p[0] for p in plain], room)
            expected = next((p for p in plain if p[0] == length), None)
        elif plain:
            popped = buffer.pop_oldest() if action == "oldest" else buffer.pop_shortest()
            expected = plain[0] if action == "oldest" else min(plain, key=lambda p: min(p[0], row + 1))
        else:
            continue
        assert popped == expected
        if expected:
            plain.remove(expected)
        assert list(buffer) == plain
        assert len(buffer) == len(plain)
        assert buffer.total == sum(length for length, _ in plain)


@pytest.mark.parametrize(
    "lengths, room, expected",
    [
        ([60, 50, 40, 30], 50, 50),
        ([70, 60, 50, 40, 30], 100, 60),  # with 40, a more equal pair than 70 and 30
        ([50, 30, 90], 100, 90),  # a single 50 is not a pair
        ([50, 30, 90, 50], 100, 50),
        ([80, 65, 25, 10], 100, 80),  # the largest, since no two fill the room
        ([101, 300], 100, None),
    ],
)
def test_room_is_filled_exactly_by_one_or_two_items(lengths, room, expected):
    buffer = BestFitBuffer(100)
    for length in lengths:
        buffer.add(length, length)
    assert buffer.pop_best(room) == expected


def test_conversation_is_split_into_consecutive_pairs():
    ids, mask = [10, 11, 12, 13, 14, 15], [0, 0, 1, 1, 0, 1]
    assert split_conversation(ids, mask, 10, "assistant") == [([10, 11, 12, 13, 14], [-1, 12, 13, -1, 15])]
    assert split_conversation(ids, mask, 2, "assistant") == [([10, 11], [-1, 12]), ([12, 13], [13, -1]), ([14], [15])]
    assert split_conversation(ids, mask, 3, "all") == [([10, 11, 12], [11, 12, 13]), ([13, 14], [14, 15])]
    assert split_conversation([10], [1], 3, "all") == []


def render(conversation: list[int]):
    """A fake rendering: a conversation is the lengths of its chunks; chunks of odd length have no supervised token."""
    return [([n] * n, [n if n % 2 == 0 else -1] * n) for n in conversation]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 8), max_size=4), min_size=1, max_size=12), st.integers(1, 6))
def test_each_supervised_chunk_is_packed_once_per_epoch_and_rows_are_best_fit(lengths, buffer_size):
    expected = sorted(n for conversation in lengths for n in conversation if n % 2 == 0)
    packer = ConversationPacker(lengths, render, 8, 0, buffer_size, seed=1)
    if not expected:
        with pytest.raises(UserError, match=f"none of the {len(lengths)} conversations"):
            packer.next_row()
        return
    for epoch in (1, 2):
        packed, finished = [], (epoch - 1) * len(lengths)
        while packer.state()["finished"] < epoch * len(lengths):
            inputs, targets = packer.next_row()
            row = inputs[inputs > 0].tolist()
            assert (targets[: len(row)] == row).all() and (targets[len(row) :] == -1).all()
            assert all(len(ids) > 8 - len(row) for _, (ids, _) in packer.buffer)  # nothing more would have fitted
            state = packer.state()
            assert state["epoch"] == epoch and state["finished"] >= finished
            finished = state["finished"]
            packed += [n for n in set(row) for _ in range(row.count(n) // n)]
        assert sorted(packed) == expected
        assert packer.state()["skipped"] == epoch * sum(n % 2 for conversation in lengths for n in conversation)
