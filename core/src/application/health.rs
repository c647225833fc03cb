//! Whether this replica can do its work.

use std::time::Duration;

use super::fleet::Fleet;
use crate::domain::ports::FleetStoreHealth;

/// Memory that is behind the store for longer tells of a fleet that was. A member of the store that
/// is exchanged for another one takes less.
const TOO_OLD: Duration = Duration::from_secs(5);

/// Why not, one line each; none where it can.
pub async fn problems(fleet: &Fleet) -> Vec<String> {
    problems_with(fleet, fleet.store().health().await)
}

/// As [`problems`], with what the store has just said.
pub fn problems_with(fleet: &Fleet, store: FleetStoreHealth) -> Vec<String> {
    let mut found = Vec::new();
    if !store.writable {
        let why = store.problem.unwrap_or_else(|| "it says not why".into());
        found.push(format!("the store takes no writes: {why}"));
    }
    if let Some(behind) = fleet.behind_for().filter(|behind| *behind > TOO_OLD) {
        found.push(format!(
            "what is shown is up to {} s old: the store's changes do not arrive",
            behind.as_secs()
        ));
    }
    found
}
