//! Every key of Core's configuration: one struct for each section, with its defaults.

use std::time::Duration;

use ghost_core::domain::DirectPolicy;
use ghost_domain::ByteSize;
use ghost_infrastructure::config::{
    Endpoint, Fraction, FullPath, Judge, List, Listen, LogLevel, Name, Program, Schema,
    ServerNames, SocketPath, Visitor,
};
use ghost_infrastructure::config_sections;
use ghost_infrastructure::telemetry::LogFormat;

use super::value::{Engine, HostPort, Network, Port, TrustDomain, Url, Word};

config_sections! {
    /// The whole configuration.
    Config {
        /// See [`Core`].
        core: section<Core> = Core::default(),
        /// See [`Grpc`].
        grpc: section<Grpc> = Grpc::default(),
        /// See [`Http`].
        http: section<Http> = Http::default(),
        /// See [`Metrics`].
        metrics: section<Metrics> = Metrics::default(),
        /// See [`Link`].
        link: section<Link> = Link::default(),
        /// See [`Direct`].
        direct: section<Direct> = Direct::default(),
        /// See [`Store`].
        store: section<Store> = Store::default(),
        /// See [`Replica`].
        replica: section<Replica> = Replica::default(),
        /// See [`Oidc`].
        oidc: section<Oidc> = Oidc::default(),
        /// See [`Compat`].
        compat: section<Compat> = Compat::default(),
        /// See [`Limits`].
        limits: section<Limits> = Limits::default(),
        /// See [`Logging`].
        logging: section<Logging> = Logging::default(),
        /// See [`Telemetry`].
        telemetry: section<Telemetry> = Telemetry::default(),
    }

    /// Core itself.
    Core {
        /// What it is called in status and traces; the machine's name where it is left out.
        name: key<Option<Name>> = None,
        /// Where records and keys lie.
        data_dir: key<FullPath> = FullPath::new("/var/lib/ghost-core"),
        /// The trust domain of all SPIFFE ids.
        trust_domain: key<TrustDomain> = TrustDomain::new("ghost.local"),
        /// Where hosts and people reach it; the machine's name and the port of `grpc.listen` where
        /// it is left out.
        addresses: key<List<HostPort>> = List::default(),
    }

    /// The one TLS listener, for links of hosts and for gRPC, and the local socket.
    Grpc {
        /// Where it listens.
        listen: key<Listen> = Listen::All(7443),
        /// The local socket, for root and the group `ghost`: administrators of the fleet.
        socket: key<SocketPath> = SocketPath(Some("/run/ghost/core.sock".into())),
        /// Names and addresses for its certificate, besides the machine's own.
        server_names: key<ServerNames> = ServerNames::default(),
        /// Links at once.
        max_links: key<u32> = 20_000,
        /// Connections of people and programs at once.
        max_connections: key<u32> = 1024,
    }

    /// The HTTP API.
    Http {
        /// Where it listens.
        listen: key<Listen> = loopback(7080),
        /// Whether it speaks TLS, with Core's certificate.
        tls: key<bool> = false,
        /// Whether it may listen beyond loopback without TLS.
        insecure: key<bool> = false,
    }

    /// Metrics for Prometheus.
    Metrics {
        /// Where they are served.
        listen: key<Listen> = loopback(7081),
        /// Whether it may listen beyond loopback, which it does without TLS.
        insecure: key<bool> = false,
    }

    /// The links of hosts.
    Link {
        /// How often a host reports.
        heartbeat_interval: key<Duration> = Duration::from_secs(30),
        /// How often each side sends a ping; three that are missed end a link.
        ping_interval: key<Duration> = Duration::from_secs(5),
        /// TLS handshakes that are worked on at once; the others wait in line.
        handshakes: key<u32> = 64,
    }

    /// Connections that Core makes to hosts itself, where they say that they can be dialled. Each host
    /// names its own addresses, so Core dials only where this allows it.
    Direct {
        /// Whether Core dials hosts at all.
        enabled: key<bool> = false,
        /// The networks that it may dial.
        networks: key<List<Network>> = List(DirectPolicy::PRIVATE.map(Network).to_vec()),
        /// The ports that it may dial.
        ports: key<List<Port>> = List(vec![Port(DirectPolicy::PORT)]),
    }

    /// Where records are kept.
    Store {
        /// The engine.
        engine: key<Engine> = Engine::Sled,
        /// Space held back for a full disk; not for etcd.
        reserve: key<ByteSize> = ByteSize::from_mib(32),
        /// See [`Etcd`].
        etcd: section<Etcd> = Etcd::default(),
    }

    /// etcd, for several replicas.
    Etcd {
        /// Its members.
        endpoints: key<List<Url>> = List::default(),
        /// What all keys begin with.
        prefix: key<Word> = Word::new("/ghost/"),
        /// The CA of its members, PEM.
        ca: key<Option<FullPath>> = None,
        /// Our client certificate, PEM.
        certificate: key<Option<FullPath>> = None,
        /// Its key, PEM.
        key: key<Option<FullPath>> = None,
        /// How long a replica that is not heard keeps its hosts.
        lease: key<Duration> = Duration::from_secs(10),
    }

    /// This replica among the others of one Core.
    Replica {
        /// Its name; the machine's where it is left out.
        name: key<Option<Name>> = None,
        /// Where other replicas reach it; the first of `core.addresses` where it is left out.
        address: key<Option<HostPort>> = None,
    }

    /// People who log in with OpenID Connect.
    Oidc {
        /// The issuer; nobody logs in that way where it is left out.
        issuer: key<Option<Url>> = None,
        /// What tokens must be made for.
        audience: key<Option<Word>> = None,
        /// The claim with the roles.
        roles_claim: key<Word> = Word::new("roles"),
        /// The claim with the tenant.
        tenant_claim: key<Word> = Word::new("tenant"),
    }

    /// Interfaces of other systems.
    Compat {
        /// The routes of Batwa, each with its key.
        batwa: key<bool> = false,
    }

    /// What one caller may ask.
    Limits {
        /// Calls a second of one identity, over time.
        requests_per_second: key<u32> = 50,
        /// Calls of one identity at once, above that.
        burst: key<u32> = 200,
    }

    /// The log, on standard error.
    Logging {
        /// Which lines.
        level: key<LogLevel> = LogLevel("info".into()),
        /// As what.
        format: key<LogFormat> = LogFormat::Text,
    }

    /// Traces.
    Telemetry {
        /// The OTLP collector (gRPC); no traces are sent where it is left out.
        otlp_endpoint: key<Option<Endpoint>> = None,
        /// The part of traces that begin here and are sent.
        sampling: key<Fraction> = Fraction(1.0),
        /// How long one delivery may take.
        timeout: key<Duration> = Duration::from_secs(5),
    }
}

fn loopback(port: u16) -> Listen {
    Listen::At((std::net::Ipv4Addr::LOCALHOST, port).into())
}

impl Schema for Config {
    const PROGRAM: Program = Program {
        name: "ghost-core",
        default_file: super::DEFAULT_FILE,
        example: "configs/core.yaml",
        prefix: "GHOST_CORE_",
    };

    fn visit(&mut self, visitor: &mut dyn Visitor) {
        self.walk("", visitor);
    }

    fn check(&self, judge: &mut Judge<'_>) {
        super::check::check(self, judge);
    }
}
