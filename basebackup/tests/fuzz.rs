//! Fuzz targets: each a `fn(&[u8])` that may not panic on any bytes. They run on stable Rust, over
//! `tests/corpus/<target>/` and then over seeded mutations of it for `ANYWHEN_FUZZ_SECONDS` (1 s
//! each unless set). A failure prints the seed; `ANYWHEN_FUZZ_SEED` repeats it.

#[expect(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    clippy::print_stderr,
    reason = "the fuzz loop reads its corpus, looks at the clock and prints its seed; the crate does none of these"
)]
mod driver {
    use std::path::Path;
    use std::time::{Duration, Instant};

    const LENGTH_MAX: usize = 64 * 1024;

    /// Runs `target` over `samples`, its corpus, and mutations of both.
    pub(crate) fn run(name: &str, samples: Vec<Vec<u8>>, target: fn(&[u8])) {
        let mut inputs = samples;
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/corpus")
            .join(name);
        let mut paths: Vec<_> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        paths.sort();
        inputs.extend(paths.iter().map(|path| std::fs::read(path).unwrap()));
        for input in &inputs {
            target(input);
        }
        let seconds = setting("ANYWHEN_FUZZ_SECONDS").unwrap_or(1);
        let seed = setting("ANYWHEN_FUZZ_SEED")
            .unwrap_or_else(|| u64::from(std::process::id()).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        eprintln!("{name}: ANYWHEN_FUZZ_SEED={seed}");
        let mut random = Random(seed | 1);
        let begun = Instant::now();
        let mut runs = 0_u64;
        while begun.elapsed() < Duration::from_secs(seconds) {
            let mut input = inputs[random.below(inputs.len())].clone();
            for _ in 0..=random.below(4) {
                mutate(&mut input, &inputs, &mut random);
            }
            target(&input);
            runs += 1;
        }
        eprintln!("{name}: {runs} mutations");
        assert!(runs > 0 || seconds == 0, "nothing was tried");
    }

    fn setting(name: &str) -> Option<u64> {
        std::env::var(name).ok().map(|value| value.parse().unwrap())
    }

    fn mutate(input: &mut Vec<u8>, inputs: &[Vec<u8>], random: &mut Random) {
        let at = random.below(input.len() + 1);
        match random.below(7) {
            0 => input.truncate(at),
            1 => input.insert(at, random.byte()),
            2 if at < input.len() => input[at] ^= 1 << random.below(8),
            3 if at < input.len() => input[at] = random.byte(),
            4 if at < input.len() => {
                // Lengths and blanks are four bytes wide.
                let word = [0, 1, 0x7FFF_FFFF, u32::MAX, 512, 0x2020_2020][random.below(6)];
                for (byte, new) in input[at..].iter_mut().zip(word.to_le_bytes()) {
                    *byte = new;
                }
            }
            5 if at < input.len() => {
                let end = at + 1 + random.below(input.len() - at);
                input.drain(at..end);
            }
            _ => {
                let other = &inputs[random.below(inputs.len())];
                let start = random.below(other.len() + 1);
                let end = start + random.below(other.len() - start + 1);
                input.splice(at..at, other[start..end].iter().copied());
            }
        }
        input.truncate(LENGTH_MAX);
    }

    /// xorshift64*: small, and the same on every machine.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
        }

        fn below(&mut self, end: usize) -> usize {
            usize::try_from(self.next() % (end as u64)).unwrap()
        }

        fn byte(&mut self) -> u8 {
            self.next().to_le_bytes()[0]
        }
    }
}

use basebackup::page::{PageVerdict, check_page};
use basebackup::stream::{Events, Form, Tablespace};
use basebackup::{BackupLabel, BlockLayout, ControlFile, Manifest, tablespace_map};
use wal::{Lsn, Major};

use crate::{archives, golden, tar_header};

#[test]
fn tar_survives_any_bytes() {
    let mut archive = tar_header(b"base/", b'5', 0, b"").to_vec();
    archive.extend_from_slice(&tar_header(b"base/1", b'0', 3, b""));
    archive.extend_from_slice(&[1; 3]);
    archive.resize(archive.len() + 509 + 1024, 0);
    driver::run("tar", vec![archive], |bytes| {
        // The verdict does not depend on the cut.
        assert_eq!(archives::read(bytes, 7), archives::read(bytes, 1000));
    });
}

