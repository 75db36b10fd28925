//! The command, by server version (`repl_gram.y`, `backup/basebackup.c`, `parse_basebackup_options`).

use std::ops::RangeInclusive;

use super::{BaseBackupError, TYPED_FORM};

/// The server version from which a backup can be an increment.
pub(crate) const INCREMENTAL_SINCE: u32 = 170_000;

/// What is asked of the server. WAL and a tablespace map are never asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// Goes into `backup_label`; up to 1023 bytes, no control characters.
    pub label: String,
    /// How the server makes the checkpoint that starts the backup.
    pub checkpoint: CheckpointMode,
    /// Let the server wait until `archive_command` has stored the WAL that the backup needs.
    pub wait: bool,
    /// Limit to the rate of sending, in KiB per second, 32 to 1,048,576.
    pub max_rate_kib: Option<u32>,
    /// Checksums of files in the server's manifest.
    pub manifest_checksums: ManifestChecksums,
    /// Let the server check the pages that it reads, where the cluster has page checksums.
    pub verify_checksums: bool,
    /// Let the server add up the sizes of the tablespaces first, which reads every directory.
    pub progress: bool,
    /// Whether all is sent.
    pub kind: BackupKind,
    /// Let the server compress the archives; 15 and newer. The manifest comes as it is.
    pub compression: Option<ServerCompression>,
}

/// How the server compresses archives: with zstd. One that was built without it refuses with SQLSTATE
/// 42601.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerCompression {
    /// zstd's level, 1 to 19: those above use windows that we do not make room for.
    pub level: u8,
    /// Threads of the server's that compress beside the one that reads; 0 is none.
    pub workers: u8,
}

impl ServerCompression {
    const LEVELS: RangeInclusive<u8> = 1..=19;

    /// The options of the command.
    fn options(self) -> Result<[String; 2], BaseBackupError> {
        let Self { level, workers } = self;
        if !Self::LEVELS.contains(&level) {
            return Err(BaseBackupError::BadLevel { level });
        }
        // a server whose zstd has no threads refuses to be told how many, so it is not where it need not
        let workers = match workers {
            0 => String::new(),
            workers => format!(",workers={workers}"),
        };
        let detail = format!("COMPRESSION_DETAIL 'level={level}{workers}'");
        Ok(["COMPRESSION 'zstd'".to_owned(), detail])
    }
}

impl BaseBackupOptions {
    /// What a backup is best taken with: a fast checkpoint, pages checked, CRC-32C in the manifest.
    pub fn new(label: impl Into<String>) -> Self {
        Self {
            label: label.into(),
            checkpoint: CheckpointMode::Fast,
            wait: false,
            max_rate_kib: None,
            manifest_checksums: ManifestChecksums::Crc32c,
            verify_checksums: true,
            progress: true,
            kind: BackupKind::Full,
            compression: None,
        }
    }

    /// The command for a server of version `version_num`.
    pub(super) fn command(&self, version_num: u32) -> Result<String, BaseBackupError> {
        if self.label.len() > 1023 || self.label.contains(char::is_control) {
            return Err(BaseBackupError::BadLabel {
                label: self.label.clone(),
            });
        }
        let rate = self.max_rate_kib;
        if let Some(kib) = rate.filter(|kib| !(32..=1_048_576).contains(kib)) {
            return Err(BaseBackupError::BadRate { kib });
        }
        let is_increment = self.kind == BackupKind::Increment;
        for (asked, what, since) in [
            (is_increment, "incremental backups", INCREMENTAL_SINCE),
            (
                self.compression.is_some(),
                "compression by the server",
                TYPED_FORM,
            ),
        ] {
            if asked && version_num < since {
                let found = version_num;
                return Err(BaseBackupError::TooOld { what, since, found });
            }
        }
        // repl_scanner.l knows no escape but the doubled quote.
        let label = self.label.replace('\'', "''");
        let checksums = self.manifest_checksums.name();
        let mut options = vec![format!("LABEL '{label}'")];
        if self.progress {
            options.push("PROGRESS".to_owned());
        }
        if version_num >= TYPED_FORM {
            options.push(format!("CHECKPOINT '{}'", self.checkpoint.name()));
            options.push(format!("WAIT {}", self.wait));
            options.extend(rate.map(|kib| format!("MAX_RATE {kib}")));
            options.push(format!("VERIFY_CHECKSUMS {}", self.verify_checksums));
            options.push("MANIFEST 'yes'".to_owned());
            options.push(format!("MANIFEST_CHECKSUMS '{checksums}'"));
            if let Some(compression) = self.compression {
                options.extend(compression.options()?);
            }
            if is_increment {
                options.push("INCREMENTAL".to_owned());
            }
            return Ok(format!("BASE_BACKUP ({})", options.join(", ")));
        }
        if self.checkpoint == CheckpointMode::Fast {
            options.push("FAST".to_owned());
        }
        if !self.wait {
            options.push("NOWAIT".to_owned());
        }
        options.extend(rate.map(|kib| format!("MAX_RATE {kib}")));
        if !self.verify_checksums {
            options.push("NOVERIFY_CHECKSUMS".to_owned());
        }
        options.push("MANIFEST 'yes'".to_owned());
        options.push(format!("MANIFEST_CHECKSUMS '{checksums}'"));
        Ok(format!("BASE_BACKUP {}", options.join(" ")))
    }
}

