//! From libvirt's numbers to our words: power states, reasons and lifecycle events.
//!
//! Source: `virDomainState`, its reasons and `virDomainEventType` at
//! <https://libvirt.org/html/libvirt-libvirt-domain.html>.

use ghost_domain::vm::ObservedPower;
use virt::sys;

/// Power and reason.
pub(crate) type Power = (ObservedPower, &'static str);

/// Reads `virDomainGetState`'s pair.
pub(crate) fn of_state(state: u32, reason: u32) -> Power {
    use ObservedPower as P;
    let pick = |names: &[&'static str]| -> &'static str {
        usize::try_from(reason)
            .ok()
            .and_then(|at| names.get(at).copied())
            .unwrap_or("unknown")
    };
    match state {
        sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => (
            P::Running,
            pick(&[
                "unknown",
                "booted",
                "migrated",
                "restored",
                "from_snapshot",
                "unpaused",
                "migration_canceled",
                "save_canceled",
                "wakeup",
                "crashed",
                "postcopy",
                "postcopy_failed",
            ]),
        ),
        sys::VIR_DOMAIN_PAUSED => (
            P::Paused,
            pick(&[
                "unknown",
                "user",
                "migration",
                "save",
                "dump",
                "io_error",
                "watchdog",
                "from_snapshot",
                "shutting_down",
                "snapshot",
                "crashed",
                "starting_up",
                "postcopy",
                "postcopy_failed",
                "api_error",
            ]),
        ),
        sys::VIR_DOMAIN_PMSUSPENDED => (P::Paused, "pm_suspended"),
        sys::VIR_DOMAIN_SHUTDOWN => (P::ShuttingDown, pick(&["unknown", "user"])),
        sys::VIR_DOMAIN_CRASHED => (P::Crashed, pick(&["unknown", "panicked"])),
        // NOSTATE and whatever comes: no driver of ours reports it for a live domain.
        _ => match reason {
            sys::VIR_DOMAIN_SHUTOFF_CRASHED => (P::Crashed, "crashed"),
            _ => (
                P::Off,
                pick(&[
                    "unknown",
                    "shutdown",
                    "destroyed",
                    "crashed",
                    "migrated",
                    "saved",
                    "start_failed",
                    "from_snapshot",
                    "daemon",
                ]),
            ),
        },
    }
}

/// What a lifecycle event means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// Power changed.
    Power {
        /// To what, and why.
        power: Power,
        /// The guest crashed or QEMU died.
        crashed: bool,
    },
    /// Defined or redefined.
    Defined,
    /// Undefined.
    Undefined,
    /// Nothing to us.
    Nothing,
}

/// Reads a lifecycle event.
pub(crate) fn of_event(event: u32, detail: u32) -> Meaning {
    use ObservedPower as P;
    let power = |power, names: &[&'static str]| Meaning::Power {
        power: (
            power,
            usize::try_from(detail)
                .ok()
                .and_then(|at| names.get(at).copied())
                .unwrap_or("unknown"),
        ),
        crashed: false,
    };
    match event {
        sys::VIR_DOMAIN_EVENT_DEFINED => Meaning::Defined,
        sys::VIR_DOMAIN_EVENT_UNDEFINED => Meaning::Undefined,
        sys::VIR_DOMAIN_EVENT_STARTED => power(
            P::Running,
            &[
                "booted",
                "migrated",
                "restored",
                "from_snapshot",
                "wakeup",
                "booted",
            ],
        ),
        sys::VIR_DOMAIN_EVENT_RESUMED => power(
            P::Running,
            &[
                "unpaused",
                "migrated",
                "from_snapshot",
                "postcopy",
                "postcopy_failed",
            ],
        ),
        sys::VIR_DOMAIN_EVENT_SUSPENDED => power(
            P::Paused,
            &[
                "user",
                "migration",
                "io_error",
                "watchdog",
                "restored",
                "from_snapshot",
                "api_error",
                "postcopy",
                "postcopy_failed",
                "shutting_down",
            ],
        ),
        sys::VIR_DOMAIN_EVENT_PMSUSPENDED => Meaning::Power {
            power: (P::Paused, "pm_suspended"),
            crashed: false,
        },
        sys::VIR_DOMAIN_EVENT_SHUTDOWN => power(P::ShuttingDown, &["shutdown", "guest", "user"]),
        sys::VIR_DOMAIN_EVENT_STOPPED => match detail {
            // FAILED is QEMU gone without a word (killed, out of memory, its own fault).
            sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED | sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => {
                Meaning::Power {
                    power: (P::Crashed, "crashed"),
                    crashed: true,
                }
            }
            _ => power(
                P::Off,
                &[
                    "shutdown",
                    "destroyed",
                    "crashed",
                    "migrated",
                    "saved",
                    "failed",
                    "from_snapshot",
                    "recreated",
                ],
            ),
        },
        // The guest panicked; QEMU is still there. With our `on_crash` libvirt ends it next, and
        // that STOPPED event is the one that counts as the crash: one crash, one restart.
        sys::VIR_DOMAIN_EVENT_CRASHED => Meaning::Power {
            power: (P::Crashed, "panicked"),
            crashed: false,
        },
        _ => Meaning::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_crashes_count_as_crashes() {
        for detail in 0..10 {
            let Meaning::Power { crashed, power } = of_event(sys::VIR_DOMAIN_EVENT_STOPPED, detail)
            else {
                panic!("a stop is a change of power");
            };
            let expected = matches!(
                detail,
                sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED | sys::VIR_DOMAIN_EVENT_STOPPED_FAILED
            );
            assert_eq!(crashed, expected, "{detail}");
            assert_eq!(power.0 == ObservedPower::Crashed, expected);
        }
        assert!(matches!(
            of_event(
                sys::VIR_DOMAIN_EVENT_SUSPENDED,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR
            ),
            Meaning::Power {
                power: (ObservedPower::Paused, "io_error"),
                crashed: false
            }
        ));
        assert_eq!(of_event(99, 0), Meaning::Nothing);
    }

    #[test]
    fn states_and_unknown_reasons() {
        assert_eq!(of_state(1, 1), (ObservedPower::Running, "booted"));
        assert_eq!(of_state(3, 5), (ObservedPower::Paused, "io_error"));
        assert_eq!(of_state(5, 2), (ObservedPower::Off, "destroyed"));
        assert_eq!(of_state(5, 3), (ObservedPower::Crashed, "crashed"));
        assert_eq!(of_state(5, 999), (ObservedPower::Off, "unknown"));
        assert_eq!(of_state(4, 0).0, ObservedPower::ShuttingDown);
    }
}
