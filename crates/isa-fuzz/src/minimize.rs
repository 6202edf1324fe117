//! A mismatch with as plain a state as still shows it.

use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions};

use crate::blocks::starts;
use crate::case::{Area, Case, TIMED_OUT, WINDOW};
use crate::compare::difference;
use crate::generate::Generated;
use crate::interpreter::Executor;
use crate::layout;
use crate::oracle::{Oracle, OracleError};
use crate::session::{Mismatch, instruction};

/// Ways to make a case plainer.
fn simpler(case: &Case) -> Vec<Case> {
    let mut all = Vec::new();
    for number in 0..16 {
        all.push(Case { gprs: std::array::from_fn(|n| if n == number { 0 } else { case.gprs[n] }), ..*case });
    }
    for bit in [0, 2, 4, 6, 7, 10, 11] {
        all.push(Case { rflags: case.rflags & !(1 << bit), ..*case });
    }
    all.push(Case { bases: [0; 2], ..*case });
    all.push(Case { window: [0; WINDOW], ..*case });
    let plain = Case::default().area;
    for (first, last) in
        [(0, 32), (32, 160), (160, 416), (576, 832), (1088, 1152), (1152, 1664), (1664, 2688)]
    {
        let mut area = Area(case.area.0);
        area.0[first..last].copy_from_slice(&plain.0[first..last]);
        all.push(Case { area, ..*case });
    }
    all
}

/// A program with one of its instructions after another replaced by NOPs.
fn shorter(case: &Case) -> impl Iterator<Item = Range<usize>> + use<> {
    let starts = starts(case);
    let ends: Vec<usize> = starts.iter().skip(1).copied().chain([case.code().len()]).collect();
    starts.into_iter().zip(ends).map(|(from, to)| from..to)
}

/// Tries every way once.
pub fn minimize(
    oracle: &mut Oracle,
    executor: &mut dyn Executor,
    mismatch: &Mismatch,
    programs: bool,
) -> Result<Mismatch, OracleError> {
    let mut best = mismatch.generated.case;
    let mut text = mismatch.difference.clone();
    let name = executor.name();
    let mut attempt = |best: &mut Case, case: Case| -> Result<(), OracleError> {
        let host = oracle.run_one(&case)?;
        if host.vector == TIMED_OUT {
            return Ok(());
        }
        let generated = Generated { case, ..mismatch.generated.clone() };
        let instruction = instruction(&generated, &host, programs);
        let found = difference(&case, &instruction, &host, &executor.run(&case));
        // The same things must differ, or it is another mismatch.
        if !found.is_empty() && found.lines().next().map(kind) == text.lines().nth(1).map(kind) {
            (*best, text) = (case, format!("  on the {name}:\n{found}"));
        }
        Ok(())
    };
    if programs {
        for range in shorter(&mismatch.generated.case) {
            let mut case = best;
            case.bytes[range].fill(0x90);
            attempt(&mut best, case)?;
        }
    }
    for step in 0..simpler(&best).len() {
        let Some(case) = simpler(&best).into_iter().nth(step) else { break };
        attempt(&mut best, case)?;
    }
    let generated = Generated { case: best, ..mismatch.generated.clone() };
    Ok(Mismatch { generated, difference: text })
}

fn kind(line: &str) -> &str {
    line.split(':').next().unwrap_or(line)
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let case = &self.generated.case;
        let code = self.generated.instruction.code();
        if case.code().len() > 16 {
            writeln!(f, "a program:")?;
            let mut decoder =
                Decoder::with_ip(case.mode.bits(), case.code(), case.mode.rip(), DecoderOptions::NONE);
            for from in starts(case) {
                let code = decoder.decode().code();
                if code != iced_x86::Code::Nopd {
                    writeln!(
                        f,
                        "  {:#x} {code:?} {:02x?}",
                        case.mode.rip() + from as u64,
                        &case.code()[from..decoder.position()]
                    )?;
                }
            }
        } else {
            writeln!(f, "{code:?} {:02x?} in {}-bit code ({:?})", case.code(), case.mode.bits(), case.trap)?;
        }
        writeln!(f, "  registers {:x?}", case.gprs)?;
        writeln!(f, "  flags {:x}, selectors {:x?}, bases {:x?}", case.rflags, case.selectors, case.bases)?;
        let index = self.generated.instruction.memory_index();
        if index.is_vector_register() {
            let (number, area) = (index.number() & 15, &case.area.0);
            writeln!(
                f,
                "  indices {:x?} {:x?}",
                &area[160 + 16 * number..][..16],
                &area[576 + 16 * number..][..16]
            )?;
        }
        if case.window != [0; WINDOW] {
            writeln!(f, "  data at {:#x}: {:02x?}", layout::ARENA + u64::from(case.window_at), case.window)?;
        }
        write!(f, "{}", self.difference)
    }
}
