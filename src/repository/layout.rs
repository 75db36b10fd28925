//! Where each object lives: names to paths and back, in one file so that writing and listing
//! cannot drift apart. Pure.
//!
//! All paths are relative to `<url>/<cluster>/<system identifier>/` (DESIGN.md, "The repository,
//! version 1").

use std::fmt;
use std::str::FromStr;

use wal::{Lsn, SegmentName, TimelineId, WalRange};

/// Folders at the root of a repository that are no cluster's.
const RESERVED: &[&str] = &[super::keys::FOLDER];

/// A cluster's name, `[a-z0-9_]{1,40}`, and none of the folders that stand beside clusters.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterName(String);

/// A name that no cluster can have.
#[derive(Debug, thiserror::Error)]
#[error("a cluster name has 1 to 40 of a-z, 0-9 and _, and is not keys: found {0:?}")]
pub struct InvalidClusterName(String);

impl ClusterName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ClusterName {
    type Err = InvalidClusterName;

    fn from_str(text: &str) -> Result<Self, InvalidClusterName> {
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        let fits = (1..=40).contains(&text.len()) && text.chars().all(legal);
        if fits && !RESERVED.contains(&text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidClusterName(text.to_owned()))
        }
    }
}

impl fmt::Display for ClusterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A backup's id: the UTC time of its beginning, `YYYYMMDDTHHMMSS.mmmZ`, so that ids sort by time.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId(String);

/// Text that is no backup's id.
#[derive(Debug, thiserror::Error)]
#[error("a backup id looks like 20261120T140300.000Z: found {0:?}")]
pub struct InvalidBackupId(String);

impl BackupId {
    /// The id of a backup that begins at `time`.
    pub fn at(time: jiff::Timestamp) -> Self {
        Self(time.strftime("%Y%m%dT%H%M%S.%3fZ").to_string())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for BackupId {
    type Err = InvalidBackupId;

    fn from_str(text: &str) -> Result<Self, InvalidBackupId> {
        let shape = b"dddddddd-dddddd.dddZ";
        let fits = text.len() == shape.len()
            && text
                .bytes()
                .zip(shape)
                .enumerate()
                .all(|(at, (byte, form))| match form {
                    b'd' => byte.is_ascii_digit(),
                    b'-' => at == 8 && byte == b'T',
                    other => byte == *other,
                });
        if fits {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidBackupId(text.to_owned()))
        }
    }
}

impl TryFrom<String> for BackupId {
    type Error = InvalidBackupId;

    fn try_from(text: String) -> Result<Self, InvalidBackupId> {
        text.parse()
    }
}

impl From<BackupId> for String {
    fn from(id: BackupId) -> Self {
        id.0
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Every object that a cluster's system can have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectName {
    /// `cluster.json`: name, system identifier, major; written once.
    Cluster,
    /// A complete segment.
    Segment(SegmentName),
    /// A stretch of a segment that is not complete yet.
    Piece {
        /// The segment that the stretch belongs to.
        segment: SegmentName,
        /// The stretch.
        range: WalRange,
    },
    /// A segment that its timeline left before it was full, as the server archived it.
    Partial(SegmentName),
    /// A backup history file, as the server archived it.
    BackupHistory {
        /// The segment in which the backup began.
        segment: SegmentName,
        /// The offset of its start in that segment, in bytes.
        offset: u32,
    },
    /// A timeline history file.
    History(TimelineId),
    /// The summaries of neighbouring segments, from this one on.
    Index(SegmentName),
    /// A stretch that could not be had, with the reason.
    Hole {
        /// The timeline that misses the stretch.
        timeline: TimelineId,
        /// The stretch.
        range: WalRange,
    },
    /// What an unfinished backup refers to.
    Intent(BackupId),
    /// That packs of a backup may be about to go.
    Mark {
        /// Whose packs.
        backup: BackupId,
        /// When that was decided; tells one removal from another.
        at: BackupId,
    },
    /// The latest known position of a stream; rewritten.
    Tip(TimelineId),
    /// The commit point of a backup.
    Backup(BackupId),
    /// What a backup that failed has stored, for the next one to use.
    Unfinished(BackupId),
    /// A backup's list of files and extents.
    Manifest(BackupId),
    /// Lines of a manifest that are stored by themselves; numbers count from 0.
    FileList {
        /// Whose.
        backup: BackupId,
        /// Which of its lists.
        number: u32,
    },
    /// A pack of extents; its number counts from 0 within the backup that wrote it.
    Pack {
        /// The backup that wrote it.
        backup: BackupId,
        /// Which of that backup's packs.
        number: u32,
    },
}

impl ObjectName {
    /// The word for this sort of object, in headers and messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Segment(_) => "segment",
            Self::Piece { .. } => "piece",
            Self::Partial(_) => "partial",
            Self::BackupHistory { .. } => "backup_history",
            Self::History(_) => "history",
            Self::Index(_) => "index",
            Self::Hole { .. } => "hole",
            Self::Intent(_) => "intent",
            Self::Mark { .. } => "mark",
            Self::Tip(_) => "tip",
            Self::Backup(_) => "backup",
            Self::Unfinished(_) => "unfinished",
            Self::Manifest(_) => "manifest",
            Self::FileList { .. } => "file_list",
            Self::Pack { .. } => "pack",
        }
    }

