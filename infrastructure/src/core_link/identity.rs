//! Who this host is in its fleet, on disk.
//!
//! ```text
//! <data_dir>/core/                     0700
//!   current -> <host>-<generation>     a symbolic link that is replaced by a rename
//!   <host>-<generation>/
//!     key.pem                          0600
//!     certificate.pem  authority.pem  identity.json
//!   next.pem                           0600, the key of a certificate that was asked for
//!   core-id                            the Core that greeted first since this host joined
//! ```
//! A key and its certificate become visible together or not at all. The key of a request is kept
//! before it is sent: should the answer be lost, the same key asks again, and Core sees that it is
//! the same host and not a copy of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ghost_domain::fleet::{FleetIdentity, spiffe_host};
use ghost_domain::{Error, ErrorCode, HostId, HostName, Result, Secret, TenantName, Timestamp};
use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::tls::{Shown, has_uri};
use crate::identity::files;

const CURRENT: &str = "current";
const NEXT_KEY: &str = "next.pem";
const CORE_ID: &str = "core-id";

/// The row of ours that stands beside the certificate.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    version: u32,
    host: String,
    name: String,
    tenant: String,
    trust_domain: String,
    addresses: Vec<String>,
    generation: u64,
}

const ROW_VERSION: u32 = 1;

/// An identity with what proves it.
#[derive(Clone, Debug)]
pub(super) struct Enrolled {
    pub(super) identity: FleetIdentity,
    pub(super) key_pem: Secret,
    pub(super) certificate_pem: String,
    pub(super) authority: CertificateDer<'static>,
    authority_pem: String,
}

/// What Core gave, as it came.
pub(super) struct Given {
    pub(super) certificate_pem: String,
    pub(super) authority_pem: String,
    pub(super) host: String,
    pub(super) name: String,
    pub(super) tenant: String,
    pub(super) trust_domain: String,
    pub(super) addresses: Vec<String>,
    pub(super) generation: u64,
}

impl Enrolled {
    /// Puts together and checks what Core gave: that the certificate is of our key, is that of the
    /// host that Core says, and comes with the CA that it should.
    pub(super) fn new(given: Given, key_pem: Secret, authority: [u8; 32]) -> Result<Self> {
        let wrong = |why: &str| {
            Error::new(
                ErrorCode::CoreUnreachable,
                "Core's answer is not an identity for this host",
            )
            .because(why)
        };
        let host: HostId = given
            .host
            .parse()
            .map_err(|_| wrong("its host id is no UUID"))?;
        let name = HostName::new(given.name).map_err(|_| wrong("its host name is none"))?;
        let tenant = TenantName::new(given.tenant).map_err(|_| wrong("its tenant is none"))?;
        let domain_ok = !given.trust_domain.is_empty()
            && given.trust_domain.len() <= 255
            && given.trust_domain.bytes().all(|byte| {
                byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-._".contains(&byte)
            });
        if !domain_ok {
            return Err(wrong("its trust domain is none"));
        }
        let addresses: Vec<String> = given
            .addresses
            .into_iter()
            .filter(|one| super::token::is_address(one))
            .take(16)
            .collect();
        if addresses.is_empty() {
            return Err(wrong("it has no address of Core"));
        }
        let certificate = CertificateDer::from_pem_slice(given.certificate_pem.as_bytes())
            .map_err(|_| wrong("its certificate is not PEM"))?;
        let authority_der = CertificateDer::from_pem_slice(given.authority_pem.as_bytes())
            .map_err(|_| wrong("its authority is not PEM"))?;
        let fingerprint = Sha256::digest(&authority_der);
        if fingerprint.as_slice() != authority {
            return Err(wrong("its authority is another one"));
        }
        let expected = spiffe_host(&given.trust_domain, &tenant, host);
        if !has_uri(&certificate, |uri| uri == expected) {
            return Err(wrong("its certificate is that of somebody else"));
        }
        let key = KeyPair::from_pem(key_pem.expose()).map_err(|_| wrong("the key is none"))?;
        let (_, parsed) = X509Certificate::from_der(&certificate)
            .map_err(|_| wrong("its certificate is not X.509"))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.der_bytes() {
            return Err(wrong("its certificate is of another key"));
        }
        let millis = |seconds: i64| Timestamp::from_unix_millis(seconds.saturating_mul(1000));
        Ok(Self {
            identity: FleetIdentity {
                host,
                name,
                tenant,
                trust_domain: given.trust_domain,
                addresses,
                authority_fingerprint: hex::encode(fingerprint),
                issued_at: millis(parsed.validity().not_before.timestamp()),
                expires_at: millis(parsed.validity().not_after.timestamp()),
                generation: given.generation,
            },
            key_pem,
            certificate_pem: given.certificate_pem,
            authority: authority_der,
            authority_pem: given.authority_pem,
        })
    }

