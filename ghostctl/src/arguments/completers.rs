//! Live names for the shell's Tab. A Tab must never hang or print an error: whatever goes wrong
//! means no candidates.

use std::ffi::OsStr;
use std::future::Future;
use std::time::Duration;

use clap_complete::engine::{
    ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use ghost_proto::agent::v1::{
    ListCatalogueRequest, ListCertificatesRequest, ListImagesRequest, ListKeysRequest,
    ListNetworksRequest, ListOperationsRequest, ListVmsRequest,
};
use ghost_proto::core::v1::ListHostsRequest;
use ghost_proto::view::{Operation, Vm};

use super::{Format, Global};
use crate::connect::{Agent, Session};
use crate::errors::Failure;
use crate::identity::{Contexts, LOCAL};
use crate::text::printable;

/// A person at a prompt does not wait longer.
const PATIENCE: Duration = Duration::from_millis(800);

/// A name with what is said about it.
type Candidate = (String, String);

pub(super) fn vms() -> ArgValueCompleter {
    live(|agent| async move {
        let answer = agent.vms().list(ListVmsRequest::default()).await.ok()?;
        let vms = answer.into_inner().vms.into_iter().map(Vm::from);
        Some(vms.map(|vm| (vm.name, vm.state.to_string())).collect())
    })
}

pub(super) fn hosts() -> ArgValueCompleter {
    live(|agent| async move {
        let answer = agent.fleet().list_hosts(ListHostsRequest::default()).await;
        let hosts = answer.ok()?.into_inner().hosts;
        Some(
            hosts
                .into_iter()
                .map(|host| (host.name, host.state))
                .collect(),
        )
    })
}

/// Local paths, and `NAME:/` for the side of a copy that is in a VM.
pub(super) fn vm_paths() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let vms = candidates(|agent: Agent| async move {
            let answer = agent.vms().list(ListVmsRequest::default()).await.ok()?;
            let vms = answer.into_inner().vms.into_iter().map(Vm::from);
            Some(
                vms.map(|vm| (format!("{}:/", vm.name), vm.state.to_string()))
                    .collect(),
            )
        });
        let mut found = matching(current, vms.unwrap_or_default());
        found.extend(PathCompleter::any().complete(current));
        found
    })
}

pub(super) fn images() -> ArgValueCompleter {
    live(cached)
}

pub(super) fn catalogue() -> ArgValueCompleter {
    live(official)
}

pub(super) fn images_and_catalogue() -> ArgValueCompleter {
    live(|agent| async move {
        let mut images = cached(agent.clone()).await?;
        let known: Vec<String> = images.iter().map(|(name, _)| name.clone()).collect();
        let more = official(agent).await.unwrap_or_default();
        images.extend(more.into_iter().filter(|(name, _)| !known.contains(name)));
        Some(images)
    })
}

async fn cached(agent: Agent) -> Option<Vec<Candidate>> {
    let answer = agent.images().list(ListImagesRequest {}).await.ok()?;
    let images = answer.into_inner().images.into_iter();
    Some(images.map(|image| (image.name, image.format)).collect())
}

async fn official(agent: Agent) -> Option<Vec<Candidate>> {
    let answer = agent
        .images()
        .list_catalogue(ListCatalogueRequest {})
        .await
        .ok()?;
    let entries = answer.into_inner().entries.into_iter();
    Some(
        entries
            .map(|entry| (entry.name, entry.description))
            .collect(),
    )
}

pub(super) fn networks() -> ArgValueCompleter {
    live(|agent| async move {
        let answer = agent.networks().list(ListNetworksRequest {}).await.ok()?;
        let networks = answer.into_inner().networks.into_iter();
        Some(
            networks
                .map(|network| (network.name, network.subnet))
                .collect(),
        )
    })
}

