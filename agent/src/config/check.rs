//! Rules between keys. What depends on the host (ports taken, folders that cannot be made, more
//! reserved than there is) is not judged here: a configuration is right or wrong by itself.

use std::time::Duration;

use ghost_infrastructure::config::{Judge, Listen};

use super::Config;

/// Adds a problem for every broken rule.
pub(super) fn check(config: &Config, judge: &mut Judge<'_>) {
    let mut problem =
        |path: &str, message: String, hint: String| judge.problem(path, message, hint);

    let open = "it listens beyond this host without TLS";
    if !config.grpc.listen.is_loopback() && !config.grpc.tls && !config.grpc.insecure {
        problem(
            "grpc.listen",
            open.into(),
            "set grpc.tls: true, or accept that with grpc.insecure: true".into(),
        );
    }
    if !config.http.listen.is_loopback() && !config.http.tls && !config.http.insecure {
        problem(
            "http.listen",
            open.into(),
            "set http.tls: true, or accept that with http.insecure: true".into(),
        );
    }
    if !config.metrics.listen.is_loopback() && !config.metrics.insecure {
        problem(
            "metrics.listen",
            open.into(),
            "listen on 127.0.0.1, or accept that with metrics.insecure: true".into(),
        );
    }

    if config.libvirt.workers == 0 || config.libvirt.workers > 64 {
        problem(
            "libvirt.workers",
            "1 to 64 workers are possible".into(),
            "leave it out for 4".into(),
        );
    }
    if config.libvirt.call_timeout < Duration::from_secs(1) {
        problem(
            "libvirt.call_timeout",
            "libvirt needs up to some seconds for a call".into(),
            "write at least 1s".into(),
        );
    }
    if config.grpc.max_connections == 0 {
        problem(
            "grpc.max_connections",
            "nobody could connect".into(),
            "write grpc.listen: off to close the listener".into(),
        );
    }
    let interval = config.guest.telemetry_interval;
    if interval < Duration::from_secs(1) || interval > Duration::from_secs(300) {
        problem(
            "guest.telemetry_interval",
            "guests report once in 1s to 5m".into(),
            "leave it out for 5s".into(),
        );
    }
    let (hold_off, most) = (config.guest.hold_off, config.guest.hold_off_most);
    if hold_off < Duration::from_millis(100) {
        problem(
            "guest.hold_off",
            "a guest that breaks the protocol would cost the host without end".into(),
            "write at least 100ms, or leave it out for 5s".into(),
        );
    }
    if most < hold_off || most > Duration::from_secs(3600) {
        problem(
            "guest.hold_off_most",
            "at least as long as guest.hold_off, and at most 1h".into(),
            "leave it out for 5m".into(),
        );
    }
    if config.piko.server_url.is_some() != config.piko.endpoint.is_some() {
        problem(
            "piko.endpoint",
            "piko.server_url and piko.endpoint belong together".into(),
            "set both, or neither".into(),
        );
    }
    if config.piko.server_url.is_some() && (config.grpc.listen == Listen::Off || !config.grpc.tls) {
        problem(
            "piko.server_url",
            "what comes through Piko is carried to the gRPC listener with TLS, and there is none"
                .into(),
            "set grpc.listen and grpc.tls: true".into(),
        );
    }
    let reconnect = &config.piko.reconnect;
    if reconnect.initial_delay < Duration::from_millis(100)
        || reconnect.max_delay < reconnect.initial_delay
    {
        problem(
            "piko.reconnect.initial_delay",
            "at least 100ms, and not longer than piko.reconnect.max_delay".into(),
            "leave both out for 1s and 60s".into(),
        );
    }
    if reconnect.multiplier.percent() < 100 {
        problem(
            "piko.reconnect.multiplier",
            "waits would become shorter".into(),
            "write at least 1.0, or leave it out for 2.0".into(),
        );
    }
    if config.telemetry.timeout.is_zero() {
        problem(
            "telemetry.timeout",
            "no delivery could ever succeed".into(),
            "write for example 5s".into(),
        );
    }
    judge.listeners(&[
        ("grpc.listen", config.grpc.listen),
        ("http.listen", config.http.listen),
        ("metrics.listen", config.metrics.listen),
    ]);
}
