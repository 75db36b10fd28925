//! The address of a repository: parsed once, cleaned, and refused with a way out.

use std::fmt;
use std::path::PathBuf;

use super::StoreError;

/// Whose object store a bucket is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Provider {
    /// Amazon S3, and what speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Google,
    /// Azure Blob Storage.
    Azure,
}

impl Provider {
    pub(super) fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }

    /// What the provider calls the thing that holds objects.
    pub(super) fn bucket_word(self) -> &'static str {
        match self {
            Self::S3 | Self::Google => "bucket",
            Self::Azure => "container",
        }
    }
}

/// Where a repository lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    /// A folder of this machine.
    Local(PathBuf),
    /// A prefix in a bucket; without slashes at its ends, empty for the whole bucket.
    Bucket {
        provider: Provider,
        bucket: String,
        prefix: String,
    },
}

/// The same repository always prints the same, however its address was written.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(folder) => write!(f, "{}", folder.display()),
            Self::Bucket {
                provider,
                bucket,
                prefix,
            } if prefix.is_empty() => write!(f, "{}://{bucket}", provider.scheme()),
            Self::Bucket {
                provider,
                bucket,
                prefix,
            } => write!(f, "{}://{bucket}/{prefix}", provider.scheme()),
        }
    }
}

impl Address {
    /// Parses what a user wrote. Slashes that are doubled or trail are cleaned; `.`, `..`,
    /// credentials, and queries are refused.
    pub(super) fn parse(url: &str) -> Result<Self, StoreError> {
        let Some((scheme, rest)) = url.split_once("://") else {
            return local(url, url);
        };
        let provider = match scheme {
            "file" => return file(rest, url),
            "s3" => Provider::S3,
            "gs" => Provider::Google,
            "az" => Provider::Azure,
            _ => {
                return Err(
                    bad(url, "its scheme is not known").hint("use s3://, gs://, az:// or file:///")
                );
            }
        };
        if rest.contains(['?', '#']) {
            return Err(
                bad(url, "it has a query").hint("settings such as the endpoint or the region stand beside the url, not in it; %3F and %23 write ? and #")
            );
        }
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        check_bucket(provider, bucket, url)?;
        Ok(Self::Bucket {
            provider,
            bucket: bucket.to_owned(),
            prefix: segments(prefix, url)?.join("/"),
        })
    }
}

/// An address as messages show it: without a query, and without whatever stands before an `@`.
pub(super) fn without_secrets(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    if scheme.is_empty() {
        return url.to_owned();
    }
    let shown = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    let shown = shown.split(['?', '#']).next().unwrap_or(shown);
    let cut = if shown.len() < rest.len() { "…" } else { "" };
    format!("{scheme}://{cut}{shown}")
}

fn bad(url: &str, why: &str) -> StoreError {
    StoreError::url(format!(
        "not the address of a repository, {why}: url={}",
        without_secrets(url)
    ))
}

fn file(rest: &str, url: &str) -> Result<Address, StoreError> {
    let path = rest.strip_prefix("localhost").unwrap_or(rest);
    if !path.starts_with('/') {
        return Err(bad(url, "it names a host")
            .hint("the address of a local folder has three slashes: file:///path/to/repository"));
    }
    local(&decoded(path, url)?, url)
}

fn local(path: &str, url: &str) -> Result<Address, StoreError> {
    if !path.starts_with('/') {
        return Err(StoreError::url(format!(
            "a repository's folder is an absolute path: found {path:?}"
        ))
        .hint(
            "use an absolute path, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix",
        ));
    }
    let mut folder = PathBuf::from("/");
    for part in path.split('/').filter(|part| !part.is_empty()) {
        check_segment(part, url)?;
        folder.push(part);
    }
    if folder.parent().is_none() {
        return Err(StoreError::url(format!(
            "the root of the file system is no place for a repository: found {path:?}"
        ))
        .hint("give it a folder of its own, such as /srv/anywhen"));
    }
    Ok(Address::Local(folder))
}

fn check_bucket(provider: Provider, bucket: &str, url: &str) -> Result<(), StoreError> {
    let word = provider.bucket_word();
    if bucket.is_empty() {
        return Err(
            StoreError::url(format!("the address names no {word}: url={url}"))
                .hint(format!("write {}://{word}/prefix", provider.scheme())),
        );
    }
    if bucket.contains('@') {
        return Err(bad(url, "it holds a user name").hint(
            "credentials come from the environment or the provider's files, never from the address",
        ));
    }
    if bucket.contains(':') {
        return Err(bad(url, "it holds a port").hint(
            "the service's own address goes into the setting endpoint; the url names the bucket",
        ));
    }
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b".-_$".contains(&byte);
    // 222: Google's bound for names with dots, the widest of the three
    if bucket.len() > 222 || bucket.starts_with('.') || !bucket.bytes().all(known) {
        return Err(
            StoreError::url(format!("not the name of a {word}: {bucket:?}"))
                .hint("such names are letters, digits, dots and hyphens"),
        );
    }
    Ok(())
}

