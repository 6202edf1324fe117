//! Loads and stores of the guest: the fast way through the translation cache, and the slow way for everything else.

use engine::Space;
use guest_memory::Offset;
use x86::descriptor::Attributes;
use x86::{Exception, SegmentRegister, Vector};

use super::tlb::{Allowed, Mapping};
use super::{Access, Translation, View};
use crate::cpu::Cpu;
use crate::insn::{FLAT, Insn, Stop, flag};
use crate::width::Width;

/// What is behind one page of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// RAM, at its offset.
    Ram(Offset),
    /// RAM whose stores are discarded.
    ReadOnly(Offset),
    /// A device register, or nothing: a guest-physical address.
    Device(u64),
}

impl Target {
    /// Its place in RAM.
    pub fn offset(self) -> Option<Offset> {
        match self {
            Self::Ram(offset) | Self::ReadOnly(offset) => Some(offset),
            Self::Device(_) => None,
        }
    }
}

/// Where a read-modify-write happens: translated, checked for writing, not yet accessed.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// RAM within one page.
    Ram(Offset),
    /// Anything else: the first page's target, the second's where the operand crosses, and the bytes in the first.
    Slow(Target, Option<Target>, u64),
}

impl Cpu {
    /// The memory operand's effective address, within its segment.
    #[inline(always)]
    pub fn effective(&self, insn: &Insn) -> u64 {
        self.registers
            .get(insn.base)
            .wrapping_add(self.registers.get(insn.index) << insn.scale)
            .wrapping_add(insn.disp)
            & insn.address_mask()
    }

    /// The memory operand's linear address. Checks the segment outside 64-bit mode.
    ///
    /// # Errors
    /// [`Stop::Fault`] with #GP or #SS for what the segment does not allow.
    #[inline(always)]
    pub fn linear<const WRITE: bool>(&mut self, insn: &Insn, size: u64) -> Result<u64, Stop> {
        let offset = self.effective(insn);
        if insn.has(flag::CHECKED) {
            return self.segmented(insn.segment, offset, size, WRITE);
        }
        Ok(offset.wrapping_add(self.bases[usize::from(insn.segment & 7)]))
    }

    /// A linear address through a segment with all checks. SDM vol. 3, *Limit Checking* and *Type Checking*.
    ///
    /// # Errors
    /// [`Stop::Fault`] with #SS(0) for the stack segment, #GP(0) for others.
    pub fn segmented(&mut self, segment: u8, offset: u64, size: u64, write: bool) -> Result<u64, Stop> {
        let register = &self.segments[usize::from(segment).min(5)];
        let (attributes, limit) = (register.attributes, u64::from(register.limit));
        let linear = offset.wrapping_add(register.base) & 0xffff_ffff;
        let last = offset.wrapping_add(size - 1);
        let in_limit =
            if attributes.contains(Attributes::EXPAND_DOWN) && !attributes.contains(Attributes::CODE) {
                let top = if attributes.contains(Attributes::DB) { 0xffff_ffff } else { 0xffff };
                offset > limit && last <= top
            } else {
                // With the largest limit an operand may go round the top, but only where nothing is added to it.
                last <= limit || limit == 0xffff_ffff && register.base == 0
            };
        let writable = attributes.contains(Attributes::WRITABLE) && !attributes.contains(Attributes::CODE);
        let readable = !attributes.contains(Attributes::CODE) || attributes.contains(Attributes::WRITABLE);
        let real = self.mode.is_real_or_v86();
        let typed = real || if write { writable } else { readable };
        if in_limit
            && typed
            && !attributes.contains(Attributes::UNUSABLE)
            && attributes.contains(Attributes::P)
        {
            return Ok(linear);
        }
        let stack = segment == SegmentRegister::Ss as u8;
        let vector = if stack { Vector::StackFault } else { Vector::GeneralProtection };
        Err(self.raise(Exception::with_code(vector, 0)))
    }

    /// Loads the memory operand.
    ///
    /// # Errors
    /// [`Stop::Fault`] with the fault that the access raises.
    #[inline(always)]
    pub fn load<T: Width>(&mut self, insn: &Insn) -> Result<T, Stop> {
        let linear = self.linear::<false>(insn, u64::from(T::BITS / 8))?;
        self.load_linear(linear)
    }

