//! How software reaches the registers: the xAPIC's page and the x2APIC's MSRs.

use engine::MsrFault;
use x86::apic::{DeliveryMode, ErrorStatus, Icr, SpuriousVector, offset};
use x86::msr;

use super::address::{Mode, x2apic_ldr};
use super::apic::{Apic, Effect, LvtEntry};

/// Version 0x14 (integrated), the number of the last LVT entry, and the ability to suppress EOI broadcasts.
const VERSION: u32 = 0x14 | (LvtEntry::COUNT as u32 - 1) << 16 | 1 << 24;

const DIVIDE_BITS: u32 = 0b1011;

/// A register by its offset in the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Id,
    Version,
    Tpr,
    Apr,
    Ppr,
    Eoi,
    Rrd,
    Ldr,
    Dfr,
    Svr,
    Isr(u32),
    Tmr(u32),
    Irr(u32),
    Esr,
    IcrLow,
    IcrHigh,
    Lvt(LvtEntry),
    InitialCount,
    CurrentCount,
    Divide,
    SelfIpi,
}

impl Register {
    fn at(offset: u32) -> Option<Self> {
        Some(match offset {
            offset::ID => Self::Id,
            offset::VERSION => Self::Version,
            offset::TPR => Self::Tpr,
            offset::APR => Self::Apr,
            offset::PPR => Self::Ppr,
            offset::EOI => Self::Eoi,
            offset::RRD => Self::Rrd,
            offset::LDR => Self::Ldr,
            offset::DFR => Self::Dfr,
            offset::SVR => Self::Svr,
            offset::ISR..offset::TMR => Self::Isr((offset - offset::ISR) >> 4),
            offset::TMR..offset::IRR => Self::Tmr((offset - offset::TMR) >> 4),
            offset::IRR..offset::ESR => Self::Irr((offset - offset::IRR) >> 4),
            offset::ESR => Self::Esr,
            offset::ICR_LOW => Self::IcrLow,
            offset::ICR_HIGH => Self::IcrHigh,
            offset::LVT_CMCI => Self::Lvt(LvtEntry::Cmci),
            offset::LVT_TIMER => Self::Lvt(LvtEntry::Timer),
            offset::LVT_THERMAL => Self::Lvt(LvtEntry::Thermal),
            offset::LVT_PERFORMANCE => Self::Lvt(LvtEntry::Performance),
            offset::LVT_LINT0 => Self::Lvt(LvtEntry::Lint0),
            offset::LVT_LINT1 => Self::Lvt(LvtEntry::Lint1),
            offset::LVT_ERROR => Self::Lvt(LvtEntry::Error),
            offset::TIMER_INITIAL_COUNT => Self::InitialCount,
            offset::TIMER_CURRENT_COUNT => Self::CurrentCount,
            offset::TIMER_DIVIDE => Self::Divide,
            offset::SELF_IPI => Self::SelfIpi,
            _ => return None,
        })
    }

    /// The manual's abbreviation.
    fn name(self) -> &'static str {
        match self {
            Self::Id => "ID",
            Self::Version => "VERSION",
            Self::Tpr => "TPR",
            Self::Apr => "APR",
            Self::Ppr => "PPR",
            Self::Eoi => "EOI",
            Self::Rrd => "RRD",
            Self::Ldr => "LDR",
            Self::Dfr => "DFR",
            Self::Svr => "SVR",
            Self::Isr(_) => "ISR",
            Self::Tmr(_) => "TMR",
            Self::Irr(_) => "IRR",
            Self::Esr => "ESR",
            Self::IcrLow => "ICR",
            Self::IcrHigh => "ICR_HIGH",
            Self::Lvt(LvtEntry::Cmci) => "LVT_CMCI",
            Self::Lvt(LvtEntry::Timer) => "LVT_TIMER",
            Self::Lvt(LvtEntry::Thermal) => "LVT_THERMAL",
            Self::Lvt(LvtEntry::Performance) => "LVT_PERFORMANCE",
            Self::Lvt(LvtEntry::Lint0) => "LVT_LINT0",
            Self::Lvt(LvtEntry::Lint1) => "LVT_LINT1",
            Self::Lvt(LvtEntry::Error) => "LVT_ERROR",
            Self::InitialCount => "TIMER_INITIAL_COUNT",
            Self::CurrentCount => "TIMER_CURRENT_COUNT",
            Self::Divide => "TIMER_DIVIDE",
            Self::SelfIpi => "SELF_IPI",
        }
    }

    /// Whether x2APIC mode lacks it.
    fn is_xapic_only(self) -> bool {
        matches!(self, Self::Apr | Self::Rrd | Self::Dfr | Self::IcrHigh)
    }

    fn is_write_only(self) -> bool {
        matches!(self, Self::Eoi | Self::SelfIpi)
    }

    fn is_read_only(self) -> bool {
        matches!(
            self,
            Self::Version | Self::Apr | Self::Ppr | Self::Rrd | Self::Isr(_) | Self::Tmr(_) | Self::Irr(_)
        ) || self == Self::CurrentCount
    }
}

