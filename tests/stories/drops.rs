//! The operator's nightmare: something was dropped, and is wanted back.

use crate::judge::{End, start_restored};
use crate::record::Record;
use crate::server::{Options, value};

#[test]
fn brings_a_dropped_table_back() {
    let mut record = Record::begun(&Options::default());
    record.insert(1);
    let before = record.now();
    record.server.execute("drop table moments");
    record.server.execute("create table moments (id int)");
    record.store_all();
    assert_eq!(
        record.rows_at("before", &["--to-time", &before], End::Paused),
        "0,1"
    );
}

#[test]
fn brings_a_truncated_table_back() {
    let mut record = Record::begun(&Options::default());
    record.insert(1);
    let mut sql = record.server.sql();
    sql.batch_execute("begin; truncate moments").unwrap();
    let xid = value(&mut sql, "select pg_current_xact_id()");
    sql.batch_execute("commit").unwrap();
    record.store_all();
    // paused there, the table would still be locked by the transaction that truncates it
    let exclusive = ["--to-xid", &xid, "--exclusive", "--action", "promote"];
    assert_eq!(record.rows_at("before", &exclusive, End::Promoted), "0,1");
}

/// DROP DATABASE removes the files by a record that precedes its commit: a `recovery_target_time` before
/// the commit replays the removal, and gives back a database without files.
#[test]
fn brings_a_dropped_database_back_with_its_files() {
    let mut record = Record::begun(&Options::default());
    record.server.execute("create database shop");
    let mut shop = record.server.sql_in("shop");
    shop.batch_execute(
        "create table orders (id int primary key); insert into orders values (1), (2)",
    )
    .unwrap();
    drop(shop);
    let before = record.now();
    record.server.execute("drop database shop");
    record.insert(1);
    record.store_all();

    let target = record.target("before");
    record.anywhen.restore(&target, &["--to-time", &before]);
    let restored = start_restored(&record.ground, &target, End::Paused);
    let mut shop = restored.sql_in("shop");
    assert_eq!(value(&mut shop, "select sum(id) from orders"), "3");
}
