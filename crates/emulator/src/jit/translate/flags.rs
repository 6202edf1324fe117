//! Where the guest's flags are while a block runs.
//!
//! An instruction leaves them in the host's flags. A probe of the translation cache overwrites those: before it, they
//! are saved to the frame, unless nobody reads them any more. Then it is enough to know how they follow from the
//! registers, should the probe's way to the handler be taken.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::Translator;
use crate::jit::assembler::{RAX, RSP, SCRATCH};
use crate::jit::frame::slot;
use crate::jit::recipe::{Operation, Recipe, Right};
use crate::jit::region::{Facts, Part, Region};

/// Where the guest's flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    /// In the frame alone.
    Frame,
    /// In the host's flags alone.
    Host,
    /// In both.
    Both,
    /// In the frame, or nowhere: the frame says how they follow from registers, as whoever led here has left them. Nobody
    /// reads them any more.
    Dynamic,
    /// Nowhere: they follow from registers, and nobody reads them any more. The number of a [`Recipe`], above zero.
    Recipe(u32),
}

impl Translator<'_> {
    /// Saves the flags to the frame, if they are only in the host's. Leaves those as they are.
    pub(super) fn save_flags(&mut self) {
        if self.at.flags != Flags::Host {
            return;
        }
        self.a.mov(SCRATCH, RAX);
        self.a.bytes.push(0x9f); // lahf
        self.a.memory(false, &[0x88], 4, RSP, slot::FLAGS); // mov [..], ah
        self.a.memory(false, &[0x0f, 0x90], 0, RSP, slot::FLAGS + 1); // seto [..]
        self.a.mov(RAX, SCRATCH);
        if std::mem::take(&mut self.at.stale) {
            self.set_recipe(0);
        }
        self.at.flags = Flags::Both;
    }

    /// At the end of a way to a join that does not need them: notes how they follow from registers, instead of saving them.
    pub(super) fn save_flags_for(&mut self, join: usize) {
        let recipe = self.at.recipe.filter(|_| self.at.flags == Flags::Host);
        match (recipe, self.dynamic[join]) {
            (Some(recipe), Some(kept)) if recipe.before().is_none() && recipe.needs & !kept == 0 => {
                let number = self.calls.recipe(recipe);
                self.set_recipe(number);
                (self.at.flags, self.at.stale) = (Flags::Recipe(number), false);
            }
            _ => self.save_flags(),
        }
    }

    /// `mov dword [recipe], number`: leaves the host's flags alone.
    pub(super) fn set_recipe(&mut self, number: u32) {
        self.a.memory(false, &[0xc7], 0, RSP, slot::RECIPE);
        self.a.bytes.extend_from_slice(&number.to_le_bytes());
    }

    /// Loads them into the host's.
    pub(super) fn load_flags(&mut self) {
        if self.at.flags != Flags::Frame {
            return;
        }
        self.a.mov(SCRATCH, RAX);
        self.a.memory(false, &[0x8a], 4, RSP, slot::FLAGS); // mov ah, [..]
        self.a.memory(false, &[0x8a], 0, RSP, slot::FLAGS + 1); // mov al, [..]
        self.a.bytes.extend_from_slice(&[0x04, 0x7f]); // add al, 0x7f: OF
        self.a.bytes.push(0x9e); // sahf
        self.a.mov(RAX, SCRATCH);
        self.at.flags = Flags::Both;
    }

    /// The host's flags are about to be overwritten, for an instruction that may go to its handler. What is left says
    /// where the handler finds the guest's.
    pub(super) fn give_up_flags(&mut self) {
        if self.at.flags == Flags::Host
            && let Some(recipe) = self.at.recipe.filter(|_| !self.keeps_flags)
            && self.is_enough(recipe, self.number)
        {
            self.at.flags = Flags::Recipe(self.calls.recipe(recipe));
            return;
        }
        self.save_flags();
        if self.at.flags == Flags::Both {
            self.at.flags = Flags::Frame;
        }
    }

    /// The host's flags are gone.
    pub(super) fn lose_flags(&mut self) {
        debug_assert!(self.at.flags != Flags::Host, "flags that are nowhere else");
        if self.at.flags == Flags::Both {
            self.at.flags = Flags::Frame;
        }
    }

    /// Whether a recipe serves all that follows: until the next instruction that overwrites the flags, nobody reads
    /// them, and the registers are what they were wherever a handler may be called.
    fn is_enough(&self, recipe: Recipe, from: usize) -> bool {
        let mut intact = true;
        // What the flags before a rotation need, and what those after it.
        let mut before = recipe.needs;
        if recipe.before().is_some() {
            before &= !(1 << (recipe.left & 15));
        }
        let mut needs = recipe.needs;
        let part = self.part();
        for (facts, insn) in part.facts.iter().zip(&part.insns).skip(from) {
            let rotation = rotation(insn).filter(|_| self.stubs.layout.bmi2);
            if facts.needs_flags && rotation.is_none() || facts.may_leave && !intact {
                return false;
            }
            if facts.sets_flags {
                return true;
            }
            if let Some((_, left)) = rotation {
                if before & facts.writes != 0 {
                    return false;
                }
                // A register that only the last rotation needed may have changed since.
                (needs, intact) = (before | 1 << (left & 15), true);
            } else {
                if facts.writes & before != 0 {
                    before = u16::MAX;
                }
                intact &= facts.writes & needs == 0;
            }
        }
        false
    }

    /// A rotation by an immediate, without the host's flags: they are somewhere else, and stay there.
    pub(super) fn rotation_without_flags(&mut self, i: &Instruction) -> Option<Instruction> {
        let (operation, left) = rotation(i).filter(|_| self.stubs.layout.bmi2 && !self.keeps_flags)?;
        let before = match self.at.flags {
            Flags::Frame => None,
            Flags::Recipe(number) => Some((number, *self.calls.get_recipe(number)?)),
            Flags::Host | Flags::Both | Flags::Dynamic => return None,
        };
        let size = i.op_register(0).size() as u8;
        let recipe = Recipe::rotated(operation, size, left, before);
        if !self.is_enough(recipe, self.number + 1) {
            return None;
        }
        self.at.flags = Flags::Recipe(self.calls.recipe(recipe));
        let code = if size == 8 { Code::VEX_Rorx_r64_rm64_imm8 } else { Code::VEX_Rorx_r32_rm32_imm8 };
        let bits = u32::from(size) * 8;
        let count = u32::from(i.immediate8()) % bits;
        let right = if operation == Operation::RotateRight { count } else { bits - count };
        Instruction::with3(code, i.op_register(0), i.op_register(0), right).ok()
    }

    /// How the flags follow from what an instruction has left behind, which ran with the host's.
    pub(super) fn recipe_after(&mut self, i: &Instruction) -> Option<Recipe> {
        let Some((operation, left)) = rotation(i) else { return recipe(i) };
        let before = self.at.recipe?;
        let number = self.calls.recipe(before);
        let size = i.op_register(0).size() as u8;
        (before.needs & 1 << (left & 15) == 0 || before.before().is_some_and(|_| before.left == left))
            .then(|| Recipe::rotated(operation, size, left, Some((number, before))))
    }
}

