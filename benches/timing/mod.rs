//! Timing of something short by repeating it.

use std::time::{Duration, Instant};

/// How long one sample takes at least.
const SAMPLE: Duration = Duration::from_millis(40);
/// How many samples; the median of them counts.
const SAMPLES: usize = 7;

/// How long one repetition takes, in nanoseconds; `work` repeats as often as it is told.
pub fn nanoseconds_each(mut work: impl FnMut(u64)) -> f64 {
    let mut count = 64;
    let mut timed = |count: u64| {
        let started = Instant::now();
        work(count);
        started.elapsed()
    };
    while timed(count) < SAMPLE && count < 1 << 40 {
        count *= 2;
    }
    let mut samples: Vec<Duration> = (0..SAMPLES).map(|_| timed(count)).collect();
    samples.sort();
    samples[SAMPLES / 2].as_secs_f64() * 1e9 / count as f64
}
