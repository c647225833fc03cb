//! Reached through a Piko server (<https://github.com/andydunstall/piko>): the host keeps a WebSocket
//! to it, and Piko hands over the connections of whoever asks it for this host's endpoint.
//!
//! The protocol, as a server of version 0.7.0 was seen to speak it: `GET
//! /piko/v1/upstream/<endpoint>` with `Authorization: Bearer <JWT>`; then yamux over the binary
//! messages, this side its client, and *Piko* opens the streams. Each stream is one connection of a
//! stranger: nothing that comes on it is trusted, and what it meets here is the agent's own TLS
//! listener ([`forward`]), so that Piko sees only ciphertext.
//!
//! A token is for one endpoint or, where it names none, for all. At its `exp` the server closes the
//! connection; a new one is made before that, and the old one serves its streams to their end.

pub(super) mod socket;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ghost_domain::{Error, ErrorCode, Result, Secret};
use parking_lot::Mutex;
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::{HeaderName, HeaderValue, StatusCode, header};
use tokio_tungstenite::tungstenite::{Error as WsError, handshake::client::Request};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::tunnel::{
    Backoff, BackoffOptions, Dialled, Limits, Session, Side, Tunnel, TunnelStream, begin,
};
use socket::{ByteSocket, Heard, config};

const TENANT_HEADER: HeaderName = HeaderName::from_static("x-piko-tenant-id");
/// What connecting may take, as Piko's own client has it.
const DIAL_TIME: Duration = Duration::from_secs(60);
/// Largest token, and largest authority file, that is read.
const MOST_FILE: u64 = 64 * 1024;
/// How long a connection was up that counts as a good one.
const GOOD: Duration = Duration::from_secs(60);
/// Until a server that refused us is asked again.
const REFUSED_WAIT: Duration = Duration::from_secs(600);
const STREAMS_WAITING: usize = 256;

/// Where the token comes from.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum PikoToken {
    /// The server asks for none.
    #[default]
    None,
    /// This one.
    Fixed(Secret),
    /// The content of this file, read anew for each connection: whoever issues tokens writes the
    /// next one there before the present one ends.
    File(PathBuf),
}

/// How Piko is reached: `piko.*` of the configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct PikoOptions {
    /// `piko.server_url`: `https://` or `http://` (or `wss://`, `ws://`), with a path before Piko's
    /// own where a proxy stands in front.
    pub server_url: String,
    /// `piko.endpoint`. A `/` stands for `--`, as Piko's routes take one label.
    pub endpoint: String,
    /// The token.
    pub token: PikoToken,
    /// `x-piko-tenant-id`, of servers from 0.8 on.
    pub tenant: Option<String>,
    /// A file with the authorities that the server's certificate may be of; `None`: the system's.
    pub authority: Option<PathBuf>,
    /// `piko.reconnect.{initial_delay,max_delay,multiplier}`.
    pub reconnect: BackoffOptions,
}

/// How the connection to Piko fares.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum PikoState {
    /// It is not run.
    #[default]
    Off,
    /// A connection is being made.
    Connecting,
    /// Connections can come.
    Up,
    /// The next try comes.
    Waiting {
        /// Why the last one ended.
        reason: String,
        /// When.
        retry_in: Duration,
    },
    /// The server will not have this host as it is configured.
    Refused {
        /// Why.
        reason: String,
    },
}

/// How long things take; tests shorten them.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Without a frame for so long the connection is dead. The server sends one each 30 s.
    dead: Duration,
    look: Duration,
    /// How long before its end a token is replaced.
    margin: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            dead: Duration::from_secs(45),
            look: Duration::from_secs(5),
            margin: Duration::from_secs(60),
        }
    }
}

/// Keeps a connection to Piko.
pub struct PikoService {
    target: Target,
    reconnect: BackoffOptions,
    pace: Pace,
    state: Mutex<PikoState>,
    streams: mpsc::Sender<TunnelStream>,
    incoming: Mutex<Option<mpsc::Receiver<TunnelStream>>>,
}

