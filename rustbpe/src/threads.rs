//! Shares work on many texts among threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

const CHUNK: usize = 1 << 16; // bytes

/// Runs `work` on all chunks of texts of about 64 kB and returns the results in order. `threads` 0: one for each core
/// that this process may use.
pub fn on_threads<R: Send>(texts: &[&[u8]], threads: usize, work: impl Fn(&[&[u8]]) -> R + Sync) -> Vec<R> {
    let (mut chunks, mut first, mut size) = (vec![], 0, 0);
    for (i, text) in texts.iter().enumerate() {
        size += text.len() + 16;
        if size >= CHUNK || i + 1 == texts.len() {
            chunks.push(&texts[first..=i]);
            (first, size) = (i + 1, 0);
        }
    }
    let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
    let (next, results) = (AtomicUsize::new(0), Mutex::new(vec![]));
    let run = || loop {
        let i = next.fetch_add(1, Ordering::Relaxed);
        let Some(chunk) = chunks.get(i) else { break };
        let result = work(chunk);
        results.lock().unwrap().push((i, result));
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(chunks.len()) {
            if std::thread::Builder::new().spawn_scoped(scope, run).is_err() {
                break; // the system allows no more threads; those that there are do all the work
            }
        }
        run();
    });
    let mut results = results.into_inner().unwrap();
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Values of which a thread has one to itself while it works; they are retained for later work.
pub struct Pool<T>(pub Mutex<Vec<T>>);

impl<T> Pool<T> {
    pub fn new() -> Pool<T> {
        Pool(Mutex::new(vec![]))
    }

    pub fn with<R>(&self, make: impl FnOnce() -> T, work: impl FnOnce(&mut T) -> R) -> R {
        let retained = self.0.lock().unwrap().pop();
        let mut value = retained.unwrap_or_else(make);
        let result = work(&mut value);
        self.0.lock().unwrap().push(value);
        result
    }
}
