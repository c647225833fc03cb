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
//!   ours, field by field: it says the same thing and is the caller's. Where the guest agent is
//!   injected, a boothook stands beside it (see [`super::inject`]), and the program itself is the
//!   file `ghost-guest`.
//! - `user-data`: the caller's bytes, untouched. A MIME multipart around them would have changed
//!   what a script or a template is given, and what a guest without cloud-init reads.
//! - `network-config`: the caller's, or none: cloud-init then brings the first card up with DHCP
//!   in the way of each distribution. A general default could not be written: the renderers of
//!   Debian's ifupdown and of AlmaLinux ignore a match by name or driver.
//!
//! The image depends on its input alone (fixed times, fixed volume id), so writing it again
//! changes nothing.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use fatfs::{
    Date, DateTime, FatType, FileSystem, FormatVolumeOptions, FsOptions, Time, TimeProvider,
};
use ghost_domain::ports::Seed;
use ghost_domain::{Error, Result};
use serde::Serialize;

use super::inject::Injected;
use crate::guest_link::PROGRAM_NAME;

/// FAT12 with room for the largest legal input several times over.
const VOLUME_BYTES: u64 = 2 << 20;
/// FAT12 counts at most 4084 clusters: of this size they hold the largest program too.
const LARGE_CLUSTER: u32 = 8 * 1024;
/// The beginning of a volume, which is written piecemeal: the boot sector, both tables and the root
/// folder lie within.
const HEAD_BYTES: usize = 64 * 1024;
/// What is copied of the program at a time.
const PIECE: usize = 64 * 1024;
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

/// A part of an archive (`#cloud-config-archive`).
#[derive(Serialize)]
struct Part {
    r#type: &'static str,
    content: String,
}

/// The files of a seed, by name, without the program.
fn files(seed: &Seed, injected: Option<&Injected>) -> Result<Vec<(&'static str, String)>> {
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
    let mut vendor_data = Vec::new();
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
        vendor_data.push(Part {
            r#type: "text/cloud-config",
            content: format!("#cloud-config\n{vendor}"),
        });
    }
    if let Some(injected) = injected {
        vendor_data.push(Part {
            r#type: "text/cloud-boothook",
            content: injected.script(),
        });
    }
    match vendor_data.len() {
        0 => {}
        // Each tells by its first line what it is.
        1 => files.extend(vendor_data.pop().map(|part| ("vendor-data", part.content))),
        _ => files.push((
            "vendor-data",
            format!("#cloud-config-archive\n{}", yaml(&vendor_data)?),
        )),
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

/// Writes the volume into a new file.
///
/// # Errors
/// [`ghost_domain::ErrorCode::Internal`] when the texts cannot be made, and what the disk says.
pub(super) fn write(
    seed: &Seed,
    injected: Option<&mut Injected>,
    file: &File,
) -> Result<io::Result<()>> {
    let texts = files(seed, injected.as_deref())?;
    Ok(volume(&texts, injected, file))
}

fn volume(
    files: &[(&'static str, String)],
    injected: Option<&mut Injected>,
    file: &File,
) -> io::Result<()> {
    let program = injected
        .as_ref()
        .map_or(0, |injected| injected.program.size);
    // Only as large as needed: whole mebibytes, and one for what is left over of clusters.
    let size = match program {
        0 => VOLUME_BYTES,
        size => VOLUME_BYTES + (size.div_ceil(1 << 20) << 20) + (1 << 20),
    };
    file.set_len(size)?;
    let mut device = Device::new(file, size);
    let mut format = FormatVolumeOptions::new()
        .fat_type(FatType::Fat12)
        .volume_label(LABEL)
        .volume_id(0x6768_6f73);
    if program > 0 {
        format = format.bytes_per_cluster(LARGE_CLUSTER);
    }
    fatfs::format_volume(&mut device, format)?;
    device.rewind()?;
    {
        let options = FsOptions::new().time_provider(&EPOCH);
        let volume = FileSystem::new(&mut device, options)?;
        let root = volume.root_dir();
        for (name, content) in files {
            let mut file = root.create_file(name)?;
            file.truncate()?;
            file.write_all(content.as_bytes())?;
            file.flush()?;
        }
        if let Some(injected) = injected {
            let mut file = root.create_file(PROGRAM_NAME)?;
            file.truncate()?;
            copy(&mut injected.file, injected.program.size, &mut file)?;
            file.flush()?;
        }
        drop(root);
        volume.unmount()?;
    }
    device.finish()
}

/// Copies the program a piece at a time: it is never held whole.
fn copy(from: &mut File, size: u64, to: &mut impl Write) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut copied = 0;
    loop {
        let count = from.read(&mut piece)?;
        copied += count as u64;
        if count == 0 && copied == size {
            return Ok(());
        }
        if count == 0 || copied > size {
            return Err(io::Error::other(
                "the guest agent's program changed while it was copied",
            ));
        }
        to.write_all(&piece[..count])?;
    }
}

/// A file as a block device: its beginning, where the file system writes a few bytes at a time
/// again and again, is kept in memory until the end.
struct Device<'a> {
    file: &'a File,
    head: Vec<u8>,
    at: u64,
    size: u64,
}

impl<'a> Device<'a> {
    fn new(file: &'a File, size: u64) -> Self {
        Self {
            file,
            head: vec![0; HEAD_BYTES],
            at: 0,
            size,
        }
    }

    /// Where in the head the position lies, if it does.
    fn in_head(&self) -> Option<usize> {
        usize::try_from(self.at).ok().filter(|at| *at < HEAD_BYTES)
    }

    fn left(&self) -> usize {
        usize::try_from(self.size.saturating_sub(self.at)).unwrap_or(usize::MAX)
    }

    fn finish(self) -> io::Result<()> {
        self.file.write_all_at(&self.head, 0)
    }
}

impl Read for Device<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(self.left());
        let count = match self.in_head() {
            Some(at) => {
                let count = wanted.min(HEAD_BYTES - at);
                buffer[..count].copy_from_slice(&self.head[at..at + count]);
                count
            }
            None => self.file.read_at(&mut buffer[..wanted], self.at)?,
        };
        self.at += count as u64;
        Ok(count)
    }
}

impl Write for Device<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let wanted = bytes.len().min(self.left());
        let count = match self.in_head() {
            Some(at) => {
                let count = wanted.min(HEAD_BYTES - at);
                self.head[at..at + count].copy_from_slice(&bytes[..count]);
                count
            }
            None => self.file.write_at(&bytes[..wanted], self.at)?,
        };
        self.at += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Device<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.size.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
