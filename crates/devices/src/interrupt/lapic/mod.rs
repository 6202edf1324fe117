//! The local APIC. SDM vol. 3, *Advanced Programmable Interrupt Controller (APIC)*.
//!
//! - [`apic`]: the registers, and what interrupts do to them;
//! - [`access`]: the two ways in which software reaches them;
//! - [`timer`]: the timer's three modes;
//! - [`address`]: which messages are meant for it;
//! - [`events`]: INIT, SIPI and NMI.
//!
//! Here is what makes it one of several that threads share: its lock, and the attention of its processor.

mod access;
mod address;
mod apic;
mod events;
mod timer;
mod vectors;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use engine::{Attention, CpuEvent, MsrFault, Signals};
use x86::msr;

pub use access::register_name;
use address::{Address, Mode};
use apic::Apic;
pub use apic::ApicFeatures;
pub(super) use apic::{Acknowledged, Effect, Ipi, Recipients};
pub use timer::TIMER_FREQUENCY;

use super::message::InterruptMessage;
use crate::clock::{Timer, Timers};

/// A local APIC and the attention word of its processor.
///
/// Its lock is a leaf: with it held nothing is called but a [`Timer`] and the time. What an access means for others
/// comes back as an [`Effect`], to be carried out without it.
pub(super) struct LocalApic {
    locked: Mutex<Locked>,
    published: Published,
    attention: Arc<Attention>,
}

/// What others may look at without the lock; whoever has it keeps this up to date.
struct Published {
    /// [`Apic::address`].
    address: AtomicU64,
    /// The page, [`NO_PAGE`] where there is none.
    page: AtomicU64,
    task_priority: AtomicU8,
    /// Set once any of the machine's APICs has an xAPIC ID that is not its own.
    moved: Arc<AtomicBool>,
}

/// No page begins here.
const NO_PAGE: u64 = u64::MAX;

impl Published {
    fn of(apic: &Apic, moved: Arc<AtomicBool>) -> Self {
        let published = Self {
            address: AtomicU64::new(0),
            page: AtomicU64::new(NO_PAGE),
            task_priority: AtomicU8::new(0),
            moved,
        };
        published.update(apic);
        published
    }

    fn update(&self, apic: &Apic) {
        let page = if apic.mode() == Mode::XApic { apic.page() } else { NO_PAGE };
        if apic.xapic_id != apic.id as u8 {
            self.moved.store(true, Ordering::Release);
        }
        self.address.store(apic.address().0, Ordering::Release);
        self.page.store(page, Ordering::Release);
        self.task_priority.store(apic.tpr, Ordering::Release);
    }

    fn address(&self) -> Address {
        Address(self.address.load(Ordering::Acquire))
    }
}

struct Locked {
    apic: Apic,
    timer: Timer,
    /// What `timer` is armed for, in nanoseconds. It may be earlier than needed: an early call does no harm, and
    /// moving a deadline back costs nothing then.
    armed_for: u64,
}

impl Locked {
    fn arm(&mut self) {
        let wake_at = self.apic.timer_wake_at();
        if wake_at < self.armed_for {
            self.armed_for = wake_at;
            self.timer.arm(wake_at);
        }
    }
}

