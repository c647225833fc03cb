//! `GuestService`.
//!
//! Nothing is piled up on the way: output is asked of a guest only when the caller's connection
//! takes more (HTTP/2 flow control), and a message of the caller is read only when the guest has
//! taken the one before. A caller or guest that stands still holds up its own call.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use ghost_application::UseCases;
use ghost_application::guest::{
    FreezeGuestCommand, GuestTarget, ListAuditCommand, ListGuestFilesCommand, ReadGuestFileCommand,
    SetGuestPasswordCommand, SetLockdownCommand, UpdateGuestSshKeysCommand,
};
use ghost_domain::ports::{ExecEvent, ExecInput, ExecOutput, GuestFileReader, GuestFileWriter};
use ghost_domain::{Error, ErrorCode, Secret};
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::guest_service_server::GuestService;
use message::exec_input::Input;
use message::{
    read_guest_file_response as reading, write_guest_file_request as sent,
    write_guest_file_response as writing,
};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Extensions, Request, Response, Status, Streaming};

use super::stream::{Answer, until};
use super::{OrStatus, principal};
use crate::convert::{self, MOST_PIECE};
use crate::grpc::guard::foreign;
use crate::request::CalledAs;

/// How long a caller may take to say what a stream is about.
const NAME_WITHIN: Duration = Duration::from_secs(10);
/// How long an upload may stand still before it is given up; what came is kept for a resumed try.
const PATIENCE: Duration = Duration::from_secs(60);

/// Serves what happens inside VMs.
pub(crate) struct Guests(pub(crate) Arc<UseCases>);

type Answered<T> = Result<Response<T>, Status>;

/// Which guest, and the request's id for the audit log.
fn target(extensions: &Extensions, vm: String) -> GuestTarget {
    GuestTarget {
        vm,
        request_id: called_as(extensions),
    }
}

fn called_as(extensions: &Extensions) -> String {
    extensions
        .get::<CalledAs>()
        .map(|id| id.0.clone())
        .unwrap_or_default()
}

