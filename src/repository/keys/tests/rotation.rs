//! Rotation: no key is ever without a wrap that opens it.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use object_store::memory::InMemory;

use super::failing::{Fails, failing, sound};
use super::*;

/// An operator who opens with `identities` and rotates to `recipients`.
fn operator(identities: Identities, recipients: &[&Recipient]) -> Told {
    Told {
        identities,
        shares_state: false,
        ..Told::archiver(recipients)
    }
}

async fn rotate(operator: &Encryption) -> Result<RotationPlan, KeyError> {
    let plan = operator.plan_rotation().await.unwrap();
    operator.rotate(&plan).await.map(|()| plan)
}

/// A copy of somebody's identities, for another process.
fn again(identities: &Identities) -> Identities {
    Identities::joined(&[identities])
}

#[tokio::test]
async fn rotating_adds_new_wraps_and_retires_old_ones() {
    let stage = Stage::new();
    let ((old, alice), (new, bob), (_, carol)) = (identity(), identity(), identity());
    let archiver = stage.process(Told::archiver(&[&alice, &carol]));
    let mut headers = vec![stage.store_object(&archiver, 2).await];
    stage.later(24);
    headers.push(stage.store_object(&archiver, 3).await);
    let operator = stage.process(operator(again(&old), &[&bob, &carol]));
    let before = stage.wraps().await;
    let plan = operator.plan_rotation().await.unwrap();
    assert_eq!(stage.wraps().await, before, "a plan writes nothing");
    assert_eq!(plan.keys.len(), 2);
    for key in &plan.keys {
        assert_eq!(key.add, [bob.as_str()]);
        assert_eq!(key.retire[0].id, alice.wrap_id());
        assert_eq!((key.retire.len(), key.objects, key.carried), (1, 1, false));
    }
    operator.rotate(&plan).await.unwrap();
    let (old, new) = (
        stage.process(Told::reader(old)),
        stage.process(Told::reader(new)),
    );
    for header in &headers {
        assert!(opens(&new, header).await && !opens(&old, header).await);
    }
    assert!(!operator.plan_rotation().await.unwrap().changes_anything());
}

#[tokio::test]
async fn keys_that_only_objects_carry_are_found_and_stored() {
    let stage = Stage::new();
    let ((old, alice), (new, bob)) = (identity(), identity());
    let told = Told {
        shares_state: false,
        ..Told::archiver(&[&alice])
    };
    let header = stage.store_object(&stage.process(told), 2).await;
    stage.store_object(&stage.process(Told::default()), 3).await;
    let plan = rotate(&stage.process(operator(old, &[&bob])))
        .await
        .unwrap();
    assert!(plan.keys[0].carried && plan.to_string().contains("carry themselves"));
    assert!(opens(&stage.process(Told::reader(new)), &header).await);
}

#[tokio::test]
async fn the_key_of_a_sealed_backup_record_is_found() {
    // it may be named nowhere else: the day changed between the manifest and the record
    let stage = Stage::new();
    let ((old, alice), (new, bob)) = (identity(), identity());
    let told = Told {
        shares_state: false,
        ..Told::archiver(&[&alice])
    };
    let path = "backups/20261120T120000.000Z/backup.json";
    let (header, object) = object_of(&stage.process(told), "backup", path).await;
    let record = serde_json::json!({ "format": 1, "sealed": BASE64.encode(object) });
    let store = stage.store().below("main").below("7");
    let text = serde_json::to_vec(&record).unwrap();
    store.create(path, text.into()).await.unwrap();
    let clear = path.replace(".000Z", ".001Z");
    let text = Bytes::from_static(b"{\"format\":1}");
    store.create(&clear, text).await.unwrap();
    let plan = rotate(&stage.process(operator(old, &[&bob])))
        .await
        .unwrap();
    assert_eq!((plan.keys.len(), plan.keys[0].objects), (1, 1));
    assert!(opens(&stage.process(Told::reader(new)), &header).await);
}

