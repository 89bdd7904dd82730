//! Splits text into words, in one pass and without a regex engine, exactly as tiktoken does with the pattern
//!
//!     '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+
//!
//! The alternatives are tried in order, so one or two characters determine which of them matches. Together
//! they match every character, so each word begins where the previous one ends.

use crate::unicode::{LETTERS, NUMBERS, SPACES};
use std::sync::OnceLock;

const LETTER: u8 = 1; // \p{L}
const NUMBER: u8 = 2; // \p{N}
const SPACE: u8 = 4; // \s
const NEWLINE: u8 = 8; // [\r\n]

pub const BATCH: usize = 64; // words

/// Calls `take` with the words of a text (UTF-8) in order, as (start, end) in bytes, up to BATCH at a time: a caller
/// that looks them up in a table can then prefetch the slots of all of them.
#[inline]
pub fn split(text: &[u8], mut take: impl FnMut(&[(usize, usize)])) {
    let scanner = Scanner { text, classes: classes() };
    let (mut words, mut number, mut start) = ([(0, 0); BATCH], 0, 0);
    while start < text.len() {
        let end = scanner.end_of_word(start);
        words[number] = (start, end);
        number += 1;
        start = end;
        if number == BATCH || start == text.len() {
            take(&words[..number]);
            number = 0;
        }
    }
}

/// Flags by code point: 1.1 MB, of which most texts touch little.
fn classes() -> &'static [u8] {
    static CLASSES: OnceLock<Vec<u8>> = OnceLock::new();
    CLASSES.get_or_init(|| {
        let mut classes = vec![0; 0x110000];
        for (flag, runs) in [(LETTER, LETTERS), (NUMBER, NUMBERS), (SPACE, SPACES)] {
            let mut end = 0;
            for run in runs.chunks(2) {
                let start = end + run[0] as usize;
                end = start + run[1] as usize;
                classes[start..end].fill(flag);
            }
        }
        for newline in [b'\r', b'\n'] {
            classes[newline as usize] |= NEWLINE;
        }
        classes
    })
}

/// Eight bytes from `at` on as an integer, the first one lowest; zeros after the end of the text.
#[inline(always)]
fn load8(text: &[u8], at: usize) -> u64 {
    match text.get(at..at + 8) {
        Some(bytes) => u64::from_le_bytes(bytes.try_into().unwrap()),
        None => text[at.min(text.len())..].iter().rev().fold(0, |all, &byte| all << 8 | byte as u64),
    }
}

struct Scanner<'a> {
    text: &'a [u8],
    classes: &'static [u8],
}

/// Each function takes the position of a character and returns the position after what it matched.
impl Scanner<'_> {
    #[inline(always)]
    fn end_of_word(&self, at: usize) -> usize {
        let blank = (self.text[at] == b' ') as usize;
        let end = self.letters(at + blank);
        if end > at + blank {
            return end; // by far the most frequent: a word, perhaps with a blank before it
        }
        if let Some(end) = self.contraction(at) {
            return end;
        }
        let (class, length) = self.character(at);
        if class & NUMBER != 0 {
            let (class, second) = self.character(at + length);
            return if class & NUMBER != 0 { at + length + second } else { at + length };
        }
        if class & NEWLINE == 0 {
            let end = self.letters(at + length);
            if end > at + length {
                return end;
            }
        }
        let end = self.run(at + blank, |class| class & (LETTER | NUMBER | SPACE) == 0);
        if end > at + blank {
            return self.run(end, |class| class & NEWLINE != 0);
        }
        self.blanks(at)
    }

    /// The class of the character at `at` and its length in bytes; (0, 0) at the end.
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

    #[inline(always)]
    fn run(&self, mut at: usize, belongs: impl Fn(u8) -> bool) -> usize {
        loop {
            let (class, length) = self.character(at);
            if length == 0 || !belongs(class) {
                return at;
            }
            at += length;
        }
    }

    /// \p{L}*, eight ASCII letters at a time.
    #[inline(always)]
    fn letters(&self, mut at: usize) -> usize {
        const ONES: u64 = 0x0101_0101_0101_0101;
        loop {
            let bytes = load8(self.text, at);
            // The top bit of each byte of `letters` tells whether it is one. `lower` leaves room for the two sums.
            let lower = (bytes | (ONES * 0x20)) & (ONES * 0x7F);
            let letters = (lower + ONES * (0x80 - b'a' as u64)) & !(lower + ONES * (0x7F - b'z' as u64)) & !bytes;
            let others = !letters & (ONES * 0x80);
            if others != 0 {
                at += others.trailing_zeros() as usize / 8;
                let more = at < self.text.len() && self.text[at] >= 0x80;
                return if more { self.run(at, |class| class & LETTER != 0) } else { at };
            }
            at += 8;
        }
    }

    /// '(?i:[sdmt]|ll|ve|re); regardless of case, "ſ" is an s, too.
    #[inline(always)]
    fn contraction(&self, at: usize) -> Option<usize> {
        let byte = |i: usize| self.text.get(at + i).map_or(0, |byte| byte | 0x20);
        match (byte(1), byte(2)) {
            _ if self.text[at] != b'\'' => None,
            (b's' | b'd' | b'm' | b't', _) => Some(at + 2),
            (b'l', b'l') | (b'v' | b'r', b'e') => Some(at + 3),
            _ if self.text[at + 1..].starts_with("ſ".as_bytes()) => Some(at + 3),
            _ => None,
        }
    }

    /// \s*[\r\n]|\s+(?!\S)|\s+
    fn blanks(&self, at: usize) -> usize {
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
        if after_newline > at {
            after_newline
        } else if end == self.text.len() || last == at {
            end
        } else {
            last // the last blank may begin the next word
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_an_example() {
        let text = "Hello, world!!\n\nIt's we'LLx'Rex 12345  x=y\u{17F}'\u{17F} über\t\tа\r\n  end \n  ";
        let expected = [
            "Hello", ",", " world", "!!\n\n", "It", "'s", " we", "'LL", "x", "'Re", "x", " ", "12", "34", "5", " ",
            " x", "=y\u{17F}", "'\u{17F}", " über", "\t", "\tа", "\r\n", " ", " end", " \n", "  ",
        ];
        let mut words = vec![];
        split(text.as_bytes(), |batch| words.extend(batch.iter().map(|&(start, end)| &text[start..end])));
        assert_eq!(words, expected);
    }
}
