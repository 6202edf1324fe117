/// Buckets for each doubling of the value, as a power of two.
const SUB_BITS: u32 = 2;
/// Values from here on share the last bucket.
const MAX_VALUE: u64 = (1 << 44) - 1;
const BUCKETS: usize = ((44 - SUB_BITS as usize) << SUB_BITS) + (1 << SUB_BITS);

/// How often which values came up: four buckets for each doubling, so that a value read back is at most an eighth off.
///
/// It takes up to 700 bytes, whatever is recorded. A bucket that has counted 2^32 values counts no further.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Counts up to the highest bucket seen.
    counts: Vec<u32>,
}

impl Histogram {
    /// Counts one value.
    #[inline]
    pub fn record(&mut self, value: u64) {
        let bucket = bucket_of(value);
        match self.counts.get_mut(bucket) {
            Some(count) => *count = count.saturating_add(1),
            None => self.grow(bucket),
        }
    }

    /// Adds another's counts.
    pub fn merge(&mut self, other: &Self) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count = count.saturating_add(*more);
        }
    }

    /// The value that `share` (0 to 1) of the recorded ones do not exceed, as the middle of its bucket; 0 where
    /// nothing was recorded.
    pub fn quantile(&self, share: f64) -> u64 {
        let total: u64 = self.counts.iter().map(|&c| u64::from(c)).sum();
        let wanted = ((total as f64 * share).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        for (bucket, &count) in self.counts.iter().enumerate() {
            seen += u64::from(count);
            if seen >= wanted {
                let (low, high) = bounds(bucket);
                return low + (high - low) / 2;
            }
        }
        0
    }

    /// The buckets that counted something: their highest value and their count, in ascending order.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let counted = self.counts.iter().enumerate().filter(|&(_, &count)| count > 0);
        counted.map(|(bucket, &count)| (bounds(bucket).1, u64::from(count)))
    }

    #[cold]
    fn grow(&mut self, bucket: usize) {
        self.counts.reserve_exact(bucket + 1 - self.counts.len());
        self.counts.resize(bucket + 1, 0);
        self.counts[bucket] = 1;
    }
}

/// The bucket of a value: below 2^SUB_BITS the value itself, then its exponent and the bits after the leading one.
#[inline]
fn bucket_of(value: u64) -> usize {
    let value = value.min(MAX_VALUE);
    if value < 1 << SUB_BITS {
        return value as usize;
    }
    let shift = value.ilog2() - SUB_BITS;
    ((shift as usize) << SUB_BITS) + (value >> shift) as usize
}

/// The lowest and the highest value of a bucket.
fn bounds(bucket: usize) -> (u64, u64) {
    debug_assert!(bucket < BUCKETS);
    if bucket < 1 << SUB_BITS {
        return (bucket as u64, bucket as u64);
    }
    let shift = (bucket >> SUB_BITS) - 1;
    let leading = (bucket & ((1 << SUB_BITS) - 1)) as u64 | 1 << SUB_BITS;
    (leading << shift, ((leading + 1) << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_within_its_bucket_and_buckets_are_contiguous() {
        let mut next = 0;
        for bucket in 0..BUCKETS {
            let (low, high) = bounds(bucket);
            assert_eq!(low, next);
            assert_eq!((bucket_of(low), bucket_of(high)), (bucket, bucket));
            next = high + 1;
        }
        assert_eq!(next - 1, MAX_VALUE);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_at_most_an_eighth_off() {
        let mut histogram = Histogram::default();
        (1..=10_000).for_each(|v| histogram.record(v));
        for share in [0.01, 0.5, 0.9, 0.99, 1.0] {
            let (found, exact) = (histogram.quantile(share) as f64, 10_000.0 * share);
            assert!((found - exact).abs() <= exact / 8.0, "{share}: {found} for {exact}");
        }
    }

    #[test]
    fn an_empty_histogram_has_quantile_zero() {
        assert_eq!(Histogram::default().quantile(0.5), 0);
    }

    #[test]
    fn merging_adds_counts() {
        let (mut a, mut b) = (Histogram::default(), Histogram::default());
        a.record(3);
        b.record(3);
        b.record(1000);
        a.merge(&b);
        assert_eq!(a.buckets().collect::<Vec<_>>(), [(3, 2), (1023, 1)]);
    }
}
