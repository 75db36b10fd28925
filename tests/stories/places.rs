//! A story that does not run over a kind of repository is in the list `places`, one that does not run on every
//! major in `majors`, with the reason: what is left out by mistake protects nobody.

use std::collections::BTreeSet;
use std::process::Command;

const PLACES: &str = include_str!("places");
const MAJORS: &str = include_str!("majors");

#[test]
fn every_exception_is_a_story() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--list", "--format=terse"])
        .output()
        .unwrap();
    let listed = String::from_utf8(output.stdout).unwrap();
    let stories: BTreeSet<&str> = listed
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .collect();
    assert!(stories.len() > 90, "{} stories", stories.len());
    let exceptions = |list: &'static str| list.lines().filter(|line| !line.starts_with('#'));
    for line in exceptions(PLACES) {
        let mut words = line.split_whitespace();
        let (story, place) = (words.next().unwrap(), words.next());
        assert!(stories.contains(story), "no such story: {line}");
        assert!(
            matches!(place, Some("disk" | "s3")),
            "no such place: {line}"
        );
        assert!(words.next().is_some(), "no reason: {line}");
    }
    for line in exceptions(MAJORS) {
        let (story, reason) = line.split_once(' ').unwrap();
        assert!(stories.contains(story), "no such story: {line}");
        assert!(!reason.trim().is_empty(), "no reason: {line}");
    }
}
