//! A piece of internet in network namespaces, with a host behind two NATs that let nothing in, and
//! switches for what goes wrong on the way. All of it is gone with its value.
//!
//! ```text
//!  core 198.51.100.10 ── isp 198.51.100.1 │ NAT │ 100.64.0.1 ── home 100.64.0.2 │ NAT │ 192.168.50.1 ─┬─ host   192.168.50.2
//!                                                                                                    └─ second 192.168.50.3
//! ```
//!
//! The addresses are those for documentation and for carriers (RFC 5737, RFC 6598); no packet leaves
//! the namespaces.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Where Core is.
pub const CORE: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 10));

/// What happens to packets between Core and the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They arrive.
    Open,
    /// They vanish without a word, both ways.
    BlackHole,
    /// What the hosts say vanishes; what Core says arrives.
    Unheard,
    /// So many of a hundred vanish, each way.
    Loses(u8),
    /// The cable is out.
    Cut,
}

/// The namespaces. At the end of the value they are removed, whoever still is in them.
pub struct NetLab {
    prefix: String,
}

impl NetLab {
    /// Makes the namespaces.
    ///
    /// # Panics
    /// Where that cannot be done: it needs root, `ip` and `nft`.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let lab = Self {
            prefix: format!("gl{:x}{number}", std::process::id() & 0xfffff),
        };
        for name in ["core", "isp", "home", "host", "second"] {
            run("ip", &["netns", "add", &lab.namespace(name)]);
            lab.inside(name, "ip", &["link", "set", "lo", "up"]);
        }
        lab.cable(
            ("core", "wan", "198.51.100.10/24"),
            ("isp", "wan", "198.51.100.1/24"),
        );
        lab.cable(
            ("isp", "lan", "100.64.0.1/24"),
            ("home", "wan", "100.64.0.2/24"),
        );
        lab.cable(("home", "lan0", ""), ("host", "eth0", "192.168.50.2/24"));
        lab.cable(("home", "lan1", ""), ("second", "eth0", "192.168.50.3/24"));
        lab.inside("home", "ip", &["link", "add", "lan", "type", "bridge"]);
        for port in ["lan0", "lan1"] {
            lab.inside("home", "ip", &["link", "set", port, "master", "lan"]);
        }
        lab.inside(
            "home",
            "ip",
            &["address", "add", "192.168.50.1/24", "dev", "lan"],
        );
        lab.inside("home", "ip", &["link", "set", "lan", "up"]);
        for (name, gateway) in [
            ("home", "100.64.0.1"),
            ("host", "192.168.50.1"),
            ("second", "192.168.50.1"),
        ] {
            lab.inside(name, "ip", &["route", "add", "default", "via", gateway]);
        }
        for router in ["isp", "home"] {
            lab.inside(router, "sysctl", &["-qw", "net.ipv4.ip_forward=1"]);
            lab.rules(router, NAT);
        }
        lab.set(Way::Open);
        lab
    }

    /// The full name of a namespace.
    pub fn namespace(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// What happens from now on to packets between Core and the hosts.
    ///
    /// # Panics
    /// Where the rules cannot be set.
    pub fn set(&self, way: Way) {
        let link = |state| self.inside("isp", "ip", &["link", "set", "wan", state]);
        link(if way == Way::Cut { "down" } else { "up" });
        let rule = match way {
            Way::Open | Way::Cut => String::new(),
            Way::BlackHole => "drop".to_owned(),
            Way::Unheard => "iifname \"lan\" drop".to_owned(),
            Way::Loses(percent) => format!("numgen random mod 100 < {percent} drop"),
        };
        self.rules(
            "isp",
            &format!(
                "table inet fault\ndelete table inet fault\ntable inet fault {{\n chain forward {{\n type filter hook forward priority -10; policy accept;\n {rule}\n }}\n}}\n"
            ),
        );
    }

    /// Gives the host another address, as a laptop gets one in another network.
    ///
    /// # Panics
    /// Where that cannot be done.
    pub fn move_host(&self, address: &str) {
        self.inside("host", "ip", &["address", "flush", "dev", "eth0"]);
        self.inside("host", "ip", &["address", "add", address, "dev", "eth0"]);
        self.inside(
            "host",
            "ip",
            &["route", "add", "default", "via", "192.168.50.1"],
        );
    }

    /// Takes the host's network interface down, as a cable that is pulled out of it does, or up again
    /// with the way that it had.
    ///
    /// # Panics
    /// Where that cannot be done.
    pub fn plug_host(&self, plugged: bool) {
        let state = if plugged { "up" } else { "down" };
        self.inside("host", "ip", &["link", "set", "eth0", state]);
        if plugged {
            // Its routes went with it.
            let route = ["route", "replace", "default", "via", "192.168.50.1"];
            self.inside("host", "ip", &route);
        }
    }

    /// Lays a cable from Core to the host, as a private network of both is one: Core reaches the host's
    /// own address over it. The link's way stays what it was.
    ///
    /// # Panics
    /// Where that cannot be done.
    pub fn lay_private(&self) {
        self.cable(
            ("core", "private", "10.99.0.1/24"),
            ("host", "private", "10.99.0.2/24"),
        );
        self.inside(
            "core",
            "ip",
            &["route", "add", "192.168.50.2/32", "via", "10.99.0.2"],
        );
    }

    /// Whether packets over the private cable arrive from now on; else they vanish without a word.
    ///
    /// # Panics
    /// Where the rules cannot be set.
    pub fn let_private(&self, arrive: bool) {
        let rule = if arrive {
            ""
        } else {
            "iifname \"private\" drop"
        };
        for end in ["core", "host"] {
            self.rules(
                end,
                &format!(
                    "table inet private\ndelete table inet private\ntable inet private {{\n chain input {{\n type filter hook input priority -10; policy accept;\n {rule}\n }}\n}}\n"
                ),
            );
        }
    }

    /// How many bytes have come to Core over the private cable.
    ///
    /// # Panics
    /// Where the kernel does not tell.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn private_bytes(&self) -> u64 {
        let table = self
            .enter("core", || {
                std::fs::read_to_string("/proc/thread-self/net/dev")
            })
            .expect("the interfaces' counters");
        table
            .lines()
            .find_map(|line| line.trim().strip_prefix("private:"))
            .and_then(|counters| counters.split_whitespace().next()?.parse().ok())
            .expect("the private cable's counter")
    }

    /// Whether a TCP connection from one namespace to an address comes about.
    pub fn reaches(&self, from: &str, to: SocketAddr) -> bool {
        self.enter(from, move || {
            TcpStream::connect_timeout(&to, Duration::from_secs(2)).is_ok()
        })
    }

    /// Runs `work` in a thread within a namespace; sockets that it makes stay there.
    ///
    /// # Panics
    /// Where the namespace cannot be entered.
    pub fn enter<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        enter_namespace(&self.namespace(name), work)
    }

    /// A way to Core that takes its time: a TCP proxy beside it, with this delay each way.
    pub fn delay(&self, port: u16, delay: Duration) -> Delay {
        let stop = Arc::new(AtomicBool::new(false));
        let carried = Arc::new(AtomicU64::new(0));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&carried));
        let at = self.enter("core", move || {
            let listener = TcpListener::bind((CORE, 0))?;
            let at = listener.local_addr()?;
            listener.set_nonblocking(true)?;
            // Threads are born into the namespace of the one that makes them.
            std::thread::spawn(move || accept(&listener, port, delay, &stopped, &count));
            io::Result::Ok(at)
        });
        #[expect(clippy::expect_used, reason = "the test cannot go on")]
        let at = at.expect("the proxy listens");
        Delay { at, stop, carried }
    }

    /// The beginning of a command line that runs a program in a namespace. Only the network is
    /// another one: `ip netns exec` would also replace /sys.
    pub fn wrapper(&self, name: &str) -> [String; 3] {
        [
            "nsenter".to_owned(),
            format!("--net=/run/netns/{}", self.namespace(name)),
            "--".to_owned(),
        ]
    }

    fn cable(
        &self,
        (a, a_name, a_address): (&str, &str, &str),
        (b, b_name, b_address): (&str, &str, &str),
    ) {
        run(
            "ip",
            &[
                "link",
                "add",
                a_name,
                "netns",
                &self.namespace(a),
                "type",
                "veth",
                "peer",
                "name",
                b_name,
                "netns",
                &self.namespace(b),
            ],
        );
        for (name, device, address) in [(a, a_name, a_address), (b, b_name, b_address)] {
            if !address.is_empty() {
                self.inside(name, "ip", &["address", "add", address, "dev", device]);
            }
            self.inside(name, "ip", &["link", "set", device, "up"]);
        }
    }

    fn rules(&self, name: &str, rules: &str) {
        let wrapper = self.wrapper(name);
        let mut command = Command::new(&wrapper[0]);
        command.args(&wrapper[1..]).args(["nft", "-f", "-"]);
        feed(command, rules);
    }

    fn inside(&self, name: &str, program: &str, arguments: &[&str]) {
        let wrapper = self.wrapper(name);
        let all: Vec<&str> = wrapper[1..]
            .iter()
            .map(String::as_str)
            .chain([program])
            .chain(arguments.iter().copied())
            .collect();
        run(&wrapper[0], &all);
    }
}

