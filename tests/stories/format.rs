//! docs/format.md is held to the code: a reader that was written from it alone, in another language,
//! gets back what Anywhen stored. Should Anywhen vanish, the data does not.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use crate::anywhen::Anywhen;
use crate::ground::{
    Environment, Ground, command, eventually, give, shared_folder, write_as_account,
};
use crate::judge::{End, assert_verified, moments, start_restored};
use crate::objects::{files_below, stored_segments, system_dir};
use crate::record::Record;
use crate::sealed::Identity;
use crate::server::{Options, value};
use crate::workloads::fill_a_file_list;

const DOCUMENT: &str = include_str!("../../docs/format.md");
const READER: &str = include_str!("../../docs/reader/anywhen_reader.py");

/// What the reader says of damage, and of everything else that is not "found" or "not stored".
const REFUSED: i32 = 200;
/// Of the document's examples.
const SYSTEM: &str = "7710446195935103786";

/// A file of settings outside of the data directory, and what it holds.
const OUTSIDE: &str = "outside.conf";
const OUTSIDE_SETTINGS: &[u8] = b"# gr\xf6\xdfer\nwork_mem = '5MB'\n";

/// A repository with a backup, complete segments and pieces, whose stream has stopped.
struct Stored {
    record: Record,
    /// What a folder's repository is encrypted with; that in a bucket always is.
    encryption: Environment,
    identity: Option<&'static Path>,
    backup: String,
}

/// What a command is told that encrypts, and reads what is encrypted, in a folder.
fn encryption() -> Environment {
    let Identity { recipient, file } = Identity::get();
    vec![
        ("ANYWHEN_RECIPIENTS", recipient.clone()),
        ("ANYWHEN_IDENTITY_FILE", file.display().to_string()),
    ]
}

impl Stored {
    /// As repositories are where the story runs: plain in a folder, encrypted in a bucket.
    fn as_usual() -> Self {
        Self::new(vec![])
    }

    /// Encrypted in a folder.
    fn encrypted() -> Self {
        Self::new(encryption())
    }

    fn new(encryption: Environment) -> Self {
        let ground = Ground::new();
        let outside = ground.path(OUTSIDE);
        write_as_account(&outside, OUTSIDE_SETTINGS, 0o600);
        let options = Options {
            wal_segment_mib: 1,
            settings: format!("include '{}'", outside.display()),
            ..Options::default()
        };
        let mut record = Record::on(ground, &options);
        let elsewhere = record.ground.make_dir("elsewhere", 0o700);
        let tablespace = format!(
            "create tablespace elsewhere location '{}'",
            elsewhere.display()
        );
        record.server.execute(&tablespace);
        let table = "create table far tablespace elsewhere as select repeat('far', n) from generate_series(1, 99) n";
        record.server.execute(table);
        fill_a_file_list(&record.server);
        record.insert(0);
        let conninfo = record.server.conninfo();
        let of_server = |arguments: &[&str]| {
            let mut command = record.anywhen.command(arguments);
            command.args(["-d", &conninfo]);
            command.envs(encryption.iter().cloned());
            command
        };
        let mut stream = of_server(&["stream", "--flush-interval", "200ms"]);
        if !encryption.is_empty() {
            // without a place for its key, as the backup is, a command keeps the wraps in its objects
            stream.env("ANYWHEN_STATE_DIR", record.ground.make_dir("keys", 0o700));
        }
        record.stream = Some(record.anywhen.stream_of(&record.server, stream));
        // the second one refers to packs of the first
        let [_, backup] = [(); 2].map(|()| {
            let backup = of_server(&["backup", "--checkpoint", "fast", "--json"]);
            record.anywhen.run_command(backup).succeeded().document()
        });
        record.fill_segments(2);
        record.insert(1);
        record.store_all();
        record.stop_stream();
        let is_encrypted = record.ground.endpoint().is_some() || !encryption.is_empty();
        Self {
            record,
            encryption,
            identity: is_encrypted.then(|| Identity::get().file.as_path()),
            backup: backup["id"].as_str().unwrap().to_owned(),
        }
    }

