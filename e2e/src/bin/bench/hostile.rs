//! What one guest that means harm costs the others and the host.

use std::time::Duration;

use ghost_e2e::siege::{self, Plan};

use crate::figures::Failure;
use crate::report::{Budget, Figure, Report, ms, progress};

/// Of the whole siege.
const TIME: Duration = Duration::from_secs(120);

/// Lays siege to an agent of its own, which holds the guest off for less than anybody would have it.
pub(crate) fn measure(report: &mut Report) -> Result<(), Failure> {
    let agent = siege::builder().set("logging.level", "warn").start();
    agent.import_tiny();
    progress("a hostile guest beside two others");
    let outcome = siege::lay(&agent, Plan::within(TIME))?;
    for (what, calls) in [
        ("nobody in the way", &outcome.quiet),
        ("beside a busy guest", &outcome.burning),
        ("beside a hostile guest", &outcome.attacked),
    ] {
        progress(&format!("{what}: {calls}"));
    }
    if let Some(failed) = outcome.failed.first() {
        return Err(format!("a call into another guest failed: {failed}").into());
    }
    report.add(
        Figure::new(
            "exec of `true` beside a hostile guest, p99",
            ms(outcome.attacked.percentile(99)),
            "ms",
        )
        .beside("beside a busy guest", ms(outcome.before()))
        .budget(Budget::Times(2.0)),
    );
    let kib = u32::try_from(outcome.growth() >> 10)?;
    report.add(
        Figure::new(
            "memory that a hostile guest costs the agent",
            f64::from(kib) / 1024.0,
            "MiB",
        )
        .budget(Budget::Most(16.0)),
    );
    Ok(())
}
