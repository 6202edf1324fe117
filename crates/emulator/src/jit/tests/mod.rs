//! Translated code against the interpreter.

mod blocks;
mod changing;
mod crossing;
mod flat;
mod generator;
mod machine;
mod planted;
mod strings;
mod system;
mod words;
