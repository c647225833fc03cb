//! `ImageService`.

use ghost_proto::agent::v1::image_service_server::ImageService;
use ghost_proto::agent::v1::import_image_request::Part;
use ghost_proto::agent::v1::*;
use tonic::{Request, Response, Status, Streaming};

use super::{Fake, error, moment, refuse};

type Answer<T> = Result<Response<T>, Status>;

fn image(name: &str) -> Image {
    Image {
        name: name.to_owned(),
        digest: "ab".repeat(32),
        format: "qcow2".to_owned(),
        virtual_size_bytes: 2 << 30,
        file_size_bytes: 400 << 20,
        source: "https://cloud.example/debian-12.qcow2".to_owned(),
        checksum: format!("sha512:{}", "cd".repeat(64)),
        created_at: moment(-2 * 86_400),
        last_used_at: moment(-120),
        used_by: vec!["web-1".to_owned(), "db-1".to_owned()],
    }
}

#[tonic::async_trait]
impl ImageService for Fake {
    async fn get(&self, request: Request<GetImageRequest>) -> Answer<Image> {
        let name = self.note(request).name;
        if name.starts_with("absent") {
            return Err(error(
                "image_not_found",
                &format!("there is no image {name}"),
                "",
                "ghostctl image list",
            ));
        }
        Ok(Response::new(image(&name)))
    }

    async fn list(&self, request: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        self.note(request);
        let mut unused = image("tiny");
        unused.used_by.clear();
        unused.last_used_at = None;
        let images = vec![image("debian-12"), unused];
        Ok(Response::new(ListImagesResponse { images }))
    }

    async fn list_catalogue(
        &self,
        request: Request<ListCatalogueRequest>,
    ) -> Answer<ListCatalogueResponse> {
        self.note(request);
        let entry = |name: &str, aliases: &[&str], cached| CatalogueEntry {
            name: name.to_owned(),
            aliases: aliases.iter().map(|&alias| alias.to_owned()).collect(),
            description: format!("{name} cloud image"),
            url: format!("https://cloud.example/{name}.qcow2"),
            cached,
        };
        let entries = vec![
            entry("debian-12", &["debian", "bookworm"], true),
            entry("ubuntu-24.04", &["ubuntu"], false),
        ];
        Ok(Response::new(ListCatalogueResponse { entries }))
    }

    async fn pull(&self, request: Request<PullImageRequest>) -> Answer<Operation> {
        let request = self.note(request);
        refuse(&request.name)?;
        Ok(self.begin("pull_image", &request.name, &request.request_id))
    }

    async fn import(&self, request: Request<Streaming<ImportImageRequest>>) -> Answer<Operation> {
        let mut parts = request.into_inner();
        let Some(Part::Header(header)) = parts.message().await?.and_then(|first| first.part) else {
            return Err(Status::invalid_argument("the header is missing"));
        };
        self.note(Request::new(header.clone()));
        refuse(&header.name)?;
        while let Some(next) = parts.message().await? {
            if let Some(Part::Data(data)) = next.part {
                assert!(data.len() <= 1 << 20);
                self.0.imported.lock().unwrap().extend_from_slice(&data);
            }
        }
        Ok(self.begin("import_image", &header.name, &header.request_id))
    }

    async fn delete(&self, request: Request<DeleteImageRequest>) -> Answer<Operation> {
        let request = self.note(request);
        refuse(&request.name)?;
        Ok(self.begin("delete_image", &request.name, &request.request_id))
    }
}
