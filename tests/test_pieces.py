"""Tokens turned into pieces of text: whole characters, known kinds, nothing of a stop string."""

from itertools import groupby

import pytest
from chat_server import END, TOKENIZER, tokens_of
from hypothesis import given
from hypothesis import strategies as st

from nanochat.pieces import Pieces


def said(tokens, stop=()) -> list[list[tuple[str, str]]]:
    """What each token makes appear, and what the end does."""
    pieces = Pieces(TOKENIZER, stop)
    return [*(pieces.push(token) for token in tokens), pieces.finish()]


def joined(appearances) -> list[tuple[str, str]]:
    flat = [piece for pieces in appearances for piece in pieces]
    return [(kind, "".join(text for _, text in group)) for kind, group in groupby(flat, key=lambda piece: piece[0])]


def test_characters_come_whole():
    tokens = TOKENIZER.encode("né 👩‍🚀!")
    appearances = [pieces[0][1] if pieces else "" for pieces in said(tokens)]
    assert "".join(appearances) == "né 👩‍🚀!" and "👩" in appearances and "🚀" in appearances
    assert all(len(text) <= 1 for text in appearances)


@pytest.mark.parametrize("tail", [b"\xf0\x9f\x98", b"\xff", b"\xc3"])
def test_half_a_character_at_the_end_is_what_decode_makes_of_it(tail):
    tokens = [*b"ab", *tail]
    assert joined(said(tokens)) == [("text", TOKENIZER.decode(tokens))]
    assert joined(said([*tokens, END])) == [("text", TOKENIZER.decode(tokens))]


def test_parts_are_known_by_the_special_tokens_which_are_not_shown():
    tokens = tokens_of("It is <|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>42.<|assistant_end|>")
    assert joined(said(tokens)) == [("text", "It is "), ("python", "6*7"), ("python_output", "42"), ("text", "42.")]
    assert joined(said(tokens_of("a<|user_start|>b<|bos|>"))) == [("text", "ab")]


def test_only_what_may_become_a_stop_string_is_held_back():
    appearances = said(TOKENIZER.encode("an EN ENd"), ["END"])
    assert ["".join(text for _, text in pieces) for pieces in appearances] == ["a", "n", " ", "", "", "EN ", "", "", "ENd", ""]
    assert joined(said(TOKENIZER.encode("an EN"), ["END"])) == [("text", "an EN")]  # it did not become one


def test_a_stop_string_may_lie_across_a_call_that_is_no_text_but_not_in_it():
    tokens = tokens_of("a=<|python_start|>=b<|python_end|>=b")
    assert joined(said(tokens, ["=="])) == [("text", "a"), ("python", "=b")]


@given(st.text("abé", max_size=20), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=4))
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut_into_tokens(text, stop):
    def naive():
        """The text grows character by character until it contains one of them."""
        for end in range(len(text) + 1):
            found = [text[:end].find(string) for string in stop if string in text[:end]]
            if found:
                return text[: min(found)]
        return text

    assert "".join(piece for _, piece in joined(said(TOKENIZER.encode(text), stop))) == naive()
