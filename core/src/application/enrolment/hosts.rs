//! How a host gets its identity, keeps it, and comes back after it ended.
//!
//! The rule of generations. Each certificate of a host has a number, one higher than the one before.
//! A certificate is let in where it is
//!
//! - the newest (its number and its key are those of the record), or
//! - the one before (its number is one less, its key the recorded former one) as long as the newest
//!   has not been used: Core's answer to the last renewal may have been lost on its way. It renews
//!   to the *same* number again, which takes the place of the lost one: that one's key is not the
//!   recorded one any more.
//!
//! Once the newest was used (a link's hello, or the next renewal), whoever shows an older one, or the
//! same number with another key, is a second machine with a copy of the host's files. Then nobody
//! can say which one is the owner's: the identity is locked until the owner decides.
//!
//! A number that is *higher* than the record's was signed by this CA and then forgotten: the records
//! were put back from an older copy. The host is believed and the record brought up to it.

use std::sync::Arc;
use std::time::Duration;

use ghost_domain::fleet::{CorePermissions, FleetFacts};
use ghost_domain::ports::IssuedCertificate;
use ghost_domain::{Error, ErrorCode, HostId, HostName, Result, Secret, TenantName};

use super::token::{HOST_PREFIX, ShownToken};
use crate::application::fleet::{Fleet, FleetState};
use crate::domain::ports::FleetAuthority;
use crate::domain::{
    CertificateUse, HostLife, HostRecord, JoinToken, PeerIdentity, Record, RecordKey, TokenKind,
};

/// So long after its certificate ended a host may come back with it.
const RECOVERY: Duration = Duration::from_secs(30 * 24 * 3600);
/// So often a certificate is signed anew because the record changed meanwhile.
const MOST_SIGNATURES: u32 = 8;
/// Numbers that are tried for a name that is taken.
const MOST_NUMBERS: u32 = 10_000;

/// A host that wants to join.
#[derive(Clone, Debug)]
pub struct EnrollHostCommand {
    /// The token.
    pub token: Secret,
    /// PKCS #10, PEM.
    pub request_pem: String,
    /// What it wants to be called; empty: `host`.
    pub name: String,
    /// Its agent's version.
    pub agent_version: String,
}

/// A host that comes back after its certificate ended.
#[derive(Clone, Debug)]
pub struct RecoverHostCommand {
    /// The certificate that ended, PEM.
    pub certificate_pem: String,
    /// PKCS #10, PEM.
    pub request_pem: String,
    /// The signature of the request by the old key.
    pub proof: Vec<u8>,
}

/// A host's new certificate, and who it is.
#[derive(Clone, Debug)]
pub struct HostIdentity {
    /// The certificate.
    pub issued: IssuedCertificate,
    /// Its number.
    pub generation: u64,
    /// The host.
    pub host: HostId,
    /// Its name.
    pub name: HostName,
    /// Its tenant.
    pub tenant: TenantName,
    /// The trust domain of its SPIFFE id.
    pub trust_domain: String,
    /// Where Core's replicas can be reached.
    pub addresses: Vec<String>,
}

/// Enrols hosts and renews what they prove themselves with.
pub struct HostEnrolment {
    fleet: Arc<Fleet>,
    authority: Arc<dyn FleetAuthority>,
    addresses: Vec<String>,
}

impl std::fmt::Debug for HostEnrolment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostEnrolment")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

/// What to do with a certificate that is shown for a new one.
enum Step {
    /// Sign this number.
    Sign(u64),
    /// It was cloned: lock the host, for this reason.
    Lock(String),
}

impl HostEnrolment {
    /// `addresses` is where hosts reach Core's replicas, `host:port`.
    pub fn new(
        fleet: Arc<Fleet>,
        authority: Arc<dyn FleetAuthority>,
        addresses: Vec<String>,
    ) -> Self {
        Self {
            fleet,
            authority,
            addresses,
        }
    }

