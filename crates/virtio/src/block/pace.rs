//! When a worker publishes what it completed, and how long it looks for more before it sleeps.
//!
//! A request that is completed at once costs the guest an interrupt, and the next one a notification. A guest with several
//! requests on their way is better off if they come back together; one with a single request wants it at once. How many it
//! has on their way is learned: a burst ends when nothing came for a while, and the next one is published as soon as it is as
//! long. Now and then one is held longer, to see whether there are more by now.

use std::time::{Duration, Instant};

/// A burst ends when nothing came for so long, or after so long, or with so many requests.
const GAP: Duration = Duration::from_micros(60);
const LONGEST: Duration = Duration::from_micros(1500);
const MOST: usize = 32;
/// Every so many bursts one is held longer than it would be: the first where there is one request at a time.
const PROBE_SINGLE: u32 = 128;
const PROBE: u32 = 16;
/// How long a worker looks for more before it sleeps, at least and at most.
const SHORTEST_LINGER: Duration = Duration::from_micros(10);
const LONGEST_LINGER: Duration = Duration::from_micros(300);

/// What was learned of a queue.
pub(super) struct Pace {
    /// Whether there is a processor to spare for looking around.
    spins: bool,
    /// How many requests came together in the last burst.
    depth: usize,
    bursts: u32,
    /// Where there is one request at a time: how many more are published at once until one is held.
    singles: u32,
    linger: Duration,
    /// When the burst's first request was completed, and its last.
    begun: Option<Instant>,
    latest: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        let spins = std::thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        let linger = if spins { Duration::from_micros(50) } else { Duration::ZERO };
        Self { spins, depth: 1, bursts: 0, singles: 0, linger, begun: None, latest: Instant::now() }
    }

    /// `held` requests are completed and not yet published; `more` says whether some came just now. Whether to publish them.
    pub(super) fn is_due(&mut self, held: usize, more: bool) -> bool {
        self.is_due_at(held, more, Instant::now)
    }

    fn is_due_at(&mut self, held: usize, more: bool, now: impl FnOnce() -> Instant) -> bool {
        if held == 0 {
            return false;
        }
        if !self.spins {
            // The worker runs while the guest does not: what is there is all that there is.
            return self.publish(held, true);
        }
        let probe = match self.depth {
            1 => self.singles == 0,
            _ => self.bursts.is_multiple_of(PROBE),
        };
        if held >= MOST || held >= self.depth && !probe {
            // As many as the last time, or more.
            return self.publish(held, false);
        }
        let now = now();
        let begun = *self.begun.get_or_insert(now);
        if more {
            self.latest = now;
        }
        if now - self.latest < GAP && now - begun < LONGEST {
            return false;
        }
        self.publish(held, true)
    }

    /// `held` come back together; `certain` says that no more of them were on their way.
    fn publish(&mut self, held: usize, certain: bool) -> bool {
        self.depth = held;
        self.bursts = self.bursts.wrapping_add(1);
        self.singles = match (held, certain) {
            (1, true) => PROBE_SINGLE,
            (1, false) => self.singles.saturating_sub(1),
            _ => 0,
        };
        self.begun = None;
        true
    }

    /// Whether the driver has one request on its way at a time, as far as was seen not long ago.
    pub(super) fn is_alone(&self) -> bool {
        self.depth == 1 && self.singles > 0
    }

    /// A request was published as soon as it came, by who rang.
    pub(super) fn published_at_once(&mut self) {
        self.singles = self.singles.saturating_sub(1);
    }

    /// How long to look for more before sleeping.
    pub(super) fn linger(&self) -> Duration {
        self.linger
    }

    /// The worker slept so long until something came.
    pub(super) fn slept(&mut self, time: Duration) {
        if !self.spins {
            return;
        }
        // What came soon after would have been found by looking a little longer.
        self.linger = match time < LONGEST_LINGER {
            true => (self.linger * 2).clamp(SHORTEST_LINGER, LONGEST_LINGER),
            false => (self.linger / 2).max(SHORTEST_LINGER),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that has seen requests come alone, with a clock of its own.
    fn pace() -> (Pace, Instant) {
        (Pace { spins: true, bursts: 1, singles: PROBE_SINGLE, ..Pace::new() }, Instant::now())
    }

    #[test]
    fn single_requests_are_published_at_once() {
        let (mut pace, now) = pace();
        assert!((0..100).all(|_| pace.is_due_at(1, true, || now)));
    }

    #[test]
    fn a_driver_with_one_request_at_a_time_is_known_to_be_alone_until_it_has_to_be_seen_again() {
        let (mut pace, now) = pace();
        pace.singles = 0;
        assert!(!pace.is_alone() && !pace.is_due_at(1, true, || now), "the first is held");
        assert!(pace.is_due_at(1, false, || now + GAP) && pace.is_alone());
        (0..PROBE_SINGLE).for_each(|_| pace.published_at_once());
        assert!(!pace.is_alone() && !pace.is_due_at(1, true, || now), "it is looked again");
        assert!(!pace.is_due_at(2, true, || now));
        assert!(pace.is_due_at(2, false, || now + GAP) && !pace.is_alone());
    }

    #[test]
    fn bursts_are_learned_and_then_published_whole() {
        let (mut pace, now) = pace();
        pace.singles = 0;
        for held in 1..=24 {
            assert!(!pace.is_due_at(held, true, || now), "it is looked for more");
        }
        assert!(pace.is_due_at(24, false, || now + GAP));
        for held in 1..24 {
            assert!(!pace.is_due_at(held, true, || now), "{held}");
        }
        assert!(pace.is_due_at(24, true, || now));
    }

    #[test]
    fn a_burst_that_grows_shorter_is_not_waited_for_long() {
        let (mut pace, now) = pace();
        pace.depth = 32;
        assert!(!pace.is_due_at(4, true, || now));
        assert!(pace.is_due_at(4, false, || now + GAP));
        assert_eq!(pace.depth, 4);
    }

    #[test]
    fn a_full_burst_is_not_held_longer() {
        let (mut pace, now) = pace();
        pace.singles = 0;
        assert!(pace.is_due_at(MOST, true, || now));
    }

    #[test]
    fn what_comes_soon_after_falling_asleep_is_waited_for_longer() {
        let (mut pace, _) = pace();
        let first = pace.linger();
        pace.slept(Duration::from_micros(100));
        assert!(pace.linger() > first);
        (0..20).for_each(|_| pace.slept(Duration::from_secs(1)));
        assert_eq!(pace.linger(), SHORTEST_LINGER);
    }
}
