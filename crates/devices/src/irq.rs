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
    fn repeating_a_level_is_no_change() {
        let lines = RecordedLines::new();
        lines.line(1).set(false);
        lines.line(1).set(true);
        lines.line(1).set(true);
        assert_eq!(lines.take_edges(1), 1);
        assert!(lines.level(1));
    }
}
