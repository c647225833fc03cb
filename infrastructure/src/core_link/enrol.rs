//! How this host gets its certificates: by a token at first, by the present one from then on, and by
//! the old key where the certificate ended while the host was away.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ghost_domain::fleet::FleetIdentity;
use ghost_domain::{Error, ErrorCode, HostId, HostName, Result, Secret, Timestamp};
use ghost_proto::core::v1::enrolment_service_client::EnrolmentServiceClient;
use ghost_proto::core::v1::{
    EnrollHostRequest, HostCertificate, RecoverHostRequest, RenewHostRequest,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rand::Rng;
use rcgen::{CertificateParams, KeyPair, SigningKey};
use rustls_pki_types::CertificateSigningRequestDer;
use sha2::{Digest, Sha256};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::identity::{Enrolled, Given, IdentityFolder};
use super::tls::{Setup, Trust};
use super::token::HostToken;

/// What Core may take for one answer.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// More than any answer of the service.
const MOST_ANSWER: usize = 256 * 1024;
/// Before the request in what the old key signs.
const RECOVER_PREFIX: &[u8] = b"ghost-recover-v1";
/// The key under which a machine is known to Core: the machine's own id goes nowhere else.
const MACHINE_PREFIX: &[u8] = b"ghost-machine-v1\0";
pub(super) const MACHINE_ID: &str = "/etc/machine-id";

/// How a host joins.
#[derive(Clone, Debug)]
pub struct EnrolOptions {
    /// The agent's `agent.data_dir`.
    pub data_dir: PathBuf,
    /// What the host wants to be called.
    pub name: HostName,
    /// The agent's release.
    pub agent_version: String,
    /// Join anew where the host has joined a fleet already, which it then leaves.
    pub replace: bool,
}

/// Joins the fleet that a token names: makes a key, gets a certificate for it from the Core whose CA
/// the token names, and keeps both.
///
/// # Errors
/// `TokenInvalid`; `AlreadyEnrolled`; `CoreUnreachable`; `Unauthenticated` where somebody else
/// answers; what Core says; `IoFailed`. Nothing was changed then, but for a used token.
pub async fn enrol(token: &str, options: EnrolOptions) -> Result<FleetIdentity> {
    let token = HostToken::parse(token)?;
    let folder = IdentityFolder::new(&options.data_dir);
    // Before the token is used: a folder that cannot be written, or a host that has joined already.
    let key = {
        let (folder, replace) = (folder.clone(), options.replace);
        blocking(move || {
            if !replace && let Some(old) = folder.load()? {
                return Err(Error::new(
                    ErrorCode::AlreadyEnrolled,
                    format!(
                        "this host is {} of {} already",
                        old.identity.name, old.identity.tenant
                    ),
                )
                .hint("ghost-agent enroll --replace --token TOKEN joins anew"));
            }
            folder.forget()?;
            folder.next_key()
        })
        .await?
    };
    let (request_pem, _) = request(&key)?;
    let message = EnrollHostRequest {
        token: token.text.expose().to_owned(),
        request_pem,
        name: options.name.to_string(),
        agent_version: options.agent_version,
        machine_hash: machine_hash(&token.fingerprint, Path::new(MACHINE_ID)),
    };
    let setup = Setup::new(Trust::Fingerprint(token.fingerprint), None, b"h2")?;
    let mut client = dial_any(&setup, &token.addresses).await?;
    let answer = client
        .enroll(message)
        .await
        .map_err(|status| refusal(&status))?;
    let enrolled = keep(answer.into_inner(), key, token.fingerprint, folder, None).await?;
    Ok(enrolled.identity)
}

/// A new certificate by the present one.
pub(super) async fn renew(present: &Enrolled, folder: &IdentityFolder) -> Result<Enrolled> {
    let (key, authority) = next(present, folder).await?;
    let (request_pem, _) = request(&key)?;
    let setup = Setup::new(trust(present), Some(present.shown()?), b"h2")?;
    let mut client = dial_any(&setup, &present.identity.addresses).await?;
    let message = RenewHostRequest {
        request_pem,
        generation: present.identity.generation,
    };
    let answer = client
        .renew(message)
        .await
        .map_err(|status| refusal(&status))?;
    keep(
        answer.into_inner(),
        key,
        authority,
        folder.clone(),
        Some(present.identity.host),
    )
    .await
}

/// A new certificate for an ended one.
pub(super) async fn recover(ended: &Enrolled, folder: &IdentityFolder) -> Result<Enrolled> {
    let (key, authority) = next(ended, folder).await?;
    let (request_pem, der) = request(&key)?;
    let message = RecoverHostRequest {
        certificate_pem: ended.certificate_pem.clone(),
        request_pem,
        generation: ended.identity.generation,
        proof: proof(&ended.key_pem, &der)?,
    };
    // Without the ended certificate, which no handshake takes.
    let setup = Setup::new(trust(ended), None, b"h2")?;
    let mut client = dial_any(&setup, &ended.identity.addresses).await?;
    let answer = client
        .recover(message)
        .await
        .map_err(|status| refusal(&status))?;
    keep(
        answer.into_inner(),
        key,
        authority,
        folder.clone(),
        Some(ended.identity.host),
    )
    .await
}

/// When to ask for the next certificate: somewhere between a half and two thirds of the life of the
/// present one, so that a fleet does not ask in one moment.
pub(super) fn renew_at(identity: &FleetIdentity, rng: &mut impl Rng) -> Timestamp {
    let life = identity.expires_at.since(identity.issued_at);
    identity
        .issued_at
        .after(life.mul_f64(rng.random_range(0.5..2.0 / 3.0)))
}

/// The signature by which a host whose certificate ended proves that it has its key: ECDSA over the
/// SHA-256 of `ghost-recover-v1` and the request's DER, itself in DER.
fn proof(key_pem: &Secret, request: &[u8]) -> Result<Vec<u8>> {
    let failed =
        |error: rcgen::Error| Error::internal("cannot sign with the old key").because(error);
    let key = KeyPair::from_pem(key_pem.expose()).map_err(failed)?;
    key.sign(&[RECOVER_PREFIX, request].concat())
        .map_err(failed)
}

fn trust(enrolled: &Enrolled) -> Trust {
    Trust::Authority {
        certificate: enrolled.authority.clone(),
        trust_domain: enrolled.identity.trust_domain.clone(),
    }
}

async fn next(present: &Enrolled, folder: &IdentityFolder) -> Result<(KeyPair, [u8; 32])> {
    let folder = folder.clone();
    let key = blocking(move || folder.next_key()).await?;
    Ok((key, Sha256::digest(&present.authority).into()))
}

/// A certificate request, PEM and DER. What it asks for is only that its key be taken over.
fn request(key: &KeyPair) -> Result<(String, CertificateSigningRequestDer<'static>)> {
    let failed = |error: rcgen::Error| Error::internal("cannot make a request").because(error);
    let request = CertificateParams::default()
        .serialize_request(key)
        .map_err(failed)?;
    Ok((request.pem().map_err(failed)?, request.der().clone()))
}

async fn keep(
    given: HostCertificate,
    key: KeyPair,
    authority: [u8; 32],
    folder: IdentityFolder,
    follows: Option<HostId>,
) -> Result<Enrolled> {
    let given = Given {
        certificate_pem: given.certificate_pem,
        authority_pem: given.authority_pem,
        host: given.host_id,
        name: given.host_name,
        tenant: given.tenant,
        trust_domain: given.trust_domain,
        addresses: given.addresses,
        generation: given.generation,
    };
    let enrolled = Enrolled::new(given, Secret::new(key.serialize_pem()), authority)?;
    blocking(move || {
        if let Some(host) = follows {
            let present = folder.load()?.map(|one| one.identity.host);
            if present != Some(host) || enrolled.identity.host != host {
                return Err(Error::new(
                    ErrorCode::NotEnrolled,
                    "this host joined another fleet meanwhile, or Core took it for another host",
                ));
            }
        }
        folder.save(&enrolled)?;
        Ok(enrolled)
    })
    .await
}

async fn dial_any(setup: &Setup, addresses: &[String]) -> Result<EnrolmentServiceClient<Channel>> {
    let mut last = None;
    for address in addresses {
        match setup.dial(address).await {
            Ok((stream, _)) => {
                let slot = Mutex::new(Some(stream));
                let connector = tower::service_fn(move |_| {
                    let stream = slot.lock().take().map(TokioIo::new);
                    async move { stream.ok_or_else(|| std::io::Error::other("the connection was lost")) }
                });
                // Nothing is looked up by this name: the connection is there.
                let channel = Endpoint::from_static("http://core.ghost.internal")
                    .timeout(ANSWER_TIME)
                    .connect_with_connector(connector)
                    .await
                    .map_err(|error| {
                        Error::new(ErrorCode::CoreUnreachable, "Core was lost").because(error)
                    })?;
                return Ok(
                    EnrolmentServiceClient::new(channel).max_decoding_message_size(MOST_ANSWER)
                );
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last
        .unwrap_or_else(|| Error::new(ErrorCode::CoreUnreachable, "no address of Core is known")))
}

/// What Core's refusal says.
fn refusal(status: &Status) -> Error {
    let details = status.get_error_details();
    let known = details
        .error_info()
        .and_then(|info| ErrorCode::parse(&info.reason).map(|code| (code, info)));
    let text: String = status
        .message()
        .chars()
        .filter(|character| !character.is_control())
        .take(300)
        .collect();
    match known {
        Some((code, info)) => {
            let mut error = Error::new(code, text);
            let said = |key: &str| -> Option<String> {
                let text = info.metadata.get(key).filter(|one| !one.is_empty())?;
                let shown = text.chars().filter(|character| !character.is_control());
                Some(shown.take(300).collect())
            };
            if let Some(cause) = said("cause") {
                error = error.because(cause);
            }
            if let Some(hint) = said("hint") {
                error = error.hint(hint);
            }
            error
        }
        None => {
            let code = match status.code() {
                Code::Unauthenticated => ErrorCode::Unauthenticated,
                Code::PermissionDenied => ErrorCode::PermissionDenied,
                _ => ErrorCode::CoreUnreachable,
            };
            Error::new(code, "Core did not answer the request").because(text)
        }
    }
}

/// `/etc/machine-id` under a key of ours (machine-id(5) asks for that) and a salt, so that Core
/// recognises a machine and learns nothing else: what one fleet knows of a machine is worth nothing to
/// another. Empty where the machine has no id. Reads the disk.
pub(super) fn machine_hash(salt: &[u8], path: &Path) -> String {
    match std::fs::read_to_string(path) {
        Ok(id) if !id.trim().is_empty() => {
            let digest = Sha256::new_with_prefix(MACHINE_PREFIX)
                .chain_update(salt)
                .chain_update(id.trim());
            hex::encode(digest.finalize())
        }
        _ => String::new(),
    }
}

pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => Err(Error::internal("a file task broke").because(error)),
    }
}

#[cfg(test)]
mod tests {
    use ghost_domain::TenantName;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn renewal_falls_between_a_half_and_two_thirds_and_is_spread() {
        let identity = FleetIdentity {
            host: HostId::random(),
            name: HostName::new("pc").unwrap(),
            tenant: TenantName::new("acme").unwrap(),
            trust_domain: "fleet.example".into(),
            addresses: vec!["core:7443".into()],
            authority_fingerprint: String::new(),
            issued_at: Timestamp::from_unix_millis(0),
            expires_at: Timestamp::from_unix_millis(24 * 3_600_000),
            generation: 1,
        };
        let mut rng = StdRng::seed_from_u64(3);
        let mut times: Vec<i64> = (0..200)
            .map(|_| renew_at(&identity, &mut rng).unix_millis())
            .collect();
        times.sort_unstable();
        assert!(times[0] >= 12 * 3_600_000 && times[199] <= 16 * 3_600_000);
        assert!(times[199] - times[0] > 3 * 3_600_000);
    }

    #[test]
    fn a_machine_is_known_by_a_hash_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine-id");
        assert_eq!(machine_hash(b"fleet", &path), "");
        std::fs::write(&path, "0123456789abcdef0123456789abcdef\n").unwrap();
        let hash = machine_hash(b"fleet", &path);
        assert_eq!(hash.len(), 64);
        assert!(!hash.contains("0123456789abcdef"));
        assert_eq!(hash, machine_hash(b"fleet", &path), "it is known again");
        assert_ne!(hash, machine_hash(b"other", &path), "and nowhere else");
    }
}
