//! The key of what is stored.

use super::*;
use crate::error::{Error, Kind};
use crate::repository::RepositoryError;

#[tokio::test]
async fn an_archiver_opens_today_and_not_yesterday() {
    // a stolen archiver must not give away the past
    let stage = Stage::new();
    let (ours, alice) = identity();
    let archiver = stage.process(Told::archiver(&[&alice]));
    let yesterday = stage.store_object(&archiver, 2).await;
    stage.later(24);
    let today = stage.store_object(&archiver, 3).await;
    let stolen = stage.process(Told::archiver(&[&alice]));
    assert!(opens(&stolen, &today).await);
    let refused = open(&stolen, &yesterday).await.unwrap_err();
    assert!(matches!(refused, KeyError::NoIdentity { .. }));
    let reader = stage.process(Told::reader(ours));
    assert!(opens(&reader, &today).await && opens(&reader, &yesterday).await);
}

/// Whoever rehearses a restore on the archiver's machine would find out too late that the identity in
/// the safe opens nothing.
#[tokio::test]
async fn the_key_of_the_day_does_not_stand_in_for_an_identity_that_opens_nothing() {
    let stage = Stage::new();
    let ((ours, alice), (theirs, _)) = (identity(), identity());
    let header = stage
        .store_object(&stage.process(Told::archiver(&[&alice])), 2)
        .await;
    let with = |identities| {
        stage.process(Told {
            identities,
            ..Told::archiver(&[&alice])
        })
    };
    let refused = open(&with(theirs), &header).await.unwrap_err();
    assert!(matches!(refused, KeyError::WrongIdentity { .. }));
    let without_settings = Told {
        shares_state: true,
        ..Told::default()
    };
    let refused = open(&stage.process(without_settings), &header).await;
    assert!(matches!(refused, Err(KeyError::NotConfigured { .. })));
    // where no wrap is left it is the last that opens anything
    std::fs::remove_dir_all(stage.repository().join(FOLDER)).unwrap();
    assert!(opens(&with(ours), &header).await);
}

#[tokio::test]
async fn what_was_sealed_is_read_back() {
    let stage = Stage::new();
    let (ours, alice) = identity();
    let archiver = stage.process(Told::archiver(&[&alice]));
    stage.store_object(&archiver, 2).await;
    let store = stage.store().below("main").below("7");
    let object = store.get("wal/00000002.history").await.unwrap();
    let Ok(container::Reading::Done((header, _))) = container::read_header(&object) else {
        panic!("no header")
    };
    let key = open(&stage.process(Told::reader(ours)), &header)
        .await
        .unwrap();
    let decoded = container::decode(&object, 100, key.as_ref()).unwrap();
    assert_eq!(decoded.plain, b"plain");
}

#[tokio::test]
async fn each_way_of_having_no_key_is_said_by_itself() {
    let stage = Stage::new();
    let ((_, alice), (theirs, bob)) = (identity(), identity());
    let header = stage
        .store_object(&stage.process(Told::archiver(&[&alice])), 2)
        .await;
    let of = |told: Told| stage.process(told);
    let bobs = Told {
        shares_state: false,
        ..Told::archiver(&[&bob])
    };
    let errors = [
        (
            open(&of(Told::default()), &header).await,
            Kind::Usage,
            "no encryption is configured",
        ),
        (
            open(&of(bobs), &header).await,
            Kind::Usage,
            "no identity file is configured",
        ),
        (
            open(&of(Told::reader(theirs)), &header).await,
            Kind::Usage,
            "wraps=1, identities=1",
        ),
    ];
    for (outcome, kind, words) in errors {
        let error = Error::from(outcome.unwrap_err());
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.message().contains(words), "{error}");
        assert!(error.hint_text().is_some(), "{error}");
    }
}

