use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{Attention, Space};
use x86::apic::{self, DeliveryMode};

use super::handle::LocalApicHandle;
use super::ioapic::{self, IoApic};
use super::lapic::{ApicFeatures, Effect, Ipi, LocalApic, Recipients};
use super::message::InterruptMessage;
use super::pic::{self, Pic};
use crate::bus::{BusError, Device, MachineBus, Window};
use crate::clock::Timers;
use crate::irq::IrqSink;

/// The I/O APIC's pin that the PIC's output drives.
const PIC_PIN: usize = 0;
/// The pin of ISA interrupt 0: the interrupt source override that the ACPI tables tell.
const TIMER_PIN: u32 = 2;
/// ISA interrupts are the lines below this.
const ISA_LINES: u32 = 16;

/// All interrupt controllers of a machine.
///
/// As an [`IrqSink`] its lines 0 to 15 are the ISA interrupts, which reach both the PIC and the I/O APIC (0 as pin 2;
/// line 2 is the PICs' cascade and does not exist), and 16 to 23 the I/O APIC's other pins. A line has one driver: what
/// several devices share is combined before it comes here.
pub struct InterruptFabric {
    pic: Mutex<WiredPic>,
    ioapic: Mutex<IoApic>,
    apics: Vec<Arc<LocalApic>>,
    /// Whether a guest has ever moved an xAPIC ID, so that IDs are not indices, and several processors may have one.
    moved: Arc<AtomicBool>,
    /// Where the search for a lowest-priority processor begins, so that equals take turns.
    turn: AtomicUsize,
}

/// The PIC and the level of its output as the others know it.
struct WiredPic {
    pic: Pic,
    output: bool,
}

impl InterruptFabric {
    /// The controllers after power-up, with one local APIC for each attention word: processor `n` has APIC ID `n`,
    /// and processor 0 is the bootstrap processor.
    pub fn new(features: ApicFeatures, timers: &Timers, attentions: &[Arc<Attention>]) -> Arc<Self> {
        let moved = Arc::new(AtomicBool::new(false));
        let apics = (0..)
            .zip(attentions)
            .map(|(id, attention)| LocalApic::new(id, features, timers, attention.clone(), moved.clone()))
            .collect();
        Arc::new(Self {
            pic: Mutex::new(WiredPic { pic: Pic::new(), output: false }),
            ioapic: Mutex::new(IoApic::new()),
            apics,
            moved,
            turn: AtomicUsize::new(0),
        })
    }

    /// The view of vCPU `index`; `None` where there is no such vCPU.
    pub fn local_apic(self: &Arc<Self>, index: usize) -> Option<LocalApicHandle> {
        Some(LocalApicHandle::new(self.clone(), index, self.apics.get(index)?.clone()))
    }

    /// Maps the PIC's ports and the I/O APIC's window. The local APICs' pages are each vCPU's own ([`super::VcpuBus`]).
    ///
    /// # Errors
    /// [`BusError`] where something else is mapped there.
    pub fn attach(self: &Arc<Self>, bus: &MachineBus) -> Result<(), BusError> {
        let pic = Arc::new(Mutex::new(PicPorts(self.clone())));
        for (base, offset) in pic::PORTS {
            bus.insert_window(Window { space: Space::Port, base, len: 2, offset }, "pic", pic.clone())?;
        }
        let ioapic = Arc::new(Mutex::new(IoApicWindow(self.clone())));
        bus.insert(Space::Memory, apic::IOAPIC_BASE, ioapic::WINDOW, "ioapic", ioapic)
    }

    /// Puts all controllers into their state after power-up. The vCPUs must not be running.
    pub fn reset(&self) {
        self.with_pic(|pic| pic.reset());
        self.lock_ioapic().reset();
        for apic in &self.apics {
            apic.power_up();
        }
    }

    /// Leaves the bootstrap processor's local APIC as a PC's firmware does: enabled, the PIC's output through LINT0 as
    /// ExtINT, and NMIs through LINT1. For guests that are started without firmware. Intel, *MultiProcessor
    /// Specification*, *Virtual Wire Mode*.
    pub fn enable_virtual_wire(&self) {
        if let Some(apic) = self.apics.first() {
            apic.enable_virtual_wire();
        }
    }

    /// Sets the level of the NMI line, which is wired to each local APIC's LINT1.
    pub fn set_nmi(&self, level: bool) {
        for apic in &self.apics {
            apic.set_lint1(level);
        }
    }

    /// A device's write of `data` to `address` in the interrupt range; true if a local APIC accepted it as an
    /// interrupt.
    pub fn signal_msi(&self, address: u64, data: u32) -> bool {
        InterruptMessage::from_msi(address, data).is_some_and(|message| self.deliver(&message))
    }

    /// Delivers a message of a device; true if a local APIC accepted it.
    pub fn deliver(&self, message: &InterruptMessage) -> bool {
        self.deliver_except(message, None)
    }

