"""The best-fit buffer against a list, and conversations dealt out once per epoch."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.packing import BestFitBuffer, Conversations, split_conversation

FRESH = {"epoch": 1, "progress": 0.0, "read": 0, "buffer": [], "skipped": 0, "rank": 0, "world_size": 1}


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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 8), max_size=4), min_size=1, max_size=12), st.integers(1, 6))
def test_each_supervised_piece_is_packed_once_per_epoch_and_rows_are_best_fit(lengths, buffer_size):
    expected = sorted(n for conversation in lengths for n in conversation if n % 2 == 0)
    conversations = Conversations(lengths, pieces_of, 0, 1, 42, buffer_size, FRESH)
    if not expected:
        with pytest.raises(UserError, match=f"none of the {len(lengths)} conversations"):
            conversations.next_row(8)
        return
    for epoch in (1, 2):
        packed, progress = [], epoch - 1
        while conversations.state()["progress"] < epoch:
            row = [len(inputs) for inputs, _ in conversations.next_row(8)]
            assert 1 <= sum(row) <= 8
            left = 8 - sum(row)
            assert all(len(inputs) > left for _, _, inputs, _ in conversations.buffer)  # nothing more would have fitted
            assert conversations.state()["epoch"] == epoch
            assert conversations.state()["progress"] >= progress
            progress = conversations.state()["progress"]
            packed += row
        assert sorted(packed) == expected
        assert conversations.state()["progress"] == epoch
        assert conversations.state()["skipped"] == epoch * sum(n % 2 for conversation in lengths for n in conversation)


def test_epochs_differ_in_order_and_a_seed_repeats_it():
    def order(seed):
        conversations = Conversations([[32 + 2 * n] for n in range(1, 9)], pieces_of, 0, 1, seed, 1, FRESH)
        return [len(conversations.next_row(64)[0][0]) for _ in range(16)]

    assert order(1) == order(1) != order(2)
    assert order(1)[:8] != order(1)[8:]
    assert sorted(order(1)[:8]) == sorted(order(1)[8:])
