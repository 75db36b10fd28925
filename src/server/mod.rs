//! What Anywhen asks a server besides WAL and base backups: settings, rights, clock, slots.
//!
//! SQL goes over the replication crate's own connection in simple-query form: one stack for TLS
//! and authentication, so that whatever lets the stream in lets SQL in.

use jiff::Timestamp;
use replication::connect::{ConnectError, Purpose, connect};
use replication::connection::{Connection, QueryError, literal};
use replication::conninfo::{ConnectionSettings, Environment};
use replication::server_error::may_pass;
use replication::slots::{SlotError, is_slot_name};
use std::collections::BTreeSet;
use wal::{Lsn, SegmentName, SegmentSize, TimelineId};

use crate::error::{Error, Kind, Result, chain};

/// What a slot may be called.
const SLOT_NAMES: &str = "lower-case letters, digits and underscores, at most 63";
/// The database for SQL where the user names none: every server has it, unless it was dropped.
const DEFAULT_DATABASE: &str = "postgres";
/// `XLOG_BLCKSZ` of every build that is met in practice; headers of pages are counted by it.
const WAL_PAGE_BYTES: u64 = 8192;
const SHORT_PAGE_HEADER_BYTES: u64 = 24;
const LONG_PAGE_HEADER_BYTES: u64 = 40;

/// Reads a conninfo as libpq does, with the environment of this process.
pub fn resolve(conninfo: Option<&str>) -> Result<ConnectionSettings> {
    let settings = ConnectionSettings::resolve(conninfo.unwrap_or(""), &Environment::of_process())
        .map_err(|error| {
            Error::usage(chain(&error)).hint(
                "a connection string is libpq's, such as 'host=db1 user=anywhen sslmode=require' \
                 or postgres://anywhen@db1/?sslmode=require",
            )
        })?;
    Ok(settings.with_default_application_name("anywhen"))
}

/// A connection for ordinary SQL.
pub async fn connect_sql(settings: &ConnectionSettings) -> Result<Connection> {
    let settings = if settings.names_dbname() {
        settings.clone()
    } else {
        settings.clone().with_dbname(DEFAULT_DATABASE)
    };
    connect(&settings, Purpose::Sql)
        .await
        .map_err(|error| connect_error(&error))
}

/// A connection for physical replication.
pub async fn connect_replication(settings: &ConnectionSettings) -> Result<Connection> {
    connect(settings, Purpose::Replication)
        .await
        .map_err(|error| connect_error(&error))
}

fn connect_error(error: &ConnectError) -> Error {
    let kind = if error.is_transient() {
        Kind::Unreachable
    } else {
        Kind::Usage
    };
    let text = error.to_string();
    let (message, hint) = match text.split_once("\nhint: ") {
        Some((message, hint)) => (message, Some(hint)),
        None => (text.as_str(), None),
    };
    let failure = Error::new(kind, message);
    let too_many = error
        .server_error()
        .is_some_and(|said| said.sqlstate == "53300");
    match hint {
        Some(hint) => failure.hint(hint),
        None if too_many => failure.hint(
            "every connection or walsender is taken: raise max_wal_senders (or max_connections) \
             and restart the server, or end one that is not needed (pg_stat_replication)",
        ),
        None if kind == Kind::Unreachable => {
            failure.hint("is the server running there, and does it listen for this connection?")
        }
        None => failure,
    }
}

/// Whether a connection was refused because the server shuts down, or is not up yet: by the code that
/// our message carries.
pub fn is_shutting_down(error: &Error) -> bool {
    error.message().contains("SQLSTATE 57P03")
}

/// A failed command, for people.
pub fn query_error(doing: &str, error: &QueryError) -> Error {
    let message = format!("cannot {doing}: {}", chain(error));
    let failure = match error.sqlstate() {
        Some("42501") => Error::usage(message).hint(
            "the role lacks a right; as a superuser: ALTER ROLE <role> REPLICATION; \
             GRANT pg_monitor TO <role>;",
        ),
        Some("53400") => Error::usage(message)
            .hint("raise max_replication_slots or max_wal_senders, or drop a slot that is unused"),
        _ if error.is_transient() => Error::new(Kind::Unreachable, message),
        _ => Error::failure(message),
    };
    match error.sqlstate() {
        Some(sqlstate) if may_pass(sqlstate) => failure.passing(),
        _ => failure,
    }
}