    fn system_dir(&self) -> PathBuf {
        system_dir(&self.record.anywhen, &self.record.server)
    }

    /// `<command> REPO <arguments>` of the reader.
    fn read(&self, name: &str, arguments: &[&str]) -> Read {
        read(
            self.record.anywhen.repository(),
            self.identity,
            name,
            arguments,
        )
    }

    /// `<command> REPO CLUSTER SYSTEM <arguments> -o OUT`; what it wrote is at the path returned.
    fn read_to(&self, out: &str, name: &str, arguments: &[&str]) -> PathBuf {
        let out = self.record.ground.path(out);
        let system = self.record.server.system_id();
        let before: &[&str] = &[self.record.anywhen.cluster, &system];
        let after: &[&str] = &["-o", out.to_str().unwrap()];
        self.read(name, &[before, arguments, after].concat())
            .succeeded();
        out
    }

    /// The path of an object in the repository.
    fn path_of(&self, object: &Path) -> String {
        let path = object.strip_prefix(self.record.anywhen.repository());
        path.unwrap().to_str().unwrap().to_owned()
    }
}

struct Read {
    code: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

impl Read {
    #[track_caller]
    fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self
    }
}

/// Runs the reader, as the account of the stories.
fn read(repository: &Path, identity: Option<&Path>, name: &str, arguments: &[&str]) -> Read {
    let mut reader = command("sh");
    reader.args([
        "-c",
        &format!("exec {} \"$@\"", reader_command(identity)),
        "reader",
    ]);
    reader.arg(name).arg(repository).args(arguments);
    let output = reader.output().unwrap();
    Read {
        code: output.status.code(),
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The reader as a shell's words, where the account of the stories can read it: root's checkout may be
/// closed to it.
fn reader_command(identity: Option<&Path>) -> String {
    static COPY: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    let (python, script) = COPY.get_or_init(|| {
        let packages = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/check/python");
        let python = shared_folder().join("python");
        let copied = Command::new("cp")
            .arg("-a")
            .arg(&packages)
            .arg(&python)
            .status();
        assert!(
            copied.unwrap().success(),
            "no Python with the reader's packages in {}: run ./check, which makes it",
            packages.display()
        );
        let script = shared_folder().join("anywhen_reader.py");
        write_as_account(&script, READER.as_bytes(), 0o644);
        (python.join("bin/python"), script)
    });
    let identity = identity.map(|path| format!(" --identity {}", path.display()));
    let identity = identity.unwrap_or_default();
    format!("{} {}{identity}", python.display(), script.display())
}

#[test]
fn a_reader_written_from_the_document_restores_a_cluster() {
    restores_a_cluster(&Stored::as_usual());
}

#[test]
fn a_reader_written_from_the_document_restores_an_encrypted_cluster() {
    restores_a_cluster(&Stored::encrypted());
}

/// A kill leaves the journal of a local repository, a power cut torn pieces besides. The reader gives the
/// bytes all the same, and leaves the folder to Anywhen, which puts it right before it reads.
#[test]
fn the_reader_plays_back_what_a_power_cut_tore() {
    let mut record = Record::on(Ground::on_disk(), &Options::default());
    let flags = ["--flush-interval", "20ms"];
    record.stream = Some(record.anywhen.stream_with(&record.server, &flags));
    let journals = record.anywhen.repository().join(".journal");
    let journal = || fs::read_dir(&journals).ok()?.next();
    let mut rows = 0..;
    let mut insert = |record: &mut Record| {
        record.insert(rows.next().unwrap());
        record.store_all();
    };
    eventually("a journal is written", || {
        insert(&mut record);
        journal().is_some()
    });
    for _ in 0..20 {
        insert(&mut record);
    }
    let repository = record.anywhen.repository().to_owned();
    let journaled_pieces = || -> Vec<PathBuf> {
        let journal = fs::read(journal().unwrap().unwrap().path()).unwrap();
        let is_journaled = |path: &PathBuf| {
            let path = path.strip_prefix(&repository).unwrap();
            let path = path.to_str().unwrap().as_bytes();
            journal.windows(path.len()).any(|found| found == path)
        };
        files_below(&repository)
            .into_iter()
            .filter(is_journaled)
            .collect()
    };
    eventually("what is not merged has files", || {
        !journaled_pieces().is_empty()
    });
    record.stream.take().unwrap().kill9();
    let system = record.server.system_id();
    let current = "select pg_walfile_name(pg_current_wal_lsn())";
    let current = record.server.value(current);
    let read_segment = |out: &str| {
        let out = record.ground.path(out);
        let (repository, cluster) = (record.anywhen.repository(), record.anywhen.cluster);
        let asked = [cluster, &system, &current, "-o", out.to_str().unwrap()];
        read(repository, None, "segment", &asked).succeeded();
        fs::read(out).unwrap()
    };
    let whole = read_segment("whole");
    let pieces = journaled_pieces();
    assert!(!pieces.is_empty());
    let stored: Vec<Vec<u8>> = pieces.iter().map(|path| fs::read(path).unwrap()).collect();
    for (number, path) in pieces.iter().enumerate() {
        match number % 3 {
            0 => fs::write(path, b"").unwrap(),
            1 => fs::write(path, &stored[number][..100]).unwrap(),
            _ => fs::remove_file(path).unwrap(),
        }
    }
    assert!(read_segment("torn") == whole, "other bytes than before");

    let status = record.anywhen.command(&["status"]);
    record.anywhen.run_command(status).succeeded();
    for (path, bytes) in pieces.iter().zip(stored) {
        let found = fs::read(path).unwrap();
        assert!(found == bytes, "not put right: {}", path.display());
    }
    assert!(read_segment("put right") == whole);
}

fn restores_a_cluster(stored: &Stored) {
    let list = String::from_utf8(stored.read("list", &[]).succeeded().stdout).unwrap();
    assert!(
        list.contains(&format!("backup {} ", stored.backup)),
        "{list}"
    );
    assert_reads_segments(stored);
    let data = assert_reads_backup(stored);

    let reader = reader_command(stored.identity);
    let repository = stored.record.anywhen.repository().display();
    let system = stored.record.server.system_id();
    let cluster = stored.record.anywhen.cluster;
    let settings = format!(
        "restore_command = '{reader} segment {repository} {cluster} {system} %f -o %p'\n\
         recovery_target_timeline = '1'\n"
    );
    let conf = data.join("postgresql.conf");
    let settings = fs::read_to_string(&conf).unwrap() + &settings;
    write_as_account(&conf, settings.as_bytes(), 0o600);
    write_as_account(&data.join("recovery.signal"), b"", 0o600);
    let restored = start_restored(&stored.record.ground, &data, End::Promoted);
    assert_eq!(moments(&restored), "0,1");
    assert_eq!(value(&mut restored.sql(), "select count(*) from far"), "99");
}

fn assert_reads_segments(stored: &Stored) {
    let pg_wal = stored.record.server.data().join("pg_wal");
    let segments = stored_segments(&stored.system_dir());
    assert!(segments.len() >= 3, "{segments:?}");
    for name in segments.keys() {
        let copy = stored.read_to("segment", "segment", &[name]);
        let equal = fs::read(copy).unwrap() == fs::read(pg_wal.join(name)).unwrap();
        assert!(equal, "the bytes of {name} differ");
    }
    // PostgreSQL takes 1 for the end of the archive, which a folder that is not mounted is not
    let system = stored.record.server.system_id();
    for (cluster, code) in [(stored.record.anywhen.cluster, 1), ("nobody", REFUSED)] {
        let absent = [cluster, &system, "0000000100000FFF000000FF", "-o", "absent"];
        assert_eq!(
            stored.read("segment", &absent).code,
            Some(code),
            "{cluster}"
        );
    }
    let current = "select pg_walfile_name(pg_current_wal_lsn())";
    let current = stored.record.server.value(current);
    assert!(!segments.contains_key(&current), "{current} is complete");
    let fetched = stored.record.ground.path("fetched");
    let mut fetch = stored.record.anywhen.command(&["wal-fetch", &current]);
    fetch.arg(&fetched).current_dir(stored.record.server.data());
    fetch.envs(stored.encryption.iter().cloned());
    stored.record.anywhen.run_command(fetch).succeeded();
    let copy = stored.read_to("segment", "segment", &[&current]);
    let equal = fs::read(copy).unwrap() == fs::read(fetched).unwrap();
    assert!(
        equal,
        "the bytes of {current}, put together from pieces, differ"
    );
}

/// Reads the whole backup, and returns the data directory.
fn assert_reads_backup(stored: &Stored) -> PathBuf {
    let oid = "select oid::text from pg_tablespace where spcname = 'elsewhere'";
    let oid = stored.record.server.value(oid);
    let elsewhere = stored.record.ground.path("elsewhere.read");
    let tablespace = format!("{oid}={}", elsewhere.display());
    let arguments = [stored.backup.as_str(), "--tablespace", &tablespace];
    let data = stored.read_to("read", "backup", &arguments);
    assert_verified(&data);
    let far = "select pg_relation_filepath('far')";
    for path in ["global/pg_control", &stored.record.server.value(far)] {
        let file = stored.read_to("file", "file", &[&stored.backup, path]);
        let equal = fs::read(file).unwrap() == fs::read(data.join(path)).unwrap();
        assert!(equal, "the bytes of {path} differ");
    }
    let outside = stored.record.ground.path(OUTSIDE);
    let arguments = [stored.backup.as_str(), outside.to_str().unwrap()];
    let copy = stored.read_to("outside.read", "file", &arguments);
    assert_eq!(fs::read(copy).unwrap(), OUTSIDE_SETTINGS);
    data
}

/// Damage is found, named, and never restored as if it were data: by the second reader too, else it
/// would restore what Anywhen refuses.
#[test]
fn the_reader_refuses_damage() {
    refuses_damage(&Stored::as_usual());
}

#[test]
fn the_reader_refuses_damage_of_what_is_encrypted() {
    let stored = Stored::encrypted();
    // a slip in its path must not look like the wrong identity
    let nowhere = Some(Path::new("/nowhere/identity"));
    let read = read(stored.record.anywhen.repository(), nowhere, "list", &[]);
    assert_eq!(read.code, Some(REFUSED), "{}", read.stderr);
    assert!(
        read.stderr
            .contains("no such identity file: /nowhere/identity"),
        "{}",
        read.stderr
    );
    refuses_damage(&stored);
}

fn refuses_damage(stored: &Stored) {
    const PLACES: u64 = 4;
    for object in one_of_each_kind(&stored.system_dir()) {
        let path = stored.path_of(&object);
        stored.read("cat", &[&path]).succeeded();
        let whole = fs::read(&object).unwrap();
        let last = u64::try_from(whole.len()).unwrap() - 1;
        let file = fs::File::options().write(true).open(&object).unwrap();
        for place in 0..=PLACES {
            let at = last * place / PLACES;
            let byte = whole[usize::try_from(at).unwrap()];
            file.write_all_at(&[byte ^ (1 << place)], at).unwrap();
            let read = stored.read("cat", &[&path]);
            assert_eq!(
                read.code,
                Some(REFUSED),
                "bit {place} of byte {at} of {path}"
            );
            assert!(read.stdout.is_empty(), "damaged bytes were given out");
            file.write_all_at(&[byte], at).unwrap();
        }
        file.set_len(last).unwrap();
        assert_eq!(
            stored.read("cat", &[&path]).code,
            Some(REFUSED),
            "cut short: {path}"
        );
        file.write_all_at(&whole[whole.len() - 1..], last).unwrap();
        let other = object.with_file_name("FFFFFFFFFFFFFFFFFFFFFFFF");
        fs::copy(&object, &other).unwrap();
        give(&other);
        let read = stored.read("cat", &[&stored.path_of(&other)]);
        assert_eq!(read.code, Some(REFUSED), "under another name: {path}");
        fs::remove_file(other).unwrap();
    }
}

/// One container of every kind that the system has.
fn one_of_each_kind(system_dir: &Path) -> Vec<PathBuf> {
    let mut kinds = BTreeSet::new();
    let of_a_new_kind = |path: &PathBuf| {
        header(path).is_some_and(|header| kinds.insert(header["kind"].as_str().unwrap().to_owned()))
    };
    let found = files_below(system_dir)
        .into_iter()
        .filter(of_a_new_kind)
        .collect();
    let expected = ["file_list", "manifest", "pack", "piece", "segment"].map(str::to_owned);
    assert_eq!(kinds, BTreeSet::from(expected));
    found
}

/// An object's header; none of what is no container.
fn header(object: &Path) -> Option<Value> {
    let bytes = fs::read(object).unwrap();
    let line = bytes
        .strip_prefix(b"P*M\x18")?
        .get(4..)?
        .split(|byte| *byte == b'\n')
        .next()?;
    Some(serde_json::from_slice(line).unwrap())
}

fn trailer(object: &Path) -> Value {
    let bytes = fs::read(object).unwrap();
    let (rest, tail) = bytes.split_last_chunk::<16>().unwrap();
    let length = u32::from_le_bytes(tail[..4].try_into().unwrap());
    let text = &rest[rest.len() - usize::try_from(length).unwrap()..];
    serde_json::from_slice(text).unwrap()
}

/// Whoever writes a reader has the document alone: a field that it does not explain is lost to them.
#[test]
fn the_document_explains_every_field_that_is_stored() {
    explains_every_field(&Stored::as_usual());
}

#[test]
fn the_document_explains_every_field_that_is_stored_encrypted() {
    explains_every_field(&Stored::encrypted());
}

fn explains_every_field(stored: &Stored) {
    let mut fields = BTreeSet::new();
    for object in files_below(&stored.system_dir()) {
        let Some(header) = header(&object) else {
            let record = serde_json::from_slice(&fs::read(&object).unwrap()).unwrap();
            add_fields(&record, &mut fields);
            continue;
        };
        if matches!(header["kind"].as_str(), Some("manifest" | "file_list")) {
            let plain = stored
                .read("cat", &[&stored.path_of(&object)])
                .succeeded()
                .stdout;
            for line in plain
                .split(|byte| *byte == b'\n')
                .filter(|line| !line.is_empty())
            {
                add_fields(&serde_json::from_slice(line).unwrap(), &mut fields);
            }
        }
        add_fields(&header, &mut fields);
        add_fields(&trailer(&object), &mut fields);
    }
    assert!(
        fields.contains("segment_bytes") && fields.contains("extents"),
        "{fields:?}"
    );
    assert_eq!(fields.contains("salt"), stored.identity.is_some());
    for field in fields {
        assert_explained(&field);
    }
}

fn add_fields(value: &Value, fields: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                fields.insert(name.clone());
                add_fields(value, fields);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| add_fields(value, fields)),
        _ => {}
    }
}

