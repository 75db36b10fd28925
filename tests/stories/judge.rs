//! PostgreSQL's own verdict on a restored data directory.

use std::path::Path;

use crate::ground::{Ground, Programs, command};
use crate::server::{Server, Shutdown, execute, value};

/// `pg_verifybackup`: every file is the one that the server described.
#[track_caller]
pub(crate) fn assert_verified(data: &Path) {
    let mut verify = command(Programs::get().tool("pg_verifybackup"));
    verify.arg("--no-parse-wal").arg("--exit-on-error");
    let output = verify.arg(data).output().unwrap();
    assert!(
        output.status.success(),
        "pg_verifybackup: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Starts the server of a restored directory, and waits until it has reached its target.
#[track_caller]
pub(crate) fn start_restored(ground: &Ground, data: &Path, end: End) -> Server {
    let mut server = Server::at(ground, data);
    server.start();
    match end {
        End::Paused => server.wait_until_paused(),
        End::Promoted => server.wait_until_promoted(),
    }
    server
}

/// What a restored server does once it has reached its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Paused,
    Promoted,
}

/// The rows of the table `moments` in a restored directory, whose files PostgreSQL verified.
#[track_caller]
pub(crate) fn restored_moments(ground: &Ground, data: &Path, end: End) -> String {
    assert_verified(data);
    let mut server = start_restored(ground, data, end);
    let rows = moments(&server);
    server.stop(Shutdown::Fast);
    rows
}

/// The rows of the table `moments`, in order, as in `1,2,3`.
#[track_caller]
pub(crate) fn moments(server: &Server) -> String {
    server.value("select coalesce(string_agg(id::text, ',' order by id), '') from moments")
}

/// Reads every row of every table, the catalogues too, and asks amcheck about every B-tree and, where
/// it can, every heap. The server must be writable.
#[track_caller]
pub(crate) fn assert_sound(server: &Server, database: &str) {
    let mut sql = server.sql_in(database);
    let tables = "select coalesce(string_agg(format('select count(%s::text) from %s t', 't', c.oid::regclass), ';'), '')
                  from pg_class c where relkind in ('r', 'm') and relpersistence <> 't'
                  and c.oid::regclass::text not like 'information_schema.%'";
    let reads = value(&mut sql, tables);
    assert!(!reads.is_empty(), "no table in {database}");
    execute(&mut sql, &reads);
    execute(&mut sql, "create extension if not exists amcheck");
    let indexes = "select count(bt_index_parent_check(i.indexrelid, true))
                   from pg_index i join pg_class c on c.oid = i.indexrelid join pg_am a on a.oid = c.relam
                   where a.amname = 'btree' and c.relpersistence = 'p' and i.indisvalid";
    assert_ne!(value(&mut sql, indexes), "0", "no index was checked");
    if Programs::get().major >= 14 {
        let damage = "select coalesce(string_agg(c.oid::regclass || ': ' || v.msg, '; '), 'none')
                      from pg_class c, lateral verify_heapam(c.oid::regclass) v
                      where c.relkind = 'r' and c.relpersistence = 'p'";
        assert_eq!(value(&mut sql, damage), "none");
    }
}
