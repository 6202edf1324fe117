//! Which encodings were executed, and how often.

use std::collections::BTreeMap;

use iced_x86::Code;

/// Cases of each encoding.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// By the encoding's number: executed, and completed without an exception.
    counts: Vec<(u64, u64)>,
}

impl Coverage {
    /// Counts a case.
    pub fn count(&mut self, code: Code, completed: bool) {
        let at = code as usize;
        if self.counts.len() <= at {
            self.counts.resize(at + 1, (0, 0));
        }
        self.counts[at].0 += 1;
        self.counts[at].1 += u64::from(completed);
    }

    /// Cases of an encoding: executed, and completed without an exception.
    pub fn of(&self, code: Code) -> (u64, u64) {
        self.counts.get(code as usize).copied().unwrap_or((0, 0))
    }

    /// Encodings that completed.
    pub fn encodings(&self) -> usize {
        self.counts.iter().filter(|(_, completed)| *completed > 0).count()
    }

    /// The same, by mnemonic.
    pub fn by_mnemonic(&self) -> BTreeMap<String, (u64, u64)> {
        let mut all = BTreeMap::<String, (u64, u64)>::new();
        for code in Code::values() {
            let (executed, completed) = self.of(code);
            if executed > 0 {
                let sum = all.entry(format!("{:?}", code.mnemonic())).or_default();
                *sum = (sum.0 + executed, sum.1 + completed);
            }
        }
        all
    }
}
