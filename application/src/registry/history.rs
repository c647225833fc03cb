//! What a VM did in the last 24 hours, in bounded memory: a point for each sample of the last hour
//! and one for each minute of the day. Full, it takes about 100 KiB.

use std::collections::VecDeque;
use std::time::Duration;

use ghost_domain::Timestamp;
use ghost_domain::guest::SampleSource;

/// Points of the last hour, at one each five seconds.
const FINE: usize = 720;
/// Samples that come closer than this make no point of their own, however often a guest reports.
const SPACING: i64 = 4_000;
/// Points of the last day, at one each minute.
const COARSE: usize = 24 * 60;
const MINUTE: i64 = 60_000;
/// For how far back fine points are there.
pub(crate) const FINE_SPAN: Duration = Duration::from_secs(3600);
/// For how far back there is anything.
pub(crate) const LONGEST_SPAN: Duration = Duration::from_secs(24 * 3600);

/// How a VM fared at one time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GuestSample {
    /// When.
    pub at: Timestamp,
    /// Whose word CPU and memory are. Disks and network are counted by the host in any case.
    pub source: SampleSource,
    /// 0 to 100 of all its CPUs together.
    pub cpu_percent: Option<f64>,
    /// Memory in use: what programs could not have, by the guest; what its QEMU process holds, by
    /// the host.
    pub memory_used_bytes: Option<u64>,
    /// Memory that it has.
    pub memory_total_bytes: Option<u64>,
    /// Read from its disks.
    pub disk_read_bytes_per_second: Option<f64>,
    /// Written to its disks.
    pub disk_write_bytes_per_second: Option<f64>,
    /// Received by its network cards.
    pub network_receive_bytes_per_second: Option<f64>,
    /// Sent by them.
    pub network_transmit_bytes_per_second: Option<f64>,
}

/// A sample as it is kept: 44 bytes. What is not known is NaN, or 0 for memory.
#[derive(Clone, Copy, Debug)]
struct Point {
    at: i64,
    cpu: f32,
    memory_used_kib: u32,
    memory_total_kib: u32,
    rates: [f32; 4],
    source: SampleSource,
}

impl Point {
    fn of(sample: &GuestSample) -> Self {
        let kib = |bytes: Option<u64>| {
            u32::try_from(bytes.unwrap_or(0).div_ceil(1024)).unwrap_or(u32::MAX)
        };
        #[expect(
            clippy::cast_possible_truncation,
            reason = "seven digits are plenty for a rate that is drawn"
        )]
        let float = |value: Option<f64>| value.map_or(f32::NAN, |value| value as f32);
        Self {
            at: sample.at.unix_millis(),
            cpu: float(sample.cpu_percent),
            memory_used_kib: kib(sample.memory_used_bytes),
            memory_total_kib: kib(sample.memory_total_bytes),
            rates: [
                float(sample.disk_read_bytes_per_second),
                float(sample.disk_write_bytes_per_second),
                float(sample.network_receive_bytes_per_second),
                float(sample.network_transmit_bytes_per_second),
            ],
            source: sample.source,
        }
    }

    fn sample(&self) -> GuestSample {
        let float = |value: f32| (!value.is_nan()).then_some(f64::from(value));
        let bytes = |kib: u32| (kib != 0).then_some(u64::from(kib) * 1024);
        let [read, write, receive, transmit] = self.rates;
        GuestSample {
            at: Timestamp::from_unix_millis(self.at),
            source: self.source,
            cpu_percent: float(self.cpu),
            memory_used_bytes: bytes(self.memory_used_kib),
            memory_total_bytes: bytes(self.memory_total_kib),
            disk_read_bytes_per_second: float(read),
            disk_write_bytes_per_second: float(write),
            network_receive_bytes_per_second: float(receive),
            network_transmit_bytes_per_second: float(transmit),
        }
    }
}

/// A mean of what was there.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f64,
    count: u32,
}

impl Mean {
    fn add(&mut self, value: Option<f64>) {
        if let Some(value) = value {
            self.sum += value;
            self.count += 1;
        }
    }

