//! A store that fails as stores do: before or after storing, slowly, with 503, half-open, with
//! bodies cut short, with listings that lag behind. It never alters stored bytes, and writes down
//! whatever is done to it that must not be.
//!
//! What a request meets depends on the seed, the request, and how often it was made; not on what
//! happens elsewhere. So a schedule is the same each time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt as _, StreamExt as _, TryFutureExt as _, TryStreamExt as _};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt as _, PutMode, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, RenameOptions, Result,
};

use super::faults::{Fault, LIST_FAULTS, READ_FAULTS, Request, WRITE_FAULTS, lost, spoilt, wait};
use super::lots::Lots;
use super::tally::{Seen, Tally};
use super::time::Time;
use crate::repository::store::refusal;

/// What a store is like by nature.
#[derive(Debug, Clone, Copy)]
pub(super) struct Nature {
    pub(super) conditions: Conditions,
    /// Listings may lag behind for so long.
    pub(super) late: Duration,
    /// Nothing ever happens to it.
    pub(super) is_sound: bool,
}

/// What it makes of "only if there is none".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Conditions {
    Honoured,
    Ignored,
    Unknown,
}

/// Nobody reaches it, or not for everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outage {
    Refusing,
    Silent,
    Busy,
    Denied,
    /// Reads go on.
    Full,
}

/// A store with faults. Clones are the same store.
#[derive(Clone)]
pub(super) struct Faulty(Arc<Inner>);

struct Inner {
    objects: InMemory,
    number: usize,
    seed: u64,
    nature: Nature,
    time: Arc<Time>,
    tally: Arc<Tally>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Faults in a thousand requests.
    faults: u64,
    outage: Option<Outage>,
    asked: HashMap<(Request, String), u64>,
    /// When each object came to be there.
    stored_at: HashMap<Path, Duration>,
    removed: HashMap<Path, (ObjectMeta, Duration)>,
    /// Requests that the client has given up, and that will be carried out.
    underway: Vec<(Duration, Late)>,
    /// Objects whose writer was not told that they are stored.
    untold: HashSet<Path>,
    /// How many writers have looked for an object, and were told that there is none.
    licences: HashMap<Path, u32>,
    /// Nothing may be written: whoever does has not looked where it writes.
    is_sealed: bool,
    wrongs: Vec<String>,
}

enum Late {
    Put(Path, PutPayload, PutOptions),
    Delete(Path),
}

/// A key's id is chance, and must not change the schedule.
fn without_chance(path: &str) -> &str {
    if path.starts_with("keys") {
        "keys"
    } else {
        path
    }
}

impl Faulty {
    pub(super) fn new(
        number: usize,
        seed: u64,
        nature: Nature,
        time: &Arc<Time>,
        tally: &Arc<Tally>,
    ) -> Self {
        Self(Arc::new(Inner {
            objects: InMemory::new(),
            number,
            seed,
            nature,
            time: Arc::clone(time),
            tally: Arc::clone(tally),
            state: Mutex::default(),
        }))
    }

    pub(super) fn nature(&self) -> Nature {
        self.0.nature
    }

    /// From now on so many of a thousand requests fail; none at a sound store.
    pub(super) fn set_faults(&self, per_mille: u64) {
        self.state().faults = if self.nature().is_sound { 0 } else { per_mille };
    }

    pub(super) fn set_outage(&self, outage: Option<Outage>) {
        self.state().outage = outage.filter(|_| !self.nature().is_sound);
    }

    pub(super) fn is_out(&self) -> bool {
        self.state().outage.is_some()
    }

    /// Takes everything away. With `sealed`, whoever writes without having noticed does wrong.
    pub(super) fn empty(&self, sealed: bool) {
        self.settle();
        for path in self.paths() {
            let deleted = self.0.objects.delete(&path).now_or_never();
            deleted.expect("memory answers at once").unwrap();
        }
        let mut state = self.state();
        state.stored_at.clear();
        state.removed.clear();
        state.underway.clear();
        state.untold.clear();
        state.licences.clear();
        state.is_sealed = sealed;
        self.0.tally.count(Seen::Emptied);
    }

    pub(super) fn unseal(&self) {
        self.state().is_sealed = false;
    }

    /// What was done to it that must not be.
    pub(super) fn wrongs(&self) -> Vec<String> {
        self.state().wrongs.clone()
    }

