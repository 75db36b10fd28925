//! What a server needs to start again and keeps outside of its data directory: Debian's configuration in
//! `/etc/postgresql`. A base backup does not have it (basebackup.c sends the data directory and
//! tablespaces), and who restores on another machine misses it first.

use std::path::{Path, PathBuf};

use replication::connection::{Connection, literal};

use super::BackupTaker;
use super::extents::EXTENT_BYTES;
use crate::error::{Error, Result, chain};
use crate::repository::records::bytes_of_hex;
use crate::server;

/// The files that the configuration is read from, as far as this role may know: guc.c hides their names from
/// all but superusers and members of `pg_read_all_settings`.
const CONFIGURATION: &str = "SELECT setting FROM pg_catalog.pg_settings \
     WHERE name IN ('config_file', 'hba_file', 'ident_file') AND setting <> '' \
     UNION SELECT sourcefile FROM pg_catalog.pg_settings WHERE sourcefile <> '' ORDER BY 1";
const DATA_DIRECTORY: &str =
    "SELECT max(setting) FROM pg_catalog.pg_settings WHERE name = 'data_directory'";
/// The most files that are kept.
const FILES_MAX: usize = 100;

/// A file that is kept with a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OutsideFile {
    /// Its full path on the server.
    pub(super) path: String,
    /// What it holds: at most one extent.
    pub(super) bytes: Vec<u8>,
}

impl BackupTaker {
    /// Reads what the backup would otherwise not have, and says what it will not have. That nobody may look
    /// is no reason to stop.
    pub(super) async fn what_lies_outside(&self) -> Result<Vec<OutsideFile>> {
        let mut sql = server::connect_sql(&self.settings).await?;
        let mut kept = Vec::new();
        let mut missing = Vec::new();
        let mut why = None;
        for path in named_outside(&mut sql).await? {
            let read = if kept.len() < FILES_MAX {
                read(&mut sql, &path).await
            } else {
                Err(Error::failure(format!("more than {FILES_MAX} files")))
            };
            match read {
                Ok(bytes) => kept.push(OutsideFile { path, bytes }),
                Err(error) => {
                    missing.push(path);
                    why.get_or_insert(error);
                }
            }
        }
        if let Some(why) = why {
            tracing::warn!(
                "the backup does not have what lies outside of the data directory, and the server needs it to \
                 start as it does: {}: {}. hint: keep copies of these files; or let this role read them: GRANT \
                 pg_read_server_files, and GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_binary_file(text, \
                 bigint, bigint, boolean)",
                missing.join(", "),
                why.message()
            );
        }
        Ok(kept)
    }
}

/// The files that the configuration is read from and that lie outside of the data directory.
async fn named_outside(sql: &mut Connection) -> Result<Vec<String>> {
    let failed = |error| server::query_error("ask where the configuration is", &error);
    let data = sql.query_value(DATA_DIRECTORY).await.map_err(failed)?;
    let Some(data) = data.filter(|data| !data.is_empty()) else {
        tracing::info!(
            "whether configuration lies outside of the data directory is not known: GRANT \
             pg_read_all_settings lets this role see it"
        );
        return Ok(Vec::new());
    };
    match sql.query(CONFIGURATION).await {
        Ok(found) => {
            let found = found.rows.into_iter().flatten().flatten();
            Ok(outside_of(Path::new(&data), found.map(PathBuf::from)))
        }
        Err(error) => {
            tracing::info!(
                "where the configuration is cannot be asked: {}",
                chain(&error)
            );
            Ok(Vec::new())
        }
    }
}

/// What a file on the server holds, if that is not more than one extent.
async fn read(sql: &mut Connection, path: &str) -> Result<Vec<u8>> {
    let failed = |error| server::query_error("read a file on the server", &error);
    let most = EXTENT_BYTES.saturating_add(1);
    let query = format!(
        "SELECT pg_catalog.encode(pg_catalog.pg_read_binary_file({}, 0, {most}, false), 'hex')",
        literal(path)
    );
    let digits = sql.query_value(&query).await.map_err(failed)?;
    match digits.and_then(|digits| bytes_of_hex(&digits)) {
        Some(bytes) if bytes.len() <= EXTENT_BYTES => Ok(bytes),
        Some(_) => Err(Error::failure(format!(
            "{path} has more than {EXTENT_BYTES} bytes"
        ))),
        None => Err(Error::failure(format!(
            "what {path} holds came as no bytes"
        ))),
    }
}

/// Those of `files` that do not lie below `data`.
fn outside_of(data: &Path, files: impl Iterator<Item = PathBuf>) -> Vec<String> {
    let outside = files.filter(|file| file.is_absolute() && !file.starts_with(data));
    outside.map(|file| file.display().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lies_elsewhere_is_named() {
        let files = [
            "/var/lib/pg/18/main/postgresql.auto.conf",
            "/var/lib/pg/18/main2/extra.conf",
            "/etc/postgresql/18/main/postgresql.conf",
            "relative.conf",
        ];
        let outside = outside_of(
            Path::new("/var/lib/pg/18/main"),
            files.iter().map(PathBuf::from),
        );
        assert_eq!(
            outside,
            [
                "/var/lib/pg/18/main2/extra.conf",
                "/etc/postgresql/18/main/postgresql.conf"
            ]
        );
    }
}
