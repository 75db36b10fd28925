//! Paths inside a data directory, proven to stay inside it.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A path below a data directory or a tablespace, as bytes (PostgreSQL does not promise UTF-8).
///
/// Not empty, not absolute, and every component is a plain name: none is empty, `.` or `..`, and
/// no byte is NUL. So joining it to a directory names something below that directory, as long as
/// no symbolic link stands in between.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelativePath(Box<[u8]>);

impl RelativePath {
    /// Takes `bytes` if they are a path that stays inside.
    pub fn parse(bytes: &[u8]) -> Result<Self, UnsafePath> {
        match fault(bytes) {
            None => Ok(Self(bytes.into())),
            Some(fault) => Err(UnsafePath {
                path: String::from_utf8_lossy(bytes.get(..200).unwrap_or(bytes)).into_owned(),
                fault,
            }),
        }
    }

    /// The path that a file of a tablespace has below the data directory:
    /// `pg_tblspc/<oid>/<path>`, as `backup_manifest` lists it.
    #[must_use]
    pub fn in_tablespace(oid: u32, path: &Self) -> Self {
        let mut bytes = format!("pg_tblspc/{oid}/").into_bytes();
        bytes.extend_from_slice(&path.0);
        Self(bytes.into())
    }

    /// The path's bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The path as the operating system takes it.
    pub fn as_path(&self) -> &Path {
        Path::new(OsStr::from_bytes(&self.0))
    }

    /// The path's names, outermost first.
    pub fn components(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/')
    }

    /// Whether the path is `directory` or lies below it.
    pub fn is_at_or_below(&self, directory: &str) -> bool {
        match self.0.strip_prefix(directory.as_bytes()) {
            Some(rest) => rest.is_empty() || rest.starts_with(b"/"),
            None => false,
        }
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&String::from_utf8_lossy(&self.0), f)
    }
}

impl fmt::Debug for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&String::from_utf8_lossy(&self.0), f)
    }
}

/// A path that could lead out of the directory it is meant for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("path {fault}: {path:?}")]
pub struct UnsafePath {
    /// The path, at most its first 200 bytes.
    pub path: String,
    /// What is wrong with it.
    pub fault: PathFault,
}

/// What is wrong with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathFault {
    /// There is none.
    Empty,
    /// It begins with a slash.
    Absolute,
    /// It holds a NUL byte.
    Nul,
    /// Two slashes follow one another, or one ends it.
    EmptyComponent,
    /// A component is `.`.
    Dot,
    /// A component is `..`.
    DotDot,
}

impl fmt::Display for PathFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "is empty",
            Self::Absolute => "is absolute",
            Self::Nul => "holds a NUL byte",
            Self::EmptyComponent => "has an empty component",
            Self::Dot => "has a component '.'",
            Self::DotDot => "has a component '..'",
        })
    }
}

fn fault(bytes: &[u8]) -> Option<PathFault> {
    if bytes.is_empty() {
        return Some(PathFault::Empty);
    }
    if bytes.starts_with(b"/") {
        return Some(PathFault::Absolute);
    }
    if bytes.contains(&0) {
        return Some(PathFault::Nul);
    }
    bytes
        .split(|byte| *byte == b'/')
        .find_map(|component| match component {
            b"" => Some(PathFault::EmptyComponent),
            b"." => Some(PathFault::Dot),
            b".." => Some(PathFault::DotDot),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path from a server, or from a manifest in a bucket, must not write outside the directory
    /// that an operator named.
    #[test]
    fn refuses_every_way_out() {
        for (path, expected) in [
            (&b""[..], PathFault::Empty),
            (b"/etc/passwd", PathFault::Absolute),
            (b"/", PathFault::Absolute),
            (b"..", PathFault::DotDot),
            (b"base/../../x", PathFault::DotDot),
            (b"base/..", PathFault::DotDot),
            (b".", PathFault::Dot),
            (b"./base", PathFault::Dot),
            (b"base/./1", PathFault::Dot),
            (b"base//1", PathFault::EmptyComponent),
            (b"base/", PathFault::EmptyComponent),
            (b"base/1\0", PathFault::Nul),
        ] {
            assert_eq!(
                RelativePath::parse(path).unwrap_err().fault,
                expected,
                "{path:?}"
            );
        }
        let long = [b'a'; 1000];
        let error = RelativePath::parse(&[b"/", &long[..]].concat()).unwrap_err();
        assert_eq!(error.path.len(), 200);
    }

    #[test]
    fn keeps_names_that_only_look_odd() {
        for path in [
            &b"..."[..],
            b"..a/b..",
            b"base/1/2_vm.1",
            b"a\nb",
            b"\xff\xfe/\x80",
            b" ",
        ] {
            let parsed = RelativePath::parse(path).unwrap();
            assert_eq!(parsed.as_bytes(), path);
            assert_eq!(parsed.as_path().as_os_str().as_bytes(), path);
        }
        let path = RelativePath::parse(b"PG_18_202506291/5/16386").unwrap();
        let inside = RelativePath::in_tablespace(16384, &path);
        assert_eq!(
            inside.to_string(),
            "pg_tblspc/16384/PG_18_202506291/5/16386"
        );
        assert_eq!(inside.components().count(), 5);
    }

    #[test]
    fn knows_what_lies_below_a_directory() {
        let path = |text: &str| RelativePath::parse(text.as_bytes()).unwrap();
        assert!(path("pg_wal").is_at_or_below("pg_wal"));
        assert!(path("pg_wal/archive_status/x").is_at_or_below("pg_wal"));
        assert!(!path("pg_wal2/x").is_at_or_below("pg_wal"));
        assert!(!path("base/pg_wal").is_at_or_below("pg_wal"));
    }
}