#[tokio::test]
async fn objects_that_do_not_tell_their_key_are_an_error_at_the_end() {
    // "done" would be taken for leave to throw the old identity away
    let stage = Stage::new();
    let ((old, alice), (new, bob)) = (identity(), identity());
    let archiver = stage.process(Told::archiver(&[&alice]));
    let header = stage.store_object(&archiver, 2).await;
    let store = stage.store().below("main").below("7");
    for (path, bytes) in [
        ("wal/00000003.history", &b""[..]),
        ("wal/00000004.history", b"no object"),
        ("wal/00000005.history", b"\x50\x2a\x4d"),
        ("backups/20261120T120000.000Z/backup.json", b"{"),
        (
            "backups/20261120T120001.000Z/backup.json",
            b"{\"sealed\":\"!\"}",
        ),
        (
            "backups/20261120T120002.000Z/backup.json",
            b"{\"sealed\":\"AAAA\"}",
        ),
    ] {
        store.create(path, Bytes::from(bytes)).await.unwrap();
    }
    let operator = stage.process(operator(old, &[&bob]));
    let plan = operator.plan_rotation().await.unwrap();
    assert!(plan.to_string().contains("6 damaged objects"), "{plan}");
    let rotated = operator.rotate(&plan).await;
    let Err(error @ KeyError::UnknownKeys { objects: 6, .. }) = rotated else {
        panic!("{rotated:?}")
    };
    assert!(error.is_damage());
    assert!(opens(&stage.process(Told::reader(new)), &header).await);
}

// at how many places it waits depends on the disk; each request by itself is the next test's
#[tokio::test]
async fn a_rotation_that_is_stopped_anywhere_loses_no_key_and_can_be_run_again() {
    let mut stops = 0;
    for step in 1.. {
        let stage = Stage::new();
        let ((old, alice), (new, bob)) = (identity(), identity());
        let archiver = stage.process(Told::archiver(&[&alice]));
        let header = stage.store_object(&archiver, 2).await;
        let first = stage.process(operator(again(&old), &[&bob]));
        let plan = first.plan_rotation().await.unwrap();
        let came_to_its_end = stop_after(step, first.rotate(&plan)).await;
        let reads = |who: &Identities| stage.process(Told::reader(again(who)));
        assert!(opens(&reads(&new), &header).await || opens(&reads(&old), &header).await);
        // the same identity as before is enough, as far as it still opens anything
        if !came_to_its_end && opens(&reads(&old), &header).await {
            rotate(&stage.process(operator(again(&old), &[&bob])))
                .await
                .unwrap();
        }
        assert!(opens(&reads(&new), &header).await, "stopped at {step}");
        if came_to_its_end {
            assert!(!opens(&reads(&old), &header).await);
            break;
        }
        stops += 1;
    }
    assert!(stops > 0, "the rotation was never stopped");
}

#[tokio::test]
async fn a_rotation_whose_store_fails_loses_no_key_and_can_be_run_again() {
    for fails in [Fails::Before, Fails::After] {
        for requests in 0.. {
            let (stage, objects) = (Stage::new(), Arc::new(InMemory::new()));
            let store = sound(&objects);
            let ((old, alice), (new, bob)) = (identity(), identity());
            let archiver = stage.process_over(&store, Told::archiver(&[&alice]));
            let header = store_object_in(&store, &archiver, 2).await;
            let fails_soon = failing(&objects, requests, fails);
            let first = stage.process_over(&fails_soon, operator(again(&old), &[&bob]));
            let is_done = match first.plan_rotation().await {
                Ok(plan) => first.rotate(&plan).await.is_ok(),
                Err(_) => false,
            };
            let reads = |who: &Identities| stage.process_over(&store, Told::reader(again(who)));
            let (old_opens, new_opens) = (
                opens(&reads(&old), &header).await,
                opens(&reads(&new), &header).await,
            );
            assert!(
                old_opens || new_opens,
                "{fails:?} {requests}: nobody opens it"
            );
            if old_opens {
                let second = stage.process_over(&store, operator(again(&old), &[&bob]));
                rotate(&second).await.unwrap();
            }
            assert!(
                opens(&reads(&new), &header).await && !opens(&reads(&old), &header).await,
                "{fails:?} {requests}"
            );
            if is_done {
                assert!(requests > 7, "it took {requests} requests only");
                break;
            }
        }
    }
}

