//! One counter of the i8254: the six modes as functions of the clocks since the count was loaded.

/// The modes of the control word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    InterruptOnTerminalCount = 0,
    OneShot = 1,
    RateGenerator = 2,
    SquareWave = 3,
    SoftwareStrobe = 4,
    HardwareStrobe = 5,
}

/// Which bytes of the count are read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low = 1,
    High = 2,
    LowThenHigh = 3,
}

/// What the counting element does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// No count has been written since the control word, or the trigger has not come.
    Idle,
    /// The count was, or will be, loaded at this tick.
    Since(i64),
    /// The gate stopped it this many clocks after the load.
    Stopped(i64),
}

/// One counter. Its methods take the time in clocks, which never goes back; [`Self::advance`] comes first.
#[derive(Debug)]
pub(super) struct Counter {
    mode: Mode,
    access: Access,
    bcd: bool,
    gate: bool,
    /// The count register, in clocks: 1 to 65,536 (BCD: to 10,000).
    count: i64,
    run: Run,
    /// A count that the rate generator or the square wave takes at the end of its (half) cycle, and since when.
    next: Option<(i64, i64)>,
    /// The first byte of a count of two.
    first_byte: Option<u8>,
    /// The next read gives the high byte of two.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    /// An unprogrammed counter: the data sheet leaves it open, this is the mode that does nothing.
    pub(super) fn new(gate: bool) -> Self {
        Self {
            mode: Mode::InterruptOnTerminalCount,
            access: Access::LowThenHigh,
            bcd: false,
            gate,
            count: 0x10000,
            run: Run::Idle,
            next: None,
            first_byte: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// A control word for this counter.
    pub(super) fn write_control(&mut self, value: u8, now: i64) {
        let access = match value >> 4 & 3 {
            0 => {
                self.advance(now);
                return self.latch_count(now);
            }
            1 => Access::Low,
            2 => Access::High,
            _ => Access::LowThenHigh,
        };
        let mode = match value >> 1 & 7 {
            0 => Mode::InterruptOnTerminalCount,
            1 => Mode::OneShot,
            2 | 6 => Mode::RateGenerator,
            3 | 7 => Mode::SquareWave,
            4 => Mode::SoftwareStrobe,
            _ => Mode::HardwareStrobe,
        };
        *self = Self { mode, access, bcd: value & 1 != 0, count: self.count, ..Self::new(self.gate) };
        self.count = self.count.min(self.modulus());
    }

    /// A byte of a count.
    pub(super) fn write(&mut self, value: u8, now: i64) {
        let count = match self.access {
            Access::Low => u16::from(value),
            Access::High => u16::from(value) << 8,
            Access::LowThenHigh => match self.first_byte.take() {
                Some(low) => u16::from_le_bytes([low, value]),
                None => {
                    self.first_byte = Some(value);
                    // In mode 0 the first byte stops the count and lowers the output.
                    if self.mode == Mode::InterruptOnTerminalCount {
                        self.run = Run::Idle;
                    }
                    return;
                }
            },
        };
        self.load(self.decode(count), now);
    }

    fn load(&mut self, count: i64, now: i64) {
        match self.mode {
            Mode::RateGenerator | Mode::SquareWave if self.run != Run::Idle => self.next = Some((count, now)),
            Mode::OneShot | Mode::HardwareStrobe => self.next = Some((count, now)),
            _ if !self.gate => (self.count, self.run) = (count, Run::Stopped(0)),
            _ => (self.count, self.run) = (count, Run::Since(now + 1)),
        }
    }

    /// The gate input changes, or not.
    pub(super) fn set_gate(&mut self, gate: bool, now: i64) {
        self.advance(now);
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate, self.run) {
            (Mode::OneShot | Mode::HardwareStrobe, true, _) => {
                if let Some((count, _)) = self.next.take() {
                    self.count = count;
                } else if self.run == Run::Idle {
                    return; // Never programmed.
                }
                self.run = Run::Since(now + 1);
            }
            (Mode::OneShot | Mode::HardwareStrobe, false, _) | (_, _, Run::Idle) => {}
            (_, false, Run::Since(start)) => self.run = Run::Stopped((now - start).max(0)),
            (Mode::InterruptOnTerminalCount | Mode::SoftwareStrobe, true, Run::Stopped(elapsed)) => {
                self.run = Run::Since(now - elapsed);
            }
            (Mode::RateGenerator | Mode::SquareWave, true, _) => {
                if let Some((count, _)) = self.next.take() {
                    self.count = count;
                }
                self.run = Run::Since(now + 1);
            }
            (_, true, Run::Since(_)) | (_, false, Run::Stopped(_)) => {}
        }
    }

    /// Takes a new count whose time has come.
    pub(super) fn advance(&mut self, now: i64) {
        let (Mode::RateGenerator | Mode::SquareWave, Run::Since(start), Some((next, written))) =
            (self.mode, self.run, self.next)
        else {
            return;
        };
        let cycles = (written - start).max(0).div_euclid(self.count);
        let high_end = start + cycles * self.count + high_clocks(self.count);
        let cycle_end = start + (cycles + 1) * self.count;
        if self.mode == Mode::SquareWave && written < high_end {
            if now >= high_end {
                // The low half that begins here is the new count's.
                self.run = Run::Since(high_end - high_clocks(next));
                (self.count, self.next) = (next, None);
            }
        } else if now >= cycle_end {
            self.run = Run::Since(cycle_end);
            (self.count, self.next) = (next, None);
        }
    }

    /// Clocks since the load; none while there is nothing loaded.
    fn elapsed(&self, now: i64) -> Option<i64> {
        match self.run {
            Run::Idle => None,
            Run::Since(start) => (now >= start).then_some(now - start),
            Run::Stopped(elapsed) => Some(elapsed),
        }
    }

    /// The output.
    pub(super) fn out(&self, now: i64) -> bool {
        let Some(elapsed) = self.elapsed(now) else {
            return self.mode != Mode::InterruptOnTerminalCount;
        };
        match self.mode {
            Mode::InterruptOnTerminalCount | Mode::OneShot => elapsed >= self.count,
            Mode::RateGenerator => !self.gate || elapsed % self.count != self.count - 1,
            Mode::SquareWave => !self.gate || elapsed % self.count < high_clocks(self.count),
            Mode::SoftwareStrobe | Mode::HardwareStrobe => elapsed != self.count,
        }
    }

    /// The tick after `after` at which the output rises next, where it will without the gate's doing.
    pub(super) fn next_rise(&self, after: i64) -> Option<i64> {
        let Run::Since(start) = self.run else { return None };
        let rise = match self.mode {
            Mode::InterruptOnTerminalCount | Mode::OneShot => start + self.count,
            Mode::SoftwareStrobe | Mode::HardwareStrobe => start + self.count + 1,
            Mode::RateGenerator | Mode::SquareWave => {
                start + ((after - start).max(0).div_euclid(self.count) + 1) * self.count
            }
        };
        (rise > after).then_some(rise)
    }

    fn modulus(&self) -> i64 {
        if self.bcd { 10_000 } else { 0x10000 }
    }

    /// The counting element's value as it is read.
    fn value(&self, now: i64) -> u16 {
        let count = self.count;
        let Some(elapsed) = self.elapsed(now) else { return self.encode(count) };
        self.encode(match self.mode {
            Mode::RateGenerator => count - elapsed % count,
            Mode::SquareWave => {
                let position = elapsed % count;
                let high = high_clocks(count);
                let in_half = if position < high { position } else { position - high };
                (count & !1) - 2 * in_half
            }
            _ => count - elapsed,
        })
    }

    fn decode(&self, raw: u16) -> i64 {
        let digit = |shift: u32| i64::from(raw >> shift & 0xf);
        let count = if self.bcd {
            (digit(12) * 1000 + digit(8) * 100 + digit(4) * 10 + digit(0)) % 10_000
        } else {
            i64::from(raw)
        };
        if count == 0 { self.modulus() } else { count }
    }

    fn encode(&self, count: i64) -> u16 {
        let value = count.rem_euclid(self.modulus()) as u16;
        if !self.bcd {
            return value;
        }
        ((value / 1000) << 12) | ((value / 100 % 10) << 8) | ((value / 10 % 10) << 4) | (value % 10)
    }

    /// Keeps the count as it is until it has been read.
    pub(super) fn latch_count(&mut self, now: i64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(now));
        }
    }

    /// Keeps the status byte as it is until it has been read: output, null count, and the control word's lower bits.
    pub(super) fn latch_status(&mut self, now: i64) {
        if self.latched_status.is_some() {
            return;
        }
        let loaded = self.next.is_none() && self.elapsed(now).is_some();
        let status = u8::from(self.out(now)) << 7
            | u8::from(!loaded) << 6
            | (self.access as u8) << 4
            | (self.mode as u8) << 1
            | u8::from(self.bcd);
        self.latched_status = Some(status);
    }

    /// Reads a byte: of the status or the count that was latched, or of the count now.
    pub(super) fn read(&mut self, now: i64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(now)).to_le_bytes();
        let (byte, is_last) = match (self.access, self.read_high) {
            (Access::Low, _) => (low, true),
            (Access::High, _) => (high, true),
            (Access::LowThenHigh, false) => (low, false),
            (Access::LowThenHigh, true) => (high, true),
        };
        self.read_high = !is_last;
        if is_last {
            self.latched_count = None;
        }
        byte
    }
}

/// Clocks of a square wave's high half: the longer one of an odd count.
fn high_clocks(count: i64) -> i64 {
    (count + 1) / 2
}
