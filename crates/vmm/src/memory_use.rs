//! What the process takes of the host's memory: the guest's RAM, and all the rest.

use std::collections::HashSet;
use std::ops::Range;

use guest_memory::GuestMemory;

/// Resident memory of the process, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// The guest's RAM, as far as it was touched.
    pub guest: u64,
    /// Everything else: translations, decoded code, tables, the program itself. What is mapped twice counts once.
    pub beside: u64,
}

impl MemoryUse {
    /// Of this process at the moment; `None` where the host does not tell.
    pub(crate) fn now(memory: &GuestMemory) -> Option<Self> {
        let start = memory.host_address(0)?;
        let text = std::fs::read_to_string("/proc/self/smaps").ok()?;
        Some(Self::parse(&text, start..start + memory.len()))
    }

    /// Adds up what proc(5), */proc/pid/smaps*, says of each mapping.
    fn parse(smaps: &str, ram: Range<u64>) -> Self {
        let (mut sum, mut files) = (Self::default(), HashSet::new());
        // Of what is none of these two.
        let (mut in_ram, mut again) = (false, false);
        for line in smaps.lines() {
            if let Some(mapping) = Mapping::parse(line) {
                in_ram = ram.contains(&mapping.start);
                again = mapping.shared.is_some_and(|file| !files.insert(file));
            } else if let Some(bytes) = resident(line) {
                match in_ram {
                    true => sum.guest += bytes,
                    false if again => {}
                    false => sum.beside += bytes,
                }
            }
        }
        sum
    }
}

/// The first line of a mapping: `START-END PERMISSIONS OFFSET DEVICE INODE NAME`.
struct Mapping<'a> {
    start: u64,
    /// Offset, device and inode of a mapping that shares a file's pages.
    shared: Option<(&'a str, &'a str, &'a str)>,
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (start, _) = words.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let (permissions, offset, device, inode) =
            (words.next()?, words.next()?, words.next()?, words.next()?);
        Some(Self { start, shared: permissions.ends_with('s').then_some((offset, device, inode)) })
    }
}

/// `Rss:    1234 kB`
fn resident(line: &str) -> Option<u64> {
    let kib: u64 = line.strip_prefix("Rss:")?.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_memory::Region;

    #[test]
    fn the_guests_ram_is_told_from_the_rest_and_what_is_mapped_twice_counts_once() {
        let smaps = "7f0000000000-7f0000100000 rw-p 00000000 00:00 0 \nSize: 1024 kB\nRss:    16 kB\nPss:  9 kB\n\
                     7f0000100000-7f0000200000 rw-p 00000000 00:00 0 \nRss:    4 kB\n\
                     7f1000000000-7f1000100000 rw-s 00000000 00:01 77 /memfd:code (deleted)\nRss: 32 kB\n\
                     7f2000000000-7f2000100000 r-xs 00000000 00:01 77 /memfd:code (deleted)\nRss: 32 kB\n\
                     7f3000000000-7f3000100000 r-xp 00000000 fe:01 5 /bin/x\nRss: 8 kB\n";
        let sum = MemoryUse::parse(smaps, 0x7f00_0000_0000..0x7f00_0010_0000);
        assert_eq!(sum, MemoryUse { guest: 16 << 10, beside: 44 << 10 });
    }

    #[test]
    fn ram_counts_as_soon_as_it_is_touched() {
        let len = 8 << 20;
        let memory = GuestMemory::new(&[Region { start: 0, len, read_only: false }]).unwrap();
        let before = MemoryUse::now(&memory).unwrap();
        memory.write_bytes(0, &vec![1; len as usize]);
        let after = MemoryUse::now(&memory).unwrap();
        assert!(before.guest <= 2 << 20 && after.guest == len, "{before:?} {after:?}");
        assert!(after.beside > 0);
    }
}
