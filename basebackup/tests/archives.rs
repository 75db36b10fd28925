//! The push parser of the archives.

use basebackup::tar::BLOCK_BYTES;
use basebackup::{RelativePath, TarError, TarEvent, TarParser};
use proptest::prelude::*;

use crate::{put_number, seal, tar_header};

/// A member in a form that does not depend on how its bytes were cut.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Member {
    File {
        path: String,
        size: u64,
        mode: u32,
        mtime: u64,
        content: Vec<u8>,
    },
    Directory {
        path: String,
        mode: u32,
    },
    Symlink {
        path: String,
        target: Vec<u8>,
    },
}

/// Reads a whole archive that comes in pieces of `cut` bytes.
pub(crate) fn read(archive: &[u8], cut: usize) -> Result<Vec<Member>, TarError> {
    let mut parser = TarParser::new();
    let mut members = Vec::new();
    let mut open = None;
    for mut piece in archive.chunks(cut).chain([&b""[..]]) {
        while let Some(event) = parser.next_event(&mut piece)? {
            match event {
                TarEvent::File {
                    path,
                    size,
                    mode,
                    mtime,
                } => {
                    assert_eq!(open, None);
                    open = Some((path.to_string(), size, mode, mtime, Vec::new()));
                }
                TarEvent::FileData(data) => {
                    assert!(!data.is_empty());
                    open.as_mut().unwrap().4.extend_from_slice(data);
                }
                TarEvent::FileEnd => {
                    let (path, size, mode, mtime, content) = open.take().unwrap();
                    assert_eq!(size, content.len() as u64);
                    members.push(Member::File {
                        path,
                        size,
                        mode,
                        mtime,
                        content,
                    });
                }
                TarEvent::Directory { path, mode } => {
                    members.push(Member::Directory {
                        path: path.to_string(),
                        mode,
                    });
                }
                TarEvent::Symlink {
                    path,
                    target,
                    mode: _,
                } => {
                    members.push(Member::Symlink {
                        path: path.to_string(),
                        target,
                    });
                }
            }
        }
        assert!(piece.is_empty());
    }
    parser.finish()?;
    assert_eq!(open, None);
    Ok(members)
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = tar_header(name.as_bytes(), b'0', content.len() as u64, b"").to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    bytes
}

proptest! {
    /// Messages cut an archive anywhere; the backup must not depend on it.
    #[test]
    fn gives_the_same_members_however_the_archive_is_cut(
        contents in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..1500), 0..5),
        cut in 1_usize..2000,
        zero_blocks in prop::sample::select(vec![0_usize, 2]),
    ) {
        let mut archive = tar_header(b"base/", b'5', 0, b"").to_vec();
        archive.extend_from_slice(&tar_header(b"pg_tblspc/16384/", b'2', 0, b"/srv/a"));
        for (number, content) in contents.iter().enumerate() {
            archive.extend_from_slice(&file(&format!("base/{number}"), content));
        }
        archive.extend_from_slice(&vec![0; zero_blocks * BLOCK_BYTES]);
        let members = read(&archive, cut).unwrap();
        prop_assert_eq!(members.len(), contents.len() + 2);
        prop_assert_eq!(&members[0], &Member::Directory { path: "base".to_owned(), mode: 0o600 });
        let link =
            Member::Symlink { path: "pg_tblspc/16384".to_owned(), target: b"/srv/a".to_vec() };
        prop_assert_eq!(&members[1], &link);
        for (member, expected) in members[2..].iter().zip(&contents) {
            let Member::File { content, mode, mtime, .. } = member else {
                return Err(TestCaseError::fail("no file"));
            };
            prop_assert_eq!(content, expected);
            prop_assert_eq!((*mode, *mtime), (0o600, 1_795_216_499));
        }
    }
}

/// A connection that breaks inside a file must not leave a file that looks whole.
#[test]
fn an_archive_that_ends_early_is_not_whole() {
    let mut archive = [file("a", b"some bytes"), file("b", &[7; 700])].concat();
    let end = archive.len();
    archive.extend_from_slice(&[0; 1024]);
    for length in 0..=archive.len() {
        let result = read(&archive[..length], 100);
        let is_whole = [0, 1024, end, archive.len()].contains(&length);
        assert_eq!(result.is_ok(), is_whole, "{length} of {}", archive.len());
        if let Err(error) = result {
            let TarError::Truncated { offset, missing } = error else {
                panic!("{error}")
            };
            assert_eq!(offset, length as u64);
            assert!(missing > 0);
        }
    }
}

