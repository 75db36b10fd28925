//! What a journal is made of: frames, each checked on its own. Bytes in, values out.
//!
//! | bytes | content |
//! |---:|---|
//! | 8 | `ANYWJNL` and the byte 1 |
//! | 4 | CRC-32C of the journal's salt, of all that follows up to the end of the object |
//! | 2 | kind: 1 put, 2 gone, 3 safe, 4 removed, 5 named |
//! | 2 | the length of the path |
//! | 4 | the length of the object |
//! | 8 | epoch: which filling of a half it belongs to |
//! | 8 | sequence: its number in that filling, from 0 |
//! | 8 | so many frames of that filling were durable when it was written; of kind 3, the epoch meant |
//! | | the path, then the object, then zeros up to a multiple of 8 |
//!
//! Of kinds 4 and 5 the object says which put frames are meant, in runs: an epoch, the first sequence, and
//! how many, 8 bytes each. All integers are little-endian.

use std::ops::Range;

/// What a frame begins with.
const MAGIC: [u8; 8] = *b"ANYWJNL\x01";
const CRC_AT: usize = 8;
const KIND_AT: usize = 12;
const PATH_LENGTH_AT: usize = 14;
const OBJECT_LENGTH_AT: usize = 16;
const EPOCH_AT: usize = 20;
const SEQUENCE_AT: usize = 28;
const MARK_AT: usize = 36;
/// The bytes before the path.
const HEAD_BYTES: usize = 44;
/// Frames begin at multiples of this.
pub(super) const ALIGNED: usize = 8;

const KIND_PUT: u16 = 1;
const KIND_GONE: u16 = 2;
const KIND_SAFE: u16 = 3;
const KIND_REMOVED: u16 = 4;
const KIND_NAMED: u16 = 5;

