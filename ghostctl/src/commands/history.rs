//! `vm show --history`: what a VM used, as spark lines.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ghost_proto::agent::v1 as message;
use ghost_proto::agent::v1::GetGuestHistoryRequest;
use ghost_proto::view::GuestHistory;

use super::{each, wire};
use crate::connect::{Session, ask};
use crate::errors::{Exit, Failure};
use crate::table::Paint;
use crate::text::{exact_duration, human_size, printable};

const SPARKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// As many as fit beside the figures in 80 columns.
const WIDTH: usize = 32;

pub(super) async fn show(
    names: Vec<String>,
    span: Duration,
    session: &Session,
) -> Result<Exit, Failure> {
    let agent = session.agent().await?;
    let (found, exit) = each(&names, session, |vm| async {
        let span = Some(wire(span));
        agent
            .guest()
            .get_history(ask(GetGuestHistoryRequest { vm, span }))
            .await
            .map(tonic::Response::into_inner)
            .map_err(|status| agent.failure(&status))
    })
    .await;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let texts: Vec<(String, String)> = found
        .iter()
        .map(|history| (history.vm_name.clone(), text(history, now, span)))
        .collect();
    let views: Vec<GuestHistory> = found.into_iter().map(Into::into).collect();
    session.printer.several(
        &views,
        names.len(),
        |history| &history.vm_name,
        |history, _: Paint| {
            texts
                .iter()
                .find(|(name, _)| *name == history.vm_name)
                .map(|(_, text)| text.clone())
                .unwrap_or_default()
        },
    )?;
    Ok(exit)
}

/// A figure over time; `None` where nothing is known.
struct Line<'a> {
    name: &'a str,
    /// The top of the scale, where the figure has one of its own.
    full: Option<f64>,
    value: fn(&message::GuestSample) -> Option<f64>,
    show: fn(f64) -> String,
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn memory(sample: &message::GuestSample) -> Option<f64> {
    sample.memory_used_bytes.map(|bytes| bytes as f64)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "`as` saturates, and a rate is not negative"
)]
fn size(bytes: f64) -> String {
    human_size(bytes as u64)
}

