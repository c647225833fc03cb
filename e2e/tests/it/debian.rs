//! A real Debian 12 with systemd and cloud-init.

use std::fs;
use std::time::Duration;

use ghost_e2e::agent::Builder;
use ghost_e2e::binaries::debian_image;
use ghost_e2e::guest;

use crate::inside;
use crate::support::{sh, show, text, wait_console};

/// Under software emulation on a busy machine the boot takes a minute and more.
const DEBIAN_BOOT: Duration = Duration::from_secs(420);

#[test]
fn debian_is_what_cloud_init_was_told() {
    let _room = guest::room(2);
    let mut agent = Builder::new().start();
    let ctl = agent.ctl();
    let image = debian_image().to_str().unwrap();
    ctl.ok(&["image", "import", image, "--name", "debian-12"]);
    let key = agent.folder().join("key");
    let public = format!("{}.pub", key.display());
    let ssh_there = ["ssh", "ssh-keygen"]
        .iter()
        .all(|tool| std::process::Command::new(tool).arg("-?").output().is_ok());
    if ssh_there {
        sh(
            "ssh-keygen",
            &[
                "-q",
                "-t",
                "ed25519",
                "-N",
                "",
                "-C",
                "e2e",
                "-f",
                key.to_str().unwrap(),
            ],
        );
    } else {
        // Somebody's key, to which nobody has the other half.
        fs::write(
            &public,
            format!(
                "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{} e2e\n",
                "A".repeat(43)
            ),
        )
        .unwrap();
    }
    let user_data = agent.folder().join("user-data");
    fs::write(
        &user_data,
        "#cloud-config\nwrite_files:\n  - path: /etc/ghost-was-here\n    content: written by cloud-init\n\
         runcmd:\n  - [sh, -c, 'echo \"e2e: $(cat /etc/ghost-was-here), keys $(grep -c e2e /home/ada/.ssh/authorized_keys), host $(hostname), user $(id -un ada)\" > /dev/ttyS0']\n",
    )
    .unwrap();
    let vm = agent.name("debian");
    ctl.ok(&[
        "launch",
        "debian-12",
        &vm,
        "--cpus",
        "1",
        "--memory",
        "768MiB",
        "--disk",
        "4GiB",
        "--user",
        "ada",
        "--ssh-key",
        &public,
        "--user-data",
        user_data.to_str().unwrap(),
    ]);
    let address = ctl.ok(&["vm", "wait", &vm, "--for", "address", "--timeout", "300s"]);
    assert_eq!(show(&agent, &vm)["nics"][0]["addresses"][0], address.trim());
    wait_console(
        &agent,
        &vm,
        &format!("e2e: written by cloud-init, keys 1, host {vm}, user ada"),
        DEBIAN_BOOT,
    );
    // The person whose key it is gets in, and may do what an administrator does.
    let ssh = |command: &str| {
        std::process::Command::new("ssh")
            .args([
                "-i",
                key.to_str().unwrap(),
                "-o",
                "StrictHostKeyChecking=no",
            ])
            .args([
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-o",
                "ConnectTimeout=20",
                "-o",
                "BatchMode=yes",
            ])
            .args([&format!("ada@{}", address.trim()), command])
            .output()
    };
    if ssh_there {
        let output = ssh("sudo -n id -u").unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(
            said.trim(),
            "0",
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    } else {
        println!(
            "skipped: logging in needs openssh-client; the key was seen in the guest's own file"
        );
    }
    // The agent came by the seed alone: a stock image, no network, no package.
    ctl.ok(&["vm", "wait", &vm, "--for", "agent", "--timeout", "300s"]);
    ctl.ok(&[
        "vm",
        "wait",
        &vm,
        "--for",
        "cloud-init",
        "--timeout",
        "300s",
    ]);
    let inside = |words: &[&str]| ctl.ok(&[&["exec"], words].concat());
    assert_eq!(
        inside(&[&vm, "--", "cat", "/etc/ghost-was-here"]),
        "written by cloud-init"
    );
    assert_eq!(
        inside(&[
            "-u",
            "ada",
            &vm,
            "--",
            "sh",
            "-c",
            "id -un; pwd; id -G | wc -w"
        ])
        .lines()
        .take(2)
        .collect::<Vec<_>>(),
        ["ada", "/home/ada"]
    );
    assert!(inside(&[&vm, "--", "systemctl", "is-active", "ghost-guest"]).starts_with("active"));
    ctl.ok(&["guest", "freeze", &vm]);
    ctl.ok(&["guest", "thaw", &vm]);
    let secret = "correct horse battery";
    let set = ctl.run_with(
        &["guest", "password", &vm, "ada"],
        format!("{secret}\n").as_bytes(),
    );
    assert_eq!(set.code, 0, "{}", set.stderr);
    assert!(
        inside(&[&vm, "--", "grep", "^ada:[$]", "/etc/shadow"]).starts_with("ada:$"),
        "the password is hashed"
    );
    assert!(!ctl.ok(&["audit", "list"]).contains(secret));
    // What the tiny guest shows, in a guest with systemd.
    inside::much_of_both_streams(&agent, &vm);
    inside::a_timeout_ends_the_whole_group(&agent, &vm);
    inside::a_shell_is_a_terminal(&agent, &vm);
    inside::a_large_file_goes_both_ways(&agent, &vm, "/var/tmp");
    inside::whatever_dies(&mut agent, &vm, DEBIAN_BOOT);
    let ctl = agent.ctl();
    // It was restarted, and its agent answers early in a boot: who hears the power button comes late.
    ctl.run(&[
        "exec",
        &vm,
        "--",
        "systemctl",
        "is-system-running",
        "--wait",
    ]);
    ctl.ok(&["vm", "stop", &vm, "--timeout", "120s"]);
    let stopped = show(&agent, &vm);
    assert_eq!(text(&stopped["state"]), "stopped");
    assert!(
        ctl.ok(&["vm", "logs", &vm]).contains("Power down")
            || ctl.ok(&["vm", "logs", &vm]).contains("reboot: "),
        "it went down by itself"
    );
    ctl.ok(&["vm", "delete", &vm]);
    agent.audit();
}
