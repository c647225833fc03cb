//! Use cases on identities: join tokens, client certificates, HTTP keys.

mod certificates;
mod keys;
mod secrets;
mod tokens;

pub use certificates::{AuthenticateCertificate, ListCertificates, Renew, RevokeCertificate};
pub use keys::{AuthenticateKey, CreateKey, CreateKeyCommand, ListKeys, RevokeKey};
pub use tokens::{CreateToken, Enroll, EnrollCommand, IssuedIdentity};
