//! A bit flipped, a byte cut off, two objects swapped, in every kind of object: found and named, and a
//! restore stops. What is restored all the same is right.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use crate::anywhen::Ended;
use crate::chance::{Chance, rounds};
use crate::ground::{eventually, give};
use crate::judge::{End, restored_moments};
use crate::objects::{files_below, lsn};
use crate::record::Record;
use crate::server::Options;
use crate::workloads::fill_a_file_list;

/// Two objects of one kind.
struct Kind {
    name: &'static str,
    object: PathBuf,
    other: PathBuf,
    checked: Checked,
}

/// What a restore of all that is stored can notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Checked {
    /// All of it is read and has a checksum: damage must be found.
    Whole,
    /// The parts that are needed are read, each with its checksum: a restore is right or refused.
    InParts,
    /// JSON for people without a checksum, or a hint: as in parts, but a bit may change unnoticed.
    No,
}

#[derive(Clone, Copy, Debug)]
enum Damage {
    BitFlipped,
    ByteCutOff,
    Swapped,
}

const DAMAGES: [Damage; 3] = [Damage::BitFlipped, Damage::ByteCutOff, Damage::Swapped];

#[test]
fn damage_in_every_kind_of_object_is_found_and_named() {
    let mut record = Record::begun(&Options {
        wal_segment_mib: 1,
        ..Options::default()
    });
    let first = record.anywhen.json(&["list"])["backups"][0]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    record.insert(1);
    record.store_all();
    record.fill_segments(4);
    record.insert(2);
    record.store_all();
    record
        .server
        .execute("create table other as select generate_series(1, 100000) n");
    record.anywhen.backup(&record.server);
    // two pieces at least
    for row in [3, 4, 5] {
        record.insert(row);
        record.store_all();
    }
    record.stop_stream();
    let restore = ["--backup", &first];
    assert_eq!(
        record.rows_at("undamaged", &restore, End::Promoted),
        "0,1,2,3,4,5"
    );

    let mut chance = Chance::new();
    let kinds = kinds(record.anywhen.repository());
    for round in 1..=rounds(1) {
        for kind in &kinds {
            for damage in DAMAGES {
                if kind.checked == Checked::No && matches!(damage, Damage::BitFlipped) {
                    continue;
                }
                let whole = [&kind.object, &kind.other].map(|path| fs::read(path).unwrap());
                do_damage(kind, damage, &mut chance);
                let name = format!("{}-{damage:?}-{round}", kind.name);
                assert_found(&record, kind, &restore, &name);
                put(&kind.object, &whole[0]);
                put(&kind.other, &whole[1]);
            }
        }
    }
    assert_eq!(
        record.rows_at("mended", &restore, End::Promoted),
        "0,1,2,3,4,5"
    );
}

fn kinds(repository: &Path) -> Vec<Kind> {
    let files = files_below(repository);
    let sealed = repository.join("keys").exists();
    let kind = |name, checked, is_of_kind: &dyn Fn(&str) -> bool| {
        let mut found = files
            .iter()
            .filter(|path| is_of_kind(path.to_str().unwrap()));
        // the first of a kind belongs to the first backup, or to the WAL behind it
        let object = found
            .next()
            .unwrap_or_else(|| panic!("no {name} in {files:#?}"));
        Kind {
            name,
            object: object.clone(),
            other: found.next().unwrap_or(object).clone(),
            checked,
        }
    };
    let is_segment = |path: &str| {
        let name = path.rsplit('/').next().unwrap();
        name.len() == 24 && path.contains("/wal/")
    };
    // a piece that came later than its whole segment may still be there, and nothing reads it
    let is_needed_piece = |path: &str| match path.split_once(".pieces/") {
        Some((segment, _)) => !files.contains(&PathBuf::from(segment)),
        None => false,
    };
    let mut kinds = vec![
        kind("cluster", Checked::No, &|path| {
            path.ends_with("/cluster.json")
        }),
        kind("record", Checked::InParts, &|path| {
            path.ends_with("/backup.json")
        }),
        kind("manifest", Checked::Whole, &|path| {
            path.ends_with("/manifest")
        }),
        kind("pack", Checked::InParts, &|path| path.contains("/packs/")),
        kind("segment", Checked::Whole, &is_segment),
        kind("piece", Checked::Whole, &is_needed_piece),
        kind("tip", Checked::No, &|path| path.contains("/tip/")),
    ];
    if sealed {
        kinds.push(kind("wrap", Checked::No, &|path| path.contains("/keys/")));
    }
    kinds
}

fn do_damage(kind: &Kind, damage: Damage, chance: &mut Chance) {
    let mut bytes = fs::read(&kind.object).unwrap();
    match damage {
        Damage::BitFlipped => {
            let bit = chance.below(8 * bytes.len() as u64);
            bytes[usize::try_from(bit / 8).unwrap()] ^= 1 << (bit % 8);
            put(&kind.object, &bytes);
        }
        Damage::ByteCutOff => {
            bytes.pop();
            put(&kind.object, &bytes);
        }
        Damage::Swapped => {
            let other = fs::read(&kind.other).unwrap();
            put(&kind.other, &bytes);
            put(&kind.object, &other);
        }
    }
}