#[track_caller]
fn assert_explained(field: &str) {
    assert!(
        DOCUMENT.contains(&format!("`{field}`")) || DOCUMENT.contains(&format!("\"{field}\"")),
        "docs/format.md does not explain {field}"
    );
}

/// A number that only the reader's source has is knowledge that the document lacks.
#[test]
fn the_document_has_every_number_and_name_that_the_reader_uses() {
    let mut constants = 0;
    for line in READER.lines() {
        let Some((name, constant)) = line.split_once(" = ") else {
            continue;
        };
        if !name
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte == b'_')
        {
            continue;
        }
        let quoted = constant.split('"').nth(1);
        let text = quoted.map_or(constant, |text| text.trim_end_matches("\\x01"));
        assert!(
            DOCUMENT.contains(text),
            "docs/format.md has no {name}: {text}"
        );
        constants += 1;
    }
    assert!(constants >= 15, "only {constants} constants were found");
    let mut fields = 0;
    for before in ["[\"", ".get(\""] {
        for after in READER.split(before).skip(1) {
            assert_explained(after.split('"').next().unwrap());
            fields += 1;
        }
    }
    assert!(fields >= 30, "only {fields} fields were found");
}

/// An object of the document, from its dump.
fn example(name: &str) -> Vec<u8> {
    let fence = format!("```hexdump {name}\n");
    let (_, dump) = DOCUMENT.split_once(&fence).expect("a dump in the document");
    let (dump, _) = dump.split_once("```").unwrap();
    let mut bytes = Vec::new();
    for line in dump.lines() {
        let (_, hex) = line.split_once(": ").unwrap();
        let digits: String = hex.split("  ").next().unwrap().split(' ').collect();
        let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
        bytes.extend((0..digits.len()).step_by(2).map(byte));
    }
    bytes
}

