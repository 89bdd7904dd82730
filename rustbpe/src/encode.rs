//! Encoding: texts to ids, by the tokens and ranks that were learnt.
//!
//! The one idea to know: most words of a text occurred a moment ago. A cache in which each word has
//! one place, with its ids beside it, answers for them, and the places for the next few dozen words
//! are fetched from memory together. Only the rest is joined pair by pair, in time linear in the text.

use crate::split::{Pattern, BATCH};
use crate::table::{halves, hash, key, prefetch, Table};
use crate::threads::{on_threads, Pool};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

const NONE: u32 = u32::MAX;
const SHORT: usize = 64; // up to here finding the lowest rank by looking at all is quickest

/// What texts are encoded to, in the order of the texts.
#[derive(Default)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub lengths: Vec<usize>, // of each text in ids
}

pub struct Encoder {
    pattern: Pattern,
    tokens: Table,
    bytes: [u32; 256],
    pairs: Pairs,
    caches: Pool<Vec<Bucket>>,
}

/// Of each pair of tokens that make a token together, that token's id.
struct Pairs {
    bytes: Vec<u32>, // of two tokens of a byte each, by bytes
    slots: Vec<u64>, // of any: left id, right id, id in 21 bits each; a power of two of them; EMPTY where empty
}

const ID_BITS: u32 = 21; // rustbpe/core.py knows this limit, too
const EMPTY: u64 = u64::MAX;

impl Pairs {
    fn new(pairs: &[(u32, u32, u32)]) -> Pairs {
        let mut table = Pairs { bytes: vec![NONE; 1 << 16], slots: vec![EMPTY; (pairs.len() * 2 + 2).next_power_of_two()] };
        for &(left, right, id) in pairs {
            let at = table.find(left, right);
            table.slots[at] = ((left as u64) << ID_BITS | right as u64) << ID_BITS | id as u64;
        }
        table
    }

    #[inline(always)]
    fn find(&self, left: u32, right: u32) -> usize {
        let (pair, last) = ((left as u64) << ID_BITS | right as u64, self.slots.len() - 1);
        let product = pair.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut at = (product >> 40) as usize & last;
        while self.slots[at] >> ID_BITS != pair && self.slots[at] != EMPTY {
            at = (at + 1) & last;
        }
        at
    }

    #[inline(always)]
    fn get(&self, left: u32, right: u32) -> u32 {
        let slot = self.slots[self.find(left, right)];
        if slot != EMPTY { slot as u32 & ((1 << ID_BITS) - 1) } else { NONE }
    }
}

/// A word that was encoded lately.
#[derive(Clone, Copy)]
struct Recent {
    key: [u64; 2],
    ids: [u32; 4], // those that are not used are NONE
}

/// The two latest words of the same hash: one line of the processor's cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Bucket([Recent; 2]);

const BUCKETS: usize = 1 << 17; // 8 MB for each thread

impl Encoder {
    /// Of tokens whose ids are 0, 1, 2, ... Each of the 256 bytes must be a token.
    pub fn new(pattern: Pattern, tokens: &[&[u8]]) -> Result<Encoder, String> {
        if tokens.len() >= 1 << ID_BITS {
            return Err(format!("{} tokens are too many: fewer than {} fit", tokens.len(), 1 << ID_BITS));
        }
        let mut table = Table::new();
        for (id, token) in tokens.iter().enumerate() {
            if token.is_empty() {
                return Err("an empty token".into());
            }
            let entry = table.entry_word(token, 0, token.len());
            if *entry > 0 {
                return Err(format!("the token {:?} stands twice", String::from_utf8_lossy(token)));
            }
            *entry = id as u64 + 1; // 0 would be a new word
        }
        let id = |token: &[u8]| table.get_word(token).map(|entry| entry as u32 - 1);
        let mut bytes = [NONE; 256];
        for byte in 0..=255 {
            bytes[byte as usize] = id(&[byte]).ok_or(format!("the byte {byte} has no token"))?;
        }
        // Only cuts into lengths that tokens have: an enormous token has too many to look at them all.
        let lengths: BTreeSet<usize> = tokens.iter().map(|token| token.len()).collect();
        let mut pairs = vec![];
        for (number, token) in tokens.iter().enumerate() {
            for &cut in lengths.range(..token.len()).filter(|&cut| lengths.contains(&(token.len() - cut))) {
                if let (Some(left), Some(right)) = (id(&token[..cut]), id(&token[cut..])) {
                    pairs.push((left, right, number as u32));
                }
            }
        }
        let mut pairs = Pairs::new(&pairs);
        for (i, id) in pairs.bytes.iter_mut().enumerate() {
            *id = table.get_word(&[(i >> 8) as u8, i as u8]).map_or(NONE, |entry| entry as u32 - 1);
        }
        Ok(Encoder { pattern, tokens: table, bytes, pairs, caches: Pool::new() })
    }

