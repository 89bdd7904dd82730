"""A vocabulary survives the disk whole or is refused with a reason, and its file can never run anything."""

import copyreg
import io
import json
import os
import pickle
import subprocess

import pytest
import tiktoken

from nanochat.common import UserError
from nanochat.vocabulary import LEGACY_FILE, VOCABULARY_FILE, read_vocabulary, write_vocabulary

RANKS = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b"\xed\x95": 258}
PATTERN = r"\p{L}+|\P{L}+"
SPECIALS = {"<|bos|>": 259, "<|end|>": 300}


def test_round_trip(tmp_path):
    write_vocabulary(tmp_path / "new" / "folder", RANKS, PATTERN, SPECIALS)
    assert read_vocabulary(tmp_path / "new" / "folder") == (RANKS, PATTERN, SPECIALS)


def test_writing_again_replaces_the_file_and_leaves_nothing_else(tmp_path):
    write_vocabulary(tmp_path, RANKS, PATTERN, SPECIALS)
    write_vocabulary(tmp_path, RANKS, "other", SPECIALS)
    assert read_vocabulary(tmp_path)[1] == "other"
    assert [path.name for path in tmp_path.iterdir()] == [VOCABULARY_FILE]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_vocabulary(tmp_path, RANKS, PATTERN, SPECIALS)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", disk_full)
    with pytest.raises(OSError):
        write_vocabulary(tmp_path, RANKS, "other", SPECIALS)
    assert read_vocabulary(tmp_path) == (RANKS, PATTERN, SPECIALS)
    assert [path.name for path in tmp_path.iterdir()] == [VOCABULARY_FILE]


def test_none_there_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match="tok_train"):
        read_vocabulary(tmp_path)


def cut(data):
    return data[: len(data) // 2]


def change_a_token(data):
    return data.replace(b'"dGhl"', b'"dGhm"')  # "the" -> "thf"


def change_the_pattern(data):
    return data.replace(b"L}+|", b"L}*|")


def forget_the_tokens(data):
    contents = json.loads(data)
    del contents["tokens"]
    return json.dumps(contents).encode()


def not_text(data):
    return b"\xff\xfe" + data


def a_list(data):
    return b"[1, 2]"


def nothing(data):
    return b""


@pytest.mark.parametrize(
    "damage", [cut, change_a_token, change_the_pattern, forget_the_tokens, not_text, a_list, nothing]
)
def test_damage_is_noticed(tmp_path, damage):
    write_vocabulary(tmp_path, RANKS, PATTERN, SPECIALS)
    path = tmp_path / VOCABULARY_FILE
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with pytest.raises(UserError, match="cannot be used") as error:
        read_vocabulary(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "ranks, specials, reason",
    [
        ({token: id for token, id in RANKS.items() if token != b"\x00"}, SPECIALS, "256 bytes"),
        (RANKS | {b"zz": 261}, SPECIALS, "are not 0 to"),
        (RANKS | {b"zz": 258}, SPECIALS, "are not 0 to"),
        (RANKS, {"<|bos|>": 5}, "share ids"),
        (RANKS, {"<|bos|>": 259, "<|end|>": 259}, "share ids"),
        (RANKS, {"<|bos|>": "259"}, "share ids"),
    ],
)
def test_what_is_no_vocabulary_is_refused(tmp_path, ranks, specials, reason):
    """Through the pickle, whose ids are written out and could be anything."""
    save_pickle(tmp_path, ranks=ranks, specials=specials)
    with pytest.raises(UserError, match=reason):
        read_vocabulary(tmp_path)


# -----------------------------------------------------------------------------
# The legacy pickle


def encoding_pickle(state):
    """The bytes of a tiktoken Encoding pickled as tiktoken does it, but with a state of our choice."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            if isinstance(value, tiktoken.Encoding):
                return copyreg.__newobj__, (tiktoken.Encoding,), state
            return NotImplemented

    buffer = io.BytesIO()
    Pickler(buffer, protocol=4).dump(object.__new__(tiktoken.Encoding))
    return buffer.getvalue()


def save_pickle(folder, ranks=RANKS, specials=SPECIALS):
    state = {"name": "x", "pat_str": PATTERN, "mergeable_ranks": ranks, "special_tokens": specials}
    (folder / LEGACY_FILE).write_bytes(encoding_pickle(state))


def test_a_pickled_tiktoken_encoding_loads(tmp_path):
    encoding = tiktoken.Encoding("x", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens=SPECIALS)
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):  # before 3, even bytes are pickled as a call
        (tmp_path / LEGACY_FILE).write_bytes(pickle.dumps(encoding, protocol))
        assert read_vocabulary(tmp_path) == (RANKS, PATTERN, SPECIALS)


def test_our_own_file_comes_before_the_legacy_one(tmp_path):
    save_pickle(tmp_path, specials={})
    write_vocabulary(tmp_path, RANKS, PATTERN, SPECIALS)
    assert read_vocabulary(tmp_path)[2] == SPECIALS


class Hostile:
    """What unpickles into a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, protocol):
    traces = [tmp_path / f"trace{i}" for i in range(4)]
    hostiles = [
        Hostile(os.mkdir, str(traces[0])),
        Hostile(subprocess.call, ["touch", str(traces[1])]),
        Hostile(eval, f"open({str(traces[2])!r}, 'w')"),
        Hostile(getattr, tiktoken.Encoding, "__init__"),
        {"name": "x", "mergeable_ranks": Hostile(os.mkdir, str(traces[3]))},
    ]
    for hostile in hostiles:
        (tmp_path / LEGACY_FILE).write_bytes(pickle.dumps(hostile, protocol))
        with pytest.raises(UserError, match="refused"):
            read_vocabulary(tmp_path)
    pickle.loads(pickle.dumps(hostiles[0], protocol))
    assert traces[0].exists(), "the pickle of this test does harm where nothing stops it"
    assert not any(trace.exists() for trace in traces[1:])


def test_code_hidden_in_the_state_of_an_encoding_is_refused(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / LEGACY_FILE).write_bytes(encoding_pickle({"pat_str": Hostile(os.mkdir, str(trace))}))
    with pytest.raises(UserError, match="refused"):
        read_vocabulary(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("state", ["gpt2", None, {}, {"mergeable_ranks": {}}, 5])
def test_an_encoding_of_another_state_is_refused_without_a_look_at_the_network(tmp_path, state):
    """tiktoken itself would fetch "gpt2" when it finds a name for a state."""
    (tmp_path / LEGACY_FILE).write_bytes(encoding_pickle(state))
    with pytest.raises(UserError, match="cannot be used"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("data", [b"", b"hello", pickle.dumps([1, 2]), pickle.dumps(None), b"\x80\x04\x95\xff"])
def test_other_pickles_and_no_pickles_are_refused(tmp_path, data):
    (tmp_path / LEGACY_FILE).write_bytes(data)
    with pytest.raises(UserError, match="cannot be used"):
        read_vocabulary(tmp_path)
