//! What an operator asks for: targets, times as people write them, tablespace mappings. Pure.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, Zoned};
use wal::Lsn;

use crate::error::{Error, Result};

/// Where a restore ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Every commit that stands in WAL before the first one stamped after this moment.
    Time(Timestamp),
    /// The record that starts here, and all before it.
    Lsn(Lsn),
    /// The commit of this transaction. Only the lower 32 bits are compared: WAL has no more.
    Xid(u64),
    /// A point made by `pg_create_restore_point`.
    Name(String),
    /// The first consistent moment of the backup.
    Immediate,
    /// All that is stored.
    Latest,
}

impl Target {
    /// The word for this sort of target in JSON.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Time(_) => "time",
            Self::Lsn(_) => "lsn",
            Self::Xid(_) => "xid",
            Self::Name(_) => "name",
            Self::Immediate => "immediate",
            Self::Latest => "latest",
        }
    }

    /// What was asked for, where the kind alone does not say it.
    pub fn value(&self) -> Option<String> {
        match self {
            Self::Time(time) => Some(rfc3339(*time)),
            Self::Lsn(lsn) => Some(lsn.to_string()),
            Self::Xid(xid) => Some(xid.to_string()),
            Self::Name(name) => Some(name.clone()),
            Self::Immediate | Self::Latest => None,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value() {
            Some(value) => write!(f, "{} {value}", self.kind()),
            None => f.write_str(self.kind()),
        }
    }
}

/// What the restored server does once it has reached its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetAction {
    /// It stands still and can be read.
    Pause,
    /// It becomes a primary on a new timeline.
    Promote,
    /// It shuts down.
    Shutdown,
}

impl TargetAction {
    /// The value of `recovery_target_action`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Promote => "promote",
            Self::Shutdown => "shutdown",
        }
    }
}

/// A moment as the whole tool prints it: RFC 3339 in UTC with microseconds.
pub(crate) fn rfc3339(time: Timestamp) -> String {
    crate::clock::rfc3339::text(&time)
}

/// A time on the command line, and the instant that it was taken for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedTime {
    /// The instant.
    pub instant: Timestamp,
    /// The instant in UTC and in local time, to be shown.
    pub shown: String,
}

/// Reads a time as people write it: RFC 3339, `2026-11-20 14:03:00 Europe/Paris`,
/// `2026-11-20 14:03:00+01`, `10 minutes ago`, or a bare local time, taken in the zone of `now`.
///
/// A local time that a clock change made ambiguous, or that it skipped, is refused with the two
/// instants that it could mean.
pub fn parse_time(text: &str, now: &Zoned) -> Result<ParsedTime> {
    let instant = instant_of(text.trim(), now)?;
    let local = instant.to_zoned(now.time_zone().clone());
    let shown = format!(
        "{:?} is taken for {} ({})",
        text.trim(),
        rfc3339(instant),
        local.strftime("%Y-%m-%d %H:%M:%S%.f %:z %Q")
    );
    Ok(ParsedTime { instant, shown })
}

fn instant_of(text: &str, now: &Zoned) -> Result<Timestamp> {
    if text.ends_with(" ago") {
        return ago(text, now);
    }
    // an annotation must agree with an offset beside it, which `Zoned` checks
    if let Some((time, zone)) = text.strip_suffix(']').and_then(|text| text.split_once('[')) {
        return match time.trim().parse::<DateTime>() {
            Ok(civil) if !names_offset(time) => in_zone(civil, &named_zone(zone, text)?, text),
            _ => text
                .parse::<Zoned>()
                .map(|zoned| zoned.timestamp())
                .map_err(|error| bad_time(text, &error)),
        };
    }
    if let Ok(instant) = text.parse::<Timestamp>() {
        return Ok(instant);
    }
    if let Some((time, last)) = text.rsplit_once(char::is_whitespace) {
        let time = time.trim_end();
        if last.starts_with(['+', '-']) || last == "Z" {
            let joined = format!("{time}{last}");
            return joined
                .parse::<Timestamp>()
                .map_err(|error| bad_time(text, &error));
        }
        if last.starts_with(|first: char| first.is_ascii_alphabetic()) {
            if names_offset(time) {
                // both are given, and must agree
                return instant_of(&format!("{time}[{last}]"), now);
            }
            let civil = time
                .parse::<DateTime>()
                .map_err(|error| bad_time(text, &error))?;
            return in_zone(civil, &named_zone(last, text)?, text);
        }
    }
    let civil = text
        .parse::<DateTime>()
        .map_err(|error| bad_time(text, &error))?;
    in_zone(civil, now.time_zone(), text)
}

