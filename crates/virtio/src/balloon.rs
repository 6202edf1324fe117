//! The balloon: memory that the guest gives back to the host, and takes again. *Traditional Memory Balloon Device*.
//!
//! The host says how large the balloon is to be; the driver fills it with pages that it does not use (inflates) and takes
//! pages back (deflates). With free page reporting it also tells, all the time, what it does not use at the moment. Either
//! way the pages' host memory is given back at once; the guest that touches such a page again finds zeros.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use guest_memory::PAGE_SIZE;

use crate::memory::DmaMemory;
use crate::queue::{Chain, QueueError};
use crate::{Activation, ConfigHandle, Device, QueueHandle, features, read_config_bytes};

/// Its device id.
const ID: u16 = 5;
/// Entries of the queues: inflate, deflate, statistics, reports.
const SIZES: [u16; 4] = [128, 128, 16, 32];

/// Feature bits.
mod feature {
    pub(super) const STATISTICS: u64 = 1 << 1;
    pub(super) const DEFLATE_ON_OOM: u64 = 1 << 2;
    pub(super) const PAGE_POISON: u64 = 1 << 4;
    pub(super) const REPORTING: u64 = 1 << 5;
}

/// Offsets in the configuration space that the driver writes.
const ACTUAL: u64 = 4;
const POISON: u64 = 12;
/// Page numbers that are read at a time.
const BATCH: usize = 1024;
/// Bytes of one statistic, and the most of them that are read.
const STATISTIC: u64 = 10;
const MOST_STATISTICS: u64 = 64;

/// What the driver tells of the guest's memory, by the tags of *Memory Statistics Tags*.
pub const STATISTICS: [&str; 16] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free",
    "total",
    "available",
    "caches",
    "hugepages-made",
    "hugepages-failed",
    "oom-kills",
    "allocation-stalls",
    "async-scans",
    "direct-scans",
    "async-reclaims",
    "direct-reclaims",
];

/// What the balloon can do besides being inflated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonOptions {
    /// Bytes that it is to have at first.
    pub size: u64,
    /// Whether the driver may deflate it where the guest runs out of memory.
    pub deflate_on_oom: bool,
    /// Whether the driver tells which pages are free.
    pub free_page_reporting: bool,
}

/// The host's side of a balloon. Clones are for the same one.
#[derive(Clone)]
pub struct BalloonControl(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Pages that the balloon is to have, and has.
    target: u32,
    actual: u32,
    /// What the guest fills free pages with, where it relies on finding it again.
    poison: u32,
    /// Bytes that were given back to the host in all.
    given_back: u64,
    statistics: [Option<u64>; STATISTICS.len()],
    /// Counts what the driver told.
    told: u64,
    config: Option<ConfigHandle>,
    /// The driver's buffer, which it gets back when it is to tell again.
    waiting: Option<(QueueHandle, Chain)>,
}

/// How a balloon is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BalloonState {
    /// Bytes that it is to have.
    pub target: u64,
    /// Bytes that it has, as the driver says.
    pub actual: u64,
    /// Bytes that were given back to the host in all, by inflating and by reports.
    pub given_back: u64,
    /// What the guest told last of its memory, by name.
    pub statistics: Vec<(&'static str, u64)>,
    /// How often it told.
    pub told: u64,
}

impl BalloonControl {
    /// Asks the guest for so many bytes, rounded down to whole pages; it gives them when it can.
    pub fn set_target(&self, bytes: u64) {
        let mut state = self.lock();
        state.target = pages(bytes);
        let config = state.config.clone();
        drop(state);
        if let Some(config) = config {
            config.changed();
        }
    }

    /// Asks the driver for new statistics; [`BalloonState::told`] changes when they have come. False where there is no
    /// driver that could tell.
    pub fn ask_for_statistics(&self) -> bool {
        let waiting = self.lock().waiting.take();
        let Some((queue, chain)) = waiting else { return false };
        queue.complete(&chain, 0);
        true
    }