impl LocalApic {
    /// The APIC of processor `id`. `moved` is shared by all of a machine's: see [`Published`].
    pub fn new(
        id: u32,
        features: ApicFeatures,
        timers: &Timers,
        attention: Arc<Attention>,
        moved: Arc<AtomicBool>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let weak = weak.clone();
            let timer = timers.timer(move |_| {
                if let Some(apic) = weak.upgrade() {
                    apic.timer_due();
                }
            });
            let apic = Apic::new(id, features, timers.time().clone());
            Self {
                published: Published::of(&apic, moved),
                locked: Mutex::new(Locked { apic, timer, armed_for: timer::NEVER }),
                attention,
            }
        })
    }

    fn lock(&self) -> MutexGuard<'_, Locked> {
        self.locked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something, and tells the processor if it has something to take afterwards.
    fn change<R>(&self, act: impl FnOnce(&mut Apic) -> R) -> R {
        let mut locked = self.lock();
        let result = act(&mut locked.apic);
        locked.arm();
        self.published.update(&locked.apic);
        let wanted = locked.apic.wants_attention();
        drop(locked);
        if wanted {
            self.attention.raise(Signals::INTERRUPT);
        }
        result
    }

    fn timer_due(&self) {
        self.lock().armed_for = timer::NEVER;
        self.change(|apic| {
            apic.settle_timer();
            apic.timer.reschedule();
        });
    }

    /// Whether a message is meant for this APIC.
    pub fn is_meant(&self, message: &InterruptMessage) -> bool {
        self.published.address().is_meant(message)
    }

    /// Whether messages reach it.
    pub fn is_enabled(&self) -> bool {
        self.published.address().is_enabled()
    }

    /// Whether it takes interrupts with vectors.
    pub fn is_software_enabled(&self) -> bool {
        self.published.address().is_software_enabled()
    }

    /// Takes a message in; false where it is not accepted.
    pub fn accept(&self, message: &InterruptMessage) -> bool {
        self.change(|apic| {
            apic.mode() != Mode::Disabled && apic.accept(message.delivery, message.vector, message.trigger)
        })
    }

    pub fn set_lint0(&self, level: bool) {
        self.change(|apic| apic.set_lint0(level));
    }

    pub fn set_lint1(&self, level: bool) {
        self.change(|apic| apic.set_lint1(level));
    }

    pub fn power_up(&self) {
        self.change(Apic::power_up);
    }

    pub fn enable_virtual_wire(&self) {
        self.change(Apic::enable_virtual_wire);
    }

    pub fn set_tsc_offset(&self, offset: u64) {
        self.change(|apic| {
            apic.settle_timer();
            apic.timer.set_tsc_offset(offset);
            apic.settle_timer();
        });
    }

    pub fn has_interrupt(&self) -> bool {
        self.lock().apic.has_interrupt()
    }

    pub fn acknowledge(&self) -> Acknowledged {
        self.change(Apic::acknowledge)
    }

    pub fn take_event(&self, nmi_allowed: bool) -> Option<CpuEvent> {
        let mut locked = self.lock();
        let event = locked.apic.take_event(nmi_allowed);
        self.published.update(&locked.apic);
        let more = locked.apic.has_reset_event();
        drop(locked);
        // An NMI that stays back raises nothing, or a processor in its handler would look again at every instruction.
        if more {
            self.attention.raise(Signals::INTERRUPT);
        }
        event
    }

    pub fn task_priority(&self) -> u8 {
        self.published.task_priority.load(Ordering::Acquire)
    }

    pub fn set_task_priority(&self, tpr: u8) {
        self.change(|apic| apic.tpr = tpr);
    }

    pub fn performance_interrupt(&self) {
        self.change(Apic::performance_interrupt);
    }

    /// The guest-physical address of the page, where there is one.
    pub fn base(&self) -> Option<u64> {
        let page = self.published.page.load(Ordering::Acquire);
        (page != NO_PAGE).then_some(page)
    }

    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        self.change(|apic| apic.mmio_read(offset, data));
    }

    pub fn mmio_write(&self, offset: u64, data: &[u8]) -> Effect {
        self.change(|apic| apic.mmio_write(offset, data))
    }

    pub fn read_msr(&self, index: u32) -> Result<u64, MsrFault> {
        match index {
            msr::IA32_APIC_BASE => Ok(self.lock().apic.base),
            msr::IA32_TSC_DEADLINE => self.change(Apic::read_tsc_deadline),
            _ => self.change(|apic| apic.read_x2apic(index)),
        }
    }

    pub fn write_msr(&self, index: u32, value: u64) -> Result<Effect, MsrFault> {
        self.change(|apic| match index {
            msr::IA32_APIC_BASE => apic.write_base(value).map(|()| Effect::None),
            msr::IA32_TSC_DEADLINE => apic.write_tsc_deadline(value).map(|()| Effect::None),
            _ => apic.write_x2apic(index, value),
        })
    }
}
