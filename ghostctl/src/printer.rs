//! All output of ghostctl goes through here: data to stdout, everything else to stderr. The lints
//! forbid printing elsewhere.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::arguments::Format;
use crate::errors::Failure;
use crate::progress::Progress;
use crate::table::{Paint, Table};

/// Where output goes and how it looks.
pub(crate) struct Printer {
    format: Format,
    quiet: bool,
    stdout_terminal: bool,
    stderr_terminal: bool,
    /// Bars live here while something is waited for; notes are printed above them.
    progress: Progress,
}

impl Printer {
    pub(crate) fn new(format: Format, quiet: bool) -> Self {
        let stderr_terminal = io::stderr().is_terminal();
        Self {
            format,
            quiet,
            stdout_terminal: io::stdout().is_terminal(),
            stderr_terminal,
            progress: Progress::new(stderr_terminal, quiet),
        }
    }

    /// How data is written.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Whether a person looks at what is written beside the data.
    pub(crate) fn is_watched(&self) -> bool {
        self.stderr_terminal && !self.quiet
    }

    /// Whether stdout is a terminal.
    pub(crate) fn stdout_is_terminal(&self) -> bool {
        self.stdout_terminal
    }

    /// Where progress is shown.
    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    /// A list: a table, an array, or names.
    pub(crate) fn list<T: Serialize>(
        &self,
        items: &[T],
        name: impl Fn(&T) -> &str,
        table: impl FnOnce(&[T]) -> Table,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table if items.is_empty() => Ok(()),
            Format::Table => {
                let table = table(items).render(self.width(), self.paint());
                self.stdout(&table)
            }
            Format::Name => self.names(items.iter().map(name)),
            Format::Json | Format::Yaml => self.document(&items),
        }
    }

    /// A table as `list` writes it, for a picture that is drawn again and again.
    pub(crate) fn render(&self, table: &Table) -> String {
        table.render(self.width(), self.paint())
    }

    /// One thing or several: paragraphs, a document (an array for several), or names.
    pub(crate) fn several<T: Serialize>(
        &self,
        items: &[T],
        asked: usize,
        name: impl Fn(&T) -> &str,
        text: impl Fn(&T, Paint) -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => {
                let texts: Vec<String> =
                    items.iter().map(|item| text(item, self.paint())).collect();
                // Sheets of several lines are kept apart, single lines are not.
                let apart = texts.iter().any(|text| text.lines().count() > 1);
                self.stdout(&texts.join(if apart { "\n" } else { "" }))
            }
            Format::Name => self.names(items.iter().map(name)),
            Format::Json | Format::Yaml => match items {
                // Whoever names one thing gets that thing, whoever names several gets an array,
                // also where all but one of them failed.
                [item] if asked == 1 => self.document(item),
                [] if asked == 1 => Ok(()),
                items => self.document(&items),
            },
        }
    }

    /// One line of a stream: text, a document on one line, or a name.
    pub(crate) fn item<T: Serialize>(
        &self,
        item: &T,
        name: &str,
        text: impl FnOnce(Paint) -> String,
    ) -> Result<(), Failure> {
        let line = match self.format {
            Format::Table => text(self.paint()),
            Format::Name => format!("{name}\n"),
            Format::Json => serde_json::to_string(item).map_err(|error| unwritable(&error))? + "\n",
            Format::Yaml => {
                let text = serde_saphyr::to_string(item).map_err(|error| unwritable(&error))?;
                format!("---\n{text}")
            }
        };
        self.stdout(&line)
    }

    /// Bytes as they are.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        let mut stdout = io::stdout().lock();
        stdout
            .write_all(bytes)
            .and_then(|()| stdout.flush())
            .map_err(|error| stdout_failure(&error))
    }

    fn stdout(&self, text: &str) -> Result<(), Failure> {
        self.progress.suspend(|| self.bytes(text.as_bytes()))
    }

    fn names<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<(), Failure> {
        let mut text = String::new();
        for name in names {
            text.push_str(&crate::text::printable(name));
            text.push('\n');
        }
        self.stdout(&text)
    }

    fn document<T: Serialize>(&self, item: &T) -> Result<(), Failure> {
        let text = match self.format {
            Format::Yaml => serde_saphyr::to_string(item).map_err(|error| unwritable(&error))?,
            Format::Json | Format::Table | Format::Name => {
                serde_json::to_string_pretty(item).map_err(|error| unwritable(&error))? + "\n"
            }
        };
        self.stdout(&text)
    }

    /// A remark for people, on stderr; silent with `-q`.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            self.stderr(&format!("{text}\n"));
        }
    }

    /// Something that will become a problem.
    pub(crate) fn warning(&self, text: &str) {
        let label = self.stderr_paint().yellow("warning:");
        self.stderr(&format!("{label} {}\n", crate::text::printable(text)));
    }

    /// A line of `--debug`.
    pub(crate) fn debug(&self, text: &str) {
        self.stderr(&format!("debug: {text}\n"));
    }

    /// A failure: lines for people, one line of JSON for programs.
    pub(crate) fn failure(&self, failure: &Failure) {
        let text = match self.format {
            Format::Json => serde_json::to_string(&failure.body()).unwrap_or_default() + "\n",
            Format::Table | Format::Yaml | Format::Name => {
                let paint = self.stderr_paint();
                failure
                    .lines()
                    .into_iter()
                    .map(|(label, text)| {
                        let label = match label {
                            "error:" => paint.red(label),
                            "interrupted:" => paint.yellow(label),
                            label => paint.dim(label),
                        };
                        format!("{label} {text}\n")
                    })
                    .collect()
            }
        };
        self.stderr(&text);
    }

    fn stderr(&self, text: &str) {
        // Nobody is left to tell where stderr is closed.
        self.progress
            .suspend(|| drop(io::stderr().lock().write_all(text.as_bytes())));
    }

    fn paint(&self) -> Paint {
        Paint::new(self.stdout_terminal)
    }

    fn stderr_paint(&self) -> Paint {
        Paint::new(self.stderr_terminal)
    }

    fn width(&self) -> Option<usize> {
        if !self.stdout_terminal {
            return None;
        }
        rustix::termios::tcgetwinsize(io::stdout())
            .ok()
            .map(|size| usize::from(size.ws_col))
            .filter(|width| *width > 0)
    }
}

fn unwritable(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(
        crate::errors::ErrorCode::Internal,
        "the answer cannot be written in this format",
    )
    .because(error)
}

fn stdout_failure(error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        // The reader has seen enough, as in `ghostctl list | head -1`.
        std::process::exit(0);
    }
    Failure::io("stdout cannot be written", error)
}
