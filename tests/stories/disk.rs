//! A disk that forgets at a power cut what was not synced, played from what strace saw: a write is there
//! once its file was synced after it, and a name once its folder was synced after it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::ground::command;

/// The calls that make, write, name and sync files, and `writev`, which speaks to a server.
const CALLS: &str = "trace=open,openat,creat,mkdir,mkdirat,link,linkat,rename,renameat,renameat2,unlink,\
                     unlinkat,rmdir,fsync,fdatasync,syncfs,sync,write,writev,pwrite64,pwritev,pwritev2,\
                     ftruncate,fallocate,copy_file_range,sendto,sendmsg";

/// The same command with its calls written to `log`. It stays the child of its caller.
pub(crate) fn traced(traced: &Command, log: &Path) -> Command {
    let mut strace = command("strace");
    strace
        .args(["-D", "-f", "--seccomp-bpf", "-y", "-xx", "-s", "1048576"])
        .args(["-e", CALLS, "-o"])
        .arg(log)
        .arg(traced.get_program())
        .args(traced.get_args());
    for (name, value) in traced.get_envs() {
        match value {
            Some(value) => strace.env(name, value),
            None => strace.env_remove(name),
        };
    }
    strace
}

/// One line of a trace, or two that belong together: when the call began is when it may first have
/// taken effect, and when it returned is when it surely had.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// Paths and strings in their order, of arguments and of what descriptors are open on.
    pub(crate) strings: Vec<Vec<u8>>,
    text: String,
    began: usize,
}

/// What a trace says, in the order of its lines.
#[derive(Debug, Clone)]
pub(crate) enum Event {
    Began(Call),
    /// With what it returned, from `=` on.
    Succeeded(Call),
}

/// The calls of a trace.
pub(crate) fn events(trace: &str) -> Vec<Event> {
    let mut events = Vec::new();
    let mut unfinished: BTreeMap<&str, (usize, String)> = BTreeMap::new();
    for (line_number, line) in trace.lines().enumerate() {
        let (pid, rest) = line.split_once(' ').expect("a process and a call");
        let rest = rest.trim_start();
        if rest.starts_with("+++") || rest.starts_with("---") {
            continue;
        }
        if let Some(begun) = rest.strip_suffix("<unfinished ...>") {
            unfinished.insert(pid, (line_number, begun.to_owned()));
            events.push(Event::Began(Call::parsed(begun, line_number)));
            continue;
        }
        let (began, text) = if let Some(resumed) = rest.strip_prefix("<... ") {
            let (_, end) = resumed.split_once(" resumed>").expect("a resumed call");
            // one that was under way when the tracer came
            let Some((began, begun)) = unfinished.remove(pid) else {
                continue;
            };
            (began, begun + end)
        } else {
            events.push(Event::Began(Call::parsed(rest, line_number)));
            (line_number, rest.to_owned())
        };
        let (_, returned) = text.rsplit_once(" = ").unwrap_or(("", "-1"));
        if !returned.starts_with(['-', '?']) {
            events.push(Event::Succeeded(Call::parsed(&text, began)));
        }
    }
    events
}

impl Call {
    fn parsed(text: &str, began: usize) -> Self {
        let name = text.split('(').next().unwrap().to_owned();
        // what is written to a journal is read whole
        let longest = if name == "pwrite64" { usize::MAX } else { 2048 };
        Self {
            name,
            strings: hex_strings(text, longest),
            text: text.to_owned(),
            began,
        }
    }

    fn path(&self, number: usize) -> PathBuf {
        PathBuf::from(OsString::from_vec(self.strings[number].clone()))
    }

    /// The path that an argument names: relative ones go from the folder before it.
    fn path_at(&self, number: usize) -> PathBuf {
        self.path(number - 1).join(self.path(number))
    }
}

/// Everything in `"…"` and `<…>`, which strace was told to print in hexadecimal: of each the first
/// `longest` bytes.
fn hex_strings(text: &str, longest: usize) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(['"', '<']) {
        let close = if rest[at..].starts_with('"') {
            '"'
        } else {
            '>'
        };
        let Some(length) = rest[at + 1..].find(close) else {
            break;
        };
        let hex = &rest[at + 1..at + 1 + length];
        let bytes = hex.split("\\x").skip(1).take(longest);
        found.push(
            bytes
                .map(|byte| u8::from_str_radix(&byte[..2], 16).unwrap())
                .collect(),
        );
        rest = &rest[at + length + 2..];
    }
    found
}

