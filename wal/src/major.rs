//! The majors of PostgreSQL whose log can be read, and how they differ.

use std::fmt;

/// A major version of PostgreSQL whose log format is known.
///
/// The log of any other version can be kept, since page headers have had one layout for decades,
/// but not be followed record by record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Major {
    /// PostgreSQL 13.
    V13,
    /// PostgreSQL 14.
    V14,
    /// PostgreSQL 15.
    V15,
    /// PostgreSQL 16.
    V16,
    /// PostgreSQL 17.
    V17,
    /// PostgreSQL 18.
    V18,
    /// PostgreSQL 19.
    V19,
}

/// What tells one major from another.
struct Row {
    major: Major,
    number: u32,
    /// `xlog_internal.h`, `XLOG_PAGE_MAGIC`
    page_magic: u16,
    /// `pg_control.h`, `PG_CONTROL_VERSION`
    control_version: u32,
    /// `catversion.h`, `CATALOG_VERSION_NO`: the smallest and the largest that we take for it
    catalog_versions: (u32, u32),
}

// 13 to 16 share a control version, so their catalog versions, which are dates, tell them apart.
const ROWS: [Row; 7] = [
    row(Major::V13, 13, 0xD106, 1300, (202_007_201, 202_007_209)),
    row(Major::V14, 14, 0xD10D, 1300, (202_107_181, 202_107_189)),
    row(Major::V15, 15, 0xD110, 1300, (202_209_061, 202_209_069)),
    row(Major::V16, 16, 0xD113, 1300, (202_307_071, 202_307_079)),
    row(Major::V17, 17, 0xD116, 1700, (0, u32::MAX)),
    row(Major::V18, 18, 0xD118, 1800, (0, u32::MAX)),
    row(Major::V19, 19, 0xD122, 1905, (0, u32::MAX)),
];

const fn row(
    major: Major,
    number: u32,
    page_magic: u16,
    control_version: u32,
    catalog_versions: (u32, u32),
) -> Row {
    Row {
        major,
        number,
        page_magic,
        control_version,
        catalog_versions,
    }
}

impl Major {
    /// Every known major, oldest first.
    pub const ALL: [Self; 7] = [
        Self::V13,
        Self::V14,
        Self::V15,
        Self::V16,
        Self::V17,
        Self::V18,
        Self::V19,
    ];

    /// The major whose pages carry this magic.
    pub fn from_page_magic(magic: u16) -> Option<Self> {
        ROWS.iter()
            .find(|row| row.page_magic == magic)
            .map(|row| row.major)
    }

    /// The major with this number, as in `server_version_num / 10000`.
    pub fn from_number(number: u32) -> Option<Self> {
        ROWS.iter()
            .find(|row| row.number == number)
            .map(|row| row.major)
    }

    /// The major that writes `pg_control` with this version and catalog version.
    pub fn from_control_version(control_version: u32, catalog_version: u32) -> Option<Self> {
        let known = |row: &&Row| {
            let (from, to) = row.catalog_versions;
            row.control_version == control_version && (from..=to).contains(&catalog_version)
        };
        ROWS.iter().find(known).map(|row| row.major)
    }

    /// 13 to 19.
    pub fn number(self) -> u32 {
        self.row().number
    }

    /// The first two bytes of every page (`xlog_internal.h`, `XLOG_PAGE_MAGIC`).
    pub fn page_magic(self) -> u16 {
        self.row().page_magic
    }

    /// `pg_control.h`, `PG_CONTROL_VERSION`; 13 to 16 share theirs.
    pub fn control_version(self) -> u32 {
        self.row().control_version
    }

    fn row(self) -> &'static Row {
        ROWS.iter()
            .find(|row| row.major == self)
            .expect("the table has a row for every major")
    }
}

impl fmt::Display for Major {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.number(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_major_is_found_by_what_it_writes() {
        for major in Major::ALL {
            assert_eq!(Major::from_page_magic(major.page_magic()), Some(major));
            assert_eq!(Major::from_number(major.number()), Some(major));
        }
        assert_eq!(
            Major::from_control_version(1300, 202_209_061),
            Some(Major::V15)
        );
        assert_eq!(
            Major::from_control_version(1700, 202_406_281),
            Some(Major::V17)
        );
    }

    #[test]
    fn an_unknown_version_is_not_guessed() {
        assert_eq!(Major::from_page_magic(0xD119), None);
        assert_eq!(Major::from_page_magic(0), None);
        assert_eq!(Major::from_number(12), None);
        assert_eq!(Major::from_control_version(1300, 202_101_011), None);
    }
}
