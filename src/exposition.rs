//! Numbers as Prometheus reads them: the text format 0.0.4. Pure.
//!
//! Written by hand: a library would bring a registry to hold numbers that are held already.

use std::fmt::{self, Display, Write as _};

use jiff::{SignedDuration, Timestamp};

/// What a number is.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// It goes up and down.
    Gauge,
    /// It only grows, from zero when the process begins.
    Counter,
}

/// Names and values that tell samples of one family apart.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// A page of samples, all of one family together.
pub struct Page<'a, 'f> {
    out: &'a mut fmt::Formatter<'f>,
    common: Labels<'a>,
}

impl<'a, 'f> Page<'a, 'f> {
    /// A page whose samples all have the labels in `common`.
    pub fn new(out: &'a mut fmt::Formatter<'f>, common: Labels<'a>) -> Self {
        Self { out, common }
    }

    /// A family with one value, or with none where it is not known: zero would be a claim.
    pub fn only(
        &mut self,
        name: &str,
        kind: Kind,
        help: &str,
        value: Option<impl Display>,
    ) -> fmt::Result {
        self.family(name, kind, help)?;
        value.map_or(Ok(()), |value| self.sample(name, &[], value))
    }

    /// Begins a family.
    pub fn family(&mut self, name: &str, kind: Kind, help: &str) -> fmt::Result {
        let kind = match kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        };
        writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}")
    }

    /// A sample of the family that was begun last.
    pub fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl Display) -> fmt::Result {
        self.out.write_str(name)?;
        let mut before = '{';
        for (label, text) in self.common.iter().chain(labels) {
            write!(self.out, "{before}{label}=\"{}\"", Escaped(text))?;
            before = ',';
        }
        let end = if before == ',' { "}" } else { "" };
        writeln!(self.out, "{end} {value}")
    }
}

/// A label's value: backslash, quote and line feed are escaped.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\\' => f.write_str("\\\\")?,
                '"' => f.write_str("\\\"")?,
                '\n' => f.write_str("\\n")?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

/// A length of time in seconds, to the microsecond.
pub struct Seconds(pub SignedDuration);

impl Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0.is_negative() { "-" } else { "" };
        let length = self.0.unsigned_abs();
        let (seconds, micros) = (length.as_secs(), length.subsec_micros());
        write!(f, "{sign}{seconds}.{micros:06}")
    }
}

/// A moment, in seconds since 1970.
pub fn since_epoch(time: Timestamp) -> Seconds {
    Seconds(time.duration_since(Timestamp::UNIX_EPOCH))
}
