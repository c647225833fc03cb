//! Inside a guest: our channel beside qemu-guest-agent in the same Debian, and beside a bare
//! virtio-serial port of the same domain.
//!
//! Files lie in the guest's memory, so that its disk is no part of it. All transfers carry the same
//! number of bytes, in the way that is fastest for each; sizes are told as the time that they take.
//! The bare port is measured twice: with nothing at the guest's end (`/dev/null`, `/dev/zero`), which
//! is what the channel carries, and with the same file there, which is what a copy must do at least.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ghost_e2e::agent::Agent;
use ghost_e2e::binaries::debian_image;
use ghost_e2e::libvirt::SYSTEM;
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::exec_input::Input;
use ghost_proto::agent::v1::exec_output::Output;
use ghost_proto::agent::v1::guest_service_client::GuestServiceClient;
use ghost_proto::agent::v1::write_guest_file_request::{End, Event as Writing};
use ghost_proto::agent::v1::{read_guest_file_response, write_guest_file_response};
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::sys;

use crate::figures::{Failure, channel};
use crate::report::{Budget, Figure, Report, median, ms, progress};

/// Pairs of the short calls.
const CALLS: usize = 31;
/// Rounds of the transfers.
const TRANSFERS: usize = 5;
/// Bytes of a transfer.
const SIZE: usize = 16 << 20;
/// Bytes of one message to qemu-guest-agent, as its users send them: with half a MiB at once it did
/// not answer within a minute here.
const QGA_PIECE: usize = 48 << 10;
/// Where the guest keeps the files.
const FILE: &str = "/dev/shm/ghost-bench";
/// What the bare port writes and reads there.
const BARE_FILE: &str = "/dev/shm/ghost-bench-bare";
/// The port that nobody serves.
const BARE_PORT: &str = "org.ghost.bench.0";

