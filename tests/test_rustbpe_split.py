"""Our rustbpe: character classes, words and ids, which must equal tiktoken's.

Three oracles: tiktoken, Python's `regex` for characters that both versions of Unicode know, and a slow byte-pair encoder.
tiktoken does not return words; with a token for every pair of bytes in random order, the ids show where words end.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import SPLIT_PATTERN

if not hasattr(rustbpe, "Counts"):
    pytest.skip("the published rustbpe is installed here, not ours", allow_module_level=True)

PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "gpt2 as released": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "rustbpe's default": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s+""",
    "o200k": r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "nanochat": SPLIT_PATTERN,
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
FLAGS = {  # bit of character_class: the characters that have it
    1: r"\p{L}",
    2: r"\p{N}",
    4: r"\s",
    8: r"[\r\n]",
    16: r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    32: r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
}
CODE_POINTS = [*range(0xD800), *range(0xE000, 0x110000)]  # all but surrogates, which no text has

BYTES = {bytes([byte]): byte for byte in range(256)}
# Every pair of bytes is a token, in random order
PAIRS = {bytes([i >> 8, i & 255]): 256 + int(rank) for i, rank in enumerate(np.random.default_rng(0).permutation(2**16))}

# Characters on which the patterns depend, which are rare in hypothesis' own texts
KINDS = {
    "blanks": " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u180e\u200b\ufeff",
    "contractions": ["'", "'", "’", *"sStTmMdDſaA 1", "ll", "Ll", "lL", "re", "RE", "vE", "Ve", "l", "r", "v", "\n"],
    "cases and marks": "aAzßǅᾈΑλʰªºـאه中ㄅ\u0301\u0903\u20dd\u1ab0 '1ſſK\u0295",
    "digits": "01239٣१৪Ⅷ½①๑𝟘²一 a.",
    "signs": "/!?.,…¿\"'-_$€+^`~🙂\u200d\ufe0f\U0001f3fd\r\n\n// aA1",
}
pieces = st.one_of([st.sampled_from(kind) for kind in KINDS.values()] + [st.sampled_from(["'s", " ", "a", "\n"])])
strange_texts = st.one_of(
    st.text(max_size=30),
    *(st.lists(st.sampled_from(kind), max_size=25).map("".join) for kind in KINDS.values()),
    st.lists(st.one_of(pieces, st.characters(codec="utf-8")), max_size=25).map("".join),
)
# Characters whose class is the same in all versions of Unicode: assigned, and not U+0295, which moved from Ll to Lo
agreed = st.characters(exclude_categories=("Cs", "Cn"), exclude_characters="\u0295")
agreed_texts = st.one_of(
    st.text(agreed, max_size=30),
    st.lists(st.one_of(pieces, agreed), max_size=25).map("".join).filter(lambda text: "\u0295" not in text),
)


def tiktoken_with(ranks, pattern):
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def words_by_regex(text, pattern):
    return [match[0].encode() for match in regex.finditer(pattern, text)]


def cut(text, ends):
    """The words of `text`, as bytes: cut("it's", [2, 4]) == [b"it", b"'s"]."""
    data, ends = text.encode(), [0, *map(int, ends)]
    return [data[begin:end] for begin, end in zip(ends, ends[1:])]


def slow_encode(ranks, word):
    """The word's id if it is a token; else merge the neighbours of the lowest rank, until none are left."""
    parts = [word] if word in ranks else [bytes([byte]) for byte in word]
    while ranked := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
        _, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


# -----------------------------------------------------------------------------
# Patterns and classes


def test_the_default_pattern_is_that_of_the_published_package():
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(["it's"], 257)
    assert tokenizer.get_pattern() == PATTERNS["rustbpe's default"]


def test_classes_are_those_of_tiktokens_regex_engine():
    text = "".join(map(chr, CODE_POINTS))
    expected = dict.fromkeys(CODE_POINTS, 0)
    for flag, pattern in FLAGS.items():
        encoding = tiktoken_with(BYTES, pattern)  # what a pattern does not match is left out
        for character in encoding.decode(encoding.encode_ordinary(text)):
            expected[ord(character)] |= flag
    wrong = [hex(c) for c in CODE_POINTS if rustbpe.character_class(c) != expected[c]]
    assert not wrong, f"{len(wrong)} code points, first {wrong[:5]}"


