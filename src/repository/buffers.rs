//! Large buffers that are used again: what one thread allocates and another frees would stay with
//! the allocator, several times over, and be faulted in anew each time.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

/// What is smaller is left to the allocator.
const BYTES_MIN: usize = 1 << 20;

/// Buffers of the plain bytes of segments.
pub static PLAIN: Buffers = Buffers::new(64 << 20);
/// Buffers that objects are encoded into.
pub(super) static ENCODED: Buffers = Buffers::new(64 << 20);

/// Buffers at rest.
pub struct Buffers {
    kept: Mutex<Vec<Vec<u8>>>,
    /// In all.
    bytes_max: usize,
}

impl Buffers {
    const fn new(bytes_max: usize) -> Self {
        Self {
            kept: Mutex::new(Vec::new()),
            bytes_max,
        }
    }

    /// An empty buffer with room for so many bytes.
    pub fn take(&self, bytes: usize) -> Vec<u8> {
        if bytes < BYTES_MIN {
            return Vec::with_capacity(bytes);
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = kept.iter().position(|buffer| buffer.capacity() >= bytes);
        fitting.map_or_else(|| Vec::with_capacity(bytes), |at| kept.swap_remove(at))
    }

    /// What is in a buffer, for as long as anybody reads it; then the buffer is put back. What fits
    /// into less is copied there.
    pub(super) fn lend(&'static self, buffer: Vec<u8>) -> Bytes {
        if buffer.capacity() < BYTES_MIN {
            return Bytes::copy_from_slice(&buffer);
        }
        Bytes::from_owner(Lent {
            buffer,
            owner: self,
        })
    }

    /// Keeps a buffer for the next one that asks, unless enough are kept.
    pub(super) fn put_back(&self, mut buffer: Vec<u8>) {
        if buffer.capacity() < BYTES_MIN {
            return;
        }
        buffer.clear();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: usize = kept.iter().map(Vec::capacity).sum();
        if bytes.saturating_add(buffer.capacity()) <= self.bytes_max {
            kept.push(buffer);
        }
    }
}

/// A buffer that goes back to where it came from.
struct Lent {
    buffer: Vec<u8>,
    owner: &'static Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.owner.put_back(std::mem::take(&mut self.buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_and_empty() {
        let buffers = Buffers::new(4 * BYTES_MIN);
        let mut first = buffers.take(BYTES_MIN);
        first.extend_from_slice(b"old");
        let place = first.as_ptr();
        buffers.put_back(first);
        let second = buffers.take(BYTES_MIN);
        assert_eq!((second.as_ptr(), second.len()), (place, 0));
        let third = buffers.take(BYTES_MIN);
        assert_ne!(third.as_ptr(), place);
    }

    /// One that came back too early would be written over while it is on its way to a store.
    #[test]
    fn a_lent_buffer_comes_back_once_nobody_reads_it() {
        static BUFFERS: Buffers = Buffers::new(4 * BYTES_MIN);
        let mut buffer = BUFFERS.take(BYTES_MIN);
        buffer.extend_from_slice(b"object");
        let first = BUFFERS.lend(buffer);
        let second = first.clone();
        drop(first);
        assert_eq!(BUFFERS.kept.lock().unwrap().len(), 0);
        assert_eq!(second, "object");
        drop(second);
        assert_eq!(BUFFERS.kept.lock().unwrap().len(), 1);
        assert_eq!(BUFFERS.lend(b"small".to_vec()), "small");
    }

    #[test]
    fn no_more_is_kept_than_the_bound() {
        let buffers = Buffers::new(2 * BYTES_MIN);
        for _ in 0..3 {
            buffers.put_back(Vec::with_capacity(BYTES_MIN));
        }
        assert_eq!(buffers.kept.lock().unwrap().len(), 2);
        // too small to be worth it, and too small for who asks
        buffers.put_back(Vec::with_capacity(BYTES_MIN - 1));
        assert!(buffers.take(3 * BYTES_MIN).capacity() >= 3 * BYTES_MIN);
        assert_eq!(buffers.kept.lock().unwrap().len(), 2);
    }
}
