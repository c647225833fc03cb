//! `qemu-img`, always with explicit formats, and confined where it reads a file of strangers.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use ghost_domain::{ByteSize, Error, ErrorCode, ImageFormat, Result};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::UnshareFlags;
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use super::files::io_error;

/// What one run may take.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    cpu_seconds: u64,
    wall: Duration,
    /// The longest file it may write; 0 where it only reads.
    file_size: u64,
}

const MEMORY: u64 = 1 << 30;
/// Its JSON is a few hundred bytes; a file that makes it print more is not worth reading.
const MAX_OUTPUT: u64 = 256 * 1024;
const INSPECT: Bounds = Bounds {
    cpu_seconds: 30,
    wall: Duration::from_secs(60),
    file_size: 0,
};

/// Runs QEMU's image tool.
#[derive(Clone, Debug)]
pub(crate) struct QemuImg {
    program: PathBuf,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    format: String,
    virtual_size: u64,
    #[serde(default)]
    backing_filename: Option<String>,
    #[serde(default)]
    full_backing_filename: Option<String>,
}

impl QemuImg {
    pub(crate) fn new(program: PathBuf) -> Self {
        Self { program }
    }

    /// QEMU's own opinion of a qcow2 file that passed ours: the same format and size, no backing
    /// file, and consistent metadata.
    pub(crate) async fn verify_qcow2(&self, path: &Path, virtual_size: ByteSize) -> Result<()> {
        let output = self
            .confined(
                &[
                    "info".as_ref(),
                    "-f".as_ref(),
                    "qcow2".as_ref(),
                    "--output=json".as_ref(),
                    path.as_os_str(),
                ],
                INSPECT,
            )
            .await?;
        if !output.ok {
            return Err(refused("QEMU cannot read the image", &output.stderr));
        }
        let info: Info = serde_json::from_slice(&output.stdout).map_err(|error| {
            Error::internal(format!(
                "qemu-img info gave other JSON than expected: {error}"
            ))
        })?;
        if info.format != "qcow2"
            || info.virtual_size != virtual_size.bytes()
            || info.backing_filename.is_some()
            || info.full_backing_filename.is_some()
        {
            return Err(Error::new(
                ErrorCode::UnsafeImage,
                "QEMU reads another image out of the file than its header says",
            ));
        }
        let output = self
            .confined(
                &[
                    "check".as_ref(),
                    "-f".as_ref(),
                    "qcow2".as_ref(),
                    "--output=json".as_ref(),
                    path.as_os_str(),
                ],
                INSPECT,
            )
            .await?;
        // 0: clean. 3: leaked clusters, which waste space and harm nothing (qemu-img(1)).
        if output.ok || output.code == Some(3) {
            Ok(())
        } else {
            Err(refused("the image's metadata is damaged", &output.stderr)
                .hint("download or copy it again, or repair a copy: qemu-img check -f qcow2 -r all FILE"))
        }
    }

    /// Copies the active layer of a qcow2 file into a new flat one.
    pub(crate) async fn flatten(
        &self,
        from: &Path,
        to: &Path,
        max: ByteSize,
        deadline: Duration,
    ) -> Result<()> {
        let bounds = Bounds {
            cpu_seconds: deadline.as_secs().max(1),
            wall: deadline,
            file_size: max.bytes(),
        };
        let output = self
            .confined(
                &[
                    "convert".as_ref(),
                    "-f".as_ref(),
                    "qcow2".as_ref(),
                    "-O".as_ref(),
                    "qcow2".as_ref(),
                    "-m".as_ref(),
                    "2".as_ref(),
                    from.as_os_str(),
                    to.as_os_str(),
                ],
                bounds,
            )
            .await?;
        if output.ok {
            return Ok(());
        }
        if output.stderr.contains("No space left") {
            return Err(io_error("write", to, &io::ErrorKind::StorageFull.into()));
        }
        Err(refused("the image could not be re-encoded", &output.stderr))
    }

