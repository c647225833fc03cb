//! Two figures and a health check over HTTP, for those who watch guests from within the network.
//! Off unless the configuration says where to listen; nothing can be changed through it.
//!
//! Bounded: so many connections at a time, one request on each, a head of 8 KiB, five seconds.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::calls::lock;
use crate::telemetry::Sampler;

const MOST_CONNECTIONS: usize = 16;
const MOST_HEAD: usize = 8 * 1024;
const PATIENCE: Duration = Duration::from_secs(5);
/// The rate is over this much time, whoever asks and however often.
const TICK: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Default)]
struct Figures {
    cpu: f64,
    memory: f64,
}

/// Listens and serves in threads of its own.
///
/// # Errors
/// Where the address cannot be bound.
pub fn start(listen: SocketAddr, sysroot: &Path) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind(listen)?;
    let address = listener.local_addr()?;
    let figures = Arc::new(Mutex::new(Figures::default()));
    let mut sampler = Sampler::new(sysroot);
    sampler.sample();
    let samples = Arc::clone(&figures);
    *lock(&samples) = look(&mut sampler);
    thread("http-sample", move || {
        loop {
            std::thread::sleep(TICK);
            let now = look(&mut sampler);
            *lock(&samples) = now;
        }
    })?;
    thread("http", move || serve(&listener, &figures))?;
    Ok(address)
}

fn thread(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(128 * 1024)
        .spawn(work)
        .map(|_| ())
}

fn look(sampler: &mut Sampler) -> Figures {
    let report = sampler.sample();
    let used = report
        .memory_total_bytes
        .saturating_sub(report.memory_available_bytes);
    Figures {
        cpu: report.cpu_percent,
        memory: if report.memory_total_bytes == 0 {
            0.0
        } else {
            used as f64 * 100.0 / report.memory_total_bytes as f64
        },
    }
}

fn serve(listener: &TcpListener, figures: &Arc<Mutex<Figures>>) {
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok((stream, _)) = listener.accept() else {
            // Out of descriptors, mostly; it passes.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        if open.load(Ordering::SeqCst) >= MOST_CONNECTIONS {
            continue;
        }
        open.fetch_add(1, Ordering::SeqCst);
        let (of_this, figures) = (Arc::clone(&open), Arc::clone(figures));
        let started = thread("http-connection", move || {
            let now = *lock(&figures);
            let _ = answer(stream, now);
            of_this.fetch_sub(1, Ordering::SeqCst);
        });
        if started.is_err() {
            open.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn answer(mut stream: TcpStream, figures: Figures) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut head = Vec::with_capacity(1024);
    let mut buffer = [0; 1024];
    let response = loop {
        match respond(&head, figures) {
            Some(response) => break response,
            None if head.len() >= MOST_HEAD => break plain(431, "the head is too long\n"),
            None => {}
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        stream.set_read_timeout(Some(left))?;
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        head.extend_from_slice(&buffer[..read]);
    };
    stream.write_all(response.as_bytes())
}

/// The answer to a head, or `None` while it is not whole.
fn respond(head: &[u8], figures: Figures) -> Option<String> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(_)) => {}
        Err(_) => return Some(plain(400, "not understood\n")),
    }
    let path = request
        .path
        .unwrap_or_default()
        .split('?')
        .next()
        .unwrap_or_default();
    let accept = request
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("accept"))
        .and_then(|header| std::str::from_utf8(header.value).ok())
        .unwrap_or_default();
    let get = request.method == Some("GET");
    Some(match path {
        "/metrics" | "/health" if !get => plain(405, "GET only\n"),
        "/metrics" if wants_text(accept) => {
            let text = format!(
                "# HELP ghost_guest_cpu_usage_percent Share of CPU time that was not idle in the last five seconds.\n\
                 # TYPE ghost_guest_cpu_usage_percent gauge\n\
                 ghost_guest_cpu_usage_percent {:.3}\n\
                 # HELP ghost_guest_memory_usage_percent Share of memory that programs could not have.\n\
                 # TYPE ghost_guest_memory_usage_percent gauge\n\
                 ghost_guest_memory_usage_percent {:.3}\n",
                figures.cpu, figures.memory
            );
            response(200, "text/plain; version=0.0.4; charset=utf-8", &text)
        }
        "/metrics" => {
            let body = serde_json::json!({
                "cpu_usage_percent": figures.cpu,
                "memory_usage_percent": figures.memory,
            });
            response(200, "application/json", &body.to_string())
        }
        "/health" => {
            let body = serde_json::json!({ "status": "ok", "version": crate::VERSION });
            response(200, "application/json", &body.to_string())
        }
        _ => plain(404, "GET /metrics or /health\n"),
    })
}

/// Whether text is wanted more than JSON, by RFC 9110, 12.5.1; as much as two types need of it.
fn wants_text(accept: &str) -> bool {
    let weight = |wanted: &[&str]| {
        accept
            .split(',')
            .filter_map(|part| {
                let mut fields = part.split(';');
                let kind = fields.next()?.trim();
                let weight = fields
                    .find_map(|field| field.trim().strip_prefix("q=")?.parse::<f32>().ok())
                    .unwrap_or(1.0);
                wanted.contains(&kind).then_some(weight)
            })
            .fold(0.0, f32::max)
    };
    weight(&["text/plain", "application/openmetrics-text"]) > weight(&["application/json"])
}

fn plain(status: u16, text: &str) -> String {
    response(status, "text/plain; charset=utf-8", text)
}

fn response(status: u16, kind: &str, body: &str) -> String {
    let reason = match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        _ => "Request Header Fields Too Large",
    };
    format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn get(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn figures_come_as_json_or_as_text() {
        let address = start("127.0.0.1:0".parse().unwrap(), Path::new("/")).unwrap();
        let text = get(address, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.contains("application/json"), "{head}");
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        for name in ["cpu_usage_percent", "memory_usage_percent"] {
            let value = body[name].as_f64().unwrap();
            assert!((0.0..=100.0).contains(&value), "{name} {value}");
        }
        assert!(body["memory_usage_percent"].as_f64().unwrap() > 0.0);
        let text = get(
            address,
            "GET /metrics?x=1 HTTP/1.1\r\naccept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n\r\n",
        );
        assert!(
            text.contains("\nghost_guest_memory_usage_percent "),
            "{text}"
        );
        assert!(get(address, "GET /health HTTP/1.0\r\n\r\n").contains("\"status\":\"ok\""));
        for (request, status) in [
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("GET /etc/passwd HTTP/1.1\r\n\r\n", "404"),
            ("\u{1}\u{2}\r\n\r\n", "400"),
        ] {
            let text = get(address, request);
            assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{text}");
        }
    }

    #[test]
    fn a_head_without_end_is_refused() {
        let long = format!("GET / HTTP/1.1\r\nX: {}", "x".repeat(MOST_HEAD));
        assert_eq!(respond(long.as_bytes(), Figures::default()), None);
        assert!(wants_text("text/plain") && !wants_text("*/*") && !wants_text(""));
        assert!(!wants_text("text/plain;q=0.3, application/json"));
    }
}
