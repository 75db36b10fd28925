//! The two ways to write a connection string: `keyword = value` pairs and URIs, as libpq reads
//! them (fe-connect.c, `conninfo_parse` and `conninfo_uri_parse_options`).
//!
//! Errors give a position instead of the text around it: what follows a mistyped quote may be a
//! password.

use zeroize::Zeroizing;

/// Why a connection string could not be read. Positions count bytes from 0.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyntaxError {
    /// A word stands where `keyword=` was expected.
    #[error(
        "connection string: missing \"=\" after the word at byte {at} (does a value with a space lack its quotes?)"
    )]
    MissingEquals {
        /// Where the word starts.
        at: usize,
    },
    /// A quote was opened and never closed.
    #[error("connection string: the quote at byte {at} is not closed")]
    UnclosedQuote {
        /// Where the quote stands.
        at: usize,
    },
    /// An IPv6 address in a URI lacks its closing bracket.
    #[error("connection URI: the \"[\" at byte {at} is not closed")]
    UnclosedBracket {
        /// Where the bracket stands.
        at: usize,
    },
    /// `[]` in a URI.
    #[error("connection URI: the IPv6 address at byte {at} is empty")]
    EmptyBrackets {
        /// Where the opening bracket stands.
        at: usize,
    },
    /// A character that cannot stand in this place of a URI.
    #[error(
        "connection URI: expected \":\", \"/\", \"?\", \",\" or the end at byte {at}, found {found:?}"
    )]
    Unexpected {
        /// Where it stands.
        at: usize,
        /// What it is.
        found: char,
    },
    /// A parameter without a value.
    #[error("connection URI: the parameter at byte {at} has no \"=\"")]
    ParameterWithoutValue {
        /// Where the parameter starts.
        at: usize,
    },
    /// A parameter whose value holds a bare `=`.
    #[error("connection URI: the parameter at byte {at} has two \"=\"; write the second as %3D")]
    TwoEquals {
        /// Where the parameter starts.
        at: usize,
    },
    /// `%` without two hexadecimal digits.
    #[error("connection URI: \"%\" at byte {at} is not followed by two hexadecimal digits")]
    BadPercent {
        /// Where the percent sign stands.
        at: usize,
    },
    /// `%00`.
    #[error("connection URI: %00 at byte {at} is not allowed")]
    PercentZero {
        /// Where the percent sign stands.
        at: usize,
    },
    /// Percent-encoded bytes that are no text.
    #[error("connection URI: what starts at byte {at} is not UTF-8 once decoded")]
    NotUtf8 {
        /// Where the encoded text starts.
        at: usize,
    },
    /// A bare space within a URI.
    #[error("connection URI: space at byte {at}; write it as %20")]
    Space {
        /// Where it stands.
        at: usize,
    },
}

/// A keyword and its value, in the order written.
pub(crate) type Pair = (String, Zeroizing<String>);

/// Reads a connection string of either form.
pub(crate) fn parse(conninfo: &str) -> Result<Vec<Pair>, SyntaxError> {
    for prefix in ["postgresql://", "postgres://"] {
        if let Some(rest) = conninfo.strip_prefix(prefix) {
            return Uri {
                whole: conninfo,
                rest,
                pairs: Vec::new(),
            }
            .parse();
        }
    }
    parse_pairs(conninfo)
}

fn parse_pairs(text: &str) -> Result<Vec<Pair>, SyntaxError> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let at = text.len() - rest.len();
        let name_end = rest.find(|c| c == '=' || is_space(c)).unwrap_or(rest.len());
        let name = &rest[..name_end];
        rest = rest[name_end..].trim_start_matches(is_space);
        rest = rest
            .strip_prefix('=')
            .ok_or(SyntaxError::MissingEquals { at })?;
        rest = rest.trim_start_matches(is_space);
        let at = text.len() - rest.len();
        let (value, after) = match rest.strip_prefix('\'') {
            Some(quoted) => take_value(quoted, true).ok_or(SyntaxError::UnclosedQuote { at })?,
            None => take_value(rest, false).expect("an unquoted value ends with the text"),
        };
        pairs.push((name.to_owned(), value));
        rest = after.trim_start_matches(is_space);
    }
    Ok(pairs)
}

