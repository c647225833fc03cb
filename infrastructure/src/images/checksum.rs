//! Hashes of files, and the lists of checksums that distributions publish.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use ghost_domain::{Checksum, ChecksumAlgorithm, Error, ErrorCode, ImageDigest, Result};
use sha2::{Digest, Sha256, Sha512};

use super::files::{Cancellation, io_error};
use super::progress::Meter;

/// SHA-256 of a file, and its hash by `also` in the same pass.
pub(super) fn hash_file(
    mut file: &File,
    path: &Path,
    also: Option<ChecksumAlgorithm>,
    meter: &mut Meter,
    cancellation: &Cancellation,
) -> Result<(ImageDigest, Option<Checksum>)> {
    use std::io::Seek;
    let failed = |error: &io::Error| io_error("read", path, error);
    file.rewind().map_err(|error| failed(&error))?;
    let mut sha256 = Sha256::new();
    let mut sha512 = (also == Some(ChecksumAlgorithm::Sha512)).then(Sha512::new);
    let mut buffer = vec![0; 1 << 20];
    loop {
        cancellation.check()?;
        let count = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(failed(&error)),
        };
        sha256.update(&buffer[..count]);
        if let Some(sha512) = &mut sha512 {
            sha512.update(&buffer[..count]);
        }
        meter.add(count as u64);
    }
    let digest: [u8; 32] = sha256.finalize().into();
    let checksum = match (also, sha512) {
        (Some(ChecksumAlgorithm::Sha512), Some(sha512)) => Some(Checksum::new(
            ChecksumAlgorithm::Sha512,
            sha512.finalize().to_vec(),
        )?),
        (Some(ChecksumAlgorithm::Sha256), _) => {
            Some(Checksum::new(ChecksumAlgorithm::Sha256, digest.to_vec())?)
        }
        _ => None,
    };
    Ok((ImageDigest::from_bytes(digest), checksum))
}

/// Finds the checksum of `file_name` in a published list. Understood are
/// - coreutils: `DIGEST  NAME` and `DIGEST *NAME` (Debian's `SHA512SUMS`, Ubuntu's `SHA256SUMS`),
/// - BSD: `SHA256 (NAME) = DIGEST` (Fedora's and AlmaLinux's `CHECKSUM`),
/// - one bare digest, for the file it stands beside (Alpine's `.sha512`),
///
/// each also inside an OpenPGP clear-signed message (RFC 9580 section 7). The signature is not
/// checked: the list is trusted because it comes by https from the publisher.
///
/// # Errors
/// `DownloadFailed` when the list has no entry of this algorithm for the file, or two different.
pub fn find_in_list(list: &str, file_name: &str, algorithm: ChecksumAlgorithm) -> Result<Checksum> {
    let mut found: Option<Checksum> = None;
    let mut bare: Vec<Checksum> = Vec::new();
    let mut others = 0usize;
    for line in list.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line.starts_with("-----BEGIN PGP SIGNATURE") {
            break;
        }
        let (name, checksum) = match parse_line(line, algorithm) {
            Some((Some(name), checksum)) => (name, checksum),
            Some((None, checksum)) => {
                bare.push(checksum);
                continue;
            }
            None => continue,
        };
        // Lists name files by path too (`./NAME`, `images/NAME`).
        if name.rsplit('/').next() != Some(file_name) {
            others += 1;
            continue;
        }
        if found.as_ref().is_some_and(|first| *first != checksum) {
            return Err(missing(file_name, algorithm)
                .because("the list names the file twice, with different checksums"));
        }
        found = Some(checksum);
    }
    match (found, bare.len(), others) {
        (Some(checksum), ..) => Ok(checksum),
        (None, 1, 0) => bare.pop().ok_or_else(|| missing(file_name, algorithm)),
        _ => Err(missing(file_name, algorithm)),
    }
}

fn missing(file_name: &str, algorithm: ChecksumAlgorithm) -> Error {
    Error::new(
        ErrorCode::DownloadFailed,
        format!(
            "the published list has no {} checksum for {file_name}",
            algorithm.as_str()
        ),
    )
    .hint("the publisher may have moved the image; check the addresses in the image catalogue")
}

/// The name (none for a bare digest) and checksum of one line, if it is of this algorithm.
fn parse_line(line: &str, algorithm: ChecksumAlgorithm) -> Option<(Option<&str>, Checksum)> {
    let digest = |text: &str| {
        if text.len() != algorithm.digest_length() * 2 {
            return None;
        }
        Checksum::new(algorithm, hex::decode(text).ok()?).ok()
    };
    if let Some((left, right)) = line.rsplit_once(" = ") {
        let (kind, name) = left.split_once(" (")?;
        if !kind.eq_ignore_ascii_case(algorithm.as_str()) {
            return None;
        }
        return Some((Some(name.strip_suffix(')')?), digest(right.trim())?));
    }
    match line.split_once(char::is_whitespace) {
        None => Some((None, digest(line)?)),
        Some((hex, name)) => {
            let name = name.trim_start();
            Some((Some(name.strip_prefix('*').unwrap_or(name)), digest(hex)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

    fn find(list: &str, name: &str) -> Result<String> {
        find_in_list(list, name, ChecksumAlgorithm::Sha256).map(|c| c.to_string())
    }

    #[test]
    fn the_lists_of_the_distributions_are_read() {
        let coreutils = format!("{A}  a.qcow2\n{B} *b.qcow2\n");
        assert_eq!(find(&coreutils, "a.qcow2").unwrap(), format!("sha256:{A}"));
        assert_eq!(find(&coreutils, "b.qcow2").unwrap(), format!("sha256:{B}"));
        let fedora = format!(
            "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n# a.qcow2: 500 bytes\nSHA256 (a.qcow2) = {A}\n# b.qcow2: 5 bytes\nSHA256 (b.qcow2) = {B}\n-----BEGIN PGP SIGNATURE-----\n\niQIzBAEBCAAdFiEE\n-----END PGP SIGNATURE-----\n"
        );
        assert_eq!(find(&fedora, "b.qcow2").unwrap(), format!("sha256:{B}"));
        assert_eq!(find(&format!("{A}\n"), "x").unwrap(), format!("sha256:{A}"));
        assert_eq!(
            find(&format!("{A}  ./images/x\r\n"), "x").unwrap(),
            format!("sha256:{A}")
        );
        let both = format!("{}  a\n{A}  a\n", "c".repeat(128));
        assert_eq!(find(&both, "a").unwrap(), format!("sha256:{A}"));
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        for list in [
            String::new(),
            format!("{A}  other.qcow2\n"),
            format!("{A}\n{B}\n"),
            format!("{A}  other.qcow2\n{B}\n"),
            format!("{A}  a\n{B}  a\n"),
            format!("{}  a\n", &A[1..]),
            format!("{}  a\n", "g".repeat(64)),
            format!("MD5 (a) = {A}\n"),
            format!("-----BEGIN PGP SIGNATURE-----\n{A}  a\n"),
            "<html>404</html>".to_owned(),
        ] {
            let error = find(&list, "a").unwrap_err();
            assert_eq!(error.code(), ErrorCode::DownloadFailed, "{list}");
        }
        // The same line twice is no contradiction.
        assert!(find(&format!("{A}  a\n{A}  a\n"), "a").is_ok());
    }

    proptest! {
        #[test]
        fn never_panics(list in "\\PC*", name in "\\PC*") {
            let _ = find(&list, &name);
        }
    }
}
