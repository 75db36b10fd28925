//! What scripts and people rely on: exit codes, one JSON document, a quiet standard output.

use std::process::{Command, Stdio};

use crate::anywhen::{Anywhen, binary};
use crate::ground::Ground;
use crate::record::Record;
use crate::server::Options;

#[test]
fn wrong_usage_is_2() {
    let ground = Ground::new();
    let anywhen = Anywhen::new(&ground);
    let target = ground.path("target");
    let target = target.to_str().unwrap();
    for arguments in [
        &["no-such-command"][..],
        &["list", "--no-such-flag"],
        &["restore"],
        &["restore", "-D", target, "--to-lsn", "0/1", "--immediate"],
        &[
            "restore",
            "-D",
            target,
            "--to-time",
            "yesterday evening or so",
        ],
        &["restore", "-D", target, "--to-lsn", "not an LSN"],
        &["list", "--cluster", "Not/A Name"],
    ] {
        let mut command = anywhen.bare();
        command.args(arguments).args(["--repo", anywhen.url()]);
        anywhen.run_command(command).failed_with(2);
    }
    assert!(!ground.path("target").exists());
}

/// Somebody who restores at night reads this one message, and nothing else.
#[test]
fn what_is_mistyped_is_answered_with_what_to_write_instead() {
    let ground = Ground::on_disk();
    let anywhen = Anywhen::new(&ground);
    let file = format!(
        "[repository.here]\nurl = \"{}/\"\n[cluster.main]\nrepositories = [\"here\"]\n",
        anywhen.url()
    );
    let file = ground.write("anywhen.toml", &file, 0o600);
    let config = ["--config", file.to_str().unwrap()];
    let repo = ["--repo", anywhen.url()];
    let restore = ["restore", "-D", "/nowhere"];
    for (command, place, flags, words) in [
        (
            &["status"][..],
            ["--config", "/nowhere/a.toml"],
            &[][..],
            &["/nowhere/a.toml", "hint", "ANYWHEN_CONFIG"][..],
        ),
        (
            &["stream"],
            config,
            &["--spool-dir", "/nowhere", "--spool-bytes-max", "0"],
            &["spool_bytes_max=0", "hint", "10GiB"],
        ),
        (
            &["status"],
            config,
            &["--repository", "there"],
            &["=here", "hint"],
        ),
        (
            &["status"],
            config,
            &["--cluster", "mian"],
            &["=main", "hint"],
        ),
        (
            &["status"],
            ["--repo", "/"],
            &[],
            &["root", "hint", "/srv/anywhen"],
        ),
        (&["list"], ["--repo", "file:///"], &[], &["root", "hint"]),
        (
            &restore,
            repo,
            &["--timeline", "x"],
            &["hint", "status --timelines"],
        ),
        (&restore, repo, &["--to-lsn", "12345"], &["16/B374D848"]),
        (&restore, repo, &["--to-xid", "abc"], &["such as 4711"]),
        (
            &["stream"],
            repo,
            &["--flush-interval", "never"],
            &["1s, 500ms or 5min"],
        ),
        (
            &["stream"],
            repo,
            &["-d", "host=h sslmode=x"],
            &["verify-full", "hint"],
        ),
    ] {
        let mut called = anywhen.bare();
        called.args(command).args(place).args(flags);
        let ended = anywhen.run_command(called);
        ended.failed_with(2);
        ended.says(words);
        for leaked in ["invalid digit", "friendly"] {
            assert!(!ended.stderr.contains(leaked), "{ended}");
        }
    }
}

/// An empty folder looks like a repository in which nothing is stored.
#[test]
fn wrong_settings_leave_no_folder_behind() {
    let ground = Ground::on_disk();
    let anywhen = Anywhen::new(&ground);
    let folder = ground.path("new");
    for flags in [
        ["--recipient", "age1nobody"],
        ["--identity-file", "/nowhere"],
        ["--cluster", "Not/A Name"],
    ] {
        for command in ["stream", "backup"] {
            let mut called = anywhen.bare();
            called.args([command, "-d", "host=/nowhere", "--repo"]);
            called.arg(&folder).args(flags);
            anywhen.run_command(called).failed_with(2);
            assert!(!folder.exists(), "{command} {flags:?}");
        }
    }
    // what mends a repository does not begin one
    let mut called = anywhen.bare();
    called.args(["index", "rebuild", "--repo"]).arg(&folder);
    anywhen.run_command(called).failed_with(4);
    assert!(!folder.exists());
}

/// Called beside the folder, as `stream` may be, `status` must look into the same one.
#[test]
fn a_relative_spool_is_found_from_where_status_is_called() {
    let ground = Ground::on_disk();
    let anywhen = Anywhen::new(&ground);
    // where nothing is stored, only the spool is told of; a file in its place is an error
    ground.write("spool", "", 0o600);
    let mut called = anywhen.command(&["status", "--spool-dir", "spool"]);
    called.current_dir(ground.path(""));
    let ended = anywhen.run_command(called);
    ended.failed_with(3);
    ended.says(&[&format!("{}/main", ground.path("spool").display())]);
    assert!(!ended.stderr.contains("absolute path"), "{ended}");
}

