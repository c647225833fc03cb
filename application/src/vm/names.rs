//! Names for VMs that nobody named.

use ghost_domain::{Error, Result, VmName};
use rand::seq::IndexedRandom;

use crate::registry::Model;

const FIRST: [&str; 32] = [
    "amber", "ashen", "brisk", "calm", "clear", "coral", "dusky", "early", "faint", "fleet",
    "gentle", "glad", "hazel", "hushed", "ivory", "keen", "late", "lucid", "mellow", "misty",
    "noble", "pale", "plain", "quiet", "rapid", "silver", "slow", "still", "sunny", "swift",
    "tidal", "warm",
];
const SECOND: [&str; 32] = [
    "badger", "beacon", "birch", "brook", "cedar", "comet", "crane", "delta", "ember", "falcon",
    "fern", "finch", "grove", "harbor", "heron", "juniper", "lantern", "maple", "meadow", "otter",
    "owl", "pebble", "raven", "reed", "ridge", "sparrow", "spruce", "thicket", "tundra", "valley",
    "willow", "wren",
];

/// A name that no VM has: `quiet-heron`, with a number once the plain ones are rare.
pub(crate) fn unused(model: &Model) -> Result<VmName> {
    let mut random = rand::rng();
    for attempt in 0u32..1_000 {
        let (Some(first), Some(second)) = (FIRST.choose(&mut random), SECOND.choose(&mut random))
        else {
            break;
        };
        let text = if attempt < 16 {
            format!("{first}-{second}")
        } else {
            format!("{first}-{second}-{attempt}")
        };
        let name = VmName::new(text)?;
        if !model.names.contains_key(&name) {
            return Ok(name);
        }
    }
    Err(Error::internal("no unused name was found"))
}
