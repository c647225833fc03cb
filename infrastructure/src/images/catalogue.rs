//! The catalogue of official cloud images: a list in YAML, built in and extended by the owner.

use std::collections::HashMap;
use std::path::Path;

use ghost_domain::ports::ImageCatalogue;
use ghost_domain::{
    CatalogueEntry, Checksum, ChecksumAlgorithm, ChecksumSource, Error, ErrorCode, ImageName,
    Result,
};
use serde::Deserialize;

use super::address;
use super::files::io_error;

/// `configs/images.yaml` as it was when this program was built.
const BUILT_IN: &str = include_str!("../../../configs/images.yaml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Catalogue {
    images: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default)]
    aliases: Vec<String>,
    description: String,
    url: String,
    checksum: Sum,
}

/// Exactly one of the two.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sum {
    #[serde(default)]
    value: Option<String>,
    #[serde(default)]
    url: Option<String>,
    #[serde(default)]
    algorithm: Option<Algorithm>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Algorithm {
    Sha256,
    Sha512,
}

/// [`ImageCatalogue`] from YAML.
#[derive(Clone, Debug)]
pub struct FileImageCatalogue {
    entries: Vec<CatalogueEntry>,
    by_name: HashMap<ImageName, usize>,
}

impl FileImageCatalogue {
    /// The built-in catalogue.
    ///
    /// # Errors
    /// None in a program whose tests passed; the error of [`Self::parse`] otherwise.
    pub fn built_in() -> Result<Self> {
        Self::parse(BUILT_IN)
    }

