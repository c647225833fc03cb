//! The certificate authority itself.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ghost_domain::ports::{CertificateAuthority, Clock, IssuedCertificate};
use ghost_domain::{CredentialId, Error, ErrorCode, Result, Role, Timestamp};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate, X509CertificationRequest};

use super::client::CLIENT_URI;
use super::files;

/// How long the CA lives: ten years. There is no way to replace it short of enrolling all clients
/// anew, so it should outlive the machine.
pub const CA_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 3600);
/// How long a leaf lives: a day, so that one that got away soon stops working.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// How far into the past certificates begin, for clients whose clock is behind ours.
pub const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);

/// 2026-01-01, before which this program did not exist. A machine without a battery starts in
/// 1970; a CA that began then would be over by the time the clock is right.
const EARLIEST: Timestamp = Timestamp::from_unix_millis(1_767_225_600_000);

const CERTIFICATE_FILE: &str = "ca.pem";
const KEY_FILE: &str = "ca.key";
/// More than any certificate request needs.
const MOST_REQUEST_BYTES: usize = 16 * 1024;
/// RFC 5280, upper bound of a common name.
const MOST_NAME_CHARACTERS: usize = 64;

/// The agent's certificate authority. Signing takes well below a millisecond (ECDSA P-256) and
/// touches no file, so it runs on the caller's thread.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    expires_at: Timestamp,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

/// A leaf with names of the caller's choice, for a service that is more than one agent.
#[derive(Clone, Debug, Default)]
pub struct LeafTemplate {
    /// For people.
    pub common_name: String,
    /// URI alternative names, such as a SPIFFE id.
    pub uris: Vec<String>,
    /// Good for clients.
    pub client: bool,
    /// Good for servers.
    pub server: bool,
    /// What the last eight octets of the serial number say; the ones before stay random.
    pub serial_tail: Option<u64>,
}

/// A leaf fresh from the CA.
#[derive(Clone, Debug)]
pub struct SignedLeaf {
    /// The certificate and its CA's, PEM.
    pub issued: IssuedCertificate,
    /// SHA-256 of its public key (SubjectPublicKeyInfo, DER).
    pub key_hash: [u8; 32],
}

/// Which kind of leaf to sign.
pub(super) enum Leaf {
    Template {
        template: LeafTemplate,
        /// Further alternative names.
        names: Vec<SanType>,
    },
    Client {
        credential: CredentialId,
        name: String,
        role: Role,
    },
}

impl Authority {
    /// Opens the CA in `<data_dir>/identity/`, or makes it where there is none. Reads and writes
    /// files: call it where blocking is allowed.
    ///
    /// # Errors
    /// [`ErrorCode::IoFailed`] when the files cannot be read or written, when they do not belong
    /// together, or when the CA is over. What is there is never replaced: a new CA would shut out
    /// every client.
    pub fn open(data_dir: &Path, clock: Arc<dyn Clock>) -> Result<Self> {
        Self::open_named(data_dir, "Ghost agent CA", clock)
    }

    /// Like [`Self::open`]; a CA that is made gets a common name that begins with `name`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_named(data_dir: &Path, name: &str, clock: Arc<dyn Clock>) -> Result<Self> {
        let folder = data_dir.join("identity");
        let failed = |path: &Path, what: &str| {
            let what = format!("cannot {what} {}", path.display());
            move |cause: std::io::Error| Error::new(ErrorCode::IoFailed, what).because(cause)
        };
        files::private_folder(&folder).map_err(failed(&folder, "make the folder"))?;
        let key_path = folder.join(KEY_FILE);
        let certificate_path = folder.join(CERTIFICATE_FILE);
        let key = files::read(&key_path).map_err(failed(&key_path, "read"))?;
        let certificate =
            files::read(&certificate_path).map_err(failed(&certificate_path, "read"))?;

