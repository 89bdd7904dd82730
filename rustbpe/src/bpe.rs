//! Byte-pair encoding: counting words and learning merges from the counts. encode.rs applies the merges.
//!
//! The one idea to know: words do not interact, so text is reduced to different words and how often
//! each occurs. Training then lives in one flat array with all words end to end, a cell per byte. A
//! token is written into the first and the last cell that it covers, so that from any token both
//! neighbours are one step away, and a merge changes three cells. Nothing is ever moved.
//!
//! Counts of pairs are not kept up to date. What a pair's neighbours take from it only lowers its
//! count, so an old count is a bound, and the pair with the greatest bound is counted anew when its
//! turn comes. New pairs all contain the new token: an array by neighbour adds them up.

use crate::split::Pattern;
use crate::table::Table;
use crate::threads::{on_threads, Pool};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::RwLock;

// -----------------------------------------------------------------------------
// Counting

/// How often each word occurs in the texts that were added.
pub struct Counts {
    pattern: Pattern,
    tables: Pool<Table>, // one for each thread that ever counted
    adding: RwLock<()>,  // many may add at a time, but nobody while the tables are summed
}

/// Different words end to end in `bytes`, where each ends, and how often it occurs.
#[derive(Default)]
pub struct Words {
    pub bytes: Vec<u8>,
    pub ends: Vec<u64>,
    pub counts: Vec<u64>,
}

impl Words {
    pub fn each(&self) -> impl Iterator<Item = (&[u8], u64)> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let words = starts.zip(&self.ends).map(|(start, &end)| &self.bytes[start as usize..end as usize]);
        words.zip(self.counts.iter().copied())
    }

    pub fn sorted(&self) -> Words {
        let mut all: Vec<_> = self.each().collect();
        all.sort_unstable();
        let mut words = Words::default();
        all.into_iter().for_each(|(word, count)| words.push(word, count));
        words
    }

    fn push(&mut self, word: &[u8], count: u64) {
        self.bytes.extend_from_slice(word);
        self.ends.push(self.bytes.len() as u64);
        self.counts.push(count);
    }
}

impl Counts {
    pub fn new(pattern: Pattern) -> Counts {
        Counts { pattern, tables: Pool::new(), adding: RwLock::new(()) }
    }

    pub fn add(&self, texts: &[&str], threads: usize) {
        let _adding = self.adding.read().unwrap();
        on_threads(texts, threads, |texts| {
            self.tables.with(Table::new, |table| {
                for text in texts {
                    self.pattern.split(text, |words| {
                        for &(start, end) in words {
                            table.add(text.as_bytes(), start, end, 1);
                        }
                    });
                }
            })
        });
    }

    pub fn add_words(&self, words: &[&str], counts: &[u64]) {
        let _adding = self.adding.read().unwrap();
        self.tables.with(Table::new, |table| {
            for (word, count) in words.iter().zip(counts).filter(|(word, _)| !word.is_empty()) {
                table.add(word.as_bytes(), 0, word.len(), *count);
            }
        });
    }

    /// What all threads counted, in one table.
    fn with_sum<R>(&self, work: impl FnOnce(&Table) -> R) -> R {
        let _alone = self.adding.write().unwrap();
        let mut tables = self.tables.take();
        let mut sum = tables.pop().unwrap_or_else(Table::new);
        for other in tables {
            other.each(|word, count| sum.add(word, 0, word.len(), count));
        }
        self.tables.with(|| sum, |sum| work(sum))
    }

    /// How many different words there are.
    pub fn number(&self) -> usize {
        self.with_sum(Table::len)
    }

    /// All words, in no particular order.
    pub fn words(&self) -> Words {
        let mut words = Words::default();
        self.with_sum(|table| table.each(|word, count| words.push(word, count)));
        words
    }
}

// -----------------------------------------------------------------------------
// Training

const DEAD: u32 = u32::MAX; // a cell in which no token begins any more
const EDGE: u32 = u32::MAX - 1; // between two words
const MOST_CELLS: usize = 1 << 30; // there are at most three places for each, numbered in 32 bits

#[derive(Clone, Copy)]
struct Cell {
    token: u32,
    word: u32,
}

/// A pair of neighbours that may be merged. Ordered by count, and among equal counts the lower pair is greater.
#[derive(PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
struct Candidate {
    count: u64,                 // at least how often the pair occurs: other merges may have used up some
    pair: Reverse<(u32, u32)>,
    first: u32, // its places are `places[first..first + number]`
    number: u32,
}

