//! A siege: one real guest in which the hostile program takes the agent's place and does everything
//! it knows in turn, beside two guests that only want to work.
//!
//! # What is compared
//! How long the peers' calls take while the guest attacks, beside how long they take while the same
//! guest merely burns its processor. Under software emulation a busy guest costs its peers a core
//! whatever it does, and no agent can give that back; on a host with a core for each it is nothing.
//! What is left between the two is what the channel, QEMU's main loop and the agent make of it.
//! Burning and attacking alternate, so that whatever else the machine does falls on both alike.
//! How long calls take with nobody in the way is told too.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ghost_hostile::{BURN, Behaviour};
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::exec_input::Input;
use ghost_proto::agent::v1::exec_output::Output;
use ghost_proto::agent::v1::guest_service_client::GuestServiceClient;
use tonic::transport::{Channel, Endpoint};

use crate::agent::{Agent, Builder};
use crate::binaries::hostile_program;
use crate::guest::TINY;
use crate::wait;

/// How long a guest that breaks the rules is held off in a siege, every time: far less than anybody
/// would set it, so that it comes back at the host again and again.
const HOLD_OFF: &str = "200ms";
/// In the guest.
const PROGRAM: &str = "/tmp/hostile-guest";
/// The image's own supervisor is stopped for as long as the attack goes on, and then starts the
/// agent again as after any death of it.
const SCRIPT: &str = "#!/bin/sh
agent=$(pidof ghost-guest)
supervisor=$(sed -n 's/^PPid:[[:space:]]*//p' /proc/$agent/status)
kill -STOP $supervisor
sleep 1
kill -9 $agent
/tmp/hostile-guest --device /dev/virtio-ports/org.ghost.agent.0 --plan \"$1\"
kill -CONT $supervisor
";
/// How often the agent's memory is looked at.
const LOOK: Duration = Duration::from_millis(50);
/// How long a guest may take to answer at all.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the link may take to be back after an attack.
const RECOVERY: Duration = Duration::from_secs(120);

/// How long what goes on.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Nobody does any harm yet.
    pub quiet: Duration,
    /// The processor burns, before each behaviour.
    pub burn: Duration,
    /// Each behaviour.
    pub attack: Duration,
}

/// An agent for a siege.
pub fn builder() -> Builder {
    Builder::new()
        .set("guest.hold_off", HOLD_OFF)
        .set("guest.hold_off_most", HOLD_OFF)
}

impl Plan {
    /// Fills a time, about half of it with burning.
    pub fn within(time: Duration) -> Self {
        let quiet = time / 10;
        let count = u32::try_from(Behaviour::ALL.len()).unwrap_or(u32::MAX);
        let each = (time - quiet) / count;
        Self {
            quiet,
            burn: each * 2 / 5,
            attack: each - each * 2 / 5,
        }
    }

    fn text(self) -> String {
        let steps: Vec<String> = Behaviour::ALL
            .iter()
            .map(|one| {
                format!(
                    "{BURN}:{},{}:{}",
                    self.burn.as_millis(),
                    one.as_str(),
                    self.attack.as_millis()
                )
            })
            .collect();
        steps.join(",")
    }
}

/// How long calls took.
#[derive(Clone, Debug, Default)]
pub struct Latencies(Vec<Duration>);

impl Latencies {
    /// How many there were.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// What so many of a hundred stayed below; zero of none.
    pub fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let at = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
        sorted.get(at).copied().unwrap_or_default()
    }
}

impl std::fmt::Display for Latencies {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |percent| self.percentile(percent).as_secs_f64() * 1e3;
        write!(
            f,
            "{} calls, p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
            self.count(),
            ms(50),
            ms(99),
            ms(100)
        )
    }
}

/// What one behaviour did.
#[derive(Clone, Debug)]
pub struct Assault {
    /// Which.
    pub behaviour: Behaviour,
    /// The peers' calls meanwhile.
    pub peers: Latencies,
    /// How often the guest was held off.
    pub held_off: usize,
    /// The most resident memory of the agent meanwhile, in bytes.
    pub memory: u64,
}

/// What became of it all.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The peers' calls while nobody did any harm.
    pub quiet: Latencies,
    /// While the guest burnt its processor.
    pub burning: Latencies,
    /// While it attacked, all behaviours together.
    pub attacked: Latencies,
    /// One by one, in their order.
    pub assaults: Vec<Assault>,
    /// Calls into the peers that failed.
    pub failed: Vec<String>,
    /// The agent's resident memory before, in bytes.
    pub memory_before: u64,
    /// The most of it afterwards, in bytes.
    pub memory_most: u64,
    /// What people were shown meanwhile: the command, and its output.
    pub shown: Vec<(String, String)>,
    /// Until the guest's own agent took calls again.
    pub recovery: Duration,
}

