//! A proxy in front of libvirtd's socket, which can refuse, drop and hang. The daemon itself is
//! shared and never touched.

use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;
use tokio::io::copy_bidirectional;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

const LIBVIRTD: &str = "/run/libvirt/libvirt-sock";

/// What the proxy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Passes everything on.
    Pass,
    /// Takes connections and data, and passes nothing on: a daemon under SIGSTOP.
    Hang,
    /// Has no socket, and every connection is cut: a daemon that was killed.
    Dead,
}

pub(crate) struct Proxy {
    folder: TempDir,
    mode: Arc<watch::Sender<Mode>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Proxy {
    /// Starts it; `None` where there is no libvirtd.
    pub(crate) async fn start() -> Option<Self> {
        if UnixStream::connect(LIBVIRTD).await.is_err() {
            println!("skipped: needs libvirtd (deploy/host-setup.sh starts it)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let mode = Arc::new(watch::Sender::new(Mode::Pass));
        let socket = folder.path().join("libvirt.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let task = tokio::spawn(serve(listener, socket, Arc::clone(&mode)));
        Some(Self { folder, mode, task })
    }

    pub(crate) fn uri(&self) -> String {
        format!(
            "qemu+unix:///system?socket={}",
            self.folder.path().join("libvirt.sock").display()
        )
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn serve(listener: UnixListener, socket: PathBuf, mode: Arc<watch::Sender<Mode>>) {
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    let mut changes = mode.subscribe();
    loop {
        let now = *changes.borrow_and_update();
        if now == Mode::Dead {
            if listener.take().is_some() {
                std::fs::remove_file(&socket).unwrap();
            }
            connections.abort_all();
        } else if listener.is_none() {
            listener = Some(UnixListener::bind(&socket).unwrap());
        }
        match &listener {
            Some(open) => tokio::select! {
                accepted = open.accept() => {
                    let (client, _) = accepted.unwrap();
                    connections.spawn(carry(client, mode.subscribe()));
                }
                changed = changes.changed() => if changed.is_err() { return },
            },
            None => {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Carries one connection, standing still while the proxy hangs.
async fn carry(mut client: UnixStream, mut mode: watch::Receiver<Mode>) {
    if mode.wait_for(|mode| *mode == Mode::Pass).await.is_err() {
        return;
    }
    let Ok(mut daemon) = UnixStream::connect(LIBVIRTD).await else {
        return;
    };
    loop {
        tokio::select! {
            biased;
            changed = mode.wait_for(|mode| *mode == Mode::Hang) => {
                if changed.is_err() {
                    return;
                }
            }
            // Dropping the copy loses what it has buffered. That is what a cut in the middle is
            // like; whoever resumes after a hang has been given up by its peer.
            _ = copy_bidirectional(&mut client, &mut daemon) => return,
        }
        if mode.wait_for(|mode| *mode != Mode::Hang).await.is_err() {
            return;
        }
    }
}
