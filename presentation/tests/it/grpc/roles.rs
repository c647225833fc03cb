//! Every RPC against every identity. The methods come from the table, which a unit test holds to
//! the descriptor set: no RPC can be forgotten.

use bytes::Bytes;
use ghost_domain::Role;
use ghost_presentation::Access;
use ghost_presentation::grpc::access::METHODS;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::*;

/// Messages as the bytes they are.
#[derive(Clone, Copy, Default)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put(buffer, item);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = bytes::Buf::remaining(buffer);
        Ok(Some(bytes::Buf::copy_to_bytes(buffer, length)))
    }
}

/// Calls a method with one message and says how it began: the guard's refusals come first.
pub(crate) async fn call(
    channel: &Channel,
    path: &'static str,
    message: Bytes,
) -> Result<(), Status> {
    call_with(channel, path, message, &[]).await
}

/// The same with metadata.
pub(crate) async fn call_with(
    channel: &Channel,
    path: &'static str,
    message: Bytes,
    metadata: &[(&'static str, &str)],
) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client
        .ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let path = axum::http::uri::PathAndQuery::from_static(path);
    let mut request = tonic::Request::new(tokio_stream::once(message));
    for (name, value) in metadata {
        let value = value.parse().unwrap();
        request.metadata_mut().insert(*name, value);
    }
    client.streaming(request, path, Raw).await.map(drop)
}

#[tokio::test]
async fn every_rpc_against_every_identity() {
    let served = Served::new().await;
    let world = &served.world;
    let callers = [
        ("none", None, None, false),
        ("viewer", Some(world.viewer), Some(Role::Viewer), true),
        ("operator", Some(world.operator), Some(Role::Operator), true),
        ("admin", Some(world.admin), Some(Role::Admin), true),
        ("revoked", Some(world.revoked), None, true),
        (
            "confined operator",
            Some(world.confined[0]),
            Some(Role::Operator),
            false,
        ),
        (
            "confined admin",
            Some(world.confined[1]),
            Some(Role::Admin),
            false,
        ),
    ];
    let mut checked = 0;
    for (name, credential, role, guests) in callers {
        let identity = credential.map(|id| served.ca.client(id));
        let channel = served.remote(identity).await;
        for method in METHODS {
            let path = method.path;
            let outcome = call(&channel, path, Bytes::new()).await;
            let refusal = outcome.as_ref().err().map(reason);
            let refusal = refusal.as_deref();
            let expected = match (method.access, role) {
                (Access::Anyone, _) => None,
                (Access::Role(_) | Access::Guests, None) => Some("unauthenticated"),
                (Access::Guests, Some(role)) if role < Role::Operator || !guests => {
                    Some("permission_denied")
                }
                (Access::Role(needed), Some(role)) if role < needed => Some("permission_denied"),
                (Access::Role(_) | Access::Guests, Some(_)) => None,
            };
            match expected {
                Some(code) => assert_eq!(refusal, Some(code), "{name} calls {path}"),
                None => assert!(
                    !matches!(refusal, Some("unauthenticated" | "permission_denied")),
                    "{name} calls {path}: {refusal:?}"
                ),
            }
            checked += 1;
        }
    }
    assert_eq!(checked, 7 * METHODS.len());
}

#[tokio::test]
async fn an_unknown_call_is_refused_and_told_to_nobody_without_an_identity() {
    let served = Served::new().await;
    let path = "/ghost.agent.v1.VmService/Explode";
    let nobody = served.remote(None).await;
    let status = call(&nobody, path, Bytes::new()).await.unwrap_err();
    assert_eq!(reason(&status), "unauthenticated");
    let viewer = served
        .remote(Some(served.ca.client(served.world.viewer)))
        .await;
    let status = call(&viewer, path, Bytes::new()).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unimplemented, "not_found")
    );
}