/// Refuses what no server takes for a slot's name.
pub fn check_slot_name(name: &str) -> Result<()> {
    if is_slot_name(name) {
        return Ok(());
    }
    let message = format!("not the name of a replication slot: {name:?}");
    Err(Error::usage(message).hint(SLOT_NAMES))
}

/// A failed command on a slot, for people.
pub fn slot_error(doing: &str, error: &SlotError) -> Error {
    let message = || format!("cannot {doing}: {}", chain(error));
    match error {
        SlotError::Query(inner) if lacks_slots(inner) => Error::usage(message())
            .hint(
                "raise max_replication_slots and restart the server, or drop a slot that is unused \
                 (pg_replication_slots); without a slot: --no-slot, but then the server may remove WAL \
                 before it was received",
            )
            .passing(),
        SlotError::Query(inner) if inner.sqlstate().is_some_and(slot_has_changed) => {
            query_error(doing, inner).passing()
        }
        SlotError::Query(inner) => query_error(doing, inner),
        // somebody else did something to it at the same time
        SlotError::NotUnreserved { .. } => Error::failure(message()).passing(),
        SlotError::Dropped { reason, .. } if query_error(doing, reason).may_pass() => {
            Error::failure(message()).passing()
        }
        SlotError::Dropped { .. } => Error::failure(message()),
        SlotError::InvalidName { .. } => Error::usage(message()).hint(SLOT_NAMES),
    }
}

/// Whether a slot cannot be made since the server has no place for another one: by the setting that
/// its message names in every language (slot.c, `CheckSlotRequirements`, `ReplicationSlotCreate`).
fn lacks_slots(error: &QueryError) -> bool {
    let said = matches!(error.sqlstate(), Some("55000" | "53400"));
    said && (error.sqlstate() == Some("53400") || chain(error).contains("max_replication_slots"))
}

/// Whether this SQLSTATE says that a slot has come, gone, been taken or given up since it was looked
/// at: the next look tells.
pub fn slot_has_changed(sqlstate: &str) -> bool {
    // duplicate_object, undefined_object, object_not_in_prerequisite_state, object_in_use
    matches!(sqlstate, "42710" | "42704" | "55000" | "55006")
}

/// What is read from a server at first contact; nothing of it is assumed.
#[derive(Debug, Clone)]
pub struct ServerFacts {
    /// The system identifier.
    pub system_id: u64,
    /// The timeline that the server writes, or replays, now.
    pub timeline: TimelineId,
    /// The end of its flushed WAL.
    pub flushed: Lsn,
    /// Its version, as it calls itself.
    pub version: String,
    /// Its major version.
    pub major: u32,
    /// Its WAL segment size.
    pub segment_size: SegmentSize,
    /// Its block size in bytes.
    pub block_bytes: u32,
    /// `wal_level`.
    pub wal_level: String,
    /// `wal_sender_timeout` in milliseconds; 0 is none.
    pub wal_sender_timeout_ms: u64,
    /// `max_slot_wal_keep_size`, as shown; `-1` is without limit.
    pub max_slot_wal_keep_size: String,
}

