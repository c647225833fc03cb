//! The documents name tests; here they are held to the code.

use std::fs;
use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
}

/// Whether a file is that of a module: `module.rs`, or a `mod.rs` in a folder of that name.
fn is_module(path: &Path, module: &str) -> bool {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    let folder = path
        .parent()
        .and_then(Path::file_name)
        .and_then(|name| name.to_str());
    stem == Some(module) || (stem == Some("mod") && folder == Some(module))
}

#[test]
fn every_test_that_the_requirements_name_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(root.join("docs/REQUIREMENTS.md")).unwrap();
    let mut named = 0;
    let mut missing = Vec::new();
    for quoted in page.split('`').skip(1).step_by(2) {
        let Some((package, test)) = quoted.split_once(": ") else {
            continue;
        };
        let Some((module, function)) = test.split_once("::") else {
            continue;
        };
        if package == "crate" {
            continue;
        }
        named += 1;
        let mut files = Vec::new();
        sources(&root.join(package).join("src"), &mut files);
        sources(&root.join(package).join("tests"), &mut files);
        let declaration = format!("fn {function}(");
        let exists = files
            .iter()
            .filter(|path| is_module(path, module))
            .filter_map(|path| fs::read_to_string(path).ok())
            .any(|text| text.contains(&declaration));
        if !exists {
            missing.push(quoted.to_owned());
        }
    }
    assert!(named > 50, "only {named} tests are named");
    assert!(missing.is_empty(), "named, and not there: {missing:#?}");
}
