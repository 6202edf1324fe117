//! ACPI's fixed hardware, as the ACPI specification's chapter "ACPI Hardware Specification" has it: the PM1a registers,
//! the power-management timer, one block of general-purpose events, and the SMI command port that hands them over.
//!
//! ```text
//!           SLP_EN with S3's SLP_TYP
//!   awake ──────────────────────────────> asleep (the machine stops)
//!         <──────────────────────────────
//!           an enabled event, or the power button: WAK is set, the machine starts again
//! ```
//!
//! All of it is on the standby supply: it keeps its registers while the machine sleeps. The constants are what the FADT
//! says of it. Map [`WINDOWS`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bitflags::bitflags;
use engine::Space;

use crate::bus::{Device, Window};
use crate::clock::{Timer, Timers};
use crate::irq::{IrqLine, IrqSink};
use crate::request::{MachineRequest, RequestSink};

/// PM1a event block: status and enable register, 2 bytes each.
pub const PM1A_EVT: u16 = 0x600;
/// Its length in bytes.
pub const PM1_EVT_LEN: u8 = 4;
/// PM1a control block.
pub const PM1A_CNT: u16 = 0x604;
/// Its length in bytes.
pub const PM1_CNT_LEN: u8 = 2;
/// Power-management timer.
pub const PM_TMR: u16 = 0x608;
/// Its length in bytes.
pub const PM_TMR_LEN: u8 = 4;
/// General-purpose event block 0: status and enable register, 2 bytes each.
pub const GPE0: u16 = 0x620;
/// Its length in bytes.
pub const GPE0_LEN: u8 = 4;
/// SMI command port.
pub const SMI_CMD: u16 = 0xb2;
/// What it takes to set SCI_EN.
pub const ACPI_ENABLE: u8 = 0xa0;
/// What it takes to clear SCI_EN.
pub const ACPI_DISABLE: u8 = 0xa1;
/// The SCI's ISA interrupt: level-triggered, high when asserted.
pub const SCI_IRQ: u32 = 9;
/// SLP_TYP of S5 (soft off).
pub const SLP_TYP_S5: u8 = 5;
/// SLP_TYP of S3 (suspend to memory).
pub const SLP_TYP_S3: u8 = 1;
/// The timer's frequency, in Hz.
pub const PM_TIMER_FREQUENCY: u64 = 3_579_545;

/// Where the device has its registers.
pub const WINDOWS: [Window; 3] = [
    Window { space: Space::Port, base: PM1A_EVT as u64, len: 12, offset: PM1_STS },
    Window { space: Space::Port, base: GPE0 as u64, len: 4, offset: GPE0_STS },
    Window { space: Space::Port, base: SMI_CMD as u64, len: 2, offset: APM_CNT },
];

const PM1_STS: u64 = 0x00;
const PM1_EN: u64 = 0x02;
const PM1_CNT: u64 = 0x04;
const TIMER: u64 = 0x08;
const GPE0_STS: u64 = 0x20;
const GPE0_EN: u64 = 0x22;
const APM_CNT: u64 = 0x40;
const APM_STS: u64 = 0x41;

bitflags! {
    /// PM1 status register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Status: u16 {
        /// The timer's highest bit has changed.
        const TMR = 1 << 0;
        const BM = 1 << 4;
        const GBL = 1 << 5;
        const PWRBTN = 1 << 8;
        const SLPBTN = 1 << 9;
        const RTC = 1 << 10;
        const WAK = 1 << 15;
    }

    /// PM1 enable register.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Enable: u16 {
        const TMR = 1 << 0;
        const GBL = 1 << 5;
        const PWRBTN = 1 << 8;
        const SLPBTN = 1 << 9;
        const RTC = 1 << 10;
    }

    /// PM1 control register; its bits 10 to 12 are SLP_TYP.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Control: u16 {
        /// Power-management events are SCIs, not SMIs.
        const SCI_EN = 1 << 0;
        const BM_RLD = 1 << 1;
        const SLP_TYP = 7 << 10;
        /// Write-only: go to sleep.
        const SLP_EN = 1 << 13;
    }
}

impl Enable {
    /// Events that end a sleep.
    const WAKES: Self = Self::PWRBTN.union(Self::SLPBTN).union(Self::RTC);
}

impl Control {
    /// SCI_EN too, as with Intel's chipsets: Linux sets it after a sleep.
    const WRITABLE: Self = Self::SCI_EN.union(Self::BM_RLD).union(Self::SLP_TYP);

