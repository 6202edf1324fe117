//! Memory operands near each other that one probe finds: those of instructions one behind the other with the same base
//! and index registers, as the fields of a structure are.
//!
//! The instructions are translated twice. With the probe's answer each operand is a displacement from it, nothing
//! overwrites the host's flags, and no handler is called. Where there is none, as the operands lie in two pages or may
//! not all be written to, a copy behind the code proper looks for each of them, and leads back.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpAccess, OpKind, Register};

use super::operand::{beside_stack, displacement, is_bit_string, is_on_stack};
use super::{At, Flags, Miss, NotCopied, Translator};
use crate::jit::flat;
use crate::jit::frame::{Home, STACK_OPERAND, home};
use crate::mmu::Access;

/// Bytes from the first operand's first to the last one's last, at most. The more, the more often they lie in two pages.
const MOST_BYTES: i64 = 256;
/// Instructions, at most.
const MOST_INSNS: usize = 32;

/// What is known of a memory operand's address besides its displacement.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    base: Register,
    index: Register,
    scale: u32,
    /// FS and GS have a base of their own.
    segment: Register,
}

/// Operands that one probe finds.
#[derive(Clone, Copy)]
struct Window {
    key: Key,
    /// The displacement where it begins, and the one where it ends.
    low: i64,
    high: i64,
    access: Access,
    /// The address of the displacement `aligned` must be a multiple of so many bytes.
    alignment: i64,
    aligned: i64,
    /// Instructions, of which so many have operands in it.
    insns: usize,
    members: usize,
}

/// The copy for where the probe has no answer.
pub struct Slow {
    misses: Vec<Miss>,
    /// The part, and its instructions' numbers.
    present: usize,
    first: usize,
    insns: usize,
    /// What is true before and behind the instructions, and where they end in the code proper.
    before: At,
    after: At,
    end: usize,
}

/// An instruction's memory operand.
struct Operand {
    key: Key,
    displacement: i64,
    size: i64,
    access: Access,
    alignment: i64,
}

