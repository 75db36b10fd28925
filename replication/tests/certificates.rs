//! Certificates made for a test.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
};

/// A certificate and its key, both PEM.
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// One who issues certificates.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = params(name, &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// Its own certificate.
    pub(crate) fn certificate(&self) -> String {
        self.0.pem()
    }

    pub(crate) fn issue(&self, common_name: &str, alternatives: &[&str]) -> Identity {
        let key = KeyPair::generate().unwrap();
        let certificate = params(common_name, alternatives)
            .signed_by(&key, &self.0)
            .unwrap();
        Identity {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        }
    }
}

/// As PostgreSQL's manual makes one: signed by itself and said to be an authority.
pub(crate) fn self_signed(common_name: &str) -> Identity {
    self_signed_from_to(common_name, 2000, 4000)
}

pub(crate) fn self_signed_in_the_past(common_name: &str) -> Identity {
    self_signed_from_to(common_name, 2000, 2001)
}

fn self_signed_from_to(common_name: &str, from_year: i32, to_year: i32) -> Identity {
    let key = KeyPair::generate().unwrap();
    let mut params = params(common_name, &[]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_before = rcgen::date_time_ymd(from_year, 1, 1);
    params.not_after = rcgen::date_time_ymd(to_year, 1, 1);
    let certificate = params.self_signed(&key).unwrap();
    Identity {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    }
}

/// X.509 version 1 with a common name alone, and the certificate of who issued it.
pub(crate) fn of_version_1() -> (Identity, &'static str) {
    let identity = Identity {
        certificate: include_str!("certificates/v1-server.crt").to_owned(),
        key: include_str!("certificates/v1-server.key").to_owned(),
    };
    (identity, include_str!("certificates/v1-root.crt"))
}

/// One whose signature defines no hash for channel binding.
pub(crate) fn of_ed25519() -> Identity {
    Identity {
        certificate: include_str!("certificates/ed25519-server.crt").to_owned(),
        key: include_str!("certificates/ed25519-server.key").to_owned(),
    }
}

fn params(common_name: &str, alternatives: &[&str]) -> CertificateParams {
    let alternatives: Vec<String> = alternatives.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(alternatives).unwrap();
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params
}
