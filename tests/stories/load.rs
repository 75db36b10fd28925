//! A load as pgbench makes it: clients that commit small transactions for as long as they are let, and
//! know which of them were acknowledged.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use postgres::{Client, NoTls};

use crate::ground::pause;
use crate::judge::{End, assert_verified, start_restored};
use crate::record::Record;
use crate::server::{Server, Shutdown, value};

const CLIENTS: u32 = 2;
/// The ids of one client, whatever happens to it.
const IDS: u32 = 10_000_000;

/// Clients at work. They end when this is dropped.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<BTreeSet<u32>>>,
}

impl Load {
    /// Makes the tables, where they are missing, and lets clients work on them. They connect again when
    /// the server was away. `generation` tells their ids from those of a load before.
    #[track_caller]
    pub(crate) fn start(server: &Server, generation: u32) -> Self {
        server.execute(
            "create table if not exists accounts (id int primary key, balance bigint);
             create table if not exists history (id int primary key, note text);
             insert into accounts select n, 0 from generate_series(0, 99) n on conflict do nothing",
        );
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..CLIENTS)
            .map(|number| {
                let first = (generation * CLIENTS + number) * IDS;
                let (settings, stop) = (server.client(), Arc::clone(&stop));
                std::thread::spawn(move || work(&settings, first, &stop))
            })
            .collect();
        Self { stop, clients }
    }

    /// Ends it, and says which ids were acknowledged.
    #[track_caller]
    pub(crate) fn stop(mut self) -> BTreeSet<u32> {
        self.stop.store(true, Ordering::Relaxed);
        let clients = std::mem::take(&mut self.clients);
        let acknowledged: BTreeSet<u32> = clients
            .into_iter()
            .flat_map(|client| client.join().unwrap())
            .collect();
        assert!(!acknowledged.is_empty(), "no client committed anything");
        acknowledged
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients.drain(..) {
            drop(client.join());
        }
    }
}

fn work(settings: &postgres::Config, first: u32, stop: &AtomicBool) -> BTreeSet<u32> {
    let mut acknowledged = BTreeSet::new();
    let mut id = first;
    while !stop.load(Ordering::Relaxed) {
        let Ok(mut sql) = settings.connect(NoTls) else {
            pause();
            continue;
        };
        while !stop.load(Ordering::Relaxed) {
            id += 1;
            if commit(&mut sql, id).is_err() {
                pause();
                break;
            }
            acknowledged.insert(id);
        }
    }
    acknowledged
}

/// One transaction, and the time that a client takes to think.
fn commit(sql: &mut Client, id: u32) -> Result<(), postgres::Error> {
    sql.batch_execute(&format!(
        "update accounts set balance = balance + 1 where id = {};
         insert into history values ({id}, repeat(md5('{id}'), {}))",
        id % 100,
        1 + id % 7,
    ))?;
    // an error after the commit does not take its acknowledgement back
    drop(sql.batch_execute("select pg_sleep(0.004)"));
    Ok(())
}

/// The ids that `server` has.
#[track_caller]
pub(crate) fn ids(server: &Server) -> BTreeSet<u32> {
    let ids = value(
        &mut server.sql(),
        "select coalesce(string_agg(id::text, ','), '') from history",
    );
    let ids = ids.split(',').filter(|id| !id.is_empty());
    ids.map(|id| id.parse().unwrap()).collect()
}

/// Restores the latest moment: every acknowledged transaction must be there, and each of them whole.
#[track_caller]
pub(crate) fn assert_restored(record: &Record, acknowledged: &BTreeSet<u32>) {
    let target = record.target("latest");
    record.anywhen.restore(&target, &[]);
    assert_verified(&target);
    let mut restored = start_restored(&record.ground, &target, End::Promoted);
    assert_has(&restored, acknowledged);
    let halves = "select (select sum(balance) from accounts) - (select count(*) from history)";
    assert_eq!(restored.value(halves), "0", "half a transaction");
    restored.stop(Shutdown::Fast);
}

/// Asserts that a server has every transaction that was acknowledged.
#[track_caller]
pub(crate) fn assert_has(server: &Server, acknowledged: &BTreeSet<u32>) {
    let found = ids(server);
    let lost: Vec<&u32> = acknowledged.difference(&found).collect();
    assert!(
        lost.is_empty(),
        "{} of {} acknowledged transactions are lost: {lost:?}",
        lost.len(),
        acknowledged.len()
    );
}
