//! The arrows of the house point one way: what a room uses is what the design lets it use.
//!
//! The code is read as text, so an arrow cannot hide behind a path written out in full.
#![expect(
    clippy::unwrap_used,
    reason = "a source that cannot be read fails the test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Which of the root package's modules each may use, besides itself.
const ROOMS: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    (
        "cli",
        &[
            "service", "setup", "backup", "restore", "status", "config", "clock", "error",
        ],
    ),
    ("config", &["error"]),
    (
        "service",
        &[
            "receive",
            "repository",
            "server",
            "clock",
            "exposition",
            "retry",
            "error",
        ],
    ),
    (
        "setup",
        &["server", "repository", "clock", "durable", "retry", "error"],
    ),
    (
        "backup",
        &["receive", "repository", "server", "clock", "retry", "error"],
    ),
    (
        "receive",
        &["repository", "server", "clock", "retry", "error"],
    ),
    (
        "restore",
        &["repository", "server", "clock", "durable", "retry", "error"],
    ),
    ("status", &["repository", "clock", "exposition", "error"]),
    ("repository", &["clock", "durable", "retry", "error"]),
    ("server", &["error"]),
    ("durable", &[]),
    ("exposition", &[]),
    ("retry", &[]),
    ("clock", &[]),
    ("error", &[]),
];

/// Which packages each may use. `restore::replay` alone talks to a server that it started.
const PACKAGES: &[(&str, &[&str])] = &[
    ("wal", &[]),
    ("basebackup", &["wal"]),
    ("container", &[]),
    ("replication", &["wal"]),
    ("root:cli", &["wal"]),
    ("root:service", &["wal"]),
    ("root:setup", &["replication", "wal"]),
    (
        "root:backup",
        &["replication", "basebackup", "container", "wal"],
    ),
    ("root:receive", &["replication", "wal"]),
    ("root:restore", &["basebackup", "container", "wal"]),
    ("root:restore/replay.rs", &["replication"]),
    ("root:status", &["wal"]),
    ("root:repository", &["container", "wal"]),
    ("root:server", &["replication", "wal"]),
];

/// Who alone may name these crates from elsewhere.
const ONLY: &[(&str, &[&str])] = &[("object_store", &["root:repository"])];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
    found
}

/// Code without its comments, which may name anything.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let lines = text
        .lines()
        .map(|line| line.split_once("//").map_or(line, |(code, _)| code));
    lines.collect::<Vec<_>>().join("\n")
}

/// The names that follow `prefix` at the beginning of a path, also within `use` braces.
fn named_after(code: &str, prefix: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices(prefix) {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let word = |text: &str| -> String {
            text.trim_start()
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        };
        match rest.strip_prefix('{') {
            None => found.extend([word(rest)]),
            Some(inner) => {
                let inner = inner.split_once('}').map_or(inner, |(inner, _)| inner);
                found.extend(inner.split(',').map(word));
            }
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

fn uses_crate(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = &code[at + name.len()..];
        let starts = !before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | ':' | '.'));
        let imported = code[..at].ends_with("use ");
        starts && (after.starts_with("::") || (imported && after.starts_with(';')))
    })
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Each source of the root package with the room that it belongs to.
fn root_sources() -> Vec<(String, PathBuf)> {
    let src = root().join("src");
    let room_of = |path: &Path| {
        let below = path.strip_prefix(&src).unwrap();
        let first = below
            .components()
            .next()
            .unwrap()
            .as_os_str()
            .to_str()
            .unwrap();
        first.trim_end_matches(".rs").to_owned()
    };
    sources(&src)
        .into_iter()
        .map(|path| (room_of(&path), path))
        .collect()
}

#[test]
fn rooms_use_only_what_the_design_lets_them() {
    let allowed: BTreeMap<&str, &[&str]> = ROOMS.iter().copied().collect();
    let known: BTreeSet<&str> = allowed.keys().copied().collect();
    let mut wrong = Vec::new();
    let mut arrows = 0;
    for (room, path) in root_sources() {
        if room == "lib" {
            continue;
        }
        let Some(allowed) = allowed.get(room.as_str()) else {
            wrong.push(format!(
                "{}: a room that the design does not have",
                path.display()
            ));
            continue;
        };
        let prefix = if room == "main" {
            "anywhen::"
        } else {
            "crate::"
        };
        for used in named_after(&code(&path), prefix) {
            if !known.contains(used.as_str()) || used == room {
                continue;
            }
            arrows += 1;
            if !allowed.contains(&used.as_str()) {
                wrong.push(format!("{}: {room} -> {used}", path.display()));
            }
        }
    }
    assert!(arrows > 40, "the reader of arrows found only {arrows}");
    assert!(
        wrong.is_empty(),
        "arrows that the design does not have:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn packages_use_only_what_the_design_lets_them() {
    let members = ["wal", "basebackup", "container", "replication"];
    let allowed: BTreeMap<&str, &[&str]> = PACKAGES.iter().copied().collect();
    let mut files: Vec<(String, String, PathBuf)> = Vec::new();
    for member in members {
        let found = sources(&root().join(member).join("src"));
        files.extend(
            found
                .into_iter()
                .map(|path| (member.to_owned(), String::new(), path)),
        );
    }
    for (room, path) in root_sources() {
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        files.push((format!("root:{room}"), format!("root:{room}/{file}"), path));
    }
    let mut wrong = Vec::new();
    let mut arrows = 0;
    for (room, file, path) in files {
        let code = code(&path);
        let of = |key: &str| allowed.get(key).copied().unwrap_or_default();
        for used in members
            .into_iter()
            .filter(|used| *used != room && uses_crate(&code, used))
        {
            arrows += 1;
            if !of(&room).contains(&used) && !of(&file).contains(&used) {
                wrong.push(format!("{}: {room} -> {used}", path.display()));
            }
        }
        for (name, only) in ONLY {
            if uses_crate(&code, name) && !only.contains(&room.as_str()) {
                wrong.push(format!("{}: {room} -> {name}", path.display()));
            }
        }
    }
    assert!(arrows > 20, "the reader of arrows found only {arrows}");
    assert!(
        wrong.is_empty(),
        "arrows that the design does not have:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_reader_of_arrows_sees_what_is_there() {
    let code = "use crate::{error::Error, server};\nlet x = crate::receive::run();\nmycrate::no();";
    let found = named_after(code, "crate::");
    let expected = ["error", "receive", "server"].map(str::to_owned);
    assert_eq!(found, BTreeSet::from(expected));
    assert!(uses_crate("use wal::Lsn;", "wal") && uses_crate("x(wal::Lsn)", "wal"));
    assert!(!uses_crate(
        "self.wal::x; crate::wal::y; let wal = 1;",
        "wal"
    ));
}
