//! A hash table from words to numbers, which both training and encoding use.
//!
//! Nearly all words are short, and a word of up to 15 bytes fits into a 128-bit integer together with its length.
//! Such words are compared, hashed and stored as integers, in the slots themselves, so that a lookup reads one
//! place in memory. Longer words are in a map of the standard library.

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

/// A key as slots store it: a u128 would be aligned to 16 bytes.
#[inline(always)]
pub fn halves(key: u128) -> [u64; 2] {
    [key as u64, (key >> 64) as u64]
}

/// Starts to load a value that is needed soon; does nothing where there is no such instruction.
#[inline(always)]
pub fn prefetch<T>(_value: &T) {
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use core::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(_value as *const T as *const i8);
    }
}

#[derive(Clone, Copy)]
struct Slot {
    key: [u64; 2], // EMPTY in an unused slot
    value: u64,
}

const EMPTY: [u64; 2] = [0, 0];
const UNUSED: Slot = Slot { key: EMPTY, value: 0 };

pub struct Table {
    slots: Vec<Slot>, // their number is a power of two; at most 3 of 4 are in use
    used: usize,
    long: HashMap<Box<[u8]>, u64>,
}

impl Table {
    pub fn new() -> Table {
        Table { slots: vec![UNUSED; 1 << 12], used: 0, long: HashMap::new() }
    }

    pub fn get(&self, word: &[u8]) -> Option<u64> {
        let Some(key) = key(word, 0, word.len()) else { return self.long.get(word).copied() };
        let slot = &self.slots[self.find(key)];
        (slot.key != EMPTY).then_some(slot.value)
    }

    /// The value of the word `text[start..end]`, which must not be empty; 0 if it is new.
    #[inline(always)]
    pub fn entry(&mut self, text: &[u8], start: usize, end: usize) -> &mut u64 {
        let Some(key) = key(text, start, end) else { return self.long_entry(&text[start..end]) };
        let mut at = self.find(key);
        if self.slots[at].key == EMPTY {
            if self.used * 4 >= self.slots.len() * 3 {
                self.grow();
                at = self.find(key);
            }
            self.used += 1;
            self.slots[at].key = halves(key);
        }
        &mut self.slots[at].value
    }

    /// Calls `each(word, value)` in no particular order.
    pub fn each(&self, mut each: impl FnMut(&[u8], u64)) {
        for slot in self.slots.iter().filter(|slot| slot.key != EMPTY) {
            let key = (slot.key[1] as u128) << 64 | slot.key[0] as u128;
            each(&key.to_le_bytes()[..(key >> 120) as usize], slot.value);
        }
        for (word, &value) in &self.long {
            each(word, value);
        }
    }

    /// The slot that has the key, or that would have it.
    #[inline(always)]
    fn find(&self, key: u128) -> usize {
        let (halves, last) = (halves(key), self.slots.len() - 1);
        let mut at = hash(key) as usize & last;
        while self.slots[at].key != halves && self.slots[at].key != EMPTY {
            at = (at + 1) & last;
        }
        at
    }

    #[cold]
    fn grow(&mut self) {
        let larger = vec![UNUSED; self.slots.len() * 2];
        for slot in std::mem::replace(&mut self.slots, larger) {
            if slot.key != EMPTY {
                let at = self.find((slot.key[1] as u128) << 64 | slot.key[0] as u128);
                self.slots[at] = slot;
            }
        }
    }

    #[inline(never)]
    fn long_entry(&mut self, word: &[u8]) -> &mut u64 {
        if !self.long.contains_key(word) {
            self.long.insert(word.into(), 0);
        }
        self.long.get_mut(word).unwrap()
    }
}
