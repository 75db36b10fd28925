//! Whether a server is the kind that `target_session_attrs` asks for.

use super::Purpose;
use super::error::AttemptError;
use crate::connection::{Connection, QueryError};
use crate::conninfo::TargetSessionAttrs;

/// Gives the connection back if its server is what is wanted.
///
/// Servers of 14 and later tell by themselves, in parameters that they report. 13 is asked; on a
/// connection for replication, which cannot run `pg_is_in_recovery()`, it counts as a standby if
/// its transactions are read-only, as they are there, and on a primary that makes them so.
pub(super) async fn check(
    mut connection: Connection,
    purpose: Purpose,
    wanted: TargetSessionAttrs,
) -> Result<Connection, AttemptError> {
    use TargetSessionAttrs as T;
    let fits = match wanted {
        T::Any => true,
        T::ReadWrite => !is_read_only(&mut connection).await?,
        T::ReadOnly => is_read_only(&mut connection).await?,
        T::Primary => !is_standby(&mut connection, purpose).await?,
        T::Standby | T::PreferStandby => is_standby(&mut connection, purpose).await?,
    };
    if fits {
        return Ok(connection);
    }
    // a farewell that fails changes nothing
    drop(connection.terminate().await);
    Err(AttemptError::NotWanted { wanted })
}

async fn is_read_only(connection: &mut Connection) -> Result<bool, AttemptError> {
    if let Some(in_recovery) = reported(connection, "in_hot_standby")
        && let Some(by_default) = reported(connection, "default_transaction_read_only")
    {
        return Ok(in_recovery || by_default);
    }
    is_true(connection, "SHOW transaction_read_only").await
}

async fn is_standby(connection: &mut Connection, purpose: Purpose) -> Result<bool, AttemptError> {
    match (reported(connection, "in_hot_standby"), purpose) {
        (Some(in_recovery), _) => Ok(in_recovery),
        (None, Purpose::Sql) => is_true(connection, "SELECT pg_catalog.pg_is_in_recovery()").await,
        (None, Purpose::Replication) => is_true(connection, "SHOW transaction_read_only").await,
    }
}

fn reported(connection: &Connection, parameter: &str) -> Option<bool> {
    connection.parameter(parameter).map(|value| value == "on")
}

async fn is_true(connection: &mut Connection, command: &str) -> Result<bool, AttemptError> {
    let value = connection
        .query_value(command)
        .await
        .map_err(undetermined)?;
    Ok(matches!(value.as_deref(), Some("on" | "t")))
}

fn undetermined(error: QueryError) -> AttemptError {
    match error {
        QueryError::Wire(error) => AttemptError::Wire(error),
        other => AttemptError::Undetermined(other),
    }
}
