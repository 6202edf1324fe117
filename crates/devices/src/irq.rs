//! Interrupt lines: a device's end of the wire to an interrupt controller.

use std::sync::{Arc, Mutex};

/// The controller's end of a group of lines.
///
/// It may be called with a device's lock held, so an implementation never calls back into a device.
pub trait IrqSink: Send + Sync {
    /// Sets the level of line `line`: what an edge or a level means is the controller's business.
    fn set_line(&self, line: u32, level: bool);
}

/// One line of an [`IrqSink`].
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    number: u32,
}

impl IrqLine {
    /// Line `number` of `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, number: u32) -> Self {
        Self { sink, number }
    }

    /// A line that leads nowhere.
    pub fn unconnected() -> Self {
        struct Nowhere;
        impl IrqSink for Nowhere {
            fn set_line(&self, _line: u32, _level: bool) {}
        }
        Self::new(Arc::new(Nowhere), 0)
    }

    /// A line that drives two: what one device's pin is wired to.
    pub fn both(first: Self, second: Self) -> Self {
        struct Both([IrqLine; 2]);
        impl IrqSink for Both {
            fn set_line(&self, _line: u32, level: bool) {
                self.0.iter().for_each(|line| line.set(level));
            }
        }
        Self::new(Arc::new(Both([first, second])), 0)
    }

    /// The line's number at its controller.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Sets the line's level.
    pub fn set(&self, level: bool) {
        self.sink.set_line(self.number, level);
    }

    /// Raises and lowers the line: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

impl std::fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IrqLine({})", self.number)
    }
}

/// What the controller makes of a line that several devices share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Level-triggered, as PCI's INTx pins: the line is high while one of the devices holds it high.
    Level,
    /// Edge-triggered, as an ISA line that a second card sits on: the same, and the line falls for an instant when
    /// another device joins, which is the edge that the controller would not see otherwise.
    Edge,
}

/// Several devices on one line.
pub struct SharedLine {
    line: IrqLine,
    sharing: Sharing,
    levels: Mutex<SharedLevels>,
}

#[derive(Default)]
struct SharedLevels {
    /// By the input's number.
    inputs: Vec<bool>,
    high: usize,
}

impl SharedLine {
    /// Nobody on `line` yet, which must have no other driver.
    pub fn new(line: IrqLine, sharing: Sharing) -> Arc<Self> {
        Arc::new(Self { line, sharing, levels: Mutex::default() })
    }

    /// The end for one more device.
    pub fn input(self: &Arc<Self>) -> IrqLine {
        let mut levels = self.lock();
        levels.inputs.push(false);
        let number = u32::try_from(levels.inputs.len() - 1).unwrap_or(u32::MAX);
        IrqLine::new(self.clone(), number)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, SharedLevels> {
        self.levels.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl IrqSink for SharedLine {
    fn set_line(&self, input: u32, level: bool) {
        let mut levels = self.lock();
        let Some(input) = levels.inputs.get_mut(input as usize) else { return };
        if std::mem::replace(input, level) == level {
            return;
        }
        levels.high = if level { levels.high + 1 } else { levels.high.saturating_sub(1) };
        // With the levels locked, so that changes arrive in their order.
        if level && levels.high > 1 && self.sharing == Sharing::Edge {
            self.line.set(false);
        }
        if level || levels.high == 0 {
            self.line.set(level);
        }
    }
}

/// Most changes that a [`RecordedLines`] keeps.
const RECORD_LIMIT: usize = 65536;

/// An [`IrqSink`] for tests that remembers what happened to its lines.
#[derive(Debug, Default)]
pub struct RecordedLines(Mutex<Recorded>);

#[derive(Debug, Default)]
struct Recorded {
    levels: std::collections::BTreeMap<u32, bool>,
    changes: Vec<(u32, bool)>,
}

impl RecordedLines {
    /// A sink whose lines are all low, to be shared with the lines that [`Self::line`] gives.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Line `number` of this sink.
    pub fn line(self: &Arc<Self>, number: u32) -> IrqLine {
        IrqLine::new(self.clone(), number)
    }

    /// The level of line `number` now.
    pub fn level(&self, number: u32) -> bool {
        self.lock().levels.get(&number).copied().unwrap_or(false)
    }

    /// Takes the changes since the last call, in their order: line and new level. Setting a line to the level that it
    /// has is no change.
    pub fn take_changes(&self) -> Vec<(u32, bool)> {
        std::mem::take(&mut self.lock().changes)
    }

    /// How often line `number` rose since the last call of this or [`Self::take_changes`], which it takes all.
    pub fn take_edges(&self, number: u32) -> usize {
        self.take_changes().iter().filter(|&&change| change == (number, true)).count()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Recorded> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl IrqSink for RecordedLines {
    fn set_line(&self, line: u32, level: bool) {
        let mut recorded = self.lock();
        if recorded.levels.insert(line, level).unwrap_or(false) != level
            && recorded.changes.len() < RECORD_LIMIT
        {
            recorded.changes.push((line, level));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pulse_is_one_edge_and_leaves_the_line_low() {
        let lines = RecordedLines::new();
        lines.line(4).pulse();
        assert!(!lines.level(4));
        assert_eq!(lines.take_changes(), [(4, true), (4, false)]);
    }

    #[test]
    fn a_line_may_drive_two() {
        let lines = RecordedLines::new();
        IrqLine::both(lines.line(8), lines.line(3)).set(true);
        assert!(lines.level(8) && lines.level(3));
    }

    #[test]
    fn repeating_a_level_is_no_change() {
        let lines = RecordedLines::new();
        lines.line(1).set(false);
        lines.line(1).set(true);
        lines.line(1).set(true);
        assert_eq!(lines.take_edges(1), 1);
        assert!(lines.level(1));
    }

    #[test]
    fn a_shared_level_is_high_until_its_last_device_lets_go() {
        let lines = RecordedLines::new();
        let shared = SharedLine::new(lines.line(17), Sharing::Level);
        let devices: Vec<_> = (0..40).map(|_| shared.input()).collect();
        for device in &devices {
            device.set(true);
            device.set(true);
        }
        assert_eq!(lines.take_changes(), [(17, true)]);
        for device in &devices {
            assert!(lines.level(17));
            device.set(false);
            device.set(false);
        }
        assert_eq!(lines.take_changes(), [(17, false)]);
    }

    #[test]
    fn each_rise_of_a_shared_edge_is_an_edge() {
        let lines = RecordedLines::new();
        let shared = SharedLine::new(lines.line(4), Sharing::Edge);
        let (first, second) = (shared.input(), shared.input());
        first.set(true);
        second.set(true);
        first.set(false);
        assert!(lines.level(4));
        second.set(false);
        assert_eq!(lines.take_changes(), [(4, true), (4, false), (4, true), (4, false)]);
    }
}