pub struct Trainer {
    cells: Vec<Cell>,
    counts: Vec<u64>,  // of each word
    lengths: Vec<u32>, // of each token in bytes
    places: Vec<u32>,  // cells where pairs begin, ascending for each pair; some no longer do
    heap: BinaryHeap<Candidate>,
}

/// New pairs that one merge makes on one of its sides: by the neighbour, how often and where.
#[derive(Default)]
struct Side {
    totals: Vec<(u64, u32)>, // by neighbour: count, and number of places
    neighbours: Vec<u32>,
    found: Vec<(u32, u32)>, // neighbour, place
}

impl Side {
    #[inline(always)]
    fn add(&mut self, neighbour: u32, place: u32, count: u64) {
        let total = &mut self.totals[neighbour as usize];
        if total.1 == 0 {
            self.neighbours.push(neighbour);
        }
        total.0 = total.0.saturating_add(count);
        total.1 += 1;
        self.found.push((neighbour, place));
    }

    /// Moves what was found into `places`, grouped by neighbour, and makes a candidate of each group.
    fn flush(&mut self, places: &mut Vec<u32>, heap: &mut BinaryHeap<Candidate>, pair: impl Fn(u32) -> (u32, u32)) {
        let mut first = places.len();
        places.resize(first + self.found.len(), 0);
        for &neighbour in &self.neighbours {
            let (count, number) = self.totals[neighbour as usize];
            heap.push(Candidate { count, pair: Reverse(pair(neighbour)), first: first as u32, number });
            self.totals[neighbour as usize] = (0, first as u32); // from here on: where its next place goes
            first += number as usize;
        }
        for (neighbour, place) in self.found.drain(..) {
            let next = &mut self.totals[neighbour as usize].1;
            places[*next as usize] = place;
            *next += 1;
        }
        for neighbour in self.neighbours.drain(..) {
            self.totals[neighbour as usize] = (0, 0);
        }
    }
}

impl Trainer {
    pub fn new(words: Words) -> Result<Trainer, String> {
        let size = words.bytes.len() + words.counts.len() + 1;
        if size > MOST_CELLS {
            return Err(format!("{size} bytes in different words are too many: {MOST_CELLS} at most"));
        }
        let edge = Cell { token: EDGE, word: 0 };
        let mut cells = Vec::with_capacity(size);
        for (number, (word, _)) in words.each().enumerate() {
            cells.push(edge);
            cells.extend(word.iter().map(|&byte| Cell { token: byte as u32, word: number as u32 }));
        }
        cells.push(edge);
        let mut trainer = Trainer {
            cells,
            counts: words.counts,
            lengths: vec![1; 256],
            places: vec![],
            heap: BinaryHeap::new(),
        };
        trainer.find_pairs_of_bytes();
        Ok(trainer)
    }

    fn find_pairs_of_bytes(&mut self) {
        let mut totals = vec![(0u64, 0u32); 1 << 16]; // count, number of places
        let pairs = || self.cells.windows(2).enumerate().filter(|(_, two)| two[0].token < 256 && two[1].token < 256);
        let index = |two: &[Cell]| (two[0].token << 8 | two[1].token) as usize;
        for (_, two) in pairs() {
            let total = &mut totals[index(two)];
            *total = (total.0.saturating_add(self.counts[two[0].word as usize]), total.1 + 1);
        }
        let mut first = 0;
        for (i, total) in totals.iter_mut().enumerate().filter(|(_, total)| total.1 > 0) {
            let pair = Reverse(((i >> 8) as u32, (i & 255) as u32));
            self.heap.push(Candidate { count: total.0, pair, first, number: total.1 });
            first += total.1;
            total.1 = first - total.1; // from here on: where the next place goes
        }
        self.places = vec![0; first as usize];
        for (place, two) in pairs() {
            let next = &mut totals[index(two)].1;
            self.places[*next as usize] = place as u32;
            *next += 1;
        }
    }

    /// Learns so many more merges, or fewer where no pair is left: the ids that are joined, each time to the next free id.
    pub fn merge(&mut self, wanted: usize) -> Vec<(u32, u32)> {
        let (mut left, mut right) = (Side::default(), Side::default());
        for side in [&mut left, &mut right] {
            side.totals.resize(self.lengths.len() + wanted, (0, 0));
        }
        let mut merges = vec![];
        while merges.len() < wanted {
            let Some(best) = self.most_frequent() else { break };
            self.apply(best, &mut left, &mut right);
            merges.push(best.pair.0);
        }
        merges
    }

