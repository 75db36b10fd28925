//! Compares the body of a record with the description that `pg_waldump` prints of it.

use wal::{Body, Major, PgTime, RelFile};

/// That the body of a record agrees with `pg_waldump`'s description of it.
#[expect(clippy::too_many_lines, reason = "one arm for each kind of record")]
pub(crate) fn assert_says(body: &Body, description: &str, major: Major) {
    let says = |expected: String| {
        assert!(
            description.starts_with(&expected),
            "{major}: {description} is not {expected}"
        );
    };
    let part = |label: &str| {
        let found = description
            .split("; ")
            .find_map(|part| part.strip_prefix(label));
        found.map(|list| {
            list.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
    };
    let or_none = |list: Vec<String>| (!list.is_empty()).then_some(list);
    match body {
        Body::Commit(end) | Body::Abort(end) => {
            let word = if matches!(body, Body::Commit(_)) {
                "COMMIT"
            } else {
                "ABORT"
            };
            if end.prepared {
                says(format!("{word}_PREPARED {}: {}", end.xid, utc(end.time)));
            } else {
                says(format!("{word} {}", utc(end.time)));
            }
            let subxacts = end.subxacts.iter().map(u32::to_string).collect();
            assert_eq!(part("subxacts: "), or_none(subxacts), "{description}");
            let drops = end.drops.iter().map(|file| path(*file)).collect();
            assert_eq!(part("rels: "), or_none(drops), "{description}");
        }
        Body::Prepare {
            prepared_at, gid, ..
        } => {
            says(format!("PREPARE gid {gid}: {}", utc(*prepared_at)));
        }
        Body::RestorePoint { name, .. } => says(format!("RESTORE_POINT {name}")),
        Body::Checkpoint {
            shutdown,
            redo,
            this_timeline,
            prev_timeline,
            next_xid,
            ..
        } => {
            let word = if *shutdown {
                "CHECKPOINT_SHUTDOWN"
            } else {
                "CHECKPOINT_ONLINE"
            };
            says(word.to_owned());
            let redo_found = description
                .split_once("redo ")
                .unwrap()
                .1
                .split(';')
                .next()
                .unwrap();
            assert_eq!(redo_found.parse(), Ok(*redo));
            let timelines = format!(
                "; tli {}; prev tli {};",
                this_timeline.unwrap(),
                prev_timeline.unwrap()
            );
            assert!(description.contains(&timelines), "{description}");
            let xid = format!("; xid {}:{};", next_xid >> 32, next_xid & 0xFFFF_FFFF);
            assert!(description.contains(&xid), "{description}");
        }
        Body::ParameterChange {
            max_connections,
            max_worker_processes,
            max_wal_senders,
            max_prepared_transactions,
            max_locks_per_transaction,
            wal_level,
        } => {
            assert_eq!(*wal_level, 1);
            says(format!(
                "PARAMETER_CHANGE max_connections={max_connections} \
                 max_worker_processes={max_worker_processes} max_wal_senders={max_wal_senders} \
                 max_prepared_xacts={max_prepared_transactions} \
                 max_locks_per_xact={max_locks_per_transaction} wal_level=replica"
            ));
        }
        Body::CreateTablespace { oid, path } => says(format!("CREATE {oid} \"{path}\"")),
        Body::DropTablespace { oid } => says(format!("DROP {oid}")),
        Body::CreateDatabase {
            database,
            tablespace,
        } => {
            says("CREATE".to_owned());
            assert!(
                description.ends_with(&format!("to {tablespace}/{database}")),
                "{description}"
            );
        }
        Body::DropDatabase {
            database,
            tablespaces,
        } => {
            says(format!("DROP dir {}/{database}", tablespaces[0]));
        }
        Body::TruncateRelation {
            file,
            blocks,
            flags,
        } => {
            says(format!(
                "TRUNCATE {} to {blocks} blocks flags {flags}",
                path(*file)
            ));
        }
        Body::Switch => says("SWITCH".to_owned()),
        Body::OverwriteContrecord { overwritten } => {
            let found = description
                .strip_prefix("OVERWRITE_CONTRECORD lsn ")
                .unwrap();
            assert_eq!(found.split(';').next().unwrap().parse(), Ok(*overwritten));
        }
        Body::EndOfRecovery {
            time,
            this_timeline,
            prev_timeline,
        } => says(format!(
            "END_OF_RECOVERY tli {}; prev tli {}; time {}",
            this_timeline.unwrap(),
            prev_timeline.unwrap(),
            utc(*time)
        )),
        Body::BackupEnd { start } => {
            let found = description.strip_prefix("BACKUP_END ").unwrap();
            assert_eq!(found.parse(), Ok(*start));
        }
        Body::Other => {
            let kind = description.split(' ').next().unwrap();
            let others = [
                "CREATE",
                "NEXTOID",
                "CHECKPOINT_REDO",
                "FPI",
                "FPI_FOR_HINT",
                "INVALIDATION",
                "ASSIGNMENT",
            ];
            assert!(
                others.contains(&kind),
                "{major}: nothing was read of {description}"
            );
        }
    }
}

/// `common/relpath.c`, `GetRelationPath`.
fn path(file: RelFile) -> String {
    match file.tablespace {
        1664 => format!("global/{}", file.relation),
        1663 => format!("base/{}/{}", file.database, file.relation),
        other => panic!("tablespace {other}"),
    }
}

/// As servers print a time in UTC, to the microsecond.
fn utc(time: PgTime) -> String {
    let micros = time.to_unix_micros();
    let (days, rest) = (
        micros.div_euclid(86_400_000_000),
        micros.rem_euclid(86_400_000_000),
    );
    // days since 0000-03-01, so that a leap day ends its year; Gregorian cycles of 400 years
    let days = days + 719_468;
    let (cycle, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, (month + 2) % 12 + 1);
    let year = year + cycle * 400 + i64::from(month <= 2);
    let (seconds, micros) = (rest / 1_000_000, rest % 1_000_000);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02}.{micros:06} UTC")
}