#[derive(Debug, Clone, Copy)]
struct Name {
    file: usize,
    made: usize,
    synced: bool,
}

/// When a file was last written and last synced, as lines of the trace.
#[derive(Debug, Clone, Copy, Default)]
struct Content {
    written: usize,
    synced: usize,
}

/// The part of a disk below one folder, which was empty or synced when the trace began.
pub(crate) struct Disk {
    root: PathBuf,
    names: BTreeMap<PathBuf, Name>,
    contents: Vec<Content>,
    /// The objects in journals: the journal's path, and when it was written there.
    journaled: BTreeMap<PathBuf, (PathBuf, usize)>,
    /// Their frames: journal, epoch, sequence.
    frames: BTreeMap<(PathBuf, u64, u64), PathBuf>,
    /// The frames of all kinds that were ever written.
    seen: BTreeSet<(PathBuf, u64, u64)>,
    has_journaled: bool,
}

impl Disk {
    pub(crate) fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            names: BTreeMap::new(),
            contents: Vec::new(),
            journaled: BTreeMap::new(),
            frames: BTreeMap::new(),
            seen: BTreeSet::new(),
            has_journaled: false,
        }
    }

    /// Whether `path` and what was written to it would be there after a power cut now, or is put
    /// there from a journal that would be.
    pub(crate) fn keeps(&self, path: &Path) -> bool {
        let journaled = self.journaled.get(path);
        self.keeps_file(path)
            || journaled.is_some_and(|(journal, when)| self.keeps_until(journal, *when))
    }

    /// The objects in journals, which may have no files.
    pub(crate) fn journaled(&self) -> impl Iterator<Item = &Path> {
        self.journaled.keys().map(PathBuf::as_path)
    }

    /// Whether an object was written to a journal.
    pub(crate) fn has_journaled(&self) -> bool {
        self.has_journaled
    }

    /// Whether what was written to a file until then would be there.
    fn keeps_until(&self, path: &Path, when: usize) -> bool {
        let name = self.names.get(path);
        name.is_some_and(|name| name.synced && self.contents[name.file].synced > when)
    }

    fn keeps_file(&self, path: &Path) -> bool {
        let named = path
            .ancestors()
            .take_while(|at| *at != self.root)
            .all(|at| self.names.get(at).is_none_or(|name| name.synced));
        let content = self.names.get(path).map(|name| self.contents[name.file]);
        named && content.is_none_or(|content| content.synced >= content.written)
    }

    /// Every file and folder that was made and is still named.
    pub(crate) fn names(&self) -> impl Iterator<Item = &Path> {
        self.names.keys().map(PathBuf::as_path)
    }

    /// What a call that succeeded has done.
    pub(crate) fn apply(&mut self, call: &Call) {
        let when = call.began;
        match call.name.as_str() {
            "open" | "creat" => self.open(call, call.path(0)),
            "openat" => self.open(call, call.path_at(1)),
            "mkdir" => self.make(call.path(0), when),
            "mkdirat" => self.make(call.path_at(1), when),
            "link" => self.link(&call.path(0), call.path(1), when),
            "linkat" => self.link(&call.path_at(1), call.path_at(3), when),
            "rename" => self.rename(&call.path(0), call.path(1), when),
            "renameat" | "renameat2" => self.rename(&call.path_at(1), call.path_at(3), when),
            "unlink" | "rmdir" => drop(self.names.remove(&call.path(0))),
            "unlinkat" => drop(self.names.remove(&call.path_at(1))),
            "fsync" | "fdatasync" => self.sync(&call.path(0), when),
            "sync" | "syncfs" => self.sync_all(when),
            "pwrite64" => {
                self.write(&call.path(0), when);
                self.journal(call);
            }
            "copy_file_range" => self.write(&call.path(1), when),
            "write" | "writev" | "pwritev" | "pwritev2" | "ftruncate" | "fallocate" => {
                self.write(&call.path(0), when);
            }
            _ => {}
        }
    }

    fn is_inside(&self, path: &Path) -> bool {
        path.starts_with(&self.root) && path != self.root
    }

    fn open(&mut self, call: &Call, path: PathBuf) {
        let made = call.text.contains("O_CREAT") || call.name == "creat";
        if made && !self.names.contains_key(&path) {
            self.make(path, call.began);
        } else if call.text.contains("O_TRUNC") {
            self.write(&path, call.began);
        }
    }

    fn make(&mut self, path: PathBuf, when: usize) {
        if !self.is_inside(&path) {
            return;
        }
        self.contents.push(Content::default());
        let file = self.contents.len() - 1;
        let made = when;
        self.names.insert(
            path,
            Name {
                file,
                made,
                synced: false,
            },
        );
    }

    fn link(&mut self, from: &Path, to: PathBuf, when: usize) {
        let Some(name) = self.names.get(from).copied() else {
            return;
        };
        let (made, synced) = (when, false);
        self.names.insert(
            to,
            Name {
                made,
                synced,
                ..name
            },
        );
    }

    fn rename(&mut self, from: &Path, to: PathBuf, when: usize) {
        self.link(from, to, when);
        self.names.remove(from);
    }

    fn write(&mut self, path: &Path, when: usize) {
        if let Some(name) = self.names.get(path) {
            self.contents[name.file].written = when;
        }
    }

    /// Takes note of the frames that are written to a journal, in whole blocks, some of which were written
    /// before (docs/format.md).
    fn journal(&mut self, call: &Call) {
        let (journal, bytes) = (call.path(0), &call.strings[1]);
        if journal.parent() != Some(&self.root.join(".journal")) {
            return;
        }
        assert!(bytes.len().is_multiple_of(4096), "strace cuts strings off");
        let mut rest = &bytes[..];
        while rest.len() >= 44 {
            let mut length = 8;
            if rest.starts_with(b"ANYWJNL\x01") {
                let path = u16::from_le_bytes(rest[14..16].try_into().unwrap());
                let object = u32::from_le_bytes(rest[16..20].try_into().unwrap());
                let whole = 44 + usize::from(path) + usize::try_from(object).unwrap();
                length = whole.next_multiple_of(8);
                self.frame(&journal, &rest[..length], call.began);
            }
            rest = &rest[length..];
        }
    }

    fn frame(&mut self, journal: &Path, frame: &[u8], when: usize) {
        let number = |at: usize| usize::from(u16::from_le_bytes([frame[at], frame[at + 1]]));
        let long = |at: usize| u64::from_le_bytes(frame[at..at + 8].try_into().unwrap());
        let (kind, length) = (number(12), number(14));
        let path = OsString::from_vec(frame[44..44 + length].to_vec());
        let path = self.root.join(path);
        let id = (journal.to_owned(), long(20), long(28));
        if !self.seen.insert(id.clone()) {
            return;
        }
        match kind {
            1 => {
                self.frames.insert(id, path.clone());
                self.journaled.insert(path, (journal.to_owned(), when));
                self.has_journaled = true;
            }
            4 => {
                let object = usize::try_from(long(16) & 0xFFFF_FFFF).unwrap();
                for run in (44..44 + object).step_by(24) {
                    let (epoch, first, count) = (long(run), long(run + 8), long(run + 16));
                    for sequence in first..first + count {
                        let id = (journal.to_owned(), epoch, sequence);
                        let path = self.frames.remove(&id).expect("a frame that was written");
                        self.journaled.remove(&path);
                    }
                }
            }
            // the half that is filled again was synced file by file, which was seen
            3 | 5 => {}
            other => panic!("a frame of kind {other}"),
        }
    }

    fn sync(&mut self, path: &Path, when: usize) {
        if let Some(name) = self.names.get(path) {
            self.contents[name.file].synced = when;
        }
        for (at, name) in &mut self.names {
            if at.parent() == Some(path) && name.made < when {
                name.synced = true;
            }
        }
    }

    fn sync_all(&mut self, when: usize) {
        for name in self.names.values_mut().filter(|name| name.made < when) {
            name.synced = true;
            self.contents[name.file].synced = when;
        }
    }
}

