//! The routes of Batwa over all hosts: each request becomes calls of gRPC through Core's own guard,
//! to Core for what is in memory and to the VM's host for the rest. So roles, tenants, quotas,
//! limits, the audit log and what a host's owner allows are those of every other way in.

use std::sync::Arc;

use async_trait::async_trait;
use axum::http::HeaderMap;
use bytes::Bytes;
use futures::StreamExt;
use ghost_domain::guest::ExecExit;
use ghost_domain::ports::{ExecEvent, ExecInput, ExecOutput, ExecSession};
use ghost_domain::{Error, ErrorCode, Result};
use ghost_presentation::Shape;
use ghost_presentation::http::compat::{
    Asker, Backend, BatwaAgent, BatwaVm, Begun, Change, SETTLE, Wanted,
};
use ghost_presentation::http::routes::Route;
use ghost_presentation::request::request_id;
use ghost_proto::agent::v1 as agent;
use ghost_proto::core::metadata;
use ghost_proto::core::v1 as message;
use ghost_proto::view;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::ask::{Answers, ask_at, call, framed};
use crate::domain::Caller;
use crate::presentation::grpc::Front;
use crate::presentation::grpc::front::Door;

/// Messages to a program that wait for its host to take them.
const AHEAD: usize = 2;
/// Most bytes of input in one message.
const PIECE: usize = 64 * 1024;

/// All hosts of the asker.
pub(super) struct Fleet(pub(super) Arc<Front>);

impl Fleet {
    async fn ask<Q: Message, A: Message + Default>(
        &self,
        asker: &Asker,
        method: &str,
        question: &Q,
    ) -> Result<A> {
        let method = format!("/ghost.core.v1.FleetService/{method}");
        let (answer, _) = ask_at(&self.0, &asker.headers, None, &method, question).await?;
        Ok(answer)
    }

    /// Begins something with a VM, on a host or where Core places it.
    async fn begin<Q: Message>(
        &self,
        asker: &Asker,
        host: Option<&str>,
        verb: &str,
        question: &Q,
    ) -> Result<(agent::Operation, HeaderMap)> {
        let method = format!("/ghost.agent.v1.VmService/{verb}");
        ask_at(&self.0, &asker.headers, host, &method, question).await
    }

    /// The operation once it has ended, or as it is after a while.
    async fn settled(
        &self,
        asker: &Asker,
        host: &str,
        begun: agent::Operation,
    ) -> agent::Operation {
        let watch = agent::WatchOperationRequest {
            id: begun.id.clone(),
        };
        let mut latest = begun;
        let following = async {
            let path = "/ghost.agent.v1.OperationService/Watch";
            let question = framed(&watch)?.into();
            let mut answers = call(&self.0, &asker.headers, Some(host), path, question).await?;
            while let Some(operation) = answers.next().await? {
                latest = operation;
            }
            Ok::<_, Error>(())
        };
        if let Ok(Err(error)) = tokio::time::timeout(SETTLE, following).await {
            // It goes on all the same, and is told as under way.
            tracing::debug!(%error, "an operation could not be followed");
        }
        latest
    }
}

/// How the asker names a host.
fn agent_id(asker: &Asker, tenant: &str, name: &str) -> String {
    match asker.extensions.get::<Caller>() {
        Some(Caller { tenant: None, .. }) => format!("{tenant}/{name}"),
        _ => name.to_owned(),
    }
}

fn shown(asker: &Asker, host: message::Host) -> BatwaAgent {
    BatwaAgent {
        agent_id: agent_id(asker, &host.tenant, &host.name),
        hostname: host.name,
        host_id: Some(host.id),
        // Whatever is not well is not online: a client of Batwa knows no third word.
        status: if host.state == "online" {
            "online".to_owned()
        } else {
            "offline".to_owned()
        },
        state: host.state,
        state_reason: Some(host.state_reason).filter(|reason| !reason.is_empty()),
        last_heartbeat: host.last_heard_at.as_ref().and_then(view::rfc3339),
        vm_count: host.vms.values().sum(),
        version: host.agent_version,
        api_url: None,
    }
}