#[test]
fn stream_survives_any_bytes() {
    let messages = b"n5.tar\0/a\0\xFFd123\xFFnbase.tar\0\0\xFFm\xFFd{}".to_vec();
    driver::run("stream", vec![messages], |bytes| {
        for form in [Form::Typed, Form::PerArchive] {
            let row = |oid| Tablespace {
                oid,
                location: None,
                size_kib: None,
            };
            let mut events = Events::new(form, vec![row(Some(5)), row(None)]).unwrap();
            for message in bytes.split(|byte| *byte == 0xFF) {
                let failed = match message {
                    b"H" => events.copy_out_begins().is_err(),
                    b"c" => events.copy_out_ends().is_err(),
                    _ => events.copy_data(message).is_err(),
                };
                if failed && events.copy_out_begins().is_err() {
                    return;
                }
            }
            drop(events.finish());
        }
    });
}

#[test]
fn label_survives_any_bytes() {
    driver::run("label", vec![], |bytes| {
        let label = BackupLabel::parse(bytes).ok();
        let full = BackupLabel::without_increment(bytes).ok();
        let expected = label.map(|label| BackupLabel {
            incremental: None,
            ..label
        });
        assert_eq!(
            full.map(|full| BackupLabel::parse(&full).unwrap()),
            expected
        );
    });
}

#[test]
fn tablespace_map_survives_any_bytes() {
    driver::run("tablespace_map", vec![], |bytes| {
        for major in [Major::V13, Major::V18] {
            let links = tablespace_map::parse(bytes, major).unwrap_or_default();
            let length: usize = links.iter().map(|link| link.location.len()).sum();
            assert!(length <= bytes.len());
        }
    });
}

#[test]
fn manifest_survives_any_bytes() {
    driver::run("manifest", vec![], |bytes| {
        // A changed manifest fails on its checksum: what lies behind it is tried with a right one.
        let text = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let end = text
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        drop(Manifest::parse(bytes, 1 << 20));
        let sealed = crate::server_manifest::sealed_bytes(&bytes[..end]);
        let whole = Manifest::parse(&sealed, 1 << 20);
        // What is read by line is read as JSON, and says the same.
        if let Ok(manifest) = crate::streamed::read(&sealed, 100) {
            assert_eq!(whole.as_ref().unwrap(), &manifest);
        }
        if let Ok(manifest) = whole {
            assert_eq!(
                Manifest::parse(&manifest.write(), 1 << 22).unwrap(),
                manifest
            );
        }
    });
}

#[test]
fn increment_survives_any_bytes() {
    driver::run("increment", vec![], |bytes| {
        let layout = BlockLayout::new(1024, 20).unwrap();
        let whole = crate::increments::read(bytes, layout, usize::MAX);
        // The verdict does not depend on the cut.
        assert_eq!(crate::increments::read(bytes, layout, 3), whole);
        if let Ok((header, blocks)) = whole {
            assert_eq!(blocks.len(), header.blocks().len() * 1024);
            assert!(header.rebuilt_blocks() <= 20);
        }
    });
}

#[test]
fn page_survives_any_bytes() {
    let sample = golden(Major::V18, "pages.zst")[..8192].to_vec();
    driver::run("page", vec![sample, vec![0; 1024]], |bytes| {
        for start in [0, 1 << 20, u64::MAX] {
            let verdict = check_page(bytes, 0, Lsn::new(start));
            assert!(verdict != PageVerdict::New || bytes.iter().all(|byte| *byte == 0));
        }
    });
}

#[test]
fn control_survives_any_bytes() {
    let samples = Major::ALL.map(|major| golden(major, "pg_control")).to_vec();
    driver::run("control", samples, |bytes| {
        drop(ControlFile::parse(bytes));
        // Behind the checksum.
        for at in [288, 292, 308] {
            let mut sealed = bytes.to_vec();
            if let Some(field) = sealed.get_mut(at..at + 4) {
                field.copy_from_slice(&crc32c::crc32c(&bytes[..at]).to_le_bytes());
                drop(ControlFile::parse(&sealed));
            }
        }
    });
}