fn some(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// The first message of a stream.
async fn first<T>(input: &mut Streaming<T>) -> ghost_domain::Result<T> {
    tokio::time::timeout(NAME_WITHIN, input.message())
        .await
        .map_err(|_| {
            Error::new(
                ErrorCode::DeadlineExceeded,
                "the first message did not come",
            )
        })?
        .map_err(|status| foreign(&status))?
        .ok_or_else(|| {
            Error::new(ErrorCode::InvalidArgument, "the call has no message")
                .field("start", "needed in the first message")
        })
}

fn no_start() -> Error {
    Error::new(
        ErrorCode::InvalidArgument,
        "the first message says what is wanted",
    )
    .field("start", "needed in the first message, and only there")
}

#[tonic::async_trait]
impl GuestService for Guests {
    async fn get_status(
        &self,
        request: Request<message::GetGuestStatusRequest>,
    ) -> Answered<message::GuestStatus> {
        let caller = principal(request.extensions())?;
        let status = &self.0.get_guest_status;
        let view = status.execute(&caller, &request.get_ref().vm).await;
        Ok(Response::new(convert::guest_status(view.or_status()?)))
    }

    async fn ping(
        &self,
        request: Request<message::PingGuestRequest>,
    ) -> Answered<message::PingGuestResponse> {
        let caller = principal(request.extensions())?;
        let ping = &self.0.ping_guest;
        let answer = ping.execute(&caller, &request.get_ref().vm).await;
        Ok(Response::new(convert::guest_ping(answer.or_status()?)))
    }

    type ExecStream = Answer<message::ExecOutput>;

    async fn exec(
        &self,
        request: Request<Streaming<message::ExecInput>>,
    ) -> Answered<Self::ExecStream> {
        let caller = principal(request.extensions())?;
        let (_, extensions, mut input) = request.into_parts();
        let Some(Input::Start(start)) = first(&mut input).await.or_status()?.input else {
            return Err(no_start()).or_status();
        };
        let target = target(&extensions, start.vm.clone());
        let wanted = convert::exec_request(start).or_status()?;
        let session = self
            .0
            .exec_in_guest
            .execute(&caller, &target, wanted)
            .await
            .or_status()?;
        // Input has a task of its own: a program that does not read must still be heard.
        let feeding = AbortOnDropHandle::new(tokio::spawn(feed(session.input, input)));
        // Dropped with the answer, which is when the caller hangs up: that cancels the program.
        let running = Running {
            output: session.output,
            pending: VecDeque::new(),
            ended: false,
            _feeding: feeding,
        };
        let source = stream::try_unfold(running, |mut running| async move {
            let event = running.next().await.or_status()?;
            Ok(event.map(|event| (convert::exec_output(event), running)))
        });
        Ok(Response::new(until(&extensions, source)))
    }

    async fn stat_file(
        &self,
        request: Request<message::StatGuestFileRequest>,
    ) -> Answered<message::GuestFile> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let stat = &self.0.stat_guest_file;
        let file = stat
            .execute(&caller, &target, &given.path, given.follow)
            .await;
        let file = convert::guest_file(String::new(), &file.or_status()?);
        Ok(Response::new(file))
    }

    async fn list_files(
        &self,
        request: Request<message::ListGuestFilesRequest>,
    ) -> Answered<message::ListGuestFilesResponse> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let command = ListGuestFilesCommand {
            path: given.path,
            after: given.after,
            limit: given.limit,
        };
        let list = &self.0.list_guest_files;
        let page = list.execute(&caller, &target, command).await.or_status()?;
        Ok(Response::new(convert::guest_directory(page)))
    }

    async fn make_directory(
        &self,
        request: Request<message::MakeGuestDirectoryRequest>,
    ) -> Answered<message::MakeGuestDirectoryResponse> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm.clone());
        let directory = convert::directory_make(given).or_status()?;
        let make = &self.0.make_guest_directory;
        make.execute(&caller, &target, directory)
            .await
            .or_status()?;
        Ok(Response::new(message::MakeGuestDirectoryResponse {}))
    }

    async fn make_link(
        &self,
        request: Request<message::MakeGuestLinkRequest>,
    ) -> Answered<message::MakeGuestLinkResponse> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm.clone());
        let link = convert::link_make(given).or_status()?;
        let make = &self.0.make_guest_link;
        make.execute(&caller, &target, link).await.or_status()?;
        Ok(Response::new(message::MakeGuestLinkResponse {}))
    }

    type ReadFileStream = Answer<message::ReadGuestFileResponse>;

    async fn read_file(
        &self,
        request: Request<message::ReadGuestFileRequest>,
    ) -> Answered<Self::ReadFileStream> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let command = ReadGuestFileCommand {
            path: given.path,
            offset: given.offset,
            length: Some(given.length).filter(|length| *length > 0),
        };
        let read = &self.0.read_guest_file;
        let (file, reader) = read.execute(&caller, &target, command).await.or_status()?;
        let opened = message::ReadGuestFileResponse {
            event: Some(reading::Event::Opened(convert::guest_file(
                String::new(),
                &file,
            ))),
        };
        let data = stream::try_unfold(
            (Some(reader), VecDeque::new()),
            |(reader, mut pending)| async move {
                let Some(mut reader) = reader else {
                    return Ok(None);
                };
                let piece = read_piece(reader.as_mut(), &mut pending)
                    .await
                    .or_status()?;
                let (event, left) = match piece {
                    Some(piece) => (reading::Event::Data(piece.into()), Some(reader)),
                    None => (finished(reader.as_ref()).or_status()?, None),
                };
                let answer = message::ReadGuestFileResponse { event: Some(event) };
                Ok(Some((answer, (left, pending))))
            },
        );
        let source = stream::once(async { Ok(opened) }).chain(data);
        Ok(Response::new(until(&extensions, source)))
    }

    type WriteFileStream = Answer<message::WriteGuestFileResponse>;

    async fn write_file(
        &self,
        request: Request<Streaming<message::WriteGuestFileRequest>>,
    ) -> Answered<Self::WriteFileStream> {
        let caller = principal(request.extensions())?;
        let (_, extensions, mut input) = request.into_parts();
        let Some(sent::Event::Start(start)) = first(&mut input).await.or_status()?.event else {
            return Err(no_start()).or_status();
        };
        let target = target(&extensions, start.vm.clone());
        let file = convert::file_write(start).or_status()?;
        let write = &self.0.write_guest_file;
        let writer = write.execute(&caller, &target, file).await.or_status()?;
        let accepted = message::WriteGuestFileResponse {
            event: Some(writing::Event::Accepted(writer.offset())),
        };
        let rest = stream::once(async move {
            let sum = take_upload(writer, input).await.or_status()?;
            Ok(message::WriteGuestFileResponse {
                event: Some(writing::Event::Written(sum)),
            })
        });
        let source = stream::once(async { Ok(accepted) }).chain(rest);
        Ok(Response::new(until(&extensions, source)))
    }

    async fn shutdown(
        &self,
        request: Request<message::ShutdownGuestRequest>,
    ) -> Answered<message::GuestDone> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let delay = convert::optional_length(given.delay.as_ref(), "delay").or_status()?;
        let shutdown = &self.0.shutdown_guest;
        shutdown
            .execute(&caller, &target, given.reboot, delay.unwrap_or_default())
            .await
            .or_status()?;
        Ok(Response::new(message::GuestDone {}))
    }

    async fn set_password(
        &self,
        request: Request<message::SetGuestPasswordRequest>,
    ) -> Answered<message::GuestDone> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let command = SetGuestPasswordCommand {
            user: given.user,
            password: Secret::new(given.password),
            hashed: given.hashed,
        };
        let set = &self.0.set_guest_password;
        set.execute(&caller, &target, command).await.or_status()?;
        Ok(Response::new(message::GuestDone {}))
    }

    async fn update_ssh_keys(
        &self,
        request: Request<message::UpdateGuestSshKeysRequest>,
    ) -> Answered<message::GuestDone> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let command = UpdateGuestSshKeysCommand {
            user: given.user,
            add: given.add,
            remove: given.remove,
        };
        let update = &self.0.update_guest_ssh_keys;
        update
            .execute(&caller, &target, command)
            .await
            .or_status()?;
        Ok(Response::new(message::GuestDone {}))
    }

    async fn sync_clock(
        &self,
        request: Request<message::SyncGuestClockRequest>,
    ) -> Answered<message::GuestDone> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let sync = &self.0.sync_guest_clock;
        sync.execute(&caller, &target).await.or_status()?;
        Ok(Response::new(message::GuestDone {}))
    }

    async fn freeze(
        &self,
        request: Request<message::FreezeGuestRequest>,
    ) -> Answered<message::FreezeGuestResponse> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let command = FreezeGuestCommand {
            timeout: convert::optional_length(given.timeout.as_ref(), "timeout").or_status()?,
            mount_points: given.mount_points,
        };
        let freeze = &self.0.freeze_guest;
        let outcome = freeze
            .execute(&caller, &target, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::freeze(outcome)))
    }

    async fn thaw(
        &self,
        request: Request<message::ThawGuestRequest>,
    ) -> Answered<message::FreezeGuestResponse> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let thaw = &self.0.thaw_guest;
        let outcome = thaw.execute(&caller, &target).await.or_status()?;
        Ok(Response::new(convert::freeze(outcome)))
    }

    async fn update_guest(
        &self,
        request: Request<message::UpdateGuestRequest>,
    ) -> Answered<message::UpdateGuestResponse> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let update = &self.0.update_guest;
        let view = update.execute(&caller, &target).await.or_status()?;
        Ok(Response::new(convert::guest_update(&view)))
    }

    async fn set_access(
        &self,
        request: Request<message::SetGuestAccessRequest>,
    ) -> Answered<message::GuestAccess> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let target = target(&extensions, given.vm);
        let set = &self.0.set_guest_access;
        let view = set
            .execute(&caller, &target, given.access)
            .await
            .or_status()?;
        Ok(Response::new(convert::guest_access(view)))
    }

    async fn get_history(
        &self,
        request: Request<message::GetGuestHistoryRequest>,
    ) -> Answered<message::GuestHistory> {
        let caller = principal(request.extensions())?;
        let given = request.into_inner();
        let span = convert::optional_length(given.span.as_ref(), "span").or_status()?;
        let history = &self.0.get_guest_history;
        let view = history
            .execute(&caller, &given.vm, span)
            .await
            .or_status()?;
        Ok(Response::new(convert::guest_history(view)))
    }

    type WatchTelemetryStream = Answer<message::GuestTelemetry>;

    async fn watch_telemetry(
        &self,
        request: Request<message::WatchTelemetryRequest>,
    ) -> Answered<Self::WatchTelemetryStream> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let vm = some(given.vm);
        let watch = &self.0.watch_telemetry;
        let watch = watch.execute(&caller, vm.as_deref()).await.or_status()?;
        let source = stream::unfold(watch, |mut watch| async move {
            let view = watch.next().await?;
            Some((Ok(convert::guest_telemetry(&view)), watch))
        });
        Ok(Response::new(until(&extensions, source)))
    }

    async fn register_address(
        &self,
        request: Request<message::RegisterGuestAddressRequest>,
    ) -> Answered<message::GuestDone> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let address = some(given.address)
            .map(|address| convert::address(&address))
            .transpose()
            .or_status()?;
        let target = target(&extensions, given.vm);
        let register = &self.0.register_guest_address;
        register
            .execute(&caller, &target, address)
            .await
            .or_status()?;
        Ok(Response::new(message::GuestDone {}))
    }

    async fn set_lockdown(
        &self,
        request: Request<message::SetLockdownRequest>,
    ) -> Answered<message::Lockdown> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let command = SetLockdownCommand {
            active: given.active,
            reason: given.reason,
            request_id: called_as(&extensions),
        };
        let set = &self.0.set_lockdown;
        let view = set.execute(&caller, command).await.or_status()?;
        Ok(Response::new(convert::lockdown(view)))
    }

    async fn get_lockdown(
        &self,
        request: Request<message::GetLockdownRequest>,
    ) -> Answered<message::Lockdown> {
        let caller = principal(request.extensions())?;
        let view = self.0.get_lockdown.execute(&caller).await.or_status()?;
        Ok(Response::new(convert::lockdown(view)))
    }

    type ListAuditStream = Answer<message::AuditEntry>;

    async fn list_audit(
        &self,
        request: Request<message::ListAuditRequest>,
    ) -> Answered<Self::ListAuditStream> {
        let caller = principal(request.extensions())?;
        let (_, extensions, given) = request.into_parts();
        let command = ListAuditCommand {
            vm: some(given.vm),
            since: given
                .since
                .as_ref()
                .map(convert::stamp)
                .transpose()
                .or_status()?,
            limit: given.limit,
        };
        let list = &self.0.list_audit;
        let entries = list.execute(&caller, &command).await.or_status()?;
        let source = stream::iter(entries).map(|entry| Ok(convert::audit_entry(entry)));
        Ok(Response::new(until(&extensions, source)))
    }

    async fn verify_audit(
        &self,
        request: Request<message::VerifyAuditRequest>,
    ) -> Answered<message::VerifyAuditResponse> {
        let caller = principal(request.extensions())?;
        let verdict = self.0.verify_audit.execute(&caller).await.or_status()?;
        Ok(Response::new(convert::audit_verdict(verdict)))
    }
}