fn put(path: &Path, bytes: &[u8]) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(path, bytes).unwrap();
}

/// Asserts that a restore is refused as damage that is named, or that a segment is not handed to the
/// server, or else, where the object need not be read, that what was restored is right.
fn assert_found(record: &Record, kind: &Kind, arguments: &[&str], name: &str) {
    let target = record.target(name);
    let fixed = ["restore", "-D", target.to_str().unwrap()];
    let ended = record.anywhen.run(&[&fixed, arguments].concat());
    let object = kind.object.file_name().unwrap().to_str().unwrap();
    if ended.code == Some(0) {
        // a plan need not read all of the WAL; the server will
        let rows = kind.checked == Checked::Whole;
        if rows && matches!(kind.name, "segment" | "piece") {
            let fetched = fetch(record, kind, &target);
            assert_eq!(
                fetched.code,
                Some(200),
                "{name}: {object} was handed out: {fetched} {:#?}",
                files_below(record.anywhen.repository())
            );
        } else {
            assert!(
                kind.checked != Checked::Whole,
                "{name}: restored all the same: {ended}"
            );
            let rows = restored_moments(&record.ground, &target, End::Promoted);
            assert_eq!(rows, "0,1,2,3,4,5", "{name}");
        }
    } else {
        assert!(matches!(ended.code, Some(3 | 5)), "{name}: {ended}");
        assert!(
            ended.stderr.contains("damaged")
                || ended.code == Some(5)
                || kind.checked != Checked::Whole,
            "{name}: {ended}"
        );
        // the object, or the backup or the segment that it belongs to
        let folder = kind.object.parent().unwrap().file_name().unwrap();
        let folder = folder.to_str().unwrap().trim_end_matches(".pieces");
        let named = [object, folder]
            .iter()
            .any(|name| ended.stderr.contains(name));
        assert!(named, "{name}: {object} is not named: {ended}");
        assert!(
            !target.join("global/pg_control").exists(),
            "{name}: a server would start there"
        );
    }
    fs::remove_dir_all(&target).unwrap_or_default();
}

/// `wal-fetch` of the segment that the object is, or is a piece of.
fn fetch(record: &Record, kind: &Kind, target: &Path) -> Ended {
    let segment = segment_of(&kind.object);
    let fetched = record.ground.path("fetched");
    let mut fetch = record
        .anywhen
        .command(&["wal-fetch", &segment, fetched.to_str().unwrap()]);
    fetch.current_dir(target);
    let ended = record.anywhen.run_command(fetch);
    let there = fs::remove_file(fetched).is_ok();
    assert_eq!(there, ended.code == Some(0), "{ended}");
    ended
}

fn segment_of(object: &Path) -> String {
    let folder = object.parent().unwrap().file_name().unwrap();
    let name = object.file_name().unwrap().to_str().unwrap();
    let folder = folder.to_str().unwrap();
    folder.strip_suffix(".pieces").unwrap_or(name).to_owned()
}

