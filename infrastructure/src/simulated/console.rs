//! Serial consoles of simulated guests: they greet, and send back what they are sent.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use ghost_domain::VmId;

use super::world::Domain;
use crate::libvirt::xml::Element;

/// How often a console's thread looks whether its guest is still there.
const LOOK: Duration = Duration::from_millis(20);

/// The consoles of all active guests.
#[derive(Default)]
pub(super) struct Consoles {
    open: HashMap<VmId, Running>,
}

/// A served console; ends when it is dropped.
struct Running {
    over: Arc<AtomicBool>,
    started: i64,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

impl Consoles {
    /// Serves the consoles of the guests that are active now, and no others.
    pub(super) fn follow(&mut self, domains: &BTreeMap<VmId, Domain>) {
        self.open.retain(|id, running| {
            domains.get(id).is_some_and(|domain| {
                domain.power.is_active() && domain.started_milliseconds == running.started
            })
        });
        for (id, domain) in domains {
            if domain.power.is_active() && !self.open.contains_key(id) {
                let over = Arc::new(AtomicBool::new(false));
                if let Some((socket, log)) = paths(domain) {
                    let stop = Arc::clone(&over);
                    let name = domain
                        .parsed
                        .as_ref()
                        .map_or_else(String::new, |parsed| parsed.name.clone());
                    let started =
                        thread::Builder::new()
                            .name("ghost-sim-tty".into())
                            .spawn(move || {
                                if let Err(error) = serve(&socket, &log, &name, &stop) {
                                    tracing::warn!(%error, "a simulated console failed");
                                }
                            });
                    if let Err(error) = started {
                        tracing::warn!(%error, "cannot start a simulated console");
                    }
                }
                self.open.insert(
                    *id,
                    Running {
                        over,
                        started: domain.started_milliseconds,
                    },
                );
            }
        }
    }
}

fn paths(domain: &Domain) -> Option<(PathBuf, PathBuf)> {
    let root = Element::parse(&domain.xml).ok()?;
    let serial = root.at(&["devices", "serial"])?;
    Some((
        serial.find("source")?.attribute("path")?.into(),
        serial.find("log")?.attribute("file")?.into(),
    ))
}

fn serve(socket: &PathBuf, log: &PathBuf, name: &str, over: &AtomicBool) -> std::io::Result<()> {
    let mut log = File::options().create(true).append(true).open(log)?;
    let greeting = format!("simulated guest {name}: up\r\n");
    log.write_all(greeting.as_bytes())?;
    // What a process before us left; the directory is ours alone.
    drop(std::fs::remove_file(socket));
    let listener = UnixListener::bind(socket)?;
    listener.set_nonblocking(true)?;
    while !over.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((peer, _)) => {
                // One peer at a time, as QEMU does; its going away is no fault.
                drop(echo(peer, &mut log, over));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => thread::sleep(LOOK),
            Err(error) => return Err(error),
        }
    }
    log.write_all(b"simulated guest: down\r\n")?;
    drop(std::fs::remove_file(socket));
    Ok(())
}

fn echo(mut peer: UnixStream, log: &mut File, over: &AtomicBool) -> std::io::Result<()> {
    peer.set_nonblocking(false)?;
    peer.set_read_timeout(Some(LOOK))?;
    let mut buffer = [0u8; 4096];
    while !over.load(Ordering::SeqCst) {
        match peer.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                log.write_all(bytes)?;
                peer.write_all(bytes)?;
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                ) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
