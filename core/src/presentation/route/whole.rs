//! Bodies of one message, whole in memory.

use axum::http::HeaderMap;
use bytes::{BufMut, Bytes, BytesMut};
use ghost_domain::{Error, ErrorCode, Result};
use ghost_presentation::grpc::{MOST_MESSAGE, code_name};
use http_body::Body as _;
use tonic::body::Body;

/// A body that is in memory already.
pub(in crate::presentation) fn whole(bytes: Bytes) -> Body {
    Body::new(axum::body::Body::from(bytes))
}

/// All of a body of one message, and its trailers.
pub(in crate::presentation) async fn collect(mut body: Body) -> Result<(Bytes, Option<HeaderMap>)> {
    let mut bytes = BytesMut::new();
    let mut trailers = None;
    loop {
        let frame =
            std::future::poll_fn(|context| std::pin::Pin::new(&mut body).poll_frame(context));
        let Some(frame) = frame.await else {
            return Ok((bytes.freeze(), trailers));
        };
        let frame = frame.map_err(|status| {
            Error::new(ErrorCode::Cancelled, "the call was broken off")
                .because(code_name(status.code()))
        })?;
        match frame.into_data() {
            Ok(data) => {
                if bytes.len() + data.len() > MOST_MESSAGE + 5 {
                    return Err(
                        Error::new(ErrorCode::PayloadTooLarge, "the message is too large")
                            .because(format!("{MOST_MESSAGE} bytes are the most")),
                    );
                }
                bytes.put(data);
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
}