#[async_trait]
impl Backend for Fleet {
    async fn admit(&self, asker: &mut Asker, route: &'static Route) -> Result<()> {
        let door = Door {
            headers: &asker.headers,
            request_id: &request_id(&asker.headers),
            action: format!("{} {}", route.method, route.path),
            access: route.access,
            reach: route.core,
            shape: Shape::Unary,
        };
        let caller = self.0.look(door).await?;
        asker.extensions.insert(caller);
        Ok(())
    }

    async fn agents(&self, asker: &Asker) -> Result<Vec<BatwaAgent>> {
        let request = message::ListHostsRequest::default();
        let found: message::ListHostsResponse = self.ask(asker, "ListHosts", &request).await?;
        Ok(found
            .hosts
            .into_iter()
            .map(|host| shown(asker, host))
            .collect())
    }

    async fn agent(&self, asker: &Asker, wanted: &str) -> Result<BatwaAgent> {
        let mut found = self.agents(asker).await?;
        found.retain(|host| {
            host.agent_id == wanted
                || host.hostname == wanted
                || host.host_id.as_deref() == Some(wanted)
        });
        match found.pop() {
            Some(host) if found.is_empty() => Ok(host),
            Some(_) => Err(Error::new(
                ErrorCode::HostAmbiguous,
                format!("{wanted:?} is the name of more than one host"),
            )
            .hint("write the tenant too: tenant/name")),
            None => Err(Error::new(
                ErrorCode::HostNotFound,
                format!("there is no host {wanted:?}"),
            )),
        }
    }

    async fn unregister(&self, asker: &Asker, agent_id: &str, force: bool) -> Result<()> {
        let request = message::RemoveHostRequest {
            host: agent_id.to_owned(),
            force,
        };
        let _: message::RemoveHostResponse = self.ask(asker, "RemoveHost", &request).await?;
        Ok(())
    }

    async fn vms(&self, asker: &Asker, wanted: Wanted) -> Result<Vec<BatwaVm>> {
        let request = message::ListFleetVmsRequest {
            host: wanted.agent_id.unwrap_or_default(),
            name: wanted.name.unwrap_or_default(),
            ..Default::default()
        };
        let found: message::ListFleetVmsResponse = self.ask(asker, "ListVms", &request).await?;
        Ok(found
            .vms
            .into_iter()
            .filter_map(|one| {
                let vm = one.vm?;
                let state = vm.state();
                Some(
                    BatwaVm {
                        state_reason: Some(vm.state_reason).filter(|reason| !reason.is_empty()),
                        release: vm.image,
                        cpus: vm.vcpus,
                        memory_bytes: vm.memory_bytes,
                        disk_bytes: vm.disk_bytes,
                        agent_id: agent_id(asker, &one.tenant, &one.host),
                        hostname: one.host,
                        age_seconds: one
                            .age
                            .and_then(|age| std::time::Duration::try_from(age).ok())
                            .map(|age| age.as_secs_f64()),
                        ..BatwaVm::new(vm.id, vm.name, state)
                    }
                    .addressed(vm.addresses),
                )
            })
            .collect())
    }

    async fn create(
        &self,
        asker: &Asker,
        host: Option<String>,
        request: agent::CreateVmRequest,
    ) -> Result<Begun> {
        let (begun, headers) = self
            .begin(asker, host.as_deref(), "Create", &request)
            .await?;
        let told = |name: &str| {
            let value = headers.get(name)?.to_str().ok()?;
            Some(value.to_owned())
        };
        let (host, placement) = match host {
            Some(host) => (host, None),
            None => {
                let host = told(metadata::HOST)
                    .ok_or_else(|| Error::internal("nobody said where the VM went"))?;
                (host, told(metadata::PLACEMENT))
            }
        };
        Ok(Begun {
            operation: self.settled(asker, &host, begun).await,
            agent_id: host,
            placement,
        })
    }

