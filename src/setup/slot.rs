//! The replication slot, shown and dropped.

use std::fmt;

use replication::slots::{SlotError, SlotState, read_slot};
use serde::Serialize;
use wal::Lsn;

use crate::error::{Error, Result};
use crate::server;

/// A slot as `slot show` tells it.
#[derive(Debug, Serialize)]
pub struct SlotReport {
    /// The version of this document's form.
    pub schema: u32,
    /// The slot's name.
    pub slot: String,
    /// `absent`, `logical`, `unreserved`, `ready`, `active` or `lost`.
    pub state: &'static str,
    /// From here on the server keeps WAL.
    pub restart_lsn: Option<Lsn>,
    /// How much that is, in bytes.
    pub kept_bytes: Option<u64>,
    /// Why it is lost, or whose it is.
    pub why: Option<String>,
}

impl fmt::Display for SlotReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}: {}", self.slot, self.state)?;
        if let Some(restart) = self.restart_lsn {
            write!(f, ", the server keeps WAL from {restart} on")?;
        }
        if let Some(kept) = self.kept_bytes {
            write!(f, " ({})", indicatif::HumanBytes(kept))?;
        }
        if let Some(why) = &self.why {
            write!(f, ": {why}")?;
        }
        if self.state == "lost" {
            f.write_str(
                "\nhint: `anywhen stream` makes it anew by itself, unless it is --strict: then \
                 `anywhen slot drop` first; `anywhen status` shows whether WAL is missing, and a \
                 backup is needed",
            )?;
        }
        Ok(())
    }
}

/// Reads the state of a slot.
pub async fn show(conninfo: Option<&str>, slot: &str) -> Result<SlotReport> {
    server::check_slot_name(slot)?;
    let mut sql = server::connect_sql(&server::resolve(conninfo)?).await?;
    let state = read_slot(&mut sql, slot)
        .await
        .map_err(|error| server::slot_error("read the slot", &error))?;
    let (word, restart_lsn, why) = match state {
        SlotState::Absent => ("absent", None, None),
        SlotState::NotPhysical => ("logical", None, None),
        SlotState::Unreserved => ("unreserved", None, None),
        SlotState::Ready { restart, .. } => ("ready", Some(restart), None),
        SlotState::Active { restart, pid } => {
            ("active", restart, Some(format!("used by process {pid}")))
        }
        SlotState::Lost { why } => ("lost", None, Some(why)),
    };
    let kept_bytes = match restart_lsn {
        Some(restart) => server::kept_bytes(&mut sql, restart).await.ok(),
        None => None,
    };
    Ok(SlotReport {
        schema: 1,
        slot: slot.to_owned(),
        state: word,
        restart_lsn,
        kept_bytes,
        why,
    })
}

/// Drops a slot; the server keeps WAL for it no longer.
pub async fn drop(conninfo: Option<&str>, slot: &str) -> Result<()> {
    server::check_slot_name(slot)?;
    let mut replication = server::connect_replication(&server::resolve(conninfo)?).await?;
    match replication.drop_slot(slot).await {
        Ok(()) => Ok(()),
        Err(SlotError::Query(error)) if error.sqlstate() == Some("42704") => {
            Err(Error::not_found(format!("there is no slot {slot}"))
                .hint("name another with --slot; pg_replication_slots lists them"))
        }
        Err(SlotError::Query(error)) if error.sqlstate() == Some("55006") => {
            Err(Error::failure(format!("slot {slot} is in use")).hint("stop the stream first"))
        }
        Err(error) => Err(server::slot_error("drop the slot", &error)),
    }
}
