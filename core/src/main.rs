//! `ghost-core`: joins hosts behind NAT into a fleet.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::SUCCESS
}
