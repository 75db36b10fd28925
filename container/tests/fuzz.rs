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
                // Lengths and magic numbers are four bytes wide.
                let word = [0, 1, 0x7FFF_FFFF, u32::MAX, 0x184D_2A5E][random.below(5)];
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

use std::sync::LazyLock;

use container::{Decoder, FrameReader, Reading, check_stored, decode, read_header, read_trailer};

use crate::compressed::pack;
use crate::parts::Parts;
use crate::{key, object, plain, plain_reader, sealed_object};

const LIMIT: u64 = 1 << 20;

/// The only objects that were ever sealed with [`key`].
static SEALED: LazyLock<[Vec<u8>; 2]> =
    LazyLock::new(|| [sealed_object(b""), sealed_object(&plain(300))]);

fn objects() -> Vec<Vec<u8>> {
    let frames = pack(&[plain(100), plain(200)], false);
    let plain = [object(b""), object(&plain(300)), frames];
    plain.into_iter().chain(SEALED.clone()).collect()
}

#[test]
fn decode_survives_any_bytes() {
    driver::run("decode", objects(), |bytes| {
        let key = key();
        let whole = decode(bytes, LIMIT, Some(&key));
        // Cut into single bytes, the verdict is the same.
        if bytes.len() < 4096 {
            let mut decoder = Decoder::new(LIMIT, Some(&key)).unwrap();
            let mut out = Vec::new();
            let pushed = bytes
                .iter()
                .try_for_each(|byte| decoder.push(&[*byte], &mut out));
            assert_eq!(
                pushed.and_then(|()| decoder.finish()).is_ok(),
                whole.is_ok()
            );
        }
        if let Ok(object) = whole {
            if object.header.digest_of.is_none() {
                assert_eq!(container::digest(&object.plain), object.trailer.digest);
            }
            let stored = check_stored(bytes).unwrap();
            assert_eq!(stored, (object.header.clone(), object.trailer));
            // What opens is what was sealed, byte for byte.
            assert!(object.header.key.is_none() || SEALED.iter().any(|sealed| sealed == bytes));
        }
    });
}

#[test]
fn check_stored_survives_any_bytes() {
    driver::run("check_stored", objects(), |bytes| {
        if let Ok((header, trailer)) = check_stored(bytes) {
            // The ends by themselves say the same.
            assert!(matches!(read_header(bytes), Ok(Reading::Done((found, _))) if found == header));
            assert_eq!(
                read_trailer(bytes, bytes.len() as u64).unwrap(),
                Reading::Done(trailer)
            );
        }
    });
}

#[test]
fn read_header_survives_any_bytes() {
    driver::run(
        "read_header",
        vec![object(b""), SEALED[0].clone()],
        |bytes| {
            drop(read_header(bytes));
            drop(FrameReader::new(bytes, Some(&key())));
        },
    );
}

#[test]
fn read_trailer_survives_any_bytes() {
    driver::run(
        "read_trailer",
        vec![object(b""), SEALED[0].clone()],
        |bytes| {
            drop(read_trailer(bytes, bytes.len() as u64));
            drop(read_trailer(bytes, u64::MAX));
        },
    );
}

#[test]
fn a_single_frame_survives_any_bytes() {
    static READERS: LazyLock<[FrameReader; 2]> = LazyLock::new(|| {
        let (sealed, _) = FrameReader::new(&SEALED[1], Some(&key())).unwrap();
        [plain_reader(), sealed]
    });
    static OFFSET: LazyLock<u64> =
        LazyLock::new(|| Parts::of(&SEALED[1]).header_frame().len() as u64);
    let frames = objects()
        .into_iter()
        .map(|object| Parts::of(&object).frames);
    driver::run("frame", frames.collect(), |bytes| {
        for expected in [0, 300] {
            for reader in &*READERS {
                if let Ok(found) = reader.frame(*OFFSET, bytes, expected) {
                    assert_eq!(found.len(), expected);
                }
            }
            if let Ok(found) = READERS[1].frame(*OFFSET, bytes, expected) {
                let sealed = Parts::of(&SEALED[usize::from(expected == 300)]);
                assert_eq!((bytes, found), (sealed.frames.as_slice(), plain(expected)));
            }
        }
    });
}
