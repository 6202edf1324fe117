//! What is known of each page: whether it was written, and whether translated code came from it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use zerocopy::FromZeros;

use crate::turns::{DeviceTurn, Turns};
use crate::{Offset, PAGE_SIZE, Ram};

const CODE: u32 = 1;
const DIRTY: u32 = 2;
/// A page's generation counts in the bits above.
const GENERATION: u32 = 4;

/// One word a page: a generation that changes whenever a page that held translated code is written, a code mark
/// and a dirty mark.
///
/// A vCPU that translates code from a page sets the code mark first ([`PageMarks::mark_code`]), keeps the generation
/// that it gets, and compares it before it runs the translation again. A vCPU whose translation tables let it
/// write to the page without looking must have dropped that entry by then.
#[derive(Debug)]
pub struct PageMarks(Box<[AtomicU32]>, DeviceWrites);

/// What devices wrote, where somebody wants to know: offsets and lengths in bytes; and when they may.
type DeviceWrites = OnceLock<(Mutex<Vec<(Offset, u64)>>, Turns)>;

impl PageMarks {
    /// Clear marks for so many pages; `None` where the host has no memory for them. What is never used takes none.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        <[AtomicU32]>::new_box_zeroed_with_elems(usize::try_from(pages).ok()?)
            .ok()
            .map(|words| Self(words, DeviceWrites::new()))
    }

    /// From now on [`PageMarks::take_device_writes`] tells where devices wrote, and devices' threads write only while the one
    /// vCPU has no turn.
    pub fn log_device_writes(&self) {
        let _ = self.1.set(Default::default());
    }

    /// Whether [`PageMarks::log_device_writes`] was called: what devices do must not depend on when they do it.
    pub fn are_device_writes_logged(&self) -> bool {
        self.1.get().is_some()
    }

    /// Waits until a device's thread may write to RAM in a way that the guest sees, and holds the vCPU off until it is
    /// dropped. It costs nothing unless [`PageMarks::log_device_writes`] was called.
    pub fn device_turn(&self) -> DeviceTurn<'_> {
        Turns::of_device(self.1.get().map(|(_, turns)| turns))
    }

    /// The vCPU's turn begins: devices' threads wait.
    pub fn begin_vcpu_turn(&self) {
        if let Some((_, turns)) = self.1.get() {
            turns.begin();
        }
    }

    /// The vCPU's turn ends: it sleeps, or asks a device.
    pub fn end_vcpu_turn(&self) {
        if let Some((_, turns)) = self.1.get() {
            turns.end();
        }
    }

    /// In the vCPU's turn: lets devices go first that wait; whether some have written to RAM since the last time.
    #[inline]
    pub fn let_devices(&self) -> bool {
        self.1.get().is_some_and(|(_, turns)| turns.let_devices())
    }

    /// Where devices wrote since the last call, as offsets and lengths in bytes; nothing unless
    /// [`PageMarks::log_device_writes`] was called.
    pub fn take_device_writes(&self) -> Vec<(Offset, u64)> {
        let log =
            |log: &Mutex<Vec<_>>| std::mem::take(&mut *log.lock().unwrap_or_else(PoisonError::into_inner));
        self.1.get().map(|(writes, _)| log(writes)).unwrap_or_default()
    }

    /// Marks the page at an offset as holding translated code. Gives its generation, and whether the mark is new.
    pub fn mark_code(&self, offset: Offset) -> (u32, bool) {
        let before = self.word(offset).fetch_or(CODE, Ordering::SeqCst);
        (before / GENERATION, before & CODE == 0)
    }

    /// The page's generation.
    #[inline]
    pub fn generation(&self, offset: Offset) -> u32 {
        self.word(offset).load(Ordering::Relaxed) / GENERATION
    }

    /// All that is known of the page, in one word that changes whenever its generation does.
    pub fn state(&self, offset: Offset) -> u32 {
        self.word(offset).load(Ordering::SeqCst)
    }

    /// Where the page's word is, for translated code that compares it. Good while the memory lives.
    pub fn state_address(&self, offset: Offset) -> u64 {
        self.word(offset).as_ptr() as u64
    }

    /// Whether the page holds translated code, so that a write must come through [`PageMarks::written`].
    #[inline]
    pub fn is_code(&self, offset: Offset) -> bool {
        self.word(offset).load(Ordering::SeqCst) & CODE != 0
    }

    /// Notes a write to the page at an offset: it is dirty now, and translations of its code are stale.
    /// Gives whether it held translated code.
    pub fn written(&self, offset: Offset) -> bool {
        let word = self.word(offset);
        if word.load(Ordering::SeqCst) & (CODE | DIRTY) == DIRTY {
            return false;
        }
        let next = |old: u32| {
            let bumped = if old & CODE != 0 { old.wrapping_add(GENERATION) } else { old };
            Some(bumped & !CODE | DIRTY)
        };
        word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, next).is_ok_and(|old| old & CODE != 0)
    }

    /// Notes what a device wrote, byte by byte or in one go: [`Self::written`] for each page.
    pub fn device_wrote(&self, offset: Offset, len: u64) {
        if let Some((log, _)) = self.1.get() {
            log.lock().unwrap_or_else(PoisonError::into_inner).push((offset, len));
        }
        let end = offset.saturating_add(len).div_ceil(PAGE_SIZE);
        for page in offset / PAGE_SIZE..end.min(self.0.len() as u64) {
            self.written(page * PAGE_SIZE);
        }
    }

    /// Whether the page was written since the last [`PageMarks::clean`].
    pub fn is_dirty(&self, offset: Offset) -> bool {
        self.word(offset).load(Ordering::SeqCst) & DIRTY != 0
    }

    /// Makes the page clean; gives whether it was dirty.
    pub fn clean(&self, offset: Offset) -> bool {
        self.word(offset).fetch_and(!DIRTY, Ordering::SeqCst) & DIRTY != 0
    }

    #[inline]
    fn word(&self, offset: Offset) -> &AtomicU32 {
        &self.0[(offset / PAGE_SIZE) as usize]
    }
}