    /// The path below `<url>/<cluster>/<system identifier>/`.
    pub fn path(&self) -> String {
        match self {
            Self::Cluster => "cluster.json".to_owned(),
            Self::Segment(segment) => segment_path(*segment),
            Self::Piece { segment, range } => {
                format!("{}{}", pieces_prefix(*segment), range_name(*range))
            }
            Self::Partial(segment) => format!("{}.partial", segment_path(*segment)),
            Self::BackupHistory { segment, offset } => {
                format!("{}.{offset:08X}.backup", segment_path(*segment))
            }
            Self::History(timeline) => format!("wal/{}.history", timeline.hex8()),
            Self::Index(first) => format!("{}{first}", index_prefix(first.timeline)),
            Self::Hole { timeline, range } => {
                format!("holes/{}/{}", timeline.hex8(), range_name(*range))
            }
            Self::Intent(id) => format!("intents/{id}"),
            Self::Mark { backup, at } => format!("marks/{backup}/{at}"),
            Self::Tip(timeline) => format!("tip/{}", timeline.hex8()),
            Self::Backup(id) => format!("backups/{id}/backup.json"),
            Self::Unfinished(id) => format!("backups/{id}/unfinished.json"),
            Self::Manifest(id) => format!("backups/{id}/manifest"),
            Self::FileList { backup, number } => format!("backups/{backup}/files/{number:08}"),
            Self::Pack { backup, number } => format!("packs/{backup}/{number:08}"),
        }
    }

    /// What the path names; `None` where no object of this layout has such a path.
    pub fn parse(path: &str) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').collect();
        let name = match *parts.as_slice() {
            ["cluster.json"] => Self::Cluster,
            ["wal", history] => {
                Self::History(TimelineId::from_hex8(history.strip_suffix(".history")?)?)
            }
            ["wal", _, _, pieces, range] => {
                let segment = pieces.strip_suffix(".pieces")?.parse().ok()?;
                Self::Piece {
                    segment,
                    range: parse_range(range)?,
                }
            }
            ["wal", _, _, file] => parse_wal_file(file)?,
            ["index", _, first] => Self::Index(first.parse().ok()?),
            ["holes", timeline, range] => Self::Hole {
                timeline: TimelineId::from_hex8(timeline)?,
                range: parse_range(range)?,
            },
            ["intents", id] => Self::Intent(id.parse().ok()?),
            ["marks", backup, at] => Self::Mark {
                backup: backup.parse().ok()?,
                at: at.parse().ok()?,
            },
            ["tip", timeline] => Self::Tip(TimelineId::from_hex8(timeline)?),
            ["backups", id, "backup.json"] => Self::Backup(id.parse().ok()?),
            ["backups", id, "unfinished.json"] => Self::Unfinished(id.parse().ok()?),
            ["backups", id, "manifest"] => Self::Manifest(id.parse().ok()?),
            ["backups", id, "files", number] if number.len() == 8 => Self::FileList {
                backup: id.parse().ok()?,
                number: number.parse().ok()?,
            },
            ["packs", id, number] if number.len() == 8 => Self::Pack {
                backup: id.parse().ok()?,
                number: number.parse().ok()?,
            },
            _ => return None,
        };
        // a path in the wrong folder, or spelt in another way, is not the object's
        (name.path() == path).then_some(name)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path())
    }
}

