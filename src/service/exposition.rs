//! What a stream shows of itself, as Prometheus reads it. Pure.

use std::fmt::{self, Display};

use jiff::Timestamp;

use crate::exposition::{Kind, Page, Seconds, since_epoch};
use crate::receive::state::{Connection, StreamState};
use crate::repository::store::Traffic;

/// How much of an error's text becomes a label, in characters.
const MESSAGE_CHARS_MAX: usize = 200;

/// All that is shown of one stream.
#[derive(Debug)]
pub(super) struct Shown<'a> {
    /// The cluster's name.
    pub(super) cluster: &'a str,
    pub(super) state: &'a StreamState,
    /// Each repository's name, and what it was asked.
    pub(super) traffic: &'a [(String, Traffic)],
    /// When it is shown.
    pub(super) now: Timestamp,
}

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let common = [("cluster", self.cluster)];
        let mut page = Page::new(f, &common);
        page.connection(self.state)?;
        page.positions(self.state)?;
        page.times(self.state, self.now)?;
        page.slot(self.state)?;
        page.stored(self.state)?;
        page.failure(self.state)?;
        page.traffic(self.traffic)
    }
}

/// A number of a store.
type Count = fn(&Traffic) -> u64;

impl Page<'_, '_> {
    fn connection(&mut self, state: &StreamState) -> fmt::Result {
        self.family(
            "anywhen_stream_state",
            Kind::Gauge,
            "What the stream does now: 1 for one of its states, 0 for the others.",
        )?;
        for connection in Connection::ALL {
            let is = u8::from(connection == state.connection);
            self.sample("anywhen_stream_state", &[("state", connection.word())], is)?;
        }
        self.family(
            "anywhen_stream_info",
            Kind::Gauge,
            "The server that the stream receives from, or did last, and its slot: always 1.",
        )?;
        let server = state.server.as_deref().unwrap_or_default();
        let slot = state.slot.as_deref().unwrap_or_default();
        let labels = [("server", server), ("slot", slot)];
        self.sample("anywhen_stream_info", &labels, 1)?;
        self.only(
            "anywhen_timeline",
            Kind::Gauge,
            "The timeline that is received.",
            state.timeline.map(wal::TimelineId::get),
        )?;
        self.only(
            "anywhen_synchronous",
            Kind::Gauge,
            "Whether commits on the server wait for this stream.",
            Some(u8::from(state.synchronous)),
        )?;
        self.only(
            "anywhen_reconnects_total",
            Kind::Counter,
            "How often the stream began again after it had been lost.",
            Some(state.reconnects),
        )
    }

    fn positions(&mut self, state: &StreamState) -> fmt::Result {
        for (name, help, lsn) in [
            (
                "anywhen_server_lsn_bytes",
                "The end of WAL as the server last said it, as a byte position.",
                state.server_end,
            ),
            (
                "anywhen_received_lsn_bytes",
                "The end of what was received, as a byte position.",
                state.received,
            ),
            (
                "anywhen_stored_lsn_bytes",
                "The end of what is durable in the repository, as a byte position.",
                state.stored,
            ),
            (
                "anywhen_reported_lsn_bytes",
                "The flush position that the server was last told, as a byte position; where \
                 the spool acknowledges, it may be ahead of what is stored.",
                state.reported,
            ),
        ] {
            self.only(name, Kind::Gauge, help, lsn.map(wal::Lsn::as_u64))?;
        }
        self.only(
            "anywhen_lag_bytes",
            Kind::Gauge,
            "WAL that the server is known to have and the repository has not.",
            state.lag_bytes(),
        )
    }

    fn times(&mut self, state: &StreamState, now: Timestamp) -> fmt::Result {
        self.only(
            "anywhen_lag_seconds",
            Kind::Gauge,
            "How much time would be lost with the server: 0 while all that it has is stored.",
            state.lag(now).map(Seconds),
        )?;
        for (name, help, time) in [
            (
                "anywhen_restorable_timestamp_seconds",
                "The newest moment that is known to be restorable, given a backup.",
                state.moment,
            ),
            (
                "anywhen_received_timestamp_seconds",
                "When WAL was last received.",
                state.received_at,
            ),
            (
                "anywhen_stored_timestamp_seconds",
                "When the repository last acknowledged WAL.",
                state.stored_at,
            ),
        ] {
            self.only(name, Kind::Gauge, help, time.map(since_epoch))?;
        }
        Ok(())
    }

