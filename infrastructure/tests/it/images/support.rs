//! Images, caches and servers for the tests.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ghost_domain::ports::{CachedContent, ImageCache, ProgressSink};
use ghost_domain::{Progress, Result};
use ghost_infrastructure::images::{DirectoryImageCache, ImageCacheOptions};
use sha2::{Digest, Sha256, Sha512};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Collects progress.
#[derive(Default)]
pub(super) struct Sink(pub(super) Mutex<Vec<Progress>>);

impl ProgressSink for Sink {
    fn report(&self, progress: Progress) {
        self.0.lock().unwrap().push(progress);
    }
}

impl Sink {
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(super) fn phases(&self) -> Vec<String> {
        let mut phases: Vec<_> = self
            .0
            .lock()
            .unwrap()
            .iter()
            .map(|progress| progress.phase.clone())
            .collect();
        phases.dedup();
        phases
    }
}

/// A cache in a folder of its own.
pub(super) struct Fixture {
    pub(super) folder: TempDir,
    pub(super) cache: DirectoryImageCache,
}

impl Fixture {
    pub(super) fn new() -> Self {
        Self::with(|_| ())
    }

    pub(super) fn with(change: impl FnOnce(&mut ImageCacheOptions)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut options = ImageCacheOptions::new(folder.path());
        options.download.first_pause = Duration::from_millis(5);
        options.download.longest_pause = Duration::from_millis(20);
        options.download.stall_timeout = Duration::from_millis(500);
        change(&mut options);
        let cache = DirectoryImageCache::open(options).unwrap();
        Self { folder, cache }
    }

    pub(super) fn staging(&self) -> PathBuf {
        self.folder.path().join("images/staging")
    }

    /// Names in the staging folder.
    pub(super) fn staged(&self) -> Vec<String> {
        names(&self.staging())
    }

    /// Names of the published files.
    pub(super) fn published(&self) -> Vec<String> {
        let mut names = names(&self.folder.path().join("images"));
        names.retain(|name| name != "staging");
        names
    }

    /// Uploads bytes in pieces and takes them in.
    pub(super) async fn import(&self, bytes: &[u8]) -> Result<CachedContent> {
        let staged = self.cache.stage().await?;
        for piece in bytes.chunks(1 << 20) {
            self.cache.append(&staged, piece).await?;
        }
        let content = self.cache.adopt(&staged, Sink::new()).await?;
        self.cache.discard(&staged).await?;
        Ok(content)
    }
}

pub(super) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

pub(super) fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

pub(super) fn sha512(bytes: &[u8]) -> String {
    hex::encode(Sha512::digest(bytes))
}

/// Runs `qemu-img`, which must succeed.
pub(super) fn qemu_img(arguments: &[&str]) {
    let output = Command::new("/usr/bin/qemu-img")
        .args(arguments)
        .output()
        .expect("qemu-img is needed: apt-get install qemu-utils");
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A raw disk with a boot signature and some content that does not compress.
pub(super) fn raw_disk(megabytes: usize) -> Vec<u8> {
    let mut disk = vec![0u8; megabytes << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for chunk in disk[4096..300_000].chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes());
    }
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk
}

/// A qcow2 image made by `qemu-img` from a raw disk, with further options of `convert`.
pub(super) fn qcow2_disk(megabytes: usize, options: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let raw = folder.path().join("raw");
    let qcow2 = folder.path().join("qcow2");
    std::fs::write(&raw, raw_disk(megabytes)).unwrap();
    let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
    arguments.extend_from_slice(options);
    arguments.extend([raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    qemu_img(&arguments);
    std::fs::read(&qcow2).unwrap()
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(super) fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// What came in a request.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) path: String,
    pub(super) head: String,
}

impl Request {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }

    /// The first byte asked for by `Range`, 0 without.
    pub(super) fn offset(&self) -> usize {
        self.header("range")
            .and_then(|range| {
                range
                    .strip_prefix("bytes=")?
                    .strip_suffix('-')?
                    .parse()
                    .ok()
            })
            .unwrap_or(0)
    }
}

/// What the server does with one request.
pub(super) struct Answer {
    pub(super) head: String,
    pub(super) body: Vec<u8>,
    /// Keep the connection open in silence after the body, instead of closing it.
    pub(super) hang: bool,
    /// Wait for this before the body is sent.
    pub(super) gate: Option<Arc<tokio::sync::Semaphore>>,
}

impl Answer {
    pub(super) fn status(status: &str, headers: &str, body: &[u8]) -> Self {
        Self {
            head: format!("HTTP/1.1 {status}\r\n{headers}Connection: close\r\n\r\n"),
            body: body.to_vec(),
            hang: false,
            gate: None,
        }
    }

    /// All of a file, or its rest from the offset that was asked for, as a good server does.
    pub(super) fn file(request: &Request, bytes: &[u8], etag: &str) -> Self {
        let offset = request.offset();
        let fresh = request.header("if-range") == Some(etag);
        if offset == 0 || !fresh {
            return Self::status(
                "200 OK",
                &format!("Content-Length: {}\r\nETag: {etag}\r\n", bytes.len()),
                bytes,
            );
        }
        if offset >= bytes.len() {
            return Self::status("416 Range Not Satisfiable", "Content-Length: 0\r\n", b"");
        }
        Self::status(
            "206 Partial Content",
            &format!(
                "Content-Length: {}\r\nContent-Range: bytes {offset}-{}/{}\r\nETag: {etag}\r\n",
                bytes.len() - offset,
                bytes.len() - 1,
                bytes.len()
            ),
            &bytes[offset..],
        )
    }

    /// Sends only the first `count` bytes of the body and breaks off.
    pub(super) fn broken_after(mut self, count: usize) -> Self {
        self.body.truncate(count);
        self
    }

    pub(super) fn then_silence(mut self) -> Self {
        self.hang = true;
        self
    }
}

/// An HTTP server on a loopback port; stops when dropped.
pub(super) struct Server {
    pub(super) port: u16,
    pub(super) requests: Arc<Mutex<Vec<Request>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    /// `answer` gets each request and its number, from 0.
    pub(super) async fn start(
        answer: impl Fn(&Request, usize) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let log = Arc::clone(&requests);
        let answer = Arc::new(answer);
        let task = tokio::spawn(async move {
            // Connections end with the server.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                connections.spawn(async move {
                    let _ = serve(stream, &log, &*answer).await;
                });
            }
        });
        Self {
            port,
            requests,
            task,
        }
    }

    pub(super) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub(super) fn seen(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }
}

async fn serve(
    mut stream: TcpStream,
    log: &Mutex<Vec<Request>>,
    answer: &(dyn Fn(&Request, usize) -> Answer + Send + Sync),
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Ok(());
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let request = Request {
        path: head.split(' ').nth(1).unwrap_or("").to_owned(),
        head,
    };
    let number = {
        let mut log = log.lock().unwrap();
        log.push(request.clone());
        log.len() - 1
    };
    let answer = answer(&request, number);
    stream.write_all(answer.head.as_bytes()).await?;
    if let Some(gate) = &answer.gate {
        gate.acquire().await.unwrap().forget();
    }
    stream.write_all(&answer.body).await?;
    stream.flush().await?;
    if answer.hang {
        std::future::pending::<()>().await;
    }
    stream.shutdown().await
}
