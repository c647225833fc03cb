//! Every key of the configuration: one struct for each section, with its defaults. The same lines
//! make the structs, the reader, the list of known keys and the names of the environment.
//!
//! A key that is added here is at once readable, settable from the environment, shown by
//! `config show` and missed by the test over `configs/agent.yaml` until it stands there.

use std::time::Duration;

use ghost_domain::ByteSize;
use ghost_domain::fleet::CorePermissions;
use ghost_domain::guest::GuestInject;
use ghost_infrastructure::core_link::direct::Provider;
use ghost_infrastructure::libvirt::AcceleratorChoice;
use ghost_infrastructure::store::Engine;
use ghost_infrastructure::telemetry::LogFormat;

use ghost_infrastructure::config::{
    Endpoint, Fraction, FullPath, Judge, Listen, LogLevel, Name, Program, Ratio, Schema,
    ServerNames, SocketPath, Visitor,
};
use ghost_infrastructure::config_sections;

use super::value::{
    AddressProvider, HypervisorUri, LibvirtNetwork, Permissions, PikoEndpoint, PikoServer,
};

config_sections! {
    /// The whole configuration.
    Config {
        /// See [`Agent`].
        agent: section<Agent> = Agent::default(),
        /// See [`Libvirt`].
        libvirt: section<Libvirt> = Libvirt::default(),
        /// See [`Resources`].
        resources: section<Resources> = Resources::default(),
        /// See [`Images`].
        images: section<Images> = Images::default(),
        /// See [`Network`].
        network: section<Network> = Network::default(),
        /// See [`Grpc`].
        grpc: section<Grpc> = Grpc::default(),
        /// See [`Http`].
        http: section<Http> = Http::default(),
        /// See [`Metrics`].
        metrics: section<Metrics> = Metrics::default(),
        /// See [`Core`].
        core: section<Core> = Core::default(),
        /// See [`Piko`].
        piko: section<Piko> = Piko::default(),
        /// See [`Compat`].
        compat: section<Compat> = Compat::default(),
        /// See [`Guest`].
        guest: section<Guest> = Guest::default(),
        /// See [`Store`].
        store: section<Store> = Store::default(),
        /// See [`Logging`].
        logging: section<Logging> = Logging::default(),
        /// See [`Telemetry`].
        telemetry: section<Telemetry> = Telemetry::default(),
    }

    /// The agent itself.
    Agent {
        /// What it is called; the host's name where it is left out.
        name: key<Option<Name>> = None,
        /// Where state, images and VMs lie.
        data_dir: key<FullPath> = FullPath::new("/var/lib/ghost"),
    }

    /// How VMs are run.
    Libvirt {
        /// The address of libvirt.
        uri: key<HypervisorUri> = HypervisorUri::Libvirt("qemu:///system".into()),
        /// Hardware virtualisation or emulation.
        accelerator: key<AcceleratorChoice> = AcceleratorChoice::Auto,
        /// Longest time that one call may take.
        call_timeout: key<Duration> = Duration::from_secs(20),
        /// Calls that may be under way at once.
        workers: key<u32> = 4,
    }

    /// What VMs may have.
    Resources {
        /// See [`Reserved`].
        reserved: section<Reserved> = Reserved::default(),
        /// See [`Overcommit`].
        overcommit: section<Overcommit> = Overcommit::default(),
    }

    /// What stays with the owner of the machine.
    Reserved {
        /// CPUs.
        cpus: key<u32> = 0,
        /// Memory.
        memory: key<ByteSize> = ByteSize::from_gib(1),
        /// Disk space.
        disk: key<ByteSize> = ByteSize::from_gib(5),
    }

    /// How many times over each resource may be promised.
    Overcommit {
        /// CPUs.
        cpus: key<Ratio> = Ratio(400),
        /// Memory.
        memory: key<Ratio> = Ratio(100),
        /// Disk space.
        disk: key<Ratio> = Ratio(100),
    }

    /// The image cache.
    Images {
        /// The most that images may take before those that were not used for longest go.
        cache_size: key<ByteSize> = ByteSize::from_gib(50),
        /// A catalogue whose entries go before those of the built-in one.
        catalogue: key<Option<FullPath>> = None,
        /// The largest disk that an image may show to a guest.
        max_virtual_size: key<ByteSize> = ByteSize::from_gib(2048),
        /// The largest file that is downloaded.
        max_download: key<ByteSize> = ByteSize::from_gib(64),
        /// The largest file that is uploaded.
        max_upload: key<ByteSize> = ByteSize::from_gib(64),
    }

    /// The network of VMs.
    Network {
        /// The libvirt network behind Ghost's network `default`; made where it is absent.
        name: key<LibvirtNetwork> = LibvirtNetwork("ghost-default".into()),
        /// Where addresses come from by which Core could dial this host itself.
        provider: key<AddressProvider> = AddressProvider(Provider::None),
    }

    /// The gRPC API.
    Grpc {
        /// Where it listens, with mutual TLS.
        listen: key<Listen> = Listen::All(9090),
        /// The local socket, for root and the group `ghost`.
        socket: key<SocketPath> = SocketPath(Some("/run/ghost/agent.sock".into())),
        /// Whether the listener speaks TLS.
        tls: key<bool> = true,
        /// Whether it may listen beyond loopback without TLS.
        insecure: key<bool> = false,
        /// Names and addresses for its certificate, besides the host's own.
        server_names: key<ServerNames> = ServerNames::default(),
        /// Connections at once.
        max_connections: key<u32> = 512,
    }

    /// The HTTP API.
    Http {
        /// Where it listens.
        listen: key<Listen> = loopback(9092),
        /// Whether it speaks TLS, with the agent's certificate.
        tls: key<bool> = false,
        /// Whether it may listen beyond loopback without TLS.
        insecure: key<bool> = false,
    }

    /// Metrics for Prometheus.
    Metrics {
        /// Where they are served.
        listen: key<Listen> = loopback(9091),
        /// Whether it may listen beyond loopback, which it does without TLS.
        insecure: key<bool> = false,
    }

    /// What Ghost Core may do on this host. All else of the link is Core's to say.
    Core {
        /// What its principals may do.
        permissions: key<Permissions> = Permissions(CorePermissions::OperateAndEnter),
    }

    /// Another way in, through a Piko server.
    Piko {
        /// The server; nothing is dialled where it is left out.
        server_url: key<Option<PikoServer>> = None,
        /// This host's endpoint there.
        endpoint: key<Option<PikoEndpoint>> = None,
        /// The file with the token; none is shown where it is left out.
        token_file: key<Option<FullPath>> = None,
        /// The tenant, for servers that have them.
        tenant: key<Option<Name>> = None,
        /// The authorities that the server's certificate may be of; the system's where it is left
        /// out.
        ca_file: key<Option<FullPath>> = None,
        /// See [`Reconnect`].
        reconnect: section<Reconnect> = Reconnect::default(),
    }

    /// When Piko is dialled again.
    Reconnect {
        /// The first wait.
        initial_delay: key<Duration> = Duration::from_secs(1),
        /// The longest.
        max_delay: key<Duration> = Duration::from_secs(60),
        /// Each is so many times the one before.
        multiplier: key<Ratio> = Ratio(200),
    }

    /// Interfaces of other systems.
    Compat {
        /// The routes of Batwa, each with its key.
        batwa: key<bool> = false,
    }

    /// The agent inside guests.
    Guest {
        /// How it comes into VMs whose creator does not say.
        inject: key<GuestInject> = GuestInject::Auto,
        /// Its program on this host; looked for beside the agent's own and in the folders of the
        /// packages where it is left out.
        program: key<Option<FullPath>> = None,
        /// Whether guests may be entered at all.
        access: key<bool> = true,
        /// Whether members of the group `ghost`, who use the local socket, may enter guests.
        group_access: key<bool> = true,
        /// How often guests report.
        telemetry_interval: key<Duration> = Duration::from_secs(5),
        /// Whether agents in guests are replaced where they are not the program of this host.
        update: key<bool> = true,
        /// How long a guest that breaks the protocol is held off the first time; twice as long each
        /// further time.
        hold_off: key<Duration> = Duration::from_secs(5),
        /// But no longer than this.
        hold_off_most: key<Duration> = Duration::from_secs(300),
    }

    /// Where state is kept.
    Store {
        /// The engine.
        engine: key<Engine> = Engine::Sled,
        /// Space held back for a full disk.
        reserve: key<ByteSize> = ByteSize::from_mib(32),
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
        name: "ghost-agent",
        default_file: super::DEFAULT_FILE,
        example: "configs/agent.yaml",
        prefix: "GHOST_",
    };

    fn visit(&mut self, visitor: &mut dyn Visitor) {
        self.walk("", visitor);
    }

    fn check(&self, judge: &mut Judge<'_>) {
        super::check::check(self, judge);
    }
}