    /// Makes an overlay. `base` comes from the cache, whose content was vetted, so this runs
    /// without the namespaces that cost time in every `vm create`.
    pub(crate) async fn create_overlay(
        &self,
        path: &Path,
        base: &Path,
        base_format: ImageFormat,
        size: ByteSize,
    ) -> Result<()> {
        let size = size.bytes().to_string();
        let output = self
            .run(
                &[
                    "create".as_ref(),
                    "-q".as_ref(),
                    "-f".as_ref(),
                    "qcow2".as_ref(),
                    "-F".as_ref(),
                    base_format.as_str().as_ref(),
                    "-b".as_ref(),
                    base.as_os_str(),
                    path.as_os_str(),
                    size.as_ref(),
                ],
                Bounds {
                    file_size: 1 << 30,
                    ..INSPECT
                },
                false,
            )
            .await?;
        if output.ok {
            return Ok(());
        }
        if output.stderr.contains("No space left") {
            return Err(io_error("create", path, &io::ErrorKind::StorageFull.into()));
        }
        Err(
            Error::new(ErrorCode::IoFailed, "the disk could not be made")
                .because(excerpt(&output.stderr)),
        )
    }

    async fn confined(&self, arguments: &[&OsStr], bounds: Bounds) -> Result<Output> {
        self.run(arguments, bounds, true).await
    }

    async fn run(&self, arguments: &[&OsStr], bounds: Bounds, isolate: bool) -> Result<Output> {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .env_clear()
            .env("LC_ALL", "C")
            // Each thread's arena reserves 64 MiB of address space, which the limit counts.
            .env("MALLOC_ARENA_MAX", "2")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        // SAFETY: between fork and exec only async-signal-safe work is allowed. The closure makes
        // plain system calls through rustix (setrlimit, prctl, unshare); it neither allocates nor
        // takes a lock, and touches no state of the parent but the copied `bounds`.
        unsafe {
            command.pre_exec(move || confine(bounds, isolate));
        }
        let mut child = command.spawn().map_err(|error| {
            Error::new(
                ErrorCode::IoFailed,
                format!("cannot run {}", self.program.display()),
            )
            .because(error)
            .hint("install qemu-utils: apt-get install qemu-utils")
        })?;
        let stdout = child.stdout.take();
        let stderr = child.stderr.take();
        let finished = tokio::time::timeout(bounds.wall, async {
            let (stdout, stderr) = tokio::join!(capped(stdout), capped(stderr));
            (stdout, stderr, child.wait().await)
        })
        .await;
        let Ok((stdout, stderr, status)) = finished else {
            // Dropping the child kills it.
            return Err(Error::new(
                ErrorCode::UnsupportedImage,
                "QEMU's image tool did not finish with the image in its time",
            )
            .because(format!("{} s are allowed", bounds.wall.as_secs())));
        };
        let status = status.map_err(|error| io_error("wait for", &self.program, &error))?;
        Ok(Output {
            ok: status.success(),
            code: status.code(),
            stdout,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        })
    }
}

/// Runs in the child: limits, no new privileges, no core dump, and no network.
fn confine(bounds: Bounds, isolate: bool) -> io::Result<()> {
    let limit = |resource, value: u64| {
        setrlimit(
            resource,
            Rlimit {
                current: Some(value),
                maximum: Some(value),
            },
        )
    };
    limit(Resource::As, MEMORY)?;
    limit(Resource::Cpu, bounds.cpu_seconds)?;
    limit(Resource::Fsize, bounds.file_size)?;
    limit(Resource::Core, 0)?;
    limit(Resource::Nofile, 64)?;
    rustix::thread::set_no_new_privs(true)?;
    if isolate {
        // An agent without CAP_SYS_ADMIN cannot, and goes on without: our header check, not the
        // namespace, is what keeps the tool from opening anything else.
        // SAFETY: this process is the forked child with one thread; nothing of it relies on the
        // namespaces of before.
        let _ =
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWIPC) };
    }
    Ok(())
}

struct Output {
    ok: bool,
    code: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

async fn capped(pipe: Option<impl tokio::io::AsyncRead + Unpin>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // What was read until an error is all there is to say.
        let _ = pipe.take(MAX_OUTPUT).read_to_end(&mut bytes).await;
    }
    bytes
}

fn excerpt(stderr: &str) -> String {
    let text: String = stderr
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(300)
        .collect();
    text.trim().to_owned()
}