/// Which frame: its epoch, and its sequence.
pub(super) type FrameId = (u64, u64);

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Note<'a> {
    /// An object was put.
    Put { path: &'a str, object: &'a [u8] },
    /// The object was removed, or was never put after all.
    Gone { path: &'a str },
    /// Everything of this epoch is durable by itself.
    Safe { epoch: u64 },
    /// The objects of these frames were removed.
    Removed { frames: Runs<'a> },
    /// The objects of these frames have files by their names.
    Named { frames: Runs<'a> },
}

/// Frames that are meant, as they are written: see [`runs_of`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Runs<'a>(pub(super) &'a [u8]);

const RUN_BYTES: usize = 24;

impl Runs<'_> {
    /// The stretches of frames: from the first, up to and without the second.
    pub(super) fn ranges(self) -> impl Iterator<Item = Range<FrameId>> {
        let runs = self.0.chunks_exact(RUN_BYTES);
        runs.filter_map(|run| {
            let number = |at| field(run, at).map(u64::from_le_bytes);
            let (epoch, first, count) = (number(0)?, number(8)?, number(16)?);
            Some((epoch, first)..(epoch, first.saturating_add(count)))
        })
    }
}

/// What [`Runs`] reads. Frames that follow on each other take as much room as one.
pub(super) fn runs_of(mut frames: Vec<FrameId>) -> Vec<u8> {
    frames.sort_unstable();
    let mut runs: Vec<(FrameId, u64)> = Vec::new();
    for (epoch, sequence) in frames {
        match runs.last_mut() {
            Some(((of, first), count)) if *of == epoch && sequence - *first == *count => {
                *count += 1;
            }
            _ => runs.push(((epoch, sequence), 1)),
        }
    }
    let numbers = runs
        .into_iter()
        .flat_map(|((epoch, first), count)| [epoch, first, count]);
    numbers.flat_map(u64::to_le_bytes).collect()
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    pub(super) epoch: u64,
    pub(super) sequence: u64,
    /// So many frames of the epoch were durable when it was written; unknown to [`Note::Safe`].
    pub(super) durable: u64,
    pub(super) note: Note<'a>,
}

impl<'a> Frame<'a> {
    /// Whether it says that objects are gone.
    pub(super) fn is_removal(&self) -> bool {
        matches!(self.note, Note::Gone { .. } | Note::Removed { .. })
    }

    /// How many bytes it takes; `None` where a length does not fit its field.
    pub(super) fn encoded_bytes(note: &Note<'_>) -> Option<usize> {
        let (path, object) = parts(note);
        u16::try_from(path.len()).ok()?;
        u32::try_from(object.len()).ok()?;
        Some((HEAD_BYTES + path.len() + object.len()).next_multiple_of(ALIGNED))
    }

    /// The frame as it is written.
    #[cfg(test)]
    pub(super) fn encode(&self, salt: u64) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        self.append_to(&mut bytes, salt)?;
        Some(bytes)
    }

    /// Appends the frame as it is written, and gives how many bytes it takes; `None` where a length does
    /// not fit its field, and nothing is appended.
    pub(super) fn append_to(&self, bytes: &mut Vec<u8>, salt: u64) -> Option<usize> {
        let (path, object) = parts(&self.note);
        let (kind, mark) = match self.note {
            Note::Put { .. } => (KIND_PUT, self.durable),
            Note::Gone { .. } => (KIND_GONE, self.durable),
            Note::Safe { epoch } => (KIND_SAFE, epoch),
            Note::Removed { .. } => (KIND_REMOVED, self.durable),
            Note::Named { .. } => (KIND_NAMED, self.durable),
        };
        let length = Self::encoded_bytes(&self.note)?;
        let path_bytes = u16::try_from(path.len()).ok()?;
        let object_bytes = u32::try_from(object.len()).ok()?;
        let start = bytes.len();
        bytes.reserve(length);
        bytes.extend(MAGIC);
        bytes.extend([0; KIND_AT - CRC_AT]);
        bytes.extend(kind.to_le_bytes());
        bytes.extend(path_bytes.to_le_bytes());
        bytes.extend(object_bytes.to_le_bytes());
        bytes.extend(self.epoch.to_le_bytes());
        bytes.extend(self.sequence.to_le_bytes());
        bytes.extend(mark.to_le_bytes());
        debug_assert_eq!(bytes.len(), start + HEAD_BYTES);
        bytes.extend(path.as_bytes());
        bytes.extend(object);
        let frame = bytes.get_mut(start..)?;
        let crc = crc_of(salt, frame.get(KIND_AT..)?);
        frame
            .get_mut(CRC_AT..KIND_AT)?
            .copy_from_slice(&crc.to_le_bytes());
        bytes.resize(start + length, 0);
        Some(length)
    }

    /// The frame at the beginning of `bytes`, and how many it takes; `None` where there is no whole
    /// one of this journal. Never panics, allocates nothing.
    pub(super) fn decode(salt: u64, bytes: &'a [u8]) -> Option<(Self, usize)> {
        if bytes.get(..CRC_AT)? != MAGIC.as_slice() {
            return None;
        }
        let path_bytes = usize::from(u16::from_le_bytes(field(bytes, PATH_LENGTH_AT)?));
        let object_bytes = u32::from_le_bytes(field(bytes, OBJECT_LENGTH_AT)?);
        let object_at = HEAD_BYTES + path_bytes;
        let end = object_at.checked_add(usize::try_from(object_bytes).ok()?)?;
        let crc = u32::from_le_bytes(field(bytes, CRC_AT)?);
        if crc_of(salt, bytes.get(KIND_AT..end)?) != crc {
            return None;
        }
        let path = std::str::from_utf8(bytes.get(HEAD_BYTES..object_at)?).ok()?;
        let object = bytes.get(object_at..end)?;
        let mark = u64::from_le_bytes(field(bytes, MARK_AT)?);
        let (durable, note) = match u16::from_le_bytes(field(bytes, KIND_AT)?) {
            KIND_PUT => (mark, Note::Put { path, object }),
            KIND_GONE => (mark, Note::Gone { path }),
            KIND_SAFE => (0, Note::Safe { epoch: mark }),
            KIND_REMOVED => {
                let frames = Runs(object);
                (mark, Note::Removed { frames })
            }
            KIND_NAMED => {
                let frames = Runs(object);
                (mark, Note::Named { frames })
            }
            _ => return None,
        };
        let frame = Self {
            epoch: u64::from_le_bytes(field(bytes, EPOCH_AT)?),
            sequence: u64::from_le_bytes(field(bytes, SEQUENCE_AT)?),
            durable,
            note,
        };
        Some((frame, end.next_multiple_of(ALIGNED).min(bytes.len())))
    }
}

fn parts<'a>(note: &Note<'a>) -> (&'a str, &'a [u8]) {
    match *note {
        Note::Put { path, object } => (path, object),
        Note::Gone { path } => (path, &[]),
        Note::Safe { .. } => ("", &[]),
        Note::Removed { frames } | Note::Named { frames } => ("", frames.0),
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn crc_of(salt: u64, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&salt.to_le_bytes()), bytes)
}

