//! The parts of a host that changes are followed by, and programs run with.

use std::sync::Arc;

use futures::StreamExt;
use ghost_domain::{Error, ErrorCode};
use ghost_presentation::grpc::status::to_status;
use ghost_proto::agent::v1::exec_input::Input;
use ghost_proto::agent::v1::exec_output::Output;
use ghost_proto::agent::v1::guest_service_server::GuestService;
use ghost_proto::agent::v1::operation_service_server::OperationService;
use ghost_proto::agent::v1::*;
use tonic::{Request, Response, Status, Streaming};

use super::{Answer, Fake, Items, Running, operation};

#[tonic::async_trait]
impl OperationService for Fake {
    type WatchStream = Items<Operation>;

    async fn get(&self, request: Request<GetOperationRequest>) -> Answer<Operation> {
        let id = self.note("get operation", request).id;
        Ok(Response::new(operation(&id)))
    }

    async fn list(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Answer<ListOperationsResponse> {
        self.note("list operations", request);
        Ok(Response::new(ListOperationsResponse::default()))
    }

    /// It runs, then it has succeeded; of a VM `doomed` it fails.
    async fn watch(&self, request: Request<WatchOperationRequest>) -> Answer<Items<Operation>> {
        let id = self.note("watch operation", request).id;
        let doomed = id.contains("doomed");
        let at = |status: OperationStatus| Operation {
            status: status.into(),
            subject: "web".into(),
            error: (status == OperationStatus::Failed).then(|| OperationError {
                code: "hypervisor_failed".into(),
                message: "QEMU said no".into(),
                ..OperationError::default()
            }),
            ..operation(&id)
        };
        let end = if doomed {
            OperationStatus::Failed
        } else {
            OperationStatus::Succeeded
        };
        let items = [Ok(at(OperationStatus::Running)), Ok(at(end))];
        Ok(Response::new(futures::stream::iter(items).boxed()))
    }

    async fn cancel(&self, request: Request<CancelOperationRequest>) -> Answer<Operation> {
        let id = self.note("cancel", request).id;
        Ok(Response::new(operation(&id)))
    }
}

fn not_here<T>() -> Answer<T> {
    Err(Status::unimplemented("no test needs it"))
}

#[tonic::async_trait]
impl GuestService for Fake {
    type ExecStream = Items<ExecOutput>;
    type ReadFileStream = Items<ReadGuestFileResponse>;
    type WriteFileStream = Items<WriteGuestFileResponse>;
    type WatchTelemetryStream = Items<GuestTelemetry>;
    type ListAuditStream = Items<AuditEntry>;

    /// A shell says what is typed; a program says its name and ends with 3.
    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Answer<Items<ExecOutput>> {
        let running = Running::new(&self.0);
        let seen = Arc::clone(&self.0);
        let mut input = self.note("exec", request);
        let Some(Input::Start(start)) = input.message().await?.and_then(|one| one.input) else {
            return Err(Status::invalid_argument("start comes first"));
        };
        if start.program == "/closed" {
            return Err(to_status(&Error::new(
                ErrorCode::GuestAccessOff,
                "its guest access is off",
            )));
        }
        let said = |output| {
            Ok(ExecOutput {
                output: Some(output),
            })
        };
        let started = said(Output::Started(ExecStarted { pid: 7 }));
        if !start.login_shell {
            let line = format!("{} {}", start.program, start.arguments.join(" "));
            let exit = ExecExited {
                code: 3,
                ..ExecExited::default()
            };
            let items = [
                started,
                said(Output::Stdout(line.into_bytes().into())),
                said(Output::Exited(exit)),
            ];
            return Ok(Response::new(futures::stream::iter(items).boxed()));
        }
        let echoed = input.filter_map(move |item| {
            let _ = &running;
            let item = match item.map(|one| one.input) {
                Ok(Some(Input::Stdin(data))) => Some(said(Output::Stdout(data))),
                Ok(Some(Input::Resize(size))) => {
                    let text = format!("{}x{}", size.columns, size.rows);
                    seen.sizes.lock().push(text);
                    None
                }
                Ok(_) => None,
                Err(status) => Some(Err(status)),
            };
            std::future::ready(item)
        });
        let items = futures::stream::iter([started]).chain(echoed);
        Ok(Response::new(items.boxed()))
    }

    async fn read_file(
        &self,
        _: Request<ReadGuestFileRequest>,
    ) -> Answer<Items<ReadGuestFileResponse>> {
        not_here()
    }

    async fn write_file(
        &self,
        _: Request<Streaming<WriteGuestFileRequest>>,
    ) -> Answer<Items<WriteGuestFileResponse>> {
        not_here()
    }

    async fn watch_telemetry(
        &self,
        _: Request<WatchTelemetryRequest>,
    ) -> Answer<Items<GuestTelemetry>> {
        not_here()
    }

    async fn list_audit(&self, _: Request<ListAuditRequest>) -> Answer<Items<AuditEntry>> {
        not_here()
    }

    async fn get_status(&self, _: Request<GetGuestStatusRequest>) -> Answer<GuestStatus> {
        not_here()
    }

    async fn ping(&self, _: Request<PingGuestRequest>) -> Answer<PingGuestResponse> {
        not_here()
    }

    async fn stat_file(&self, _: Request<StatGuestFileRequest>) -> Answer<GuestFile> {
        not_here()
    }

    async fn list_files(
        &self,
        _: Request<ListGuestFilesRequest>,
    ) -> Answer<ListGuestFilesResponse> {
        not_here()
    }

    async fn make_directory(
        &self,
        _: Request<MakeGuestDirectoryRequest>,
    ) -> Answer<MakeGuestDirectoryResponse> {
        not_here()
    }

    async fn make_link(&self, _: Request<MakeGuestLinkRequest>) -> Answer<MakeGuestLinkResponse> {
        not_here()
    }

    async fn shutdown(&self, _: Request<ShutdownGuestRequest>) -> Answer<GuestDone> {
        not_here()
    }

    async fn set_password(&self, _: Request<SetGuestPasswordRequest>) -> Answer<GuestDone> {
        not_here()
    }

    async fn update_ssh_keys(&self, _: Request<UpdateGuestSshKeysRequest>) -> Answer<GuestDone> {
        not_here()
    }

    async fn sync_clock(&self, _: Request<SyncGuestClockRequest>) -> Answer<GuestDone> {
        not_here()
    }

    async fn freeze(&self, _: Request<FreezeGuestRequest>) -> Answer<FreezeGuestResponse> {
        not_here()
    }

    async fn thaw(&self, _: Request<ThawGuestRequest>) -> Answer<FreezeGuestResponse> {
        not_here()
    }

    async fn update_guest(&self, _: Request<UpdateGuestRequest>) -> Answer<UpdateGuestResponse> {
        not_here()
    }

    async fn set_access(&self, _: Request<SetGuestAccessRequest>) -> Answer<GuestAccess> {
        not_here()
    }

    async fn get_history(&self, _: Request<GetGuestHistoryRequest>) -> Answer<GuestHistory> {
        not_here()
    }

    async fn register_address(&self, _: Request<RegisterGuestAddressRequest>) -> Answer<GuestDone> {
        not_here()
    }

    async fn set_lockdown(&self, _: Request<SetLockdownRequest>) -> Answer<Lockdown> {
        not_here()
    }

    async fn get_lockdown(&self, _: Request<GetLockdownRequest>) -> Answer<Lockdown> {
        not_here()
    }

    async fn verify_audit(&self, _: Request<VerifyAuditRequest>) -> Answer<VerifyAuditResponse> {
        not_here()
    }
}
