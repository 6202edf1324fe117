//! Timing of something short by repeating it. What counts is the thread's processor time: others on the host are left out.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// How long one sample takes at least.
const SAMPLE: Duration = Duration::from_millis(40);
/// How many samples; the median of them counts.
const SAMPLES: usize = 7;

/// How long one repetition takes, in nanoseconds; `work` repeats as often as it is told.
pub fn nanoseconds_each(mut work: impl FnMut(u64)) -> f64 {
    let mut count = 64;
    let mut timed = |count: u64| {
        let started = processor_time();
        work(count);
        processor_time().saturating_sub(started)
    };
    while timed(count) < SAMPLE && count < 1 << 40 {
        count *= 2;
    }
    let mut samples: Vec<Duration> = (0..SAMPLES).map(|_| timed(count)).collect();
    samples.sort();
    samples[SAMPLES / 2].as_secs_f64() * 1e9 / count as f64
}

/// What the calling thread has used so far.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
