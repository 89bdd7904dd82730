"""The best-fit buffer against a plain list; test_dataloader.py tests the packers."""

from operator import itemgetter

from hypothesis import example, given
from hypothesis import strategies as st

from nanochat.packing import BestFitBuffer


def best_length(lengths: list[int], room: int) -> int | None:
    """Reference implementation of `pop_best`: the length that it chooses among `lengths`."""

    def longer_of_two(room):
        pairs = [(a, room - a) for a in lengths if a >= room - a]
        return min((a for a, b in pairs if b in lengths and lengths.count(a) > (a == b)), default=None)

    if room in lengths:
        return room
    return longer_of_two(room) or max((n for n in lengths if n <= room), default=None)


ACTIONS = st.sampled_from("add add best oldest shortest".split())


@example([("add", 2), ("add", 3), ("best", 4)])  # a single 2 is not a pair
@given(st.lists(st.tuples(ACTIONS, st.integers(1, 12)), max_size=200))
def test_buffer_equals_a_plain_list(actions):
    buffer, plain = BestFitBuffer(), []  # plain: (length, name), oldest first
    for name, (action, number) in enumerate(actions):
        if action == "add":
            buffer.add(number, (number, name))
            plain.append((number, name))
            continue
        if action == "best":
            popped = buffer.pop_best(number)
            length = best_length([p[0] for p in plain], number)
            expected = next((p for p in plain if p[0] == length), None)
        elif plain:
            popped = buffer.pop_oldest() if action == "oldest" else buffer.pop_shortest()
            expected = plain[0] if action == "oldest" else min(plain, key=itemgetter(0))
        else:
            continue
        assert popped == expected
        if expected:
            plain.remove(expected)
        assert list(buffer) == plain and len(buffer) == len(plain)
