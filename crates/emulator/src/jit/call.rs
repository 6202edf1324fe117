//! What translated code calls: the handlers of single instructions.

use super::recipe::Recipe;
use crate::block::Map;

/// A place in translated code from which a handler is called.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The instruction, by its number among the vCPU's.
    pub insn: u32,
    /// Its block.
    pub block: u32,
    /// How to compute the flags; 0 where they are in the frame, [`DYNAMIC`] where that depends on the way that led here.
    /// See [`Calls::get_recipe`].
    pub recipe: u32,
    /// What the count of instructions lacks, of those before the block; negative where the block's are in it.
    pub pending: i32,
}

/// Instead of a recipe's number: it is in the frame.
pub const DYNAMIC: u32 = u32::MAX;

/// All of a vCPU's.
#[derive(Default)]
pub struct Calls {
    calls: Vec<Call>,
    recipes: Vec<Recipe>,
    numbers: Map<Recipe, u32>,
}

impl Calls {
    /// Notes a call. Gives its number.
    pub fn add(&mut self, call: Call) -> u32 {
        self.calls.push(call);
        self.calls.len() as u32 - 1
    }

    /// A call by its number.
    pub fn get(&self, number: u32) -> Call {
        self.calls[number as usize]
    }

    /// How many there are, and how much memory they take in bytes.
    pub fn counts(&self) -> (usize, usize) {
        (self.calls.len(), self.calls.capacity() * size_of::<Call>())
    }

    /// The number of a recipe, from 1.
    pub fn recipe(&mut self, recipe: Recipe) -> u32 {
        let recipes = &mut self.recipes;
        *self.numbers.entry(recipe).or_insert_with(|| {
            recipes.push(recipe);
            recipes.len() as u32
        })
    }

    /// The recipe of a number; `None` for 0.
    pub fn get_recipe(&self, number: u32) -> Option<&Recipe> {
        self.recipes.get(number.checked_sub(1)? as usize)
    }

    /// The flags by the recipe of a number; `frame` are those in the frame.
    pub fn flags(&self, number: u32, registers: &[u64; 16], frame: u64) -> u64 {
        let Some(recipe) = self.get_recipe(number) else { return frame };
        let before = match recipe.before() {
            // What is before a rotation is no rotation.
            Some(before) => self.get_recipe(before).map_or(frame, |before| before.flags(registers, frame)),
            None => 0,
        };
        recipe.flags(registers, before)
    }

    /// Forgets the last calls, of code that was not used.
    pub fn truncate(&mut self, calls: usize) {
        self.calls.truncate(calls);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}
