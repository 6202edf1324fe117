//! The two 8259A interrupt controllers of a PC, and their edge/level registers.
//!
//! Intel, *8259A Programmable Interrupt Controller*; the edge/level registers (ELCR) as in the data sheets of the
//! PIIX and ICH, where they replace the LTIM bit of ICW1.
//!
//! ```text
//!            ICW1          ICW2                 ICW3                 ICW4
//!  (any) ----------> Icw2 ------> Icw3 ----------------> Icw4 ---------------> Ready
//!                           \---- if single ---->/  \---- if IC4 is 0 ---->/
//! ```
//!
//! One deviation: an edge stays latched where its line falls before it is acknowledged (the data sheet then gives
//! the spurious interrupt 7), so that a device model may pulse its line.

/// The master's input that the slave's output is wired to.
const CASCADE: u8 = 2;
/// The input whose vector a spurious interrupt gets.
const SPURIOUS: u8 = 7;

mod icw1 {
    pub const ICW4_NEEDED: u8 = 1 << 0;
    pub const SINGLE: u8 = 1 << 1;
    pub const SELECT: u8 = 1 << 4;
}

mod icw4 {
    pub const AUTO_EOI: u8 = 1 << 1;
    pub const SPECIAL_FULLY_NESTED: u8 = 1 << 4;
}

mod ocw2 {
    pub const LEVEL: u8 = 7;
    pub const EOI: u8 = 1 << 5;
    pub const SPECIFIC: u8 = 1 << 6;
    pub const ROTATE: u8 = 1 << 7;
}

mod ocw3 {
    pub const READ_ISR: u8 = 1 << 0;
    pub const READ_REGISTER: u8 = 1 << 1;
    pub const POLL: u8 = 1 << 2;
    pub const SELECT: u8 = 1 << 3;
    pub const SPECIAL_MASK: u8 = 1 << 5;
    pub const ENABLE_SPECIAL_MASK: u8 = 1 << 6;
}

/// What the next write to the data port is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expects {
    /// OCW1: the interrupt mask.
    #[default]
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug)]
struct Chip {
    is_master: bool,
    /// Levels of the inputs.
    lines: u8,
    /// Inputs that are level-triggered.
    level_triggered: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    vector_base: u8,
    /// The input of lowest priority; the next one has the highest.
    lowest: u8,
    expects: Expects,
    icw1: u8,
    icw4: u8,
    reads_isr: bool,
    polled: bool,
    special_mask: bool,
    rotates_on_auto_eoi: bool,
}

impl Chip {
    fn new(is_master: bool) -> Self {
        Self {
            is_master,
            lines: 0,
            level_triggered: 0,
            irr: 0,
            isr: 0,
            imr: 0xff,
            vector_base: 0,
            lowest: 7,
            expects: Expects::Mask,
            icw1: 0,
            icw4: 0,
            reads_isr: false,
            polled: false,
            special_mask: false,
            rotates_on_auto_eoi: false,
        }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let rose = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if self.level_triggered & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rose {
            self.irr |= bit;
        }
    }

    fn set_level_triggered(&mut self, inputs: u8) {
        let changed = self.level_triggered ^ inputs;
        self.level_triggered = inputs;
        self.irr = self.irr & !changed | self.lines & inputs;
    }

    /// The inputs in the order of their priority, the highest first.
    fn by_priority(&self) -> impl Iterator<Item = u8> + use<> {
        let lowest = self.lowest;
        (1..=8).map(move |step| (lowest + step) & 7)
    }

    /// The input that the output asks an interrupt for.
    fn request(&self) -> Option<u8> {
        let requests = self.irr & !self.imr;
        if requests == 0 {
            return None;
        }
        let blocking = if self.special_mask { self.isr & !self.imr } else { self.isr };
        for input in self.by_priority() {
            let bit = 1 << input;
            if blocking & bit != 0 {
                // Special fully nested mode: the slave may ask for something of higher priority on its own input.
                let nested =
                    self.is_master && input == CASCADE && self.icw4 & icw4::SPECIAL_FULLY_NESTED != 0;
                return (nested && requests & bit != 0).then_some(input);
            }
            if requests & bit != 0 {
                return Some(input);
            }
        }
        None
    }

