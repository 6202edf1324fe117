//! A second RAM of the same layout, for running a guest twice and comparing.

use crate::{GuestMemory, MemoryError, Offset, PAGE_SIZE};

impl GuestMemory {
    /// Zeroed RAM of its own with the same regions, those of files too. What is set of the layout later holds for both.
    ///
    /// # Errors
    /// [`MemoryError::Map`] where the host refuses.
    pub fn twin(&self) -> Result<Self, MemoryError> {
        let mut twin = Self::map(&self.regions, &[])?;
        twin.shadow = self.shadow.clone();
        Ok(twin)
    }

    /// Copies everything from RAM of the same layout. Pages of zeros are left alone where there are zeros already.
    ///
    /// # Panics
    /// Where the other is smaller.
    pub fn copy_from(&self, other: &Self) {
        for page in (0..self.len()).step_by(PAGE_SIZE as usize) {
            if let Some(theirs) = self.differing_page(other, page) {
                self.write_bytes(page, &theirs);
                self.marks().written(page);
            }
        }
    }

    /// The first page, of those that were written since their marks were last cleaned on either side, that is not the
    /// same in both.
    pub fn first_difference(&self, other: &Self) -> Option<Offset> {
        let written = |page: &Offset| self.marks().is_dirty(*page) || other.marks().is_dirty(*page);
        let mut pages = (0..self.len().min(other.len())).step_by(PAGE_SIZE as usize).filter(written);
        pages.find(|&page| self.differing_page(other, page).is_some())
    }

    /// The other's bytes of a page, where they are not this one's.
    fn differing_page(&self, other: &Self, page: Offset) -> Option<[u8; PAGE_SIZE as usize]> {
        let (mut mine, mut theirs) = ([0; PAGE_SIZE as usize], [0; PAGE_SIZE as usize]);
        self.read_bytes(page, &mut mine);
        other.read_bytes(page, &mut theirs);
        (mine != theirs).then_some(theirs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Region;

    #[test]
    fn a_twin_is_the_same_until_one_of_them_is_written() {
        let memory = GuestMemory::new(&[Region { start: 0, len: 0x4000, read_only: false }]).unwrap();
        memory.store(0x2010, 7u32);
        let twin = memory.twin().unwrap();
        twin.copy_from(&memory);
        assert_eq!(twin.load::<u32>(0x2010), 7);
        assert_eq!(memory.first_difference(&twin), None);
        memory.store(0x3ffc, 1u32);
        assert_eq!(memory.first_difference(&twin), None, "nobody has marked the page");
        memory.marks().written(0x3ffc);
        assert_eq!(memory.first_difference(&twin), Some(0x3000));
        assert_eq!(twin.first_difference(&memory), Some(0x3000));
    }
}