    fn slot(&mut self, state: &StreamState) -> fmt::Result {
        self.only(
            "anywhen_slot_retained_bytes",
            Kind::Gauge,
            "WAL that the server keeps for the slot.",
            state.retained_bytes,
        )?;
        self.family(
            "anywhen_slot_state_info",
            Kind::Gauge,
            "What the server says of the slot: always 1.",
        )?;
        match &state.slot_state {
            Some(said) => self.sample("anywhen_slot_state_info", &[("state", said)], 1),
            None => Ok(()),
        }
    }

    fn stored(&mut self, state: &StreamState) -> fmt::Result {
        for (name, help, count) in [
            (
                "anywhen_received_bytes_total",
                "Plain WAL received.",
                state.received_bytes,
            ),
            (
                "anywhen_stored_bytes_total",
                "Plain WAL that the repository has acknowledged.",
                state.stored_bytes,
            ),
            (
                "anywhen_segments_stored_total",
                "Complete segments stored.",
                state.segments_stored,
            ),
            (
                "anywhen_pieces_stored_total",
                "Pieces of segments stored, merged ones left out.",
                state.pieces_stored,
            ),
            (
                "anywhen_merged_pieces_stored_total",
                "Pieces stored to take the place of smaller ones.",
                state.merges,
            ),
            (
                "anywhen_pieces_removed_total",
                "Pieces removed because another object covers them.",
                state.pieces_removed,
            ),
            (
                "anywhen_holes_total",
                "Holes that this process noted: WAL that was removed before it was received, that \
                 cannot be verified, or that was written with wal_level=minimal.",
                state.holes,
            ),
        ] {
            self.only(name, Kind::Counter, help, Some(count))?;
        }
        self.only(
            "anywhen_spool_bytes",
            Kind::Gauge,
            "What is in the spool and not in the repository yet, as stored.",
            Some(state.spool_bytes),
        )?;
        self.only(
            "anywhen_spool_objects",
            Kind::Gauge,
            "Objects in the spool that are not in the repository yet.",
            Some(state.spool_objects),
        )
    }

    fn failure(&mut self, state: &StreamState) -> fmt::Result {
        let failure = state.last_error.as_ref();
        self.only(
            "anywhen_last_error_timestamp_seconds",
            Kind::Gauge,
            "When something last went wrong.",
            failure.map(|failure| since_epoch(failure.at)),
        )?;
        self.family(
            "anywhen_last_error_info",
            Kind::Gauge,
            "What last went wrong, also where it is over: always 1.",
        )?;
        let Some(failure) = failure else {
            return Ok(());
        };
        let message: String = failure.message.chars().take(MESSAGE_CHARS_MAX).collect();
        self.sample("anywhen_last_error_info", &[("message", &message)], 1)
    }

