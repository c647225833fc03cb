//! What a copy has done so far, on the progress bar and for the end.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use ghost_proto::view::Progress as Bytes;

use super::Copied;
use crate::errors::Exit;
use crate::printer::Printer;
use crate::progress::Tracker;

pub(super) struct Tally {
    /// Gone at the end, so that its bar is out of the way of the last words.
    tracker: RefCell<Option<Tracker>>,
    begun: Instant,
    done: Cell<u64>,
    total: Cell<u64>,
    expected: Cell<u64>,
    breaks: Cell<u64>,
    copied: RefCell<Copied>,
    exits: RefCell<Vec<Exit>>,
}

impl Tally {
    pub(super) fn new(printer: &Printer, destination: &str) -> Self {
        Self {
            tracker: RefCell::new(Some(printer.progress().track(destination))),
            begun: Instant::now(),
            done: Cell::new(0),
            total: Cell::new(0),
            expected: Cell::new(0),
            breaks: Cell::new(0),
            copied: RefCell::default(),
            exits: RefCell::default(),
        }
    }

    /// So much there is to do.
    pub(super) fn expect(&self, files: u64, bytes: u64) {
        self.expected.set(self.expected.get() + files);
        self.total.set(self.total.get() + bytes);
    }

    /// Something is looked at before anything is copied.
    pub(super) fn looks(&self, entries: usize) {
        if let Some(tracker) = self.tracker.borrow_mut().as_mut() {
            tracker.update(&format!("looking, {entries} found"), None);
        }
    }

    /// The bytes of one file went from `before` to `now`.
    pub(super) fn moved(&self, before: u64, now: u64) {
        self.done
            .set((self.done.get() + now).saturating_sub(before));
        self.show();
    }

    pub(super) fn file(&self, bytes: u64) {
        let mut copied = self.copied.borrow_mut();
        copied.files += 1;
        copied.size_bytes += bytes;
    }

    pub(super) fn directory(&self) {
        self.copied.borrow_mut().directories += 1;
    }

    pub(super) fn link(&self) {
        self.copied.borrow_mut().links += 1;
    }

    pub(super) fn broke(&self) {
        self.breaks.set(self.breaks.get() + 1);
        self.show();
    }

    pub(super) fn skip(&self, what: String) {
        self.copied.borrow_mut().skipped.push(what);
        self.failed(Exit::Failed);
    }

    pub(super) fn failed(&self, exit: Exit) {
        self.exits.borrow_mut().push(exit);
    }

    /// What there is to say at the end.
    pub(super) fn end(self) -> (Copied, Vec<Exit>) {
        drop(self.tracker.into_inner());
        (self.copied.into_inner(), self.exits.into_inner())
    }

    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate for people"
    )]
    fn show(&self) {
        let mut tracker = self.tracker.borrow_mut();
        let Some(tracker) = tracker.as_mut() else {
            return;
        };
        let (done, total) = (self.done.get(), self.total.get().max(self.done.get()));
        let rate = done as f64 / self.begun.elapsed().as_secs_f64().max(0.001);
        let bytes = Bytes {
            bytes_done: done,
            bytes_total: Some(total),
            bytes_per_second: Some(rate as u64),
            remaining_seconds: Some((total - done) as f64 / rate.max(1.0)),
            fraction: Some(done as f64 / total.max(1) as f64),
        };
        let breaks = match self.breaks.get() {
            0 => String::new(),
            some => format!(", gone on after {some} breaks"),
        };
        let phase = match self.expected.get() {
            0 | 1 => format!("copying{breaks}"),
            files => format!(
                "copying, {} of {files} files{breaks}",
                self.copied.borrow().files
            ),
        };
        tracker.update(&phase, Some(&bytes));
    }
}
