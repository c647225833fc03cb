//! The clock: a VM that was paused or restored wakes up in the past.

use std::io;
use std::time::Duration;

use ghost_proto::guest::v1::SetClockRequest;

use crate::Failure;
use crate::power::System;

/// 2000-01-01 and 2100-01-01: what is outside them is a mistake, and would expire every certificate.
const PLAUSIBLE: std::ops::Range<u64> = 946_684_800..4_102_444_800;

/// Sets the clock to what the host says.
///
/// # Errors
/// `invalid_argument` for times that nobody lives in; what the kernel answers.
pub(crate) fn set(system: &dyn System, request: &SetClockRequest) -> Result<(), Failure> {
    let now = request
        .now
        .as_ref()
        .ok_or_else(|| Failure::invalid("what time is it?"))?;
    let seconds = u64::try_from(now.seconds)
        .ok()
        .filter(|seconds| PLAUSIBLE.contains(seconds));
    let nanos = u32::try_from(now.nanos).ok().filter(|n| *n < 1_000_000_000);
    let (Some(seconds), Some(nanos)) = (seconds, nanos) else {
        return Err(Failure::invalid("not a time between 2000 and 2100"));
    };
    system
        .set_clock(Duration::new(seconds, nanos))
        .map_err(|error| Failure::io("set the clock", &error))
}

/// Sets the kernel's clock, and the hardware's where there is one.
pub(crate) fn set_system(since_epoch: Duration) -> io::Result<()> {
    let seconds = i64::try_from(since_epoch.as_secs()).map_err(io::Error::other)?;
    rustix::time::clock_settime(
        rustix::time::ClockId::Realtime,
        rustix::time::Timespec {
            tv_sec: seconds,
            tv_nsec: since_epoch.subsec_nanos().into(),
        },
    )?;
    // A guest without one keeps its time in the kernel only.
    if let Ok(rtc) = rustix::fs::open(
        c"/dev/rtc0",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    ) {
        set_hardware(&rtc, seconds);
    }
    Ok(())
}

/// `struct rtc_time` of rtc(4).
#[repr(C)]
#[derive(Debug, PartialEq, Eq)]
struct RtcTime {
    sec: i32,
    min: i32,
    hour: i32,
    mday: i32,
    mon: i32,
    year: i32,
    wday: i32,
    yday: i32,
    isdst: i32,
}

fn set_hardware(rtc: &impl std::os::fd::AsFd, seconds: i64) {
    use std::os::fd::AsRawFd;
    /// `_IOW('p', 0x0a, struct rtc_time)`
    const RTC_SET_TIME: libc::c_ulong = 0x4024_700a;
    let time = civil(seconds);
    // SAFETY: an open descriptor and a record of the size that the number of the call names.
    let answer = unsafe {
        libc::ioctl(
            rtc.as_fd().as_raw_fd(),
            RTC_SET_TIME,
            std::ptr::from_ref(&time),
        )
    };
    if answer != 0 {
        crate::log::line(&format!(
            "hardware clock not set: {}",
            io::Error::last_os_error()
        ));
    }
}

/// UTC of a time since 1970, after Howard Hinnant's `civil_from_days`.
fn civil(seconds: i64) -> RtcTime {
    let days = seconds.div_euclid(86_400);
    let within = seconds.rem_euclid(86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let of_era = shifted.rem_euclid(146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let small = |value: i64| i32::try_from(value).unwrap_or(0);
    RtcTime {
        sec: small(within % 60),
        min: small(within / 60 % 60),
        hour: small(within / 3600),
        mday: small(day),
        mon: small(month - 1),
        year: small(year - 1900),
        wday: small((days + 4).rem_euclid(7)),
        // The drivers work these two out for themselves.
        yday: 0,
        isdst: 0,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use prost_types::Timestamp;

    use super::*;
    use crate::power::PowerMode;

    struct Clock(Mutex<Option<Duration>>);

    impl System for Clock {
        fn power(&self, _: PowerMode) -> io::Result<()> {
            Err(io::Error::other("not here"))
        }

        fn set_clock(&self, now: Duration) -> io::Result<()> {
            *self.0.lock().unwrap() = Some(now);
            Ok(())
        }
    }

    #[test]
    fn only_plausible_times_are_set() {
        let clock = Clock(Mutex::new(None));
        for (seconds, nanos) in [
            (0, 0),
            (-1, 0),
            (i64::MAX, 0),
            (1_800_000_000, -1),
            (1_800_000_000, i32::MAX),
        ] {
            let request = SetClockRequest {
                now: Some(Timestamp { seconds, nanos }),
            };
            assert_eq!(set(&clock, &request).unwrap_err().code, "invalid_argument");
        }
        assert!(set(&clock, &SetClockRequest { now: None }).is_err());
        assert_eq!(*clock.0.lock().unwrap(), None);
        let request = SetClockRequest {
            now: Some(Timestamp {
                seconds: 1_800_000_000,
                nanos: 5,
            }),
        };
        set(&clock, &request).unwrap();
        assert_eq!(
            *clock.0.lock().unwrap(),
            Some(Duration::new(1_800_000_000, 5))
        );
    }

    #[test]
    fn days_have_their_dates() {
        let leap = civil(951_827_696);
        // 2000-02-29 12:34:56, a Tuesday
        assert_eq!((leap.year, leap.mon, leap.mday), (100, 1, 29));
        assert_eq!((leap.hour, leap.min, leap.sec, leap.wday), (12, 34, 56, 2));
        let last = civil(4_102_444_799);
        assert_eq!(
            (last.year, last.mon, last.mday, last.wday),
            (199, 11, 31, 4)
        );
    }
}
