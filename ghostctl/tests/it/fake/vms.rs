//! `VmService`.

use ghost_proto::agent::v1::vm_service_server::VmService;
use ghost_proto::agent::v1::*;
use tonic::{Request, Response, Status, Streaming};

use super::{Fake, Stream, id_of, moment, refuse, seconds, stream};

type Answer<T> = Result<Response<T>, Status>;

/// A VM that runs.
pub(crate) fn vm(name: &str) -> Vm {
    Vm {
        id: id_of("vm", name),
        name: name.to_owned(),
        state: VmState::Running.into(),
        state_reason: String::new(),
        state_source: "libvirt_event".to_owned(),
        state_age: seconds(2),
        desired_state: DesiredState::Running.into(),
        vcpus: 2,
        memory_bytes: 2 << 30,
        image: "debian-12".to_owned(),
        disks: vec![Disk {
            name: "root".to_owned(),
            size_bytes: 10 << 30,
            allocated_bytes: 3 << 29,
        }],
        nics: vec![NetworkInterface {
            network: "default".to_owned(),
            mac: "52:54:00:00:00:01".to_owned(),
            addresses: vec!["10.77.0.2".to_owned()],
            addresses_age: seconds(65),
        }],
        conditions: vec![Condition {
            r#type: "address".to_owned(),
            status: true,
            reason: "a DHCP lease".to_owned(),
            since: moment(-3600),
        }],
        tags: [("env".to_owned(), "test".to_owned())].into(),
        owner: String::new(),
        generation: 3,
        created_at: moment(-3 * 3600),
        operation_id: String::new(),
        autostart: Some(Autostart {
            order: 1,
            delay: seconds(10),
        }),
        restart_policy: Some(RestartPolicy {
            max_restarts: 3,
            window: seconds(600),
        }),
        delete_protection: true,
        guest: None,
    }
}

/// A VM that nobody knows about, with a guest that chose an evil address text.
pub(crate) fn unknown(name: &str) -> Vm {
    Vm {
        state: VmState::Unknown.into(),
        state_reason: "libvirt unreachable 12 s; last: running".to_owned(),
        nics: vec![NetworkInterface {
            addresses: vec!["\x1b[2J10.0.0.9".to_owned()],
            ..NetworkInterface::default()
        }],
        disks: Vec::new(),
        conditions: Vec::new(),
        tags: [].into(),
        autostart: None,
        restart_policy: None,
        delete_protection: false,
        ..vm(name)
    }
}

fn in_state(name: &str, state: VmState) -> Vm {
    Vm {
        state: state.into(),
        nics: Vec::new(),
        guest: name.starts_with("guest-").then(policy),
        ..vm(name)
    }
}

fn policy() -> GuestPolicy {
    GuestPolicy {
        inject: "auto".to_owned(),
        access: true,
    }
}

/// A VM whose agent answers, and whose cloud-init is where the name says.
fn with_agent(name: &str) -> Vm {
    let condition = |kind: &str, status: bool, reason: &str| Condition {
        r#type: kind.to_owned(),
        status,
        reason: reason.to_owned(),
        since: moment(-5),
    };
    let (over, reason) = match name {
        "guest-ready" => (true, "done"),
        "guest-plain" => (true, "absent"),
        "guest-spotty" => (true, "done: ('users', 'no such group')"),
        "guest-broken" => (
            false,
            "error modules-final: ('runcmd', 'exit 1')\x1b[2J; ('users', 'x')",
        ),
        _ => (false, "running modules-config"),
    };
    Vm {
        conditions: vec![
            condition("agent", true, "ghost-guest 0.1.0"),
            condition("cloud-init", over, reason),
        ],
        guest: Some(policy()),
        ..vm(name)
    }
}

#[tonic::async_trait]
impl VmService for Fake {
    async fn create(&self, request: Request<CreateVmRequest>) -> Answer<Operation> {
        let placed = self.needs_host(&request).is_err();
        let labels = request.metadata().get("ghost-labels").cloned();
        let request = self.note(request);
        refuse(&request.name)?;
        let name = if request.name.is_empty() {
            "brave-otter".to_owned()
        } else {
            request.name
        };
        let mut answer = self.begin("create_vm", &name, &request.request_id);
        if placed {
            let metadata = answer.metadata_mut();
            metadata.insert("ghost-host", "pc".parse().unwrap());
            let mut why = "most room: 4 of 6 CPUs".to_owned();
            if let Some(labels) = labels {
                why.push_str(&format!(", labelled {}", labels.to_str().unwrap()));
            }
            metadata.insert("ghost-placement", why.parse().unwrap());
        }
        Ok(answer)
    }

    async fn get(&self, request: Request<GetVmRequest>) -> Answer<Vm> {
        let request = self.note(request);
        refuse(&request.vm)?;
        let vms = self.0.vms.lock().unwrap();
        let found = vms.iter().find(|vm| vm.name == request.vm);
        Ok(Response::new(found.cloned().unwrap_or_else(|| {
            if request.vm.starts_with("guest-") {
                with_agent(&request.vm)
            } else {
                vm(&request.vm)
            }
        })))
    }