/// Whether an offset or a `Z` follows the time of day.
fn names_offset(time: &str) -> bool {
    let time = time.trim();
    let clock = time
        .split_once(['T', 't', ' '])
        .map_or("", |(_, clock)| clock);
    clock.contains(['+', '-']) || clock.ends_with(['Z', 'z'])
}

fn ago(text: &str, now: &Zoned) -> Result<Timestamp> {
    let span: Span = text.parse().map_err(|error| bad_time(text, &error))?;
    let then = now
        .checked_add(span)
        .map_err(|error| bad_time(text, &error))?;
    Ok(then.timestamp())
}

fn named_zone(name: &str, text: &str) -> Result<TimeZone> {
    TimeZone::get(name).map_err(|error| bad_time(text, &error))
}

fn in_zone(civil: DateTime, zone: &TimeZone, text: &str) -> Result<Timestamp> {
    let local = zone.to_ambiguous_zoned(civil);
    if local.is_ambiguous() {
        let earlier = local
            .clone()
            .earlier()
            .map_err(|error| bad_time(text, &error))?;
        let later = local.later().map_err(|error| bad_time(text, &error))?;
        return Err(Error::usage(format!(
            "the clocks were changed then, so that this local time is not one instant: {text:?} \
             could be {} or {}",
            rfc3339(earlier.timestamp()),
            rfc3339(later.timestamp())
        ))
        .hint("give the one that is meant, or write the offset from UTC behind the time"));
    }
    let zoned = local
        .unambiguous()
        .map_err(|error| bad_time(text, &error))?;
    Ok(zoned.timestamp())
}

fn bad_time(text: &str, error: &jiff::Error) -> Error {
    tracing::debug!("{text:?}: {error}");
    Error::usage(format!("not a time: {text:?}")).hint(
        "times look like 2026-11-20T14:03:00Z, \"2026-11-20 14:03:00 Europe/Paris\", \
         \"2026-11-20 14:03:00+01\", or \"10 minutes ago\"; `latest` is all that is stored",
    )
}

/// `-T OID=DIR` or `-T OLDDIR=DIR`: where a tablespace goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceMapping {
    /// Which one.
    pub from: MappedFrom,
    /// The directory that it goes to; absolute.
    pub to: PathBuf,
}

/// How a tablespace is named on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MappedFrom {
    /// By its OID.
    Oid(u32),
    /// By the directory where the server kept it.
    Location(String),
}

impl TablespaceMapping {
    /// Whether it names the tablespace `oid` that the server kept at `location`.
    pub(crate) fn names(&self, oid: u32, location: &str) -> bool {
        match &self.from {
            MappedFrom::Oid(wanted) => *wanted == oid,
            MappedFrom::Location(wanted) => {
                wanted.trim_end_matches('/') == location.trim_end_matches('/')
            }
        }
    }
}

impl fmt::Display for TablespaceMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.from {
            MappedFrom::Oid(oid) => write!(f, "{oid}={}", self.to.display()),
            MappedFrom::Location(location) => write!(f, "{location}={}", self.to.display()),
        }
    }
}

impl FromStr for TablespaceMapping {
    type Err = Error;

    /// A `=` in a directory's name is written `\=`, as for `pg_basebackup`.
    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            Error::usage(format!("{why}: {text:?}"))
                .hint("a tablespace is mapped by OID=DIR or OLDDIR=DIR, with absolute paths")
        };
        let (from, to) = split_mapping(text).ok_or_else(|| bad("not one `=` in a mapping"))?;
        let to = PathBuf::from(to);
        if !to.is_absolute() {
            return Err(bad("the new directory is not an absolute path"));
        }
        let from = match from.parse::<u32>() {
            Ok(oid) => MappedFrom::Oid(oid),
            Err(_) if from.starts_with('/') => MappedFrom::Location(from),
            Err(_) => return Err(bad("neither an OID nor an absolute path")),
        };
        Ok(Self { from, to })
    }
}