    /// The built-in catalogue with the owner's file over it: an entry of the file replaces the
    /// built-in entry of its name, and takes names and aliases from the others.
    ///
    /// # Errors
    /// `IoFailed` when the file cannot be read, `InvalidArgument` when it is no catalogue.
    pub fn with_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| io_error("read", path, &error))?;
        let own = Self::parse(&text)
            .map_err(|error| error.hint(format!("correct {}", path.display())))?;
        let built_in = Self::built_in()?;
        let taken = |name: &ImageName| own.by_name.contains_key(name);
        let mut entries = own.entries.clone();
        for mut entry in built_in.entries {
            if taken(&entry.name) {
                continue;
            }
            entry.aliases.retain(|alias| !taken(alias));
            entries.push(entry);
        }
        Self::index(entries)
    }

    /// Reads a catalogue.
    ///
    /// # Errors
    /// `InvalidArgument` with line and column, or with the entry and its fault.
    pub fn parse(text: &str) -> Result<Self> {
        let catalogue: Catalogue = serde_saphyr::from_str(text).map_err(|error| {
            let cause = match error.location() {
                Some(at) => format!("line {}, column {}: {error}", at.line(), at.column()),
                None => error.to_string(),
            };
            invalid("the image catalogue is not valid").because(cause)
        })?;
        let entries = catalogue
            .images
            .into_iter()
            .map(|entry| {
                let name = entry.name.clone();
                convert(entry).map_err(|error| {
                    invalid(format!("the image catalogue's entry {name:?} is not valid"))
                        .because(error)
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Self::index(entries)
    }

    fn index(entries: Vec<CatalogueEntry>) -> Result<Self> {
        let mut by_name = HashMap::new();
        for (index, entry) in entries.iter().enumerate() {
            for name in std::iter::once(&entry.name).chain(&entry.aliases) {
                if by_name.insert(name.clone(), index).is_some() {
                    return Err(invalid(format!(
                        "the image catalogue has the name {name} twice"
                    )));
                }
            }
        }
        Ok(Self { entries, by_name })
    }
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorCode::InvalidArgument, what)
}

fn convert(entry: Entry) -> Result<CatalogueEntry> {
    address::start(&entry.url)?;
    let checksum = match (entry.checksum.value, entry.checksum.url) {
        (Some(value), None) => {
            let checksum: Checksum = value.parse()?;
            ChecksumSource::Inline(checksum)
        }
        (None, Some(url)) => {
            address::start(&url)?;
            let algorithm = match entry.checksum.algorithm {
                Some(Algorithm::Sha256) => ChecksumAlgorithm::Sha256,
                Some(Algorithm::Sha512) => ChecksumAlgorithm::Sha512,
                None => return Err(invalid("checksum.url needs checksum.algorithm beside it")),
            };
            ChecksumSource::Url { url, algorithm }
        }
        _ => {
            return Err(invalid("checksum needs either value, or url and algorithm"));
        }
    };
    Ok(CatalogueEntry {
        name: ImageName::new(entry.name)?,
        aliases: entry
            .aliases
            .into_iter()
            .map(ImageName::new)
            .collect::<Result<_>>()?,
        description: entry.description,
        url: entry.url,
        checksum,
    })
}

impl ImageCatalogue for FileImageCatalogue {
    fn entries(&self) -> Vec<CatalogueEntry> {
        self.entries.clone()
    }

    fn find(&self, name: &ImageName) -> Option<CatalogueEntry> {
        self.by_name
            .get(name)
            .and_then(|index| self.entries.get(*index))
            .cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ImageName {
        ImageName::new(text).unwrap()
    }

    #[test]
    fn the_built_in_catalogue_is_sound() {
        let catalogue = FileImageCatalogue::built_in().unwrap();
        for (asked, found) in [
            ("debian", "debian-13"),
            ("debian-12", "debian-12"),
            ("ubuntu-22.04", "ubuntu-22.04"),
            ("noble", "ubuntu-24.04"),
            ("ubuntu", "ubuntu-26.04"),
            ("fedora", "fedora-44"),
            ("alpine", "alpine-3.24"),
            ("almalinux", "almalinux-10"),
            ("almalinux-9", "almalinux-9"),
        ] {
            assert_eq!(
                catalogue.find(&name(asked)).unwrap().name,
                name(found),
                "{asked}"
            );
        }
        assert_eq!(catalogue.find(&name("windows")), None);
        for entry in catalogue.entries() {
            assert!(entry.url.starts_with("https://"), "{}", entry.url);
            let ChecksumSource::Url { url, .. } = &entry.checksum else {
                continue;
            };
            // The list lies with the publisher of the image, or it vouches for nothing.
            let host = |url: &str| url.split('/').nth(2).map(str::to_owned);
            assert_eq!(host(url), host(&entry.url), "{}", entry.name);
        }
    }

    const OWN: &str = "images:
  - name: debian-13
    aliases: [ubuntu]
    description: ours
    url: https://mirror.example.org/debian.qcow2
    checksum: {value: 'sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'}
";

    #[test]
    fn the_owners_file_lies_over_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("images.yaml");
        std::fs::write(&path, OWN).unwrap();
        let catalogue = FileImageCatalogue::with_file(&path).unwrap();
        assert_eq!(
            catalogue.find(&name("debian-13")).unwrap().description,
            "ours"
        );
        assert_eq!(catalogue.find(&name("ubuntu")).unwrap().description, "ours");
        assert_eq!(
            catalogue.find(&name("trixie")),
            None,
            "the replaced entry is gone whole"
        );
        assert!(catalogue.find(&name("resolute")).is_some());
        assert_eq!(
            catalogue.entries().len(),
            FileImageCatalogue::built_in().unwrap().entries().len()
        );
        let missing = FileImageCatalogue::with_file(&folder.path().join("none"));
        assert_eq!(missing.unwrap_err().code(), ErrorCode::IoFailed);
    }

    #[test]
    fn faults_are_named() {
        for (from, to, told) in [
            ("name: debian-13", "nam: debian-13", "line 2"),
            ("name: debian-13", "name: Debian", "\"Debian\""),
            ("https://mirror", "http://mirror", "https"),
            ("https://mirror", "file:///mirror", "not supported"),
            ("value:", "url:", "address"),
            ("'sha256:aaaa", "'sha256:a", "not a checksum"),
            ("{value:", "{algorithm: sha256, value:", ""),
            ("{value:", "{size: 1, value:", "line"),
            ("aliases: [ubuntu]", "aliases: [debian-13]", "twice"),
            ("description: ours", "", "line"),
            ("images:", "pictures:", "line 1"),
        ] {
            let text = OWN.replacen(from, to, 1);
            match FileImageCatalogue::parse(&text) {
                Ok(_) => assert_eq!(told, "", "{to}"),
                Err(error) => {
                    assert_eq!(error.code(), ErrorCode::InvalidArgument);
                    assert!(
                        !told.is_empty() && error.to_string().contains(told),
                        "{to}: {error}"
                    );
                }
            }
        }
    }
}
