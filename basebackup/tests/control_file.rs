//! `pg_control` of every major, with `pg_controldata` as judge.

use std::collections::HashMap;

use basebackup::control::{ControlError, identity};
use basebackup::{ClusterState, ControlFile, WalLevel};
use wal::Major;

use crate::golden;

/// A server of the wrong identity, or settings below the primary's, would be noticed at three in
/// the morning only.
#[test]
fn says_what_pg_controldata_says_on_every_major() {
    for major in Major::ALL {
        let control = judged(major, "pg");
        assert_eq!(control.state, ClusterState::ShutDown);
        assert_eq!(control.min_recovery_timeline, None);
        assert_eq!(control.wal_level, WalLevel::Logical);
        assert!((0..3600).contains(&(control.written_at - control.checkpoint.time)));
        assert!(control.checkpoint.time > 1_700_000_000);
        // 18 made page checksums the default.
        assert_eq!(control.data_checksum_version != 0, major >= Major::V18);
        let standby = judged(major, "standby");
        assert_eq!(standby.state, ClusterState::ShutDownInRecovery);
        assert!(standby.min_recovery_point > standby.checkpoint.redo);
        assert_eq!(
            standby.min_recovery_timeline,
            Some(standby.checkpoint.timeline)
        );
        assert_eq!(standby.system_id, control.system_id);
    }
}

/// The control file of a golden server, found equal to what the server's own tool says.
fn judged(major: Major, server: &str) -> ControlFile {
    let text = String::from_utf8(golden(major, &format!("{server}_controldata"))).unwrap();
    let said: HashMap<&str, &str> = text
        .lines()
        .map(|line| line.split_once(':').unwrap())
        .map(|(name, value)| (name, value.trim()))
        .collect();
    let control = ControlFile::parse(&golden(major, &format!("{server}_control"))).unwrap();
    assert_eq!(control.major, Some(major));
    let found = found(&control);
    assert_eq!(found.len(), 25);
    for (name, found) in found {
        // 19 pads the lower half of an LSN with zeros.
        let said = match said[name].split_once('/') {
            Some(_) => said[name].parse::<wal::Lsn>().unwrap().to_string(),
            None => said[name].to_owned(),
        };
        assert_eq!(said, found, "{name} of {server} {major}");
    }
    control
}

/// The fields under the names that `pg_controldata` gives them.
fn found(control: &ControlFile) -> Vec<(&'static str, String)> {
    let switch = |on, words: [&str; 2]| words[usize::from(on)].to_owned();
    let checkpoint = &control.checkpoint;
    let xid = checkpoint.next_xid;
    vec![
        (
            "pg_control version number",
            control.control_version.to_string(),
        ),
        (
            "Catalog version number",
            control.catalog_version.to_string(),
        ),
        ("Database system identifier", control.system_id.to_string()),
        ("Database cluster state", control.state.to_string()),
        (
            "Latest checkpoint location",
            control.checkpoint_lsn.to_string(),
        ),
        (
            "Latest checkpoint's REDO location",
            checkpoint.redo.to_string(),
        ),
        (
            "Latest checkpoint's TimeLineID",
            checkpoint.timeline.to_string(),
        ),
        (
            "Latest checkpoint's PrevTimeLineID",
            checkpoint.previous_timeline.to_string(),
        ),
        (
            "Latest checkpoint's NextXID",
            format!("{}:{}", xid >> 32, xid & 0xFFFF_FFFF),
        ),
        (
            "Minimum recovery ending location",
            control.min_recovery_point.to_string(),
        ),
        (
            "Min recovery ending loc's timeline",
            control
                .min_recovery_timeline
                .map_or(0, wal::TimelineId::get)
                .to_string(),
        ),
        ("Backup start location", control.backup_start.to_string()),
        ("Backup end location", control.backup_end.to_string()),
        (
            "End-of-backup record required",
            switch(control.backup_end_required, ["no", "yes"]),
        ),
        ("wal_level setting", control.wal_level.to_string()),
        (
            "wal_log_hints setting",
            switch(control.wal_log_hints, ["off", "on"]),
        ),
        (
            "max_connections setting",
            control.max_connections.to_string(),
        ),
        (
            "max_worker_processes setting",
            control.max_worker_processes.to_string(),
        ),
        (
            "max_wal_senders setting",
            control.max_wal_senders.to_string(),
        ),
        (
            "max_prepared_xacts setting",
            control.max_prepared_xacts.to_string(),
        ),
        (
            "max_locks_per_xact setting",
            control.max_locks_per_xact.to_string(),
        ),
        ("Database block size", control.block_size.to_string()),
        ("WAL block size", control.wal_block_size.to_string()),
        (
            "Bytes per WAL segment",
            control.segment_size.bytes().to_string(),
        ),
        (
            "Data page checksum version",
            control.data_checksum_version.to_string(),
        ),
    ]
}

#[test]
fn finds_every_flipped_bit_that_matters() {
    for major in [Major::V13, Major::V18, Major::V19] {
        let good = golden(major, "pg_control");
        let parsed = ControlFile::parse(&good).unwrap();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                // What follows the checksum is unused.
                assert!(
                    ControlFile::parse(&bad).is_err() || (at >= 292 && bad[..292] == good[..292]),
                    "{major}: bit {bit} of byte {at}"
                );
            }
        }
        let whole = [good.clone(), vec![0; 8192 - good.len()]].concat();
        assert_eq!(ControlFile::parse(&whole).unwrap(), parsed);
        for length in 0..288 {
            assert!(matches!(
                ControlFile::parse(&good[..length]),
                Err(ControlError::Short { .. })
            ));
        }
    }
}

/// An unknown major is still archived under its own identity.
#[test]
fn reads_the_identity_of_a_version_to_come() {
    let mut later = golden(Major::V19, "pg_control");
    let system_id = ControlFile::parse(&later).unwrap().system_id;
    later[8..12].copy_from_slice(&2000_u32.to_le_bytes());
    assert_eq!(
        ControlFile::parse(&later),
        Err(ControlError::Version { found: 2000 })
    );
    let identity_read = identity(&later[..16]).unwrap();
    assert_eq!(
        (identity_read.system_id, identity_read.control_version),
        (system_id, 2000)
    );
    later[8..12].copy_from_slice(&1905_u32.to_be_bytes());
    assert!(matches!(
        identity(&later),
        Err(ControlError::ByteOrder { .. })
    ));
}

#[test]
fn refuses_values_that_cannot_be_under_a_checksum_that_matches() {
    let good = golden(Major::V18, "pg_control");
    for (at, value) in [(16, 7_u32), (48, 0), (52, 0), (172, 3), (228, 3 << 20)] {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let crc = crc32c::crc32c(&bad[..292]);
        bad[292..296].copy_from_slice(&crc.to_le_bytes());
        let error = ControlFile::parse(&bad).unwrap_err();
        assert!(
            matches!(error, ControlError::Value { found, .. } if found == u64::from(value)),
            "{error}"
        );
    }
}
