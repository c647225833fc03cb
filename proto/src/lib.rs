//! Ghost's protocol: the messages and services of `ghost.agent.v1` as generated code that is
//! checked in (`tests/generate.rs` holds it to the `.proto` files), and the JSON views that HTTP
//! and the command line share.
//!
//! Without the default features only [`guest`] is left: all that a program inside a VM needs, and
//! nothing that would make it large.

/// The host agent's API, version 1.
#[cfg(feature = "agent")]
pub mod agent {
    /// Generated from `proto/ghost/agent/v1/*.proto`.
    #[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
    #[rustfmt::skip]
    pub mod v1 {
        include!("generated/ghost.agent.v1.rs");
    }

    /// What `ghostctl` and the agent take as one HTTP/2 frame (RFC 9113, section 4.2), in bytes. With the
    /// default of 16 KiB a file of 16 MiB is a thousand frames on either side, each with system calls of
    /// its own.
    pub const MOST_FRAME: u32 = 256 * 1024;
}

/// Ghost Core: the fleet's API and the link to its hosts, version 1.
#[cfg(feature = "agent")]
pub mod core {
    /// Generated from `proto/ghost/core/v1/*.proto`.
    #[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
    #[rustfmt::skip]
    pub mod v1 {
        include!("generated/ghost.core.v1.rs");
    }

    /// The oldest version of the control stream that this release speaks.
    pub const OLDEST_LINK_VERSION: u32 = 1;
    /// The newest.
    pub const NEWEST_LINK_VERSION: u32 = 1;
    /// ALPN of a link on Core's TLS listener.
    pub const LINK_PROTOCOL: &[u8] = b"ghost-tunnel/1";
    /// ALPN of a connection that Core makes to a host's own listener: yamux as on a link, where Core is
    /// the client and its first stream carries pings.
    pub const DIRECT_PROTOCOL: &[u8] = b"ghost-direct/1";
    /// Most bytes of one message on the control stream.
    pub const MOST_LINK_MESSAGE: usize = 1024 * 1024;

    /// Metadata (and HTTP headers) of a call that goes through Core.
    pub mod metadata {
        /// The host that a call is for: a name, a full id or a unique prefix of an id.
        pub const HOST: &str = "ghost-host";
        /// In an answer: why the VM was placed where it was.
        pub const PLACEMENT: &str = "ghost-placement";
        /// Of a VM that Core finds a host for: only hosts with all of these labels,
        /// `key=value,key=value`.
        pub const LABELS: &str = "ghost-labels";
        /// From Core to the agent: who calls, `<tenant>/<name>`. Taken only from Core's own streams.
        pub const PRINCIPAL: &str = "ghost-principal";
        /// From Core to the agent: the caller's role.
        pub const ROLE: &str = "ghost-role";
        /// From Core to the agent: the caller's tenant. From one of no tenant to Core: whose hosts a
        /// VM that Core places may go to.
        pub const TENANT: &str = "ghost-tenant";
        /// Between replicas: the call was forwarded once and is not forwarded again.
        pub const FORWARDED: &str = "ghost-forwarded";
    }
}

/// What the host agent and the agent in a VM say to each other over the virtio-serial channel.
pub mod guest {
    pub mod frame;

    /// Generated from `proto/ghost/guest/v1/*.proto`.
    #[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
    #[rustfmt::skip]
    pub mod v1 {
        include!("generated/ghost.guest.v1.rs");
    }

    /// The oldest protocol version that this release speaks.
    pub const OLDEST_VERSION: u32 = 1;
    /// The newest. 2 has bulk frames, see [`frame`], and [`Flow::FILE`].
    pub const NEWEST_VERSION: u32 = 2;
    /// The name of the virtio-serial port, in the domain and in the guest.
    pub const PORT_NAME: &str = "org.ghost.agent.0";

    /// How the bytes of one stream of a call flow.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Flow {
        /// How many bytes may be under way without a grant.
        pub window: u64,
        /// Most bytes in one `StreamData`.
        pub most: usize,
        /// A grant is worth a message once so many bytes were consumed.
        pub grant: u64,
    }

    impl Flow {
        /// What people and programs wait for: small pieces, so that none is late for another.
        pub const STREAM: Self = Self {
            window: 256 * 1024,
            most: 64 * 1024,
            grant: 64 * 1024,
        };
        /// Contents of files: every piece and every grant wakes threads on both sides, which costs an
        /// emulated guest as much as a few ten KiB.
        pub const FILE: Self = Self {
            window: 512 * 1024,
            most: 128 * 1024,
            grant: 256 * 1024,
        };
        /// Whoever waits for a whole piece of the window waits for no more than a grant.
        const ENDS: () = assert!(
            Self::FILE.window - Self::FILE.grant >= Self::FILE.most as u64
                && Self::STREAM.window - Self::STREAM.grant >= Self::STREAM.most as u64
        );

        /// That of a stream in a version of the protocol.
        pub fn of(stream: v1::Stream, version: u32) -> Self {
            let () = Self::ENDS;
            if stream == v1::Stream::File && version >= frame::BULK_VERSION {
                Self::FILE
            } else {
                Self::STREAM
            }
        }
    }
}

/// The file descriptor set of all packages, for gRPC reflection.
#[cfg(feature = "agent")]
pub const DESCRIPTORS: &[u8] = include_bytes!("generated/descriptors.bin");

#[cfg(feature = "agent")]
pub mod view;
