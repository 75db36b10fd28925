//! Physical replication slots: what makes a server keep WAL until it was received.

use wal::{Lsn, TimelineId};

use crate::commands::parsed;
use crate::connection::{Connection, QueryError, literal};

/// The server version from which replication commands take their options in parentheses, and
/// `READ_REPLICATION_SLOT` exists.
const PARENTHESISED_OPTIONS: u32 = 150_000;

/// The server version from which `pg_replication_slots` has `invalidation_reason`.
const INVALIDATION_REASON: u32 = 170_000;

/// A slot, as far as streaming from it is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SlotState {
    /// There is none of that name.
    Absent,
    /// A logical slot has the name.
    NotPhysical,
    /// It never reserved WAL, as after `pg_receivewal --create-slot`: the server keeps nothing
    /// for it. See [`reserve_slot`].
    Unreserved,
    /// It keeps WAL and nobody uses it.
    Ready {
        /// From here on the server keeps WAL.
        restart: Lsn,
        /// The timeline of `restart`, where the server says it (`READ_REPLICATION_SLOT`).
        timeline: Option<TimelineId>,
        /// How much more WAL can be written before the slot may be lost, in bytes; `None` where
        /// nothing limits it (`max_slot_wal_keep_size = -1`) or the server did not say.
        safe_wal_bytes: Option<i64>,
    },
    /// A walsender uses it.
    Active {
        /// That walsender's process.
        pid: u32,
        /// From here on the server keeps WAL; `None` until something was reserved.
        restart: Option<Lsn>,
    },
    /// The server gave up keeping WAL for it; it can only be dropped.
    Lost {
        /// The server's word for the reason.
        why: String,
    },
}

/// Why nothing could be done with a slot.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Not what PostgreSQL accepts as a slot's name.
    #[error(
        "not a name for a replication slot (1 to 63 of a-z, 0-9 and underscore): name={name:?}"
    )]
    InvalidName {
        /// The name.
        name: String,
    },
    /// The slot is not one without a reserved position, so it is left alone.
    #[error("the slot is not one without a reserved position: name={name}, state={state:?}")]
    NotUnreserved {
        /// The slot.
        name: String,
        /// What it is.
        state: SlotState,
    },
    /// The slot without a reserved position was dropped, and could not be created again.
    #[error(
        "the slot was dropped to create it anew, and creating it failed: name={name}: {reason}"
    )]
    Dropped {
        /// The slot.
        name: String,
        /// Why it could not be created.
        #[source]
        reason: QueryError,
    },
    /// The command failed.
    #[error(transparent)]
    Query(#[from] QueryError),
}

impl SlotError {
    /// Whether the same may succeed on a new connection with nothing changed.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Query(error) | Self::Dropped { reason: error, .. } => error.is_transient(),
            Self::InvalidName { .. } | Self::NotUnreserved { .. } => false,
        }
    }
}

/// The state of slot `name`, over a connection that takes SQL.
///
/// # Errors
/// [`SlotError`]
pub async fn read_slot(sql: &mut Connection, name: &str) -> Result<SlotState, SlotError> {
    checked_name(name)?;
    let reason = match sql.server_version_num() {
        INVALIDATION_REASON.. => "invalidation_reason",
        _ => "NULL AS invalidation_reason",
    };
    let query = format!(
        "SELECT slot_type, active_pid, restart_lsn, wal_status, safe_wal_size, {reason} \
         FROM pg_catalog.pg_replication_slots WHERE slot_name = {}",
        literal(name)
    );
    let mut result = sql.query(&query).await?;
    let Some(row) = result.rows.pop() else {
        return Ok(SlotState::Absent);
    };
    let Ok([slot_type, active_pid, restart, wal_status, safe_wal, reason]) =
        <[Option<String>; 6]>::try_from(row)
    else {
        let (place, missing) = ("a query of pg_replication_slots", "a column");
        return Err(QueryError::Incomplete { place, missing }.into());
    };
    if slot_type.as_deref() != Some("physical") {
        return Ok(SlotState::NotPhysical);
    }
    let restart = restart
        .map(|lsn| parsed("a WAL position", Some(&lsn)))
        .transpose()?;
    if wal_status.as_deref() == Some("lost") {
        let why = reason.unwrap_or_else(|| "its WAL was removed".to_owned());
        return Ok(SlotState::Lost { why });
    }
    if let Some(pid) = active_pid {
        return Ok(SlotState::Active {
            pid: parsed("a process id", Some(&pid))?,
            restart,
        });
    }
    let Some(restart) = restart else {
        return Ok(SlotState::Unreserved);
    };
    let safe_wal_bytes = safe_wal
        .map(|size| parsed("a size", Some(&size)))
        .transpose()?;
    Ok(SlotState::Ready {
        restart,
        timeline: None,
        safe_wal_bytes,
    })
}

