//! A small HTTP server on loopback that serves one file, breaks off where it is told to, and
//! remembers what it was asked for.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How it serves.
#[derive(Debug, Default)]
struct Behaviour {
    /// Bytes of a body after which the connection breaks; 0: none.
    break_after: AtomicU64,
    /// Bodies that still break.
    breaks: AtomicU64,
    /// Milliseconds between pieces of 64 KiB.
    pause: AtomicU64,
    stop: AtomicBool,
    requests: Mutex<Vec<String>>,
}

/// The server; gone when dropped.
pub struct FileServer {
    port: u16,
    behaviour: Arc<Behaviour>,
}

impl FileServer {
    /// Serves `content` under every path.
    ///
    /// # Panics
    /// Where no port is free.
    #[expect(clippy::expect_used, reason = "the test cannot go on")]
    pub fn start(content: Vec<u8>) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let behaviour = Arc::new(Behaviour::default());
        let (shared, content) = (Arc::clone(&behaviour), Arc::new(content));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if shared.stop.load(Ordering::SeqCst) {
                    return;
                }
                let (shared, content) = (Arc::clone(&shared), Arc::clone(&content));
                std::thread::spawn(move || drop(serve(stream, &content, &shared)));
            }
        });
        Self { port, behaviour }
    }

    /// The address of a file.
    pub fn url(&self, name: &str) -> String {
        format!("http://127.0.0.1:{}/{name}", self.port)
    }

    /// The next `times` bodies break after `bytes`.
    pub fn break_after(&self, bytes: u64, times: u64) {
        self.behaviour.break_after.store(bytes, Ordering::SeqCst);
        self.behaviour.breaks.store(times, Ordering::SeqCst);
    }

    /// Waits so long between pieces.
    pub fn slow_down(&self, pause: Duration) {
        let millis = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
        self.behaviour.pause.store(millis, Ordering::SeqCst);
    }

    /// What it was asked for: `METHOD PATH RANGE`, the range as it was asked for.
    pub fn requests(&self) -> Vec<String> {
        self.behaviour
            .requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.behaviour.stop.store(true, Ordering::SeqCst);
        // Wakes the acceptor up.
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}

fn serve(mut stream: TcpStream, content: &[u8], behaviour: &Behaviour) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        if line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let range = lines.iter().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("range")
            .then(|| value.trim().to_owned())
    });
    let request = lines.first().cloned().unwrap_or_default();
    let request = request
        .rsplit_once(' ')
        .map_or(request.as_str(), |(head, _)| head)
        .to_owned();
    let head_only = request.starts_with("HEAD");
    behaviour
        .requests
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(format!("{request} {}", range.as_deref().unwrap_or("-")));
    let start = range
        .as_deref()
        .and_then(|range| {
            range
                .strip_prefix("bytes=")?
                .strip_suffix('-')?
                .parse::<usize>()
                .ok()
        })
        .unwrap_or(0)
        .min(content.len());
    let total = content.len();
    let body = &content[start..];
    let mut head = if range.is_some() {
        format!(
            "HTTP/1.1 206 Partial Content\r\ncontent-range: bytes {start}-{}/{total}\r\n",
            total.saturating_sub(1)
        )
    } else {
        "HTTP/1.1 200 OK\r\n".to_owned()
    };
    head.push_str(&format!(
        "content-length: {}\r\naccept-ranges: bytes\r\netag: \"v1\"\r\nconnection: close\r\n\r\n",
        body.len()
    ));
    stream.write_all(head.as_bytes())?;
    if head_only {
        return Ok(());
    }
    let breaks = behaviour
        .breaks
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
            left.checked_sub(1)
        })
        .is_ok();
    let most = if breaks {
        usize::try_from(behaviour.break_after.load(Ordering::SeqCst)).unwrap_or(usize::MAX)
    } else {
        usize::MAX
    };
    for piece in body[..body.len().min(most)].chunks(64 * 1024) {
        stream.write_all(piece)?;
        std::thread::sleep(Duration::from_millis(
            behaviour.pause.load(Ordering::SeqCst),
        ));
    }
    Ok(())
}
