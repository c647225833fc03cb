//! Ghost's protocol: the messages and services of `ghost.agent.v1` as generated code that is
//! checked in (`tests/generate.rs` holds it to the `.proto` files), and the JSON views that HTTP
//! and the command line share.

/// The host agent's API, version 1.
pub mod agent {
    /// Generated from `proto/ghost/agent/v1/*.proto`.
    #[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
    #[rustfmt::skip]
    pub mod v1 {
        include!("generated/ghost.agent.v1.rs");
    }
}

/// The file descriptor set of all packages, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!("generated/descriptors.bin");

pub mod view;
