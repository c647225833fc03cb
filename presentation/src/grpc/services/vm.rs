//! `VmService`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use ghost_application::UseCases;
use ghost_application::vm::{DeleteVmCommand, PowerCommand};
use ghost_domain::ports::{ConsoleReader, ConsoleWriter, LogReader};
use ghost_domain::{Error, ErrorCode};
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::vm_service_server::VmService;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

use super::stream::{Answer, until};
use super::{OrStatus, principal};
use crate::convert;
use crate::grpc::guard::foreign;

/// How often a followed log is looked at.
const LOOK_AT_LOG: Duration = Duration::from_millis(250);
/// Most bytes in one message of a console or log.
const MOST_PIECE: usize = 256 * 1024;
/// How long a caller may take to name the VM of a console.
const NAME_WITHIN: Duration = Duration::from_secs(10);

/// Serves VMs.
pub(crate) struct Vms(pub(crate) Arc<UseCases>);

type Answered<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl VmService for Vms {
    async fn create(
        &self,
        request: Request<message::CreateVmRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let command = convert::create_vm(request.into_inner()).or_status()?;
        let view = self
            .0
            .create_vm
            .execute(&caller, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::operation(&view)))
    }

    async fn get(&self, request: Request<message::GetVmRequest>) -> Answered<message::Vm> {
        let caller = principal(request.extensions())?;
        let view = self.0.get_vm.execute(&caller, &request.get_ref().vm).await;
        Ok(Response::new(convert::vm(&view.or_status()?)))
    }

    async fn list(
        &self,
        request: Request<message::ListVmsRequest>,
    ) -> Answered<message::ListVmsResponse> {
        let caller = principal(request.extensions())?;
        let views = self
            .0
            .list_vms
            .execute(&caller, &request.get_ref().tags)
            .await;
        let vms = views.or_status()?.iter().map(convert::vm).collect();
        Ok(Response::new(message::ListVmsResponse { vms }))
    }

    async fn update(
        &self,
        request: Request<message::UpdateVmRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let command = convert::update_vm(request.into_inner()).or_status()?;
        let view = self
            .0
            .update_vm
            .execute(&caller, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::operation(&view)))
    }

    async fn delete(
        &self,
        request: Request<message::DeleteVmRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let request = request.into_inner();
        let command = DeleteVmCommand {
            vm: request.vm,
            force: request.force,
            expected_generation: Some(request.expected_generation).filter(|seen| *seen > 0),
            request_id: convert::request_id(&request.request_id).or_status()?,
        };
        let view = self
            .0
            .delete_vm
            .execute(&caller, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::operation(&view)))
    }

    type WatchStream = Answer<message::Vm>;

    async fn watch(
        &self,
        request: Request<message::WatchVmRequest>,
    ) -> Answered<Self::WatchStream> {
        let caller = principal(request.extensions())?;
        let watch = self
            .0
            .watch_vm
            .execute(&caller, &request.get_ref().vm)
            .await;
        let source = stream::unfold(watch.or_status()?, |mut watch| async move {
            let view = watch.next().await?;
            Some((Ok(convert::vm(&view)), watch))
        });
        Ok(Response::new(until(request.extensions(), source)))
    }

    async fn start(
        &self,
        request: Request<message::StartVmRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let message::StartVmRequest { vm, request_id } = request.into_inner();
        let command = power(vm, &request_id)?;
        let view = self
            .0
            .start_vm
            .execute(&caller, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::operation(&view)))
    }

    async fn stop(&self, request: Request<message::StopVmRequest>) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let given = request.into_inner();
        let command = convert::stop(
            given.vm,
            given.force,
            given.timeout.as_ref(),
            &given.request_id,
        );
        let view = self.0.stop_vm.execute(&caller, command.or_status()?).await;
        Ok(Response::new(convert::operation(&view.or_status()?)))
    }

    async fn restart(
        &self,
        request: Request<message::RestartVmRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let given = request.into_inner();
        let command = convert::stop(
            given.vm,
            given.force,
            given.timeout.as_ref(),
            &given.request_id,
        );
        let view = self
            .0
            .restart_vm
            .execute(&caller, command.or_status()?)
            .await;
        Ok(Response::new(convert::operation(&view.or_status()?)))
    }

    async fn pause(
        &self,
        request: Request<message::PauseVmRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let message::PauseVmRequest { vm, request_id } = request.into_inner();
        let command = power(vm, &request_id)?;
        let view = self
            .0
            .pause_vm
            .execute(&caller, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::operation(&view)))
    }

    async fn resume(
        &self,
        request: Request<message::ResumeVmRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let message::ResumeVmRequest { vm, request_id } = request.into_inner();
        let command = power(vm, &request_id)?;
        let view = self
            .0
            .resume_vm
            .execute(&caller, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::operation(&view)))
    }

    type ConsoleStream = Answer<message::ConsoleOutput>;

    async fn console(
        &self,
        request: Request<Streaming<message::ConsoleInput>>,
    ) -> Answered<Self::ConsoleStream> {
        let caller = principal(request.extensions())?;
        let (_, extensions, mut input) = request.into_parts();
        let first = tokio::time::timeout(NAME_WITHIN, input.message())
            .await
            .map_err(|_| Error::new(ErrorCode::DeadlineExceeded, "no VM was named in time"))
            .or_status()?
            .map_err(|status| foreign(&status))
            .or_status()?
            .ok_or_else(|| {
                Error::new(ErrorCode::InvalidArgument, "the first message names the VM")
                    .field("vm", "needed in the first message")
            })
            .or_status()?;
        let (_, session) = self
            .0
            .open_console
            .execute(&caller, &first.vm)
            .await
            .or_status()?;
        // Typing has a task of its own: a read that is given up halfway could lose output.
        let typing =
            AbortOnDropHandle::new(tokio::spawn(type_in(session.writer, first.data, input)));
        let source = stream::try_unfold(
            (session.reader, typing, VecDeque::new()),
            |(mut reader, typing, mut pending)| async move {
                let piece = read_piece(&mut reader, &mut pending).await.or_status()?;
                Ok(piece.map(|piece| {
                    (
                        message::ConsoleOutput { data: piece },
                        (reader, typing, pending),
                    )
                }))
            },
        );
        Ok(Response::new(until(&extensions, source)))
    }

    type LogsStream = Answer<message::ConsoleOutput>;

    async fn logs(&self, request: Request<message::VmLogsRequest>) -> Answered<Self::LogsStream> {
        let caller = principal(request.extensions())?;
        let given = request.get_ref();
        let tail = Some(given.tail_bytes).filter(|tail| *tail > 0);
        let reader = self
            .0
            .open_log
            .execute(&caller, &given.vm, tail)
            .await
            .or_status()?;
        let follow = given.follow;
        let source = stream::try_unfold(
            (reader, VecDeque::new()),
            move |(mut reader, mut pending)| async move {
                let piece = follow_log(&mut reader, &mut pending, follow)
                    .await
                    .or_status()?;
                Ok(piece.map(|piece| (message::ConsoleOutput { data: piece }, (reader, pending))))
            },
        );
        Ok(Response::new(until(request.extensions(), source)))
    }
}

