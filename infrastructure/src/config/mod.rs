//! Configurations of Ghost's programs: a YAML file below, variables of the environment above, and
//! defaults in code beneath both. What keys there are says each program's [`Schema`].
//!
//! Everything that is wrong is told at once, each problem with its place, the path of its key and
//! what to write instead. Nothing is taken over from a configuration with a problem.
//!
//! The variable of a key is the program's prefix with the path in capitals, two underscores between
//! its parts: `GHOST_GRPC__LISTEN` is `grpc.listen` of the agent, `GHOST_CORE_GRPC__LISTEN` that of
//! Core. One prefix for both would let a variable that is meant for one of two programs on a machine
//! move the other's port.

mod show;
mod tree;
mod value;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

pub use self::show::show;
pub use self::tree::{Entry, Node, Place};
pub use self::value::{
    Endpoint, Fraction, FullPath, Given, Leaf, List, Listen, LogLevel, Name, Ratio, Refusal,
    Scalar, ServerNames, SocketPath, refuse,
};

/// Exit code for a configuration that cannot be used (EX_CONFIG of sysexits.h).
pub const EXIT_CONFIG: u8 = 78;

/// The prefixes of all programs of ours. A variable belongs to the program with the longest that
/// fits, so that the agent does not take Core's variables for slips of its own.
const PREFIXES: [&str; 2] = ["GHOST_", "GHOST_CORE_"];

/// The program that a configuration is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its name, as it is called.
    pub name: &'static str,
    /// Where its configuration lies when nobody says otherwise.
    pub default_file: &'static str,
    /// The example with every key.
    pub example: &'static str,
    /// What its variables begin with; one of the known ones.
    pub prefix: &'static str,
}

impl Program {
    /// The environment's name of a key: `GHOST_GRPC__LISTEN` for `grpc.listen`.
    pub fn variable(&self, path: &str) -> String {
        format!(
            "{}{}",
            self.prefix,
            path.replace('.', "__").to_ascii_uppercase()
        )
    }

    /// Whether a variable is this program's: `GHOST_CORE_STORE__ENGINE` is Core's, and
    /// `GHOST_CORE__PERMISSIONS` is the key `core.permissions` of the agent.
    fn owns(&self, variable: &str) -> bool {
        PREFIXES
            .into_iter()
            .filter(|prefix| {
                variable
                    .strip_prefix(prefix)
                    .is_some_and(|rest| !rest.starts_with('_'))
            })
            .max_by_key(|prefix| prefix.len())
            == Some(self.prefix)
    }
}

/// Walks over the keys.
pub trait Visitor {
    /// A section begins.
    fn section(&mut self, path: &str);
    /// A key with a value.
    fn leaf(&mut self, path: &str, value: &mut dyn Leaf);
}

/// A program's configuration; [`crate::config_sections`] makes the structs.
pub trait Schema: Clone + Default {
    /// The program.
    const PROGRAM: Program;

    /// Visits every section and key, in the order of the file.
    fn visit(&mut self, visitor: &mut dyn Visitor);

    /// The rules between keys. What depends on the host (ports taken, folders that cannot be made,
    /// more reserved than there is) is not judged here: a configuration is right or wrong by itself.
    fn check(&self, judge: &mut Judge<'_>);
}

/// Collects the broken rules.
#[derive(Debug)]
pub struct Judge<'a> {
    origins: &'a BTreeMap<String, Origin>,
    problems: &'a mut Vec<Problem>,
}

impl Judge<'_> {
    /// A rule is broken at `path`.
    pub fn problem(&mut self, path: &str, message: impl Into<String>, hint: impl Into<String>) {
        self.problems.push(Problem {
            origin: self.origins.get(path).cloned().unwrap_or(Origin::Default),
            path: path.into(),
            message: message.into(),
            hint: Some(hint.into()),
        });
    }

    /// A problem for each two listeners that want the same port of the same address.
    pub fn listeners(&mut self, listeners: &[(&str, Listen)]) {
        for (at, (path, listen)) in listeners.iter().enumerate() {
            for (other_path, other) in listeners.iter().take(at) {
                if listen.collides(*other) {
                    self.problem(
                        path,
                        format!("{other_path} listens on the same port"),
                        "choose another port for one of them",
                    );
                }
            }
        }
    }
}

