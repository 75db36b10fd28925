//! The digest of an object's content.

use crate::digest_text;

/// Computes [`crate::Trailer::digest`] while frames pass: over their plain bytes or over their
/// hashes, as the header says.
pub(crate) enum ContentDigest {
    /// The hash of all plain bytes.
    Plain(blake3::Hasher),
    /// The hash of the hashes of frames.
    Frames {
        whole: blake3::Hasher,
        /// Of the frame at hand.
        frame: Box<blake3::Hasher>,
    },
}

impl ContentDigest {
    pub(crate) fn of_plain() -> Self {
        Self::Plain(blake3::Hasher::new())
    }

    pub(crate) fn of_frames() -> Self {
        Self::Frames {
            whole: blake3::Hasher::new(),
            frame: Box::new(blake3::Hasher::new()),
        }
    }

    /// The next plain bytes of the frame at hand.
    pub(crate) fn update(&mut self, plain: &[u8]) {
        match self {
            Self::Plain(whole) => whole.update(plain),
            Self::Frames { frame, .. } => frame.update(plain),
        };
    }

    /// The frame at hand has ended.
    pub(crate) fn end_frame(&mut self) {
        if let Self::Frames { whole, frame } = self {
            whole.update(frame.finalize().as_bytes());
            frame.reset();
        }
    }

    /// A whole frame with plain bytes of this hash; whether that is enough to know.
    pub(crate) fn add_hashed(&mut self, hash: &[u8; 32]) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Frames { whole, .. } => {
                whole.update(hash);
                true
            }
        }
    }

    /// The digest as a trailer has it.
    pub(crate) fn text(&self) -> String {
        match self {
            Self::Plain(whole) | Self::Frames { whole, .. } => digest_text(&whole.finalize()),
        }
    }
}
