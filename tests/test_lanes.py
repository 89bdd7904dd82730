"""Lanes: the number of ranks changes nothing, another number of lanes loses nothing, and shares are fair."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataloader import BOS, LENGTHS, PACKED, STREAM, WordTokenizer, make_conversations, supervised, trained, write_corpus

from nanochat import lanes
from nanochat.common import Compute, UserError
from nanochat.dataloader import conversation_data_loader
from nanochat.lanes import merge_states
from nanochat.loss_eval import share_of


def open_packed(folder):
    return lambda **kwargs: PACKED(WordTokenizer(), 2, 8, "train", device="cpu", source=folder, buffer_size=5, **kwargs)


def open_stream(folder):
    return lambda **kwargs: STREAM(WordTokenizer(), 2, 8, "train", device="cpu", source=folder, **kwargs)


def open_conversations(folder):
    kinds = dict(supervise="all", device="cpu", buffer_size=3)
    chats = make_conversations([(2 + 7 * i % 19, 1) for i in range(23)])
    return lambda **kwargs: conversation_data_loader(chats, WordTokenizer(), 2, 7, **kinds, **kwargs)


def take_steps(open_loader, n, world_size, count, resume=None):
    """n times (the micro-batches of a step over all ranks, in order; the merged state after it)."""
    kwargs = dict(world_size=world_size, lanes=count, resume_state_dict=resume)
    loaders = [open_loader(rank=rank, **kwargs) for rank in range(world_size)]
    steps = []
    for _ in range(n):
        micro = [next(loaders[i % world_size]) for i in range(count)]
        state = merge_states([state for _, _, state in micro[-world_size:]])  # the newest of each rank, in any order
        steps.append(([(x.tolist(), y.tolist()) for x, y, _ in micro], json.loads(json.dumps(state))))
    for loader in loaders:
        loader.close()
    return steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, LENGTHS)
    return str(folder)


@pytest.mark.parametrize("opener", [open_packed, open_stream, open_conversations])
@pytest.mark.parametrize("count, world_sizes", [(6, (1, 2, 3)), (4, (1, 3, 4))])
def test_the_number_of_ranks_changes_no_batch_nor_a_resume(corpus, opener, count, world_sizes):
    steps = {w: take_steps(opener(corpus), 12, w, count) for w in world_sizes}
    first = steps[world_sizes[0]]
    assert all(of == first for of in steps.values())
    assert first[-1][1]["epoch"] > 1
    for before, after in [(2, 0), (1, 2), (0, 1)]:  # which of the numbers of ranks saves, which resumes
        for stop in (1, 4, 9):
            state = steps[world_sizes[before]][stop - 1][1]
            assert take_steps(opener(corpus), 3, world_sizes[after], count, state) == first[stop : stop + 3]


class NumberedTokenizer:
    """A document "d n" is n tokens: 100 d + 1, 100 d + 2, ... So each is recognised."""

    def get_bos_token_id(self):
        return BOS

    def encode_to_numpy(self, texts, num_threads):
        rows = [range(100 * d + 1, 100 * d + n + 1) for d, n in (map(int, text.split()) for text in texts)]
        return np.array([id for ids in rows for id in ids], np.uint32), np.cumsum([0, *map(len, rows)])


legs = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=3)
legs = legs.map(lambda legs: [(min(w, count), count, n) for w, count, n in legs])  # (world size, lanes, steps)


@settings(max_examples=40, deadline=None)
@given(legs, st.lists(st.integers(1, 24), min_size=40, max_size=60), st.integers(1, 9), st.booleans())
def test_documents_dealt_anew_are_neither_lost_nor_seen_twice(legs, lengths, buffer_size, packed):
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(2):
            texts = [f"{d} {n}" for d, n in enumerate(lengths) if d // 30 == shard]
            pq.write_table(pa.table({"text": texts}), f"{folder}/{shard}.parquet", row_group_size=7)
        pq.write_table(pa.table({"text": ["0 1"]}), f"{folder}/9.parquet")
        kwargs = dict(device="cpu", source=folder, buffer_size=buffer_size, tokenizer_batch_size=2)

        def open_loader(**more):
            return (PACKED if packed else STREAM)(NumberedTokenizer(), 2, 8, "train", **kwargs, **more)

        seen, state = Counter(), None
        for world_size, count, n in chain(legs, repeat((1, 1, 4))):  # at the end one lane goes on ...
            if state and count == state["lanes"] == 1 and not state["deals"]:  # ... until all that was dealt is passed
                break
            for micro, state in take_steps(open_loader, n, world_size, count, state):
                rows = [row + target[-1:] if packed else row for x, y in micro for row, target in zip(x, y)]
                seen.update(token for row in rows for token in row if token != BOS)
    epoch, *place = state["streams"]["0"]["next"]
    read = Counter({d: epoch - 1 + ([d // 30, d % 30 // 7, d % 30 % 7] < place) for d in range(len(lengths))})
    begun = Counter({d: seen[100 * d + 1] for d in range(len(lengths))})
    if packed:
        for _, shard, group, row, start in state["streams"]["0"]["buffer"]:
            d = 30 * shard + 7 * group + row
            seen.update(range(100 * d + start + 1, 100 * d + lengths[d] + 1))
        assert seen == +Counter({100 * d + i: read[d] for d, n in enumerate(lengths) for i in range(1, n + 1)})
    else:  # what a batch had cut began again, and the last document is under way
        assert not read - begun
        assert (begun - read).total() <= sum(count for _, count, _ in legs) + 1


@settings(max_examples=40, deadline=None)
@given(legs, st.lists(st.integers(2, 30), min_size=8, max_size=30), st.integers(1, 9), st.integers(1, 9))
def test_conversations_dealt_anew_are_neither_lost_nor_seen_twice(legs, lengths, T, buffer_size):
    conversations = make_conversations([(n, 1) for n in lengths])

    def open_loader(**more):
        kinds = dict(supervise="all", device="cpu", buffer_size=buffer_size)
        return conversation_data_loader(conversations, WordTokenizer(), 1, T, **kinds, **more)

    seen, state, finished = Counter(), None, 0

    def tally(micro, state) -> None:
        nonlocal finished
        seen.update(pair for x, y in micro for pair in trained(torch.tensor(x), torch.tensor(y)).elements())
        assert state["finished"] >= finished
        finished = state["finished"]

    for world_size, count, n in legs:
        steps = take_steps(open_loader, n, world_size, count, state)
        for step in steps:
            tally(*step)
        state = steps[-1][1]
    loader = open_loader(rank=0, world_size=1, lanes=1, resume_state_dict=state)
    for x, y, state in islice(loader, 5000):  # with one lane, until an epoch ends and all that was dealt is passed
        tally([(x.tolist(), y.tolist())], state)
        if not merge_states([state])["deals"] and not state["streams"]["0"]["buffer"] and finished % len(lengths) == 0:
            break
    loader.close()
    epochs = finished // len(lengths)
    assert epochs == state["epoch"]
    assert seen == Counter({pair: epochs for pair in supervised(conversations, "all")})


def test_lanes_that_lack_a_state_are_refused(corpus):
    one = next(open_packed(corpus)(rank=1, world_size=2, lanes=4))[2]
    with pytest.raises(AssertionError, match="lanes 1, 3 are here, of 4"):
        merge_states([one])
    with pytest.raises(AssertionError, match="merge_states of all ranks"):
        open_packed(corpus)(rank=0, world_size=2, lanes=4, resume_state_dict=one)
    with pytest.raises(AssertionError, match="merge_states of all ranks"):
        open_packed(corpus)(rank=0, world_size=1, lanes=1, resume_state_dict=one)
    with pytest.raises(AssertionError, match="rank 2 of 3 has none of the 2 lanes"):
        next(open_packed(corpus)(rank=2, world_size=3, lanes=2))  # to have such a loader is fine, as for a small measurement
    with pytest.raises(UserError, match="older version"):
        open_packed(corpus)(resume_state_dict={"next": [1, 0, 0, 0], "buffer": [], "rank": 0, "world_size": 1})


def test_the_lanes_of_a_rank_read_a_row_group_once(tmp_path, monkeypatch):
    write_corpus(tmp_path, LENGTHS * 8, row_group_size=20, shard_size=200)
    reads = Counter()

    def counting(path, group):
        reads[group] += 1
        return read_row_group(path, group)

    read_row_group = lanes.read_row_group
    monkeypatch.setattr(lanes, "read_row_group", counting)
    *_, (_, state) = take_steps(open_packed(str(tmp_path)), 6, 1, 8)
    assert len(reads) > 4 and set(reads.values()) == {1}
    reads.clear()
    take_steps(open_packed(str(tmp_path)), 1, 1, 8, state)  # also those in which documents wait
    assert set(reads.values()) == {1}


def test_the_texts_that_are_kept_are_bounded_and_those_used_last_stay(tmp_path):
    write_corpus(tmp_path, [2] * 40, row_group_size=4, shard_size=40)  # a word each, of one or two figures
    groups = lanes.RowGroups([tmp_path / "000.parquet"], keep=20)
    for group in (1, 2, 3, 1, 4):
        assert len(groups.read(0, group)) == 4
        assert groups.size == sum(len(text) for texts in groups.kept.values() for text in texts) <= 20
    assert list(groups.kept) == [(0, 3), (0, 1), (0, 4)]
    assert len(lanes.RowGroups([tmp_path / "000.parquet"], keep=0).read(0, 9)) == 4


class Recorder:
    """Stands for `Lanes` of one lane; nothing was read before."""

    def __init__(self, lane, count):
        self.lanes, self.streams = count, {str(lane): {"next": [1, 0, 0, 0]}}

    def was_read(self, place, number):
        return False


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), row_group_size=st.integers(1, 50),
       count=st.integers(1, 40), at_a_time=st.integers(1, 9))  # fmt: skip
def test_lanes_share_every_shard_fairly_even_if_they_are_more_than_documents(sizes, row_group_size, count, at_a_time):
    """In each epoch every document is in one lane; of a shard no lane has two more than another; over epochs all get some."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{shard}.parquet" for shard in range(len(sizes))]
        for path, size in zip(paths, sizes):
            pq.write_table(pa.table({"text": ["text"] * size}), path, row_group_size=row_group_size)
        groups, seen = lanes.RowGroups(paths), {}
        for lane in range(count):
            documents, seen[lane] = lanes.Documents(groups, lane, Recorder(lane, count), list, at_a_time), []
            while documents.next_place[0] <= 3:
                chunk = documents.read()
                assert len({place[0] for place, _ in chunk}) == 1 and len(chunk) <= at_a_time
                seen[lane] += [place for place, _ in chunk]
    everything = {(e, s, r // row_group_size, r % row_group_size) for e in (1, 2, 3) for s, n in enumerate(sizes) for r in range(n)}
    assert sorted(sum(seen.values(), [])) == sorted(everything)
    for epoch in (1, 2, 3):
        for shard in range(len(sizes)):
            shares = [sum(place[:2] == (epoch, shard) for place in places) for places in seen.values()]
            assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("opener", [open_packed, open_conversations])
def test_more_lanes_than_there_is_to_read(tmp_path, opener):
    """Three documents for seven lanes: each lane gets its turn in some epoch, and all of them are read equally often."""
    write_corpus(tmp_path, [5, 6, 7])
    steps = take_steps(opener(str(tmp_path)), 30, 3, 40 if opener is open_conversations else 7)
    assert steps[-1][1]["epoch"] > 1


def test_the_buffer_fills_however_few_rows_a_group_has(tmp_path):
    """Best fit needs a choice: with more lanes than rows in a group too."""
    write_corpus(tmp_path, [3 + i % 7 for i in range(400)], row_group_size=4, shard_size=400)
    loader = PACKED(WordTokenizer(), 2, 8, "train", device="cpu", source=str(tmp_path), lanes=16, rank=0, world_size=16, buffer_size=12)
    *_, (_, _, state) = islice(loader, 4)
    loader.close()
    assert len(state["streams"]["0"]["buffer"]) >= 10


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 64), st.integers(64, 10**4))
def test_a_measurement_finds_text_in_every_lane(documents, row_group_size, tokens):
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), [4] * documents, row_group_size, shard_size=documents)
        count, steps = share_of(tokens, documents, 2, 8, Compute(torch.device("cpu"), torch.float32))
        options = dict(device="cpu", source=folder, rank=0, world_size=1, lanes=count, buffer_size=10)
        loader = PACKED(WordTokenizer(), 2, 8, "train", **options)
        assert len(list(islice(loader, min(steps, 70)))) == min(steps, 70)
        loader.close()
