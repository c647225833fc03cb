//! Who we are to which agent: contexts in `$XDG_CONFIG_HOME/ghost/contexts/<name>/`.
//!
//! A context is a folder (mode 0700) of four files (mode 0600): `context.yaml` (endpoint, id,
//! role), and for a remote agent `key.pem`, `certificate.pem` and `authority.pem`. It comes into
//! being whole, by a rename, and only its certificate changes afterwards ([`renew`]). The name of
//! the current context stands in `$XDG_CONFIG_HOME/ghost/current-context`.

pub(crate) mod certificate;
pub(crate) mod enrol;
pub(crate) mod files;
pub(crate) mod renew;
pub(crate) mod token;

use std::io;
use std::path::{Path, PathBuf};

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

pub(crate) use token::{Fingerprint, Token};

use crate::connect::Endpoint;
use crate::errors::{ErrorCode, Failure};

/// The context of this host's agent; it always exists and has no files.
pub(crate) const LOCAL: &str = "local";

const SETTINGS: &str = "context.yaml";
const KEY: &str = "key.pem";
const CERTIFICATE: &str = "certificate.pem";
const AUTHORITY: &str = "authority.pem";
const CURRENT: &str = "current-context";

/// All contexts of this user.
pub(crate) struct Contexts {
    root: PathBuf,
}

/// An agent that this ghostctl knows.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// Its name.
    pub(crate) name: String,
    /// Where the agent is.
    pub(crate) endpoint: Endpoint,
    /// What `context.yaml` says.
    pub(crate) settings: Settings,
    folder: PathBuf,
}

/// `context.yaml`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    /// Where the agent is.
    pub(crate) endpoint: String,
    /// The id under which the agent lists our certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) identity: Option<String>,
    /// What it may do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<String>,
}

/// The files of a remote context, read.
pub(crate) struct Identity {
    /// The agent's CA.
    pub(crate) authority: CertificateDer<'static>,
    /// Our certificate, and what leads from it to the CA.
    pub(crate) chain: Vec<CertificateDer<'static>>,
    /// Our key.
    pub(crate) key: PrivateKeyDer<'static>,
}

/// The PEM files of a context to be.
pub(crate) struct Credentials {
    pub(crate) key: String,
    pub(crate) certificate: String,
    pub(crate) authority: String,
}

/// `$XDG_CONFIG_HOME/ghost`, by the XDG base directory specification.
fn config_folder() -> Option<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("XDG_CONFIG_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".config")))
        .map(|folder| folder.join("ghost"))
}

impl Contexts {
    /// The contexts of this user.
    pub(crate) fn open() -> Result<Self, Failure> {
        let root = config_folder().ok_or_else(|| {
            Failure::new(ErrorCode::IoFailed, "there is no folder for contexts")
                .because("neither XDG_CONFIG_HOME nor HOME is set")
        })?;
        Ok(Self { root })
    }

    /// The current context; `None`: this host's agent.
    pub(crate) fn current() -> Result<Option<Context>, Failure> {
        let Some(root) = config_folder() else {
            return Ok(None);
        };
        let contexts = Self { root };
        match contexts.current_name()? {
            Some(name) => contexts.load(&name).map(Some),
            None => Ok(None),
        }
    }

