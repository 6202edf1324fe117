//! The local APIC's registers and what happens to them, without locks.

use std::sync::Arc;

use engine::{CpuEvent, MsrFault, TimeSource};
use x86::apic::{self, ApicBase, DeliveryMode, ErrorStatus, Icr, Lvt, SpuriousVector};

use super::super::message::{InterruptMessage, TriggerMode};
use super::address::{Address, Mode};
use super::events::Events;
use super::timer::{ApicTimer, TimerMode};
use super::vectors::VectorSet;

/// What the processor's local APIC can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicFeatures {
    /// Bits of a physical address: the APIC's page lies below.
    pub physical_address_bits: u8,
    /// Whether x2APIC mode exists.
    pub x2apic: bool,
    /// Whether the timer's TSC-deadline mode exists.
    pub tsc_deadline: bool,
}

impl Default for ApicFeatures {
    fn default() -> Self {
        Self { physical_address_bits: 46, x2apic: true, tsc_deadline: true }
    }
}

/// What an access asks of the other local APICs and of the I/O APIC, once this one's lock is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(in super::super) enum Effect {
    None,
    Send(Ipi),
    /// A level-triggered interrupt of this vector has ended.
    EndOfInterrupt(u8),
}

/// An interrupt that a local APIC sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Ipi {
    pub message: InterruptMessage,
    pub to: Recipients,
}

/// Whom an IPI is for: the ICR's destination shorthand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Recipients {
    /// Those that the message's destination names.
    Destination,
    /// The sender alone.
    Sender,
    /// All.
    All,
    /// All but the sender.
    Others,
}

/// What an interrupt-acknowledge cycle finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Acknowledged {
    Nothing,
    /// The external interrupt controller has the vector.
    External,
    Vector(u8),
}

/// The local vector table, in the order of the entries' places in [`Apic::lvt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LvtEntry {
    Cmci,
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

impl LvtEntry {
    pub const COUNT: usize = 7;

    /// The bits that the entry has.
    pub fn bits(self, features: &ApicFeatures) -> Lvt {
        let common = Lvt::VECTOR | Lvt::DELIVERY_STATUS | Lvt::MASKED;
        match self {
            Self::Timer if features.tsc_deadline => common | Lvt::PERIODIC | Lvt::TSC_DEADLINE,
            Self::Timer => common | Lvt::PERIODIC,
            Self::Cmci | Self::Thermal | Self::Performance => common | Lvt::DELIVERY_MODE,
            Self::Lint0 | Self::Lint1 => {
                common | Lvt::DELIVERY_MODE | Lvt::ACTIVE_LOW | Lvt::REMOTE_IRR | Lvt::LEVEL
            }
            Self::Error => common,
        }
    }
}

/// The ESR: errors are collected, and shown by the next write of the register.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Errors {
    pub shown: ErrorStatus,
    collected: ErrorStatus,
    /// The error interrupt has been sent since the register was last written.
    signalled: bool,
}

impl Errors {
    pub fn show(&mut self) {
        *self = Self { shown: self.collected, ..Self::default() };
    }
}

/// The two interrupt pins, and the ExtINT messages that stand for the first.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pins {
    lint0: bool,
    lint1: bool,
    external: bool,
}

/// One local APIC.
pub(super) struct Apic {
    pub features: ApicFeatures,
    /// The initial APIC ID, which is the x2APIC ID.
    pub id: u32,
    pub base: u64,
    pub xapic_id: u8,
    pub tpr: u8,
    pub ldr: u8,
    pub dfr: u32,
    pub svr: SpuriousVector,
    pub lvt: [Lvt; LvtEntry::COUNT],
    pub icr: Icr,
    pub irr: VectorSet,
    pub isr: VectorSet,
    pub tmr: VectorSet,
    pub errors: Errors,
    pub timer: ApicTimer,
    events: Events,
    pins: Pins,
}