/// The two sides of the only `=` that no backslash precedes.
fn split_mapping(text: &str) -> Option<(String, String)> {
    let mut sides = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\\' if rest.peek() == Some(&'=') => {
                rest.next();
                sides.last_mut()?.push('=');
            }
            '=' => sides.push(String::new()),
            c => sides.last_mut()?.push(c),
        }
    }
    let [from, to] = <[String; 2]>::try_from(sides).ok()?;
    (!from.is_empty() && !to.is_empty()).then_some((from, to))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn now() -> Zoned {
        "2026-11-20T15:00:00[Europe/Paris]".parse().unwrap()
    }

    fn instant(text: &str) -> String {
        rfc3339(parse_time(text, &now()).unwrap().instant)
    }

    #[test]
    fn every_promised_form_is_read() {
        for text in [
            "2026-11-20T14:03:00Z",
            "2026-11-20T15:03:00+01:00",
            "2026-11-20 15:03:00+01",
            "2026-11-20 15:03:00 +01:00",
            "2026-11-20 15:03:00 Europe/Paris",
            "2026-11-20 16:03 Europe/Helsinki",
            "2026-11-20T15:03:00[Europe/Paris]",
            "2026-11-20T15:03:00+01:00[Europe/Paris]",
            "2026-11-20 15:03:00+01 Europe/Paris",
            "2026-11-20 14:03:00 UTC",
            "  2026-11-20 15:03:00  ",
        ] {
            assert_eq!(instant(text), "2026-11-20T14:03:00.000000Z", "{text}");
        }
        assert_eq!(instant("10 minutes ago"), "2026-11-20T13:50:00.000000Z");
        assert_eq!(instant("1h30m ago"), "2026-11-20T12:30:00.000000Z");
        assert_eq!(
            instant("2026-11-20 15:03:00.25"),
            "2026-11-20T14:03:00.250000Z"
        );
        assert_eq!(
            instant("2026-11-20T14:03:00.123456Z"),
            "2026-11-20T14:03:00.123456Z"
        );
    }

    /// jiff's civil parser would leave the offset unread.
    #[test]
    fn an_offset_and_a_zone_must_agree() {
        let error = parse_time("2026-11-20 15:03:00+05 Europe/Paris", &now()).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage, "{error}");
    }

    #[test]
    fn a_local_time_is_shown_with_the_instant_that_it_was_taken_for() {
        let shown = parse_time("2026-11-20 15:03:00", &now()).unwrap().shown;
        assert!(shown.contains("2026-11-20T14:03:00.000000Z"), "{shown}");
        assert!(shown.contains("+01:00 Europe/Paris"), "{shown}");
    }

    /// An hour's difference is an hour of work lost or an hour of damage kept.
    #[test]
    fn a_local_time_that_is_not_one_instant_is_refused_with_both() {
        for (text, first, second) in [
            (
                "2026-10-25 02:30:00",
                "2026-10-25T00:30:00",
                "2026-10-25T01:30:00",
            ),
            (
                "2026-03-29 02:30:00",
                "2026-03-29T00:30:00",
                "2026-03-29T01:30:00",
            ),
            (
                "2026-10-25 02:30:00 Europe/Paris",
                "2026-10-25T00:30:00",
                "2026-10-25T01:30:00",
            ),
            (
                "2026-10-25T02:30:00[Europe/Paris]",
                "2026-10-25T00:30:00",
                "2026-10-25T01:30:00",
            ),
        ] {
            let error = parse_time(text, &now()).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage);
            assert!(error.message().contains(first), "{error}");
            assert!(error.message().contains(second), "{error}");
        }
        assert_eq!(
            instant("2026-10-25 02:30:00+01"),
            "2026-10-25T01:30:00.000000Z"
        );
    }

    #[test]
    fn what_is_no_time_is_wrong_usage() {
        for text in [
            "",
            "yesterday evening or so",
            "2026-13-01",
            "14:03",
            "2026-11-20 14:03:00 Nowhere/Land",
            "2026-11-20T15:03:00+05:00[Europe/Paris]",
            "10 parsecs ago",
        ] {
            let error = parse_time(text, &now()).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{text}");
        }
    }

    #[test]
    fn mappings_name_a_tablespace_by_oid_or_by_place() {
        let by_oid: TablespaceMapping = "16385=/new".parse().unwrap();
        assert!(by_oid.names(16385, "/old") && !by_oid.names(16386, "/old"));
        let by_place: TablespaceMapping = r"/old\=er/=/new\=est".parse().unwrap();
        assert!(by_place.names(1, "/old=er"));
        assert_eq!(by_place.to, PathBuf::from("/new=est"));
        for bad in [
            "",
            "16385",
            "16385=",
            "=/new",
            "16385=new",
            "old=/new",
            "1=/a=/b",
        ] {
            let error = bad.parse::<TablespaceMapping>().unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{bad}");
        }
    }
}
