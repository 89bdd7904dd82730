//! Cuts text into words, as the known split patterns do, in one pass and without a regex engine.
//!
//! The one idea to know: every pattern is a list of alternatives tried in order, so a scanner looks
//! at one or two characters, knows which alternative it is in, and runs to the word's end. All
//! patterns here match every character of any text, so words follow each other without gaps.

use crate::unicode::RUNS;
use std::sync::OnceLock;

pub const LETTER: u8 = 1; // \p{L}
pub const NUMBER: u8 = 2; // \p{N}
pub const SPACE: u8 = 4; // \s
pub const NEWLINE: u8 = 8; // [\r\n]
pub const UPPER: u8 = 16; // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], the first half of a word in o200k
pub const LOWER: u8 = 32; // [\p{Ll}\p{Lm}\p{Lo}\p{M}], the second

const NANOCHAT: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const GPT4: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const CL100K: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const GPT2_BRACKETS: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const GPT2_POSSESSIVE: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s";
const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Pattern {
    /// GPT-4's and ours: numbers of up to so many digits; `\s++$` takes blanks at the text's end whole.
    Gpt4 { digits: usize, tail: bool },
    Gpt2,
    O200k,
    /// Each text is one word: it was split elsewhere.
    Whole,
}

impl Pattern {
    /// The scanner for a pattern that is spelt exactly like this, if there is one.
    pub fn known(pattern: &str) -> Option<Pattern> {
        match pattern {
            NANOCHAT => Some(Pattern::Gpt4 { digits: 2, tail: false }),
            GPT4 | LLAMA3 => Some(Pattern::Gpt4 { digits: 3, tail: false }),
            CL100K => Some(Pattern::Gpt4 { digits: 3, tail: true }),
            GPT2 | GPT2_BRACKETS | GPT2_POSSESSIVE => Some(Pattern::Gpt2),
            O200K => Some(Pattern::O200k),
            _ => None,
        }
    }

    /// Calls `take` with the words of a text from left to right, as (start, end) in bytes, a few dozen at a
    /// time: whoever then looks them up waits for memory once and not for each of them.
    #[inline]
    pub fn split(self, text: &str, take: impl FnMut(&[(usize, usize)])) {
        let scan = Scanner { text: text.as_bytes(), classes: classes() };
        match self {
            Pattern::Gpt4 { digits: 2, tail: false } => batches(text, take, |at| scan.gpt4(at, 2, false)),
            Pattern::Gpt4 { digits, tail } => batches(text, take, |at| scan.gpt4(at, digits, tail)),
            Pattern::Gpt2 => batches(text, take, |at| scan.gpt2(at)),
            Pattern::O200k => batches(text, take, |at| scan.o200k(at)),
            Pattern::Whole => batches(text, take, |_| text.len()),
        }
    }
}

pub const BATCH: usize = 64; // words

#[inline(always)]
fn batches(text: &str, mut take: impl FnMut(&[(usize, usize)]), end_of_word: impl Fn(usize) -> usize) {
    let (mut words, mut number, mut start) = ([(0, 0); BATCH], 0, 0);
    while start < text.len() {
        let end = end_of_word(start);
        words[number] = (start, end);
        number += 1;
        start = end;
        if number == BATCH || start == text.len() {
            take(&words[..number]);
            number = 0;
        }
    }
}

/// Flags by code point: 1.1 MB, of which a text touches little.
pub fn classes() -> &'static [u8] {
    static CLASSES: OnceLock<Vec<u8>> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let mut classes = vec![0; 0x110000];
        for (i, &(start, flags)) in RUNS.iter().enumerate() {
            let end = RUNS.get(i + 1).map_or(0x110000, |run| run.0 as usize);
            classes[start as usize..end].fill(flags);
        }
        classes
    })
}

/// Eight bytes from `at` on as an integer, the first one lowest; zeros after the text's end.
#[inline(always)]
fn load8(text: &[u8], at: usize) -> u64 {
    match text.get(at..at + 8) {
        Some(bytes) => u64::from_le_bytes(bytes.try_into().unwrap()),
        None => text[at.min(text.len())..].iter().rev().fold(0, |all, &byte| all << 8 | byte as u64),
    }
}

struct Scanner<'a> {
    text: &'a [u8], // sound UTF-8
    classes: &'static [u8],
}