impl PikoService {
    /// Checks the options; nothing is dialled before [`Self::run`].
    ///
    /// # Errors
    /// `InvalidArgument` for an address or an endpoint that is none.
    pub fn new(options: PikoOptions) -> Result<Self> {
        let (streams, incoming) = mpsc::channel(STREAMS_WAITING);
        Ok(Self {
            reconnect: options.reconnect,
            target: Target::new(options)?,
            pace: Pace::default(),
            state: Mutex::new(PikoState::Off),
            streams,
            incoming: Mutex::new(Some(incoming)),
        })
    }

    /// The connections that come: strangers' bytes. `None` where they were given out already.
    pub fn incoming(&self) -> Option<mpsc::Receiver<TunnelStream>> {
        self.incoming.lock().take()
    }

    /// The server and the endpoint, for people.
    pub fn peer(&self) -> String {
        let server = self.target.address.host_str().unwrap_or_default();
        format!("{} at {server}", self.target.endpoint)
    }

    /// How it fares.
    pub fn state(&self) -> PikoState {
        self.state.lock().clone()
    }

    fn show(&self, state: PikoState) {
        *self.state.lock() = state;
    }

    /// Keeps connected until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        let mut backoff = Backoff::new(self.reconnect);
        while !stop.is_cancelled() {
            self.show(PikoState::Connecting);
            let connected = tokio::select! {
                connected = self.target.dial() => connected,
                () = stop.cancelled() => break,
            };
            let (reason, wait) = match connected {
                Ok(connected) => {
                    tracing::info!(server = %self.target.address, endpoint = self.target.endpoint, "connected to Piko");
                    let begun = Instant::now();
                    let reason = self.serve(connected, &stop).await;
                    if begun.elapsed() >= GOOD {
                        backoff.reset();
                    }
                    (reason, None)
                }
                Err(Refusal::Fatal(reason)) => {
                    tracing::error!(reason, "Piko refuses this host");
                    self.show(PikoState::Refused { reason });
                    (String::new(), Some(REFUSED_WAIT))
                }
                Err(Refusal::Again(reason)) => (reason, None),
            };
            let wait = match wait {
                Some(wait) => wait,
                None => {
                    let retry_in = backoff.next(&mut rand::rng());
                    tracing::warn!(
                        reason,
                        wait_seconds = retry_in.as_secs_f64(),
                        "there is no connection to Piko"
                    );
                    self.show(PikoState::Waiting { reason, retry_in });
                    retry_in
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.cancelled() => {}
            }
        }
        self.show(PikoState::Off);
    }

    /// Serves a connection, and those that follow it when tokens are replaced; says why the last one
    /// ended.
    async fn serve(&self, mut connected: Connected, stop: &CancellationToken) -> String {
        self.show(PikoState::Up);
        let mut look = tokio::time::interval(self.pace.look);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut warned = false;
        loop {
            let handle = connected.session.handle.clone();
            tokio::select! {
                Some(stream) = connected.session.incoming.recv() => self.give(stream),
                closed = handle.closed() => return closed.to_string(),
                () = stop.cancelled() => {
                    handle.close("the agent stops");
                    handle.closed().await;
                    return "the agent stops".to_owned();
                }
                _ = look.tick() => {
                    if connected.heard.silence() >= self.pace.dead {
                        handle.close("nothing came for long");
                        return format!("nothing came for {} s", self.pace.dead.as_secs());
                    }
                    if connected.ends_within(self.pace.margin) {
                        match self.follow(&connected).await {
                            Some(next) => {
                                let old = std::mem::replace(&mut connected, next);
                                tokio::spawn(finish(old.session, self.streams.clone(), stop.clone()));
                                warned = false;
                            }
                            None if !warned => {
                                warned = true;
                                tracing::warn!("the token for Piko ends soon, and there is no newer one");
                            }
                            None => {}
                        }
                    }
                }
            }
        }
    }

