//! Training: counts words and learns merges from the counts. encode.rs applies the merges.
//!
//! Words do not interact, so all that training needs of a text is its different words and how often each occurs.
//! It works on one flat array with all words end to end, a cell per byte. A token is stored in the first and the
//! last cell that it covers, so that both neighbours of a token are one step away, and a merge changes three
//! cells. Nothing is ever moved.
//!
//! Counts of pairs are not kept up to date. Other merges can only lower the count of a pair, so an old count is an
//! upper bound, and the pair with the greatest bound is counted again when it gets to the top of the heap. A new
//! pair always contains the new token, so an array indexed by the other token sums up its count.

use crate::split::split;
use crate::table::Table;
use crate::threads::{on_threads, Pool};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// How often each word occurs in the texts that were added.
pub struct Counts(Pool<Table>); // one table for each thread

impl Counts {
    pub fn new() -> Counts {
        Counts(Pool::new())
    }

    pub fn add(&self, texts: &[&[u8]], threads: usize) {
        let count = |table: &mut Table, text: &[u8]| {
            split(text, |words| words.iter().for_each(|&(start, end)| *table.entry(text, start, end) += 1))
        };
        on_threads(texts, threads, |texts| {
            self.0.with(Table::new, |table| texts.iter().for_each(|text| count(table, text)))
        });
    }

    /// The counts of all threads together. They are removed here.
    fn take_total(&self) -> Table {
        let mut tables = std::mem::take(&mut *self.0 .0.lock().unwrap());
        let mut total = tables.pop().unwrap_or_else(Table::new);
        for table in tables {
            table.each(|word, count| *total.entry(word, 0, word.len()) += count);
        }
        total
    }
}

const DEAD: u32 = u32::MAX; // a cell in which no token begins any more
const EDGE: u32 = u32::MAX - 1; // between two words
const MAX_CELLS: usize = 1 << 30; // each is the position of at most three pairs, and these are numbered in 32 bits

#[derive(Clone, Copy)]
struct Cell {
    token: u32,
    word: u32,
}

/// A pair of neighbours that may be merged. Ordered by count; among equal counts the lower pair is greater.
#[derive(PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
struct Candidate {
    count: u64, // an upper bound of the pair's count
    pair: Reverse<(u32, u32)>,
    first: u32, // its positions are `positions[first..first + number]`
    number: u32,
}

pub struct Trainer {
    cells: Vec<Cell>,
    counts: Vec<u64>,    // of each word
    lengths: Vec<u32>,   // of each token in bytes
    positions: Vec<u32>, // cells where pairs begin, ascending for each pair; at some the pair is gone
    heap: BinaryHeap<Candidate>,
}

/// Collects new pairs by a key that identifies a pair.
struct NewPairs {
    totals: Vec<(u64, u32)>, // by key: count, and number of positions
    keys: Vec<u32>,
    found: Vec<(u32, u32)>, // key, position
}

impl NewPairs {
    fn new(keys: usize) -> NewPairs {
        NewPairs { totals: vec![(0, 0); keys], keys: vec![], found: vec![] }
    }

    #[inline(always)]
    fn add(&mut self, key: u32, position: u32, count: u64) {
        let total = &mut self.totals[key as usize];
        if total.1 == 0 {
            self.keys.push(key);
        }
        *total = (total.0 + count, total.1 + 1);
        self.found.push((key, position));
    }

    /// Moves the positions into `positions`, grouped by key, and makes a candidate of each group.
    fn flush(&mut self, positions: &mut Vec<u32>, heap: &mut BinaryHeap<Candidate>, pair: impl Fn(u32) -> (u32, u32)) {
        let mut first = positions.len();
        positions.resize(first + self.found.len(), 0);
        for &key in &self.keys {
            let (count, number) = self.totals[key as usize];
            heap.push(Candidate { count, pair: Reverse(pair(key)), first: first as u32, number });
            self.totals[key as usize].1 = first as u32; // from here on the index of its next position
            first += number as usize;
        }
        for (key, position) in self.found.drain(..) {
            let next = &mut self.totals[key as usize].1;
            positions[*next as usize] = position;
            *next += 1;
        }
        for key in self.keys.drain(..) {
            self.totals[key as usize] = (0, 0);
        }
    }
}

