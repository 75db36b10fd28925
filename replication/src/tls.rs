//! TLS towards a server: what libpq's `ssl…` settings ask for, by rustls.
//!
//! Where this differs from libpq with OpenSSL:
//!
//! * TLS 1.0 and 1.1 are not spoken.
//! * A root certificate file that merely happens to be there (`~/.postgresql/root.crt`) makes
//!   `require` verify, as in libpq, but not `prefer` and `allow`: libpq would fall back to no TLS
//!   at all when that fails.
//! * A certificate that is itself in the root file is trusted, which is how self-signed ones are
//!   used, whatever it says about being an authority.
//! * `require` with a root certificate file that is named and not there is an error.
//! * A revocation list in its default place is an error, since it would not be heeded.

pub(crate) mod certificate;
mod verifier;

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, InconsistentKeys, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::conninfo::{CertificateMode, FileChoice, Roots, SslMode, TlsSettings, TlsVersion};
use certificate::{Certificate, SignatureHash};
use verifier::{Authorities, Verifier};

pub use certificate::MalformedCertificate;
pub use verifier::VerifyError;

/// The protocol's name in TLS (`PG_ALPN_PROTOCOL`, pqcomm.h). With direct negotiation it must be
/// agreed on, so that no server of another protocol can be talked into answering.
const ALPN: &[u8] = b"postgresql";

/// Why there is no TLS, or not with the right server.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The server has it switched off.
    #[error("the server does not offer TLS, and sslmode asks for it")]
    NotOffered,
    /// The server answered the question for TLS with an error, which nothing protects: it is
    /// not shown, and could be anyone's.
    #[error("the server answered the request for TLS with an error (is it out of processes?)")]
    AnsweredWithError,
    /// Something else answered.
    #[error("expected S or N in answer to the request for TLS: found={found:?}; is it PostgreSQL?")]
    BadAnswer {
        /// The byte.
        found: char,
    },
    /// The file with the roots that verification needs is not there.
    #[error(
        "root certificate file does not exist: path={}; provide it, use the system's authorities by \
         sslrootcert=system, or change sslmode to disable verification", shown(path.as_ref())
    )]
    NoRoots {
        /// The file; nothing if not even its place is known, for lack of a home directory.
        path: Option<PathBuf>,
    },
    /// A certificate or key file cannot be read.
    #[error("cannot read {what} file: path={}: {source}", path.display())]
    Unreadable {
        /// What should be in it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds nothing of what it should.
    #[error("found no {what} in PEM form: path={}: {reason}", path.display())]
    NotPem {
        /// What should be in it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the reader says.
        reason: String,
    },
    /// The operating system has no authorities that we could find.
    #[error("the system's certificate authorities were not found: {reason}")]
    NoSystemRoots {
        /// What was tried.
        reason: String,
    },
    /// There is a client certificate and no key for it.
    #[error("there is a client certificate but no private key for it: path={}", shown(path.as_ref()))]
    NoKey {
        /// Where the key should be.
        path: Option<PathBuf>,
    },
    /// A private key that others may read.
    #[error(
        "private key file has group or world access: path={}, mode={mode:04o}; it must be 0600 or \
         less, or 0640 if root owns it", path.display()
    )]
    KeyTooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A private key under a passphrase.
    #[error(
        "private key is encrypted, which is not supported; decrypt it with `openssl pkey -in … -out \
         …` and protect the file: path={}", path.display()
    )]
    EncryptedKey {
        /// The file.
        path: PathBuf,
    },
    /// A private key of a kind that is not known, or not the certificate's.
    #[error("private key cannot be used: path={}: {reason}", path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A revocation list that would not be heeded.
    #[error(
        "found a certificate revocation list, which is not supported; move it away if the server's \
         certificate need not be checked against it: path={}", path.display()
    )]
    RevocationList {
        /// The file.
        path: PathBuf,
    },
    /// `verify-full` without a name.
    #[error("sslmode=verify-full needs the server's name: set host besides hostaddr")]
    NoHostName,
    /// The server is not who it should be.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The two could not agree.
    #[error("TLS handshake failed: {0}")]
    Handshake(#[source] rustls::Error),
    /// The connection failed.
    #[error("the connection failed during the TLS handshake: {0}")]
    Io(#[source] io::Error),
    /// Direct TLS with something that does not say that it speaks PostgreSQL's protocol.
    #[error(
        "sslnegotiation=direct: the server did not agree to the protocol \"postgresql\" (it needs PostgreSQL 17)"
    )]
    NoAlpn,
    /// `sslcertmode=require`, and the server did not ask.
    #[error("sslcertmode=require: the server did not ask for a client certificate")]
    CertificateNotAsked,
    /// `sslcertmode=require`, and there is none.
    #[error("sslcertmode=require: there is no client certificate: path={}", shown(path.as_ref()))]
    NoCertificate {
        /// Where it was looked for.
        path: Option<PathBuf>,
    },
}

