//! `global/pg_control`: a cluster's identity, state and settings that a standby must match.
//!
//! `catalog/pg_control.h`, `ControlFileData`, little-endian with 8-byte alignment (x86-64 and arm64).
//! The first 16 bytes are the same in every version; the rest has one layout for each `pg_control`
//! version, compared with `pg_controldata` on files of each major (tests/golden).

use std::fmt;

use wal::{Lsn, Major, SegmentSize, TimelineId};

use crate::byte_count;

/// The file's length on disk (`PG_CONTROL_FILE_SIZE`); what is used of it is less than 512 bytes.
pub const CONTROL_FILE_BYTES: usize = 8192;

/// What `pg_control` says, its CRC-32C verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// The cluster's system identifier.
    pub system_id: u64,
    /// `PG_CONTROL_VERSION`.
    pub control_version: u32,
    /// `CATALOG_VERSION_NO`.
    pub catalog_version: u32,
    /// The major that writes these two versions, if it is a released one that is known.
    pub major: Option<Major>,
    /// What the cluster was doing.
    pub state: ClusterState,
    /// When the file was last written: seconds since 1970-01-01 UTC.
    pub written_at: i64,
    /// Where the latest checkpoint's record stands.
    pub checkpoint_lsn: Lsn,
    /// A copy of that record.
    pub checkpoint: Checkpoint,
    /// A standby's or a restored cluster's: replay must come at least so far. Zero elsewhere.
    pub min_recovery_point: Lsn,
    /// The timeline of `min_recovery_point`; `None` elsewhere.
    pub min_recovery_timeline: Option<TimelineId>,
    /// The start of the backup being recovered from; zero outside such a recovery.
    pub backup_start: Lsn,
    /// The end of a backup from a standby being recovered from; zero outside such a recovery.
    pub backup_end: Lsn,
    /// Whether recovery has to find an end-of-backup record.
    pub backup_end_required: bool,
    /// `wal_level`.
    pub wal_level: WalLevel,
    /// `wal_log_hints`.
    pub wal_log_hints: bool,
    /// `max_connections`; a server in recovery needs at least this much, as of the next four.
    pub max_connections: u32,
    /// `max_worker_processes`.
    pub max_worker_processes: u32,
    /// `max_wal_senders`.
    pub max_wal_senders: u32,
    /// `max_prepared_transactions`.
    pub max_prepared_xacts: u32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_xact: u32,
    /// Length of a page in bytes.
    pub block_size: u32,
    /// Length of a WAL page in bytes.
    pub wal_block_size: u32,
    /// `wal_segment_size`.
    pub segment_size: SegmentSize,
    /// Version of the page checksums; 0 when they are off.
    pub data_checksum_version: u32,
}

/// The latest checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where replay from it begins.
    pub redo: Lsn,
    /// Its timeline.
    pub timeline: TimelineId,
    /// The timeline before, where this checkpoint begins one; the same otherwise.
    pub previous_timeline: TimelineId,
    /// The next transaction, epoch in the upper half.
    pub next_xid: u64,
    /// When it was begun: seconds since 1970-01-01 UTC.
    pub time: i64,
}

/// `pg_control.h`, `DBState`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Just made.
    StartingUp,
    /// Stopped cleanly.
    ShutDown,
    /// Stopped cleanly as a standby.
    ShutDownInRecovery,
    /// About to stop.
    ShuttingDown,
    /// Recovering from a crash.
    InCrashRecovery,
    /// Recovering from an archive, or following as a standby.
    InArchiveRecovery,
    /// Running, or crashed while running.
    InProduction,
}

impl fmt::Display for ClusterState {
    /// As `pg_controldata` has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StartingUp => "starting up",
            Self::ShutDown => "shut down",
            Self::ShutDownInRecovery => "shut down in recovery",
            Self::ShuttingDown => "shutting down",
            Self::InCrashRecovery => "in crash recovery",
            Self::InArchiveRecovery => "in archive recovery",
            Self::InProduction => "in production",
        })
    }
}

/// xlog.h, `WalLevel`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalLevel {
    /// Enough for a crash alone: nothing can be archived.
    Minimal,
    /// Enough for archives and standbys.
    Replica,
    /// With what logical decoding needs.
    Logical,
}

impl fmt::Display for WalLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Minimal => "minimal",
            Self::Replica => "replica",
            Self::Logical => "logical",
        })
    }
}

/// The three fields that stand at the same place in every version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The cluster's system identifier.
    pub system_id: u64,
    /// `PG_CONTROL_VERSION`.
    pub control_version: u32,
    /// `CATALOG_VERSION_NO`.
    pub catalog_version: u32,
}

