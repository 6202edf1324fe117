//! The walker and the translation cache against an independent model, and against random tables.

mod model;
mod random;
mod rights;
mod rules;
mod translated;