/// A value and what follows it; a backslash takes the next character as it is. Nothing if a
/// quoted value does not end.
fn take_value(text: &str, quoted: bool) -> Option<(Zeroizing<String>, &str)> {
    // never grows, so that no copy of a password stays behind in memory
    let mut value = Zeroizing::new(String::with_capacity(text.len()));
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Some((value, &text[at + 1..])),
            c if !quoted && is_space(c) => return Some((value, &text[at..])),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, ""))
}

/// `isspace` in the C locale.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

struct Uri<'a> {
    whole: &'a str,
    rest: &'a str,
    pairs: Vec<Pair>,
}

impl<'a> Uri<'a> {
    fn parse(mut self) -> Result<Vec<Pair>, SyntaxError> {
        self.user_info()?;
        self.hosts()?;
        if let Some(rest) = self.rest.strip_prefix('/') {
            self.rest = rest;
            let (name, at) = self.take_until(&['?']);
            if !name.is_empty() {
                self.push("dbname", name, at)?;
            }
        }
        if let Some(rest) = self.rest.strip_prefix('?') {
            self.rest = rest;
            self.parameters()?;
        }
        Ok(self.pairs)
    }

    /// `user[:password]@`, there only if an `@` comes before the first `/`.
    fn user_info(&mut self) -> Result<(), SyntaxError> {
        let Some(end) = self.rest.find(['@', '/']) else {
            return Ok(());
        };
        if !self.rest[end..].starts_with('@') {
            return Ok(());
        }
        let (user, at) = self.take_until(&[':', '@']);
        if !user.is_empty() {
            self.push("user", user, at)?;
        }
        if let Some(rest) = self.rest.strip_prefix(':') {
            self.rest = rest;
            let (password, at) = self.take_until(&['@']);
            if !password.is_empty() {
                self.push("password", password, at)?;
            }
        }
        self.rest = &self.rest[1..];
        Ok(())
    }

    /// `host[:port]`, separated by commas; as in libpq, any number of either may be empty.
    fn hosts(&mut self) -> Result<(), SyntaxError> {
        let mut hosts = Zeroizing::new(String::new());
        let mut ports = Zeroizing::new(String::new());
        loop {
            if let Some(inside) = self.rest.strip_prefix('[') {
                let at = self.at();
                let end = inside
                    .find(']')
                    .ok_or(SyntaxError::UnclosedBracket { at })?;
                if end == 0 {
                    return Err(SyntaxError::EmptyBrackets { at });
                }
                hosts.push_str(&decode(&inside[..end], at + 1)?);
                self.rest = &inside[end + 1..];
                if let Some(found) = self.rest.chars().next()
                    && !matches!(found, ':' | '/' | '?' | ',')
                {
                    return Err(SyntaxError::Unexpected {
                        at: self.at(),
                        found,
                    });
                }
            } else {
                let (host, at) = self.take_until(&[':', '/', '?', ',']);
                hosts.push_str(&decode(host, at)?);
            }
            if let Some(rest) = self.rest.strip_prefix(':') {
                self.rest = rest;
                let (port, at) = self.take_until(&['/', '?', ',']);
                ports.push_str(&decode(port, at)?);
            }
            let Some(rest) = self.rest.strip_prefix(',') else {
                break;
            };
            self.rest = rest;
            hosts.push(',');
            ports.push(',');
        }
        if !hosts.is_empty() {
            self.pairs.push(("host".to_owned(), hosts));
        }
        if !ports.is_empty() {
            self.pairs.push(("port".to_owned(), ports));
        }
        Ok(())
    }

    fn parameters(&mut self) -> Result<(), SyntaxError> {
        while !self.rest.is_empty() {
            let (parameter, at) = self.take_until(&['&']);
            self.rest = self.rest.strip_prefix('&').unwrap_or(self.rest);
            let (name, value) = parameter
                .split_once('=')
                .ok_or(SyntaxError::ParameterWithoutValue { at })?;
            if value.contains('=') {
                return Err(SyntaxError::TwoEquals { at });
            }
            let value_at = at + name.len() + 1;
            let name = decode(name, at)?;
            // JDBC's spelling, which libpq takes too
            if name.as_str() == "ssl" && value == "true" {
                self.push("sslmode", "require", value_at)?;
            } else {
                self.push(&name, value, value_at)?;
            }
        }
        Ok(())
    }

    fn push(&mut self, name: &str, encoded: &str, at: usize) -> Result<(), SyntaxError> {
        self.pairs.push((name.to_owned(), decode(encoded, at)?));
        Ok(())
    }

