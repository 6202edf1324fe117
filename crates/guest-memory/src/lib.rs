//! Guest-physical RAM: where it lies, who wrote to it, and which of its pages hold translated code.
//!
//! All of a machine's RAM is one host mapping; an [`Offset`] into it stands for a host address, so that the software
//! CPU reaches memory with one bounds check and no `unsafe` of its own. Devices use the same memory through the
//! `vm-memory` traits ([`GuestMemory::vm`]); a write through either marks its pages ([`PageMarks`]).
//!
//! Guest memory is never a `&[u8]`: the guest, its devices and other vCPUs change it at any time. Every access is a
//! single machine instruction of its width (so that the host's memory model is the guest's), or a volatile copy.
//!
//! A file of the host can be memory too ([`FileRegion`]): it lies in the same mapping behind the RAM, so that whoever
//! reaches memory reaches it without knowing. What becomes of an access that its file cannot answer, [`FileState`] says.

mod access;
mod bus_error;
mod files;
mod marks;
mod scatter;
mod shadow;
mod turns;
mod twin;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use access::Scalar;
pub use files::{FileRegion, FileState};
pub use marks::{PageMarks, PageTracker};
pub use scatter::{HostSlice, HostSlices};
use shadow::Shadow;
pub use shadow::{ShadowArea, Shadowing};
pub use turns::DeviceTurn;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// A byte's place in the machine's RAM, counted over all regions.
pub type Offset = u64;

/// A contiguous range of guest-physical addresses with RAM behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address; a multiple of the page size.
    pub start: u64,
    /// Bytes; a multiple of the page size.
    pub len: u64,
    /// Whether the guest's writes are discarded.
    pub read_only: bool,
}

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host does not give that much.
    #[error("cannot map {bytes} bytes of guest memory: {source}")]
    Map {
        /// Bytes asked for.
        bytes: u64,
        /// The host's error.
        source: std::io::Error,
    },
    /// The regions overlap, are empty or are not made of pages.
    #[error(
        "the memory region at {start:#x} of {len:#x} bytes is empty, overlaps another or is not made of pages"
    )]
    BadRegion {
        /// First address.
        start: u64,
        /// Bytes.
        len: u64,
    },
    /// A file that cannot be mapped.
    #[error("the host cannot map it into memory: {0}")]
    File(std::io::Error),
    /// An access outside the RAM.
    #[error("no RAM at guest-physical address {0:#x}")]
    NoRam(u64),
}

/// A region and where it lies in the host mapping.
#[derive(Clone, Copy, Debug)]
struct Placed {
    region: Region,
    offset: Offset,
    /// Whether a file is behind it.
    of_file: bool,
}

/// What a guest-physical address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Where it lies in the RAM.
    pub offset: Offset,
    /// Whether the guest's writes are discarded.
    pub read_only: bool,
}

/// The bytes and the marks; every region of [`GuestMemory::vm`] keeps them alive.
#[derive(Debug)]
pub(crate) struct Ram {
    /// Before the mapping: the signal handler is to forget them first.
    files: files::Files,
    mapping: access::Mapping,
    marks: PageMarks,
    bus_locked: AtomicBool,
}

/// The bus, locked until this is dropped.
#[derive(Debug)]
pub struct BusLock(Arc<Ram>);

impl Drop for BusLock {
    fn drop(&mut self) {
        self.0.bus_locked.store(false, Ordering::Release);
    }
}

/// The machine's RAM. Clones share it.
#[derive(Clone)]
pub struct GuestMemory {
    ram: Arc<Ram>,
    regions: Arc<[Placed]>,
    shadow: Option<Arc<Shadow>>,
    vm: Arc<GuestMemoryMmap<PageTracker>>,
}

impl GuestMemory {
    /// Maps zeroed RAM for the regions, which must be in ascending order.
    ///
    /// # Errors
    /// [`MemoryError::BadRegion`] for regions that are not ascending pages, [`MemoryError::Map`] where the host refuses.
    pub fn new(regions: &[Region]) -> Result<Self, MemoryError> {
        Self::with_files(regions, &[])
    }

    /// The same with files as memory; they come after the regions, in ascending order too.
    ///
    /// # Errors
    /// As [`Self::new`]; [`MemoryError::File`] for a file that the host does not map.
    pub fn with_files(regions: &[Region], files: &[FileRegion]) -> Result<Self, MemoryError> {
        let all: Vec<_> = regions.iter().copied().chain(files.iter().map(|file| file.region)).collect();
        let mut placed = place(&all)?;
        placed[regions.len()..].iter_mut().for_each(|p| p.of_file = true);
        Self::map(&placed, files)
    }

