//! Keys as an operator has to do with them: made, lost, wrong, renewed, and asked for late.

use std::fs;
use std::path::{Path, PathBuf};

use crate::anywhen::{Anywhen, Ended};
use crate::ground::{Ground, PATIENCE, Programs};
use crate::judge::End;
use crate::objects::{assert_all_whole, files_below, remove_segment, stored_segments, system_dir};
use crate::record::Record;
use crate::sealed::{Identity, is_sealed};
use crate::server::Options;

/// Encryption asked for and not done would be found out when the bucket is stolen.
#[test]
fn everything_in_an_encrypted_repository_is_sealed() {
    let mut record = Record::on(Ground::on_s3(), &Options::default()).begin();
    record.insert(1);
    record.fill_segments(1);
    record.store_all();
    record.stop_stream();
    let files = files_below(record.anywhen.repository());
    let sealed: Vec<bool> = files.iter().filter_map(|path| is_sealed(path)).collect();
    assert!(sealed.len() > 3, "{} containers", sealed.len());
    assert!(
        sealed.iter().all(|sealed| *sealed),
        "an object is not sealed"
    );
    let readable = files.iter().find(|path| {
        let bytes = fs::read(path).unwrap();
        bytes.windows(11).any(|part| part == b"pg_hba.conf")
    });
    assert_eq!(readable, None, "a file's name can be read");
}

/// Public recipients are all that an archiver needs: whoever steals it reads nothing.
#[test]
fn an_archiver_with_recipients_alone_writes_what_only_the_identity_reads() {
    let mut record = Record::on(Ground::on_s3(), &Options::default());
    record.insert(0);
    record.stream = Some(record.anywhen.stream(&record.server));
    record.fill_segments(4);
    record.store_all();
    record.stop_stream();
    let without_identity = |arguments: &[&str]| -> Ended {
        let mut command = record.anywhen.bare();
        command.args(arguments);
        for (flag, _, value) in record.anywhen.flags() {
            // nor does it keep the keys of the day
            if !matches!(flag, "--identity-file" | "--state-dir") {
                command.args([flag, &value]);
            }
        }
        record.anywhen.run_command(command)
    };
    let conninfo = record.server.conninfo();
    for _ in 0..2 {
        let backup = ["backup", "--checkpoint", "fast", "-d", &conninfo];
        without_identity(&backup).succeeded();
    }
    // what it cannot read is no reason for an alarm
    let status = without_identity(&["status"]).succeeded();
    assert!(status.stdout.contains("or later"), "{status}");
    assert_eq!(status.stderr, "", "{status}");
    let target = record.target("refused");
    let restore = ["restore", "-D", target.to_str().unwrap(), "--immediate"];
    let refused = without_identity(&restore);
    refused.failed_with(2);
    refused.says(&["identity", "hint"]);
    assert!(!target.join("global").exists(), "{refused}");
    assert_eq!(record.rows_at("mine", &["--immediate"], End::Paused), "0");

    // a hole is shown to whoever cannot read when it was
    let system = system_dir(&record.anywhen, &record.server);
    let middle = stored_segments(&system).keys().nth(2).unwrap().clone();
    remove_segment(&system, &middle);
    let status = without_identity(&["status"]).succeeded();
    assert!(
        status.stdout.contains("  HOLE        timeline 1, "),
        "{status}"
    );
}

