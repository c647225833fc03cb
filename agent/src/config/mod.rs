//! The agent's configuration: `/etc/ghost/agent.yaml` below, `GHOST_…` of the environment above,
//! defaults in code beneath both.
//!
//! Everything that is wrong is told at once, each problem with its place, the path of its key and
//! what to write instead. Nothing is taken over from a configuration with a problem.

mod check;
mod command;
mod schema;
mod tree;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

pub(crate) use self::command::{Command, execute};
pub(crate) use self::schema::Config;
pub(crate) use self::value::{HypervisorUri, Listen};

use self::schema::{Visitor, environment_name};
use self::tree::{Node, Place};
use self::value::{Given, Leaf};

/// Where the configuration lies when nobody says otherwise.
pub(crate) const DEFAULT_FILE: &str = "/etc/ghost/agent.yaml";

/// Exit code for a configuration that cannot be used (EX_CONFIG of sysexits.h).
pub(crate) const EXIT_CONFIG: u8 = 78;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Nobody set it.
    Default,
    /// The file, and where in it.
    File { line: u64, column: u64 },
    /// A variable of the environment.
    Environment(String),
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    /// Where it was written; `Default` where it is not written anywhere.
    pub(crate) origin: Origin,
    /// The path of the key, empty for the file as a whole.
    pub(crate) path: String,
    /// What is wrong.
    pub(crate) message: String,
    /// What to do.
    pub(crate) hint: Option<String>,
}

/// A configuration that cannot be used, and all reasons why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Faults {
    /// The file, where there is one.
    pub(crate) file: Option<PathBuf>,
    /// The reasons, in the order of the file.
    pub(crate) problems: Vec<Problem>,
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.problems.len();
        write!(
            f,
            "error: the configuration has {count} problem{}",
            if count == 1 { "" } else { "s" }
        )?;
        for problem in &self.problems {
            write!(f, "\n  ")?;
            match (&problem.origin, &self.file) {
                (Origin::File { line, column }, Some(file)) => {
                    write!(f, "{}:{line}:{column}: ", file.display())?;
                }
                (Origin::Environment(name), _) => write!(f, "{name}: ")?,
                (_, Some(file)) => write!(f, "{}: ", file.display())?,
                (_, None) => {}
            }
            if !problem.path.is_empty() {
                write!(f, "{}: ", problem.path)?;
            }
            write!(f, "{}", problem.message)?;
            if let Some(hint) = &problem.hint {
                write!(f, "\n    try: {hint}")?;
            }
        }
        Ok(())
    }
}

/// A configuration and where it came from.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    /// The values.
    pub(crate) config: Config,
    /// The file, where there was one.
    pub(crate) file: Option<PathBuf>,
    /// The origin of each key that is not at its default.
    pub(crate) origins: BTreeMap<String, Origin>,
}

/// Loads the configuration: from `file` where it is named (then it must be there), or else from
/// [`DEFAULT_FILE`] where that exists.
///
/// # Errors
/// Everything that is wrong with it.
pub(crate) fn load(file: Option<&Path>) -> Result<Loaded, Faults> {
    let path = file.unwrap_or(Path::new(DEFAULT_FILE));
    let text = match std::fs::read_to_string(path) {
        Ok(text) => Some(text),
        Err(cause) if file.is_none() && cause.kind() == std::io::ErrorKind::NotFound => None,
        Err(cause) => {
            return Err(Faults {
                file: Some(path.to_owned()),
                problems: vec![Problem {
                    origin: Origin::Default,
                    path: String::new(),
                    message: format!("the file cannot be read: {cause}"),
                    hint: Some("is the path right, and may this user read it?".into()),
                }],
            });
        }
    };
    let environment = std::env::vars_os().map(|(name, value)| {
        (
            name.to_string_lossy().into_owned(),
            value.to_string_lossy().into_owned(),
        )
    });
    load_from(
        text.as_deref().map(|text| (path, text)),
        environment.collect(),
    )
}

