//! Files made so that a power cut, a full disk or a dropped future leaves no half of them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ghost_domain::{Error, ErrorCode, Result};
use rustix::fs::OFlags;
use tokio::sync::Semaphore;

/// `O_NOFOLLOW`: a link that somebody put in our folder is an error, never a way out of it.
pub(crate) fn no_follow() -> i32 {
    // The flag word fits: every open(2) flag of Linux lies below 2^31.
    i32::try_from((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits()).unwrap_or(0)
}

/// Maps an input or output error to ours; `doing` completes "cannot …".
pub(crate) fn io_error(doing: &str, path: &Path, error: &io::Error) -> Error {
    let message = format!("cannot {doing} {}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::new(ErrorCode::DiskFull, message)
                .because("the file system is full")
                .hint("delete VMs or images that are not needed (ghostctl image list), or enlarge the file system")
        }
        io::ErrorKind::FileTooLarge => Error::new(ErrorCode::ImageTooLarge, message)
            .because("the file would exceed its size limit"),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::new(ErrorCode::IoFailed, message)
                .because(error)
                .hint("check the folder with: ghost-agent doctor")
        }
        _ => Error::new(ErrorCode::IoFailed, message).because(error),
    }
}

/// Makes a folder (and its parents) that QEMU's user can pass through but not list. One that is
/// there keeps its mode.
pub(crate) fn make_passable_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o711)
        .create(path)?;
    // The umask took bits away from `mode`.
    fs::set_permissions(path, fs::Permissions::from_mode(0o711))?;
    if let Some(parent) = path.parent() {
        sync_folder(parent)?;
    }
    Ok(())
}

/// A new file of mode 0600 that must not exist.
pub(crate) fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(no_follow())
        .open(path)
}

/// Opens for reading, not through a link.
pub(crate) fn open_plain(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(no_follow())
        .open(path)
}

/// Makes a folder's entries durable.
pub(crate) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Removes a file; none there is success.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Puts a finished file in its place: durable content, final mode, rename, durable name (F17).
pub(crate) fn publish(file: &File, from: &Path, to: &Path, mode: u32) -> io::Result<()> {
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()?;
    fs::rename(from, to)?;
    to.parent().map_or(Ok(()), sync_folder)
}

/// Writes a small file whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = TemporaryFile::at(PathBuf::from(name))?;
    (&temporary.file).write_all(bytes)?;
    temporary.publish(path, mode)
}

/// A file that is removed unless it is published.
#[derive(Debug)]
pub(crate) struct TemporaryFile {
    pub(crate) file: File,
    path: PathBuf,
    kept: bool,
}

impl TemporaryFile {
    /// Makes one, replacing what an earlier crash left.
    pub(crate) fn at(path: PathBuf) -> io::Result<Self> {
        remove_if_there(&path)?;
        Ok(Self {
            file: create_new(&path)?,
            path,
            kept: false,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes over a file that is there.
    pub(crate) fn existing(path: PathBuf) -> io::Result<Self> {
        Ok(Self {
            file: open_plain(&path)?,
            path,
            kept: false,
        })
    }

    pub(crate) fn publish(mut self, to: &Path, mode: u32) -> io::Result<()> {
        publish(&self.file, &self.path, to, mode)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = remove_if_there(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "a temporary file stays behind until the next start");
        }
    }
}

/// Removes a file when dropped.
#[derive(Debug)]
pub(crate) struct RemoveOnDrop(pub(crate) PathBuf);

impl RemoveOnDrop {
    /// Opens the file, which some tool made meanwhile, and hands the duty to remove it on.
    pub(crate) fn open(mut self) -> io::Result<TemporaryFile> {
        let file = open_plain(&self.0)?;
        Ok(TemporaryFile {
            file,
            // What is left here is an empty path, which names no file.
            path: std::mem::take(&mut self.0),
            kept: false,
        })
    }
}

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        if let Err(error) = remove_if_there(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "a staging file stays behind until the next start");
        }
    }
}

/// Writes bytes at `offset`, leaving holes where whole blocks are zero. The caller sets the
/// length at the end: a hole at the end is not written at all.
pub(crate) fn write_sparse(file: &File, data: &[u8], offset: u64) -> io::Result<()> {
    const BLOCK: usize = 4096;
    let mut at = 0;
    // The file must be new and growing: a skipped block is zero only because nothing was there.
    while at < data.len() {
        let to_boundary = BLOCK - usize::try_from((offset + at as u64) % BLOCK as u64).unwrap_or(0);
        let mut end = (at + to_boundary).min(data.len());
        if data[at..end].iter().any(|byte| *byte != 0) {
            // One write for a run of blocks with content.
            while end < data.len() {
                let next = (end + BLOCK).min(data.len());
                if data[end..next].iter().all(|byte| *byte == 0) {
                    break;
                }
                end = next;
            }
            file.write_all_at(&data[at..end], offset + at as u64)?;
        }
        at = end;
    }
    Ok(())
}

