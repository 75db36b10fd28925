//! What a record says, for the records that restores need.
//!
//! Layouts are those of `xact.h`, `pg_control.h`, `xlog_internal.h`, `storage_xlog.h`,
//! `dbcommands_xlog.h` and `tablespace.h`, where majors differ it is said.

use std::fmt;

use thiserror::Error;

use crate::lsn::Lsn;
use crate::major::Major;
use crate::reader::{Reader, TooShort};
use crate::record::{Record, rmgr};
use crate::time::PgTime;
use crate::timeline::TimelineId;

/// Text as the server has it, in the server's encoding, which need not be UTF-8.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ServerText(Vec<u8>);

impl ServerText {
    /// The bytes, without the NUL that ended them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Whatever is not UTF-8 is replaced.
impl fmt::Display for ServerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for ServerText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(&self.0), f)
    }
}

impl PartialEq<str> for ServerText {
    fn eq(&self, other: &str) -> bool {
        self.0 == other.as_bytes()
    }
}

impl PartialEq<&str> for ServerText {
    fn eq(&self, other: &&str) -> bool {
        self.0 == other.as_bytes()
    }
}

/// The files of a relation, or all of one database's in a tablespace where `relation` is 0
/// (`relfilelocator.h`, `RelFileLocator`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RelFile {
    /// The tablespace's OID.
    pub tablespace: u32,
    /// The database's OID, 0 for what all databases share.
    pub database: u32,
    /// The file number.
    pub relation: u32,
}

/// How a transaction ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransactionEnd {
    /// The transaction; for one that had been prepared, that one and not the one that ended it.
    pub xid: u32,
    /// When, by the server's clock. Later records can carry earlier times.
    pub time: PgTime,
    /// True if it had been prepared (`COMMIT PREPARED`, `ROLLBACK PREPARED`).
    pub prepared: bool,
    /// The identifier that it had been prepared under, if the record has it.
    pub gid: Option<ServerText>,
    /// Its subtransactions.
    pub subxacts: Vec<u32>,
    /// Relations whose files are removed now.
    pub drops: Vec<RelFile>,
}

/// What a record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A transaction committed.
    Commit(TransactionEnd),
    /// A transaction was rolled back.
    Abort(TransactionEnd),
    /// A transaction was prepared for a later commit.
    Prepare {
        /// The transaction.
        xid: u32,
        /// When, by the server's clock. Recovery does not stop at this time.
        prepared_at: PgTime,
        /// The identifier it was given.
        gid: ServerText,
    },
    /// `pg_create_restore_point`.
    RestorePoint {
        /// When, by the server's clock.
        time: PgTime,
        /// Its name.
        name: ServerText,
    },
    /// A checkpoint finished.
    Checkpoint {
        /// True if the server was shut down with it.
        shutdown: bool,
        /// Where recovery from it begins.
        redo: Lsn,
        /// The timeline.
        this_timeline: Option<TimelineId>,
        /// The timeline before, if this checkpoint begins one; else the same.
        prev_timeline: Option<TimelineId>,
        /// When it began, in seconds since 1970.
        time_unix_s: i64,
        /// The next transaction, with its epoch in the upper half.
        next_xid: u64,
    },
    /// Settings that a standby, or a restored server, must not be below.
    ParameterChange {
        /// `max_connections`.
        max_connections: i32,
        /// `max_worker_processes`.
        max_worker_processes: i32,
        /// `max_wal_senders`.
        max_wal_senders: i32,
        /// `max_prepared_transactions`.
        max_prepared_transactions: i32,
        /// `max_locks_per_transaction`.
        max_locks_per_transaction: i32,
        /// `wal_level`: 0 minimal, 1 replica, 2 logical.
        wal_level: u32,
    },
    /// A recovery ended without a checkpoint, and a timeline began.
    EndOfRecovery {
        /// When, by the server's clock.
        time: PgTime,
        /// The timeline that began.
        this_timeline: Option<TimelineId>,
        /// The timeline that was left.
        prev_timeline: Option<TimelineId>,
    },
    /// A tablespace was made. Replaying it makes a link to this path.
    CreateTablespace {
        /// Its OID.
        oid: u32,
        /// Where it is. Empty for one in place, inside of the data directory.
        path: ServerText,
    },
    /// A tablespace was removed.
    DropTablespace {
        /// Its OID.
        oid: u32,
    },
    /// A database was made. Its commit comes later.
    CreateDatabase {
        /// Its OID.
        database: u32,
        /// The OID of its tablespace.
        tablespace: u32,
    },
    /// A database's files are removed. The commit of the transaction comes later, so that
    /// stopping between the two leaves a database without files.
    DropDatabase {
        /// Its OID.
        database: u32,
        /// The OIDs of the tablespaces from which it goes.
        tablespaces: Vec<u32>,
    },
    /// A relation was cut short.
    TruncateRelation {
        /// Whose.
        file: RelFile,
        /// Blocks that are left.
        blocks: u32,
        /// Which parts: 1 the table, 2 the visibility map, 4 the free space map.
        flags: u32,
    },
    /// The rest of the segment is empty.
    Switch,
    /// A record was never finished, and this stands in its place.
    OverwriteContrecord {
        /// Where it started.
        overwritten: Lsn,
    },
    /// A base backup ended; what it copied is consistent from here.
    BackupEnd {
        /// Where the backup started.
        start: Lsn,
    },
    /// Anything else.
    Other,
}