/// The marks of one region's pages, as `vm-memory` wants them: every write of a device comes through here.
#[derive(Clone, Debug)]
pub struct PageTracker {
    ram: Arc<Ram>,
    base: Offset,
}

impl PageTracker {
    pub(crate) fn new(ram: Arc<Ram>, base: Offset) -> Self {
        Self { ram, base }
    }
}

impl WithBitmapSlice<'_> for PageTracker {
    type S = PageTracker;
}

impl BitmapSlice for PageTracker {}

impl Bitmap for PageTracker {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.ram.marks.device_wrote(self.base + offset as u64, len as u64);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.ram.marks.is_dirty(self.base + offset as u64)
    }
    fn slice_at(&self, offset: usize) -> Self {
        Self { ram: self.ram.clone(), base: self.base + offset as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_to_a_code_page_makes_its_translations_stale_once() {
        let marks = PageMarks::new(2).unwrap();
        let (generation, new) = marks.mark_code(4096);
        assert!(new && !marks.mark_code(4097).1);
        assert!(marks.written(5000));
        assert_ne!(marks.generation(4096), generation);
        assert!(!marks.written(5000) && !marks.is_code(4096));
        assert!(marks.is_dirty(4096) && !marks.is_dirty(0));
    }

    #[test]
    fn a_device_write_marks_every_page_it_touches() {
        let memory =
            crate::GuestMemory::new(&[crate::Region { start: 0, len: 0x4000, read_only: false }]).unwrap();
        PageTracker::new(memory.ram.clone(), 4096).slice_at(4000).mark_dirty(0, 200);
        let dirty: Vec<_> = (0..4).map(|p| memory.marks().is_dirty(p * 4096)).collect();
        assert_eq!(dirty, [false, true, true, false]);
    }

    #[test]
    fn what_devices_wrote_is_told_once_where_somebody_asked_for_it() {
        let memory =
            crate::GuestMemory::new(&[crate::Region { start: 0, len: 0x4000, read_only: false }]).unwrap();
        let device = PageTracker::new(memory.ram.clone(), 4096).slice_at(8);
        device.mark_dirty(0, 4);
        assert_eq!(memory.marks().take_device_writes(), []);
        memory.marks().log_device_writes();
        device.mark_dirty(0, 4);
        memory.marks().written(0);
        assert_eq!(memory.marks().take_device_writes(), [(4096 + 8, 4)]);
        assert_eq!(memory.marks().take_device_writes(), []);
    }
}
