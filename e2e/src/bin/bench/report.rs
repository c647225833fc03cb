//! The table.

use std::io::Write as _;
use std::time::Duration;

/// One line of it.
pub(crate) struct Figure {
    name: String,
    value: f64,
    unit: &'static str,
    /// The floor or the peer: what it is, and its value.
    beside: Option<(&'static str, f64)>,
    budget: Option<Budget>,
}

/// What was promised.
pub(crate) enum Budget {
    /// The value is at most this.
    Most(f64),
    /// The value is at most so many times what stands beside it.
    Times(f64),
    /// The value is below what stands beside it.
    Faster,
    /// The value is at most so much more than what stands beside it.
    Beyond(f64),
}

impl Figure {
    pub(crate) fn new(name: &str, value: f64, unit: &'static str) -> Self {
        Self {
            name: name.to_owned(),
            value,
            unit,
            beside: None,
            budget: None,
        }
    }

    pub(crate) fn beside(mut self, what: &'static str, value: f64) -> Self {
        self.beside = Some((what, value));
        self
    }

    pub(crate) fn budget(mut self, budget: Budget) -> Self {
        self.budget = Some(budget);
        self
    }

    /// The budget in words, and whether it is kept; `None` without one.
    fn verdict(&self) -> Option<(String, bool)> {
        let other = self.beside.map(|(_, value)| value);
        let unit = self.unit;
        Some(match (self.budget.as_ref()?, other) {
            (Budget::Most(most), _) => (format!("<= {most} {unit}"), self.value <= *most),
            (Budget::Times(most), Some(other)) => {
                (format!("<= {most} x"), self.value <= most * other)
            }
            (Budget::Faster, Some(other)) => ("faster".to_owned(), self.value < other),
            (Budget::Beyond(most), Some(other)) => (
                format!("<= {most} {unit} beyond"),
                self.value - other <= *most,
            ),
            (Budget::Times(_) | Budget::Faster | Budget::Beyond(_), None) => {
                ("nothing to compare with".to_owned(), false)
            }
        })
    }
}

/// The figures so far.
#[derive(Default)]
pub(crate) struct Report(Vec<Figure>);

impl Report {
    pub(crate) fn add(&mut self, figure: Figure) {
        progress(&format!(
            "{}: {:.2} {}",
            figure.name, figure.value, figure.unit
        ));
        self.0.push(figure);
    }

    /// Prints the table, and in plain words what missed its budget.
    pub(crate) fn print(&self) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        writeln!(
            out,
            "| {:<58} | {:>12} | {:>32} | {:>7} | {:<18} |",
            "figure", "median", "floor or peer", "ratio", "budget"
        )?;
        writeln!(
            out,
            "|{:-<60}|{:->14}|{:->34}|{:->9}|{:-<20}|",
            "", ":", ":", ":", ""
        )?;
        let mut missed = Vec::new();
        for figure in &self.0 {
            let value = format!("{:.2} {}", figure.value, figure.unit);
            let (beside, ratio) = figure
                .beside
                .map_or_else(Default::default, |(what, other)| {
                    (
                        format!("{what} {other:.2} {}", figure.unit),
                        format!("{:.2}", figure.value / other),
                    )
                });
            let budget = match figure.verdict() {
                None => String::new(),
                Some((budget, true)) => budget,
                Some((budget, false)) => {
                    missed.push(format!("{} ({value}, budget {budget})", figure.name));
                    format!("{budget}: MISSED")
                }
            };
            writeln!(
                out,
                "| {:<58} | {value:>12} | {beside:>32} | {ratio:>7} | {budget:<18} |",
                figure.name
            )?;
        }
        writeln!(out)?;
        match missed.as_slice() {
            [] => writeln!(out, "All budgets are kept."),
            missed => writeln!(out, "MISSED: {}", missed.join("; ")),
        }
    }
}

/// Says on stderr what is going on.
pub(crate) fn progress(text: &str) {
    // Nobody may be there to read it.
    drop(writeln!(std::io::stderr(), "bench: {text}"));
}

/// The median.
pub(crate) fn median(values: &[Duration]) -> Duration {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// Milliseconds.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
