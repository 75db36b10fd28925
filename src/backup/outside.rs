//! What a server needs to start again and keeps outside of its data directory: Debian's configuration in
//! `/etc/postgresql`. A base backup does not have it (basebackup.c sends the data directory and
//! tablespaces), and who restores on another machine misses it first.

use std::path::{Path, PathBuf};

use replication::connection::Connection;

use crate::error::{Result, chain};
use crate::server;

/// The files that the configuration is read from, as far as this role may know: guc.c hides their names from
/// all but superusers and members of `pg_read_all_settings`.
const CONFIGURATION: &str = "SELECT setting FROM pg_catalog.pg_settings \
     WHERE name IN ('config_file', 'hba_file', 'ident_file') AND setting <> '' \
     UNION SELECT sourcefile FROM pg_catalog.pg_settings WHERE sourcefile <> '' ORDER BY 1";
const DATA_DIRECTORY: &str =
    "SELECT max(setting) FROM pg_catalog.pg_settings WHERE name = 'data_directory'";

/// Says which files the backup will not have. That nobody may look is no reason to stop.
pub(super) async fn name_what_lies_outside(sql: &mut Connection) -> Result<()> {
    let failed = |error| server::query_error("ask where the configuration is", &error);
    let data = sql.query_value(DATA_DIRECTORY).await.map_err(failed)?;
    let Some(data) = data.filter(|data| !data.is_empty()) else {
        tracing::info!(
            "whether configuration lies outside of the data directory is not known: GRANT \
             pg_read_all_settings lets this role see it"
        );
        return Ok(());
    };
    let found = sql.query(CONFIGURATION).await;
    let found = match found {
        Ok(found) => found.rows.into_iter().flatten().flatten(),
        Err(error) => {
            tracing::info!(
                "where the configuration is cannot be asked: {}",
                chain(&error)
            );
            return Ok(());
        }
    };
    let outside = outside_of(Path::new(&data), found.map(PathBuf::from));
    if !outside.is_empty() {
        tracing::warn!(
            "the backup does not have what lies outside of the data directory, and the server needs it to \
             start as it does: {}. hint: keep copies of these files",
            outside.join(", ")
        );
    }
    Ok(())
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
