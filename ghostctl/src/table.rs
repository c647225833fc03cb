//! Columns for people: aligned, no wider than the terminal, safe to show.

use unicode_width::UnicodeWidthStr;

use crate::text::printable;

const GAP: usize = 2;
/// No column is shrunk below this.
const NARROWEST: usize = 8;

/// Colours, where the terminal shows them and nobody asked otherwise (<https://no-color.org>).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paint(bool);

impl Paint {
    pub(crate) fn new(terminal: bool) -> Self {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        Self(terminal && set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb"))
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    pub(crate) fn red(self, text: &str) -> String {
        self.with("31", text)
    }

    pub(crate) fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    pub(crate) fn yellow(self, text: &str) -> String {
        self.with("33", text)
    }

    pub(crate) fn dim(self, text: &str) -> String {
        self.with("2", text)
    }

    /// A state or status by how good it is. The word says it all; the colour only helps the eye.
    pub(crate) fn state(self, state: &str, shown: &str) -> String {
        match state {
            "running" | "succeeded" | "connected" | "active" => self.green(shown),
            "failed" | "needs_attention" | "unreachable" | "error" | "revoked" | "expired" => {
                self.red(shown)
            }
            "stopped" | "cancelled" | "inactive" => self.dim(shown),
            "info" => shown.to_owned(),
            _ => self.yellow(shown),
        }
    }
}

/// Rows under headings.
pub(crate) struct Table {
    headings: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    /// The column whose words are states.
    state: Option<usize>,
}

impl Table {
    pub(crate) fn new(headings: &[&'static str]) -> Self {
        Self {
            state: headings
                .iter()
                .position(|heading| matches!(*heading, "STATE" | "STATUS")),
            headings: headings.to_vec(),
            rows: Vec::new(),
        }
    }

    /// Adds a row; its cells may be foreign text.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        let mut cells: Vec<String> = cells.iter().map(|cell| printable(cell)).collect();
        cells.resize(self.headings.len(), String::new());
        self.rows.push(cells);
    }

    /// The text, at most `width` columns wide where that is possible.
    pub(crate) fn render(&self, width: Option<usize>, paint: Paint) -> String {
        let widths = self.widths(width);
        let mut out = String::new();
        let headings: Vec<String> = self.headings.iter().map(|&text| text.to_owned()).collect();
        for (number, row) in std::iter::once(&headings).chain(&self.rows).enumerate() {
            let mut line = String::new();
            let mut padding = 0;
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                let shown = fit(cell, width);
                // Padding is written before the next cell only: no blanks at a line's end.
                if !shown.is_empty() {
                    line.extend(std::iter::repeat_n(' ', padding));
                    padding = 0;
                }
                padding += width.saturating_sub(shown.width()) + GAP;
                if shown.is_empty() {
                    continue;
                }
                if number == 0 {
                    line.push_str(&paint.dim(&shown));
                } else if self.state == Some(column) {
                    let word = cell.split(' ').next().unwrap_or_default();
                    line.push_str(&paint.state(word, &shown));
                } else {
                    line.push_str(&shown);
                }
            }
            line.push('\n');
            out.push_str(&line);
        }
        out
    }

    fn widths(&self, limit: Option<usize>) -> Vec<usize> {
        let mut widths: Vec<usize> = self
            .headings
            .iter()
            .enumerate()
            .map(|(column, heading)| {
                self.rows
                    .iter()
                    .map(|row| row[column].width())
                    .chain([heading.width()])
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let Some(limit) = limit else { return widths };
        let gaps = GAP * widths.len().saturating_sub(1);
        // The widest column gives way, one step at a time, so that short ones stay whole.
        while widths.iter().sum::<usize>() + gaps > limit {
            match widths.iter_mut().max() {
                Some(widest) if *widest > NARROWEST => *widest -= 1,
                _ => break,
            }
        }
        widths
    }
}

/// Cuts a text to a width, with an ellipsis where something is missing.
fn fit(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let mut out = String::new();
    let mut buffer = [0; 4];
    for c in text.chars() {
        let c: &str = c.encode_utf8(&mut buffer);
        if out.width() + c.width() + 1 > width {
            break;
        }
        out.push_str(c);
    }
    out.push('…');
    out
}

/// `key: value` lines with aligned values, for one thing.
pub(crate) struct Sheet {
    lines: Vec<(String, String)>,
}

impl Sheet {
    pub(crate) fn new() -> Self {
        Self { lines: Vec::new() }
    }

    /// Adds a line; the value may be foreign text.
    pub(crate) fn line(&mut self, key: &str, value: impl AsRef<str>) -> &mut Self {
        self.lines.push((key.to_owned(), printable(value.as_ref())));
        self
    }

    /// Adds a line where there is something to say.
    pub(crate) fn some(&mut self, key: &str, value: Option<impl AsRef<str>>) -> &mut Self {
        if let Some(value) = value {
            self.line(key, value);
        }
        self
    }

    /// The text.
    pub(crate) fn render(&self, paint: Paint) -> String {
        let width = self
            .lines
            .iter()
            .map(|(key, _)| key.width())
            .max()
            .unwrap_or(0);
        self.lines
            .iter()
            .map(|(key, value)| {
                let gap = " ".repeat(width.saturating_sub(key.width()) + GAP);
                if value.is_empty() {
                    format!("{}\n", paint.dim(key))
                } else if key == "state" || key == "status" {
                    let word = value.split(' ').next().unwrap_or_default();
                    format!("{}{gap}{}\n", paint.dim(key), paint.state(word, value))
                } else {
                    format!("{}{gap}{value}\n", paint.dim(key))
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&["NAME", "STATE", "ADDRESS"]);
        table.row(["web-1".into(), "running".into(), "10.0.0.2".into()]);
        table.row([
            "a-much-longer-name-than-fits".into(),
            "stopped".into(),
            String::new(),
        ]);
        table
    }

    #[test]
    fn columns_are_aligned_and_lines_end_clean() {
        assert_eq!(
            table().render(None, Paint(false)),
            "NAME                          STATE    ADDRESS\n\
             web-1                         running  10.0.0.2\n\
             a-much-longer-name-than-fits  stopped\n"
        );
    }

    #[test]
    fn a_narrow_terminal_cuts_the_widest_column() {
        let text = table().render(Some(40), Paint(false));
        assert!(text.lines().all(|line| line.width() <= 40), "{text}");
        assert!(text.contains("a-much-longer-name-t…"), "{text}");
        assert!(text.contains("10.0.0.2"), "{text}");
        // Too narrow for anything: it is wider than the terminal, but it does not loop or panic.
        assert!(!table().render(Some(1), Paint(false)).is_empty());
    }

    #[test]
    fn wide_characters_and_escapes_keep_the_columns() {
        let mut table = Table::new(&["NAME", "X"]);
        table.row(["東京".into(), "1".into()]);
        table.row(["\x1b[2J".into(), "2".into()]);
        assert_eq!(
            table.render(None, Paint(false)),
            "NAME     X\n東京     1\n\\x1b[2J  2\n"
        );
    }

    #[test]
    fn colours_do_not_count_as_width() {
        let plain = table().render(None, Paint(false));
        let coloured = table().render(None, Paint(true));
        let stripped: String = coloured
            .split('\x1b')
            .enumerate()
            .map(|(number, part)| {
                if number == 0 {
                    part
                } else {
                    part.split_once('m').unwrap().1
                }
            })
            .collect();
        assert_eq!(stripped, plain);
        assert_ne!(coloured, plain);
    }
}
