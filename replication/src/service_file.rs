//! Connection service files: sections of keywords under a name (fe-connect.c,
//! `parseServiceInfo`).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use crate::conninfo::Environment;

/// More than any service file holds; a larger one is refused.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Where distributions keep the system's service file, after `PGSYSCONFDIR`: libpq has the path
/// built in, and Debian's is this one.
const SYSTEM_DIR: &str = "/etc/postgresql-common";

/// Why a service could not be looked up.
#[derive(Debug, thiserror::Error)]
pub enum ServiceFileError {
    /// No file has a section of that name.
    #[error("definition of service {service:?} not found: looked in {}", paths(.searched))]
    NotFound {
        /// The service's name.
        service: String,
        /// The files looked into, those that do not exist included.
        searched: Vec<PathBuf>,
    },
    /// A file cannot be read.
    #[error("cannot read service file: path={}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line is neither a section, a comment nor `keyword=value`.
    #[error("syntax error in service file: path={}, line={line}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
}

/// What a service file says of a service.
pub(crate) struct Service {
    /// The file.
    pub(crate) path: PathBuf,
    /// Keywords and values, in the order of the file.
    pub(crate) pairs: Vec<(String, Zeroizing<String>)>,
}

/// Looks `service` up: in `named`, or else in `~/.pg_service.conf`; then in the system's file.
pub(crate) fn look_up(
    service: &str,
    named: Option<&Path>,
    environment: &Environment,
) -> Result<Service, ServiceFileError> {
    let users = named
        .map(Path::to_owned)
        .or_else(|| environment.in_home(".pg_service.conf"));
    let system_dir = environment.var("PGSYSCONFDIR").unwrap_or(SYSTEM_DIR);
    let systems = Path::new(system_dir).join("pg_service.conf");
    let searched: Vec<PathBuf> = users.into_iter().chain([systems]).collect();
    for path in &searched {
        let Some(contents) = read(path)? else {
            continue;
        };
        let found =
            find(&contents, service).map_err(|(line, reason)| ServiceFileError::Syntax {
                path: path.clone(),
                line,
                reason,
            })?;
        if let Some(pairs) = found {
            return Ok(Service {
                path: path.clone(),
                pairs,
            });
        }
    }
    Err(ServiceFileError::NotFound {
        service: service.to_owned(),
        searched,
    })
}

/// The file's text, if there is such a file.
fn read(path: &Path) -> Result<Option<Zeroizing<String>>, ServiceFileError> {
    let unreadable = |source| ServiceFileError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(e) => return Err(unreadable(e)),
    };
    let mut contents = Zeroizing::new(String::new());
    file.take(FILE_BYTES_MAX)
        .read_to_string(&mut contents)
        .map_err(unreadable)?;
    Ok(Some(contents))
}

type Pairs = Vec<(String, Zeroizing<String>)>;

/// The keywords of the first section named `service`, or the line that is at fault and why. Only
/// lines of that section are looked at, as in libpq.
fn find(contents: &str, service: &str) -> Result<Option<Pairs>, (usize, &'static str)> {
    let mut section: Option<Pairs> = None;
    for (number, line) in (1..).zip(contents.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            if section.is_some() {
                break;
            }
            if header.strip_suffix(']') == Some(service) {
                section = Some(Pairs::new());
            }
            continue;
        }
        let Some(pairs) = &mut section else { continue };
        if line.starts_with("ldap") && !line.contains('=') {
            return Err((number, "looking services up by LDAP is not supported"));
        }
        let (name, value) = line
            .split_once('=')
            .ok_or((number, "expected keyword=value"))?;
        if name == "service" || name == "servicefile" {
            return Err((number, "a service cannot refer to another"));
        }
        pairs.push((name.to_owned(), Zeroizing::new(value.to_owned())));
    }
    Ok(section)
}

fn paths(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|path| path.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(contents: &str, service: &str) -> Result<Option<Vec<String>>, (usize, &'static str)> {
        let pairs = find(contents, service)?;
        Ok(pairs.map(|pairs| {
            pairs
                .iter()
                .map(|(name, value)| format!("{name}={}", value.as_str()))
                .collect()
        }))
    }

    #[test]
    fn only_the_named_section_counts() {
        let file =
            "# services\nstray\n[a]\nhost=one\n\n  port=1  \n[b]\nhost=two\n[a]\nhost=three\n";
        assert_eq!(
            found(file, "a"),
            Ok(Some(vec!["host=one".into(), "port=1".into()]))
        );
        assert_eq!(found(file, "b"), Ok(Some(vec!["host=two".into()])));
        assert_eq!(found(file, "c"), Ok(None));
        assert_eq!(
            found("[a]\r\nhost=x\r\n", "a"),
            Ok(Some(vec!["host=x".into()]))
        );
        assert_eq!(
            found("[a]\noptions=-c a=b", "a"),
            Ok(Some(vec!["options=-c a=b".into()]))
        );
    }

    #[test]
    fn faults_name_their_line() {
        assert_eq!(
            found("[a]\n\nhost", "a"),
            Err((3, "expected keyword=value"))
        );
        assert!(matches!(found("[a]\nservice=b", "a"), Err((2, _))));
        assert!(matches!(found("[a]\nldap://x/y?z", "a"), Err((2, _))));
        assert_eq!(found("[a]\nhost", "b"), Ok(None));
    }

    #[test]
    fn the_users_file_comes_before_the_systems() {
        let dir = tempfile::tempdir().unwrap();
        let environment = Environment {
            home: Some(dir.path().join("home")),
            vars: [("PGSYSCONFDIR".to_owned(), dir.path().display().to_string())].into(),
            ..Environment::default()
        };
        let missing = look_up("a", None, &environment).err().unwrap().to_string();
        assert!(missing.contains("home/.pg_service.conf, "), "{missing}");

        let systems = dir.path().join("pg_service.conf");
        std::fs::write(&systems, "[a]\nhost=system\n").unwrap();
        assert_eq!(look_up("a", None, &environment).unwrap().path, systems);

        std::fs::create_dir(dir.path().join("home")).unwrap();
        let users = dir.path().join("home/.pg_service.conf");
        std::fs::write(&users, "[a]\nhost=user\n").unwrap();
        assert_eq!(look_up("a", None, &environment).unwrap().path, users);

        let named = dir.path().join("named");
        std::fs::write(&named, "[b]\nhost=named\n").unwrap();
        assert_eq!(
            look_up("b", Some(&named), &environment).unwrap().path,
            named
        );
        assert_eq!(
            look_up("a", Some(&named), &environment).unwrap().path,
            systems
        );
    }
}