/// The record's kind is known and its bytes do not say what such records say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BodyError {
    /// It ends too early.
    #[error(transparent)]
    Short(#[from] TooShort),
    /// A text has no end.
    #[error("{part} is not ended by a NUL: offset={offset}")]
    NoNul {
        /// What was read.
        part: &'static str,
        /// Where the text starts, in bytes.
        offset: usize,
    },
    /// A count that is below zero.
    #[error("{part} counts below zero: offset={offset}, found={found}")]
    Count {
        /// What was read.
        part: &'static str,
        /// Where the count stands, in bytes.
        offset: usize,
        /// The count.
        found: i32,
    },
}

impl Record {
    /// What it says, if it is one of the kinds that restores need; else [`Body::Other`].
    pub fn body(&self, major: Major) -> Result<Body, BodyError> {
        let info = self.header.info;
        match self.header.rmgr {
            rmgr::XLOG => xlog(info & 0xF0, &self.main_data, major),
            rmgr::XACT => xact(info, self.header.xid, &self.main_data, major),
            rmgr::SMGR => smgr(info & 0xF0, &self.main_data),
            rmgr::DBASE => dbase(info & 0xF0, &self.main_data, major),
            rmgr::TBLSPC => tblspc(info & 0xF0, &self.main_data),
            _ => Ok(Body::Other),
        }
    }
}

/// `pg_control.h`, `XLOG_*`; `xlogdesc.c`.
fn xlog(info: u8, data: &[u8], major: Major) -> Result<Body, BodyError> {
    match info {
        0x00 => checkpoint(true, data, major),
        0x10 => checkpoint(false, data, major),
        0x40 => Ok(Body::Switch),
        0x50 => Ok(Body::BackupEnd {
            start: Reader::new("BACKUP_END", data).lsn()?,
        }),
        0x60 => parameter_change(data),
        0x70 => {
            let mut fields = Reader::new("RESTORE_POINT", data);
            let time = PgTime(fields.i64()?);
            Ok(Body::RestorePoint {
                time,
                name: text(&mut fields, "RESTORE_POINT")?,
            })
        }
        0x90 => {
            let mut fields = Reader::new("END_OF_RECOVERY", data);
            Ok(Body::EndOfRecovery {
                time: PgTime(fields.i64()?),
                this_timeline: TimelineId::new(fields.u32()?),
                prev_timeline: TimelineId::new(fields.u32()?),
            })
        }
        0xD0 => {
            let overwritten = Reader::new("OVERWRITE_CONTRECORD", data).lsn()?;
            Ok(Body::OverwriteContrecord { overwritten })
        }
        _ => Ok(Body::Other),
    }
}

/// `pg_control.h`, `CheckPoint`. In 19 it grew by the state of logical decoding, and a multixact
/// offset of 64 bits.
fn checkpoint(shutdown: bool, data: &[u8], major: Major) -> Result<Body, BodyError> {
    let grew = major >= Major::V19;
    let mut fields = Reader::new("CHECKPOINT", data);
    let redo = fields.lsn()?;
    let this_timeline = TimelineId::new(fields.u32()?);
    let prev_timeline = TimelineId::new(fields.u32()?);
    // fullPageWrites, since 17 wal_level, in 19 logical decoding, all with padding
    fields.take(if grew { 16 } else { 8 })?;
    let next_xid = fields.u64()?;
    // nextOid, nextMulti, nextMultiOffset
    fields.take(if grew { 4 + 4 + 8 } else { 4 + 4 + 4 })?;
    // oldestXid and oldestMulti, each with a database, then padding up to a multiple of eight
    fields.take(if grew { 4 * 4 } else { 4 * 4 + 4 })?;
    let time_unix_s = fields.i64()?;
    Ok(Body::Checkpoint {
        shutdown,
        redo,
        this_timeline,
        prev_timeline,
        time_unix_s,
        next_xid,
    })
}

