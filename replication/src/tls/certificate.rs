//! As much of X.509 as logging in to PostgreSQL needs beyond what webpki does: version 1
//! certificates, common names, and the hash for channel binding.
//!
//! PostgreSQL's manual makes certificates with `openssl x509 -req`, which were of version 1 for
//! many years, with a common name and no alternative names; libpq takes both.

/// A certificate's parts, as slices of its DER (RFC 5280, 4.1).
#[derive(Debug)]
pub(crate) struct Certificate<'a> {
    /// 1 to 3.
    pub(crate) version: u8,
    /// What is signed, header included.
    pub(crate) signed: &'a [u8],
    /// Contents of the issuer's name.
    pub(crate) issuer: &'a [u8],
    subject: &'a [u8],
    /// Validity, both ends included, in seconds since 1970.
    pub(crate) not_before: i64,
    pub(crate) not_after: i64,
    /// The public key with its algorithm, header included.
    pub(crate) public_key_info: &'a [u8],
    /// Contents of the signature's `AlgorithmIdentifier`.
    pub(crate) signature_algorithm: &'a [u8],
    pub(crate) signature: &'a [u8],
    extensions: Option<&'a [u8]>,
}

/// A certificate that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed certificate: {part}")]
pub struct MalformedCertificate {
    /// The part that is not as it should be.
    pub part: &'static str,
}

/// Names that a certificate is for.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) dns: Vec<String>,
    /// 4 or 16 bytes each.
    pub(crate) addresses: Vec<Vec<u8>>,
    /// The subject's last common name, as OpenSSL takes it.
    pub(crate) common_name: Option<String>,
}

mod tag {
    pub(super) const BOOLEAN: u8 = 0x01;
    pub(super) const INTEGER: u8 = 0x02;
    pub(super) const BIT_STRING: u8 = 0x03;
    pub(super) const OCTET_STRING: u8 = 0x04;
    pub(super) const OID: u8 = 0x06;
    pub(super) const UTF8_STRING: u8 = 0x0c;
    pub(super) const PRINTABLE_STRING: u8 = 0x13;
    pub(super) const TELETEX_STRING: u8 = 0x14;
    pub(super) const IA5_STRING: u8 = 0x16;
    pub(super) const UTC_TIME: u8 = 0x17;
    pub(super) const GENERALIZED_TIME: u8 = 0x18;
    pub(super) const SEQUENCE: u8 = 0x30;
    pub(super) const SET: u8 = 0x31;
    /// `[0]` explicit: the version, or the hash of an RSA-PSS signature.
    pub(super) const CONTEXT_0: u8 = 0xa0;
    pub(super) const CONTEXT_1: u8 = 0x81;
    pub(super) const CONTEXT_2: u8 = 0x82;
    pub(super) const EXTENSIONS: u8 = 0xa3;
    /// In `GeneralName`: `[2]` and `[7]` implicit.
    pub(super) const DNS_NAME: u8 = 0x82;
    pub(super) const IP_ADDRESS: u8 = 0x87;
}

const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];

impl<'a> Certificate<'a> {
    /// Reads a certificate. `der` may be hostile: never panics, allocates nothing.
    pub(crate) fn parse(der: &'a [u8]) -> Result<Self, MalformedCertificate> {
        let mut whole = Der(der);
        let mut outer = whole.enter(tag::SEQUENCE, "certificate")?;
        whole.end("certificate")?;
        let (signed, mut inner) = outer.enter_whole(tag::SEQUENCE, "signed part")?;

        let version = match inner.optional(tag::CONTEXT_0)? {
            None => 1,
            Some(mut explicit) => match explicit.take(tag::INTEGER, "version")? {
                [0] => 1,
                [1] => 2,
                [2] => 3,
                _ => return Err(MalformedCertificate { part: "version" }),
            },
        };
        inner.take(tag::INTEGER, "serial number")?;
        inner.take(tag::SEQUENCE, "inner signature algorithm")?;
        let issuer = inner.take(tag::SEQUENCE, "issuer")?;
        let mut validity = inner.enter(tag::SEQUENCE, "validity")?;
        let not_before = validity.time()?;
        let not_after = validity.time()?;
        let subject = inner.take(tag::SEQUENCE, "subject")?;
        let (public_key_info, _) = inner.enter_whole(tag::SEQUENCE, "public key")?;
        inner.optional(tag::CONTEXT_1)?;
        inner.optional(tag::CONTEXT_2)?;
        let extensions = match inner.optional(tag::EXTENSIONS)? {
            None => None,
            Some(mut explicit) => Some(explicit.take(tag::SEQUENCE, "extensions")?),
        };
        inner.end("signed part")?;

        let signature_algorithm = outer.take(tag::SEQUENCE, "signature algorithm")?;
        let signature = outer.bits("signature")?;
        outer.end("certificate")?;
        Ok(Self {
            version,
            signed,
            issuer,
            subject,
            not_before,
            not_after,
            public_key_info,
            signature_algorithm,
            signature,
            extensions,
        })
    }

