//! Calls to the members of an etcd cluster: each with a deadline, by one member at a time, the next
//! one where that one is not there.

use std::error::Error as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ghost_domain::{Error, ErrorCode, Result};
use prost::Message;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{ConnectError, Request, Status, Streaming};
use tonic_prost::ProstCodec;

/// How long a member may take to be reached.
const CONNECT: Duration = Duration::from_secs(2);
/// A connection on which nothing is heard for so long is asked whether it is alive, …
const KEEP_ALIVE: Duration = Duration::from_secs(3);
/// … and ends where it does not answer within this time.
const KEEP_ALIVE_ANSWER: Duration = Duration::from_secs(3);
/// A page of records; etcd itself takes requests of 1.5 MiB at most.
const MOST_ANSWER: usize = 128 << 20;

/// TLS to etcd, all PEM.
#[derive(Clone, Default)]
pub struct EtcdTls {
    /// Who signs the members' certificates.
    pub authority: Vec<u8>,
    /// Our certificate and its key, where the members want one.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

impl std::fmt::Debug for EtcdTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdTls")
            .field("identity", &self.identity.is_some())
            .finish_non_exhaustive()
    }
}

/// Whether a call that failed may be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// Always: it changes nothing, or the same twice.
    Always,
    /// Only where it never went out.
    Unsent,
}

/// The members.
#[derive(Debug)]
pub(super) struct Members {
    channels: Vec<(String, Channel)>,
    current: AtomicUsize,
    deadline: Duration,
}

/// A call that failed, and by which member.
struct Failed {
    status: Status,
    unsent: bool,
}

impl Members {
    pub(super) fn new(
        endpoints: &[String],
        tls: Option<&EtcdTls>,
        deadline: Duration,
    ) -> Result<Self> {
        let odd = |endpoint: &str, cause: &dyn std::fmt::Display| {
            Error::new(
                ErrorCode::InvalidArgument,
                format!("{endpoint:?} cannot be used as a member of etcd"),
            )
            .because(cause)
            .hint("write http://HOST:2379, or https://HOST:2379 with store.etcd.ca")
        };
        let channels = endpoints
            .iter()
            .map(|endpoint| {
                let mut one = Endpoint::from_shared(endpoint.clone())
                    .map_err(|cause| odd(endpoint, &cause))?
                    .connect_timeout(CONNECT)
                    .tcp_nodelay(true)
                    .http2_keep_alive_interval(KEEP_ALIVE)
                    .keep_alive_timeout(KEEP_ALIVE_ANSWER)
                    .keep_alive_while_idle(true);
                if let Some(tls) = tls.filter(|_| endpoint.starts_with("https://")) {
                    let mut config = ClientTlsConfig::new()
                        .ca_certificate(Certificate::from_pem(&tls.authority));
                    if let Some((certificate, key)) = &tls.identity {
                        config = config.identity(Identity::from_pem(certificate, key));
                    }
                    one = one
                        .tls_config(config)
                        .map_err(|cause| odd(endpoint, &cause))?;
                }
                Ok((endpoint.clone(), one.connect_lazy()))
            })
            .collect::<Result<Vec<_>>>()?;
        if channels.is_empty() {
            return Err(
                Error::new(ErrorCode::InvalidArgument, "no member of etcd is named")
                    .hint("write store.etcd.endpoints"),
            );
        }
        Ok(Self {
            channels,
            current: AtomicUsize::new(0),
            deadline,
        })
    }

    /// The longest that one attempt takes.
    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    fn pick(&self) -> (usize, Channel) {
        let number = self.current.load(Ordering::Relaxed) % self.channels.len();
        // Not empty, by the constructor.
        (number, self.channels[number].1.clone())
    }

