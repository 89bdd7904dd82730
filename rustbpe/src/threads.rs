//! Work on many texts, shared out among threads.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

/// Runs `work(piece)` for all pieces of texts of about 64 kB each, on so many threads (0: as many as this
/// process may use); the results in order.
pub fn on_threads<R: Send>(texts: &[&str], threads: usize, work: impl Fn(&[&str]) -> R + Sync) -> Vec<R> {
    let (mut pieces, mut first, mut size) = (vec![], 0, 0);
    for (i, text) in texts.iter().enumerate() {
        size += text.len() + 16;
        if size >= 1 << 16 || i + 1 == texts.len() {
            pieces.push(&texts[first..=i]);
            (first, size) = (i + 1, 0);
        }
    }
    let threads = if threads == 0 { std::thread::available_parallelism().map_or(1, usize::from) } else { threads };
    let (next, results) = (AtomicUsize::new(0), Mutex::new(vec![]));
    let run = || loop {
        let i = next.fetch_add(1, Ordering::Relaxed);
        let Some(piece) = pieces.get(i) else { break };
        let result = work(piece);
        results.lock().unwrap().push((i, result));
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.clamp(1, pieces.len().max(1)) {
            if std::thread::Builder::new().spawn_scoped(scope, run).is_err() {
                break; // the system has no more threads; those that there are do it all
            }
        }
        run();
    });
    let mut results = results.into_inner().unwrap();
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Something that each thread has of its own while it works, and that is kept for the next time.
pub struct Pool<T>(Mutex<Vec<T>>);

impl<T> Pool<T> {
    pub fn new() -> Pool<T> {
        Pool(Mutex::new(vec![]))
    }

    /// All there are; the pool is empty then.
    pub fn take(&self) -> Vec<T> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    pub fn with<R>(&self, make: impl FnOnce() -> T, work: impl FnOnce(&mut T) -> R) -> R {
        let kept = self.0.lock().unwrap().pop();
        let mut item = kept.unwrap_or_else(make);
        let result = work(&mut item);
        self.0.lock().unwrap().push(item);
        result
    }
}