/// Loads from a text and variables.
fn load_from(
    file: Option<(&Path, &str)>,
    environment: BTreeMap<String, String>,
) -> Result<Loaded, Faults> {
    let faults = |problems| Faults {
        file: file.map(|(path, _)| path.to_owned()),
        problems,
    };
    let mut reader = Reader {
        environment: environment
            .into_iter()
            .filter(|(name, _)| name.starts_with("GHOST_"))
            .collect(),
        ..Reader::default()
    };
    let root = match file.map(|(_, text)| tree::parse(text)) {
        None => Node::Null,
        Some(Ok(root)) => root,
        Some(Err(unreadable)) => {
            return Err(faults(vec![Problem {
                origin: unreadable.at.map_or(Origin::Default, Origin::from),
                path: String::new(),
                message: format!("this is not valid YAML: {}", unreadable.message),
                hint: None,
            }]));
        }
    };
    let mut config = Config::default();
    config.visit(&mut reader.known);
    reader.flatten(&root);
    config.visit(&mut reader);
    reader.unknown_variables();
    if reader.problems.is_empty() {
        check::check(&config, &reader.origins, &mut reader.problems);
    }
    if !reader.problems.is_empty() {
        reader
            .problems
            .sort_by_key(|problem| match &problem.origin {
                Origin::File { line, column } => (0, *line, *column, String::new()),
                Origin::Default => (1, 0, 0, problem.path.clone()),
                Origin::Environment(name) => (2, 0, 0, name.clone()),
            });
        return Err(faults(reader.problems));
    }
    Ok(Loaded {
        config,
        file: file.map(|(path, _)| path.to_owned()),
        origins: reader.origins,
    })
}

impl From<Place> for Origin {
    fn from(place: Place) -> Self {
        Self::File {
            line: place.line,
            column: place.column,
        }
    }
}

/// The paths of all sections and keys.
#[derive(Default)]
struct Known {
    sections: Vec<String>,
    keys: Vec<String>,
}

impl Visitor for Known {
    fn section(&mut self, path: &str) {
        self.sections.push(path.to_owned());
    }

    fn leaf(&mut self, path: &str, _: &mut dyn Leaf) {
        self.keys.push(path.to_owned());
    }
}

impl Known {
    /// The names right below a section.
    fn below<'a>(&'a self, section: &'a str) -> impl Iterator<Item = &'a str> {
        self.sections
            .iter()
            .chain(&self.keys)
            .filter_map(move |path| {
                let rest = if section.is_empty() {
                    path.as_str()
                } else {
                    path.strip_prefix(section)?.strip_prefix('.')?
                };
                (!rest.contains('.')).then_some(rest)
            })
    }

    /// What somebody may have meant by an unknown key.
    fn hint(&self, section: &str, key: &str) -> String {
        if let Some(near) = nearest(key, self.below(section)) {
            return format!("did you mean {near}?");
        }
        let elsewhere: Vec<_> = self
            .sections
            .iter()
            .chain(&self.keys)
            .filter(|path| path.rsplit('.').next() == Some(key))
            .map(String::as_str)
            .collect();
        if !elsewhere.is_empty() {
            return format!("there is {}", elsewhere.join(" and "));
        }
        let names: Vec<_> = self.below(section).collect();
        match (section, names.is_empty()) {
            ("", _) => format!("the sections are {}", names.join(", ")),
            (_, true) => "this section has no keys in this version: remove it".into(),
            (_, false) => format!("its keys are {}", names.join(", ")),
        }
    }
}

/// Fills a configuration from the file and the environment, collecting what is wrong.
#[derive(Default)]
struct Reader {
    known: Known,
    environment: BTreeMap<String, String>,
    given: BTreeMap<String, (Node, Place)>,
    origins: BTreeMap<String, Origin>,
    problems: Vec<Problem>,
}

impl Reader {
    /// Takes the document apart into known keys with their values; all else is a problem.
    fn flatten(&mut self, root: &Node) {
        match root {
            Node::Null => {}
            Node::Map(_) => self.section_of("", root),
            other => self.problems.push(Problem {
                origin: Place { line: 1, column: 1 }.into(),
                path: String::new(),
                message: format!("sections with keys are expected, not {}", other.kind()),
                hint: Some("see configs/agent.yaml for an example with every key".into()),
            }),
        }
    }

