//! Core's own operators, by the service that `ghostctl` knows from a host's agent.

use std::sync::Arc;

use ghost_domain::{Error, ErrorCode, Secret};
use ghost_presentation::convert::timestamp;
use ghost_proto::agent::v1::access_service_server::AccessService;
use ghost_proto::agent::v1::{
    ApiKey, Certificate, CreateKeyRequest, CreateTokenRequest, CreatedKey, EnrollRequest, Identity,
    IssuedCertificate, JoinToken, ListCertificatesRequest, ListCertificatesResponse,
    ListKeysRequest, ListKeysResponse, RenewRequest, RevokeCertificateRequest, RevokeKeyRequest,
    WhoAmIRequest,
};
use tonic::{Request, Response};

use super::super::front::source_name;
use super::{Answer, answer, caller, note};
use crate::application::accounts::{
    CreateKeyCommand, CreateTokenCommand, Keys, Tokens, Users, WhoJoins,
};
use crate::application::enrolment::{PersonEnrolment, PersonIdentity};
use crate::domain::CallerSource;
use crate::presentation::convert;

pub(super) struct Access {
    pub(super) enrolment: PersonEnrolment,
    pub(super) tokens: Arc<Tokens>,
    pub(super) users: Arc<Users>,
    pub(super) keys: Arc<Keys>,
}

fn issued(identity: PersonIdentity) -> IssuedCertificate {
    IssuedCertificate {
        certificate_pem: identity.issued.certificate_pem,
        authority_pem: identity.issued.authority_pem,
        expires_at: Some(timestamp(identity.issued.expires_at)),
        id: identity.user.id.to_string(),
        role: identity.user.role.as_str().to_owned(),
    }
}

#[tonic::async_trait]
impl AccessService for Access {
    async fn create_token(&self, request: Request<CreateTokenRequest>) -> Answer<JoinToken> {
        let caller = caller(&request)?;
        let role = request.into_inner().role;
        let created = async {
            let command = CreateTokenCommand {
                // Of the same tenant as the caller, where it has one.
                tenant: caller.tenant.clone(),
                who: WhoJoins::Person(role.parse()?),
                lifetime: None,
            };
            self.tokens.create(&caller, command).await
        };
        answer(created.await.map(|created| JoinToken {
            token: created.text.expose().to_owned(),
            expires_at: Some(timestamp(created.token.expires_at)),
            role,
            ..JoinToken::default()
        }))
    }

    async fn enroll(&self, request: Request<EnrollRequest>) -> Answer<IssuedCertificate> {
        let note = note(&request);
        let request = request.into_inner();
        note.subject(&request.name);
        let enrolled = self
            .enrolment
            .enroll(
                &Secret::new(request.token),
                &request.request_pem,
                &request.name,
            )
            .await;
        answer(enrolled.map(issued))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Answer<IssuedCertificate> {
        let caller = caller(&request)?;
        let request_pem = request.into_inner().request_pem;
        answer(
            self.enrolment
                .renew(&caller, &request_pem)
                .await
                .map(issued),
        )
    }

    async fn who_am_i(&self, request: Request<WhoAmIRequest>) -> Answer<Identity> {
        let caller = caller(&request)?;
        let id = match &caller.source {
            CallerSource::Key { id } => id.to_string(),
            CallerSource::Socket { .. }
            | CallerSource::Certificate
            | CallerSource::OpenIdConnect => {
                caller.user.map(|user| user.to_string()).unwrap_or_default()
            }
        };
        Ok(Response::new(Identity {
            name: caller.full_name(),
            role: caller.role.as_str().to_owned(),
            source: source_name(&caller.source).to_owned(),
            id,
            server: "core".to_owned(),
            tenant: caller
                .tenant
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            ..Identity::default()
        }))
    }

    async fn list_certificates(
        &self,
        request: Request<ListCertificatesRequest>,
    ) -> Answer<ListCertificatesResponse> {
        let caller = caller(&request)?;
        answer(self.users.list(&caller, None).map(|users| {
            ListCertificatesResponse {
                certificates: users
                    .iter()
                    .map(|view| convert::certificate(&view.user))
                    .collect(),
            }
        }))
    }

    async fn revoke_certificate(
        &self,
        request: Request<RevokeCertificateRequest>,
    ) -> Answer<Certificate> {
        let (caller, note) = (caller(&request)?, note(&request));
        let id = request.into_inner().id;
        note.subject(&id);
        let revoked = self.users.revoke(&caller, &id).await;
        answer(revoked.map(|view| convert::certificate(&view.user)))
    }

    async fn create_key(&self, request: Request<CreateKeyRequest>) -> Answer<CreatedKey> {
        let (caller, note) = (caller(&request)?, note(&request));
        let request = request.into_inner();
        note.subject(&request.name);
        let created = async {
            let command = CreateKeyCommand {
                name: request.name,
                tenant: caller.tenant.clone(),
                role: request.role.parse()?,
                lifetime: convert::lifetime(request.lifetime.as_ref())?,
                hosts: Vec::new(),
            };
            self.keys.create(&caller, command).await
        };
        answer(created.await.map(|(secret, key)| CreatedKey {
            key: Some(convert::api_key(&key)),
            secret: secret.expose().to_owned(),
        }))
    }

    async fn list_keys(&self, request: Request<ListKeysRequest>) -> Answer<ListKeysResponse> {
        let caller = caller(&request)?;
        answer(self.keys.list(&caller, None).map(|keys| ListKeysResponse {
            keys: keys.iter().map(|key| convert::api_key(key)).collect(),
        }))
    }

    async fn revoke_key(&self, request: Request<RevokeKeyRequest>) -> Answer<ApiKey> {
        let (caller, note) = (caller(&request)?, note(&request));
        let id = request.into_inner().id;
        note.subject(&id);
        if id.is_empty() {
            return answer(Err(Error::new(
                ErrorCode::CredentialNotFound,
                "no key was named",
            )));
        }
        let revoked = self.keys.revoke(&caller, &id).await;
        answer(revoked.map(|key| convert::api_key(&key)))
    }
}
