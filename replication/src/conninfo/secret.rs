//! A value that must not be seen.

use std::fmt;

use zeroize::Zeroizing;

/// A password. Its bytes are wiped when it is dropped, and neither `Debug` nor any error shows
/// them; whoever needs them says so by [`Secret::expose`].
///
/// Bytes rather than text, since a pass file may hold a password in any encoding.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Takes over `bytes`; what the caller copied them from is the caller's to wipe.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Self {
        Self(Zeroizing::new(bytes.into()))
    }

    /// The bytes themselves, for the one place that sends or hashes them.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(hidden)")
    }
}
