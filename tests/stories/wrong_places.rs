//! Addresses and stores that cannot work: one sentence that says what is wrong, a hint, the exit code of
//! DESIGN.md; and addresses that look wrong and work.

use std::fs;
use std::process::Command;

use crate::anywhen::{Anywhen, Ended};
use crate::ground::{Ground, command};
use crate::judge::End;
use crate::objects::{assert_all_whole, files_below};
use crate::record::Record;
use crate::server::Options;

/// Asserts on an error of one sentence with a hint.
#[track_caller]
fn refused(ended: &Ended, code: i32, words: &[&str]) {
    ended.failed_with(code);
    ended.says(words);
    let said = |prefix: &str| {
        ended
            .stderr
            .lines()
            .filter(|line| line.starts_with(prefix))
            .count()
    };
    assert_eq!((said("anywhen: "), said("hint: ")), (1, 1), "{ended}");
    assert!(
        !ended.stderr.contains("stories-secret"),
        "a secret is shown: {ended}"
    );
}

fn list_at(anywhen: &Anywhen, url: &str) -> Command {
    let mut list = anywhen.bare();
    list.args(["list", "--repo", url, "--cluster", "main"]);
    list
}

#[test]
fn an_address_that_makes_no_sense_says_what_one_looks_like() {
    let ground = Ground::on_disk();
    let anywhen = Anywhen::new(&ground);
    for (url, named) in [
        ("ftp://host/backups", "ftp"),
        ("s3:///prefix", "bucket"),
        ("s3://", "bucket"),
        ("gs:///prefix", "bucket"),
        ("az:///prefix", "container"),
        ("s3://bucket/a/../../b", ".."),
        ("file:///a/../b", ".."),
        ("backups/here", "backups/here"),
        ("", ""),
    ] {
        let ended = anywhen.run_command(list_at(&anywhen, url));
        refused(&ended, 2, &[named]);
    }
}

/// A file in the place of the folder would pass for a repository in which nothing is stored yet.
#[test]
fn a_file_is_no_repository() {
    let record = Record::on(Ground::on_disk(), &Options::default());
    let anywhen = &record.anywhen;
    let file = record.ground.write("file", "no folder", 0o600);
    let file = file.to_str().unwrap();
    refused(
        &anywhen.run_command(list_at(anywhen, file)),
        2,
        &["is not a folder"],
    );
    for arguments in [
        &["status"][..],
        &["restore", "-D", "/nowhere/target"],
        &["backup"],
        &["stream", "--no-slot"],
    ] {
        let mut command = anywhen.bare();
        let url = format!("file://{file}");
        command.args(arguments).args(["--repo", &url]);
        command.args(["-d", &record.server.conninfo()]);
        let ended = anywhen.run_command(command);
        refused(&ended, 2, &["is not a folder"]);
    }
}

/// Each of them is another remedy: a name, a key, a clock, a region, a right.
#[test]
fn each_refusal_of_a_store_is_told_apart() {
    let mut ground = Ground::on_s3();
    let anywhen = Anywhen::new(&ground);
    let missing = anywhen.run_command(list_at(&anywhen, "s3://no-such-bucket/prefix"));
    refused(&missing, 4, &["bucket", "no-such-bucket"]);

    let mut wrong_secret = list_at(&anywhen, anywhen.url());
    wrong_secret.env("AWS_SECRET_ACCESS_KEY", "not-the-secret");
    let denied = anywhen.run_command(wrong_secret);
    refused(&denied, 4, &["denied", "AWS_SECRET_ACCESS_KEY"]);
    assert!(!denied.stderr.contains("not-the-secret"), "{denied}");
    let mut wrong_key = list_at(&anywhen, anywhen.url());
    wrong_key.env("AWS_ACCESS_KEY_ID", "nobody");
    refused(&anywhen.run_command(wrong_key), 4, &["denied"]);

    for (code, words) in [
        ("RequestTimeTooSkewed", &["clock"][..]),
        ("PermanentRedirect", &["region", "eu-west-1"]),
        ("AuthorizationHeaderMalformed", &["region", "eu-west-1"]),
        ("AccessDenied", &["denied"]),
    ] {
        ground.endpoint_mut().kill9();
        let flags = ["--answer", code, "--region", "eu-west-1"];
        ground.endpoint_mut().go_on(&flags);
        refused(&anywhen.run(&["list"]), 4, words);
    }
}