    pub fn encode(&self, texts: &[&str], threads: usize) -> Vec<Encoded> {
        on_threads(texts, threads, |texts| {
            self.caches.with(|| vec![Bucket([Recent { key: [0, 0], ids: [NONE; 4] }; 2]); BUCKETS], |cache| {
                let mut encoded = Encoded::default();
                for text in texts {
                    let before = encoded.ids.len();
                    self.encode_text(text, cache, &mut encoded.ids);
                    encoded.lengths.push(encoded.ids.len() - before);
                }
                encoded
            })
        })
    }

    fn encode_text(&self, text: &str, cache: &mut [Bucket], out: &mut Vec<u32>) {
        let bytes = text.as_bytes();
        self.pattern.split(text, |words| {
            let mut keys = [(0, 0); BATCH];
            for (place, &(start, end)) in keys.iter_mut().zip(words) {
                let key = key(bytes, start, end).unwrap_or(0); // 0 is never found
                *place = (key, hash(key) as usize % BUCKETS);
                prefetch(&cache[place.1]);
            }
            let (mut ids, mut used) = ([0; 4 * BATCH], 0);
            for (&(start, end), &(key, place)) in words.iter().zip(&keys) {
                let halves = halves(key);
                let Bucket(latest) = &mut cache[place];
                let recent = &latest[(latest[0].key != halves) as usize];
                if recent.key == halves && key != 0 {
                    ids[used..used + 4].copy_from_slice(&recent.ids);
                    used += recent.ids.iter().map(|&id| (id != NONE) as usize).sum::<usize>();
                    continue;
                }
                out.extend_from_slice(&ids[..used]);
                used = 0;
                let before = out.len();
                self.encode_word(&bytes[start..end], out);
                if key != 0 && out.len() - before <= 4 {
                    let mut ids = [NONE; 4];
                    ids[..out.len() - before].copy_from_slice(&out[before..]);
                    *latest = [Recent { key: halves, ids }, latest[0]];
                }
            }
            out.extend_from_slice(&ids[..used]);
        });
    }

    /// A word that is a token is that token. In any other the pair of lowest rank is joined, the leftmost
    /// of them first, for as long as there is one.
    fn encode_word(&self, word: &[u8], out: &mut Vec<u32>) {
        match self.tokens.get_word(word) {
            Some(id) => out.push(id as u32 - 1),
            None if word.len() <= SHORT => self.join_short(word, out),
            None => self.join_long(word, out),
        }
    }

    fn join_short(&self, word: &[u8], out: &mut Vec<u32>) {
        let (mut ids, mut ranks, mut n) = ([0; SHORT], [NONE; SHORT], word.len());
        for (id, &byte) in ids.iter_mut().zip(word) {
            *id = self.bytes[byte as usize];
        }
        for i in 1..n {
            ranks[i - 1] = self.pairs.bytes[(word[i - 1] as usize) << 8 | word[i] as usize]; // of the pair from i - 1 on
        }
        loop {
            let (mut at, mut lowest) = (0, NONE);
            for (i, &rank) in ranks[..n - 1].iter().enumerate() {
                if rank < lowest {
                    (at, lowest) = (i, rank);
                }
            }
            if lowest == NONE {
                return out.extend_from_slice(&ids[..n]);
            }
            ids[at] = lowest;
            ids.copy_within(at + 2..n, at + 1);
            ranks.copy_within(at + 1..n, at);
            n -= 1;
            ranks[at] = if at + 1 < n { self.pairs.get(ids[at], ids[at + 1]) } else { NONE };
            if at > 0 {
                ranks[at - 1] = self.pairs.get(ids[at - 1], ids[at]);
            }
        }
    }

