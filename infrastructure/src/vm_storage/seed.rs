//! The NoCloud seed: a small FAT volume labelled `cidata`, written by a library.
//!
//! # Who says what
//! - `meta-data`: `instance-id` (the VM's id, so that cloud-init runs once in a VM's life),
//!   `local-hostname`, and `public-keys`: the caller's SSH keys. Keys from the datasource go to
//!   the default user whatever user-data says, so no merge can lose them.
//! - `vendor-data`: ours, where a user or keys are asked for: `user: {…}` redefines the image's
//!   default user (name, sudo). cloud-init merges vendor-data *below* user-data, and with a `user`
//!   mapping in force it adds the default user to the caller's `users` list
//!   (`normalize_users_groups` in cloud-init), so that both take effect, also where that list
//!   leaves the default user out. Only a `user` mapping in the caller's own cloud-config overrides
//!   ours, field by field: it says the same thing and is the caller's.
//! - `user-data`: the caller's bytes, untouched. A MIME multipart around them would have changed
//!   what a script or a template is given, and what a guest without cloud-init reads.
//! - `network-config`: the caller's, or none: cloud-init then brings the first card up with DHCP
//!   in the way of each distribution. A general default could not be written: the renderers of
//!   Debian's ifupdown and of AlmaLinux ignore a match by name or driver.
//!
//! The image depends on its input alone (fixed times, fixed volume id), so writing it again
//! changes nothing.

use std::io::{Cursor, Write};

use fatfs::{
    Date, DateTime, FatType, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider,
};
use ghost_domain::ports::Seed;
use ghost_domain::{Error, Result};
use serde::Serialize;

/// FAT12 with room for the largest legal input several times over.
const VOLUME_BYTES: usize = 2 << 20;
/// Lower case is what the oldest cloud-init looks for; newer take both.
const LABEL: [u8; 11] = *b"cidata     ";

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct MetaData<'a> {
    instance_id: String,
    local_hostname: &'a str,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    public_keys: &'a [String],
}

#[derive(Serialize)]
struct VendorData<'a> {
    user: DefaultUser<'a>,
}

#[derive(Serialize)]
struct DefaultUser<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lock_passwd: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sudo: Option<[&'a str; 1]>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    ssh_authorized_keys: &'a [String],
}

/// The files of a seed, by name.
pub(super) fn files(seed: &Seed) -> Result<Vec<(&'static str, String)>> {
    let cloud_init = &seed.cloud_init;
    let keys = cloud_init.ssh_authorized_keys.as_slice();
    let mut files = vec![
        (
            "meta-data",
            yaml(&MetaData {
                instance_id: seed.vm.to_string(),
                local_hostname: seed.hostname.as_str(),
                public_keys: keys,
            })?,
        ),
        (
            "user-data",
            cloud_init
                .user_data
                .clone()
                .unwrap_or_else(|| "#cloud-config\n{}\n".to_owned()),
        ),
    ];
    if cloud_init.user.is_some() || !keys.is_empty() {
        let vendor = yaml(&VendorData {
            user: DefaultUser {
                name: cloud_init.user.as_deref(),
                lock_passwd: cloud_init.user.is_some().then_some(true),
                sudo: cloud_init
                    .user
                    .is_some()
                    .then_some(["ALL=(ALL) NOPASSWD:ALL"]),
                ssh_authorized_keys: keys,
            },
        })?;
        files.push(("vendor-data", format!("#cloud-config\n{vendor}")));
    }
    if let Some(network) = &cloud_init.network_config {
        files.push(("network-config", network.clone()));
    }
    Ok(files)
}

/// Strings that YAML 1.1 (cloud-init's reader) takes for numbers, dates or booleans are quoted by
/// the writer: `on`, `2024-01-01` and `1e3` are legal VM names.
fn yaml(value: &impl Serialize) -> Result<String> {
    serde_saphyr::to_string(value)
        .map_err(|error| Error::internal(format!("the seed could not be written: {error}")))
}

/// A clock that stands still: the image must not depend on when it was written.
#[derive(Debug)]
struct Epoch;

impl TimeProvider for Epoch {
    fn get_current_date(&self) -> Date {
        // FAT's calendar starts here.
        Date {
            year: 1980,
            month: 1,
            day: 1,
        }
    }

    fn get_current_date_time(&self) -> DateTime {
        DateTime {
            date: self.get_current_date(),
            time: Time {
                hour: 0,
                min: 0,
                sec: 0,
                millis: 0,
            },
        }
    }
}

static EPOCH: Epoch = Epoch;

/// The bytes of the seed volume.
///
/// # Errors
/// [`ghost_domain::ErrorCode::Internal`] when the input does not fit, which the limits on
/// user-data rule out.
pub(super) fn image(seed: &Seed) -> Result<Vec<u8>> {
    volume(&files(seed)?)
        .map_err(|error| Error::internal(format!("the seed could not be written: {error}")))
}

fn volume(files: &[(&'static str, String)]) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; VOLUME_BYTES];
    fatfs::format_volume(
        Cursor::new(&mut bytes),
        FormatVolumeOptions::new()
            .fat_type(FatType::Fat12)
            .volume_label(LABEL)
            .volume_id(0x6768_6f73),
    )?;
    {
        let options = FsOptions::new().time_provider(&EPOCH);
        let volume = FileSystem::new(Cursor::new(&mut bytes), options)?;
        let root = volume.root_dir();
        for (name, content) in files {
            let mut file = root.create_file(name)?;
            file.truncate()?;
            file.write_all(content.as_bytes())?;
            file.flush()?;
        }
        drop(root);
        volume.unmount()?;
    }
    Ok(bytes)
}