    /// A connection with a newer token, where there is one.
    async fn follow(&self, present: &Connected) -> Option<Connected> {
        let token = self.target.token().await.ok()?;
        let until = token.as_ref().and_then(|token| ends_at(token.expose()));
        if until <= present.until {
            return None;
        }
        match self.target.dial().await {
            Ok(next) => Some(next),
            Err(Refusal::Fatal(reason) | Refusal::Again(reason)) => {
                tracing::warn!(reason, "Piko does not take the newer token yet");
                None
            }
        }
    }

    fn give(&self, stream: TunnelStream) {
        if self.streams.try_send(stream).is_err() {
            tracing::debug!("nobody takes a connection of Piko's; it was reset");
        }
    }
}

impl std::fmt::Debug for PikoService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PikoService")
            .field("address", &self.target.address.as_str())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// Lets a connection that is replaced serve what it has, until the last stream ends or the server
/// closes it.
async fn finish(session: Session, streams: mpsc::Sender<TunnelStream>, stop: CancellationToken) {
    let Session {
        handle,
        mut incoming,
    } = session;
    // The server may still hand a connection to the old one for a moment.
    let mut idle = 0;
    loop {
        tokio::select! {
            Some(stream) = incoming.recv() => {
                if streams.try_send(stream).is_err() {
                    tracing::debug!("nobody takes a connection of Piko's; it was reset");
                }
            }
            _ = handle.closed() => return,
            () = stop.cancelled() => break,
            () = tokio::time::sleep(Duration::from_millis(500)) => {
                idle = if handle.streams() == (0, 0) { idle + 1 } else { 0 };
                if idle > 4 {
                    break;
                }
            }
        }
    }
    handle.close("another connection took over");
    handle.closed().await;
}

/// Carries each connection that comes to a listener of this host, its own TLS listener best, until
/// `stop` or the end of the service.
pub async fn forward(
    mut incoming: mpsc::Receiver<TunnelStream>,
    target: SocketAddr,
    stop: CancellationToken,
) {
    loop {
        let stream = tokio::select! {
            stream = incoming.recv() => stream,
            () = stop.cancelled() => return,
        };
        let Some(mut stream) = stream else {
            return;
        };
        let stop = stop.clone();
        tokio::spawn(async move {
            let carry = async {
                let mut local = TcpStream::connect(target).await?;
                local.set_nodelay(true)?;
                tokio::io::copy_bidirectional(&mut stream, &mut local).await
            };
            tokio::select! {
                carried = carry => if let Err(error) = carried {
                    tracing::debug!(%error, "a connection through Piko broke");
                },
                () = stop.cancelled() => {}
            }
        });
    }
}

/// Why there is no connection.
#[derive(Debug)]
enum Refusal {
    /// Another try may help.
    Again(String),
    /// It will not, before something is changed.
    Fatal(String),
}

struct Connected {
    session: Session,
    local: Option<SocketAddr>,
    heard: Heard,
    /// When the token ends, in seconds since the epoch.
    until: Option<u64>,
}

impl Connected {
    fn ends_within(&self, margin: Duration) -> bool {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.until
            .is_some_and(|until| now + margin >= Duration::from_secs(until))
    }
}

/// Piko as a carrier: one connection, whose streams are strangers' connections.
pub struct PikoTunnel(Target);

impl PikoTunnel {
    /// Checks the options.
    ///
    /// # Errors
    /// `InvalidArgument` for an address or an endpoint that is none.
    pub fn new(options: PikoOptions) -> Result<Self> {
        Target::new(options).map(Self)
    }
}

#[async_trait]
impl Tunnel for PikoTunnel {
    fn name(&self) -> &'static str {
        "piko"
    }

    async fn connect(&self) -> Result<Dialled> {
        match self.0.dial().await {
            Ok(connected) => Ok(Dialled {
                session: connected.session,
                local: connected.local,
            }),
            Err(Refusal::Fatal(reason)) => Err(Error::new(
                ErrorCode::Unauthenticated,
                "Piko refuses this host",
            )
            .because(reason)),
            Err(Refusal::Again(reason)) => Err(Error::new(
                ErrorCode::CoreUnreachable,
                "Piko cannot be reached",
            )
            .because(reason)),
        }
    }
}

