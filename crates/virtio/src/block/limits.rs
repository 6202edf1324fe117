//! Rate limits: a token bucket for requests, and one for bytes.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How much a disk may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Requests a second.
    pub iops: Option<u64>,
    /// Bytes read and written a second.
    pub bps: Option<u64>,
}

/// So much of a second may be used at once after a pause.
const BURST: f64 = 0.1;

/// The buckets of one disk.
pub(super) struct Limiter(Mutex<Buckets>);

struct Buckets {
    iops: Option<Bucket>,
    bps: Option<Bucket>,
}

/// Tokens that come at a rate; below zero are those that were taken before they came.
struct Bucket {
    rate: f64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    fn new(rate: u64, now: Instant) -> Self {
        let rate = rate.max(1) as f64;
        Self { rate, tokens: rate * BURST, filled: now }
    }

    /// Takes tokens; how long whoever takes them has to wait first.
    fn take(&mut self, count: u64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.tokens = (self.tokens + passed * self.rate).min(self.rate * BURST);
        self.tokens -= count as f64;
        if self.tokens >= 0.0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(-self.tokens / self.rate).unwrap_or(Duration::MAX)
    }
}

impl Limiter {
    /// `None` where nothing is limited.
    pub(super) fn new(limits: Limits) -> Option<Self> {
        let now = Instant::now();
        let bucket = |rate: Option<u64>| rate.map(|rate| Bucket::new(rate, now));
        let limited = limits != Limits::default();
        limited.then(|| Self(Mutex::new(Buckets { iops: bucket(limits.iops), bps: bucket(limits.bps) })))
    }

    /// Takes what a request of so many bytes needs; how long it has to wait for it.
    pub(super) fn take(&self, bytes: u64, now: Instant) -> Duration {
        let mut buckets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut take = |bucket: fn(&mut Buckets) -> &mut Option<Bucket>, count| {
            bucket(&mut buckets).as_mut().map_or(Duration::ZERO, |bucket| bucket.take(count, now))
        };
        take(|all| &mut all.iops, 1).max(take(|all| &mut all.bps, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_above_the_rate_waits() {
        let limiter = Limiter::new(Limits { iops: Some(100), bps: None }).unwrap();
        let start = Instant::now();
        let waits: Vec<_> = (0..12).map(|_| limiter.take(1 << 20, start)).collect();
        assert!(waits[..10].iter().all(Duration::is_zero), "a tenth of a second's at once: {waits:?}");
        assert_eq!(waits[10].as_millis(), 10);
        assert_eq!(waits[11].as_millis(), 20);
        assert!(limiter.take(0, start + Duration::from_secs(60)).is_zero());
    }

    #[test]
    fn bytes_count_and_the_slower_limit_holds() {
        let limiter = Limiter::new(Limits { iops: Some(1_000_000), bps: Some(1 << 20) }).unwrap();
        let start = Instant::now();
        let wait = limiter.take(1 << 20, start);
        assert!((899..=901).contains(&wait.as_millis()), "{wait:?}");
        assert!(Limiter::new(Limits::default()).is_none());
    }
}
