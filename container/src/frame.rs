//! One zstd frame with content size and checksum: the unit that can be read on its own.

use std::cell::Cell;
use std::io::Cursor;
use std::sync::Mutex;

use zstd::zstd_safe;
use zstd_safe::{CCtx, CParameter, DCtx, DParameter, ResetDirective};

use crate::sealing::SEALED_MAGIC;
use crate::trailer::TRAILER_MAGIC;
use crate::{Error, Part, byte_count};

/// Magic number of a zstd frame (RFC 8878 §3.1.1).
pub(crate) const ZSTD_MAGIC: u32 = 0xFD2F_B528;
/// The most plain bytes of one frame: the largest WAL segment.
pub const MAX_FRAME_PLAIN_BYTES: u64 = 1024 * 1024 * 1024;

/// Above 19, zstd uses windows that a reader may not have the memory for.
const LEVEL_MIN: i32 = -7;
const LEVEL_MAX: i32 = 19;
/// A level of zstd's that hardly looks for anything to compress: for what is stored for a moment, and
/// must take none to be made.
pub const LEVEL_STORED: i32 = -131_072;
/// The window of the highest level, 8 MiB, which every decoder has to support (RFC 8878 §3.1.1.1.2).
const WINDOW_LOG_MAX: u32 = 23;

/// What stands between the header and the end of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// A zstd frame.
    Plain,
    /// A sealed frame.
    Sealed,
    /// The trailer's frame.
    Trailer,
}

/// What begins at `offset` with this magic number, in an object that is `sealed` or is not.
pub(crate) fn next(magic: u32, sealed: bool, offset: u64) -> Result<Next, Error> {
    match (magic, sealed) {
        (TRAILER_MAGIC, _) => Ok(Next::Trailer),
        (ZSTD_MAGIC, false) => Ok(Next::Plain),
        (SEALED_MAGIC, true) => Ok(Next::Sealed),
        (ZSTD_MAGIC, true) => Err(Error::Unsealed {
            part: Part::Frame,
            offset,
        }),
        (found, _) => Err(Error::UnknownFrame { offset, found }),
    }
}

/// The most bytes of a zstd frame with at most so many plain bytes.
pub(crate) fn stored_bytes_max(plain_bytes_max: u64) -> u64 {
    let plain = plain_bytes_max.min(MAX_FRAME_PLAIN_BYTES);
    byte_count(usize::try_from(plain).map_or(usize::MAX, zstd_safe::compress_bound))
}

/// A compressor for many frames.
///
/// Its tables stay for the next one: to make them anew takes longer than all else that is done for
/// an object of a few hundred bytes.
pub(crate) struct Compressor {
    context: Option<CCtx<'static>>,
}

/// Not one for each thread: a program may have many, and each would keep its own.
static SPARES: Mutex<Vec<CCtx<'static>>> = Mutex::new(Vec::new());

thread_local! {
    static SPARE_DECODER: Cell<Option<DCtx<'static>>> = const { Cell::new(None) };
}

/// So many compressors are kept, and each of so many bytes at most: of the lower levels, which WAL is
/// stored with.
const SPARES_MAX: usize = 4;
const SPARE_BYTES_MAX: usize = 4 << 20;

impl Compressor {
    /// `level` is zstd's, from -7 to 19, or [`LEVEL_STORED`].
    pub(crate) fn new(level: i32) -> Result<Self, Error> {
        // nobody waits for a spare
        let spare = SPARES.try_lock().ok().and_then(|mut spares| spares.pop());
        Ok(Self {
            context: Some(configured(spare, level)?),
        })
    }

    /// Appends one frame of `plain` to `out`; the frame's stored length in bytes.
    pub(crate) fn compress(
        &mut self,
        plain: &[u8],
        offset: u64,
        out: &mut Vec<u8>,
    ) -> Result<u64, Error> {
        let context = self.context.as_mut().expect("it is there until the drop");
        compress(context, plain, offset, out)
    }
}

impl Drop for Compressor {
    fn drop(&mut self) {
        let context = self.context.take();
        let small = context.filter(|context| context.sizeof() <= SPARE_BYTES_MAX);
        if let (Some(small), Ok(mut spares)) = (small, SPARES.try_lock())
            && spares.len() < SPARES_MAX
        {
            spares.push(small);
        }
    }
}