    fn sleep_type(self) -> u8 {
        ((self & Self::SLP_TYP).bits() >> 10) as u8
    }
}

/// The fixed hardware.
pub struct AcpiPm {
    status: Status,
    enable: Enable,
    control: Control,
    gpe_status: u16,
    gpe_enable: u16,
    apm: [u8; 2],
    /// Whether the machine sleeps.
    asleep: bool,
    clock_alarm: Arc<ClockAlarm>,
    /// How often the timer's highest bit had changed when the status was looked at last.
    changes_seen: u64,
    sci: IrqLine,
    requests: RequestSink,
    timers: Timers,
    timer: Timer,
}

/// The clock's interrupt line, as it comes in here: noted with the clock's lock held, looked at later.
struct ClockAlarm {
    rose: AtomicBool,
    level: AtomicBool,
    /// Somebody has to look at once: the event is enabled.
    enabled: AtomicBool,
    timer: Timer,
}

impl IrqSink for ClockAlarm {
    fn set_line(&self, _line: u32, level: bool) {
        if level && !self.level.swap(level, Ordering::SeqCst) {
            self.rose.store(true, Ordering::SeqCst);
            if self.enabled.load(Ordering::SeqCst) {
                self.timer.arm(self.timer.now());
            }
        } else {
            self.level.store(level, Ordering::SeqCst);
        }
    }
}

/// Ticks of the power-management timer in `ns` nanoseconds.
fn ticks(ns: u64) -> u128 {
    u128::from(ns) * u128::from(PM_TIMER_FREQUENCY) / 1_000_000_000
}

/// The first nanosecond after `changes` changes of the timer's bit 31.
fn change_time(changes: u64) -> u64 {
    ((u128::from(changes) << 31) * 1_000_000_000)
        .div_ceil(u128::from(PM_TIMER_FREQUENCY))
        .try_into()
        .unwrap_or(u64::MAX)
}