/// Measures it all in one Debian.
pub(crate) fn measure(
    agent: &Agent,
    runtime: &Runtime,
    report: &mut Report,
) -> Result<(), Failure> {
    let ctl = agent.ctl();
    let image = debian_image();
    ctl.ok(&[
        "image",
        "import",
        image.to_str().ok_or("a path in UTF-8")?,
        "--name",
        "debian-12",
    ]);
    let name = agent.name("inside");
    ctl.ok(&[
        "launch",
        "debian-12",
        &name,
        "--cpus",
        "1",
        "--memory",
        "1GiB",
        "--disk",
        "4GiB",
    ]);
    progress("waiting for the Debian guest and its cloud-init");
    ctl.ok(&["vm", "wait", &name, "--for", "agent", "--timeout", "600s"]);
    ctl.ok(&[
        "vm",
        "wait",
        &name,
        "--for",
        "cloud-init",
        "--timeout",
        "600s",
    ]);
    let id = ctl.json(&["vm", "show", &name])["id"]
        .as_str()
        .ok_or("the guest has no id")?
        .to_owned();
    let libvirt = Connect::open(Some(SYSTEM))?;
    let domain = libvirt.lookup_domain_by_uuid_string(&id)?;
    let peer = Peer(&domain);
    let deadline = Instant::now() + Duration::from_secs(120);
    while let Err(error) = peer.ask("guest-ping", &json!({})) {
        if Instant::now() > deadline {
            return Err(format!("qemu-guest-agent does not answer: {error}").into());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    let ours = Ours {
        runtime,
        client: GuestServiceClient::new(runtime.block_on(channel(agent))?),
        vm: name.clone(),
    };
    execute(&ours, &peer, report)?;
    transfer(agent, &ours, &peer, &domain, report)?;
    ctl.ok(&["vm", "delete", &name, "--force"]);
    ctl.ok(&["image", "delete", "debian-12"]);
    Ok(())
}

/// Ghost's gRPC, as ghostctl calls it.
struct Ours<'a> {
    runtime: &'a Runtime,
    client: GuestServiceClient<Channel>,
    vm: String,
}

impl Ours<'_> {
    /// Runs a program to its end, which must be a good one.
    fn exec(&self, program: &str, arguments: &[&str]) -> Result<(), Failure> {
        let start = message::ExecStart {
            vm: self.vm.clone(),
            program: program.to_owned(),
            arguments: arguments.iter().map(ToString::to_string).collect(),
            ..message::ExecStart::default()
        };
        let mut client = self.client.clone();
        self.runtime.block_on(async move {
            let input = tokio_stream::once(message::ExecInput {
                input: Some(Input::Start(start)),
            });
            let mut output = client.exec(input).await?.into_inner();
            while let Some(next) = output.message().await? {
                match next.output {
                    Some(Output::Exited(exited)) if exited.code == 0 && exited.signal == 0 => {
                        return Ok(());
                    }
                    Some(Output::Exited(exited)) => {
                        return Err(format!("it ended with {exited:?}").into());
                    }
                    _ => {}
                }
            }
            Err("the call ended without an exit".into())
        })
    }

    fn write(&self, data: &[u8]) -> Result<(), Failure> {
        let start = message::WriteGuestFileStart {
            vm: self.vm.clone(),
            path: FILE.to_owned(),
            size_bytes: data.len() as u64,
            mode: 0o600,
            ..message::WriteGuestFileStart::default()
        };
        let events: Vec<message::WriteGuestFileRequest> = std::iter::once(Writing::Start(start))
            .chain(
                data.chunks(256 << 10)
                    .map(|piece| Writing::Data(piece.to_vec().into())),
            )
            .chain([Writing::End(End {})])
            .map(|event| message::WriteGuestFileRequest { event: Some(event) })
            .collect();
        let mut client = self.client.clone();
        let expected = data.len() as u64;
        self.runtime.block_on(async move {
            let mut answers = client
                .write_file(tokio_stream::iter(events))
                .await?
                .into_inner();
            while let Some(next) = answers.message().await? {
                if let Some(write_guest_file_response::Event::Written(sum)) = next.event {
                    return match sum.size_bytes == expected {
                        true => Ok(()),
                        false => Err(format!("{} bytes were written", sum.size_bytes).into()),
                    };
                }
            }
            Err("the write ended without an answer".into())
        })
    }

    fn read(&self) -> Result<usize, Failure> {
        let request = message::ReadGuestFileRequest {
            vm: self.vm.clone(),
            path: FILE.to_owned(),
            ..message::ReadGuestFileRequest::default()
        };
        let mut client = self.client.clone();
        self.runtime.block_on(async move {
            let mut stream = client.read_file(request).await?.into_inner();
            let mut bytes = 0;
            while let Some(next) = stream.message().await? {
                if let Some(read_guest_file_response::Event::Data(data)) = next.event {
                    bytes += data.len();
                }
            }
            Ok(bytes)
        })
    }
}

/// qemu-guest-agent, through one libvirt connection.
struct Peer<'a>(&'a Domain);

impl Peer<'_> {
    fn ask(&self, command: &str, arguments: &Value) -> Result<Value, Failure> {
        let request = json!({ "execute": command, "arguments": arguments }).to_string();
        let answer = self.0.qemu_agent_command(&request, 60, 0)?;
        let mut answer: Value = serde_json::from_str(&answer)?;
        Ok(answer["return"].take())
    }

    fn exec(&self, program: &str) -> Result<(), Failure> {
        let started = self.ask("guest-exec", &json!({ "path": program }))?;
        loop {
            let status = self.ask("guest-exec-status", &json!({ "pid": started["pid"] }))?;
            if status["exited"] == true {
                return match status["exitcode"] == 0 {
                    true => Ok(()),
                    false => Err(status.to_string().into()),
                };
            }
        }
    }

    fn open(&self, mode: &str) -> Result<Value, Failure> {
        self.ask("guest-file-open", &json!({ "path": FILE, "mode": mode }))
    }

    fn write(&self, data: &[u8]) -> Result<(), Failure> {
        let handle = self.open("w")?;
        for piece in data.chunks(QGA_PIECE) {
            let arguments = json!({ "handle": handle, "buf-b64": BASE64.encode(piece) });
            self.ask("guest-file-write", &arguments)?;
        }
        self.ask("guest-file-close", &json!({ "handle": handle }))?;
        Ok(())
    }

    fn read(&self) -> Result<usize, Failure> {
        let handle = self.open("r")?;
        let mut bytes = 0;
        loop {
            let arguments = json!({ "handle": handle, "count": QGA_PIECE });
            let answer = self.ask("guest-file-read", &arguments)?;
            let data = answer["buf-b64"].as_str().unwrap_or_default();
            bytes += BASE64.decode(data)?.len();
            if answer["eof"] == true {
                break;
            }
        }
        self.ask("guest-file-close", &json!({ "handle": handle }))?;
        Ok(bytes)
    }
}