/// A context, the spare one if there is one, with its parameters set.
fn configured(spare: Option<CCtx<'static>>, level: i32) -> Result<CCtx<'static>, Error> {
    if !(LEVEL_MIN..=LEVEL_MAX).contains(&level) && level != LEVEL_STORED {
        return Err(Error::Level {
            min: LEVEL_MIN,
            max: LEVEL_MAX,
            found: level,
        });
    }
    let mut context = spare.unwrap_or_else(CCtx::create);
    context
        .reset(ResetDirective::SessionAndParameters)
        .map_err(|code| failed(code, 0))?;
    for parameter in [
        CParameter::CompressionLevel(level),
        CParameter::ChecksumFlag(true),
        CParameter::ContentSizeFlag(true),
    ] {
        context
            .set_parameter(parameter)
            .map_err(|code| failed(code, 0))?;
    }
    Ok(context)
}

/// A decompressor that allocates at most the window that [`Compressor`] can ask for, for one frame
/// after another.
///
/// It too stays with the thread: to make one takes longer than to decode a frame of a few kilobytes.
pub(crate) struct Decompressor {
    context: Option<DCtx<'static>>,
}

impl Decompressor {
    pub(crate) fn new() -> Result<Self, Error> {
        let spare = SPARE_DECODER.try_with(Cell::take).ok().flatten();
        let mut context = spare.unwrap_or_else(DCtx::create);
        // what was broken off is forgotten
        context
            .reset(ResetDirective::SessionAndParameters)
            .and_then(|_| context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)))
            .map_err(|code| failed(code, 0))?;
        Ok(Self {
            context: Some(context),
        })
    }

    pub(crate) fn context(&mut self) -> &mut DCtx<'static> {
        self.context.as_mut().expect("it is there until the drop")
    }
}

impl Drop for Decompressor {
    fn drop(&mut self) {
        let context = self.context.take();
        let small = context.filter(|context| context.sizeof() <= SPARE_BYTES_MAX);
        // a thread that ends keeps nothing
        let _ended = SPARE_DECODER.try_with(|spare| spare.set(small));
    }
}

fn compress(
    context: &mut CCtx<'_>,
    plain: &[u8],
    offset: u64,
    out: &mut Vec<u8>,
) -> Result<u64, Error> {
    let start = out.len();
    out.reserve(zstd_safe::compress_bound(plain.len()));
    let mut cursor = Cursor::new(std::mem::take(out));
    cursor.set_position(byte_count(start));
    let stored = context.compress2(&mut cursor, plain);
    *out = cursor.into_inner();
    stored.map(byte_count).map_err(|code| failed(code, offset))
}

/// Decodes the zstd frame that begins at `offset` in its object.
///
/// `stored` may be damaged or hostile: never panics, allocates at most `expected_plain_bytes`, and
/// those only after the frame itself claims as many. Gives exactly that many bytes or an error.
pub(crate) fn decode(
    stored: &[u8],
    expected_plain_bytes: usize,
    offset: u64,
) -> Result<Vec<u8>, Error> {
    let expected = byte_count(expected_plain_bytes);
    if expected > MAX_FRAME_PLAIN_BYTES {
        return Err(Error::TooLarge {
            part: Part::Frame,
            limit: MAX_FRAME_PLAIN_BYTES,
            found: expected,
        });
    }
    let length =
        zstd_safe::find_frame_compressed_size(stored).map_err(|code| failed(code, offset))?;
    if length != stored.len() {
        return Err(Error::Trailing {
            part: Part::Frame,
            expected: byte_count(length),
            found: byte_count(stored.len()),
        });
    }
    // RFC 8878 §3.1.1.1.1: bit 2 of the descriptor, the byte after the magic number.
    let &[m0, m1, m2, m3, descriptor, ..] = stored else {
        return Err(Error::Truncated {
            part: Part::Frame,
            expected: 5,
            found: byte_count(length),
        });
    };
    let magic = u32::from_le_bytes([m0, m1, m2, m3]);
    if magic != ZSTD_MAGIC {
        return Err(Error::UnknownFrame {
            offset,
            found: magic,
        });
    }
    if descriptor & 0b100 == 0 {
        return Err(Error::NoFrameChecksum);
    }
    let claimed = zstd_safe::get_frame_content_size(stored)
        .ok()
        .flatten()
        .unwrap_or(0);
    if claimed != expected {
        return Err(Error::PlainLength {
            part: Part::Frame,
            expected,
            found: claimed,
        });
    }
    let mut plain = Vec::with_capacity(expected_plain_bytes);
    let found = Decompressor::new()?
        .context()
        .decompress(&mut plain, stored)
        .map_err(|code| failed(code, offset))?;
    if found != expected_plain_bytes {
        return Err(Error::PlainLength {
            part: Part::Frame,
            expected,
            found: byte_count(found),
        });
    }
    Ok(plain)
}

/// zstd's error code in words.
pub(crate) fn failed(code: zstd_safe::ErrorCode, offset: u64) -> Error {
    Error::Zstd {
        offset,
        reason: zstd_safe::get_error_name(code),
    }
}
