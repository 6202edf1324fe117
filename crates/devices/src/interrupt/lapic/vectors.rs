/// A bit for each of the 256 vectors, as IRR, ISR and TMR are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct VectorSet([u64; 4]);

impl VectorSet {
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    pub fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    pub fn set(&mut self, vector: u8, value: bool) {
        if value { self.insert(vector) } else { self.remove(vector) }
    }

    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] >> (vector & 63) & 1 != 0
    }

    /// The highest vector, which has the highest priority.
    #[inline]
    pub fn highest(&self) -> Option<u8> {
        let word = (0..4).rev().find(|&word| self.0[word] != 0)?;
        Some((word * 64) as u8 + (63 - self.0[word].leading_zeros() as u8))
    }

    /// The 32-bit register that stands `index` registers (of 32 vectors each) after the first.
    pub fn register(&self, index: u32) -> u32 {
        (self.0[(index as usize / 2) % 4] >> (index % 2 * 32)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_vector_is_found_in_every_word() {
        let mut set = VectorSet::default();
        assert_eq!(set.highest(), None);
        for vector in [0, 1, 63, 64, 127, 128, 200, 255] {
            set.insert(vector);
            assert_eq!(set.highest(), Some(vector));
            assert!(set.contains(vector));
        }
        set.remove(255);
        assert_eq!(set.highest(), Some(200));
        assert_eq!(set.register(6), 1 << (200 - 192));
    }
}
