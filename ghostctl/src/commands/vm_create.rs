//! `vm create` and `launch`.

use std::io::Read;
use std::path::{Path, PathBuf};

use ghost_proto::agent::v1::{Autostart, CreateVmRequest, GuestPolicy, RestartPolicy};
use ghost_proto::core::metadata;
use ghost_proto::core::v1::GetCoreStatusRequest;
use ghost_proto::view::Operation;
use tonic::metadata::{Ascii, MetadataValue};

use super::{change, pairs, stages, wire};
use crate::arguments::{Following, LaunchArgs, VmCreate, VmSpec, WaitStage};
use crate::connect::{Agent, Session, ask};
use crate::errors::{ErrorCode, Exit, Failure};
use crate::text::printable;

/// What cloud-init takes is bounded far below this; more is a mistake, such as an image.
const FILE_LIMIT: u64 = 4 << 20;

/// The window of `--max-restarts` where none is given.
const RESTART_WINDOW: std::time::Duration = std::time::Duration::from_secs(600);

pub(super) async fn create(args: VmCreate, session: &Session) -> Result<Exit, Failure> {
    let (done, start) = if args.start {
        ("Created and started", true)
    } else {
        ("Created", false)
    };
    if !args.start
        && args
            .following
            .wait
            .is_some_and(|stage| stage > WaitStage::None)
    {
        return Err(Failure::usage("--wait needs --start")
            .because("a VM that is not started does not come up"));
    }
    let spec = detached(args.spec, args.following);
    let waits = start && !spec.change.detach && !spec.dry_run;
    let agent = session.agent().await?;
    let operation = make(args.name, args.image, start, spec, done, &agent, session).await?;
    if waits {
        stages::follow(&agent, &operation.subject, args.following, session).await?;
    }
    Ok(Exit::Done)
}

pub(super) async fn launch(args: LaunchArgs, session: &Session) -> Result<Exit, Failure> {
    let name = args.name.unwrap_or_default();
    let spec = detached(args.spec, args.following);
    let waits = !spec.change.detach && !spec.dry_run;
    let agent = session.agent().await?;
    let operation = make(name, args.image, true, spec, "Launched", &agent, session).await?;
    if waits {
        stages::follow(&agent, &operation.subject, args.following, session).await?;
        session.printer.note(&format!(
            "its console: {} vm console {}",
            session.ghostctl(),
            printable(&operation.subject)
        ));
    }
    Ok(Exit::Done)
}

/// `--wait none` is `--detach` said otherwise.
fn detached(mut spec: VmSpec, following: Following) -> VmSpec {
    spec.change.detach |= following.wait == Some(WaitStage::None);
    spec
}

async fn make(
    name: String,
    image: String,
    start: bool,
    spec: VmSpec,
    done: &str,
    agent: &Agent,
    session: &Session,
) -> Result<Operation, Failure> {
    let mut change = spec.change.clone();
    let labels = host_labels(&spec.host_labels, agent).await?;
    let request = request(name, image, start, spec)?;
    let dry_run = request.dry_run;
    if dry_run {
        // The answer is an operation that nobody runs: there is nothing to wait for.
        change.detach = false;
        let operation = agent
            .vms()
            .create(placed(request, labels))
            .await
            .map_err(|status| agent.failure(&status))?;
        if let Some((host, why)) = agent.route().learn(operation.metadata()) {
            session.printer.note(&format!(
                "it would be placed on {}: {}",
                printable(&host),
                printable(&why)
            ));
        }
        let operation = Operation::from(operation.into_inner());
        session.printer.several(
            std::slice::from_ref(&operation),
            1,
            |operation| &operation.subject,
            |operation, _| format!("Would create {}\n", printable(&operation.subject)),
        )?;
        return Ok(operation);
    }
    change::one(
        &change,
        done,
        session,
        agent,
        |agent, request_id| async move {
            agent
                .vms()
                .create(placed(
                    CreateVmRequest {
                        request_id,
                        ..request
                    },
                    labels,
                ))
                .await
        },
    )
    .await
}

/// The labels of the host that Core is to find, as metadata says them.
async fn host_labels(
    labels: &[(String, String)],
    agent: &Agent,
) -> Result<Option<MetadataValue<Ascii>>, Failure> {
    if labels.is_empty() {
        return Ok(None);
    }
    if let Some(host) = agent.route().host() {
        return Err(
            Failure::usage("--host-label is for VMs that Core finds a host for")
                .because(format!("the host {host} was named"))
                .hint("leave out --host (and GHOST_HOST), or --host-label"),
        );
    }
    // A host's own agent would make the VM and know nothing of labels.
    agent
        .fleet()
        .get_status(ask(GetCoreStatusRequest {}))
        .await
        .map_err(|status| agent.fleet_failure(&status))?;
    let one = |(key, value): &(String, String)| format!("{key}={value}");
    let text = labels.iter().map(one).collect::<Vec<_>>().join(",");
    // Core reads them between commas.
    let labels = (!labels.iter().any(|label| one(label).contains(',')))
        .then(|| text.parse().ok())
        .flatten();
    match labels {
        Some(labels) => Ok(Some(labels)),
        None => Err(Failure::usage(format!("{text:?} are not labels of hosts"))
            .because("letters, digits and - _ . / are expected")
            .hint("ghostctl host list")),
    }
}