        let key = match (key, &certificate) {
            (Some(text), _) => {
                if files::tighten(&key_path).map_err(failed(&key_path, "protect"))? {
                    tracing::warn!(path = %key_path.display(), "the CA's key was open to other users; it is closed now");
                }
                KeyPair::from_pem(&text).map_err(|cause| {
                    broken(&key_path, &format!("it is not a private key: {cause}"))
                })?
            }
            (None, Some(_)) => {
                return Err(broken(
                    &key_path,
                    "the CA's key is missing beside its certificate",
                ));
            }
            (None, None) => {
                let key = KeyPair::generate()
                    .map_err(|cause| Error::internal("cannot make a key").because(cause))?;
                files::write(&folder, KEY_FILE, 0o600, &key.serialize_pem())
                    .map_err(failed(&key_path, "write"))?;
                key
            }
        };
        let certificate_pem = match certificate {
            Some(text) => text,
            // Also after a crash between the two files: no certificate of this key got out yet.
            None => {
                let text = make_certificate(&key, name, clock.now())?;
                files::write(&folder, CERTIFICATE_FILE, 0o644, &text)
                    .map_err(failed(&certificate_path, "write"))?;
                tracing::info!(path = %certificate_path.display(), "made a certificate authority");
                text
            }
        };
        Self::assemble(certificate_path, key, certificate_pem, clock)
    }

    fn assemble(
        path: PathBuf,
        key: KeyPair,
        certificate_pem: String,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|_| broken(&path, "it is not a certificate in PEM form"))?;
        let (expires_at, key_matches, is_ca) = {
            let (_, parsed) = X509Certificate::from_der(&certificate)
                .map_err(|_| broken(&path, "it is not an X.509 certificate"))?;
            (
                Timestamp::from_unix_millis(
                    parsed.validity().not_after.timestamp().saturating_mul(1000),
                ),
                parsed.public_key().subject_public_key.data.as_ref() == key.public_key_raw(),
                parsed.is_ca(),
            )
        };
        if !key_matches {
            return Err(broken(&path, "it does not belong to the key beside it"));
        }
        if !is_ca {
            return Err(broken(&path, "it is not the certificate of a CA"));
        }
        if expires_at <= clock.now() {
            return Err(broken(&path, "it is over (or the host's clock is wrong)"));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key)
            .map_err(|cause| broken(&path, &cause.to_string()))?;
        Ok(Self {
            issuer,
            certificate,
            certificate_pem,
            expires_at,
            clock,
        })
    }

    /// The CA's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The CA's certificate, PEM.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Signs a leaf for the public key of a PKCS #10 request (PEM) that is signed with it. Nothing
    /// else of the request is taken over.
    ///
    /// # Errors
    /// `InvalidArgument` for a request that is malformed or whose signature is wrong.
    pub fn sign_template(&self, request_pem: &str, template: LeafTemplate) -> Result<SignedLeaf> {
        let (public_key, key_hash) = requested_key(request_pem)?;
        let names = Vec::new();
        let (certificate, expires_at) =
            self.sign(Leaf::Template { template, names }, &public_key)?;
        Ok(SignedLeaf {
            issued: IssuedCertificate {
                certificate_pem: certificate.pem(),
                authority_pem: self.certificate_pem.clone(),
                expires_at,
            },
            key_hash,
        })
    }

    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// Signs a leaf for `public_key`; gives it with its end.
    pub(super) fn sign(
        &self,
        leaf: Leaf,
        public_key: &impl PublicKeyData,
    ) -> Result<(rcgen::Certificate, Timestamp)> {
        let now = self.clock.now();
        // A leaf that outlives its CA would be refused later anyway, and less clearly.
        let expires_at = now.after(LEAF_LIFETIME).min(self.expires_at);
        let mut params = CertificateParams::default();
        params.not_before = offset(before(now, CLOCK_SKEW))?;
        params.not_after = offset(expires_at)?;
        params.serial_number = Some(serial());
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let mut subject = DistinguishedName::new();
        match leaf {
            Leaf::Client {
                credential,
                name,
                role,
            } => {
                subject.push(DnType::CommonName, name);
                let uri = format!("{CLIENT_URI}{role}/{credential}");
                params.subject_alt_names =
                    vec![SanType::URI(uri.try_into().map_err(|cause| {
                        Error::internal("a URI is not ASCII").because(cause)
                    })?)];
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            }
            Leaf::Template { template, names } => {
                subject.push(DnType::CommonName, template.common_name);
                for uri in template.uris {
                    let uri = uri
                        .try_into()
                        .map_err(|cause| Error::internal("a URI is not ASCII").because(cause))?;
                    params.subject_alt_names.push(SanType::URI(uri));
                }
                params.subject_alt_names.extend(names);
                if template.client {
                    params
                        .extended_key_usages
                        .push(ExtendedKeyUsagePurpose::ClientAuth);
                }
                if template.server {
                    params
                        .extended_key_usages
                        .push(ExtendedKeyUsagePurpose::ServerAuth);
                }
                if let Some(tail) = template.serial_tail {
                    params.serial_number = Some(serial_with(tail));
                }
            }
        }
        params.distinguished_name = subject;
        let certificate = params
            .signed_by(public_key, &self.issuer)
            .map_err(|cause| Error::internal("cannot sign a certificate").because(cause))?;
        Ok((certificate, expires_at))
    }
}