# -----------------------------------------------------------------------------
# Words


def test_words_of_an_example():
    """The ends count bytes, not characters."""
    assert rustbpe.word_ends("", PATTERNS["nanochat"]).tolist() == []
    for pattern, expected in [
        (PATTERNS["gpt2"], ["It", "'s", " 2024", ",", " né", "\n\n ", " ok", "!!", "\n"]),
        (PATTERNS["nanochat"], ["It", "'s", " ", "20", "24", ",", " né", "\n\n", " ", " ok", "!!\n"]),
        (PATTERNS["o200k"], ["It's", " ", "202", "4", ",", " né", "\n\n", " ", " ok", "!!\n"]),
    ]:
        text = "It's 2024, né\n\n  ok!!\n"
        ends = rustbpe.word_ends(text, pattern)
        assert isinstance(ends, np.ndarray) and ends.dtype == np.int64 and ends.ndim == 1
        assert cut(text, ends) == words_by_regex(text, pattern)
        assert cut(text, ends) == [word.encode() for word in expected]


@each_pattern
def test_words_are_those_of_regex(pattern):
    @settings(max_examples=120, deadline=None)
    @given(text=agreed_texts)
    def agree(text):
        assert cut(text, rustbpe.word_ends(text, pattern)) == words_by_regex(text, pattern)

    agree()


@each_pattern
def test_every_character_in_every_place(pattern):
    """Each character between letters, blanks, digits, line breaks and apostrophes. Han, Hangul, unassigned and private
    characters stand before a letter only, and only every 64th is tried for patterns other than nanochat's: it takes long."""
    few = [c for c in CODE_POINTS if c < 0x3400 or (0xA000 <= c < 0xAC00 or 0xD7A4 <= c < 0x20000 or c >= 0xE0000)]
    few = [c for c in few if c < 0x3400 or rustbpe.character_class(c)]
    many = CODE_POINTS if pattern == SPLIT_PATTERN else CODE_POINTS[::64]
    texts = ["".join(f"{chr(c)}a" for c in many[i : i + 2**12]) for i in range(0, len(many), 2**12)]
    for i in range(0, len(few), 2**10):
        characters = map(chr, few[i : i + 2**10])
        texts.append("".join(f"a{c}B{c} {c}1{c}\n{c}{c}'S{c}'{c}!{c}\n/{c}  {c}" for c in characters))
    ids, offsets = rustbpe.Tokenizer.from_ranks(BYTES | PAIRS, pattern).encode_to_numpy(texts)
    encoding = tiktoken_with(BYTES | PAIRS, pattern)
    for i, text in enumerate(texts):
        expected = encoding.encode_to_numpy(text, disallowed_special=())
        assert np.array_equal(ids[offsets[i] : offsets[i + 1]], expected), f"{text[:20]!r}... to ...{text[-20:]!r}"


# -----------------------------------------------------------------------------
# Ids


@each_pattern
def test_ids_are_tiktokens_on_any_unicode(pattern):
    """With trained ranks, and with a token for every pair of bytes."""
    trained = rustbpe.Tokenizer()
    strange = ["".join(kind) * 2 for kind in KINDS.values()]
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    trained.train_from_iterator([readme, *strange], 1500, pattern=pattern)
    tokenizers = (trained, rustbpe.Tokenizer.from_ranks(BYTES | PAIRS, pattern))
    pairs = [(tokenizer, tiktoken_with(dict(tokenizer.get_mergeable_ranks()), pattern)) for tokenizer in tokenizers]

    @settings(max_examples=100, deadline=None)
    @given(text=strange_texts)
    def agree(text):
        for tokenizer, encoding in pairs:
            ids = tokenizer.encode(text)
            assert ids == encoding.encode_ordinary(text)
            assert tokenizer.decode(ids) == text

    agree()


small_tokens = st.binary(min_size=2, max_size=6) | st.text("ab ", min_size=2, max_size=7).map(str.encode)


