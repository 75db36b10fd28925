//! Targets that are called by something other than their place: transactions, and named points. They are
//! looked for from the newest backup on, and then before it.

use jiff::Timestamp;
use wal::Lsn;

use super::{Chooser, Chosen, ceil_rfc3339};
use crate::error::{Error, Nearest, Result};
use crate::repository::catalog::BranchEnd;
use crate::repository::records::BackupRecord;
use crate::repository::walk::Ended;
use crate::repository::windows::Candidate;
use crate::restore::resolve::{Alike, LOOK_AHEAD_BYTES, Wanted};
use crate::restore::walk::Walked;

impl Chooser<'_> {
    pub(super) async fn to_xid(&self, xid: u32, exclusive: bool) -> Result<Chosen> {
        let mut searched_from: Option<Lsn> = None;
        let (mut rolled_back, mut subxact_of, mut too_early) = (None, None, None);
        let mut first_damage = None;
        for candidate in &self.candidates {
            let wanted = Wanted::Xid { xid, exclusive };
            let walked = self.walk_up_to(candidate, wanted, searched_from).await?;
            if let Some(point) = walked.resolved.point.clone() {
                if point.boundary >= candidate.backup.stop_lsn {
                    return Ok(Chosen::new(candidate, Some(point), walked));
                }
                too_early = Some((point.boundary, candidate.backup));
            } else if let Ended::Damaged(damage) = &walked.ended {
                // it may stand before the damage, where an older backup leads to it
                first_damage.get_or_insert_with(|| self.damaged(damage, &walked));
            }
            if let Some(lsn) = walked.resolved.aborted_at {
                let place = RolledBack::seen(lsn, candidate.backup);
                rolled_back = Some(rolled_back.filter(RolledBack::is_reached).unwrap_or(place));
            }
            subxact_of = subxact_of.or(walked.resolved.subxact_of);
            searched_from = Some(candidate.backup.stop_lsn);
        }
        if let Some(damage) = first_damage {
            return Err(damage);
        }
        Err(match (too_early, subxact_of, rolled_back) {
            (Some((lsn, backup)), ..) => {
                before_its_end(&format!("transaction {xid} ended"), lsn, backup)
            }
            (_, Some(of), _) => {
                Error::not_found(format!("transaction {xid} was a part of transaction {of}"))
                    .hint(format!("restore to the whole of it with --to-xid {of}"))
            }
            (.., Some(rolled_back)) => rolled_back.refusal(xid),
            _ => Error::not_found(format!(
                "no commit of transaction {xid} in what is stored since the first backup on this branch"
            ))
            .hint("`anywhen status --timelines` shows the branches: is another meant?"),
        })
    }

    pub(super) async fn to_name(&self, name: &str, exclusive: bool) -> Result<Chosen> {
        let mut searched_from: Option<Lsn> = None;
        let mut chosen: Option<Chosen> = None;
        let mut places: Vec<Lsn> = Vec::new();
        let mut alike: Option<Alike> = None;
        let mut too_early = None;
        let mut first_damage = None;
        for candidate in &self.candidates {
            let wanted = Wanted::Name {
                name: name.to_owned(),
                exclusive,
            };
            let walked = self.walk_up_to(candidate, wanted, searched_from).await?;
            places.extend(walked.resolved.again_at);
            if let Some(found) = walked.resolved.alike.clone() {
                alike = Some(found.or(alike));
            }
            if let Some(point) = walked.resolved.point.clone() {
                places.extend(walked.resolved.named_at);
                if chosen.is_none() && point.boundary >= candidate.backup.stop_lsn {
                    chosen = Some(Chosen::new(candidate, Some(point), walked));
                } else {
                    too_early = Some((point.boundary, candidate.backup));
                }
            } else if let Ended::Damaged(damage) = &walked.ended {
                first_damage.get_or_insert_with(|| self.damaged(damage, &walked));
            }
            searched_from = Some(candidate.backup.stop_lsn);
        }
        places.sort_unstable();
        places.dedup();
        if let [first, second, ..] = places.as_slice() {
            return Err(Error::not_found(format!(
                "several points have the name {name:?}: {first} and {second}"
            ))
            .hint("restore to the one that is meant with --to-lsn"));
        }
        if let (None, Some(damage)) = (&chosen, first_damage) {
            return Err(damage);
        }
        chosen.ok_or_else(|| match too_early {
            Some((lsn, backup)) => {
                before_its_end(&format!("the point {name:?} stands"), lsn, backup)
            }
            None => Error::not_found(format!(
                "no point has the name {name:?} in what is stored since the first backup on this branch"
            ))
            .hint(hint_at(alike)),
        })
    }

    /// As far as a newer backup's search did not come.
    async fn walk_up_to(
        &self,
        candidate: &Candidate<'_>,
        wanted: Wanted,
        searched_from: Option<Lsn>,
    ) -> Result<Walked> {
        let up_to = |lsn: Lsn| BranchEnd {
            lsn: lsn.min(candidate.end.lsn),
            ..candidate.end
        };
        let Some(searched_from) = searched_from else {
            return self.walk(candidate, wanted).await;
        };
        let end = up_to(searched_from);
        let mut walked = self.walk_to(candidate, wanted.clone(), end).await?;
        if let Some(point) = &mut walked.resolved.point
            && point.first_out.is_none()
        {
            // it stands where the newer backup's search began
            let further = up_to(point.boundary.saturating_add(LOOK_AHEAD_BYTES));
            if further.lsn > end.lsn {
                let further = self.walk_to(candidate, wanted, further).await?;
                point.first_out = further.resolved.point.and_then(|point| point.first_out);
            }
        }
        Ok(walked)
    }
}