    /// Stores to the memory operand.
    ///
    /// # Errors
    /// [`Stop::Fault`] with the fault that the access raises, [`Stop::OwnPage`].
    #[inline(always)]
    pub fn store<T: Width>(&mut self, insn: &Insn, value: T) -> Result<(), Stop> {
        let linear = self.linear::<true>(insn, u64::from(T::BITS / 8))?;
        self.store_linear(linear, value)
    }

    /// Prepares a read-modify-write of the memory operand.
    ///
    /// # Errors
    /// As [`Cpu::store`].
    #[inline(always)]
    pub fn place<T: Width>(&mut self, insn: &Insn) -> Result<Place, Stop> {
        let linear = self.linear::<true>(insn, u64::from(T::BITS / 8))?;
        self.place_linear(linear, u64::from(T::BITS / 8))
    }

    /// Loads at a linear address with the rights of the present view.
    ///
    /// # Errors
    /// [`Stop::Fault`].
    #[inline(always)]
    pub fn load_linear<T: Width>(&mut self, linear: u64) -> Result<T, Stop> {
        self.load_as(self.mmu.view, linear)
    }

    /// Stores at a linear address with the rights of the present view.
    ///
    /// # Errors
    /// [`Stop::Fault`], [`Stop::OwnPage`].
    #[inline(always)]
    pub fn store_linear<T: Width>(&mut self, linear: u64, value: T) -> Result<(), Stop> {
        self.store_as(self.mmu.view, linear, value)
    }

    /// Loads with the rights of a view: system tables are read as [`View::Supervisor`] at any CPL.
    ///
    /// # Errors
    /// [`Stop::Fault`].
    #[inline(always)]
    pub fn load_as<T: Width>(&mut self, view: View, linear: u64) -> Result<T, Stop> {
        match self.mmu.tlb.read(view, linear, u64::from(T::BITS / 8)) {
            Some(offset) => Ok(self.memory.load(offset)),
            None => self.load_slow(view, linear, T::BITS / 8).map(T::truncate),
        }
    }

    /// Stores with the rights of a view.
    ///
    /// # Errors
    /// [`Stop::Fault`], [`Stop::OwnPage`].
    #[inline(always)]
    pub fn store_as<T: Width>(&mut self, view: View, linear: u64, value: T) -> Result<(), Stop> {
        match self.mmu.tlb.write(view, linear, u64::from(T::BITS / 8)) {
            Some(offset) => {
                self.memory.store(offset, value);
                Ok(())
            }
            None => self.store_slow(view, linear, T::BITS / 8, value.zext()),
        }
    }

    /// Prepares a read-modify-write of `size` bytes at a linear address.
    ///
    /// # Errors
    /// As [`Cpu::store`].
    #[inline(always)]
    pub fn place_linear(&mut self, linear: u64, size: u64) -> Result<Place, Stop> {
        match self.mmu.tlb.write(self.mmu.view, linear, size) {
            Some(offset) => Ok(Place::Ram(offset)),
            None => self.place_slow(self.mmu.view, linear, size, Access::Write),
        }
    }

    /// Loads from a place.
    #[inline(always)]
    pub fn load_place<T: Width>(&mut self, place: Place) -> T {
        match place {
            Place::Ram(offset) => self.memory.load(offset),
            Place::Slow(..) => {
                let mut bytes = [0; 8];
                self.read_place(place, &mut bytes[..T::BITS as usize / 8]);
                T::truncate(u64::from_le_bytes(bytes))
            }
        }
    }

    /// Stores to a place.
    #[inline(always)]
    pub fn store_place<T: Width>(&mut self, place: Place, value: T) {
        match place {
            Place::Ram(offset) => self.memory.store(offset, value),
            Place::Slow(..) => self.write_place(place, &value.zext().to_le_bytes()[..T::BITS as usize / 8]),
        }
    }

    /// Replaces a place's value by `change` of it, as one atomic operation; where it does not lie in one page of RAM,
    /// that holds among those that do not.
    /// Gives the old value.
    #[inline(always)]
    pub fn exchange_place<T: Width>(&mut self, place: Place, mut change: impl FnMut(T) -> T) -> T {
        let Place::Ram(offset) = place else { return self.exchange_slow(place, change) };
        let mut old = self.memory.load(offset);
        loop {
            let held = self.memory.compare_exchange(offset, old, change(old));
            if held == old {
                return old;
            }
            old = held;
        }
    }

