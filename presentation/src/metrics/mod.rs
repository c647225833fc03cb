//! Metrics.
mod recorder;
pub use recorder::Recorder;
