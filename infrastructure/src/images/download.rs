//! Downloads over http(s): resumed where an earlier one broke off, retried on network faults,
//! bounded in size and in silence.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ghost_domain::ports::ProgressSink;
use ghost_domain::{ByteSize, Error, ErrorCode, Progress, Result};
use rand::Rng;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_RANGE, ETAG, HeaderMap, IF_RANGE, LAST_MODIFIED, LOCATION, RANGE,
};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;

use super::address::{self, PrivateAddress, PublicOnly, Route};
use super::files::{io_error, no_follow, remove_if_there, write_whole};
use super::progress::Meter;

const MAX_REDIRECTS: usize = 10;
/// Bounds a server that always breaks off after a few bytes more.
const MAX_ATTEMPTS: u32 = 200;
/// Published checksum lists have some kilobytes.
const MAX_LIST: usize = 1 << 20;
/// Kept free of every download: a full file system hurts more than a refused image.
const KEEP_FREE: u64 = 64 << 20;

/// Patience of a download.
#[derive(Clone, Copy, Debug)]
pub struct DownloadOptions {
    /// For a connection, TLS included.
    pub connect_timeout: Duration,
    /// For the next byte.
    pub stall_timeout: Duration,
    /// Attempts in a row that brought nothing, before it is given up.
    pub attempts: u32,
    /// Pause after the first failed attempt; doubles each time.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
}

impl Default for DownloadOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(30),
            attempts: 6,
            first_pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(15),
        }
    }
}

/// A file that grows by downloads, and what is known of it beside it.
#[derive(Clone, Debug)]
pub(super) struct Partial {
    pub(super) path: PathBuf,
}

/// What the server said of the file that the partial is the start of.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Validators {
    etag: Option<String>,
    last_modified: Option<String>,
    total: Option<u64>,
}

impl Validators {
    fn of(headers: &HeaderMap, total: Option<u64>) -> Self {
        let text = |name| {
            headers
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        Self {
            etag: text(ETAG),
            last_modified: text(LAST_MODIFIED),
            total,
        }
    }

    /// For `If-Range`: a strong entity tag, or else a date (RFC 9110 section 13.1.5).
    fn if_range(&self) -> Option<&str> {
        self.etag
            .as_deref()
            .filter(|tag| tag.starts_with('"'))
            .or(self.last_modified.as_deref())
    }
}

impl Partial {
    pub(super) fn sidecar(&self) -> PathBuf {
        self.path.with_extension("json")
    }

    fn length(&self) -> Result<u64> {
        match std::fs::symlink_metadata(&self.path) {
            Ok(metadata) => Ok(metadata.len()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(io_error("read", &self.path, &error)),
        }
    }

    fn validators(&self) -> Validators {
        std::fs::read(self.sidecar())
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default()
    }

    pub(super) fn remove(&self) -> Result<()> {
        remove_if_there(&self.path)
            .and_then(|()| remove_if_there(&self.sidecar()))
            .map_err(|error| io_error("remove", &self.path, &error))
    }
}

/// Counts failed attempts and waits between them.
struct Patience {
    options: DownloadOptions,
    attempts: u32,
    in_vain: u32,
}

impl Patience {
    fn new(options: DownloadOptions) -> Self {
        Self {
            options,
            attempts: 0,
            in_vain: 0,
        }
    }

    /// Waits before the next attempt; `brought` says that the last one brought bytes.
    ///
    /// # Errors
    /// The failure, when it is final or patience has ended.
    async fn pause(
        &mut self,
        failure: Failure,
        brought: bool,
        sink: &dyn ProgressSink,
    ) -> Result<()> {
        let error = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Passing(error) => error,
        };
        self.attempts += 1;
        self.in_vain = if brought { 1 } else { self.in_vain + 1 };
        if self.in_vain >= self.options.attempts || self.attempts >= MAX_ATTEMPTS {
            return Err(error);
        }
        let doubled = self
            .options
            .first_pause
            .saturating_mul(1 << (self.in_vain - 1).min(16));
        // Half to full: hosts that failed together do not come back together.
        let jitter = rand::rng().random_range(0.5..=1.0);
        let pause = doubled.min(self.options.longest_pause).mul_f64(jitter);
        tracing::info!(%error, pause_ms = pause.as_millis(), "the download is tried again");
        sink.report(Progress::waiting("downloading", "the network"));
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// Why an attempt failed.
enum Failure {
    /// Trying again may help.
    Passing(Error),
    /// It will not.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

struct Clients {
    loopback: Client,
    chosen: Client,
    guarded: Client,
}

/// Downloads files.
pub(super) struct Downloader {
    options: DownloadOptions,
    // Made at the first download: the trust roots take memory that an idle agent need not have.
    clients: OnceLock<Result<Clients>>,
}

fn failed(what: impl Into<String>) -> Error {
    Error::new(ErrorCode::DownloadFailed, what)
}

/// An error with all of its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        next = error.source();
    }
    text
}

fn is_private(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<PrivateAddress>() {
            return true;
        }
        next = error.source();
    }
    false
}

fn network(url: &Url, error: &reqwest::Error) -> Failure {
    let host = url.host_str().unwrap_or("the server");
    let told = failed(format!("the download from {host} failed"))
        .because(chain(error))
        .hint("check the network and the address, then pull again: it goes on where it stopped");
    if is_private(error) || error.is_builder() {
        Failure::Final(told)
    } else {
        Failure::Passing(told)
    }
}

impl Downloader {
    pub(super) fn new(options: DownloadOptions) -> Self {
        Self {
            options,
            clients: OnceLock::new(),
        }
    }