    /// Takes everything before the first of `ends`, and says where it started.
    fn take_until(&mut self, ends: &[char]) -> (&'a str, usize) {
        let at = self.at();
        let (taken, rest) = self
            .rest
            .split_at(self.rest.find(ends).unwrap_or(self.rest.len()));
        self.rest = rest;
        (taken, at)
    }

    fn at(&self) -> usize {
        self.whole.len() - self.rest.len()
    }
}

/// Decodes `%XX`; `at` is where `text` starts in the URI.
fn decode(text: &str, at: usize) -> Result<Zeroizing<String>, SyntaxError> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len()));
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let here = at + text.len() - rest.len();
        rest = after;
        if is_space(char::from(byte)) {
            return Err(SyntaxError::Space { at: here });
        }
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |i: usize| after.get(i).and_then(|&d| char::from(d).to_digit(16));
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return Err(SyntaxError::BadPercent { at: here });
        };
        let decoded = u8::try_from(high * 16 + low).expect("two hexadecimal digits are a byte");
        if decoded == 0 {
            return Err(SyntaxError::PercentZero { at: here });
        }
        bytes.push(decoded);
        rest = &after[2..];
    }
    match std::str::from_utf8(&bytes) {
        Ok(decoded) => Ok(Zeroizing::new(decoded.to_owned())),
        Err(_) => Err(SyntaxError::NotUtf8 { at }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(conninfo: &str) -> Result<Vec<(String, String)>, SyntaxError> {
        let pairs = parse(conninfo)?;
        Ok(pairs
            .into_iter()
            .map(|(name, value)| (name, value.to_string()))
            .collect())
    }

    fn assert_parses(conninfo: &str, expected: &[(&str, &str)]) {
        let expected: Vec<_> = expected
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect();
        assert_eq!(parsed(conninfo).unwrap(), expected, "{conninfo:?}");
    }

    #[test]
    fn keyword_strings_are_read_as_libpq_reads_them() {
        assert_parses("", &[]);
        assert_parses("  \t\n", &[]);
        assert_parses("host=a port=1", &[("host", "a"), ("port", "1")]);
        assert_parses(" host = a\tport =1 ", &[("host", "a"), ("port", "1")]);
        assert_parses("password='a b'", &[("password", "a b")]);
        assert_parses(r"password='it\'s \\ here'", &[("password", r"it's \ here")]);
        assert_parses(r"password=a\ b", &[("password", "a b")]);
        assert_parses(r"password=a\", &[("password", "a")]);
        assert_parses("password=a'b", &[("password", "a'b")]);
        assert_parses("host='' port=''", &[("host", ""), ("port", "")]);
        assert_parses("host='a'port=1", &[("host", "a"), ("port", "1")]);
        assert_parses("host= port=1", &[("host", "port=1")]);
        assert_parses("options='-c a=b'", &[("options", "-c a=b")]);
        assert_parses("password=ü€", &[("password", "ü€")]);
        assert_parses("=x", &[("", "x")]);
    }

    #[test]
    fn faults_in_keyword_strings_are_located() {
        assert_eq!(parsed("host"), Err(SyntaxError::MissingEquals { at: 0 }));
        assert_eq!(
            parsed("host=a b"),
            Err(SyntaxError::MissingEquals { at: 7 })
        );
        assert_eq!(parsed("host='a"), Err(SyntaxError::UnclosedQuote { at: 5 }));
        assert_eq!(
            parsed(r"host='a\'"),
            Err(SyntaxError::UnclosedQuote { at: 5 })
        );
    }

    #[test]
    fn uris_are_read_as_libpq_reads_them() {
        assert_parses("postgresql://", &[]);
        assert_parses("postgres://", &[]);
        assert_parses("postgresql:///", &[]);
        assert_parses("postgresql://host", &[("host", "host")]);
        assert_parses("postgresql://host:1/", &[("host", "host"), ("port", "1")]);
        assert_parses(
            "postgresql://host:/db",
            &[("host", "host"), ("dbname", "db")],
        );
        assert_parses(
            "postgresql://u:p@host:1/db?sslmode=require&application_name=x",
            &[
                ("user", "u"),
                ("password", "p"),
                ("host", "host"),
                ("port", "1"),
                ("dbname", "db"),
                ("sslmode", "require"),
                ("application_name", "x"),
            ],
        );
        assert_parses("postgresql://u@host", &[("user", "u"), ("host", "host")]);
        assert_parses("postgresql://u:@host", &[("user", "u"), ("host", "host")]);
        assert_parses(
            "postgresql://:p@host",
            &[("password", "p"), ("host", "host")],
        );
        assert_parses("postgresql://@host", &[("host", "host")]);
        assert_parses("postgresql://u@", &[("user", "u")]);
        assert_parses(
            "postgresql://u%40x:p%3A%2F@h%6Fst/d%20b",
            &[
                ("user", "u@x"),
                ("password", "p:/"),
                ("host", "host"),
                ("dbname", "d b"),
            ],
        );
        assert_parses("postgresql://[::1]", &[("host", "::1")]);
        assert_parses(
            "postgresql://[::1]:5/d",
            &[("host", "::1"), ("port", "5"), ("dbname", "d")],
        );
        assert_parses(
            "postgresql://[fe80::1%25eth0]/",
            &[("host", "fe80::1%eth0")],
        );
        assert_parses(
            "postgresql://a,b:2,[::1]:3",
            &[("host", "a,b,::1"), ("port", ",2,3")],
        );
        assert_parses(
            "postgresql://%2Ftmp%2Fsock/d",
            &[("host", "/tmp/sock"), ("dbname", "d")],
        );
        assert_parses(
            "postgresql:///d?host=/tmp",
            &[("dbname", "d"), ("host", "/tmp")],
        );
        assert_parses("postgresql://?host=a", &[("host", "a")]);
        assert_parses(
            "postgresql://h?ssl=true",
            &[("host", "h"), ("sslmode", "require")],
        );
        assert_parses("postgresql://h/?a=", &[("host", "h"), ("a", "")]);
        assert_parses("postgresql://h/?a=b&", &[("host", "h"), ("a", "b")]);
        // an @ after the first slash is no user's
        assert_parses("postgresql://h/d@e", &[("host", "h"), ("dbname", "d@e")]);
    }

    #[test]
    fn faults_in_uris_are_located() {
        let cases = [
            ("postgresql://[::1", SyntaxError::UnclosedBracket { at: 13 }),
            ("postgresql://[]", SyntaxError::EmptyBrackets { at: 13 }),
            (
                "postgresql://[::1]z",
                SyntaxError::Unexpected { at: 18, found: 'z' },
            ),
            (
                "postgresql://h/?a",
                SyntaxError::ParameterWithoutValue { at: 16 },
            ),
            (
                "postgresql://h/?&",
                SyntaxError::ParameterWithoutValue { at: 16 },
            ),
            ("postgresql://h/?a=b=c", SyntaxError::TwoEquals { at: 16 }),
            ("postgresql://h%", SyntaxError::BadPercent { at: 14 }),
            ("postgresql://h%1", SyntaxError::BadPercent { at: 14 }),
            ("postgresql://h%zz", SyntaxError::BadPercent { at: 14 }),
            ("postgresql://h%1é", SyntaxError::BadPercent { at: 14 }),
            ("postgresql://h%00", SyntaxError::PercentZero { at: 14 }),
            ("postgresql://%ff", SyntaxError::NotUtf8 { at: 13 }),
            ("postgresql://h/d b", SyntaxError::Space { at: 16 }),
        ];
        for (uri, expected) in cases {
            assert_eq!(parsed(uri), Err(expected), "{uri:?}");
        }
    }

    /// A password that lacks its quotes used to end up in logs by way of "missing = after …".
    #[test]
    fn an_error_never_quotes_what_may_be_a_password() {
        for conninfo in [
            "password=correct horse",
            "password='correct horse",
            "postgresql://u:correct horse@h",
            "postgresql://u:horse%zz@h",
        ] {
            let error = parsed(conninfo).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("horse"), "{error}");
        }
    }

    /// Anything a user pastes is refused or read, never a panic in the middle of a character.
    #[test]
    fn takes_any_text_without_panicking() {
        let pieces = [
            "postgresql://",
            "[",
            "]",
            "%",
            "%4",
            "é",
            "'",
            "\\",
            "=",
            "&",
            "?",
            ",",
            ":",
        ];
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..8 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                text.push_str(pieces[usize::try_from(state % 13).unwrap()]);
            }
            let outcome = parse(&text);
            assert!(outcome.is_ok() || outcome.is_err());
        }
    }
}
