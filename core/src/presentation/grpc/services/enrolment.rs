//! How hosts join and stay.

use ghost_domain::{Error, ErrorCode, Secret};
use ghost_presentation::convert::timestamp;
use ghost_presentation::grpc::status::to_status;
use ghost_proto::core::v1::enrolment_service_server::EnrolmentService;
use ghost_proto::core::v1::{
    EnrollHostRequest, HostCertificate, RecoverHostRequest, RenewHostRequest,
};
use tonic::Request;

use super::{Answer, answer, note};
use crate::application::enrolment::{
    EnrollHostCommand, HostEnrolment, HostIdentity, RecoverHostCommand,
};
use crate::domain::PeerIdentity;

pub(super) struct Enrolments {
    pub(super) enrolment: HostEnrolment,
}

fn told(identity: HostIdentity) -> HostCertificate {
    HostCertificate {
        certificate_pem: identity.issued.certificate_pem,
        authority_pem: identity.issued.authority_pem,
        expires_at: Some(timestamp(identity.issued.expires_at)),
        generation: identity.generation,
        host_id: identity.host.to_string(),
        host_name: identity.name.to_string(),
        tenant: identity.tenant.to_string(),
        trust_domain: identity.trust_domain,
        addresses: identity.addresses,
    }
}

#[tonic::async_trait]
impl EnrolmentService for Enrolments {
    async fn enroll(&self, request: Request<EnrollHostRequest>) -> Answer<HostCertificate> {
        let note = note(&request);
        let request = request.into_inner();
        let enrolled = self
            .enrolment
            .enroll(EnrollHostCommand {
                token: Secret::new(request.token),
                request_pem: request.request_pem,
                name: request.name,
                agent_version: request.agent_version,
            })
            .await;
        if let Ok(identity) = &enrolled {
            note.host(identity.host, &identity.tenant);
            note.subject(identity.name.as_str());
        }
        answer(enrolled.map(told))
    }

    async fn renew(&self, request: Request<RenewHostRequest>) -> Answer<HostCertificate> {
        let Some(peer) = request.extensions().get::<PeerIdentity>().cloned() else {
            return Err(to_status(&Error::new(
                ErrorCode::Unauthenticated,
                "this call is for hosts only",
            )));
        };
        let request_pem = request.into_inner().request_pem;
        answer(self.enrolment.renew(&peer, &request_pem).await.map(told))
    }

    async fn recover(&self, request: Request<RecoverHostRequest>) -> Answer<HostCertificate> {
        let note = note(&request);
        let request = request.into_inner();
        let recovered = self
            .enrolment
            .recover(RecoverHostCommand {
                certificate_pem: request.certificate_pem,
                request_pem: request.request_pem,
                proof: request.proof,
            })
            .await;
        if let Ok(identity) = &recovered {
            note.host(identity.host, &identity.tenant);
            note.subject(identity.name.as_str());
        }
        answer(recovered.map(told))
    }
}