fn execute(ours: &Ours<'_>, peer: &Peer<'_>, report: &mut Report) -> Result<(), Failure> {
    let (mut here, mut there, mut alone) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=CALLS {
        let begun = Instant::now();
        ours.exec("/bin/true", &[])?;
        let took = begun.elapsed();
        let begun = Instant::now();
        peer.exec("/bin/true")?;
        // The first round warms caches up.
        if round > 0 {
            here.push(took);
            there.push(begun.elapsed());
            if round % 4 == 0 {
                alone.push(inside_alone(ours)?);
            }
        }
    }
    progress(&format!(
        "exec of `true`: {:.1} ms, qemu-guest-agent {:.1} ms",
        ms(median(&here)),
        ms(median(&there))
    ));
    report.add(
        Figure::new("exec of `true` in a guest", ms(median(&here)), "ms")
            .beside("qemu-guest-agent", ms(median(&there)))
            .budget(Budget::Times(0.2)),
    );
    report.add(
        Figure::new("exec of `true` in a guest", ms(median(&here)), "ms").beside(
            "a shell in the guest itself starts `true`",
            ms(median(&alone)),
        ),
    );
    Ok(())
}

/// What starting `true` costs in the guest itself, without any channel: a shell starts it many times.
fn inside_alone(ours: &Ours<'_>) -> Result<Duration, Failure> {
    const MANY: u32 = 20;
    let looped = |program: &str| {
        let script = format!("i=0; while [ $i -lt {MANY} ]; do {program}; i=$((i+1)); done");
        let begun = Instant::now();
        ours.exec("/bin/sh", &["-c", &script])?;
        Ok::<_, Failure>(begun.elapsed())
    };
    // `:` is the shell's own.
    let nothing = looped(":")?;
    Ok(looped("/bin/true")?.saturating_sub(nothing) / MANY)
}

fn transfer(
    agent: &Agent,
    ours: &Ours<'_>,
    peer: &Peer<'_>,
    domain: &Domain,
    report: &mut Report,
) -> Result<(), Failure> {
    let data: Vec<u8> = (0..SIZE as u64)
        .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect();
    let bare = Bare::plug(agent, domain)?;
    let mut times: [Vec<Duration>; 8] = Default::default();
    for round in 0..=TRANSFERS {
        let mut took = Vec::new();
        let mut time = |what: &mut dyn FnMut() -> Result<usize, Failure>| -> Result<(), Failure> {
            let begun = Instant::now();
            let bytes = what()?;
            took.push(begun.elapsed());
            match bytes == SIZE {
                true => Ok(()),
                false => Err(format!("{bytes} bytes instead of {SIZE}").into()),
            }
        };
        time(&mut || ours.write(&data).map(|()| SIZE))?;
        time(&mut || ours.read())?;
        time(&mut || peer.write(&data).map(|()| SIZE))?;
        time(&mut || peer.read())?;
        time(&mut || bare.write(ours, &data, "/dev/null"))?;
        time(&mut || bare.read(ours, "/dev/zero"))?;
        time(&mut || bare.write(ours, &data, BARE_FILE))?;
        time(&mut || bare.read(ours, BARE_FILE))?;
        // Written anew every time, as ours is.
        ours.exec("/bin/rm", &[BARE_FILE])?;
        progress(&format!(
            "16 MiB: in {:.0} ms, out {:.0} ms; qemu-guest-agent {:.0}, {:.0}; bare port {:.0}, {:.0}; with a file {:.0}, {:.0}",
            ms(took[0]),
            ms(took[1]),
            ms(took[2]),
            ms(took[3]),
            ms(took[4]),
            ms(took[5]),
            ms(took[6]),
            ms(took[7])
        ));
        if round > 0 {
            for (all, one) in times.iter_mut().zip(took) {
                all.push(one);
            }
        }
    }
    let [
        write,
        read,
        qga_write,
        qga_read,
        bare_write,
        bare_read,
        file_write,
        file_read,
    ] = times.map(|all| ms(median(&all)));
    for (name, value, what, other, most) in [
        (
            "copy of 16 MiB into a guest",
            write,
            "qemu-guest-agent",
            qga_write,
            0.2,
        ),
        (
            "copy of 16 MiB into a guest",
            write,
            "bare virtio-serial",
            bare_write,
            1.25,
        ),
        (
            "copy of 16 MiB into a guest",
            write,
            "bare virtio-serial into a file",
            file_write,
            1.25,
        ),
        (
            "copy of 16 MiB out of a guest",
            read,
            "qemu-guest-agent",
            qga_read,
            0.2,
        ),
        (
            "copy of 16 MiB out of a guest",
            read,
            "bare virtio-serial",
            bare_read,
            1.25,
        ),
        (
            "copy of 16 MiB out of a guest",
            read,
            "bare virtio-serial from a file",
            file_read,
            1.25,
        ),
    ] {
        report.add(
            Figure::new(name, value, "ms")
                .beside(what, other)
                .budget(Budget::Times(most)),
        );
    }
    Ok(())
}