    /// The stored bytes of an object, without any fault.
    pub(super) fn stored(&self, path: &str) -> Option<Bytes> {
        self.settle();
        self.bytes(&Path::from(path))
    }

    /// Every stored object, sorted by path, without any fault.
    pub(super) fn paths(&self) -> Vec<Path> {
        self.settle();
        self.metas(None)
            .into_iter()
            .map(|meta| meta.location)
            .collect()
    }

    /// Carries out what was given up and has arrived by now.
    pub(super) fn settle(&self) {
        let now = self.0.time.now();
        loop {
            let due = {
                let mut state = self.state();
                let due = state.underway.iter().position(|(at, _)| *at <= now);
                due.map(|at| state.underway.remove(at).1)
            };
            match due {
                None => return,
                Some(Late::Put(path, payload, options)) => {
                    self.0.tally.count(Seen::LandedLate);
                    // nobody hears the answer
                    drop(self.put_now(&path, payload, options));
                }
                Some(Late::Delete(path)) => {
                    self.0.tally.count(Seen::LandedLate);
                    self.delete_now(&path);
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    fn bytes(&self, path: &Path) -> Option<Bytes> {
        let got = self.0.objects.get(path).now_or_never();
        let got = got.expect("memory answers at once").ok()?;
        let bytes = got.bytes().now_or_never();
        Some(bytes.expect("memory answers at once").unwrap())
    }

    fn metas(&self, prefix: Option<&Path>) -> Vec<ObjectMeta> {
        let listed = self.0.objects.list(prefix).try_collect().now_or_never();
        listed.expect("memory answers at once").unwrap()
    }

    /// What a request meets, and lots for the rest of it.
    fn draw(&self, request: Request, path: &str, faults: &[(u64, Fault)]) -> (Fault, Lots) {
        let path = without_chance(path);
        let mut state = self.state();
        let times = state.asked.entry((request, path.to_owned())).or_default();
        *times += 1;
        let what = (self.0.number, request, path, *times);
        let mut lots = Lots::of(self.0.seed, what);
        if !lots.chance(state.faults) {
            return (Fault::None, lots);
        }
        let mut at = lots.below(faults.iter().map(|(weight, _)| weight).sum());
        for (weight, fault) in faults {
            if at < *weight {
                tracing::debug!("store {}: {request:?} {path}: {fault:?}", self.0.number);
                return (*fault, lots);
            }
            at -= weight;
        }
        (Fault::None, lots)
    }

    /// Whether an outage lets the request through.
    async fn reached(&self, request: Request) -> Result<()> {
        self.settle();
        let outage = self.state().outage;
        match outage {
            None => Ok(()),
            Some(Outage::Full) if request != Request::Put => Ok(()),
            Some(Outage::Full) => {
                self.count(Seen::Full);
                Err(refusal(507, "StorageFull", None))
            }
            Some(Outage::Refusing) => {
                self.count(Seen::Refusing);
                Err(lost("connection refused"))
            }
            Some(Outage::Silent) => {
                self.count(Seen::Silent);
                std::future::pending().await
            }
            Some(Outage::Busy) => {
                self.count(Seen::Busy);
                Err(refusal(503, "SlowDown", Some(Duration::from_secs(2))))
            }
            Some(Outage::Denied) => {
                self.count(Seen::Denied);
                Err(refusal(403, "AccessDenied", None))
            }
        }
    }

    /// The faults that any request can meet before it is carried out.
    async fn before(&self, fault: Fault, lots: &mut Lots) -> Result<()> {
        wait(lots.millis(0, 30)).await;
        match fault {
            Fault::FailedBefore => {
                self.count(Seen::FailedBefore);
                Err(lost("connection reset"))
            }
            Fault::SlowDown => {
                self.count(Seen::SlowDown);
                let asked = lots.chance(500).then(|| lots.millis(500, 5000));
                Err(refusal(503, "SlowDown", asked))
            }
            Fault::HalfOpen => {
                self.count(Seen::HalfOpen);
                std::future::pending().await
            }
            Fault::Slow => {
                self.count(Seen::Slow);
                wait(lots.millis(500, 40_000)).await;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The faults that any request can meet after it was carried out.
    async fn after(&self, fault: Fault, lots: &mut Lots) -> Result<()> {
        match fault {
            Fault::FailedAfter => {
                self.count(Seen::FailedAfter);
                Err(lost("connection reset"))
            }
            Fault::HalfOpenDone => {
                self.count(Seen::HalfOpenDone);
                std::future::pending().await
            }
            Fault::Slow => {
                wait(lots.millis(0, 5000)).await;
                Ok(())
            }
            _ => {
                wait(lots.millis(0, 30)).await;
                Ok(())
            }
        }
    }

    fn count(&self, seen: Seen) {
        self.0.tally.count(seen);
    }

    fn put_now(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let before = self.bytes(path);
        let new = Bytes::from(payload.clone());
        let is_create = options.mode == PutMode::Create;
        let mode = match self.0.nature.conditions {
            Conditions::Unknown if is_create => {
                self.count(Seen::ConditionUnknown);
                return Err(refusal(501, "NotImplemented", None));
            }
            Conditions::Ignored if is_create => PutMode::Overwrite,
            _ => options.mode.clone(),
        };
        let options = PutOptions { mode, ..options };
        let put = self.0.objects.put_opts(path, payload, options);
        let put = put.now_or_never().expect("memory answers at once");
        let mut state = self.state();
        if matches!(put, Err(Error::AlreadyExists { .. })) {
            if state.untold.remove(path) && before.as_ref() == Some(&new) {
                self.count(Seen::OwnCreateFound);
            }
            return put;
        }
        if state.is_sealed {
            state
                .wrongs
                .push(format!("{path} written where all was gone"));
        }
        let licences = state.licences.entry(path.clone()).or_default();
        let licensed = *licences > 0;
        *licences = licences.saturating_sub(1);
        if let Some(before) = before {
            if is_create {
                self.count(Seen::ConditionIgnored);
            }
            if before != new && !licensed && !path.as_ref().contains("/tip/") {
                state.wrongs.push(format!("{path} was written over"));
            }
        }
        let now = self.0.time.now();
        state.stored_at.insert(path.clone(), now);
        state.removed.remove(path);
        put
    }

    fn delete_now(&self, path: &Path) {
        let meta = self.metas(None);
        let meta = meta.into_iter().find(|meta| meta.location == *path);
        let deleted = self.0.objects.delete(path).now_or_never();
        deleted.expect("memory answers at once").unwrap();
        let now = self.0.time.now();
        let mut state = self.state();
        state.stored_at.remove(path);
        if let Some(meta) = meta {
            state.removed.insert(path.clone(), (meta, now));
        }
    }

    async fn delete_one(&self, path: Path) -> Result<Path> {
        self.reached(Request::Delete).await?;
        let (fault, mut lots) = self.draw(Request::Delete, path.as_ref(), WRITE_FAULTS);
        self.before(fault, &mut lots).await?;
        if fault == Fault::LandsLate {
            let at = self.0.time.now() + lots.millis(1000, 120_000);
            self.state().underway.push((at, Late::Delete(path)));
            return std::future::pending().await;
        }
        self.delete_now(&path);
        self.after(fault, &mut lots).await?;
        Ok(path)
    }

    /// What a listing shows now, and whether it breaks off.
    async fn listing(&self, prefix: Option<&Path>) -> Result<(Vec<ObjectMeta>, bool)> {
        self.reached(Request::List).await?;
        let shown = prefix.map_or("", |prefix| prefix.as_ref());
        let (fault, mut lots) = self.draw(Request::List, shown, LIST_FAULTS);
        self.before(fault, &mut lots).await?;
        let mut metas = self.metas(prefix);
        self.lag_behind(prefix, &mut metas);
        self.after(fault, &mut lots).await?;
        if fault == Fault::ListBroke {
            self.count(Seen::ListBroke);
            metas.truncate(lots.index(metas.len() + 1));
        }
        Ok((metas, fault == Fault::ListBroke))
    }

    fn lag_behind(&self, prefix: Option<&Path>, metas: &mut Vec<ObjectMeta>) {
        let (now, late) = (self.0.time.now(), self.0.nature.late);
        if late.is_zero() {
            return;
        }
        // each object has its own lag, so that none vanishes again
        let lags = |path: &Path, at: Duration| {
            let what = (self.0.number, without_chance(path.as_ref()), at);
            let lag = Lots::of(self.0.seed, what).below(2000);
            at + late * u32::try_from(lag.saturating_sub(1000)).unwrap() / 1000 > now
        };
        let state = self.state();
        let stored_at = &state.stored_at;
        metas.retain(|meta| {
            let at = stored_at.get(&meta.location);
            let is_late = at.is_some_and(|at| lags(&meta.location, *at));
            if is_late {
                self.count(Seen::ListedLate);
            }
            !is_late
        });
        for (path, (meta, at)) in &state.removed {
            let below = prefix.is_none_or(|prefix| path.prefix_matches(prefix));
            if below && lags(path, *at) {
                self.count(Seen::StillListed);
                metas.push(meta.clone());
            }
        }
        metas.sort_by(|a, b| a.location.cmp(&b.location));
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for Faulty {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        opts: PutOptions,
    ) -> Result<PutResult> {
        self.reached(Request::Put).await?;
        let (fault, mut lots) = self.draw(Request::Put, location.as_ref(), WRITE_FAULTS);
        self.before(fault, &mut lots).await?;
        if fault == Fault::LandsLate {
            let at = self.0.time.now() + lots.millis(1000, 120_000);
            let late = Late::Put(location.clone(), payload, opts);
            self.state().underway.push((at, late));
            return std::future::pending().await;
        }
        let put = self.put_now(location, payload, opts)?;
        if matches!(fault, Fault::FailedAfter | Fault::HalfOpenDone) {
            self.state().untold.insert(location.clone());
        }
        self.after(fault, &mut lots).await?;
        Ok(put)
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.0.objects.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let request = if options.head {
            Request::Head
        } else {
            Request::Get
        };
        self.reached(request).await?;
        let (mut fault, mut lots) = self.draw(request, location.as_ref(), READ_FAULTS);
        self.before(fault, &mut lots).await?;
        let got = self.0.objects.get_opts(location, options).await;
        if request == Request::Head && self.0.nature.conditions != Conditions::Honoured {
            match &got {
                Ok(_) => self.count(Seen::GuardFound),
                Err(_) => {
                    *self.state().licences.entry(location.clone()).or_default() += 1;
                }
            }
        }
        let got = got?;
        let size = got.range.clone();
        let bytes = self.bytes(location).unwrap_or_default();
        let bytes =
            bytes.slice(usize::try_from(size.start).unwrap()..usize::try_from(size.end).unwrap());
        if request == Request::Head || bytes.is_empty() {
            fault = Fault::None;
        }
        wait(lots.millis(0, 30)).await;
        match fault {
            Fault::Truncated => self.count(Seen::Truncated),
            Fault::BodyBroke => self.count(Seen::BodyBroke),
            Fault::BodyStalled => self.count(Seen::BodyStalled),
            _ => return Ok(got),
        }
        Ok(spoilt(got, &bytes, fault, &mut lots))
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.0.objects.get_ranges(location, ranges).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        let deleted = locations.and_then(move |path| {
            let store = store.clone();
            async move { store.delete_one(path).await }
        });
        deleted.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (store, prefix) = (self.clone(), prefix.cloned());
        let listed = async move {
            let (metas, breaks) = store.listing(prefix.as_ref()).await?;
            let end = breaks.then(|| Err(lost("connection reset")));
            Ok(stream::iter(metas.into_iter().map(Ok).chain(end)))
        };
        listed.try_flatten_stream().boxed()
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let offset = offset.clone();
        let listed = self.list(prefix);
        let later = listed.try_filter(move |meta| std::future::ready(meta.location > offset));
        later.boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let (metas, breaks) = self.listing(prefix).await?;
        if breaks {
            return Err(lost("connection reset"));
        }
        let base = prefix.cloned().unwrap_or_default();
        let (mut objects, mut folders) = (Vec::new(), BTreeSet::new());
        for meta in metas {
            let parts: Vec<_> = meta.location.prefix_match(&base).unwrap().collect();
            match parts.as_slice() {
                [_] => objects.push(meta),
                [folder, ..] => {
                    folders.insert(base.clone().join(folder.as_ref()));
                }
                [] => {}
            }
        }
        Ok(ListResult {
            objects,
            common_prefixes: folders.into_iter().collect(),
            extensions: object_store::Extensions::new(),
        })
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.objects.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.0.objects.rename_opts(from, to, options).await
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "simulated store {}", self.0.number)
    }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