    /// Two pages, or a device: no one operation of the host does it. Others that want the same wait.
    #[cold]
    #[inline(never)]
    fn exchange_slow<T: Width>(&mut self, place: Place, mut change: impl FnMut(T) -> T) -> T {
        let _lock = self.memory.lock_bus();
        let old = self.load_place(place);
        self.store_place(place, change(old));
        old
    }

    /// Finds where one page of an access lies; fills the translation cache.
    ///
    /// # Errors
    /// [`Stop::Fault`] with the page fault, #GP(0) for a non-canonical address; [`Stop::OwnPage`] for a store to the
    /// page that the running block came from.
    pub fn target(&mut self, view: View, linear: u64, access: Access) -> Result<Target, Stop> {
        let found = match access {
            Access::Read => self.mmu.tlb.read(view, linear, 1),
            Access::Write => self.mmu.tlb.write(view, linear, 1),
            Access::Fetch => self.mmu.tlb.fetch(view, linear),
        };
        if let Some(offset) = found {
            return Ok(Target::Ram(offset));
        }
        let linear = if access == Access::Fetch { linear } else { self.mmu.paging.masked(linear) };
        if !self.mmu.paging.is_canonical(linear) {
            // Which of #GP and #SS it is, `refine_fault` finds out.
            return Err(self.raise(Exception { address: linear, ..Exception::gp(0) }));
        }
        let translation =
            self.mmu.paging.walk(&self.memory, linear, access, view).map_err(|fault| self.raise(fault))?;
        let Some(location) = self.memory.locate(translation.physical) else {
            return Ok(Target::Device(translation.physical));
        };
        let offset = location.offset;
        let page = offset & !0xfff;
        if access == Access::Write && location.read_only {
            // Nothing changes, but who owns the page may want to know of it.
            self.memory.marks().written(offset);
        } else if access == Access::Write {
            // Even where the page is not marked as code any more: then somebody else wrote to it since the block was found
            // good, and nothing else would keep its old instructions from being executed behind this store.
            if self.mmu.executing.contains(&page) {
                return Err(Stop::OwnPage);
            }
            self.memory.marks().written(offset);
        }
        // Breakpoints and alignment are checked where nothing is cached.
        let cached = view != View::UserAligned && !self.breakpoints.in_data_page(linear);
        let allowed = Allowed {
            read: translation.readable && cached,
            write: access == Access::Write && cached && translation.writable && !location.read_only,
            fetch: translation.executable,
        };
        let Translation { size_bits, key, global, .. } = translation;
        self.mmu.tlb.insert(view, linear, Mapping { offset, allowed, size_bits, key, global });
        Ok(if location.read_only { Target::ReadOnly(offset) } else { Target::Ram(offset) })
    }

    /// Makes #GP(0) for a non-canonical address #SS(0) where `insn` reached it through the stack segment: with RSP or
    /// RBP as its base, or by a push or pop.
    pub fn refine_fault(&mut self, insn: &Insn) {
        let Some(fault) = self.fault.filter(|f| f.vector == Vector::GeneralProtection && f.address != 0)
        else {
            return;
        };
        let operand = self.effective(insn).wrapping_add(self.bases[usize::from(insn.segment & 7)]);
        let operand = self.mmu.paging.masked(operand);
        // What is neither the operand nor beside it is what a push or pop reaches; or a bit far from a BT's operand.
        let stack = if insn.has(flag::STACK) && fault.address.wrapping_sub(operand) >= 64 {
            true
        } else {
            matches!(insn.base, 4 | 5) && insn.segment == FLAT
        };
        let vector = if stack { Vector::StackFault } else { Vector::GeneralProtection };
        self.fault = Some(Exception::with_code(vector, 0));
    }