    fn build(&self) -> Result<Clients> {
        let builder = || {
            Client::builder()
                .redirect(Policy::none())
                .connect_timeout(self.options.connect_timeout)
                .read_timeout(self.options.stall_timeout)
                .user_agent(concat!("ghost-agent/", env!("CARGO_PKG_VERSION")))
        };
        let built = |client: reqwest::Result<Client>| {
            client.map_err(|error| {
                failed("no TLS client can be made")
                    .because(chain(&error))
                    .hint("install the certificate authorities: apt-get install ca-certificates")
            })
        };
        Ok(Clients {
            loopback: built(builder().no_proxy().build())?,
            chosen: built(builder().build())?,
            guarded: built(builder().dns_resolver(Arc::new(PublicOnly)).build())?,
        })
    }

    fn client(&self, route: Route) -> Result<&Client> {
        let clients = self
            .clients
            .get_or_init(|| self.build())
            .as_ref()
            .map_err(Clone::clone)?;
        Ok(match route {
            Route::Loopback => &clients.loopback,
            Route::Chosen => &clients.chosen,
            Route::Guarded => &clients.guarded,
        })
    }

    /// One GET, redirects followed by our rules.
    async fn get(&self, url: &str, headers: &HeaderMap) -> Result<Response, Failure> {
        let (first, first_route) = address::start(url)?;
        let (mut next, mut route) = (first.clone(), first_route);
        for _ in 0..=MAX_REDIRECTS {
            let response = self
                .client(route)?
                .get(next.clone())
                .headers(headers.clone())
                .header(ACCEPT_ENCODING, "identity")
                .send()
                .await
                .map_err(|error| network(&next, &error))?;
            let target = match response.status() {
                StatusCode::MOVED_PERMANENTLY
                | StatusCode::FOUND
                | StatusCode::SEE_OTHER
                | StatusCode::TEMPORARY_REDIRECT
                | StatusCode::PERMANENT_REDIRECT => response.headers().get(LOCATION),
                _ => return Ok(response),
            };
            let target = target
                .and_then(|target| target.to_str().ok())
                .and_then(|target| next.join(target).ok())
                .ok_or_else(|| failed("the server redirects to nowhere"))?;
            route = address::redirect(&first, first_route, &target)?;
            next = target;
        }
        Err(failed("the server redirects in circles").into())
    }

    /// A small text, such as a list of checksums.
    pub(super) async fn text(&self, url: &str, sink: &dyn ProgressSink) -> Result<String> {
        let mut patience = Patience::new(self.options);
        loop {
            match self.text_once(url).await {
                Ok(text) => return Ok(text),
                Err(failure) => patience.pause(failure, false, sink).await?,
            }
        }
    }

    async fn text_once(&self, url: &str) -> Result<String, Failure> {
        let mut response = success(self.get(url, &HeaderMap::new()).await?)?;
        let from = response.url().clone();
        let mut bytes = Vec::new();
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| network(&from, &error))?
        {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MAX_LIST {
                return Err(failed("the published list of checksums is too long").into());
            }
        }
        // Clear-signed lists may carry names in any encoding; digests are ASCII.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Completes `partial` from `url`, at most `cap` bytes.
    pub(super) async fn file(
        &self,
        url: &str,
        partial: &Partial,
        cap: ByteSize,
        sink: &Arc<dyn ProgressSink>,
    ) -> Result<()> {
        let mut patience = Patience::new(self.options);
        loop {
            let before = partial.length()?;
            match self.file_once(url, partial, cap, sink).await {
                Ok(()) => return Ok(()),
                Err(failure) => {
                    let brought = partial.length()? > before;
                    patience.pause(failure, brought, &**sink).await?;
                }
            }
        }
    }

