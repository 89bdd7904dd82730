//! The C interface, which python/rustbpe/__init__.py calls. Nothing is computed here.
//!
//! Every function that can fail returns -1 where it did, and `rustbpe_error` then says why. A panic is
//! such a failure, too: none crosses the border. Texts come as bytes end to end and the places between
//! them (`number + 1` offsets), which is how Arrow keeps strings; they are checked before use.

mod bpe;
mod encode;
mod split;
mod table;
mod threads;
mod unicode;

use bpe::{Counts, Trainer, Words};
use encode::{Encoded, Encoder};
use split::Pattern;
use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::slice::{from_raw_parts, from_raw_parts_mut};
use std::sync::Mutex;

thread_local! {
    static ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

fn guard(work: impl FnOnce() -> Result<i64, String>) -> i64 {
    let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(format!("a bug in rustbpe: {}", text.unwrap_or("no message")))
    });
    result.unwrap_or_else(|message| {
        ERROR.with(|error| *error.borrow_mut() = message);
        -1
    })
}

fn boxed<T>(value: T) -> Result<i64, String> {
    Ok(Box::into_raw(Box::new(value)) as i64)
}

/// Strings in memory of the caller's.
#[repr(C)]
pub struct Strings {
    data: *const u8,
    size: i64,
    offsets: *const u8, // `number + 1` integers of 4 or 8 bytes
    wide: i64,          // whether they have 8
    number: i64,
}

impl Strings {
    unsafe fn slices<'a>(&self) -> Result<Vec<&'a [u8]>, String> {
        let data: &[u8] = if self.size == 0 { &[] } else { from_raw_parts(self.data, self.size as usize) };
        let offset = |i: usize| match self.wide {
            0 => (self.offsets as *const i32).add(i).read_unaligned() as i64,
            _ => (self.offsets as *const i64).add(i).read_unaligned(),
        };
        (0..self.number as usize)
            .map(|i| {
                let (start, end) = (offset(i), offset(i + 1));
                let found = usize::try_from(start).ok().zip(usize::try_from(end).ok());
                let text = found.and_then(|(start, end)| data.get(start..end));
                text.ok_or_else(|| format!("text {i} has impossible offsets: {start} to {end}"))
            })
            .collect()
    }
}

/// The texts of several parts, all of them checked before any is used.
unsafe fn texts<'a>(parts: *const Strings, number: i64) -> Result<Vec<&'a str>, String> {
    let mut texts = vec![];
    for part in from_raw_parts(parts, number as usize) {
        for bytes in part.slices()? {
            texts.push(std::str::from_utf8(bytes).map_err(|why| format!("text {} is not UTF-8: {why}", texts.len()))?);
        }
    }
    Ok(texts)
}

/// A scanner's number for a pattern (UTF-8, so many bytes), or 0 where there is none.
/// # Safety
/// The pointer is valid, as everywhere below; handles come from the functions that make them.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_pattern(pattern: *const u8, size: i64) -> i64 {
    guard(|| {
        let pattern = std::str::from_utf8(from_raw_parts(pattern, size as usize)).map_err(|why| why.to_string())?;
        Ok(Pattern::known(pattern).map_or(0, |pattern| 1 + PATTERNS.iter().position(|known| *known == pattern).unwrap() as i64))
    })
}

const PATTERNS: [Pattern; 6] = [
    Pattern::Whole,
    Pattern::Gpt4 { digits: 2, tail: false },
    Pattern::Gpt4 { digits: 3, tail: false },
    Pattern::Gpt4 { digits: 3, tail: true },
    Pattern::Gpt2,
    Pattern::O200k,
];

fn pattern(number: i64) -> Result<Pattern, String> {
    PATTERNS.get((number - 1) as usize).copied().ok_or(format!("no scanner has the number {number}"))
}

/// Copies the last error's message (at most `size` bytes) and returns how long it is.
/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_error(message: *mut u8, size: i64) -> i64 {
    ERROR.with(|error| {
        let error = error.borrow();
        let length = error.len().min(size as usize);
        from_raw_parts_mut(message, length).copy_from_slice(&error.as_bytes()[..length]);
        length as i64
    })
}

#[no_mangle]
pub extern "C" fn rustbpe_character_class(code_point: i64) -> i64 {
    guard(|| split::classes().get(code_point as usize).map(|&class| class as i64).ok_or("no code point".into()))
}

/// Writes where each word of a text ends (room for `size` numbers); returns how many words.
/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_word_ends(number: i64, text: *const u8, size: i64, ends: *mut i64) -> i64 {
    guard(|| {
        let text = std::str::from_utf8(from_raw_parts(text, size as usize)).map_err(|why| why.to_string())?;
        let (ends, mut words) = (from_raw_parts_mut(ends, size as usize), 0);
        pattern(number)?.split(text, |batch| {
            for &(_, end) in batch {
                ends[words] = end as i64;
                words += 1;
            }
        });
        Ok(words as i64)
    })
}

// -----------------------------------------------------------------------------
// Counts and training

#[no_mangle]
pub extern "C" fn rustbpe_counts_new(number: i64) -> i64 {
    guard(|| boxed(Counts::new(pattern(number)?)))
}

/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counts_free(counts: *mut Counts) {
    drop(Box::from_raw(counts));
}

/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counts_add(counts: *const Counts, parts: *const Strings, number: i64, threads: i64) -> i64 {
    guard(|| {
        (*counts).add(&texts(parts, number)?, threads as usize);
        Ok(0)
    })
}

