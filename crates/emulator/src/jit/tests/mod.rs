//! Translated code against the interpreter.

mod blocks;
mod changing;
mod generator;
mod machine;
mod planted;
mod system;
