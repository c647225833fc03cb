//! Files in a guest.

use std::sync::Arc;

use async_trait::async_trait;
use ghost_domain::guest::{
    DirectoryMake, FileSum, FileWrite, GuestDirectory, GuestFile, LinkMake, check_guest_path,
    check_link_target,
};
use ghost_domain::ports::{GuestFileReader, GuestFileWriter};
use ghost_domain::{Principal, Result};

use super::door::{Door, Visit, failed};
use super::{GuestTarget, detail};

/// Looks at a file in a guest.
pub struct StatGuestFile {
    pub(crate) door: Arc<Door>,
}

impl StatGuestFile {
    /// What is at `path`; a symbolic link itself unless `follow`.
    ///
    /// # Errors
    /// `InvalidArgument`, `GuestFileNotFound`, `GuestPathDenied`, and those of every call into a
    /// guest (see [`super::ExecInGuest`]).
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        path: &str,
        follow: bool,
    ) -> Result<GuestFile> {
        check_guest_path(path)?;
        let visit = self
            .door
            .enter(principal, target, "file_stat", detail::word(path))
            .await?;
        let outcome = self.door.ports.guests.stat(visit.vm, path, follow).await;
        visit.settle(outcome)
    }
}

/// Which part of a directory.
#[derive(Clone, Debug, Default)]
pub struct ListGuestFilesCommand {
    /// Absolute path.
    pub path: String,
    /// Only names after this one.
    pub after: String,
    /// At most so many; 0 takes 1,000, the most.
    pub limit: u32,
}

/// Lists a directory in a guest.
pub struct ListGuestFiles {
    pub(crate) door: Arc<Door>,
}

impl ListGuestFiles {
    /// A page, by name.
    ///
    /// # Errors
    /// As [`StatGuestFile`].
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        command: ListGuestFilesCommand,
    ) -> Result<GuestDirectory> {
        const MOST: u32 = 1000;
        check_guest_path(&command.path)?;
        let limit = match command.limit {
            0 => MOST,
            limit => limit.min(MOST),
        };
        let visit = self
            .door
            .enter(principal, target, "file_list", detail::word(&command.path))
            .await?;
        let outcome = self
            .door
            .ports
            .guests
            .list(visit.vm, &command.path, &command.after, limit)
            .await;
        visit.settle(outcome)
    }
}

/// Makes a directory in a guest.
pub struct MakeGuestDirectory {
    pub(crate) door: Arc<Door>,
}

impl MakeGuestDirectory {
    /// Makes it; succeeds where it is there.
    ///
    /// # Errors
    /// As [`StatGuestFile`].
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        directory: DirectoryMake,
    ) -> Result<()> {
        check_guest_path(&directory.path)?;
        let visit = self
            .door
            .enter(
                principal,
                target,
                "directory_make",
                detail::make(&directory),
            )
            .await?;
        let outcome = self
            .door
            .ports
            .guests
            .make_directory(visit.vm, directory)
            .await;
        visit.settle(outcome)
    }
}

/// Makes a symbolic link in a guest.
pub struct MakeGuestLink {
    pub(crate) door: Arc<Door>,
}

impl MakeGuestLink {
    /// Makes it, in the place of a file or link that is there.
    ///
    /// # Errors
    /// As [`StatGuestFile`].
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        link: LinkMake,
    ) -> Result<()> {
        check_guest_path(&link.path)?;
        check_link_target(&link.target)?;
        let visit = self
            .door
            .enter(principal, target, "link_make", detail::link(&link))
            .await?;
        let outcome = self.door.ports.guests.make_link(visit.vm, link).await;
        visit.settle(outcome)
    }
}

/// Which part of a file.
#[derive(Clone, Debug, Default)]
pub struct ReadGuestFileCommand {
    /// Absolute path.
    pub path: String,
    /// From here on.
    pub offset: u64,
    /// So many bytes; `None`: to the end.
    pub length: Option<u64>,
}

/// Reads a file of a guest.
pub struct ReadGuestFile {
    pub(crate) door: Arc<Door>,
}