    /// An interrupt-acknowledge cycle (or a poll) takes the request.
    fn accept(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level_triggered & bit == 0 {
            self.irr &= !bit;
        }
        if self.icw4 & icw4::AUTO_EOI == 0 {
            self.isr |= bit;
        } else if self.rotates_on_auto_eoi {
            self.lowest = input;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & icw1::SELECT != 0 {
            self.write_icw1(value);
        } else if value & ocw3::SELECT != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn write_icw1(&mut self, value: u8) {
        self.icw1 = value;
        self.icw4 = 0;
        self.irr = self.lines & self.level_triggered;
        self.isr = 0;
        self.imr = 0;
        self.lowest = 7;
        self.special_mask = false;
        self.reads_isr = false;
        self.polled = false;
        self.rotates_on_auto_eoi = false;
        self.expects = Expects::Icw2;
    }

    fn write_ocw2(&mut self, value: u8) {
        let (eoi, specific, rotate) =
            (value & ocw2::EOI != 0, value & ocw2::SPECIFIC != 0, value & ocw2::ROTATE != 0);
        let level = value & ocw2::LEVEL;
        match (eoi, specific) {
            (true, false) => {
                let in_service = if self.special_mask { self.isr & !self.imr } else { self.isr };
                if let Some(input) = self.by_priority().find(|input| in_service & 1 << input != 0) {
                    self.end(input, rotate);
                }
            }
            (true, true) => self.end(level, rotate),
            (false, false) => self.rotates_on_auto_eoi = rotate,
            (false, true) if rotate => self.lowest = level,
            (false, true) => {}
        }
    }

    fn end(&mut self, input: u8, rotate: bool) {
        self.isr &= !(1 << input);
        if rotate {
            self.lowest = input;
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & ocw3::ENABLE_SPECIAL_MASK != 0 {
            self.special_mask = value & ocw3::SPECIAL_MASK != 0;
        }
        if value & ocw3::POLL != 0 {
            self.polled = true;
        } else if value & ocw3::READ_REGISTER != 0 {
            self.reads_isr = value & ocw3::READ_ISR != 0;
        }
    }

    fn write_data(&mut self, value: u8) {
        self.expects = match self.expects {
            Expects::Mask => {
                self.imr = value;
                Expects::Mask
            }
            Expects::Icw2 => {
                self.vector_base = value & 0xf8;
                if self.icw1 & icw1::SINGLE == 0 { Expects::Icw3 } else { self.after_icw3() }
            }
            // The wiring of the cascade is the board's.
            Expects::Icw3 => self.after_icw3(),
            Expects::Icw4 => {
                self.icw4 = value;
                Expects::Mask
            }
        };
    }

    fn after_icw3(&self) -> Expects {
        if self.icw1 & icw1::ICW4_NEEDED != 0 { Expects::Icw4 } else { Expects::Mask }
    }

    fn read(&mut self, data_port: bool) -> u8 {
        if std::mem::take(&mut self.polled) {
            return self.poll();
        }
        match (data_port, self.reads_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn poll(&mut self) -> u8 {
        match self.request() {
            Some(input) => {
                self.accept(input);
                0x80 | input
            }
            None => 0,
        }
    }

    fn register(&self, data_port: bool, write: bool) -> &'static str {
        match (data_port, write) {
            (false, true) => "ICW1/OCW2/OCW3",
            (false, false) if self.polled => "poll",
            (false, false) if self.reads_isr => "ISR",
            (false, false) => "IRR",
            (true, false) => "IMR",
            (true, true) => match self.expects {
                Expects::Mask => "IMR",
                Expects::Icw2 => "ICW2",
                Expects::Icw3 => "ICW3",
                Expects::Icw4 => "ICW4",
            },
        }
    }
}

/// Inputs of each chip that its ELCR can make level-triggered: not the timer, the keyboard, the cascade, the clock or
/// the coprocessor.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// The registers of both chips, as offsets of their bus ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    /// Ports 0x20 and 0xa0.
    Command(usize),
    /// Ports 0x21 and 0xa1.
    Data(usize),
    /// Ports 0x4d0 and 0x4d1.
    Elcr(usize),
}

impl Register {
    fn at(offset: u64) -> Option<Self> {
        let chip = (offset & 1) as usize;
        match offset {
            0 => Some(Self::Command(0)),
            1 => Some(Self::Data(0)),
            2 => Some(Self::Command(1)),
            3 => Some(Self::Data(1)),
            4 | 5 => Some(Self::Elcr(chip)),
            _ => None,
        }
    }
}

/// Port ranges of the pair: first port, and the offset that it has in [`Pic::read`] and [`Pic::write`]; each is two
/// ports long.
pub(super) const PORTS: [(u64, u64); 3] = [(0x20, 0), (0xa0, 2), (0x4d0, 4)];

/// The pair of 8259As: sixteen lines in, one out.
#[derive(Clone, Debug)]
pub(super) struct Pic {
    chips: [Chip; 2],
}

impl Default for Pic {
    fn default() -> Self {
        Self { chips: [Chip::new(true), Chip::new(false)] }
    }
}

impl Pic {
    /// Everything masked, nothing in service.
    pub fn new() -> Self {
        Self::default()
    }

    /// The state after power-up; the lines keep their levels.
    pub fn reset(&mut self) {
        for chip in &mut self.chips {
            *chip = Chip { lines: chip.lines, ..Chip::new(chip.is_master) };
        }
    }

    /// Sets the level of ISA interrupt `irq`. There is no line 2 (it is the cascade), and none above 15.
    pub fn set_line(&mut self, irq: u32, level: bool) {
        match irq {
            0..=7 if irq != u32::from(CASCADE) => self.chips[0].set_line(irq as u8, level),
            8..=15 => self.chips[1].set_line(irq as u8 - 8, level),
            _ => {}
        }
        self.cascade();
    }

    /// The level of the pair's INTR output.
    pub fn output(&self) -> bool {
        self.chips[0].request().is_some()
    }

    /// The interrupt-acknowledge cycle: gives the vector. With nothing to acknowledge it is that of input 7 of the
    /// chip that was asked: the spurious interrupt.
    pub fn acknowledge(&mut self) -> u8 {
        let [master, slave] = &mut self.chips;
        let vector = match master.request() {
            None => master.vector_base | SPURIOUS,
            Some(CASCADE) => {
                master.accept(CASCADE);
                match slave.request() {
                    None => slave.vector_base | SPURIOUS,
                    Some(input) => {
                        slave.accept(input);
                        slave.vector_base | input
                    }
                }
            }
            Some(input) => {
                master.accept(input);
                master.vector_base | input
            }
        };
        self.cascade();
        vector
    }

    /// Reads the register at `offset`: 0 and 1 are the master's ports, 2 and 3 the slave's, 4 and 5 the ELCRs.
    pub fn read(&mut self, offset: u64) -> u8 {
        let value = match Register::at(offset) {
            Some(Register::Command(chip)) => self.chips[chip].read(false),
            Some(Register::Data(chip)) => self.chips[chip].read(true),
            Some(Register::Elcr(chip)) => self.chips[chip].level_triggered,
            None => 0xff,
        };
        self.cascade();
        value
    }

    /// Writes the register at `offset`, as for [`Self::read`].
    pub fn write(&mut self, offset: u64, value: u8) {
        match Register::at(offset) {
            Some(Register::Command(chip)) => self.chips[chip].write_command(value),
            Some(Register::Data(chip)) => self.chips[chip].write_data(value),
            Some(Register::Elcr(chip)) => self.chips[chip].set_level_triggered(value & ELCR_WRITABLE[chip]),
            None => {}
        }
        self.cascade();
    }

    /// The data sheet's name of the register at `offset`.
    pub fn register(&self, offset: u64, write: bool) -> &'static str {
        match Register::at(offset) {
            Some(Register::Command(chip)) => self.chips[chip].register(false, write),
            Some(Register::Data(chip)) => self.chips[chip].register(true, write),
            Some(Register::Elcr(_)) => "ELCR",
            None => "none",
        }
    }

    /// The master's input 2 follows the slave's output.
    fn cascade(&mut self) {
        let [master, slave] = &mut self.chips;
        let bit = 1 << CASCADE;
        master.irr = if slave.request().is_some() { master.irr | bit } else { master.irr & !bit };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASTER: u64 = 0;
    const SLAVE: u64 = 2;

    /// A pair as Linux and most others set it up: vectors 0x30 and 0x38, all unmasked.
    fn pic_with(icw4: u8) -> Pic {
        let mut pic = Pic::new();
        for (chip, base, icw3) in [(MASTER, 0x30, 4), (SLAVE, 0x38, 2)] {
            pic.write(chip, 0x11);
            for value in [base, icw3, icw4, 0] {
                pic.write(chip + 1, value);
            }
        }
        pic
    }

    fn pic() -> Pic {
        pic_with(1)
    }

    fn pulse(pic: &mut Pic, irq: u32) {
        pic.set_line(irq, true);
        pic.set_line(irq, false);
    }

    fn isr(pic: &mut Pic, chip: u64) -> u8 {
        pic.write(chip, 0x0b);
        pic.read(chip)
    }

    fn irr(pic: &mut Pic, chip: u64) -> u8 {
        pic.write(chip, 0x0a);
        pic.read(chip)
    }

    #[test]
    fn an_interrupt_goes_from_request_through_service_to_its_end() {
        let mut pic = pic();
        assert!(!pic.output());
        pic.set_line(4, true);
        assert!(pic.output());
        assert_eq!(irr(&mut pic, MASTER), 0x10);
        assert_eq!(pic.acknowledge(), 0x34);
        assert_eq!((irr(&mut pic, MASTER), isr(&mut pic, MASTER)), (0, 0x10));
        pic.write(MASTER, 0x20);
        assert_eq!(isr(&mut pic, MASTER), 0);
        assert!(!pic.output(), "an edge is one interrupt, however long the line stays high");
    }

    #[test]
    fn the_higher_priority_comes_first_and_blocks_the_lower() {
        let mut pic = pic();
        pulse(&mut pic, 5);
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x33);
        assert!(!pic.output());
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31, "a higher one interrupts");
        pic.write(MASTER, 0x20);
        assert_eq!(isr(&mut pic, MASTER), 0x08, "the non-specific EOI ends the highest in service");
        pic.write(MASTER, 0x63);
        assert_eq!(pic.acknowledge(), 0x35);
    }

    #[test]
    fn the_slave_comes_through_input_2_and_both_need_an_eoi() {
        let mut pic = pic();
        pulse(&mut pic, 12);
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x3c);
        assert_eq!((isr(&mut pic, MASTER), isr(&mut pic, SLAVE)), (0x04, 0x10));
        pulse(&mut pic, 9);
        assert!(!pic.output(), "without the special fully nested mode the master's input 2 is in service");
        pic.write(SLAVE, 0x20);
        pic.write(MASTER, 0x20);
        assert_eq!(pic.acknowledge(), 0x39);
        pic.write(SLAVE, 0x20);
        pic.write(MASTER, 0x20);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn the_special_fully_nested_mode_lets_the_slave_interrupt_itself() {
        let mut pic = pic_with(0x11);
        pulse(&mut pic, 12);
        assert_eq!(pic.acknowledge(), 0x3c);
        pulse(&mut pic, 3);
        assert!(!pic.output());
        pulse(&mut pic, 9);
        assert_eq!(pic.acknowledge(), 0x39);
    }

    #[test]
    fn a_level_interrupt_comes_back_until_its_line_falls() {
        let mut pic = pic();
        pic.write(5, 0xff);
        assert_eq!(pic.read(5), 0xde);
        pic.set_line(11, true);
        assert_eq!(pic.acknowledge(), 0x3b);
        pic.write(SLAVE, 0x20);
        pic.write(MASTER, 0x20);
        assert_eq!(pic.acknowledge(), 0x3b);
        pic.set_line(11, false);
        pic.write(SLAVE, 0x20);
        pic.write(MASTER, 0x20);
        assert!(!pic.output());
    }

    #[test]
    fn a_request_that_is_gone_at_its_acknowledgement_is_spurious() {
        let mut pic = pic();
        pic.write(4, 0x20);
        pic.set_line(5, true);
        pic.set_line(5, false);
        assert_eq!(pic.acknowledge(), 0x37);
        assert_eq!(isr(&mut pic, MASTER), 0, "a spurious interrupt is not in service");
        pulse(&mut pic, 10);
        // The slave's request is masked between the master's acknowledgement and its own.
        pic.chips[1].imr = 0xff;
        assert_eq!(pic.acknowledge(), 0x3f);
        assert_eq!((isr(&mut pic, MASTER), isr(&mut pic, SLAVE)), (0x04, 0));
    }

    #[test]
    fn masking_holds_an_edge_back_and_initialization_forgets_it() {
        let mut pic = pic();
        pic.write(MASTER + 1, 0x10);
        assert_eq!(pic.read(MASTER + 1), 0x10);
        pulse(&mut pic, 4);
        assert!(!pic.output());
        pic.write(MASTER + 1, 0);
        assert!(pic.output());
        pic.write(MASTER, 0x11);
        assert!(!pic.output());
    }

    #[test]
    fn an_automatic_eoi_leaves_nothing_in_service_and_may_rotate() {
        let mut pic = pic_with(3);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34);
        assert_eq!(isr(&mut pic, MASTER), 0);
        pic.write(MASTER, 0x80);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34);
        pulse(&mut pic, 3);
        pulse(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x35, "4 has the lowest priority now, so 5 the highest");
        pic.write(MASTER, 0x00);
        pulse(&mut pic, 6);
        assert_eq!(pic.acknowledge(), 0x36);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn rotation_moves_the_priorities() {
        let mut pic = pic();
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x33);
        pic.write(MASTER, 0xa0);
        pulse(&mut pic, 3);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.write(MASTER, 0xe4);
        assert_eq!(isr(&mut pic, MASTER), 0);
        pulse(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(MASTER, 0x20);
        pic.write(MASTER, 0xc2);
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x33, "3 has the highest priority once 2 has the lowest");
    }

    #[test]
    fn the_special_mask_mode_lets_lower_priorities_through() {
        let mut pic = pic();
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x33);
        pulse(&mut pic, 6);
        assert!(!pic.output());
        pic.write(MASTER, 0x68);
        pic.write(MASTER + 1, 0x08);
        assert_eq!(pic.acknowledge(), 0x36);
        pic.write(MASTER, 0x20);
        assert_eq!(isr(&mut pic, MASTER), 0x08, "a masked one is not ended by a non-specific EOI");
    }

    #[test]
    fn a_poll_acknowledges() {
        let mut pic = pic();
        pulse(&mut pic, 6);
        pic.write(MASTER, 0x0c);
        assert_eq!(pic.read(MASTER), 0x86);
        assert_eq!(isr(&mut pic, MASTER), 0x40);
        pic.write(MASTER, 0x0c);
        assert_eq!(pic.read(MASTER), 0);
    }

    #[test]
    fn initialization_without_icw4_or_cascade_takes_fewer_words() {
        let mut pic = Pic::new();
        pic.write(MASTER, 0x12);
        pic.write(MASTER + 1, 0x40);
        pic.write(MASTER + 1, 0xfe);
        assert_eq!(pic.read(MASTER + 1), 0xfe);
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x40);
    }
}