impl TlsError {
    /// Whether the same may succeed later with nothing changed.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::AnsweredWithError | Self::Io(_))
    }

    /// Whether the fault is in the settings or files here, so that no server can help it.
    pub fn is_local(&self) -> bool {
        !matches!(
            self,
            Self::NotOffered
                | Self::AnsweredWithError
                | Self::BadAnswer { .. }
                | Self::Verify(_)
                | Self::Handshake(_)
                | Self::Io(_)
                | Self::NoAlpn
                | Self::CertificateNotAsked
        )
    }
}

fn shown(path: Option<&PathBuf>) -> String {
    path.map_or_else(
        || "(no home directory)".to_owned(),
        |path| path.display().to_string(),
    )
}

/// The client's side of TLS with all files read: good for any number of hosts.
pub(crate) struct TlsClient {
    provider: Arc<CryptoProvider>,
    /// Nothing if the server's certificate is not to be verified.
    authorities: Option<Arc<Authorities>>,
    check_name: bool,
    certified_key: Option<Arc<CertifiedKey>>,
    certificate_mode: CertificateMode,
    versions: Vec<&'static rustls::SupportedProtocolVersion>,
    send_host_name: bool,
    must_agree_on_protocol: bool,
}

/// A session that was agreed on with the right server.
pub(crate) struct Secured {
    pub(crate) stream: TlsStream<TcpStream>,
    /// RFC 5929's `tls-server-end-point`, where the certificate's signature defines one.
    pub(crate) end_point: Option<Vec<u8>>,
}

impl TlsClient {
    pub(crate) fn new(settings: &TlsSettings) -> Result<Self, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let authorities = authorities(settings)?;
        let certified_key = match settings.certificate_mode {
            CertificateMode::Disable => None,
            CertificateMode::Allow => client_certificate(settings, &provider)?,
            CertificateMode::Require => {
                let found = client_certificate(settings, &provider)?;
                let missing = || TlsError::NoCertificate {
                    path: chosen(&settings.certificate),
                };
                Some(found.ok_or_else(missing)?)
            }
        };
        let versions = [
            (TlsVersion::Tls12, &rustls::version::TLS12),
            (TlsVersion::Tls13, &rustls::version::TLS13),
        ];
        Ok(Self {
            provider,
            authorities: authorities.map(Arc::new),
            check_name: settings.mode == SslMode::VerifyFull,
            certified_key,
            certificate_mode: settings.certificate_mode,
            versions: versions
                .into_iter()
                .filter(|(version, _)| {
                    (settings.version_min..=settings.version_max).contains(version)
                })
                .map(|(_, version)| version)
                .collect(),
            send_host_name: settings.send_host_name,
            must_agree_on_protocol: settings.direct,
        })
    }

    /// Agrees on a session over `tcp` with the server that the user calls `name`.
    ///
    /// Nothing may have been read from `tcp` beyond the server's consent: what someone put in
    /// after it in clear text then belongs to the handshake, and fails it (CVE-2021-23222).
    pub(crate) async fn handshake(
        &self,
        tcp: TcpStream,
        name: Option<&str>,
        address: IpAddr,
    ) -> Result<Secured, TlsError> {
        let expected_name = match (self.check_name, name) {
            (false, _) => None,
            (true, Some(name)) => Some(name.to_owned()),
            (true, None) => return Err(TlsError::NoHostName),
        };
        let verifier = Verifier {
            authorities: self.authorities.clone(),
            expected_name,
            algorithms: self.provider.signature_verification_algorithms,
        };
        let resolver = Arc::new(OfferOne {
            certified_key: self.certified_key.clone(),
            asked: AtomicBool::new(false),
        });
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&self.versions)
            .map_err(TlsError::Handshake)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(resolver.clone());
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = self.send_host_name;
        config.resumption = Resumption::disabled();

        // rustls sends no name for an address, and the verifier has its own idea of the name
        let server_name = name
            .and_then(|name| ServerName::try_from(name.to_owned()).ok())
            .unwrap_or_else(|| ServerName::IpAddress(address.into()));
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector
            .connect(server_name, tcp)
            .await
            .map_err(handshake_error)?;
        let (_, session) = stream.get_ref();
        if self.must_agree_on_protocol && session.alpn_protocol() != Some(ALPN) {
            return Err(TlsError::NoAlpn);
        }
        if self.certificate_mode == CertificateMode::Require
            && !resolver.asked.load(Ordering::Relaxed)
        {
            return Err(TlsError::CertificateNotAsked);
        }
        let end_point = session
            .peer_certificates()
            .and_then(|chain| chain.first())
            .and_then(end_point);
        Ok(Secured { stream, end_point })
    }
}

