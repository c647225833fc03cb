//! Answers that go on: they end when their source does, when the agent shuts down, and when the
//! caller's identity is no longer good.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::{Stream, StreamExt, stream};
use ghost_domain::{Error, ErrorCode};
use tokio_util::sync::CancellationToken;
use tonic::{Extensions, Status};

use super::to_status;

/// What a streaming answer is.
pub(super) type Answer<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// So many items may still follow once a stream is called off: one that is at its end anyway ends
/// well, one that has always something to say ends all the same.
const MOST_AFTER: u8 = 8;

/// Holds a stream to the conditions under which it was allowed.
#[derive(Clone, Debug)]
pub(crate) struct Leash {
    stop: CancellationToken,
    reason: Arc<OnceLock<Error>>,
}

impl Leash {
    /// A leash that is pulled when `shutdown` is.
    pub(crate) fn new(shutdown: &CancellationToken) -> Self {
        Self {
            stop: shutdown.child_token(),
            reason: Arc::default(),
        }
    }

    /// Ends the stream with `reason`.
    pub(crate) fn pull(&self, reason: Error) {
        // Only the first reason counts.
        drop(self.reason.set(reason));
        self.stop.cancel();
    }

    fn error(&self) -> Error {
        self.reason.get().cloned().unwrap_or_else(shutting_down)
    }
}

fn shutting_down() -> Error {
    Error::new(ErrorCode::ShuttingDown, "the agent is shutting down")
        .hint("VMs and operations are not touched; call again in a moment")
        .retry_after(Duration::from_secs(5))
}

/// The items of `source`, until it ends or the call's leash is pulled.
pub(super) fn until<T: Send + 'static>(
    extensions: &Extensions,
    source: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> Answer<T> {
    // The guard puts one there; without it the stream merely lasts longer.
    let leash = extensions
        .get::<Leash>()
        .cloned()
        .unwrap_or_else(|| Leash::new(&CancellationToken::new()));
    let state = (Box::pin(source), leash, false, MOST_AFTER);
    Box::pin(stream::unfold(
        state,
        |(mut source, leash, ended, mut after)| async move {
            if ended {
                return None;
            }
            if leash.stop.is_cancelled() {
                if after == 0 {
                    let status = to_status(&leash.error());
                    return Some((Err(status), (source, leash, true, after)));
                }
                after -= 1;
            }
            tokio::select! {
                biased;
                item = source.next() => item.map(|item| {
                    let failed = item.is_err();
                    (item, (source, leash, failed, after))
                }),
                () = leash.stop.cancelled() => {
                    let status = to_status(&leash.error());
                    Some((Err(status), (source, leash, true, after)))
                }
            }
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pulled_leash_ends_the_stream_with_its_reason() {
        let shutdown = CancellationToken::new();
        let leash = Leash::new(&shutdown);
        let mut extensions = Extensions::new();
        extensions.insert(leash.clone());
        let source = stream::iter([Ok(1)]).chain(stream::pending());
        let mut answer = until::<i32>(&extensions, source);
        assert_eq!(answer.next().await.unwrap().unwrap(), 1);
        leash.pull(Error::new(ErrorCode::Unauthenticated, "revoked"));
        let status = answer.next().await.unwrap().unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unauthenticated);
        assert!(answer.next().await.is_none());
    }

    #[tokio::test]
    async fn a_source_that_never_pauses_is_ended_too() {
        let leash = Leash::new(&CancellationToken::new());
        let mut extensions = Extensions::new();
        extensions.insert(leash.clone());
        let answer = until::<i32>(&extensions, stream::repeat_with(|| Ok(1)));
        leash.pull(Error::new(ErrorCode::Unauthenticated, "revoked"));
        let items: Vec<_> = answer.take(100).collect().await;
        assert_eq!(items.len(), usize::from(MOST_AFTER) + 1);
        assert!(items.last().unwrap().is_err());
    }

    #[tokio::test]
    async fn shutdown_ends_it_and_a_natural_end_stays_one() {
        let shutdown = CancellationToken::new();
        let mut extensions = Extensions::new();
        extensions.insert(Leash::new(&shutdown));
        let mut open = until::<i32>(&extensions, stream::pending());
        let mut done = until::<i32>(&extensions, stream::iter([Ok(7)]));
        shutdown.cancel();
        let status = open.next().await.unwrap().unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert_eq!(done.next().await.unwrap().unwrap(), 7);
        assert!(done.next().await.is_none());
    }
}
