//! What a server knows of its WAL besides the WAL itself: the summaries that `summarize_wal` makes, one from each
//! redo position to the next (`postmaster/walsummarizer.c`), which name the blocks that changed.

use std::collections::BTreeSet;

use basebackup::{BlockLayout, Fork, RelationFile, RelativePath};
use replication::connection::{Connection, QueryError};
use wal::Lsn;

/// `DEFAULTTABLESPACE_OID` and `GLOBALTABLESPACE_OID` (`pg_tablespace.dat`).
const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;

/// One segment of a relation's main fork.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RelationSegment {
    tablespace: u32,
    database: u32,
    relation: u32,
    segment: u32,
}

impl RelationSegment {
    /// What a file below the data directory holds; `None` where that is no segment of a main fork.
    pub(super) fn of(path: &RelativePath) -> Option<Self> {
        let file = RelationFile::of(path).filter(|file| file.fork == Fork::Main)?;
        let text = std::str::from_utf8(path.as_bytes()).ok()?;
        let parts: Vec<&str> = text.split('/').collect();
        let (tablespace, database, name) = match parts[..] {
            ["global", name] => (GLOBAL_TABLESPACE, 0, name),
            ["base", database, name] => (DEFAULT_TABLESPACE, database.parse().ok()?, name),
            ["pg_tblspc", tablespace, _version, database, name] => {
                (tablespace.parse().ok()?, database.parse().ok()?, name)
            }
            _ => return None,
        };
        let relation = name.split('.').next()?.parse().ok()?;
        Some(Self {
            tablespace,
            database,
            relation,
            segment: file.segment,
        })
    }
}

/// Whether the server summarizes its WAL. Only of 17 and later.
pub(super) async fn are_made(sql: &mut Connection) -> Result<bool, QueryError> {
    let setting = sql.query_value("SHOW summarize_wal").await?;
    Ok(setting.as_deref() == Some("on"))
}

/// The segments that were cut somewhere within, by WAL from `since` on, up to `until` where that is given.
///
/// Of such a segment an increment says too little: it may have grown again by blocks that nothing was
/// written to, which are no change in WAL, and the server leaves to the earlier backup what that has in their
/// place (`backup/basebackup_incremental.c`, `GetFileBackupMethod`, makes the file's length the limit up to
/// which it does). Rows that were deleted would be back: `docs/backups.md` tells how to see it.
pub(super) async fn cut_segments(
    sql: &mut Connection,
    since: Lsn,
    until: Option<Lsn>,
    layout: BlockLayout,
) -> Result<BTreeSet<RelationSegment>, QueryError> {
    let until = until.map(|until| format!(" AND s.start_lsn < '{until}'"));
    let query = format!(
        "SELECT DISTINCT c.reltablespace, c.reldatabase, c.relfilenode, c.relblocknumber / {} \
         FROM pg_catalog.pg_available_wal_summaries() s, \
         LATERAL pg_catalog.pg_wal_summary_contents(s.tli, s.start_lsn, s.end_lsn) c \
         WHERE s.end_lsn > '{since}'{} AND c.is_limit_block AND c.relblocknumber > 0 \
         AND c.relforknumber = 0",
        layout.segment_blocks(),
        until.unwrap_or_default()
    );
    let rows = sql.query(&query).await?.rows;
    let segments = rows.into_iter().map(|row| {
        let numbers: Option<Vec<u32>> = row.iter().map(|it| it.as_deref()?.parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[tablespace, database, relation, segment]) => Ok(RelationSegment {
                tablespace,
                database,
                relation,
                segment,
            }),
            _ => Err(QueryError::BadValue {
                what: "a relation",
                found: format!("{row:?}"),
            }),
        }
    });
    segments.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_told_by_their_paths() {
        let of = |path: &str| {
            RelationSegment::of(&RelativePath::parse(path.as_bytes()).unwrap())
                .map(|it| (it.tablespace, it.database, it.relation, it.segment))
        };
        assert_eq!(of("base/5/16384"), Some((1663, 5, 16384, 0)));
        assert_eq!(of("base/5/16384.2"), Some((1663, 5, 16384, 2)));
        assert_eq!(of("global/1262"), Some((1664, 0, 1262, 0)));
        let elsewhere = "pg_tblspc/16400/PG_18_202506291/5/16401.1";
        assert_eq!(of(elsewhere), Some((16400, 5, 16401, 1)));
        for other in [
            "base/5/16384_vm",
            "base/5/16384_fsm",
            "base/5/PG_VERSION",
            "pg_xact/0000",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