/// Where a transaction was rolled back, as one backup leads there.
#[derive(Debug, Clone, Copy)]
struct RolledBack {
    /// The record that says so.
    lsn: Lsn,
    /// When the backup was finished, where that was later: the first moment behind the place.
    unless: Option<Timestamp>,
}

impl RolledBack {
    fn seen(lsn: Lsn, backup: &BackupRecord) -> Self {
        let unless = (lsn < backup.stop_lsn).then_some(backup.finished_at);
        Self { lsn, unless }
    }

    fn is_reached(&self) -> bool {
        self.unless.is_none()
    }

    fn refusal(self, xid: u32) -> Error {
        let lsn = self.lsn;
        let refused = Error::not_found(format!("transaction {xid} was rolled back: lsn={lsn}"));
        match self.unless {
            None => refused
                .hint(format!(
                    "nothing of it is there at any moment; --to-lsn {lsn} restores to where it ended"
                ))
                .nearest(Nearest {
                    before: Some(lsn.to_string()),
                    after: None,
                }),
            Some(finished) => refused
                .hint("nothing of it is there at any moment")
                .nearest(Nearest {
                    before: None,
                    after: Some(ceil_rfc3339(finished)),
                }),
        }
    }
}

/// What stands before the end of the oldest backup that has it, so that none leads there.
fn before_its_end(what: &str, lsn: Lsn, backup: &BackupRecord) -> Error {
    Error::not_found(format!(
        "{what} before the end of backup {}, and no backup before it leads there: lsn={lsn}, end={}",
        backup.id, backup.stop_lsn
    ))
    .hint("a backup leads to its own end and later")
    .nearest(Nearest {
        before: None,
        after: Some(ceil_rfc3339(backup.finished_at)),
    })
}

/// What to do about a name that is not there.
fn hint_at(alike: Option<Alike>) -> String {
    match alike {
        Some(alike) if alike.is_close() => {
            format!(
                "did you mean {:?}, which stands at {}?",
                alike.name, alike.lsn
            )
        }
        Some(alike) => format!(
            "names are taken to the letter; there is {:?} at {}",
            alike.name, alike.lsn
        ),
        None => {
            "there is no named point in what can be restored: pg_create_restore_point makes one"
                .to_owned()
        }
    }
}