/// Where a connection goes.
struct Target {
    address: Url,
    host: String,
    port: u16,
    secure: bool,
    endpoint: String,
    token: PikoToken,
    tenant: Option<HeaderValue>,
    authority: Option<PathBuf>,
}

impl Target {
    fn new(options: PikoOptions) -> Result<Self> {
        let illegal = |field: &str, rule: &str| {
            Error::new(ErrorCode::InvalidArgument, format!("{field} is not legal"))
                .because(rule)
                .field(field, rule)
        };
        let endpoint = endpoint(&options.endpoint).ok_or_else(|| {
            illegal(
                "piko.endpoint",
                "1 to 128 of letters, digits, '-', '_', '.' and '/'",
            )
        })?;
        let url_rule = "http://HOST:PORT or https://HOST:PORT";
        let mut address =
            Url::parse(&options.server_url).map_err(|_| illegal("piko.server_url", url_rule))?;
        let scheme = match address.scheme() {
            "http" | "ws" => "ws",
            "https" | "wss" => "wss",
            _ => return Err(illegal("piko.server_url", url_rule)),
        };
        // Both are special schemes, between which the URL standard allows the change.
        address
            .set_scheme(scheme)
            .map_err(|()| illegal("piko.server_url", url_rule))?;
        let host = address
            .host_str()
            .ok_or_else(|| illegal("piko.server_url", url_rule))?
            .to_owned();
        let port = address.port_or_known_default().unwrap_or(443);
        let path = address.path().trim_end_matches('/').to_owned();
        address.set_path(&format!("{path}/piko/v1/upstream/{endpoint}"));
        address.set_query(None);
        address.set_fragment(None);
        let tenant = options
            .tenant
            .as_deref()
            .map(HeaderValue::from_str)
            .transpose()
            .map_err(|_| illegal("piko.tenant", "printable ASCII characters"))?;
        Ok(Self {
            secure: scheme == "wss",
            address,
            host,
            port,
            endpoint,
            token: options.token,
            tenant,
            authority: options.authority,
        })
    }

    async fn token(&self) -> std::io::Result<Option<Secret>> {
        match &self.token {
            PikoToken::None => Ok(None),
            PikoToken::Fixed(token) => Ok(Some(token.clone())),
            PikoToken::File(path) => Ok(Some(Secret::new(read(path).await?.trim()))),
        }
    }

    async fn dial(&self) -> std::result::Result<Connected, Refusal> {
        match tokio::time::timeout(DIAL_TIME, self.dial_unbounded()).await {
            Ok(dialled) => dialled,
            Err(_) => Err(Refusal::Again("it does not answer within 60 s".into())),
        }
    }

    async fn dial_unbounded(&self) -> std::result::Result<Connected, Refusal> {
        let again = |error: std::io::Error| Refusal::Again(error.to_string());
        let token = self
            .token()
            .await
            .map_err(|error| Refusal::Again(format!("the token cannot be read: {error}")))?;
        let request = self.request(token.as_ref())?;
        let host = self.host.trim_start_matches('[').trim_end_matches(']');
        let tcp = TcpStream::connect((host, self.port)).await.map_err(again)?;
        tcp.set_nodelay(true).map_err(again)?;
        let local = tcp.local_addr().ok();
        let io: Box<dyn Io> = if self.secure {
            let name = ServerName::try_from(host.to_owned())
                .map_err(|error| Refusal::Fatal(error.to_string()))?;
            let config = self.tls().await?;
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            Box::new(connector.connect(name, tcp).await.map_err(again)?)
        } else {
            Box::new(tcp)
        };
        let (socket, _) = tokio_tungstenite::client_async_with_config(request, io, Some(config()))
            .await
            .map_err(refusal)?;
        let (io, heard) = ByteSocket::new(socket);
        Ok(Connected {
            session: begin(io, Side::Client, Limits::HOST),
            local,
            heard,
            until: token.as_ref().and_then(|token| ends_at(token.expose())),
        })
    }