impl ReadGuestFile {
    /// Opens it. The audit log gets its second line when the reader came to the end or is dropped.
    ///
    /// # Errors
    /// As [`StatGuestFile`].
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        command: ReadGuestFileCommand,
    ) -> Result<(GuestFile, Box<dyn GuestFileReader>)> {
        let ReadGuestFileCommand {
            path,
            offset,
            length,
        } = command;
        check_guest_path(&path)?;
        let mut visit = self
            .door
            .enter_early(principal, target, "file_read", detail::word(&path))
            .await?;
        let opened = self
            .door
            .ports
            .guests
            .read_file(visit.vm, &path, offset, length)
            .await;
        // The disk was given the line while the guest opened the file, which costs as long. Where
        // that failed, the call is ended by dropping its reader.
        if let Err(error) = visit.logged().await {
            return Err(visit.fail(error));
        }
        let (file, inner) = match opened {
            Ok(opened) => opened,
            Err(error) => return Err(visit.fail(error)),
        };
        if let Err(error) = visit.recheck() {
            return Err(visit.fail(error));
        }
        let reader = WatchedReader {
            inner,
            visit: Some(visit),
            received: 0,
        };
        Ok((file, Box::new(reader)))
    }
}

struct WatchedReader {
    inner: Box<dyn GuestFileReader>,
    visit: Option<Visit>,
    received: u64,
}

impl WatchedReader {
    fn end(&mut self, outcome: String) {
        if let Some(visit) = self.visit.take() {
            visit.end(outcome, 0, self.received);
        }
    }
}

#[async_trait]
impl GuestFileReader for WatchedReader {
    async fn read(&mut self) -> Result<Vec<u8>> {
        let data = self.inner.read().await;
        match &data {
            Ok(data) if data.is_empty() => self.end("ok".into()),
            Ok(data) => self.received += data.len() as u64,
            Err(error) => self.end(failed(error)),
        }
        data
    }

    fn sum(&self) -> Option<FileSum> {
        self.inner.sum()
    }
}

impl Drop for WatchedReader {
    fn drop(&mut self) {
        self.end("cancelled".into());
    }
}

/// Writes a file in a guest.
pub struct WriteGuestFile {
    pub(crate) door: Arc<Door>,
}

impl WriteGuestFile {
    /// Begins to write. The audit log gets its second line when the writer is finished or dropped.
    ///
    /// # Errors
    /// `InvalidArgument`, `GuestPathDenied`, and those of every call into a guest (see
    /// [`super::ExecInGuest`]).
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        file: FileWrite,
    ) -> Result<Box<dyn GuestFileWriter>> {
        check_guest_path(&file.path)?;
        let mut visit = self
            .door
            .enter_early(principal, target, "file_write", detail::write(&file))
            .await?;
        let opened = self.door.ports.guests.write_file(visit.vm, file).await;
        // As for reading: so far the guest has made a temporary file, and no byte was sent.
        if let Err(error) = visit.logged().await {
            return Err(visit.fail(error));
        }
        let inner = match opened {
            Ok(inner) => inner,
            Err(error) => return Err(visit.fail(error)),
        };
        if let Err(error) = visit.recheck() {
            return Err(visit.fail(error));
        }
        Ok(Box::new(WatchedWriter {
            inner: Some(inner),
            visit: Some(visit),
            sent: 0,
        }))
    }
}

struct WatchedWriter {
    /// Taken by `finish`.
    inner: Option<Box<dyn GuestFileWriter>>,
    visit: Option<Visit>,
    sent: u64,
}

impl WatchedWriter {
    fn end(&mut self, outcome: String) {
        if let Some(visit) = self.visit.take() {
            visit.end(outcome, self.sent, 0);
        }
    }
}

#[async_trait]
impl GuestFileWriter for WatchedWriter {
    fn offset(&self) -> u64 {
        self.inner.as_ref().map_or(0, |inner| inner.offset())
    }

    async fn write(&mut self, data: Vec<u8>) -> Result<()> {
        let length = data.len() as u64;
        let Some(inner) = &mut self.inner else {
            return Err(ghost_domain::Error::internal("written after the end"));
        };
        let outcome = inner.write(data).await;
        match &outcome {
            Ok(()) => self.sent += length,
            Err(error) => self.end(failed(error)),
        }
        outcome
    }

    async fn finish(mut self: Box<Self>) -> Result<FileSum> {
        let Some(inner) = self.inner.take() else {
            return Err(ghost_domain::Error::internal("finished twice"));
        };
        let outcome = inner.finish().await;
        match &outcome {
            Ok(_) => self.end("ok".into()),
            Err(error) => self.end(failed(error)),
        }
        outcome
    }
}

impl Drop for WatchedWriter {
    fn drop(&mut self) {
        self.end("cancelled".into());
    }
}