/// rustls' errors come wrapped for the stream, and ours within them.
fn handshake_error(error: io::Error) -> TlsError {
    let Some(inner) = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    else {
        return TlsError::Io(error);
    };
    match inner {
        rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => {
            match other.0.downcast_ref::<VerifyError>() {
                Some(verify) => TlsError::Verify(verify.clone()),
                None => TlsError::Handshake(inner.clone()),
            }
        }
        _ => TlsError::Handshake(inner.clone()),
    }
}

/// The hash of a server's certificate by which a password exchange is tied to the session.
fn end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    let hash = Certificate::parse(certificate).ok()?.signature_hash()?;
    Some(match hash {
        SignatureHash::Sha224 => Sha224::digest(certificate).to_vec(),
        SignatureHash::Sha256 => Sha256::digest(certificate).to_vec(),
        SignatureHash::Sha384 => Sha384::digest(certificate).to_vec(),
        SignatureHash::Sha512 => Sha512::digest(certificate).to_vec(),
    })
}

/// Shows the server our certificate, whichever authorities it says it knows, as OpenSSL does.
#[derive(Debug)]
struct OfferOne {
    certified_key: Option<Arc<CertifiedKey>>,
    asked: AtomicBool,
}

impl ResolvesClientCert for OfferOne {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.asked.store(true, Ordering::Relaxed);
        self.certified_key.clone()
    }

    fn has_certs(&self) -> bool {
        self.certified_key.is_some()
    }
}

fn chosen(choice: &FileChoice) -> Option<PathBuf> {
    match choice {
        FileChoice::Named(path) => Some(path.clone()),
        FileChoice::Default(path) => path.clone(),
    }
}

/// The file's bytes; nothing if it is in its default place and not there.
fn read(choice: &FileChoice, what: &'static str) -> Result<Option<(PathBuf, Vec<u8>)>, TlsError> {
    let (path, needed) = match choice {
        FileChoice::Named(path) => (path, true),
        FileChoice::Default(Some(path)) => (path, false),
        FileChoice::Default(None) => return Ok(None),
    };
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some((path.clone(), bytes))),
        Err(e) if !needed && is_absent(&e) => Ok(None),
        Err(source) => Err(TlsError::Unreadable {
            what,
            path: path.clone(),
            source,
        }),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

fn certificates(
    path: &Path,
    bytes: &[u8],
    what: &'static str,
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let not_pem = |reason: String| TlsError::NotPem {
        what,
        path: path.to_owned(),
        reason,
    };
    let found = CertificateDer::pem_slice_iter(bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| not_pem(e.to_string()))?;
    if found.is_empty() {
        return Err(not_pem("no certificate in the file".to_owned()));
    }
    Ok(found)
}