    async fn change(&self, asker: &Asker, host: &str, change: Change) -> Result<Begun> {
        let (begun, _) = match &change {
            Change::Start(request) => self.begin(asker, Some(host), "Start", request).await?,
            Change::Stop(request) => self.begin(asker, Some(host), "Stop", request).await?,
            Change::Delete(request) => self.begin(asker, Some(host), "Delete", request).await?,
        };
        Ok(Begun {
            operation: self.settled(asker, host, begun).await,
            agent_id: host.to_owned(),
            placement: None,
        })
    }

    async fn execute(
        &self,
        asker: &Asker,
        host: &str,
        request: agent::ExecStart,
    ) -> Result<ExecSession> {
        let (to, messages) = mpsc::channel(AHEAD);
        let input = Input(to);
        input.send(agent::exec_input::Input::Start(request)).await?;
        let body = ReceiverStream::new(messages).map(Ok::<_, std::convert::Infallible>);
        let body = axum::body::Body::from_stream(body);
        let path = "/ghost.agent.v1.GuestService/Exec";
        let answers = call(&self.0, &asker.headers, Some(host), path, body).await?;
        Ok(ExecSession {
            output: Box::new(Output(answers)),
            input: Box::new(input),
        })
    }

    async fn called_off(&self, _: Asker) -> Error {
        // Who has no right any more loses the call beneath, by the guard's own look.
        self.0.shutdown.cancelled().await;
        Error::new(ErrorCode::ShuttingDown, "Core is shutting down")
            .hint("connect again in a moment")
    }
}

/// Input of a program, as messages of the call.
struct Input(mpsc::Sender<Bytes>);

impl Input {
    async fn send(&self, input: agent::exec_input::Input) -> Result<()> {
        let message = framed(&agent::ExecInput { input: Some(input) })?;
        self.0.send(message).await.map_err(|_| {
            Error::new(
                ErrorCode::GuestUnreachable,
                "the program is not there any more",
            )
        })
    }
}

#[async_trait]
impl ExecInput for Input {
    async fn write(&self, data: Vec<u8>) -> Result<()> {
        let data = Bytes::from(data);
        for start in (0..data.len()).step_by(PIECE) {
            let piece = data.slice(start..data.len().min(start + PIECE));
            self.send(agent::exec_input::Input::Stdin(piece)).await?;
        }
        Ok(())
    }

    async fn end(&self) -> Result<()> {
        let end = agent::exec_input::StdinEnd {};
        self.send(agent::exec_input::Input::StdinEnd(end)).await
    }

    async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let size = agent::GuestTerminal {
            rows: rows.into(),
            columns: columns.into(),
            kind: String::new(),
        };
        self.send(agent::exec_input::Input::Resize(size)).await
    }

    async fn signal(&self, number: u8) -> Result<()> {
        self.send(agent::exec_input::Input::Signal(number.into()))
            .await
    }
}

/// What a program writes, as answers of the call. Dropping it hangs up, which cancels the program.
struct Output(Answers);

#[async_trait]
impl ExecOutput for Output {
    async fn next(&mut self) -> Result<ExecEvent> {
        use agent::exec_output::Output as Told;
        loop {
            let Some(message) = self.0.next::<agent::ExecOutput>().await? else {
                return Err(Error::new(
                    ErrorCode::GuestUnreachable,
                    "the program's end was not told",
                ));
            };
            let small = |number: u32| u8::try_from(number).unwrap_or(u8::MAX);
            return Ok(match message.output {
                // A word of a newer agent.
                None => continue,
                Some(Told::Started(started)) => ExecEvent::Started(started.pid),
                Some(Told::Stdout(data)) => ExecEvent::Stdout(data.into()),
                Some(Told::Stderr(data)) => ExecEvent::Stderr(data.into()),
                Some(Told::Exited(exit)) => ExecEvent::Exited(ExecExit {
                    code: small(exit.code),
                    signal: Some(small(exit.signal)).filter(|signal| *signal > 0),
                    timed_out: exit.timed_out,
                    cancelled: exit.cancelled,
                    truncated_bytes: exit.truncated_bytes,
                }),
            });
        }
    }
}
