//! `AccessService`.

use std::sync::Arc;

use ghost_application::UseCases;
use ghost_application::access::{CreateKeyCommand, EnrollCommand};
use ghost_domain::{Role, Secret};
use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::access_service_server::AccessService;
use tonic::{Request, Response, Status};

use super::{OrStatus, principal};
use crate::convert;

/// Serves identities and credentials.
pub(crate) struct Access(pub(crate) Arc<UseCases>);

type Answered<T> = Result<Response<T>, Status>;

fn role(text: &str) -> Result<Role, Status> {
    text.parse::<Role>()
        .map_err(|error| error.field("role", "viewer, operator or admin"))
        .or_status()
}

#[tonic::async_trait]
impl AccessService for Access {
    async fn create_token(
        &self,
        request: Request<message::CreateTokenRequest>,
    ) -> Answered<message::JoinToken> {
        let caller = principal(request.extensions())?;
        let role = role(&request.get_ref().role)?;
        let guest_access = request.get_ref().guest_access.unwrap_or(true);
        let (text, token) = self
            .0
            .create_token
            .execute(&caller, role, guest_access)
            .await
            .or_status()?;
        Ok(Response::new(convert::join_token(&text, &token)))
    }

    async fn enroll(
        &self,
        request: Request<message::EnrollRequest>,
    ) -> Answered<message::IssuedCertificate> {
        let given = request.into_inner();
        let command = EnrollCommand {
            token: Secret::new(given.token),
            request_pem: given.request_pem,
            name: given.name,
        };
        let identity = self.0.enroll.execute(command).await.or_status()?;
        Ok(Response::new(convert::issued(identity)))
    }

    async fn renew(
        &self,
        request: Request<message::RenewRequest>,
    ) -> Answered<message::IssuedCertificate> {
        let caller = principal(request.extensions())?;
        let identity = self
            .0
            .renew
            .execute(&caller, &request.get_ref().request_pem)
            .await;
        Ok(Response::new(convert::issued(identity.or_status()?)))
    }

    async fn who_am_i(
        &self,
        request: Request<message::WhoAmIRequest>,
    ) -> Answered<message::Identity> {
        let caller = principal(request.extensions())?;
        Ok(Response::new(convert::identity(&caller)))
    }

    async fn list_certificates(
        &self,
        request: Request<message::ListCertificatesRequest>,
    ) -> Answered<message::ListCertificatesResponse> {
        let caller = principal(request.extensions())?;
        let found = self
            .0
            .list_certificates
            .execute(&caller)
            .await
            .or_status()?;
        let certificates = found.iter().map(convert::certificate).collect();
        Ok(Response::new(message::ListCertificatesResponse {
            certificates,
        }))
    }

    async fn revoke_certificate(
        &self,
        request: Request<message::RevokeCertificateRequest>,
    ) -> Answered<message::Certificate> {
        let caller = principal(request.extensions())?;
        let revoked = self
            .0
            .revoke_certificate
            .execute(&caller, &request.get_ref().id)
            .await;
        Ok(Response::new(convert::certificate(&revoked.or_status()?)))
    }

    async fn create_key(
        &self,
        request: Request<message::CreateKeyRequest>,
    ) -> Answered<message::CreatedKey> {
        let caller = principal(request.extensions())?;
        let given = request.into_inner();
        let command = CreateKeyCommand {
            role: role(&given.role)?,
            name: given.name,
            guest_access: given.guest_access.unwrap_or(true),
            lifetime: convert::lifetime(given.lifetime.as_ref()).or_status()?,
        };
        let (secret, key) = self
            .0
            .create_key
            .execute(&caller, command)
            .await
            .or_status()?;
        Ok(Response::new(convert::created_key(&secret, &key)))
    }

    async fn list_keys(
        &self,
        request: Request<message::ListKeysRequest>,
    ) -> Answered<message::ListKeysResponse> {
        let caller = principal(request.extensions())?;
        let found = self.0.list_keys.execute(&caller).await.or_status()?;
        let keys = found.iter().map(convert::api_key).collect();
        Ok(Response::new(message::ListKeysResponse { keys }))
    }

    async fn revoke_key(
        &self,
        request: Request<message::RevokeKeyRequest>,
    ) -> Answered<message::ApiKey> {
        let caller = principal(request.extensions())?;
        let revoked = self
            .0
            .revoke_key
            .execute(&caller, &request.get_ref().id)
            .await;
        Ok(Response::new(convert::api_key(&revoked.or_status()?)))
    }
}