    #[cold]
    #[inline(never)]
    fn place_slow(&mut self, view: View, linear: u64, size: u64, access: Access) -> Result<Place, Stop> {
        let linear = self.mmu.paging.masked(linear);
        self.watch_data(linear, size, access)?;
        let in_first = 4096 - (linear & 0xfff);
        if view == View::UserAligned && (!self.mode.is_64() || self.mmu.paging.is_canonical(linear)) {
            // The processor finds it before it has translated the address, and before the end of it is canonical.
            self.check_alignment(linear, size)?;
        }
        // All of it must be canonical before any of it is looked up.
        let last = linear.wrapping_add(size - 1);
        if self.mode.is_64() && !self.mmu.paging.is_canonical(last) {
            return Err(self.raise(Exception { address: last, ..Exception::gp(0) }));
        }
        let first = self.target(view, linear, access)?;
        if in_first >= size {
            return Ok(match first {
                Target::Ram(offset) => Place::Ram(offset),
                other => Place::Slow(other, None, size),
            });
        }
        let second = self.target(view, self.wrap(linear.wrapping_add(in_first)), access)?;
        Ok(Place::Slow(first, Some(second), in_first))
    }

    /// Finds where `size` bytes lie for an access with the rights of the present view.
    ///
    /// # Errors
    /// As [`Cpu::target`].
    pub fn place_for(&mut self, linear: u64, size: u64, access: Access) -> Result<Place, Stop> {
        self.place_slow(self.mmu.view, linear, size, access)
    }

    /// The same for an instruction that never checks alignment.
    ///
    /// # Errors
    /// As [`Cpu::target`].
    pub fn place_unchecked(&mut self, linear: u64, size: u64, access: Access) -> Result<Place, Stop> {
        let view = if self.mmu.view == View::UserAligned { View::User } else { self.mmu.view };
        self.place_slow(view, linear, size, access)
    }

    /// #AC where an operand of 2, 4 or 8 bytes, or one of x87's, is not aligned. Others have their own rules.
    ///
    /// # Errors
    /// #AC.
    pub(crate) fn check_alignment(&mut self, linear: u64, size: u64) -> Result<(), Stop> {
        let alignment = match size {
            2 | 4 | 8 => size,
            10 => 8,
            // x87's environment and state, by operand size.
            14 | 94 => 2,
            28 | 108 => 4,
            _ => 1,
        };
        if linear.is_multiple_of(alignment) {
            return Ok(());
        }
        Err(self.raise(Exception::with_code(Vector::AlignmentCheck, 0)))
    }

    /// Linear addresses have 32 bits outside 64-bit mode.
    fn wrap(&self, linear: u64) -> u64 {
        if self.mode.is_64() { linear } else { linear & 0xffff_ffff }
    }