/// Announced in the documents and missing here, a command must not look misspelt.
#[test]
fn a_command_that_is_not_built_yet_says_so() {
    let ground = Ground::new();
    let anywhen = Anywhen::new(&ground);
    let mut command = anywhen.bare();
    command.args(["wal-push", "pg_wal/000000010000000000000001"]);
    let ended = anywhen.run_command(command);
    ended.failed_with(2);
    ended.says(&["wal-push", "not built yet", "hint"]);
}

#[test]
fn an_unknown_key_of_the_configuration_is_refused_with_the_nearest() {
    let ground = Ground::new();
    let anywhen = Anywhen::new(&ground);
    let file = format!(
        "[repository.here]\nurl = \"{}\"\n[cluster.main]\nconection = \"\"\n",
        anywhen.url()
    );
    let file = ground.write("anywhen.toml", &file, 0o600);
    let mut command = anywhen.bare();
    command.args(["list", "--config", file.to_str().unwrap()]);
    let ended = anywhen.run_command(command);
    ended.failed_with(2);
    ended.says(&["conection", "connection"]);
}

/// Every flag has its variable, and a file can stand for both.
#[test]
fn flags_variables_and_a_file_configure_alike() {
    let record = Record::begun(&Options::default());
    let expected = record.anywhen.json(&["list"]);
    let mut by_flag = record.anywhen.bare();
    let mut by_variable = record.anywhen.bare();
    for command in [&mut by_flag, &mut by_variable] {
        command.args(["list", "--json"]);
    }
    for (flag, variable, value) in record.anywhen.flags() {
        by_flag.args([flag, &value]);
        by_variable.env(variable, value);
    }
    for command in [by_flag, by_variable] {
        let ended = record.anywhen.run_command(command).succeeded();
        assert_eq!(ended.document(), expected);
    }
    let file = format!(
        "{}[cluster.main]\nconnection = \"{}\"\n",
        record.anywhen.table("here", &record.ground),
        record.server.conninfo()
    );
    let file = record.ground.write("anywhen.toml", &file, 0o600);
    let mut by_file = record.anywhen.bare();
    by_file.args(["--config", file.to_str().unwrap(), "list", "--json"]);
    assert_eq!(
        record.anywhen.run_command(by_file).succeeded().document(),
        expected
    );
}

/// The fields of DESIGN.md, which scripts rely on.
#[test]
fn json_has_the_promised_fields() {
    let (record, _) = Record::with_four_rows();
    let list = record.anywhen.json(&["list"]);
    assert_eq!(list["schema"], 1);
    let row = &list["backups"][0];
    for text in [
        "id",
        "cluster",
        "system_id",
        "start_lsn",
        "stop_lsn",
        "started_at",
        "finished_at",
        "postgres_version",
    ] {
        assert!(row[text].is_string(), "{text}: {row}");
    }
    for number in ["timeline", "files", "bytes", "stored_bytes"] {
        assert!(row[number].is_u64(), "{number}: {row}");
    }
    assert_eq!(row["system_id"], record.server.system_id());

    let status = record.anywhen.json(&["status"]);
    assert_eq!(status["schema"], 1);
    let cluster = &status["clusters"][0];
    assert_eq!(cluster["name"], "main");
    assert_eq!(cluster["system_id"], record.server.system_id());
    assert_eq!(cluster["backup_count"], 1);
    assert_eq!(cluster["last_backup"], row["id"]);
    assert_eq!(cluster["segment_bytes"], 16 << 20);
    assert_eq!(
        cluster["holes"].as_array().map(Vec::len),
        Some(0),
        "{status}"
    );
    let window = &cluster["windows"][0];
    for text in ["earliest", "latest", "earliest_lsn", "latest_lsn"] {
        assert!(window[text].is_string(), "{text}: {window}");
    }
    assert!(
        cluster["stored"]["wal_bytes"].as_u64() > Some(0),
        "{status}"
    );
    assert!(
        cluster["stored"]["backup_bytes"].as_u64() > Some(0),
        "{status}"
    );
}

/// Logs and progress go to standard error: what a script reads holds nothing else.
#[test]
fn a_failure_is_one_document_too() {
    let ground = Ground::new();
    let anywhen = Anywhen::new(&ground);
    let target = ground.path("target");
    let ended = anywhen.run(&["restore", "-D", target.to_str().unwrap(), "--json"]);
    ended.failed_with(3);
    let failure = ended.document();
    assert!(failure["error"]["kind"].is_string(), "{failure}");
    assert!(failure["error"]["message"].is_string(), "{failure}");
}

/// `anywhen list | head -1` ends without a word about broken pipes.
#[test]
fn a_closed_pipe_ends_quietly() {
    let mut child = Command::new(binary())
        .arg("--help")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}