/// The joins that overwrite the flags before anybody needs them, as long as some registers are what they were where the
/// ways to them end: those registers.
pub fn dynamic_joins(region: &Region) -> Vec<Option<u16>> {
    let needs = |to: &Part| {
        let ways = region.parts.iter().filter(|part| part.successors.contains(&to.block.rip));
        let needs = ways.filter_map(last_recipe).fold(0, |needs, recipe| needs | recipe.needs);
        (to.join && needs != 0 && overwrites_flags(to, needs)).then_some(needs)
    };
    region.parts.iter().map(needs).collect()
}

/// How the flags at a part's end follow from registers.
fn last_recipe(part: &Part) -> Option<Recipe> {
    let last = part.facts.iter().rposition(|facts| facts.sets_flags)?;
    let recipe = recipe(&part.insns[last])?;
    let intact = |facts: &Facts| facts.writes & recipe.needs == 0;
    part.facts[last + 1..].iter().all(intact).then_some(recipe)
}

/// Whether a part overwrites the flags before it needs them, and no handler is called before that when one of these registers
/// has changed.
fn overwrites_flags(part: &Part, needs: u16) -> bool {
    let mut changed = false;
    for facts in &part.facts {
        if facts.needs_flags || facts.may_leave && changed {
            return false;
        }
        if facts.sets_flags {
            return true;
        }
        changed |= facts.writes & needs != 0;
    }
    false
}

/// A rotation of a 32- or 64-bit register by an immediate that is not zero: which, and the register.
fn rotation(i: &Instruction) -> Option<(Operation, u8)> {
    let operation = match i.mnemonic() {
        Mnemonic::Ror => Operation::RotateRight,
        Mnemonic::Rol => Operation::RotateLeft,
        _ => return None,
    };
    let register = i.op_register(0);
    let bits = register.size() as u8 * 8;
    let fits = i.op_kind(0) == OpKind::Register
        && i.op_kind(1) == OpKind::Immediate8
        && bits >= 32
        && !i.immediate8().is_multiple_of(bits);
    fits.then(|| (operation, register.full_register().number() as u8))
}

/// How the flags that an instruction sets follow from what it leaves behind.
fn recipe(i: &Instruction) -> Option<Recipe> {
    let operation = match i.mnemonic() {
        Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => Operation::Logic,
        Mnemonic::Test => Operation::Test,
        Mnemonic::Cmp => Operation::Compare,
        Mnemonic::Add => Operation::Add,
        Mnemonic::Sub => Operation::Subtract,
        _ => return None,
    };
    let register = |n: u32| {
        let register = i.op_register(n);
        let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
        (i.op_kind(n) == OpKind::Register && register.is_gpr() && !high)
            .then(|| register.full_register().number() as u8)
    };
    let left = register(0)?;
    let right = match i.op_kind(1) {
        OpKind::Register => Right::Register(register(1)?),
        OpKind::Memory if operation == Operation::Logic => Right::Immediate(0),
        kind if crate::instructions::shape::is_immediate(kind) => Right::Immediate(i.immediate(1)),
        _ => return None,
    };
    let changes = !matches!(operation, Operation::Test | Operation::Compare);
    let right = match right {
        // The result took its place.
        Right::Register(number) if changes && number == left && operation != Operation::Logic => return None,
        _ if operation == Operation::Logic => Right::Immediate(0),
        right => right,
    };
    Some(Recipe::new(operation, i.op_register(0).size() as u8, left, right))
}
