"""Who reads what: the lanes that documents and conversations are dealt to, and a lane's walk over its documents.

The one idea to know: the micro-batches of an optimizer step are numbered over all ranks, and number
i of every step comes from lane i, a stream over its own share of the data. Which ranks serve which
lanes changes nothing, so a run sees the same batches on any number of ranks. Where reading stands in
each lane, and which documents wait in its packing buffer, is small and plain (JSON), and resumes it.

Nothing here knows of tensors or tokens: dataloader.py makes batches of what is read here.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Callable, Iterable, Iterator

from nanochat.common import UserError, ranks
from nanochat.dataset import read_row_group, row_counts

KEPT = 2**26  # characters of text that stay in memory for the other lanes


class Lanes:
    """The lanes that one rank serves: where each stands, and what lanes of an earlier deal have read before.

    Rank r of W serves the lanes r, r + W, ... in turn. Whatever is dealt out has a number in each epoch, one more
    in the next, and belongs to lane number % lanes; a lane walks its share in order of place. So even of fewer
    documents than lanes every lane gets some. A state of as many lanes goes on exactly. Of another number, each
    new lane begins where the least advanced of the old ones stood, and leaves out what its old lane has read, of
    which `deals` keeps the record; what waited in the buffer of old lane i waits in that of new lane i % lanes.
    """

    def __init__(self, lanes: int | None, rank: int | None, world_size: int | None, state: dict | None, fresh: dict):
        """`fresh` is how a lane begins: "next" is the place it reads next, the rest is for what makes its batches."""
        launched_rank, _, launched_world_size = ranks()
        rank = launched_rank if rank is None else rank
        world_size = launched_world_size if world_size is None else world_size
        self.lanes = world_size if lanes is None else lanes
        assert 0 <= rank < world_size
        self.place = f"rank {rank} of {world_size}"
        mine = [str(lane) for lane in range(rank, self.lanes, world_size)]
        if state is None:
            state = {"lanes": self.lanes, "streams": dict.fromkeys(mine, {**fresh, "batches": 0}), "deals": []}
        elif "lanes" not in state:
            raise UserError("this checkpoint is of an older version, which noted its place in the data in a way that "
                            "is not read any more. Start this stage again.")
        elif state["lanes"] != self.lanes:
            state = self._deal_anew(state, fresh)
        assert set(mine) <= state["streams"].keys(), "the state is of other lanes: use merge_states of all ranks'"
        self.deals = state["deals"]
        self.streams = {lane: state["streams"][lane] for lane in mine}

    def _deal_anew(self, state: dict, fresh: dict) -> dict:
        assert len(state["streams"]) == state["lanes"], "the state is of some lanes: use merge_states of all ranks'"
        old = [state["streams"][str(lane)] for lane in range(state["lanes"])]
        places = [stream["next"] for stream in old]
        streams = {}
        for lane in range(self.lanes):
            stream = streams[str(lane)] = {**fresh, "batches": 0, "next": min(places)}
            for key in {"buffer", "finished", "skipped"} & fresh.keys():
                stream[key] = sum((other[key] for other in old[lane :: self.lanes]), fresh[key])
            stream.get("buffer", []).sort()  # the oldest first
        return {"streams": streams, "deals": [*state["deals"], {"lanes": state["lanes"], "next": places}]}

    def was_read(self, place: Iterable[int], number: int) -> bool:
        """Whether a lane of an earlier deal has read what has this number and is at this place."""
        return any(list(place) < deal["next"][number % deal["lanes"]] for deal in self.deals)

    def batches(self, made: dict[str, Iterator[tuple]]) -> Iterator[tuple]:
        """Of each lane's batches the next, in turn, with the state of all lanes of this rank."""
        assert self.streams, f"{self.place} has none of the {self.lanes} lanes"
        while True:
            lane = min(self.streams, key=lambda lane: self.streams[lane]["batches"])
            inputs, targets, after = next(made[lane])
            self.streams[lane] = {**after, "batches": self.streams[lane]["batches"] + 1}
            yield inputs, targets, {"lanes": self.lanes, "deals": self.deals, **_summary(self.streams)}


def _summary(streams: dict[str, dict]) -> dict:
    """The states of some lanes; the epoch that they are all in or past, and their sums where they count."""
    counted = {"finished", "skipped"}.intersection(*streams.values())
    sums = {key: sum(stream[key] for stream in streams.values()) for key in sorted(counted)}
    return {"epoch": min(stream["next"] for stream in streams.values())[0], **sums, "streams": dict(streams)}


