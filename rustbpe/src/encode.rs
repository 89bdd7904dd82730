//! Encoding: text to token ids.
//!
//! Most words of a text occurred shortly before. A cache in which each word has one place, with its ids beside it,
//! holds them, and the places of a batch of words are prefetched together. Only other words are looked up or merged
//! pair by pair.

use crate::split::{split, BATCH};
use crate::table::{halves, hash, key, prefetch, Table};
use crate::threads::{on_threads, Pool};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};

const NONE: u32 = u32::MAX;
const SHORT: usize = 64; // bytes of a word for which a linear search of the lowest rank is the fastest

/// The ids of some texts, in order.
#[derive(Default)]
pub struct Encoded {
    pub ids: Vec<u32>,
    pub lengths: Vec<usize>, // of each text in ids
}

pub struct Encoder {
    tokens: Table, // token -> id + 1
    bytes: [u32; 256],
    pairs: Pairs,
    caches: Pool<Vec<Bucket>>,
}

/// From two tokens to the id of the token that they make together.
struct Pairs {
    bytes: Vec<u32>, // for two tokens of a byte each, by bytes
    slots: Vec<u64>, // for any: left id, right id, id with 21 bits each; a power of two of them
}

const ID_BITS: u32 = 21; // rustbpe/__init__.py limits vocabularies accordingly
const EMPTY: u64 = u64::MAX;