impl ServerFacts {
    /// Reads the facts over a replication connection.
    pub async fn read(connection: &mut Connection) -> Result<Self> {
        let failed = |error: QueryError| query_error("read the server's settings", &error);
        let identity = connection.identify_system().await.map_err(failed)?;
        let block_size = connection.show("block_size").await.map_err(failed)?;
        let timeout = connection
            .show("wal_sender_timeout")
            .await
            .map_err(failed)?;
        Ok(Self {
            system_id: identity.system_id,
            timeline: identity.timeline,
            flushed: identity.xlogpos,
            version: connection
                .parameter("server_version")
                .unwrap_or("unknown")
                .to_owned(),
            major: connection.server_version_num() / 10_000,
            segment_size: connection.wal_segment_size().await.map_err(failed)?,
            block_bytes: block_size.parse().map_err(|_not_a_number| {
                Error::failure(format!("block_size is not a number: found {block_size:?}"))
            })?,
            wal_level: connection.show("wal_level").await.map_err(failed)?,
            wal_sender_timeout_ms: parse_milliseconds(&timeout).ok_or_else(|| {
                Error::failure(format!(
                    "wal_sender_timeout is not a time: found {timeout:?}"
                ))
            })?,
            max_slot_wal_keep_size: connection
                .show("max_slot_wal_keep_size")
                .await
                .map_err(failed)?,
        })
    }

    /// Refuses servers that cannot be archived.
    pub fn check(&self) -> Result<()> {
        if self.major < 13 {
            return Err(Error::usage(format!(
                "PostgreSQL 13 or newer is needed: found {}",
                self.version
            )));
        }
        if self.wal_level == "minimal" {
            return Err(Error::usage("the server writes too little WAL: wal_level=minimal").hint(
                "ALTER SYSTEM SET wal_level = 'replica'; ALTER SYSTEM SET max_wal_senders = 10; \
                 then restart the server and take a backup",
            ));
        }
        Ok(())
    }
}

/// A time setting as `SHOW` prints it: `1min`, `60s`, `500ms`, `0`.
fn parse_milliseconds(shown: &str) -> Option<u64> {
    let digits = shown
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(shown.len());
    let (number, unit) = shown.split_at(digits);
    let factor = match unit {
        "" | "ms" => 1,
        "s" => 1_000,
        "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

/// A moment of the server's clock, and a position that every commit stamped before it precedes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// The clock, read before the position.
    pub time: Timestamp,
    /// The end of WAL, read after the clock. `None` on a standby, whose clock says nothing about
    /// the primary's commits.
    pub lsn: Option<Lsn>,
}

/// Reads the server's clock, and then the end of its WAL.
pub async fn read_moment(sql: &mut Connection) -> Result<Moment, QueryError> {
    // the clock's row is made before the position is asked for: two statements, in this order
    let time = sql.query_value(
        "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
    );
    let time = time.await?.unwrap_or_default();
    let bad = |what, found: &str| QueryError::BadValue {
        what,
        found: found.to_owned(),
    };
    let time: Timestamp = time
        .parse()
        .ok()
        .ok_or_else(|| bad("the server's clock", &time))?;
    let position = sql.query_value(
        "SELECT CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_insert_lsn() END",
    );
    let lsn = match position.await? {
        None => None,
        Some(text) => Some(
            text.parse::<Lsn>()
                .ok()
                .ok_or_else(|| bad("a WAL position", &text))?,
        ),
    };
    Ok(Moment { time, lsn })
}

/// Reads the same where the server may be a standby: there, when the last commit was stamped that it
/// has replayed, and then up to where it has. `lsn` is `None` where it has replayed none.
pub async fn read_moment_anywhere(sql: &mut Connection) -> Result<Moment, QueryError> {
    let moment = read_moment(sql).await?;
    if moment.lsn.is_some() {
        return Ok(moment);
    }
    let Some(time) = last_replayed_commit(sql).await? else {
        return Ok(moment);
    };
    let lsn = replayed_lsn(sql).await?;
    Ok(Moment { time, lsn })
}

/// Stands for a column that the server does not show us.
const HIDDEN: &str = "hidden";

/// How a server stands to a stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// `sync_state` in `pg_stat_replication`; `None` where the server does not have the stream any
    /// more.
    pub sync_state: Option<SyncState>,
    /// `wal_status` of the slot in `pg_replication_slots`.
    pub slot_state: Option<String>,
    /// WAL that the server keeps for the slot, in bytes.
    pub retained_bytes: Option<u64>,
    /// Whether commits ask for more than an archiver can give, unless they say otherwise.
    pub remote_apply: bool,
}