fn refused(what: &str, stderr: &str) -> Error {
    Error::new(ErrorCode::UnsupportedImage, what).because(excerpt(stderr))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A tool that is a script of ours.
    fn fake(folder: &Path, script: &str) -> QemuImg {
        let path = folder.join("tool");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        QemuImg::new(path)
    }

    #[tokio::test]
    async fn the_tool_runs_confined() {
        let folder = tempfile::tempdir().unwrap();
        let tool = fake(
            folder.path(),
            "echo \"v=$(ulimit -v) t=$(ulimit -t) f=$(ulimit -f) n=$(ulimit -n) c=$(ulimit -c) pwd=$(pwd) env=$(env | grep -c SECRET)\" >&2
             grep NoNewPrivs /proc/self/status >&2
             echo \"net=$(grep -c : /proc/net/dev)\" >&2
             exit 1",
        );
        let image = folder.path().join("image");
        let error = tool
            .verify_qcow2(&image, ByteSize::from_mib(1))
            .await
            .unwrap_err();
        let cause = error.cause().unwrap();
        for told in [
            "v=1048576 ",
            "t=30 ",
            "f=0 ",
            "n=64 ",
            "c=0 ",
            "pwd=/ ",
            "NoNewPrivs: 1",
        ] {
            assert!(cause.contains(told), "{told}: {cause}");
        }
        if rustix::process::geteuid().is_root() {
            assert!(
                cause.contains("net=1"),
                "only a loopback device is left: {cause}"
            );
        } else {
            eprintln!("SKIPPED: a network namespace of its own needs root");
        }
    }

    #[tokio::test]
    async fn what_it_says_is_cut_and_cleaned() {
        let folder = tempfile::tempdir().unwrap();
        let tool = fake(
            folder.path(),
            "yes '\u{1b}[31mevil' | head -c 3000000 >&2; exit 1",
        );
        let image = folder.path().join("image");
        let error = tool
            .verify_qcow2(&image, ByteSize::from_mib(1))
            .await
            .unwrap_err();
        assert_eq!(error.code(), ErrorCode::UnsupportedImage);
        let cause = error.cause().unwrap();
        assert!(cause.len() <= 300 && !cause.contains('\u{1b}'), "{cause:?}");
    }

    #[tokio::test]
    async fn another_opinion_of_qemu_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        for (json, code) in [
            (
                r#"{"format":"raw","virtual-size":1048576}"#,
                ErrorCode::UnsafeImage,
            ),
            (
                r#"{"format":"qcow2","virtual-size":5}"#,
                ErrorCode::UnsafeImage,
            ),
            (
                r#"{"format":"qcow2","virtual-size":1048576,"backing-filename":"/etc/passwd"}"#,
                ErrorCode::UnsafeImage,
            ),
            ("garbage", ErrorCode::Internal),
        ] {
            let tool = fake(folder.path(), &format!("echo '{json}'"));
            let error = tool
                .verify_qcow2(&image, ByteSize::from_mib(1))
                .await
                .unwrap_err();
            assert_eq!(error.code(), code, "{json}: {error}");
        }
        let tool = QemuImg::new(folder.path().join("none"));
        let error = tool
            .verify_qcow2(&image, ByteSize::from_mib(1))
            .await
            .unwrap_err();
        assert!(error.hint_text().unwrap().contains("qemu-utils"));
    }

    #[tokio::test]
    async fn a_dropped_run_is_killed_and_a_slow_one_too() {
        let folder = tempfile::tempdir().unwrap();
        let pid_file = folder.path().join("pid");
        // The size limit of inspections forbids the script to write a file; convert may.
        let tool = fake(
            folder.path(),
            &format!("echo $$ > {}; exec sleep 1000", pid_file.display()),
        );
        let running = || {
            let pid = std::fs::read_to_string(&pid_file).unwrap();
            // A zombie that is not reaped yet is dead too.
            std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
                .is_ok_and(|stat| !stat.contains(") Z"))
        };
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let flatten = |deadline| tool.flatten(&from, &to, ByteSize::from_mib(1), deadline);
        let error = flatten(Duration::from_millis(300)).await.unwrap_err();
        assert!(error.message().contains("in its time"), "{error}");
        while running() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        std::fs::remove_file(&pid_file).unwrap();
        tokio::select! {
            result = flatten(Duration::from_secs(1000)) => panic!("{result:?}"),
            () = async {
                while std::fs::read_to_string(&pid_file).unwrap_or_default().is_empty() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            } => {}
        }
        while running() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
