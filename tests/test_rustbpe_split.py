"""Our rustbpe: words and ids, which must equal tiktoken's, and a slow encoder's with Python's `regex`.

Neither library returns words; with a token for every pair of bytes in random order, the ids show where words end.
"""

import runpy
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import encode_slowly

from nanochat.tokenizer import SPLIT_PATTERN

if not hasattr(rustbpe, "PATTERN"):
    pytest.skip("the published rustbpe is installed here, not ours", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
CODE_POINTS = [*range(0xD800), *range(0xE000, 0x110000)]  # all but surrogates, which no text has
BYTES = {bytes([byte]): byte for byte in range(256)}
# Every pair of bytes is a token, in random order
PAIRS = {bytes([i >> 8, i & 255]): 256 + int(n) for i, n in enumerate(np.random.default_rng(0).permutation(65536))}

# Characters on which the pattern depends, which are rare in hypothesis' own texts
KINDS = {
    "blanks": " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u180e\u200b\ufeff",
    "contractions": ["'", "'", "’", *"sStTmMdDſaA 1", "ll", "Ll", "lL", "re", "RE", "vE", "Ve", "l", "r", "v", "\n"],
    "letters and marks": "aAzßǅᾈΑλʰªºـאه中ㄅ\u0301\u0903\u20dd\u1ab0 '1ſſK",
    "digits": "01239٣१৪Ⅷ½①๑𝟘²一 a.",
    "signs": "/!?.,…¿\"'-_$€+^`~🙂\u200d\ufe0f\U0001f3fd\r\n\n// aA1",
}
# Characters that are assigned have the same class in all versions of Unicode, as far as this pattern is concerned
agreed = st.characters(exclude_categories=("Cs", "Cn"))
pieces = st.one_of([st.sampled_from(kind) for kind in KINDS.values()] + [st.sampled_from(["'s", " ", "a", "\n"])])


def texts_of(characters):
    kinds = (st.lists(st.sampled_from(kind), max_size=25) for kind in KINDS.values())
    mixtures = st.lists(pieces | characters, max_size=25)
    return st.one_of(st.text(characters, max_size=30), *(parts.map("".join) for parts in (*kinds, mixtures)))


def tiktoken_with(ranks):
    return tiktoken.Encoding("test", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})


def test_character_classes_are_those_of_tiktoken():
    generator = runpy.run_path(str(ROOT / "rustbpe" / "unicode.py"))
    assert generator["table"]() == generator["TABLE"].read_text(), "run rustbpe/unicode.py and build again"


def test_every_character_in_every_place():
    """Each character between letters, blanks, digits, line breaks and apostrophes, and contractions of all kinds. Han,
    Hangul, unassigned and private characters stand before a letter only: it takes long."""
    few = [c for c in CODE_POINTS if c < 0x3400 or 0xA000 <= c < 0xAC00 or 0xD7A4 <= c < 0x20000 or c >= 0xE0000]
    few = [c for c in few if c < 0x3400 or chr(c).isprintable()]
    texts = ["".join(f"{chr(c)}a" for c in CODE_POINTS[i : i + 2**12]) for i in range(0, len(CODE_POINTS), 2**12)]
    for i in range(0, len(few), 2**10):
        characters = map(chr, few[i : i + 2**10])
        texts.append("".join(f"a{c}B{c} {c}1{c}\n{c}{c}'S{c}'{c}!{c}\n/{c}  {c}" for c in characters))
    texts.append(" ".join("a'" + "".join(letters) for letters in product("sdmtlvrexSDMTLVREſ", repeat=3)))
    ids, offsets = rustbpe.Tokenizer.from_ranks(BYTES | PAIRS).encode_to_numpy(texts)
    encoding = tiktoken_with(BYTES | PAIRS)
    for text, start, end in zip(texts, offsets, offsets[1:]):
        expected = encoding.encode_to_numpy(text, disallowed_special=())
        assert np.array_equal(ids[start:end], expected), f"{text[:20]!r}... to ...{text[-20:]!r}"


def test_ids_are_tiktokens_on_any_unicode():
    """With trained ranks, and with a token for every pair of bytes."""
    trained = rustbpe.Tokenizer()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    trained.train_from_iterator([readme, *("".join(kind) * 2 for kind in KINDS.values())], 1500)
    tokenizers = (trained, rustbpe.Tokenizer.from_ranks(BYTES | PAIRS))
    pairs = [(tokenizer, tiktoken_with(dict(tokenizer.get_mergeable_ranks()))) for tokenizer in tokenizers]

    @settings(max_examples=600, deadline=None)
    @given(text=texts_of(st.characters(codec="utf-8")))
    def agree(text):
        for tokenizer, encoding in pairs:
            ids = tokenizer.encode(text)
            assert ids == encoding.encode_ordinary(text)
            assert tokenizer.decode(ids) == text

    agree()


small_tokens = st.binary(min_size=2, max_size=6) | st.text("ab ", min_size=2, max_size=7).map(str.encode)


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(small_tokens, max_size=12, unique=True),
    rng=st.randoms(use_true_random=False),
    texts=st.lists(st.text("ab ", max_size=15) | st.text("ab", min_size=60) | texts_of(agreed), max_size=5),
)
def test_ids_of_any_ranks_are_those_of_the_reference(tokens, rng, texts):
    """Tokens that no merges reach (a whole word may still be one), bytes with other ids than 0 to 255."""
    ids = rng.sample(range(256 + len(tokens)), 256 + len(tokens))
    ranks = dict(zip([*BYTES, *tokens], ids))
    tokenizer, encoding = rustbpe.Tokenizer.from_ranks(ranks), tiktoken_with(ranks)
    assert tokenizer.get_mergeable_ranks() == sorted(ranks.items(), key=lambda item: item[1])
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == encode_slowly(ranks, text) == encoding.encode_ordinary(text)
        assert tokenizer.decode(ids) == text


BAD_CASES = """
import random, rustbpe
rng, size = random.Random(0), 300_000
texts = [unit * size for unit in ("a", " ", "🙂")]
texts += [unit * (size // 5) for unit in ("A", "\\n", "\\t \\n", "'", "'s", "7", "\\u0301", "中", "aA", "/\\n")]
texts.append("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=size)))
texts.append(rng.randbytes(size).decode("utf-8", "replace"))
texts.append(" " * 1_000_001 + "x")  # where tiktoken panics
rustbpe.Tokenizer().train_from_iterator(["=" * size], 5000)  # tokens of up to 300,000 bytes
tokenizer = rustbpe.Tokenizer()
tokenizer.train_from_iterator(texts, 300)
assert len(tokenizer.get_mergeable_ranks()) == 300
ids, offsets = tokenizer.encode_to_numpy(texts)
for text, start, end in zip(texts, offsets, offsets[1:]):
    assert tokenizer.decode(ids[start:end].tolist()) == text, text[:20]
"""


def test_enormous_words_and_runs_are_trained_on_and_encoded():
    """In a process of its own, which must not crash, with a timeout that quadratic work would exceed."""
    done = subprocess.run([sys.executable, "-c", BAD_CASES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
