"""The best-fit buffer against a list, and conversations dealt out once per epoch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.packing import BestFitBuffer, Conversations, split_conversation

FRESH = {"next": [1, 0], "buffer": [], "finished": 0, "skipped": 0}


def best_length(lengths: list[int], room: int) -> int | None:
    """The rule of `pop_best`, the slow way: the length that it takes of those that wait."""

    def longer_of_two(room):
        pairs = [(a, room - a) for a in lengths if a >= room - a]
        return min((a for a, b in pairs if b in lengths and lengths.count(a) > (a == b)), default=None)

    if room in lengths:
        return room
    return longer_of_two(room) or max((n for n in lengths if n <= room), default=None)


@given(
    st.lists(st.tuples(st.sampled_from(["add", "add", "best", "largest", "oldest", "shortest"]), st.integers(1, 40)), max_size=200),
    st.integers(1, 40),
)
def test_the_buffer_does_what_a_plain_list_does(actions, row):
    """But that it does not know which of two that are longer than a row is the shorter."""
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


def test_a_row_is_filled_exactly_by_one_or_two():
    def popped(lengths, room):
        buffer = BestFitBuffer(100)
        for length in lengths:
            buffer.add(length, length)
        return buffer.pop_best(room)

    assert popped([60, 50, 40, 30], 50) == 50
    assert popped([70, 60, 50, 40, 30], 100) == 60  # with 40, which is nearer to it than 70 and 30
    assert popped([50, 30, 90], 100) == 90  # 50 is there only once
    assert popped([50, 30, 90, 50], 100) == 50
    assert popped([85, 45, 40, 15], 100) == 85
    assert popped([80, 65, 25, 10], 100) == 80  # the largest, where no two do
    assert popped([101, 300], 100) is None


def test_a_conversation_is_split_into_consecutive_pairs():
    ids, mask = [10, 11, 12, 13, 14, 15], [0, 0, 1, 1, 0, 1]
    assert split_conversation(ids, mask, 10, "assistant") == [([10, 11, 12, 13, 14], [-1, 12, 13, -1, 15])]
    assert split_conversation(ids, mask, 2, "assistant") == [([10, 11], [-1, 12]), ([12, 13], [13, -1]), ([14], [15])]
    assert split_conversation(ids, mask, 3, "all") == [([10, 11, 12], [11, 12, 13]), ([13, 14], [14, 15])]
    assert split_conversation([10], [1], 3, "all") == []


def pieces_of(conversation: tuple[int, ...]):
    """A stand-in for rendering: a conversation is its pieces' lengths; odd lengths have nothing supervised."""
    return [([n] * n, [n if n % 2 == 0 else -1] * n) for n in conversation]


def one_lane(dataset, buffer_size, T, lane=0, lanes=1, was_read=lambda place, index: False, state=FRESH):
    """Conversations of a lane; even epochs are read backwards."""
    def order(epoch):
        return list(range(len(dataset)))[:: 1 if epoch % 2 else -1]

    return Conversations(dataset, pieces_of, order, lane, lanes, was_read, buffer_size, T, state)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 8), max_size=4), min_size=1, max_size=12), st.integers(1, 6))
def test_each_supervised_piece_is_packed_once_per_epoch_and_rows_are_best_fit(lengths, buffer_size):
    expected = sorted(n for conversation in lengths for n in conversation if n % 2 == 0)
    conversations = one_lane(lengths, buffer_size, 8)
    if not expected:
        with pytest.raises(UserError, match=f"none of the {len(lengths)} conversations"):
            conversations.next_row()
        return
    for epoch in (1, 2):
        packed, finished = [], (epoch - 1) * len(lengths)
        while conversations.state()["finished"] < epoch * len(lengths):
            row = [len(inputs) for inputs, _ in conversations.next_row()]
            assert 1 <= sum(row) <= 8
            left = 8 - sum(row)
            assert all(len(inputs) > left for _, (inputs, _) in conversations.buffer)  # nothing more would have fitted
            assert conversations.state()["next"][0] == epoch
            assert conversations.state()["finished"] >= finished
            finished = conversations.state()["finished"]
            packed += row
        assert sorted(packed) == expected
        assert conversations.state()["finished"] == epoch * len(lengths)
        assert conversations.state()["skipped"] == epoch * sum(n % 2 for conversation in lengths for n in conversation)


def test_a_lane_reads_its_share_in_the_order_of_the_epoch():
    """Lane l has the conversations l - epoch, l - epoch + 3, ...; the order of even epochs is backwards here."""
    lengths = [[2 * n] for n in range(8, 15)]  # no two fit into a row of 28
    rows = {}
    for lane in range(3):
        conversations = one_lane(lengths, 1, 28, lane, lanes=3)
        shares = [len(lengths[(lane - epoch) % 3 :: 3]) for epoch in (1, 2)]
        rows[lane] = [len(conversations.next_row()[0][0]) for _ in range(sum(shares))]
    assert rows == {0: [20, 26, 24, 18], 1: [16, 22, 28, 26, 20], 2: [18, 24, 28, 22, 16]}


def test_a_conversation_may_wait_from_two_epochs():
    state = {"next": [2, 1], "buffer": [[1, 0, 0], [2, 0, 0]], "finished": 5, "skipped": 0}  # after another deal
    conversations = one_lane([[2]], 1, 2, state=state)
    assert conversations.state() == state
    for finished in (6, 7, 8):
        assert len(conversations.next_row()) == 1
        assert conversations.state()["finished"] == finished


def test_what_was_read_is_left_out_even_a_whole_epoch():
    conversations = one_lane([[2], [4], [6]], 1, 6, was_read=lambda place, number: place < [2, 1] and number - place[0] != 1)
    rows = [[len(inputs) for inputs, _ in conversations.next_row()] for _ in range(4)]
    assert rows == [[4], [4, 2], [2, 4], [6]]  # epochs 1, 2 (backwards, without the last) and 3
    conversations = one_lane([[2]], 1, 6, was_read=lambda place, number: place < [9, 0])
    assert len(conversations.next_row()) == 1 and conversations.state()["next"] == [9, 1]