impl Translator<'_> {
    /// Translates the instructions from the present one on whose operands one probe finds. Gives how many; none where there
    /// are not several.
    pub(super) fn windowed(&mut self, insns: &[Instruction]) -> usize {
        let first = self.number;
        let mut most = MOST_INSNS;
        while let Some(window) = self.window(&insns[..insns.len().min(most)], first) {
            let start = (self.a.here(), self.at, self.calls.counts().0);
            let tried = self.window_proper(&insns[..window.insns], window, first);
            self.window_low = None;
            match tried {
                Ok(slow) => {
                    self.slow.push(slow);
                    return window.insns;
                }
                // Without the one that has to be left to its handler.
                Err(good) => {
                    self.a.bytes.truncate(start.0);
                    self.at = start.1;
                    self.calls.truncate(start.2);
                    self.number = first;
                    most = good;
                }
            }
        }
        0
    }

    /// The code proper; or how many instructions can be copied.
    fn window_proper(&mut self, insns: &[Instruction], window: Window, first: usize) -> Result<Slow, usize> {
        self.give_up_flags();
        let before = self.at;
        // A multiple of the alignment begins the window.
        let low = window.low - (window.low - window.aligned).rem_euclid(window.alignment);
        let size = (window.high - low) as u32;
        let mut start = insns[0];
        start.set_memory_displacement64(low as u64);
        self.effective_address(&start, size).map_err(|NotCopied| 0usize)?;
        let mut misses = Vec::new();
        if window.alignment > 1 {
            misses.push(self.misaligned(window.alignment as u16).into());
        }
        misses.push(if is_on_stack(&start) && size <= STACK_OPERAND as u32 {
            self.probe_stack(window.access, size, beside_stack(&start))
        } else {
            self.probe(window.access, size).into()
        });
        self.window_low = Some(low);
        for (n, i) in insns.iter().enumerate() {
            self.number = first + n;
            self.computes(i).map_err(|NotCopied| n)?;
        }
        let (present, end, after) = (self.present, self.a.here(), self.at);
        Ok(Slow { misses, present, first, insns: insns.len(), before, after, end })
    }

    /// The copies, behind the code proper.
    pub(super) fn slow_copies(&mut self) {
        for slow in std::mem::take(&mut self.slow) {
            // The one on the stack, where there is one, goes on to what the others lead to.
            let (stack, others): (Vec<_>, Vec<_>) = slow.misses.iter().partition(|miss| miss.stack.is_some());
            stack.into_iter().chain(others).for_each(|&miss| self.missed(miss));
            (self.present, self.at) = (slow.present, slow.before);
            // Where the code proper ends with the flags in the host's, this has to have them.
            self.keeps_flags = matches!(slow.after.flags, Flags::Host | Flags::Both);
            let region = self.region;
            for (n, i) in
                region.parts[slow.present].insns.iter().enumerate().skip(slow.first).take(slow.insns)
            {
                self.number = n;
                self.instruction(i);
            }
            if std::mem::take(&mut self.keeps_flags) {
                self.load_flags();
                debug_assert!(matches!(self.at.flags, Flags::Host | Flags::Both), "{:?}", self.at.flags);
            } else {
                let (here, there) = (self.at.flags, slow.after.flags);
                let same = matches!((here, there), (Flags::Recipe(_), Flags::Recipe(_)));
                let in_frame = matches!((here, there), (Flags::Both, Flags::Frame));
                debug_assert!(here == there || same || in_frame, "{here:?} {there:?}");
            }
            let back = self.a.jump();
            self.a.land(back, slow.end);
        }
    }

    /// What one probe would find of the first instruction's operand and those of the next, where it is several.
    fn window(&mut self, insns: &[Instruction], first: usize) -> Option<Window> {
        let region = self.region;
        let facts = &region.parts[self.present].facts[first..];
        let start = self.operand(insns.first()?)?;
        let mut window = Window {
            key: start.key,
            low: start.displacement,
            high: start.displacement + start.size,
            access: start.access,
            alignment: start.alignment,
            aligned: start.displacement,
            insns: 1,
            members: 1,
        };
        let addressed = [start.key.base, start.key.index].into_iter().filter(|register| register.is_gpr());
        let addressed = addressed.fold(0, |all, register| all | 1u16 << register.full_register().number());
        for (n, i) in insns.iter().enumerate() {
            if n > 0 {
                let in_memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
                if in_memory && !matches!(i.mnemonic(), Mnemonic::Lea | Mnemonic::Nop) {
                    let Some(wider) = self.operand(i).and_then(|operand| window.with(&operand, n)) else {
                        break;
                    };
                    window = wider;
                } else if !self.leaves_address(i) {
                    break;
                }
            }
            if facts[n].writes & addressed != 0 {
                break;
            }
        }
        (window.members > 1).then_some(window)
    }

    /// An instruction's memory operand, where it may be one of a window's.
    fn operand(&mut self, i: &Instruction) -> Option<Operand> {
        let at = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory)?;
        let plain = (self.wide() || flat::reaches(i, self.source.mode))
            && !is_bit_string(i)
            && i.flow_control() == FlowControl::Next
            && !i.is_stack_instruction()
            && !matches!(i.mnemonic(), Mnemonic::Lea | Mnemonic::Nop | Mnemonic::Cmpxchg16b);
        let vector = self.vector_use(i).ok().filter(|_| plain)?;
        let (base, index) = (i.memory_base(), i.memory_index());
        let segment = match i.memory_segment() {
            segment @ (Register::FS | Register::GS) => segment,
            _ => Register::DS,
        };
        let reads = matches!(self.factory.info(i).op_access(at), OpAccess::Read | OpAccess::CondRead);
        let size = i.memory_size().size() as i64;
        (size > 0).then_some(())?;
        Some(Operand {
            key: Key { base, index, scale: i.memory_index_scale(), segment },
            displacement: i64::from(i32::try_from(displacement(i)).ok()?),
            size,
            access: if reads { Access::Read } else { Access::Write },
            alignment: vector.map_or(1, |vector| i64::from(vector.alignment)),
        })
    }

    /// Whether an instruction without a memory operand is copied without the register that has the probe's answer.
    fn leaves_address(&self, i: &Instruction) -> bool {
        let in_frame = |register: Register| {
            register.is_gpr() && matches!(home(register.full_register().number() as u8), Home::Frame(_))
        };
        match i.mnemonic() {
            Mnemonic::Nop => true,
            Mnemonic::Lea => {
                !in_frame(i.op_register(0)) && i.op_register(0).size() > 2 && !in_frame(i.memory_base())
            }
            _ => {
                i.flow_control() == FlowControl::Next
                    && !i.is_stack_instruction()
                    && self.vector_use(i).is_ok()
            }
        }
    }
}

impl Window {
    /// With another instruction's operand, the `n`th's.
    fn with(mut self, other: &Operand, n: usize) -> Option<Self> {
        let low = self.low.min(other.displacement);
        let high = self.high.max(other.displacement + other.size);
        let common = self.alignment.min(other.alignment);
        let agree = (self.aligned - other.displacement) % common == 0;
        if other.key != self.key || high - low > MOST_BYTES || !agree {
            return None;
        }
        if other.alignment > self.alignment {
            (self.alignment, self.aligned) = (other.alignment, other.displacement);
        }
        if other.access == Access::Write {
            self.access = Access::Write;
        }
        (self.low, self.high, self.insns, self.members) = (low, high, n + 1, self.members + 1);
        Some(self)
    }
}
