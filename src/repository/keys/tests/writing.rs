//! The key for what is written now.

use object_store::memory::InMemory;

use super::failing::{Fails, failing, sound};
use super::*;
use crate::error::{Error, Kind};

#[tokio::test]
async fn the_calls_of_one_archiver_share_a_key() {
    // wal-push is a process for each segment: a key each would leave hundreds of wraps a day
    let stage = Stage::new();
    let ((_, alice), (_, bob)) = (identity(), identity());
    let told = || Told::archiver(&[&bob, &alice]);
    let first = id_now(&stage.process(told())).await;
    let second = id_now(&stage.process(told())).await;
    assert_eq!(first, second);
    assert_eq!(first.to_string()[..9], *"20261120-");
    let mut expected = [&alice, &bob].map(|one| id::wrap_path(&first, &one.wrap_id()));
    expected.sort();
    assert_eq!(stage.wraps().await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_begin_at_once_make_one_key() {
    let stage = Stage::new();
    let (_, alice) = identity();
    let calls: Vec<_> = (0..16)
        .map(|_| {
            let process = stage.process(Told::archiver(&[&alice]));
            tokio::spawn(async move { id_now(&process).await })
        })
        .collect();
    let mut ids = BTreeSet::new();
    for call in calls {
        ids.insert(call.await.unwrap());
    }
    assert_eq!((ids.len(), stage.wraps().await.len()), (1, 1));
}

#[tokio::test]
async fn a_repository_that_was_emptied_gets_the_wraps_again() {
    // it would hold objects that nobody can open
    let stage = Stage::new();
    let (ours, alice) = identity();
    let id = id_now(&stage.process(Told::archiver(&[&alice]))).await;
    std::fs::remove_dir_all(stage.repository()).unwrap();
    let archiver = stage.process(Told::archiver(&[&alice]));
    assert_eq!(id_now(&archiver).await, id);
    let header = stage.store_object(&archiver, 2).await;
    assert!(opens(&stage.process(Told::reader(ours)), &header).await);
}

/// A stream that goes on for months would acknowledge what nobody can open.
#[tokio::test]
async fn wraps_that_are_removed_under_a_running_archiver_are_stored_again() {
    let stage = Stage::new();
    let (ours, alice) = identity();
    let archiver = stage.process(Told::archiver(&[&alice]));
    stage.store_object(&archiver, 2).await;
    std::fs::remove_dir_all(stage.repository().join(FOLDER)).unwrap();
    stage.store_object(&archiver, 3).await;
    assert!(stage.wraps().await.is_empty(), "not asked each time");
    stage.later(1);
    let header = stage.store_object(&archiver, 4).await;
    let again = async {
        while stage.wraps().await.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    let patience = std::time::Duration::from_secs(20);
    tokio::time::timeout(patience, again).await.unwrap();
    assert!(opens(&stage.process(Told::reader(ours)), &header).await);
}

#[tokio::test]
async fn a_key_is_not_used_before_its_wraps_are_stored() {
    let stage = Stage::new();
    let (ours, alice) = identity();
    let archiver = stage.process(Told::archiver(&[&alice]));
    let in_the_way = stage.repository().join(FOLDER);
    std::fs::write(&in_the_way, "no folder").unwrap();
    for _ in 0..3 {
        assert!(matches!(archiver.sealing().await, Err(KeyError::Store(_))));
    }
    let state = stage.folder.path().join("state/keys");
    let kept = std::fs::read_dir(&state).unwrap();
    let kept: Vec<_> = kept.map(|file| file.unwrap().path()).collect();
    assert!(
        kept.iter().all(|file| file.extension().unwrap() == "lock"),
        "{kept:?}"
    );
    std::fs::remove_file(&in_the_way).unwrap();
    let header = stage.store_object(&archiver, 2).await;
    assert!(opens(&stage.process(Told::reader(ours)), &header).await);
    assert_eq!(stage.wraps().await.len(), 1);
}

#[tokio::test]
async fn whatever_fails_a_key_that_is_handed_out_can_be_opened() {
    for (fails, shares_state) in [
        (Fails::Before, true),
        (Fails::After, true),
        (Fails::Before, false),
    ] {
        for requests in 0.. {
            let (stage, objects) = (Stage::new(), Arc::new(InMemory::new()));
            let store = sound(&objects);
            let ((ours, alice), (_, bob)) = (identity(), identity());
            let told = || Told {
                shares_state,
                ..Told::archiver(&[&alice, &bob])
            };
            let fails_soon = failing(&objects, requests, fails);
            let first = stage.process_over(&fails_soon, told());
            let handed_out = first.sealing().await.is_ok();
            let reader = stage.process_over(&store, Told::reader(ours));
            let archivers = [first, stage.process_over(&store, told())];
            let from = usize::from(!handed_out);
            for (archiver, timeline) in archivers[from..].iter().zip(2..) {
                let header = store_object_in(&store, archiver, timeline).await;
                assert!(opens(&reader, &header).await, "{fails:?} {requests}");
            }
            if handed_out {
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_new_day_begins_a_new_key_in_the_middle_of_a_process() {
    let stage = Stage::new();
    let (_, alice) = identity();
    for shares_state in [true, false] {
        let told = Told {
            shares_state,
            ..Told::archiver(&[&alice])
        };
        let archiver = stage.process(told);
        let first = id_now(&archiver).await;
        stage.later(11);
        assert_eq!(id_now(&archiver).await, first);
        stage.later(2);
        let second = id_now(&archiver).await;
        assert_eq!(second.day(), first.day().tomorrow().unwrap());
        // a clock that is set back across midnight makes no third key
        stage.later(-2);
        assert_eq!(id_now(&archiver).await, second);
        stage.later(-11);
    }
}

#[tokio::test]
async fn a_process_that_runs_for_days_forgets_the_keys_of_earlier_days() {
    // whoever takes its machine over would read all that was written since it began
    let (_, alice) = identity();
    for shares_state in [true, false] {
        let stage = Stage::new();
        let told = Told {
            shares_state,
            ..Told::archiver(&[&alice])
        };
        let archiver = stage.process(told);
        let mut headers = Vec::new();
        for timeline in 2..5 {
            headers.push(stage.store_object(&archiver, timeline).await);
            stage.later(24);
        }
        // a write that is tried again over midnight looks at what it wrote the day before
        assert!(opens(&archiver, &headers[1]).await && opens(&archiver, &headers[2]).await);
        let error = open(&archiver, &headers[0]).await;
        assert!(
            matches!(error, Err(KeyError::NoIdentity { .. })),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_state_dir_that_fails_at_midnight_passes_and_one_that_never_worked_does_not() {
    // a stream that ended over a full disk would end in the night, and need somebody
    let stage = Stage::new();
    let (_, alice) = identity();
    let archiver = stage.process(Told::archiver(&[&alice]));
    let first = id_now(&archiver).await;
    stage.later(24);
    let keys = stage.folder.path().join("state/keys");
    std::fs::remove_dir_all(&keys).unwrap();
    std::fs::write(&keys, "no folder").unwrap();
    let error = archiver.sealing().await.unwrap_err();
    assert!(error.is_unreachable() && error.to_string().contains("the data key of the day"));
    let said = Error::from(error);
    assert!(said.hint_text().unwrap().contains("state_dir"));
    assert_eq!(said.kind(), Kind::Unreachable);
    let error = stage.process(Told::archiver(&[&alice])).sealing().await;
    assert!(error.is_err_and(|error| !error.is_unreachable()));
    std::fs::remove_file(&keys).unwrap();
    assert_ne!(id_now(&archiver).await, first);
}

#[tokio::test]
async fn a_clock_that_once_was_years_ahead_keeps_no_key_in_use_for_years() {
    let stage = Stage::new();
    let (_, alice) = identity();
    stage.later(24 * 365 * 5);
    let ahead = id_now(&stage.process(Told::archiver(&[&alice]))).await;
    stage.later(-24 * 365 * 5);
    let archiver = stage.process(Told::archiver(&[&alice]));
    let now = id_now(&archiver).await;
    assert!(now.day() < ahead.day(), "{now} {ahead}");
    assert_eq!(id_now(&stage.process(Told::archiver(&[&alice]))).await, now);
}

#[tokio::test]
async fn other_recipients_begin_a_new_key() {
    // whoever was removed could open what is written from now on
    let stage = Stage::new();
    let ((old, alice), (new, bob)) = (identity(), identity());
    let first = id_now(&stage.process(Told::archiver(&[&alice]))).await;
    let archiver = stage.process(Told::archiver(&[&bob]));
    assert_ne!(id_now(&archiver).await, first);
    let header = stage.store_object(&archiver, 2).await;
    assert!(opens(&stage.process(Told::reader(new)), &header).await);
    assert!(!opens(&stage.process(Told::reader(old)), &header).await);
}

#[tokio::test]
async fn without_a_state_dir_each_object_carries_its_wraps() {
    let stage = Stage::new();
    let ((ours, alice), (theirs, bob)) = (identity(), identity());
    let told = Told {
        shares_state: false,
        ..Told::archiver(&[&alice, &bob])
    };
    let header = stage.store_object(&stage.process(told), 2).await;
    assert_eq!((header.wraps.len(), stage.wraps().await.len()), (2, 0));
    for identities in [ours, theirs] {
        assert!(opens(&stage.process(Told::reader(identities)), &header).await);
    }
}

#[tokio::test]
async fn every_upload_has_a_salt_of_its_own() {
    let stage = Stage::new();
    let (_, alice) = identity();
    let archiver = stage.process(Told::archiver(&[&alice]));
    let first = stage.store_object(&archiver, 2).await;
    let second = stage.store_object(&archiver, 3).await;
    assert_eq!(first.key, second.key);
    assert_ne!(first.salt, second.salt);
}

#[tokio::test]
async fn a_kept_key_that_is_damaged_is_replaced_and_a_newer_one_is_not() {
    let stage = Stage::new();
    let (_, alice) = identity();
    let first = id_now(&stage.process(Told::archiver(&[&alice]))).await;
    let folder = stage.folder.path().join("state/keys");
    let files = std::fs::read_dir(folder).unwrap();
    let mut files = files.map(|file| file.unwrap().path());
    let file = files
        .find(|path| path.extension().unwrap() == "json")
        .unwrap();
    let whole = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let second = id_now(&stage.process(Told::archiver(&[&alice]))).await;
    assert_ne!(first, second);
    let newer = whole.replace("\"format\":1", "\"format\":2");
    std::fs::write(&file, &newer).unwrap();
    let refused = stage.process(Told::archiver(&[&alice])).sealing().await;
    assert!(matches!(
        refused,
        Err(KeyError::NewerState { format: 2, .. })
    ));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), newer);
}

#[tokio::test]
async fn an_identity_alone_writes_nothing_plain() {
    // its owner takes the repository for encrypted
    let stage = Stage::new();
    let (ours, _) = identity();
    let error = stage.process(Told::reader(ours)).sealing().await;
    assert!(matches!(error, Err(KeyError::NoRecipients)));
    let (ours, _) = identity();
    let told = Told {
        accept_plain: true,
        ..Told::reader(ours)
    };
    assert!(stage.process(told).sealing().await.unwrap().is_none());
    assert!(
        stage
            .process(Told::default())
            .sealing()
            .await
            .unwrap()
            .is_none()
    );
}

#[test]
fn settings_that_cannot_encrypt_are_refused_at_once() {
    let stage = Stage::new();
    let new = |settings: &EncryptionSettings| {
        let clock: Arc<dyn Clock> = Arc::clone(&stage.clock) as _;
        Encryption::new(settings, &stage.store(), clock)
    };
    let (_, alice) = identity();
    let settings = EncryptionSettings {
        recipients: vec![alice.as_str().to_owned(), "age1nobody".to_owned()],
        ..EncryptionSettings::default()
    };
    assert!(matches!(new(&settings), Err(KeyError::Recipient { found }) if found == "age1nobody"));
    let settings = EncryptionSettings {
        identity_file: Some("/nonexistent/identity".into()),
        ..EncryptionSettings::default()
    };
    assert!(matches!(new(&settings), Err(KeyError::IdentityFile { .. })));
    assert!(!new(&EncryptionSettings::default()).unwrap().is_configured());
}
