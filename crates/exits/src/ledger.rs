use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard};

use x86::ExitReason;

use crate::{Detail, Exit, Histogram, ticks};

/// How many details of one reason a vCPU tells apart; the guest chooses addresses, so there must be a bound.
pub const MAX_DETAILS: usize = 256;

/// The exits of one machine. Clones share it.
///
/// ```
/// use exits::{Exit, Ledger, Report, ticks};
/// let ledger = Ledger::new();
/// let recorder = ledger.recorder(0);
/// let start = ticks();
/// // ... handle the exit ...
/// recorder.record(Exit::new(x86::ExitReason::Cpuid), ticks() - start);
/// let report = Report::new(&ledger, 2_400_000_000, &|_| None);
/// assert_eq!(report.reasons[0].reason, "CPUID");
/// ```
#[derive(Clone, Debug)]
pub struct Ledger {
    started: u64,
    books: Arc<Mutex<BTreeMap<u32, Recorder>>>,
}

/// One vCPU's way into the ledger. Clones write to the same place.
#[derive(Clone, Debug)]
pub struct Recorder(Arc<Mutex<Book>>);

/// What a tally says: how many, how long in all, the longest, and the distribution. In ticks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) count: u64,
    pub(crate) ticks: u64,
    pub(crate) longest: u64,
    pub(crate) histogram: Histogram,
}

/// One vCPU's exits for one reason.
#[derive(Clone, Debug, Default)]
pub(crate) struct Page {
    pub(crate) all: Tally,
    pub(crate) details: Vec<(Detail, Tally)>,
    /// What found no place among the details.
    pub(crate) others: Tally,
    places: HashMap<Detail, usize, BuildHasherDefault<FastHasher>>,
    /// The place of the last exit: the next one is often at the same register.
    last: usize,
}

/// One vCPU's exits, by the reason's number.
#[derive(Debug)]
struct Book {
    pages: Vec<Option<Box<Page>>>,
    kernel: Option<KernelCounts>,
}

/// What one vCPU's engine handled in the host's kernel, where exits are counted but not timed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelCounts {
    /// All exits of the vCPU, those that were recorded one by one included.
    pub exits: u64,
    /// How long it was halted there, in nanoseconds.
    pub halted_ns: u64,
    /// Those that the kernel tells apart, without those that were recorded.
    pub by_reason: Vec<(ExitReason, u64)>,
}

impl Default for Ledger {
    fn default() -> Self {
        Self::new()
    }
}

impl Ledger {
    /// An empty ledger; the machine starts now.
    pub fn new() -> Self {
        Self { started: ticks(), books: Arc::default() }
    }

    /// The recorder of a vCPU; the same one for the same number.
    pub fn recorder(&self, vcpu: u32) -> Recorder {
        self.lock().entry(vcpu).or_insert_with(Recorder::new).clone()
    }

    /// Ticks since the machine started.
    pub(crate) fn elapsed(&self) -> u64 {
        ticks().saturating_sub(self.started)
    }

    /// A copy of each vCPU's pages.
    pub(crate) fn pages(&self) -> Vec<(u32, Vec<(ExitReason, Page)>)> {
        self.lock().iter().map(|(&vcpu, recorder)| (vcpu, recorder.pages())).collect()
    }