impl Outcome {
    /// The peers' p99 under attack as a multiple of that before.
    pub fn ratio(&self) -> f64 {
        self.attacked.percentile(99).as_secs_f64() / self.before().as_secs_f64()
    }

    /// The peers' p99 without an attack: beside a guest that burns, or, where chance would have it
    /// that this was shorter, with nobody in the way.
    pub fn before(&self) -> Duration {
        self.burning.percentile(99).max(self.quiet.percentile(99))
    }

    /// How much the agent grew, in bytes.
    pub const fn growth(&self) -> u64 {
        self.memory_most.saturating_sub(self.memory_before)
    }
}

/// What all threads share.
struct Watch {
    over: AtomicBool,
    /// The most memory since it was looked at.
    memory: AtomicU64,
}

impl Watch {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// Ends the threads also where this one fails.
struct Ending<'a>(&'a Watch);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// What a thread of a peer brings back: when each call began and how long it took, and what failed.
type Calls = (Vec<(Instant, Duration)>, Vec<String>);

/// Lays siege to the agent, which has the image `tiny`: launches its three guests, and deletes them
/// at the end.
///
/// # Errors
/// What kept it from being done; what it found stands in the outcome.
///
/// # Panics
/// As all of these tools do, where a command that must succeed fails.
pub fn lay(agent: &Agent, plan: Plan) -> Result<Outcome, String> {
    let ctl = agent.ctl();
    let enemy = agent.name("enemy");
    let peers = [agent.name("peer-a"), agent.name("peer-b")];
    let all: Vec<&str> = std::iter::once(&enemy)
        .chain(&peers)
        .map(String::as_str)
        .collect();
    for name in &all {
        ctl.ok(&[&["launch", "tiny", name], &TINY[..]].concat());
    }
    for name in &all {
        ctl.ok(&["vm", "wait", name, "--for", "agent", "--timeout", "180s"]);
    }
    let script = agent.folder().join("siege.sh");
    fs::write(&script, SCRIPT).map_err(|error| error.to_string())?;
    let program = hostile_program().display().to_string();
    ctl.ok(&["cp", &program, &format!("{enemy}:{PROGRAM}")]);
    ctl.ok(&[
        "cp",
        &script.display().to_string(),
        &format!("{enemy}:/tmp/siege.sh"),
    ]);
    let id = ctl.json(&["vm", "show", &enemy])["id"]
        .as_str()
        .ok_or("the guest has no id")?
        .to_owned();
    let console = agent.data_dir().join("vms").join(id).join("console.log");

    let watch = Watch {
        over: AtomicBool::new(false),
        memory: AtomicU64::new(0),
    };
    let outcome = std::thread::scope(|scope| {
        let ending = Ending(&watch);
        let calls: Vec<_> = peers
            .iter()
            .map(|peer| scope.spawn(|| call_on(agent, peer, &watch)))
            .collect();
        scope.spawn(|| weigh(agent.pid(), &watch));
        let provoking = scope.spawn(|| provoke(agent, &enemy, &watch));
        let looking = scope.spawn(|| look(agent, &enemy, &watch));
        let besieged = besiege(agent, &enemy, &console, plan, &watch);
        drop(ending);
        let mut calls_of_all = Calls::default();
        for thread in calls {
            let (times, failed) = thread.join().map_err(|_| "a caller died")??;
            calls_of_all.0.extend(times);
            calls_of_all.1.extend(failed);
        }
        provoking.join().map_err(|_| "the provoker died")??;
        let shown = looking.join().map_err(|_| "the onlooker died")?;
        Ok::<_, String>(besieged?.judge(calls_of_all, shown))
    })?;
    for name in &all {
        ctl.ok(&["vm", "delete", name, "--force"]);
    }
    Ok(outcome)
}

/// A part of the siege, as it was seen on the guest's console.
struct Phase {
    /// `None`: it burnt.
    behaviour: Option<Behaviour>,
    begun: Instant,
    ended: Instant,
    held_off: usize,
    memory: u64,
}

struct Besieged {
    quiet: (Instant, Instant),
    phases: Vec<Phase>,
    memory_before: u64,
    memory_most: u64,
    recovery: Duration,
}