/// DFR after reset: the flat model.
const DFR_RESET: u32 = u32::MAX;

impl Apic {
    /// The APIC of processor `id` after power-up; processor 0 is the bootstrap processor.
    pub fn new(id: u32, features: ApicFeatures, time: Arc<dyn TimeSource>) -> Self {
        let mut apic = Self {
            features,
            id,
            base: 0,
            xapic_id: 0,
            tpr: 0,
            ldr: 0,
            dfr: DFR_RESET,
            svr: SpuriousVector::VECTOR,
            lvt: [Lvt::MASKED; LvtEntry::COUNT],
            icr: Icr::empty(),
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            errors: Errors::default(),
            timer: ApicTimer::new(time),
            events: Events::new(id == 0),
            pins: Pins::default(),
        };
        apic.power_up();
        apic
    }

    /// The state after power-up. The pins keep their levels: others drive them.
    pub fn power_up(&mut self) {
        let bsp = if self.id == 0 { ApicBase::BSP } else { ApicBase::empty() };
        self.base = apic::DEFAULT_BASE | (bsp | ApicBase::EN).bits();
        self.xapic_id = self.id as u8;
        self.events = Events::new(self.id == 0);
        self.reset_registers();
    }

    /// What power-up, INIT and disabling have in common. SDM vol. 3, *Local APIC State After Power-Up or Reset* and
    /// *Local APIC State After an INIT Reset*: INIT leaves the ID and IA32_APIC_BASE as they are.
    fn reset_registers(&mut self) {
        self.tpr = 0;
        self.ldr = 0;
        self.dfr = DFR_RESET;
        self.svr = SpuriousVector::VECTOR;
        self.lvt = [Lvt::MASKED; LvtEntry::COUNT];
        self.icr = Icr::empty();
        self.irr = VectorSet::default();
        self.isr = VectorSet::default();
        self.tmr = VectorSet::default();
        self.errors = Errors::default();
        self.timer.reset();
        self.pins.external = false;
    }

    pub fn mode(&self) -> Mode {
        mode_of(ApicBase::from_bits_truncate(self.base))
    }

    /// The guest-physical address of the registers' page in xAPIC mode.
    pub fn page(&self) -> u64 {
        self.base & !0xfff
    }

    pub fn software_enabled(&self) -> bool {
        self.svr.contains(SpuriousVector::ENABLE)
    }

    pub fn address(&self) -> Address {
        let xapic = (self.xapic_id, self.ldr, self.dfr);
        Address::new(self.mode(), self.software_enabled(), self.id, xapic)
    }

    /// Writes IA32_APIC_BASE. SDM vol. 3, *x2APIC State Transitions*.
    pub fn write_base(&mut self, value: u64) -> Result<(), MsrFault> {
        let pages = (1u64 << self.features.physical_address_bits.clamp(32, 52)) - 0x1000;
        let flags = ApicBase::from_bits_truncate(value);
        let without_en = flags.contains(ApicBase::EXTD) && !flags.contains(ApicBase::EN);
        let extended = flags.contains(ApicBase::EXTD) && !self.features.x2apic;
        if value & !(pages | ApicBase::all().bits()) != 0 || without_en || extended {
            return Err(MsrFault);
        }
        match (self.mode(), mode_of(flags)) {
            (Mode::Disabled, Mode::X2Apic) | (Mode::X2Apic, Mode::XApic) => return Err(MsrFault),
            (Mode::XApic | Mode::X2Apic, Mode::Disabled) => {
                self.reset_registers();
                self.xapic_id = self.id as u8;
            }
            (Mode::XApic, Mode::X2Apic) => {
                self.xapic_id = self.id as u8;
                self.icr.remove(Icr::DESTINATION);
            }
            _ => {}
        }
        self.base = value;
        Ok(())
    }

