//! `OperationService`, and the beginning of operations.

use ghost_proto::agent::v1::operation_service_server::OperationService;
use ghost_proto::agent::v1::*;
use tonic::{Request, Response, Status};

use super::{Fake, Stream, error, id_of, moment, seconds, stream};

type Answer<T> = Result<Response<T>, Status>;

/// An operation that was begun.
#[derive(Clone)]
pub(crate) struct Known {
    kind: String,
    subject: String,
    request_id: String,
    watched: usize,
}

impl Known {
    fn at(&self, id: &str, status: OperationStatus) -> Operation {
        let image = self.kind.ends_with("_image");
        Operation {
            id: id.to_owned(),
            kind: self.kind.clone(),
            vm: if image {
                String::new()
            } else {
                id_of("vm", &self.subject)
            },
            subject: self.subject.clone(),
            status: status.into(),
            request_id: self.request_id.clone(),
            requested_by: "root".to_owned(),
            // In the middle of a minute, so that the age is the same however slow the machine.
            created_at: moment(-330),
            finished_at: (status as i32 > OperationStatus::Running as i32)
                .then(|| moment(0))
                .flatten(),
            deadline: moment(600),
            ..Operation::default()
        }
    }

    fn running(&self, id: &str, phase: &str, waiting_for: &str) -> Operation {
        Operation {
            phase: phase.to_owned(),
            waiting_for: waiting_for.to_owned(),
            ..self.at(id, OperationStatus::Running)
        }
    }

    fn downloading(&self, id: &str, done: u64) -> Operation {
        Operation {
            progress: Some(Progress {
                bytes_done: done << 20,
                bytes_total: 400 << 20,
                bytes_per_second: 50 << 20,
                remaining: seconds(i64::try_from((400 - done) / 50).unwrap()),
            }),
            ..self.running(id, "downloading", "")
        }
    }

    fn end(&self, id: &str) -> Operation {
        match self.subject.strip_prefix("fail.") {
            None => self.at(id, OperationStatus::Succeeded),
            Some(code) => Operation {
                error: Some(OperationError {
                    code: code.to_owned(),
                    message: format!("it ended with {code}"),
                    cause: "the test said so".to_owned(),
                    hint: String::new(),
                }),
                ..self.at(
                    id,
                    if code == "cancelled" {
                        OperationStatus::Cancelled
                    } else {
                        OperationStatus::Failed
                    },
                )
            },
        }
    }

    /// What a watcher sees, in order.
    fn story(&self, id: &str) -> Vec<Operation> {
        let mut story = match self.kind.as_str() {
            "pull_image" => [0, 1, 100, 110, 400]
                .map(|done| self.downloading(id, done))
                .into(),
            "stop_vm" => vec![self.running(id, "stopping", "the guest to shut down")],
            _ => vec![
                self.running(id, "preparing", ""),
                self.running(id, "working", ""),
            ],
        };
        if !self.subject.starts_with("slow") {
            story.push(self.end(id));
        }
        story
    }
}

impl Fake {
    /// Accepts a change.
    pub(crate) fn begin(&self, kind: &str, subject: &str, request_id: &str) -> Response<Operation> {
        let id = id_of(kind, subject);
        let known = Known {
            kind: kind.to_owned(),
            subject: subject.to_owned(),
            request_id: request_id.to_owned(),
            watched: 0,
        };
        let operation = known.at(&id, OperationStatus::Pending);
        self.0.operations.lock().unwrap().insert(id, known);
        Response::new(operation)
    }

    fn find(&self, prefix: &str) -> Result<(String, Known), Status> {
        let operations = self.0.operations.lock().unwrap();
        operations
            .iter()
            .find(|(id, _)| id.starts_with(prefix))
            .map(|(id, known)| (id.clone(), known.clone()))
            .ok_or_else(|| {
                error(
                    "operation_not_found",
                    &format!("there is no operation {prefix}"),
                    "",
                    "ghostctl operation list --all",
                )
            })
    }
}

#[tonic::async_trait]
impl OperationService for Fake {
    async fn get(&self, request: Request<GetOperationRequest>) -> Answer<Operation> {
        let (id, known) = self.find(&self.note(request).id)?;
        let story = known.story(&id);
        Ok(Response::new(story.first().cloned().unwrap_or_default()))
    }

    async fn list(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Answer<ListOperationsResponse> {
        let all = self.note(request).all;
        let open = Known {
            kind: "pull_image".to_owned(),
            subject: "debian-12".to_owned(),
            request_id: String::new(),
            watched: 0,
        };
        let over = Known {
            kind: "start_vm".to_owned(),
            subject: "fail.insufficient_resources".to_owned(),
            ..open.clone()
        };
        let mut operations = vec![open.downloading(&id_of("op", "1"), 100)];
        if all {
            operations.push(over.end(&id_of("op", "2")));
        }
        Ok(Response::new(ListOperationsResponse { operations }))
    }

    type WatchStream = Stream<Operation>;

    async fn watch(&self, request: Request<WatchOperationRequest>) -> Answer<Self::WatchStream> {
        let (id, known) = self.find(&self.note(request).id)?;
        if let Some(known) = self.0.operations.lock().unwrap().get_mut(&id) {
            known.watched += 1;
        }
        let mut cancelled = self.0.cancelled.subscribe();
        Ok(Response::new(stream(|sender| async move {
            if known.subject.starts_with("shaky") && known.watched == 0 {
                let _ = sender.send(Ok(known.running(&id, "preparing", ""))).await;
                let _ = sender.send(Err(Status::unavailable("broken pipe"))).await;
                return;
            }
            for operation in known.story(&id) {
                let _ = sender.send(Ok(operation)).await;
            }
            if known.subject.starts_with("slow") {
                let over = tokio::select! {
                    seen = cancelled.wait_for(|ids| ids.contains(&id)) => seen.is_ok(),
                    () = sender.closed() => false,
                };
                if over {
                    let over = known.at(&id, OperationStatus::Cancelled);
                    let _ = sender.send(Ok(over)).await;
                }
            }
        })))
    }

    async fn cancel(&self, request: Request<CancelOperationRequest>) -> Answer<Operation> {
        let (id, known) = self.find(&self.note(request).id)?;
        self.0.cancelled.send_modify(|ids| ids.push(id.clone()));
        Ok(Response::new(known.running(&id, "undoing", "")))
    }
}