    /// The names that the certificate is for.
    pub(crate) fn names(&self) -> Result<Names, MalformedCertificate> {
        let mut names = Names::default();
        let mut subject = Der(self.subject);
        while !subject.0.is_empty() {
            let mut set = subject.enter(tag::SET, "subject")?;
            while !set.0.is_empty() {
                let mut attribute = set.enter(tag::SEQUENCE, "subject")?;
                if attribute.take(tag::OID, "subject")? == COMMON_NAME {
                    names.common_name = attribute.string();
                }
            }
        }
        let mut extensions = Der(self.extensions.unwrap_or_default());
        while !extensions.0.is_empty() {
            let mut extension = extensions.enter(tag::SEQUENCE, "extension")?;
            let id = extension.take(tag::OID, "extension")?;
            extension.optional(tag::BOOLEAN)?;
            let value = extension.take(tag::OCTET_STRING, "extension")?;
            if id != SUBJECT_ALT_NAME {
                continue;
            }
            let mut alternatives = Der(value).enter(tag::SEQUENCE, "alternative names")?;
            while !alternatives.0.is_empty() {
                match alternatives.any("alternative name")? {
                    (tag::DNS_NAME, name) => names.dns.extend(ascii(name)),
                    (tag::IP_ADDRESS, address) => names.addresses.push(address.to_vec()),
                    _ => {}
                }
            }
        }
        Ok(names)
    }

    /// The hash that the certificate's signature was made over.
    pub(crate) fn signature_hash(&self) -> Option<SignatureHash> {
        signature_hash(self.signature_algorithm)
    }
}

/// The key of a `SubjectPublicKeyInfo` (its contents), apart from its algorithm.
pub(crate) fn split_public_key(info: &[u8]) -> Result<(&[u8], &[u8]), MalformedCertificate> {
    let mut info = Der(info);
    let algorithm = info.take(tag::SEQUENCE, "public key")?;
    let key = info.bits("public key")?;
    info.end("public key")?;
    Ok((algorithm, key))
}

/// The contents of a `SubjectPublicKeyInfo`.
pub(crate) fn public_key_contents(info: &[u8]) -> Result<&[u8], MalformedCertificate> {
    Der(info).take(tag::SEQUENCE, "public key")
}

/// A hash function by RFC 5929's reckoning: what is weaker than SHA-256 counts as SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SignatureHash {
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

fn signature_hash(algorithm: &[u8]) -> Option<SignatureHash> {
    use SignatureHash::{Sha224, Sha256, Sha384, Sha512};
    // 1.2.840.113549.1.1 (PKCS #1), 1.2.840.10045.4 (ECDSA), 2.16.840.1.101.3.4.2 (hashes)
    const PKCS1: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
    const ECDSA: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04];
    const HASHES: &[u8] = &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02];

    let mut algorithm = Der(algorithm);
    let id = algorithm.take(tag::OID, "signature algorithm").ok()?;
    if let Some(id) = id.strip_prefix(PKCS1) {
        return match id {
            // MD5, SHA-1
            [4 | 5 | 11] => Some(Sha256),
            [12] => Some(Sha384),
            [13] => Some(Sha512),
            [14] => Some(Sha224),
            // RSA-PSS names its hash in the parameters, SHA-1 if it does not
            [10] => {
                let mut parameters = algorithm
                    .optional(tag::SEQUENCE)
                    .ok()
                    .flatten()
                    .unwrap_or(Der(&[]));
                let Some(mut hash) = parameters.optional(tag::CONTEXT_0).ok()? else {
                    return Some(Sha256);
                };
                let mut hash = hash.enter(tag::SEQUENCE, "hash algorithm").ok()?;
                match hash
                    .take(tag::OID, "hash algorithm")
                    .ok()?
                    .strip_prefix(HASHES)?
                {
                    [1] => Some(Sha256),
                    [2] => Some(Sha384),
                    [3] => Some(Sha512),
                    [4] => Some(Sha224),
                    _ => None,
                }
            }
            _ => None,
        };
    }
    match id.strip_prefix(ECDSA)? {
        [1] | [3, 2] => Some(Sha256),
        [3, 1] => Some(Sha224),
        [3, 3] => Some(Sha384),
        [3, 4] => Some(Sha512),
        _ => None,
    }
}