    /// Takes an interrupt message in; false where the APIC does not accept it.
    pub fn accept(&mut self, delivery: DeliveryMode, vector: u8, trigger: TriggerMode) -> bool {
        match delivery {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => return self.accept_vector(vector, trigger),
            DeliveryMode::Nmi => self.events.add_nmi(),
            DeliveryMode::Init => self.events.add_init(),
            DeliveryMode::StartUp => self.events.add_sipi(vector),
            DeliveryMode::ExtInt if self.software_enabled() => self.pins.external = true,
            // There is no system-management mode.
            DeliveryMode::Smi | DeliveryMode::ExtInt => return false,
        }
        true
    }

    fn accept_vector(&mut self, vector: u8, trigger: TriggerMode) -> bool {
        if !self.software_enabled() {
            return false;
        }
        if vector < apic::FIRST_VECTOR {
            self.report(ErrorStatus::RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.insert(vector);
        self.tmr.set(vector, trigger == TriggerMode::Level);
        true
    }

    /// Records an error, and sends the error interrupt if it is the first since the ESR was written.
    pub fn report(&mut self, error: ErrorStatus) {
        self.errors.collected |= error;
        if !std::mem::replace(&mut self.errors.signalled, true) {
            self.deliver_local(LvtEntry::Error, TriggerMode::Edge);
        }
    }

    /// A local source's interrupt, as its LVT entry says.
    fn deliver_local(&mut self, entry: LvtEntry, trigger: TriggerMode) -> bool {
        let lvt = self.lvt[entry as usize];
        if lvt.contains(Lvt::MASKED) {
            return false;
        }
        let has_mode = !matches!(entry, LvtEntry::Timer | LvtEntry::Error);
        let mode = if has_mode { delivery_mode(lvt) } else { Some(DeliveryMode::Fixed) };
        match mode {
            Some(DeliveryMode::Fixed) => self.accept_vector(lvt.bits() as u8, trigger),
            Some(mode @ (DeliveryMode::Nmi | DeliveryMode::Init)) => self.accept(mode, 0, trigger),
            // ExtINT is not latched: the pin's level is looked at.
            _ => false,
        }
    }

    /// Lets the timer's interrupt happen if it is due. To be called before the timer's registers are used.
    pub fn settle_timer(&mut self) {
        if self.timer.settle() {
            self.timer_expired();
        }
    }

    /// When the host must look at the timer, in nanoseconds: never for an interrupt that is masked.
    pub fn timer_wake_at(&self) -> u64 {
        let masked = self.lvt[LvtEntry::Timer as usize].contains(Lvt::MASKED);
        if masked { super::timer::NEVER } else { self.timer.wake_at() }
    }

    pub fn timer_expired(&mut self) {
        self.deliver_local(LvtEntry::Timer, TriggerMode::Edge);
    }

    /// The performance counters' interrupt, which masks its entry: the next one comes when software has unmasked it.
    pub fn performance_interrupt(&mut self) {
        if self.deliver_local(LvtEntry::Performance, TriggerMode::Edge) {
            self.lvt[LvtEntry::Performance as usize].insert(Lvt::MASKED);
        }
    }

    /// Sets the level of the LINT0 pin: the PIC's output, on the bootstrap processor.
    pub fn set_lint0(&mut self, level: bool) {
        let rose = level && !self.pins.lint0;
        self.pins.lint0 = level;
        if self.lint0_is_level() {
            self.service_lint0();
        } else if rose {
            self.deliver_local(LvtEntry::Lint0, TriggerMode::Edge);
        }
    }

    fn lint0_is_level(&self) -> bool {
        let lvt = self.lvt[LvtEntry::Lint0 as usize];
        lvt.contains(Lvt::LEVEL) && delivery_mode(lvt) == Some(DeliveryMode::Fixed)
    }

    /// Sends LINT0's level-triggered interrupt while it is asserted and none awaits its EOI.
    fn service_lint0(&mut self) {
        let waiting = self.lvt[LvtEntry::Lint0 as usize].contains(Lvt::REMOTE_IRR);
        if self.pins.lint0 && !waiting && self.deliver_local(LvtEntry::Lint0, TriggerMode::Level) {
            self.lvt[LvtEntry::Lint0 as usize].insert(Lvt::REMOTE_IRR);
        }
    }

    /// Sets the level of the LINT1 pin: NMI where the APIC is disabled.
    pub fn set_lint1(&mut self, level: bool) {
        let rose = level && !self.pins.lint1;
        self.pins.lint1 = level;
        if rose && self.mode() == Mode::Disabled {
            self.events.add_nmi();
        } else if rose {
            self.deliver_local(LvtEntry::Lint1, TriggerMode::Edge);
        }
    }

    pub fn write_lvt(&mut self, entry: LvtEntry, value: u32) {
        if entry == LvtEntry::Timer {
            self.settle_timer();
        }
        let old = self.lvt[entry as usize];
        let read_only = Lvt::DELIVERY_STATUS | Lvt::REMOTE_IRR;
        let mut lvt = Lvt::from_bits_truncate(value) & (entry.bits(&self.features) - read_only);
        if lvt.contains(Lvt::LEVEL) {
            lvt |= old & Lvt::REMOTE_IRR;
        }
        if !self.software_enabled() {
            lvt |= Lvt::MASKED;
        }
        self.lvt[entry as usize] = lvt;
        match entry {
            LvtEntry::Timer => self.timer.set_mode(TimerMode::of(lvt)),
            LvtEntry::Lint0 if self.lint0_is_level() => self.service_lint0(),
            _ => {}
        }
    }

    pub fn write_svr(&mut self, value: u32) {
        self.svr = SpuriousVector::from_bits_truncate(value);
        if !self.software_enabled() {
            for lvt in &mut self.lvt {
                lvt.insert(Lvt::MASKED);
            }
        }
    }

    /// The processor priority. SDM vol. 3, *Task and Processor Priorities*.
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The arbitration priority.
    pub fn apr(&self) -> u8 {
        let class = |vector: Option<u8>| vector.unwrap_or(0) & 0xf0;
        let (task, request, service) =
            (self.tpr & 0xf0, class(self.irr.highest()), class(self.isr.highest()));
        if task >= request && task > service { self.tpr } else { task.max(request).max(service) }
    }

    /// The interrupt that the processor would take now.
    fn deliverable(&self) -> Option<u8> {
        self.irr.highest().filter(|vector| vector & 0xf0 > self.ppr() & 0xf0)
    }

    /// Whether the external controller asks for an interrupt through here. Where the APIC is disabled by either
    /// switch, its pin is the processor's INTR pin: the state in which firmware leaves a PC whose system knows no APIC.
    fn is_external_pending(&self) -> bool {
        if self.pins.external {
            return true;
        }
        let lint0 = self.lvt[LvtEntry::Lint0 as usize];
        let bypassed = self.mode() == Mode::Disabled || !self.software_enabled();
        let routed = !lint0.contains(Lvt::MASKED) && delivery_mode(lint0) == Some(DeliveryMode::ExtInt);
        self.pins.lint0 && (bypassed || routed)
    }

    pub fn has_interrupt(&self) -> bool {
        self.deliverable().is_some() || self.is_external_pending()
    }

    /// Whether the processor should look: at an interrupt or an event.
    pub fn wants_attention(&self) -> bool {
        self.events.any() || self.has_interrupt()
    }

    pub fn has_reset_event(&self) -> bool {
        self.events.any_but_nmi()
    }

    /// The interrupt-acknowledge cycle. ExtINT knows no priorities, and goes first.
    pub fn acknowledge(&mut self) -> Acknowledged {
        if self.is_external_pending() {
            self.pins.external = false;
            return Acknowledged::External;
        }
        match self.deliverable() {
            None => Acknowledged::Nothing,
            Some(vector) => {
                self.irr.remove(vector);
                self.isr.insert(vector);
                Acknowledged::Vector(vector)
            }
        }
    }

    pub fn take_event(&mut self, nmi_allowed: bool) -> Option<CpuEvent> {
        let event = self.events.take(nmi_allowed);
        if event == Some(CpuEvent::Init) {
            self.reset_registers();
        }
        event
    }

    /// The EOI register. SDM vol. 3, *Signaling Interrupt Servicing Completion*.
    pub fn end_of_interrupt(&mut self) -> Effect {
        self.settle_timer();
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.remove(vector);
        if !self.tmr.contains(vector) {
            return Effect::None;
        }
        let lint0 = &mut self.lvt[LvtEntry::Lint0 as usize];
        if lint0.contains(Lvt::REMOTE_IRR) && lint0.bits() as u8 == vector {
            lint0.remove(Lvt::REMOTE_IRR);
            self.service_lint0();
        }
        if self.svr.contains(SpuriousVector::SUPPRESS_EOI_BROADCAST) {
            return Effect::None;
        }
        Effect::EndOfInterrupt(vector)
    }

    /// Sends what the ICR says. SDM vol. 3, *Issuing Interprocessor Interrupts*.
    pub fn send(&mut self) -> Effect {
        let icr = self.icr;
        let Some(delivery) = DeliveryMode::from_bits((icr.bits() >> 8 & 7) as u8) else {
            return Effect::None;
        };
        let recipients = match icr.intersection(Icr::SHORTHAND).bits() >> 18 {
            0 => Recipients::Destination,
            1 => Recipients::Sender,
            2 => Recipients::All,
            _ => Recipients::Others,
        };
        let fixed = matches!(delivery, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
        let deassert =
            delivery == DeliveryMode::Init && icr.contains(Icr::LEVEL) && !icr.contains(Icr::ASSERT);
        if delivery == DeliveryMode::ExtInt || deassert || !is_valid(recipients, delivery) {
            return Effect::None;
        }
        let vector = icr.bits() as u8;
        if recipients == Recipients::Sender {
            self.send_to_self(vector);
            return Effect::None;
        }
        if fixed && vector < apic::FIRST_VECTOR {
            self.report(ErrorStatus::SEND_ILLEGAL_VECTOR);
            return Effect::None;
        }
        let destination = match self.mode() {
            Mode::X2Apic => (icr.bits() >> 32) as u32,
            _ => InterruptMessage::short_destination((icr.bits() >> 56) as u8),
        };
        let logical = icr.contains(Icr::LOGICAL);
        let message = InterruptMessage { destination, logical, delivery, vector, trigger: TriggerMode::Edge };
        Effect::Send(Ipi { message, to: recipients })
    }

    /// A fixed interrupt to this processor.
    pub fn send_to_self(&mut self, vector: u8) {
        if vector < apic::FIRST_VECTOR {
            self.report(ErrorStatus::SEND_ILLEGAL_VECTOR);
        } else {
            self.accept_vector(vector, TriggerMode::Edge);
        }
    }
}

/// The delivery mode of an LVT entry that has one.
fn delivery_mode(lvt: Lvt) -> Option<DeliveryMode> {
    DeliveryMode::from_bits((lvt.bits() >> 8 & 7) as u8)
}

fn mode_of(base: ApicBase) -> Mode {
    match (base.contains(ApicBase::EN), base.contains(ApicBase::EXTD)) {
        (false, _) => Mode::Disabled,
        (true, false) => Mode::XApic,
        (true, true) => Mode::X2Apic,
    }
}

/// SDM vol. 3, *Valid Combinations for the Pentium 4 and Intel Xeon Processors' Local xAPIC Interrupt Command Register*.
fn is_valid(recipients: Recipients, delivery: DeliveryMode) -> bool {
    match recipients {
        Recipients::Destination | Recipients::Others => true,
        Recipients::Sender | Recipients::All => delivery == DeliveryMode::Fixed,
    }
}
