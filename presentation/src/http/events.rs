//! Events, as they happen (server-sent events, HTML Living Standard 9.2).

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt, stream};
use ghost_application::event::WatchEventsCommand;
use ghost_proto::agent::v1 as message;
use ghost_proto::view;

use super::bodies::EventsQuery;
use super::extract::{Caller, Query};
use super::problem::Problem;
use super::{Answer, Shell};
use crate::convert;

/// What happens on the host
///
/// Server-sent events: the event's name is its kind, its data the JSON of an event. After a break a
/// client goes on where it was by `Last-Event-ID`, as browsers do by themselves.
#[utoipa::path(get, path = "/v1/events", tag = "events", params(EventsQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, content_type = "text/event-stream", body = view::Event),
        (status = "default", body = Problem)))]
pub(super) async fn watch(
    State(shell): State<Arc<Shell>>,
    Caller(caller): Caller,
    Query(query): Query<EventsQuery>,
    headers: HeaderMap,
) -> Answer {
    let seen = last_seen(&headers, &shell.run);
    let command = WatchEventsCommand {
        vm: query.vm,
        replay: query.replay || headers.contains_key("last-event-id"),
    };
    let (events, vm) = shell
        .use_cases
        .watch_events
        .execute(&caller, &command)
        .await?;
    let follow = query.follow;
    let source = stream::unfold(events, move |mut events| async move {
        loop {
            let event = if follow {
                events.next().await?
            } else {
                events.replayed()?
            };
            if event.sequence > seen && (vm.is_none() || event.vm == vm) {
                return Some((event, events));
            }
        }
    });
    let source = source
        .map(|event| convert::event(&event))
        .take_until(shell.shutdown.clone().cancelled_owned());
    Ok(told(shell.run.clone(), source))
}

/// Events as an answer that goes on; `run` tells their numbers from those of another run.
pub fn told(run: String, events: impl Stream<Item = message::Event> + Send + 'static) -> Response {
    let lines = events.map(move |event| {
        let line = Event::default()
            .id(format!("{run}-{}", event.sequence))
            .event(event.kind.clone());
        // Text and numbers only: there is nothing that JSON could refuse.
        let data = serde_json::to_string(&view::Event::from(event)).unwrap_or_default();
        Ok::<_, Infallible>(line.data(data))
    });
    let alive = KeepAlive::new().interval(Duration::from_secs(15));
    Sse::new(lines).keep_alive(alive).into_response()
}

/// The last sequence that the client saw of this run; 0 for another run's, so that it gets all.
pub fn last_seen(headers: &HeaderMap, run: &str) -> u64 {
    headers
        .get("last-event-id")
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.rsplit_once('-'))
        .filter(|(theirs, _)| *theirs == run)
        .and_then(|(_, sequence)| sequence.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_runs_position_counts_for_nothing() {
        let mut headers = HeaderMap::new();
        assert_eq!(last_seen(&headers, "abc"), 0);
        for (text, expected) in [("abc-7", 7), ("xyz-7", 0), ("abc", 0), ("abc-x", 0)] {
            headers.insert("last-event-id", text.parse().unwrap());
            assert_eq!(last_seen(&headers, "abc"), expected, "{text}");
        }
    }
}