fn rate(bytes: f64) -> String {
    format!("{}/s", size(bytes))
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn text(history: &message::GuestHistory, now: Duration, span: Duration) -> String {
    let samples = &history.samples;
    let name = printable(&history.vm_name);
    let last = exact_duration(span);
    if samples.is_empty() {
        return format!("{name}: nothing is known of the last {last}\n");
    }
    let by_guest = samples
        .iter()
        .filter(|sample| sample.source == "guest")
        .count();
    let source = match by_guest {
        0 => "the host's figures: the guest was silent".to_owned(),
        all if all == samples.len() => "the guest's figures".to_owned(),
        some => format!(
            "the guest's figures, and the host's for {} of {} points while the guest was silent",
            samples.len() - some,
            samples.len()
        ),
    };
    let total = samples
        .iter()
        .filter_map(|sample| sample.memory_total_bytes)
        .max()
        .map(|bytes| bytes as f64);
    let mut text = format!("{name}, the last {last}: {source}\n");
    for line in [
        Line {
            name: "cpu",
            full: Some(100.0),
            value: |sample| sample.cpu_percent,
            show: |percent| format!("{percent:.1}%"),
        },
        Line {
            name: "memory",
            full: total,
            value: memory,
            show: size,
        },
        Line {
            name: "disk read",
            full: None,
            value: |sample| Some(sample.disk_read_bytes_per_second),
            show: rate,
        },
        Line {
            name: "disk write",
            full: None,
            value: |sample| Some(sample.disk_write_bytes_per_second),
            show: rate,
        },
        Line {
            name: "net in",
            full: None,
            value: |sample| Some(sample.network_receive_bytes_per_second),
            show: rate,
        },
        Line {
            name: "net out",
            full: None,
            value: |sample| Some(sample.network_transmit_bytes_per_second),
            show: rate,
        },
    ] {
        text.push_str(&row(&line, samples, now, span));
    }
    text
}

fn row(line: &Line<'_>, samples: &[message::GuestSample], now: Duration, span: Duration) -> String {
    let known = |sample: &message::GuestSample| {
        (line.value)(sample).filter(|value| value.is_finite() && *value >= 0.0)
    };
    let values: Vec<f64> = samples.iter().filter_map(known).collect();
    let Some(last) = values.last() else {
        return format!("  {:10}  {:WIDTH$}  not known\n", line.name, "");
    };
    let most = values.iter().copied().fold(0.0, f64::max);
    let buckets = buckets(samples, known, now, span);
    let sparks = sparks(&buckets, line.full.unwrap_or(most));
    format!(
        "  {:10}  {sparks}  now {}, most {}\n",
        line.name,
        (line.show)(*last),
        (line.show)(most)
    )
}

/// The largest value of each part of the span: a peak must not vanish between two columns.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a column of a picture; `as` saturates"
)]
fn buckets(
    samples: &[message::GuestSample],
    known: impl Fn(&message::GuestSample) -> Option<f64>,
    now: Duration,
    span: Duration,
) -> [Option<f64>; WIDTH] {
    let mut buckets: [Option<f64>; WIDTH] = [None; WIDTH];
    let begin = now.as_secs_f64() - span.as_secs_f64();
    for sample in samples {
        let (Some(value), Some(at)) = (known(sample), &sample.at) else {
            continue;
        };
        let at = at.seconds as f64 + f64::from(at.nanos) / 1e9;
        let part = ((at - begin) / span.as_secs_f64()).clamp(0.0, 1.0);
        let column = ((part * WIDTH as f64) as usize).min(WIDTH - 1);
        let bucket = &mut buckets[column];
        *bucket = Some(bucket.unwrap_or(0.0).max(value));
    }
    buckets
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a height of a picture; `as` saturates"
)]
fn sparks(buckets: &[Option<f64>], full: f64) -> String {
    buckets
        .iter()
        .map(|bucket| match bucket {
            None => ' ',
            Some(_) if full <= 0.0 => SPARKS[0],
            Some(value) => {
                let height = (value / full * SPARKS.len() as f64) as usize;
                SPARKS[height.min(SPARKS.len() - 1)]
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: i64, cpu: Option<f64>, source: &str) -> message::GuestSample {
        message::GuestSample {
            at: Some(prost_types::Timestamp {
                seconds: at,
                nanos: 0,
            }),
            source: source.to_owned(),
            cpu_percent: cpu,
            memory_used_bytes: Some(1 << 30),
            memory_total_bytes: Some(2 << 30),
            ..message::GuestSample::default()
        }
    }

    #[test]
    fn gaps_stay_gaps_and_peaks_stay_peaks() {
        assert_eq!(
            sparks(
                &[Some(0.0), None, Some(50.0), Some(100.0), Some(1e300)],
                100.0
            ),
            "▁ ▅██"
        );
        assert_eq!(sparks(&[Some(0.0)], 0.0), "▁");
        let now = Duration::from_secs(10_000);
        let span = Duration::from_secs(3200);
        let samples = [
            sample(6_850, Some(1.0), "guest"),
            sample(6_860, Some(90.0), "guest"),
            sample(9_990, Some(5.0), "host"),
        ];
        let buckets = buckets(&samples, |sample| sample.cpu_percent, now, span);
        assert_eq!(buckets[0], Some(90.0));
        assert_eq!(buckets[WIDTH - 1], Some(5.0));
        assert_eq!(buckets.iter().flatten().count(), 2);
    }

    /// A hostile guest's figures are a line like any other.
    #[test]
    fn nonsense_is_not_shown() {
        let history = message::GuestHistory {
            vm_id: String::new(),
            vm_name: "\x1b[2Jweb".to_owned(),
            samples: vec![
                sample(9_000, Some(f64::NAN), "guest"),
                sample(i64::MAX, Some(f64::INFINITY), "guest"),
                sample(i64::MIN, Some(-1.0), "host"),
            ],
        };
        let text = text(
            &history,
            Duration::from_secs(10_000),
            Duration::from_secs(3600),
        );
        assert!(
            text.starts_with(
                "\\x1b[2Jweb, the last 1h: the guest's figures, and the host's for 1 of 3 points"
            ),
            "{text}"
        );
        assert!(text.contains("not known"), "{text}");
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }
}