impl AcpiPm {
    /// The hardware after power-up: legacy mode, until the guest enables ACPI.
    pub fn new(sci: IrqLine, requests: RequestSink, timers: &Timers) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|this: &Weak<Mutex<Self>>| {
            let [timer, alarm] = [this.clone(), this.clone()].map(|this| {
                timers.timer(move |_| {
                    if let Some(pm) = this.upgrade() {
                        pm.lock().unwrap_or_else(PoisonError::into_inner).update();
                    }
                })
            });
            let [rose, level, enabled] = [(); 3].map(|()| AtomicBool::new(false));
            Mutex::new(Self {
                asleep: false,
                clock_alarm: Arc::new(ClockAlarm { rose, level, enabled, timer: alarm }),
                status: Status::empty(),
                enable: Enable::empty(),
                control: Control::empty(),
                gpe_status: 0,
                gpe_enable: 0,
                apm: [0; 2],
                changes_seen: 0,
                sci,
                requests,
                timers: timers.clone(),
                timer,
            })
        })
    }

    /// The line that the clock's interrupt has to drive as well.
    pub fn clock_line(&self) -> IrqLine {
        IrqLine::new(self.clock_alarm.clone(), 0)
    }

    /// The reset of the machine. The timer counts on.
    pub fn reset(&mut self) {
        self.asleep = false;
        self.clock_alarm.rose.store(false, Ordering::SeqCst);
        self.status = Status::empty();
        self.enable = Enable::empty();
        self.control = Control::empty();
        (self.gpe_status, self.gpe_enable) = (0, 0);
        self.apm = [0; 2];
        self.changes_seen = self.changes();
        self.update();
    }

    /// Somebody presses the power button: the guest is asked to shut down, or woken up whatever it has enabled.
    pub fn press_power_button(&mut self) {
        self.status |= Status::PWRBTN;
        if self.asleep {
            self.wake();
        }
        self.update();
    }

    /// General-purpose event `event` (0 to 15) happens.
    pub fn raise_gpe(&mut self, event: u8) {
        self.gpe_status |= 1u16.checked_shl(event.into()).unwrap_or(0);
        self.update();
    }

    fn wake(&mut self) {
        self.asleep = false;
        self.status |= Status::WAK;
        self.requests.send(MachineRequest::Wake);
    }

    fn changes(&self) -> u64 {
        (ticks(self.timers.now()) >> 31) as u64
    }

    /// Looks at the timer and the clock, and brings the SCI in line with the registers.
    fn update(&mut self) {
        // Before looking, so that a rise that comes too late for that finds it set.
        self.clock_alarm.enabled.store(self.enable.contains(Enable::RTC), Ordering::SeqCst);
        if self.clock_alarm.rose.swap(false, Ordering::SeqCst) {
            self.status |= Status::RTC;
        }
        let changes = self.changes();
        if changes != self.changes_seen {
            self.changes_seen = changes;
            self.status |= Status::TMR;
        }
        let fixed = self.status.bits() & self.enable.bits() != 0;
        let general = self.gpe_status & self.gpe_enable != 0;
        let wakes = self.enable & Enable::WAKES;
        if self.asleep && (general || self.status.bits() & wakes.bits() != 0) {
            self.wake();
        }
        self.sci.set(self.control.contains(Control::SCI_EN) && (fixed || general));
        if self.enable.contains(Enable::TMR) && !self.status.contains(Status::TMR) {
            self.timer.arm(change_time(changes + 1));
        } else {
            self.timer.disarm();
        }
    }

    /// All registers of the PM block at one instant.
    fn pm_image(&self) -> [u8; 12] {
        let mut image = [0; 12];
        let timer = ticks(self.timers.now()) as u32;
        image[0..2].copy_from_slice(&self.status.bits().to_le_bytes());
        image[2..4].copy_from_slice(&self.enable.bits().to_le_bytes());
        image[4..6].copy_from_slice(&self.control.bits().to_le_bytes());
        image[8..12].copy_from_slice(&timer.to_le_bytes());
        image
    }

    fn gpe_image(&self) -> [u8; 4] {
        let ([a, b], [c, d]) = (self.gpe_status.to_le_bytes(), self.gpe_enable.to_le_bytes());
        [a, b, c, d]
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        let low = u16::from(value);
        let high = low << 8;
        match offset {
            PM1_STS => self.status.remove(Status::from_bits_truncate(low)),
            0x01 => self.status.remove(Status::from_bits_truncate(high)),
            PM1_EN => self.enable = Enable::from_bits_truncate(self.enable.bits() & 0xff00 | low),
            0x03 => self.enable = Enable::from_bits_truncate(self.enable.bits() & 0x00ff | high),
            PM1_CNT => self.write_control(low, 0x00ff),
            0x05 => self.write_control(high, 0xff00),
            GPE0_STS => self.gpe_status &= !low,
            0x21 => self.gpe_status &= !high,
            GPE0_EN => self.gpe_enable = self.gpe_enable & 0xff00 | low,
            0x23 => self.gpe_enable = self.gpe_enable & 0x00ff | high,
            APM_CNT => self.write_smi_command(value),
            APM_STS => self.apm[1] = value,
            _ => {}
        }
    }

    fn write_control(&mut self, value: u16, lanes: u16) {
        let value = Control::from_bits_truncate(value);
        let kept = Control::from_bits_retain(!(Control::WRITABLE.bits() & lanes));
        self.control = self.control & kept | value & Control::WRITABLE;
        if value.contains(Control::SLP_EN) {
            match self.control.sleep_type() {
                SLP_TYP_S5 => self.requests.send(MachineRequest::PowerOff),
                SLP_TYP_S3 => {
                    self.asleep = true;
                    self.requests.send(MachineRequest::Sleep(3));
                }
                other => log::debug!("the guest asks for a sleep type that the tables do not offer: {other}"),
            }
        }
    }

    fn write_smi_command(&mut self, command: u8) {
        self.apm[0] = command;
        match command {
            ACPI_ENABLE => self.control |= Control::SCI_EN,
            ACPI_DISABLE => self.control -= Control::SCI_EN,
            _ => {}
        }
    }
}