    /// Maps memory for what was placed; where there is no file for one of the last, it is RAM of zeros.
    fn map(placed: &[Placed], files: &[FileRegion]) -> Result<Self, MemoryError> {
        let total = placed.last().map_or(0, |p| p.offset + p.region.len);
        let mapping = access::Mapping::anonymous(total)?;
        let offsets = placed.iter().filter(|p| p.of_file).map(|p| p.offset);
        let ram = Arc::new(Ram {
            files: files::Files::map(&mapping, offsets.zip(files))?,
            mapping,
            marks: PageMarks::new(total / PAGE_SIZE).ok_or_else(|| MemoryError::Map {
                bytes: total,
                source: std::io::ErrorKind::OutOfMemory.into(),
            })?,
            bus_locked: AtomicBool::new(false),
        });
        let vm = placed
            .iter()
            .map(|p| {
                let tracker = PageTracker::new(ram.clone(), p.offset);
                let region = ram.mapping.vm_region(p.offset, p.region.len, tracker)?;
                Ok(Arc::new(region_at(region, p.region.start)?))
            })
            .collect::<Result<Vec<_>, MemoryError>>()?;
        let vm = GuestMemoryMmap::from_arc_regions(vm)
            .map_err(|_| MemoryError::BadRegion { start: 0, len: total })?;
        Ok(Self { ram, regions: placed.into(), shadow: None, vm: Arc::new(vm) })
    }

    /// The same with shadow RAM: the two ranges of `area` are regions.
    ///
    /// # Errors
    /// As [`Self::with_files`]; [`MemoryError::BadRegion`] also where one of the ranges is no region.
    pub fn with_shadow(
        regions: &[Region],
        files: &[FileRegion],
        area: ShadowArea,
    ) -> Result<Self, MemoryError> {
        let mut memory = Self::with_files(regions, files)?;
        let place = |range: &std::ops::Range<u64>| {
            let len = range.end.wrapping_sub(range.start);
            let found = memory.regions.iter().find(|p| p.region.start == range.start && p.region.len == len);
            found.map(|p| p.offset).ok_or(MemoryError::BadRegion { start: range.start, len })
        };
        let shadow = Shadow::new(area.clone(), place(&area.ram)?, place(&area.rom)?);
        memory.shadow = Some(Arc::new(shadow));
        Ok(memory)
    }

    /// Says which accesses to `range` the shadow RAM answers. Whoever keeps what [`Self::locate`] gave has to ask again.
    pub fn set_shadowing(&self, range: std::ops::Range<u64>, shadowing: Shadowing) {
        if let Some(shadow) = &self.shadow {
            shadow.set(range, shadowing);
        }
    }

    /// A number that changes whenever [`Self::locate`] may give something else than before.
    #[inline]
    pub fn layout_generation(&self) -> u64 {
        self.shadow.as_ref().map_or(0, |shadow| shadow.generation())
    }

    /// The addresses of the shadow RAM, where there is one.
    pub fn shadow_area(&self) -> Option<std::ops::Range<u64>> {
        self.shadow.as_ref().map(|shadow| shadow.area().clone())
    }

    /// The same memory for devices and loaders. Writes through it reach read-only regions too.
    pub fn vm(&self) -> &GuestMemoryMmap<PageTracker> {
        &self.vm
    }

