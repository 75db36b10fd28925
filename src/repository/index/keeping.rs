//! When an archiver puts summaries together, as it stores segments.

use std::collections::BTreeSet;

use wal::{SegmentName, SegmentSize, TimelineId};

use super::Group;
use crate::repository::{Repository, Result};

/// So many groups wait for a segment of theirs that has not come yet; the next archiver looks for them all.
const WAITING_MAX: usize = 16;

/// What is remembered from one segment to the next.
#[derive(Debug, Default)]
pub(super) struct Keeping {
    /// Timelines of which everything was looked at: an earlier archiver may have been stopped before it came to it.
    caught_up: BTreeSet<TimelineId>,
    /// The last segments of groups that are not whole: segments are not stored in their order, and one of a group
    /// may come after its last.
    waiting: Vec<SegmentName>,
}

impl Keeping {
    /// A segment is stored. What cannot be done now is tried again when the next group ends.
    pub(super) async fn take(
        &mut self,
        repository: &Repository,
        segment: SegmentName,
        size: SegmentSize,
    ) -> Result<()> {
        let group = Group::of(segment, size);
        let is_last = group.is_some_and(|group| group.is_ended_by(segment));
        let waits = |last: &SegmentName| Group::of(*last, size) == group;
        if !is_last && !self.waiting.iter().any(waits) {
            return Ok(());
        }
        if is_last && !self.waiting.contains(&segment) {
            self.waiting.push(segment);
        }
        let done = self.roll_up(repository, segment.timeline, size).await;
        if done.is_err() {
            self.caught_up.remove(&segment.timeline);
        }
        // what has a hole waits in vain
        let too_many = self.waiting.len().saturating_sub(WAITING_MAX);
        self.waiting.drain(..too_many);
        done
    }

    async fn roll_up(
        &mut self,
        repository: &Repository,
        timeline: TimelineId,
        size: SegmentSize,
    ) -> Result<()> {
        if !self.caught_up.contains(&timeline) {
            repository.roll_up(timeline, size, false, &|_| {}).await?;
            self.caught_up.insert(timeline);
        }
        let mut at = 0;
        while let Some(last) = self.waiting.get(at) {
            if repository.roll_up_behind(*last, size).await? {
                self.waiting.remove(at);
            } else {
                at += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::sync::Arc;

    use tempfile::TempDir;
    use wal::Lsn;

    use super::*;
    use crate::clock::{Clock, SystemClock};
    use crate::repository::ServerIdentity;
    use crate::repository::destination::Destination;
    use crate::repository::index::GROUP_SEGMENTS;
    use crate::repository::layout::ObjectName;

    const MIB: u64 = 1 << 20;

    /// A repository, and segments in it that only have names: no summaries are in them.
    struct Stage {
        folder: TempDir,
        repository: Repository,
        keeping: Keeping,
    }

    impl Stage {
        async fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let clock: Arc<dyn Clock> = Arc::new(SystemClock);
            let identity = ServerIdentity {
                system_id: 7,
                major: 18,
                block_bytes: 8192,
            };
            let destination = Destination::local(folder.path(), "main");
            let open = destination.open(true, &clock).unwrap();
            let repository = open.repository(identity, false).await.unwrap();
            Self {
                folder,
                repository,
                keeping: Keeping::default(),
            }
        }

        fn path(&self, number: u64) -> PathBuf {
            let name = ObjectName::Segment(segment(number));
            self.folder.path().join("main/7").join(name.path())
        }

        fn store(&self, numbers: impl IntoIterator<Item = u64>) {
            for number in numbers {
                let path = self.path(number);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, b"no container").unwrap();
            }
        }

        async fn take(&mut self, number: u64) {
            let taken = self.keeping.take(&self.repository, segment(number), size());
            taken.await.unwrap();
        }

        /// The groups that are put together, by their numbers.
        async fn together(&self) -> Vec<u64> {
            let found = self.repository.indexed(segment(0).timeline).await.unwrap();
            let start = |first: SegmentName| first.start(size()).unwrap().as_u64();
            let numbers = found
                .into_iter()
                .map(|first| start(first) / MIB / GROUP_SEGMENTS);
            numbers.collect()
        }
    }

    fn size() -> SegmentSize {
        SegmentSize::from_bytes(MIB).unwrap()
    }

    fn segment(number: u64) -> SegmentName {
        SegmentName::of(TimelineId::new(1).unwrap(), Lsn::new(number * MIB), size())
    }

    #[tokio::test]
    async fn a_group_whose_last_segment_came_too_early_is_put_together_with_the_missing_one() {
        let mut stage = Stage::new().await;
        stage.store((0..GROUP_SEGMENTS).filter(|number| *number != 3));
        stage.take(GROUP_SEGMENTS - 1).await;
        assert!(stage.together().await.is_empty());
        stage.store([3]);
        stage.take(3).await;
        assert_eq!(stage.together().await, [0]);
    }

    /// Each such group would be looked at for ever, and new ones would find no place.
    #[tokio::test]
    async fn groups_with_holes_make_room_for_others() {
        let mut stage = Stage::new().await;
        let holed = u64::try_from(WAITING_MAX).unwrap() + 1;
        for group in 0..holed {
            let last = (group + 1) * GROUP_SEGMENTS - 1;
            stage.store([last]);
            stage.take(last).await;
        }
        assert_eq!(stage.keeping.waiting.len(), WAITING_MAX);
        let first = holed * GROUP_SEGMENTS;
        let last = first + GROUP_SEGMENTS - 1;
        stage.store(first + 1..=last);
        stage.take(last).await;
        stage.store([first]);
        stage.take(first).await;
        assert_eq!(stage.together().await, [holed]);
        assert!(!stage.keeping.waiting.contains(&segment(last)));
    }
}
