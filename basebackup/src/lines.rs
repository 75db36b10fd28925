//! A text of lines, each of which is expected to begin with a certain word.

/// What stands where something else was expected: `None` is the end of the text.
pub(crate) struct Unexpected {
    pub(crate) line: usize,
    pub(crate) found: Option<String>,
}

/// Lines that end in a line feed, taken one by one.
pub(crate) struct Lines<'a> {
    rest: &'a [u8],
    /// The number of the line taken last, from 1.
    pub(crate) line: usize,
}

impl<'a> Lines<'a> {
    pub(crate) fn new(text: &'a [u8]) -> Self {
        Self {
            rest: text,
            line: 0,
        }
    }

    /// The next line without its line feed; a line that has none is no line.
    pub(crate) fn next(&mut self) -> Option<&'a [u8]> {
        let end = self.rest.iter().position(|byte| *byte == b'\n')?;
        let (line, rest) = self.rest.split_at_checked(end)?;
        self.rest = rest.get(1..).unwrap_or_default();
        self.line = self.line.saturating_add(1);
        Some(line)
    }

    /// What follows `prefix` on the next line.
    pub(crate) fn expect(&mut self, prefix: &str) -> Result<&'a [u8], Unexpected> {
        let before = self.rest;
        match self.next() {
            Some(line) => line
                .strip_prefix(prefix.as_bytes())
                .ok_or_else(|| self.wrong(line)),
            None => Err(Unexpected {
                line: self.line.saturating_add(1),
                found: rest_of(before),
            }),
        }
    }

    /// Nothing may follow.
    pub(crate) fn end(&self) -> Result<(), Unexpected> {
        match rest_of(self.rest) {
            None => Ok(()),
            found => Err(Unexpected {
                line: self.line.saturating_add(1),
                found,
            }),
        }
    }

    /// This line, the one taken last, is not what it should be.
    pub(crate) fn wrong(&self, line: &[u8]) -> Unexpected {
        Unexpected {
            line: self.line,
            found: Some(shown(line)),
        }
    }
}

fn rest_of(rest: &[u8]) -> Option<String> {
    let line = rest.split(|byte| *byte == b'\n').next().unwrap_or_default();
    (!rest.is_empty()).then(|| shown(line))
}

/// The beginning of a line, for a message.
fn shown(line: &[u8]) -> String {
    String::from_utf8_lossy(line.get(..200).unwrap_or(line)).into_owned()
}
