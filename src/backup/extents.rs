//! Stretches of files on their way to packs: put together where only changes came, hashed and compressed by
//! threads of their own, several at a time, and given back in the order in which they came.

use std::collections::VecDeque;
use std::sync::Arc;

use container::CompressedFrame;
use tokio::runtime::Handle;
use tokio::task::{JoinError, JoinHandle};

use super::pages::Pages;
use super::rebuilding::{Predecessor, Rebuild, RebuiltFile, Sums};
use crate::error::{Error, Result, chain};
use crate::repository::BackupRecipe;
use crate::repository::records::ManifestEntry;
use crate::repository::sharing::{EarlierExtent, StoredExtent};

/// A file is cut into extents of so many bytes. From the measurements of 512 KiB frames: within
/// 4 % of the ratio of one long stream, and small enough to be shared between backups.
pub(super) const EXTENT_BYTES: usize = 512 << 10;
/// So many for each core are under way: one that is worked on, one that waits.
const FOR_EACH_CORE: usize = 2;
/// However many cores there are: each takes a few extents' bytes.
const MOST: usize = 64;
/// So many steps wait at most: those that nobody works on too, where one before them takes long.
const STEPS_MAX: usize = 10_000;

/// What became of a stretch of a file.
pub(super) enum Made {
    /// It is zeros.
    Zeros,
    /// A frame to be stored.
    Frame(CompressedFrame),
    /// An earlier backup has it.
    Stored(StoredExtent),
}

/// What comes next of the files, in their order.
pub(super) enum Next {
    Extent(NextExtent),
    /// The file at hand ends; its size, and what it was put together from.
    FileEnds(ManifestEntry, u64, Option<RebuiltFile>),
}

/// A stretch of the file at hand.
pub(super) struct NextExtent {
    pub(super) plain_bytes: u64,
    pub(super) made: Made,
    /// Its pages that look damaged.
    pub(super) bad: Vec<u32>,
    /// Checksums, where it was put together from an increment.
    pub(super) sums: Option<Sums>,
}

enum Step {
    Extent(JoinHandle<Worked>),
    /// One that nobody has to work on: an earlier backup has it, or it is zeros.
    Kept(u64, Made),
    FileEnds(ManifestEntry, u64, Option<RebuiltFile>),
}

/// Extents, and the ends of files between them.
pub(super) struct Extents {
    recipe: BackupRecipe,
    threads: Handle,
    steps: VecDeque<Step>,
    under_way: usize,
    most: usize,
    /// Memory for the next extents.
    spare: Vec<Vec<u8>>,
}

impl Extents {
    /// To be used on a thread that may wait, of the runtime whose threads do the work.
    pub(super) fn new(recipe: BackupRecipe) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            recipe,
            threads: Handle::current(),
            steps: VecDeque::new(),
            under_way: 0,
            most: cores.saturating_mul(FOR_EACH_CORE).min(MOST),
            spare: Vec::new(),
        }
    }

    /// Empty memory for an extent.
    pub(super) fn room(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_default()
    }

    /// Memory that was not needed.
    pub(super) fn give_back(&mut self, mut room: Vec<u8>) {
        room.clear();
        self.spare.push(room);
    }

    /// The next stretch of the file at hand; `earlier` is what an earlier backup has in its place, `pages` are
    /// those to be checked.
    pub(super) fn push(
        &mut self,
        plain: Vec<u8>,
        earlier: Option<StoredExtent>,
        pages: Option<Pages>,
    ) {
        let recipe = self.recipe.clone();
        let work = move || work(plain, earlier, pages, &recipe);
        self.steps
            .push_back(Step::Extent(self.threads.spawn_blocking(work)));
        self.under_way += 1;
    }

    /// The next stretch of the file at hand, on which nobody has to work.
    pub(super) fn keep(&mut self, plain_bytes: u64, made: Made) {
        self.steps.push_back(Step::Kept(plain_bytes, made));
    }

    /// The next stretch of the file at hand is to be put together from that of its predecessor.
    pub(super) fn rebuild(&mut self, rebuild: Rebuild, of: Arc<Predecessor>) {
        let (recipe, room, threads) = (self.recipe.clone(), self.room(), self.threads.clone());
        let work = move || {
            let earlier = rebuild.earlier.and_then(EarlierExtent::stored);
            match threads.block_on(of.rebuild(rebuild, room)) {
                Ok((plain, sums)) => Worked {
                    made: make(&plain, earlier, &recipe),
                    plain,
                    bad: Vec::new(),
                    sums: Some(sums),
                },
                Err(error) => Worked {
                    plain: Vec::new(),
                    made: Err(error),
                    bad: Vec::new(),
                    sums: None,
                },
            }
        };
        self.steps
            .push_back(Step::Extent(self.threads.spawn_blocking(work)));
        self.under_way += 1;
    }

    /// The file at hand ends.
    pub(super) fn end_file(
        &mut self,
        entry: ManifestEntry,
        size: u64,
        rebuilt: Option<RebuiltFile>,
    ) {
        self.steps.push_back(Step::FileEnds(entry, size, rebuilt));
    }

    /// Waits for the next step, where more than the memory allows are under way, or `all` are wanted;
    /// `None` where there is no need to wait.
    pub(super) fn next(&mut self, all: bool) -> Result<Option<Next>> {
        let is_due = all || self.under_way >= self.most || self.steps.len() > STEPS_MAX;
        match self.steps.pop_front() {
            None => Ok(None),
            Some(Step::FileEnds(entry, size, rebuilt)) => {
                Ok(Some(Next::FileEnds(entry, size, rebuilt)))
            }
            Some(Step::Kept(plain_bytes, made)) => Ok(Some(Next::Extent(NextExtent {
                plain_bytes,
                made,
                bad: Vec::new(),
                sums: None,
            }))),
            Some(Step::Extent(job)) if !is_due && !job.is_finished() => {
                self.steps.push_front(Step::Extent(job));
                Ok(None)
            }
            Some(Step::Extent(job)) => {
                self.under_way -= 1;
                let worked = match self
                    .threads
                    .block_on(job)
                    .map_err(JoinError::try_into_panic)
                {
                    Ok(worked) => worked,
                    Err(Ok(panic)) => std::panic::resume_unwind(panic),
                    // the program ends
                    Err(Err(_cancelled)) => return Err(Error::failure("stopped")),
                };
                let plain_bytes = u64::try_from(worked.plain.len()).unwrap_or(u64::MAX);
                self.give_back(worked.plain);
                Ok(Some(Next::Extent(NextExtent {
                    plain_bytes,
                    made: worked.made?,
                    bad: worked.bad,
                    sums: worked.sums,
                })))
            }
        }
    }
}