/// Words that were counted elsewhere.
/// # Safety
/// As above; there are as many `numbers` as words.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counts_add_words(counts: *const Counts, words: &Strings, numbers: *const u64) -> i64 {
    guard(|| {
        let words = texts(words, 1)?;
        let numbers = if words.is_empty() { &[] } else { from_raw_parts(numbers, words.len()) };
        (*counts).add_words(&words, numbers);
        Ok(0)
    })
}

/// How many different words there are.
/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counts_number(counts: *const Counts) -> i64 {
    guard(|| Ok((*counts).number() as i64))
}

/// All words and counts, sorted by word, to be copied out.
/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_words_new(counts: *const Counts, number: *mut i64, size: *mut i64) -> i64 {
    guard(|| {
        let words = (*counts).words().sorted();
        (*number, *size) = (words.counts.len() as i64, words.bytes.len() as i64);
        boxed(words)
    })
}

/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_words_free(words: *mut Words) {
    drop(Box::from_raw(words));
}

/// # Safety
/// As above; there is room for what `rustbpe_words_new` said.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_words_copy(words: *const Words, bytes: *mut u8, ends: *mut u64, counts: *mut u64) {
    let words = &*words;
    from_raw_parts_mut(bytes, words.bytes.len()).copy_from_slice(&words.bytes);
    from_raw_parts_mut(ends, words.ends.len()).copy_from_slice(&words.ends);
    from_raw_parts_mut(counts, words.counts.len()).copy_from_slice(&words.counts);
}

/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_new(counts: *const Counts) -> i64 {
    guard(|| boxed(Mutex::new(Trainer::new((*counts).words())?)))
}

/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_free(trainer: *mut Mutex<Trainer>) {
    drop(Box::from_raw(trainer));
}

/// Learns up to so many more merges and writes them, two ids each, returning how many.
/// # Safety
/// As above; there is room for `2 * wanted` ids.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_merge(trainer: *const Mutex<Trainer>, wanted: i64, pairs: *mut u32) -> i64 {
    guard(|| {
        let merges = (*trainer).lock().unwrap().merge(wanted as usize);
        for (i, (a, b)) in merges.iter().enumerate() {
            pairs.add(2 * i).write(*a);
            pairs.add(2 * i + 1).write(*b);
        }
        Ok(merges.len() as i64)
    })
}

// -----------------------------------------------------------------------------
// Encoding

/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoder_new(number: i64, tokens: &Strings) -> i64 {
    guard(|| boxed(Encoder::new(pattern(number)?, &tokens.slices()?)?))
}

/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoder_free(encoder: *mut Encoder) {
    drop(Box::from_raw(encoder));
}

/// Encodes texts; the ids wait, `number` of them, to be copied out.
/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encode(
    encoder: *const Encoder,
    parts: *const Strings,
    number_of_parts: i64,
    threads: i64,
    number: *mut i64,
) -> i64 {
    guard(|| {
        let encoded = (*encoder).encode(&texts(parts, number_of_parts)?, threads as usize);
        *number = encoded.iter().map(|part| part.ids.len() as i64).sum();
        boxed(encoded)
    })
}

/// # Safety
/// As above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoded_free(encoded: *mut Vec<Encoded>) {
    drop(Box::from_raw(encoded));
}

/// Writes the ids, two bytes each or four, and the offsets of the texts in them.
/// # Safety
/// As above; there is room for the ids and for one offset more than there were texts.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoded_copy(encoded: *const Vec<Encoded>, wide: i64, ids: *mut u8, mut offsets: *mut i64) {
    let (mut at, mut offset) = (0, 0);
    offsets.write(0);
    for part in &*encoded {
        let length = part.ids.len();
        if wide != 0 {
            from_raw_parts_mut((ids as *mut u32).add(at), length).copy_from_slice(&part.ids);
        } else {
            let out = from_raw_parts_mut((ids as *mut u16).add(at), length);
            out.iter_mut().zip(&part.ids).for_each(|(narrow, &id)| *narrow = id as u16);
        }
        at += length;
        for length in &part.lengths {
            offset += *length as i64;
            offsets = offsets.add(1);
            offsets.write(offset);
        }
    }
}

#[cfg(test)]
struct Random(u64);

#[cfg(test)]
impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % limit
    }

    /// Fewer letters than that, of few kinds and in runs, so that there is much to join.
    fn word(&mut self, limit: usize) -> String {
        let kinds = 1 + self.below(4);
        (0..self.below(limit)).map(|_| ['a', 'b', 'c', 'd'][self.below(kinds)]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> String {
        let mut buffer = vec![0; 200];
        let length = unsafe { rustbpe_error(buffer.as_mut_ptr(), 200) };
        String::from_utf8(buffer[..length as usize].to_vec()).unwrap()
    }

    #[test]
    fn a_panic_becomes_an_error() {
        assert_eq!(guard(|| panic!("out of {}", "luck")), -1);
        assert_eq!(message(), "a bug in rustbpe: out of luck");
        assert_eq!(guard(|| Ok(3)), 3);
    }

    #[test]
    fn strings_are_checked() {
        let checked = |data: &'static [u8], offsets: &'static [i32]| {
            let strings = Strings {
                data: data.as_ptr(),
                size: data.len() as i64,
                offsets: offsets.as_ptr() as *const u8,
                wide: 0,
                number: offsets.len() as i64 - 1,
            };
            unsafe { texts(&strings, 1) }
        };
        assert_eq!(checked("aöb".as_bytes(), &[0, 3, 3, 4]).unwrap(), ["aö", "", "b"]);
        for (data, offsets) in [(&b"abc"[..], &[0, 4][..]), (b"abc", &[2, 1]), (b"abc", &[-1, 2]), ("ö".as_bytes(), &[0, 1, 2])] {
            assert!(checked(data, offsets).is_err());
        }
    }
}
