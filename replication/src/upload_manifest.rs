//! `UPLOAD_MANIFEST`: the server is given the manifest of an earlier backup, from which
//! `BASE_BACKUP` with `INCREMENTAL` on the same connection then goes on (17 and newer).
//!
//! `walsender.c`, `UploadManifest`: a copy to the server. What it finds wrong with the manifest it may
//! say at any time, but does not read less for it.

use std::io;

use bytes::BytesMut;
use postgres_protocol::message::{backend, frontend};

use crate::base_backup::{BaseBackupError, INCREMENTAL_SINCE};
use crate::connection::{Connection, QueryError, unexpected};
use crate::framing::Message;
use crate::server_error::ServerError;

/// The most of a manifest that goes into one message.
const PART_BYTES_MAX: usize = 64 << 10;

const PLACE: &str = "the answer to UPLOAD_MANIFEST";

impl Connection {
    /// Starts to upload a manifest, to a server of 17 or newer.
    ///
    /// # Errors
    /// [`BaseBackupError`]; the connection is dropped then.
    pub async fn upload_manifest(mut self) -> Result<ManifestUpload, BaseBackupError> {
        let found = self.server_version_num();
        if found < INCREMENTAL_SINCE {
            return Err(BaseBackupError::TooOld {
                what: "incremental backups",
                since: INCREMENTAL_SINCE,
                found,
            });
        }
        self.begin("UPLOAD_MANIFEST").await?;
        match self.read().await? {
            Message::Backend(backend::Message::CopyInResponse(_)) => Ok(ManifestUpload {
                connection: self,
                phase: Phase::Sending,
            }),
            Message::Backend(backend::Message::ErrorResponse(body)) => {
                Err(ServerError::of_error(&body).into())
            }
            other => Err(unexpected(PLACE, &other).into()),
        }
    }
}

/// A manifest that is being uploaded.
///
/// To give up, drop it: the connection closes.
#[derive(Debug)]
pub struct ManifestUpload {
    connection: Connection,
    phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Sending,
    /// `ReadyForQuery` was read.
    Ready,
    /// No more can come.
    Dead,
}

impl ManifestUpload {
    /// The manifest's next bytes, any number of them.
    ///
    /// Returns when the connection has taken them; a dropped future may leave some of them unsent,
    /// and the upload is then to be dropped too.
    ///
    /// # Errors
    /// [`BaseBackupError`]; then [`BaseBackupError::Ended`].
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), BaseBackupError> {
        for part in bytes.chunks(PART_BYTES_MAX) {
            self.put(|out| {
                frontend::CopyData::new(part)?.write(out);
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// The manifest is whole: the server reads it, and takes it or not.
    ///
    /// # Errors
    /// [`BaseBackupError`]: [`BaseBackupError::Server`] where it does not take the manifest.
    pub async fn finish(&mut self) -> Result<(), BaseBackupError> {
        self.put(|out| {
            frontend::copy_done(out);
            Ok(())
        })
        .await?;
        // what ends without ReadyForQuery leaves nothing to go on with
        self.phase = Phase::Dead;
        let mut taken = None;
        loop {
            use backend::Message as B;
            match self.connection.read().await {
                Ok(Message::Backend(B::CommandComplete(_))) if taken.is_none() => {
                    taken = Some(Ok(()));
                }
                Ok(Message::Backend(B::ErrorResponse(body))) if taken.is_none() => {
                    let error = ServerError::of_error(&body);
                    if error.ends_connection() {
                        return Err(error.into());
                    }
                    taken = Some(Err(error));
                }
                Ok(Message::Backend(B::ReadyForQuery(_))) => {
                    let (place, missing) = ("UPLOAD_MANIFEST", "its end");
                    let taken = taken.ok_or(QueryError::Incomplete { place, missing })?;
                    self.connection.answered();
                    self.phase = Phase::Ready;
                    return taken.map_err(BaseBackupError::from);
                }
                Ok(other) => return Err(unexpected(PLACE, &other).into()),
                // the server's reason explains more than that it went away
                Err(error) => {
                    return Err(match taken {
                        Some(Err(said)) => said.into(),
                        _ => error.into(),
                    });
                }
            }
        }
    }

    /// Sends a message.
    async fn put(
        &mut self,
        write: impl FnOnce(&mut BytesMut) -> io::Result<()>,
    ) -> Result<(), BaseBackupError> {
        if self.phase != Phase::Sending {
            return Err(BaseBackupError::Ended);
        }
        let queued = self.connection.framed().queue_with(write);
        let sent = match queued.map_err(QueryError::Unsendable) {
            Ok(()) => self.connection.flush().await,
            Err(error) => Err(error),
        };
        if sent.is_err() {
            self.phase = Phase::Dead;
        }
        Ok(sent?)
    }

    /// The connection, after [`Self::finish`], also where the server did not take the manifest;
    /// `None` if it is good for nothing more.
    ///
    /// A manifest that was taken before on the same connection is still the server's then
    /// (`walsender.c`, `uploaded_manifest`): an increment would be one to that backup.
    pub fn into_connection(self) -> Option<Connection> {
        (self.phase == Phase::Ready).then_some(self.connection)
    }
}