/// Keys that may read and not write are common; a backup that ran for hours must not be the one to find
/// out, and nothing may be left behind.
#[test]
fn keys_that_may_only_read_are_found_out_before_the_backup() {
    let mut record = Record::on(Ground::on_s3(), &Options::default());
    record.ground.endpoint_mut().kill9();
    let flags = ["--answer", "AccessDenied", "--answer-to", "writes"];
    record.ground.endpoint_mut().go_on(&flags);
    for command in ["backup", "stream"] {
        let ended = record.anywhen.run_on(&record.server, &[command]);
        ended.failed_with(4);
        ended.says(&["denied", "hint"]);
    }
    assert_eq!(files_below(record.anywhen.repository()).len(), 0);
    let slots = "select count(*) from pg_replication_slots";
    assert_eq!(
        record.server.value(slots),
        "0",
        "a slot is left that nothing advances"
    );
}

/// Slashes too many are the same place, in a bucket and in a folder: a second repository beside the first
/// would hold half of the WAL.
#[test]
fn slashes_too_many_lead_to_the_same_repository() {
    let record = Record::of_server(&Options::default());
    record.anywhen.backup(&record.server);
    let expected = record.anywhen.json(&["list"]);
    let (scheme, rest) = record.anywhen.url().split_once("://").unwrap();
    let doubled = rest.trim_start_matches('/').replace('/', "//");
    let root = if rest.starts_with('/') { "/" } else { "" };
    for url in [
        format!("{scheme}://{rest}/"),
        format!("{scheme}://{root}{doubled}//"),
    ] {
        let mut list = record.anywhen.bare();
        list.args(["list", "--json"]);
        for (flag, _, value) in record.anywhen.flags() {
            let value = if flag == "--repo" { url.clone() } else { value };
            list.args([flag, &value]);
        }
        let ended = record.anywhen.run_command(list).succeeded();
        assert_eq!(ended.document(), expected, "{url}");
    }
}

/// Others keep their files in the same bucket, below the same prefix and beside it: they are neither read
/// as ours nor touched.
#[test]
fn files_of_another_tool_are_left_alone() {
    let mut record = Record::of_server(&Options::default());
    let names = [
        "README",
        "archive.info",
        "other/12-1/0000000100000000/000000010000000000000001-abc.gz",
        "main/notes.txt",
        "main/20260101T000000/base.tar",
        "main.old/123/cluster.json",
    ];
    let mut theirs: Vec<String> = names
        .iter()
        .map(|name| format!("repository/{name}"))
        .collect();
    theirs.push("repository2/main/1/cluster.json".to_owned());
    for name in &theirs {
        let folders = name.match_indices('/').map(|(at, _)| &name[..at]);
        for folder in folders {
            record
                .ground
                .make_dir(&record.ground.place_of(folder), 0o700);
        }
        let path = record.ground.place_of(name);
        record.ground.write(&path, "theirs", 0o600);
    }
    record.insert(0);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.anywhen.backup(&record.server);
    record.insert(1);
    record.store_all();
    record.stop_stream();
    record.anywhen.json(&["status"]);
    let list = record.anywhen.json(&["list"]);
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(1), "{list}");
    assert_eq!(record.rows_at("latest", &[], End::Promoted), "0,1");
    for name in &theirs {
        let path = record.ground.path(&record.ground.place_of(name));
        assert_eq!(fs::read_to_string(path).unwrap(), "theirs", "{name}");
    }
}

/// A disk fills up in the middle of something: the file that was being written is not there under its
/// name, the error says so, and with room again the same command works. strace answers for the disk.
#[test]
fn a_full_disk_leaves_no_half_object_and_is_named() {
    let record = Record::on(Ground::on_disk(), &Options::default());
    record.insert(0);
    // strace counts the calls of each thread, and each object is written by one
    for (calls, first) in [
        ("mkdir,mkdirat", 1),
        ("fsync", 1),
        ("fsync", 2),
        ("link,linkat,rename,renameat,renameat2", 1),
    ] {
        let mut backup = record.anywhen.command(&["backup", "--checkpoint", "fast"]);
        backup.args(["-d", &record.server.conninfo()]);
        let mut full = command("strace");
        full.args(["-D", "-f", "-o", "/dev/null", "-e"])
            .arg(format!("trace={calls}"))
            .arg("-e")
            .arg(format!("inject={calls}:error=ENOSPC:when={first}+"))
            .arg(backup.get_program())
            .args(backup.get_args());
        for (name, value) in backup.get_envs() {
            full.env(name, value.unwrap_or_default());
        }
        let ended = record.anywhen.run_command(full);
        ended.failed_with(4);
        ended.says(&["no space", "hint"]);
        if !files_below(record.anywhen.repository()).is_empty() {
            assert_all_whole(record.anywhen.repository());
        }
    }
    record.anywhen.backup(&record.server);
    let list = record.anywhen.json(&["list"]);
    assert_eq!(list["backups"].as_array().map(Vec::len), Some(1), "{list}");
    assert_eq!(record.rows_at("after", &["--immediate"], End::Paused), "0");
}