    async fn list(&self, request: Request<ListVmsRequest>) -> Answer<ListVmsResponse> {
        self.needs_host(&request)?;
        let request = self.note(request);
        let vms = self.0.vms.lock().unwrap().clone();
        let vms = vms
            .into_iter()
            .filter(|vm| {
                request
                    .tags
                    .iter()
                    .all(|(key, value)| vm.tags.get(key) == Some(value))
            })
            .collect();
        Ok(Response::new(ListVmsResponse { vms }))
    }

    async fn update(&self, request: Request<UpdateVmRequest>) -> Answer<Operation> {
        let request = self.note(request);
        refuse(&request.vm)?;
        Ok(self.begin("update_vm", &request.vm, &request.request_id))
    }

    async fn delete(&self, request: Request<DeleteVmRequest>) -> Answer<Operation> {
        let request = self.note(request);
        refuse(&request.vm)?;
        Ok(self.begin("delete_vm", &request.vm, &request.request_id))
    }

    type WatchStream = Stream<Vm>;

    async fn watch(&self, request: Request<WatchVmRequest>) -> Answer<Self::WatchStream> {
        let name = self.note(request).vm;
        refuse(&name)?;
        Ok(Response::new(stream(|sender| async move {
            let states = match name.as_str() {
                "broken" => vec![VmState::Starting, VmState::Failed],
                "vanishing" => vec![VmState::Running, VmState::Deleting],
                "stuck" => vec![VmState::Starting],
                _ => vec![VmState::Starting, VmState::Running],
            };
            for state in states {
                let _ = sender.send(Ok(in_state(&name, state))).await;
            }
            if name.starts_with("guest-") {
                let _ = sender.send(Ok(with_agent(&name))).await;
            }
            match name.as_str() {
                "vanishing" => {}
                "booting" => {
                    let _ = sender.send(Ok(vm(&name))).await;
                    sender.closed().await;
                }
                _ => sender.closed().await,
            }
        })))
    }

    async fn start(&self, request: Request<StartVmRequest>) -> Answer<Operation> {
        self.needs_host(&request)?;
        let request = self.note(request);
        refuse(&request.vm)?;
        Ok(self.begin("start_vm", &request.vm, &request.request_id))
    }

    async fn stop(&self, request: Request<StopVmRequest>) -> Answer<Operation> {
        let request = self.note(request);
        refuse(&request.vm)?;
        Ok(self.begin("stop_vm", &request.vm, &request.request_id))
    }

    async fn restart(&self, request: Request<RestartVmRequest>) -> Answer<Operation> {
        let request = self.note(request);
        refuse(&request.vm)?;
        Ok(self.begin("restart_vm", &request.vm, &request.request_id))
    }

    async fn pause(&self, request: Request<PauseVmRequest>) -> Answer<Operation> {
        let request = self.note(request);
        refuse(&request.vm)?;
        Ok(self.begin("pause_vm", &request.vm, &request.request_id))
    }

    async fn resume(&self, request: Request<ResumeVmRequest>) -> Answer<Operation> {
        let request = self.note(request);
        refuse(&request.vm)?;
        Ok(self.begin("resume_vm", &request.vm, &request.request_id))
    }

    type ConsoleStream = Stream<ConsoleOutput>;

    /// Echoes in capitals; `bye` makes it hang up.
    async fn console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Answer<Self::ConsoleStream> {
        let mut input = request.into_inner();
        let first = input.message().await?.unwrap_or_default();
        refuse(&first.vm)?;
        self.note(Request::new(first));
        Ok(Response::new(stream(|sender| async move {
            let output = |text: String| ConsoleOutput { data: text.into() };
            let _ = sender.send(Ok(output("login: ".to_owned()))).await;
            while let Ok(Some(typed)) = input.message().await {
                let text = String::from_utf8_lossy(&typed.data).to_uppercase();
                let over = text.contains("BYE");
                let _ = sender.send(Ok(output(text))).await;
                if over {
                    break;
                }
            }
        })))
    }

    type LogsStream = Stream<ConsoleOutput>;

    async fn logs(&self, request: Request<VmLogsRequest>) -> Answer<Self::LogsStream> {
        let request = self.note(request);
        refuse(&request.vm)?;
        Ok(Response::new(stream(|sender| async move {
            for part in ["boot \x1b[1;32mok\x1b[0m\n\x1b", "[2Jlogin: \n"] {
                let data = part.as_bytes().to_vec();
                let _ = sender.send(Ok(ConsoleOutput { data })).await;
            }
        })))
    }
}

impl Fake {
    /// A VM for lists that tests fill themselves.
    pub(crate) fn example(name: &str) -> Vm {
        vm(name)
    }
}
