//! Which exits of translated code lead to a block: places in code memory, by the block's key where it is in the same page,
//! and by RIP where it is not. What is in another page is only known for one regime: such an exit compares the name of the
//! present table from RIP to code first.
//!
//! All of them are forgotten at once, while the guest waits: nothing here has memory of its own that would have to be
//! freed one by one.

use std::hash::Hash;

use super::targets::Name;
use crate::block::Map;

/// No further place.
const END: u32 = u32::MAX;

/// The exits to each block.
pub struct Links<K> {
    /// The last place of each block, as an index of `places`.
    last: Map<K, u32>,
    /// Offsets in code memory, each with the index of the one before it.
    places: Vec<(u32, u32)>,
}

impl<K> Default for Links<K> {
    fn default() -> Self {
        Self { last: Map::default(), places: Vec::new() }
    }
}

impl<K: Copy + Eq + Hash> Links<K> {
    /// Notes an exit to a block, at an offset in code memory.
    pub fn add(&mut self, key: K, at: usize) {
        let index = self.places.len() as u32;
        let before = self.last.insert(key, index).unwrap_or(END);
        self.places.push((at as u32, before));
    }

    /// The exits to a block, the last one first.
    pub fn to(&self, key: K) -> impl Iterator<Item = usize> + '_ {
        let mut next = self.last.get(&key).copied().unwrap_or(END);
        std::iter::from_fn(move || {
            let &(at, before) = self.places.get(next as usize)?;
            next = before;
            Some(at as usize)
        })
    }

    /// Whether there are any.
    fn has(&self, key: K) -> bool {
        self.last.contains_key(&key)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.last.clear();
        self.places.clear();
    }
}

/// The exits to other pages.
#[derive(Default)]
pub struct FarLinks {
    exits: Links<u64>,
    /// By RIP: under which table's name exits to it go on, and to which code.
    leading: Map<u64, (Name, u64)>,
}

impl FarLinks {
    /// Notes an exit to a RIP, at an offset in code memory. Gives under which name it is to go on, and to which code, as far
    /// as other exits do.
    pub fn add(&mut self, rip: u64, at: usize) -> Option<(Name, u64)> {
        self.exits.add(rip, at);
        self.leading.get(&rip).copied()
    }

    /// The code for a RIP became known under a name. Gives the exits that are to lead there: all, unless they lead somewhere
    /// already under another name that `is_in_use`.
    pub fn lead(
        &mut self,
        rip: u64,
        (name, code): (Name, u64),
        is_in_use: impl FnOnce(Name) -> bool,
    ) -> impl Iterator<Item = usize> + '_ {
        let now = self.leading.get(&rip).copied();
        let stays = now.is_some_and(|now| now == (name, code) || now.0 != name && is_in_use(now.0));
        let leads = name != 0 && !stays && self.exits.has(rip);
        if leads {
            self.leading.insert(rip, (name, code));
        }
        self.exits.to(rip).take_while(move |_| leads)
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.exits.clear();
        self.leading.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::Key;
    use crate::mode::Mode;

    #[test]
    fn exits_to_another_page_follow_a_name_as_long_as_it_is_in_use() {
        let mut links = FarLinks::default();
        let led = |links: &mut FarLinks, name, code, used: &[Name]| {
            links.lead(1, (name, code), |name| used.contains(&name)).collect::<Vec<_>>()
        };
        assert_eq!(led(&mut links, 7, 70, &[7]), Vec::<usize>::new(), "nobody goes there");
        assert_eq!(links.add(1, 10), None);
        assert_eq!(links.add(1, 20), None);
        assert_eq!(led(&mut links, 7, 70, &[7]), [20, 10]);
        assert_eq!(links.add(1, 30), Some((7, 70)));
        assert_eq!(led(&mut links, 7, 70, &[7]), Vec::<usize>::new(), "they do already");
        assert_eq!(led(&mut links, 7, 71, &[7]), [30, 20, 10], "other code");
        assert_eq!(
            led(&mut links, 8, 80, &[7, 8]),
            Vec::<usize>::new(),
            "another name, while the first is in use"
        );
        assert_eq!(led(&mut links, 8, 80, &[8]), [30, 20, 10]);
        assert_eq!(led(&mut links, 0, 90, &[]), Vec::<usize>::new(), "no name");
        links.clear();
        assert_eq!(led(&mut links, 8, 80, &[8]), Vec::<usize>::new());
        assert_eq!(links.add(1, 10), None);
    }

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
