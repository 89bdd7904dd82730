//! A hash table from words to numbers, the one data structure that both training and encoding lean on.
//!
//! The one idea to know: nearly all words are short, and a word of up to 15 bytes fits into one
//! 128-bit integer together with its length. Such words are compared, hashed and stored as integers,
//! in the slots themselves, so that a look-up touches one place in memory. Longer words are rare.

use std::collections::HashMap;

/// The word as an integer, never 0; `None` if it is longer than 15 bytes or empty.
#[inline(always)]
pub fn key(text: &[u8], start: usize, end: usize) -> Option<u128> {
    let length = end - start;
    if length.wrapping_sub(1) >= 15 {
        return None;
    }
    let bytes = match text.get(start..start + 16) {
        Some(bytes) => u128::from_le_bytes(bytes.try_into().unwrap()) & ((1 << (8 * length)) - 1),
        None => text[start..end].iter().rev().fold(0, |all, &byte| all << 8 | byte as u128),
    };
    Some(bytes | (length as u128) << 120)
}

#[inline(always)]
pub fn hash(key: u128) -> u64 {
    let product = (key as u64 ^ 0x9E37_79B9_7F4A_7C15) as u128 * ((key >> 64) as u64 ^ 0xD1B5_4A32_D192_ED03) as u128;
    product as u64 ^ (product >> 64) as u64
}

/// Asks for something in memory that is wanted soon; where there is no such instruction, does nothing.
#[inline(always)]
pub fn prefetch<T>(_wanted: &T) {
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use core::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(_wanted as *const T as *const i8);
    }
}

/// A key as slots keep it: a u128 would be aligned to 16 bytes.
#[inline(always)]
pub fn halves(key: u128) -> [u64; 2] {
    [key as u64, (key >> 64) as u64]
}

#[derive(Clone, Copy)]
struct Slot {
    key: [u64; 2], // 0, 0: empty
    value: u64,
}

impl Slot {
    fn key(&self) -> u128 {
        (self.key[1] as u128) << 64 | self.key[0] as u128
    }
}

pub struct Table {
    slots: Vec<Slot>, // a power of two of them, at most 3 of 4 in use
    used: usize,
    long: HashMap<Box<[u8]>, u64>,
}

impl Table {
    pub fn new() -> Table {
        Table { slots: vec![Slot { key: [0, 0], value: 0 }; 1 << 12], used: 0, long: HashMap::new() }
    }

    pub fn len(&self) -> usize {
        self.used + self.long.len()
    }

    /// Where the key is, or where it would be.
    #[inline(always)]
    fn find(&self, key: u128) -> usize {
        let (halves, last) = (halves(key), self.slots.len() - 1);
        let mut at = hash(key) as usize & last;
        while self.slots[at].key != halves && self.slots[at].key != [0, 0] {
            at = (at + 1) & last;
        }
        at
    }

    #[inline(always)]
    fn get(&self, key: u128) -> Option<u64> {
        let slot = &self.slots[self.find(key)];
        (slot.key != [0, 0]).then_some(slot.value)
    }

    /// The value of a short word, 0 if it is new.
    #[inline(always)]
    fn entry(&mut self, key: u128) -> &mut u64 {
        let mut at = self.find(key);
        if self.slots[at].key == [0, 0] {
            if self.used * 4 >= self.slots.len() * 3 {
                self.grow();
                at = self.find(key);
            }
            self.used += 1;
            self.slots[at].key = halves(key);
        }
        &mut self.slots[at].value
    }

    #[cold]
    fn grow(&mut self) {
        let larger = vec![Slot { key: [0, 0], value: 0 }; self.slots.len() * 2];
        for slot in std::mem::replace(&mut self.slots, larger) {
            if slot.key != [0, 0] {
                let at = self.find(slot.key());
                self.slots[at] = slot;
            }
        }
    }

    pub fn get_word(&self, word: &[u8]) -> Option<u64> {
        match key(word, 0, word.len()) {
            Some(key) => self.get(key),
            None => self.long.get(word).copied(),
        }
    }

    /// The value of the word at `text[start..end]`, which is not empty; 0 if it is new.
    #[inline(always)]
    pub fn entry_word(&mut self, text: &[u8], start: usize, end: usize) -> &mut u64 {
        match key(text, start, end) {
            Some(key) => self.entry(key),
            None => self.long_entry(&text[start..end]),
        }
    }

    /// Counts the word at `text[start..end]` so many times more.
    #[inline(always)]
    pub fn add(&mut self, text: &[u8], start: usize, end: usize, count: u64) {
        let total = self.entry_word(text, start, end);
        *total = total.saturating_add(count);
    }

    #[inline(never)]
    fn long_entry(&mut self, word: &[u8]) -> &mut u64 {
        if !self.long.contains_key(word) {
            self.long.insert(word.into(), 0);
        }
        self.long.get_mut(word).unwrap()
    }

    /// Calls `each(word, value)` in no particular order.
    pub fn each(&self, mut each: impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| slot.key != [0, 0]) {
            let key = slot.key();
            each(&key.to_le_bytes()[..(key >> 120) as usize], slot.value);
        }
        for (word, &value) in &self.long {
            each(word, value);
        }
    }
}