/// What a backup consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupKind {
    /// All files.
    Full,
    /// What changed since the backup whose manifest was uploaded on the same connection
    /// ([`Connection::upload_manifest`](crate::connection::Connection::upload_manifest)); 17 and
    /// newer.
    Increment,
}

/// How a checkpoint is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointMode {
    /// At once.
    Fast,
    /// Over `checkpoint_completion_target`, minutes usually.
    Spread,
}

impl CheckpointMode {
    fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Spread => "spread",
        }
    }
}

/// How the server's manifest lets files be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManifestChecksums {
    /// By their size.
    None,
    /// CRC-32C.
    Crc32c,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl ManifestChecksums {
    fn name(self) -> &'static str {
        match self {
            Self::None => "NONE",
            Self::Crc32c => "CRC32C",
            Self::Sha224 => "SHA224",
            Self::Sha256 => "SHA256",
            Self::Sha384 => "SHA384",
            Self::Sha512 => "SHA512",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        BackupKind, BaseBackupError, BaseBackupOptions, CheckpointMode, ManifestChecksums,
        ServerCompression,
    };

    fn options() -> BaseBackupOptions {
        BaseBackupOptions {
            max_rate_kib: Some(1024),
            manifest_checksums: ManifestChecksums::Sha256,
            verify_checksums: false,
            ..BaseBackupOptions::new("it's nightly")
        }
    }

    #[test]
    fn writes_the_command_as_each_version_reads_it() {
        assert_eq!(
            options().command(150_000).unwrap(),
            "BASE_BACKUP (LABEL 'it''s nightly', PROGRESS, CHECKPOINT 'fast', WAIT false, \
             MAX_RATE 1024, VERIFY_CHECKSUMS false, MANIFEST 'yes', MANIFEST_CHECKSUMS 'SHA256')"
        );
        assert_eq!(
            options().command(140_012).unwrap(),
            "BASE_BACKUP LABEL 'it''s nightly' PROGRESS FAST NOWAIT MAX_RATE 1024 \
             NOVERIFY_CHECKSUMS MANIFEST 'yes' MANIFEST_CHECKSUMS 'SHA256'"
        );
        let spread = BaseBackupOptions {
            checkpoint: CheckpointMode::Spread,
            wait: true,
            ..options()
        };
        assert!(!spread.command(130_000).unwrap().contains("FAST"));
        assert!(!spread.command(130_000).unwrap().contains("NOWAIT"));
    }

    #[test]
    fn asks_no_server_for_what_it_does_not_know() {
        let increment = BaseBackupOptions {
            kind: BackupKind::Increment,
            ..BaseBackupOptions::new("x")
        };
        let command = increment.command(170_000).unwrap();
        assert!(
            command.ends_with("MANIFEST_CHECKSUMS 'CRC32C', INCREMENTAL)"),
            "{command}"
        );
        let compressed = |level, workers| BaseBackupOptions {
            compression: Some(ServerCompression { level, workers }),
            ..BaseBackupOptions::new("x")
        };
        for (workers, expected) in [(0, "'level=1'"), (2, "'level=1,workers=2'")] {
            let command = compressed(1, workers).command(150_000).unwrap();
            let end = format!("COMPRESSION 'zstd', COMPRESSION_DETAIL {expected})");
            assert!(command.ends_with(&end), "{command}");
        }
        for (options, version) in [(increment, 160_010), (compressed(1, 0), 140_020)] {
            let refused = options.command(version).unwrap_err();
            assert!(
                matches!(refused, BaseBackupError::TooOld { found, .. } if found == version),
                "{refused}"
            );
            assert!(!refused.is_transient());
        }
        for level in [0, 20] {
            let refused = compressed(level, 0).command(150_000).unwrap_err();
            assert!(matches!(refused, BaseBackupError::BadLevel { .. }));
        }
    }

    #[test]
    fn refuses_a_label_that_would_forge_lines_of_backup_label() {
        let forged = BaseBackupOptions::new("x\nSTART TIMELINE: 7");
        forged.command(180_000).unwrap_err();
        BaseBackupOptions::new("ä".repeat(512))
            .command(180_000)
            .unwrap_err();
        let slow = BaseBackupOptions {
            max_rate_kib: Some(31),
            ..options()
        };
        slow.command(180_000).unwrap_err();
    }
}
