//! An entry as a line of JSON. Its last member is the hash over the hash of the line before and
//! all bytes of this line before that member: what is compared is what stands in the file, not
//! what some reader makes of it.

use std::time::Duration;

use ghost_domain::Timestamp;
use ghost_domain::guest::{AuditEntry, AuditRecord, FleetAuditPart};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A chain's beginning.
pub(super) const GENESIS: [u8; 32] = [0; 32];
const BEFORE_HASH: &str = ",\"hash\":\"";
const AFTER_HASH: &str = "\"}";
const SUFFIX: usize = BEFORE_HASH.len() + 64 + AFTER_HASH.len();
/// What a line may hold of one text; the rest is told by its length.
const MOST_TEXT: usize = 16 * 1024;
/// What it may hold of a name, in characters.
const MOST_NAME: usize = 128;
/// Longer than any line: eight texts, each byte escaped by six, and four names.
pub(super) const MOST_LINE: usize = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Line<'a> {
    sequence: u64,
    at_unix_millis: i64,
    principal: Text<'a>,
    vm_id: Text<'a>,
    vm_name: Text<'a>,
    action: Text<'a>,
    detail: Text<'a>,
    outcome: Text<'a>,
    bytes_in: u64,
    bytes_out: u64,
    duration_micros: Option<u64>,
    request_id: Text<'a>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    fleet: Option<Fleet<'a>>,
}

/// Lines of a fleet's log only.
#[derive(Serialize, Deserialize)]
struct Fleet<'a> {
    tenant: Text<'a>,
    source: Text<'a>,
    host: Text<'a>,
    host_tenant: Text<'a>,
}

type Text<'a> = std::borrow::Cow<'a, str>;

/// At most [`MOST_TEXT`] bytes, and how many are left out.
fn bounded(text: &str) -> Text<'_> {
    if text.len() <= MOST_TEXT {
        return Text::Borrowed(text);
    }
    let mut end = MOST_TEXT;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Text::Owned(format!(
        "{}… ({} bytes more)",
        &text[..end],
        text.len() - end
    ))
}

/// A name of ours, which is short: what is longer is none.
fn name(text: &str) -> Text<'_> {
    Text::Owned(text.chars().take(MOST_NAME).collect())
}

fn hash(previous: &[u8; 32], content: &[u8]) -> [u8; 32] {
    let mut sum = Sha256::new();
    sum.update(previous);
    sum.update(content);
    sum.finalize().into()
}

/// The line of an entry, with its line break, and the entry as it was written.
pub(super) fn write(
    sequence: u64,
    at: Timestamp,
    record: &AuditRecord,
    previous: &[u8; 32],
) -> Result<(Vec<u8>, AuditEntry), serde_json::Error> {
    let line = Line {
        sequence,
        at_unix_millis: at.unix_millis(),
        principal: bounded(&record.principal),
        vm_id: bounded(&record.vm_id),
        vm_name: bounded(&record.vm_name),
        action: bounded(&record.action),
        detail: bounded(&record.detail),
        outcome: bounded(&record.outcome),
        bytes_in: record.bytes_in,
        bytes_out: record.bytes_out,
        duration_micros: record
            .duration
            .map(|duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)),
        request_id: bounded(&record.request_id),
        fleet: record.fleet.as_ref().map(|fleet| Fleet {
            tenant: name(&fleet.tenant),
            source: name(&fleet.source),
            host: name(&fleet.host),
            host_tenant: name(&fleet.host_tenant),
        }),
    };
    let mut bytes = serde_json::to_vec(&line)?;
    // The closing brace comes behind the hash.
    bytes.pop();
    let hash = hash(previous, &bytes);
    bytes.extend_from_slice(BEFORE_HASH.as_bytes());
    bytes.extend_from_slice(hex::encode(hash).as_bytes());
    bytes.extend_from_slice(AFTER_HASH.as_bytes());
    bytes.push(b'\n');
    Ok((bytes, line.entry(hash)))
}

impl Line<'_> {
    fn entry(self, hash: [u8; 32]) -> AuditEntry {
        AuditEntry {
            sequence: self.sequence,
            at: Timestamp::from_unix_millis(self.at_unix_millis),
            record: AuditRecord {
                principal: self.principal.into_owned(),
                vm_id: self.vm_id.into_owned(),
                vm_name: self.vm_name.into_owned(),
                action: self.action.into_owned(),
                detail: self.detail.into_owned(),
                outcome: self.outcome.into_owned(),
                bytes_in: self.bytes_in,
                bytes_out: self.bytes_out,
                duration: self.duration_micros.map(Duration::from_micros),
                request_id: self.request_id.into_owned(),
                fleet: self.fleet.map(|fleet| FleetAuditPart {
                    tenant: fleet.tenant.into_owned(),
                    source: fleet.source.into_owned(),
                    host: fleet.host.into_owned(),
                    host_tenant: fleet.host_tenant.into_owned(),
                }),
            },
            hash,
        }
    }
}

/// A line that was read.
pub(super) struct Read {
    /// What it says, with the hash that it carries.
    pub(super) entry: AuditEntry,
    content: Vec<u8>,
}

impl Read {
    /// Whether its hash is the one over `previous` and its content.
    pub(super) fn follows(&self, previous: &[u8; 32]) -> bool {
        hash(previous, &self.content) == self.entry.hash
    }
}

/// Reads a line without its line break; `None` where it is none.
pub(super) fn read(line: &[u8]) -> Option<Read> {
    let content = line.len().checked_sub(SUFFIX)?;
    let (content, suffix) = line.split_at(content);
    let digits = suffix
        .strip_prefix(BEFORE_HASH.as_bytes())?
        .strip_suffix(AFTER_HASH.as_bytes())?;
    let mut hash = [0; 32];
    hex::decode_to_slice(digits, &mut hash).ok()?;
    let mut json = content.to_vec();
    json.push(b'}');
    let parsed: Line<'_> = serde_json::from_slice(&json).ok()?;
    Some(Read {
        entry: parsed.entry(hash),
        content: content.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_back_and_are_bounded() {
        let record = AuditRecord {
            principal: "uid 0".into(),
            detail: "\u{1}\n\"".repeat(100_000),
            duration: Some(Duration::from_millis(5)),
            ..AuditRecord::default()
        };
        let (bytes, entry) = write(7, Timestamp::from_unix_millis(5), &record, &GENESIS).unwrap();
        assert!(bytes.len() < MOST_LINE);
        assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
        let read = read(&bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(read.entry, entry);
        assert!(read.follows(&GENESIS) && !read.follows(&[1; 32]));
        assert!(entry.record.detail.ends_with("bytes more)"));
    }

    #[test]
    fn what_is_no_line_is_none() {
        for bad in ["", "{}", "{\"hash\":\"00\"}", &"x".repeat(200)] {
            assert!(read(bad.as_bytes()).is_none(), "{bad}");
        }
    }
}