/// What is left to read of some DER.
struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The next value, whatever it is: its tag and contents.
    fn any(&mut self, part: &'static str) -> Result<(u8, &'a [u8]), MalformedCertificate> {
        let malformed = MalformedCertificate { part };
        let (&tag, rest) = self.0.split_first().ok_or(malformed)?;
        // tags of more than one byte have no place in a certificate
        if tag & 0x1f == 0x1f {
            return Err(malformed);
        }
        let (&first, rest) = rest.split_first().ok_or(malformed)?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81 => {
                let (&[a], rest) = rest.split_first_chunk::<1>().ok_or(malformed)?;
                (usize::from(a), rest)
            }
            0x82 => {
                let (&bytes, rest) = rest.split_first_chunk::<2>().ok_or(malformed)?;
                (usize::from(u16::from_be_bytes(bytes)), rest)
            }
            // 64 KiB are enough for a certificate
            _ => return Err(malformed),
        };
        let (value, rest) = rest.split_at_checked(length).ok_or(malformed)?;
        self.0 = rest;
        Ok((tag, value))
    }

    /// The contents of the next value, which must bear this tag.
    fn take(&mut self, tag: u8, part: &'static str) -> Result<&'a [u8], MalformedCertificate> {
        match self.any(part)? {
            (found, value) if found == tag => Ok(value),
            _ => Err(MalformedCertificate { part }),
        }
    }

    fn enter(&mut self, tag: u8, part: &'static str) -> Result<Self, MalformedCertificate> {
        self.take(tag, part).map(Der)
    }

    /// The next value with its header, and its contents.
    fn enter_whole(
        &mut self,
        tag: u8,
        part: &'static str,
    ) -> Result<(&'a [u8], Self), MalformedCertificate> {
        let before = self.0;
        let inner = self.enter(tag, part)?;
        Ok((&before[..before.len() - self.0.len()], inner))
    }

    fn optional(&mut self, tag: u8) -> Result<Option<Self>, MalformedCertificate> {
        if self.0.first() == Some(&tag) {
            return self.enter(tag, "optional part").map(Some);
        }
        Ok(None)
    }

    /// A bit string of whole bytes.
    fn bits(&mut self, part: &'static str) -> Result<&'a [u8], MalformedCertificate> {
        match self.take(tag::BIT_STRING, part)? {
            [0, bytes @ ..] => Ok(bytes),
            _ => Err(MalformedCertificate { part }),
        }
    }

    /// A string of a name; nothing if its kind or its bytes are no text that a host is named in.
    fn string(&mut self) -> Option<String> {
        match self.any("name").ok()? {
            (
                tag::UTF8_STRING | tag::PRINTABLE_STRING | tag::TELETEX_STRING | tag::IA5_STRING,
                text,
            ) => {
                let text = std::str::from_utf8(text).ok()?;
                // a zero byte would hide what follows it from code in C
                (!text.contains('\0')).then(|| text.to_owned())
            }
            _ => None,
        }
    }

    fn time(&mut self) -> Result<i64, MalformedCertificate> {
        let malformed = MalformedCertificate { part: "validity" };
        let (tag, text) = self.any("validity")?;
        let digits = text.strip_suffix(b"Z").ok_or(malformed)?;
        if !digits.iter().all(u8::is_ascii_digit) {
            return Err(malformed);
        }
        let two = |at: usize| i64::from(digits[at] - b'0') * 10 + i64::from(digits[at + 1] - b'0');
        let (year, at) = match (tag, digits.len()) {
            // RFC 5280, 4.1.2.5.1: two digits mean 1950 to 2049
            (tag::UTC_TIME, 12) => (
                if two(0) < 50 {
                    2000 + two(0)
                } else {
                    1900 + two(0)
                },
                2,
            ),
            (tag::GENERALIZED_TIME, 14) => (two(0) * 100 + two(2), 4),
            _ => return Err(malformed),
        };
        let (month, day) = (two(at), two(at + 2));
        if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return Err(malformed);
        }
        let (hour, minute, second) = (two(at + 4), two(at + 6), two(at + 8));
        Ok(((days_since_1970(year, month, day) * 24 + hour) * 60 + minute) * 60 + second)
    }

    fn end(&self, part: &'static str) -> Result<(), MalformedCertificate> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(MalformedCertificate { part })
        }
    }
}

