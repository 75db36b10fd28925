//! Pages whose checksum is wrong, where the server was told to send them all the same.

use std::collections::BTreeMap;

use basebackup::RelativePath;
use basebackup::page::{PageVerdict, check_page};
use basebackup::{BlockLayout, Fork, RelationFile};
use replication::connection::Connection;
use replication::conninfo::ConnectionSettings;
use wal::Lsn;

use crate::error::{Error, Result, chain};
use crate::repository::records::{DamagedPages, bytes_of_hex};
use crate::server;

/// So many are looked at again, and named in the backup's record; of the others their number.
const NAMED_MAX: usize = 1000;
/// The SQLSTATE of what a role may not do.
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// How the pages of a server's relations are checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageChecks {
    layout: BlockLayout,
    /// Where replay of the backup begins: pages changed since come from WAL.
    start: Lsn,
}

/// Where the pages of a stretch of a file are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pages {
    checks: PageChecks,
    /// The number of the first in its file.
    in_file: u32,
    /// The number of the first in its fork, which its checksum covers.
    in_fork: u32,
}

/// How a server cuts its relations; `None`, said, where its pages have no checksums.
pub(super) async fn page_layout(settings: &ConnectionSettings) -> Result<Option<BlockLayout>> {
    let mut sql = server::connect_sql(settings).await?;
    if !has_checksums(&mut sql).await? {
        tracing::info!("the cluster's pages have no checksums: nothing is known of damaged ones");
        return Ok(None);
    }
    block_layout(&mut sql).await.map(Some)
}

/// Whether a server's pages have checksums.
pub(super) async fn has_checksums(sql: &mut Connection) -> Result<bool> {
    let failed = |error| server::query_error("read whether pages have checksums", &error);
    let state = "SELECT setting FROM pg_catalog.pg_settings WHERE name = 'data_checksums'";
    let state = sql.query_value(state).await.map_err(failed)?;
    Ok(state.as_deref() == Some("on"))
}

/// How a server cuts its relations.
pub(super) async fn block_layout(sql: &mut Connection) -> Result<BlockLayout> {
    let failed = |error| server::query_error("read how pages are stored", &error);
    let mut number = async |name: &str| {
        let query = format!("SELECT setting FROM pg_catalog.pg_settings WHERE name = '{name}'");
        let value = sql.query_value(&query).await.map_err(failed)?;
        let number = value.as_deref().and_then(|value| value.parse::<u32>().ok());
        number.ok_or_else(|| Error::failure(format!("{name} is not a number: found {value:?}")))
    };
    // of segment_size pg_settings gives the blocks
    let (block_bytes, segment_blocks) =
        (number("block_size").await?, number("segment_size").await?);
    BlockLayout::new(block_bytes, segment_blocks).ok_or_else(|| {
        Error::failure(format!(
            "no server has such files: block_size={block_bytes}, segment_size={segment_blocks} blocks"
        ))
    })
}

impl PageChecks {
    pub(super) fn new(layout: BlockLayout, start: Lsn) -> Self {
        Self { layout, start }
    }

    /// Whether a page that came with a wrong checksum does no harm, by what stands there now: WAL has it, or has
    /// its end. One that is good now, and older than the backup, came wrong: nothing will put it right. Maps
    /// are written to without a new LSN, and are made anew where they are wrong
    /// (`access/heap/visibilitymap.c`, `visibilitymap_clear`; `storage/freespace/README`).
    fn is_passed_over(self, path: &RelativePath, block: u32, page: &[u8]) -> bool {
        let Some(file) = RelationFile::of(path) else {
            return false;
        };
        let in_fork = file
            .first_block(self.layout)
            .and_then(|first| first.checked_add(block));
        let Some(in_fork) = in_fork else {
            return false;
        };
        let is_map = matches!(file.fork, Fork::FreeSpace | Fork::Visibility);
        page.is_empty()
            || match check_page(page, in_fork, self.start) {
                PageVerdict::Newer => true,
                PageVerdict::Good | PageVerdict::New => is_map,
                PageVerdict::Bad { .. } => false,
            }
    }

    /// The pages of a file; `None` where it has none.
    pub(super) fn of_file(self, path: &RelativePath) -> Option<Pages> {
        Some(Pages {
            checks: self,
            in_file: 0,
            in_fork: RelationFile::of(path)?.first_block(self.layout)?,
        })
    }
}

impl Pages {
    /// Those behind so many bytes of the file.
    pub(super) fn behind(mut self, bytes: u64) -> Option<Self> {
        let pages = bytes.checked_div(self.checks.layout.block_bytes().into())?;
        let pages = u32::try_from(pages).ok()?;
        self.in_file = self.in_file.checked_add(pages)?;
        self.in_fork = self.in_fork.checked_add(pages)?;
        Some(self)
    }

    /// The numbers in their file of those of these pages whose checksum is wrong. What is no whole page at
    /// the end was torn off while the file grew.
    pub(super) fn bad_of(self, bytes: &[u8]) -> Vec<u32> {
        let page_bytes = usize::try_from(self.checks.layout.block_bytes()).unwrap_or(usize::MAX);
        let pages = (0..).zip(bytes.chunks_exact(page_bytes));
        let bad = pages.filter(|(nth, page)| {
            let block = self.in_fork.wrapping_add(*nth);
            let verdict = check_page(page, block, self.checks.start);
            matches!(verdict, PageVerdict::Bad { .. })
        });
        bad.map(|(nth, _)| self.in_file.wrapping_add(nth)).collect()
    }
}

/// Pages that looked damaged as they came.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    pages: BTreeMap<RelativePath, Vec<u32>>,
    count: u64,
}