    /// The regions of RAM and ROM, in ascending order.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.regions.iter().filter(|p| !p.of_file).map(|p| p.region)
    }

    /// The same, and behind them those with files behind them: all that is memory.
    pub fn all_regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.regions.iter().map(|p| p.region)
    }

    /// Bytes of RAM and ROM, without what files are behind.
    pub fn ram_len(&self) -> u64 {
        self.regions().map(|region| region.len).sum()
    }

    /// Bytes of memory in all.
    pub fn len(&self) -> u64 {
        self.ram.mapping.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Dirty and code marks.
    pub fn marks(&self) -> &PageMarks {
        &self.ram.marks
    }

    /// Host address of an offset's first byte, for KVM's memory slots and the JIT. Valid while `self` or a clone lives.
    pub fn host_address(&self, offset: Offset) -> Option<u64> {
        (offset < self.len()).then(|| self.ram.mapping.host_address() + offset)
    }

    /// Where a guest-physical address lies, where RAM is behind it. All addresses of one page lie together.
    #[inline]
    pub fn locate(&self, address: u64) -> Option<Location> {
        self.regions.iter().find_map(|p| {
            let within = address.wrapping_sub(p.region.start);
            (within < p.region.len).then(|| match &self.shadow {
                Some(shadow) if shadow.area().start == p.region.start => shadow.locate(within),
                _ => Some(Location { offset: p.offset + within, read_only: p.region.read_only }),
            })
        })?
    }

    /// Where bytes lie that are plain RAM of one region: nothing of it is read-only, or comes and goes. Most are.
    #[inline]
    pub fn plain(&self, address: u64, len: u64) -> Option<Offset> {
        self.regions.iter().find_map(|p| {
            let within = address.wrapping_sub(p.region.start);
            let fits = within < p.region.len && len <= p.region.len - within && !p.region.read_only;
            fits.then(|| p.offset + within)
        })
    }

    /// The guest-physical address of an offset.
    pub fn address_of(&self, offset: Offset) -> Option<u64> {
        self.regions
            .iter()
            .find(|p| offset.wrapping_sub(p.offset) < p.region.len)
            .map(|p| p.region.start + (offset - p.offset))
    }

    /// One load of the scalar's width.
    ///
    /// # Panics
    /// Where the scalar does not lie within the RAM.
    #[inline(always)]
    pub fn load<T: Scalar>(&self, offset: Offset) -> T {
        self.ram.mapping.load(offset)
    }

    /// One store of the scalar's width. Marks nothing: the caller has looked at the page's marks.
    ///
    /// # Panics
    /// Where the scalar does not lie within the RAM.
    #[inline(always)]
    pub fn store<T: Scalar>(&self, offset: Offset, value: T) {
        self.ram.mapping.store(offset, value);
    }

    /// LOCK CMPXCHG: stores `new` where memory holds `expected`; gives what memory held.
    ///
    /// # Panics
    /// Where the scalar does not lie within the RAM.
    #[inline(always)]
    pub fn compare_exchange<T: Scalar>(&self, offset: Offset, expected: T, new: T) -> T {
        self.ram.mapping.compare_exchange(offset, expected, new)
    }

    /// LOCK CMPXCHG16B on a 16-byte aligned offset: gives what memory held.
    ///
    /// # Panics
    /// Where it is not aligned or does not lie within the RAM.
    pub fn compare_exchange_16(&self, offset: Offset, expected: u128, new: u128) -> u128 {
        self.ram.mapping.compare_exchange_16(offset, expected, new)
    }

    /// LOCK for what no one operation of the host can do, because it does not lie together: waits until nobody else holds
    /// the bus, and holds it. SDM vol. 3, *Bus Locking*.
    pub fn lock_bus(&self) -> BusLock {
        while self.ram.bus_locked.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
        BusLock(self.ram.clone())
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// Where they do not lie within the RAM.
    pub fn read_bytes(&self, offset: Offset, data: &mut [u8]) {
        self.ram.mapping.read_bytes(offset, data);
    }

    /// Copies bytes in. Marks nothing.
    ///
    /// # Panics
    /// Where they do not lie within the RAM.
    pub fn write_bytes(&self, offset: Offset, data: &[u8]) {
        self.ram.mapping.write_bytes(offset, data);
    }

    /// Copies bytes within the RAM, the first byte first, as REP MOVSB does: a destination that overlaps the source's
    /// end repeats its beginning. Marks nothing.
    ///
    /// # Panics
    /// Where either range does not lie within the RAM.
    pub fn copy_forward(&self, from: Offset, to: Offset, len: u64) {
        self.ram.mapping.copy_forward(from, to, len);
    }

    /// Stores the same value `count` times in a row. Marks nothing.
    ///
    /// # Panics
    /// Where the values do not lie within the RAM.
    pub fn fill<T: Scalar>(&self, offset: Offset, value: T, count: u64) {
        self.ram.mapping.fill(offset, value, count);
    }

    /// Gives the host's memory of whole pages back. The pages stay where they are and read as zeros; they are marked as
    /// written.
    ///
    /// # Errors
    /// [`MemoryError::NoRam`] where they do not lie in one region that the guest may write, or are not pages.
    pub fn discard(&self, address: u64, len: u64) -> Result<(), MemoryError> {
        let refused = MemoryError::NoRam(address);
        let whole = address.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        let within = |p: &&Placed| {
            let start = address.wrapping_sub(p.region.start);
            let is_ram = !p.region.read_only && !p.of_file;
            is_ram && start < p.region.len && len <= p.region.len - start
        };
        let Some(placed) = self.regions.iter().find(within).filter(|_| whole) else { return Err(refused) };
        let offset = placed.offset + (address - placed.region.start);
        self.ram.mapping.discard(offset, len);
        self.ram.marks.device_wrote(offset, len);
        Ok(())
    }

    /// Reads a scalar at a guest-physical address, as a page walk does. The scalar must not cross a page.
    pub fn load_physical<T: Scalar>(&self, address: u64) -> Option<T> {
        let location = self.locate(address)?;
        (location.offset + size_of::<T>() as u64 <= self.len()).then(|| self.load(location.offset))
    }
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.all_regions()).finish()
    }
}