/// Puts an example where its header says that it was.
fn place_example(anywhen: &Anywhen, name: &str) -> PathBuf {
    let bytes = example(name);
    let line = bytes[8..].split(|byte| *byte == b'\n').next().unwrap();
    let header: Value = serde_json::from_slice(line).unwrap();
    let text = |field: &str| header[field].as_str().unwrap().to_owned();
    let system = anywhen
        .repository()
        .join(text("cluster"))
        .join(text("system_id"));
    assert_eq!(text("system_id"), SYSTEM);
    let path = system.join(text("name"));
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    write_as_account(&path, &bytes, 0o600);
    let record = DOCUMENT
        .split("```json\n")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    assert!(
        record.contains("block_bytes"),
        "cluster.json is the first record: {record}"
    );
    write_as_account(&system.join("cluster.json"), record.as_bytes(), 0o600);
    for folder in crate::objects::folders_below(anywhen.repository()) {
        give(&folder);
    }
    path
}

#[test]
fn the_documents_example_is_an_object() {
    let ground = Ground::new();
    let anywhen = Anywhen::new(&ground);
    let path = place_example(&anywhen, "piece");
    let relative = path
        .strip_prefix(anywhen.repository())
        .unwrap()
        .to_str()
        .unwrap();
    let plain = read(anywhen.repository(), None, "cat", &[relative])
        .succeeded()
        .stdout;
    assert_eq!(plain, crate::objects::unpacked(&path));
    assert_eq!(plain.len(), 104);
}

