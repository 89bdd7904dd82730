"""The packers, through the loaders, against brute force: no token is lost, every supervised token once per epoch."""

import tempfile
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shard
from hypothesis import given, settings, strategies as st

from nanochat import dataloader, packing
from nanochat.common import UserError

BOS = 0
# Lengths of documents, at least one with text; what `make_conversations` takes
corpora = st.lists(st.integers(1, 25), min_size=1, max_size=30).filter(lambda lengths: max(lengths) > 1)
chats = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 12)), min_size=1, max_size=12)


class WordTokenizer:
    """One token per word, and words are numbers. Conversations are (ids, mask) already."""

    def get_bos_token_id(self):
        return BOS

    def fingerprint(self):
        return "words"

    def encode_to_numpy(self, texts, num_threads=8):
        rows = [[int(word) for word in text.split()] for text in texts]
        return np.array([id for ids in rows for id in ids], np.uint16), np.cumsum([0, *map(len, rows)])

    def render_conversation(self, conversation, max_tokens=2048):
        assert max_tokens is None
        return conversation


def write_corpus(folder, lengths, row_group_size=4, shard_size=10):
    """Documents of `lengths` tokens, bos included, that no other document has, and a val shard. Returns their ids."""
    documents, word = [], 1
    for length in lengths:
        documents.append(list(range(word, word + length - 1)))
        word += length - 1
    shards = [documents[i : i + shard_size] for i in range(0, len(documents), shard_size)] + [[[7, 7, 7]]]
    for number, shard in enumerate(shards):
        write_shard(folder / f"{number:03d}.parquet", [" ".join(map(str, ids)) for ids in shard], row_group_size)
    return [[BOS, *ids] for ids in documents]


def make_conversations(shapes):
    """(tokens, period of the assistant's tokens; 0: none) -> ids that no other conversation has, and the mask."""
    made, first = [], 1
    for length, every in shapes:
        made.append((list(range(first, first + length)), [int(every > 0 and i % every == 0) for i in range(length)]))
        first += length
    return made


def packed(folder, B=2, T=8, split="train", device="cpu", **kwargs):
    loader = dataloader.tokenizing_distributed_data_loader_with_state_bos_bestfit
    return loader(WordTokenizer(), B, T, split, device=device, source=str(folder), **kwargs)


stream = partial(packed, buffer_size=0)


def conversations(dataset, B=1, T=4, supervise="assistant", **kwargs):
    return dataloader.conversation_data_loader(dataset, WordTokenizer(), B, T, supervise=supervise, device="cpu", **kwargs)


def take(loader, n):
    taken = list(islice(loader, n))
    loader.close()
    return taken


# -----------------------------------------------------------------------------
# Documents


def best_length(lengths, room):
    """Reference implementation of `pop_best`: the length that it chooses among `lengths`."""

    def longer_of_two(room):
        pairs = [(a, room - a) for a in lengths if a >= room - a]
        return min((a for a, b in pairs if b in lengths and lengths.count(a) > (a == b)), default=None)

    if room in lengths:
        return room
    return longer_of_two(room) or max((n for n in lengths if n <= room), default=None)