/// `sync_state` in `pg_stat_replication` (`pg_stat_get_wal_senders` in walsender.c).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncState {
    /// No commit waits for the stream.
    Async,
    /// None does now, and the server may change its mind without a word: another standby has to go,
    /// or this stream to report for the first time.
    Potential,
    /// Commits may wait for it: `sync` and `quorum`.
    Sync,
    /// The server does not tell us: that takes `pg_monitor`.
    Hidden,
}

impl SyncState {
    fn of(word: &str) -> Self {
        match word {
            "async" => Self::Async,
            "sync" | "quorum" => Self::Sync,
            HIDDEN => Self::Hidden,
            // `async` of a stream that has not reported anything yet says nothing, and what a later server
            // may say is not taken for harmless
            _ => Self::Potential,
        }
    }
}

impl Standing {
    /// Whether a commit may be waiting for the stream now.
    pub fn waits_for_us(&self) -> bool {
        self.sync_state == Some(SyncState::Sync)
    }

    /// Whether it is certain that none is, and that none will be before somebody changes the settings.
    pub fn is_asynchronous(&self) -> bool {
        self.sync_state == Some(SyncState::Async)
    }
}

/// Asks how the server stands to the stream that its process `pid` serves, from `slot`.
pub async fn read_standing(
    sql: &mut Connection,
    pid: Option<u32>,
    slot: Option<&str>,
) -> Result<Standing, QueryError> {
    let pid = pid.map_or_else(|| "NULL".to_owned(), |pid| pid.to_string());
    let slot = slot.map_or_else(|| "NULL".to_owned(), literal);
    let query = format!(
        "SELECT (SELECT CASE WHEN sync_state = 'async' AND flush_lsn IS NULL THEN 'unknown' \
         ELSE coalesce(sync_state, '{HIDDEN}') END FROM pg_catalog.pg_stat_replication WHERE pid = {pid}), s.wal_status, \
         pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() \
         ELSE pg_current_wal_lsn() END, s.restart_lsn)::bigint, current_setting('synchronous_commit') \
         FROM (SELECT 1) AS one LEFT JOIN pg_catalog.pg_replication_slots AS s ON s.slot_name = {slot}"
    );
    let mut result = sql.query(&query).await?;
    let row = result.rows.pop().unwrap_or_default();
    let Ok([sync_state, slot_state, retained, synchronous_commit]) =
        <[Option<String>; 4]>::try_from(row)
    else {
        let (place, missing) = ("a query of pg_stat_replication", "a column");
        return Err(QueryError::Incomplete { place, missing });
    };
    Ok(Standing {
        sync_state: sync_state.as_deref().map(SyncState::of),
        slot_state,
        // a standby may have received less than the slot says
        retained_bytes: retained.map(|bytes| bytes.parse().unwrap_or(0)),
        remote_apply: synchronous_commit.as_deref() == Some("remote_apply"),
    })
}

/// Whether the server is a standby, or otherwise still replays WAL.
pub async fn is_in_recovery(sql: &mut Connection) -> Result<bool, QueryError> {
    let found = sql.query_value("SELECT pg_is_in_recovery()").await?;
    Ok(found.as_deref() == Some("t"))
}

/// The oldest segment of each timeline that the server still has, where it lets us look
/// (`pg_monitor`).
pub async fn oldest_segments(sql: &mut Connection) -> Vec<SegmentName> {
    let query = "SELECT min(name) FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$' \
                 GROUP BY left(name, 8)";
    let rows = sql.query(query).await.map(|result| result.rows);
    let names = rows.unwrap_or_default().into_iter().flatten().flatten();
    names.filter_map(|name| name.parse().ok()).collect()
}

/// The transactions in progress that have an identifier, prepared ones too (procarray.c).
pub async fn transactions_in_progress(sql: &mut Connection) -> Result<BTreeSet<u64>, QueryError> {
    let query = "SELECT pg_snapshot_xip(pg_current_snapshot())";
    let rows = sql.query(query).await?.rows;
    let shown = rows.into_iter().flatten().flatten();
    let xids = shown.map(|xid| {
        let what = "a transaction identifier";
        xid.parse()
            .ok()
            .ok_or(QueryError::BadValue { what, found: xid })
    });
    xids.collect()
}