/// A program that runs, as the answer's source.
struct Running {
    output: Box<dyn ExecOutput>,
    pending: VecDeque<ExecEvent>,
    ended: bool,
    _feeding: AbortOnDropHandle<()>,
}

impl Running {
    /// The next event with at most [`MOST_PIECE`] bytes; `None` after the exit.
    async fn next(&mut self) -> ghost_domain::Result<Option<ExecEvent>> {
        if self.ended {
            return Ok(None);
        }
        if self.pending.is_empty() {
            let cut = |data: Vec<u8>, event: fn(Vec<u8>) -> ExecEvent| {
                data.chunks(MOST_PIECE)
                    .map(|piece| event(piece.to_vec()))
                    .collect()
            };
            self.pending = match self.output.next().await? {
                ExecEvent::Stdout(data) if data.len() > MOST_PIECE => cut(data, ExecEvent::Stdout),
                ExecEvent::Stderr(data) if data.len() > MOST_PIECE => cut(data, ExecEvent::Stderr),
                event => [event].into(),
            };
        }
        let event = self.pending.pop_front();
        self.ended = matches!(event, Some(ExecEvent::Exited(_)) | None);
        Ok(event)
    }
}

/// Passes on what the caller sends, until the caller stops. The end of the caller's messages is
/// not the end of stdin: many clients half-close at once when they have nothing to send.
async fn feed(to: Box<dyn ExecInput>, mut from: Streaming<message::ExecInput>) {
    loop {
        let input = match from.message().await {
            Ok(Some(message)) => message.input,
            Ok(None) => break,
            Err(status) => {
                tracing::debug!(code = ?status.code(), "the caller's input broke off");
                break;
            }
        };
        let passed = match input {
            Some(Input::Stdin(data)) => to.write(data.into()).await,
            Some(Input::StdinEnd(_)) => to.end().await,
            Some(Input::Resize(size)) => match convert::terminal_size(size.rows, size.columns) {
                Ok((rows, columns)) => to.resize(rows, columns).await,
                Err(error) => Err(error),
            },
            Some(Input::Signal(number)) => match convert::signal(number) {
                Ok(number) => to.signal(number).await,
                Err(error) => Err(error),
            },
            Some(Input::Start(_)) => Err(no_start()),
            // Of a newer client.
            None => Ok(()),
        };
        // A program that closed its stdin still takes signals, and its output tells how it ends.
        if let Err(error) = passed {
            tracing::debug!(%error, "input of a program was not taken");
        }
    }
    // Held until the answer is dropped, so that nothing is concluded from its going away.
    let _held = to;
    std::future::pending::<()>().await;
}

