//! Events of the fleet, as they happen (server-sent events, HTML Living Standard 9.2).

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use futures::stream;
use ghost_presentation::http::events::{last_seen, told};
use ghost_presentation::http::extract::Query;
use ghost_presentation::http::problem::Problem;
use ghost_proto::agent::v1 as agent;
use ghost_proto::view;

use super::ask::{call, framed};
use super::bodies::EventsQuery;
use super::{Answer, Shell};

/// What happens in the fleet
///
/// Server-sent events: the event's name is its kind, its data the JSON of an event. After a break a
/// client goes on where it was by `Last-Event-ID`, as browsers do by themselves; `missed` says how
/// many were not kept so long. What happens on one host in all detail is at
/// `/v1/hosts/{host}/events`.
#[utoipa::path(get, path = "/v1/events", tag = "events", params(EventsQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 200, content_type = "text/event-stream", body = view::Event),
        (status = "default", body = Problem)))]
pub(super) async fn watch(
    State(shell): State<Arc<Shell>>,
    headers: HeaderMap,
    Query(query): Query<EventsQuery>,
) -> Answer {
    let run = shell.front.parts.events.run().to_owned();
    let request = agent::WatchEventsRequest {
        vm: query.vm,
        replay: query.replay || headers.contains_key("last-event-id"),
        follow: query.follow,
        after: last_seen(&headers, &run),
    };
    let path = "/ghost.agent.v1.EventService/Watch";
    let body = framed(&request)?.into();
    let answers = call(&shell.front, &headers, None, path, body).await?;
    let events = stream::unfold(answers, |mut answers| async move {
        // A refusal in the middle ends the answer: there is no place for a reason here.
        let event: agent::Event = answers.next().await.ok()??;
        Some((event, answers))
    });
    Ok(told(run, events))
}