fn segments(prefix: &str, url: &str) -> Result<Vec<String>, StoreError> {
    let mut found = Vec::new();
    for part in prefix.split('/').filter(|part| !part.is_empty()) {
        let part = decoded(part, url)?;
        check_segment(&part, url)?;
        if part.contains('/') {
            return Err(bad(url, "it hides a slash in %2F"));
        }
        found.push(part);
    }
    Ok(found)
}

fn check_segment(part: &str, url: &str) -> Result<(), StoreError> {
    if matches!(part, "." | "..") {
        return Err(bad(url, "it holds . or ..").hint("write the folder out in full"));
    }
    if part.chars().any(char::is_control) {
        return Err(bad(url, "it holds a control character"));
    }
    Ok(())
}

fn decoded(path: &str, url: &str) -> Result<String, StoreError> {
    if !path.contains('%') {
        return Ok(path.to_owned());
    }
    let wrong = || bad(url, "its percent-encoding is broken").hint("write %25 for a percent sign");
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next(), rest.next()].map(|digit| digit.and_then(hex));
        let [Some(high), Some(low)] = digits else {
            return Err(wrong());
        };
        bytes.push(high << 4 | low);
    }
    String::from_utf8(bytes).ok().ok_or_else(wrong)
}

fn hex(digit: u8) -> Option<u8> {
    let value = char::from(digit).to_digit(16)?;
    u8::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> String {
        match Address::parse(url) {
            Ok(address) => address.to_string(),
            Err(error) => format!("refused: {error}"),
        }
    }

    #[test]
    fn one_repository_has_one_address_however_it_is_written() {
        // state that is kept per address would be made twice for `s3://b/p` and `s3://b/p/`
        for (url, expected) in [
            ("/a/b", "/a/b"),
            ("/a//b/", "/a/b"),
            ("file:///a/b/", "/a/b"),
            ("file://localhost/a/b", "/a/b"),
            ("file:///a%20b/c", "/a b/c"),
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/", "s3://bucket"),
            ("s3://bucket//", "s3://bucket"),
            ("s3://bucket/a/b", "s3://bucket/a/b"),
            ("s3://bucket//a///b//", "s3://bucket/a/b"),
            ("s3://my.bucket-1/a%20b", "s3://my.bucket-1/a b"),
            ("s3://bucket/a%23b", "s3://bucket/a#b"),
            ("gs://bucket_1/x", "gs://bucket_1/x"),
            ("az://$root/x", "az://$root/x"),
            ("s3://bucket/ä", "s3://bucket/ä"),
        ] {
            assert_eq!(parsed(url), expected, "{url}");
        }
    }

    #[test]
    fn refuses_what_it_does_not_understand_and_says_what_it_is() {
        for (url, word) in [
            ("", "absolute"),
            ("relative/path", "absolute"),
            // all of the machine's files would be taken for objects
            ("/", "root"),
            ("///", "root"),
            ("file:///", "root"),
            ("file://localhost/", "root"),
            ("http://x/", "scheme"),
            ("S3://x/", "scheme"),
            ("s3a://x/", "scheme"),
            ("file://host/path", "host"),
            ("file://", "host"),
            ("file:///a%zz", "percent"),
            ("file:///a%2", "percent"),
            ("file:///a%+1", "percent"),
            ("file:///%ff", "percent"),
            ("file:///a/../b", ".."),
            ("/a/./b", "."),
            ("s3://", "no bucket"),
            ("s3:///prefix", "no bucket"),
            ("az://", "no container"),
            ("s3://localhost:9000/bucket", "port"),
            ("s3://bucket/a/../b", ".."),
            ("s3://bucket/%2e%2e/b", ".."),
            ("s3://bucket/a%2Fb", "slash"),
            ("s3://bucket/a%00b", "control"),
            ("s3://buc ket/a", "name of a bucket"),
            ("s3://../a", "name of a bucket"),
            ("s3://bucket?region=x", "query"),
        ] {
            let said = parsed(url);
            assert!(
                said.starts_with("refused: ") && said.contains(word),
                "{url}: {said}"
            );
        }
    }

    #[test]
    fn a_pasted_secret_is_not_repeated() {
        for url in [
            "s3://KEY:SECRET@bucket/x",
            "http://KEY:SECRET@host/x",
            "s3://bucket/x?secret=SECRET",
            "http://x:SE?CRET:SECRET@host",
            "s3://KEY:SEC/RET/SECRET@bucket/x",
        ] {
            let said = parsed(url);
            assert!(!said.contains("SECRET"), "{said}");
            let shown = format!("{:?}", super::super::StoreOptions::at(url));
            assert!(!shown.contains("SECRET"), "{shown}");
        }
    }
}
