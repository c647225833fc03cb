//! `ghost-agent`: turns a Linux host into a host of VMs.
mod config;

fn main() {}