/// A virtio-serial port plugged into the running guest, with `dd` on the other side.
struct Bare<'a> {
    domain: &'a Domain,
    xml: String,
    socket: PathBuf,
}

impl<'a> Bare<'a> {
    fn plug(agent: &Agent, domain: &'a Domain) -> Result<Self, Failure> {
        let id = domain.uuid_string()?;
        // Where QEMU may make sockets: it does so for the VM's own.
        let socket = agent.data_dir().join("vms").join(id).join("bench.sock");
        let xml = format!(
            "<channel type='unix'><source mode='bind' path='{}'/><target type='virtio' name='{BARE_PORT}'/></channel>",
            socket.display()
        );
        domain.attach_device_flags(&xml, sys::VIR_DOMAIN_AFFECT_LIVE)?;
        // The guest's udev names it a moment later.
        std::thread::sleep(Duration::from_secs(2));
        Ok(Self {
            domain,
            xml,
            socket,
        })
    }

    fn port() -> String {
        format!("/dev/virtio-ports/{BARE_PORT}")
    }

    /// Time until `dd` has read all and ended.
    fn write(&self, ours: &Ours<'_>, data: &[u8], target: &str) -> Result<usize, Failure> {
        let mut socket = UnixStream::connect(&self.socket)?;
        let input = format!("if={}", Self::port());
        std::thread::scope(|scope| {
            let feeding = scope.spawn(move || socket.write_all(data));
            ours.exec(
                "/bin/dd",
                &[
                    &input,
                    &format!("of={target}"),
                    "bs=64k",
                    "iflag=fullblock",
                    &format!("count={}", data.len() >> 16),
                ],
            )?;
            feeding.join().map_err(|_| "the feeding thread died")??;
            Ok(data.len())
        })
    }

    fn read(&self, ours: &Ours<'_>, source: &str) -> Result<usize, Failure> {
        let mut socket = UnixStream::connect(&self.socket)?;
        let output = format!("of={}", Self::port());
        std::thread::scope(|scope| {
            let draining = scope.spawn(move || {
                let (mut buffer, mut bytes) = (vec![0; 1 << 16], 0);
                while bytes < SIZE {
                    match socket.read(&mut buffer)? {
                        0 => break,
                        read => bytes += read,
                    }
                }
                Ok::<_, std::io::Error>(bytes)
            });
            ours.exec(
                "/bin/dd",
                &[
                    &format!("if={source}"),
                    &output,
                    "bs=64k",
                    &format!("count={}", SIZE >> 16),
                ],
            )?;
            Ok(draining.join().map_err(|_| "the draining thread died")??)
        })
    }
}

impl Drop for Bare<'_> {
    fn drop(&mut self) {
        // The guest goes at the end of the run anyway.
        drop(
            self.domain
                .detach_device_flags(&self.xml, sys::VIR_DOMAIN_AFFECT_LIVE),
        );
    }
}