/// Whom to trust, if the server's certificate is to be verified at all.
fn authorities(settings: &TlsSettings) -> Result<Option<Authorities>, TlsError> {
    let must_verify = settings.mode >= SslMode::VerifyCa;
    if settings.mode < SslMode::Require {
        return Ok(None);
    }
    let what = "root certificate";
    let found = match &settings.roots {
        Roots::System => return system_authorities().map(Some),
        // libpq takes such a file as none unless the mode is verify-…; its being named says otherwise
        Roots::File(FileChoice::Named(path)) if !path.exists() => {
            return Err(TlsError::NoRoots {
                path: Some(path.clone()),
            });
        }
        Roots::File(choice) => read(choice, what)?,
    };
    let Some((path, bytes)) = found else {
        if let (true, Roots::File(choice)) = (must_verify, &settings.roots) {
            return Err(TlsError::NoRoots {
                path: chosen(choice),
            });
        }
        return Ok(None);
    };
    if let Some(list) = settings.default_crl.as_ref().filter(|list| list.exists()) {
        return Err(TlsError::RevocationList { path: list.clone() });
    }
    let trusted = certificates(&path, &bytes, what)?;
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(trusted.iter().cloned());
    if added == 0 {
        let reason = "none of its certificates can be read".to_owned();
        return Err(TlsError::NotPem { what, path, reason });
    }
    Ok(Some(Authorities { roots, trusted }))
}

fn system_authorities() -> Result<Authorities, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (added, _) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let reasons: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
        return Err(TlsError::NoSystemRoots {
            reason: reasons.join("; "),
        });
    }
    Ok(Authorities {
        roots,
        trusted: Vec::new(),
    })
}

fn client_certificate(
    settings: &TlsSettings,
    provider: &CryptoProvider,
) -> Result<Option<Arc<CertifiedKey>>, TlsError> {
    let what = "client certificate";
    let Some((path, bytes)) = read(&settings.certificate, what)? else {
        return Ok(None);
    };
    let chain = certificates(&path, &bytes, what)?;

    let no_key = || TlsError::NoKey {
        path: chosen(&settings.key),
    };
    let key_path = chosen(&settings.key).ok_or_else(no_key)?;
    match std::fs::metadata(&key_path) {
        Ok(metadata) => check_key_access(&key_path, metadata.uid(), metadata.mode() & 0o7777)?,
        Err(e) if is_absent(&e) => return Err(no_key()),
        Err(_) => {} // reading it tells
    }
    let (path, bytes) = read(&settings.key, "private key")?.ok_or_else(no_key)?;
    let contains = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    // PKCS #8 says it in the label, older forms in a header
    if contains(b"BEGIN ENCRYPTED PRIVATE KEY") || contains(b"Proc-Type: 4,ENCRYPTED") {
        return Err(TlsError::EncryptedKey { path });
    }
    let key = PrivateKeyDer::from_pem_slice(&bytes)
        .or_else(|not_pem| {
            let der = PrivateKeyDer::try_from(bytes.as_slice()).ok();
            der.map(|key| key.clone_key()).ok_or(not_pem)
        })
        .map_err(|e| TlsError::NotPem {
            what: "private key",
            path: path.clone(),
            reason: e.to_string(),
        })?;
    let bad_key = |e: rustls::Error| TlsError::BadKey {
        path: path.clone(),
        reason: e.to_string(),
    };
    let key = provider
        .key_provider
        .load_private_key(key)
        .map_err(bad_key)?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        // what cannot be compared, such as a certificate of version 1, is the server's to judge
        Err(e @ rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => Err(bad_key(e)),
        _ => Ok(Some(Arc::new(certified))),
    }
}

/// libpq's rule (fe-secure-openssl.c, `initialize_SSL`): a key of root's may be read by a group,
/// since that is how distributions share one; anyone else's is for its owner alone.
fn check_key_access(path: &Path, owner: u32, mode: u32) -> Result<(), TlsError> {
    let forbidden = if owner == 0 { 0o037 } else { 0o077 };
    if mode & forbidden == 0 {
        return Ok(());
    }
    Err(TlsError::KeyTooOpen {
        path: path.to_owned(),
        mode,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let refused = |owner, mode| check_key_access(Path::new("key"), owner, mode).is_err();
        assert!(!refused(1000, 0o600));
        assert!(!refused(1000, 0o400));
        assert!(refused(1000, 0o640));
        assert!(refused(1000, 0o604));
        assert!(!refused(0, 0o600));
        assert!(!refused(0, 0o640));
        assert!(refused(0, 0o660));
        assert!(refused(0, 0o644));
    }
}
