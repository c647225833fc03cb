//! `ImageService`.

use std::sync::Arc;
use std::time::Duration;

use ghost_application::UseCases;
use ghost_application::image::{DeleteImageCommand, ImportImageCommand, PullImageCommand};
use ghost_domain::{Error, ErrorCode};
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::image_service_server::ImageService;
use ghost_proto::agent::v1::import_image_request::Part;
use tonic::{Request, Response, Status, Streaming};

use super::{OrStatus, principal};
use crate::convert;
use crate::grpc::guard::foreign;

/// Most bytes in one piece of an upload.
pub(crate) const MOST_PIECE: usize = 1024 * 1024;
/// How long an upload may stand still before it is thrown away.
const PATIENCE: Duration = Duration::from_secs(60);

/// Serves images.
pub(crate) struct Images(pub(crate) Arc<UseCases>);

type Answered<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ImageService for Images {
    async fn get(&self, request: Request<message::GetImageRequest>) -> Answered<message::Image> {
        let caller = principal(request.extensions())?;
        let view = self
            .0
            .get_image
            .execute(&caller, &request.get_ref().name)
            .await;
        Ok(Response::new(convert::image(&view.or_status()?)))
    }

    async fn list(
        &self,
        request: Request<message::ListImagesRequest>,
    ) -> Answered<message::ListImagesResponse> {
        let caller = principal(request.extensions())?;
        let views = self.0.list_images.execute(&caller).await.or_status()?;
        let images = views.iter().map(convert::image).collect();
        Ok(Response::new(message::ListImagesResponse { images }))
    }

    async fn list_catalogue(
        &self,
        request: Request<message::ListCatalogueRequest>,
    ) -> Answered<message::ListCatalogueResponse> {
        let caller = principal(request.extensions())?;
        let views = self.0.list_catalogue.execute(&caller).await.or_status()?;
        let entries = views.iter().map(convert::catalogue_entry).collect();
        Ok(Response::new(message::ListCatalogueResponse { entries }))
    }

    async fn pull(
        &self,
        request: Request<message::PullImageRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let given = request.into_inner();
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        let command = PullImageCommand {
            name: given.name,
            url: some(given.url),
            checksum: some(given.checksum),
            request_id: convert::request_id(&given.request_id).or_status()?,
        };
        let view = self
            .0
            .pull_image
            .execute(&caller, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::operation(&view)))
    }

    async fn import(
        &self,
        request: Request<Streaming<message::ImportImageRequest>>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let mut pieces = request.into_inner();
        let Some(Part::Header(header)) = next(&mut pieces).await.or_status()? else {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "the first message of an import is its header",
            )
            .field("header", "needed in the first message"))
            .or_status();
        };
        let command = ImportImageCommand {
            name: header.name,
            file_name: header.file_name,
            request_id: convert::request_id(&header.request_id).or_status()?,
        };
        // Whatever ends this call early drops the upload, and what came is thrown away.
        let mut upload = self
            .0
            .import_image
            .execute(&caller, command)
            .await
            .or_status()?;
        while let Some(part) = next(&mut pieces).await.or_status()? {
            let Part::Data(data) = part else {
                return Err(Error::new(
                    ErrorCode::InvalidArgument,
                    "an import has one header only",
                ))
                .or_status();
            };
            if data.len() > MOST_PIECE {
                return Err(Error::new(
                    ErrorCode::PayloadTooLarge,
                    "a piece of an upload is too large",
                )
                .because("1 MiB is the most"))
                .or_status();
            }
            upload.append(&data).await.or_status()?;
        }
        let view = upload.finish().await.or_status()?;
        Ok(Response::new(convert::operation(&view)))
    }

    async fn delete(
        &self,
        request: Request<message::DeleteImageRequest>,
    ) -> Answered<message::Operation> {
        let caller = principal(request.extensions())?;
        let given = request.into_inner();
        let command = DeleteImageCommand {
            name: given.name,
            request_id: convert::request_id(&given.request_id).or_status()?,
        };
        let view = self
            .0
            .delete_image
            .execute(&caller, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::operation(&view)))
    }
}

/// The next part of an upload; `None` at its end. A message without a part counts as empty data.
async fn next(
    pieces: &mut Streaming<message::ImportImageRequest>,
) -> ghost_domain::Result<Option<Part>> {
    let message = tokio::time::timeout(PATIENCE, pieces.message())
        .await
        .map_err(|_| {
            Error::new(
                ErrorCode::DeadlineExceeded,
                "the upload stood still for too long",
            )
            .hint("upload it again")
        })?
        .map_err(|status| foreign(&status))?;
    Ok(message.map(|message| {
        message
            .part
            .unwrap_or_else(|| Part::Data(Default::default()))
    }))
}
