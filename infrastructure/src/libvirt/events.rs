//! One subscriber's side of the event channel.

use async_trait::async_trait;
use ghost_domain::ports::{HypervisorEvent, HypervisorEvents};
use tokio::sync::broadcast;

/// Receives from a broadcast channel; a subscriber that was too slow is told where things stand.
pub(crate) struct Subscriber {
    events: broadcast::Receiver<HypervisorEvent>,
    /// What to tell in place of what was missed: `Connected`, or `Disconnected` while that is so.
    standing: Box<dyn Fn() -> HypervisorEvent + Send + Sync>,
}

impl Subscriber {
    pub(crate) fn new(
        events: broadcast::Receiver<HypervisorEvent>,
        standing: impl Fn() -> HypervisorEvent + Send + Sync + 'static,
    ) -> Self {
        Self {
            events,
            standing: Box::new(standing),
        }
    }
}

#[async_trait]
impl HypervisorEvents for Subscriber {
    async fn next(&mut self) -> Option<HypervisorEvent> {
        match self.events.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Closed) => None,
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                tracing::warn!(missed, "a subscriber of hypervisor events was too slow");
                // It lists anew, and sees what comes from here on.
                self.events = self.events.resubscribe();
                Some((self.standing)())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_subscriber_is_told_to_list_anew_and_the_end_is_the_end() {
        let channel = broadcast::Sender::new(2);
        let mut subscriber = Subscriber::new(channel.subscribe(), || HypervisorEvent::Connected);
        let lost = HypervisorEvent::Disconnected { reason: "x".into() };
        for _ in 0..5 {
            channel.send(lost.clone()).unwrap();
        }
        assert_eq!(subscriber.next().await, Some(HypervisorEvent::Connected));
        channel.send(lost.clone()).unwrap();
        assert_eq!(subscriber.next().await, Some(lost));
        drop(channel);
        assert_eq!(subscriber.next().await, None);
    }
}
