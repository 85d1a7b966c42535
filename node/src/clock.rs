//! The time of day as the control server has it, and as peers have seen it.

use std::time::{Instant, SystemTime};

use chrono::{DateTime, TimeDelta, Utc};

/// A calendar that counts on from what the control server said last.
///
/// Keys expire by the server's calendar (ipnlocal/expiry.go), and the host's may be wrong or be
/// set at any time: so this one goes by the monotonic clock. It stands still while the host
/// sleeps, until the server speaks again. Before the server has spoken it is the host's.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    said: DateTime<Utc>,
    heard: Instant,
}

impl Clock {
    /// The host's.
    pub fn of_host() -> Self {
        Self {
            said: Utc::now(),
            heard: Instant::now(),
        }
    }

    /// The server says that it is so late now.
    pub fn set(&mut self, said: DateTime<Utc>) {
        *self = Self {
            said,
            heard: Instant::now(),
        };
    }

    /// How late it is.
    pub fn now(&self) -> DateTime<Utc> {
        let since = TimeDelta::from_std(self.heard.elapsed()).unwrap_or(TimeDelta::MAX);
        self.said.checked_add_signed(since).unwrap_or(self.said)
    }
}

/// The latest time of day that this host can have told anyone, though its clock was set back since.
///
/// WireGuard's handshakes carry a time, and a peer takes none that is older than one before
/// (section 5.1 of its paper).
#[derive(Clone, Copy, Debug)]
pub struct Latest {
    time: SystemTime,
    at: Instant,
}

impl Latest {
    /// Begins now.
    pub fn begin() -> Self {
        Self {
            time: SystemTime::now(),
            at: Instant::now(),
        }
    }

    /// The latest time until now. What is set between two looks, and set back, is missed.
    pub fn look(&mut self) -> SystemTime {
        let (now, counted) = (SystemTime::now(), self.time + self.at.elapsed());
        *self = Self {
            time: counted.max(now),
            at: Instant::now(),
        };
        self.time
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_latest_time_goes_on_from_where_it_was() {
        let ahead = SystemTime::now() + Duration::from_secs(3600);
        let mut latest = Latest {
            time: ahead,
            ..Latest::begin()
        };
        let late = latest.look().duration_since(ahead).unwrap();
        assert!(late < Duration::from_secs(60));
        assert!(latest.look() > ahead);
    }

    #[test]
    fn the_servers_word_counts() {
        let mut clock = Clock::of_host();
        assert!((clock.now() - Utc::now()).abs() < TimeDelta::minutes(1));
        for said in [DateTime::UNIX_EPOCH, DateTime::<Utc>::MAX_UTC] {
            clock.set(said);
            let late = clock.now() - said;
            assert!(late >= TimeDelta::zero() && late < TimeDelta::minutes(1));
        }
    }
}
