//! How hosts and people join with a token, and keep what they prove themselves with.

mod hosts;
mod people;
mod token;

pub use hosts::{EnrollHostCommand, HostEnrolment, HostIdentity, RecoverHostCommand};
pub use people::{PersonEnrolment, PersonIdentity};

#[cfg(test)]
mod tests;