def brute_force_rows(documents, n, T, buffer_size, chunk_size):
    """Reference implementation of the packing rule, with lists that are searched from the front."""
    texts = [ids for ids in documents if len(ids) > 1]
    chunks = [texts[i : i + chunk_size] for i in range(0, len(texts), chunk_size)]
    buffer, read, rows = [], 0, []  # buffer: (epoch, ids), oldest first
    for _ in range(n):
        row = []
        while len(row) < T:
            oldest = min((epoch for epoch, _ in buffer), default=read)
            if len(buffer) < buffer_size and read // len(chunks) <= oldest + 1:
                buffer += [(read // len(chunks), ids) for ids in chunks[read % len(chunks)]]
                read += 1
            room, lengths = T + 1 - len(row), [len(ids) for _, ids in buffer]
            best = best_length(lengths, room) or min(min(lengths), T + 2)
            number = next(i for i, n in enumerate(lengths) if min(n, T + 2) == best) if row else 0
            epoch, ids = buffer.pop(number)
            row += ids[:room]
            if len(ids) > room:
                buffer.append((epoch, [BOS, *ids[room:]]))
        rows.append(row + [BOS] * (T + 1 - len(row)))
    return rows


@settings(max_examples=60, deadline=None)
@given(corpora, st.integers(1, 12), st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
def test_packed_rows_equal_brute_force(lengths, T, B, buffer_size, chunk_size, row_group_size):
    with tempfile.TemporaryDirectory() as folder:
        documents = write_corpus(Path(folder), lengths, row_group_size)
        taken = take(packed(folder, B, T, tokenizer_batch_size=chunk_size, buffer_size=buffer_size), 12)
    assert {(x.dtype, y.dtype) for x, y, _ in taken} == {(torch.int32, torch.int64)}
    rows = brute_force_rows(documents, 12 * B, T, buffer_size, chunk_size)
    assert [row for inputs, _, _ in taken for row in inputs.tolist()] == [row[:-1] for row in rows]
    assert [row for _, targets, _ in taken for row in targets.tolist()] == [row[1:] for row in rows]


@settings(max_examples=25, deadline=None)
@given(corpora, st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))
def test_plain_stream_loses_no_token(lengths, T, B, chunk_size):
    with tempfile.TemporaryDirectory() as folder:
        documents = write_corpus(Path(folder), lengths)
        taken = take(stream(folder, B, T, tokenizer_batch_size=chunk_size), 12)
    once = [token for ids in documents if len(ids) > 1 for token in ids]
    endless = once * (12 * B * T // len(once) + 2)
    for name, shift in (("inputs", 0), ("targets", 1)):
        tokens = [token for batch in taken for token in batch[shift].flatten().tolist()]
        assert tokens == endless[shift : shift + 12 * B * T], name


def test_long_document_neither_blocks_the_others_nor_grows_the_state(tmp_path, monkeypatch):
    documents = write_corpus(tmp_path, [5, 4000, *[5 + i % 9 for i in range(300)]], shard_size=400)
    for long in (packing.LONG, 20):  # 20: the document alone is more than may wait
        monkeypatch.setattr(packing, "LONG", long)
        taken = take(packed(tmp_path, B=4, buffer_size=10, tokenizer_batch_size=5), 60)
        of_the_long = [[row[1] in documents[1] for row in inputs.tolist()] for inputs, _, _ in taken[1:]]
        assert all(sum(rows) < 4 for rows in of_the_long) and sum(map(sum, of_the_long)) > 5
        assert max(len(state["buffer"]) for _, _, state in taken) < (15 if long > 20 else packing.FEW + 5)


@pytest.mark.parametrize("loader", [packed, stream])
def test_data_without_text_is_refused(tmp_path, loader):
    write_corpus(tmp_path, [1, 1, 1])
    with pytest.raises(UserError, match="no document with text in 1 shard"):
        loader(tmp_path)


# -----------------------------------------------------------------------------
# Conversations


@settings(max_examples=60, deadline=None)
@given(chats, st.integers(1, 9), st.integers(1, 20), st.sampled_from(["assistant", "all"]))
def test_every_supervised_token_is_trained_on_once_per_epoch(shapes, T, buffer_size, supervise):
    dataset = make_conversations(shapes)
    triples = [triple for ids, mask in dataset for triple in zip(ids, ids[1:], mask[1:])]  # input, target, its mask
    expected = Counter((x, y) for x, y, mask in triples if supervise == "all" or mask)
    loader = conversations(dataset, 1, T, supervise, buffer_size=buffer_size)
    if not expected:
        with pytest.raises(UserError, match="none of the .* has a supervised token"):
            next(loader)
        return
    trained_on = {1: Counter(), 2: Counter()}
    for inputs, targets, state in loader:  # rows one by one; none holds chunks of two epochs
        padding = (inputs == BOS).squeeze(0)
        assert (targets != -1).any() and (targets.squeeze(0)[padding] == -1).all()
        assert padding.tolist() == sorted(padding.tolist())
        for _, index, chunk in state["buffer"]:  # nothing that waits would have fitted
            assert min(T, shapes[index][0] - 1 - chunk * T) > padding.sum()
        epoch = state["epoch"]
        unfinished = {index for _, index, _ in state["buffer"]}
        assert state["finished"] == (epoch - 1) * len(shapes) + state["next"][1] - len(unfinished)
        if epoch > 2:
            break
        pairs = zip(inputs.flatten().tolist(), targets.flatten().tolist())
        trained_on[epoch].update((x, y) for x, y in pairs if y != -1)
    loader.close()
    assert trained_on == {1: expected, 2: expected}


def test_epochs_differ_in_order_and_a_seed_repeats_it():
    def order(seed):
        return [x.item() for x, _, _ in take(conversations(make_conversations([(2, 1)] * 9), T=1, seed=seed), 18)]

    assert order(1) == order(1) != order(2)
    assert order(1)[:9] != order(1)[9:]
    assert sorted(order(1)[:9]) == sorted(order(1)[9:]) == list(range(1, 18, 2))
