//! `tablespace_map`: where the links of a backup's tablespaces led.
//!
//! xlog.c, `do_pg_backup_start` writes it, `read_tablespace_map` (13: `read_tablespace_map` of the
//! same file) reads it at the start of recovery and makes the links anew.

use wal::Major;

/// One link: `pg_tblspc/<oid>` leads to `location`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The tablespace.
    pub oid: u32,
    /// Where its link leads, unchecked: an absolute path, or one below the data directory for a
    /// tablespace in place.
    pub location: Vec<u8>,
}

/// Why bytes are not a `tablespace_map`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tablespace_map is damaged at link {link}: {fault}")]
pub struct TablespaceMapError {
    /// Which link, from 1.
    pub link: usize,
    /// What is wrong with it.
    pub fault: LinkFault,
}

/// What is wrong with a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LinkFault {
    /// It does not begin with a number.
    #[error("no oid")]
    Oid,
    /// No path follows the number.
    #[error("no path")]
    Path,
    /// No line feed ends it.
    #[error("no end of line")]
    Unfinished,
}

/// Reads `tablespace_map` as a server of `major` wrote it.
///
/// 14 and later put a backslash before a backslash, a line feed and a carriage return; 13 not
/// before a backslash, so that `\\` stands for two of them. `bytes` may be damaged or hostile: never
/// panics, allocates at most a multiple of its length.
pub fn parse(bytes: &[u8], major: Major) -> Result<Vec<Link>, TablespaceMapError> {
    let mut links = Vec::new();
    let mut line = Vec::new();
    let mut rest = bytes.iter().copied().peekable();
    let fault = |links: &Vec<Link>, fault| TablespaceMapError {
        link: links.len().saturating_add(1),
        fault,
    };
    while let Some(byte) = rest.next() {
        match byte {
            b'\\' if escapes(rest.peek().copied(), major) => line.extend(rest.next()),
            b'\n' => {
                let link = link(&line).map_err(|wrong| fault(&links, wrong))?;
                links.push(link);
                line.clear();
            }
            other => line.push(other),
        }
    }
    if line.is_empty() {
        Ok(links)
    } else {
        Err(fault(&links, LinkFault::Unfinished))
    }
}

fn escapes(next: Option<u8>, major: Major) -> bool {
    match next {
        Some(b'\n' | b'\r') => true,
        Some(_) => major > Major::V13,
        None => false,
    }
}

fn link(line: &[u8]) -> Result<Link, LinkFault> {
    let space = line
        .iter()
        .position(|byte| *byte == b' ')
        .ok_or(LinkFault::Path)?;
    let (oid, location) = line.split_at_checked(space).ok_or(LinkFault::Path)?;
    let oid = std::str::from_utf8(oid)
        .ok()
        .filter(|oid| oid.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|oid| oid.parse().ok())
        .ok_or(LinkFault::Oid)?;
    let location = location.get(1..).unwrap_or_default();
    if location.is_empty() {
        return Err(LinkFault::Path);
    }
    Ok(Link {
        oid,
        location: location.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(oid: u32, location: &[u8]) -> Link {
        Link {
            oid,
            location: location.to_vec(),
        }
    }

    /// What 13.16 and 14 to 19 wrote for the same two places: a link to another path than the
    /// tablespace's would lose it.
    #[test]
    fn reads_a_backslash_as_each_major_wrote_it() {
        let old = "16384 /srv/äöü\n16385 /srv/b a\\ck\n".as_bytes();
        let new = "16384 /srv/äöü\n16385 /srv/b a\\\\ck\n".as_bytes();
        let expected = [
            link(16384, "/srv/äöü".as_bytes()),
            link(16385, b"/srv/b a\\ck"),
        ];
        assert_eq!(parse(old, Major::V13).unwrap(), expected);
        for major in Major::ALL.into_iter().filter(|major| *major > Major::V13) {
            assert_eq!(parse(new, major).unwrap(), expected);
        }
    }

    #[test]
    fn reads_line_feeds_inside_a_path() {
        for major in [Major::V13, Major::V18] {
            let links = parse(b"5 /a\\\nb\\\rc\n6 pg_tblspc/6\n", major).unwrap();
            assert_eq!(links, [link(5, b"/a\nb\rc"), link(6, b"pg_tblspc/6")]);
        }
        assert_eq!(parse(b"", Major::V18).unwrap(), []);
    }

    #[test]
    fn refuses_what_is_no_link() {
        for (bytes, at, expected) in [
            (&b"5 /a\n6 /b"[..], 2, LinkFault::Unfinished),
            (b"5 /a\\", 1, LinkFault::Unfinished),
            (b"\n", 1, LinkFault::Path),
            (b"5\n", 1, LinkFault::Path),
            (b"5 \n", 1, LinkFault::Path),
            (b"x /a\n", 1, LinkFault::Oid),
            (b"+5 /a\n", 1, LinkFault::Oid),
            (b"4294967296 /a\n", 1, LinkFault::Oid),
            (b" /a\n", 1, LinkFault::Oid),
        ] {
            let error = parse(bytes, Major::V18).unwrap_err();
            assert_eq!((error.link, error.fault), (at, expected), "{bytes:?}");
        }
    }
}