    /// Turns a token and a certificate request into a host of the fleet. The token is good for one:
    /// of several who use it at once exactly one wins. A malformed request leaves it good.
    ///
    /// # Errors
    /// `TokenInvalid`, `InvalidArgument`, `InvalidName`, `TenantNotFound`, `StoreUnavailable`.
    pub async fn enroll(&self, command: EnrollHostCommand) -> Result<HostIdentity> {
        let shown = ShownToken::parse(&command.token, HOST_PREFIX)?;
        let wanted = match command.name.as_str() {
            "" => HostName::new("host")?,
            name => HostName::new(name)?,
        };
        let now = self.fleet.clock().now();
        // Before the CA works for anybody.
        let tenant = self
            .fleet
            .read(|state| of_host(shown.check(state, now)?).map(|(tenant, _)| tenant.clone()))?;
        let host = HostId::random();
        let (issued, key_hash) = self
            .authority
            .sign_host(&command.request_pem, &tenant, host, 1)
            .await?;
        let agent_version: String = command.agent_version.chars().take(64).collect();
        let name = self
            .fleet
            .transact(|state| {
                let token = shown.check(state, now)?;
                let (tenant, labels) = of_host(token)?;
                state.require_tenant(tenant)?;
                let name = free_name(state, tenant, &wanted)?;
                let mut draft = state.draft();
                draft.unchanged(&RecordKey::Tenant(tenant.clone()));
                draft.put(
                    RecordKey::Token(token.id),
                    Record::Token(JoinToken {
                        used_at: Some(now),
                        ..JoinToken::clone(token)
                    }),
                );
                draft.put(
                    RecordKey::HostName(tenant.clone(), name.as_str().to_owned()),
                    Record::HostName(host),
                );
                draft.put_host(HostRecord {
                    id: host,
                    name: name.clone(),
                    tenant: tenant.clone(),
                    labels: labels.clone(),
                    cordoned: None,
                    life: HostLife::Active,
                    certificate_generation: 1,
                    key_hash,
                    previous_key_hash: None,
                    machine: None,
                    certificate_expires_at: issued.expires_at,
                    enrolled_at: now,
                    agent_version: agent_version.clone(),
                    permissions: CorePermissions::default(),
                    facts: FleetFacts::default(),
                    last_heard_at: None,
                    command_generation: 0,
                });
                Ok(draft.done(name))
            })
            .await?;
        tracing::info!(%host, %name, %tenant, token = %shown.id, "a host joined");
        Ok(self.identity(issued, 1, host, name, tenant))
    }

    /// A new certificate for the host that calls with `peer`, the certificate that TLS has verified.
    ///
    /// # Errors
    /// `PermissionDenied` for one who is no host; `HostNotFound`; `HostLocked`; `Unauthenticated`
    /// for a revoked one; `InvalidArgument`; `StoreUnavailable`.
    pub async fn renew(&self, peer: &PeerIdentity, request_pem: &str) -> Result<HostIdentity> {
        let PeerIdentity::Host {
            tenant,
            host,
            generation,
            key_hash,
        } = peer
        else {
            return Err(Error::new(
                ErrorCode::PermissionDenied,
                "only a host's certificate can be renewed here",
            )
            .hint("join with a token: ghost-agent enroll --token …"));
        };
        for _ in 0..MOST_SIGNATURES {
            let seen = self
                .fleet
                .read(|state| known(state, *host, tenant).cloned())?;
            let next = match step(&seen, *generation, key_hash)? {
                Step::Sign(next) => next,
                Step::Lock(reason) => return Err(self.lock(*host, reason).await),
            };
            let (issued, new_hash) = self
                .authority
                .sign_host(request_pem, tenant, *host, next)
                .await?;
            let kept = self
                .fleet
                .transact(|state| {
                    let record = known(state, *host, tenant)?;
                    let mut draft = state.draft();
                    let same = record.certificate_generation == seen.certificate_generation
                        && record.key_hash == seen.key_hash
                        && record.previous_key_hash == seen.previous_key_hash
                        && record.life == seen.life;
                    if !same {
                        return Ok(draft.done(None));
                    }
                    draft.put_host(HostRecord {
                        certificate_generation: next,
                        key_hash: new_hash,
                        // By this one the host came; until the new one is used it may come again.
                        previous_key_hash: Some(*key_hash),
                        certificate_expires_at: issued.expires_at,
                        ..HostRecord::clone(record)
                    });
                    Ok(draft.done(Some(record.name.clone())))
                })
                .await?;
            if let Some(name) = kept {
                tracing::info!(%host, generation = next, "a host's certificate was renewed");
                return Ok(self.identity(issued, next, *host, name, tenant.clone()));
            }
        }
        Err(Error::new(
            ErrorCode::TooManyRequests,
            "this host's certificate is being renewed by somebody else all the time",
        )
        .retry_after(Duration::from_secs(5)))
    }