/// The next piece of a file of at most [`MOST_PIECE`] bytes; `None` at the end.
async fn read_piece(
    reader: &mut dyn GuestFileReader,
    pending: &mut VecDeque<Vec<u8>>,
) -> ghost_domain::Result<Option<Vec<u8>>> {
    if pending.is_empty() {
        let data = reader.read().await?;
        if data.len() <= MOST_PIECE {
            return Ok(Some(data).filter(|data| !data.is_empty()));
        }
        pending.extend(data.chunks(MOST_PIECE).map(<[u8]>::to_vec));
    }
    Ok(pending.pop_front())
}

fn finished(reader: &dyn GuestFileReader) -> ghost_domain::Result<reading::Event> {
    let sum = reader
        .sum()
        .ok_or_else(|| Error::internal("a file was read to its end and has no checksum"))?;
    Ok(reading::Event::Finished(convert::file_sum(&sum)))
}

/// Takes the data of an upload. Whatever ends it early drops the writer: the target stays as it is.
async fn take_upload(
    mut writer: Box<dyn GuestFileWriter>,
    mut input: Streaming<message::WriteGuestFileRequest>,
) -> ghost_domain::Result<message::GuestFileSum> {
    loop {
        let message = tokio::time::timeout(PATIENCE, input.message())
            .await
            .map_err(|_| {
                Error::new(
                    ErrorCode::DeadlineExceeded,
                    "the upload stood still for too long",
                )
                .hint("send it again with resume")
            })?
            .map_err(|status| foreign(&status))?;
        match message.and_then(|message| message.event) {
            Some(sent::Event::Data(data)) => writer.write(data.into()).await?,
            Some(sent::Event::End(_)) => break,
            Some(sent::Event::Start(_)) => return Err(no_start()),
            None => {
                return Err(Error::new(
                    ErrorCode::InvalidArgument,
                    "the upload ended without saying that it is whole",
                )
                .hint("the last message is `end`")
                .field("end", "needed as the last message"));
            }
        }
    }
    Ok(convert::file_sum(&writer.finish().await?))
}