#[test]
fn finds_every_flipped_bit_of_a_header() {
    let good = file("base/1/1259", b"");
    for at in 0..BLOCK_BYTES {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            // A digit's checksum in other clothes is the same checksum: NUL and space both end it.
            if at == 155 && bad[at] == 0 {
                continue;
            }
            assert!(read(&bad, 512).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn refuses_what_postgresql_does_not_send() {
    let refused = |header: [u8; 512]| read(&header, 512).unwrap_err();
    for kind in *b"1346Lxg\0S" {
        assert_eq!(
            refused(tar_header(b"a", kind, 0, b"")),
            TarError::Type {
                offset: 0,
                found: char::from(kind)
            }
        );
    }
    let mut prefixed = tar_header(b"a", b'0', 0, b"");
    prefixed[345] = b'p';
    seal(&mut prefixed);
    assert_eq!(refused(prefixed), TarError::Prefix { offset: 0 });
    let mut old = tar_header(b"a", b'0', 0, b"");
    old[257..265].copy_from_slice(b"ustar  \0");
    seal(&mut old);
    assert!(matches!(refused(old), TarError::NotUstar { .. }));
    let sized = tar_header(b"a/", b'5', 512, b"");
    assert_eq!(
        refused(sized),
        TarError::Size {
            offset: 0,
            size: 512
        }
    );
    for path in [
        &b"/etc/passwd"[..],
        b"../x",
        b"a/../../x",
        b"",
        b"a//b",
        b"./",
    ] {
        assert!(matches!(
            refused(tar_header(path, b'0', 0, b"")),
            TarError::Path { .. }
        ));
    }
    for digits in [
        &b"00000000008 "[..],
        b"            ",
        b"0000 000001 ",
        b"\xFF00000000000",
    ] {
        let mut bad = tar_header(b"a", b'0', 0, b"");
        bad[124..136].copy_from_slice(&digits[..12]);
        seal(&mut bad);
        let error = refused(bad);
        assert!(
            matches!(error, TarError::Number { field: "size", .. }),
            "{error}"
        );
    }
}

#[test]
fn refuses_bytes_where_zeros_belong() {
    let mut padded = file("a", b"x");
    padded[600] = 1;
    assert_eq!(
        read(&padded, 4096).unwrap_err(),
        TarError::Padding { offset: 600 }
    );
    let after = [vec![0; 1024], file("a", b"")].concat();
    assert_eq!(
        read(&after, 4096).unwrap_err(),
        TarError::AfterEnd { offset: 1024 }
    );
}

/// Files beyond 8 GiB have sizes that octal cannot hold (a relation is cut at 1 GiB unless it was
/// built otherwise; what else lies in a data directory is not).
#[test]
fn reads_sizes_beyond_octal() {
    let size = (8 << 30) + 5;
    let header = tar_header(b"big", b'0', size, b"");
    assert_eq!(header[124], 0x80);
    let mut parser = TarParser::new();
    let event = parser.next_event(&mut &header[..]).unwrap().unwrap();
    let path = RelativePath::parse(b"big").unwrap();
    assert_eq!(
        event,
        TarEvent::File {
            path,
            size,
            mode: 0o600,
            mtime: 1_795_216_499
        }
    );
    let missing = size.next_multiple_of(512);
    assert_eq!(
        parser.finish(),
        Err(TarError::Truncated {
            offset: 512,
            missing
        })
    );
    let mut endless = tar_header(b"big", b'0', 0, b"");
    endless[124..136].copy_from_slice(&[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    seal(&mut endless);
    assert!(matches!(read(&endless, 512), Err(TarError::Number { .. })));
    put_number(&mut endless[124..136], u64::MAX);
    seal(&mut endless);
    assert!(matches!(
        read(&endless, 512),
        Err(TarError::Truncated { .. })
    ));
}

#[test]
fn keeps_names_of_99_bytes_and_of_no_encoding() {
    let long = [b"base/", &[b'n'; 94][..]].concat();
    let odd = b"base/\xFF\xFE\n".to_vec();
    for name in [long, odd] {
        let header = tar_header(&name, b'0', 0, b"");
        let mut parser = TarParser::new();
        let event = parser.next_event(&mut &header[..]).unwrap().unwrap();
        let TarEvent::File { path, .. } = event else {
            panic!("{event:?}")
        };
        assert_eq!(path.as_bytes(), name);
    }
}