/// Why bytes are not a `pg_control` that can be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// Too few bytes.
    #[error("pg_control is too short: expected at least {expected} bytes, found {found}")]
    Short {
        /// Bytes needed.
        expected: u64,
        /// Bytes there were.
        found: u64,
    },
    /// Written by a machine of the other byte order.
    #[error("pg_control is of a machine with another byte order: version {found:#010x}")]
    ByteOrder {
        /// The version as found.
        found: u32,
    },
    /// A version whose layout is not known; [`identity`] still reads it.
    #[error("pg_control has an unknown version: found {found}")]
    Version {
        /// `PG_CONTROL_VERSION`.
        found: u32,
    },
    /// Its checksum does not match.
    #[error("pg_control is damaged: expected CRC-32C {expected:08x}, found {found:08x}")]
    Checksum {
        /// As the file has it.
        expected: u32,
        /// As computed.
        found: u32,
    },
    /// A value that cannot be, under a checksum that matches.
    #[error("pg_control has an impossible {field}: found {found}")]
    Value {
        /// Which value.
        field: &'static str,
        /// The value.
        found: u64,
    },
}

/// Where the fields of one `pg_control` version stand, in bytes from the file's first.
struct Layout {
    control_version: u32,
    checkpoint_next_xid: usize,
    checkpoint_time: usize,
    /// `minRecoveryPoint`; its timeline, the backup's start, end and need follow.
    min_recovery_point: usize,
    /// `wal_level`; `wal_log_hints` and the five limits follow.
    wal_level: usize,
    block_size: usize,
    wal_block_size: usize,
    segment_size: usize,
    data_checksum_version: usize,
    crc: usize,
}

/// 13 to 17: between 16 and 17 only the checkpoint gained a `wal_level`, in what was padding.
const V1300: Layout = Layout {
    control_version: 1300,
    checkpoint_next_xid: 64,
    checkpoint_time: 104,
    min_recovery_point: 136,
    wal_level: 172,
    block_size: 216,
    wal_block_size: 224,
    segment_size: 228,
    data_checksum_version: 252,
    crc: 288,
};
const V1700: Layout = Layout {
    control_version: 1700,
    ..V1300
};
/// 18: `default_char_signedness` before the nonce.
const V1800: Layout = Layout {
    control_version: 1800,
    crc: 292,
    ..V1300
};
/// 19: wider multixact offsets, logical decoding in the checkpoint, the size of SLRU segments.
/// Found on files of 19rc1 with its `pg_controldata`, without the header file; the word before the
/// version of the page checksums, which keeps its first value, is not understood.
const V1905: Layout = Layout {
    control_version: 1905,
    checkpoint_next_xid: 72,
    checkpoint_time: 112,
    min_recovery_point: 144,
    wal_level: 180,
    block_size: 224,
    wal_block_size: 236,
    segment_size: 240,
    data_checksum_version: 268,
    crc: 308,
};
const LAYOUTS: [Layout; 4] = [V1300, V1700, V1800, V1905];

/// What is the same in all layouts.
const SYSTEM_ID: usize = 0;
const CONTROL_VERSION: usize = 8;
const CATALOG_VERSION: usize = 12;
const IDENTITY_BYTES: u64 = 16;
const STATE: usize = 16;
const WRITTEN_AT: usize = 24;
const CHECKPOINT_LSN: usize = 32;
const CHECKPOINT_REDO: usize = 40;
const CHECKPOINT_TIMELINE: usize = 48;
const CHECKPOINT_PREVIOUS_TIMELINE: usize = 52;

/// The cluster's identity, of any version that there was or will be. No checksum is verified.
pub fn identity(bytes: &[u8]) -> Result<Identity, ControlError> {
    let file = Fields(bytes);
    let identity = || {
        Some(Identity {
            system_id: file.u64(SYSTEM_ID)?,
            control_version: file.u32(CONTROL_VERSION)?,
            catalog_version: file.u32(CATALOG_VERSION)?,
        })
    };
    let short = ControlError::Short {
        expected: IDENTITY_BYTES,
        found: byte_count(bytes.len()),
    };
    let identity = identity().ok_or(short)?;
    // Versions are far below 65536 (controldata_utils.c looks at it the same way).
    if identity.control_version % 65536 == 0 && identity.control_version / 65536 != 0 {
        return Err(ControlError::ByteOrder {
            found: identity.control_version,
        });
    }
    Ok(identity)
}