/// Each of them is another mistake, and another remedy.
#[test]
fn a_wrong_a_missing_and_a_lost_key_are_told_apart() {
    let record = Record::on(Ground::on_s3(), &Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    // what this archiver keeps for the day would open it without an identity
    let state = record.ground.path("state");
    fs::remove_dir_all(&state).unwrap();
    let restore = |more: &[&str]| {
        let target = record.target("refused");
        let fixed = ["restore", "-D", target.to_str().unwrap(), "--immediate"];
        let ended = record.anywhen.run(&[&fixed, more].concat());
        assert!(!target.join("global/pg_control").exists(), "{ended}");
        fs::remove_dir_all(target).unwrap_or_default();
        ended
    };
    let stranger = Identity::new(&record.ground.path("stranger"));
    let wrong = restore(&["--identity-file", stranger.file.to_str().unwrap()]);
    wrong.failed_with(2);
    wrong.says(&["identity", "hint"]);
    let nowhere = restore(&["--identity-file", "/nowhere/identity"]);
    nowhere.failed_with(2);
    nowhere.says(&["/nowhere/identity", "hint"]);

    let keys = record.anywhen.repository().join("keys");
    let aside = record.ground.path("aside");
    rustix::fs::rename(&keys, &aside).unwrap();
    let lost = restore(&[]);
    lost.failed_with(5);
    lost.says(&["key", "hint"]);
    rustix::fs::rename(&aside, &keys).unwrap();

    let mut unconfigured = record.anywhen.bare();
    let target = record.target("unconfigured");
    unconfigured
        .args(["restore", "--immediate", "-D"])
        .arg(&target)
        .args(["--repo", record.anywhen.url(), "--cluster", "main"]);
    let unconfigured = record.anywhen.run_command(unconfigured);
    unconfigured.failed_with(2);
    unconfigured.says(&["encrypted", "identity", "hint"]);
    assert_eq!(record.rows_at("mine", &["--immediate"], End::Paused), "0");
}

/// Told that there is no backup, and exit code 0, nobody looks for the copy of the keys while there still
/// is one.
#[test]
fn backups_whose_key_is_lost_are_counted_and_named() {
    let record = Record::on(Ground::on_s3(), &Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    record.anywhen.backup(&record.server);
    // what this archiver keeps for the day would open them
    fs::remove_dir_all(record.ground.path("state")).unwrap();
    let keys = record.anywhen.repository().join("keys");
    let aside = record.ground.path("aside");
    rustix::fs::rename(&keys, &aside).unwrap();
    for command in ["status", "list"] {
        let ended = record.anywhen.run(&[command]);
        ended.failed_with(5);
        ended.says(&["2 backups cannot be read", "restore the folder keys/"]);
        assert!(!ended.stdout.contains("no backups"), "{ended}");
        assert!(!ended.stdout.contains("there is no backup"), "{ended}");
        let ended = record.anywhen.run(&[command, "--json"]);
        ended.failed_with(5);
        let document = ended.document();
        let unreadable = match command {
            "status" => &document["clusters"][0]["unreadable_backups"],
            _ => &document["unreadable_backups"],
        };
        assert_eq!(unreadable.as_array().map(Vec::len), Some(2), "{document}");
        let reason = unreadable[1]["reason"].as_str().unwrap();
        assert!(reason.contains("no wrap of it is stored"), "{document}");
        assert!(unreadable[1]["hint"].is_string(), "{document}");
    }
    rustix::fs::rename(&aside, &keys).unwrap();
    let status = record.anywhen.json(&["status"]);
    assert_eq!(status["clusters"][0]["backup_count"], 2, "{status}");
}

/// Whoever can write to a bucket could plant an object that is not encrypted and have it restored.
#[test]
fn what_is_not_encrypted_is_refused_where_encryption_is_set_up_unless_accepted() {
    let record = Record::on(Ground::on_disk(), &Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    let Identity { recipient, file } = Identity::get();
    let table = format!(
        "[repository.here]\nurl = \"{}\"\nrecipients = [\"{recipient}\"]\nidentity_file = \"{}\"\n",
        record.anywhen.url(),
        file.display()
    );
    let configured = |name: &str, table: &str| {
        let url = record.anywhen.url().to_owned();
        Anywhen::with_table(&record.ground, name, url, table)
    };
    let strict = configured("strict", &table);
    let target = record.target("refused");
    let refused = strict.restore_refused(&target, &["--immediate"], 5);
    refused.says(&["not encrypted", "accept_plain"]);
    for command in ["status", "list"] {
        let ended = strict.run(&[command]);
        ended.failed_with(5);
        ended.says(&["1 backup cannot be read", "accept_plain"]);
    }
    let begun = strict.run_on(&record.server, &["backup", "--checkpoint", "fast"]);
    begun.failed_with(0);
    begun.says(&["is not read any more", "accept_plain"]);
    let status = strict.run(&["status"]);
    status.failed_with(5);
    assert!(status.stdout.contains("restorable"), "{status}");
    // a target of its own fault is not blamed on the backup that is left out
    let beyond = strict.restore_refused(&target, &["--to-lsn", "F/0"], 3);
    let at = |words: &str| beyond.stderr.find(words);
    assert!(at("lies behind what is stored") < at("1 backup cannot be read"));
    assert!(at("1 backup cannot be read").is_some(), "{beyond}");
    let lenient = configured("lenient", &format!("{table}accept_plain = true\n"));
    lenient.restore(&record.target("accepted"), &["--immediate"]);
    // what is written from now on is encrypted
    lenient.backup(&record.server);
    let files = files_below(record.anywhen.repository());
    let sealed = |sealed| {
        let alike = files.iter().filter(|path| is_sealed(path) == Some(sealed));
        alike.count()
    };
    assert!(sealed(true) > 0 && sealed(false) > 0, "{files:#?}");
    lenient.restore(&record.target("both"), &["--immediate"]);
}

/// A new recipient reads what was written before it was known, the old one no longer does, and no data is
/// written anew.
#[test]
fn rotating_hands_the_past_to_a_new_identity_and_rewrites_no_data() {
    let record = Record::on(Ground::on_s3(), &Options::default());
    record.insert(0);
    record.anywhen.backup(&record.server);
    assert_all_whole(record.anywhen.repository());
    let before = data_of(record.anywhen.repository());

    let new = record.ground.make_dir("new keys", 0o700).join("identity");
    let mut generate = record.anywhen.bare();
    generate
        .args(["keys", "generate", "--json", "-o"])
        .arg(&new);
    let made = record.anywhen.run_command(generate).succeeded().document();
    let recipient = made["recipient"].as_str().unwrap();
    // whoever rotates has the old identity and names the new recipient
    let rotate = |dry: &str| {
        let mut rotate = record.anywhen.command(&["keys", "rotate", dry]);
        rotate.args(["--recipient", recipient]);
        record.anywhen.run_command(rotate).succeeded()
    };
    let wraps = || files_below(&record.anywhen.repository().join("keys"));
    let wrapped_before = wraps();
    rotate("--dry-run");
    assert_eq!(wraps(), wrapped_before, "a plan has changed something");
    rotate("--yes");
    assert_ne!(wraps(), wrapped_before, "nothing was wrapped anew");
    assert!(
        data_of(record.anywhen.repository()) == before,
        "data was rewritten"
    );
    // what this archiver keeps for the day would open it without an identity
    fs::remove_dir_all(record.ground.path("state")).unwrap();

    let identity = ["--identity-file", new.to_str().unwrap()];
    let renewed = [
        "--recipient",
        recipient,
        identity[0],
        identity[1],
        "--immediate",
    ];
    assert_eq!(record.rows_at("new", &renewed, End::Paused), "0");
    let target = record.target("old");
    let old = ["restore", "-D", target.to_str().unwrap(), "--immediate"];
    let refused = record.anywhen.run(&old);
    refused.failed_with(2);
    refused.says(&["identity"]);
}

/// The first thing that a person does: keys made by anywhen, and opened by age where anywhen is gone.
#[test]
fn a_generated_identity_is_ages_own_and_never_overwritten() {
    let ground = Ground::on_disk();
    let anywhen = Anywhen::new(&ground);
    let path = ground.make_dir("keys", 0o700).join("identity");
    let generate = || {
        let mut generate = anywhen.bare();
        generate.args(["keys", "generate", "-o"]).arg(&path);
        anywhen.run_command(generate)
    };
    let made = generate().succeeded();
    let said = format!("{}{}", made.stdout, made.stderr);
    let recipient = crate::sealed::recipient_of(&path);
    assert!(said.contains(&recipient), "{made}");
    assert!(!said.contains("AGE-SECRET-KEY"), "{made}");
    let secret = fs::read(&path).unwrap();
    generate().failed();
    assert!(
        fs::read(&path).unwrap() == secret,
        "an identity was overwritten"
    );
}

/// What a newcomer runs first is what is documented, over a bucket and encrypted too.
#[test]
fn the_demo_runs_over_a_bucket_with_recipients() {
    let ground = Ground::on_s3();
    let anywhen = Anywhen::new(&ground);
    let mut demo = anywhen.bare();
    demo.args(["demo", "--pg-bin"]).arg(Programs::get().bin());
    for (flag, _, value) in anywhen.flags() {
        if !matches!(flag, "--cluster" | "--state-dir") {
            demo.args([flag, &value]);
        }
    }
    let mut demo = anywhen.launch(demo);
    let status = demo.end_within(2 * PATIENCE, "the demo");
    assert!(status.success(), "{}{}", demo.stdout(), demo.stderr());
    let bucket = ground.endpoint().unwrap().bucket();
    let repository = anywhen.repository();
    assert!(repository.starts_with(&bucket));
    assert_all_whole(repository);
    let files = files_below(repository);
    let sealed: Vec<bool> = files.iter().filter_map(|path| is_sealed(path)).collect();
    assert!(
        sealed.len() > 3 && sealed.iter().all(|sealed| *sealed),
        "{files:#?}"
    );
}

/// The demo of one's own settings is the first try of them: an endpoint that it did not take from the file
/// would send it to another store, and recipients that it did not take would store in the clear.
#[test]
fn the_demo_takes_what_the_file_says_of_its_repository() {
    let ground = Ground::on_s3();
    let place = crate::endpoint::BUCKET;
    let url = format!("s3://{place}/demo");
    let Identity { recipient, file } = Identity::get();
    let table = format!(
        "[repository.offsite]\nurl = \"{url}\"\nendpoint = \"{}\"\nallow_http = true\n\
         recipients = [\"{recipient}\"]\nidentity_file = \"{}\"\nretry_for = \"1s\"\n",
        ground.endpoint().unwrap().url(),
        file.display()
    );
    let config = ground.write("demo.toml", &table, 0o600);
    let anywhen = Anywhen::new(&ground);
    let demo = |more: &[&str]| {
        let mut demo = anywhen.bare();
        demo.args(["demo", "--pg-bin"]).arg(Programs::get().bin());
        demo.arg("--config").arg(&config).args(more);
        // what the file says must be enough
        demo.env_remove("AWS_ENDPOINT_URL")
            .env_remove("AWS_ALLOW_HTTP");
        let mut demo = anywhen.launch(demo);
        let status = demo.end_within(2 * PATIENCE, "the demo");
        let said = format!("{}{}", demo.stdout(), demo.stderr());
        (status.code(), said)
    };
    let (code, said) = demo(&["--repo", &format!("{url}/")]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains(&format!("stays in {url}/demo_")), "{said}");
    assert!(said.contains(&format!("{url}/keys")), "{said}");
    let repository = ground.path(&ground.place_of("demo"));
    assert_all_whole(&repository);
    let files = files_below(&repository);
    let sealed: Vec<bool> = files.iter().filter_map(|path| is_sealed(path)).collect();
    assert!(
        sealed.len() > 3 && sealed.iter().all(|sealed| *sealed),
        "{files:#?}"
    );

    // a stream that ends is told at once, in its own words, and nothing is said to be stored
    let table = table.replace(&format!("s3://{place}"), "s3://no-such-bucket");
    ground.write("demo.toml", &table, 0o600);
    let (code, said) = demo(&["--repository", "offsite"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("the stream ended") && said.contains("no such bucket"),
        "{said}"
    );
    assert!(!said.contains("stored stays in"), "{said}");

    let (code, said) = demo(&["--json"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("has no document"), "{said}");
}

/// Every object but the wrapped keys, with its bytes.
fn data_of(repository: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    files_below(repository)
        .into_iter()
        .filter(|path| !path.starts_with(repository.join("keys")))
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}