    /// The same with a queue, for words of any length.
    fn join_long(&self, word: &[u8], out: &mut Vec<u32>) {
        assert!(word.len() < NONE as usize, "a word of {} bytes", word.len());
        #[derive(Clone, Copy)]
        struct Node {
            id: u32,
            rank: u32, // of the pair that begins here; NONE also where no token begins any more
            next: u32,
            previous: u32,
        }
        let n = word.len() as u32;
        let pair = |left: &Node, right: Option<&Node>| right.map_or(NONE, |right| self.pairs.get(left.id, right.id));
        let node = |(at, &byte): (u32, &u8)| Node { id: self.bytes[byte as usize], rank: NONE, next: at + 1, previous: at.wrapping_sub(1) };
        let mut nodes: Vec<Node> = (0..).zip(word).map(node).collect();
        let mut queue = Queue::new();
        for at in 0..n {
            let rank = pair(&nodes[at as usize], nodes.get(at as usize + 1));
            nodes[at as usize].rank = rank;
            if rank != NONE {
                queue.push(rank, at);
            }
        }
        while let Some((rank, at)) = queue.pop() {
            let here = nodes[at as usize];
            if here.rank != rank {
                continue; // this pair is no more
            }
            let right = &mut nodes[here.next as usize];
            right.rank = NONE;
            let after = right.next;
            (nodes[at as usize].id, nodes[at as usize].next) = (rank, after);
            if let Some(after) = nodes.get_mut(after as usize) {
                after.previous = at;
            }
            for (left, right) in [(here.previous, at), (at, after)] {
                if left < n {
                    let rank = pair(&nodes[left as usize], nodes.get(right as usize));
                    nodes[left as usize].rank = rank;
                    if rank != NONE {
                        queue.push(rank, left);
                    }
                }
            }
        }
        let mut at = 0;
        while at < n {
            out.push(nodes[at as usize].id);
            at = nodes[at as usize].next;
        }
    }
}

/// (rank, place), the lowest first: a radix heap (Ahuja, Mehlhorn, Orlin and Tarjan, 1990, section 2). A pair
/// contains the token that its merge made, so in a vocabulary that was learnt, ranks only rise while a word is
/// joined, and a number that came out never has to be compared again. Where ranks fall, a usual heap helps out.
struct Queue {
    buckets: [Vec<u64>; 65], // by the highest bit in which a number differs from `last`
    last: u64,               // came out of the buckets last
    early: BinaryHeap<Reverse<u64>>, // numbers below `last`
}

impl Queue {
    fn new() -> Queue {
        Queue { buckets: std::array::from_fn(|_| vec![]), last: 0, early: BinaryHeap::new() }
    }

    #[inline(always)]
    fn push(&mut self, rank: u32, place: u32) {
        let number = (rank as u64) << 32 | place as u64;
        if number < self.last {
            self.early.push(Reverse(number));
        } else {
            self.buckets[64 - (number ^ self.last).leading_zeros() as usize].push(number);
        }
    }

    #[inline(always)]
    fn pop(&mut self) -> Option<(u32, u32)> {
        let number = match self.early.pop() {
            Some(Reverse(number)) => number,
            None => self.next()?,
        };
        Some(((number >> 32) as u32, number as u32))
    }

    fn next(&mut self) -> Option<u64> {
        if self.buckets[0].is_empty() {
            let lowest = self.buckets.iter().position(|bucket| !bucket.is_empty())?;
            let numbers = std::mem::take(&mut self.buckets[lowest]);
            self.last = *numbers.iter().min()?;
            for number in numbers {
                self.buckets[64 - (number ^ self.last).leading_zeros() as usize].push(number);
            }
        }
        self.buckets[0].pop()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn join_slowly(ranks: &HashMap<Vec<u8>, u32>, word: &str) -> Vec<u32> {
        let mut parts: Vec<Vec<u8>> = word.bytes().map(|byte| vec![byte]).collect();
        loop {
            let rank = |i: &usize| ranks.get(&parts[i - 1..=*i].concat());
            let Some(i) = (1..parts.len()).filter(|i| rank(i).is_some()).min_by_key(|i| rank(i)) else {
                return parts.iter().map(|part| ranks[part]).collect();
            };
            let joined = parts[i - 1..=i].concat();
            parts.splice(i - 1..=i, [joined]);
        }
    }

    #[test]
    fn joining_short_and_long_words_equals_the_slow_twin() {
        let mut random = crate::Random(2);
        for _ in 0..300 {
            let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
            for _ in 0..random.below(30) {
                let token = random.word(6).into_bytes();
                if token.len() > 1 && !tokens.contains(&token) {
                    tokens.push(token);
                }
            }
            let ranks: HashMap<Vec<u8>, u32> = tokens.iter().cloned().zip(0..).collect();
            let tokens: Vec<&[u8]> = tokens.iter().map(Vec::as_slice).collect();
            let encoder = Encoder::new(Pattern::Whole, &tokens).unwrap();
            for _ in 0..10 {
                let word = random.word(SHORT) + "a";
                let (mut short, mut long) = (vec![], vec![]);
                encoder.join_short(word.as_bytes(), &mut short);
                encoder.join_long(word.as_bytes(), &mut long);
                assert_eq!(short, join_slowly(&ranks, &word), "{word}");
                assert_eq!(long, short, "{word}");
            }
        }
    }
}
