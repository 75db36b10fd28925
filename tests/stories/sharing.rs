//! Backups that refer to what earlier ones have stored.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde_json::Value;

use crate::anywhen::Anywhen;
use crate::ground::{Ground, eventually};
use crate::judge::{End, assert_verified};
use crate::objects::{files_below, system_dir};
use crate::proxy::Proxy;
use crate::record::Record;
use crate::sealed::{Identity, is_sealed};
use crate::server::{Options, value};
use crate::workloads::fill_a_file_list;

/// A server with a table of 20,000 rows that do not compress to nothing.
fn with_rows() -> Record {
    with_rows_on(Ground::new())
}

fn with_rows_on(ground: Ground) -> Record {
    let record = Record::on(ground, &Options::default());
    record.insert(0);
    record.server.execute(
        "create table filled as select n as id, md5(n::text) || md5((n + 1)::text) as words
         from generate_series(1, 20000) n",
    );
    record.server.execute("checkpoint");
    record
}

fn stored_bytes(backup: &Value) -> u64 {
    backup["stored_bytes"].as_u64().unwrap()
}

fn id(backup: &Value) -> &str {
    backup["id"].as_str().unwrap()
}

/// Restores a backup by itself, and finds every file as the server described it, and every row.
fn restores(record: &Record, backup: &Value, rows: &str) {
    let name = format!("restored-{}", id(backup));
    let flags = ["--backup", id(backup), "--immediate"];
    assert_eq!(record.rows_at(&name, &flags, End::Paused), rows);
}

#[test]
fn a_second_backup_stores_what_has_changed_and_restores_as_a_full_one() {
    let record = with_rows();
    let first = record.anywhen.backup(&record.server);
    let unchanged = record.anywhen.backup(&record.server);
    assert!(
        stored_bytes(&unchanged) * 10 < stored_bytes(&first),
        "{unchanged}\n{first}"
    );
    assert_eq!(unchanged["files"], first["files"]);

    record.insert(1);
    record
        .server
        .execute("update filled set words = 'changed' where id between 1 and 20");
    let changed = record.anywhen.backup(&record.server);
    assert!(
        stored_bytes(&changed) * 2 < stored_bytes(&first),
        "{changed}\n{first}"
    );
    let asked = ["backup", "--checkpoint", "fast", "--full", "--json"];
    let full = record.anywhen.run_on(&record.server, &asked);
    let full = full.succeeded().document();
    assert!(
        stored_bytes(&full) * 10 > stored_bytes(&first) * 9,
        "{full}\n{first}"
    );

    restores(&record, &first, "0");
    restores(&record, &unchanged, "0");
    restores(&record, &changed, "0,1");
    restores(&record, &full, "0,1");
    let latest = record.target("latest");
    record.anywhen.restore(&latest, &["--immediate"]);
    assert_verified(&latest);
}

/// Told that it can be restored, nobody takes another backup.
#[test]
fn a_backup_whose_packs_are_of_another_that_lost_them_is_not_called_good() {
    let record = with_rows();
    let first = record.anywhen.backup(&record.server);
    let second = record.anywhen.backup(&record.server);
    let packs = system_dir(&record.anywhen, &record.server).join("packs");
    let pack = packs.join(id(&first)).join("00000000");
    fs::remove_file(&pack).unwrap();
    let name = format!("packs/{}/00000000", id(&first));

    let list = record.anywhen.run(&["list"]);
    list.failed_with(5);
    let says_why = |backup: &Value| {
        let mut lines = list.stdout.lines();
        lines.any(|line| {
            line.contains(&format!("UNREADABLE {}", id(backup))) && line.contains(&name)
        })
    };
    assert!(says_why(&first) && says_why(&second), "{list}");
    let status = record.anywhen.run(&["status", "--json"]);
    status.failed_with(5);
    let status = status.document();
    let cluster = &status["clusters"][0];
    assert_eq!(
        cluster["windows"].as_array().map(Vec::len),
        Some(0),
        "{cluster}"
    );
    let target = record.target("refused");
    let flags = ["--backup", id(&second), "--immediate"];
    let asked = [
        &["restore", "-D", target.to_str().unwrap()],
        flags.as_slice(),
    ]
    .concat();
    let refused = record.anywhen.run(&asked);
    refused.failed_with(5);
    refused.says(&[&name]);
    assert!(
        !target.join("global/pg_control").exists(),
        "a server would start there"
    );

    // the next one does not build on what is not there
    let third = record.anywhen.backup(&record.server);
    assert!(
        stored_bytes(&third) * 10 > stored_bytes(&first) * 9,
        "{third}\n{first}"
    );
    restores(&record, &third, "0");
}

