"""Writes src/unicode.rs, the character classes of the regex engine inside tiktoken: `python rustbpe/unicode.py`.

Unicode's classes change with its version, and our splitting must equal tiktoken's. Therefore the classes are taken
from tiktoken itself: its encoding drops text that the pattern does not match.
"""

import textwrap
from pathlib import Path

import tiktoken

CLASSES = {"LETTERS": r"\p{L}", "NUMBERS": r"\p{N}", "SPACES": r"\s"}
TABLE = Path(__file__).parent / "src" / "unicode.rs"


def run_lengths(pattern: str) -> list[int]:
    """Code points outside the class, then inside it, and so on: "[b-dg]" -> [98, 3, 2, 1]."""
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))  # all but surrogates
    byte_ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("class", pat_str=pattern, mergeable_ranks=byte_ranks, special_tokens={})
    matched = sorted(map(ord, encoding.decode(encoding.encode_ordinary(text))))
    edges = [0]  # where runs begin, alternately outside and inside
    for code_point in matched:
        if code_point == edges[-1] and len(edges) > 1:
            edges[-1] += 1
        else:
            edges += [code_point, code_point + 1]
    return [end - start for start, end in zip(edges, edges[1:])]


def table() -> str:
    """The source text of src/unicode.rs."""
    text = "//! Made by unicode.py from tiktoken's character classes; do not edit.\n\n"
    text += "// Lengths of runs of code points, alternately outside and inside the class.\n"
    for name, pattern in CLASSES.items():
        numbers = textwrap.fill(", ".join(map(str, run_lengths(pattern))), 115)
        text += f"#[rustfmt::skip]\npub const {name}: &[u16] = &[\n{numbers}\n];\n"
    return text


if __name__ == "__main__":
    TABLE.write_text(table())
