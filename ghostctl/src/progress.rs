//! What a person sees while an operation runs: a bar on a terminal, plain lines elsewhere. Both
//! say how long it has taken, what is being done, and what is waited for.

use std::cell::RefCell;
use std::fmt;
use std::io::Write as _;
use std::time::{Duration, Instant};

use ghost_proto::view::{Operation, Progress as Bytes};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::text::{human_duration, human_size, printable};

/// Plain lines about bytes come at each of these parts of the whole, not at each message.
const PLAIN_STEPS: f64 = 10.0;
/// What would take longer at the rate of now is not guessed: something stands still for a moment.
const LONGEST_GUESS: Duration = Duration::from_secs(100 * 3600);

/// Where progress is shown.
pub(crate) struct Progress {
    kind: Kind,
}

enum Kind {
    Silent,
    Plain,
    /// Made when the first bar is: most commands wait for nothing.
    Bars(RefCell<Option<MultiProgress>>),
}

impl Progress {
    pub(crate) fn new(terminal: bool, quiet: bool) -> Self {
        let kind = match (quiet, terminal) {
            (true, _) => Kind::Silent,
            (false, true) => Kind::Bars(RefCell::new(None)),
            (false, false) => Kind::Plain,
        };
        Self { kind }
    }

    /// Begins to show one operation, or one upload.
    pub(crate) fn track(&self, subject: &str) -> Tracker {
        let shown = match &self.kind {
            Kind::Silent => Shown::Nothing,
            Kind::Plain => Shown::Lines {
                phase: String::new(),
                step: -1.0,
            },
            Kind::Bars(bars) => {
                let mut bars = bars.borrow_mut();
                let bars = bars.get_or_insert_with(|| {
                    MultiProgress::with_draw_target(ProgressDrawTarget::stderr())
                });
                let bar = bars.add(ProgressBar::new_spinner());
                bar.set_style(style(SPINNER));
                bar.set_prefix(printable(subject));
                bar.enable_steady_tick(Duration::from_millis(120));
                Shown::Bar(bar)
            }
        };
        Tracker {
            shown,
            subject: printable(subject),
            begun: Instant::now(),
        }
    }

    /// Runs something that writes to the terminal, with the bars out of its way.
    pub(crate) fn suspend<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.kind {
            Kind::Bars(bars) => match bars.borrow().as_ref() {
                Some(bars) => bars.suspend(write),
                None => write(),
            },
            Kind::Silent | Kind::Plain => write(),
        }
    }
}

const SPINNER: &str = "{spinner} {prefix}: {wide_msg} {elapsed}";
const BAR: &str = "{spinner} {prefix}: {msg} {bar:24} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}{left}";

fn style(template: &str) -> ProgressStyle {
    // The templates are constants; where one were wrong the default is shown.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .with_key(
            "left",
            |state: &ProgressState, text: &mut dyn fmt::Write| {
                // A line of a bar that cannot be formatted is a line shorter.
                let _ = text.write_str(&left(state.eta()));
            },
        )
}

/// ` 3s left`, or nothing.
fn left(guess: Duration) -> String {
    if guess > LONGEST_GUESS {
        return String::new();
    }
    format!(" {} left", human_duration(guess))
}

enum Shown {
    Nothing,
    Lines { phase: String, step: f64 },
    Bar(ProgressBar),
}

/// One operation or upload while it runs. Its bar goes when it does.
pub(crate) struct Tracker {
    shown: Shown,
    subject: String,
    begun: Instant,
}

impl Tracker {
    /// Shows where an operation stands.
    pub(crate) fn show(&mut self, operation: &Operation) {
        if operation.status.is_finished() {
            // The outcome is told by whoever waited for it.
            return;
        }
        let mut phase = printable(operation.phase.as_deref().unwrap_or("accepted"));
        if let Some(waiting_for) = &operation.waiting_for {
            phase = format!("{phase}, waiting for {}", printable(waiting_for));
        }
        self.update(&phase, operation.progress.as_ref());
    }

    /// Shows a phase, and how far it is where bytes are counted.
    #[expect(
        clippy::cast_precision_loss,
        reason = "a part of a whole, shown in tenths"
    )]
    pub(crate) fn update(&mut self, phase: &str, bytes: Option<&Bytes>) {
        let elapsed = self.begun.elapsed();
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                match bytes.and_then(|bytes| Some((bytes.bytes_done, bytes.bytes_total?))) {
                    Some((done, total)) => {
                        bar.set_style(style(BAR));
                        bar.set_length(total);
                        bar.set_position(done);
                    }
                    None => bar.set_style(style(SPINNER)),
                }
                bar.set_message(phase.to_owned());
            }
            Shown::Lines { phase: last, step } => {
                let now = bytes.map_or(-1.0, |bytes| match bytes.bytes_total {
                    Some(total) if total > 0 => {
                        (bytes.bytes_done as f64 / total as f64 * PLAIN_STEPS).floor()
                    }
                    _ => 0.0,
                });
                if last == phase && now <= *step {
                    return;
                }
                phase.clone_into(last);
                *step = now;
                let detail = bytes.map(amounts).unwrap_or_default();
                let line = format!(
                    "{}: {phase}{detail} ({:.1}s)\n",
                    self.subject,
                    elapsed.as_secs_f64()
                );
                // Nobody is left to tell where stderr is closed.
                drop(std::io::stderr().lock().write_all(line.as_bytes()));
            }
        }
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

fn amounts(bytes: &Bytes) -> String {
    let mut text = format!(" {}", human_size(bytes.bytes_done));
    if let Some(total) = bytes.bytes_total {
        text = format!("{text} of {}", human_size(total));
    }
    if let Some(rate) = bytes.bytes_per_second {
        text = format!("{text}, {}/s", human_size(rate));
    }
    if let Some(guess) = bytes
        .remaining_seconds
        .and_then(|guess| Duration::try_from_secs_f64(guess).ok())
        .filter(|guess| *guess <= LONGEST_GUESS)
    {
        text = format!("{text},{}", left(guess));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_say_what_is_known() {
        let mut bytes = Bytes {
            bytes_done: 1 << 20,
            bytes_total: None,
            bytes_per_second: None,
            remaining_seconds: None,
            fraction: None,
        };
        assert_eq!(amounts(&bytes), " 1 MiB");
        bytes.bytes_total = Some(4 << 20);
        bytes.bytes_per_second = Some(1 << 20);
        bytes.remaining_seconds = Some(3.0);
        assert_eq!(amounts(&bytes), " 1 MiB of 4 MiB, 1 MiB/s, 3s left");
        for nonsense in [f64::NAN, 3106.0 * 86_400.0] {
            bytes.remaining_seconds = Some(nonsense);
            assert_eq!(amounts(&bytes), " 1 MiB of 4 MiB, 1 MiB/s");
        }
    }
}