/// The judge can say no: each step left out is a loss.
#[test]
fn the_disk_forgets_what_was_not_synced() {
    let hex = |text: &str| {
        let bytes: Vec<String> = text.bytes().map(|byte| format!("\\x{byte:02x}")).collect();
        bytes.concat()
    };
    let at = |path: &str| format!("AT_FDCWD<{}>, \"{}\"", hex("/"), hex(path));
    let (staged, path) = (hex("/r/d/new#1"), "/r/d/new");
    let steps = [
        format!("1 mkdir(\"{}\", 0700) = 0", hex("/r/d")),
        format!("1 fsync(9<{}>) = 0", hex("/r")),
        format!(
            "1 openat({}, O_RDWR|O_CREAT|O_EXCL, 0666) = 9<{staged}>",
            at("/r/d/new#1")
        ),
        format!("1 write(9<{staged}>, \"{}\", 1) = 1", hex("x")),
        format!("2 fsync(9<{staged}> <unfinished ...>\n2 <... fsync resumed>) = 0"),
        format!("1 linkat({}, {}, 0) = 0", at("/r/d/new#1"), at(path)),
        format!("1 fsync(9<{}>) = 0", hex("/r/d")),
        format!("1 unlink(\"{staged}\") = 0"),
    ];
    let kept = |left_out: Option<usize>| {
        let steps = steps.iter().enumerate();
        let trace: Vec<String> = steps
            .map(|(number, step)| match left_out {
                Some(left_out) if left_out == number => "1 sync_file_range() = 0".to_owned(),
                _ => step.clone(),
            })
            .collect();
        let mut disk = Disk::new(Path::new("/r"));
        for event in events(&trace.join("\n")) {
            if let Event::Succeeded(call) = event {
                disk.apply(&call);
            }
        }
        disk.names.contains_key(Path::new(path)) && disk.keeps(Path::new(path))
    };
    assert!(kept(None));
    for sync in [1, 4, 6] {
        assert!(!kept(Some(sync)), "not missed: {}", steps[sync]);
    }
}