    /// What the kernel counted, by vCPU.
    pub(crate) fn kernel_counts(&self) -> Vec<KernelCounts> {
        self.lock().values().filter_map(|recorder| recorder.lock().kernel.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, Recorder>> {
        self.books.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Recorder {
    fn new() -> Self {
        let highest = ExitReason::ALL.iter().map(|&r| r as usize).max().unwrap_or(0);
        Self(Arc::new(Mutex::new(Book { pages: (0..=highest).map(|_| None).collect(), kernel: None })))
    }

    /// Counts an exit that took so many [`ticks`] to handle (HLT: to wait).
    #[inline]
    pub fn record(&self, exit: Exit, ticks: u64) {
        let mut book = self.lock();
        if let Some(page) = book.pages.get_mut(exit.reason as usize) {
            page.get_or_insert_default().record(exit.detail, ticks);
        }
    }

    /// Replaces what the kernel counted for this vCPU.
    pub fn set_kernel_counts(&self, counts: KernelCounts) {
        self.lock().kernel = Some(counts);
    }

    fn pages(&self) -> Vec<(ExitReason, Page)> {
        let book = self.lock();
        let page =
            |reason: ExitReason| Some((reason, (**book.pages.get(reason as usize)?.as_ref()?).clone()));
        ExitReason::ALL.iter().filter_map(|&reason| page(reason)).collect()
    }

    #[inline]
    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Page {
    #[inline]
    fn record(&mut self, detail: Detail, ticks: u64) {
        self.all.record(ticks);
        if detail == Detail::None {
            return;
        }
        match self.details.get_mut(self.last) {
            Some((last, tally)) if *last == detail => tally.record(ticks),
            _ => self.find(detail).record(ticks),
        }
    }

    fn find(&mut self, detail: Detail) -> &mut Tally {
        self.last = match self.places.get(&detail) {
            Some(&place) => place,
            None if self.details.len() == MAX_DETAILS => return &mut self.others,
            None => {
                self.details.push((detail, Tally::default()));
                self.places.insert(detail, self.details.len() - 1);
                self.details.len() - 1
            }
        };
        &mut self.details[self.last].1
    }
}

impl Tally {
    #[inline]
    fn record(&mut self, ticks: u64) {
        self.count += 1;
        self.ticks = self.ticks.saturating_add(ticks);
        self.longest = self.longest.max(ticks);
        self.histogram.record(ticks);
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.ticks = self.ticks.saturating_add(other.ticks);
        self.longest = self.longest.max(other.longest);
        self.histogram.merge(&other.histogram);
    }
}

/// Multiplies and rotates: a detail is one or two words, and a table never holds more than [`MAX_DETAILS`] of them, so
/// that a guest which picks colliding addresses slows down only itself, and little.
#[derive(Default)]
struct FastHasher(u64);

impl Hasher for FastHasher {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.write_u64(u64::from(b)));
    }
    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }
    fn write_u16(&mut self, value: u16) {
        self.write_u64(u64::from(value));
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    #[inline]
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(address: u64) -> Exit {
        Exit::at(ExitReason::EptViolation, Detail::Memory { address, size: 4, write: false })
    }

    #[test]
    fn exits_are_counted_by_reason_and_by_detail() {
        let ledger = Ledger::new();
        let recorder = ledger.recorder(0);
        recorder.record(memory(0x1000), 10);
        recorder.record(memory(0x2000), 30);
        recorder.record(memory(0x1000), 20);
        recorder.record(Exit::new(ExitReason::Hlt), 1000);
        let pages = ledger.pages().remove(0).1;
        assert_eq!(pages.len(), 2);
        assert_eq!(pages[0].0, ExitReason::Hlt);
        let page = &pages[1].1;
        assert_eq!((page.all.count, page.all.ticks, page.all.longest), (3, 60, 30));
        assert_eq!(
            page.details.iter().map(|d| (d.1.count, d.1.ticks)).collect::<Vec<_>>(),
            [(2, 30), (1, 30)]
        );
    }

    #[test]
    fn a_guest_that_touches_every_address_fills_no_memory() {
        let ledger = Ledger::new();
        let recorder = ledger.recorder(0);
        (0..100_000).for_each(|n| recorder.record(memory(n * 8), 1));
        recorder.record(memory(0), 1);
        let pages = ledger.pages().remove(0).1;
        let page = &pages[0].1;
        assert_eq!(page.details.len(), MAX_DETAILS);
        assert_eq!(page.all.count, 100_001);
        assert_eq!(page.others.count, 100_000 - MAX_DETAILS as u64);
        assert_eq!(page.details[0].1.count, 2, "known details are still told apart");
    }

    #[test]
    fn the_recorder_of_a_vcpu_is_always_the_same() {
        let ledger = Ledger::new();
        ledger.recorder(1).record(memory(0), 1);
        ledger.clone().recorder(1).record(memory(0), 1);
        let pages = ledger.pages();
        assert_eq!(pages.len(), 1);
        assert_eq!((pages[0].0, pages[0].1[0].1.all.count), (1, 2));
    }

    #[test]
    fn every_reason_has_its_page() {
        let ledger = Ledger::new();
        let recorder = ledger.recorder(0);
        ExitReason::ALL.iter().for_each(|&reason| recorder.record(Exit::new(reason), 1));
        let pages = ledger.pages().remove(0).1;
        assert!(pages.iter().map(|p| p.0).eq(ExitReason::ALL.iter().copied()));
    }

    #[test]
    fn recording_costs_nanoseconds() {
        const EXITS: u64 = 100_000;
        let recorder = Ledger::new().recorder(0);
        let round = || {
            let start = std::time::Instant::now();
            (0..EXITS).for_each(|n| recorder.record(memory(n % 40 * 4), n % 5000));
            start.elapsed().as_nanos() as u64 / EXITS
        };
        let best = (0..10).map(|_| round()).min().unwrap();
        println!("{best} ns an exit");
        assert!(best < 250, "{best} ns an exit: the aim is 50 on a quiet machine");
    }
}