impl Device for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The timer is read often: the rest is left alone where nothing has happened.
        if self.changes() != self.changes_seen || self.clock_alarm.rose.load(Ordering::SeqCst) {
            self.update();
        }
        let (pm, gpe) = (self.pm_image(), self.gpe_image());
        for (index, byte) in data.iter_mut().enumerate() {
            let offset = offset.wrapping_add(index as u64);
            let from = |registers: &[u8], base: u64| {
                let index = usize::try_from(offset.checked_sub(base)?).ok()?;
                registers.get(index).copied()
            };
            let value =
                from(&self.apm, APM_CNT).or_else(|| from(&gpe, GPE0_STS)).or_else(|| from(&pm, PM1_STS));
            *byte = value.unwrap_or(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.update();
        for (index, &byte) in data.iter().enumerate() {
            self.write_byte(offset.wrapping_add(index as u64), byte);
        }
        self.update();
    }

    fn register(&self, offset: u64, _write: bool) -> &'static str {
        match offset {
            PM1_STS..PM1_EN => "PM1_STS",
            PM1_EN..PM1_CNT => "PM1_EN",
            PM1_CNT..0x06 => "PM1_CNT",
            TIMER..0x0c => "PM_TMR",
            GPE0_STS..GPE0_EN => "GPE0_STS",
            GPE0_EN..0x24 => "GPE0_EN",
            APM_CNT => "SMI_CMD",
            APM_STS => "APM_STS",
            _ => "none",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualTime;
    use crate::irq::RecordedLines;

    struct Bench {
        pm: Arc<Mutex<AcpiPm>>,
        lines: Arc<RecordedLines>,
        requests: Arc<Mutex<Vec<MachineRequest>>>,
        time: Arc<ManualTime>,
        timers: Timers,
    }

    fn bench() -> Bench {
        let (lines, time) = (RecordedLines::new(), ManualTime::new());
        let timers = Timers::new(time.clone());
        let (sink, requests) = RequestSink::recording();
        Bench { pm: AcpiPm::new(lines.line(SCI_IRQ), sink, &timers), lines, requests, time, timers }
    }

    impl Bench {
        fn read16(&self, offset: u64) -> u16 {
            let mut data = [0; 2];
            self.pm.lock().unwrap().read(offset, &mut data);
            u16::from_le_bytes(data)
        }
        fn write16(&self, offset: u64, value: u16) {
            self.pm.lock().unwrap().write(offset, &value.to_le_bytes());
        }
        fn smi(&self, command: u8) {
            self.pm.lock().unwrap().write(APM_CNT, &[command]);
        }
        fn timer(&self) -> u32 {
            let mut data = [0; 4];
            self.pm.lock().unwrap().read(TIMER, &mut data);
            u32::from_le_bytes(data)
        }
        fn sci(&self) -> bool {
            self.lines.level(SCI_IRQ)
        }
    }

    #[test]
    fn the_smi_command_port_hands_over() {
        let bench = bench();
        assert_eq!(bench.read16(PM1_CNT), 0);
        bench.smi(ACPI_ENABLE);
        assert_eq!(bench.read16(PM1_CNT), 1);
        bench.smi(ACPI_DISABLE);
        assert_eq!(bench.read16(PM1_CNT), 0);
        bench.write16(PM1_CNT, 1);
        assert_eq!(bench.read16(PM1_CNT), 1, "Linux sets it after a sleep");
    }

    #[test]
    fn s5_powers_off_and_s3_sleeps() {
        let bench = bench();
        bench.write16(PM1_CNT, u16::from(SLP_TYP_S5) << 10);
        assert!(bench.requests.lock().unwrap().is_empty(), "no SLP_EN");
        bench.write16(PM1_CNT, 1 << 13 | u16::from(SLP_TYP_S5) << 10);
        bench.write16(PM1_CNT, 1 << 13 | u16::from(SLP_TYP_S3) << 10);
        bench.write16(PM1_CNT, 1 << 13 | 7 << 10);
        assert_eq!(*bench.requests.lock().unwrap(), [MachineRequest::PowerOff, MachineRequest::Sleep(3)]);
        assert_eq!(bench.read16(PM1_CNT), 7 << 10, "SLP_EN reads as zero");
    }

    #[test]
    fn the_power_button_raises_the_sci_until_its_status_is_cleared() {
        let bench = bench();
        bench.write16(PM1_EN, 1 << 8);
        bench.pm.lock().unwrap().press_power_button();
        assert!(!bench.sci(), "legacy mode");
        bench.smi(ACPI_ENABLE);
        assert!(bench.sci());
        assert_eq!(bench.read16(PM1_STS), 1 << 8);
        bench.write16(PM1_STS, 1 << 8);
        assert!(!bench.sci());
        assert_eq!(bench.read16(PM1_STS), 0);
    }

    const SLEEP: u16 = 1 << 13 | (SLP_TYP_S3 as u16) << 10;

    #[test]
    fn the_clocks_alarm_is_an_event_once_for_each_rise_of_its_line() {
        let bench = bench();
        bench.smi(ACPI_ENABLE);
        let line = bench.pm.lock().unwrap().clock_line();
        line.set(true);
        assert_eq!(bench.timers.next_deadline(), None, "nobody wakes up for an event that is not enabled");
        assert_eq!(bench.read16(PM1_STS), 1 << 10);
        bench.write16(PM1_STS, 1 << 10);
        line.set(true);
        bench.write16(PM1_EN, 1 << 10);
        assert_eq!((bench.read16(PM1_STS), bench.sci()), (0, false));
        line.set(false);
        line.set(true);
        bench.time.run(&bench.timers, 1);
        assert!(bench.sci(), "without anybody reading the status");
    }

    #[test]
    fn an_enabled_event_ends_a_sleep_and_says_so() {
        use MachineRequest::{Sleep, Wake};
        let bench = bench();
        let line = bench.pm.lock().unwrap().clock_line();
        bench.write16(PM1_CNT, SLEEP);
        line.pulse();
        bench.time.run(&bench.timers, 1_000_000);
        assert_eq!(*bench.requests.lock().unwrap(), [Sleep(3)], "the alarm is not enabled");
        bench.write16(PM1_STS, 1 << 10);
        bench.write16(PM1_EN, 1 << 10);
        line.pulse();
        bench.time.run(&bench.timers, 1);
        assert_eq!(*bench.requests.lock().unwrap(), [Sleep(3), Wake]);
        assert_eq!(bench.read16(PM1_STS), 1 << 15 | 1 << 10);
        line.pulse();
        bench.time.run(&bench.timers, 1);
        assert_eq!(bench.requests.lock().unwrap().len(), 2, "it is awake already");
        bench.write16(PM1_CNT, SLEEP);
        assert_eq!(bench.requests.lock().unwrap().len(), 4, "an event that has happened ends it at once");
    }

    #[test]
    fn the_power_button_and_general_purpose_events_end_a_sleep() {
        use MachineRequest::{Sleep, Wake};
        let bench = bench();
        bench.write16(PM1_CNT, SLEEP);
        bench.pm.lock().unwrap().press_power_button();
        bench.write16(PM1_STS, 0xffff);
        bench.write16(PM1_CNT, SLEEP);
        bench.write16(GPE0_EN, 1 << 3);
        bench.pm.lock().unwrap().raise_gpe(3);
        assert_eq!(*bench.requests.lock().unwrap(), [Sleep(3), Wake, Sleep(3), Wake]);
    }

    #[test]
    fn general_purpose_events_raise_the_sci() {
        let bench = bench();
        bench.smi(ACPI_ENABLE);
        bench.pm.lock().unwrap().raise_gpe(9);
        assert!(!bench.sci());
        bench.write16(GPE0_EN, 1 << 9);
        assert!(bench.sci());
        bench.write16(GPE0_STS, 1 << 9);
        assert!(!bench.sci());
    }

    #[test]
    fn the_timer_counts_at_its_frequency() {
        let bench = bench();
        bench.time.advance(1_000_000_000);
        assert_eq!(bench.timer(), 3_579_545);
        bench.time.advance(3600 * 1_000_000_000);
        assert_eq!(u64::from(bench.timer()), 3601 * 3_579_545 % (1 << 32));
    }

    #[test]
    fn each_change_of_the_timers_high_bit_is_an_event() {
        let bench = bench();
        bench.smi(ACPI_ENABLE);
        bench.write16(PM1_EN, 1);
        for _ in 0..3 {
            let passed = bench.timers.now();
            bench.time.run(&bench.timers, change_time(1) - 1_000);
            let early = bench.timers.now() - passed;
            bench.time.run(&bench.timers, 10_000);
            assert!(bench.sci(), "after {early} ns");
            assert_eq!(bench.read16(PM1_STS), 1);
            bench.write16(PM1_STS, 1);
            assert!(!bench.sci());
        }
    }

    #[test]
    fn the_windows_tell_the_registers_apart() {
        let bench = bench();
        let bus = crate::bus::MachineBus::new();
        for window in WINDOWS {
            bus.insert_window(window, "acpi", bench.pm.clone()).unwrap();
        }
        let name = |port: u16| bus.describe(Space::Port, port.into(), true).unwrap().1;
        let names = [PM1A_EVT, PM1A_EVT + 2, PM1A_CNT, PM_TMR, GPE0, GPE0 + 2, SMI_CMD].map(name);
        assert_eq!(names, ["PM1_STS", "PM1_EN", "PM1_CNT", "PM_TMR", "GPE0_STS", "GPE0_EN", "SMI_CMD"]);
    }

    #[test]
    fn no_access_panics() {
        crate::fuzz::exercise(|timers| {
            AcpiPm::new(IrqLine::unconnected(), RequestSink::recording().0, timers)
        });
    }
}
