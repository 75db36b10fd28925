//! Pages that the server's disk has damaged, by their checksums.

use std::fs;
use std::os::unix::fs::FileExt as _;

use crate::anywhen::Ended;
use crate::judge::{End, assert_verified};
use crate::record::Record;
use crate::server::{Options, Shutdown};

/// So long is a page.
const PAGE: u64 = 8192;

/// A cluster with checksums, and a table in `file`, of whose pages two are damaged on disk.
fn with_damaged_pages() -> (Record, String) {
    let mut record = Record::of_server(&Options {
        hba: "local postgres,replication archiver trust".to_owned(),
        own_system: true,
        ..Options::default()
    });
    record.insert(0);
    record.server.execute(
        "create table filled as select n as id, md5(n::text) as words from generate_series(1, 20000) n",
    );
    let file = record.server.value("select pg_relation_filepath('filled')");
    record.server.stop(Shutdown::Fast);
    let path = record.server.data().join(&file);
    let pages = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    for page in [3, 90] {
        let mut byte = [0];
        pages.read_exact_at(&mut byte, page * PAGE + 5000).unwrap();
        pages
            .write_all_at(&[byte[0] ^ 1], page * PAGE + 5000)
            .unwrap();
    }
    record.server.start();
    (record, file)
}

fn backup(record: &Record, flags: &[&str]) -> Ended {
    let asked = ["backup", "--checkpoint", "fast", "--json"];
    record
        .anywhen
        .run_on(&record.server, &[&asked, flags].concat())
}

#[test]
fn damaged_pages_fail_a_backup_that_names_them_or_are_recorded_where_that_is_asked_for() {
    let (record, file) = with_damaged_pages();
    let refused = backup(&record, &[]);
    refused.failed_with(5);
    refused.says(&[
        "checksum",
        &file,
        "block 3",
        "block 90",
        "--no-verify-checksums",
    ]);
    assert_eq!(
        record.anywhen.json(&["list"])["backups"]
            .as_array()
            .unwrap()
            .len(),
        0
    );

    // the second one finds them too, though it stores nothing of them
    for _ in 0..2 {
        let taken = backup(&record, &["--no-verify-checksums"]).succeeded();
        taken.says(&[
            "checksum is wrong",
            &format!("{file} block 3, {file} block 90"),
        ]);
        let document = taken.document();
        assert_eq!(document["damaged_page_count"], 2, "{document}");
        assert_eq!(
            document["damaged_pages"],
            serde_json::json!([{ "path": file, "blocks": [3, 90] }])
        );
        let id = document["id"].as_str().unwrap();
        let list = record.anywhen.run(&["list"]).succeeded();
        assert!(list.stdout.contains(&format!("DAMAGED {id}: ")), "{list}");
        assert!(list.stdout.contains(&format!("{file} block 90")), "{list}");
    }
    // who may not look again says so
    record
        .server
        .execute("create role archiver login replication");
    let conninfo = record
        .server
        .conninfo()
        .replace("user=postgres", "user=archiver");
    let asked = ["backup", "--no-verify-checksums", "-d", &conninfo];
    let taken = record.anywhen.run(&asked).succeeded();
    taken.says(&[
        &format!("{file} block 3, {file} block 90"),
        "GRANT EXECUTE ON FUNCTION pg_catalog.pg_read_binary_file",
    ]);
    // nothing else is lost of the backup, and whoever restores it is told
    let target = record.target("restored");
    let planned = ["restore", "--dry-run", "-D", target.to_str().unwrap()];
    let planned = record.anywhen.run(&planned).succeeded();
    assert!(
        planned.stdout.contains(&format!("{file} block 3")),
        "{planned}"
    );
    record.anywhen.restore(&target, &["--immediate"]);
    assert_verified(&target);
    assert_eq!(record.rows_at("rows", &["--immediate"], End::Paused), "0");
}

/// Pages that are written to while a backup reads them look torn, and are not.
#[test]
fn a_busy_server_has_no_damaged_pages() {
    let (record, _) = with_damaged_pages();
    record.server.execute("drop table filled");
    let mut sql = record.server.sql();
    sql.batch_execute(
        "create table busy as select n as id, 0 as times from generate_series(1, 50000) n",
    )
    .unwrap();
    std::thread::scope(|scope| {
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        let busy = scope.spawn(move || {
            let mut updates = 0;
            while is_done.try_recv().is_err() {
                sql.batch_execute("update busy set times = times + 1; checkpoint")
                    .unwrap();
                updates += 1;
            }
            updates
        });
        for _ in 0..3 {
            let taken = backup(&record, &["--no-verify-checksums", "--full"]).succeeded();
            let document = taken.document();
            assert_eq!(document["damaged_page_count"], 0, "{document}");
        }
        done.send(()).unwrap();
        assert!(busy.join().unwrap() > 0);
    });
}