/// A pack that was cut short is as long as it is now, for whoever asks only now.
#[test]
fn a_backup_does_not_refer_to_a_pack_that_was_cut_short() {
    let record = with_rows();
    let first = record.anywhen.backup(&record.server);
    record.anywhen.backup(&record.server);
    let packs = system_dir(&record.anywhen, &record.server).join("packs");
    let pack = packs.join(id(&first)).join("00000000");
    fs::set_permissions(&pack, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::File::options().write(true).open(&pack).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length / 2).unwrap();
    let third = record.anywhen.backup(&record.server);
    assert!(
        stored_bytes(&third) * 10 > stored_bytes(&first) * 9,
        "{third}\n{first}"
    );
    let list = record.anywhen.run(&["list"]);
    list.failed_with(5);
    assert_eq!(list.stdout.matches("UNREADABLE").count(), 2, "{list}");
    restores(&record, &third, "0");
}

/// Whoever holds recipients alone cannot read what an earlier backup has: it is stored again, and said.
#[test]
fn without_an_identity_everything_is_stored_anew_and_that_is_said() {
    let record = with_rows_on(Ground::on_disk());
    let Identity { recipient, file } = Identity::get();
    let take = |with_identity: bool| {
        let mut command = record
            .anywhen
            .command(&["backup", "--checkpoint", "fast", "--json"]);
        command.args(["-d", &record.server.conninfo()]);
        command.env("ANYWHEN_RECIPIENTS", recipient);
        if with_identity {
            command.env("ANYWHEN_IDENTITY_FILE", file);
        } else {
            command.env_remove("ANYWHEN_IDENTITY_FILE");
        }
        let ended = record.anywhen.run_command(command).succeeded();
        let said = ended.stderr.contains("everything is stored anew");
        (ended.document(), said)
    };
    let (first, _) = take(true);
    let (blind, said) = take(false);
    assert!(said);
    assert!(
        stored_bytes(&blind) * 10 > stored_bytes(&first) * 9,
        "{blind}\n{first}"
    );
    let (seeing, said) = take(true);
    assert!(!said);
    assert!(
        stored_bytes(&seeing) * 10 < stored_bytes(&first),
        "{seeing}\n{first}"
    );
}

