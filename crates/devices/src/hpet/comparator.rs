//! One comparator of the HPET.

use bitflags::bitflags;

use super::ROUTES;

bitflags! {
    /// A comparator's configuration register, but for its route.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Config: u64 {
        /// Level-triggered.
        const INT_TYPE_CNF = 1 << 1;
        const INT_ENB_CNF = 1 << 2;
        /// Periodic.
        const TYPE_CNF = 1 << 3;
        /// It can be periodic.
        const PER_INT_CAP = 1 << 4;
        /// It has 64 bits.
        const SIZE_CAP = 1 << 5;
        /// The next write of a periodic comparator sets its value, not only its period.
        const VAL_SET_CNF = 1 << 6;
        /// It compares 32 bits only.
        const MODE32_CNF = 1 << 8;
    }
}

const WRITABLE: Config = Config::INT_TYPE_CNF
    .union(Config::INT_ENB_CNF)
    .union(Config::TYPE_CNF)
    .union(Config::VAL_SET_CNF)
    .union(Config::MODE32_CNF);
const CAPABILITIES: Config = Config::PER_INT_CAP.union(Config::SIZE_CAP);
const ROUTE_SHIFT: u32 = 9;
const ROUTE_MASK: u64 = 0x1f;
const ROUTE_CAPABILITIES_SHIFT: u32 = 32;

/// Its registers, and what it has done.
#[derive(Clone, Debug)]
pub(super) struct Comparator {
    pub(super) config: Config,
    route: u32,
    /// The counter's value that it waits for.
    pub(super) value: u64,
    /// What is added to the value at each match, where it is periodic.
    period: u64,
    /// Its status bit.
    pub(super) pending: bool,
    /// When it matched last, in nanoseconds.
    pub(super) last_match: u64,
}

impl Default for Comparator {
    fn default() -> Self {
        Self { config: Config::empty(), route: 0, value: u64::MAX, period: 0, pending: false, last_match: 0 }
    }
}

impl Comparator {
    /// The configuration register.
    pub(super) fn configuration(&self) -> u64 {
        let routes: u64 = ROUTES.iter().map(|pin| 1 << pin).sum();
        (self.config | CAPABILITIES).bits()
            | u64::from(self.route) << ROUTE_SHIFT
            | routes << ROUTE_CAPABILITIES_SHIFT
    }

    /// Sets the configuration register.
    pub(super) fn configure(&mut self, value: u64) {
        self.config = Config::from_bits_truncate(value) & WRITABLE;
        self.route = (value >> ROUTE_SHIFT & ROUTE_MASK) as u32;
        if !self.config.contains(Config::INT_TYPE_CNF) {
            self.pending = false;
        }
        self.value &= self.mask();
        self.period &= self.mask();
    }

    /// The I/O APIC's pin that it is routed to; reset leaves one that is not in [`ROUTES`].
    pub(super) fn route(&self) -> u32 {
        self.route
    }

    /// Sets the bits of the comparator register that `mask` has.
    pub(super) fn set_value(&mut self, value: u64, mask: u64) {
        let merge = |old: u64| (old & !mask | value & mask) & self.mask();
        if !self.config.contains(Config::TYPE_CNF) {
            self.value = merge(self.value);
            return;
        }
        let (new_value, new_period) = (merge(self.value), merge(self.period));
        if self.config.contains(Config::VAL_SET_CNF) {
            self.value = new_value;
            self.config.remove(Config::VAL_SET_CNF);
        }
        self.period = new_period;
    }

    /// Takes note of the `elapsed` ticks (not 0) since the counter was `from`; whether it matched in them.
    pub(super) fn advance(&mut self, from: u64, elapsed: u64) -> bool {
        let to_match = self.ticks_to_match(from);
        let Some(beyond) = elapsed.checked_sub(to_match) else { return false };
        if self.config.contains(Config::TYPE_CNF) && self.period != 0 {
            let periods = beyond / self.period + 1;
            self.value = self.value.wrapping_add(periods.wrapping_mul(self.period)) & self.mask();
        }
        true
    }

    /// Ticks until it matches next, at least 1: the present tick's match has happened.
    pub(super) fn ticks_to_match(&self, counter: u64) -> u64 {
        match self.value.wrapping_sub(counter) & self.mask() {
            // Once round.
            0 => self.mask().saturating_add(1),
            ticks => ticks,
        }
    }

    /// The bits that it compares.
    fn mask(&self) -> u64 {
        if self.config.contains(Config::MODE32_CNF) { u32::MAX.into() } else { u64::MAX }
    }
}