/// Drops `work` where it waits for the `step`th time; says whether it had ended before.
async fn stop_after(step: usize, work: impl Future<Output = Result<(), KeyError>>) -> bool {
    let mut work = pin!(work);
    let mut waits = 0;
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(outcome) => {
            outcome.unwrap();
            Poll::Ready(true)
        }
        Poll::Pending => {
            waits += 1;
            if waits == step {
                Poll::Ready(false)
            } else {
                Poll::Pending
            }
        }
    })
    .await
}

#[tokio::test]
async fn what_stays_is_known_to_open_before_anything_goes() {
    // bob's wrap is damaged, and only bob could see that: alice's was the last that opened
    let stage = Stage::new();
    let ((old, alice), (new, bob)) = (identity(), identity());
    let archiver = stage.process(Told::archiver(&[&alice, &bob]));
    let header = stage.store_object(&archiver, 2).await;
    flip_last_byte(&stage.wrap_file(&id_now(&archiver).await, &bob));
    let plan = rotate(&stage.process(operator(old, &[&bob])))
        .await
        .unwrap();
    assert_eq!(plan.keys[0].renew, [bob.as_str()]);
    assert!(opens(&stage.process(Told::reader(new)), &header).await);
    assert_eq!(stage.wraps().await.len(), 1);
}

#[tokio::test]
async fn a_damaged_wrap_of_somebody_present_is_written_anew() {
    let stage = Stage::new();
    let ((first, alice), (second, bob)) = (identity(), identity());
    let archiver = stage.process(Told::archiver(&[&alice, &bob]));
    let header = stage.store_object(&archiver, 2).await;
    flip_last_byte(&stage.wrap_file(&id_now(&archiver).await, &bob));
    let both = Identities::joined(&[&first, &second]);
    rotate(&stage.process(operator(both, &[&alice, &bob])))
        .await
        .unwrap();
    assert!(opens(&stage.process(Told::reader(second)), &header).await);
}

#[tokio::test]
async fn a_key_that_does_not_open_is_left_alone_and_the_others_are_not() {
    let stage = Stage::new();
    let ((theirs, alice), (old, bob), (new, carol)) = (identity(), identity(), identity());
    let foreign = stage
        .store_object(&stage.process(Told::archiver(&[&alice])), 2)
        .await;
    let header = stage
        .store_object(&stage.process(Told::archiver(&[&bob])), 3)
        .await;
    let rotated = rotate(&stage.process(operator(old, &[&carol]))).await;
    assert!(
        matches!(
            rotated,
            Err(KeyError::NotRotated {
                keys: 1,
                any_gone: false,
                ..
            })
        ),
        "{rotated:?}"
    );
    assert!(opens(&stage.process(Told::reader(new)), &header).await);
    assert!(opens(&stage.process(Told::reader(theirs)), &foreign).await);
}

/// Told to add an identity, an operator looks for one that there is not, and not for the copy of keys/.
#[tokio::test]
async fn a_key_without_any_wrap_is_said_to_be_gone() {
    let stage = Stage::new();
    let ((old, alice), (_, bob)) = (identity(), identity());
    stage
        .store_object(&stage.process(Told::archiver(&[&alice])), 2)
        .await;
    std::fs::remove_dir_all(stage.repository().join(FOLDER)).unwrap();
    let rotated = rotate(&stage.process(operator(old, &[&bob]))).await;
    assert!(
        matches!(
            rotated,
            Err(KeyError::NotRotated {
                keys: 1,
                any_gone: true,
                ..
            })
        ),
        "{rotated:?}"
    );
    let error = crate::error::Error::from(rotated.unwrap_err());
    assert_eq!(error.kind(), crate::error::Kind::Damaged);
    assert!(
        error
            .hint_text()
            .unwrap()
            .contains("restore the folder keys/")
    );
}