    fn traffic(&mut self, places: &[(String, Traffic)]) -> fmt::Result {
        self.family(
            "anywhen_store_requests_total",
            Kind::Counter,
            "Attempts at requests to the repository's store, by what came of them.",
        )?;
        for (place, traffic) in places {
            for (request, outcome, count) in traffic.requests() {
                let labels = [
                    ("repository", place.as_str()),
                    ("request", request.word()),
                    ("outcome", outcome.word()),
                ];
                self.sample("anywhen_store_requests_total", &labels, count)?;
            }
        }
        let counts: [(&str, &str, Count); 3] = [
            (
                "anywhen_store_retries_total",
                "Attempts that were made after one that had failed, until one is answered.",
                |traffic| traffic.retries,
            ),
            (
                "anywhen_store_written_bytes_total",
                "Bytes sent to the repository's store and answered, as stored.",
                |traffic| traffic.written_bytes,
            ),
            (
                "anywhen_store_read_bytes_total",
                "Bytes read from the repository's store, as stored.",
                |traffic| traffic.read_bytes,
            ),
        ];
        for (name, help, count) in counts {
            self.family(name, Kind::Counter, help)?;
            for (place, traffic) in places {
                self.sample(name, &[("repository", place)], count(traffic))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use wal::{Lsn, TimelineId};

    use super::*;
    use crate::receive::state::Unstored;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_microsecond(micros).unwrap()
    }

    fn shown(state: &StreamState, traffic: &[(String, Traffic)], now: Timestamp) -> String {
        let cluster = "main";
        Shown {
            cluster,
            state,
            traffic,
            now,
        }
        .to_string()
    }

    fn full() -> StreamState {
        let mut state = StreamState {
            connection: Connection::Streaming,
            server: Some("host=db1 port=5432".to_owned()),
            slot: Some("anywhen_main".to_owned()),
            slot_state: Some("reserved".to_owned()),
            retained_bytes: Some(16_777_216),
            timeline: TimelineId::new(3),
            received: Some(Lsn::new(0x1_0000_0300)),
            stored: Some(Lsn::new(0x1_0000_0200)),
            reported: Some(Lsn::new(0x1_0000_0100)),
            // beyond what a float holds exactly
            server_end: Some(Lsn::new((1 << 53) + 1)),
            unstored: Unstored::default(),
            received_at: Some(at(1_700_000_001_500_000)),
            stored_at: Some(at(1_700_000_001_000_000)),
            moment: Some(at(1_700_000_000_000_001)),
            synchronous: true,
            received_bytes: 1,
            stored_bytes: 2,
            segments_stored: 3,
            pieces_stored: 4,
            merges: 5,
            pieces_removed: 6,
            holes: 7,
            reconnects: 8,
            spool_bytes: 9,
            spool_objects: 10,
            last_error: None,
        };
        state.failed(
            at(1_600_000_000_000_000),
            "cannot read \"a\\b\":\nno such host",
        );
        state
    }

    const GOLDEN: &str = include_str!("exposition.golden");

    #[test]
    fn the_page_is_as_it_was_agreed() {
        // dashboards and alerts name these: nothing is renamed, and no unit changes
        let places = [("local".to_owned(), Traffic::default())];
        let page = shown(&full(), &places, at(1_700_000_010_000_000));
        assert_eq!(page, GOLDEN);
    }

    #[test]
    fn every_sample_belongs_to_a_family_that_is_described_before_it_once() {
        let places = [
            ("local".to_owned(), Traffic::default()),
            ("offsite".to_owned(), Traffic::default()),
        ];
        let page = shown(&full(), &places, at(1_700_000_010_000_000));
        let mut families = Vec::new();
        let mut samples = std::collections::BTreeSet::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(!families.contains(&name), "{name} twice");
                assert!(help.ends_with('.'), "{line}");
                families.push(name);
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(families.last(), Some(&name));
                assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
            } else {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let (name, _) = series.split_once('{').unwrap();
                assert_eq!(families.last(), Some(&name), "{line}");
                assert!(value.parse::<f64>().is_ok(), "{line}");
                assert!(samples.insert(series), "{series} twice");
            }
        }
    }

    #[test]
    fn the_document_lists_every_metric_and_no_other() {
        let document = include_str!("../../docs/metrics.md");
        // below it stands what `status` knows
        let (document, _) = document.split_once("| number | what |").unwrap();
        let types = GOLDEN
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "));
        let shown: Vec<String> = types
            .map(|line| {
                let (name, kind) = line.split_once(' ').unwrap();
                format!("| `{name}` | {kind} |")
            })
            .collect();
        let rows = document
            .lines()
            .filter(|line| line.starts_with("| `anywhen_"));
        let listed: Vec<String> = rows
            .map(|row| row.split_inclusive('|').take(3).collect())
            .collect();
        assert_eq!(listed, shown);
    }

    #[test]
    fn what_is_not_known_has_no_sample() {
        // zero would be read as "no lag" before the first contact
        let page = shown(&StreamState::default(), &[], at(0));
        for name in [
            "anywhen_lag_seconds",
            "anywhen_lag_bytes",
            "anywhen_stored_lsn_bytes",
            "anywhen_slot_retained_bytes",
            "anywhen_last_error_info",
        ] {
            assert!(page.contains(&format!("# TYPE {name} gauge\n")), "{name}");
            assert!(!page.contains(&format!("\n{name}{{")), "{name}");
        }
        assert!(page.contains("anywhen_stream_state{cluster=\"main\",state=\"connecting\"} 1\n"));
    }

    #[test]
    fn a_long_error_is_cut_within_characters() {
        let mut state = StreamState::default();
        state.failed(at(0), "é".repeat(1_000));
        let page = shown(&state, &[], at(0));
        let message = format!("message=\"{}\"}} 1\n", "é".repeat(MESSAGE_CHARS_MAX));
        assert!(page.contains(&message));
    }

    #[test]
    fn seconds_keep_their_sign_and_their_microseconds() {
        for (micros, text) in [
            (0, "0.000000"),
            (1_000_001, "1.000001"),
            (-1_500_000, "-1.500000"),
        ] {
            assert_eq!(
                Seconds(SignedDuration::from_micros(micros)).to_string(),
                text
            );
        }
    }
}