impl ControlFile {
    /// Reads `pg_control`: the whole file, or at least its first 512 bytes.
    ///
    /// `bytes` may be damaged or hostile: never panics, allocates nothing.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlError> {
        let Identity {
            system_id,
            control_version,
            catalog_version,
        } = identity(bytes)?;
        let layout = LAYOUTS
            .iter()
            .find(|layout| layout.control_version == control_version)
            .ok_or(ControlError::Version {
                found: control_version,
            })?;
        let file = Fields(bytes);
        let expected = file.u32(layout.crc).ok_or_else(|| ControlError::Short {
            expected: byte_count(layout.crc.saturating_add(4)),
            found: byte_count(bytes.len()),
        })?;
        let found = crc32c::crc32c(bytes.get(..layout.crc).unwrap_or_default());
        if found != expected {
            return Err(ControlError::Checksum { expected, found });
        }
        Self::read(
            &file,
            layout,
            Identity {
                system_id,
                control_version,
                catalog_version,
            },
        )
    }

    fn read(file: &Fields<'_>, layout: &Layout, identity: Identity) -> Result<Self, ControlError> {
        let number = |at| {
            file.u32(at)
                .expect("every field stands before the checksum")
        };
        let wide = |at| {
            file.u64(at)
                .expect("every field stands before the checksum")
        };
        let flag = |at| number(at).to_le_bytes().first() == Some(&1);
        let time = |at| wide(at).cast_signed();
        let lsn = |at| Lsn::new(wide(at));
        let after = |at: usize, bytes: usize| at.saturating_add(bytes);
        let timeline = |at, field| {
            let found = number(at);
            TimelineId::new(found).ok_or_else(|| ControlError::Value {
                field,
                found: u64::from(found),
            })
        };
        let recovery = layout.min_recovery_point;
        let settings = layout.wal_level;
        let segment_bytes = u64::from(number(layout.segment_size));
        Ok(Self {
            system_id: identity.system_id,
            control_version: identity.control_version,
            catalog_version: identity.catalog_version,
            major: Major::from_control_version(identity.control_version, identity.catalog_version),
            state: state(number(STATE))?,
            written_at: time(WRITTEN_AT),
            checkpoint_lsn: lsn(CHECKPOINT_LSN),
            checkpoint: Checkpoint {
                redo: lsn(CHECKPOINT_REDO),
                timeline: timeline(CHECKPOINT_TIMELINE, "timeline of the checkpoint")?,
                previous_timeline: timeline(
                    CHECKPOINT_PREVIOUS_TIMELINE,
                    "previous timeline of the checkpoint",
                )?,
                next_xid: wide(layout.checkpoint_next_xid),
                time: time(layout.checkpoint_time),
            },
            min_recovery_point: lsn(recovery),
            min_recovery_timeline: TimelineId::new(number(after(recovery, 8))),
            backup_start: lsn(after(recovery, 16)),
            backup_end: lsn(after(recovery, 24)),
            backup_end_required: flag(after(recovery, 32)),
            wal_level: wal_level(number(settings))?,
            wal_log_hints: flag(after(settings, 4)),
            max_connections: number(after(settings, 8)),
            max_worker_processes: number(after(settings, 12)),
            max_wal_senders: number(after(settings, 16)),
            max_prepared_xacts: number(after(settings, 20)),
            max_locks_per_xact: number(after(settings, 24)),
            block_size: number(layout.block_size),
            wal_block_size: number(layout.wal_block_size),
            segment_size: SegmentSize::from_bytes(segment_bytes).map_err(|_invalid| {
                ControlError::Value {
                    field: "WAL segment size",
                    found: segment_bytes,
                }
            })?,
            data_checksum_version: number(layout.data_checksum_version),
        })
    }
}

fn state(found: u32) -> Result<ClusterState, ControlError> {
    Ok(match found {
        0 => ClusterState::StartingUp,
        1 => ClusterState::ShutDown,
        2 => ClusterState::ShutDownInRecovery,
        3 => ClusterState::ShuttingDown,
        4 => ClusterState::InCrashRecovery,
        5 => ClusterState::InArchiveRecovery,
        6 => ClusterState::InProduction,
        _ => {
            return Err(ControlError::Value {
                field: "state",
                found: u64::from(found),
            });
        }
    })
}

fn wal_level(found: u32) -> Result<WalLevel, ControlError> {
    Ok(match found {
        0 => WalLevel::Minimal,
        1 => WalLevel::Replica,
        2 => WalLevel::Logical,
        _ => {
            return Err(ControlError::Value {
                field: "wal_level",
                found: u64::from(found),
            });
        }
    })
}

/// Little-endian numbers at offsets.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> Option<u32> {
        self.0
            .get(at..)?
            .first_chunk()
            .copied()
            .map(u32::from_le_bytes)
    }

    fn u64(&self, at: usize) -> Option<u64> {
        self.0
            .get(at..)?
            .first_chunk()
            .copied()
            .map(u64::from_le_bytes)
    }
}
