//! Points in time. The clock itself belongs to the callers: this crate and the scheduler only compare.

use std::ops::{Add, Sub};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Microseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Timestamp(pub i64);

impl Timestamp {
    pub fn from_system(time: SystemTime) -> Self {
        match time.duration_since(UNIX_EPOCH) {
            Ok(since) => Self(i64::try_from(since.as_micros()).unwrap_or(i64::MAX)),
            Err(_) => Self(0),
        }
    }

    /// Reads the wall clock. Never called by `scheduler`, whose time comes with its events.
    pub fn now() -> Self {
        Self::from_system(SystemTime::now())
    }

    pub fn from_unix_seconds(seconds: f64) -> Self {
        Self((seconds * 1e6) as i64)
    }

    pub fn as_unix_seconds(self) -> f64 {
        self.0 as f64 / 1e6
    }

    pub fn micros(self) -> i64 {
        self.0
    }

    /// Time since `earlier`, or zero where the clock went backwards.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)),
        )
    }
}

impl Sub<Duration> for Timestamp {
    type Output = Self;

    fn sub(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_sub(i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)),
        )
    }
}