impl Default for NetLab {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for NetLab {
    fn drop(&mut self) {
        for name in ["second", "host", "home", "isp", "core"] {
            // Also after a failed beginning, where not all are there.
            drop(
                Command::new("ip")
                    .args(["netns", "delete", &self.namespace(name)])
                    .stderr(Stdio::null())
                    .status(),
            );
        }
    }
}

/// Masquerades what goes out by `wan`, and lets nothing in that was not asked for.
const NAT: &str = "
table inet nat {
  chain postrouting { type nat hook postrouting priority srcnat; oifname \"wan\" masquerade; }
}
table inet guard {
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname \"lan\" accept
  }
  chain input {
    type filter hook input priority filter; policy drop;
    ct state established,related accept
    iifname { \"lo\", \"lan\" } accept
  }
}
";

/// A slow way to Core.
pub struct Delay {
    at: SocketAddr,
    stop: Arc<AtomicBool>,
    carried: Arc<AtomicU64>,
}

impl Delay {
    /// Where it listens, in Core's namespace.
    pub const fn address(&self) -> SocketAddr {
        self.at
    }

    /// How many bytes it has carried.
    pub fn carried(&self) -> u64 {
        self.carried.load(Ordering::Relaxed)
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn accept(
    listener: &TcpListener,
    port: u16,
    delay: Duration,
    stop: &Arc<AtomicBool>,
    carried: &Arc<AtomicU64>,
) {
    while !stop.load(Ordering::Relaxed) {
        let Ok((near, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        let Ok(far) = TcpStream::connect((CORE, port)) else {
            continue;
        };
        let both = [(near.try_clone(), far.try_clone()), (Ok(far), Ok(near))];
        for (from, to) in both {
            if let (Ok(from), Ok(to)) = (from, to) {
                drop(from.set_nonblocking(false));
                let (stop, carried) = (Arc::clone(stop), Arc::clone(carried));
                std::thread::spawn(move || pump(from, to, delay, &stop, &carried));
            }
        }
    }
}

/// Carries bytes, each `delay` later; what was read meanwhile waits in a queue, so that the delay
/// does not limit the rate.
fn pump(
    mut from: TcpStream,
    mut to: TcpStream,
    delay: Duration,
    stop: &AtomicBool,
    carried: &AtomicU64,
) {
    drop(from.set_nodelay(true));
    drop(to.set_nodelay(true));
    let (sender, receiver) = std::sync::mpsc::sync_channel::<(std::time::Instant, Vec<u8>)>(1024);
    let Ok(mut writer) = to.try_clone() else {
        return;
    };
    std::thread::spawn(move || {
        for (due, bytes) in receiver {
            std::thread::sleep(due.saturating_duration_since(std::time::Instant::now()));
            if writer.write_all(&bytes).is_err() {
                return;
            }
        }
        drop(writer.shutdown(Shutdown::Write));
    });
    let mut buffer = vec![0; 64 * 1024];
    while !stop.load(Ordering::Relaxed) {
        match from.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(read) => {
                carried.fetch_add(read as u64, Ordering::Relaxed);
                let due = std::time::Instant::now() + delay;
                if sender.send((due, buffer[..read].to_vec())).is_err() {
                    break;
                }
            }
        }
    }
    if stop.load(Ordering::Relaxed) {
        drop(to.flush());
        drop(to.shutdown(Shutdown::Both));
        drop(from.shutdown(Shutdown::Both));
    }
}

#[expect(clippy::panic, reason = "the test cannot go on")]
pub(crate) fn run(program: &str, arguments: &[&str]) {
    let done = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    match done {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!(
            "{program} {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => panic!("{program} {}: {error}", arguments.join(" ")),
    }
}

#[expect(clippy::expect_used, reason = "the test cannot go on")]
pub(crate) fn feed(mut command: Command, text: &str) {
    let mut child = command
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nft");
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).expect("its input");
    }
    let output = child.wait_with_output().expect("its end");
    assert!(
        output.status.success(),
        "{}\n{text}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Runs `work` in a thread of its own in a network namespace; sockets that it makes stay there.
///
/// # Panics
/// Where the namespace cannot be entered, or `work` panics.
#[expect(clippy::expect_used, reason = "the test cannot go on")]
pub(crate) fn enter_namespace<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    let path = format!("/run/netns/{namespace}");
    std::thread::scope(|scope| {
        let entered = scope.spawn(move || {
            let file = File::open(path).expect("the namespace");
            // SAFETY: setns takes a descriptor that is open for the length of the call, and changes
            // the network namespace of this thread alone.
            let done = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
            assert_eq!(done, 0, "{}", io::Error::last_os_error());
            work()
        });
        match entered.join() {
            Ok(value) => value,
            Err(cause) => std::panic::resume_unwind(cause),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_behind_two_nats_gets_out_and_nobody_gets_in() {
        let lab = NetLab::new();
        let core = lab.enter("core", || TcpListener::bind((CORE, 0)).unwrap());
        let at = core.local_addr().unwrap();
        assert!(lab.reaches("host", at));
        assert!(lab.reaches("second", at));
        let host = lab.enter("host", || TcpListener::bind("192.168.50.2:0").unwrap());
        let inner = host.local_addr().unwrap();
        assert!(lab.reaches("second", inner), "the LAN is open");
        assert!(!lab.reaches("core", inner), "no way in");

        lab.set(Way::BlackHole);
        assert!(!lab.reaches("host", at));
        lab.set(Way::Cut);
        assert!(!lab.reaches("host", at));
        lab.set(Way::Open);
        assert!(lab.reaches("host", at));

        let slow = lab.delay(at.port(), Duration::from_millis(150));
        std::thread::spawn(move || {
            let (mut one, _) = core.accept().unwrap();
            // The connections above came first.
            loop {
                let mut text = [0; 4];
                if one.read_exact(&mut text).is_ok() {
                    one.write_all(&text).unwrap();
                    return;
                }
                one = core.accept().unwrap().0;
            }
        });
        let address = slow.address();
        let (answer, took) = lab.enter("host", move || {
            let begun = std::time::Instant::now();
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"ping").unwrap();
            let mut text = [0; 4];
            stream.read_exact(&mut text).unwrap();
            (text, begun.elapsed())
        });
        assert_eq!(&answer, b"ping");
        assert!(took >= Duration::from_millis(300), "{took:?}");
        assert_eq!(slow.carried(), 8);
    }
}
