"""The tokenizer against a slow, clear byte-pair encoder, and its corners: bytes, streams, threads, errors."""

import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import regex
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import tokenizer as module
from nanochat.common import UserError
from nanochat.tokenizer import MAX_BLANKS, SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer, StreamDecoder

VOCAB_SIZE = 420
TEXTS = [
    "It's the end of the world as we know it, and I'll say we're fine. They'd said so; I'VE said so.",
    "the theme of the thesis: there are 12 or 345 or 2024 theories, 3.14159 and 10% of them hold",
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\r\n\r\n  # trailing   \n" * 3,
    "한국어를 배우는 것은 재미있다. 日本語も。 Ça va, naïve café? Привет, мир! مرحبا 👩‍🚀🙂" * 3,
    "<|bos|> is written here as text, and so is <|user_start|>",
    "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(iter(TEXTS), VOCAB_SIZE)


# Characters assigned for long enough that every library knows whether they are letters, and no surrogates.
characters = st.characters(exclude_categories=("Cs", "Cn"))
texts = st.one_of(
    st.text(characters, max_size=60),
    st.text(st.sampled_from("ab'sS \t\n\r\u3000019é한🙂<|>the"), max_size=80),
    st.lists(st.sampled_from([*TEXTS[:3], *SPECIAL_TOKENS, "the", " ", "\n\n"]), max_size=4).map("".join),
)


def slow_encode(ranks, text):
    """Byte-pair encoding as one would explain it: in each word join, again and again, the pair learned first."""
    ids = []
    for word in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            ranked = [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]
            if not ranked:
                break
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def count_pairs(words):
    """How often each pair of neighbours occurs; `words` is a list of (parts, how often the word occurs)."""
    pairs = Counter()
    for parts, count in words:
        for pair in zip(parts, parts[1:]):
            pairs[pair] += count
    return pairs


def join_pair(words, pair):
    for parts, _ in words:
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == pair:
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            i += 1


# -----------------------------------------------------------------------------
# Training


def test_every_merge_learnt_is_a_most_frequent_pair(tokenizer):
    """Training by brute force. Ties may be broken either way, so it follows the merges and checks each."""
    counts = Counter(word for text in TEXTS for word in regex.findall(SPLIT_PATTERN, text))
    words = [([bytes([byte]) for byte in word.encode()], count) for word, count in counts.items()]
    for token in sorted(tokenizer.ranks, key=tokenizer.ranks.get)[256:]:
        pairs = count_pairs(words)
        most = max(pairs.values())
        learned = [pair for pair, count in pairs.items() if count == most and pair[0] + pair[1] == token]
        assert learned, f"{token} is not a most frequent pair"
        join_pair(words, learned[0])


def test_vocabulary_is_bytes_then_merges_then_specials(tokenizer):
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    assert [tokenizer.ranks[bytes([byte])] for byte in range(256)] == list(range(256))
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert tokenizer.get_special_tokens() == set(SPECIAL_TOKENS)
    assert tokenizer.get_bos_token_id() == VOCAB_SIZE - 9


def test_training_twice_gives_the_same(tokenizer):
    again = RustBPETokenizer.train_from_iterator((text for text in TEXTS), VOCAB_SIZE)
    assert again.ranks == tokenizer.ranks


def test_vocabulary_larger_than_the_text_supports_says_what_is_possible():
    with pytest.raises(UserError, match=r"at most (\d+) tokens, not 5000") as error:
        RustBPETokenizer.train_from_iterator(iter(["the cat sat"]), 5000)
    possible = int(str(error.value).split("at most ")[1].split()[0])
    assert RustBPETokenizer.train_from_iterator(iter(["the cat sat"]), possible).get_vocab_size() == possible
    with pytest.raises(UserError):
        RustBPETokenizer.train_from_iterator(iter(["the cat sat"]), possible + 1)


def test_smallest_vocabulary_is_bytes_and_specials():
    bare = RustBPETokenizer.train_from_iterator(iter([]), 265)
    assert bare.encode("é") == [0xC3, 0xA9]
    with pytest.raises(UserError, match="265"):
        RustBPETokenizer.train_from_iterator(iter(["text"]), 264)


def test_an_error_in_the_text_source_is_not_swallowed():
    def broken():
        yield "some text"
        raise UserError("the shard is damaged")

    with pytest.raises(UserError, match="shard is damaged"):
        RustBPETokenizer.train_from_iterator(broken(), 265)


# -----------------------------------------------------------------------------
# Encoding


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_encoding_equals_the_slow_encoder_and_decodes_to_the_same_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == slow_encode(tokenizer.ranks, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()


def test_encoding_agrees_with_rustbpe(tokenizer):
    learner = rustbpe.Tokenizer()
    learner.train_from_iterator(iter(TEXTS), VOCAB_SIZE - 9, pattern=SPLIT_PATTERN)

    @settings(max_examples=300, deadline=None)
    @given(text=texts)
    def agree(text):
        assert tokenizer.encode(text) == learner.encode(text)

    agree()


class Published:
    """What the published package called rustbpe can do; it stands in for ours where there is no Rust."""

    def __init__(self, everything=rustbpe.Tokenizer):
        self._tokenizer = everything()

    def train_from_iterator(self, iterator, vocab_size, buffer_size=8192, pattern=None):
        self._tokenizer.train_from_iterator(iterator, vocab_size, pattern=pattern)

    def get_mergeable_ranks(self):
        return self._tokenizer.get_mergeable_ranks()


def test_without_our_rustbpe_the_tokens_are_the_same(tokenizer, monkeypatch):
    many = [text * (i % 50) for i, text in enumerate(TEXTS * 10)] + ["a\ud800b", " " * (MAX_BLANKS + 5) + "x"]
    ids, offsets = tokenizer.encode_to_numpy(many)
    monkeypatch.setattr(rustbpe, "Tokenizer", Published)
    fallback = RustBPETokenizer.train_from_iterator(iter(TEXTS), VOCAB_SIZE)
    assert fallback._bulk_encoder is None and fallback.fingerprint() == tokenizer.fingerprint()
    fallback_ids, fallback_offsets = fallback.encode_to_numpy(many)
    assert fallback_ids.dtype == ids.dtype and fallback_offsets.dtype == offsets.dtype
    assert fallback_ids.tolist() == ids.tolist() and fallback_offsets.tolist() == offsets.tolist()
    assert fallback.encode(many, prepend="<|bos|>") == tokenizer.encode(many, prepend="<|bos|>")


def test_a_pattern_that_only_tiktoken_can_read():
    """A loaded vocabulary may have one; then tiktoken encodes lists, too, and nobody asks Python's `regex`."""
    pattern = r"\x{61}+|(?s:.)"
    with pytest.raises(regex.error):
        regex.compile(pattern)
    ranks = {**{bytes([byte]): byte for byte in range(256)}, b"aa": 256, b"ba": 257}
    tokenizer = RustBPETokenizer(ranks, pattern, {"<|bos|>": 258})
    assert tokenizer.encode(["aab", ""]) == [tokenizer.encode("aab"), []] == [[256, 98], []]


def test_split_pattern_on_what_it_was_made_for():
    assert regex.findall(SPLIT_PATTERN, "It's 12345 dogs,\n\n  ok!!\n") == [
        "It", "'s", " ", "12", "34", "5", " dogs", ",\n\n", " ", " ok", "!!\n",
    ]  # fmt: skip


def test_special_tokens_in_text_are_text(tokenizer):
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < VOCAB_SIZE - 9
        assert tokenizer.decode(ids) == f"a{name}b"


def test_batches_equal_single_texts(tokenizer):
    many = [text * (i % 50) + str(i) for i, text in enumerate(TEXTS * 100)]  # enough for threads
    single = [tokenizer.encode(text) for text in many]
    for num_threads in (1, 2, 8, 1000):
        assert tokenizer.encode(many, num_threads=num_threads) == single
    assert tokenizer.encode(tuple(many[:3])) == single[:3]
    assert tokenizer.encode([]) == []
    assert tokenizer.encode([""]) == [[]]
    assert tokenizer(many[3]) == single[3]
    assert tokenizer(many[:3]) == single[:3]


def test_prepend_and_append_by_id_or_name(tokenizer):
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    plain = tokenizer.encode("the end")
    assert tokenizer.encode("the end", prepend=bos, append="<|assistant_end|>") == [bos, *plain, end]
    assert tokenizer.encode(["the end", ""], prepend="<|bos|>", append=end) == [[bos, *plain, end], [bos, end]]
    with pytest.raises(ValueError, match="<|bos|>"):
        tokenizer.encode("x", prepend="<|nothing|>")


@pytest.mark.parametrize("wrong", [b"bytes", None, 5, {"a": 1}])
def test_what_is_no_text_is_refused(tokenizer, wrong):
    with pytest.raises(TypeError):
        tokenizer.encode(wrong)
    with pytest.raises(TypeError):
        tokenizer.encode(["text", wrong])


def test_surrogates_become_what_utf8_can_hold(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude42b")) == "a🙂b"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode(["a\ud800b"]) == [tokenizer.encode("a\ufffdb")]
    lone, mended = (RustBPETokenizer.train_from_iterator(iter([f"ab{c}ab"] * 3), 267) for c in "\ud800\ufffd")
    assert lone.ranks == mended.ranks


@pytest.mark.parametrize("blank", [" ", "\u3000", " \n", "é"])
def test_enormous_runs_are_encoded(tokenizer, blank):
    """A run of a million blanks makes tiktoken panic; nothing that a person pastes may."""
    text = blank * 1_000_001 + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode([text, "x"]) == [tokenizer.encode(text), tokenizer.encode("x")]


def test_long_text_without_enormous_runs_is_encoded_as_ever(tokenizer):
    text = ("some words" + " " * 1000 + "\n") * 200
    assert len(text) > MAX_BLANKS
    assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)


def test_one_tokenizer_in_many_threads(tokenizer):
    expected = [tokenizer.encode(text) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: [tokenizer.encode(text) for text in TEXTS], range(200)))
    assert all(result == expected for result in results)


# -----------------------------------------------------------------------------
# Decoding


def test_tokens_one_by_one(tokenizer):
    for id in range(VOCAB_SIZE):
        assert tokenizer.id_to_bytes(id) == tokenizer.decode_bytes([id])
        assert tokenizer.id_to_token(id) == tokenizer.decode([id])
    assert tokenizer.id_to_token(0xC3) == "\ufffd"
    assert tokenizer.id_to_token(tokenizer.get_bos_token_id()) == "<|bos|>"
    for outside in (VOCAB_SIZE, -1):
        with pytest.raises(KeyError):
            tokenizer.id_to_bytes(outside)
    with pytest.raises(KeyError):
        tokenizer.decode([VOCAB_SIZE])


@settings(max_examples=500, deadline=None)
@given(
    ids=st.lists(st.one_of(st.integers(0, VOCAB_SIZE - 1), st.sampled_from([*b"\xe2\x82\xac\xf0\x9f\xed\xa0 a"])))
)
def test_stream_decoder_equals_decoding_the_whole(tokenizer, ids):
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_byte_lengths_are_right_for_every_token(tokenizer):
    """Tokens that are part of a character count their own bytes, not those of the U+FFFD they show as."""
    lengths = tokenizer.token_bytes().tolist()
    assert len(lengths) == VOCAB_SIZE
    assert lengths == [len(tokenizer.decode_bytes([id])) for id in range(VOCAB_SIZE - 9)] + [0] * 9
    assert lengths[0xC3] == 1
    for text in TEXTS:
        assert sum(lengths[id] for id in tokenizer.encode(text, prepend="<|bos|>")) == len(text.encode())


# -----------------------------------------------------------------------------
# Files, published vocabularies, imports


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = RustBPETokenizer.from_directory(tmp_path)
    assert (loaded.ranks, loaded.pattern, loaded.special_tokens) == (
        tokenizer.ranks,
        SPLIT_PATTERN,
        tokenizer.special_tokens,
    )
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_get_tokenizer_and_token_bytes(tokenizer, base_dir):
    import torch

    with pytest.raises(UserError, match="tok_train"):
        module.get_tokenizer()
    tokenizer.save(base_dir / "tokenizer")
    assert module.get_tokenizer().ranks == tokenizer.ranks
    token_bytes = module.get_token_bytes()
    assert token_bytes.dtype == torch.int32 and token_bytes.device.type == "cpu"
    assert token_bytes.tolist() == tokenizer.token_bytes().tolist()


def publish(monkeypatch, constructor):
    from tiktoken_ext import openai_public

    monkeypatch.setitem(openai_public.ENCODING_CONSTRUCTORS, "gpt2", constructor)


def test_published_vocabulary(tokenizer, monkeypatch, tmp_path):
    """Special ids of published vocabularies may leave gaps, as GPT-4's do."""
    specials = {"<|endoftext|>": VOCAB_SIZE - 9, "<|endofprompt|>": VOCAB_SIZE + 5}
    parts = {"mergeable_ranks": tokenizer.ranks, "pat_str": SPLIT_PATTERN, "special_tokens": specials}
    publish(monkeypatch, lambda: {"name": "gpt2", "explicit_n_vocab": VOCAB_SIZE, **parts})
    gpt2 = RustBPETokenizer.from_pretrained("gpt2")
    assert gpt2.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert gpt2.get_bos_token_id() == VOCAB_SIZE - 9
    assert gpt2.get_vocab_size() == VOCAB_SIZE + 6 == len(gpt2.token_bytes())
    gpt2.save(tmp_path)
    assert RustBPETokenizer.from_directory(tmp_path).special_tokens == specials
    with pytest.raises(UserError, match="gpt2"):
        RustBPETokenizer.from_pretrained("gpt17")


def test_published_vocabulary_out_of_reach(monkeypatch):
    import requests

    def unreachable():
        raise requests.exceptions.ConnectionError("Failed to resolve")

    publish(monkeypatch, unreachable)
    with pytest.raises(UserError, match="'gpt2' cannot be fetched.*ConnectionError"):
        RustBPETokenizer.from_pretrained("gpt2")


def test_a_silent_network_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT", 0.05)
    release = threading.Event()
    publish(monkeypatch, release.wait)
    with pytest.raises(UserError, match="cannot be fetched"):
        RustBPETokenizer.from_pretrained("gpt2")
    release.set()


def test_conversations_through_the_real_tokenizer(tokenizer):
    conversation = {"messages": [{"role": "user", "content": "<|bos|>?"}, {"role": "assistant", "content": "the"}]}
    ids, mask = tokenizer.render_conversation(conversation)
    special = {name: tokenizer.encode_special(f"<|{name}|>") for name in ("bos", "assistant_start", "assistant_end")}
    assert ids.count(special["bos"]) == 1, "a user cannot write a control token"
    learned = [id for id, m in zip(ids, mask) if m]
    assert learned == [*tokenizer.encode("the"), special["assistant_end"]]
    prompt = tokenizer.render_for_completion(conversation)
    assert prompt[-1] == special["assistant_start"]
    assert prompt + learned == ids
    assert len(tokenizer.render_conversation(conversation, max_tokens=3)[0]) == 3

    shown = tokenizer.visualize_tokenization(ids, mask)
    assert shown.count("\033[92m") == sum(mask) and shown.count("\033[91m") == len(mask) - sum(mask)
    assert "\033[92m<|assistant_end|>" in shown and "\033[91m<|bos|>" in shown


def test_importing_is_light():
    code = (
        "import sys, nanochat.tokenizer;"
        "heavy = [name for name in ('torch', 'rustbpe', 'tiktoken', 'requests', 'datasets') if name in sys.modules];"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -----------------------------------------------------------------------------
# The scripts


@pytest.fixture
def folder_of_text(tmp_path):
    """A source of one's own: two shards, one to train on and one to validate on."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(2):
        table = pyarrow.table({"text": [f"{text} number {n}" for n, text in enumerate(TEXTS * 5)]})
        pyarrow.parquet.write_table(table, folder / f"shard_{i}.parquet")
    return str(folder)


def test_tok_train_and_tok_eval(base_dir, folder_of_text, monkeypatch, capsys):
    import json

    from scripts import tok_eval, tok_train

    tok_train.main(["--source", folder_of_text, "--vocab-size", "400", "--max-chars", "2e3", "--doc-cap", "100"])
    assert module.get_tokenizer().get_vocab_size() == 400
    assert "2,000 characters" in capsys.readouterr().out

    def unreachable():
        raise OSError("no network")

    publish(monkeypatch, unreachable)
    from tiktoken_ext import openai_public

    parts = {"mergeable_ranks": module.get_tokenizer().ranks, "pat_str": SPLIT_PATTERN, "special_tokens": {}}
    monkeypatch.setitem(openai_public.ENCODING_CONSTRUCTORS, "cl100k_base", lambda: parts)
    tok_eval.main(["--source", folder_of_text])
    out = capsys.readouterr().out
    assert "left out GPT-2" in out and "GPT-4" in out
    for name in ("news", "Korean", "code", "math", "science", "train", "val"):
        assert f"\n{name} " in out

    lines = [json.loads(line) for line in (base_dir / "report" / "report.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines] == ["Tokenizer training", "Tokenizer evaluation"]
    assert lines[0]["data"]["characters"] == 2000


def test_tok_eval_goes_on_without_text_and_without_networks(tokenizer, base_dir, monkeypatch, capsys):
    from scripts import tok_eval

    tokenizer.save(base_dir / "tokenizer")
    monkeypatch.setattr(tok_eval, "BASELINES", {})
    tok_eval.main([])
    out = capsys.readouterr().out
    assert "left out the train text" in out and "left out the val text" in out and "\nKorean " in out


def test_tok_train_caps_documents_and_characters():
    from scripts.tok_train import capped

    read = {"documents": 0, "characters": 0}
    assert list(capped(iter(["abcdef", "gh", "ijkl", "m"]), 3, 8, read)) == ["abc", "gh", "ijk"]
    assert read == {"documents": 3, "characters": 8}


@pytest.mark.parametrize(
    "flags, message", [(["--vocab-size", "100000"], "at most"), (["--max-chars", "0"], "max-chars")]
)
def test_tok_train_mistakes(base_dir, folder_of_text, flags, message):
    from scripts import tok_train

    with pytest.raises(UserError, match=message):
        tok_train.main(["--source", folder_of_text, *flags])
    assert not (base_dir / "tokenizer").exists()