impl Suspects {
    /// Blocks of a file.
    pub(super) fn add(&mut self, path: &RelativePath, blocks: &[u32]) {
        for block in blocks {
            if usize::try_from(self.count).is_ok_and(|count| count < NAMED_MAX) {
                self.pages.entry(path.clone()).or_default().push(*block);
            }
            self.count = self.count.saturating_add(1);
        }
    }

    /// How many there are, and those of them that are named, once each of these was looked at again: one may
    /// have been torn by a write that began while it was read, as the server looks twice for
    /// (`backup/basebackup.c`, `sendFile`). Where nobody may look, they stay, and that is said.
    pub(super) async fn looked_at_again(
        self,
        settings: &ConnectionSettings,
        checks: PageChecks,
    ) -> Result<(u64, Vec<DamagedPages>)> {
        if self.count == 0 {
            return Ok((0, Vec::new()));
        }
        let mut sql = server::connect_sql(settings).await?;
        let mut may_look = true;
        let (mut count, mut damaged) = (self.count, Vec::new());
        for (path, blocks) in self.pages {
            let mut bad = Vec::new();
            for block in blocks {
                let page = if may_look {
                    page_now(&mut sql, checks, &path, block).await
                } else {
                    Looked::Forbidden
                };
                may_look &= !matches!(page, Looked::Forbidden);
                if matches!(page, Looked::Page(page) if checks.is_passed_over(&path, block, &page))
                {
                    count = count.saturating_sub(1);
                } else {
                    bad.push(block);
                }
            }
            if !bad.is_empty() {
                damaged.push(DamagedPages {
                    path: path.to_string(),
                    blocks: bad,
                });
            }
        }
        if !may_look {
            tracing::warn!(
                "whether pages with a wrong checksum were only being written to cannot be told: this role may not \
                 look at them again. hint: GRANT EXECUTE ON FUNCTION \
                 pg_catalog.pg_read_binary_file(text, bigint, bigint, boolean) TO the role"
            );
        }
        Ok((count, damaged))
    }
}

/// What a second look shows.
enum Looked {
    /// The page, empty where it is gone.
    Page(Vec<u8>),
    /// Nobody may look.
    Forbidden,
    /// Something else went wrong.
    Nothing,
}

async fn page_now(
    sql: &mut Connection,
    checks: PageChecks,
    path: &RelativePath,
    block: u32,
) -> Looked {
    let page_bytes = checks.layout.block_bytes();
    let offset = u64::from(block).saturating_mul(page_bytes.into());
    let query = format!(
        "SELECT encode(pg_catalog.pg_read_binary_file('{}', {offset}, {page_bytes}, true), 'hex')",
        path.to_string().replace('\'', "''")
    );
    let page = match sql.query_value(&query).await {
        Ok(page) => page.unwrap_or_default(),
        Err(error) if error.sqlstate() == Some(INSUFFICIENT_PRIVILEGE) => return Looked::Forbidden,
        Err(error) => {
            tracing::debug!("{path} cannot be looked at again: {}", chain(&error));
            return Looked::Nothing;
        }
    };
    bytes_of_hex(&page).map_or(Looked::Nothing, Looked::Page)
}

/// Says which pages are damaged.
pub(super) fn say(count: u64, damaged: &[DamagedPages]) {
    if count > 0 {
        tracing::warn!(
            "the backup has pages whose checksum is wrong: {count}, {}. hint: what lies in them is damaged on \
             the server; restore an earlier backup up to now elsewhere, and compare",
            DamagedPages::shown(damaged)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RelativePath {
        RelativePath::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn pages_are_numbered_in_their_file_and_checked_by_their_fork() {
        let layout = BlockLayout::new(1024, 100).unwrap();
        let checks = PageChecks::new(layout, Lsn::new(1000));
        assert!(checks.of_file(&path("base/5/PG_VERSION")).is_none());
        assert!(checks.of_file(&path("pg_xact/0000")).is_none());
        let pages = checks.of_file(&path("base/5/16384.2")).unwrap();
        assert_eq!((pages.in_file, pages.in_fork), (0, 200));
        let behind = pages.behind(3 * 1024).unwrap();
        assert_eq!((behind.in_file, behind.in_fork), (3, 203));

        // new, wrong, newer than the backup, and half of one
        let mut bytes = vec![0; 3 * 1024 + 512];
        bytes[1024 + 14] = 1;
        bytes[2048 + 6] = 0xFF;
        bytes[2048 + 14] = 1;
        assert_eq!(behind.bad_of(&bytes), [4]);
    }

    #[test]
    fn a_page_that_is_good_only_now_came_wrong() {
        let checks = PageChecks::new(BlockLayout::new(1024, 100).unwrap(), Lsn::new(1000));
        let passed = |file: &str, page: &[u8]| checks.is_passed_over(&path(file), 2, page);
        let (new, mut newer, mut bad) = ([0; 1024], [0; 1024], [0; 1024]);
        newer[6] = 0xFF;
        newer[14] = 1;
        bad[14] = 1;
        let (table, map) = ("base/5/16384", "base/5/16384_vm");
        assert!(passed(table, &newer) && passed(table, &[]));
        assert!(!passed(table, &new) && !passed(table, &bad));
        assert!(passed(map, &new) && passed(map, &newer) && !passed(map, &bad));
    }

    #[test]
    fn many_suspects_are_counted_and_some_are_named() {
        let mut suspects = Suspects::default();
        let blocks: Vec<u32> = (0..700).collect();
        suspects.add(&path("base/5/16384"), &blocks);
        suspects.add(&path("base/5/16385"), &blocks);
        assert_eq!(suspects.count, 1400);
        let named: Vec<usize> = suspects.pages.values().map(Vec::len).collect();
        assert_eq!(named, [700, 300]);
    }
}