    fn get(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / f64::from(self.count))
    }
}

/// The minute that is not over yet.
#[derive(Clone, Copy, Debug)]
struct Minute {
    number: i64,
    source: SampleSource,
    cpu: Mean,
    memory_used: Mean,
    memory_total: Option<u64>,
    rates: [Mean; 4],
}

impl Minute {
    const fn new(number: i64, source: SampleSource) -> Self {
        const NONE: Mean = Mean { sum: 0.0, count: 0 };
        Self {
            number,
            source,
            cpu: NONE,
            memory_used: NONE,
            memory_total: None,
            rates: [NONE; 4],
        }
    }

    #[expect(
        clippy::cast_precision_loss,
        reason = "a mean of memory needs no last bytes"
    )]
    fn add(&mut self, sample: &GuestSample) {
        // A minute of which the guest told a part is the guest's: the host's figures mean other
        // things and are not mixed in.
        if sample.source == SampleSource::Guest && self.source == SampleSource::Host {
            self.source = SampleSource::Guest;
            self.cpu = Mean::default();
            self.memory_used = Mean::default();
        }
        if sample.source == self.source {
            self.cpu.add(sample.cpu_percent);
            self.memory_used
                .add(sample.memory_used_bytes.map(|bytes| bytes as f64));
            self.memory_total = sample.memory_total_bytes.or(self.memory_total);
        }
        for (mean, value) in self.rates.iter_mut().zip([
            sample.disk_read_bytes_per_second,
            sample.disk_write_bytes_per_second,
            sample.network_receive_bytes_per_second,
            sample.network_transmit_bytes_per_second,
        ]) {
            mean.add(value);
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a mean of byte counts is one"
    )]
    fn sample(&self) -> GuestSample {
        let [read, write, receive, transmit] = self.rates;
        GuestSample {
            at: Timestamp::from_unix_millis(self.number.saturating_mul(MINUTE)),
            source: self.source,
            cpu_percent: self.cpu.get(),
            memory_used_bytes: self.memory_used.get().map(|mean| mean as u64),
            memory_total_bytes: self.memory_total,
            disk_read_bytes_per_second: read.get(),
            disk_write_bytes_per_second: write.get(),
            network_receive_bytes_per_second: receive.get(),
            network_transmit_bytes_per_second: transmit.get(),
        }
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct History {
    fine: VecDeque<Point>,
    coarse: VecDeque<Point>,
    minute: Option<Minute>,
    newest: Option<GuestSample>,
}

impl History {
    pub(crate) fn push(&mut self, sample: &GuestSample) {
        let number = sample.at.unix_millis().div_euclid(MINUTE);
        // A wall clock that was set back must not bend the line: what it now says again goes.
        let at = sample.at.unix_millis();
        while self.fine.back().is_some_and(|last| last.at >= at) {
            self.fine.pop_back();
        }
        if self.minute.is_some_and(|minute| minute.number > number) {
            self.minute = None;
        }
        let start = number.saturating_mul(MINUTE);
        while self.coarse.back().is_some_and(|last| last.at >= start) {
            self.coarse.pop_back();
        }
        self.newest = Some(*sample);
        let near = |last: &Point| at - last.at < SPACING && last.source == sample.source;
        if !self.fine.back().is_some_and(near) {
            bounded(&mut self.fine, FINE, Point::of(sample));
        }
        if let Some(minute) = self.minute.take_if(|minute| minute.number != number) {
            bounded(&mut self.coarse, COARSE, Point::of(&minute.sample()));
        }
        self.minute
            .get_or_insert(Minute::new(number, sample.source))
            .add(sample);
    }

    /// Points of the last `span`, oldest first: fine ones where it lies within the hour.
    pub(crate) fn points(&self, now: Timestamp, span: Duration) -> Vec<GuestSample> {
        let span = span.min(LONGEST_SPAN);
        let within = |at: Timestamp| now.since(at) <= span && at <= now.after(FINE_SPAN);
        if span <= FINE_SPAN {
            return self
                .fine
                .iter()
                .map(Point::sample)
                .filter(|sample| within(sample.at))
                .collect();
        }
        self.coarse
            .iter()
            .map(Point::sample)
            .chain(self.minute.iter().map(Minute::sample))
            .filter(|sample| within(sample.at))
            .collect()
    }

    /// The newest sample.
    pub(crate) fn newest(&self) -> Option<GuestSample> {
        self.newest
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        (self.fine.capacity() + self.coarse.capacity()) * size_of::<Point>() + size_of::<Self>()
    }
}

fn bounded(points: &mut VecDeque<Point>, most: usize, point: Point) {
    if points.len() >= most {
        points.pop_front();
    }
    points.push_back(point);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seconds: i64, source: SampleSource, cpu: f64) -> GuestSample {
        GuestSample {
            at: Timestamp::from_unix_millis(seconds * 1000),
            source,
            cpu_percent: Some(cpu),
            memory_used_bytes: Some(1 << 20),
            memory_total_bytes: Some(4 << 20),
            disk_read_bytes_per_second: Some(1.0),
            disk_write_bytes_per_second: None,
            network_receive_bytes_per_second: Some(2.0),
            network_transmit_bytes_per_second: Some(0.0),
        }
    }

    #[test]
    fn three_days_of_samples_stay_within_their_bounds() {
        let mut history = History::default();
        let last = 3 * 24 * 3600;
        for second in (0..=last).step_by(5) {
            history.push(&sample(second, SampleSource::Guest, 50.0));
        }
        assert!(history.bytes() < 256 * 1024, "{}", history.bytes());
        let now = Timestamp::from_unix_millis(last * 1000);
        let hour = history.points(now, Duration::from_secs(3600));
        assert_eq!(hour.len(), FINE);
        let day = history.points(now, Duration::from_secs(48 * 3600));
        assert!((1439..=1441).contains(&day.len()), "{}", day.len());
        assert!(day.windows(2).all(|two| two[0].at < two[1].at));
        assert!(
            hour.iter()
                .chain(&day)
                .all(|one| one.cpu_percent == Some(50.0))
        );
        let minute = history.points(now, Duration::from_secs(60));
        assert_eq!(minute.len(), 13);
    }

    #[test]
    fn a_minute_that_the_guest_told_in_part_is_the_guests() {
        let mut history = History::default();
        history.push(&sample(0, SampleSource::Host, 100.0));
        history.push(&sample(5, SampleSource::Guest, 10.0));
        history.push(&sample(10, SampleSource::Guest, 20.0));
        history.push(&sample(15, SampleSource::Host, 100.0));
        history.push(&sample(60, SampleSource::Host, 70.0));
        let now = Timestamp::from_unix_millis(61_000);
        let day = history.points(now, Duration::from_secs(7200));
        assert_eq!(day.len(), 2);
        assert_eq!(day[0].source, SampleSource::Guest);
        assert_eq!(day[0].cpu_percent, Some(15.0));
        assert_eq!(day[1].source, SampleSource::Host);
        let fine = history.points(now, Duration::from_secs(3600));
        let sources: Vec<_> = fine.iter().map(|one| one.source.as_str()).collect();
        assert_eq!(sources, ["host", "guest", "guest", "host", "host"]);
        assert_eq!(fine[0].disk_write_bytes_per_second, None);
        assert_eq!(fine[0].memory_total_bytes, Some(4 << 20));
    }

    #[test]
    fn a_clock_that_is_set_back_bends_no_line() {
        let mut history = History::default();
        for second in [100, 105, 200, 300, 90, 95] {
            history.push(&sample(second, SampleSource::Host, 1.0));
        }
        let now = Timestamp::from_unix_millis(95_000);
        for span in [3600, 7200] {
            let points = history.points(now, Duration::from_secs(span));
            assert!(points.windows(2).all(|two| two[0].at < two[1].at));
            assert!(!points.is_empty());
        }
        assert_eq!(history.newest().unwrap().at.unix_millis(), 95_000);
    }
}