/// The whole frames of one filling of a half: of its newest, whatever was torn or damaged within.
///
/// After what is no frame, the next one is looked for: each stands for itself.
pub(super) fn newest(salt: u64, half: &[u8]) -> Vec<Frame<'_>> {
    let mut found: Vec<Frame<'_>> = Vec::new();
    let mut at = 0;
    while let Some(rest) = half.get(at..).filter(|rest| !rest.is_empty()) {
        if let Some((frame, length)) = Frame::decode(salt, rest) {
            found.push(frame);
            at += length;
            continue;
        }
        // most of a half may be zeros, and whoever lists looks at all of it
        let mut behind = rest.chunks_exact(ALIGNED).skip(1);
        let Some(passed) = behind.position(|bytes| bytes == MAGIC) else {
            break;
        };
        at += ALIGNED * (passed + 1);
    }
    let newest = found.iter().map(|frame| frame.epoch).max();
    found.retain(|frame| Some(frame.epoch) == newest);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const SALT: u64 = 0x0123_4567_89AB_CDEF;

    fn put(epoch: u64, sequence: u64, object: &[u8]) -> Vec<u8> {
        let note = Note::Put {
            path: "main/1/x",
            object,
        };
        let frame = Frame {
            epoch,
            sequence,
            durable: sequence,
            note,
        };
        frame.encode(SALT).unwrap()
    }

    #[test]
    fn a_frame_is_read_as_it_was_written() {
        for note in [
            Note::Put {
                path: "main/1/a b",
                object: b"some bytes",
            },
            Note::Put {
                path: "x",
                object: b"",
            },
            Note::Gone { path: "main/1/y" },
            Note::Removed {
                frames: Runs(&runs_of(vec![(1, 2)])),
            },
            Note::Named { frames: Runs(&[]) },
        ] {
            let frame = Frame {
                epoch: 7,
                sequence: 3,
                durable: 2,
                note,
            };
            let bytes = frame.encode(SALT).unwrap();
            assert_eq!(Some(bytes.len()), Frame::encoded_bytes(&note));
            assert_eq!(Frame::decode(SALT, &bytes), Some((frame, bytes.len())));
        }
        let safe = Frame {
            epoch: 7,
            sequence: 0,
            durable: 0,
            note: Note::Safe { epoch: u64::MAX },
        };
        let bytes = safe.encode(SALT).unwrap();
        assert_eq!(Frame::decode(SALT, &bytes), Some((safe, bytes.len())));
    }

    #[test]
    fn frames_that_follow_on_each_other_are_one_run() {
        let frames = vec![(2, 7), (1, 3), (2, 5), (2, 6), (1, u64::MAX), (2, 9)];
        let runs = runs_of(frames);
        let ranges: Vec<_> = Runs(&runs).ranges().collect();
        let expected = [
            (1, 3)..(1, 4),
            // the last one that there can be is not told from none
            (1, u64::MAX)..(1, u64::MAX),
            (2, 5)..(2, 8),
            (2, 9)..(2, 10),
        ];
        assert_eq!(ranges, expected);
        // what is cut off says nothing
        assert_eq!(Runs(&runs[..RUN_BYTES + 3]).ranges().count(), 1);
    }

    #[test]
    fn no_changed_bit_and_no_missing_byte_is_taken_for_a_frame() {
        // a damaged piece would be put in the place of a sound one
        let whole = put(1, 0, b"0123456789");
        let ends = HEAD_BYTES + "main/1/x".len() + 10;
        for bit in 0..ends * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Frame::decode(SALT, &bytes), None, "bit {bit}");
        }
        for length in 0..ends {
            assert_eq!(Frame::decode(SALT, &whole[..length]), None, "{length}");
        }
        assert_eq!(Frame::decode(SALT + 1, &whole), None);
    }

    #[test]
    fn frames_of_an_earlier_filling_are_not_read_again() {
        let mut half = Vec::new();
        for sequence in 0..5 {
            half.extend(put(1, sequence, b"old"));
        }
        let newer = put(3, 0, b"a new one that is longer");
        half[..newer.len()].copy_from_slice(&newer);
        let found = newest(SALT, &half);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].epoch, 3);
    }

    #[test]
    fn a_damaged_frame_hides_no_other() {
        let frames: Vec<Vec<u8>> = (0..4).map(|number| put(1, number, b"object")).collect();
        for damaged in 0..4_u64 {
            let mut half = frames.concat();
            let at = usize::try_from(damaged).unwrap() * frames[0].len();
            half[at + 20] ^= 1;
            let found: Vec<u64> = newest(SALT, &half).iter().map(|f| f.sequence).collect();
            let expected: Vec<u64> = (0..4).filter(|number| *number != damaged).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn hostile_lengths_are_no_frames() {
        let mut bytes = put(1, 0, b"object");
        bytes[OBJECT_LENGTH_AT..OBJECT_LENGTH_AT + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Frame::decode(SALT, &bytes), None);
        for length in 0..200 {
            assert_eq!(newest(SALT, &vec![0xFF; length]), []);
            assert_eq!(newest(SALT, &MAGIC.repeat(length)), []);
        }
    }
}