impl Pairs {
    fn new(pairs: &[(u32, u32, u32)], bytes: Vec<u32>) -> Pairs {
        let mut table = Pairs { bytes, slots: vec![EMPTY; (pairs.len() * 2 + 2).next_power_of_two()] };
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

/// A word that was encoded recently.
#[derive(Clone, Copy)]
struct Recent {
    key: [u64; 2],
    ids: [u32; 4], // NONE after the last
}

/// The two most recent words with the same hash: one line of the processor's cache.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Bucket([Recent; 2]);

const BUCKETS: usize = 1 << 17; // 8 MB for each thread

impl Encoder {
    /// Of tokens whose ids are 0, 1, 2, ... Each of the 256 bytes must be a token.
    pub fn new(tokens: &[&[u8]]) -> Result<Encoder, String> {
        if tokens.len() >= 1 << ID_BITS {
            return Err(format!("there are {} tokens; the most possible are {}", tokens.len(), (1 << ID_BITS) - 1));
        }
        let mut table = Table::new();
        for (id, token) in tokens.iter().enumerate() {
            if token.is_empty() {
                return Err(format!("token {id} is empty"));
            }
            *table.entry(token, 0, token.len()) = id as u64 + 1;
        }
        let id = |token: &[u8]| table.get(token).map(|entry| entry as u32 - 1);
        let mut bytes = [NONE; 256];
        for byte in 0..=255 {
            bytes[byte as usize] = id(&[byte]).ok_or(format!("the byte {byte} has no token"))?;
        }
        // Only cuts into lengths that tokens have: a token of a megabyte has too many cuts to try all.
        let lengths: BTreeSet<usize> = tokens.iter().map(|token| token.len()).collect();
        let mut pairs = vec![];
        for (number, token) in tokens.iter().enumerate() {
            for &cut in lengths.range(..token.len()).filter(|&cut| lengths.contains(&(token.len() - cut))) {
                if let (Some(left), Some(right)) = (id(&token[..cut]), id(&token[cut..])) {
                    pairs.push((left, right, number as u32));
                }
            }
        }
        let pairs_of_bytes = (0..=u16::MAX).map(|two| id(&two.to_be_bytes()).unwrap_or(NONE)).collect();
        Ok(Encoder { pairs: Pairs::new(&pairs, pairs_of_bytes), tokens: table, bytes, caches: Pool::new() })
    }

    pub fn encode(&self, texts: &[&[u8]], threads: usize) -> Vec<Encoded> {
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

    fn encode_text(&self, text: &[u8], cache: &mut [Bucket], out: &mut Vec<u32>) {
        split(text, |words| {
            let mut keys = [(0, 0); BATCH];
            for (place, &(start, end)) in keys.iter_mut().zip(words) {
                let key = key(text, start, end).unwrap_or(0); // 0 is never found
                *place = (key, hash(key) as usize % BUCKETS);
                prefetch(&cache[place.1]);
            }
            let (mut ids, mut used) = ([0; 4 * BATCH], 0); // those that are not in `out` yet
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
                self.encode_word(&text[start..end], out);
                if key != 0 && out.len() - before <= 4 {
                    let mut ids = [NONE; 4];
                    ids[..out.len() - before].copy_from_slice(&out[before..]);
                    *latest = [Recent { key: halves, ids }, latest[0]];
                }
            }
            out.extend_from_slice(&ids[..used]);
        });
    }

    /// A word that is a token becomes that token, even if no merges lead to it, as in tiktoken. In any other word the
    /// pair of the lowest rank is merged, the leftmost of them first, for as long as there is one.
    fn encode_word(&self, word: &[u8], out: &mut Vec<u32>) {
        match self.tokens.get(word) {
            Some(id) => out.push(id as u32 - 1),
            None if word.len() <= SHORT => self.merge_short(word, out),
            None => self.merge_long(word, out),
        }
    }

    fn merge_short(&self, word: &[u8], out: &mut Vec<u32>) {
        let (mut ids, mut ranks, mut n) = ([0; SHORT], [NONE; SHORT], word.len());
        for (id, &byte) in ids.iter_mut().zip(word) {
            *id = self.bytes[byte as usize];
        }
        for i in 1..n {
            ranks[i - 1] = self.pairs.bytes[(word[i - 1] as usize) << 8 | word[i] as usize]; // of the pair at i - 1
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

    /// The same with a heap, for words of any length.
    fn merge_long(&self, word: &[u8], out: &mut Vec<u32>) {
        // A token is at the index of its first byte. The rank is that of the pair with the next token, else NONE.
        #[derive(Clone, Copy)]
        struct Node {
            id: u32,
            rank: u32,
            next: usize,
            previous: usize,
        }
        let node = |(at, &byte): (usize, &u8)| {
            Node { id: self.bytes[byte as usize], rank: NONE, next: at + 1, previous: at.wrapping_sub(1) }
        };
        let mut nodes: Vec<Node> = word.iter().enumerate().map(node).collect();
        let mut heap = BinaryHeap::new();
        let update = |nodes: &mut [Node], heap: &mut BinaryHeap<_>, at: usize| {
            let Some(&Node { id, next, .. }) = nodes.get(at) else { return };
            let rank = nodes.get(next).map_or(NONE, |right| self.pairs.get(id, right.id));
            nodes[at].rank = rank;
            if rank != NONE {
                heap.push(Reverse((rank, at)));
            }
        };
        for at in 0..nodes.len() {
            update(&mut nodes, &mut heap, at);
        }
        while let Some(Reverse((rank, at))) = heap.pop() {
            let Node { rank: current, next, previous, .. } = nodes[at];
            if rank != current {
                continue; // another merge took one of the two
            }
            nodes[next].rank = NONE;
            let after = nodes[next].next;
            (nodes[at].id, nodes[at].next) = (rank, after);
            if let Some(after) = nodes.get_mut(after) {
                after.previous = at;
            }
            update(&mut nodes, &mut heap, previous);
            update(&mut nodes, &mut heap, at);
        }
        let mut at = 0;
        while at < nodes.len() {
            out.push(nodes[at].id);
            at = nodes[at].next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_and_long_words_are_merged_alike() {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|byte| vec![byte]).collect();
        tokens.extend([b"ba", b"ab", b"aa"].map(|token| token.to_vec()));
        tokens.extend([b"aab".to_vec(), b"abab".to_vec(), b"baab".to_vec(), b"aaaa".to_vec()]);
        let encoder = Encoder::new(&tokens.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
        for bits in 0..4096u32 {
            let word: Vec<u8> = (0..12).map(|i| b'a' + (bits >> i & 1) as u8).collect();
            let (mut short, mut long) = (vec![], vec![]);
            encoder.merge_short(&word, &mut short);
            encoder.merge_long(&word, &mut long);
            assert_eq!(short, long, "{word:?}");
        }
    }

    #[test]
    fn tokens_that_cannot_be_a_vocabulary_are_refused() {
        assert_eq!(Encoder::new(&[b"a"]).err().unwrap(), "the byte 0 has no token");
        assert_eq!(Encoder::new(&[b"a", b""]).err().unwrap(), "token 1 is empty");
    }
}
