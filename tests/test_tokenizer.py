"""The tokenizer against a slow, obvious byte-pair encoder, and its limits: bytes, streams, threads, files, errors."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import regex
import requests
import rustbpe
from hypothesis import given, settings, strategies as st
from tiktoken_ext import openai_public

from nanochat import tokenizer as module
from nanochat.common import UserError
from nanochat.tokenizer import MAX_BLANKS, SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
from scripts.tok_train import capped

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
assigned = st.characters(exclude_categories=("Cs", "Cn"))
texts = st.one_of(
    st.text(assigned, max_size=60),
    st.text(st.sampled_from("ab'sS \t\n\r\u3000019é한🙂<|>the"), max_size=80),
    st.lists(st.sampled_from([*TEXTS[:3], *SPECIAL_TOKENS, "the", " ", "\n\n"]), max_size=4).map("".join),
)


def encode_slowly(ranks, text):
    """The reference implementation of encoding with `regex`.

    A word's id if it is a token; else merge, again and again, the neighbours of the lowest rank.
    """
    ids = []
    for word in map(str.encode, regex.findall(SPLIT_PATTERN, text)):
        parts = [word] if word in ranks else [bytes([byte]) for byte in word]
        while ranked := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_a_vocabulary_of_an_impossible_size_is_refused_with_the_possible_one():
    with pytest.raises(UserError, match=r"at most (\d+) tokens, not 5000") as error:
        RustBPETokenizer.train_from_iterator(iter(["the cat sat"]), 5000)
    possible = int(str(error.value).split("at most ")[1].split()[0])
    assert RustBPETokenizer.train_from_iterator(iter(["the cat sat"]), possible).get_vocab_size() == possible
    with pytest.raises(UserError, match="265"):
        RustBPETokenizer.train_from_iterator(iter(["text"]), 264)
    with pytest.raises(TypeError, match="not one text"):
        RustBPETokenizer.train_from_iterator("a text", 300)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_encoding_equals_the_reference_and_decodes_to_the_same_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == encode_slowly(tokenizer.ranks, text)
    assert tokenizer.encode([text, "x"])[0] == ids, "rustbpe encodes lists, tiktoken single texts"
    assert tokenizer.decode(ids) == text


class Published:
    """The part of our rustbpe that the published package of that name has, too."""

    def __init__(self, ours=rustbpe.Tokenizer):
        self.train_from_iterator = (tokenizer := ours()).train_from_iterator
        self.get_mergeable_ranks = tokenizer.get_mergeable_ranks


def test_without_our_rustbpe_the_tokens_are_the_same_and_a_line_says_so(tokenizer, monkeypatch, capsys):
    many = [text * (i % 50) for i, text in enumerate(TEXTS * 10)] + ["a\ud800b", " " * (MAX_BLANKS + 5) + "x"]
    ids, offsets = tokenizer.encode_to_numpy(many)
    monkeypatch.setattr(rustbpe, "Tokenizer", Published)
    fallback = RustBPETokenizer.train_from_iterator(iter(TEXTS), VOCAB_SIZE)
    assert fallback._bulk_encoder is None and "bash dev/setup.sh" in capsys.readouterr().out
    assert fallback.fingerprint() == tokenizer.fingerprint()
    fallback_ids, fallback_offsets = fallback.encode_to_numpy(many)
    assert fallback_ids.dtype == ids.dtype and fallback_offsets.dtype == offsets.dtype
    assert fallback_ids.tolist() == ids.tolist() and fallback_offsets.tolist() == offsets.tolist()


def test_batches_equal_single_texts_with_any_number_of_threads(tokenizer):
    many = [text * (i % 50) + str(i) for i, text in enumerate(TEXTS * 100)]  # enough for threads
    with ThreadPoolExecutor(8) as pool:  # one tokenizer in several threads
        single = list(pool.map(tokenizer, many))
    for num_threads in (1, 2, 1000):
        assert tokenizer.encode(many, num_threads=num_threads) == single
    assert tokenizer.encode([]) == [] and tokenizer.encode([""]) == [[]]


def test_prepend_and_append_by_id_or_name(tokenizer):
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    plain = tokenizer.encode("the end")
    assert (bos, end) == (VOCAB_SIZE - 9, VOCAB_SIZE - 5), "the special tokens are the last"
    assert tokenizer.encode("the end", prepend=bos, append="<|assistant_end|>") == [bos, *plain, end]
    assert tokenizer.encode(["the end", ""], prepend="<|bos|>", append=end) == [[bos, *plain, end], [bos, end]]
    with pytest.raises(ValueError, match="<|bos|>"):
        tokenizer.encode("x", prepend="<|nothing|>")


def test_surrogate_pairs_are_joined_and_lone_surrogates_replaced(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude42b")) == "a🙂b"
    assert tokenizer.encode(["a\ud800b", "a\ufffdb"]) == [tokenizer.encode("a\ufffdb")] * 2
    lone, mended = (RustBPETokenizer.train_from_iterator(iter([f"ab{c}ab"] * 3), 267) for c in "\ud800\ufffd")
    assert lone.ranks == mended.ranks


@pytest.mark.parametrize("run", [" ", "\u3000", " \n", "é", "words" + " " * 1000])
def test_runs_of_a_million_characters_are_encoded(tokenizer, run):
    """Of blanks they would make tiktoken panic. Only runs of blanks are split."""
    text = run * (1_000_001 // len(run)) + "x"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode([text, "x"]) == [ids, tokenizer.encode("x")]
    if run.strip():
        assert ids == tokenizer.encoding.encode_ordinary(text)


def test_each_token_has_its_bytes_and_their_number(tokenizer):
    """Tokens that are part of a character count their own bytes, not those of the U+FFFD that they are shown as."""
    for id in range(VOCAB_SIZE):
        assert tokenizer.id_to_bytes(id).decode(errors="replace") == tokenizer.id_to_token(id) == tokenizer.decode([id])
    assert tokenizer.id_to_token(0xC3) == "\ufffd" and tokenizer.id_to_token(VOCAB_SIZE - 9) == "<|bos|>"
    for decode in (tokenizer.id_to_bytes, lambda id: tokenizer.decode([id])):
        with pytest.raises(KeyError):
            decode(VOCAB_SIZE)
    lengths = tokenizer.token_bytes().tolist()
    assert lengths == [len(tokenizer.id_to_bytes(id)) for id in range(VOCAB_SIZE - 9)] + [0] * 9


def test_a_saved_tokenizer_is_loaded_unchanged(tokenizer, base_dir):
    with pytest.raises(UserError, match="tok_train"):
        module.get_tokenizer()
    tokenizer.save(base_dir / "tokenizer")
    loaded = module.get_tokenizer()
    assert loaded.fingerprint() == tokenizer.fingerprint() and loaded.get_special_tokens() == set(SPECIAL_TOKENS)
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert module.get_token_bytes().tolist() == tokenizer.token_bytes().tolist()


@pytest.mark.parametrize("damage, message", [
    (lambda contents: "{", "cannot be used"),
    (lambda contents: "{}", "KeyError.*pattern"),
    (lambda contents: json.dumps({**contents, "pattern": "."}), "its checksum does not match"),
    (lambda contents: "[" * 200_000, "RecursionError"),
    (lambda contents: contents | {"pattern": "("}, "parenthesis"),
    (lambda contents: contents | {"tokens": [*contents["tokens"], ""]}, "a token has no bytes"),
    (lambda contents: contents | {"special_tokens": {"<|bos|>": 2**31 - 1}}, "ids above 2,097,151"),
])  # fmt: skip
def test_a_damaged_vocabulary_is_refused(tokenizer, tmp_path, damage, message):
    tokenizer.save(tmp_path)
    path = tmp_path / module.VOCABULARY_FILE
    damaged = damage(json.loads(path.read_text()))
    if isinstance(damaged, dict):  # to which a checksum that fits is added
        body = {name: damaged[name] for name in ("pattern", "special_tokens", "tokens")}
        damaged = json.dumps({**body, "sha256": module._checksum(body)})
    path.write_text(damaged)
    with pytest.raises(UserError, match=message):
        RustBPETokenizer.from_directory(tmp_path)


def test_a_published_vocabulary(tokenizer, monkeypatch, tmp_path):
    """It may have gaps between special ids, as GPT-4's, and a pattern that only tiktoken can read."""
    specials = {"<|endoftext|>": VOCAB_SIZE - 9, "<|endofprompt|>": VOCAB_SIZE + 5}
    parts = {"mergeable_ranks": tokenizer.ranks, "pat_str": r"\x{68}e|(?s:.)", "special_tokens": specials}
    monkeypatch.setitem(openai_public.ENCODING_CONSTRUCTORS, "gpt2", lambda: parts)
    gpt2 = RustBPETokenizer.from_pretrained("gpt2")
    assert gpt2.encode("the") == [ord("t"), tokenizer.ranks[b"he"]] == gpt2.encode(["the"])[0]
    assert gpt2.get_bos_token_id() == VOCAB_SIZE - 9
    assert gpt2.get_vocab_size() == VOCAB_SIZE + 6 == len(gpt2.token_bytes())
    gpt2.save(tmp_path)
    assert RustBPETokenizer.from_directory(tmp_path).special_tokens == specials
    with pytest.raises(UserError, match="'gpt17' cannot be fetched"):
        RustBPETokenizer.from_pretrained("gpt17")


@pytest.mark.parametrize("constructor, cause", [
    (partial(requests.get, "http://127.0.0.1:9"), "ConnectionError"), (partial(time.sleep, 1), "TimeoutError"),
])  # fmt: skip
def test_a_published_vocabulary_out_of_reach_is_reported(monkeypatch, constructor, cause):
    monkeypatch.setattr(module, "DOWNLOAD_TIMEOUT", 0.5)
    monkeypatch.setitem(openai_public.ENCODING_CONSTRUCTORS, "gpt2", constructor)
    with pytest.raises(UserError, match=f"'gpt2' cannot be fetched by tiktoken .{cause}"):
        RustBPETokenizer.from_pretrained("gpt2")


def test_tok_train_caps_documents_and_characters():
    read = {"documents": 0, "characters": 0}
    assert list(capped(iter(["abcdef", "gh", "ijkl", "m"]), 3, 8, read)) == ["abc", "gh", "ijk"]
    assert read == {"documents": 3, "characters": 8}
