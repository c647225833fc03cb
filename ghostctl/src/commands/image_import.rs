//! `image import`: uploads a file and waits until the agent has taken it in.

use std::path::Path;
use std::time::Instant;

use ghost_proto::agent::v1::import_image_request::Part;
use ghost_proto::agent::v1::{ImportImageHeader, ImportImageRequest};
use ghost_proto::view::Progress;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::change;
use crate::arguments::ImageImport;
use crate::connect::Session;
use crate::errors::{Exit, Failure};
use crate::progress::Tracker;

/// The largest piece that the agent takes.
const PIECE: usize = 1 << 20;

/// Endings that say how a file is packed or laid out, and nothing about what it is.
const ENDINGS: [&str; 7] = [".gz", ".xz", ".zst", ".qcow2", ".img", ".raw", ".bin"];

pub(super) async fn run(args: ImageImport, session: &Session) -> Result<Exit, Failure> {
    let stdin = args.file == Path::new("-");
    let file_name = if stdin {
        "stdin".to_owned()
    } else {
        args.file
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let name = match (args.name, stdin) {
        (Some(name), _) => name,
        (None, false) => name_of(&file_name),
        (None, true) => return Err(Failure::usage("an image from stdin needs --name")),
    };
    let (source, length) = open(&args.file, stdin).await?;
    let agent = session.agent().await?;
    let mut tracker = session.printer.progress().track(&name);
    let (pieces, stream) = mpsc::channel(4);
    change::one(
        &args.change,
        "Imported",
        session,
        &agent,
        |agent, request_id| async move {
            let header = ImportImageHeader {
                name,
                file_name,
                request_id,
            };
            let mut images = agent.images();
            let upload = images.import(ReceiverStream::new(stream));
            let sending = async {
                match send(header, source, length, &pieces, &mut tracker).await {
                    Ok(()) => {
                        drop(pieces);
                        // The agent's answer ends the upload, not our last piece.
                        std::future::pending().await
                    }
                    Err(error) => {
                        // The stream must break and not end: half a file that ends cleanly would
                        // be taken for a whole one.
                        std::mem::forget(pieces);
                        Err(unreadable(&error))
                    }
                }
            };
            tokio::select! {
                answer = upload => answer,
                failed = sending => failed,
            }
        },
    )
    .await?;
    Ok(Exit::Done)
}

/// An error of ours in the shape of an answer.
fn unreadable(error: &std::io::Error) -> Status {
    Status::with_error_details(
        Code::Aborted,
        "the file could not be read to its end",
        ErrorDetails::with_error_info(
            "io_failed",
            "ghostctl",
            [("cause".to_owned(), error.to_string())],
        ),
    )
}

async fn open(
    path: &Path,
    stdin: bool,
) -> Result<(Box<dyn AsyncRead + Unpin>, Option<u64>), Failure> {
    if stdin {
        return Ok((Box::new(tokio::io::stdin()), None));
    }
    let unreadable = |error: &std::io::Error| {
        Failure::usage(format!("{} cannot be read", path.display())).because(error)
    };
    let file = tokio::fs::File::open(path)
        .await
        .map_err(|error| unreadable(&error))?;
    let metadata = file.metadata().await.map_err(|error| unreadable(&error))?;
    if metadata.is_dir() {
        return Err(Failure::usage(format!("{} is a folder", path.display())));
    }
    let length = metadata.is_file().then_some(metadata.len());
    Ok((Box::new(file), length))
}

/// Sends the header and the file; ends early where the agent no longer listens.
async fn send(
    header: ImportImageHeader,
    mut source: Box<dyn AsyncRead + Unpin>,
    length: Option<u64>,
    pieces: &mpsc::Sender<ImportImageRequest>,
    tracker: &mut Tracker,
) -> std::io::Result<()> {
    let mut part = Part::Header(header);
    let begun = Instant::now();
    let mut done = 0;
    loop {
        let message = ImportImageRequest { part: Some(part) };
        if pieces.send(message).await.is_err() {
            return Ok(());
        }
        let mut piece = Vec::with_capacity(PIECE);
        (&mut source)
            .take(PIECE as u64)
            .read_to_end(&mut piece)
            .await?;
        if piece.is_empty() {
            return Ok(());
        }
        done += piece.len() as u64;
        tracker.update("uploading", Some(&progress(done, length, begun)));
        part = Part::Data(piece.into());
    }
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate for people"
)]
fn progress(done: u64, total: Option<u64>, begun: Instant) -> Progress {
    let rate = done as f64 / begun.elapsed().as_secs_f64().max(0.001);
    Progress {
        bytes_done: done,
        bytes_total: total,
        bytes_per_second: Some(rate as u64),
        remaining_seconds: total.map(|total| total.saturating_sub(done) as f64 / rate.max(1.0)),
        fraction: total.map(|total| done as f64 / total.max(1) as f64),
    }
}

/// `debian-12.qcow2.xz` is `debian-12`.
fn name_of(file_name: &str) -> String {
    let mut name = file_name.to_ascii_lowercase();
    while let Some(shorter) = ENDINGS.iter().find_map(|ending| name.strip_suffix(ending)) {
        name = shorter.to_owned();
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_file_name_without_its_endings() {
        for (file, name) in [
            ("debian-12.qcow2.xz", "debian-12"),
            ("Tiny.RAW", "tiny"),
            (
                "noble-server-cloudimg-amd64.img",
                "noble-server-cloudimg-amd64",
            ),
            ("plain", "plain"),
        ] {
            assert_eq!(name_of(file), name);
        }
    }
}