impl Besieged {
    fn judge(self, (times, failed): Calls, shown: Vec<(String, String)>) -> Outcome {
        let between = |begun: Instant, ended: Instant| {
            let calls = times
                .iter()
                .filter(|(at, _)| (begun..ended).contains(at))
                .map(|(_, took)| *took);
            Latencies(calls.collect())
        };
        let (mut burning, mut attacked) = (Latencies::default(), Latencies::default());
        let mut assaults = Vec::new();
        for phase in self.phases {
            let peers = between(phase.begun, phase.ended);
            match phase.behaviour {
                None => burning.0.extend(peers.0),
                Some(behaviour) => {
                    attacked.0.extend_from_slice(&peers.0);
                    assaults.push(Assault {
                        behaviour,
                        peers,
                        held_off: phase.held_off,
                        memory: phase.memory,
                    });
                }
            }
        }
        Outcome {
            quiet: between(self.quiet.0, self.quiet.1),
            burning,
            attacked,
            assaults,
            failed,
            memory_before: self.memory_before,
            memory_most: self.memory_most,
            shown,
            recovery: self.recovery,
        }
    }
}

fn besiege(
    agent: &Agent,
    enemy: &str,
    console: &Path,
    plan: Plan,
    watch: &Watch,
) -> Result<Besieged, String> {
    // Caches and pools fill; then it counts.
    std::thread::sleep(plan.quiet / 4);
    let quiet = Instant::now();
    std::thread::sleep(plan.quiet);
    let quiet = (quiet, Instant::now());
    let memory_before = watch.memory.swap(0, Ordering::Relaxed);
    let mut console = Tail::at_the_end(console)?;
    let steps = plan.text();
    let begin = [
        "exec",
        enemy,
        "--",
        "sh",
        "-c",
        "setsid sh /tmp/siege.sh \"$1\" </dev/null >/dev/console 2>&1 &",
        "siege",
        &steps,
    ];
    // On a machine that does many other things a guest may fall silent for a while by itself.
    wait::until_ok("the guest takes the order", PATIENCE * 2, || {
        match agent.ctl().run(&begin) {
            output if output.code == 0 => Ok(()),
            output => Err(output.stderr),
        }
    });
    let mut phases: Vec<Phase> = Vec::new();
    let mut memory_most = memory_before;
    let mut held_off_before = held_off(agent);
    let deadline = Instant::now()
        + PATIENCE
        + (plan.burn + plan.attack) * u32::try_from(Behaviour::ALL.len()).unwrap_or(1) * 2;
    let over = 'over: loop {
        std::thread::sleep(LOOK / 5);
        for now in console.said()? {
            let at = Instant::now();
            let count = held_off(agent);
            let memory = watch.memory.swap(0, Ordering::Relaxed);
            memory_most = memory_most.max(memory);
            if let Some(last) = phases.last_mut() {
                last.ended = at;
                last.held_off = count - held_off_before;
                last.memory = memory;
            }
            held_off_before = count;
            if now == "over" {
                break 'over at;
            }
            phases.push(Phase {
                behaviour: Behaviour::parse(&now),
                begun: at,
                ended: at,
                held_off: 0,
                memory: 0,
            });
        }
        if Instant::now() > deadline {
            return Err(format!(
                "the hostile program does not end; the console: {}",
                console.text
            ));
        }
    };
    if phases.len() != 2 * Behaviour::ALL.len() {
        return Err(format!(
            "{} parts were seen, not two for each of {}; the console: {}",
            phases.len(),
            Behaviour::ALL.len(),
            console.text
        ));
    }
    // What greeted last may have been an attacker that is dead by now; and a port that an attack has
    // left without a voice is opened anew after a while.
    wait::until_ok("the guest's own agent is back", RECOVERY, || {
        let output = agent.ctl().run(&["exec", enemy, "--", "true"]);
        match output.code {
            0 => Ok(()),
            _ => Err(output.stderr),
        }
    });
    let recovery = over.elapsed();
    Ok(Besieged {
        quiet,
        phases,
        memory_before,
        memory_most: memory_most.max(watch.memory.load(Ordering::Relaxed)),
        recovery,
    })
}

/// How often the agent has told so far that it holds a guest off.
fn held_off(agent: &Agent) -> usize {
    agent.log().matches("and is held off").count()
}

/// What is added to a guest's console log.
struct Tail {
    file: File,
    text: String,
    told: usize,
}

impl Tail {
    fn at_the_end(path: &Path) -> Result<Self, String> {
        let open = || {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::End(0))?;
            Ok::<_, std::io::Error>(file)
        };
        Ok(Self {
            file: open().map_err(|error| format!("{}: {error}", path.display()))?,
            text: String::new(),
            told: 0,
        })
    }

    /// What the hostile program has said since the last time.
    fn said(&mut self) -> Result<Vec<String>, String> {
        let mut bytes = Vec::new();
        self.file
            .read_to_end(&mut bytes)
            .map_err(|error| error.to_string())?;
        self.text.push_str(&String::from_utf8_lossy(&bytes));
        let whole = self.text.rfind('\n').map_or(0, |at| at + 1);
        let said: Vec<String> = self.text[..whole]
            .lines()
            .filter_map(|line| line.trim().strip_prefix("hostile-guest: now "))
            .map(str::to_owned)
            .collect();
        let new = said[self.told..].to_vec();
        self.told = said.len();
        Ok(new)
    }
}