/// The folder of a segment's pieces, with a `/` at its end.
pub fn pieces_prefix(segment: SegmentName) -> String {
    format!("{}.pieces/", segment_path(segment))
}

/// The folder of a timeline's segments and pieces, with a `/` at its end.
pub fn timeline_prefix(timeline: TimelineId) -> String {
    format!("wal/{}/", timeline.hex8())
}

/// The folder of a timeline's summaries, with a `/` at its end.
pub fn index_prefix(timeline: TimelineId) -> String {
    format!("index/{}/", timeline.hex8())
}

fn segment_path(segment: SegmentName) -> String {
    format!(
        "wal/{}/{}/{segment}",
        segment.timeline.hex8(),
        segment.prefix16()
    )
}

fn range_name(range: WalRange) -> String {
    format!("{}-{}", range.start.hex16(), range.end.hex16())
}

fn parse_range(text: &str) -> Option<WalRange> {
    let (start, end) = text.split_once('-')?;
    let range = WalRange {
        start: Lsn::from_hex16(start)?,
        end: Lsn::from_hex16(end)?,
    };
    (range.start < range.end).then_some(range)
}

fn parse_wal_file(file: &str) -> Option<ObjectName> {
    match file.parse().ok()? {
        wal::WalFileName::Segment(segment) => Some(ObjectName::Segment(segment)),
        wal::WalFileName::Partial(segment) => Some(ObjectName::Partial(segment)),
        wal::WalFileName::Backup { segment, offset } => {
            Some(ObjectName::BackupHistory { segment, offset })
        }
        wal::WalFileName::History(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_kind() -> Vec<ObjectName> {
        let segment: SegmentName = "00000002000000010000000A".parse().unwrap();
        let timeline = TimelineId::new(2).unwrap();
        let range = WalRange {
            start: Lsn::new(0x1_0A00_0000),
            end: Lsn::new(0x1_0A00_2000),
        };
        let id: BackupId = "20261120T140300.123Z".parse().unwrap();
        vec![
            ObjectName::Cluster,
            ObjectName::Segment(segment),
            ObjectName::Piece { segment, range },
            ObjectName::Partial(segment),
            ObjectName::BackupHistory {
                segment,
                offset: 0x28,
            },
            ObjectName::History(timeline),
            ObjectName::Index(segment),
            ObjectName::Hole { timeline, range },
            ObjectName::Intent(id.clone()),
            ObjectName::Tip(timeline),
            ObjectName::Mark {
                backup: BackupId::at(jiff::Timestamp::UNIX_EPOCH),
                at: BackupId::at(jiff::Timestamp::UNIX_EPOCH),
            },
            ObjectName::Backup(id.clone()),
            ObjectName::Unfinished(id.clone()),
            ObjectName::Manifest(id.clone()),
            ObjectName::FileList {
                backup: id.clone(),
                number: 3,
            },
            ObjectName::Pack {
                backup: id,
                number: 7,
            },
        ]
    }

    #[test]
    fn every_name_is_found_again_from_its_path() {
        for name in every_kind() {
            assert_eq!(
                ObjectName::parse(&name.path()),
                Some(name.clone()),
                "{name}"
            );
        }
    }

    #[test]
    fn segments_lie_where_the_design_says() {
        let segment: SegmentName = "00000002000000010000000A".parse().unwrap();
        assert_eq!(
            ObjectName::Segment(segment).path(),
            "wal/00000002/0000000200000001/00000002000000010000000A"
        );
    }

    #[test]
    fn refuses_paths_that_only_look_like_ours() {
        for path in [
            "wal/00000001/0000000200000001/00000002000000010000000A",
            "wal/00000002/0000000200000001/00000002000000010000000a",
            "backups/../backup.json",
            "backups/20261120T140300.123Z/backup.json.tmp",
            "wal/00000002/0000000200000001/00000002000000010000000A.pieces/1-2",
            "packs/20261120T140300.123Z/7",
            "",
        ] {
            assert_eq!(ObjectName::parse(path), None, "{path}");
        }
    }

    #[test]
    fn cluster_names_cannot_leave_their_folder() {
        assert!("main_2".parse::<ClusterName>().is_ok());
        for bad in ["", "Main", "a/b", "..", "ä", "keys", &"x".repeat(41)] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad}");
        }
    }
}
