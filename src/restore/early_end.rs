//! Why a server stopped short of its target, by what it said, and what to do about it.

/// What a server says (in English, which `--replay` asks for), and what helps.
const KNOWN: &[(&str, &str)] = &[
    // xlogrecovery.c, `RecoveryRequiresIntParameter`
    (
        "is a lower setting than on the",
        "the server has less of a setting than the primary had: raise it in the restored configuration to \
         what the log says",
    ),
    // dfmgr.c, `internal_load_library`
    (
        "could not access file \"",
        "a library that the restored configuration names, as in shared_preload_libraries, is not installed \
         here for this major version: install it, or take the name out",
    ),
    (
        "could not load library \"",
        "a library that the restored configuration names cannot be loaded here",
    ),
    // guc.c, `find_option`, `parse_and_validate_value`
    (
        "unrecognized configuration parameter",
        "the restored configuration has a setting that this server does not know: take the line out",
    ),
    (
        "\" contains errors",
        "the restored configuration cannot be used here: mend the line that the log names",
    ),
    // sysv_shmem.c, `CreateAnonymousSegment`
    (
        "could not map anonymous shared memory",
        "this machine has less memory than the primary: lower shared_buffers in the restored configuration",
    ),
    // dsm_impl.c, `dsm_impl_posix`
    (
        "could not resize shared memory segment",
        "/dev/shm is too small for this server: give the container more of it",
    ),
    (
        "No space left on device",
        "a disk is full: the server needs room for the WAL that it fetches and for what it writes",
    ),
    // xlog.c, `ReadControlFile`
    (
        "database files are incompatible with server",
        "the server's programs were built otherwise than the primary's: name others with --pg-bin",
    ),
    // xlogrecovery.c, `PerformWalRecovery`
    (
        "recovery ended before configured recovery target was reached",
        "the server was given less WAL than was planned with: lines that begin with `anywhen:` say why, \
         and `anywhen status` what is stored now",
    ),
    // xlogrecovery.c, `InitWalRecovery`
    (
        "is not a child of this server's history",
        "the repository has another history than when this was planned: restore again, with --timeline",
    ),
];

/// What helps a server that said this; `None` where nothing of it is known.
pub(super) fn what_helps(log: &str) -> Option<&'static str> {
    let known = KNOWN.iter();
    let mut helps = known.filter(|(said, _)| log.contains(said));
    helps.next().map(|(_, helps)| *helps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_servers_say_is_explained() {
        for (log, helps) in [
            (
                "FATAL:  hot standby is not possible because max_connections = 10 is a lower setting than on the \
                 master server (its value was 20)",
                "raise it",
            ),
            (
                "DETAIL:  max_connections = 10 is a lower setting than on the primary server, where its value \
                 was 20.",
                "raise it",
            ),
            (
                "FATAL:  could not access file \"pg_cron\": No such file or directory",
                "install it",
            ),
            (
                "FATAL:  configuration file \"/srv/postgresql.conf\" contains errors",
                "the line that the log names",
            ),
            (
                "LOG:  unrecognized configuration parameter \"old_setting\" in file \"/srv/postgresql.conf\" \
                 line 3\nFATAL:  configuration file \"/srv/postgresql.conf\" contains errors",
                "does not know",
            ),
            (
                "LOG:  skipping missing configuration file \"/srv/local.conf\"\nFATAL:  recovery ended before \
                 configured recovery target was reached",
                "less WAL",
            ),
        ] {
            let said = what_helps(log).unwrap_or_default();
            assert!(said.contains(helps), "{log}: {said}");
        }
        assert_eq!(what_helps("LOG:  redo starts at 0/3000028"), None);
    }
}