/// An object in a journal that was synced is put right; one in a journal that was not is lost.
#[test]
fn the_disk_keeps_what_a_synced_journal_has() {
    let hex = |bytes: &[u8]| {
        let bytes: Vec<String> = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
        bytes.concat()
    };
    let at = |path: &str| format!("AT_FDCWD<{}>, \"{}\"", hex(b"/"), hex(path.as_bytes()));
    let journal = hex(b"/r/.journal/2-0");
    let mut frame = b"ANYWJNL\x01....\x01\0\x03\0".to_vec();
    frame.resize(44, 0);
    frame.extend(b"d/xthe object");
    frame.resize(4096, 0);
    let steps = [
        format!("1 fsync(9<{}>) = 0", hex(b"/r/.journal")),
        format!(
            "1 pwrite64(9<{journal}>, \"{}\", 4096, 0) = 4096",
            hex(&frame)
        ),
        format!("1 fdatasync(9<{journal}>) = 0"),
    ];
    let kept = |left_out: Option<usize>| {
        let made = [
            format!(
                "1 openat({}, O_RDWR|O_CREAT, 0600) = 9<{journal}>",
                at("/r/.journal/2-0")
            ),
            format!("1 openat({}, O_RDWR|O_CREAT, 0600) = 8", at("/r/d/x")),
            format!("1 write(8<{}>, \"\", 1) = 1", hex(b"/r/d/x")),
        ];
        let steps = steps.iter().enumerate();
        let done = steps.filter(|(number, _)| Some(*number) != left_out);
        let trace: Vec<String> = made
            .into_iter()
            .chain(done.map(|(_, step)| step.clone()))
            .collect();
        let mut disk = Disk::new(Path::new("/r"));
        for event in events(&trace.join("\n")) {
            if let Event::Succeeded(call) = event {
                disk.apply(&call);
            }
        }
        disk.keeps(Path::new("/r/d/x"))
    };
    assert!(kept(None));
    for (number, step) in steps.iter().enumerate() {
        assert!(!kept(Some(number)), "not missed: {step}");
    }
}
