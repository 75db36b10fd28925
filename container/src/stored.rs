//! A whole object checked as it is stored, without a key and without decompressing it.

use zstd::zstd_safe;

use crate::frame::{self, Next};
use crate::sealing::SEALED_HEAD_BYTES;
use crate::{Error, Header, Part, Reading, Trailer, byte_count, read_header, trailer};

/// Checks that these bytes are one whole object as it was stored: its parts in order, its trailer,
/// and the checksum over all before the trailer.
///
/// Enough to copy an object from one repository to another, sealed or not, without the key. It does
/// **not** verify the plain bytes, nor that an encrypted object is not forged: for that there is
/// [`crate::Decoder`]. `bytes` may be damaged or hostile: never panics, allocates at most a
/// multiple of the header's and the trailer's length.
pub fn check_stored(bytes: &[u8]) -> Result<(Header, Trailer), Error> {
    let found = byte_count(bytes.len());
    let cut = |part, expected| Error::Truncated {
        part,
        expected,
        found,
    };
    let (header, end) = match read_header(bytes)? {
        Reading::Done(done) => done,
        Reading::NeedMore(expected) => return Err(cut(Part::Header, expected)),
    };
    let sealed = header.check_readable()?.is_some();
    let mut offset = end;
    let (frames, last) = loop {
        let (before, rest) = usize::try_from(offset)
            .ok()
            .and_then(|offset| bytes.split_at_checked(offset))
            .ok_or_else(|| cut(Part::Frames, offset))?;
        let Some(magic) = rest.first_chunk() else {
            return Err(cut(Part::Frames, found.saturating_add(1)));
        };
        let length = match frame::next(u32::from_le_bytes(*magic), sealed, offset)? {
            Next::Trailer => break (before, rest),
            Next::Sealed => match *rest {
                [_, _, _, _, a, b, c, d, ..] => u64::from(u32::from_le_bytes([a, b, c, d]))
                    .saturating_add(byte_count(SEALED_HEAD_BYTES)),
                _ => return Err(cut(Part::Frames, found.saturating_add(1))),
            },
            Next::Plain => zstd_safe::find_frame_compressed_size(rest)
                .map(byte_count)
                .map_err(|code| frame::failed(code, offset))?,
        };
        offset = offset.saturating_add(length);
    };
    let parts = trailer::read_whole(last, offset, sealed)?;
    parts.trailer.check_stored(crc32fast::hash(frames))?;
    Ok((header, parts.trailer))
}
