"""The best-fit buffer against a list, and conversations dealt out once per epoch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.packing import BestFitBuffer, Conversations, split_conversation

FRESH = {"next": [1, 0], "buffer": [], "finished": 0, "skipped": 0}


@given(st.lists(st.tuples(st.sampled_from(["add", "add", "largest", "oldest", "shortest"]), st.integers(1, 9))))
def test_the_buffer_does_what_a_plain_list_does(actions):
    buffer, plain = BestFitBuffer(), []  # plain: (length, name), oldest first
    for name, (action, number) in enumerate(actions):
        if action == "add":
            buffer.add(number, (number, name))
            plain.append((number, name))
            continue
        if action == "largest":
            popped = buffer.pop_largest(number)
            expected = max((p for p in plain if p[0] <= number), key=lambda p: p[0], default=None)
        elif plain:
            popped = buffer.pop_oldest() if action == "oldest" else buffer.pop_shortest()
            expected = plain[0] if action == "oldest" else min(plain, key=lambda p: p[0])
        else:
            continue
        assert popped == expected
        if expected:
            plain.remove(expected)
        assert list(buffer) == plain
        assert len(buffer) == len(plain)


def test_a_conversation_is_split_into_consecutive_pairs():
    ids, mask = [10, 11, 12, 13, 14, 15], [0, 0, 1, 1, 0, 1]
    assert split_conversation(ids, mask, 10, "assistant") == [([10, 11, 12, 13, 14], [-1, 12, 13, -1, 15])]
    assert split_conversation(ids, mask, 2, "assistant") == [([10, 11], [-1, 12]), ([12, 13], [13, -1]), ([14], [15])]
    assert split_conversation(ids, mask, 3, "all") == [([10, 11, 12], [11, 12, 13]), ([13, 14], [14, 15])]
    assert split_conversation([10], [1], 3, "all") == []


def pieces_of(conversation: tuple[int, ...]):
    """A stand-in for rendering: a conversation is its pieces' lengths; odd lengths have nothing supervised."""
    return [([n] * n, [n if n % 2 == 0 else -1] * n) for n in conversation]


def one_lane(dataset, buffer_size, lane=0, lanes=1, was_read=lambda place, index: False, state=FRESH):
    """Conversations of a lane; even epochs are read backwards."""
    def order(epoch):
        return list(range(len(dataset)))[:: 1 if epoch % 2 else -1]

    return Conversations(dataset, pieces_of, order, lane, lanes, was_read, buffer_size, state)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 8), max_size=4), min_size=1, max_size=12), st.integers(1, 6))
def test_each_supervised_piece_is_packed_once_per_epoch_and_rows_are_best_fit(lengths, buffer_size):
    expected = sorted(n for conversation in lengths for n in conversation if n % 2 == 0)
    conversations = one_lane(lengths, buffer_size)
    if not expected:
        with pytest.raises(UserError, match=f"none of the {len(lengths)} conversations"):
            conversations.next_row(8)
        return
    for epoch in (1, 2):
        packed, finished = [], (epoch - 1) * len(lengths)
        while conversations.state()["finished"] < epoch * len(lengths):
            row = [len(inputs) for inputs, _ in conversations.next_row(8)]
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
    lengths = [[2 * n] for n in range(1, 8)]
    rows = {}
    for lane in range(3):
        conversations = one_lane(lengths, 1, lane, lanes=3)
        shares = [len(lengths[(lane - epoch) % 3 :: 3]) for epoch in (1, 2)]
        rows[lane] = [len(conversations.next_row(2)[0][0]) for _ in range(sum(shares))]
    assert rows == {0: [6, 12, 10, 4], 1: [2, 8, 14, 12, 6], 2: [4, 10, 14, 8, 2]}


def test_a_conversation_may_wait_from_two_epochs():
    state = {"next": [2, 1], "buffer": [[1, 0, 0], [2, 0, 0]], "finished": 5, "skipped": 0}  # after another deal
    conversations = one_lane([[2]], 1, state=state)
    assert conversations.state() == state
    for finished in (6, 7, 8):
        assert len(conversations.next_row(2)) == 1
        assert conversations.state()["finished"] == finished


def test_what_was_read_is_left_out_even_a_whole_epoch():
    conversations = one_lane([[2], [4], [6]], 1, was_read=lambda place, number: place < [2, 1] and number - place[0] != 1)
    rows = [[len(inputs) for inputs, _ in conversations.next_row(6)] for _ in range(4)]
    assert rows == [[4], [4, 2], [2, 4], [6]]  # epochs 1, 2 (backwards, without the last) and 3
    conversations = one_lane([[2]], 1, was_read=lambda place, number: place < [9, 0])
    assert len(conversations.next_row(6)) == 1 and conversations.state()["next"] == [9, 1]