def merge_states(states: list[dict]) -> dict:
    """The states of all ranks as one, which a loader on any rank of any number resumes.

    What stands in it does not depend on the number of ranks. Records of earlier deals that every
    lane has passed are left out.
    """
    lanes = states[0]["lanes"]
    known = {lane: stream for state in states for lane, stream in state["streams"].items()}
    assert len(known) == lanes, f"the states of lanes {', '.join(known)} are here, of {lanes}"
    streams = {str(lane): known[str(lane)] for lane in range(lanes)}
    least = min(stream["next"] for stream in streams.values())
    deals = [deal for deal in states[0]["deals"] if least < max(deal["next"])]
    return {**states[0], **_summary(streams), "deals": deals}


# -----------------------------------------------------------------------------
# Documents

Place = tuple[int, int, int, int]  # (epoch from 1, number of the shard, of the row group in it, of the row in that)


class RowGroups:
    """The texts of the row groups of some shards. The latest are kept, because lanes read the same ones in turn."""

    def __init__(self, paths: list[Path], keep: int = KEPT):
        """`keep`: how many characters may stay in memory, besides the row group that was read last."""
        self.paths, self.keep = paths, keep
        self.counts: dict[int, list[int]] = {}
        self.kept: dict[tuple[int, int], list[str]] = {}  # the one that was used last stands last
        self.size = 0

    def rows(self, shard: int) -> list[int]:
        """How many rows each row group of a shard has; of a shard that is not there, none."""
        if shard not in self.counts:
            self.counts[shard] = row_counts(self.paths[shard]) if shard < len(self.paths) else []
        return self.counts[shard]

    def read(self, shard: int, group: int) -> list[str]:
        texts = self.kept.pop((shard, group), None)
        if texts is None:
            texts = read_row_group(self.paths[shard], group)
            self.size += sum(map(len, texts))
        self.kept[shard, group] = texts
        while self.size > self.keep and len(self.kept) > 1:
            self.size -= sum(map(len, self.kept.pop(next(iter(self.kept)))))
        return texts

    def read_again(self, places: Iterable[list[int]]) -> Iterator[list[tuple[Place, str]]]:
        """The documents at these places (more numbers may follow in each), those of one row group at a time."""
        for (shard, group), there in groupby(sorted(places, key=lambda p: p[1:]), key=lambda p: p[1:3]):
            texts = self.read(shard, group) if group < len(self.rows(shard)) else []
            there = [tuple(place) for place in there]
            if there[-1][3] >= len(texts):
                raise UserError(
                    f"the data has changed: document {there[-1][3]} in row group {group} of shard {shard}, which this "
                    f"run has to read again, is not in {self.paths[0].parent}. Put the shards back as they were."
                )
            yield [(place, texts[place[3]]) for place in there]


class Documents:
    """An endless walk over the documents of one lane, a few at a time, as `encode` makes them.

    `next_place` is where the next `read` begins, so a walk that starts there goes on exactly like this one.
    """

    def __init__(self, groups: RowGroups, lane: int, lanes: Lanes, encode: Callable, at_a_time: int):
        self.groups, self.lane, self.lanes = groups, lane, lanes
        self.encode, self.at_a_time = encode, at_a_time
        self.walk = self._walk(*lanes.streams[str(lane)]["next"])
        self.ahead = next(self.walk)

    @property
    def next_place(self) -> Place:
        return self.ahead[0][0]

    def read(self) -> list:
        """`encode` of the next documents, [(place, text), ...], all of one epoch."""
        documents, self.ahead = self.ahead, next(self.walk)
        return self.encode(documents)

    def _walk(self, epoch: int, shard: int, group: int, row: int) -> Iterator[list[tuple[Place, str]]]:
        barren = 0  # epochs in a row without a document for this lane
        while True:
            found, unread = False, []
            for shard in range(shard, len(self.groups.paths)):
                for group in range(group, len(self.groups.rows(shard))):
                    for place, number, text in self._share(epoch, shard, group, row):
                        found = True
                        if not self.lanes.was_read(place, number):
                            unread.append((place, text))
                    while len(unread) >= self.at_a_time:
                        yield unread[: self.at_a_time]
                        unread = unread[self.at_a_time :]
                    row = 0
                group = 0
            if unread:
                yield unread
            barren = 0 if found else barren + 1
            if barren > self.lanes.lanes:
                raise UserError(f"no document with text in {len(self.groups.paths)} shard(s) of {self.groups.paths[0].parent}")
            epoch, shard = epoch + 1, 0

    def _share(self, epoch: int, shard: int, group: int, row: int) -> Iterator[tuple[Place, int, str]]:
        """This lane's documents of a row group, from `row` on, each with its number.

        Rows are numbered through each shard. Shard and epoch are added, so that where there are few rows they fall to
        other lanes in the next shard and in the next epoch.
        """
        counts, lanes = self.groups.rows(shard), self.lanes.lanes
        number = epoch + shard + sum(counts[:group])  # of the group's first row
        first = row + (self.lane - number - row) % lanes
        if first < counts[group]:
            texts = self.groups.read(shard, group)
            for row in range(first, len(texts), lanes):
                if texts[row]:
                    yield (epoch, shard, group, row), number + row, texts[row]
