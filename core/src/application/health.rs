//! Whether this replica can do its work.

use std::time::Duration;

use super::fleet::Fleet;

/// Memory that is behind the store for longer tells of a fleet that was.
const TOO_OLD: Duration = Duration::from_secs(30);

/// Why not, one line each; none where it can.
pub async fn problems(fleet: &Fleet) -> Vec<String> {
    let mut found = Vec::new();
    let store = fleet.store().health().await;
    if !store.writable {
        let why = store.problem.unwrap_or_else(|| "it says not why".into());
        found.push(format!("the store takes no writes: {why}"));
    }
    if let Some(behind) = fleet.behind_for().filter(|behind| *behind > TOO_OLD) {
        found.push(format!(
            "what is shown is {} s old: the store's changes do not arrive",
            behind.as_secs()
        ));
    }
    found
}
