//! The order of a backup's messages.

use basebackup::stream::{Event, Events, Form, StreamError, Tablespace, Totals};

fn tablespaces() -> Vec<Tablespace> {
    let location = Some("/srv/a".to_owned());
    vec![
        Tablespace {
            oid: Some(16384),
            location,
            size_kib: Some(66),
        },
        Tablespace {
            oid: None,
            location: None,
            size_kib: None,
        },
    ]
}

fn archive(index: usize) -> Event<'static> {
    Event::ArchiveBegins {
        tablespace: tablespaces().swap_remove(index),
    }
}

fn typed() -> Events {
    let mut events = Events::new(Form::Typed, tablespaces()).unwrap();
    assert_eq!(events.copy_out_begins().unwrap(), None);
    events
}

#[test]
fn the_typed_form_gives_archives_and_manifest() {
    let mut events = typed();
    assert_eq!(
        events.copy_data(b"n16384.tar\0/srv/a\0").unwrap(),
        [archive(0)]
    );
    assert_eq!(events.copy_data(b"dabc").unwrap(), [Event::Data(b"abc")]);
    assert_eq!(
        events.copy_data(b"p\0\0\0\0\0\0\x01\0").unwrap(),
        [Event::Progress(256)]
    );
    assert_eq!(
        events.copy_data(b"nbase.tar\0\0").unwrap(),
        [Event::ArchiveEnds, archive(1)]
    );
    assert_eq!(events.copy_data(b"d").unwrap(), [Event::Data(b"")]);
    assert_eq!(
        events.copy_data(b"m").unwrap(),
        [Event::ArchiveEnds, Event::ManifestBegins]
    );
    assert_eq!(
        events.copy_data(b"d{}").unwrap(),
        [Event::ManifestData(b"{}")]
    );
    assert_eq!(events.copy_out_ends().unwrap(), Some(Event::ManifestEnds));
    let totals = Totals {
        archive_bytes: 3,
        manifest_bytes: Some(2),
    };
    assert_eq!(events.finish(), Ok(totals));
}

#[test]
fn the_form_of_13_and_14_gives_the_same() {
    let mut events = Events::new(Form::PerArchive, tablespaces()).unwrap();
    assert_eq!(events.copy_out_begins().unwrap(), Some(archive(0)));
    // Without type bytes: what looks like one is data.
    assert_eq!(events.copy_data(b"nabc").unwrap(), [Event::Data(b"nabc")]);
    assert_eq!(events.copy_out_ends().unwrap(), Some(Event::ArchiveEnds));
    assert_eq!(events.copy_out_begins().unwrap(), Some(archive(1)));
    assert_eq!(events.copy_out_ends().unwrap(), Some(Event::ArchiveEnds));
    assert_eq!(
        events.copy_out_begins().unwrap(),
        Some(Event::ManifestBegins)
    );
    assert_eq!(
        events.copy_data(b"{}").unwrap(),
        [Event::ManifestData(b"{}")]
    );
    assert_eq!(events.copy_out_ends().unwrap(), Some(Event::ManifestEnds));
    assert!(events.copy_out_begins().is_err());
    let totals = Totals {
        archive_bytes: 4,
        manifest_bytes: Some(2),
    };
    assert_eq!(events.finish(), Ok(totals));
}

#[test]
fn a_backup_without_manifest_ends_after_its_archives() {
    let mut events = typed();
    events.copy_data(b"n16384.tar\0/srv/a\0").unwrap();
    events.copy_data(b"nbase.tar\0\0").unwrap();
    assert_eq!(events.copy_out_ends().unwrap(), Some(Event::ArchiveEnds));
    assert_eq!(events.finish().unwrap().manifest_bytes, None);

    let mut events = Events::new(Form::PerArchive, tablespaces()).unwrap();
    for _ in 0..2 {
        events.copy_out_begins().unwrap();
        events.copy_out_ends().unwrap();
    }
    assert_eq!(events.finish().unwrap().manifest_bytes, None);
}

/// A backup without its data directory's archive must never be taken for one.
#[test]
fn a_backup_cut_short_is_not_finished() {
    let truncated = |ended| {
        Err(StreamError::Truncated {
            ended,
            announced: 2,
        })
    };
    assert_eq!(
        Events::new(Form::Typed, tablespaces()).unwrap().finish(),
        truncated(0)
    );
    assert_eq!(typed().finish(), truncated(0));
    let mut events = typed();
    events.copy_data(b"n16384.tar\0/srv/a\0").unwrap();
    events.copy_out_ends().unwrap_err();
    let mut events = typed();
    events.copy_data(b"n16384.tar\0/srv/a\0").unwrap();
    events.copy_data(b"nbase.tar\0\0").unwrap();
    assert_eq!(events.finish(), truncated(1));
    let mut events = Events::new(Form::PerArchive, tablespaces()).unwrap();
    events.copy_out_begins().unwrap();
    events.copy_out_ends().unwrap();
    assert_eq!(events.finish(), truncated(1));
}

#[test]
fn refuses_messages_that_make_no_sense() {
    for message in [
        &b""[..],
        b"x",
        b"dabc",
        b"m",
        b"nbase.tar\0\0",
        b"n16385.tar\0/srv/a\0",
        b"n16384.tar.gz\0/srv/a\0",
        b"n16384.tar\0/srv/a",
        b"n16384.tar",
        b"n16384.tar\0/srv/a\0more\0",
        b"p",
        b"p\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF",
    ] {
        let error = typed().copy_data(message).unwrap_err();
        assert!(
            !matches!(error, StreamError::Truncated { .. }),
            "{message:?}: {error}"
        );
    }
    let mut events = typed();
    events.copy_data(b"n16384.tar\0/srv/a\0").unwrap();
    events.copy_data(b"m").unwrap_err();
    let mut events = typed();
    events.copy_data(b"n16384.tar\0/srv/a\0").unwrap();
    events.copy_data(b"nbase.tar\0\0").unwrap();
    events.copy_data(b"nbase.tar\0\0").unwrap_err();
    typed().copy_out_begins().unwrap_err();
    Events::new(Form::Typed, tablespaces())
        .unwrap()
        .copy_data(b"d")
        .unwrap_err();
    Events::new(Form::PerArchive, tablespaces())
        .unwrap()
        .copy_data(b"d")
        .unwrap_err();
}

#[test]
fn refuses_a_list_without_the_data_directory_at_its_end() {
    let [first, last] = <[Tablespace; 2]>::try_from(tablespaces()).unwrap();
    for listed in [
        vec![],
        vec![first.clone()],
        vec![last.clone(), first.clone()],
        vec![last.clone(), last.clone()],
    ] {
        assert!(matches!(
            Events::new(Form::Typed, listed),
            Err(StreamError::Tablespaces { .. })
        ));
    }
    Events::new(Form::Typed, vec![last]).unwrap();
}
