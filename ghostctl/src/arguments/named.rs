//! Every command line of ghostctl that a hint, a help text or a page of the documentation names is
//! one that ghostctl takes: who follows advice must not be told "unrecognized subcommand".

use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};

use super::Cli;

/// Files of the workspace with these endings, without what is built.
fn files(folder: &Path, endings: &[&str], found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with('.') || ["target", "build", "generated", "tests"].contains(&name) {
            continue;
        }
        if path.is_dir() {
            files(&path, endings, found);
        } else if endings
            .iter()
            .any(|ending| path.extension().is_some_and(|e| e == *ending))
        {
            found.push(path);
        }
    }
}

/// The parts of a line that are code and not prose: literals of Rust, code of Markdown.
fn code(line: &str, ending: &str, block: bool) -> Vec<String> {
    let mark = match ending {
        "rs" => '"',
        "md" if block => return vec![line.to_owned()],
        "md" => '`',
        _ => return vec![line.to_owned()],
    };
    line.replace("\\\"", "'")
        .split(mark)
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// What stands behind `ghostctl` in a piece of code, one list of words each time.
fn lines_named(code: &str) -> Vec<Vec<String>> {
    let mut lines = Vec::new();
    for (at, name) in code.match_indices("ghostctl ") {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || "-_/.".contains(c)) {
            continue;
        }
        let mut words = Vec::new();
        for word in code[at + name.len()..].split_whitespace() {
            let bare = word.trim_end_matches([',', ';', ')', '`', '.', ':', '\'', ']']);
            words.push(bare.trim_start_matches(['(', '[']).to_owned());
            if bare != word || ["|", "--", "#", ">", "&&"].contains(&word) {
                break;
            }
        }
        lines.push(words);
    }
    lines
}

fn ghostctl() -> Command {
    let mut command = Cli::command();
    command.build();
    command
}

/// Why a line is not one of ghostctl's; words in capitals or braces stand for something else.
fn wrong(ghostctl: &Command, words: &[String]) -> Option<String> {
    let mut at = ghostctl;
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        if word == "--" || word == "|" || word == "#" {
            break;
        }
        if let Some(flag) = word.strip_prefix("--") {
            let flag = flag.split(['=', '[']).next().unwrap();
            if flag.is_empty() || flag.contains(['{', '|', '…', '/']) {
                continue;
            }
            let known = ["help", "version"].contains(&flag)
                || at.get_arguments().any(|one| {
                    one.get_long() == Some(flag)
                        || one
                            .get_visible_aliases()
                            .is_some_and(|names| names.contains(&flag))
                });
            if !known {
                return Some(format!("{} has no --{flag}", at.get_name()));
            }
            let takes = at
                .get_arguments()
                .find(|one| one.get_long() == Some(flag))
                .is_some_and(|one| one.get_action().takes_values());
            if takes && !word.contains('=') && !at.get_name().eq("cp") {
                words.next();
            }
        } else if word.starts_with('-') || !at.has_subcommands() {
            // Short flags take a value in the same word or the next one, which is no command.
            if word == "-o" {
                words.next();
            }
        } else if word.chars().all(|c| c.is_ascii_lowercase() || c == '-') {
            match at.find_subcommand(word) {
                Some(below) => at = below,
                None => return Some(format!("{} has no {word}", at.get_name())),
            }
        } else {
            // Several that are told at once, or a placeholder.
            for name in word.split('|') {
                let plain = name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
                if plain && at.find_subcommand(name).is_none() {
                    return Some(format!("{} has no {name}", at.get_name()));
                }
            }
            break;
        }
    }
    None
}

#[test]
fn whatever_is_advised_is_a_command_of_ours() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut found = Vec::new();
    files(root, &["rs", "md", "sh", "yaml"], &mut found);
    let (mut seen, mut bad) = (0, Vec::new());
    let ghostctl = ghostctl();
    for path in found {
        let text = std::fs::read_to_string(&path).unwrap();
        let ending = path.extension().unwrap().to_str().unwrap();
        let prose = ["sh", "yaml"].contains(&ending);
        let mut block = false;
        for line in text.lines() {
            if line.trim_start().starts_with("```") {
                block = !block;
            }
            // What tests make up, and what people are told about, are no advice.
            if ending == "rs" && (line.starts_with("mod tests") || line == "#[test]") {
                break;
            }
            if prose && !line.trim_start().starts_with("show ghostctl ") {
                continue;
            }
            for words in code(line, ending, block)
                .iter()
                .flat_map(|code| lines_named(code))
            {
                seen += 1;
                if let Some(why) = wrong(&ghostctl, &words) {
                    bad.push(format!("{}: {why}: {}", path.display(), line.trim()));
                }
            }
        }
    }
    assert!(seen > 100, "only {seen} were found");
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn what_is_no_command_is_noticed() {
    let ghostctl = ghostctl();
    let told = |line: &str| {
        let words: Vec<_> = lines_named(line);
        words.iter().find_map(|words| wrong(&ghostctl, words))
    };
    assert_eq!(told("see ghostctl --host pc vm list -o json, then"), None);
    assert_eq!(told("ghostctl exec web -- rm --nothing"), None);
    assert!(told("ghostctl host commands").is_some());
    assert!(told("first ghostctl status, then ghostctl vm erase web").is_some());
    assert!(told("ghostctl vm list --everything").is_some());
    assert!(told("ghostctl vm start|erase").is_some());
}
