//! Addresses of repositories, as far as it takes to see that two are the same. Pure.
//!
//! Whether an address is one at all is the store's to judge.

/// The address as it is compared: a folder is its path, slashes that are doubled or trail are gone,
/// and percent-encoding is undone.
pub(super) fn cleaned(url: &str) -> String {
    let url = &with_plain_scheme(url);
    let Some((scheme, rest)) = url.split_once("://") else {
        return segments(url, "/");
    };
    let rest = decoded(rest).unwrap_or_else(|| rest.to_owned());
    if scheme == "file" {
        return segments(rest.strip_prefix("localhost").unwrap_or(&rest), "/");
    }
    segments(&rest, &format!("{scheme}://"))
}

/// The address with its scheme in small letters, as which RFC 3986 (section 3.1) has any other.
pub(super) fn with_plain_scheme(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => format!("{}://{rest}", scheme.to_ascii_lowercase()),
        None => url.to_owned(),
    }
}

/// The address as it is shown: its scheme in small letters, without slashes that are doubled or
/// trail. It names the same place; what is no address stays what it was, to be refused as written.
pub(super) fn tidied(url: &str) -> String {
    let url = with_plain_scheme(url);
    if url.contains(['?', '#']) {
        return url;
    }
    let (scheme, rest) = match url.split_once("://") {
        Some((scheme, rest)) => (format!("{scheme}://"), rest),
        None => (String::new(), url.as_str()),
    };
    let Some((authority, path)) = rest.split_once('/') else {
        return url;
    };
    match segments(path, "/") {
        path if path == "/" && !authority.is_empty() => format!("{scheme}{authority}"),
        path => format!("{scheme}{authority}{path}"),
    }
}

/// Whether it is a folder of this machine.
pub(super) fn is_folder(url: &str) -> bool {
    let scheme = url.split_once("://").map(|(scheme, _)| scheme);
    scheme.is_none_or(|scheme| scheme == "file")
}

fn segments(path: &str, beginning: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    format!("{beginning}{}", parts.join("/"))
}

/// `None` where the encoding is broken.
fn decoded(text: &str) -> Option<String> {
    let mut parts = text.split('%');
    let mut bytes = parts.next()?.as_bytes().to_vec();
    for part in parts {
        let digits = part.get(..2)?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        bytes.extend(part.bytes().skip(2));
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_repository_is_one_however_its_address_is_written() {
        for (url, expected) in [
            ("/a//b/", "/a/b"),
            ("file:///a/b/", "/a/b"),
            ("file://localhost/a/b", "/a/b"),
            ("file:///a%20b", "/a b"),
            ("/a%20b", "/a%20b"),
            ("s3://b", "s3://b"),
            ("S3://B", "s3://B"),
            ("s3://b//p///q/", "s3://b/p/q"),
            ("s3://b/a%23b", "s3://b/a#b"),
            ("s3://b/a%2", "s3://b/a%2"),
        ] {
            assert_eq!(cleaned(url), expected, "{url}");
        }
        for (url, expected) in [
            ("/a//b/", "/a/b"),
            ("//a", "/a"),
            ("/", "/"),
            ("FILE:///a/b//", "file:///a/b"),
            ("file://", "file://"),
            ("file:///", "file:///"),
            ("file:///a%20b/", "file:///a%20b"),
            ("file://host//a/", "file://host/a"),
            ("s3://b", "s3://b"),
            ("s3://b/", "s3://b"),
            ("s3://b//p///q/", "s3://b/p/q"),
            ("s3:///p/", "s3:///p"),
            ("s3://b/?x=a//b/", "s3://b/?x=a//b/"),
            ("a/b", "a/b"),
        ] {
            assert_eq!(tidied(url), expected, "{url}");
            assert_eq!(cleaned(url), cleaned(expected), "{url}");
        }
        assert!(is_folder("/a") && is_folder("file:///a") && !is_folder("az://a"));
    }
}