    /// The current context's name, where it is not `local`.
    pub(crate) fn current_name(&self) -> Result<Option<String>, Failure> {
        let path = self.root.join(CURRENT);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim().to_owned()).filter(|name| !name.is_empty())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(&path, &error)),
        }
    }

    /// Makes a context the current one.
    pub(crate) fn activate(&self, name: &str) -> Result<(), Failure> {
        let path = self.root.join(CURRENT);
        if name == LOCAL {
            return match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(unwritable(&path, &error))
                }
                Ok(()) | Err(_) => Ok(()),
            };
        }
        self.load(name)?;
        files::replace(&path, format!("{name}\n").as_bytes())
            .map_err(|error| unwritable(&path, &error))
    }

    /// The names of all contexts but `local`, sorted.
    pub(crate) fn names(&self) -> Result<Vec<String>, Failure> {
        let folder = self.root.join("contexts");
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(unreadable(&folder, &error)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// Reads a context.
    pub(crate) fn load(&self, name: &str) -> Result<Context, Failure> {
        check_name(name)?;
        let folder = self.root.join("contexts").join(name);
        let path = folder.join(SETTINGS);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Failure::new(
                    ErrorCode::NotFound,
                    format!("there is no context {name}"),
                )
                .hint("ghostctl context list"));
            }
            Err(error) => return Err(unreadable(&path, &error)),
        };
        let settings: Settings = serde_saphyr::from_str(&text).map_err(|error| {
            Failure::usage(format!("{} is not a context", path.display()))
                .because(error)
                .hint(format!("ghostctl context remove {name}"))
        })?;
        Ok(Context {
            endpoint: Endpoint::parse(&settings.endpoint)?,
            name: name.to_owned(),
            settings,
            folder,
        })
    }

    /// The context that was made for an endpoint.
    pub(crate) fn find_by_endpoint(&self, endpoint: &Endpoint) -> Result<Option<Context>, Failure> {
        for name in self.names()? {
            // One damaged context does not stand in the way of the others.
            if let Ok(context) = self.load(&name)
                && context.endpoint == *endpoint
            {
                return Ok(Some(context));
            }
        }
        Ok(None)
    }

    /// Whether a context of that name may be made.
    pub(crate) fn check_free(&self, name: &str, replace: bool) -> Result<(), Failure> {
        check_name(name)?;
        if name == LOCAL {
            return Err(Failure::new(
                ErrorCode::NameTaken,
                format!("{LOCAL} always is this host's agent"),
            )
            .hint("choose another name"));
        }
        if !replace && self.root.join("contexts").join(name).exists() {
            return Err(Failure::new(
                ErrorCode::NameTaken,
                format!("there is a context {name} already"),
            )
            .hint(format!("ghostctl context show {name}, or --replace it")));
        }
        Ok(())
    }

    /// Writes a context, whole or not at all.
    pub(crate) fn save(
        &self,
        name: &str,
        settings: Settings,
        credentials: Option<&Credentials>,
    ) -> Result<Context, Failure> {
        let yaml = serde_saphyr::to_string(&settings).map_err(|error| {
            Failure::new(ErrorCode::Internal, "the context cannot be written").because(error)
        })?;
        let mut contents = vec![(SETTINGS, yaml.as_bytes())];
        if let Some(credentials) = credentials {
            contents.extend([
                (KEY, credentials.key.as_bytes()),
                (CERTIFICATE, credentials.certificate.as_bytes()),
                (AUTHORITY, credentials.authority.as_bytes()),
            ]);
        }
        let folder = self.root.join("contexts").join(name);
        files::replace_folder(&folder, &contents).map_err(|error| unwritable(&folder, &error))?;
        self.load(name)
    }

    /// Removes a context with its key.
    pub(crate) fn remove(&self, name: &str) -> Result<(), Failure> {
        if name == LOCAL {
            return Err(Failure::usage(format!("{LOCAL} cannot be removed"))
                .because("it always is this host's agent"));
        }
        let context = self.load(name).map(|context| context.folder);
        let folder = match context {
            Ok(folder) => folder,
            // A damaged context must be removable; an absent one must be said to be absent.
            Err(failure) if failure.code() == ErrorCode::InvalidArgument.as_str() => {
                check_name(name)?;
                self.root.join("contexts").join(name)
            }
            Err(failure) => return Err(failure),
        };
        std::fs::remove_dir_all(&folder).map_err(|error| unwritable(&folder, &error))?;
        if self.current_name()?.as_deref() == Some(name) {
            self.activate(LOCAL)?;
        }
        Ok(())
    }
}