/// Makes the struct of each section, with its defaults and its walk over the keys. The same lines
/// make the structs, the reader, the list of known keys and the names of the environment, so that a
/// key that is added is at once readable, settable and shown. The first struct is the whole: its
/// `walk("", visitor)` is [`Schema::visit`].
#[macro_export]
macro_rules! config_sections {
    ($($(#[$doc:meta])* $name:ident {
        $($(#[$field_doc:meta])* $field:ident: $kind:ident<$type:ty> = $default:expr,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $name {
            #[allow(unused_variables, reason = "a section may have no keys yet")]
            fn walk(&mut self, path: &str, visitor: &mut dyn $crate::config::Visitor) {
                $(
                    let below = if path.is_empty() {
                        stringify!($field).to_owned()
                    } else {
                        format!("{path}.{}", stringify!($field))
                    };
                    $crate::config_sections!(@visit $kind, self.$field, &below, visitor);
                )*
            }
        }
    )*};
    (@visit section, $field:expr, $path:expr, $visitor:expr) => {
        $visitor.section($path);
        $field.walk($path, $visitor);
    };
    (@visit key, $field:expr, $path:expr, $visitor:expr) => {
        $visitor.leaf($path, &mut $field);
    };
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The file, and where in it.
    File {
        /// The line, from 1.
        line: u64,
        /// The column, from 1.
        column: u64,
    },
    /// A variable of the environment.
    Environment(String),
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where it was written; `Default` where it is not written anywhere.
    pub origin: Origin,
    /// The path of the key, empty for the file as a whole.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

/// A configuration that cannot be used, and all reasons why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults {
    /// The file, where there is one.
    pub file: Option<PathBuf>,
    /// The reasons, in the order of the file.
    pub problems: Vec<Problem>,
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
pub struct Loaded<C> {
    /// The values.
    pub config: C,
    /// The file, where there was one.
    pub file: Option<PathBuf>,
    /// The origin of each key that is not at its default.
    pub origins: BTreeMap<String, Origin>,
}

/// Loads the configuration: from `file` where it is named (then it must be there), or else from
/// [`Program::default_file`] where that exists.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load<C: Schema>(file: Option<&Path>) -> Result<Loaded<C>, Faults> {
    let path = file.unwrap_or(Path::new(C::PROGRAM.default_file));
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
///
/// # Errors
/// As [`load`].
pub fn load_from<C: Schema>(
    file: Option<(&Path, &str)>,
    environment: BTreeMap<String, String>,
) -> Result<Loaded<C>, Faults> {
    let faults = |problems| Faults {
        file: file.map(|(path, _)| path.to_owned()),
        problems,
    };
    let mut reader = Reader {
        program: C::PROGRAM,
        known: Known::default(),
        environment: environment
            .into_iter()
            .filter(|(name, _)| C::PROGRAM.owns(name))
            .collect(),
        given: BTreeMap::new(),
        origins: BTreeMap::new(),
        problems: Vec::new(),
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
    let mut config = C::default();
    config.visit(&mut reader.known);
    reader.flatten(&root);
    config.visit(&mut reader);
    reader.unknown_variables();
    if reader.problems.is_empty() {
        config.check(&mut Judge {
            origins: &reader.origins,
            problems: &mut reader.problems,
        });
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
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Sections.
    pub sections: Vec<String>,
    /// Keys.
    pub keys: Vec<String>,
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
    /// Those of a configuration.
    pub fn of<C: Schema>() -> Self {
        let mut known = Self::default();
        C::default().visit(&mut known);
        known
    }

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
struct Reader {
    program: Program,
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
                hint: Some(format!(
                    "see {} for an example with every key",
                    self.program.example
                )),
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
            .map(|path| (self.program.variable(path), path.clone()))
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
                    || {
                        format!(
                            "list them with: {} config show --environment",
                            self.program.name
                        )
                    },
                    |near| format!("did you mean {near}?"),
                )),
            });
        }
    }
}

impl Visitor for Reader {
    fn section(&mut self, _: &str) {}

    fn leaf(&mut self, path: &str, value: &mut dyn Leaf) {
        let name = self.program.variable(path);
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
pub fn nearest<'a>(text: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
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
mod tests {
    use super::*;

    #[test]
    fn slips_are_found_and_strangers_are_not() {
        assert_eq!(nearest("listn", ["listen", "socket"]), Some("listen"));
        assert_eq!(nearest("data-dir", ["name", "data_dir"]), Some("data_dir"));
        assert_eq!(nearest("x", ["listen", "socket"]), None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("nmae", "name"), 1);
    }

    #[test]
    fn a_variable_is_one_programs() {
        let program = |prefix| Program {
            name: "x",
            default_file: "/x",
            example: "x",
            prefix,
        };
        let (agent, core) = (program("GHOST_"), program("GHOST_CORE_"));
        assert_eq!(core.variable("grpc.listen"), "GHOST_CORE_GRPC__LISTEN");
        for (variable, of_agent, of_core) in [
            ("GHOST_GRPC__LISTEN", true, false),
            ("GHOST_CORE_GRPC__LISTEN", false, true),
            ("GHOST_CORE_CORE__NAME", false, true),
            ("GHOST_CORE__PERMISSIONS", true, false),
            ("PATH", false, false),
        ] {
            assert_eq!(agent.owns(variable), of_agent, "{variable}");
            assert_eq!(core.owns(variable), of_core, "{variable}");
        }
    }
}