fn power(vm: String, request_id: &str) -> Result<PowerCommand, Status> {
    Ok(PowerCommand {
        vm,
        request_id: convert::request_id(request_id).or_status()?,
    })
}

/// Passes on what the caller types, until the caller stops or the console does.
async fn type_in(
    mut writer: Box<dyn ConsoleWriter>,
    first: Vec<u8>,
    mut input: Streaming<message::ConsoleInput>,
) {
    let mut data = first;
    loop {
        if !data.is_empty()
            && let Err(error) = writer.write(&data).await
        {
            tracing::debug!(%error, "the console takes no more input");
            return;
        }
        match input.message().await {
            Ok(Some(next)) => data = next.data,
            Ok(None) | Err(_) => break,
        }
    }
    // The caller may still listen: the session stays attached until the answer is dropped.
    std::future::pending::<()>().await;
}

/// The next piece of at most [`MOST_PIECE`] bytes; `None` at the end.
async fn read_piece(
    reader: &mut Box<dyn ConsoleReader>,
    pending: &mut VecDeque<Vec<u8>>,
) -> ghost_domain::Result<Option<Vec<u8>>> {
    if pending.is_empty() {
        let data = reader.read().await?;
        pending.extend(data.chunks(MOST_PIECE).map(<[u8]>::to_vec));
    }
    Ok(pending.pop_front())
}

/// The next piece of a log; waits for one where it is followed.
async fn follow_log(
    reader: &mut Box<dyn LogReader>,
    pending: &mut VecDeque<Vec<u8>>,
    follow: bool,
) -> ghost_domain::Result<Option<Vec<u8>>> {
    loop {
        if let Some(piece) = pending.pop_front() {
            return Ok(Some(piece));
        }
        let data = reader.read().await?;
        pending.extend(data.chunks(MOST_PIECE).map(<[u8]>::to_vec));
        if pending.is_empty() {
            if !follow {
                return Ok(None);
            }
            tokio::time::sleep(LOOK_AT_LOG).await;
        }
    }
}