    fn deliver_except(&self, message: &InterruptMessage, except: Option<usize>) -> bool {
        if message.delivery == DeliveryMode::LowestPriority {
            return self.deliver_lowest(message, except);
        }
        if !message.logical && !self.moved.load(Ordering::Acquire) {
            let at_index = usize::try_from(message.destination).ok().and_then(|id| self.apics.get(id));
            if let Some(apic) = at_index.filter(|apic| apic.is_meant(message)) {
                return apic.accept(message);
            }
        }
        let mut accepted = false;
        for (_, apic) in self.meant(message, except) {
            accepted |= apic.accept(message);
        }
        accepted
    }

    fn meant<'a>(
        &'a self,
        message: &'a InterruptMessage,
        except: Option<usize>,
    ) -> impl Iterator<Item = (usize, &'a Arc<LocalApic>)> {
        self.apics
            .iter()
            .enumerate()
            .filter(move |(index, apic)| Some(*index) != except && apic.is_meant(message))
    }

    /// To the one at the lowest task priority; equals take turns.
    fn deliver_lowest(&self, message: &InterruptMessage, except: Option<usize>) -> bool {
        let (turn, count) = (self.turn.load(Ordering::Relaxed), self.apics.len());
        let chosen = self
            .meant(message, except)
            .filter(|(_, apic)| apic.is_software_enabled())
            .min_by_key(|(index, apic)| (apic.task_priority() >> 4, (index + count - turn) % count));
        let Some((index, apic)) = chosen else { return false };
        self.turn.store((index + 1) % count, Ordering::Relaxed);
        apic.accept(message)
    }

    /// Carries out what an access to local APIC `index` asks of the others, with no local APIC locked.
    pub(super) fn carry_out(&self, index: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::EndOfInterrupt(vector) => {
                self.lock_ioapic().end_of_interrupt(vector, &|message| self.deliver(message));
            }
            Effect::Send(Ipi { message, to }) => self.send(index, message, to),
        }
    }

    fn send(&self, sender: usize, message: InterruptMessage, to: Recipients) {
        let everyone = InterruptMessage { destination: InterruptMessage::EVERYONE, ..message };
        match to {
            Recipients::Destination => self.deliver_except(&message, None),
            Recipients::All => self.deliver_except(&everyone, None),
            Recipients::Others => self.deliver_except(&everyone, Some(sender)),
            Recipients::Sender => self.apics[sender].accept(&message),
        };
    }

    /// The external interrupt's acknowledge cycle. The output falls with it, and rises again for what is left.
    pub(super) fn acknowledge_pic(&self) -> u8 {
        let mut wired = self.lock_pic();
        let vector = wired.pic.acknowledge();
        self.drive_output(&mut wired, false);
        let output = wired.pic.output();
        self.drive_output(&mut wired, output);
        vector
    }

    /// Changes the PIC, and drives what its output is wired to.
    fn with_pic<R>(&self, act: impl FnOnce(&mut Pic) -> R) -> R {
        let mut wired = self.lock_pic();
        let result = act(&mut wired.pic);
        let output = wired.pic.output();
        self.drive_output(&mut wired, output);
        result
    }

    fn drive_output(&self, wired: &mut WiredPic, level: bool) {
        if level == std::mem::replace(&mut wired.output, level) {
            return;
        }
        self.set_pin(PIC_PIN, level);
        if let Some(apic) = self.apics.first() {
            apic.set_lint0(level);
        }
    }

    fn lock_pic(&self) -> MutexGuard<'_, WiredPic> {
        self.pic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_pin(&self, pin: usize, level: bool) {
        self.lock_ioapic().set_pin(pin, level, &|message| self.deliver(message));
    }

    fn lock_ioapic(&self) -> MutexGuard<'_, IoApic> {
        self.ioapic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IrqSink for InterruptFabric {
    fn set_line(&self, line: u32, level: bool) {
        if line < ISA_LINES {
            self.with_pic(|pic| pic.set_line(line, level));
        }
        match line {
            0 => self.set_pin(TIMER_PIN as usize, level),
            TIMER_PIN => {}
            _ => self.set_pin(line as usize, level),
        }
    }
}

/// The PIC's ports on the bus.
struct PicPorts(Arc<InterruptFabric>);

impl Device for PicPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.with_pic(|pic| {
            for (at, byte) in (offset..).zip(data) {
                *byte = pic.read(at);
            }
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.with_pic(|pic| {
            for (at, &byte) in (offset..).zip(data) {
                pic.write(at, byte);
            }
        });
    }

    fn register(&self, offset: u64, write: bool) -> &'static str {
        self.0.with_pic(|pic| pic.register(offset, write))
    }
}

/// The I/O APIC's window on the bus. Registers are 32 bits wide at multiples of 16; narrower writes have zeroes above.
struct IoApicWindow(Arc<InterruptFabric>);

impl Device for IoApicWindow {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let value = self.0.lock_ioapic().read(offset).to_le_bytes();
        for (to, from) in data.iter_mut().zip(value) {
            *to = from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        for (to, &from) in value.iter_mut().zip(data) {
            *to = from;
        }
        let fabric = &self.0;
        fabric.lock_ioapic().write(offset, u32::from_le_bytes(value), &|message| fabric.deliver(message));
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        self.0.lock_ioapic().register(offset)
    }
}