    /// A new certificate for a host whose certificate ended while it was away.
    ///
    /// # Errors
    /// `Unauthenticated` for a certificate or proof that is not ours, and for one that ended more
    /// than 30 days ago; otherwise as [`Self::renew`].
    pub async fn recover(&self, command: RecoverHostCommand) -> Result<HostIdentity> {
        let (peer, ended_at) = self.authority.former_peer(
            &command.certificate_pem,
            &command.request_pem,
            &command.proof,
        )?;
        let now = self.fleet.clock().now();
        if now.since(ended_at) > RECOVERY {
            return Err(Error::new(
                ErrorCode::Unauthenticated,
                "this host was away for too long",
            )
            .because("its certificate ended more than 30 days ago")
            .hint("join again with a new token: ghost-agent enroll --replace --token …"));
        }
        self.renew(&peer, &command.request_pem).await
    }

    async fn lock(&self, host: HostId, reason: String) -> Error {
        let now = self.fleet.clock().now();
        let locked = self
            .fleet
            .transact(|state| {
                let mut draft = state.draft();
                let record = state.require_host(host)?;
                if record.life == HostLife::Active {
                    draft.put_host(HostRecord {
                        life: HostLife::Locked {
                            since: now,
                            reason: reason.clone(),
                        },
                        ..HostRecord::clone(record)
                    });
                }
                Ok(draft.done(()))
            })
            .await;
        match locked {
            Ok(()) => {
                tracing::error!(%host, %reason, "a host's identity was cloned; it is locked");
                self::locked(&reason)
            }
            Err(error) => error,
        }
    }

    fn identity(
        &self,
        issued: IssuedCertificate,
        generation: u64,
        host: HostId,
        name: HostName,
        tenant: TenantName,
    ) -> HostIdentity {
        HostIdentity {
            issued,
            generation,
            host,
            name,
            tenant,
            trust_domain: self.authority.trust_domain().to_owned(),
            addresses: self.addresses.clone(),
        }
    }
}

fn of_host(token: &JoinToken) -> Result<(&TenantName, &crate::domain::Labels)> {
    match &token.kind {
        TokenKind::Host { tenant, labels } => Ok((tenant, labels)),
        TokenKind::Operator { .. } => Err(Error::new(
            ErrorCode::TokenInvalid,
            "the token is not accepted",
        )
        .because("it is for a person")),
    }
}

fn locked(reason: &str) -> Error {
    Error::new(ErrorCode::HostLocked, "this host's identity is locked")
        .because(reason)
        .hint("find out which machine is the right one, then: ghostctl host unlock NAME")
}

/// The record of a host whose certificate says this tenant.
fn known<'a>(
    state: &'a FleetState,
    host: HostId,
    tenant: &TenantName,
) -> Result<&'a Arc<HostRecord>> {
    state
        .host(host)
        .filter(|record| record.tenant == *tenant)
        .ok_or_else(|| {
            Error::new(
                ErrorCode::HostNotFound,
                "this host is not in the fleet any more",
            )
            .hint("join again with a new token: ghost-agent enroll --replace --token …")
        })
}

fn step(record: &HostRecord, generation: u64, key_hash: &[u8; 32]) -> Result<Step> {
    match &record.life {
        HostLife::Active => {}
        HostLife::Locked { reason, .. } => return Err(locked(reason)),
        HostLife::Revoked { .. } => {
            return Err(
                Error::new(ErrorCode::Unauthenticated, "this host was revoked")
                    .hint("ask an administrator of the fleet for a new token"),
            );
        }
    }
    Ok(match record.certificate_use(generation, key_hash) {
        CertificateUse::Newest | CertificateUse::Forgotten => {
            let next = generation.checked_add(1).ok_or_else(|| {
                Error::internal("the certificates of this host have used up all numbers")
            })?;
            Step::Sign(next)
        }
        CertificateUse::AnswerLost => Step::Sign(record.certificate_generation),
        CertificateUse::Cloned(reason) => Step::Lock(reason),
    })
}

/// The wanted name, or the first of `name-2`, `name-3`, … that the tenant does not have.
fn free_name(state: &FleetState, tenant: &TenantName, wanted: &HostName) -> Result<HostName> {
    let taken = |name: &str| {
        let key = RecordKey::HostName(tenant.clone(), name.to_owned());
        state.version(&key).is_some()
    };
    if !taken(wanted.as_str()) {
        return Ok(wanted.clone());
    }
    for number in 2..MOST_NUMBERS {
        let end = format!("-{number}");
        // Names are ASCII, and 63 long at most.
        let begin: String = wanted.as_str().chars().take(63 - end.len()).collect();
        let name = format!("{begin}{end}");
        if !taken(&name) {
            return HostName::new(name);
        }
    }
    Err(Error::new(
        ErrorCode::HostNameTaken,
        format!("too many hosts are called {wanted}"),
    ))
}
