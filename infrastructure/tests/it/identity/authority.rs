//! Files, requests and what is signed.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use ghost_domain::ErrorCode;
use ghost_infrastructure::identity::parse_client_identity;
use rcgen::{BasicConstraints, IsCa, SanType};
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::*;

#[tokio::test]
async fn the_ca_is_made_once_and_kept() {
    let root = tempfile::tempdir().unwrap();
    let clock = ShiftedClock::by(0);
    let first = Authority::open(root.path(), clock.clone()).unwrap();
    let folder = root.path().join("identity");
    let mode = |name: &str| fs::metadata(folder.join(name)).unwrap().mode() & 0o777;
    assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
    assert_eq!(mode("ca.key"), 0o600);

    let second = Authority::open(root.path(), clock).unwrap();
    assert_eq!(first.fingerprint(), second.fingerprint());
    let der = CertificateDer::from_pem_file(folder.join("ca.pem")).unwrap();
    assert_eq!(first.fingerprint(), hex::encode(Sha256::digest(&der)));

    // What the second signs is accepted where only the first is known: the key is the same.
    let (_, ca) = X509Certificate::from_der(&der).unwrap();
    let constraints = ca.basic_constraints().unwrap().unwrap().value;
    assert!(constraints.ca);
    assert_eq!(constraints.path_len_constraint, Some(0));
    let client = enrol(&second, CredentialId::random(), "alice", Role::Viewer).await;
    let (_, leaf) = X509Certificate::from_der(&client.chain[0]).unwrap();
    leaf.verify_signature(Some(ca.public_key())).unwrap();
}

#[test]
fn a_crash_between_the_two_files_is_made_good_and_a_lost_key_is_not_replaced() {
    let root = tempfile::tempdir().unwrap();
    drop(Authority::open(root.path(), ShiftedClock::by(0)).unwrap());
    let folder = root.path().join("identity");
    let key = fs::read(folder.join("ca.key")).unwrap();

    fs::remove_file(folder.join("ca.pem")).unwrap();
    drop(Authority::open(root.path(), ShiftedClock::by(0)).unwrap());
    assert_eq!(fs::read(folder.join("ca.key")).unwrap(), key);

    fs::remove_file(folder.join("ca.key")).unwrap();
    let error = Authority::open(root.path(), ShiftedClock::by(0)).unwrap_err();
    assert_eq!(error.code(), ErrorCode::IoFailed);
    assert!(error.hint_text().unwrap().contains("backup"));
    assert!(!folder.join("ca.key").exists());
}

#[test]
fn damaged_foreign_and_ended_files_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    drop(Authority::open(root.path(), ShiftedClock::by(0)).unwrap());
    drop(Authority::open(other.path(), ShiftedClock::by(0)).unwrap());
    let certificate = root.path().join("identity/ca.pem");
    let good = fs::read(&certificate).unwrap();

    let refused = |clock| Authority::open(root.path(), clock).unwrap_err();
    fs::copy(other.path().join("identity/ca.pem"), &certificate).unwrap();
    assert!(
        refused(ShiftedClock::by(0))
            .cause()
            .unwrap()
            .contains("key")
    );
    fs::write(&certificate, &good[..good.len() / 2]).unwrap();
    assert_eq!(refused(ShiftedClock::by(0)).code(), ErrorCode::IoFailed);
    fs::write(&certificate, "").unwrap();
    assert_eq!(refused(ShiftedClock::by(0)).code(), ErrorCode::IoFailed);
    fs::write(&certificate, &good).unwrap();
    let after_the_end = ShiftedClock::by(3651 * 24 * HOUR);
    assert!(refused(after_the_end).cause().unwrap().contains("over"));
    assert!(Authority::open(root.path(), ShiftedClock::by(0)).is_ok());
}