    /// Counts only fall once a pair is there, so the greatest of the known counts that is still true is the greatest.
    fn most_frequent(&mut self) -> Option<Candidate> {
        loop {
            let mut top = self.heap.pop()?;
            let known = top.count;
            let Reverse((a, b)) = top.pair;
            let length = self.lengths[a as usize];
            let (first, mut kept) = (top.first as usize, 0);
            top.count = 0;
            for i in first..first + top.number as usize {
                let place = self.places[i];
                let cell = self.cells[place as usize];
                self.places[first + kept] = place;
                if cell.token == a && self.cells[(place + length) as usize].token == b {
                    kept += 1;
                    top.count = top.count.saturating_add(self.counts[cell.word as usize]);
                }
            }
            top.number = kept as u32;
            if kept > 0 {
                if top.count == known || self.heap.peek().map_or(true, |next| *next < top) {
                    return Some(top);
                }
                self.heap.push(top);
            }
        }
    }

    fn apply(&mut self, best: Candidate, left: &mut Side, right: &mut Side) {
        let Reverse((a, b)) = best.pair;
        let new = self.lengths.len() as u32;
        let (length_a, length_b) = (self.lengths[a as usize], self.lengths[b as usize]);
        self.lengths.push(length_a + length_b);
        for i in best.first..best.first + best.number {
            let place = self.places[i as usize];
            let (middle, end) = ((place + length_a) as usize, (place + length_a + length_b) as usize);
            let Cell { token, word } = self.cells[place as usize];
            if token != a || self.cells[middle].token != b {
                continue; // in "aaa" the second pair ends with the first one's merge
            }
            let count = self.counts[word as usize];
            let (before, after) = (self.cells[place as usize - 1].token, self.cells[end].token);
            self.cells[middle].token = DEAD;
            self.cells[place as usize].token = new;
            self.cells[end - 1].token = new;
            if before < EDGE {
                left.add(before, place - self.lengths[before as usize], count);
            }
            if after < EDGE {
                right.add(after, place, count);
            }
        }
        left.flush(&mut self.places, &mut self.heap, |before| (before, new));
        right.flush(&mut self.places, &mut self.heap, |after| (new, after));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// As one would explain it: count all pairs anew for each merge.
    fn learn_slowly(words: &[(&str, u64)], wanted: usize) -> Vec<(u32, u32)> {
        let mut words: Vec<(Vec<u32>, u64)> =
            words.iter().map(|(word, count)| (word.bytes().map(u32::from).collect(), *count)).collect();
        let mut merges = vec![];
        while merges.len() < wanted {
            let mut pairs = HashMap::new();
            for (ids, count) in &words {
                for pair in ids.windows(2) {
                    *pairs.entry((pair[0], pair[1])).or_insert(0) += count;
                }
            }
            let Some((&best, _)) = pairs.iter().max_by_key(|(&pair, &count)| (count, Reverse(pair))) else { break };
            let new = 256 + merges.len() as u32;
            for (ids, _) in &mut words {
                let mut i = 0;
                while i + 1 < ids.len() {
                    if (ids[i], ids[i + 1]) == best {
                        ids.splice(i..i + 2, [new]);
                    }
                    i += 1;
                }
            }
            merges.push(best);
        }
        merges
    }

    #[test]
    fn merges_are_those_of_the_slow_trainer() {
        let mut random = crate::Random(1);
        for _ in 0..300 {
            let words: Vec<String> = (0..random.below(12)).map(|_| random.word(20)).collect();
            let mut counted: HashMap<&str, u64> = HashMap::new();
            words.iter().for_each(|word| *counted.entry(word).or_insert(0) += 1);
            let counts = Counts::new(Pattern::Whole);
            let (first, second) = words.split_at(words.len() / 2);
            for (part, threads) in [(first, 1), (second, 3)] {
                counts.add(&part.iter().map(String::as_str).collect::<Vec<_>>(), threads);
            }
            let mut trainer = Trainer::new(counts.words()).unwrap();
            let mut merges = trainer.merge(3);
            merges.extend(trainer.merge(37));
            let counted: Vec<(&str, u64)> = counted.into_iter().filter(|(word, _)| !word.is_empty()).collect();
            assert_eq!(counts.number(), counted.len());
            assert_eq!(merges, learn_slowly(&counted, 40), "{counted:?}");
        }
    }
}
