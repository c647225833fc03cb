//! Rules between keys.

use std::time::Duration;

use ghost_infrastructure::config::{Judge, Listen};

use super::Config;
use super::value::Engine;

/// Adds a problem for every broken rule.
pub(super) fn check(config: &Config, judge: &mut Judge<'_>) {
    let open = "it listens beyond this host without TLS";
    if !config.http.listen.is_loopback() && !config.http.tls && !config.http.insecure {
        judge.problem(
            "http.listen",
            open,
            "set http.tls: true, or accept that with http.insecure: true",
        );
    }
    if !config.metrics.listen.is_loopback() && !config.metrics.insecure {
        judge.problem(
            "metrics.listen",
            open,
            "listen on 127.0.0.1, or accept that with metrics.insecure: true",
        );
    }
    judge.listeners(&[
        ("grpc.listen", config.grpc.listen),
        ("http.listen", config.http.listen),
        ("metrics.listen", config.metrics.listen),
    ]);
    if config.grpc.listen == Listen::Off && config.grpc.socket.0.is_none() {
        judge.problem(
            "grpc.listen",
            "with grpc.socket off too nobody could reach Core",
            "listen on one of them",
        );
    }
    for (path, most) in [
        ("grpc.max_links", config.grpc.max_links),
        ("grpc.max_connections", config.grpc.max_connections),
        ("link.handshakes", config.link.handshakes),
    ] {
        if most == 0 {
            judge.problem(path, "nobody could connect", "leave it out for the default");
        }
    }
    link(config, judge);
    let direct = &config.direct;
    if direct.enabled && (direct.networks.0.is_empty() || direct.ports.0.is_empty()) {
        judge.problem(
            "direct.enabled",
            "no network or no port may be dialled",
            "write direct.networks and direct.ports, or leave them out for private networks and 9090",
        );
    }
    store(config, judge);
    if config.oidc.issuer.is_some() != config.oidc.audience.is_some() {
        judge.problem(
            if config.oidc.issuer.is_some() {
                "oidc.audience"
            } else {
                "oidc.issuer"
            },
            "issuer and audience go together: a token for somebody else is none for us",
            "write both, or neither",
        );
    }
    if config.limits.requests_per_second == 0 || config.limits.burst == 0 {
        judge.problem(
            "limits",
            "nobody could call",
            "leave limits.requests_per_second and limits.burst out for 50 and 200",
        );
    }
    if config.telemetry.timeout.is_zero() {
        judge.problem(
            "telemetry.timeout",
            "no delivery could ever succeed",
            "write for example 5s",
        );
    }
}

fn link(config: &Config, judge: &mut Judge<'_>) {
    let (ping, heartbeat) = (config.link.ping_interval, config.link.heartbeat_interval);
    if !(Duration::from_millis(200)..=Duration::from_secs(60)).contains(&ping) {
        judge.problem(
            "link.ping_interval",
            "pings go once in 200ms to 1m",
            "leave it out for 5s: a dead link is noticed within 15s",
        );
    }
    if heartbeat > Duration::from_secs(600) || heartbeat < Duration::from_secs(1) {
        judge.problem(
            "link.heartbeat_interval",
            "hosts report once in 1s to 10m",
            "leave it out for 30s",
        );
    }
    if heartbeat < ping {
        judge.problem(
            "link.heartbeat_interval",
            "it is shorter than link.ping_interval",
            "report less often than the link is tried",
        );
    }
}

fn store(config: &Config, judge: &mut Judge<'_>) {
    let etcd = &config.store.etcd;
    let wanted = config.store.engine == Engine::Etcd;
    if wanted && etcd.endpoints.0.is_empty() {
        judge.problem(
            "store.etcd.endpoints",
            "there is no etcd to keep records in",
            "write the members, for example [https://etcd-1:2379, https://etcd-2:2379]",
        );
    }
    if !wanted && !etcd.endpoints.0.is_empty() {
        judge.problem(
            "store.etcd.endpoints",
            "they are not used",
            "set store.engine: etcd, or leave them out",
        );
    }
    if etcd.certificate.is_some() != etcd.key.is_some() {
        judge.problem(
            "store.etcd.certificate",
            "a certificate and its key go together",
            "write store.etcd.certificate and store.etcd.key, or neither",
        );
    }
    if !(Duration::from_secs(2)..=Duration::from_secs(300)).contains(&etcd.lease) {
        judge.problem(
            "store.etcd.lease",
            "leases of 2s to 5m are possible",
            "leave it out for 10s",
        );
    }
}