fn place(regions: &[Region]) -> Result<Vec<Placed>, MemoryError> {
    let mut placed: Vec<Placed> = Vec::new();
    let mut offset = 0;
    let mut free_from = 0;
    for &region in regions {
        let Region { start, len, .. } = region;
        let end = start.checked_add(len).ok_or(MemoryError::BadRegion { start, len })?;
        if len == 0 || start % PAGE_SIZE != 0 || len % PAGE_SIZE != 0 || start < free_from {
            return Err(MemoryError::BadRegion { start, len });
        }
        placed.push(Placed { region, offset, of_file: false });
        offset += len;
        free_from = end;
    }
    Ok(placed)
}

fn region_at(
    region: MmapRegion<PageTracker>,
    start: u64,
) -> Result<GuestRegionMmap<PageTracker>, MemoryError> {
    let len = region.size() as u64;
    GuestRegionMmap::new(region, GuestAddress(start)).ok_or(MemoryError::BadRegion { start, len })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn split() -> GuestMemory {
        let region = |start, len, read_only| Region { start, len, read_only };
        GuestMemory::new(&[
            region(0, 0xa0000, false),
            region(0xe0000, 0x20000, true),
            region(0x1_0000_0000, 0x10000, false),
        ])
        .unwrap()
    }

    #[test]
    fn regions_lie_one_after_another() {
        let memory = split();
        assert_eq!(memory.len(), 0xd0000);
        assert_eq!(memory.locate(0xa0000), None);
        assert_eq!(memory.locate(0xe0010), Some(Location { offset: 0xa0010, read_only: true }));
        assert_eq!(memory.locate(0x1_0000_0000).unwrap().offset, 0xc0000);
        assert_eq!(memory.address_of(0xc0000), Some(0x1_0000_0000));
    }

    #[test]
    fn plain_memory_lies_in_one_region_that_can_be_written() {
        let memory = split();
        assert_eq!(memory.plain(0x9fff0, 16), Some(0x9fff0));
        assert_eq!(memory.plain(0x1_0000_fffc, 4), Some(0xcfffc));
        for (address, len) in [(0x9fff0, 17), (0xe0000, 1), (0xa0000, 1), (u64::MAX, 2), (8, u64::MAX)] {
            assert_eq!(memory.plain(address, len), None, "{address:#x}");
        }
    }

    #[test]
    fn copies_of_every_length_reach_their_bytes_and_no_others() {
        let memory = split();
        for len in 0..40 {
            memory.fill(0, 0xee_u8, 64);
            let bytes: Vec<u8> = (1..=len).collect();
            memory.write_bytes(3, &bytes);
            let mut all = [0; 64];
            memory.read_bytes(0, &mut all);
            assert!(
                all[..3] == [0xee; 3] && all[3..][..bytes.len()] == bytes && all[3 + bytes.len()] == 0xee
            );
            let mut back = vec![0; bytes.len()];
            memory.read_bytes(3, &mut back);
            assert_eq!(back, bytes);
        }
    }

    #[test]
    fn devices_and_the_cpu_see_the_same_bytes() {
        let memory = split();
        memory.vm().write_obj(0x1122_3344u32, GuestAddress(0x1_0000_0004)).unwrap();
        assert_eq!(memory.load::<u32>(0xc0004), 0x1122_3344);
        memory.store::<u64>(3, u64::MAX);
        assert_eq!(memory.vm().read_obj::<u16>(GuestAddress(2)).unwrap(), 0xff00);
    }

    #[test]
    fn overlapping_and_odd_regions_are_refused() {
        for (start, len) in [(0, 0), (0, 100), (12, 0x1000), (u64::MAX - 0xfff, 0x2000)] {
            assert!(GuestMemory::new(&[Region { start, len, read_only: false }]).is_err());
        }
        let region = Region { start: 0, len: 0x2000, read_only: false };
        assert!(GuestMemory::new(&[region, Region { start: 0x1000, ..region }]).is_err());
    }

    #[test]
    fn shadow_ram_hides_and_shows_page_by_page() {
        let region = |range: std::ops::Range<u64>, read_only| Region {
            start: range.start,
            len: range.end - range.start,
            read_only,
        };
        let area = ShadowArea { ram: 0xc_0000..0x10_0000, rom: 0xfffc_0000..0x1_0000_0000, shown: 0x2_0000 };
        let regions =
            [region(0..0xa_0000, false), region(area.ram.clone(), true), region(area.rom.clone(), true)];
        let memory = GuestMemory::with_shadow(&regions, &[], area.clone()).unwrap();
        let rom = |address: u64| memory.locate(address).unwrap();
        assert_eq!(memory.locate(0xd_ffff), None, "no ROM shows there");
        assert_eq!(memory.locate(0xe_0000), Some(rom(0xfffe_0000)));
        assert_eq!(memory.locate(0xf_fff0), Some(rom(0xffff_fff0)));
        let before = memory.layout_generation();
        memory.set_shadowing(0xf_0000..0x10_0000, Shadowing { read: true, write: true });
        assert_ne!(memory.layout_generation(), before);
        assert_eq!(memory.locate(0xe_ffff), Some(rom(0xfffe_ffff)));
        let ram = memory.locate(0xf_0010).unwrap();
        assert_eq!((ram.offset, ram.read_only), (0xa_0000 + 0x3_0010, false));
        memory.set_shadowing(0xf_0000..0xf_4000, Shadowing { read: true, write: false });
        assert_eq!(memory.locate(0xf_0010), Some(Location { read_only: true, ..ram }));
        assert!(!memory.locate(0xf_4000).unwrap().read_only);
        memory.set_shadowing(0xc_0000..0x10_0000, Shadowing { read: false, write: false });
        assert_eq!(memory.locate(0xf_0010), Some(rom(0xffff_0010)));
        let missing = ShadowArea { rom: 0..0x1000, ..area };
        assert!(GuestMemory::with_shadow(&regions, &[], missing).is_err());
    }

    #[test]
    fn discarded_pages_are_zeros_and_take_no_memory_of_the_host() {
        let memory = split();
        memory.write_bytes(0x2ff0, &[7; 0x5000]);
        memory.discard(0x3000, 0x4000).unwrap();
        assert_eq!(
            (memory.load::<u64>(0x2ff8), memory.load::<u64>(0x7000)),
            (0x0707_0707_0707_0707, 0x0707_0707_0707_0707)
        );
        assert_eq!((memory.load::<u64>(0x3000), memory.load::<u64>(0x6ff8)), (0, 0));
        assert!(memory.marks().is_dirty(0x6000) && !memory.marks().is_dirty(0x7000));
        for (address, len) in
            [(0x3001, 0x1000), (0x3000, 1), (0xe0000, 0x1000), (0x9f000, 0x2000), (0xa0000, 0x1000)]
        {
            assert!(memory.discard(address, len).is_err(), "{address:#x}");
        }
    }

    #[test]
    #[should_panic(expected = "outside the RAM")]
    fn a_scalar_past_the_end_panics_instead_of_reaching_the_host() {
        split().load::<u64>(0xd0000 - 4);
    }

    #[test]
    fn a_fill_stores_each_scalar_and_nothing_else() {
        let memory = split();
        memory.fill::<u32>(3, 0x0102_0304, 3);
        let mut bytes = [0; 17];
        memory.read_bytes(1, &mut bytes);
        assert_eq!(bytes, [0, 0, 4, 3, 2, 1, 4, 3, 2, 1, 4, 3, 2, 1, 0, 0, 0]);
    }

    #[test]
    fn compare_exchange_gives_what_memory_held() {
        let memory = split();
        assert_eq!(memory.compare_exchange::<u16>(1, 0, 7), 0);
        assert_eq!(memory.compare_exchange::<u16>(1, 0, 9), 7);
        assert_eq!(memory.load::<u16>(1), 7);
        assert_eq!(memory.compare_exchange_16(32, 0, 5 << 64), 0);
        assert_eq!(memory.load::<u64>(40), 5);
    }
}
