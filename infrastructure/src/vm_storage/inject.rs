//! The guest agent in the seed: its program as a file of the volume, and the part of vendor-data
//! that installs it.
//!
//! That part is a boothook: cloud-init runs it in its `init` stage, before packages, users' scripts
//! and most services, and, unlike a script, at every boot, so that an installation which failed is
//! tried again (`cloudinit/handlers/boot_hook.py`). It stands beside our cloud-config in a
//! `#cloud-config-archive`, which all releases of cloud-init take for vendor-data as they do for
//! user-data (`cloudinit/user_data.py`).
//!
//! The shell sees nothing that a person chose: a checksum and one fixed word go into the script.

use std::fs::File;

use ghost_domain::Result;
use ghost_domain::guest::GuestInject;
use ghost_domain::ports::GuestProgramFile;

use crate::guest_link::{GuestProgram, missing_program};
use ghost_domain::{Error, ErrorCode};

const SCRIPT: &str = include_str!("inject.sh");

/// The program that a seed carries.
#[derive(Debug)]
pub(super) struct Injected {
    pub(super) program: GuestProgramFile,
    pub(super) file: File,
    inject: GuestInject,
}

impl Injected {
    /// What a seed carries; nothing where it shall not, or, in the way `auto`, where this host has
    /// no program.
    ///
    /// # Errors
    /// `IoFailed` in the way `always`, without a program.
    pub(super) fn find(inject: GuestInject, program: &GuestProgram) -> Result<Option<Self>> {
        if inject == GuestInject::Never {
            return Ok(None);
        }
        let error = match program.open() {
            Ok(Some((program, file))) => {
                return Ok(Some(Self {
                    program,
                    file,
                    inject,
                }));
            }
            Ok(None) => missing_program(program),
            Err(error) => Error::new(
                ErrorCode::IoFailed,
                "the program of the guest agent cannot be read",
            )
            .because(error),
        };
        if inject == GuestInject::Always {
            return Err(error.hint(
                "install the package ghost-guest on this host, or create the VM with guest.inject auto or never",
            ));
        }
        tracing::warn!(%error, "a VM is made without the guest agent");
        Ok(None)
    }

    /// The boothook.
    pub(super) fn script(&self) -> String {
        script(&self.program.sha256, self.inject)
    }
}

fn script(sha256: &[u8; 32], inject: GuestInject) -> String {
    let words = if inject == GuestInject::Always {
        "--force"
    } else {
        ""
    };
    let body = SCRIPT.strip_prefix("#!/bin/sh\n").unwrap_or(SCRIPT);
    format!(
        "#cloud-boothook\n#!/bin/sh\nGHOST_GUEST_SHA256={}\nGHOST_GUEST_INSTALL={words}\n{body}",
        hex::encode(sha256)
    )
}