pub(super) fn operations() -> ArgValueCompleter {
    live(|agent| async move {
        let request = ListOperationsRequest::default();
        let answer = agent.operations().list(request).await.ok()?;
        let operations = answer.into_inner().operations.into_iter();
        Some(
            operations
                .map(Operation::from)
                .map(|operation| {
                    let said = format!("{} {}", operation.kind, operation.subject);
                    (operation.id, said)
                })
                .collect(),
        )
    })
}

pub(super) fn certificates() -> ArgValueCompleter {
    live(|agent| async move {
        let request = ListCertificatesRequest {};
        let answer = agent.access().list_certificates(request).await.ok()?;
        let certificates = answer.into_inner().certificates.into_iter();
        Some(
            certificates
                .map(|certificate| (certificate.id, certificate.name))
                .collect(),
        )
    })
}

pub(super) fn keys() -> ArgValueCompleter {
    live(|agent| async move {
        let answer = agent.access().list_keys(ListKeysRequest {}).await.ok()?;
        let keys = answer.into_inner().keys.into_iter();
        Some(keys.map(|key| (key.id, key.name)).collect())
    })
}

pub(super) fn contexts() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let names = Contexts::open().and_then(|contexts| contexts.names());
        let names = names.unwrap_or_default().into_iter();
        matching(
            current,
            names
                .chain([LOCAL.to_owned()])
                .map(|name| (name, String::new()))
                .collect(),
        )
    })
}

fn live<F>(ask: fn(Agent) -> F) -> ArgValueCompleter
where
    F: Future<Output = Option<Vec<Candidate>>> + 'static,
{
    ArgValueCompleter::new(move |current: &OsStr| {
        matching(current, candidates(ask).unwrap_or_default())
    })
}

fn candidates<F>(ask: fn(Agent) -> F) -> Option<Vec<Candidate>>
where
    F: Future<Output = Option<Vec<Candidate>>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .ok()?;
    runtime.block_on(async {
        let work = async {
            let agent = agent().await.ok()?;
            ask(agent).await
        };
        tokio::time::timeout(PATIENCE, work).await.ok()?
    })
}

async fn agent() -> Result<Agent, Failure> {
    Session::new(typed_so_far(std::env::args())).agent().await
}

/// `--endpoint` and `--context` of the line that is being completed: the names must be those of
/// the agent that the finished line will speak to. The rest of the line may be incomplete.
fn typed_so_far(arguments: impl Iterator<Item = String>) -> Global {
    let words: Vec<String> = arguments.collect();
    let value_of = |flag: &str| {
        words.iter().enumerate().find_map(|(number, word)| {
            match word.strip_prefix(flag)?.strip_prefix('=') {
                Some(value) => Some(value.to_owned()),
                None if word == flag => words.get(number + 1).cloned(),
                None => None,
            }
        })
    };
    Global {
        output: Format::Table,
        quiet: true,
        endpoint: value_of("--endpoint"),
        context: value_of("--context"),
        host: value_of("--host"),
        debug: false,
    }
}

fn matching(current: &OsStr, candidates: Vec<Candidate>) -> Vec<CompletionCandidate> {
    let Some(current) = current.to_str() else {
        return Vec::new();
    };
    candidates
        .into_iter()
        .filter(|(name, _)| name.starts_with(current))
        // A name that a terminal could choke on is not offered.
        .filter(|(name, _)| printable(name) == *name)
        .map(|(name, said)| {
            let said = Some(printable(&said)).filter(|said| !said.is_empty());
            CompletionCandidate::new(name).help(said.map(Into::into))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_of_the_line_is_asked() {
        let global = |line: &str| typed_so_far(line.split(' ').map(str::to_owned));
        let typed = global("ghostctl --endpoint=unix:/a vm --context lab show");
        assert_eq!(typed.endpoint.as_deref(), Some("unix:/a"));
        assert_eq!(typed.context.as_deref(), Some("lab"));
        let typed = global("ghostctl vm show --endpoint");
        assert_eq!(typed.endpoint, None);
    }
}