/// Each function takes the position where a character begins and returns the position after what it matched.
impl Scanner<'_> {
    /// The class of the character here and its length in bytes; (0, 0) at the end.
    #[inline(always)]
    fn character(&self, at: usize) -> (u8, usize) {
        let Some(&first) = self.text.get(at) else { return (0, 0) };
        if first < 0x80 {
            return (self.classes[first as usize], 1);
        }
        let next = |i: usize| (self.text[at + i] & 0x3F) as usize;
        let first = first as usize;
        let (code_point, length) = match first {
            0..=0xDF => ((first & 0x1F) << 6 | next(1), 2),
            0xE0..=0xEF => ((first & 0x0F) << 12 | next(1) << 6 | next(2), 3),
            _ => ((first & 0x07) << 18 | next(1) << 12 | next(2) << 6 | next(3), 4),
        };
        (self.classes[code_point], length)
    }

    /// [flags]*
    #[inline(always)]
    fn run(&self, mut at: usize, flags: u8) -> usize {
        loop {
            let (class, length) = self.character(at);
            if class & flags == 0 {
                return at;
            }
            at += length;
        }
    }

    /// \p{N}{0,most}
    fn digits(&self, at: usize, most: usize) -> usize {
        (0..most).fold(at, |end, _| match self.character(end) {
            (class, length) if class & NUMBER != 0 => end + length,
            _ => end,
        })
    }

    /// [^\s\p{L}\p{N}]*
    #[inline(always)]
    fn run_of_others(&self, mut at: usize) -> usize {
        loop {
            let (class, length) = self.character(at);
            if length == 0 || class & (LETTER | NUMBER | SPACE) != 0 {
                return at;
            }
            at += length;
        }
    }

    /// \p{L}*, eight ASCII letters at a time
    #[inline(always)]
    fn letters(&self, mut at: usize) -> usize {
        const ONES: u64 = 0x0101_0101_0101_0101;
        loop {
            let bytes = load8(self.text, at);
            let low = (bytes | ONES * 0x20) & (ONES * 0x7F); // lower case, top bit free for the two sums
            let letters = (low + ONES * (0x80 - b'a' as u64)) & !(low + ONES * (0x7F - b'z' as u64)) & !bytes;
            let others = !letters & (ONES * 0x80);
            if others != 0 {
                at += others.trailing_zeros() as usize / 8;
                let more = at < self.text.len() && self.text[at] >= 0x80;
                return if more { self.run(at, LETTER) } else { at };
            }
            at += 8;
        }
    }

    /// '(?i:[sdmt]|ll|ve|re), where "ſ" is an s, too
    #[inline(always)]
    fn contraction(&self, at: usize) -> Option<usize> {
        let byte = |i: usize| self.text.get(at + i).map_or(0, |byte| byte | 0x20);
        match (byte(1), byte(2)) {
            _ if self.text.get(at) != Some(&b'\'') => None,
            (b's' | b'd' | b'm' | b't', _) => Some(at + 2),
            (b'l', b'l') | (b'v' | b'r', b'e') => Some(at + 3),
            _ if self.text[at + 1..].starts_with("ſ".as_bytes()) => Some(at + 3),
            _ => None,
        }
    }

    /// The alternatives for blanks: `\s++$` if `tail`, `\s*[\r\n]` if `newlines`, then `\s+(?!\S)` and `\s+`.
    fn blanks(&self, at: usize, newlines: bool, tail: bool) -> usize {
        let (mut end, mut last, mut after_newline) = (at, at, at);
        loop {
            let (class, length) = self.character(end);
            if class & SPACE == 0 {
                break;
            }
            last = end;
            end += length;
            if class & NEWLINE != 0 {
                after_newline = end;
            }
        }
        if tail && end == self.text.len() {
            end
        } else if newlines && after_newline > at {
            after_newline
        } else if end == self.text.len() || last == at {
            end
        } else {
            last // the last one may open the next word
        }
    }

    #[inline(always)]
    fn gpt4(&self, at: usize, digits: usize, tail: bool) -> usize {
        let blank = (self.text[at] == b' ') as usize;
        let end = self.letters(at + blank);
        if end > at + blank {
            return end; // nearly always: a word, perhaps with a blank before it
        }
        if let Some(end) = self.contraction(at) {
            return end;
        }
        let (class, length) = self.character(at);
        if class & NUMBER != 0 {
            return self.digits(at, digits);
        }
        if class & NEWLINE == 0 {
            let end = self.letters(at + length);
            if end > at + length {
                return end;
            }
        }
        let end = self.run_of_others(at + blank);
        if end > at + blank {
            return self.run(end, NEWLINE);
        }
        self.blanks(at, true, tail)
    }

    #[inline(always)]
    fn gpt2(&self, at: usize) -> usize {
        let start = at + (self.text[at] == b' ') as usize;
        let end = self.letters(start);
        if end > start {
            return end;
        }
        if let Some(end) = self.contraction(at) {
            if self.text[at + 1..end].iter().all(u8::is_ascii_lowercase) {
                return end;
            }
        }
        for end in [self.run(start, NUMBER), self.run_of_others(start)] {
            if end > start {
                return end;
            }
        }
        self.blanks(at, false, false)
    }

    fn o200k(&self, at: usize) -> usize {
        let (class, length) = self.character(at);
        // [^\r\n\p{L}\p{N}]? is tried with a character first and then, which matters for marks, without one.
        let skip = if class & (NEWLINE | LETTER | NUMBER) == 0 { length } else { 0 };
        for start in [at + skip, at] {
            if let Some(end) = self.mixed_case(start) {
                return self.contraction(end).unwrap_or(end);
            }
        }
        for start in [at + skip, at] {
            let end = self.run(start, UPPER);
            if end > start {
                let end = self.run(end, LOWER);
                return self.contraction(end).unwrap_or(end);
            }
        }
        if class & NUMBER != 0 {
            return self.digits(at, 3);
        }
        let start = at + (self.text[at] == b' ') as usize;
        let mut end = self.run_of_others(start);
        if end > start {
            while matches!(self.text.get(end), Some(b'\r' | b'\n' | b'/')) {
                end += 1;
            }
            return end;
        }
        self.blanks(at, true, false)
    }

    /// [UPPER]*[LOWER]+ of o200k: when nothing lower follows, the first part gives back up to its last
    /// character that is both.
    fn mixed_case(&self, start: usize) -> Option<usize> {
        let (mut end, mut both) = (start, None);
        loop {
            let (class, length) = self.character(end);
            if class & UPPER == 0 {
                break;
            }
            end += length;
            if class & LOWER != 0 {
                both = Some(end);
            }
        }
        let lower = self.run(end, LOWER);
        if lower > end { Some(lower) } else { both }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(pattern: Pattern, text: &str) -> Vec<&str> {
        let mut words = vec![];
        pattern.split(text, |batch| words.extend(batch.iter().map(|&(start, end)| &text[start..end])));
        words
    }

    #[test]
    fn gpt4_cuts_words_numbers_marks_and_blanks() {
        let text = "Hello, world!!\n\nIt's 12345  x=y\u{17F}'\u{17F} über\t\tа\r\n  end  ";
        let expected = [
            "Hello", ",", " world", "!!\n\n", "It", "'s", " ", "12", "34", "5", " ", " x", "=y\u{17F}", "'\u{17F}", " über", "\t",
            "\tа", "\r\n", " ", " end", "  ",
        ];
        assert_eq!(words(Pattern::Gpt4 { digits: 2, tail: false }, text), expected);
    }

    #[test]
    fn blanks_at_the_end() {
        assert_eq!(words(Pattern::Gpt4 { digits: 3, tail: false }, "a \n  "), ["a", " \n", "  "]);
        assert_eq!(words(Pattern::Gpt4 { digits: 3, tail: true }, "a \n  "), ["a", " \n  "]);
        assert_eq!(words(Pattern::Gpt2, "a \n  b"), ["a", " \n ", " b"]);
    }

    #[test]
    fn gpt2_knows_contractions_in_small_letters_only() {
        assert_eq!(words(Pattern::Gpt2, "it's IT'S we'll 123 ?!"), ["it", "'s", " IT", "'", "S", " we", "'ll", " 123", " ?!"]);
    }

    #[test]
    fn o200k_cuts_at_capitals() {
        let text = "camelCase HTTPServer's ABC /path/\n 2024 A\u{301}bC";
        let expected = ["camel", "Case", " HTTPServer's", " ABC", " /", "path", "/\n", " ", "202", "4", " A\u{301}b", "C"];
        assert_eq!(words(Pattern::O200k, text), expected);
    }

    #[test]
    fn words_cover_any_text() {
        let alphabet: Vec<char> = "aZéſ' \n\r1९漢\u{301}😀/\u{3000}s".chars().collect();
        let mut random = crate::Random(3);
        for _ in 0..2000 {
            let text: String = (0..20).map(|_| alphabet[random.below(alphabet.len())]).collect();
            for pattern in [Pattern::Gpt4 { digits: 3, tail: true }, Pattern::Gpt2, Pattern::O200k, Pattern::Whole] {
                assert_eq!(words(pattern, &text).concat(), text);
            }
        }
    }
}