/// With the labels of the host that it is for.
fn placed(
    request: CreateVmRequest,
    labels: Option<MetadataValue<Ascii>>,
) -> tonic::Request<CreateVmRequest> {
    let mut request = ask(request);
    if let Some(labels) = labels {
        request.metadata_mut().insert(metadata::LABELS, labels);
    }
    request
}

fn request(
    name: String,
    image: String,
    start: bool,
    spec: VmSpec,
) -> Result<CreateVmRequest, Failure> {
    let stdin = Path::new("-");
    if spec.user_data.as_deref() == Some(stdin) && spec.network_config.as_deref() == Some(stdin) {
        return Err(Failure::usage(
            "--user-data and --network-config cannot both be read from stdin",
        ));
    }
    let life = &spec.life;
    Ok(CreateVmRequest {
        name,
        image,
        vcpus: spec.cpus.unwrap_or(0),
        memory_bytes: spec.memory.unwrap_or(0),
        disk_bytes: spec.disk.unwrap_or(0),
        networks: spec.networks,
        user: spec.user.unwrap_or_default(),
        ssh_authorized_keys: ssh_keys(&spec.ssh_keys)?,
        user_data: optional_text(spec.user_data.as_deref())?,
        network_config: optional_text(spec.network_config.as_deref())?,
        tags: pairs(spec.tags),
        autostart: autostart(life),
        restart_policy: restart_policy(life),
        delete_protection: spec.protect,
        guest: guest(&spec.guest),
        start,
        request_id: String::new(),
        dry_run: spec.dry_run,
    })
}

/// The guest policy of the flags, where one of them was given.
fn guest(guest: &crate::arguments::Guest) -> Option<GuestPolicy> {
    (guest.guest_inject.is_some() || guest.no_guest_access).then(|| GuestPolicy {
        // Empty: as the agent's configuration says.
        inject: guest
            .guest_inject
            .map(|inject| inject.as_str().to_owned())
            .unwrap_or_default(),
        access: !guest.no_guest_access,
    })
}

/// The autostart of the flags, where one of them was given.
pub(super) fn autostart(life: &crate::arguments::Life) -> Option<Autostart> {
    let wanted = life.autostart || life.autostart_order.is_some() || life.autostart_delay.is_some();
    wanted.then(|| Autostart {
        order: life.autostart_order.unwrap_or(0),
        delay: life.autostart_delay.map(wire),
    })
}

/// The restart policy of the flags, where one was given.
pub(super) fn restart_policy(life: &crate::arguments::Life) -> Option<RestartPolicy> {
    life.max_restarts.map(|max_restarts| RestartPolicy {
        max_restarts,
        window: Some(wire(life.restart_window.unwrap_or(RESTART_WINDOW))),
    })
}

fn optional_text(path: Option<&Path>) -> Result<String, Failure> {
    path.map_or_else(|| Ok(String::new()), text)
}

/// A small text file, or stdin.
fn text(path: &Path) -> Result<String, Failure> {
    let shown = if path == Path::new("-") {
        "stdin".to_owned()
    } else {
        path.display().to_string()
    };
    let unreadable =
        |error: &std::io::Error| Failure::usage(format!("{shown} cannot be read")).because(error);
    let mut content = Vec::new();
    if path == Path::new("-") {
        std::io::stdin()
            .take(FILE_LIMIT + 1)
            .read_to_end(&mut content)
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(FILE_LIMIT + 1).read_to_end(&mut content))
    }
    .map_err(|error| unreadable(&error))?;
    if content.len() as u64 > FILE_LIMIT {
        return Err(Failure::new(
            ErrorCode::PayloadTooLarge,
            format!("{shown} is larger than 4 MiB"),
        ));
    }
    String::from_utf8(content).map_err(|_| {
        Failure::new(ErrorCode::InvalidUserData, format!("{shown} is not text"))
            .because("it is not valid UTF-8")
    })
}

/// The keys of files as sshd's authorized_keys has them: one a line, # begins a comment.
pub(super) fn ssh_keys(paths: &[PathBuf]) -> Result<Vec<String>, Failure> {
    let mut keys = Vec::new();
    for path in paths {
        let text = text(path)?;
        if text.contains("PRIVATE KEY-----") {
            return Err(
                Failure::usage(format!("{} is a private key", path.display()))
                    .because("only the public key goes into a VM")
                    .hint(format!("--ssh-key {}.pub", path.display())),
            );
        }
        let before = keys.len();
        keys.extend(
            text.lines()
                .map(str::trim)
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(str::to_owned),
        );
        if keys.len() == before {
            return Err(Failure::usage(format!("{} has no key", path.display())));
        }
    }
    Ok(keys)
}
