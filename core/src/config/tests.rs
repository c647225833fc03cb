use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ghost_infrastructure::config::{Known, load_from, show};

use super::*;

const EXAMPLE: &str = include_str!("../../../configs/core.yaml");

const REPLICA: &str = include_str!("../../../configs/core-replica.yaml");

fn load_text(text: &str, environment: &[(&str, &str)]) -> Result<Loaded, Faults> {
    let environment: BTreeMap<String, String> = environment
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect();
    load_from(Some((Path::new("core.yaml"), text)), environment)
}

fn told(text: &str) -> String {
    load_text(text, &[]).unwrap_err().to_string()
}

#[test]
fn the_example_has_every_key_at_its_default() {
    let loaded = load_text(EXAMPLE, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(loaded.config, Config::default());
    let written: BTreeSet<_> = loaded.origins.keys().cloned().collect();
    let known = Known::of::<Config>();
    let all: BTreeSet<_> = known.keys.into_iter().collect();
    assert_eq!(written, all, "keys that the example does not name");
}

#[test]
fn the_example_of_a_replica_is_right_and_differs_where_it_has_to() {
    let loaded = load_text(REPLICA, &[]).unwrap_or_else(|faults| panic!("{faults}"));
    let config = loaded.config;
    assert_eq!(config.store.engine, Engine::Etcd);
    assert_eq!(config.store.etcd.endpoints.0.len(), 3);
    assert!(config.replica.name.is_some() && config.replica.address.is_some());
    assert!(config.core.addresses.0.len() > 1);
}

#[test]
fn what_is_shown_is_the_same_configuration() {
    let loaded = load_text(EXAMPLE, &[]).unwrap();
    let shown = show(&loaded, false);
    let again = load_text(&shown, &[]).unwrap_or_else(|faults| panic!("{faults}\n{shown}"));
    assert_eq!(again.config, loaded.config);
    assert!(show(&loaded, true).contains("# GHOST_CORE_STORE__ETCD__ENDPOINTS"));
}

#[test]
fn the_environment_overrules_the_file_and_the_agents_is_not_ours() {
    let loaded = load_text(
        "grpc: {listen: \"127.0.0.1:1\"}\n",
        &[
            ("GHOST_CORE_GRPC__LISTEN", "127.0.0.1:2"),
            ("GHOST_CORE_CORE__ADDRESSES", "a:1, b:2"),
            ("GHOST_GRPC__LISTEN", "127.0.0.1:3"),
            ("GHOST_CORE__PERMISSIONS", "off"),
        ],
    )
    .unwrap_or_else(|faults| panic!("{faults}"));
    assert_eq!(
        loaded.config.grpc.listen.address(),
        "127.0.0.1:2".parse().ok()
    );
    let addresses: Vec<_> = loaded
        .config
        .core
        .addresses
        .0
        .iter()
        .map(|one| one.0.as_str())
        .collect();
    assert_eq!(addresses, ["a:1", "b:2"]);
    assert!(load_text("", &[("GHOST_CORE_GRPC__LISTN", ":1")]).is_err());
}

#[test]
fn rules_between_keys_are_told_all_at_once() {
    let told = told(
        "\
grpc: {listen: off, socket: off, max_links: 0}
http: {listen: 0.0.0.0:7080}
metrics: {listen: 0.0.0.0:7080}
link: {ping_interval: 61s, heartbeat_interval: 2s}
store: {engine: etcd, etcd: {certificate: /c, lease: 1s}}
oidc: {issuer: https://login.example.org}
limits: {burst: 0}
",
    );
    for part in [
        "grpc.listen: with grpc.socket off too nobody",
        "grpc.max_links: nobody could connect",
        "http.listen: it listens beyond this host without TLS",
        "metrics.listen: it listens beyond",
        "metrics.listen: http.listen listens on the same port",
        "link.ping_interval: pings go once",
        "link.heartbeat_interval: it is shorter",
        "store.etcd.endpoints: there is no etcd",
        "store.etcd.certificate: a certificate and its key",
        "store.etcd.lease: leases of",
        "oidc.audience: issuer and audience",
        "limits: nobody could call",
    ] {
        assert!(told.contains(part), "{part} is missing in:\n{told}");
    }
}

#[test]
fn the_keys_of_the_contract_are_there() {
    let keys = Known::of::<Config>().keys;
    for fixed in [
        "core.data_dir",
        "core.addresses",
        "grpc.listen",
        "grpc.socket",
        "http.listen",
        "metrics.listen",
        "link.heartbeat_interval",
        "store.engine",
        "store.etcd.endpoints",
        "replica.name",
        "compat.batwa",
    ] {
        assert!(keys.iter().any(|key| key == fixed), "{fixed}");
    }
}