/// Tells blocking work that nobody waits for it any more.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancellation(Arc<AtomicBool>);

impl Cancellation {
    pub(crate) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorCode::Cancelled, "the work was given up"));
        }
        Ok(())
    }
}

/// Cancels when dropped; lives in the future that waits.
#[derive(Debug, Default)]
pub(crate) struct CancelOnDrop(Cancellation);

impl CancelOnDrop {
    pub(crate) fn cancellation(&self) -> Cancellation {
        self.0.clone()
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Storage that hangs takes the threads that touch it with it; more than these are never lost.
static QUICK: Semaphore = Semaphore::const_new(8);
/// Hashing and decompression fill a core each.
static LONG: Semaphore = Semaphore::const_new(4);
/// For work of milliseconds on a disk that answers at all.
const QUICK_DEADLINE: Duration = Duration::from_secs(30);

/// Runs short blocking work off the executor; it ends by itself or by a deadline.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&Cancellation) -> Result<T> + Send + 'static,
) -> Result<T> {
    within(QUICK_DEADLINE, work).await
}

async fn within<T: Send + 'static>(
    deadline: Duration,
    work: impl FnOnce(&Cancellation) -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::time::timeout(deadline, run(&QUICK, work)).await {
        Ok(result) => result,
        Err(_) => Err(Error::new(
            ErrorCode::DeadlineExceeded,
            "the host's storage does not answer",
        )
        .because(format!("{} s have passed", deadline.as_secs()))
        .hint("look at the disks of the host: dmesg, and ghost-agent doctor")),
    }
}

/// Runs blocking work of seconds to minutes off the executor; it is told when the caller goes.
pub(crate) async fn blocking_long<T: Send + 'static>(
    work: impl FnOnce(&Cancellation) -> Result<T> + Send + 'static,
) -> Result<T> {
    run(&LONG, work).await
}

async fn run<T: Send + 'static>(
    threads: &'static Semaphore,
    work: impl FnOnce(&Cancellation) -> Result<T> + Send + 'static,
) -> Result<T> {
    let guard = CancelOnDrop::default();
    let cancellation = guard.cancellation();
    let permit = threads
        .acquire()
        .await
        .map_err(|_| Error::internal("the file workers are gone"))?;
    let worker = tokio::task::spawn_blocking(move || {
        // Held by the thread, not by the future: a hanging thread counts until it is free again.
        let _permit = permit;
        work(&cancellation)
    });
    match worker.await {
        Ok(result) => result,
        Err(error) => Err(Error::internal(format!("a file worker failed: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn zero_blocks_take_no_space_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let temporary = TemporaryFile::at(folder.path().join("f")).unwrap();
        let mut data = vec![0u8; 1 << 20];
        data[500_000] = 7;
        write_sparse(&temporary.file, &data, 0).unwrap();
        temporary.file.set_len(data.len() as u64).unwrap();
        assert_eq!(fs::read(temporary.path()).unwrap(), data);
        assert!(temporary.file.metadata().unwrap().blocks() * 512 <= 64 * 1024);
    }

    #[test]
    fn an_unpublished_file_goes_away() {
        let folder = tempfile::tempdir().unwrap();
        drop(TemporaryFile::at(folder.path().join("f")).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("target"), "secret").unwrap();
        std::os::unix::fs::symlink("target", folder.path().join("link")).unwrap();
        assert!(open_plain(&folder.path().join("link")).is_err());
        assert!(create_new(&folder.path().join("link")).is_err());
    }

    #[tokio::test]
    async fn work_that_hangs_ends_by_the_deadline_and_is_told() {
        let (told, heard) = tokio::sync::oneshot::channel();
        let result: Result<()> = within(Duration::from_millis(20), move |cancellation| {
            while cancellation.check().is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
            let _ = told.send(());
            Ok(())
        })
        .await;
        assert_eq!(result.unwrap_err().code(), ErrorCode::DeadlineExceeded);
        heard.await.unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn sparse_writing_keeps_every_byte(
            chunks in proptest::collection::vec((0u8..2, 1usize..9000), 1..8),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let temporary = TemporaryFile::at(folder.path().join("f")).unwrap();
            let mut whole = Vec::new();
            for (value, length) in chunks {
                let chunk = vec![value; length];
                write_sparse(&temporary.file, &chunk, whole.len() as u64).unwrap();
                whole.extend_from_slice(&chunk);
            }
            temporary.file.set_len(whole.len() as u64).unwrap();
            prop_assert_eq!(fs::read(temporary.path()).unwrap(), whole);
        }
    }
}