    async fn file_once(
        &self,
        url: &str,
        partial: &Partial,
        cap: ByteSize,
        sink: &Arc<dyn ProgressSink>,
    ) -> Result<(), Failure> {
        let have = partial.length()?;
        let known = partial.validators();
        let mut headers = HeaderMap::new();
        // Without a validator the rest of another file could be appended.
        let validator = known.if_range().and_then(|text| text.parse().ok());
        if let Some(validator) = validator.filter(|_| have > 0) {
            headers.insert(RANGE, range_from(have)?);
            headers.insert(IF_RANGE, validator);
        }
        let response = self.get(url, &headers).await?;
        let offset = match response.status() {
            StatusCode::PARTIAL_CONTENT if !headers.is_empty() => {
                let changed = known.etag.is_some()
                    && response.headers().contains_key(ETAG)
                    && Validators::of(response.headers(), None).etag != known.etag;
                if changed || content_start(response.headers()) != Some(have) {
                    partial.remove()?;
                    return Err(Failure::Passing(failed(
                        "the server sent another part of the file than asked for",
                    )));
                }
                have
            }
            StatusCode::RANGE_NOT_SATISFIABLE if !headers.is_empty() => {
                // Complete already: an earlier run ended between download and publishing.
                if known.total == Some(have) {
                    return Ok(());
                }
                partial.remove()?;
                return Err(Failure::Passing(failed(
                    "the file became shorter than what is already here",
                )));
            }
            _ => 0,
        };
        let response = success(response)?;
        if response.status() == StatusCode::PARTIAL_CONTENT && offset == 0 {
            return Err(failed("the server sent a part of the file without being asked").into());
        }
        let total = response
            .content_length()
            .and_then(|rest| rest.checked_add(offset));
        if total.is_some_and(|total| total > cap.bytes()) {
            return Err(too_large(cap).into());
        }
        check_free_space(&partial.path, total.unwrap_or(0).saturating_sub(offset))?;
        let validators = Validators::of(response.headers(), total);
        self.receive(response, partial, offset, total, &validators, cap, sink)
            .await
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one step of file_once, split for its length"
    )]
    async fn receive(
        &self,
        mut response: Response,
        partial: &Partial,
        offset: u64,
        total: Option<u64>,
        validators: &Validators,
        cap: ByteSize,
        sink: &Arc<dyn ProgressSink>,
    ) -> Result<(), Failure> {
        let from = response.url().clone();
        let write_failed =
            |error: io::Error| Failure::from(io_error("write", &partial.path, &error));
        let mut options = std::fs::OpenOptions::new();
        use std::os::unix::fs::OpenOptionsExt;
        options
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(no_follow());
        let file: File = options.open(&partial.path).map_err(write_failed)?;
        // First the old content goes, then its validators change: a kill in between must not
        // leave new validators beside an old start.
        file.set_len(offset).map_err(write_failed)?;
        let sidecar = serde_json::to_vec(validators)
            .map_err(|error| Error::internal(format!("validators: {error}")))?;
        write_whole(&partial.sidecar(), &sidecar, 0o600).map_err(write_failed)?;
        let mut file = tokio::fs::File::from_std(file);
        use tokio::io::AsyncSeekExt;
        file.seek(io::SeekFrom::Start(offset))
            .await
            .map_err(write_failed)?;
        let mut meter = Meter::start(Arc::clone(sink), "downloading", offset, total);
        let mut have = offset;
        let end = loop {
            match response.chunk().await {
                Ok(Some(chunk)) => {
                    have += chunk.len() as u64;
                    if have > cap.bytes() {
                        break Err(Failure::Final(too_large(cap)));
                    }
                    file.write_all(&chunk).await.map_err(write_failed)?;
                    meter.add(chunk.len() as u64);
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(network(&from, &error)),
            }
        };
        // What came is kept, also when it broke off.
        file.flush().await.map_err(write_failed)?;
        end?;
        match total {
            Some(total) if have < total => Err(Failure::Passing(failed(format!(
                "the download ended early: {have} of {total} bytes came"
            )))),
            _ => Ok(()),
        }
    }
}

fn range_from(offset: u64) -> Result<reqwest::header::HeaderValue> {
    format!("bytes={offset}-")
        .parse()
        .map_err(|_| Error::internal("a range header"))
}

/// The first byte of a `Content-Range: bytes 5-9/10`.
fn content_start(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    text.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

fn too_large(cap: ByteSize) -> Error {
    Error::new(
        ErrorCode::ImageTooLarge,
        format!("the download is larger than {cap}"),
    )
    .hint("check the address: no cloud image is that large")
}

fn success(response: Response) -> Result<Response, Failure> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let error = failed(format!("the server answered {status}"))
        .because(format!("for {}", response.url()))
        .hint("check the address; the publisher may have moved the file");
    Err(match status {
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => {
            Failure::Passing(error)
        }
        status if status.is_server_error() => Failure::Passing(error),
        _ => Failure::Final(error),
    })
}

/// Refuses before the first byte what would fill the file system.
pub(super) fn check_free_space(path: &Path, needed: u64) -> Result<()> {
    let Some(folder) = path.parent() else {
        return Ok(());
    };
    let free = rustix::fs::statvfs(folder)
        .map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize))
        .map_err(|error| io_error("look at", folder, &error.into()))?;
    if needed > 0 && needed.saturating_add(KEEP_FREE) > free {
        return Err(Error::new(
            ErrorCode::DiskFull,
            format!(
                "{} more are needed in {}, {} are free",
                ByteSize::from_bytes(needed),
                folder.display(),
                ByteSize::from_bytes(free)
            ),
        )
        .hint("delete VMs or images that are not needed (ghostctl image list), or enlarge the file system"));
    }
    Ok(())
}
