//! Whether a server is who it should be.

use std::net::IpAddr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{
    WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, DigitallySignedStruct, Error, OtherError, RootCertStore, SignatureScheme,
};

use super::certificate::{
    Certificate, MalformedCertificate, Names, public_key_contents, split_public_key,
};

/// Why a server's certificate does not convince.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// Nothing leads from it to a trusted root.
    #[error(
        "the server's certificate was not issued by any of the trusted roots: {reason}; does \
         sslrootcert hold the authority that issued it?"
    )]
    NotTrusted {
        /// What the verification says.
        reason: String,
    },
    /// It is someone else's.
    #[error("the server's certificate is not for this host: host={host}, certificate={names}")]
    WrongName {
        /// The name that the user gave.
        host: String,
        /// Whom it is for.
        names: String,
    },
    /// Its time is over, or has not come.
    #[error("the server's certificate is not valid now; check it and this machine's clock")]
    NotValidNow,
    /// It cannot be read.
    #[error(transparent)]
    Malformed(#[from] MalformedCertificate),
}

impl From<VerifyError> for Error {
    fn from(error: VerifyError) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
    }
}

/// Those who are trusted to sign servers' certificates.
#[derive(Debug)]
pub(super) struct Authorities {
    pub(super) roots: RootCertStore,
    /// The same as they were written, to find a server's own among them.
    pub(super) trusted: Vec<CertificateDer<'static>>,
}

#[derive(Debug)]
pub(super) struct Verifier {
    /// Nothing if any certificate will do.
    pub(super) authorities: Option<Arc<Authorities>>,
    /// The host that the certificate must be for; nothing if any will do.
    pub(super) expected_name: Option<String>,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        if let Some(authorities) = &self.authorities {
            self.verify_issuer(authorities, end_entity, intermediates, now)?;
        }
        if let Some(host) = &self.expected_name {
            let names = Certificate::parse(end_entity)
                .and_then(|certificate| certificate.names())
                .map_err(VerifyError::from)?;
            if !names.include(host) {
                let names = names.to_string();
                return Err(VerifyError::WrongName {
                    host: host.clone(),
                    names,
                }
                .into());
            }
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let parsed = Certificate::parse(certificate).map_err(VerifyError::from)?;
        if parsed.version == 3 {
            return verify_tls12_signature(message, certificate, signed, &self.algorithms);
        }
        if self.is_handshake_signed_by(&parsed, message, signed) {
            return Ok(HandshakeSignatureValid::assertion());
        }
        Err(Error::InvalidCertificate(CertificateError::BadSignature))
    }

    /// By the bare key, since rustls reads no certificate of version 1.
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let certificate = Certificate::parse(certificate).map_err(VerifyError::from)?;
        let key = SubjectPublicKeyInfoDer::from(certificate.public_key_info);
        verify_tls13_signature_with_raw_key(message, &key, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl Verifier {
    fn verify_issuer(
        &self,
        authorities: &Authorities,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), VerifyError> {
        let certificate = Certificate::parse(end_entity)?;
        let trusted_itself = authorities
            .trusted
            .iter()
            .any(|trusted| trusted == end_entity);
        if trusted_itself {
            return check_validity(&certificate, now);
        }
        // webpki reads version 3 alone
        if certificate.version < 3 {
            self.verify_signed_by_root(authorities, &certificate)?;
            return check_validity(&certificate, now);
        }
        let not_trusted = |reason: &Error| VerifyError::NotTrusted {
            reason: reason.to_string(),
        };
        let parsed = ParsedCertificate::try_from(end_entity).map_err(|e| not_trusted(&e))?;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            &authorities.roots,
            intermediates,
            now,
            self.algorithms.all,
        )
        .map_err(|error| match error {
            Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            ) => VerifyError::NotValidNow,
            other => not_trusted(&other),
        })
    }

    /// A certificate of version 1 has no extensions that could limit it, so it is good if a root
    /// signed it directly.
    fn verify_signed_by_root(
        &self,
        authorities: &Authorities,
        certificate: &Certificate<'_>,
    ) -> Result<(), VerifyError> {
        let signed = authorities
            .roots
            .roots
            .iter()
            .filter(|root| root.subject.as_ref() == certificate.issuer)
            // what a root may name is a matter of extensions
            .filter(|root| root.name_constraints.is_none())
            .any(|root| self.is_signed_by(certificate, &root.subject_public_key_info));
        if signed {
            return Ok(());
        }
        let reason = "a certificate of X.509 version 1 must be signed by a root itself".to_owned();
        Err(VerifyError::NotTrusted { reason })
    }