    /// How it is now.
    pub fn state(&self) -> BalloonState {
        let state = self.lock();
        let named = STATISTICS.iter().zip(state.statistics);
        BalloonState {
            target: u64::from(state.target) * PAGE_SIZE,
            actual: u64::from(state.actual) * PAGE_SIZE,
            given_back: state.given_back,
            statistics: named.filter_map(|(&name, value)| Some((name, value?))).collect(),
            told: state.told,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pages(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_SIZE).unwrap_or(u32::MAX)
}

/// A balloon for the guest.
pub struct Balloon {
    options: BalloonOptions,
    control: BalloonControl,
    /// By index, which depends on what was negotiated.
    queues: Vec<(Role, QueueHandle)>,
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reports,
}

impl Balloon {
    /// A balloon, and the host's side of it.
    pub fn new(options: BalloonOptions) -> (Self, BalloonControl) {
        let state = State { target: pages(options.size), ..State::default() };
        let control = BalloonControl(Arc::new(Mutex::new(state)));
        (Self { options, control: control.clone(), queues: Vec::new() }, control)
    }

    /// Takes the pages whose numbers a request has.
    fn inflate(&self, memory: &DmaMemory, chain: &Chain) -> Result<u32, QueueError> {
        let mut bytes = [0; 4 * BATCH];
        let mut offset = 0;
        loop {
            let count = chain.read(memory, offset, &mut bytes)?;
            offset += count as u64;
            let mut run = Run::default();
            for number in bytes[..count].chunks_exact(4) {
                let number = number.iter().rev().fold(0, |high: u64, &byte| high << 8 | u64::from(byte));
                if let Some(full) = run.add(number) {
                    self.give_back(memory, full)?;
                }
            }
            if let Some(last) = run.range() {
                self.give_back(memory, last)?;
            }
            if count < bytes.len() {
                return Ok(0);
            }
        }
    }

    /// Takes the pages that a report names, which are free for the moment.
    fn report(&self, memory: &DmaMemory, chain: &Chain) -> Result<u32, QueueError> {
        // A guest that fills free pages wants to find that again.
        if self.control.lock().poison != 0 {
            return Ok(0);
        }
        for segment in chain.writable() {
            let start = segment.address.next_multiple_of(PAGE_SIZE);
            let end = (segment.address + u64::from(segment.len)) / PAGE_SIZE * PAGE_SIZE;
            if start < end {
                self.give_back(memory, (start, end - start))?;
            }
        }
        Ok(0)
    }

    fn give_back(&self, memory: &DmaMemory, (address, len): (u64, u64)) -> Result<(), QueueError> {
        memory.discard(address, len)?;
        self.control.lock().given_back += len;
        Ok(())
    }

    /// Reads what the driver tells, and keeps its buffer until it is to tell again.
    fn take_statistics(&self, queue: &QueueHandle) {
        while let Some(chain) = queue.pop() {
            let mut bytes = vec![0; (MOST_STATISTICS * STATISTIC).min(chain.readable_len()) as usize];
            if chain.read(queue.memory(), 0, &mut bytes).is_err() {
                return queue.fail("statistics that cannot be read");
            }
            let mut state = self.control.lock();
            for statistic in bytes.chunks_exact(STATISTIC as usize) {
                let word = statistic.iter().rev().fold(0u128, |high, &byte| high << 8 | u128::from(byte));
                if let Some(slot) = state.statistics.get_mut(usize::from(word as u16)) {
                    *slot = Some((word >> 16) as u64);
                }
            }
            state.told += 1;
            // A driver has one buffer; one that sends more gets them back.
            let before = state.waiting.replace((queue.clone(), chain));
            drop(state);
            if let Some((queue, chain)) = before {
                queue.complete(&chain, 0);
            }
        }
    }

    /// The configuration space: pages to have, pages that there are, nothing, the poison.
    fn config(&self) -> [u8; 16] {
        let state = self.control.lock();
        let words = [state.target, state.actual, 0, state.poison];
        let mut bytes = [0; 16];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// Pages that follow each other.
#[derive(Default)]
struct Run(Option<(u64, u64)>);

impl Run {
    /// Appends a page; gives the run before, where it is none of it.
    fn add(&mut self, number: u64) -> Option<(u64, u64)> {
        match &mut self.0 {
            Some((first, count)) if *first + *count == number => {
                *count += 1;
                None
            }
            other => {
                let before = other.replace((number, 1));
                before.map(bytes_of)
            }
        }
    }

    fn range(&self) -> Option<(u64, u64)> {
        self.0.map(bytes_of)
    }
}

fn bytes_of((first, count): (u64, u64)) -> (u64, u64) {
    (first * PAGE_SIZE, count * PAGE_SIZE)
}

impl Device for Balloon {
    fn id(&self) -> u16 {
        ID
    }

    fn features(&self) -> u64 {
        let oom = if self.options.deflate_on_oom { feature::DEFLATE_ON_OOM } else { 0 };
        let reports =
            if self.options.free_page_reporting { feature::REPORTING | feature::PAGE_POISON } else { 0 };
        feature::STATISTICS | oom | reports | features::IN_ORDER
    }

    fn queue_sizes(&self) -> &[u16] {
        if self.options.free_page_reporting { &SIZES } else { &SIZES[..3] }
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Some(&bytes) = data.first_chunk().filter(|_| data.len() == 4) else { return };
        let (value, mut state) = (u32::from_le_bytes(bytes), self.control.lock());
        match offset {
            ACTUAL => state.actual = value,
            POISON => state.poison = value,
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) {
        // Queues exist where their features were negotiated, and are numbered without gaps.
        let mut roles = vec![Role::Inflate, Role::Deflate];
        if activation.features & feature::STATISTICS != 0 {
            roles.push(Role::Statistics);
        }
        if activation.features & feature::REPORTING != 0 {
            roles.push(Role::Reports);
        }
        let queues = (0..).zip(roles).filter_map(|(index, role)| Some((role, activation.queue(index)?)));
        self.queues = queues.collect();
        self.control.lock().config = Some(activation.config);
    }

    fn notify(&mut self, index: u16) {
        let Some((role, queue)) = self.queues.iter().find(|(_, queue)| queue.index() == index) else {
            return;
        };
        match role {
            Role::Inflate => queue.serve(|memory, chain| self.inflate(memory, chain)),
            // A page that is used again needs nothing: the host gives memory when it is touched.
            Role::Deflate => queue.serve(|_, _| Ok(0)),
            Role::Statistics => self.take_statistics(queue),
            Role::Reports => queue.serve(|memory, chain| self.report(memory, chain)),
        }
    }

    fn reset(&mut self) {
        self.queues.clear();
        let mut state = self.control.lock();
        (state.actual, state.poison, state.config, state.waiting) = (0, 0, None, None);
        state.statistics = Default::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::{INDIRECT_DESC, RING_PACKED};
    use crate::testing::{BUFFERS, RAM, ROM, Rig};
    use crate::transport::{Event, Status};

    const INFLATE: u16 = 0;
    const DEFLATE: u16 = 1;
    const ALL: u64 =
        feature::STATISTICS | feature::REPORTING | feature::PAGE_POISON | feature::DEFLATE_ON_OOM;

    fn rig(negotiated: u64) -> (Rig, BalloonControl) {
        let options = BalloonOptions { size: 3 << 20, deflate_on_oom: true, free_page_reporting: true };
        let (balloon, control) = Balloon::new(options);
        (Rig::new(Box::new(balloon), 16, negotiated | features::IN_ORDER), control)
    }

    /// Sends page numbers to a queue.
    fn send_pages(rig: &mut Rig, queue: u16, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        rig.drivers[0].put(BUFFERS, &bytes);
        rig.send(queue, &[(BUFFERS, bytes.len() as u32, false)]);
    }

    #[test]
    fn pages_that_the_guest_gives_are_zeros_when_it_looks_again() {
        for format in [0, RING_PACKED, INDIRECT_DESC] {
            let (mut rig, control) = rig(ALL | format);
            for page in 0x300..0x308u64 {
                rig.drivers[0].put(page * PAGE_SIZE, &[0x5a; 4096]);
            }
            let generation = rig.memory.guest().marks().mark_code(0x301 * PAGE_SIZE).0;
            send_pages(&mut rig, INFLATE, &[0x301, 0x302, 0x303, 0x306]);
            rig.wait_used(INFLATE);
            let kept: Vec<_> = (0x300..0x308u64)
                .filter(|page| rig.drivers[0].bytes(page * PAGE_SIZE, 1) == [0x5a])
                .collect();
            assert_eq!(kept, [0x300, 0x304, 0x305, 0x307]);
            assert_ne!(rig.memory.guest().marks().generation(0x301 * PAGE_SIZE), generation, "code is stale");
            assert_eq!(control.state().given_back, 4 * PAGE_SIZE);
            send_pages(&mut rig, DEFLATE, &[0x301]);
            rig.wait_used(DEFLATE);
            assert_eq!(rig.status().bits(), 0xf);
        }
    }

    #[test]
    fn pages_that_are_no_ram_break_the_rules() {
        for page in [RAM / PAGE_SIZE, ROM / PAGE_SIZE, u64::from(u32::MAX)] {
            let (mut rig, _) = rig(ALL);
            send_pages(&mut rig, INFLATE, &[1, page as u32]);
            assert!(rig.status().contains(Status::NEEDS_RESET), "{page:#x}");
        }
    }

    #[test]
    fn reported_pages_are_given_back_whole_pages_only_and_not_where_they_are_poisoned() {
        let (mut rig, control) = rig(ALL);
        let address = 0x30_0000;
        rig.drivers[0].put(address, &[0x5a; 4 * 4096]);
        rig.send(3, &[(address + 100, 3 * 4096, true)]);
        rig.wait_used(3);
        let kept: Vec<_> =
            (0..4).filter(|page| rig.drivers[0].bytes(address + 4096 * page, 1) == [0x5a]).collect();
        assert_eq!(kept, [0, 3]);
        rig.write_config(POISON, &0xaaaa_aaaau32.to_le_bytes());
        rig.send(3, &[(address, 4096, true)]);
        rig.wait_used(3);
        assert_eq!(rig.drivers[0].bytes(address, 1), [0x5a]);
        assert_eq!(control.state().given_back, 2 * 4096);
    }

    #[test]
    fn without_statistics_the_reports_have_their_queue() {
        let (mut rig, control) = rig(feature::REPORTING);
        rig.send(2, &[(0x30_0000, 4096, true)]);
        rig.wait_used(2);
        assert_eq!(control.state().given_back, 4096);
    }

    #[test]
    fn the_driver_is_told_of_a_new_size_and_says_what_it_has() {
        let (mut rig, control) = rig(ALL);
        assert_eq!(rig.config(0, 8), [0, 3, 0, 0, 0, 0, 0, 0]);
        control.set_target(5 * PAGE_SIZE + 1);
        assert_eq!((rig.take_events(), rig.config(0, 4)), (vec![Event::Config], vec![5, 0, 0, 0]));
        rig.write_config(ACTUAL, &4u32.to_le_bytes());
        rig.write_config(0, &9u32.to_le_bytes());
        let state = control.state();
        assert_eq!((state.target, state.actual), (5 * PAGE_SIZE, 4 * PAGE_SIZE));
        control.set_target(u64::MAX);
        assert_eq!(rig.config(0, 4), [0xff; 4]);
        rig.reset();
        assert_eq!(control.state().actual, 0);
    }

    #[test]
    fn statistics_come_when_they_are_asked_for() {
        let (mut rig, control) = rig(ALL);
        assert!(!control.ask_for_statistics());
        for (round, free) in [(1, 7u64), (2, 9)] {
            let mut bytes = Vec::new();
            for (tag, value) in [(4u16, free), (5, 100), (0x7777, 1)] {
                bytes.extend(tag.to_le_bytes());
                bytes.extend(value.to_le_bytes());
            }
            rig.drivers[0].put(BUFFERS, &bytes);
            rig.send(2, &[(BUFFERS, bytes.len() as u32, false)]);
            let state = control.state();
            assert_eq!((state.told, state.statistics), (round, vec![("free", free), ("total", 100)]));
            assert_eq!(rig.drivers[2].used(), None, "the device keeps the buffer");
            assert!(control.ask_for_statistics());
            rig.wait_used(2);
        }
    }
}