/// How much WAL the server keeps from `restart` on, in bytes.
pub async fn kept_bytes(sql: &mut Connection, restart: Lsn) -> Result<u64, QueryError> {
    let text = sql
        .query_value(&format!(
            "SELECT pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN \
             pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END, '{restart}')::bigint"
        ))
        .await?
        .unwrap_or_default();
    let what = "a number of bytes";
    text.parse()
        .ok()
        .ok_or(QueryError::BadValue { what, found: text })
}

/// When the last commit that a standby has replayed was stamped; `None` before the first.
pub async fn last_replayed_commit(sql: &mut Connection) -> Result<Option<Timestamp>, QueryError> {
    let text = sql
        .query_value(
            "SELECT to_char(pg_last_xact_replay_timestamp() AT TIME ZONE 'UTC', \
             'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
        )
        .await?;
    let Some(text) = text else { return Ok(None) };
    let what = "the time of a commit";
    let time = text.parse().ok().ok_or_else(|| QueryError::BadValue {
        what,
        found: text.clone(),
    });
    time.map(Some)
}

/// Up to where a standby has replayed; `None` where nothing was ever replayed.
pub async fn replayed_lsn(sql: &mut Connection) -> Result<Option<Lsn>, QueryError> {
    let text = sql.query_value("SELECT pg_last_wal_replay_lsn()").await?;
    let Some(text) = text else { return Ok(None) };
    let what = "a WAL position";
    let lsn = text.parse().ok().ok_or_else(|| QueryError::BadValue {
        what,
        found: text.clone(),
    });
    lsn.map(Some)
}

/// The end of WAL that an insert position stands for: just behind a page's header nothing is
/// written yet, and an idle server never flushes that header.
pub fn without_page_header(insert_lsn: Lsn, size: SegmentSize) -> Lsn {
    let in_page = insert_lsn.as_u64() % WAL_PAGE_BYTES;
    let in_segment = size.offset_of(insert_lsn);
    let header = if in_segment == LONG_PAGE_HEADER_BYTES {
        LONG_PAGE_HEADER_BYTES
    } else if in_page == SHORT_PAGE_HEADER_BYTES {
        SHORT_PAGE_HEADER_BYTES
    } else {
        0
    };
    Lsn::new(insert_lsn.as_u64() - header)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection would be made for an error that can be known before.
    #[test]
    fn what_no_server_takes_for_a_slot_is_refused_with_what_one_does() {
        check_slot_name("good_slot_1").unwrap();
        for name in ["Bad-Slot", "", &"x".repeat(64)] {
            let error = check_slot_name(name).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage);
            assert!(
                error
                    .hint_text()
                    .is_some_and(|hint| hint.contains("lower-case"))
            );
        }
    }

    #[test]
    fn an_idle_insert_position_behind_a_page_header_counts_as_the_page_start() {
        // without this the tip of an idle server would stand still after every segment switch
        let size = SegmentSize::from_bytes(16 << 20).unwrap();
        let lsn = |value| without_page_header(Lsn::new(value), size);
        assert_eq!(lsn(0x300_0028), Lsn::new(0x300_0000));
        assert_eq!(lsn(0x300_2018), Lsn::new(0x300_2000));
        assert_eq!(lsn(0x300_2028), Lsn::new(0x300_2028));
        assert_eq!(lsn(0x300_0160), Lsn::new(0x300_0160));
    }

    #[test]
    fn reads_times_as_show_prints_them() {
        assert_eq!(parse_milliseconds("1min"), Some(60_000));
        assert_eq!(parse_milliseconds("0"), Some(0));
        assert_eq!(parse_milliseconds("2500ms"), Some(2_500));
        assert_eq!(parse_milliseconds("soon"), None);
    }
}