    /// What `verify_tls12_signature` does, for a certificate that rustls does not read: the scheme
    /// leaves the curve open, so all algorithms of its list are tried.
    fn is_handshake_signed_by(
        &self,
        certificate: &Certificate<'_>,
        message: &[u8],
        signed: &DigitallySignedStruct,
    ) -> bool {
        let key_info = certificate.public_key_info;
        let Ok((key_algorithm, key)) = public_key_contents(key_info).and_then(split_public_key)
        else {
            return false;
        };
        self.algorithms
            .mapping
            .iter()
            .filter(|(scheme, _)| *scheme == signed.scheme)
            .flat_map(|(_, algorithms)| algorithms.iter())
            .filter(|algorithm| algorithm.public_key_alg_id().as_ref() == key_algorithm)
            .any(|algorithm| {
                algorithm
                    .verify_signature(key, message, signed.signature())
                    .is_ok()
            })
    }

    /// Whether the owner of a key (contents of its `SubjectPublicKeyInfo`) signed a certificate.
    fn is_signed_by(&self, certificate: &Certificate<'_>, key_info: &[u8]) -> bool {
        let Ok((key_algorithm, key)) = split_public_key(key_info) else {
            return false;
        };
        self.algorithms.all.iter().any(|algorithm| {
            algorithm.signature_alg_id().as_ref() == certificate.signature_algorithm
                && algorithm.public_key_alg_id().as_ref() == key_algorithm
                && algorithm
                    .verify_signature(key, certificate.signed, certificate.signature)
                    .is_ok()
        })
    }
}

fn check_validity(certificate: &Certificate<'_>, now: UnixTime) -> Result<(), VerifyError> {
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    if (certificate.not_before..=certificate.not_after).contains(&now) {
        return Ok(());
    }
    Err(VerifyError::NotValidNow)
}

impl Names {
    /// Whether a certificate with these names is `host`'s (libpq's fe-secure-openssl.c,
    /// `pgtls_verify_peer_name_matches_certificate_guts`): the common name counts only where
    /// there is no alternative name of the host's kind.
    fn include(&self, host: &str) -> bool {
        let common_name = |none: bool| self.common_name.as_deref().filter(|_| none);
        if let Ok(address) = host.parse::<IpAddr>() {
            let bytes = match address {
                IpAddr::V4(address) => address.octets().to_vec(),
                IpAddr::V6(address) => address.octets().to_vec(),
            };
            return self.addresses.contains(&bytes)
                || common_name(self.addresses.is_empty()) == Some(host);
        }
        self.dns.iter().any(|pattern| matches(pattern, host))
            || common_name(self.dns.is_empty()).is_some_and(|pattern| matches(pattern, host))
    }
}

impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let addresses = self.addresses.iter().filter_map(|bytes| {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from))
                .ok()
        });
        let mut shown: Vec<String> = self.dns.clone();
        shown.extend(addresses.map(|address| address.to_string()));
        if shown.is_empty() {
            shown.extend(self.common_name.clone());
        }
        // bounded, as a certificate can hold thousands
        shown.truncate(8);
        f.write_str(&shown.join(","))
    }
}

/// Whether a name in a certificate covers `host`; `*.` stands for exactly one label.
fn matches(pattern: &str, host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    if pattern.is_empty() {
        return false;
    }
    match pattern.strip_prefix("*.") {
        None => pattern.eq_ignore_ascii_case(host),
        Some(domain) => host
            .split_once('.')
            .is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(domain)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dns: &[&str], addresses: &[&[u8]], common_name: Option<&str>) -> Names {
        Names {
            dns: dns.iter().map(|name| (*name).to_owned()).collect(),
            addresses: addresses.iter().map(|address| address.to_vec()).collect(),
            common_name: common_name.map(str::to_owned),
        }
    }

    #[test]
    fn names_match_as_in_libpq() {
        let one = names(&["db.example.com"], &[], Some("other.example.com"));
        assert!(one.include("db.example.com"));
        assert!(one.include("DB.Example.COM"));
        assert!(!one.include("db.example.org"));
        assert!(!one.include("example.com"));
        // a common name beside an alternative name does not count
        assert!(!one.include("other.example.com"));

        let wild = names(&["*.example.com"], &[], None);
        assert!(wild.include("db.example.com"));
        assert!(!wild.include("example.com"));
        assert!(!wild.include("a.db.example.com"));
        assert!(!wild.include(".example.com"));
        assert!(!names(&["*"], &[], None).include("localhost"));
        assert!(!names(&["d*.example.com"], &[], None).include("db.example.com"));

        assert!(names(&[], &[], Some("db")).include("db"));
        assert!(!names(&[], &[], None).include("db"));
        assert!(!names(&[""], &[], None).include(""));
    }

    #[test]
    fn an_address_needs_its_own_entry() {
        let address = names(&["db"], &[&[10, 1, 2, 3]], Some("10.9.9.9"));
        assert!(address.include("10.1.2.3"));
        assert!(!address.include("10.1.2.4"));
        assert!(!address.include("10.9.9.9"));
        assert!(names(&["db"], &[], Some("10.9.9.9")).include("10.9.9.9"));
        let mut v6 = [0; 16];
        v6[15] = 1;
        assert!(names(&[], &[&v6], None).include("::1"));
        // a wildcard covers no address
        assert!(!names(&["*.1.2.3"], &[], None).include("10.1.2.3"));
    }
}