    /// The next call goes to the next member, unless somebody changed that already.
    fn pass_over(&self, number: usize) {
        let next = (number + 1) % self.channels.len();
        let _ = self
            .current
            .compare_exchange(number, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// One answer to one question.
    ///
    /// # Errors
    /// The status of the last attempt.
    pub(super) async fn call<Ask, Answer>(
        &self,
        path: &'static str,
        ask: Ask,
        again: Again,
    ) -> Result<Answer, Status>
    where
        Ask: Message + Clone + Send + Sync + 'static,
        Answer: Message + Default + Send + Sync + 'static,
    {
        let mut last = None;
        for _ in 0..self.channels.len() {
            let (number, channel) = self.pick();
            let attempt = unary::<Ask, Answer>(channel, path, ask.clone());
            let failed = match tokio::time::timeout(self.deadline, attempt).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(failed)) => failed,
                Err(_) => Failed {
                    status: Status::deadline_exceeded("etcd did not answer in time"),
                    unsent: false,
                },
            };
            if !is_of_the_member(&failed.status) {
                return Err(failed.status);
            }
            self.pass_over(number);
            let may = failed.unsent || again == Again::Always;
            last = Some(failed.status);
            if !may {
                break;
            }
        }
        Err(last.unwrap_or_else(|| Status::unavailable("no member of etcd")))
    }

    /// A stream both ways. `asks` is handed over to the first member that takes the call.
    ///
    /// # Errors
    /// The status of the attempt; the next one goes to another member.
    pub(super) async fn stream<Ask, Answer>(
        &self,
        path: &'static str,
        asks: impl futures::Stream<Item = Ask> + Send + 'static,
    ) -> Result<Streaming<Answer>, Status>
    where
        Ask: Message + Send + Sync + 'static,
        Answer: Message + Default + Send + Sync + 'static,
    {
        let (number, channel) = self.pick();
        let attempt = async {
            let mut grpc = Grpc::new(channel).max_decoding_message_size(MOST_ANSWER);
            ready(&mut grpc).await.map_err(|failed| failed.status)?;
            let mut request = Request::new(asks);
            // A member that has no leader ends the stream instead of being silent.
            request
                .metadata_mut()
                .insert("hasleader", MetadataValue::from_static("true"));
            let codec = ProstCodec::<Ask, Answer>::default();
            let path = PathAndQuery::from_static(path);
            let answer = grpc.streaming(request, path, codec).await?;
            Ok(answer.into_inner())
        };
        let outcome = match tokio::time::timeout(self.deadline, attempt).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Status::deadline_exceeded("etcd did not answer in time")),
        };
        if outcome.is_err() {
            self.pass_over(number);
        }
        outcome
    }

    /// The stream of the present member broke: the next one goes to another.
    pub(super) fn broke(&self) {
        self.pass_over(self.pick().0);
    }
}

async fn ready(grpc: &mut Grpc<Channel>) -> Result<(), Failed> {
    grpc.ready().await.map_err(|error| Failed {
        status: Status::unavailable(text(&error)),
        unsent: true,
    })
}

async fn unary<Ask, Answer>(
    channel: Channel,
    path: &'static str,
    ask: Ask,
) -> Result<Answer, Failed>
where
    Ask: Message + Send + Sync + 'static,
    Answer: Message + Default + Send + Sync + 'static,
{
    let mut grpc = Grpc::new(channel).max_decoding_message_size(MOST_ANSWER);
    ready(&mut grpc).await?;
    let codec = ProstCodec::<Ask, Answer>::default();
    let path = PathAndQuery::from_static(path);
    match grpc.unary(Request::new(ask), path, codec).await {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => Err(Failed {
            unsent: never_connected(&status),
            status,
        }),
    }
}

/// Whether the call failed because no connection came to be, so that nothing went out.
fn never_connected(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// Whether another member may answer better. What etcd itself refuses it refuses everywhere.
fn is_of_the_member(status: &Status) -> bool {
    use tonic::Code;
    matches!(
        status.code(),
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
    )
}

fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// What to tell of a failed call.
pub(super) fn unavailable(status: &Status) -> Error {
    let mut cause = status.message().to_owned();
    if let Some(source) = status.source() {
        cause.push_str(": ");
        cause.push_str(&text(source));
    }
    Error::new(
        ErrorCode::StoreUnavailable,
        "the fleet's records in etcd cannot be reached",
    )
    .because(cause)
    .hint("see whether most of its members run: etcdctl endpoint status --cluster")
    .retry_after(Duration::from_secs(1))
}
