//! Tests of the rules for every store that is a service, over one that fails as told.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use object_store::ObjectStore;
use tokio::time::Instant;

use super::answer::Answer;
use super::bounded::Bounded;
use super::retrying::Retrying;
use super::scripted::{Scripted, Step};
use super::{Created, Names, Store, StoreError};

const BUDGET: Duration = Duration::from_mins(1);
const SILENCE: Duration = Duration::from_secs(20);

fn store_with(scripted: &Arc<Scripted>, budget: Duration) -> Store {
    let objects: Arc<dyn ObjectStore> = Arc::<Scripted>::clone(scripted);
    let client = Bounded::new(objects, 16, SILENCE).with_parts(Arc::<Scripted>::clone(scripted));
    let names = Names {
        url: "s3://bucket".to_owned(),
        address: "s3://bucket".to_owned(),
        bucket_word: "bucket",
        credentials: "profile x".to_owned(),
    };
    let retrying = Retrying::new(budget, client.meter().clone());
    Store::new(client, retrying, super::Path::default(), names)
}

fn store(scripted: &Arc<Scripted>) -> Store {
    store_with(scripted, BUDGET)
}

fn refuse(status: u16, code: &str) -> Step {
    Step::Refuse(Answer {
        status,
        code: code.to_owned(),
        ..Answer::default()
    })
}

type IsRight = fn(&StoreError) -> bool;

fn bytes(length: usize) -> Bytes {
    Bytes::from(vec![7; length])
}