/// `xlog_internal.h`, `xl_parameter_change`.
fn parameter_change(data: &[u8]) -> Result<Body, BodyError> {
    let mut fields = Reader::new("PARAMETER_CHANGE", data);
    Ok(Body::ParameterChange {
        max_connections: fields.i32()?,
        max_worker_processes: fields.i32()?,
        max_wal_senders: fields.i32()?,
        max_prepared_transactions: fields.i32()?,
        max_locks_per_transaction: fields.i32()?,
        wal_level: fields.u32()?,
    })
}

// xact.h: the upper half of info, without the bit that says that flags follow
const COMMIT: u8 = 0x00;
const PREPARE: u8 = 0x10;
const ABORT: u8 = 0x20;
const COMMIT_PREPARED: u8 = 0x30;
const ABORT_PREPARED: u8 = 0x40;

fn xact(info: u8, xid: u32, data: &[u8], major: Major) -> Result<Body, BodyError> {
    let has_flags = info & 0x80 != 0;
    match info & 0x70 {
        COMMIT | COMMIT_PREPARED => {
            transaction_end("COMMIT", has_flags, xid, data, major).map(Body::Commit)
        }
        ABORT | ABORT_PREPARED => {
            transaction_end("ABORT", has_flags, xid, data, major).map(Body::Abort)
        }
        PREPARE => prepare(data, major),
        _ => Ok(Body::Other),
    }
}

// xact.h, XACT_XINFO_*
const HAS_DATABASE: u32 = 0x1;
const HAS_SUBXACTS: u32 = 0x2;
const HAS_DROPS: u32 = 0x4;
const HAS_INVALIDATIONS: u32 = 0x8;
const HAS_TWO_PHASE: u32 = 0x10;
const HAS_GID: u32 = 0x80;
const HAS_DROPPED_STATISTICS: u32 = 0x100;

const INVALIDATION_BYTES: usize = 16;

/// `xactdesc.c`, `ParseCommitRecord` and `ParseAbortRecord`: the same, but that an abort never has
/// invalidations.
fn transaction_end(
    part: &'static str,
    has_flags: bool,
    xid: u32,
    data: &[u8],
    major: Major,
) -> Result<TransactionEnd, BodyError> {
    let mut fields = Reader::new(part, data);
    let time = PgTime(fields.i64()?);
    let flags = if has_flags { fields.u32()? } else { 0 };
    let mut end = TransactionEnd {
        xid,
        time,
        prepared: false,
        gid: None,
        subxacts: Vec::new(),
        drops: Vec::new(),
    };
    if flags & HAS_DATABASE != 0 {
        fields.take(8)?;
    }
    if flags & HAS_SUBXACTS != 0 {
        end.subxacts = list(&mut fields, part, 4, Reader::u32)?;
    }
    if flags & HAS_DROPS != 0 {
        end.drops = list(&mut fields, part, 12, rel_file)?;
    }
    if flags & HAS_DROPPED_STATISTICS != 0 {
        let item_bytes = if major >= Major::V18 { 16 } else { 12 };
        skip_list(&mut fields, part, item_bytes)?;
    }
    if flags & HAS_INVALIDATIONS != 0 {
        skip_list(&mut fields, part, INVALIDATION_BYTES)?;
    }
    if flags & HAS_TWO_PHASE != 0 {
        end.xid = fields.u32()?;
        end.prepared = true;
        if flags & HAS_GID != 0 {
            end.gid = Some(text(&mut fields, part)?);
        }
    }
    Ok(end)
}

/// `xact.h`, `xl_xact_prepare`; the identifier follows at the next multiple of eight.
fn prepare(data: &[u8], major: Major) -> Result<Body, BodyError> {
    let mut fields = Reader::new("PREPARE", data);
    fields.take(8)?; // magic, total length
    let xid = fields.u32()?;
    fields.take(4)?; // database
    let prepared_at = PgTime(fields.i64()?);
    // owner, subxacts, commit and abort relations, since 15 their statistics, invalidations
    fields.take(if major >= Major::V15 { 7 * 4 } else { 5 * 4 })?;
    fields.take(2)?; // initfileinval and padding
    let gid_bytes = usize::from(fields.u16()?);
    fields.take(16)?; // origin
    let offset = fields.offset();
    let gid = fields.take(gid_bytes)?;
    let Some((0, gid)) = gid.split_last() else {
        return Err(BodyError::NoNul {
            part: "PREPARE",
            offset,
        });
    };
    Ok(Body::Prepare {
        xid,
        prepared_at,
        gid: ServerText(gid.to_vec()),
    })
}

