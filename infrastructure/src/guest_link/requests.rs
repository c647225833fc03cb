//! Short requests, freezing and thawing, and updating the agent.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ghost_domain::guest::{FreezeOutcome, GuestRequest};
use ghost_domain::ports::GuestProgramFile;
use ghost_domain::{Error, ErrorCode, Result};
use ghost_proto::guest::v1::agent_message::Payload;
use ghost_proto::guest::v1::{
    FreezeRequest, FreezeResponse, Ping, SetClockRequest, SetPasswordRequest, ShutdownRequest,
    SshKeysRequest, ThawRequest, shutdown_request,
};

use super::call::{Kind, nonsense};
use super::link::Link;
use super::session::Session;
use super::{clean, files};

/// Hooks of the guest's owner run before and after, two minutes each time at most, beside a freeze of
/// one at most (`guest/src/freeze.rs`). The deadlines of the API's calls are made after this.
const HOOKS_PATIENCE: Duration = Duration::from_secs(300);
/// Programs of the guest that change passwords wait for locks.
const ACCOUNT_PATIENCE: Duration = Duration::from_secs(30);

pub(super) async fn ping(session: &Arc<Session>, patience: Duration) -> Result<Duration> {
    let call = session.begin(Kind::Simple, None)?;
    let payload = super::session::random_id().to_vec();
    let started = Instant::now();
    call.send(Payload::Ping(Ping {
        payload: payload.clone(),
    }))
    .await?;
    match call.answer(patience).await? {
        Payload::Pong(pong) if pong.payload == payload => Ok(started.elapsed()),
        _ => Err(nonsense()),
    }
}

pub(super) async fn request(
    session: &Arc<Session>,
    request: GuestRequest,
    patience: Duration,
) -> Result<()> {
    let (capability, patience, payload) = match request {
        GuestRequest::Shutdown { reboot, delay } => (
            "power",
            patience,
            Payload::Shutdown(ShutdownRequest {
                mode: if reboot {
                    shutdown_request::Mode::Reboot.into()
                } else {
                    shutdown_request::Mode::PowerOff.into()
                },
                delay: prost_types::Duration::try_from(delay).ok(),
            }),
        ),
        GuestRequest::SetPassword {
            user,
            password,
            hashed,
        } => (
            "password",
            patience.max(ACCOUNT_PATIENCE),
            Payload::SetPassword(SetPasswordRequest {
                user,
                password: password.expose().to_owned(),
                hashed,
            }),
        ),
        GuestRequest::SshKeys { user, add, remove } => (
            "ssh_keys",
            patience.max(ACCOUNT_PATIENCE),
            Payload::SshKeys(SshKeysRequest { user, add, remove }),
        ),
        GuestRequest::SetClock { now } => (
            "clock",
            patience,
            Payload::SetClock(SetClockRequest {
                now: Some(files::stamp(now)),
            }),
        ),
    };
    let call = session.begin(Kind::Simple, Some(capability))?;
    call.send(payload).await?;
    match call.answer(patience).await? {
        Payload::Done(_) => Ok(()),
        _ => Err(nonsense()),
    }
}

fn outcome(response: FreezeResponse) -> FreezeOutcome {
    FreezeOutcome {
        count: response.count,
        warnings: response
            .warnings
            .iter()
            .take(32)
            .map(|warning| clean::words(warning))
            .collect(),
    }
}

pub(super) async fn freeze(
    session: &Arc<Session>,
    timeout: Duration,
    mount_points: Vec<String>,
    patience: Duration,
) -> Result<FreezeOutcome> {
    let call = session.begin(Kind::Simple, Some("freeze"))?;
    call.send(Payload::Freeze(FreezeRequest {
        timeout: prost_types::Duration::try_from(timeout).ok(),
        mount_points,
    }))
    .await?;
    match call.answer(patience + HOOKS_PATIENCE).await? {
        Payload::FreezeResponse(response) => Ok(outcome(response)),
        _ => Err(nonsense()),
    }
}

pub(super) async fn thaw(session: &Arc<Session>, patience: Duration) -> Result<FreezeOutcome> {
    let call = session.begin(Kind::Simple, Some("freeze"))?;
    call.send(Payload::Thaw(ThawRequest {})).await?;
    match call.answer(patience + HOOKS_PATIENCE).await? {
        Payload::FreezeResponse(response) => Ok(outcome(response)),
        // Nothing was frozen.
        Payload::Done(_) => Ok(FreezeOutcome::default()),
        _ => Err(nonsense()),
    }
}

pub(super) async fn update(
    link: &Arc<Link>,
    session: &Arc<Session>,
    program: &GuestProgramFile,
    file: File,
) -> Result<()> {
    let mut sessions = link.session.subscribe();
    files::update(session, program, file, &link.shared.host_version).await?;
    let old = &session.instance;
    let came = tokio::time::timeout(
        link.shared.limits.update,
        sessions.wait_for(|now| now.as_ref().is_some_and(|now| now.instance != *old)),
    )
    .await;
    let hello = match came {
        Ok(Ok(now)) => now.as_ref().map(|now| now.hello.clone()),
        Ok(Err(_)) => None,
        Err(_) => {
            return Err(Error::new(
                ErrorCode::DeadlineExceeded,
                "the updated agent in the guest has not said hello",
            )
            .because(format!(
                "{} s have passed",
                link.shared.limits.update.as_secs()
            ))
            .hint("the guest goes back to the old one by itself: ghostctl guest status NAME"));
        }
    };
    match hello {
        Some(hello) if hello.program_sha256 == program.sha256 => Ok(()),
        Some(hello) => Err(Error::new(
            ErrorCode::GuestFailed,
            "the agent in the guest came back with another program",
        )
        .because(format!(
            "release {} answers: it may have gone back to the old one",
            hello.agent_version
        ))),
        None => Err(super::session::unreachable("the link was ended")),
    }
}
