//! The C interface that python/rustbpe/__init__.py calls. The algorithms are in the other files.
//!
//! A function that can fail returns -1 if it does, and `rustbpe_error` then returns the message. A panic is such a
//! failure, too. Texts (and tokens) come as bytes end to end with `number + 1` offsets; the caller guarantees that
//! pointers, numbers and offsets are right and that texts are UTF-8.

mod bpe;
mod encode;
mod split;
mod table;
mod threads;
mod unicode;

use bpe::{Counts, Trainer};
use encode::Encoder;
use std::cell::RefCell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::slice::{from_raw_parts, from_raw_parts_mut};

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

unsafe fn slices<'a>(data: *const u8, offsets: *const i64, number: i64) -> Vec<&'a [u8]> {
    let offsets = from_raw_parts(offsets, number as usize + 1);
    offsets.windows(2).map(|two| from_raw_parts(data.add(two[0] as usize), (two[1] - two[0]) as usize)).collect()
}

/// Copies the last error's message (at most `size` bytes) and returns its length.
/// # Safety
/// The caller keeps the promises at the top of this file, here and below.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_error(message: *mut u8, size: i64) -> i64 {
    ERROR.with(|error| {
        let error = error.borrow();
        let length = error.len().min(size as usize);
        from_raw_parts_mut(message, length).copy_from_slice(&error.as_bytes()[..length]);
        length as i64
    })
}

// -----------------------------------------------------------------------------
// Training

#[no_mangle]
pub extern "C" fn rustbpe_counts_new() -> i64 {
    guard(|| boxed(Counts::new()))
}

/// # Safety
/// See above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counts_free(counts: *mut Counts) {
    drop(Box::from_raw(counts));
}

/// # Safety
/// See above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_counts_add(
    counts: *const Counts,
    data: *const u8,
    offsets: *const i64,
    number: i64,
    threads: i64,
) -> i64 {
    guard(|| {
        (*counts).add(&slices(data, offsets, number), threads as usize);
        Ok(0)
    })
}

/// A trainer of all that was counted; the counts are empty afterwards.
/// # Safety
/// See above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_new(counts: *const Counts) -> i64 {
    guard(|| boxed(Trainer::new(&*counts)?))
}

/// # Safety
/// See above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_free(trainer: *mut Trainer) {
    drop(Box::from_raw(trainer));
}

/// Learns up to `limit` more merges, writes two ids for each and returns how many there are.
/// # Safety
/// See above; there is room for `2 * limit` ids, and no other thread uses the trainer.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_trainer_merge(trainer: *mut Trainer, limit: i64, ids: *mut u32) -> i64 {
    guard(|| {
        let merges = (*trainer).merge(limit as usize);
        for (i, (left, right)) in merges.iter().enumerate() {
            ids.add(2 * i).write(*left);
            ids.add(2 * i + 1).write(*right);
        }
        Ok(merges.len() as i64)
    })
}

// -----------------------------------------------------------------------------
// Encoding

/// # Safety
/// See above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoder_new(data: *const u8, offsets: *const i64, number: i64) -> i64 {
    guard(|| boxed(Encoder::new(&slices(data, offsets, number))?))
}

/// # Safety
/// See above.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encoder_free(encoder: *mut Encoder) {
    drop(Box::from_raw(encoder));
}

/// Writes the ids of texts, of 2 or 4 bytes (`width`), and where each text's begin in them; returns how many there are.
/// # Safety
/// See above; there is room for as many ids as the texts have bytes, and for `number + 1` text offsets.
#[no_mangle]
pub unsafe extern "C" fn rustbpe_encode(
    encoder: *const Encoder,
    data: *const u8,
    offsets: *const i64,
    number: i64,
    threads: i64,
    width: i64,
    ids: *mut u8,
    text_offsets: *mut i64,
) -> i64 {
    guard(|| {
        let encoded = (*encoder).encode(&slices(data, offsets, number), threads as usize);
        let (mut total, mut end) = (0, 0);
        let ends = encoded.iter().flat_map(|part| &part.lengths).map(|length| {
            end += *length as i64;
            end
        });
        for (i, offset) in std::iter::once(0).chain(ends).enumerate() {
            text_offsets.add(i).write(offset);
        }
        for part in &encoded {
            let length = part.ids.len();
            if width == 2 {
                let out = from_raw_parts_mut((ids as *mut u16).add(total), length);
                out.iter_mut().zip(&part.ids).for_each(|(narrow, &id)| *narrow = id as u16);
            } else {
                from_raw_parts_mut((ids as *mut u32).add(total), length).copy_from_slice(&part.ids);
            }
            total += length;
        }
        Ok(total as i64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error() {
        assert_eq!(guard(|| panic!("out of {}", "luck")), -1);
        let mut buffer = vec![0; 200];
        let length = unsafe { rustbpe_error(buffer.as_mut_ptr(), 200) };
        assert_eq!(&buffer[..length as usize], b"a bug in rustbpe: out of luck");
    }
}
