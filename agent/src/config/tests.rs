use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ghost_infrastructure::config::{Known, Leaf, Origin, Schema, Visitor, load_from};

use super::*;

const EXAMPLE: &str = include_str!("../../../configs/agent.yaml");

fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn load_text(text: &str, environment: &[(&str, &str)]) -> Result<Loaded, Faults> {
    load_from(
        Some((Path::new("agent.yaml"), text)),
        variables(environment),
    )
}

fn told(text: &str, environment: &[(&str, &str)]) -> String {
    load_text(text, environment).unwrap_err().to_string()
}

fn known() -> Known {
    Known::of::<Config>()
}

#[test]
fn the_example_has_every_key_at_its_default() {
    let loaded = load_text(EXAMPLE, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(loaded.config, Config::default());
    let written: BTreeSet<_> = loaded.origins.keys().cloned().collect();
    let all: BTreeSet<_> = known().keys.into_iter().collect();
    assert_eq!(written, all, "keys that the example does not name");
    for section in known().sections {
        let name = section.rsplit('.').next().unwrap_or(&section);
        assert!(EXAMPLE.contains(&format!("{name}:\n")), "{section}");
    }
}

#[test]
fn the_sections_are_those_of_the_contract() {
    let top: Vec<_> = known()
        .sections
        .into_iter()
        .filter(|path| !path.contains('.'))
        .collect();
    assert_eq!(
        top,
        [
            "agent",
            "libvirt",
            "resources",
            "images",
            "network",
            "grpc",
            "http",
            "metrics",
            "core",
            "piko",
            "compat",
            "guest",
            "store",
            "logging",
            "telemetry"
        ]
    );
    let keys = known().keys;
    for fixed in [
        "agent.name",
        "agent.data_dir",
        "libvirt.uri",
        "libvirt.accelerator",
        "grpc.listen",
        "grpc.socket",
        "http.listen",
        "metrics.listen",
        "resources.reserved.cpus",
        "resources.reserved.memory",
        "resources.reserved.disk",
        "store.engine",
        "core.permissions",
        "network.provider",
        "piko.server_url",
        "piko.endpoint",
        "piko.token_file",
        "piko.reconnect.initial_delay",
        "piko.reconnect.max_delay",
        "piko.reconnect.multiplier",
        "compat.batwa",
    ] {
        assert!(keys.iter().any(|key| key == fixed), "{fixed}");
    }
}

/// For each key: what `config show` writes for its default is taken from the environment too, and
/// rubbish there is refused by the variable's name. So no key lacks its variable.
#[test]
fn every_key_can_be_set_from_the_environment() {
    struct Shown(BTreeMap<String, String>);
    impl Visitor for Shown {
        fn section(&mut self, _: &str) {}
        fn leaf(&mut self, path: &str, value: &mut dyn Leaf) {
            let shown = value.show();
            let shown = shown.trim_matches(|c| c == '"' || c == '[' || c == ']');
            let text = if shown == "null" { "" } else { shown };
            self.0.insert(path.into(), text.into());
        }
    }
    let mut shown = Shown(BTreeMap::new());
    Config::default().visit(&mut shown);
    assert!(shown.0.len() > 30);
    for (path, text) in &shown.0 {
        let name = Config::PROGRAM.variable(path);
        assert!(
            name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'),
            "{name}"
        );
        let loaded = load_text("", &[(&name, text)]).unwrap_or_else(|faults| panic!("{faults}"));
        assert_eq!(loaded.config, Config::default(), "{name}={text}");
        assert_eq!(loaded.origins[path], Origin::Environment(name.clone()));
        let faults = told("", &[(&name, "\u{1}")]);
        assert!(faults.contains(&format!("{name}: {path}: ")), "{faults}");
    }
}

#[test]
fn the_environment_overrules_the_file_and_the_file_the_defaults() {
    let text = "grpc:\n  listen: 127.0.0.1:1\n  socket: /a\n";
    let loaded = load_text(
        text,
        &[
            ("GHOST_GRPC__LISTEN", "127.0.0.1:2"),
            ("GHOST_ENDPOINT", "x"),
        ],
    )
    .unwrap();
    assert_eq!(
        loaded.config.grpc.listen.address(),
        "127.0.0.1:2".parse().ok()
    );
    assert_eq!(loaded.config.grpc.socket.0, Some("/a".into()));
    assert_eq!(loaded.config.http, Config::default().http);
    assert_eq!(
        loaded.origins["grpc.socket"],
        Origin::File {
            line: 3,
            column: 11
        }
    );
}

#[test]
fn all_problems_are_told_at_once_each_with_its_place_path_and_remedy() {
    let text = "\
agent:
  nmae: basement
  data_dir: relative
libvirt: qemu:///system
resources:
  reserved:
    memory: 2 gigs
    cpus: -1
listen: :9090
store:
  engine: rebd
loging:
  level: info
logging:
  level: loud
telemetry:
  timeout: 30
";
    let told = told(
        text,
        &[("GHOST_HTTP__LISTEN", "here"), ("GHOST_GPRC__LISTEN", ":1")],
    );
    let expected = [
        "error: the configuration has 12 problems",
        "agent.yaml:2:3: agent.nmae: there is no such key",
        "try: did you mean name?",
        "agent.yaml:3:13: agent.data_dir: \"relative\" is not an absolute path",
        "agent.yaml:4:10: libvirt: this is a section with keys, not text",
        "agent.yaml:7:13: resources.reserved.memory: \"2 gigs\" is not a size",
        "agent.yaml:8:11: resources.reserved.cpus: \"-1\" is not a whole number",
        "agent.yaml:9:1: listen: there is no such key",
        "try: there is grpc.listen and http.listen and metrics.listen",
        "agent.yaml:11:11: store.engine: \"rebd\" is none of sled, redb",
        "agent.yaml:12:1: loging: there is no such key",
        "try: did you mean logging?",
        "agent.yaml:15:10: logging.level: \"loud\" is not a log level",
        "agent.yaml:17:12: telemetry.timeout: \"30\" has no unit",
        "GHOST_GPRC__LISTEN: this variable names no key",
        "try: did you mean GHOST_GRPC__LISTEN?",
        "GHOST_HTTP__LISTEN: http.listen: \"here\" is not an address with a port",
    ];
    let mut rest = told.as_str();
    for part in expected {
        let Some(at) = rest.find(part) else {
            panic!("{part:?} is missing, or not in its place, in:\n{told}");
        };
        rest = &rest[at..];
    }
}

#[test]
fn listeners_beyond_loopback_need_tls_or_an_explicit_word() {
    let told = told(
        "grpc: {tls: false}\nhttp:\n  listen: 0.0.0.0:9092\nmetrics: {listen: \":9091\"}\n",
        &[],
    );
    for path in ["grpc.listen", "http.listen", "metrics.listen"] {
        assert!(
            told.contains(&format!("{path}: it listens beyond this host without TLS")),
            "{told}"
        );
    }
    assert!(told.contains("agent.yaml:3:11: http.listen"), "{told}");
    load_text(
        "grpc: {tls: false, insecure: true}\nhttp: {listen: \":9092\", tls: true}\n\
         metrics: {listen: \":9091\", insecure: true}\n",
        &[],
    )
    .unwrap_or_else(|faults| panic!("{faults}"));
}

#[test]
fn two_listeners_do_not_share_a_port() {
    let told = told("http: {listen: \"127.0.0.1:9090\"}\n", &[]);
    assert!(
        told.contains("http.listen: grpc.listen listens on the same port"),
        "{told}"
    );
    load_text(
        "grpc: {listen: \"127.0.0.1:0\"}\nhttp: {listen: \"127.0.0.1:0\"}\n",
        &[],
    )
    .unwrap();
}

#[test]
fn off_and_null_and_quotes_mean_what_they_say() {
    let text = "grpc: {listen: off, socket: off}\nagent: {name: \"12\"}\nimages: {catalogue: null}\ncore:\nguest: {}\n";
    let config = load_text(text, &[])
        .unwrap_or_else(|faults| panic!("{faults}"))
        .config;
    assert_eq!(config.grpc.listen, Listen::Off);
    assert_eq!(config.grpc.socket.0, None);
    assert_eq!(config.agent.name.map(|name| name.0).as_deref(), Some("12"));
    assert_eq!(config.images.catalogue, None);
    let told = told("agent: {name: 12}\ncore: {endpoint: x}\n", &[]);
    assert!(told.contains("put it in quotes: \"12\""), "{told}");
    assert!(
        told.contains("core.endpoint: there is no such key"),
        "{told}"
    );
}

#[test]
fn what_core_may_do_and_how_piko_is_reached_is_read_and_judged() {
    let text = "core: {permissions: off}\nnetwork: {provider: 'wireguard:wg0'}\n\
                piko:\n  server_url: https://piko.example.org\n  endpoint: acme/pc\n  \
                reconnect: {initial_delay: 2s, max_delay: 5m, multiplier: 1.5}\n";
    let config = load_text(text, &[])
        .unwrap_or_else(|faults| panic!("{faults}"))
        .config;
    assert_eq!(config.core.permissions.0.as_str(), "off");
    assert_eq!(config.network.provider.0.as_str(), "wireguard");
    assert_eq!(config.piko.reconnect.multiplier.percent(), 150);
    let owner = &[("GHOST_CORE__PERMISSIONS", "read")];
    let config = load_text("", owner).unwrap().config;
    assert_eq!(config.core.permissions.0.as_str(), "read");
    for (text, key) in [
        ("core: {permissions: admin}\n", "core.permissions"),
        ("network: {provider: carrier-pigeon}\n", "network.provider"),
        ("piko: {endpoint: acme--pc}\n", "piko.endpoint"),
        ("piko: {server_url: 'https://p.example'}\n", "piko.endpoint"),
        (
            "grpc: {listen: off}\npiko: {server_url: 'https://p.example', endpoint: a}\n",
            "piko.server_url",
        ),
        (
            "piko: {reconnect: {max_delay: 500ms}}\n",
            "piko.reconnect.initial_delay",
        ),
        (
            "piko: {reconnect: {multiplier: 0.5}}\n",
            "piko.reconnect.multiplier",
        ),
    ] {
        let told = told(text, &[]);
        assert!(told.contains(&format!("{key}: ")), "{text}: {told}");
    }
}

#[test]
fn what_is_no_yaml_or_no_map_is_told() {
    assert!(told("agent: [\n", &[]).contains("this is not valid YAML"));
    let told = told("- a\n- b\n", &[]);
    assert!(
        told.contains("sections with keys are expected, not a list"),
        "{told}"
    );
    assert!(load_text("", &[]).is_ok());
}

#[test]
fn a_named_file_must_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let faults = load(Some(&folder.path().join("none.yaml"))).unwrap_err();
    assert!(faults.to_string().contains("cannot be read"), "{faults}");
}

