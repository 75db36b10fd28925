//! The short commands of a replication connection (`repl_gram.y`): who the server is, its settings,
//! and the history of a timeline.

use bytes::Bytes;
use wal::{Lsn, SegmentSize, TimelineId};

use crate::connection::{Connection, QueryError, row_bytes};

/// What `IDENTIFY_SYSTEM` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemIdentity {
    /// The system identifier, made by initdb.
    pub system_id: u64,
    /// The timeline the server is on; for a standby the one it is replaying.
    pub timeline: TimelineId,
    /// End of flushed WAL; for a standby the end of what it has replayed or received.
    pub xlogpos: Lsn,
    /// The database, on a connection that has one.
    pub dbname: Option<String>,
}

/// A timeline history file as the server has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryFile {
    /// `XXXXXXXX.history`, of the timeline that was asked for.
    pub file_name: String,
    /// The file's bytes.
    pub content: Bytes,
}

impl Connection {
    /// `IDENTIFY_SYSTEM`.
    ///
    /// # Errors
    /// [`QueryError`]
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, QueryError> {
        let row = self.query_row("IDENTIFY_SYSTEM").await?;
        Ok(SystemIdentity {
            system_id: parsed("the system identifier", row.get("systemid"))?,
            timeline: parsed("a timeline", row.get("timeline"))?,
            xlogpos: parsed("a WAL position", row.get("xlogpos"))?,
            dbname: row.get("dbname").map(str::to_owned),
        })
    }

    /// `SHOW name`, on either kind of connection.
    ///
    /// # Errors
    /// [`QueryError`]; [`QueryError::BadValue`] if `name` is no name of a setting.
    pub async fn show(&mut self, name: &str) -> Result<String, QueryError> {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        if name.is_empty() || !name.chars().all(is_name) {
            return Err(bad_value("the name of a setting", Some(name)));
        }
        let value = self.query_value(&format!("SHOW {name}")).await?;
        value.ok_or_else(|| bad_value("a setting", None))
    }

    /// The server's `wal_segment_size`.
    ///
    /// # Errors
    /// [`QueryError`]
    pub async fn wal_segment_size(&mut self) -> Result<SegmentSize, QueryError> {
        let shown = self.show("wal_segment_size").await?;
        size_with_unit(&shown)
            .and_then(|bytes| SegmentSize::from_bytes(bytes).ok())
            .ok_or_else(|| bad_value("a WAL segment size", Some(&shown)))
    }

    /// `TIMELINE_HISTORY`: the history of `timeline`, or `None` where the server has no file of
    /// it, as for a cluster's first timeline.
    ///
    /// # Errors
    /// [`QueryError`]
    pub async fn timeline_history(
        &mut self,
        timeline: TimelineId,
    ) -> Result<Option<HistoryFile>, QueryError> {
        let command = format!("TIMELINE_HISTORY {timeline}");
        // 58P01 undefined_file; it comes after the row description.
        let mut results = match self.run(&command, row_bytes).await {
            Err(QueryError::Server(error)) if error.sqlstate == "58P01" => return Ok(None),
            results => results?,
        };
        let row = results
            .pop()
            .and_then(|mut result| result.rows.pop())
            .unwrap_or_default();
        let Ok([Some(name), Some(content)]) = <[Option<Bytes>; 2]>::try_from(row) else {
            let (place, missing) = ("TIMELINE_HISTORY", "the file");
            return Err(QueryError::Incomplete { place, missing });
        };
        let file_name = format!("{}.history", timeline.hex8());
        if name != file_name {
            let name = String::from_utf8_lossy(&name);
            return Err(bad_value(
                "the name of the history file asked for",
                Some(&name),
            ));
        }
        Ok(Some(HistoryFile { file_name, content }))
    }
}

/// Reads a value of an answer; an absent one is as bad as a malformed one.
pub(crate) fn parsed<T: std::str::FromStr>(
    what: &'static str,
    value: Option<&str>,
) -> Result<T, QueryError> {
    value
        .and_then(|value| value.parse().ok())
        .ok_or_else(|| bad_value(what, value))
}

fn bad_value(what: &'static str, found: Option<&str>) -> QueryError {
    QueryError::BadValue {
        what,
        found: found.unwrap_or("nothing").to_owned(),
    }
}

/// A size as `SHOW` prints settings counted in bytes (guc.c, `convert_int_from_base_unit`).
fn size_with_unit(shown: &str) -> Option<u64> {
    let digits = shown
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(shown.len());
    let (number, unit) = shown.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => 0,
        "kB" => 10,
        "MB" => 20,
        "GB" => 30,
        "TB" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::size_with_unit;

    #[test]
    fn reads_sizes_in_every_unit_that_show_prints() {
        assert_eq!(size_with_unit("16MB"), Some(16 << 20));
        assert_eq!(size_with_unit("1GB"), Some(1 << 30));
        assert_eq!(size_with_unit("1024kB"), Some(1 << 20));
        assert_eq!(size_with_unit("1048576"), Some(1 << 20));
        assert_eq!(size_with_unit("16 MiB"), None);
        assert_eq!(size_with_unit("MB"), None);
        assert_eq!(size_with_unit("99999999999999TB"), None);
    }
}