/// The vector is what the next reader is tested with: both of ours must agree with it.
#[test]
fn the_documents_vector_opens_with_its_key() {
    let ground = Ground::new();
    let anywhen = Anywhen::new(&ground);
    let path = place_example(&anywhen, "sealed");
    let Identity { recipient, file } = Identity::get();
    let row = |name: &str| {
        let (_, row) = DOCUMENT.split_once(&format!("| {name} | `")).unwrap();
        row.split('`').next().unwrap().to_owned()
    };
    let key_id = header(&path).unwrap()["key"].as_str().unwrap().to_owned();
    assert!(
        key_id.ends_with(&format!("-{}", row("fingerprint"))),
        "{key_id}"
    );
    let wraps = ground.make_dir(&format!("repository/keys/{key_id}"), 0o700);
    give(wraps.parent().unwrap());
    wrap(&row("data key"), recipient, &wraps.join("0123456789abcdef"));

    let expected = b"1\t0/3000000\tno recovery target specified\n";
    let relative = path
        .strip_prefix(anywhen.repository())
        .unwrap()
        .to_str()
        .unwrap();
    let repository = anywhen.repository();
    let plain = read(repository, Some(file), "cat", &[relative])
        .succeeded()
        .stdout;
    assert_eq!(plain, expected);
    assert_eq!(
        read(repository, None, "cat", &[relative]).code,
        Some(REFUSED)
    );

    let fetched = ground.path("fetched");
    let mut fetch = anywhen.command(&["wal-fetch", "00000002.history", "--system-id", SYSTEM]);
    fetch.arg(&fetched);
    fetch.envs(encryption());
    anywhen.run_command(fetch).succeeded();
    assert_eq!(fs::read(fetched).unwrap(), expected);
}

/// Wraps a data key as the document says, with age's own command.
fn wrap(data_key: &str, recipient: &str, to: &Path) {
    use std::io::Write as _;
    let mut age = command("age");
    age.args(["--encrypt", "--recipient", recipient, "--output"])
        .arg(to);
    let mut running = age.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = running.stdin.take().unwrap();
    writeln!(input, "{data_key}").unwrap();
    drop(input);
    assert!(running.wait().unwrap().success());
}