proptest::proptest! {
    #[test]
    fn nothing_panics(text in "([a-z]{0,9}:[ \n]{1,3}[a-z0-9:/.\\[\\]{}\"-]{0,12}\n){0,6}") {
        let _ = load_text(&text, &[]);
    }
}

#[test]
fn guests_report_neither_all_the_time_nor_never() {
    let config = load_text(
        "guest: {inject: never, program: /opt/ghost-guest, access: false, telemetry_interval: 1s, update: false}\n",
        &[],
    )
    .unwrap_or_else(|faults| panic!("{faults}"))
    .config
    .guest;
    assert_eq!(config.inject, ghost_domain::guest::GuestInject::Never);
    assert!(!config.access && !config.update);
    for bad in ["0s", "999ms", "301s"] {
        let told = told(&format!("guest: {{telemetry_interval: {bad}}}\n"), &[]);
        assert!(
            told.contains("guest.telemetry_interval: guests report once in 1s to 5m"),
            "{told}"
        );
    }
    assert_eq!(config.hold_off, std::time::Duration::from_secs(5));
    for (bad, about) in [
        ("hold_off: 99ms", "guest.hold_off: "),
        ("hold_off: 6m", "guest.hold_off_most: "),
        ("hold_off_most: 2h", "guest.hold_off_most: "),
    ] {
        let told = told(&format!("guest: {{{bad}}}\n"), &[]);
        assert!(told.contains(about), "{bad}: {told}");
    }
    let told = told("guest: {inject: perhaps}\n", &[]);
    assert!(told.contains("none of auto, always, never"), "{told}");
}