#[tokio::test(start_paused = true)]
async fn what_may_pass_is_tried_again() {
    for step in [
        Step::FailBefore,
        Step::Hang,
        refuse(503, "SlowDown"),
        refuse(503, ""),
        refuse(429, ""),
        refuse(500, "InternalError"),
        refuse(400, "RequestTimeout"),
        refuse(409, "ConditionalRequestConflict"),
    ] {
        let scripted = Scripted::new([step.clone(), step.clone()]);
        let created = store(&scripted).create("x", bytes(1)).await;
        assert!(matches!(created, Ok(Created::New)), "{step:?}: {created:?}");
        assert_eq!(scripted.asked(), ["create"; 3], "{step:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_will_not_pass_is_asked_once() {
    // an operator with a wrong key must not wait a minute to be told
    let cases: [(u16, &str, IsRight); 11] = [
        (403, "AccessDenied", |e| {
            matches!(e, StoreError::Denied { .. })
        }),
        (403, "InvalidAccessKeyId", |e| {
            matches!(e, StoreError::Denied { .. })
        }),
        (401, "", |e| matches!(e, StoreError::Denied { .. })),
        (400, "ExpiredToken", |e| {
            matches!(e, StoreError::Denied { .. })
        }),
        (403, "RequestTimeTooSkewed", |e| {
            matches!(e, StoreError::ClockSkew { .. })
        }),
        (301, "PermanentRedirect", |e| {
            matches!(e, StoreError::WrongRegion { .. })
        }),
        (404, "NoSuchBucket", |e| {
            matches!(e, StoreError::NoBucket { .. })
        }),
        (404, "ContainerNotFound", |e| {
            matches!(e, StoreError::NoBucket { .. })
        }),
        (507, "XMinioStorageFull", |e| {
            matches!(e, StoreError::Full { .. })
        }),
        (400, "InvalidRequest", |e| {
            matches!(e, StoreError::Refused { .. })
        }),
        (404, "", |e| matches!(e, StoreError::Refused { .. })),
    ];
    for (status, code, is_right) in cases {
        let scripted = Scripted::new([refuse(status, code)]);
        let error = store(&scripted).get("x").await.unwrap_err();
        assert!(is_right(&error), "{status} {code}: {error:?}");
        assert!(error.may_pass(), "a running stream goes on: {error}");
        assert_eq!(scripted.asked(), ["get"], "{status} {code}");
        let told = crate::error::Error::from(error);
        assert_eq!(told.kind(), crate::error::Kind::Unreachable, "{told}");
        assert!(told.hint_text().is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn a_missing_object_is_an_answer() {
    let scripted = Scripted::new([]);
    let error = store(&scripted).get("x").await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error:?}");
    assert!(!error.may_pass());
    assert_eq!(scripted.asked(), ["get"]);
}

#[tokio::test(start_paused = true)]
async fn an_outage_ends_the_operation_within_its_budget() {
    let scripted = Scripted::new(vec![Step::FailBefore; 1000]);
    let since = Instant::now();
    let error = store(&scripted).get("x").await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("attempts in"), "{error}");
    assert!(since.elapsed() <= BUDGET, "{:?}", since.elapsed());
    let asked = scripted.asked().len();
    assert!((8..40).contains(&asked), "{asked} attempts in a minute");

    let scripted = Scripted::new(vec![Step::FailBefore; 2]);
    let once = store_with(&scripted, Duration::ZERO).get("x").await;
    assert!(matches!(once, Err(StoreError::Unreachable { .. })));
    assert_eq!(scripted.asked().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn waits_as_long_as_the_service_asks() {
    let slow_down = Step::Refuse(Answer {
        status: 503,
        code: "SlowDown".to_owned(),
        retry_after: Some(Duration::from_secs(20)),
        ..Answer::default()
    });
    let scripted = Scripted::new([slow_down]);
    let since = Instant::now();
    store(&scripted).create("x", bytes(1)).await.unwrap();
    assert!(since.elapsed() >= Duration::from_secs(20));
}

#[tokio::test(start_paused = true)]
async fn a_create_that_was_done_unheard_is_left_to_the_caller_to_compare() {
    // taken for a conflict it would stop the stream; taken for new, another's object would count
    for step in [Step::FailAfter, Step::HangAfter] {
        let scripted = Scripted::new([step]);
        let created = store(&scripted).create("x", bytes(3)).await.unwrap();
        assert_eq!(created, Created::Exists);
        assert_eq!(store(&scripted).get("x").await.unwrap(), bytes(3));
    }
}

#[tokio::test(start_paused = true)]
async fn a_dead_line_is_given_up_and_a_slow_one_is_not() {
    let scripted = Scripted::new([Step::Hang]);
    let since = Instant::now();
    let once = store_with(&scripted, Duration::ZERO);
    once.create("x", bytes(1 << 20)).await.unwrap_err();
    let small = since.elapsed();
    assert!(small >= SILENCE && small < SILENCE * 2, "{small:?}");

    let scripted = Scripted::new([Step::Hang]);
    let since = Instant::now();
    let once = store_with(&scripted, Duration::ZERO);
    once.create("x", bytes(64 << 20)).await.unwrap_err();
    let large = since.elapsed();
    // 64 MiB at 1 Mbit/s
    assert!(large > Duration::from_secs(512), "{large:?}");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_ends_early_is_never_a_short_object() {
    // a short pack would be damage to report; a short record would be believed
    let object = bytes(1000);
    for step in [
        Step::Cut(400),
        Step::Cut(0),
        Step::Stall(400),
        Step::Stall(0),
    ] {
        let scripted = Scripted::new([Step::Do, step.clone(), step.clone()]);
        let store = store(&scripted);
        store.create("x", object.clone()).await.unwrap();
        assert_eq!(store.get("x").await.unwrap(), object, "{step:?}");
        assert_eq!(scripted.asked().len(), 4, "{step:?}");
    }
    let scripted = Scripted::new([Step::Do, Step::Cut(5), Step::Do, Step::Cut(5)]);
    let store = store(&scripted);
    store.create("x", object.clone()).await.unwrap();
    assert_eq!(store.get_range("x", 10, 20).await.unwrap(), bytes(20));
    assert_eq!(store.get_tail("x", 20).await.unwrap(), (bytes(20), 1000));
    let past = store.get_range("x", 990, 20).await.unwrap();
    assert_eq!(past.len(), 10, "the object itself ends there");
    assert_eq!(scripted.asked().len(), 6);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_an_object_is_read_where_the_service_must_be_told_its_size() {
    // Azure refuses "the last 4096 bytes", and every trailer is read that way
    let scripted = Scripted::new([]);
    let plain = store(&scripted);
    let azure = Store {
        client: plain.client.clone().without_suffixes(),
        ..plain.clone()
    };
    for length in [0, 10, 1000] {
        plain
            .create(&length.to_string(), bytes(length))
            .await
            .unwrap();
        for tail in [1, 999, 1000, 5000] {
            let (expected, found) = (
                plain.get_tail(&length.to_string(), tail).await,
                azure.get_tail(&length.to_string(), tail).await,
            );
            assert_eq!(expected.unwrap(), found.unwrap(), "{length} {tail}");
        }
    }
    let missing = azure.get_tail("nothing", 5).await;
    assert!(
        matches!(missing, Err(StoreError::NotFound { .. })),
        "{missing:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_list_that_breaks_off_is_never_a_short_list() {
    for step in [Step::FailBefore, Step::Stall(1)] {
        let scripted = Scripted::new([Step::Do, Step::Do, Step::Do, step]);
        let store = store(&scripted).below("a/b");
        for name in ["1", "2", "3"] {
            store.create(name, bytes(1)).await.unwrap();
        }
        let listed = store.list("").await.unwrap();
        let names: Vec<_> = listed.iter().map(|listed| listed.path.as_str()).collect();
        assert_eq!(names, ["1", "2", "3"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_ignores_conditions_is_found_out_and_guarded() {
    // Garage answers 200 to a second If-None-Match: * and overwrites
    let scripted = Scripted::new([Step::Do, Step::IgnoreCondition]);
    let store = store(&scripted);
    let clone = store.below("main");
    store.create("c", bytes(1)).await.unwrap();
    assert!(!store.probe_conditional_create("c", bytes(1)).await.unwrap());
    assert!(!clone.probe_conditional_create("c", bytes(1)).await.unwrap());
    let first = clone.create("x", bytes(1)).await.unwrap();
    let second = clone.create("x", bytes(2)).await.unwrap();
    assert_eq!((first, second), (Created::New, Created::Exists));
    assert_eq!(clone.get("x").await.unwrap(), bytes(1));
    let asked = scripted.asked();
    assert_eq!(asked, ["create", "create", "head", "create", "head", "get"]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_know_conditions_is_written_to_all_the_same() {
    let unknown = Step::Refuse(Answer {
        status: 501,
        code: "NotImplemented".to_owned(),
        ..Answer::default()
    });
    let scripted = Scripted::new([unknown]);
    let store = store(&scripted);
    let first = store.create("x", bytes(1)).await.unwrap();
    let second = store.create("x", bytes(2)).await.unwrap();
    assert_eq!((first, second), (Created::New, Created::Exists));
    assert!(!store.probe_conditional_create("x", bytes(1)).await.unwrap());
    assert_eq!(scripted.asked(), ["create", "head", "put", "head"]);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_honours_conditions_is_not_guarded() {
    let scripted = Scripted::new([]);
    let store = store(&scripted);
    store.create("c", bytes(1)).await.unwrap();
    assert!(store.probe_conditional_create("c", bytes(1)).await.unwrap());
    store.create("x", bytes(1)).await.unwrap();
    assert_eq!(scripted.asked(), ["create"; 3]);
}

const LARGE: usize = (64 << 20) + 1;

#[tokio::test(start_paused = true)]
async fn a_large_object_goes_up_in_parts_that_are_tried_again() {
    let steps = [
        Step::Do,
        Step::Do,
        Step::FailBefore,
        refuse(503, "SlowDown"),
    ];
    let scripted = Scripted::new(steps);
    let store = store(&scripted);
    let object = bytes(LARGE);
    let created = store.create_bulk("packs/1", object.clone()).await.unwrap();
    assert_eq!(created, Created::New);
    assert_eq!(store.get("packs/1").await.unwrap(), object);
    let again = store.create_bulk("packs/1", bytes(LARGE)).await.unwrap();
    assert_eq!(again, Created::Exists);
    let asked = scripted.asked();
    assert_eq!(asked.iter().filter(|asked| *asked == "part").count(), 7);
    assert!(!asked.contains(&"abort".to_owned()), "{asked:?}");
}

#[tokio::test(start_paused = true)]
async fn a_small_bulk_object_is_created_as_usual() {
    let scripted = Scripted::new([]);
    store(&scripted).create_bulk("x", bytes(10)).await.unwrap();
    assert_eq!(scripted.asked(), ["create"]);
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_fails_is_given_up() {
    // parts of abandoned uploads are invisible and cost money for ever
    let steps = [Step::Do, Step::Do, refuse(403, "AccessDenied")];
    let scripted = Scripted::new(steps);
    let failed = store(&scripted).create_bulk("x", bytes(LARGE)).await;
    assert!(
        matches!(failed, Err(StoreError::Denied { .. })),
        "{failed:?}"
    );
    assert_eq!(scripted.asked().last().unwrap(), "abort");
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_is_dropped_is_given_up() {
    let scripted = Scripted::new([Step::Do, Step::Do, Step::Hang, Step::Hang]);
    let store = store(&scripted);
    let upload = store.create_bulk("x", bytes(LARGE));
    let stopped = tokio::time::timeout(Duration::from_secs(5), upload).await;
    assert!(stopped.is_err());
    let deadline = Instant::now() + Duration::from_secs(5);
    while scripted.asked().last().unwrap() != "abort" {
        assert!(Instant::now() < deadline, "{:?}", scripted.asked());
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_completed_unheard_is_done() {
    let mut steps = vec![Step::Do; 7];
    steps.extend([Step::FailAfter, refuse(404, "NoSuchUpload")]);
    let scripted = Scripted::new(steps);
    let created = store(&scripted)
        .create_bulk("x", bytes(LARGE))
        .await
        .unwrap();
    assert_eq!(created, Created::New);
    let asked = scripted.asked();
    assert_eq!(asked[asked.len() - 3..], ["complete", "complete", "head"]);
}

#[tokio::test(start_paused = true)]
async fn no_more_requests_are_under_way_than_allowed() {
    let scripted = Scripted::new(vec![Step::Hang; 8]);
    let objects: Arc<dyn ObjectStore> = Arc::<Scripted>::clone(&scripted);
    let options = super::StoreOptions {
        concurrency: 3,
        ..super::StoreOptions::at("s3://bucket")
    };
    let store = Store::over(objects, &options);
    let reads = (0..8).map(|_| store.get("x"));
    let all = futures_util::future::join_all(reads);
    let stopped = tokio::time::timeout(Duration::from_secs(5), all).await;
    assert!(stopped.is_err());
    assert_eq!(scripted.asked().len(), 3);
}
