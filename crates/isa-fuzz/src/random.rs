//! Numbers at random, the same for the same seed.

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A stream of its own for each seed and case.
    pub fn new(seed: u64, case: u64) -> Self {
        let mut random = Self(seed.rotate_left(32) ^ case.wrapping_mul(0xd134_2543_de82_ef95));
        random.next();
        random
    }

    /// The next 64 bits.
    #[allow(clippy::should_implement_trait)] // It never ends.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        (u128::from(self.next()) * u128::from(bound) >> 64) as u64
    }

    /// True once in `of` times.
    pub fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An operand: numbers at the edges come more often than chance would have them.
    pub fn operand(&mut self) -> u64 {
        match self.below(10) {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << self.below(64),
            3 => (1u64 << self.below(64)).wrapping_sub(1),
            4 => self.below(256),
            5 => self.next() as i32 as u64,
            6 => self.next() as i8 as u64,
            7 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }

    /// Eight bytes of a vector register: integers and floating-point numbers of all classes.
    pub fn element(&mut self) -> u64 {
        let single = |random: &mut Self| match random.below(8) {
            0 => 0f32.to_bits(),
            1 => (-0f32).to_bits(),
            2 => f32::INFINITY.to_bits(),
            3 => 0x7fa0_0001,
            4 => random.next() as u32 & 0x807f_ffff,
            5 => random.next() as u32,
            _ => (random.below(2000) as f32 / 16.0 - 60.0).to_bits(),
        };
        match self.below(8) {
            0 => f64::NEG_INFINITY.to_bits(),
            1 => self.next() & 0x800f_ffff_ffff_ffff,
            2 => (self.below(2000) as f64 / 16.0 - 60.0).to_bits(),
            3..=4 => self.next(),
            5 => self.below(4),
            _ => u64::from(single(self)) << 32 | u64::from(single(self)),
        }
    }
}
