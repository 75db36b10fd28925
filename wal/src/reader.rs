//! Reads fields one after another.

use thiserror::Error;

use crate::lsn::Lsn;

/// Bytes ended within a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("{part} is short: offset={offset}, expected={expected}, found={found}")]
pub struct TooShort {
    /// What was being read.
    pub part: &'static str,
    /// Where the field starts, in bytes from the start of the part.
    pub offset: usize,
    /// Bytes of the field.
    pub expected: usize,
    /// Bytes that were left.
    pub found: usize,
}

/// Takes little-endian fields off the front of some bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reader<'a> {
    part: &'static str,
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    /// `part` names the bytes in errors.
    pub(crate) const fn new(part: &'static str, bytes: &'a [u8]) -> Self {
        Self {
            part,
            bytes,
            offset: 0,
        }
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], TooShort> {
        let Some((taken, rest)) = self.bytes.split_at_checked(count) else {
            return Err(TooShort {
                part: self.part,
                offset: self.offset,
                expected: count,
                found: self.bytes.len(),
            });
        };
        self.bytes = rest;
        self.offset = self.offset.saturating_add(count);
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], TooShort> {
        Ok(self.take(N)?.try_into().expect("N bytes were taken"))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, TooShort> {
        self.array().map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, TooShort> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, TooShort> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn i32(&mut self) -> Result<i32, TooShort> {
        self.array().map(i32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, TooShort> {
        self.array().map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&mut self) -> Result<i64, TooShort> {
        self.array().map(i64::from_le_bytes)
    }

    pub(crate) fn lsn(&mut self) -> Result<Lsn, TooShort> {
        self.u64().map(Lsn::new)
    }

    /// Bytes taken so far.
    pub(crate) const fn offset(&self) -> usize {
        self.offset
    }

    /// What was not taken.
    pub(crate) const fn rest(&self) -> &'a [u8] {
        self.bytes
    }
}
