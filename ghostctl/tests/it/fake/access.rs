//! `AccessService`, with a CA that really signs.

use ghost_proto::agent::v1::access_service_server::AccessService;
use ghost_proto::agent::v1::*;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tonic::transport::{Identity as TlsIdentity, ServerTlsConfig};
use tonic::{Request, Response, Status};

use super::{Fake, error, id_of, moment};

type Answer<T> = Result<Response<T>, Status>;

/// A CA of an agent.
pub(crate) struct Authority {
    params: CertificateParams,
    key: KeyPair,
    pem: String,
    der: Vec<u8>,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).unwrap();
        Self {
            pem: certificate.pem(),
            der: certificate.der().to_vec(),
            params,
            key,
        }
    }

    pub(crate) fn fingerprint(&self) -> String {
        let digest = Sha256::digest(&self.der);
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    pub(crate) fn token(&self) -> String {
        format!("ghost-join-v1.id.secret.{}", self.fingerprint())
    }

    fn issuer(&self) -> Issuer<'_, &KeyPair> {
        Issuer::from_params(&self.params, &self.key)
    }

    /// TLS as the agent has it: its leaf with its CA, and client certificates where there are some.
    pub(crate) fn server_tls(&self) -> ServerTlsConfig {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        // Not the name that the tests connect to: the CA says who the agent is, not the name.
        params.subject_alt_names = vec![SanType::DnsName("ghost-agent".try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let leaf = params.signed_by(&key, &self.issuer()).unwrap();
        let chain = format!("{}{}", leaf.pem(), self.pem);
        ServerTlsConfig::new()
            .identity(TlsIdentity::from_pem(chain, key.serialize_pem()))
            .client_ca_root(tonic::transport::Certificate::from_pem(&self.pem))
            .client_auth_optional(true)
    }

    /// A client certificate for a request, from and to so many seconds from now.
    pub(crate) fn sign(&self, request_pem: &str, (begin, end): (i64, i64)) -> String {
        let mut request = CertificateSigningRequestParams::from_pem(request_pem).unwrap();
        let now = OffsetDateTime::now_utc();
        request.params.not_before = now + time::Duration::seconds(begin);
        request.params.not_after = now + time::Duration::seconds(end);
        request.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        request.signed_by(&self.issuer()).unwrap().pem()
    }
}

impl Fake {
    fn issue(&self, request_pem: &str) -> Response<IssuedCertificate> {
        let lifetime = *self.0.lifetime.lock().unwrap();
        Response::new(IssuedCertificate {
            certificate_pem: self.0.authority.sign(request_pem, lifetime),
            authority_pem: self.0.authority.pem.clone(),
            expires_at: moment(lifetime.1),
            id: id_of("certificate", "alice"),
            role: "operator".to_owned(),
        })
    }
}

fn certificate(name: &str, revoked: bool) -> Certificate {
    Certificate {
        id: id_of("certificate", name),
        name: name.to_owned(),
        role: "operator".to_owned(),
        created_at: moment(-3 * 86_400 - 60),
        expires_at: moment(20 * 3600 + 60),
        revoked_at: if revoked { moment(-60) } else { None },
        guest_access: Some(!revoked),
    }
}

fn key(name: &str) -> ApiKey {
    ApiKey {
        id: id_of("key", name),
        name: name.to_owned(),
        role: "viewer".to_owned(),
        created_at: moment(-86_400 - 60),
        expires_at: None,
        revoked_at: None,
        guest_access: None,
    }
}

fn known(id: &str) -> Result<(), Status> {
    if id.starts_with("absent") {
        return Err(error(
            "credential_not_found",
            &format!("there is no credential {id}"),
            "",
            "",
        ));
    }
    Ok(())
}

#[tonic::async_trait]
impl AccessService for Fake {
    async fn create_token(&self, request: Request<CreateTokenRequest>) -> Answer<JoinToken> {
        let request = self.note(request);
        Ok(Response::new(JoinToken {
            token: format!("ghost-join-v1.id.secret.{}", "ef".repeat(32)),
            expires_at: moment(9 * 60 + 30),
            role: request.role,
            guest_access: request.guest_access,
        }))
    }

    async fn enroll(&self, request: Request<EnrollRequest>) -> Answer<IssuedCertificate> {
        let request = self.note(request);
        if !request.token.contains(".secret.") {
            return Err(error(
                "token_invalid",
                "the token is used up or has expired",
                "a token is good once, for ten minutes",
                "ghostctl trust token --role ROLE on the host",
            ));
        }
        Ok(self.issue(&request.request_pem))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Answer<IssuedCertificate> {
        let request = self.note(request);
        Ok(self.issue(&request.request_pem))
    }

    async fn who_am_i(&self, request: Request<WhoAmIRequest>) -> Answer<Identity> {
        self.note(request);
        Ok(Response::new(Identity::default()))
    }

    async fn list_certificates(
        &self,
        request: Request<ListCertificatesRequest>,
    ) -> Answer<ListCertificatesResponse> {
        self.note(request);
        let certificates = vec![certificate("alice@pc", false), certificate("bob@pc", true)];
        Ok(Response::new(ListCertificatesResponse { certificates }))
    }

    async fn revoke_certificate(
        &self,
        request: Request<RevokeCertificateRequest>,
    ) -> Answer<Certificate> {
        known(&self.note(request).id)?;
        Ok(Response::new(certificate("alice@pc", true)))
    }

    async fn create_key(&self, request: Request<CreateKeyRequest>) -> Answer<CreatedKey> {
        let name = self.note(request).name;
        Ok(Response::new(CreatedKey {
            key: Some(key(&name)),
            secret: "ghost_id_secret".to_owned(),
        }))
    }

    async fn list_keys(&self, request: Request<ListKeysRequest>) -> Answer<ListKeysResponse> {
        self.note(request);
        let keys = vec![key("dashboard")];
        Ok(Response::new(ListKeysResponse { keys }))
    }

    async fn revoke_key(&self, request: Request<RevokeKeyRequest>) -> Answer<ApiKey> {
        known(&self.note(request).id)?;
        Ok(Response::new(key("dashboard")))
    }
}
