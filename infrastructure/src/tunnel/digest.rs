//! The digest by which both ends of a link know that they speak of the same VMs.

use ghost_proto::core::v1::VmSummary;
use prost::Message;
use twox_hash::XxHash3_64;

/// XXH3-64 over the encoded summaries of all VMs, which have to come in the order of their ids (as
/// text, which is the order of the UUIDs too).
pub fn vms_digest<'a>(summaries: impl IntoIterator<Item = &'a VmSummary>) -> u64 {
    let mut hasher = XxHash3_64::new();
    let mut encoded = Vec::new();
    for summary in summaries {
        encoded.clear();
        // With its length, so that two lists never look like one.
        if summary.encode_length_delimited(&mut encoded).is_ok() {
            std::hash::Hasher::write(&mut hasher, &encoded);
        }
    }
    std::hash::Hasher::finish(&hasher)
}

/// The digest of one summary, to tell whether it changed.
pub fn vm_digest(summary: &VmSummary) -> u64 {
    vms_digest([summary])
}