fn ascii(bytes: &[u8]) -> Option<String> {
    (bytes.is_ascii() && !bytes.contains(&0))
        .then(|| bytes.iter().map(|&byte| char::from(byte)).collect())
}

/// Days of the Gregorian calendar, counting years from March so that the leap day comes last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month = (month + 9) % 12;
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    365 * year + leap_days + (153 * month + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_counted_over_leap_years() {
        assert_eq!(days_since_1970(1970, 1, 1), 0);
        assert_eq!(days_since_1970(2000, 2, 29), 11_016);
        assert_eq!(days_since_1970(2000, 3, 1), 11_017);
        assert_eq!(days_since_1970(2026, 11, 20), 20_777);
        assert_eq!(days_since_1970(1950, 1, 1), -7305);
    }

    #[test]
    fn the_hash_for_channel_binding_follows_the_signature() {
        let algorithm = |id: &[u8]| {
            [
                &[tag::OID, u8::try_from(id.len()).unwrap()],
                id,
                &[0x05, 0x00],
            ]
            .concat()
        };
        let pkcs1 = [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01];
        let rsa = |last: u8| algorithm(&[&pkcs1[..], &[last]].concat());
        assert_eq!(
            signature_hash(&rsa(4)),
            Some(SignatureHash::Sha256),
            "MD5 counts as SHA-256"
        );
        assert_eq!(
            signature_hash(&rsa(5)),
            Some(SignatureHash::Sha256),
            "and so does SHA-1"
        );
        assert_eq!(signature_hash(&rsa(11)), Some(SignatureHash::Sha256));
        assert_eq!(signature_hash(&rsa(12)), Some(SignatureHash::Sha384));
        assert_eq!(signature_hash(&rsa(13)), Some(SignatureHash::Sha512));
        let ecdsa = |last: u8| algorithm(&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, last]);
        assert_eq!(signature_hash(&ecdsa(3)), Some(SignatureHash::Sha384));
        // Ed25519 has no hash of its own
        assert_eq!(signature_hash(&algorithm(&[0x2b, 0x65, 0x70])), None);
        // RSA-PSS with SHA-512
        let pss = [
            &[0x06, 0x09][..],
            &pkcs1,
            &[0x0a],
            &[0x30, 0x0f, 0xa0, 0x0d, 0x30, 0x0b, 0x06, 0x09],
            &[0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03],
        ]
        .concat();
        assert_eq!(signature_hash(&pss), Some(SignatureHash::Sha512));
        assert_eq!(signature_hash(&[]), None);
    }

    /// The certificate comes from the other side, before anything of it is verified.
    #[test]
    fn takes_any_bytes_without_panicking() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params =
            rcgen::CertificateParams::new(vec!["db.example".into(), "10.1.2.3".into()]).unwrap();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "common");
        let der = params.self_signed(&key).unwrap().der().to_vec();
        let certificate = Certificate::parse(&der).unwrap();
        assert_eq!(certificate.version, 3);
        assert!(certificate.not_before < certificate.not_after);
        let names = certificate.names().unwrap();
        assert_eq!(names.dns, ["db.example"]);
        assert_eq!(names.addresses, [[10, 1, 2, 3]]);
        assert_eq!(names.common_name.as_deref(), Some("common"));

        let read = |der: &[u8]| {
            Certificate::parse(der).is_ok_and(|c| c.names().is_ok() && c.signature_hash().is_some())
        };
        assert!(read(&der));
        for end in 0..der.len() {
            assert!(!read(&der[..end]), "cut at {end}");
        }
        let mut read_anyway = 0_u32;
        for at in 0..der.len() {
            for flip in [0x01, 0x80, 0xff] {
                let mut damaged = der.clone();
                damaged[at] ^= flip;
                read_anyway += u32::from(read(&damaged));
            }
        }
        assert!(
            read_anyway > 0,
            "a flipped bit of the key or the signature reads all the same"
        );
    }
}