struct Worked {
    plain: Vec<u8>,
    made: Result<Made>,
    bad: Vec<u32>,
    sums: Option<Sums>,
}

fn work(
    plain: Vec<u8>,
    earlier: Option<StoredExtent>,
    pages: Option<Pages>,
    recipe: &BackupRecipe,
) -> Worked {
    let made = make(&plain, earlier, recipe);
    let bad = pages.map_or_else(Vec::new, |pages| pages.bad_of(&plain));
    Worked {
        plain,
        made,
        bad,
        sums: None,
    }
}

fn make(plain: &[u8], earlier: Option<StoredExtent>, recipe: &BackupRecipe) -> Result<Made> {
    if plain.iter().all(|byte| *byte == 0) {
        return Ok(Made::Zeros);
    }
    let hash = *blake3::hash(plain).as_bytes();
    let plain_bytes = u64::try_from(plain.len()).unwrap_or(u64::MAX);
    let is_the_same = |earlier: &StoredExtent| {
        earlier.hash == hash && u64::from(earlier.plain_bytes) == plain_bytes
    };
    if let Some(stored) = earlier.filter(is_the_same) {
        return Ok(Made::Stored(stored));
    }
    let failed = |error| Error::failure(format!("cannot compress an extent: {}", chain(&error)));
    recipe
        .compress(plain, hash)
        .map(Made::Frame)
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::records::ManifestPath;

    #[tokio::test(flavor = "multi_thread")]
    async fn extents_come_back_in_their_order_and_never_too_many_are_under_way() {
        let recipe = BackupRecipe::of_nothing();
        let (came, pushed) = tokio::task::spawn_blocking(move || {
            let mut extents = Extents::new(recipe);
            let (mut came, mut pushed) = (Vec::new(), Vec::new());
            let mut take = |extents: &mut Extents, all: bool| {
                while let Some(next) = extents.next(all).unwrap() {
                    came.push(match next {
                        Next::Extent(NextExtent {
                            plain_bytes, made, ..
                        }) => match made {
                            Made::Zeros => format!("{plain_bytes} zeros"),
                            Made::Frame(frame) => {
                                assert_eq!(frame.plain_bytes(), plain_bytes);
                                blake3::Hash::from_bytes(*frame.hash()).to_string()
                            }
                            Made::Stored(stored) => format!("stored at {}", stored.offset),
                        },
                        Next::FileEnds(entry, size, _) => format!("{:?} {size}", entry.path),
                    });
                }
                assert!(all || extents.under_way < extents.most);
            };
            for number in 0..500_usize {
                // the later ones of each four are done first
                let length = 1 + (4 - number % 4) * 40_000;
                let mut plain = extents.room();
                assert!(plain.is_empty());
                let byte = u8::try_from(number % 250).unwrap();
                plain.resize(length, byte);
                // of some an earlier backup has the same, of others something else
                let earlier = (number % 5 < 2).then(|| StoredExtent {
                    pack: 0,
                    offset: u32::try_from(number).unwrap(),
                    stored_bytes: 1,
                    plain_bytes: u32::try_from(length).unwrap(),
                    hash: *blake3::hash(if number % 5 == 0 { &plain } else { b"else" }).as_bytes(),
                });
                pushed.push(if byte == 0 {
                    format!("{length} zeros")
                } else if number % 5 == 0 {
                    format!("stored at {number}")
                } else {
                    blake3::hash(&plain).to_string()
                });
                extents.push(plain, earlier, None);
                if number % 3 == 0 {
                    let path = ManifestPath::from_bytes(number.to_string().as_bytes());
                    pushed.push(format!("{path:?} {length}"));
                    let entry = ManifestEntry {
                        path,
                        mode: 0,
                        mtime: 0,
                    };
                    extents.end_file(entry, u64::try_from(length).unwrap(), None);
                }
                take(&mut extents, false);
            }
            take(&mut extents, true);
            (came, pushed)
        })
        .await
        .unwrap();
        assert_eq!(came, pushed);
    }
}