/// Makes slot `name`, which has no reserved position, keep WAL from the last checkpoint's redo
/// position on, over a connection that takes SQL.
///
/// The slot is dropped and created: a status update would reserve too, but only from what was
/// received by then, and until then WAL can go. Since it keeps nothing, nothing is lost by that.
///
/// # Errors
/// [`SlotError::NotUnreserved`] for any other slot, which is left as it was.
pub async fn reserve_slot(sql: &mut Connection, name: &str) -> Result<Lsn, SlotError> {
    let state = read_slot(sql, name).await?;
    if state != SlotState::Unreserved {
        return Err(SlotError::NotUnreserved {
            name: name.to_owned(),
            state,
        });
    }
    // If another client takes or reserves it just now, the condition or the drop itself fails.
    let quoted = literal(name);
    let dropped = sql
        .query(&format!(
            "SELECT pg_catalog.pg_drop_replication_slot(slot_name) \
             FROM pg_catalog.pg_replication_slots \
             WHERE slot_name = {quoted} AND slot_type = 'physical' \
             AND restart_lsn IS NULL AND NOT active"
        ))
        .await?;
    if dropped.rows.is_empty() {
        let state = read_slot(sql, name).await?;
        return Err(SlotError::NotUnreserved {
            name: name.to_owned(),
            state,
        });
    }
    let failed = |reason| SlotError::Dropped {
        name: name.to_owned(),
        reason,
    };
    let create =
        format!("SELECT lsn FROM pg_catalog.pg_create_physical_replication_slot({quoted}, true)");
    let restart = sql.query_value(&create).await.map_err(failed)?;
    parsed("a WAL position", restart.as_deref()).map_err(failed)
}

impl Connection {
    /// `CREATE_REPLICATION_SLOT … PHYSICAL`, over a replication connection. A temporary slot goes
    /// with the connection. With `reserve_wal` the server keeps WAL from now on; without, from
    /// the first status update on.
    ///
    /// # Errors
    /// [`SlotError`]; SQLSTATE 42710 where a slot of the name exists, 53400 where
    /// `max_replication_slots` are used up.
    pub async fn create_physical_slot(
        &mut self,
        name: &str,
        temporary: bool,
        reserve_wal: bool,
    ) -> Result<(), SlotError> {
        let name = checked_name(name)?;
        let temporary = if temporary { " TEMPORARY" } else { "" };
        let reserve = match (reserve_wal, self.server_version_num()) {
            (false, _) => "",
            (true, PARENTHESISED_OPTIONS..) => " (RESERVE_WAL)",
            (true, _) => " RESERVE_WAL",
        };
        let command = format!("CREATE_REPLICATION_SLOT \"{name}\"{temporary} PHYSICAL{reserve}");
        Ok(self.execute(&command).await?)
    }

    /// `DROP_REPLICATION_SLOT`, over a replication connection.
    ///
    /// # Errors
    /// [`SlotError`]; SQLSTATE 42704 where there is none, 55006 where it is in use.
    pub async fn drop_slot(&mut self, name: &str) -> Result<(), SlotError> {
        let name = checked_name(name)?;
        Ok(self
            .execute(&format!("DROP_REPLICATION_SLOT \"{name}\""))
            .await?)
    }

    /// `READ_REPLICATION_SLOT`, over a replication connection to a server of 15 or newer; `None`
    /// for an older one, which only [`read_slot`] can ask.
    ///
    /// Knows less than [`read_slot`]: a lost slot can look ready or unreserved, an active one
    /// like any other.
    ///
    /// # Errors
    /// [`SlotError`]
    pub async fn read_slot_by_command(
        &mut self,
        name: &str,
    ) -> Result<Option<SlotState>, SlotError> {
        let name = checked_name(name)?;
        if self.server_version_num() < PARENTHESISED_OPTIONS {
            return Ok(None);
        }
        let row = match self
            .query_row(&format!("READ_REPLICATION_SLOT \"{name}\""))
            .await
        {
            // feature_not_supported: "with a logical replication slot"
            Err(QueryError::Server(error)) if error.sqlstate == "0A000" => {
                return Ok(Some(SlotState::NotPhysical));
            }
            row => row?,
        };
        if row.get("slot_type").is_none() {
            return Ok(Some(SlotState::Absent));
        }
        let Some(restart) = row.get("restart_lsn") else {
            return Ok(Some(SlotState::Unreserved));
        };
        let timeline = row.get("restart_tli");
        Ok(Some(SlotState::Ready {
            restart: parsed("a WAL position", Some(restart))?,
            timeline: timeline
                .map(|id| parsed("a timeline", Some(id)))
                .transpose()?,
            safe_wal_bytes: None,
        }))
    }
}

/// Whether PostgreSQL accepts this as a slot's name: slot.c, `ReplicationSlotValidateName`.
pub fn is_slot_name(name: &str) -> bool {
    let is_legal = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    (1..=63).contains(&name.len()) && name.bytes().all(is_legal)
}

/// `name`, if it is one that slot.c, `ReplicationSlotValidateName`, takes; then it needs no
/// escaping inside quotes.
pub(crate) fn checked_name(name: &str) -> Result<&str, SlotError> {
    if is_slot_name(name) {
        Ok(name)
    } else {
        Err(SlotError::InvalidName {
            name: name.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::checked_name;

    #[test]
    fn refuses_a_slot_name_that_would_end_its_quotes() {
        for name in ["", "a\"; DROP", "Main", "a-b", "ä", &"x".repeat(64)] {
            checked_name(name).unwrap_err();
        }
        checked_name("anywhen_main").unwrap();
        checked_name(&"x".repeat(63)).unwrap();
    }
}
