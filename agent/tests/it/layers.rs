//! The arrows between the crates, held over what Cargo really resolves.
//!
//! ```text
//! domain  <- application <- presentation <- agent
//! domain  <- application <- infrastructure <- agent
//! proto   <- presentation, infrastructure, ghostctl, guest, core
//! ```

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// What each of our crates may use of ours, tests aside.
const ALLOWED: &[(&str, &[&str])] = &[
    ("ghost-proto", &[]),
    ("ghost-domain", &[]),
    ("ghost-application", &["ghost-domain"]),
    (
        "ghost-presentation",
        &["ghost-domain", "ghost-application", "ghost-proto"],
    ),
    (
        "ghost-infrastructure",
        &["ghost-domain", "ghost-application", "ghost-proto"],
    ),
    (
        "ghost-agent",
        &[
            "ghost-domain",
            "ghost-application",
            "ghost-presentation",
            "ghost-infrastructure",
        ],
    ),
    // Its own four layers are modules; it shares the adapters and shells that the agent has too.
    (
        "ghost-core",
        &[
            "ghost-domain",
            "ghost-infrastructure",
            "ghost-presentation",
            "ghost-proto",
        ],
    ),
    ("ghostctl", &["ghost-proto"]),
    ("ghost-guest", &["ghost-proto"]),
    // Looks at everything from outside, by processes and files alone.
    ("ghost-e2e", &["ghost-hostile", "ghost-proto"]),
    ("ghost-hostile", &["ghost-proto"]),
    // Plays many hosts at once, with the agent's own link.
    (
        "ghost-swarm",
        &["ghost-domain", "ghost-infrastructure", "ghost-proto"],
    ),
];

/// Libraries of transport, storage, serialisation or runtime, which the inner layers do without.
const FORBIDDEN: &[(&str, &[&str])] = &[
    (
        "ghost-domain",
        &[
            "serde",
            "serde_json",
            "serde-saphyr",
            "tokio",
            "tokio-util",
            "tonic",
            "prost",
            "axum",
            "hyper",
            "rustls",
            "sled",
            "redb",
            "virt",
            "tracing",
            "libc",
            "rustix",
        ],
    ),
    (
        "ghost-application",
        &[
            "tonic",
            "prost",
            "axum",
            "hyper",
            "rustls",
            "rcgen",
            "sled",
            "redb",
            "virt",
            "serde-saphyr",
            "reqwest",
            "rustix",
            "libc",
            "opentelemetry",
            "tracing-subscriber",
        ],
    ),
    (
        "ghost-presentation",
        &[
            "virt",
            "sled",
            "redb",
            "reqwest",
            "rcgen",
            "opentelemetry",
            "tracing-subscriber",
        ],
    ),
    (
        "ghost-infrastructure",
        &["axum", "clap", "utoipa", "tonic-reflection"],
    ),
    ("ghostctl", &["virt", "sled", "redb"]),
];

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .no_deps()
        .other_options(vec!["--offline".into()])
        .exec()
        .expect("cargo metadata")
}

/// Every crate of the workspace with what it depends on, tests and build scripts aside.
fn dependencies(metadata: &Metadata) -> BTreeMap<String, BTreeSet<String>> {
    metadata
        .workspace_packages()
        .into_iter()
        .map(|package| {
            let used = package
                .dependencies
                .iter()
                .filter(|dependency| dependency.kind == DependencyKind::Normal)
                .map(|dependency| dependency.name.clone())
                .collect();
            (package.name.to_string(), used)
        })
        .collect()
}

#[test]
fn every_arrow_between_our_crates_is_allowed() {
    let all = dependencies(&metadata());
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let mut wrong = Vec::new();
    for (package, used) in &all {
        let Some(may) = allowed.get(package.as_str()) else {
            wrong.push(format!(
                "{package} has no place in the layers: give it one here"
            ));
            continue;
        };
        for other in used.iter().filter(|other| all.contains_key(*other)) {
            if !may.contains(&other.as_str()) {
                wrong.push(format!("{package} uses {other}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (package, _) in ALLOWED {
        assert!(
            all.contains_key(*package),
            "{package} is gone: remove it here"
        );
    }
}

#[test]
fn inner_layers_use_no_outer_libraries() {
    let all = dependencies(&metadata());
    let mut wrong = Vec::new();
    for (package, forbidden) in FORBIDDEN {
        for library in *forbidden {
            if all[*package].contains(*library) {
                wrong.push(format!("{package} uses {library}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The test itself must be able to fail.
#[test]
fn a_wrong_arrow_would_be_seen() {
    let all = dependencies(&metadata());
    assert!(all["ghost-agent"].contains("ghost-infrastructure"));
    assert!(all["ghost-presentation"].contains("tonic"));
    assert!(all["ghost-infrastructure"].contains("virt"));
}