impl Trainer {
    pub fn new(words: &Counts) -> Result<Trainer, String> {
        let edge = Cell { token: EDGE, word: 0 };
        let (mut cells, mut counts) = (vec![edge], vec![]);
        words.take_total().each(|word, count| {
            cells.extend(word.iter().map(|&byte| Cell { token: byte as u32, word: counts.len() as u32 }));
            cells.push(edge);
            counts.push(count);
        });
        if cells.len() > MAX_CELLS {
            return Err(format!("the different words have {} bytes; the most possible are {MAX_CELLS}", cells.len()));
        }
        let mut pairs = NewPairs::new(1 << 16);
        for (position, two) in cells.windows(2).enumerate() {
            if two[0].token < EDGE && two[1].token < EDGE {
                pairs.add(two[0].token << 8 | two[1].token, position as u32, counts[two[0].word as usize]);
            }
        }
        let (mut positions, mut heap) = (vec![], BinaryHeap::new());
        pairs.flush(&mut positions, &mut heap, |key| (key >> 8, key & 255));
        Ok(Trainer { cells, counts, lengths: vec![1; 256], positions, heap })
    }

    /// Learns up to `limit` more merges, fewer if no pair is left. Each joins two ids into the next free id.
    pub fn merge(&mut self, limit: usize) -> Vec<(u32, u32)> {
        let [mut left, mut right] = [(); 2].map(|()| NewPairs::new(self.lengths.len() + limit));
        let mut merges = vec![];
        while merges.len() < limit {
            let Some(best) = self.most_frequent() else { break };
            self.apply(best, &mut left, &mut right);
            merges.push(best.pair.0);
        }
        merges
    }

    /// The pair of the greatest count. All other bounds are lower, and therefore all other counts.
    fn most_frequent(&mut self) -> Option<Candidate> {
        loop {
            let mut top = self.heap.pop()?;
            let bound = top.count;
            let Reverse((a, b)) = top.pair;
            let length = self.lengths[a as usize];
            let (first, mut remaining) = (top.first as usize, 0);
            top.count = 0;
            for i in first..first + top.number as usize {
                let position = self.positions[i];
                let cell = self.cells[position as usize];
                self.positions[first + remaining] = position;
                if cell.token == a && self.cells[(position + length) as usize].token == b {
                    remaining += 1;
                    top.count += self.counts[cell.word as usize];
                }
            }
            top.number = remaining as u32;
            if remaining > 0 {
                if top.count == bound || self.heap.peek().map_or(true, |next| *next < top) {
                    return Some(top);
                }
                self.heap.push(top);
            }
        }
    }

    fn apply(&mut self, best: Candidate, left: &mut NewPairs, right: &mut NewPairs) {
        let Reverse((a, b)) = best.pair;
        let new = self.lengths.len() as u32;
        let (length_a, length_b) = (self.lengths[a as usize], self.lengths[b as usize]);
        self.lengths.push(length_a + length_b);
        for i in best.first..best.first + best.number {
            let position = self.positions[i as usize];
            let (middle, end) = ((position + length_a) as usize, (position + length_a + length_b) as usize);
            let Cell { token, word } = self.cells[position as usize];
            if token != a {
                continue; // in "aaa" the merge of the first pair took the "a" of the second
            }
            let count = self.counts[word as usize];
            let (before, after) = (self.cells[position as usize - 1].token, self.cells[end].token);
            self.cells[middle].token = DEAD;
            self.cells[position as usize].token = new;
            self.cells[end - 1].token = new;
            if before < EDGE {
                left.add(before, position - self.lengths[before as usize], count);
            }
            if after < EDGE {
                right.add(after, position, count);
            }
        }
        left.flush(&mut self.positions, &mut self.heap, |before| (before, new));
        right.flush(&mut self.positions, &mut self.heap, |after| (new, after));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_the_most_frequent_pair_and_among_equals_the_lower_ids() {
        let counts = Counts::new();
        counts.add(&[b"dcba", b"dcba", b"abab"], 2);
        let mut trainer = Trainer::new(&counts).unwrap();
        let [a, b, c, d] = [b'a', b'b', b'c', b'd'].map(u32::from);
        assert_eq!(trainer.merge(1), [(b, a)]);
        assert_eq!(trainer.merge(9), [(c, 256), (d, 257), (a, 256), (259, b)]);
        assert_eq!(trainer.merge(9), []);
    }
}
