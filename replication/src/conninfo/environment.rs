//! What the process around us contributes to connection settings, as a value.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Everything that settings may be read from besides the connection string: passed in, so that no
/// code below `main` reads the process environment and tests need not change it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Environment {
    /// The environment variables; those that libpq knows start with `PG`.
    pub vars: BTreeMap<String, String>,
    /// The home directory: `HOME`, else what the user database says.
    pub home: Option<PathBuf>,
    /// The name of the effective user, which is the default for `user`.
    pub user_name: Option<String>,
    /// Where a server's socket is looked for when no host is named, in order; see
    /// [`ConnectionSettings::resolve`](super::ConnectionSettings::resolve).
    pub default_socket_dirs: Vec<PathBuf>,
}

impl Environment {
    /// The environment of this process. A variable that is not UTF-8 is taken with its invalid
    /// bytes replaced, so that it is refused or fails where it is used, instead of being ignored.
    pub fn of_process() -> Self {
        let vars: BTreeMap<String, String> = std::env::vars_os()
            .map(|(name, value)| {
                (
                    name.to_string_lossy().into_owned(),
                    value.to_string_lossy().into_owned(),
                )
            })
            .collect();
        let account = nix::unistd::User::from_uid(nix::unistd::Uid::effective())
            .ok()
            .flatten();
        let home = vars
            .get("HOME")
            .filter(|home| !home.is_empty())
            .map(PathBuf::from)
            .or_else(|| account.as_ref().map(|account| account.dir.clone()));
        Self {
            home,
            user_name: account.map(|account| account.name),
            default_socket_dirs: vec!["/var/run/postgresql".into(), "/tmp".into()],
            vars,
        }
    }

    /// A variable that is set; libpq tells set-but-empty from unset, and so do we.
    pub(crate) fn var(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(String::as_str)
    }

    /// A file below the home directory, where there is one.
    pub(crate) fn in_home(&self, path: &str) -> Option<PathBuf> {
        self.home.as_ref().map(|home| home.join(path))
    }
}

impl fmt::Debug for Environment {
    /// Names of variables only: `PGPASSWORD` is one of them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Environment")
            .field("vars", &self.vars.keys().collect::<Vec<_>>())
            .field("home", &self.home)
            .field("user_name", &self.user_name)
            .field("default_socket_dirs", &self.default_socket_dirs)
            .finish()
    }
}
