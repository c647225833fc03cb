//! `image list|catalogue|pull|show|delete`.

use ghost_proto::agent::v1::{
    DeleteImageRequest, GetImageRequest, ListCatalogueRequest, ListImagesRequest, PullImageRequest,
};
use ghost_proto::view::{CatalogueEntry, Image};

use super::{change, describe, each};
use crate::arguments::{Change, ImagePull};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};

pub(super) async fn list(session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let images: Vec<Image> = agent
        .images()
        .list(ask(ListImagesRequest {}))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner()
        .images
        .into_iter()
        .map(Image::from)
        .collect();
    session
        .printer
        .list(&images, |image| &image.name, describe::image_table)?;
    if images.is_empty() {
        session
            .printer
            .note("the cache is empty; what can be pulled: ghostctl image catalogue");
    }
    Ok(Exit::Done)
}

pub(super) async fn catalogue(session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let entries: Vec<CatalogueEntry> = agent
        .images()
        .list_catalogue(ask(ListCatalogueRequest {}))
        .await
        .map_err(|status| agent.failure(&status))?
        .into_inner()
        .entries
        .into_iter()
        .map(CatalogueEntry::from)
        .collect();
    session
        .printer
        .list(&entries, |entry| &entry.name, describe::catalogue_table)?;
    if entries.is_empty() {
        session.printer.note("the catalogue is empty");
    }
    Ok(Exit::Done)
}

pub(super) async fn pull(args: ImagePull, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    change::one(
        &args.change,
        "Pulled",
        session,
        &agent,
        |agent, request_id| async move {
            let request = PullImageRequest {
                name: args.name,
                url: args.url.unwrap_or_default(),
                checksum: args.checksum.unwrap_or_default(),
                request_id,
            };
            agent.images().pull(ask(request)).await
        },
    )
    .await?;
    Ok(Exit::Done)
}

pub(super) async fn show(names: Vec<String>, session: &Session) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (images, exit) = each(&names, session, |name| async {
        agent
            .images()
            .get(ask(GetImageRequest { name }))
            .await
            .map(|answer| Image::from(answer.into_inner()))
            .map_err(|status| agent.failure(&status))
    })
    .await;
    session
        .printer
        .several(&images, names.len(), |image| &image.name, describe::image)?;
    Ok(exit)
}

pub(super) async fn delete(
    names: Vec<String>,
    change: Change,
    session: &Session,
) -> Result<Exit, Failure> {
    change::each(
        &names,
        &change,
        "Deleted",
        session,
        |agent, name, request_id| async move {
            let request = DeleteImageRequest { name, request_id };
            agent.images().delete(ask(request)).await
        },
    )
    .await
}