    /// What TLS shows.
    pub(super) fn shown(&self) -> Result<Shown> {
        let broken = |cause: &dyn std::fmt::Display| {
            Error::new(ErrorCode::IoFailed, "this host's identity cannot be read").because(cause)
        };
        let chain = CertificateDer::pem_slice_iter(self.certificate_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| broken(&error))?;
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.expose().as_bytes())
            .map_err(|error| broken(&error))?;
        Ok((chain, key))
    }

    fn folder_name(&self) -> String {
        format!("{}-{}", self.identity.host, self.identity.generation)
    }
}

/// The folder of the identity. Its methods read and write files: call them where blocking is allowed.
#[derive(Clone, Debug)]
pub(super) struct IdentityFolder {
    folder: PathBuf,
}

impl IdentityFolder {
    pub(super) fn new(data_dir: &Path) -> Self {
        Self {
            folder: data_dir.join("core"),
        }
    }

    fn failed<'a>(&'a self, what: &'a str) -> impl Fn(io::Error) -> Error + 'a {
        move |error| {
            Error::new(
                ErrorCode::IoFailed,
                format!("cannot {what} in {}", self.folder.display()),
            )
            .because(error)
        }
    }

    /// The identity; `None` where this host has not joined a fleet.
    pub(super) fn load(&self) -> Result<Option<Enrolled>> {
        let current = self.folder.join(CURRENT);
        match fs::symlink_metadata(&current) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed("look")(error)),
        }
        let broken = |why: &str| {
            Error::new(
                ErrorCode::IoFailed,
                format!("the identity in {} cannot be used", current.display()),
            )
            .because(why)
            .hint("join the fleet anew: ghost-agent enroll --replace --token TOKEN")
        };
        let read = |name: &str| -> Result<String> {
            files::read(&current.join(name))
                .map_err(self.failed("read"))?
                .ok_or_else(|| broken(&format!("{name} is missing")))
        };
        let key_path = current.join("key.pem");
        let key = read("key.pem")?;
        if files::tighten(&key_path).map_err(self.failed("protect the key"))? {
            tracing::warn!(path = %key_path.display(), "this host's key was open to other users; it is closed now");
        }
        let row: Row = serde_json::from_str(&read("identity.json")?)
            .map_err(|error| broken(&error.to_string()))?;
        if row.version != ROW_VERSION {
            return Err(broken("it was written by a newer version"));
        }
        let authority_pem = read("authority.pem")?;
        let authority = CertificateDer::from_pem_slice(authority_pem.as_bytes())
            .map_err(|error| broken(&error.to_string()))?;
        let given = Given {
            certificate_pem: read("certificate.pem")?,
            authority_pem,
            host: row.host,
            name: row.name,
            tenant: row.tenant,
            trust_domain: row.trust_domain,
            addresses: row.addresses,
            generation: row.generation,
        };
        Enrolled::new(given, Secret::new(key), Sha256::digest(&authority).into())
            .map(Some)
            .map_err(|error| broken(error.cause().unwrap_or_default()))
    }

    /// Makes the identity the current one, durably.
    pub(super) fn save(&self, enrolled: &Enrolled) -> Result<()> {
        let failed = self.failed("write");
        files::private_folder(&self.folder).map_err(&failed)?;
        let name = enrolled.folder_name();
        let folder = self.folder.join(&name);
        // What a crash left behind; nobody saw it, as `current` names a whole one.
        let linked = fs::read_link(self.folder.join(CURRENT)).ok();
        if linked.as_deref() == Some(Path::new(&name)) {
            // Core gave the same generation again: a new folder beside it, so that the pair that
            // is in use is never half replaced.
            return self.save_as(
                enrolled,
                &format!("{name}-{}", uuid::Uuid::new_v4().simple()),
            );
        }
        match fs::remove_dir_all(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        self.save_as(enrolled, &name)
    }

    fn save_as(&self, enrolled: &Enrolled, name: &str) -> Result<()> {
        let failed = self.failed("write");
        let folder = self.folder.join(name);
        files::private_folder(&folder).map_err(&failed)?;
        let identity = &enrolled.identity;
        let row = Row {
            version: ROW_VERSION,
            host: identity.host.to_string(),
            name: identity.name.to_string(),
            tenant: identity.tenant.to_string(),
            trust_domain: identity.trust_domain.clone(),
            addresses: identity.addresses.clone(),
            generation: identity.generation,
        };
        let row = serde_json::to_string_pretty(&row)
            .map_err(|error| Error::internal("cannot write an identity").because(error))?;
        for (file, mode, content) in [
            ("key.pem", 0o600, enrolled.key_pem.expose()),
            ("certificate.pem", 0o644, &enrolled.certificate_pem),
            ("authority.pem", 0o644, &enrolled.authority_pem),
            ("identity.json", 0o644, &row),
        ] {
            files::write(&folder, file, mode, content).map_err(&failed)?;
        }
        let beside = self.folder.join(".current.new");
        match fs::remove_file(&beside) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        std::os::unix::fs::symlink(name, &beside)
            .and_then(|()| fs::rename(&beside, self.folder.join(CURRENT)))
            .and_then(|()| fs::File::open(&self.folder)?.sync_all())
            .map_err(&failed)?;
        self.sweep(name);
        Ok(())
    }

    /// Removes what is not current any more. What cannot be removed does no harm.
    fn sweep(&self, current: &str) {
        let _ = fs::remove_file(self.folder.join(NEXT_KEY));
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return;
        };
        for entry in entries.flatten() {
            let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_folder
                && entry.file_name() != current
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::debug!(path = %entry.path().display(), %error, "an old identity stays");
            }
        }
    }

    /// The key for the next request: the one that an unanswered request left, or a new one, kept
    /// before it is used.
    pub(super) fn next_key(&self) -> Result<KeyPair> {
        files::private_folder(&self.folder).map_err(self.failed("write"))?;
        let kept = files::read(&self.folder.join(NEXT_KEY)).map_err(self.failed("read"))?;
        if let Some(key) = kept.and_then(|text| KeyPair::from_pem(&text).ok()) {
            return Ok(key);
        }
        let key = KeyPair::generate()
            .map_err(|error| Error::internal("cannot make a key").because(error))?;
        files::write(&self.folder, NEXT_KEY, 0o600, &key.serialize_pem())
            .map_err(self.failed("write"))?;
        Ok(key)
    }

    /// Forgets the key of an unanswered request and the Core that greeted: this host joins anew.
    pub(super) fn forget(&self) -> Result<()> {
        for name in [NEXT_KEY, CORE_ID] {
            match fs::remove_file(self.folder.join(name)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(self.failed("write")(error)),
            }
        }
        Ok(())
    }

    /// The host that stands there, by the name of its folder alone.
    pub(super) fn host(&self) -> Option<HostId> {
        let current = fs::read_link(self.folder.join(CURRENT)).ok()?;
        current.to_str()?.get(..36)?.parse().ok()
    }

    /// Removes the identity with all that belongs to it; what it was, where it could be read.
    pub(super) fn leave(&self) -> Result<Option<FleetIdentity>> {
        let current = self.folder.join(CURRENT);
        if fs::symlink_metadata(&current).is_err() {
            return Err(Error::new(
                ErrorCode::NotEnrolled,
                "this host has not joined a fleet",
            ));
        }
        let was = self.load().ok().flatten().map(|one| one.identity);
        // First the name: from here on there is no identity, whatever comes of the rest.
        fs::remove_file(&current)
            .and_then(|()| fs::File::open(&self.folder)?.sync_all())
            .and_then(|()| fs::remove_dir_all(&self.folder))
            .map_err(self.failed("remove the identity"))?;
        Ok(was)
    }

    /// The Core that greeted first.
    pub(super) fn core_id(&self) -> Result<Option<String>> {
        files::read(&self.folder.join(CORE_ID)).map_err(self.failed("read"))
    }

    /// Keeps the Core that greeted first.
    pub(super) fn keep_core_id(&self, id: &str) -> Result<()> {
        files::write(&self.folder, CORE_ID, 0o644, id).map_err(self.failed("write"))
    }
}