/// The manual's name of the register at a byte offset in the APIC's page (an x2APIC MSR's offset is 16 times its
/// distance from 0x800), for the exit ledger.
pub fn register_name(offset: u64) -> &'static str {
    u32::try_from(offset & !0xf).ok().and_then(Register::at).map_or("reserved", Register::name)
}

impl Apic {
    /// Reads bytes of the page. A register is the first four of its sixteen bytes; the rest read as zero.
    pub fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; 16];
        let place = (offset & 0xf) as usize;
        if place < 4 {
            bytes[..4].copy_from_slice(&self.read_xapic((offset & 0xff0) as u32).to_le_bytes());
        }
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(place + index).copied().unwrap_or(0);
        }
    }

    /// Writes a register of the page. Registers take naturally aligned accesses of 32 bits (of 64 the low half); other
    /// writes are lost.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let value = match data {
            &[a, b, c, d, ..] if offset & 0xf == 0 => u32::from_le_bytes([a, b, c, d]),
            _ => return Effect::None,
        };
        match Register::at((offset & 0xff0) as u32) {
            None | Some(Register::SelfIpi) => {
                self.report(ErrorStatus::ILLEGAL_REGISTER);
                Effect::None
            }
            Some(register) => self.write(register, value),
        }
    }

    fn read_xapic(&mut self, offset: u32) -> u32 {
        match Register::at(offset) {
            None | Some(Register::SelfIpi) => {
                self.report(ErrorStatus::ILLEGAL_REGISTER);
                0
            }
            Some(register) => self.read(register),
        }
    }

    /// Reads an x2APIC register. SDM vol. 3, *x2APIC Register Address Space*.
    pub fn read_x2apic(&mut self, index: u32) -> Result<u64, MsrFault> {
        let register = self.x2apic_register(index)?;
        if register.is_write_only() {
            return Err(MsrFault);
        }
        Ok(match register {
            Register::IcrLow => self.icr.bits(),
            register => self.read(register).into(),
        })
    }

    /// Writes an x2APIC register.
    pub fn write_x2apic(&mut self, index: u32, value: u64) -> Result<Effect, MsrFault> {
        let register = self.x2apic_register(index)?;
        if register == Register::IcrLow {
            return self.write_x2apic_icr(value);
        }
        let value = u32::try_from(value).map_err(|_| MsrFault)?;
        // What software could move in xAPIC mode is given by the hardware in x2APIC mode.
        let fixed = matches!(register, Register::Id | Register::Ldr);
        if fixed || register.is_read_only() || value & !self.x2apic_bits(register) != 0 {
            return Err(MsrFault);
        }
        Ok(self.write(register, value))
    }

    fn x2apic_register(&self, index: u32) -> Result<Register, MsrFault> {
        if self.mode() != Mode::X2Apic || !(msr::X2APIC_BASE..=msr::X2APIC_LAST).contains(&index) {
            return Err(MsrFault);
        }
        let register = Register::at((index - msr::X2APIC_BASE) << 4).ok_or(MsrFault)?;
        if register.is_xapic_only() { Err(MsrFault) } else { Ok(register) }
    }

    /// The bits of a writable register that are not reserved in x2APIC mode.
    fn x2apic_bits(&self, register: Register) -> u32 {
        match register {
            Register::Eoi | Register::Esr => 0,
            Register::Tpr | Register::SelfIpi => 0xff,
            Register::Svr => SpuriousVector::all().bits(),
            Register::Divide => DIVIDE_BITS,
            Register::Lvt(entry) => entry.bits(&self.features).bits(),
            _ => u32::MAX,
        }
    }

    fn write_x2apic_icr(&mut self, value: u64) -> Result<Effect, MsrFault> {
        // The delivery status does not exist in this mode, but has always been written back without harm.
        if value & !Icr::all().bits() != 0 {
            return Err(MsrFault);
        }
        self.icr = Icr::from_bits_truncate(value) - Icr::DELIVERY_STATUS;
        Ok(self.send())
    }

    fn read(&mut self, register: Register) -> u32 {
        let x2apic = self.mode() == Mode::X2Apic;
        match register {
            Register::Id if x2apic => self.id,
            Register::Id => u32::from(self.xapic_id) << 24,
            Register::Version => VERSION,
            Register::Tpr => self.tpr.into(),
            Register::Apr => self.apr().into(),
            Register::Ppr => self.ppr().into(),
            Register::Eoi | Register::Rrd | Register::SelfIpi => 0,
            Register::Ldr if x2apic => x2apic_ldr(self.id),
            Register::Ldr => u32::from(self.ldr) << 24,
            Register::Dfr => self.dfr,
            Register::Svr => self.svr.bits(),
            Register::Isr(index) => self.isr.register(index),
            Register::Tmr(index) => self.tmr.register(index),
            Register::Irr(index) => {
                self.settle_timer();
                self.irr.register(index)
            }
            Register::Esr => self.errors.shown.bits(),
            Register::IcrLow => self.icr.bits() as u32,
            Register::IcrHigh => (self.icr.bits() >> 32) as u32,
            Register::Lvt(entry) => self.lvt[entry as usize].bits(),
            Register::InitialCount => self.timer.initial_count(),
            Register::CurrentCount => {
                self.settle_timer();
                self.timer.current_count()
            }
            Register::Divide => self.timer.divide(),
        }
    }

    /// Writes a register; one that is read-only ignores it.
    fn write(&mut self, register: Register, value: u32) -> Effect {
        match register {
            Register::Tpr => self.tpr = value as u8,
            Register::Eoi => return self.end_of_interrupt(),
            Register::Svr => self.write_svr(value),
            Register::Esr => self.errors.show(),
            Register::IcrHigh => {
                let low = self.icr.bits() & 0xffff_ffff;
                self.icr = Icr::from_bits_truncate(low | u64::from(value & 0xff00_0000) << 32);
            }
            Register::IcrLow => {
                let high = self.icr & Icr::DESTINATION;
                self.icr = (Icr::from_bits_truncate(value.into()) | high) - Icr::DELIVERY_STATUS;
                return self.send();
            }
            Register::SelfIpi => self.send_to_self(value as u8),
            Register::Lvt(entry) => self.write_lvt(entry, value),
            Register::InitialCount => {
                self.settle_timer();
                self.timer.set_initial_count(value);
            }
            Register::Divide => {
                self.settle_timer();
                self.timer.set_divide(value & DIVIDE_BITS);
            }
            Register::Id if self.mode() == Mode::XApic => self.xapic_id = (value >> 24) as u8,
            Register::Ldr if self.mode() == Mode::XApic => self.ldr = (value >> 24) as u8,
            Register::Dfr => self.dfr = value | 0x0fff_ffff,
            _ => {}
        }
        Effect::None
    }

    /// Reads IA32_TSC_DEADLINE.
    pub fn read_tsc_deadline(&mut self) -> Result<u64, MsrFault> {
        if !self.features.tsc_deadline {
            return Err(MsrFault);
        }
        self.settle_timer();
        Ok(self.timer.deadline())
    }

    /// Writes IA32_TSC_DEADLINE; a value that the TSC has reached interrupts at once.
    pub fn write_tsc_deadline(&mut self, value: u64) -> Result<(), MsrFault> {
        if !self.features.tsc_deadline {
            return Err(MsrFault);
        }
        self.settle_timer();
        if self.timer.set_deadline(value) {
            self.timer_expired();
        }
        Ok(())
    }

    /// Sets up LINT0 for the PIC and LINT1 for NMIs, as the firmware of a PC leaves its bootstrap processor.
    /// Intel, *MultiProcessor Specification*, *Virtual Wire Mode*.
    pub fn enable_virtual_wire(&mut self) {
        self.write_svr(SpuriousVector::ENABLE.bits() | 0xff);
        self.write_lvt(LvtEntry::Lint0, (DeliveryMode::ExtInt as u32) << 8);
        self.write_lvt(LvtEntry::Lint1, (DeliveryMode::Nmi as u32) << 8);
    }
}
