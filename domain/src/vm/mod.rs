//! Virtual machines: what is wanted, what is seen, and what follows from both.

mod record;
mod state;

pub use record::{
    Autostart, CloudInit, DesiredPower, ImageReference, Lifecycle, NetworkInterface, RestartPolicy,
    Vm, VmLimits, VmSpec,
};
pub use state::{
    Denial, Observation, ObservationSource, ObservedPower, Request, ShownState, VmState, decide,
    show,
};
