//! What a link makes of the words of Core and of Piko's server, one by one and without a link: for
//! those who try them with anything at all (`fuzz/`).

use ghost_domain::Result;
use ghost_proto::core::v1::link_message::Kind;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;

use super::piko::socket::{ByteSocket, config};
use super::token::HostToken;
use super::{control, convert};

/// The addresses that a pasted token names.
///
/// # Errors
/// `TokenInvalid`, which says what is wrong and shows nothing of the token.
pub fn host_token(text: &str) -> Result<Vec<String>> {
    HostToken::parse(text).map(|token| token.addresses)
}

/// Reads a message of Core's as a link does.
pub fn message(kind: Kind) {
    match kind {
        Kind::Command(command) => drop(convert::command(command)),
        Kind::Goodbye(goodbye) => drop(control::farewell(goodbye)),
        Kind::Welcome(welcome) => drop(control::intervals(&welcome)),
        // Numbers, and what is a host's to send.
        Kind::Ping(_)
        | Kind::Pong(_)
        | Kind::HeartbeatReply(_)
        | Kind::CommandKept(_)
        | Kind::Hello(_)
        | Kind::Heartbeat(_)
        | Kind::CommandResult(_) => {}
    }
}

/// The bytes that a server of Piko's sends over a WebSocket that was opened.
pub async fn web_socket<S>(stream: S) -> impl AsyncRead + AsyncWrite + Unpin
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let socket = WebSocketStream::from_raw_socket(stream, Role::Client, Some(config())).await;
    ByteSocket::new(socket).0
}