/// `storage_xlog.h`, `xl_smgr_truncate`.
fn smgr(info: u8, data: &[u8]) -> Result<Body, BodyError> {
    if info != 0x20 {
        return Ok(Body::Other);
    }
    let mut fields = Reader::new("SMGR_TRUNCATE", data);
    let blocks = fields.u32()?;
    let file = rel_file(&mut fields)?;
    Ok(Body::TruncateRelation {
        file,
        blocks,
        flags: fields.u32()?,
    })
}

/// `dbcommands_xlog.h`; since 15 there are two ways to make a database, and dropping one moved.
fn dbase(info: u8, data: &[u8], major: Major) -> Result<Body, BodyError> {
    let two_ways = major >= Major::V15;
    match (info, two_ways) {
        (0x00, _) | (0x10, true) => {
            let mut fields = Reader::new("CREATE_DATABASE", data);
            Ok(Body::CreateDatabase {
                database: fields.u32()?,
                tablespace: fields.u32()?,
            })
        }
        (0x10, false) | (0x20, true) => {
            let mut fields = Reader::new("DROP_DATABASE", data);
            let database = fields.u32()?;
            let tablespaces = list(&mut fields, "DROP_DATABASE", 4, Reader::u32)?;
            Ok(Body::DropDatabase {
                database,
                tablespaces,
            })
        }
        _ => Ok(Body::Other),
    }
}

/// `tablespace.h`, `xl_tblspc_create_rec` and `xl_tblspc_drop_rec`.
fn tblspc(info: u8, data: &[u8]) -> Result<Body, BodyError> {
    let mut fields = Reader::new("TABLESPACE", data);
    match info {
        0x00 => {
            let oid = fields.u32()?;
            Ok(Body::CreateTablespace {
                oid,
                path: text(&mut fields, "CREATE_TABLESPACE")?,
            })
        }
        0x10 => Ok(Body::DropTablespace { oid: fields.u32()? }),
        _ => Ok(Body::Other),
    }
}

fn rel_file(fields: &mut Reader<'_>) -> Result<RelFile, TooShort> {
    Ok(RelFile {
        tablespace: fields.u32()?,
        database: fields.u32()?,
        relation: fields.u32()?,
    })
}

/// A signed count, then as many items.
fn list<'a, T>(
    fields: &mut Reader<'a>,
    part: &'static str,
    item_bytes: usize,
    item: impl Fn(&mut Reader<'a>) -> Result<T, TooShort>,
) -> Result<Vec<T>, BodyError> {
    let mut items = Reader::new(part, skip_list(fields, part, item_bytes)?);
    let mut out = Vec::new();
    while !items.rest().is_empty() {
        out.push(item(&mut items)?);
    }
    Ok(out)
}

fn skip_list<'a>(
    fields: &mut Reader<'a>,
    part: &'static str,
    item_bytes: usize,
) -> Result<&'a [u8], BodyError> {
    let offset = fields.offset();
    let count = fields.i32()?;
    let Ok(items) = usize::try_from(count) else {
        return Err(BodyError::Count {
            part,
            offset,
            found: count,
        });
    };
    Ok(fields.take(items.saturating_mul(item_bytes))?)
}

/// The bytes up to the next NUL.
fn text(fields: &mut Reader<'_>, part: &'static str) -> Result<ServerText, BodyError> {
    let offset = fields.offset();
    let Some(length) = fields.rest().iter().position(|byte| *byte == 0) else {
        return Err(BodyError::NoNul { part, offset });
    };
    let text = fields.take(length)?.to_vec();
    fields.take(1)?;
    Ok(ServerText(text))
}

#[cfg(test)]
#[expect(clippy::arithmetic_side_effects, reason = "small numbers of a test")]
mod tests {
    use super::*;
    use crate::record::RecordHeader;