#[tokio::test]
async fn a_rotation_to_nobody_is_refused() {
    let stage = Stage::new();
    let (old, alice) = identity();
    stage
        .store_object(&stage.process(Told::archiver(&[&alice])), 2)
        .await;
    let nobody = stage.process(Told::reader(old)).plan_rotation().await;
    assert!(nobody.is_err_and(|error| error.to_string().contains("no recipients")));
    let without = stage
        .process(Told::archiver(&[&alice]))
        .plan_rotation()
        .await;
    assert!(without.is_err_and(|error| error.to_string().contains("no identity file")));
    assert_eq!(stage.wraps().await.len(), 1);
}

#[tokio::test]
async fn two_rotations_at_once_to_different_people_leave_a_wrap() {
    let stage = Stage::new();
    let ((first, alice), (second, bob)) = (identity(), identity());
    let archiver = stage.process(Told::archiver(&[&alice, &bob]));
    let header = stage.store_object(&archiver, 2).await;
    let one = stage.process(operator(again(&first), &[&alice]));
    let other = stage.process(operator(again(&second), &[&bob]));
    // each takes the other's wrap for the one to retire
    let plans = (
        one.plan_rotation().await.unwrap(),
        other.plan_rotation().await.unwrap(),
    );
    one.rotate(&plans.0).await.unwrap();
    other.rotate(&plans.1).await.unwrap();
    let reads = |who| stage.process(Told::reader(who));
    assert!(opens(&reads(first), &header).await || opens(&reads(second), &header).await);
}

#[tokio::test]
async fn the_list_names_whom_each_key_is_for() {
    let stage = Stage::new();
    let ((_, alice), (_, bob)) = (identity(), identity());
    let id = id_now(&stage.process(Told::archiver(&[&alice]))).await;
    std::fs::write(stage.repository().join(FOLDER).join("note"), "not ours").unwrap();
    let list = stage
        .process(Told::archiver(&[&alice, &bob]))
        .list()
        .await
        .unwrap();
    let row = &list.keys[0];
    assert_eq!((list.keys.len(), &row.id, row.in_use), (1, &id, true));
    assert_eq!(row.wraps[0].recipient.as_deref(), Some(alice.as_str()));
    assert_eq!(row.missing, [bob.as_str()]);
    let strangers = stage.process(Told::default()).list().await.unwrap();
    assert_eq!(strangers.keys[0].wraps[0].recipient, None);
    let json = serde_json::to_value(&list).unwrap();
    assert_eq!(json["keys"][0]["made_on"], "2026-11-20");
    assert_eq!(json["keys"][0]["id"], id.to_string());
}

/// Whoever noted that "2" is to be retired would retire another one after the next rotation.
#[tokio::test]
async fn a_list_calls_a_recipient_the_same_whoever_else_there_is() {
    let stage = Stage::new();
    let (_, first) = identity();
    let named = async |recipients: &[&Recipient]| {
        let process = stage.process(Told::archiver(recipients));
        stage.store_object(&process, 2).await;
        let listed = process.list().await.unwrap().to_string();
        let line = listed.lines().find(|line| line.ends_with(first.as_str()));
        line.unwrap().trim().to_owned()
    };
    let alone = named(&[&first]).await;
    assert_eq!(alone, format!("{} = {}", first.wrap_id(), first.as_str()));
    // among some that sort before it, and some that sort behind
    for _ in 0..8 {
        let ((_, one), (_, two)) = (identity(), identity());
        assert_eq!(named(&[&one, &first, &two]).await, alone);
    }
}
