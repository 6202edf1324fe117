//! Where the guest's flags are while a block runs.
//!
//! An instruction leaves them in the host's flags. A probe of the translation cache overwrites those: before it, they
//! are saved to the frame, unless nobody reads them any more. Then it is enough to know how they follow from the
//! registers, should the probe's way to the handler be taken.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::Translator;
use crate::jit::assembler::{RAX, RSP, SCRATCH};
use crate::jit::frame::slot;
use crate::jit::recipe::{Operation, Recipe, Right};

/// Where the guest's flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    /// In the frame alone.
    Frame,
    /// In the host's flags alone.
    Host,
    /// In both.
    Both,
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
        self.at.flags = Flags::Both;
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
            && let Some(recipe) = self.at.recipe
            && self.is_enough(recipe)
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
    fn is_enough(&self, recipe: Recipe) -> bool {
        let mut intact = true;
        for facts in &self.part().facts[self.number..] {
            if facts.needs_flags || facts.may_leave && !intact {
                return false;
            }
            if facts.sets_flags {
                return true;
            }
            intact &= facts.writes & recipe.needs() == 0;
        }
        false
    }
}

/// How the flags that an instruction sets follow from what it leaves behind.
pub fn recipe(i: &Instruction) -> Option<Recipe> {
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
    Some(Recipe { operation, size: i.op_register(0).size() as u8, left, right })
}
