//! How the places of a cluster stand, for whoever looks at all of them.

use super::Repository;
use super::member::Member;
use super::mending::PlaceState;

impl Repository {
    /// How each place stands beside the others. One that did not answer a moment ago is not waited for
    /// again.
    pub async fn place_states(&self) -> Vec<PlaceState> {
        let silent = |member: &Member| self.silence_of(member).map(|error| error.to_string());
        let answering = Self {
            members: self
                .members
                .iter()
                .filter(|member| silent(member).is_none())
                .cloned()
                .collect(),
            ..self.clone()
        };
        let silent = self.members.iter().map(|member| (member, silent(member)));
        let silent: Vec<_> = silent.collect();
        let mut states = answering.places().await.into_iter();
        let silent = silent.into_iter();
        silent
            .filter_map(|(member, silence)| match silence {
                Some(reason) => Some(PlaceState {
                    name: member.name().to_owned(),
                    url: member.place().url().to_owned(),
                    missing: Err(reason),
                }),
                None => states.next(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::clock::{Clock, SystemClock};
    use crate::repository::ServerIdentity;
    use crate::repository::destination::Destination;

    /// A monitor would wait for one outage as often as there is something to ask.
    #[tokio::test]
    async fn a_place_that_did_not_answer_is_not_asked_again_for_its_state() {
        let folders = tempfile::tempdir().unwrap();
        let [near, far] = ["near", "far"].map(|name| folders.path().join(name));
        let mut destination = Destination::local(&near, "main");
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let identity = ServerIdentity {
            system_id: 7,
            major: 18,
            block_bytes: 8192,
        };
        let written = destination.open(true, &clock).unwrap();
        written.repository(identity, false).await.unwrap();
        let mut second = Destination::local(&far, "main").places;
        second[0].name = "far".to_owned();
        destination.places.append(&mut second);

        let read = destination.open(false, &clock).unwrap();
        let repository = read.stored(None).await.unwrap();
        // asked again, it would have an answer now
        std::fs::create_dir(&far).unwrap();
        let states = repository.place_states().await;
        let [near, far] = states.as_slice() else {
            panic!("{states:?}")
        };
        assert_eq!((near.name.as_str(), &near.missing), ("local", &Ok(0)));
        assert_eq!(far.name, "far");
        assert!(far.missing.is_err(), "{far:?}");

        let again = destination.open(false, &clock).unwrap();
        let repository = again.stored(None).await.unwrap();
        let states = repository.place_states().await;
        assert!(states.iter().all(|one| one.missing.is_ok()), "{states:?}");
    }
}
