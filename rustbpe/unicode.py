"""Writes src/unicode.rs: the class of every character, as the regex engine inside tiktoken has it.

    python rustbpe/unicode.py

The one idea to know: our scanners must cut text exactly where tiktoken's patterns cut it, and
Unicode's classes change with its version. So tiktoken itself is asked, character by character,
through encodings of one class each: text that a pattern does not match gives no ids.
"""

from pathlib import Path

import tiktoken

FLAGS = {  # as in split.rs
    1: r"\p{L}",
    2: r"\p{N}",
    4: r"\s",
    8: r"[\r\n]",
    16: r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    32: r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
}


def character_classes() -> list[int]:
    """Flags of all code points; 0 for surrogates, which no text has."""
    classes = [0] * 0x110000
    for flag, pattern in FLAGS.items():
        ranks = {bytes([byte]): byte for byte in range(256)}
        encoding = tiktoken.Encoding(pattern, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        for code_point in range(0x110000):
            if not 0xD800 <= code_point < 0xE000 and encoding.encode_ordinary(chr(code_point)):
                classes[code_point] |= flag
    return classes


def main() -> None:
    classes = character_classes()
    starts = [c for c in range(len(classes)) if c == 0 or classes[c] != classes[c - 1]]
    runs = [f"({start:#x},{classes[start]})" for start in starts]
    lines, line = [], ""
    for run in runs:
        if len(line) + len(run) > 110:
            lines.append(line)
            line = ""
        line += run + ","
    text = f"//! Made by unicode.py from the classes of tiktoken {tiktoken.__version__}; do not edit.\n\n"
    text += "/// (first code point, flags) of each run of characters of one class.\n#[rustfmt::skip]\n"
    text += f"pub const RUNS: [(u32, u8); {len(runs)}] = [\n" + "\n".join(lines + [line]) + "\n];\n"
    (Path(__file__).parent / "src" / "unicode.rs").write_text(text)


if __name__ == "__main__":
    main()
