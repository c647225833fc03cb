//! The two real sides: these links and the agent of the guest, over a socket.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ghost_domain::guest::{DirectoryMake, ExecRequest, FileWrite, GuestFileKind};
use ghost_domain::ports::{ExecEvent, GuestEvent, GuestLinks};
use ghost_domain::{ErrorCode, VmId};
use ghost_guest::{Capability, Channel, Options};
use ghost_infrastructure::guest_link::VirtioGuestLinks;

use super::{collect, links, next, wait_connected, wait_lost, within};

/// A VM with a real agent, which is started again and again as a service manager does.
struct Vm {
    id: VmId,
    path: PathBuf,
    files: PathBuf,
    _folder: tempfile::TempDir,
}

impl Vm {
    async fn attached(links: &VirtioGuestLinks) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("guest.sock");
        let files = folder.path().join("files");
        std::fs::create_dir(&files).unwrap();
        let listener = UnixListener::bind(&path).unwrap();
        let options = Options {
            roots: vec![files.clone()],
            hooks: folder.path().join("hooks"),
            capabilities: vec![
                Capability::Exec,
                Capability::Pty,
                Capability::Files,
                Capability::Telemetry,
            ],
            ..Options::default()
        };
        std::thread::spawn(move || {
            // Ends with the test's process: nobody else connects.
            while let Ok((stream, _)) = listener.accept() {
                let channel = Channel::try_from(stream).unwrap();
                let _ = ghost_guest::serve(&channel, &options);
            }
        });
        let vm = Self {
            id: VmId::random(),
            path,
            files,
            _folder: folder,
        };
        let mut events = links.subscribe();
        links.attach(vm.id, &vm.path);
        wait_connected(&mut *events, vm.id).await;
        vm
    }

    fn file(&self, name: &str) -> String {
        self.files.join(name).to_str().unwrap().to_owned()
    }
}

fn shell(script: &str) -> ExecRequest {
    ExecRequest::command("/bin/sh", ["-c", script])
}

async fn read(links: &VirtioGuestLinks, vm: &Vm, path: &str) -> ghost_domain::Result<Vec<u8>> {
    let (_, mut reader) = links.read_file(vm.id, path, 0, None).await?;
    let mut all = Vec::new();
    loop {
        let piece = within(reader.read()).await?;
        if piece.is_empty() {
            assert_eq!(reader.sum().unwrap().size, all.len() as u64);
            return Ok(all);
        }
        all.extend(piece);
    }
}

fn file(path: String, content: &[u8]) -> FileWrite {
    FileWrite {
        path,
        size: content.len() as u64,
        mode: 0o640,
        owner: None,
        modified_at: None,
        checksum: Some(twox_hash::XxHash64::oneshot(0, content).to_be_bytes()),
        resume: true,
        make_parents: true,
        no_replace: false,
    }
}

#[tokio::test]
async fn programs_run_with_all_their_streams() {
    let links = links();
    let vm = Vm::attached(&links).await;
    let mut session = links
        .execute(
            vm.id,
            shell("head -c 2000000 /dev/zero; head -c 1500000 /dev/zero >&2; exit 7"),
        )
        .await
        .unwrap();
    let (out, err, exit) = collect(&mut *session.output).await.unwrap();
    assert_eq!((out.len(), err.len(), exit.code), (2_000_000, 1_500_000, 7));

    let mut request = ExecRequest::command("cat", Vec::<String>::new());
    request.stdin = true;
    let mut session = links.execute(vm.id, request).await.unwrap();
    let sent: Vec<u8> = (0..2_000_000u32).map(|at| (at % 241) as u8).collect();
    let input = session.input;
    let (written, read) = tokio::join!(
        async {
            input.write(sent.clone()).await.unwrap();
            input.end().await.unwrap();
        },
        collect(&mut *session.output),
    );
    let ((), (out, ..)) = (written, read.unwrap());
    assert!(out == sent);

    let error = links
        .execute(
            vm.id,
            ExecRequest::command("/no/such/program", Vec::<String>::new()),
        )
        .await
        .map(drop)
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestFileNotFound);
    assert!(links.ping(vm.id).await.is_ok());
    assert_eq!(links.status(vm.id).violations, 0);
}