    fn section_of(&mut self, section: &str, node: &Node) {
        let Node::Map(entries) = node else { return };
        for entry in entries {
            let path = if section.is_empty() {
                entry.key.clone()
            } else {
                format!("{section}.{}", entry.key)
            };
            if self.known.keys.contains(&path) {
                self.given
                    .insert(path, (entry.value.clone(), entry.value_at));
            } else if self.known.sections.contains(&path) {
                match &entry.value {
                    Node::Null => {}
                    Node::Map(_) => self.section_of(&path, &entry.value),
                    other => {
                        let names: Vec<_> = self.known.below(&path).collect();
                        let hint = names
                            .first()
                            .map(|name| format!("write its keys below it, indented: {name}: …"));
                        self.problems.push(Problem {
                            origin: entry.value_at.into(),
                            message: format!("this is a section with keys, not {}", other.kind()),
                            hint,
                            path,
                        });
                    }
                }
            } else {
                // A key with a dot in it is nobody's, also where it reads like a path of ours.
                let hint = self.known.hint(section, &entry.key);
                self.problems.push(Problem {
                    origin: entry.at.into(),
                    message: "there is no such key".into(),
                    hint: Some(hint),
                    path,
                });
            }
        }
    }

    /// Variables that look like ours and name no key. Those of other programs of ours
    /// (`GHOST_ENDPOINT`) have no double underscore.
    fn unknown_variables(&mut self) {
        let names: Vec<(String, String)> = self
            .known
            .keys
            .iter()
            .map(|path| (environment_name(path), path.clone()))
            .collect();
        for name in self.environment.keys() {
            if !name.contains("__") || names.iter().any(|(known, _)| known == name) {
                continue;
            }
            let near = nearest(name, names.iter().map(|(known, _)| known.as_str()));
            self.problems.push(Problem {
                origin: Origin::Environment(name.clone()),
                path: String::new(),
                message: "this variable names no key".into(),
                hint: Some(near.map_or_else(
                    || "list them with: ghost-agent config show --environment".into(),
                    |near| format!("did you mean {near}?"),
                )),
            });
        }
    }
}

impl Visitor for Reader {
    fn section(&mut self, _: &str) {}

    fn leaf(&mut self, path: &str, value: &mut dyn Leaf) {
        let name = environment_name(path);
        let from_file = self
            .given
            .get(path)
            .map(|(node, place)| (Given::File(node), Origin::from(*place)));
        let from_environment = self
            .environment
            .get(&name)
            .map(|text| (Given::Environment(text), Origin::Environment(name)));
        // What the file says is judged also where the environment overrules it: it is wrong anyway.
        for (given, origin) in from_file.into_iter().chain(from_environment) {
            match value.read(given) {
                Ok(()) => {
                    self.origins.insert(path.to_owned(), origin);
                }
                Err(refusal) => self.problems.push(Problem {
                    origin,
                    path: path.to_owned(),
                    message: refusal.message,
                    hint: refusal.hint,
                }),
            }
        }
    }
}

/// The candidate that `text` is most likely a slip of, if any is close.
fn nearest<'a>(text: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let text = text.to_lowercase().replace('-', "_");
    candidates
        .into_iter()
        .map(|candidate| (distance(&text, &candidate.to_lowercase()), candidate))
        .filter(|(distance, candidate)| *distance <= 1.max(candidate.len() / 4))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, substitutions and swaps of neighbours from one text to the other
/// (optimal string alignment).
fn distance(one: &str, other: &str) -> usize {
    let one: Vec<char> = one.chars().take(64).collect();
    let other: Vec<char> = other.chars().take(64).collect();
    // rows[i][j]: from the first i characters of one to the first j of the other.
    let mut rows: Vec<Vec<usize>> = vec![(0..=other.len()).collect()];
    let cell = |rows: &[Vec<usize>], i: usize, j: usize| -> usize {
        rows.get(i)
            .and_then(|row| row.get(j))
            .copied()
            .unwrap_or(usize::MAX / 2)
    };
    for (i, left) in one.iter().enumerate() {
        rows.push(vec![i + 1]);
        for (j, right) in other.iter().enumerate() {
            let mut best = (cell(&rows, i, j) + usize::from(left != right))
                .min(cell(&rows, i, j + 1) + 1)
                .min(cell(&rows, i + 1, j) + 1);
            let swapped =
                i > 0 && j > 0 && one.get(i - 1) == Some(right) && other.get(j - 1) == Some(left);
            if swapped {
                best = best.min(cell(&rows, i - 1, j - 1) + 1);
            }
            if let Some(row) = rows.last_mut() {
                row.push(best);
            }
        }
    }
    cell(&rows, one.len(), other.len())
}

#[cfg(test)]
mod tests;