async fn client(agent: &Agent) -> Result<GuestServiceClient<Channel>, String> {
    let endpoint = Endpoint::from_shared(format!("unix:{}", agent.socket().display()))
        .map_err(|error| error.to_string())?;
    let channel = endpoint
        .connect()
        .await
        .map_err(|error| error.to_string())?;
    Ok(GuestServiceClient::new(channel))
}

/// Runs `true` in a guest and reads all it says.
async fn execute(client: &mut GuestServiceClient<Channel>, vm: &str) -> Result<(), String> {
    let start = message::ExecStart {
        vm: vm.to_owned(),
        program: "/bin/true".to_owned(),
        ..message::ExecStart::default()
    };
    let input = tokio_stream::once(message::ExecInput {
        input: Some(Input::Start(start)),
    });
    let told = |status: tonic::Status| status.message().to_owned();
    let mut output = client.exec(input).await.map_err(told)?.into_inner();
    while let Some(next) = output.message().await.map_err(told)? {
        match next.output {
            Some(Output::Exited(exited)) if exited.code == 0 && exited.signal == 0 => return Ok(()),
            Some(Output::Exited(exited)) => return Err(format!("it ended with {exited:?}")),
            _ => {}
        }
    }
    Err("the call ended without an exit".to_owned())
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())
}

/// One call after the other into a peer.
fn call_on(agent: &Agent, vm: &str, watch: &Watch) -> Result<Calls, String> {
    runtime()?.block_on(async {
        let mut client = client(agent).await?;
        let mut calls = Calls::default();
        while !watch.is_over() {
            let begun = Instant::now();
            let done = tokio::time::timeout(PATIENCE, execute(&mut client, vm)).await;
            calls.0.push((begun, begun.elapsed()));
            let failed = match done {
                Ok(done) => done.err(),
                Err(_) => Some(format!("no answer within {PATIENCE:?}")),
            };
            calls.1.extend(failed.map(|why| format!("{vm}: {why}")));
        }
        Ok(calls)
    })
}

/// Calls into the guest that attacks: some of what it does it does to those who call.
fn provoke(agent: &Agent, vm: &str, watch: &Watch) -> Result<(), String> {
    runtime()?.block_on(async {
        let mut client = client(agent).await?;
        while !watch.is_over() {
            // Whatever comes of it.
            let call = execute(&mut client, vm);
            drop(tokio::time::timeout(Duration::from_millis(500), call).await);
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    })
}

/// Looks at the guest as its owner would, all the time.
fn look(agent: &Agent, vm: &str, watch: &Watch) -> Vec<(String, String)> {
    let views: [&[&str]; 7] = [
        &["guest", "status", vm],
        &["vm", "show", vm],
        &["guest", "status", vm, "-o", "json"],
        &["vm", "top", vm, "--once"],
        &["vm", "show", vm, "--history", "1h"],
        &["events", "-o", "json"],
        &["list"],
    ];
    let mut shown = Vec::new();
    for view in views.iter().cycle() {
        if watch.is_over() {
            break;
        }
        let output = agent.ctl().run(view);
        shown.push((view.join(" "), output.stdout + &output.stderr));
        // Every process of ghostctl costs the peers their time too, in all phases alike.
        std::thread::sleep(Duration::from_millis(300));
    }
    shown
}

/// Notes the most memory that the agent has.
fn weigh(pid: u32, watch: &Watch) {
    while !watch.is_over() {
        if let Some(bytes) = resident(pid) {
            watch.memory.fetch_max(bytes, Ordering::Relaxed);
        }
        std::thread::sleep(LOOK);
    }
}

/// `VmRSS` of `proc_pid_status(5)`, in bytes.
fn resident(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().split(' ').next()?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_taken_from_above() {
        let calls = Latencies((1..=200).rev().map(Duration::from_millis).collect());
        assert_eq!(calls.percentile(50), Duration::from_millis(100));
        assert_eq!(calls.percentile(99), Duration::from_millis(198));
        assert_eq!(calls.percentile(100), Duration::from_millis(200));
        assert_eq!(Latencies::default().percentile(99), Duration::ZERO);
    }

    #[test]
    fn a_plan_fills_its_time() {
        let plan = Plan::within(Duration::from_secs(60));
        let count = u32::try_from(Behaviour::ALL.len()).unwrap();
        let all = plan.quiet + (plan.burn + plan.attack) * count;
        assert!(all <= Duration::from_secs(60) && all > Duration::from_secs(59));
        assert!(plan.text().starts_with("burn:"));
        assert!(plan.text().contains(",lies:"));
    }
}