impl Context {
    /// Its key and certificates.
    pub(crate) fn identity(&self) -> Result<Identity, Failure> {
        let again = format!(
            "ghostctl context add {} --replace --endpoint {} --token TOKEN",
            self.name, self.endpoint
        );
        let bad = |file: &str, error: &dyn std::fmt::Display| {
            Failure::new(
                ErrorCode::Unauthenticated,
                format!("{} cannot be used", self.folder.join(file).display()),
            )
            .because(error)
            .hint(again.clone())
        };
        let chain = CertificateDer::pem_slice_iter(&self.read(CERTIFICATE)?)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| bad(CERTIFICATE, &error))?;
        if let Some(leaf) = chain.first() {
            let validity = certificate::validity(leaf).map_err(|error| bad(CERTIFICATE, &error))?;
            if validity.has_ended() {
                return Err(Failure::new(
                    ErrorCode::Unauthenticated,
                    format!("the certificate of the context {} has expired", self.name),
                )
                .because(
                    "certificates live a day and are renewed when they are used; this one was not used in time",
                )
                .hint(again));
            }
        }
        Ok(Identity {
            authority: CertificateDer::from_pem_slice(&self.read(AUTHORITY)?)
                .map_err(|error| bad(AUTHORITY, &error))?,
            key: PrivateKeyDer::from_pem_slice(&self.read(KEY)?)
                .map_err(|error| bad(KEY, &error))?,
            chain,
        })
    }

    /// How long its certificate lives; `None` for a context without one.
    pub(crate) fn validity(&self) -> Option<certificate::Validity> {
        let pem = std::fs::read(self.folder.join(CERTIFICATE)).ok()?;
        let leaf = CertificateDer::from_pem_slice(&pem).ok()?;
        certificate::validity(&leaf).ok()
    }

    /// The fingerprint of the agent's CA.
    pub(crate) fn authority_fingerprint(&self) -> Option<Fingerprint> {
        let pem = std::fs::read(self.folder.join(AUTHORITY)).ok()?;
        let authority = CertificateDer::from_pem_slice(&pem).ok()?;
        Some(Fingerprint::of(&authority))
    }

    pub(crate) fn key_pem(&self) -> Result<Vec<u8>, Failure> {
        self.read(KEY)
    }

    /// Puts a renewed certificate into the place of the old one.
    pub(crate) fn replace_certificate(&self, pem: &str) -> Result<(), Failure> {
        let path = self.folder.join(CERTIFICATE);
        files::replace(&path, pem.as_bytes()).map_err(|error| unwritable(&path, &error))
    }

    fn read(&self, file: &str) -> Result<Vec<u8>, Failure> {
        let path = self.folder.join(file);
        std::fs::read(&path).map_err(|error| unreadable(&path, &error))
    }
}

/// A name is one plain path component, so that no context reaches outside its folder.
fn check_name(name: &str) -> Result<(), Failure> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if (1..=63).contains(&name.len())
        && name.chars().all(legal)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
    {
        return Ok(());
    }
    Err(Failure::new(
        ErrorCode::InvalidName,
        format!("{name:?} is not a name for a context"),
    )
    .because("1 to 63 letters, digits, dots, dashes and underscores, a letter or digit first"))
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure::io(format!("{} cannot be read", path.display()), error)
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::io(format!("{} cannot be written", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_folder() {
        for good in ["lab", "pc-1.example", "A_b", "0"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            ".hidden",
            "a b",
            "ä",
            &"x".repeat(64),
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_context_is_private_and_survives_a_replacement() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = tempfile::tempdir().unwrap();
        let contexts = Contexts {
            root: scratch.path().join("ghost"),
        };
        let settings = |endpoint: &str| Settings {
            endpoint: endpoint.to_owned(),
            identity: None,
            role: Some("viewer".to_owned()),
        };
        let credentials = Credentials {
            key: "k".into(),
            certificate: "c".into(),
            authority: "a".into(),
        };
        contexts
            .save("lab", settings("https://a:1"), Some(&credentials))
            .unwrap();
        let context = contexts
            .save("lab", settings("https://b:1"), Some(&credentials))
            .unwrap();
        assert_eq!(context.endpoint.to_string(), "https://b:1");
        assert_eq!(contexts.names().unwrap(), ["lab"]);
        for file in [SETTINGS, KEY, CERTIFICATE, AUTHORITY] {
            let mode = std::fs::metadata(context.folder.join(file))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{file}");
        }
        let mode = std::fs::metadata(&context.folder)
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
        contexts.activate("lab").unwrap();
        assert_eq!(contexts.current_name().unwrap().as_deref(), Some("lab"));
        context.replace_certificate("new").unwrap();
        assert_eq!(context.read(CERTIFICATE).unwrap(), b"new");
        contexts.remove("lab").unwrap();
        assert_eq!(contexts.current_name().unwrap(), None);
        assert!(contexts.names().unwrap().is_empty());
        assert_eq!(
            contexts.remove("lab").unwrap_err().exit(),
            crate::errors::Exit::NotFound
        );
    }
}