/// A manifest that is gone or a pack cut short was seen only once a restore had begun, and one damaged
/// piece took every window with it.
#[test]
fn what_is_lost_of_one_object_hides_no_other_and_is_said_before_a_restore() {
    let mut record = Record::begun(&Options::default());
    let first = newest_backup(&record);
    for row in [1, 2] {
        record.insert(row);
        record.store_all();
    }
    fill_a_file_list(&record.server);
    record.anywhen.backup(&record.server);
    let second = newest_backup(&record);
    for row in [3, 4] {
        record.insert(row);
        record.store_all();
    }
    let last = record.insert(5);
    record.store_all();
    record.stop_stream();

    let files = files_below(record.anywhen.repository());
    let of_second = |kind: &str| {
        let is = |path: &&PathBuf| {
            let path = path.to_str().unwrap();
            path.contains(kind) && path.contains(&second)
        };
        files.iter().find(is).unwrap()
    };
    let target = record.target("planned");
    let plan = |arguments: &[&str]| {
        let fixed = ["restore", "--dry-run", "-D", target.to_str().unwrap()];
        record.anywhen.run(&[&fixed, arguments].concat())
    };
    let list = of_second("/files/");
    for lost in [of_second("/packs/"), of_second("/manifest"), list] {
        let whole = fs::read(lost).unwrap();
        put(lost, &whole[..whole.len() - 1]);
        assert_only_second_is_lost(&record, &first, &second);
        fs::remove_file(lost).unwrap();
        assert_only_second_is_lost(&record, &first, &second);
        let chosen = ["--backup", &second];
        plan(&chosen).says(&[&name_of(lost), "it is missing"]);
        assert_eq!(plan(&chosen).code, Some(5));
        // it goes on with the other, and says why
        let planned = plan(&[]).succeeded();
        let warning = format!("backup {second} cannot be read, and was not considered");
        assert!(planned.stdout.contains(&warning), "{planned}");
        fs::write(lost, &whole).unwrap();
        give(lost);
    }
    // what is as long as it was is read by nobody before a restore
    let whole = fs::read(list).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    put(list, &damaged);
    let arguments = ["--backup", &second, "--immediate"];
    let planned = plan(&arguments);
    planned.failed_with(5);
    let refused = record.anywhen.restore_refused(&target, &arguments, 5);
    let named = format!("backups/{second}/files/{}", name_of(list));
    refused.says(&["damaged", &named]);
    planned.says(&["damaged", &named]);
    assert_eq!(files_below(&target).len(), 0, "{refused}");
    fs::write(list, &whole).unwrap();
    assert_eq!(
        record.anywhen.json(&["list"])["backups"]
            .as_array()
            .unwrap()
            .len(),
        2
    );

    let pieces = files
        .iter()
        .filter(|path| path.to_str().unwrap().contains(".pieces/"));
    let piece = pieces.max().unwrap();
    let mut bytes = fs::read(piece).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    put(piece, &bytes);
    let status = record.anywhen.run(&["status", "--json"]);
    status.failed_with(5);
    let cluster = status.document()["clusters"][0].clone();
    let window = &cluster["windows"][0];
    let reaches = window["latest_lsn"].as_str().map(lsn).unwrap();
    assert!(reaches <= lsn(&last.commit_lsn), "{status}");
    assert_eq!(
        cluster["holes"][0]["start_lsn"], window["latest_lsn"],
        "{status}"
    );
    status.says(&["WAL that is stored cannot be read", &name_of(piece)]);
    let refused = record
        .anywhen
        .restore_refused(&record.target("all"), &["--json"], 5);
    let failure = refused.document();
    let nearest = failure["error"]["nearest"]["before"].as_str();
    let nearest = nearest.unwrap_or_else(|| panic!("{refused}"));
    let rows = record.rows_at("nearest", &["--to", nearest], End::Paused);
    assert_eq!(rows, "0,1,2,3,4", "to {nearest}");
}

/// Whoever removes the newest WAL leaves windows that look whole.
#[test]
fn wal_that_was_removed_at_the_end_is_missed() {
    let mut record = Record::of_server(&Options::default());
    record.insert(0);
    let stream = ["--flush-interval", "50ms", "--tip-interval", "50ms"];
    record.stream = Some(record.anywhen.stream_with(&record.server, &stream));
    record.anywhen.backup(&record.server);
    let row = record.insert(1);
    let confirmed = |record: &Record| {
        let status = record.anywhen.json(&["status"]);
        let tip = status["clusters"][0]["tip"]["lsn"].as_str().map(lsn);
        tip.is_some_and(|tip| tip > lsn(&row.commit_lsn))
    };
    eventually("a tip behind the row", || confirmed(&record));
    record.stop_stream();
    let holes = |record: &Record| {
        let status = record.anywhen.json(&["status"]);
        status["clusters"][0]["holes"].as_array().unwrap().clone()
    };
    assert!(holes(&record).is_empty());
    let tip = record.anywhen.json(&["status"])["clusters"][0]["tip"]["lsn"].clone();

    let files = files_below(record.anywhen.repository());
    let pieces = files
        .iter()
        .filter(|path| path.to_str().unwrap().contains(".pieces/"));
    fs::remove_file(pieces.max().unwrap()).unwrap();
    let found = holes(&record);
    assert_eq!(found.len(), 1, "{found:#?}");
    assert_eq!(found[0]["end_lsn"], tip);
    let target = record.target("planned");
    let plan = record
        .anywhen
        .run(&["restore", "--dry-run", "-D", target.to_str().unwrap()])
        .succeeded();
    assert!(
        plan.stdout
            .contains("a stream had found timeline 1 stored up to"),
        "{plan}"
    );
}

fn name_of(object: &Path) -> String {
    object.file_name().unwrap().to_str().unwrap().to_owned()
}

fn newest_backup(record: &Record) -> String {
    let list = record.anywhen.json(&["list"]);
    let newest = list["backups"].as_array().unwrap().last().unwrap();
    newest["id"].as_str().unwrap().to_owned()
}

fn assert_only_second_is_lost(record: &Record, first: &str, second: &str) {
    let [list, status] = ["list", "status"].map(|command| {
        let ended = record.anywhen.run(&[command, "--json"]);
        ended.failed_with(5);
        ended.document()
    });
    let cluster = &status["clusters"][0];
    for document in [&list, cluster] {
        let lost = document["unreadable_backups"].as_array().unwrap();
        assert_eq!(lost.len(), 1, "{document:#}");
        assert_eq!(lost[0]["id"], second, "{document:#}");
    }
    assert_eq!(cluster["last_backup"], first, "{status:#}");
    assert_eq!(
        cluster["windows"].as_array().unwrap().len(),
        1,
        "{status:#}"
    );
}