#[test]
fn a_key_open_to_others_is_closed() {
    let root = tempfile::tempdir().unwrap();
    drop(Authority::open(root.path(), ShiftedClock::by(0)).unwrap());
    let key = root.path().join("identity/ca.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    drop(Authority::open(root.path(), ShiftedClock::by(0)).unwrap());
    assert_eq!(fs::metadata(&key).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn a_ca_made_while_the_clock_stood_at_1970_lives_on() {
    let root = tempfile::tempdir().unwrap();
    let now = Timestamp::from(SystemTime::now()).unix_millis() / 1000;
    drop(Authority::open(root.path(), ShiftedClock::by(-now)).unwrap());
    Authority::open(root.path(), ShiftedClock::by(0)).unwrap();
}

#[tokio::test]
async fn identity_comes_from_us_and_never_from_the_request() {
    let root = tempfile::tempdir().unwrap();
    let authority = Authority::open(root.path(), ShiftedClock::by(0)).unwrap();
    let key = KeyPair::generate().unwrap();
    let mut greedy = CertificateParams::default();
    greedy.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    greedy.subject_alt_names = vec![SanType::URI(
        format!("ghost://client/admin/{}", CredentialId::random())
            .try_into()
            .unwrap(),
    )];
    let request = greedy.serialize_request(&key).unwrap().pem().unwrap();
    let id = CredentialId::random();
    let issued = authority
        .sign_client(&request, id, "eve@laptop", Role::Viewer)
        .await
        .unwrap();
    let der = CertificateDer::from_pem_slice(issued.certificate_pem.as_bytes()).unwrap();
    let identity = parse_client_identity(&der).unwrap();
    assert_eq!(identity.credential, id);
    assert_eq!(identity.role, Role::Viewer);
    assert_eq!(identity.name, "eve@laptop");
    assert_eq!(
        identity.expires_at.unix_millis() / 1000,
        issued.expires_at.unix_millis() / 1000
    );
    let (_, leaf) = X509Certificate::from_der(&der).unwrap();
    assert!(!leaf.is_ca());
    let purposes = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.client_auth && !purposes.server_auth && !purposes.any);
    let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(life, 24 * HOUR + 5 * 60);

    // The same key once more: another certificate with another serial number.
    let again = authority
        .sign_client(&request, id, "eve@laptop", Role::Viewer)
        .await
        .unwrap();
    let der = CertificateDer::from_pem_slice(again.certificate_pem.as_bytes()).unwrap();
    assert_ne!(parse_client_identity(&der).unwrap().serial, identity.serial);
}

#[tokio::test]
async fn bad_requests_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let authority = Authority::open(root.path(), ShiftedClock::by(0)).unwrap();
    let good = request(&KeyPair::generate().unwrap());
    let sign = async |request: String, name: &'static str| {
        authority
            .sign_client(&request, CredentialId::random(), name, Role::Viewer)
            .await
    };
    assert!(sign(good.clone(), "bob").await.is_ok());

    // A bit of the key, of the body and of the signature.
    let der = rustls::pki_types::CertificateSigningRequestDer::from_pem_slice(good.as_bytes())
        .unwrap()
        .to_vec();
    for at in [der.len() / 3, der.len() / 2, der.len() - 1] {
        let mut tampered = der.clone();
        tampered[at] ^= 1;
        let text = pem("CERTIFICATE REQUEST", &tampered);
        let error = sign(text, "bob").await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument, "byte {at}");
        assert_eq!(error.violations()[0].field, "request_pem");
    }
    let mut longer = der.clone();
    longer.extend_from_slice(b"more");
    for bad in [
        String::new(),
        "-----BEGIN CERTIFICATE REQUEST-----".into(),
        pem("CERTIFICATE", &der),
        pem("CERTIFICATE REQUEST", b"not DER"),
        pem("CERTIFICATE REQUEST", &longer),
        format!("{}{good}", "x\n".repeat(20_000)),
    ] {
        let error = sign(bad, "bob").await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument);
    }
    for name in ["", "a\nb", "\u{1b}[31m"] {
        let error = sign(good.clone(), name).await.unwrap_err();
        assert_eq!(error.code(), ErrorCode::InvalidArgument, "{name:?}");
        assert_eq!(error.violations()[0].field, "name");
    }
}

#[test]
fn server_and_ca_certificates_are_no_client_identity() {
    let root = tempfile::tempdir().unwrap();
    let authority = Authority::open(root.path(), ShiftedClock::by(0)).unwrap();
    let error = parse_client_identity(authority.certificate()).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unauthenticated);
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64::Engine;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<_> = body
        .as_bytes()
        .chunks(64)
        .map(|line| std::str::from_utf8(line).unwrap())
        .collect();
    format!(
        "-----BEGIN {label}-----\n{}\n-----END {label}-----\n",
        lines.join("\n")
    )
}