    fn request(&self, token: Option<&Secret>) -> std::result::Result<Request, Refusal> {
        let mut request = self
            .address
            .as_str()
            .into_client_request()
            .map_err(|error| Refusal::Fatal(error.to_string()))?;
        let headers = request.headers_mut();
        if let Some(token) = token {
            let mut value = HeaderValue::from_str(&format!("Bearer {}", token.expose()))
                .map_err(|_| Refusal::Fatal("the token is not one line of text".into()))?;
            value.set_sensitive(true);
            headers.insert(header::AUTHORIZATION, value);
        }
        if let Some(tenant) = &self.tenant {
            headers.insert(TENANT_HEADER, tenant.clone());
        }
        Ok(request)
    }

    async fn tls(&self) -> std::result::Result<rustls::ClientConfig, Refusal> {
        let mut roots = rustls::RootCertStore::empty();
        match &self.authority {
            Some(path) => {
                let pem = read(path)
                    .await
                    .map_err(|error| Refusal::Fatal(format!("{}: {error}", path.display())))?;
                let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
                    .collect::<std::result::Result<_, _>>()
                    .map_err(|error| Refusal::Fatal(format!("{}: {error}", path.display())))?;
                roots.add_parsable_certificates(certificates);
            }
            None => {
                let found = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs)
                    .await
                    .map_err(|error| Refusal::Again(error.to_string()))?;
                roots.add_parsable_certificates(found.certs);
            }
        }
        if roots.is_empty() {
            return Err(Refusal::Fatal(
                "no authority is known that the server's certificate could be of".into(),
            ));
        }
        rustls::ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| Refusal::Fatal(error.to_string()))
            .map(|builder| builder.with_root_certificates(roots).with_no_client_auth())
    }
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

async fn read(path: &std::path::Path) -> std::io::Result<String> {
    use tokio::io::AsyncReadExt;
    let mut text = String::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(MOST_FILE).read_to_string(&mut text).await?;
    Ok(text)
}

/// Which answers are worth another try: those of Piko's own client. All else is fatal.
fn refusal(error: WsError) -> Refusal {
    match error {
        WsError::Http(response) => {
            let status = response.status();
            let said: String = response
                .body()
                .as_deref()
                .map(String::from_utf8_lossy)
                .unwrap_or_default()
                .chars()
                .filter(|character| !character.is_control())
                .take(200)
                .collect();
            let reason = format!("the server answered {status} {said}");
            let passes = matches!(
                status,
                StatusCode::REQUEST_TIMEOUT
                    | StatusCode::TOO_MANY_REQUESTS
                    | StatusCode::INTERNAL_SERVER_ERROR
                    | StatusCode::BAD_GATEWAY
                    | StatusCode::SERVICE_UNAVAILABLE
                    | StatusCode::GATEWAY_TIMEOUT
            );
            if passes {
                Refusal::Again(reason)
            } else {
                Refusal::Fatal(reason)
            }
        }
        WsError::Io(error) => Refusal::Again(error.to_string()),
        error => Refusal::Again(format!("it does not speak WebSocket as Piko does: {error}")),
    }
}

/// An endpoint as Piko's routes take it. `tenant/host` was met in configurations, and is 404 there.
fn endpoint(text: &str) -> Option<String> {
    let legal = !text.is_empty()
        && text.len() <= 128
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte))
        && !text.split('/').any(|part| matches!(part, "" | "." | ".."));
    legal.then(|| text.replace('/', "--"))
}

/// The `exp` of a JWT, which is not verified: it is our own, and the server judges it.
fn ends_at(token: &str) -> Option<u64> {
    let payload = token.split('.').nth(1)?;
    let payload = URL_SAFE_NO_PAD.decode(payload.trim_end_matches('=')).ok()?;
    let claims: serde_json::Value = serde_json::from_slice(&payload).ok()?;
    let exp = claims.get("exp")?;
    exp.as_u64().or_else(|| {
        // NumericDate may have a fraction (RFC 7519, section 2).
        let seconds = exp.as_f64()?;
        Duration::try_from_secs_f64(seconds)
            .ok()
            .map(|duration| duration.as_secs())
    })
}
