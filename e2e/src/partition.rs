//! Machines on one switch, each a network namespace, any two of which can be kept from hearing each
//! other: packets vanish without a word, so that connections neither break nor come about. All of it
//! is gone with its value.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::netlab::{enter_namespace, feed, run};

/// The switch itself, in a namespace that no machine is in.
const SWITCH: &str = "sw";

/// The machines and their switch.
pub struct Switch {
    prefix: String,
    machines: Vec<String>,
}

impl Switch {
    /// Machines of these names, all of which hear each other. At most eight letters each.
    ///
    /// # Panics
    /// Where they cannot be made: it needs root, `ip` and `nft`.
    pub fn new(machines: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let lab = Self {
            prefix: format!("gs{:x}{number}", std::process::id() & 0xfffff),
            machines: machines.iter().map(|&name| name.to_owned()).collect(),
        };
        run("ip", &["netns", "add", &lab.namespace(SWITCH)]);
        lab.inside(SWITCH, &["ip", "link", "add", "lan", "type", "bridge"]);
        lab.inside(SWITCH, &["ip", "link", "set", "lan", "up"]);
        for name in machines {
            run("ip", &["netns", "add", &lab.namespace(name)]);
            let port = format!("p-{name}");
            let (inner, outer) = (lab.namespace(name), lab.namespace(SWITCH));
            run(
                "ip",
                &[
                    "link", "add", "eth0", "netns", &inner, "type", "veth", "peer", "name", &port,
                    "netns", &outer,
                ],
            );
            lab.inside(SWITCH, &["ip", "link", "set", &port, "master", "lan", "up"]);
            let address = format!("{}/24", lab.address(name));
            lab.inside(name, &["ip", "address", "add", &address, "dev", "eth0"]);
            lab.inside(name, &["ip", "link", "set", "lo", "up"]);
            lab.inside(name, &["ip", "link", "set", "eth0", "up"]);
        }
        lab
    }

    fn namespace(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// A machine's address.
    ///
    /// # Panics
    /// Where there is no such machine.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn address(&self, name: &str) -> IpAddr {
        let at = self.machines.iter().position(|one| one == name);
        let number = at.and_then(|at| u8::try_from(at + 1).ok());
        IpAddr::V4(Ipv4Addr::new(10, 77, 0, number.expect("a machine")))
    }

    /// The beginning of a command line that runs a program on a machine.
    pub fn wrapper(&self, name: &str) -> [String; 3] {
        [
            "nsenter".to_owned(),
            format!("--net=/run/netns/{}", self.namespace(name)),
            "--".to_owned(),
        ]
    }

    /// From now on these pairs hear nothing of each other, and all others do.
    ///
    /// # Panics
    /// Where the rules cannot be set.
    pub fn cut(&self, pairs: &[(&str, &str)]) {
        let mut deaf: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for (one, other) in pairs {
            for (hears, of) in [(one, other), (other, one)] {
                let all = deaf.entry(hears).or_default();
                all.insert(self.address(of).to_string());
            }
        }
        for name in &self.machines {
            let rule = match deaf.get(name.as_str()) {
                None => String::new(),
                Some(all) => {
                    let all: Vec<&str> = all.iter().map(String::as_str).collect();
                    format!("ip saddr {{ {} }} drop", all.join(", "))
                }
            };
            let wrapper = self.wrapper(name);
            let mut command = Command::new(&wrapper[0]);
            command.args(&wrapper[1..]).args(["nft", "-f", "-"]);
            feed(
                command,
                &format!(
                    "table inet fault\ndelete table inet fault\ntable inet fault {{\n chain input {{\n type filter hook input priority -10; policy accept;\n {rule}\n }}\n}}\n"
                ),
            );
        }
    }

    /// All hear each other again.
    ///
    /// # Panics
    /// Where the rules cannot be set.
    pub fn heal(&self) {
        self.cut(&[]);
    }

    /// Runs `work` in a thread on a machine; sockets that it makes stay there.
    ///
    /// # Panics
    /// Where the namespace cannot be entered, or `work` panics.
    pub fn enter<T: Send>(&self, name: &str, work: impl FnOnce() -> T + Send) -> T {
        enter_namespace(&self.namespace(name), work)
    }

    fn inside(&self, name: &str, words: &[&str]) {
        let wrapper = self.wrapper(name);
        let all: Vec<&str> = wrapper[1..]
            .iter()
            .map(String::as_str)
            .chain(words.iter().copied())
            .collect();
        run(&wrapper[0], &all);
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let names = self.machines.iter().map(String::as_str);
        for name in names.chain([SWITCH]) {
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    #[test]
    fn whoever_is_cut_off_hears_nothing_and_the_others_go_on() {
        let lab = Switch::new(&["a", "b", "c"]);
        let at = lab.address("a");
        let listener = lab.enter("a", || TcpListener::bind((at, 0)).unwrap());
        let to: SocketAddr = listener.local_addr().unwrap();
        let reaches = |from| {
            lab.enter(from, || {
                TcpStream::connect_timeout(&to, Duration::from_secs(2))
                    .map_err(|error| error.kind())
            })
        };
        assert!(reaches("b").is_ok() && reaches("c").is_ok());
        lab.cut(&[("a", "b")]);
        // Black-holed, and not refused.
        assert_eq!(reaches("b").unwrap_err(), io::ErrorKind::TimedOut);
        assert!(reaches("c").is_ok());
        lab.heal();
        assert!(reaches("b").is_ok());
    }
}
