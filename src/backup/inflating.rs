//! What a server compresses before it sends it.

use zstd::stream::raw::{Decoder, Operation as _};

/// How much is decoded at once.
const PLAIN_BYTES: usize = 128 << 10;
/// The largest window that a stream may ask for, as a power of two: 8 MiB, that of level 19.
const WINDOW_LOG_MAX: u32 = 23;

/// Decodes an archive that is compressed with zstd, as it comes.
///
/// Its bytes may be damaged or hostile: never panics, holds a window of at most 8 MiB and 128 KiB more.
pub(super) struct Inflater {
    decoder: Decoder<'static>,
    plain: Vec<u8>,
    /// Whether a frame has begun that has not ended.
    is_open: bool,
}

/// Why an archive cannot be decoded.
#[derive(Debug, thiserror::Error)]
pub(super) enum InflateError {
    #[error("what the server has compressed cannot be decoded")]
    Zstd(#[from] std::io::Error),
    #[error("what the server has compressed ends in the middle")]
    CutShort,
}

impl Inflater {
    /// At an archive's first byte.
    pub(super) fn new() -> Result<Self, InflateError> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(zstd::stream::raw::DParameter::WindowLogMax(WINDOW_LOG_MAX))?;
        Ok(Self {
            decoder,
            plain: vec![0; PLAIN_BYTES],
            is_open: false,
        })
    }

    /// Decodes from the front of `bytes`; `None` once all of them are, and what they gave was handed out.
    pub(super) fn next(&mut self, bytes: &mut &[u8]) -> Result<Option<&[u8]>, InflateError> {
        loop {
            let status = self.decoder.run_on_buffers(bytes, &mut self.plain)?;
            *bytes = bytes.get(status.bytes_read..).unwrap_or_default();
            if status.bytes_read > 0 || status.bytes_written > 0 {
                self.is_open = status.remaining > 0;
            }
            if status.bytes_written > 0 {
                return Ok(self.plain.get(..status.bytes_written));
            }
            if bytes.is_empty() || status.bytes_read == 0 {
                return Ok(None);
            }
        }
    }

    /// The archive has ended.
    pub(super) fn finish(self) -> Result<(), InflateError> {
        if self.is_open {
            return Err(InflateError::CutShort);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inflate(bytes: &[u8], step: usize) -> Result<Vec<u8>, InflateError> {
        let mut inflater = Inflater::new()?;
        let mut plain = Vec::new();
        for mut bytes in bytes.chunks(step) {
            while let Some(decoded) = inflater.next(&mut bytes)? {
                plain.extend_from_slice(decoded);
            }
            assert!(bytes.is_empty());
        }
        inflater.finish()?;
        Ok(plain)
    }

    #[test]
    fn decodes_frames_that_come_in_pieces() {
        let plain: Vec<u8> = (0..=u8::MAX).cycle().take(3_000_000).collect();
        let (first, second) = plain.split_at(1_234_567);
        let mut stored = zstd::encode_all(first, 1).unwrap();
        stored.extend(zstd::encode_all(second, 19).unwrap());
        for step in [1, 1000, usize::MAX] {
            assert!(inflate(&stored, step).unwrap() == plain, "{step}");
        }
        assert!(inflate(&[], 1).unwrap().is_empty());
    }

    #[test]
    fn refuses_what_is_cut_short_or_damaged() {
        let plain = vec![7; 1_000_000];
        let stored = zstd::encode_all(&*plain, 1).unwrap();
        for length in [1, 3, stored.len() / 2, stored.len() - 1] {
            let cut = inflate(&stored[..length], 1000);
            assert!(matches!(cut, Err(InflateError::CutShort)), "{length}");
        }
        let mut damaged = stored.clone();
        damaged[0] ^= 1;
        assert!(matches!(
            inflate(&damaged, 1000),
            Err(InflateError::Zstd(_))
        ));
    }

    #[test]
    fn refuses_a_window_that_no_level_below_20_has() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(WINDOW_LOG_MAX + 1).unwrap();
        std::io::Write::write_all(&mut encoder, &vec![7; 20 << 20]).unwrap();
        let stored = encoder.finish().unwrap();
        assert!(matches!(inflate(&stored, 1000), Err(InflateError::Zstd(_))));
    }
}
