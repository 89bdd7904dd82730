"""The best-fit buffer against a plain list, and how conversations are split; test_dataloader.py tests the packers."""

from hypothesis import example, given
from hypothesis import strategies as st

from nanochat.packing import BestFitBuffer, split_conversation


def best_length(lengths: list[int], room: int) -> int | None:
    """Reference implementation of `pop_best`: the length that it chooses among `lengths`."""

    def longer_of_two(room):
        pairs = [(a, room - a) for a in lengths if a >= room - a]
        return min((a for a, b in pairs if b in lengths and lengths.count(a) > (a == b)), default=None)

    if room in lengths:
        return room
    return longer_of_two(room) or max((n for n in lengths if n <= room), default=None)


ACTIONS = st.sampled_from("add add best largest oldest shortest".split())


@example([("add", 2), ("add", 3), ("best", 4)], 12)  # a single 2 is not a pair
@given(st.lists(st.tuples(ACTIONS, st.integers(1, 12)), max_size=200), st.integers(1, 12))
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
        assert list(buffer) == plain and len(buffer) == len(plain)
        assert buffer.total == sum(length for length, _ in plain)


def test_conversation_is_split_into_consecutive_pairs():
    ids, mask = [10, 11, 12, 13, 14, 15], [0, 0, 1, 1, 0, 1]
    assert split_conversation(ids, mask, 10, "assistant") == [([10, 11, 12, 13, 14], [-1, 12, 13, -1, 15])]
    assert split_conversation(ids, mask, 2, "assistant") == [([10, 11], [-1, 12]), ([12, 13], [13, -1]), ([14], [15])]
    assert split_conversation(ids, mask, 3, "all") == [([10, 11, 12], [11, 12, 13]), ([13, 14], [14, 15])]
    assert split_conversation([10], [1], 3, "all") == []