@settings(max_examples=120, deadline=None)
@given(
    tokens=st.lists(small_tokens, max_size=12, unique=True),
    numbers=st.randoms(use_true_random=False),
    texts=st.lists(st.text("ab ", max_size=15) | st.text(max_size=8), max_size=5),
)
def test_ids_of_any_ranks_are_those_of_the_reference(tokens, numbers, texts):
    """Tokens that no merges reach (a whole word may still be one), bytes with other ids than 0 to 255, gaps between ids."""
    ids = numbers.sample(range(2**30), 256 + len(tokens)) if numbers.random() < 0.5 else range(256 + len(tokens))
    ranks = dict(zip([*BYTES, *tokens], ids))
    pattern = PATTERNS["nanochat"]
    tokenizer, encoding = rustbpe.Tokenizer.from_ranks(ranks, pattern), tiktoken_with(ranks, pattern)
    assert tokenizer.get_mergeable_ranks() == sorted(ranks.items(), key=lambda item: item[1])
    assert tokenizer.get_pattern() == pattern
    for text in [*texts, *(token.decode(errors="replace") for token in tokens)]:
        words = cut(text, rustbpe.word_ends(text, pattern))
        actual = tokenizer.encode(text)
        assert actual == encoding.encode_ordinary(text) == [id for word in words for id in slow_encode(ranks, word)]
        assert tokenizer.decode(actual) == text


def test_a_token_that_merges_do_not_reach_is_used_for_whole_words_only():
    tokenizer = rustbpe.Tokenizer.from_ranks(BYTES | {b"hello": 300}, PATTERNS["cl100k"])
    assert tokenizer.encode("hello") == [300]
    assert tokenizer.encode("hellos") == [*b"hellos"]
    assert tokenizer.decode([300, 33]) == "hello!"


OTHERS = {
    "letters and the rest": r"\p{L}+|\P{L}+",
    "text that is left out": r"\p{L}+",
    "a group and a backreference": r"(\p{L})\1*|\s",
    "lookaround": r"(?<=a)b+|.(?!c)|[^b]",
    "nanochat's but for a space": SPLIT_PATTERN.replace("| ?", "|[ ]?"),
    "characters": r"(?s:.)",
}


@pytest.mark.parametrize("pattern", OTHERS.values(), ids=OTHERS)
def test_any_other_pattern_goes_through_regex(pattern):
    tokenizer, encoding = rustbpe.Tokenizer.from_ranks(BYTES | PAIRS, pattern), tiktoken_with(BYTES | PAIRS, pattern)

    @settings(max_examples=60, deadline=None)
    @given(text=agreed_texts | st.text("aabbc \n"))
    def agree(text):
        expected = encoding.encode_ordinary(text)
        assert tokenizer.encode(text) == expected
        assert tokenizer.batch_encode([text, ""]) == [expected, []]
        assert tokenizer.encode_to_numpy([text])[0].tolist() == expected
        assert tokenizer.decode(expected) == b"".join(words_by_regex(text, pattern)).decode()

    agree()


def test_empty_matches_are_not_words():
    assert rustbpe.Tokenizer.from_ranks(BYTES, r"\p{L}*").encode("a bé") == [97, 98, 0xC3, 0xA9]


BAD_CASES = """
import random, sys, rustbpe
patterns = eval(sys.argv[1])
numbers, size = random.Random(0), 300_000
texts = [unit * size for unit in ("a", " ", "🙂")]
texts += [unit * (size // 5) for unit in ("A", "\\n", "\\t \\n", "'", "'s", "7", "\\u0301", "中", "aA", "/\\n")]
texts.append("".join(numbers.choices("abcdefghijklmnopqrstuvwxyz", k=size)))
texts.append(numbers.randbytes(size).decode("utf-8", "replace"))
texts.append(" " * 1_000_001 + "x")  # where tiktoken gives up
rustbpe.Tokenizer().train_from_iterator(["=" * size], 5000)  # tokens of up to 300,000 bytes
for pattern in patterns:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, 300, pattern=pattern)
    assert tokenizer.vocab_size == 300
    ids, offsets = tokenizer.encode_to_numpy(texts)
    for i, text in enumerate(texts):
        assert tokenizer.decode(ids[offsets[i] : offsets[i + 1]].tolist()) == text, (pattern, text[:20])
"""


def test_enormous_words_and_runs_are_trained_on_and_encoded():
    """In a process of its own, which must not crash, with a time-out that quadratic work would exceed."""
    patterns = [PATTERNS[name] for name in ("gpt2", "cl100k", "o200k", "nanochat")]
    command = [sys.executable, "-c", BAD_CASES, repr(patterns)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