#[tokio::test]
async fn a_program_that_is_dropped_dies_and_one_that_overstays_too() {
    let links = links();
    let vm = Vm::attached(&links).await;
    let mut session = links
        .execute(vm.id, shell("echo $$; exec sleep 1000"))
        .await
        .unwrap();
    let pid = loop {
        if let ExecEvent::Stdout(text) = within(session.output.next()).await.unwrap() {
            break String::from_utf8(text).unwrap().trim().to_owned();
        }
    };
    drop(session);
    let process = PathBuf::from(format!("/proc/{pid}"));
    super::fake::eventually("its end", || !process.exists()).await;
    let mut request = shell("sleep 1000");
    request.timeout = Some(Duration::from_millis(50));
    let mut session = links.execute(vm.id, request).await.unwrap();
    let (.., exit) = collect(&mut *session.output).await.unwrap();
    assert!(exit.timed_out, "{exit:?}");
}

#[tokio::test]
async fn files_go_both_ways_and_nowhere_else() {
    let links = links();
    let vm = Vm::attached(&links).await;
    let content: Vec<u8> = (0..5_000_000u32).map(|at| (at % 239) as u8).collect();
    let path = vm.file("deep/er/file");
    let mut writer = links
        .write_file(vm.id, file(path.clone(), &content))
        .await
        .unwrap();
    assert_eq!(writer.offset(), 0);
    for piece in content.chunks(300_000) {
        within(writer.write(piece.to_vec())).await.unwrap();
    }
    let sum = within(writer.finish()).await.unwrap();
    assert_eq!(sum.size, 5_000_000);
    assert!(std::fs::read(&path).unwrap() == content);
    assert!(read(&links, &vm, &path).await.unwrap() == content);
    let found = links.stat(vm.id, &path, true).await.unwrap();
    assert_eq!(
        (found.kind, found.size, found.mode),
        (GuestFileKind::File, 5_000_000, 0o640)
    );
    let root = vm.files.to_str().unwrap();
    let listed = links.list(vm.id, root, "", 0).await.unwrap();
    assert_eq!(listed.entries.len(), 1);
    assert_eq!(
        (listed.entries[0].0.as_str(), listed.entries[0].1.kind),
        ("deep", GuestFileKind::Directory)
    );
    links
        .make_directory(
            vm.id,
            DirectoryMake {
                path: vm.file("made"),
                mode: 0o700,
                owner: None,
                make_parents: false,
            },
        )
        .await
        .unwrap();
    assert!(Path::new(&vm.file("made")).is_dir());
    for (path, code) in [
        (vm.file("none"), ErrorCode::GuestFileNotFound),
        ("/etc/passwd".to_owned(), ErrorCode::GuestPathDenied),
    ] {
        let error = read(&links, &vm, &path).await.unwrap_err();
        assert_eq!(error.code(), code, "{path}");
    }
}

#[tokio::test]
async fn a_copy_that_broke_off_goes_on() {
    let links = links();
    let vm = Vm::attached(&links).await;
    let content: Vec<u8> = (0..3_000_000u32).map(|at| (at % 233) as u8).collect();
    let path = vm.file("big");
    let mut writer = links
        .write_file(vm.id, file(path.clone(), &content))
        .await
        .unwrap();
    within(writer.write(content[..2_000_000].to_vec()))
        .await
        .unwrap();
    // The agent goes in the middle, and comes back.
    let mut events = links.subscribe();
    links.detach(vm.id, "test");
    wait_lost(&mut *events, vm.id).await;
    let error = within(writer.write(content[2_000_000..].to_vec()))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::GuestUnreachable);
    drop(writer);
    links.attach(vm.id, &vm.path);
    wait_connected(&mut *events, vm.id).await;
    let mut writer = links
        .write_file(vm.id, file(path.clone(), &content))
        .await
        .unwrap();
    let offset = usize::try_from(writer.offset()).unwrap();
    assert!(offset > 0 && offset <= 2_000_000, "{offset}");
    within(writer.write(content[offset..].to_vec()))
        .await
        .unwrap();
    let sum = within(writer.finish()).await.unwrap();
    assert_eq!(sum.size, 3_000_000);
    assert!(std::fs::read(&path).unwrap() == content);
}

#[tokio::test]
async fn it_reports_by_itself() {
    let mut options = super::options();
    options.telemetry_interval = Some(Duration::from_secs(1));
    let links = Arc::new(VirtioGuestLinks::new(options));
    let mut events = links.subscribe();
    let vm = Vm::attached(&links).await;
    loop {
        if let GuestEvent::Telemetry { vm: which, report } = next(&mut *events).await {
            assert_eq!(which, vm.id);
            assert!(report.memory_total_bytes > 0 && report.cpus > 0 && report.processes > 0);
            break;
        }
    }
    let hello = links.status(vm.id).hello.unwrap();
    assert!(!hello.boot_id.is_empty() && !hello.kernel.is_empty());
}