#[tokio::test]
async fn a_key_that_is_gone_is_damage_and_no_missing_object() {
    // wal-fetch would say "not in the archive", and PostgreSQL promote
    let stage = Stage::new();
    let (ours, alice) = identity();
    let header = stage
        .store_object(&stage.process(Told::archiver(&[&alice])), 2)
        .await;
    std::fs::remove_dir_all(stage.repository().join(FOLDER)).unwrap();
    let error = open(&stage.process(Told::reader(ours)), &header)
        .await
        .unwrap_err();
    assert!(matches!(error, KeyError::KeyGone { .. }));
    let error = RepositoryError::from(error);
    assert!(!error.is_not_found() && !error.is_unreachable());
    assert_eq!(Error::from(error).kind(), Kind::Damaged);
}

#[tokio::test]
async fn a_damaged_wrap_is_named_and_another_one_still_opens() {
    let stage = Stage::new();
    let ((ours, alice), (theirs, bob)) = (identity(), identity());
    let archiver = stage.process(Told::archiver(&[&alice, &bob]));
    let header = stage.store_object(&archiver, 2).await;
    let file = stage.wrap_file(&id_now(&archiver).await, &alice);
    let whole = std::fs::read(&file).unwrap();
    flip_last_byte(&file);
    let damaged = open(&stage.process(Told::reader(ours)), &header)
        .await
        .unwrap_err();
    assert!(
        matches!(&damaged, KeyError::DamagedWrap { path, .. } if path.ends_with(&alice.wrap_id().to_string())),
        "{damaged}"
    );
    assert_eq!(Error::from(damaged).kind(), Kind::Damaged);
    assert!(opens(&stage.process(Told::reader(theirs)), &header).await);
    for planted in [
        vec![0; 100_000],
        b"age-encryption.org/v1\n".to_vec(),
        Vec::new(),
    ] {
        std::fs::write(&file, planted).unwrap();
        let (ours, _) = identity();
        let error = open(&stage.process(Told::reader(ours)), &header)
            .await
            .unwrap_err();
        assert!(matches!(error, KeyError::DamagedWrap { .. }), "{error}");
    }
    std::fs::write(&file, whole).unwrap();
}

#[tokio::test]
async fn a_wrap_under_another_recipients_name_is_found() {
    // somebody tidied up, or another tool copied the folder
    let stage = Stage::new();
    let ((ours, alice), (_, bob)) = (identity(), identity());
    let archiver = stage.process(Told::archiver(&[&alice]));
    let header = stage.store_object(&archiver, 2).await;
    let id = id_now(&archiver).await;
    let (from, to) = (stage.wrap_file(&id, &alice), stage.wrap_file(&id, &bob));
    crate::durable::rename(&from, &to).unwrap();
    assert!(opens(&stage.process(Told::reader(ours)), &header).await);
}

#[tokio::test]
async fn a_plain_object_is_refused_where_encryption_is_configured() {
    // whoever can write to the bucket could plant WAL of his own
    let stage = Stage::new();
    let plain = Header::new("history", "wal/00000002.history", "main", "7");
    let (_, alice) = identity();
    for told in [Told::archiver(&[&alice]), Told::reader(identity().0)] {
        let error = open(&stage.process(told), &plain).await.unwrap_err();
        assert!(matches!(error, KeyError::PlainObject { .. }));
        let error = Error::from(error);
        assert_eq!(error.kind(), Kind::Damaged);
        assert!(error.hint_text().unwrap().contains("accept_plain"));
    }
    let accepting = Told {
        accept_plain: true,
        ..Told::archiver(&[&alice])
    };
    assert!(
        open(&stage.process(accepting), &plain)
            .await
            .unwrap()
            .is_none()
    );
    assert!(
        open(&stage.process(Told::default()), &plain)
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn a_key_id_cannot_lead_out_of_its_folder() {
    let stage = Stage::new();
    let mut header = Header::new("history", "wal/00000002.history", "main", "7");
    for found in [
        "",
        "../main/7/x",
        "20261120-0123",
        "20261120-0123456789abcdef0123456789abcdeF",
    ] {
        header.encrypt(found, &[0; 32], Vec::new());
        let reader = stage.process(Told::reader(identity().0));
        let error = open(&reader, &header).await.unwrap_err();
        assert!(matches!(error, KeyError::BadKeyId { .. }), "{found:?}");
    }
}