    fn record(rmgr: u8, info: u8, main_data: &[u8]) -> Record {
        let header = RecordHeader {
            total_bytes: 24,
            xid: 9,
            prev: Lsn::ZERO,
            info,
            rmgr,
            crc: 0,
        };
        let at = Lsn::new(1 << 20);
        Record {
            start: at,
            end: at,
            next: at,
            header,
            main_data: main_data.to_vec(),
        }
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// A commit with all that a commit can have, as `major` writes it.
    fn full_commit(major: Major) -> Vec<u8> {
        let statistics = if major >= Major::V18 { 4 } else { 3 };
        let has_statistics = major >= Major::V15;
        let flags = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x80;
        let flags = if has_statistics { flags | 0x100 } else { flags };
        let mut data = vec![5, 0, 0, 0, 0, 0, 0, 0];
        data.extend(words(&[flags, 5, 1663, 2, 10, 11, 1, 1663, 5, 77]));
        if has_statistics {
            data.extend(words(&[2]));
            data.extend(words(&vec![1; 2 * statistics]));
        }
        data.extend(words(&[1, 2, 3, 4, 5, 8]));
        data.extend(b"name\0");
        data.extend([7; 16]);
        data
    }

    /// A layout that is a word off gives another transaction, and a restore that ends elsewhere.
    #[test]
    fn reads_all_parts_of_a_commit_on_every_major() {
        for major in Major::ALL {
            for (info, is_commit) in [(0x80 | 0x30, true), (0x80 | 0x40, false)] {
                let found = record(rmgr::XACT, info, &full_commit(major)).body(major);
                let end = match found {
                    Ok(Body::Commit(end)) if is_commit => end,
                    Ok(Body::Abort(end)) if !is_commit => end,
                    other => panic!("{major}: {other:?}"),
                };
                assert_eq!(
                    (end.xid, end.prepared, end.time),
                    (8, true, PgTime(5)),
                    "{major}"
                );
                assert!(end.gid.unwrap() == "name", "{major}");
                assert_eq!(end.subxacts, [10, 11], "{major}");
                let file = RelFile {
                    tablespace: 1663,
                    database: 5,
                    relation: 77,
                };
                assert_eq!(end.drops, [file], "{major}");
            }
        }
    }

    #[test]
    fn a_commit_that_ends_early_is_refused() {
        let data = full_commit(Major::V18);
        let needed = data.len() - 16;
        for length in 0..needed {
            let found = record(rmgr::XACT, 0x80 | 0x30, &data[..length]).body(Major::V18);
            assert!(found.is_err(), "{length}");
        }
        assert!(
            record(rmgr::XACT, 0x80 | 0x30, &data[..needed])
                .body(Major::V18)
                .is_ok()
        );
    }

    #[test]
    fn a_count_is_never_believed() {
        let mut data = vec![0; 8];
        data.extend(words(&[0x2, u32::MAX]));
        let found = record(rmgr::XACT, 0x80, &data).body(Major::V18);
        assert_eq!(
            found,
            Err(BodyError::Count {
                part: "COMMIT",
                offset: 12,
                found: -1
            })
        );
        data[12..].copy_from_slice(&i32::MAX.to_le_bytes());
        let found = record(rmgr::XACT, 0x80, &data).body(Major::V18);
        assert!(matches!(
            found,
            Err(BodyError::Short(TooShort { found: 0, .. }))
        ));
    }

    /// Dropping a database had the number that making one has since 15.
    #[test]
    fn databases_are_made_and_dropped_by_version() {
        let made = Body::CreateDatabase {
            database: 5,
            tablespace: 1663,
        };
        let dropped = Body::DropDatabase {
            database: 5,
            tablespaces: vec![1663],
        };
        let make = words(&[5, 1663]);
        let drop = words(&[5, 1, 1663]);
        let dbase = |info, data: &[u8], major| record(rmgr::DBASE, info, data).body(major);
        assert_eq!(dbase(0x00, &make, Major::V13), Ok(made.clone()));
        assert_eq!(dbase(0x10, &drop, Major::V14), Ok(dropped.clone()));
        assert_eq!(dbase(0x10, &make, Major::V15), Ok(made.clone()));
        assert_eq!(dbase(0x00, &make, Major::V19), Ok(made));
        assert_eq!(dbase(0x20, &drop, Major::V15), Ok(dropped));
        assert_eq!(dbase(0x20, &drop, Major::V14), Ok(Body::Other));
    }

    #[test]
    fn a_name_that_is_not_utf8_keeps_its_bytes() {
        let mut data = vec![0; 8];
        data.extend([0xE9, b't', 0xE9, 0]);
        data.resize(72, 0);
        let Ok(Body::RestorePoint { name, .. }) = record(rmgr::XLOG, 0x70, &data).body(Major::V16)
        else {
            panic!("no restore point")
        };
        assert_eq!(name.as_bytes(), [0xE9, b't', 0xE9]);
    }
}
