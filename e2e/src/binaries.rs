//! Where the programs and images under test are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}

/// A program of ours, beside the running one (`target/<profile>/`, also from within `deps/`).
///
/// # Panics
/// Where it was not built.
#[expect(clippy::panic, reason = "nothing can be tested without it")]
pub fn program(name: &str) -> PathBuf {
    let mut folders = Vec::new();
    if let Ok(own) = std::env::current_exe() {
        folders.extend(own.ancestors().skip(1).take(2).map(Path::to_owned));
    }
    match folders
        .iter()
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
    {
        Some(path) => path,
        None => panic!(
            "{name} is not built; run: cargo build --workspace --bins (looked in {folders:?})"
        ),
    }
}

/// The agent's program for guests: static, as guests get it.
///
/// # Panics
/// Where it cannot be made.
pub fn guest_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| made("GHOST_GUEST_PROGRAM", "ghost-guest", "guest"))
}

/// What takes its place in a guest that means harm.
///
/// # Panics
/// Where it cannot be made.
pub fn hostile_program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| made("GHOST_HOSTILE_PROGRAM", "hostile-guest", "hostile"))
}

/// A static program, from where `variable` says or made by `make target`.
#[expect(clippy::panic, reason = "nothing can be tested without it")]
fn made(variable: &str, name: &str, target: &str) -> PathBuf {
    let path = std::env::var_os(variable)
        .filter(|path| !path.is_empty())
        .map_or_else(|| workspace().join("build/guest").join(name), PathBuf::from);
    if !path.is_file() {
        let made = Command::new("make")
            .args(["--no-print-directory", target])
            .current_dir(workspace())
            .status();
        assert!(
            made.is_ok_and(|status| status.success()) && path.is_file(),
            "{} cannot be made; run: make {target}",
            path.display()
        );
    }
    match path.canonicalize() {
        Ok(path) => path,
        Err(error) => panic!("{}: {error}", path.display()),
    }
}

/// The tiny guest's image.
///
/// # Panics
/// Where it cannot be made.
pub fn tiny_image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| image("GHOST_TINY_IMAGE", "tiny"))
}

/// The Debian guest's image.
///
/// # Panics
/// Where it cannot be made.
pub fn debian_image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| image("GHOST_DEBIAN_IMAGE", "debian-12"))
}

#[expect(clippy::panic, reason = "nothing can be tested without it")]
fn image(variable: &str, name: &str) -> PathBuf {
    if let Some(path) = std::env::var_os(variable).filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        assert!(
            path.is_file(),
            "{variable} names {}, which is not there",
            path.display()
        );
        return path;
    }
    let path = workspace().join(format!("build/images/{name}.qcow2"));
    if !path.is_file() {
        let script = workspace().join(format!("deploy/images/build-{name}.sh"));
        match Command::new(&script).arg(&path).status() {
            Ok(status) if status.success() => {}
            other => panic!("{}: {other:?}", script.display()),
        }
    }
    path
}