    #[cold]
    #[inline(never)]
    fn load_slow(&mut self, view: View, linear: u64, size: u32) -> Result<u64, Stop> {
        let mut bytes = [0; 8];
        let place = self.place_slow(view, linear, u64::from(size), Access::Read)?;
        self.read_place(place, &mut bytes[..size as usize]);
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    #[inline(never)]
    fn store_slow(&mut self, view: View, linear: u64, size: u32, value: u64) -> Result<(), Stop> {
        let place = self.place_slow(view, linear, u64::from(size), Access::Write)?;
        self.write_place(place, &value.to_le_bytes()[..size as usize]);
        Ok(())
    }

    /// Copies `data.len()` bytes out of a place, 64 at most.
    pub fn read_place(&mut self, place: Place, data: &mut [u8]) {
        match place {
            Place::Ram(offset) => self.read_target(Target::Ram(offset), data),
            Place::Slow(first, second, in_first) => {
                let (head, tail) = data.split_at_mut((in_first as usize).min(data.len()));
                self.read_target(first, head);
                if let Some(second) = second {
                    self.read_target(second, tail);
                }
            }
        }
    }

    /// Copies bytes into a place, 64 at most.
    pub fn write_place(&mut self, place: Place, data: &[u8]) {
        match place {
            Place::Ram(offset) => self.write_target(Target::Ram(offset), data),
            Place::Slow(first, second, in_first) => {
                let (head, tail) = data.split_at((in_first as usize).min(data.len()));
                self.write_target(first, head);
                if let Some(second) = second {
                    self.write_target(second, tail);
                }
            }
        }
    }

    fn read_target(&mut self, target: Target, data: &mut [u8]) {
        match target {
            Target::Ram(offset) | Target::ReadOnly(offset) => match data.len() {
                2 => data.copy_from_slice(&self.memory.load::<u16>(offset).to_le_bytes()),
                4 => data.copy_from_slice(&self.memory.load::<u32>(offset).to_le_bytes()),
                8 => data.copy_from_slice(&self.memory.load::<u64>(offset).to_le_bytes()),
                _ => self.memory.read_bytes(offset, data),
            },
            Target::Device(address) => each_register(address, data.len(), |at, range| {
                self.wires.bus.read(Space::Memory, at, &mut data[range]);
            }),
        }
    }

    fn write_target(&mut self, target: Target, data: &[u8]) {
        match (target, data.len()) {
            (Target::Ram(offset), 2) => self.memory.store(offset, u16::from_le_bytes([data[0], data[1]])),
            (Target::Ram(offset), 4) => {
                self.memory.store(offset, data.first_chunk().map_or(0, |b| u32::from_le_bytes(*b)));
            }
            (Target::Ram(offset), 8) => {
                self.memory.store(offset, data.first_chunk().map_or(0, |b| u64::from_le_bytes(*b)));
            }
            (Target::Ram(offset), _) => self.memory.write_bytes(offset, data),
            (Target::ReadOnly(_), _) => {}
            (Target::Device(address), len) => each_register(address, len, |at, range| {
                self.wires.bus.write(Space::Memory, at, &data[range]);
            }),
        }
    }

    /// Reads bytes at a linear address through any number of pages.
    ///
    /// # Errors
    /// [`Stop::Fault`] for the first byte that cannot be read.
    pub fn read_bytes(&mut self, view: View, linear: u64, data: &mut [u8]) -> Result<(), Stop> {
        self.each_page(view, linear, data.len(), Access::Read, |cpu, target, range| {
            cpu.read_target(target, &mut data[range]);
        })
    }

    /// Reads instruction bytes, all of them in one page.
    ///
    /// # Errors
    /// [`Stop::Fault`] with the fetch's page fault.
    pub fn fetch_bytes(&mut self, view: View, linear: u64, data: &mut [u8]) -> Result<(), Stop> {
        let target = self.target(view, self.wrap(linear), Access::Fetch)?;
        self.read_target(target, data);
        Ok(())
    }

    /// Writes bytes at a linear address through any number of pages. All of them are checked first.
    ///
    /// # Errors
    /// [`Stop::Fault`] for the first byte that cannot be written, with nothing written; [`Stop::OwnPage`].
    pub fn write_bytes(&mut self, view: View, linear: u64, data: &[u8]) -> Result<(), Stop> {
        self.each_page(view, linear, data.len(), Access::Write, |_, _, _| {})?;
        self.each_page(view, linear, data.len(), Access::Write, |cpu, target, range| {
            cpu.write_target(target, &data[range]);
        })
    }

    /// Checks that bytes can be written, and writes none: for what is read before it is written, whose fault is a
    /// write's.
    ///
    /// # Errors
    /// [`Stop::Fault`] for the first byte that cannot be written.
    pub fn probe_write(&mut self, view: View, linear: u64, len: usize) -> Result<(), Stop> {
        self.each_page(view, linear, len, Access::Write, |_, _, _| {})
    }

    fn each_page(
        &mut self,
        view: View,
        linear: u64,
        len: usize,
        access: Access,
        mut work: impl FnMut(&mut Self, Target, std::ops::Range<usize>),
    ) -> Result<(), Stop> {
        let linear = self.mmu.paging.masked(linear);
        self.watch_data(linear, len as u64, access)?;
        let mut done = 0;
        while done < len {
            let at = self.wrap(linear.wrapping_add(done as u64));
            let part = (4096 - (at & 0xfff) as usize).min(len - done);
            let target = self.target(view, at, access)?;
            work(self, target, done..done + part);
            done += part;
        }
        Ok(())
    }
}

/// Splits an access to devices into naturally aligned ones of 1, 2, 4 or 8 bytes.
fn each_register(address: u64, len: usize, mut access: impl FnMut(u64, std::ops::Range<usize>)) {
    if matches!(len, 1 | 2 | 4 | 8) {
        return access(address, 0..len);
    }
    let mut done = 0;
    while done < len {
        let at = address + done as u64;
        let fit =
            [8, 4, 2, 1].into_iter().find(|&n| n <= len - done && at.is_multiple_of(n as u64)).unwrap_or(1);
        access(at, done..done + fit);
        done += fit;
    }
}
