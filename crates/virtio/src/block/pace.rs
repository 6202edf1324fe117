//! When a worker publishes what it completed, and how long it looks for more before it sleeps.
//!
//! A request that is completed at once costs the guest an interrupt, and the next one a notification. A guest with several
//! requests on their way is better off if they come back together; one with a single request wants it at once. How many it
//! has on their way is learned: a burst ends when nothing came for a while, and the next ones are published as soon as half as
//! many are there, so that the guest works on one half while the worker does the other. Now and then one is held longer, to see whether there are more by now. A driver whose single request is held so
//! until the thread that rang for it has fallen asleep has no other: it is *alone*, and is answered by that very thread.

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
    /// How many requests the driver has on their way, as far as was seen.
    depth: usize,
    bursts: u32,
    /// Where there is one request at a time: how many more are published at once until one is held.
    singles: u32,
    /// The last one that was held was all that the driver had to send.
    alone: bool,
    linger: Duration,
    /// When the burst's first request was completed, and its last.
    begun: Option<Instant>,
    latest: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        let spins = std::thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        let linger = if spins { Duration::from_micros(50) } else { Duration::ZERO };
        Self {
            spins,
            depth: 1,
            bursts: 0,
            singles: 0,
            alone: false,
            linger,
            begun: None,
            latest: Instant::now(),
        }
    }

    /// `held` requests are completed and not yet published; `more` says whether some came just now, and `asleep` finds out
    /// whether whoever rang last sleeps. Whether to publish them.
    pub(super) fn is_due(&mut self, held: usize, more: bool, asleep: impl FnOnce() -> bool) -> bool {
        self.is_due_at(held, more, Instant::now, asleep)
    }

    fn is_due_at(
        &mut self,
        held: usize,
        more: bool,
        now: impl FnOnce() -> Instant,
        asleep: impl FnOnce() -> bool,
    ) -> bool {
        if held == 0 {
            return false;
        }
        if !self.spins {
            // The worker runs while the guest does not: what is there is all that there is.
            self.depth = held;
            let alone = held == 1 && (self.singles > 0 || asleep());
            return self.publish(held, Some(alone));
        }
        let probe = match self.depth {
            1 => self.singles == 0,
            _ => self.bursts.is_multiple_of(PROBE),
        };
        if held >= MOST || held >= self.depth.div_ceil(2) && !probe {
            return self.publish(held, None);
        }
        let now = now();
        let begun = *self.begun.get_or_insert(now);
        if more {
            self.latest = now;
        }
        let longest = now - begun >= LONGEST;
        if now - self.latest < GAP && !longest {
            return false;
        }
        if held > 1 || self.depth > 1 {
            self.depth = held;
            return self.publish(held, None);
        }
        let alone = asleep();
        if !alone && !longest {
            // It may have more to send, and be slow at that.
            self.latest = now;
            return false;
        }
        self.publish(held, Some(alone))
    }

    /// `held` come back together; `alone` says what was found out of a single one.
    fn publish(&mut self, held: usize, alone: Option<bool>) -> bool {
        self.depth = self.depth.max(held);
        self.bursts = self.bursts.wrapping_add(1);
        match (held, alone) {
            (1, Some(alone)) => (self.singles, self.alone) = (PROBE_SINGLE, alone),
            _ if self.depth == 1 => self.singles = self.singles.saturating_sub(1),
            _ => (self.singles, self.alone) = (0, false),
        }
        self.begun = None;
        true
    }

    /// Whether the driver has one request on its way at a time, as far as was seen not long ago.
    pub(super) fn is_alone(&self) -> bool {
        self.alone && self.depth == 1 && self.singles > 0
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
        assert!((0..100).all(|_| pace.is_due_at(1, true, || now, || false)));
    }

    #[test]
    fn a_driver_whose_thread_sleeps_while_its_request_is_held_is_alone_until_it_has_to_be_seen_again() {
        let (mut pace, now) = pace();
        pace.singles = 0;
        assert!(!pace.is_alone() && !pace.is_due_at(1, true, || now, || true), "the first is held");
        assert!(!pace.is_due_at(1, false, || now + GAP, || false), "it may have more");
        assert!(!pace.is_due_at(1, false, || now + GAP + GAP / 2, || true), "it is not asked all the time");
        assert!(pace.is_due_at(1, false, || now + 2 * GAP, || true) && pace.is_alone());
        (0..PROBE_SINGLE).for_each(|_| pace.published_at_once());
        assert!(!pace.is_alone() && !pace.is_due_at(1, true, || now, || true), "it is looked again");
        assert!(!pace.is_due_at(2, true, || now, || true));
        assert!(pace.is_due_at(2, false, || now + GAP, || true) && !pace.is_alone());
    }

    #[test]
    fn a_driver_that_never_sleeps_is_not_held_for_ever_and_not_alone() {
        let (mut pace, now) = pace();
        pace.singles = 0;
        assert!(!pace.is_due_at(1, true, || now, || false));
        assert!(pace.is_due_at(1, false, || now + LONGEST, || false) && !pace.is_alone());
        assert!(pace.is_due_at(1, true, || now, || false), "the next ones are not held");
    }

    #[test]
    fn bursts_are_learned_and_then_published_by_halves() {
        let (mut pace, now) = pace();
        pace.singles = 0;
        for held in 1..=24 {
            assert!(!pace.is_due_at(held, true, || now, || true), "it is looked for more");
        }
        assert!(pace.is_due_at(24, false, || now + GAP, || true));
        for _ in 0..8 {
            for held in 1..12 {
                assert!(!pace.is_due_at(held, true, || now, || true), "{held}");
            }
            assert!(pace.is_due_at(12, true, || now, || true), "half of them");
        }
    }

    #[test]
    fn a_burst_that_grows_shorter_is_not_waited_for_long() {
        let (mut pace, now) = pace();
        pace.depth = 32;
        assert!(!pace.is_due_at(4, true, || now, || false));
        assert!(pace.is_due_at(4, false, || now + GAP, || false));
        assert_eq!(pace.depth, 4);
    }

    #[test]
    fn a_full_burst_is_not_held_longer() {
        let (mut pace, now) = pace();
        pace.singles = 0;
        assert!(pace.is_due_at(MOST, true, || now, || false));
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
