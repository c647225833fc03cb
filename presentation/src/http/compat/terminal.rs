//! `WS /ws?vm_name=`: a shell of a VM, as text both ways.

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use ghost_domain::{Error, ErrorCode, Result};

use super::super::extract::Query;
use super::super::guest::{Framing, carry, carry_on, check_origin};
use super::super::problem::Problem;
use super::bodies::TerminalQuery;
use super::calls::place;
use super::{Answer, Asker, Batwa, BatwaFailure};

/// A terminal in a VM
///
/// A WebSocket, with the key in a header or, for a page, in the subprotocol `bearer.KEY` beside
/// `ghost.v1`. Frames of the client are what is typed, except for the text
/// `{"type":"resize","cols":80,"rows":24}`; frames of the server are text that is shown. The reason
/// of the closing frame says how the shell ended.
#[utoipa::path(get, path = "/ws", tag = "batwa", params(TerminalQuery),
    security(("bearer" = []), ("key" = [])),
    responses((status = 101, description = "A terminal"), (status = "default", body = Problem)))]
pub(super) async fn terminal(
    State(batwa): State<Batwa>,
    asker: Asker,
    Query(query): Query<TerminalQuery>,
    Upgrade(upgrade): Upgrade,
) -> Answer {
    let mut start = query.start();
    let (agent_id, vm) = place(batwa.as_ref(), &asker, query.vm_name, query.agent_id).await?;
    start.vm = vm;
    // Begun before the switch of protocols, so that a refusal is an answer with its own status.
    let session = batwa.execute(&asker, &agent_id, start).await?;
    Ok(carry_on(upgrade, move |socket| async move {
        let called_off = batwa.called_off(asker);
        carry(socket, session, Framing::Text, called_off).await;
    }))
}

/// A WebSocket that a page of ours asks for, or no page.
pub(super) struct Upgrade(WebSocketUpgrade);

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = BatwaFailure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, BatwaFailure> {
        check_origin(&parts.headers)?;
        match WebSocketUpgrade::from_request_parts(parts, state).await {
            Ok(upgrade) => Ok(Self(upgrade)),
            Err(cause) => Err(BatwaFailure(
                Error::new(
                    ErrorCode::InvalidArgument,
                    "this address is for a WebSocket",
                )
                .because(cause.body_text())
                .hint("connect with a WebSocket client"),
            )),
        }
    }
}
