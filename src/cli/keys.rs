//! `anywhen keys`: identities are made, data keys listed and rotated.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use super::args::{GenerateArgs, Global, KeysCommand, RotateArgs};
use super::destination::place;
use super::output;
use crate::clock::{Clock as _, SystemClock};
use crate::config::Settings;
use crate::error::{Error, Result};
use crate::setup::keys::{self, PlaceSettings, Rotation};

pub(super) async fn run(global: &Global, command: KeysCommand) -> Result<()> {
    match command {
        KeysCommand::Generate(args) => generate(global, &args),
        KeysCommand::List => {
            let lists = keys::list(&repositories(global)?).await?;
            if global.json {
                output::json(&lists)
            } else {
                output::line(&lists.to_string())
            }
        }
        KeysCommand::Rotate(args) => rotate(global, args).await,
    }
}

fn generate(global: &Global, args: &GenerateArgs) -> Result<()> {
    if global.json && args.output.is_none() {
        return Err(
            Error::usage("with --json an identity is not printed, only written")
                .hint("name the file with -o FILE"),
        );
    }
    let (made, text) = keys::generate(args.output.as_deref(), SystemClock.now())?;
    match text {
        Some(text) => output::line(text.trim_end()),
        None if global.json => output::json(&made),
        None => output::line(&format!("Public key: {}", made.recipient)),
    }
}

async fn rotate(global: &Global, args: RotateArgs) -> Result<()> {
    let rotation = Rotation::plan(&repositories(global)?, args.dry_run).await?;
    if !global.json {
        output::line(&rotation.to_string())?;
    }
    if !args.dry_run {
        if rotation.changes_anything() && !args.yes {
            confirmed(global.json).await?;
        }
        rotation.carry_out().await?;
    }
    // one document: of a failure, or of what was done
    match (global.json, args.dry_run) {
        (true, _) => output::json(&rotation),
        (false, false) if rotation.changes_anything() => output::line("done"),
        (false, _) => Ok(()),
    }
}

/// Asks on a terminal; elsewhere it must have been said beforehand.
async fn confirmed(as_json: bool) -> Result<()> {
    let unasked = || Error::usage("nothing was changed: nobody said yes").hint("add --yes");
    if as_json || !std::io::stdin().is_terminal() {
        return Err(unasked());
    }
    let asked = tokio::task::spawn_blocking(|| {
        let mut answer = String::new();
        write!(std::io::stderr(), "Do this? [y/N] ")?;
        std::io::stdin().lock().read_line(&mut answer)?;
        std::io::Result::Ok(answer)
    });
    match asked.await {
        Ok(Ok(answer)) if matches!(answer.trim(), "y" | "Y" | "yes") => Ok(()),
        _ => Err(unasked()),
    }
}

/// The repositories of the clusters that are configured, each once.
fn repositories(global: &Global) -> Result<Vec<PlaceSettings>> {
    let settings = Settings::load(&global.given())?;
    let mut found: Vec<PlaceSettings> = Vec::new();
    for repository in settings
        .clusters()
        .flat_map(|cluster| &cluster.repositories)
    {
        if !found.iter().any(|known| known.name == repository.name) {
            found.push(place(repository));
        }
    }
    Ok(found)
}
