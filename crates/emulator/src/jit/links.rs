//! Which exits of translated code lead to a block: places in code memory, by the block's key.
//!
//! All of them are forgotten at once, while the guest waits: nothing here has memory of its own that would have to be
//! freed one by one.

use crate::block::{Key, Map};

/// No further place.
const END: u32 = u32::MAX;

/// The exits to each block.
#[derive(Default)]
pub struct Links {
    /// The last place of each block, as an index of `places`.
    last: Map<Key, u32>,
    /// Offsets in code memory, each with the index of the one before it.
    places: Vec<(u32, u32)>,
}

impl Links {
    /// Notes an exit to a block, at an offset in code memory.
    pub fn add(&mut self, key: Key, at: usize) {
        let index = self.places.len() as u32;
        let before = self.last.insert(key, index).unwrap_or(END);
        self.places.push((at as u32, before));
    }

    /// The exits to a block, the last one first.
    pub fn to(&self, key: Key) -> impl Iterator<Item = usize> + '_ {
        let mut next = self.last.get(&key).copied().unwrap_or(END);
        std::iter::from_fn(move || {
            let &(at, before) = self.places.get(next as usize)?;
            next = before;
            Some(at as usize)
        })
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.last.clear();
        self.places.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mode::Mode;

    #[test]
    fn each_block_has_its_own_exits() {
        let key = |rip| Key { offset: rip & 0xfff, rip, mode: Mode::default() };
        let mut links = Links::default();
        for (rip, at) in [(1, 10), (2, 20), (1, 11), (1, 12)] {
            links.add(key(rip), at);
        }
        assert_eq!(links.to(key(1)).collect::<Vec<_>>(), [12, 11, 10]);
        assert_eq!(links.to(key(2)).collect::<Vec<_>>(), [20]);
        assert_eq!(links.to(key(3)).count(), 0);
        links.clear();
        assert_eq!(links.to(key(1)).count(), 0);
    }
}
