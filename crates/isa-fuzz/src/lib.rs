//! The software CPU against the host's processor: random instructions with random operands, executed once by each.
//!
//! A [`case::Case`] is one instruction with the whole state that it begins in, made by [`generate`] from a seed and its
//! number. The [`oracle`] lets a sandboxed child process execute it natively, in 64-bit code or in 32- and 16-bit
//! segments of its own; [`interpreter`] runs it on `emulator`'s processor, in the same address space with the same
//! descriptors. [`compare`] tells what differs: registers, RIP, defined flags, segments, data, vector state, or the
//! exception with its error code. What is not compared stands in [`exclusions`], with reasons.
//!
//! Whole programs come from [`blocks`]: the host runs them too, and [`machine`] interprets and translates them.
//!
//! The crate is a tool of the tests and of `cargo xtask fuzz-isa`; no part of Ringside depends on it.

pub mod blocks;
pub mod case;
pub mod compare;
pub mod coverage;
pub mod encode;
pub mod exclusions;
pub mod generate;
pub mod host;
pub mod interpreter;
pub mod layout;
pub mod machine;
pub mod minimize;
pub mod oracle;
pub mod random;
mod session;

pub use layout::Mode;
pub use session::{Config, Kind, Mismatch, Report, Session};