/// Hours of copying are not lost with a connection.
#[test]
fn what_a_backup_has_stored_before_its_connection_was_cut_is_used_by_the_next_one() {
    let options = Options {
        tcp: true,
        hba: "host all postgres 127.0.0.1/32 trust\nhost replication postgres 127.0.0.1/32 trust"
            .to_owned(),
        ..Options::default()
    };
    let record = Record::of_server(&options);
    record.insert(0);
    let fill = "create table filled as select n as id, md5(n::text) || md5((n + 1)::text) as words
         from generate_series(1, 120000) n; checkpoint";
    record.server.execute(fill);
    let system_dir = system_dir(&record.anywhen, &record.server);
    let unfinished = || {
        let files = files_below(&system_dir);
        let all = files
            .into_iter()
            .filter(|path| path.ends_with("unfinished.json"));
        all.count()
    };
    let intents = || fs::read_dir(system_dir.join("intents")).map_or(0, Iterator::count);

    cut_off(&record);
    assert_eq!((unfinished(), intents()), (1, 1));
    let list = record.anywhen.json(&["list"]);
    assert_eq!(list["backups"].as_array().unwrap().len(), 0, "{list}");
    let first = taken(&record, "is used");
    assert_eq!((unfinished(), intents()), (0, 0));
    let full = record.anywhen.run_on(
        &record.server,
        &["backup", "--checkpoint", "fast", "--full", "--json"],
    );
    let full = full.succeeded().document();
    assert!(
        stored_bytes(&first) * 3 < stored_bytes(&full) * 2,
        "{first}\n{full}"
    );

    // twice, and behind a backup that has what neither had changed
    record
        .server
        .execute("update filled set words = md5(words) || 'x'; checkpoint");
    cut_off(&record);
    record.insert(1);
    cut_off(&record);
    assert_eq!((unfinished(), intents()), (2, 2));
    let second = taken(&record, "is used");
    assert_eq!((unfinished(), intents()), (0, 0));
    assert!(
        stored_bytes(&second) * 3 < stored_bytes(&full) * 2,
        "{second}\n{full}"
    );
    let third = record.anywhen.backup(&record.server);
    assert!(
        stored_bytes(&third) * 10 < stored_bytes(&full),
        "{third}\n{full}"
    );
    restores(&record, &second, "0,1");
    let target = record.target("verified");
    record
        .anywhen
        .restore(&target, &["--backup", id(&first), "--immediate"]);
    assert_verified(&target);
    // nothing is left of what nobody needs
    let needed: std::collections::BTreeSet<String> = record.anywhen.json(&["list"])["backups"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|backup| {
            let path = system_dir
                .join("backups")
                .join(id(backup))
                .join("backup.json");
            let backup: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
            let shared = backup["shared_packs"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            let owners = shared
                .iter()
                .map(|packs| packs["backup"].as_str().unwrap().to_owned());
            owners.chain([id(&backup).to_owned()]).collect::<Vec<_>>()
        })
        .collect();
    for folder in fs::read_dir(system_dir.join("packs")).unwrap() {
        let folder = folder.unwrap();
        let is_empty = files_below(&folder.path()).is_empty();
        let name = folder.file_name().into_string().unwrap();
        assert!(
            is_empty || needed.contains(&name),
            "{name} is needed by nobody"
        );
    }
}

/// A backup whose connection is cut when most of it has come.
fn cut_off(record: &Record) {
    let proxy = Proxy::to(record.server.port());
    let mut command =
        record
            .anywhen
            .command(&["backup", "--checkpoint", "fast", "--max-rate", "4M"]);
    command.args(["-d", &proxy.conninfo()]);
    let mut sql = record.server.sql();
    let under_way = "select count(*) from pg_stat_progress_basebackup";
    eventually("the server has noticed the last cut", || {
        value(&mut sql, under_way) == "0"
    });
    let mut backup = record.anywhen.launch(command);
    let most = "select count(*) from pg_stat_progress_basebackup
         where backup_streamed > backup_total * 0.7";
    eventually("most of it has come", || value(&mut sql, most) == "1");
    assert!(proxy.cut() > 0);
    let status = backup.end("a backup that was cut off");
    let said = backup.stderr();
    assert_eq!(status.code(), Some(4), "{said}");
    assert!(
        said.contains("is not stored again by the next backup"),
        "{said}"
    );
}

/// A backup that says this.
fn taken(record: &Record, words: &str) -> Value {
    let command = ["backup", "--checkpoint", "fast", "--json"];
    let taken = record.anywhen.run_on(&record.server, &command).succeeded();
    taken.says(&[words]);
    taken.document()
}

/// An archiver that cannot read what it has written, as one should be, has no need to store it twice.
#[test]
fn an_archiver_with_recipients_alone_compares_with_what_it_keeps_in_its_state_dir() {
    let record = with_rows_on(Ground::on_disk());
    let state = record.ground.make_dir("archiver", 0o700);
    let take = || {
        let mut command = record
            .anywhen
            .command(&["backup", "--checkpoint", "fast", "--json"]);
        command.args(["-d", &record.server.conninfo()]);
        command.env("ANYWHEN_RECIPIENTS", &Identity::get().recipient);
        command.env_remove("ANYWHEN_IDENTITY_FILE");
        command.env("ANYWHEN_STATE_DIR", &state);
        let ended = record.anywhen.run_command(command).succeeded();
        let said = ended.stderr.contains("everything is stored anew");
        // with the day its key goes
        fs::remove_dir_all(state.join("keys")).unwrap();
        (ended.document(), said)
    };
    fill_a_file_list(&record.server);
    let (first, _) = take();
    let kept = || {
        let kept = files_below(&state.join("manifests"));
        let count = kept.len();
        let of = |path: &std::path::PathBuf| path.parent().unwrap().file_name().unwrap().to_owned();
        let ids: std::collections::BTreeSet<_> = kept.iter().map(of).collect();
        (
            count,
            ids.into_iter()
                .map(|id| id.into_string().unwrap())
                .collect::<Vec<_>>(),
        )
    };
    assert_eq!(kept(), (2, vec![id(&first).to_owned()]));
    let (second, said) = take();
    assert!(!said);
    assert!(
        stored_bytes(&second) * 10 < stored_bytes(&first),
        "{second}\n{first}"
    );
    assert_eq!(kept(), (2, vec![id(&second).to_owned()]));
    for path in files_below(&state.join("manifests")) {
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let mut bytes = fs::read(&path).unwrap();
        bytes[100] ^= 1;
        fs::write(path, bytes).unwrap();
    }
    let (third, said) = take();
    assert!(said, "what was changed was believed");
    assert!(
        stored_bytes(&third) * 10 > stored_bytes(&first) * 9,
        "{third}\n{first}"
    );
    // whoever has the identity restores what was shared
    let target = record.target("restored");
    let mut restore = record
        .anywhen
        .command(&["restore", "--backup", id(&second), "--immediate"]);
    restore.arg("-D").arg(&target);
    restore.env("ANYWHEN_IDENTITY_FILE", &Identity::get().file);
    record.anywhen.run_command(restore).succeeded();
    assert_verified(&target);
}

/// What was to be encrypted is never left plain because it lay there plain before.
#[test]
fn an_encrypted_backup_refers_to_nothing_that_is_plain() {
    let record = with_rows_on(Ground::on_disk());
    let plain = record.anywhen.backup(&record.server);
    let Identity { recipient, file } = Identity::get();
    let table = format!(
        "[repository.here]\nurl = \"{}\"\nrecipients = [\"{recipient}\"]\nidentity_file = \"{}\"\naccept_plain = true\n",
        record.anywhen.url(),
        file.display()
    );
    let url = record.anywhen.url().to_owned();
    let encrypting = Anywhen::with_table(&record.ground, "encrypting", url, &table);
    let sealed = encrypting.backup(&record.server);
    assert!(
        stored_bytes(&sealed) * 10 > stored_bytes(&plain) * 9,
        "{sealed}\n{plain}"
    );
    let packs = system_dir(&record.anywhen, &record.server).join("packs");
    let packs = files_below(&packs.join(id(&sealed)));
    assert!(!packs.is_empty());
    assert!(
        packs.iter().all(|pack| is_sealed(pack) == Some(true)),
        "{packs:?}"
    );
    let again = encrypting.backup(&record.server);
    assert!(
        stored_bytes(&again) * 10 < stored_bytes(&sealed),
        "{again}\n{sealed}"
    );
    let target = record.target("restored");
    encrypting.restore(&target, &["--backup", id(&again), "--immediate"]);
    assert_verified(&target);
}

/// Whoever is a recipient now must be able to read all of a backup, also what an earlier one has stored.
#[test]
fn a_backup_refers_to_nothing_that_a_new_recipient_cannot_open() {
    let record = with_rows_on(Ground::on_disk());
    let old = Identity::get();
    let new = Identity::new(&record.ground.path("new-identity"));
    let both = fs::read_to_string(&old.file).unwrap() + &fs::read_to_string(&new.file).unwrap();
    let both = record.ground.write("both", &both, 0o600);
    let archiver = |name: &str, recipient: &str, identity: &Path| {
        let url = record.anywhen.url().to_owned();
        let table = format!(
            "[repository.here]\nurl = \"{url}\"\nrecipients = [\"{recipient}\"]\nidentity_file = \"{}\"\n",
            identity.display()
        );
        Anywhen::with_table(&record.ground, name, url, &table)
    };
    let before = archiver("before", &old.recipient, &old.file);
    let first = before.backup(&record.server);
    // the key of the day would be handed to the new one too
    fs::remove_dir_all(record.ground.path("state")).unwrap();
    let after = archiver("after", &new.recipient, &both);
    let command = ["backup", "--checkpoint", "fast", "--json"];
    let taken = after.run_on(&record.server, &command).succeeded();
    taken.says(&[
        "not encrypted to every recipient",
        id(&first),
        "keys rotate",
    ]);
    let second = taken.document();
    assert!(
        stored_bytes(&second) * 10 > stored_bytes(&first) * 9,
        "{second}\n{first}"
    );
    let third = after.backup(&record.server);
    assert!(
        stored_bytes(&third) * 10 < stored_bytes(&first),
        "{third}\n{first}"
    );
    // and whoever has the new identity alone restores it
    let alone = archiver("alone", &new.recipient, &new.file);
    let target = record.target("restored");
    alone.restore(&target, &["--backup", id(&third), "--immediate"]);
    assert_verified(&target);
}