#[async_trait]
impl CertificateAuthority for Authority {
    async fn sign_client(
        &self,
        request_pem: &str,
        credential: CredentialId,
        name: &str,
        role: Role,
    ) -> Result<IssuedCertificate> {
        let (public_key, _) = requested_key(request_pem)?;
        let legal = !name.is_empty()
            && name.chars().count() <= MOST_NAME_CHARACTERS
            && !name.chars().any(char::is_control);
        if !legal {
            return Err(Error::new(
                ErrorCode::InvalidArgument,
                "that is not a name for a certificate",
            )
            .field("name", "1 to 64 printable characters"));
        }
        let leaf = Leaf::Client {
            credential,
            name: name.to_owned(),
            role,
        };
        let (certificate, expires_at) = self.sign(leaf, &public_key)?;
        Ok(IssuedCertificate {
            certificate_pem: certificate.pem(),
            authority_pem: self.certificate_pem.clone(),
            expires_at,
        })
    }

    fn fingerprint(&self) -> String {
        hex::encode(Sha256::digest(&self.certificate))
    }
}

/// The public key of a PKCS #10 request whose signature proves that the caller has the private one.
/// All else in the request is ignored on purpose: a caller does not choose its identity, and
/// cannot ask for the powers of a CA.
fn requested_key(request_pem: &str) -> Result<(SubjectPublicKeyInfo, [u8; 32])> {
    let refused = |why: &str| {
        Error::new(
            ErrorCode::InvalidArgument,
            "the certificate request cannot be signed",
        )
        .because(why)
        .field("request_pem", why)
    };
    if request_pem.len() > MOST_REQUEST_BYTES {
        return Err(refused("it is longer than 16 KiB"));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(request_pem.as_bytes())
        .map_err(|_| refused("it is not a PEM block 'CERTIFICATE REQUEST'"))?;
    let (rest, request) = X509CertificationRequest::from_der(&der)
        .map_err(|_| refused("it is not a PKCS #10 request"))?;
    if !rest.is_empty() {
        return Err(refused("something follows the request"));
    }
    let raw = request.certification_request_info.subject_pki.raw;
    let key = SubjectPublicKeyInfo::from_der(raw)
        .map_err(|_| refused("its kind of key is not supported; ECDSA P-256 is"))?;
    // Elliptic curves only: an RSA key may be of any size, too weak ones included.
    let curves = [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ED25519,
    ];
    if !curves.contains(&key.algorithm()) {
        return Err(refused("its kind of key is not supported; ECDSA P-256 is"));
    }
    request
        .verify_signature()
        .map_err(|_| refused("its signature is wrong"))?;
    Ok((key, Sha256::digest(raw).into()))
}

fn make_certificate(key: &KeyPair, name: &str, now: Timestamp) -> Result<String> {
    let begin = now.max(EARLIEST);
    let mut params = CertificateParams::default();
    params.not_before = offset(before(now, CLOCK_SKEW).min(begin))?;
    params.not_after = offset(begin.after(CA_LIFETIME))?;
    params.serial_number = Some(serial());
    // Path length 0: what this CA signs can sign nothing.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::CrlSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let mut subject = DistinguishedName::new();
    subject.push(DnType::OrganizationName, "Ghost");
    // Different for each CA, so that a client with several CAs finds the right one by name.
    let mark = hex::encode(&Sha256::digest(key.public_key_raw())[..8]);
    subject.push(DnType::CommonName, format!("{name} {mark}"));
    params.distinguished_name = subject;
    params
        .self_signed(key)
        .map(|certificate| certificate.pem())
        .map_err(|cause| Error::internal("cannot make the CA's certificate").because(cause))
}

/// 127 random bits: positive and within the 20 octets of RFC 5280, 4.1.2.2. Without it rcgen would
/// derive the number from the key, and a renewed certificate would have the old one's.
fn serial() -> SerialNumber {
    serial_with(rand::random())
}

/// 63 random bits, and a number of the caller's.
fn serial_with(tail: u64) -> SerialNumber {
    let mut bytes = [0; 16];
    let (head, end) = bytes.split_at_mut(8);
    head.copy_from_slice(&rand::random::<[u8; 8]>());
    end.copy_from_slice(&tail.to_be_bytes());
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn before(now: Timestamp, duration: Duration) -> Timestamp {
    let millis = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    Timestamp::from_unix_millis(now.unix_millis().saturating_sub(millis))
}

fn offset(at: Timestamp) -> Result<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(at.unix_millis().div_euclid(1000))
        .map_err(|cause| Error::internal("the host's clock is out of range").because(cause))
}

fn broken(path: &Path, why: &str) -> Error {
    Error::new(
        ErrorCode::IoFailed,
        format!("cannot use {}", path.display()),
    )
    .because(why)
    .hint("put both files of the folder back from a backup; or move the folder away and restart, which makes a new CA, and enrol all clients anew")
}

/// The key as rustls takes it.
pub(super) fn private_key(key: &KeyPair) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(key.serialize_der().into())
}
