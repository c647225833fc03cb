//! What Core makes of whatever a host sends it on its control stream, and of a token.

use ghost_core::application::desk::FromHost;
use ghost_core::infrastructure::listener::from_host;
use ghost_proto::core::v1::link_message::Kind;

/// One message of a host: whatever it says is bounded and drives no terminal.
pub fn take(kind: Kind) {
    let Ok(taken) = from_host(kind) else {
        return;
    };
    match taken {
        FromHost::Hello(hello) => {
            clean(&hello.agent_version, 64);
            clean(&hello.instance, 64);
            assert!(["link", "piko", "direct"].contains(&hello.carrier.as_str()));
            assert!(hello.direct_addresses.len() <= 16);
            for (provider, address) in &hello.direct_addresses {
                clean(provider, 32);
                assert!(address.parse::<std::net::SocketAddr>().is_ok());
            }
            for text in [
                &hello.facts.hostname,
                &hello.facts.operating_system,
                &hello.facts.kernel,
                &hello.facts.cpu_model,
                &hello.facts.boot_id,
                &hello.facts.accelerator,
                &hello.facts.hypervisor_version,
                &hello.facts.libvirt_version,
            ] {
                clean(text, 253);
            }
        }
        FromHost::Heartbeat(beat) => {
            assert!((0.0..=1e6).contains(&beat.load_one_minute));
            assert!(beat.link.round_trip.as_secs() <= 3600);
            clean(&beat.link.last_loss, 512);
            clean(&beat.health.agent_state, 16);
            assert!(beat.health.warnings.len() <= 16);
            for warning in &beat.health.warnings {
                clean(warning, 800);
            }
            for vm in &beat.vms {
                clean(&vm.name, 128);
                clean(&vm.state_reason, 512);
                clean(&vm.image, 128);
                assert!(vm.addresses.len() <= 16 && vm.tags.len() <= 64);
                for address in &vm.addresses {
                    clean(address, 64);
                }
                for (key, value) in &vm.tags {
                    clean(key, 128);
                    clean(value, 1024);
                }
                if let Some(owner) = &vm.owner {
                    clean(owner, 256);
                }
            }
        }
        FromHost::Outcome(outcome) => clean(&outcome.message, 800),
        FromHost::Goodbye { code, message } => {
            clean(&code, 128);
            clean(&message, 512);
        }
        FromHost::Ping(_) | FromHost::Pong(_) => {}
    }
}

fn clean(text: &str, most: usize) {
    assert!(text.len() <= most, "{} bytes, at most {most}", text.len());
    assert!(
        !text.chars().any(|c| c.is_control() || c == '\u{202e}'),
        "{text:?}"
    );
}
