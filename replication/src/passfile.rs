//! The password file, `~/.pgpass`: lines of `host:port:database:user:password`
//! (fe-connect.c, `passwordFromFile`).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use zeroize::Zeroizing;

use crate::conninfo::Secret;

/// More than any password file holds; what follows is not read.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// What a password is wanted for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The host as the user named it; `localhost` for a socket in the default place.
    pub host: &'a str,
    /// The port, also of a Unix socket.
    pub port: u16,
    /// The database; `replication` for a replication connection.
    pub dbname: &'a str,
    /// The role.
    pub user: &'a str,
}

/// What came of looking into a password file.
#[derive(Debug)]
pub enum Lookup {
    /// The first line that matches holds this.
    Found(Secret),
    /// There is no such file.
    NoFile,
    /// No line matches.
    NoEntry,
    /// Others may read the file, so libpq does not use it, and neither do we.
    ///
    /// Someone who can read it may be able to write it too; and the owner should learn of it.
    TooOpen {
        /// The permission bits.
        mode: u32,
    },
    /// It is a directory, a pipe or the like.
    NotAFile,
    /// It cannot be read.
    Unreadable(io::Error),
}

/// Looks for a password in the file at `path`.
pub fn look_up(path: &Path, wanted: &Wanted<'_>) -> Lookup {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Lookup::NoFile;
        }
        Err(e) => return Lookup::Unreadable(e),
    };
    // before it is opened: opening a pipe would wait for a writer
    if !metadata.is_file() {
        return Lookup::NotAFile;
    }
    if metadata.mode() & 0o077 != 0 {
        return Lookup::TooOpen {
            mode: metadata.mode() & 0o777,
        };
    }
    let mut contents = Zeroizing::new(Vec::new());
    let read =
        File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut contents));
    match read {
        Ok(_) => find(&contents, wanted).map_or(Lookup::NoEntry, Lookup::Found),
        Err(e) => Lookup::Unreadable(e),
    }
}

/// The password of the first line of `contents` that matches. An empty one counts as none, as
/// it does in libpq.
pub fn find(contents: &[u8], wanted: &Wanted<'_>) -> Option<Secret> {
    let port = wanted.port.to_string();
    contents
        .split(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
        .filter(|line| !line.starts_with(b"#"))
        .find_map(|line| {
            let rest = match_field(line, wanted.host)?;
            let rest = match_field(rest, &port)?;
            let rest = match_field(rest, wanted.dbname)?;
            match_field(rest, wanted.user)
        })
        .map(unescape_field)
        .filter(|password| !password.expose().is_empty())
}

/// What follows the first field of `line`, if that field is `*` or says `value`.
fn match_field<'a>(line: &'a [u8], value: &str) -> Option<&'a [u8]> {
    if let Some(rest) = line.strip_prefix(b"*:") {
        return Some(rest);
    }
    let mut rest = line;
    let mut value = value.bytes();
    loop {
        let (&byte, after) = rest.split_first()?;
        let (byte, after) = match byte {
            b':' => return value.next().is_none().then_some(after),
            b'\\' => after
                .split_first()
                .map(|(&escaped, after)| (escaped, after))?,
            byte => (byte, after),
        };
        if value.next() != Some(byte) {
            return None;
        }
        rest = after;
    }
}

/// The last field: up to a bare colon, a backslash taking the next byte as it is.
fn unescape_field(field: &[u8]) -> Secret {
    let mut password = Vec::with_capacity(field.len());
    let mut bytes = field.iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b':' => break,
            b'\\' => password.push(bytes.next().unwrap_or(b'\\')),
            byte => password.push(byte),
        }
    }
    Secret::new(password)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn wanted<'a>(host: &'a str, port: u16, dbname: &'a str, user: &'a str) -> Wanted<'a> {
        Wanted {
            host,
            port,
            dbname,
            user,
        }
    }

    fn password(contents: &str, wanted: &Wanted<'_>) -> Option<String> {
        find(contents.as_bytes(), wanted)
            .map(|secret| String::from_utf8(secret.expose().to_vec()).unwrap())
    }

    #[test]
    fn the_first_line_that_matches_wins() {
        let file = "# host:5432:db:u:comment\n\
                    other:5432:db:u:no\n\
                    host:5433:db:u:no\r\n\
                    host:5432:*:u:first\n\
                    *:*:*:*:any\n";
        assert_eq!(
            password(file, &wanted("host", 5432, "db", "u")).as_deref(),
            Some("first")
        );
        assert_eq!(
            password(file, &wanted("host", 5432, "db", "v")).as_deref(),
            Some("any")
        );
        assert_eq!(password("host:1:d:u:x", &wanted("hos", 1, "d", "u")), None);
        assert_eq!(password("hos:1:d:u:x", &wanted("host", 1, "d", "u")), None);
        assert_eq!(password("", &wanted("host", 1, "d", "u")), None);
        assert_eq!(password("host:1:d", &wanted("host", 1, "d", "u")), None);
        assert_eq!(password("host:1:d:u:", &wanted("host", 1, "d", "u")), None);
        // a star is a wildcard only alone
        assert_eq!(password("h*:1:d:u:x", &wanted("host", 1, "d", "u")), None);
    }

    #[test]
    fn colons_and_backslashes_are_escaped() {
        let file = r"\:\:1:5432:d\\b:u:p\:w\\d:rest";
        assert_eq!(
            password(file, &wanted("::1", 5432, r"d\b", "u")).as_deref(),
            Some(r"p:w\d")
        );
        assert_eq!(
            password(r"h:1:d:u:x\", &wanted("h", 1, "d", "u")).as_deref(),
            Some(r"x\")
        );
        assert_eq!(password(r"h\", &wanted("h", 1, "d", "u")), None);
    }

    #[test]
    fn a_file_that_others_may_read_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pgpass");
        let wanted = wanted("h", 1, "d", "u");
        assert!(matches!(look_up(&path, &wanted), Lookup::NoFile));
        assert!(matches!(
            look_up(&path.join("below"), &wanted),
            Lookup::NoFile
        ));
        assert!(matches!(look_up(dir.path(), &wanted), Lookup::NotAFile));

        std::fs::write(&path, "h:1:d:u:x\n").unwrap();
        for mode in [0o640, 0o604, 0o644, 0o620, 0o610] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert!(
                matches!(look_up(&path, &wanted), Lookup::TooOpen { mode: found } if found == mode)
            );
        }
        for mode in [0o600, 0o700] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            assert!(
                matches!(look_up(&path, &wanted), Lookup::Found(_)),
                "{mode:o}"
            );
        }
    }
}
