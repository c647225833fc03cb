//! Whole-system tests of Ghost: what they need to run real agents, to wait, to play the outsider,
//! and to prove at the end that nothing was left behind.
//!
//! Start reading at [`auditor`]: every system test ends with it. [`agent::Agent`] runs a real
//! `ghost-agent`, [`ctl::Ctl`] a real `ghostctl`.
//!
//! All but the auditor is for tests and the benchmark: it panics with an explanation where the test
//! cannot go on.

pub mod agent;
pub mod auditor;
pub mod binaries;
pub mod clock;
pub mod core;
pub mod ctl;
pub mod fleet;
pub mod guest;
pub mod http;
pub mod libvirt;
pub mod netlab;
pub mod partition;
pub mod proxy;
pub mod replicas;
pub mod server;
pub mod siege;
pub mod swarm;
pub mod wait;
pub mod xml;
