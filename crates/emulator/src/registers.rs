//! The general-purpose register file.

/// RAX to R15 in the order of their encoding, and one that is always zero, for addresses without base or index.
#[derive(Clone, Debug)]
pub struct Registers([u64; 32]);

/// The number of the register that is always zero.
pub const NONE: u8 = 16;

impl Registers {
    /// A file with these values.
    pub fn new(values: &[u64; 16]) -> Self {
        let mut file = [0; 32];
        file[..16].copy_from_slice(values);
        Self(file)
    }
    /// A register's 64 bits.
    #[inline(always)]
    pub fn get(&self, number: u8) -> u64 {
        self.0[usize::from(number & 31)]
    }
    /// Sets all 64 bits.
    #[inline(always)]
    pub fn set(&mut self, number: u8, value: u64) {
        self.0[usize::from(number & 31)] = value;
    }
    /// RAX to R15.
    pub fn all(&self) -> &[u64; 16] {
        self.0.first_chunk().unwrap_or(&[0; 16])
    }
    /// RAX to R15, for writing.
    pub fn all_mut(&mut self) -> &mut [u64; 16] {
        let (first, _) = self.0.split_first_chunk_mut().unwrap_or_else(|| unreachable!());
        first
    }
}
